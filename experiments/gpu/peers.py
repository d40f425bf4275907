"""P1 to P6 against every peer at equal accuracy: the benchmark's problems, contenders and referee, on the GPU.

Fewer contenders than `make bench`, one process a library. All contenders of a problem are compiled at the same time,
and timed alone when the last is ready. float32 without TF32, in JAX and in PyTorch alike.
"""

import json
import os
import statistics
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import workers
from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.workers import Worker
from experiments.gpu import kept

# The fastest of ours and of each library in experiments/benchmarks/results/peers, with one that accelerates.
CHOSEN: dict[str, tuple[str, ...]] = {
    "P1": (
        "ours Picard, Picard", "ours Anderson 5", "jaxopt Anderson", "banax Picard", "optimistix Picard",
        "torchdeq Picard",
    ),
    "P3": (
        "ours Anderson 5, test 3", "ours Anderson 5", "ours Anderson 8", "jaxopt Anderson", "banax Anderson",
        "torchdeq Anderson",
    ),
    "P2": (
        "ours Anderson 8", "ours Anderson 5", "jaxopt Anderson", "banax Anderson", "optimistix Picard",
        "torchdeq Picard",
    ),
    "P6": (
        "ours Anderson 5", "ours Anderson 8", "jaxopt Anderson", "banax Anderson, Picard", "optimistix Picard",
        "torchdeq Picard",
    ),
    "P4": (
        "ours Anderson 2, test 8", "ours Picard, compact", "ours Picard, test 6", "jaxopt Anderson", "banax Picard",
        "optimistix Picard, vmap", "torchdeq Picard",
    ),
    "P5": (
        "ours Anderson 5", "ours Anderson 3", "jaxopt Anderson", "banax Anderson", "optimistix Picard",
        "torchdeq Picard",
    ),
}  # fmt: skip
ABSOLUTE = ("jaxopt", "optimistix")  # their tolerance is absolute, so they wait for the norm of the solution
TUNED = Path(workers.__file__).with_name("tuned.json")
CALLS, SLOW_CALLS, SLOW_MS = 20, 5, 250.0
PARTS = ("t_f", "t_vjp", "t_params")
LOOPS = 20  # of each part in one call; see `jax_side.parts`


def measure(rows: kept.Rows, job: kept.Job) -> None:
    sizes = "tiny" if job.tiny else job.args[0]
    rows.about(
        sizes=sizes, seed="each problem's own", dtype="float32", gradient="implicit", precision="highest, no TF32"
    )
    # Before any process starts: several share the card, and NVIDIA's libraries use TF32 for float32 convolutions.
    os.environ |= {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    problems = {p: [n for n in names if f"{p} {n}" not in rows] for p, names in CHOSEN.items()}
    if job.tiny:
        problems = {p: problems[p] for p in ("P1", "P3")}
    packages = {CONTENDERS[name].package for names in problems.values() for name in names}
    with Processes(packages | {"deq_jax"}, sizes) as processes:
        for problem, names in problems.items():
            if names or f"{problem} limit" not in rows:
                race(rows, processes, problem, names)


class Processes:
    """A process a library, and the referee's."""

    def __init__(self, packages: set[str], sizes: str):
        path = [Path(place) for place in os.environ["PYTHONPATH"].split(os.pathsep)]  # the wheels are on it
        kinds = {p: "torch" if p == "torchdeq" else "jax" for p in packages} | {"referee": "referee"}
        begin = lambda kind: Worker(sys.executable, kind, sizes, path)
        with ThreadPoolExecutor(len(kinds)) as pool:
            self.of = dict(zip(kinds, pool.map(begin, kinds.values()), strict=True))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self.of.values():
            process.close()


def race(rows: kept.Rows, processes: Processes, problem: str, names: list[str]) -> None:
    """Build and judge all contenders of a problem side by side; then time each alone, and put its row."""
    tuned = json.loads(TUNED.read_text())[problem]
    ours, built = processes.of["deq_jax"], {}
    with ThreadPoolExecutor(len(processes.of) + 1) as pool:
        judge = Judge(processes.of["referee"], pool.submit(processes.of["referee"].ask, "solve", problem=problem))

        def build(package: str) -> None:
            for name in names:
                if CONTENDERS[name].package == package:
                    built[name] = admitted(processes.of[package], judge, problem, name, tuned.get(name))

        tasks = [pool.submit(build, package) for package in sorted({CONTENDERS[n].package for n in names})]
        limit = pool.submit(ours.ask, "limit", problem=problem)
        for task in tasks:
            task.result()
    if f"{problem} limit" not in rows:
        rows.put(f"{problem} limit", limit.result() | timed(ours, "limit", PARTS, LOOPS))
    for name in names:
        row = {"package": CONTENDERS[name].package} | built[name]
        if "error" not in row:
            times = timed(processes.of[row["package"]], name, ("forward", "step"))
            row = times if "error" in times else row | {what: row[what] | times[what] for what in times}
        rows.put(f"{problem} {name}", row)


class Judge(NamedTuple):
    """The referee, whose answers wait for its own solution."""

    worker: Worker
    solved: Future

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        answer = self.solved.result()
        return answer if "error" in answer else self.worker.ask(do, **options)


def admitted(worker: Worker, judge: Judge, problem: str, name: str, tolerances: list[float] | None) -> dict[str, Any]:
    """Built at the loosest tolerances that the referee accepts, from those that `make bench --tune` found on."""
    if worker.failed:
        return {"error": worker.failed}
    if tolerances is None:
        return {"error": "misses the accuracy at every tolerance on the CPU"}
    answer = judge.solved.result() if CONTENDERS[name].package in ABSOLUTE else {"scale": 0.0}
    if "error" in answer:
        return answer
    options = dict(problem=problem, contender=name, scale=answer["scale"], count=False)
    return workers.admitted(worker, judge, workers.TIGHTER, *tolerances, **options)


def timed(worker: Worker, contender: str, what: tuple[str, ...], loops: int = 1) -> dict[str, Any]:
    """The least and the median milliseconds of each of `what`, and of how many calls."""
    found = {}
    for each in what:
        ask = lambda repeats, each=each: worker.ask("time", contender=contender, what=each, repeats=repeats)
        trial = ask(2)
        if "error" in trial:
            return trial
        answer = ask(CALLS if min(trial["ms"]) < SLOW_MS else SLOW_CALLS)
        if "error" in answer:
            return answer
        ms = [value / loops for value in answer["ms"]]
        found[each] = {"ms": min(ms), "median_ms": statistics.median(ms), "calls": len(ms)}
    return found


if __name__ == "__main__":
    kept.main(measure)
