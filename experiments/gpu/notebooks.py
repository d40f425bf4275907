"""The notebooks that train, in full on one GPU: a row holds the seconds, and the last lines that the notebook prints.

A notebook runs as its script, in a process of its own, and takes the sizes that it has for an accelerator.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.gpu import kept

ROOT = Path(__file__).parents[2]
LINES, WIDTH = 20, 200  # of what is printed


def measure(rows: kept.Rows, job: kept.Job) -> None:
    rows.about(seed="each notebook's own", dtype="float32", gradient="Implicit", precision="JAX's default")
    for name in job.args:
        rows.measure(name, lambda name=name: run(name, job.tiny))


def run(name: str, tiny: bool) -> dict[str, Any]:
    environ = {k: v for k, v in os.environ.items() if k != "DEQ_JAX_FAST"} | {"MPLBACKEND": "Agg"}
    environ |= {"DEQ_JAX_FAST": "1"} if tiny else {}
    (script,) = (ROOT / "colabs").glob(f"{name}_*.py")
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, script], env=environ, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    printed = [line[:WIDTH] for line in ran.stdout.splitlines() if line.strip()][-LINES:]
    return {"seconds": time.perf_counter() - began, "printed": printed}


if __name__ == "__main__":
    kept.main(measure)
