"""Ours against every peer on the same work: `python -m experiments.benchmarks`, or `make bench`."""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks import report
from experiments.benchmarks.contenders import ALTERNATIVES, CONTENDERS, Contender
from experiments.benchmarks.workers import HOPELESS, RESIDUAL, ROOT, TIGHTER, Worker, admitted, good, judged
from experiments.shared import problems
from experiments.training.environment import environment

TUNED = Path(__file__).with_name("tuned.json")
TOO_LONG = 60.0  # seconds of a trial, compilation included, after which a contender's tolerances are not sought
OUTRUN = 10.0  # times the fastest step: whoever takes longer is visited in the first two rounds only
PEERS = ("torchdeq", "jaxopt", "optimistix", "banax")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time, memory and evaluations of ours and of each peer at equal accuracy, and how far both are from the limit.

        make bench                                                    # an hour and a half on one core
        python -m experiments.benchmarks --problems P1 P3 --rounds 2  # a look, a few minutes
        python -m experiments.benchmarks --tune                       # seek every contender's tolerances anew

    Every contender runs at the tolerances of `tuned.json`, where `--tune` has left the loosest, on a grid of thirds,
    that still meet the referee's bar. They are judged again in each run, and whoever misses the accuracy gets a third
    of them, and again. You should see one line a contender, and the bars at the end.
    """

    problems: tuple[str, ...] = ("P1", "P2", "P3", "P4", "P5", "P6")
    only: tuple[str, ...] = ()  # contenders by the beginnings of their names, as in the table
    rounds: int = 5  # visits to each contender, in an order drawn anew each time
    budget_ms: float = 1000.0  # what a visit may take, where more than one run fits
    alternatives: bool = True  # also time backpropagation through the iterations, on P6
    tune: bool = False
    tiny: bool = False  # problems that a test can afford; the numbers mean nothing
    seed: int = 0
    peers: Path = Path(".venv-peers/bin/python")  # the environment of the peers
    out: Path = Path("experiments/benchmarks/results/peers")


def main(config: Config) -> dict[str, Any]:
    out = ROOT / config.out
    out.mkdir(parents=True, exist_ok=True)
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    results: dict[str, Any] = environment() | {"seed": config.seed, "dtype": "float32", "rounds": config.rounds}
    results["peers"], results["problems"] = installed(config), {}
    print(f"{results['machine']['processor']}, {results['machine']['cores']} cores; peers: {results['peers']}")
    for problem in config.problems:
        began = time.perf_counter()
        if config.tune:
            tuned[problem] = tuned.get(problem, {}) | tune(config, problem)
            TUNED.write_text(json.dumps(tuned, indent=1) + "\n")
            continue
        results["problems"][problem] = measure(config, problem, tuned.get(problem, {}))
        print(f"{problem}: {time.perf_counter() - began:.0f} s", flush=True)
        report.write(results, out)  # after each problem, so that an interrupted run leaves what it has
    if not config.tune:
        print((out / "table.md").read_text())
    return results


def installed(config: Config) -> dict[str, str]:
    """The versions of the peers, or why there is none."""
    python = ROOT / config.peers
    if not python.exists():
        return dict.fromkeys(PEERS, "not installed: no environment of the peers")
    script = (
        "import importlib.metadata as m, json, sys\n"
        "def version(p):\n  try: return m.version(p)\n"
        "  except m.PackageNotFoundError: return 'not installable here'\n"
        "print(json.dumps({p: version(p) for p in sys.argv[1:]}))"
    )
    run = subprocess.run([python, "-c", script, *PEERS, "jax", "torch"], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def chosen(config: Config, problem: str) -> dict[str, Contender]:
    """Those that take part: named in `only`, meant for this problem, and with their package at hand."""
    here = lambda name: not config.only or name.startswith(config.only)
    at_hand = {p for p, version in installed(config).items() if version[:1].isdigit()} | {"deq_jax", "equinox"}
    return {
        name: c for name, c in CONTENDERS.items()
        if here(name) and problem in c.problems and c.package in at_hand
        and (config.alternatives or name not in ALTERNATIVES)
    }  # fmt: skip


@contextlib.contextmanager
def workers(config: Config, names: dict[str, Contender]) -> Iterator[dict[str, Worker]]:
    """A process for each package, by contender."""
    processes = {package: start(config, package) for package in sorted({c.package for c in names.values()})}
    try:
        yield {name: processes[contender.package] for name, contender in names.items()}
    finally:
        for process in processes.values():
            process.close()


def start(config: Config, package: str) -> Worker:
    python = ROOT / config.peers if package in PEERS else Path(sys.executable)
    return Worker(str(python), "torch" if package == "torchdeq" else "jax", sizes(config))


def sizes(config: Config) -> str:
    return "tiny" if config.tiny else "usual"


@contextlib.contextmanager
def referee(config: Config, problem: str) -> Iterator[tuple[Worker, float]]:
    """The referee's process, and the norm of the solution that it found."""
    process = Worker(sys.executable, "referee", sizes(config))
    try:
        answer = process.ask("solve", problem=problem)
        if "error" in answer:
            raise RuntimeError(f"the referee failed on {problem}: {answer['error']}")
        yield process, answer["scale"]
    finally:
        process.close()


