"""Does a mesh change what is trained? The same run on every mesh of 1, 2, 4 and 8 simulated devices.

    python -m experiments.studies.meshes    # 10 minutes on two cores; writes results/meshes

A mesh is a factorization of the devices into (data, fsdp, model, seq). Each trains 50 steps of a small DEQ-Transformer
on Shakespeare, with dropout, and is compared with one device: the losses, and the steps of both solves. Once with plain
iteration to 1e-4; and once with the default, Anderson to 1e-2, whose combination depends on the last digits.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import tyro

import deq_jax as deq
from experiments.shared.plots import markdown_table
from experiments.training import data, lm_train
from experiments.training.environment import environment
from experiments.training.lm_model import Config as Training
from experiments.training.mesh import AXES
from experiments.training.sealed import write_atomically

RESULTS = Path(__file__).parent / "results/meshes"
CLOSELY = deq.Picard(rtol=1e-4, max_steps=100)
SOLVERS: dict[str, dict[str, Any]] = {"Picard": {"solver": CLOSELY, "adjoint": deq.Implicit(CLOSELY)}, "Anderson": {}}


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 50
    counts: tuple[int, ...] = (1, 2, 4, 8)  # of devices
    solvers: tuple[str, ...] = tuple(SOLVERS)
    out: Path = RESULTS
    here: bool = False  # in this process, which has so many devices; its lines are printed as JSON


def main(config: Config = Config()) -> None:  # noqa: B008
    if config.here:
        for solver in config.solvers:
            for mesh in meshes(jax.device_count()):
                print(json.dumps({"solver": solver, "mesh": mesh} | run(mesh, solver, config.steps)), flush=True)
        return
    config.out.mkdir(parents=True, exist_ok=True)
    rows = [row for count in config.counts for row in on_devices(count, config)]
    write_atomically(config.out / "meshes.json", (json.dumps(environment() | {"rows": rows}, indent=1) + "\n").encode())
    text = report(rows)
    write_atomically(config.out / "meshes.md", (text + "\n").encode())
    print(text)


def meshes(count: int) -> list[str]:
    """Every factorization of so many devices, as `--mesh` takes it."""
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    found = (each for each in itertools.product(sizes, repeat=len(AXES)) if math.prod(each) == count)
    return [",".join(f"{name}={size}" for name, size in zip(AXES, each, strict=True)) for each in found]


def on_devices(count: int, config: Config) -> list[dict[str, Any]]:
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "experiments.studies.meshes", "--here", "--steps", str(config.steps)]
    ended = subprocess.run(
        [*command, "--solvers", *config.solvers],
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = ended.stdout.decode().splitlines()
    return [{"devices": count} | json.loads(line) for line in lines if line.startswith('{"solver"')]


def run(mesh: str, solver: str, steps: int) -> dict[str, list[float]]:
    """Loss and steps of the solves, at each step."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, text = data.load("shakespeare"), Path(folder) / "text.txt"
        text.write_text(corpus.vocabulary.decode(corpus.train[:20_000]))
        training = Training(
            run=Path(folder) / "run", data=str(text), mesh=mesh, steps=steps, batch=8, length=16, mem_len=16, dim=32,
            heads=8, inner_dim=64, dropout=0.1, log_every=1, eval_every=steps + 1, save_every=steps, **SOLVERS[solver],
        )  # fmt: skip
        lm_train.train(training)
        lines = [json.loads(line) for line in (training.run / "metrics.jsonl").read_text().splitlines()]
    return {name: [line.get(name, 0.0) for line in lines] for name in ("loss", "fwd_steps", "bwd_steps")}


def report(rows: list[dict[str, Any]]) -> str:
    """A line for each number of devices and solver: the worst of its meshes."""
    lines = []
    groups = itertools.groupby(
        sorted(rows, key=lambda r: (r["solver"], r["devices"])), lambda r: (r["solver"], r["devices"])
    )
    for (solver, count), group in groups:
        (one,) = (row for row in rows if row["solver"] == solver and row["devices"] == 1)
        group = list(group)
        last = max((abs(row["loss"][-1] / one["loss"][-1] - 1), row["mesh"]) for row in group)
        ever = max(abs(a / b - 1) for row in group for a, b in zip(row["loss"], one["loss"], strict=True))
        other = [
            sum(row[name][k] != one[name][k] for name in ("fwd_steps", "bwd_steps") for k in range(len(one["loss"])))
            for row in group
        ]
        solves = 2 * len(one["loss"])
        lines.append([solver, count, len(group), f"{last[0]:.1e}", last[1], f"{ever:.1e}", f"{max(other)} of {solves}"])
    head = ["solver", "devices", "meshes", "loss at the end", "on", "loss, any step", "solves of other mean steps"]
    note = "Relative differences from one device; the worst mesh of each row. python -m experiments.studies.meshes"
    return "\n".join([*markdown_table(head, lines), "", note])


if __name__ == "__main__":
    main(tyro.cli(Config))
