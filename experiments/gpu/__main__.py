"""What the library does on one GPU, in parts, within a budget of seconds: `make gpu`, or `python -m experiments.gpu`.

It needs JAX and no installation of this library. Each part is a process of its own with a time limit, and begins only
where its estimated seconds are left. Rows are written as they are measured; what is done for the same code, card and
version of JAX is not measured again, so the same command goes on where the last one stopped.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.gpu import kept, report

ROOT = Path(__file__).parents[2]
RESULTS = Path("experiments/gpu/results")
SPARE = 25.0  # seconds of the budget to stop a part, and for the archive and the page
GRACE = 10.0  # seconds that a part has to save what it can, once it is told to stop
LIBRARY = "deq_jax/**/*.py"
FAILED = "FAILED"


class Part(NamedTuple):
    name: str
    module: str
    seconds: float  # estimated, on an H100
    limit: float  # seconds after which it is stopped
    reads: tuple[str, ...]  # a change of these files makes its rows out of date
    args: tuple[str, ...] = ()


def own(module: str, *others: str) -> tuple[str, ...]:
    return (LIBRARY, f"experiments/gpu/{module}.py", *others)


PROBLEMS = tuple(f"experiments/shared/{name}.py" for name in ("jax_ops", "problems", "referee"))
RACE = own("peers", "experiments/benchmarks/*.py", "experiments/benchmarks/tuned.json", *PROBLEMS)
RUNTIME = ("experiments/paper/runtime*.py", "experiments/shared/models.py", "experiments/shared/timing.py")
LM = ("experiments/training/*.py",)
# The order is that of worth. A later issue adds its part here, and a module beside this one.
PARTS = (
    Part("steps", "experiments.gpu.steps", 120, 200, own("steps", "experiments/gpu/timing.py")),
    Part("peers_large", "experiments.gpu.peers", 240, 330, RACE, ("large",)),
    Part("paper", "experiments.gpu.paper", 110, 200, own("paper", *LM, *RUNTIME)),
    Part("ptb", "experiments.gpu.ptb", 240, 480, own("ptb", *LM)),
    Part("notebooks", "experiments.gpu.notebooks", 300, 480, own("notebooks", "colabs/0[23]_*.py"), ("02", "03")),
    Part("peers", "experiments.gpu.peers", 200, 300, RACE, ("usual",)),
    Part("core_tests", "experiments.gpu.core_tests", 300, 500, own("core_tests", "tests/**/*.py")),
)


def main(args: Sequence[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    """1 if a part failed. One that is stopped at its limit, or left for the next run, did not."""
    options, began = parse(args, parts), time.monotonic()
    environ = environment(options)
    machine = probe(environ, options.allow_cpu)
    if restored := kept.unpack(options.start, options.work):
        print(f"{restored} files of earlier runs restored", flush=True)
    out = options.out or (options.work / "results" if machine["platform"] == "cpu" else RESULTS)
    results = begin(out, options.start, machine)
    for name in options.again:
        forget(results, name)
    ended = []
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        run = Run(options, environ, machine, results, log, began)
        for part in parts:
            if part.name in (options.only or [part.name]):
                ended.append(attend(part, run))
                say(log, f"{part.name}: {ended[-1]}")
    report.write(results)
    print(f"{results}, {results.with_suffix('.md').name}, log.txt; {time.monotonic() - began:.0f} s", flush=True)
    return int(any(FAILED in end for end in ended))


class Run(NamedTuple):
    options: argparse.Namespace
    environ: dict[str, str]
    machine: dict[str, Any]
    results: Path  # the card's file
    log: IO[str]
    began: float

    @property
    def left(self) -> float:
        return max(self.options.seconds - SPARE - (time.monotonic() - self.began), 0.0)


def attend(part: Part, run: Run) -> str:
    """Run a part unless it is done, or has no time left; how it ended, in words."""
    tiny = run.machine["platform"] == "cpu"
    stamp = {"code": digest(part.reads), "card": run.machine["card"], "jax": run.machine["jax"], "tiny": tiny}
    before = kept.read(run.results)["parts"].get(part.name, {})
    same = before.get("stamp") == stamp
    if same and before["done"]:
        return "done before"
    # Rows that are there are not measured again.
    spent = before["seconds"] if same else 0.0
    needed = 1.0 if tiny else max(part.seconds - spent, part.seconds / 4)
    if needed > run.left:
        return f"left for the next run ({needed:.0f} s needed, {run.left:.0f} s left)"
    say(run.log, f"{part.name}: begins, about {needed:.0f} s of the {run.left:.0f} s left")
    work = str(run.options.work.resolve())
    job = kept.Job(str(run.results.resolve()), part.name, stamp, run.machine, work, tiny, list(part.args))
    began = time.monotonic()
    ended = watch(part, job, run)
    elapsed = time.monotonic() - began
    put_seconds(run.results, part.name, spent + elapsed)
    kept.pack(run.options.work, run.results.parent, int(1e6 * run.options.cap_mb))
    report.write(run.results)
    return f"{ended}, after {elapsed:.0f} s"


def parse(args: Sequence[str] | None, parts: tuple[Part, ...]) -> argparse.Namespace:
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser("python -m experiments.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="budget of the whole run")
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="these parts alone")
    parser.add_argument("--again", nargs="+", choices=names, default=[], help="forget the rows of these parts first")
    parser.add_argument("--out", type=Path, help=f"folder of results, log and archive (default {RESULTS})")
    parser.add_argument("--start", type=Path, default=RESULTS, help="where an empty --out finds what earlier runs kept")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of caches and checkpoints")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of pure Python: the peers, tyro")
    parser.add_argument("--data", type=Path, help="folder of corpora (default $DEQ_JAX_DATA)")
    parser.add_argument("--cap-mb", type=float, default=40.0, help="size of the archive, at most")
    parser.add_argument("--allow-cpu", action="store_true", help="without a GPU, try every part at tiny sizes")
    return parser.parse_args(args)


def environment(options: argparse.Namespace) -> dict[str, str]:
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *wheels(options.wheels), *inherited]),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_COMPILATION_CACHE_DIR": str((options.work / kept.CACHE).resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return environ | ({"DEQ_JAX_DATA": str(options.data.resolve())} if options.data else {})


def wheels(folder: Path | None) -> list[str]:
    return [str(path.resolve()) for path in sorted(folder.glob("*.whl"))] if folder else []


PROBE = """
import json, platform
import jax, jaxlib
device = jax.devices()[0]
print(json.dumps({
    "platform": "cpu" if device.platform == "cpu" else "gpu", "card": device.device_kind, "jax": jax.__version__,
    "jaxlib": jaxlib.__version__, "python": platform.python_version(), "runtime": device.client.platform_version,
    "devices": len(jax.devices()),
}))
"""


def probe(environ: dict[str, str], allow_cpu: bool) -> dict[str, Any]:
    """What JAX sees, asked in a process that ends: one that had initialized the GPU would hold its memory."""
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise SystemExit(f"error: JAX does not start under {sys.executable}: {reason}. Name a Python that has it:"
                         " make gpu GPU_PYTHON=...")  # fmt: skip
    machine = json.loads(ran.stdout.splitlines()[-1]) | {"cores": os.cpu_count(), "commit": commit()}
    if machine["platform"] == "cpu" and not allow_cpu:
        raise SystemExit(f"error: jax {machine['jax']} sees no GPU here, only {machine['card']}; with --allow-cpu"
                         " every part is tried at tiny sizes, and its numbers mean nothing")  # fmt: skip
    print(
        f"{machine['card']}; jax {machine['jax']}, Python {machine['python']}, commit {machine['commit']}", flush=True
    )
    return machine


def commit() -> str:
    """For the reader: what decides is the digest of the code, which a commit of results leaves as it is."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def digest(globs: Iterable[str]) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in globs for path in ROOT.glob(pattern)}):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def begin(out: Path, start: Path, machine: dict[str, Any]) -> Path:
    """The card's file in `out`, with what earlier runs left in `start`."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{kept.slug(machine['card'])}.json"
    if not results.exists() and (start / results.name).exists():
        shutil.copy(start / results.name, results)
    kept.write(results, {"card": machine["card"]} | kept.read(results))
    return results


def forget(results: Path, name: str) -> None:
    content = kept.read(results)
    content["parts"].pop(name, None)
    kept.write(results, content)


def put_seconds(results: Path, name: str, seconds: float) -> None:
    """The whole time of a part; it has written that of its last row itself, unless it came to none."""
    content = kept.read(results)
    if name in content["parts"]:
        content["parts"][name]["seconds"] = round(seconds, 1)
        kept.write(results, content)


def say(log: IO[str], line: str) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def watch(part: Part, job: kept.Job, run: Run) -> str:
    """Run a part to its end or its limit. It and all processes that it started are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", part.module, json.dumps(job._asdict())],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=run.environ, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=pass_on, args=[process.stdout, run.log])
    reader.start()
    try:
        with terminating():
            process.wait(min(part.limit, run.left))
        ended = "done" if process.returncode == 0 else f"{FAILED} with code {process.returncode}; the log says why"
    except subprocess.TimeoutExpired:
        ended = "stopped at its limit; its rows are kept"
    finally:
        stop(process)
        reader.join(GRACE)
    return ended


def pass_on(lines: IO[str], log: IO[str]) -> None:
    with lines:
        for line in lines:
            say(log, line.rstrip())


class terminating:
    """SIGTERM as SystemExit, so that a run which is ended takes its part's processes along."""

    def __enter__(self) -> None:
        def leave(signum: int, frame: Any) -> None:
            raise SystemExit(128 + signum)

        self.before = signal.signal(signal.SIGTERM, leave)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)


def stop(process: subprocess.Popen) -> None:
    for signum, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    raise SystemExit(main())
