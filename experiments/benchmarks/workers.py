"""Processes of the contenders and of the referee, and what counts as equal accuracy. It imports no library."""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[2]
RESIDUAL, GRADIENT = 1e-4, 1e-4  # equal accuracy: the largest residual of a problem, the error of the gradient
TIGHTER = 4  # tries, each at a third of the tolerances before, to bring a contender to the accuracy
HOPELESS = 3e-2  # a residual that no tolerance will mend


class Worker:
    """A process that answers commands; see `worker.py`. Threads may share it: it answers one at a time.

    `sizes` names the table of problems. `path` is searched after this repository, and no inherited PYTHONPATH is.
    """

    def __init__(self, python: str, kind: str, sizes: str, path: Sequence[Path] = ()):
        self._lock = threading.Lock()
        search = os.pathsep.join(map(str, (ROOT, *path)))
        environ = os.environ | {"PYTHONPATH": search, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [python, "-m", "experiments.benchmarks.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ, cwd=ROOT,
        )  # fmt: skip
        self.failed = self.ask("start", kind=kind, sizes=sizes).get("error")

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with self._lock:
            try:
                self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                line = ""
        return json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Asked(Protocol):
    """A worker, or what stands before one."""

    def ask(self, do: str, **options: Any) -> dict[str, Any]: ...


def judged(worker: Asked, contender: str, judge: Asked) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found.npz")
        answer = worker.ask("save", contender=contender, path=path)
        return answer if "error" in answer else judge.ask("judge", path=path)


def admitted(
    worker: Asked,
    judge: Asked,
    tries: int,
    rtol: float,
    backward: float,
    *,
    contender: str,
    count: bool,
    **options: Any,
) -> dict[str, Any]:
    """What was built and what the referee says of it, at the first tolerances of `tries` that are accurate enough."""
    found: dict[str, Any] = {}
    for _ in range(tries):
        options |= {"rtol": rtol, "backward": backward}
        found = worker.ask("build", contender=contender, count=count, **options)
        if "error" in found and count:  # perhaps of the callbacks that count
            found = worker.ask("build", contender=contender, count=False, **options)
        found |= {"rtol": rtol, "backward": backward}
        found |= {} if "error" in found else judged(worker, contender, judge)
        if "error" in found or good(found) or found["residual"] > HOPELESS:
            break
        rtol, backward = rtol / 3, backward / 3
    return found


def good(row: dict[str, Any]) -> bool:
    """Whether the referee found it accurate enough to be compared. NaN is not."""
    return row.get("residual", 1) <= RESIDUAL and row.get("gradient_error", 1) <= GRADIENT