def measure(config: Config, problem: str, tuned: dict[str, list[float]]) -> dict[str, Any]:
    """Build, count, judge, then time all contenders of one problem in turn."""
    names = chosen(config, problem)
    rows: dict[str, dict[str, Any]] = {name: {"package": c.package} for name, c in names.items()}
    times: dict[tuple[str, str], list[float]] = {}
    with workers(config, names) as processes:
        with referee(config, problem) as (judge, scale):
            for name, process in processes.items():
                row, tolerances = rows[name], tuned.get(name, [1e-4, 1e-5])
                if tolerances is None:
                    rows[name] = row | {"error": "misses the accuracy at every tolerance"}
                    continue
                tries = 1 if name in ALTERNATIVES else TIGHTER
                options = dict(problem=problem, contender=name, scale=scale, count=name not in ALTERNATIVES)
                row |= admitted(process, judge, tries, *tolerances, **options)
                rows[name] = row
                print(f"  {problem} {name}: {describe(row)}", flush=True)
        limit = start(config, "deq_jax")
        bytes_of = limit.ask("limit", problem=problem)
        visits = [(limit, ("limit", what)) for what in ("t_f", "t_vjp", "t_params")]
        visits += [(processes[n], (n, w)) for n, row in rows.items() if "error" not in row for w in ("forward", "step")]
        order = random.Random(config.seed)
        for done in range(config.rounds):
            if done == 2:
                steps = {key[0]: min(ms) for key, ms in times.items() if key[1] == "step"}
                outrun = {name for name, ms in steps.items() if ms > OUTRUN * min(steps.values())}
                visits = [visit for visit in visits if visit[1][0] not in outrun]
            order.shuffle(visits)
            for process, key in visits:
                known = min(times.get(key, [config.budget_ms]))
                repeats = max(1, min(20, int(config.budget_ms / (8 * known))))
                answer = process.ask("time", contender=key[0], what=key[1], repeats=repeats)
                times.setdefault(key, []).extend(answer["ms"])
        limit.close()
    for name, row in rows.items():
        for what in ("forward", "step"):
            if (name, what) in times:
                row[what] |= {
                    "ms": min(times[name, what]),
                    "median_ms": sorted(times[name, what])[len(times[name, what]) // 2],
                }
    parts = {what: min(times["limit", what]) / 20 for what in ("t_f", "t_vjp", "t_params")}
    what = problems.TABLES[sizes(config)][problem]().what
    return {"what": what, "limit": parts | bytes_of, "contenders": rows}


def describe(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return f"residual {row['residual']:.1e}, gradient error {row['gradient_error']:.1e}" + (
        "" if good(row) else " MISSES"
    )


def tune(config: Config, problem: str) -> dict[str, list[float] | None]:
    """The loosest tolerances of each contender, on a grid of thirds, at which the referee is content."""
    found: dict[str, list[float] | None] = {}
    names = {n: c for n, c in chosen(config, problem).items() if n not in ALTERNATIVES}
    with referee(config, problem) as (judge, scale), workers(config, names) as processes:
        for name, process in processes.items():

            def verdict(rtol, backward, process=process, name=name):
                began = time.perf_counter()
                options = dict(problem=problem, contender=name, rtol=rtol, backward=backward, scale=scale)
                answer = process.ask("build", count=False, **options)
                answer = answer if "error" in answer else judged(process, name, judge)
                if time.perf_counter() - began > TOO_LONG:
                    raise TimeoutError
                return answer

            try:
                found[name] = loosest(verdict)
            except TimeoutError:  # it is out of the race at any tolerance
                found[name] = [1e-5, 1e-5]
            print(f"  {problem} {name}: {found[name]}", flush=True)
    return found


def loosest(verdict: Any) -> list[float] | None:
    rtol, backward = 1e-4, 1e-4
    trial = verdict(rtol, backward)
    if "error" in trial:  # the table will show it
        return [rtol, backward]
    if trial.get("residual", 1) > HOPELESS:  # hopeless, unless its test is of another thing
        rtol, backward = 1e-6, 1e-6
        trial = verdict(rtol, backward)
        if not good(trial):
            return None
        return [rtol, backward]
    while trial.get("residual", 1) > RESIDUAL and rtol > 1e-7:
        rtol /= 3
        trial = verdict(rtol, backward)
    turn = 0
    while not good(trial):  # the gradient's error has two sources
        if min(rtol, backward) < 1e-7 or "error" in trial:
            return None
        rtol, backward = (rtol, backward / 3) if turn % 2 == 0 else (rtol / 3, backward)
        turn += 1
        trial = verdict(rtol, backward)
    for which in ("backward", "rtol"):
        while True:
            looser = (rtol, backward * 3) if which == "backward" else (rtol * 3, backward)
            if max(looser) > 1e-2 or not good(verdict(*looser)):
                break
            rtol, backward = looser
    return [rtol, backward]


if __name__ == "__main__":
    main(tyro.cli(Config, description=Config.__doc__))
