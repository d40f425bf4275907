"""What a run keeps: rows in one file a card, and an archive of caches and checkpoints for the next machine.

A part is a module that ends with `kept.main(measure)`. It runs as a process of its own, and `measure(rows, job)` writes
each row as soon as it has it, so that a part which is killed keeps what it has measured.
"""

import io
import json
import math
import os
import re
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PIECE = 15 * 10**6  # bytes: some machines give back small files only
CACHE = "cache"  # below the folder of work: JAX's compilation cache


class Job(NamedTuple):
    """What a part is told, as JSON on its command line."""

    results: str  # the card's file
    part: str
    stamp: dict[str, Any]  # code, card, JAX: rows of another stamp are out of date
    machine: dict[str, Any]
    work: str  # caches and checkpoints
    tiny: bool  # sizes that a test can afford; the numbers mean nothing
    args: list[str]


class Rows:
    """The rows of one part; each is in the card's file as soon as it is put.

    A row is a dict. One with `error` counts as measured: what a peer or a size raises is a result.
    """

    def __init__(self, path: Path, part: str, stamp: dict[str, Any], machine: dict[str, Any]):
        self._path, self._all = path, read(path)
        known = self._all["parts"].get(part)
        if known is None or known["stamp"] != stamp:
            known = {"stamp": stamp, "machine": machine, "done": False, "seconds": 0.0, "about": {}, "rows": {}}
        self._all["parts"][part] = self._part = known
        self._part.pop("error", None)
        self._before, self._began = known["seconds"], time.perf_counter()

    def about(self, **facts: Any) -> None:
        """Seed, dtype, gradient, precision: what holds for every row."""
        self._part["about"] = plain(facts)
        self._write()

    def __contains__(self, name: str) -> bool:
        return name in self._part["rows"]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._part["rows"][name]

    def put(self, name: str, row: dict[str, Any]) -> None:
        self._part["rows"][name] = plain(row)
        self._write()
        print(f"  {name}: {describe(row)}", flush=True)

    def measure(self, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Put what `measured()` gives, or what it raises, unless the row is there."""
        if name not in self:
            try:
                row = measured()
            except Exception as error:
                traceback.print_exc()
                row = failed(error)
            self.put(name, row)

    def finish(self, error: str | None = None) -> None:
        self._part |= {"error": error} if error else {"done": True}
        self._write()

    def _write(self) -> None:
        self._part["seconds"] = round(self._before + time.perf_counter() - self._began, 1)
        write(self._path, self._all)


def main(measure: Callable[[Rows, Job], None]) -> None:
    """Run a part as the process that `__main__` starts."""
    job = Job(**json.loads(sys.argv[1]))
    rows = Rows(Path(job.results), job.part, job.stamp, job.machine)
    try:
        measure(rows, job)
    except Exception as error:
        rows.finish(failed(error)["error"])
        raise
    rows.finish()


def failed(error: Exception) -> dict[str, str]:
    message = str(error).strip().splitlines() or [""]
    return {"error": f"{type(error).__name__}: {message[0][:200]}"}


def describe(row: dict[str, Any]) -> str:
    """One line; of what was timed inside a row, its milliseconds alone."""

    def short(value: Any) -> str:
        if isinstance(value, dict):
            return f"{short(value.get('ms'))} ms"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return row["error"] if "error" in row else ", ".join(f"{k} {short(v)}" for k, v in row.items())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(path: Path, content: dict[str, Any]) -> None:
    """At once or not at all: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """JSON of plain Python values: six digits, and None for what is not finite."""
    match value:
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def slug(card: str) -> str:
    """The card's name as the name of a file.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


# ---- the archive -------------------------------------------------------------------------------------------


def pack(work: Path, out: Path, cap: int) -> int:
    """Write `archive.0`, `archive.1`, … with at most `cap` bytes of the work; returns how many files are in it.

    Checkpoints of an unfinished part go first, all or none; of the compilation cache the newest entries.
    """
    files = {path: path.stat() for path in work.rglob("*") if path.is_file() and out not in path.parents}
    cached = [path for path in files if (work / CACHE) in path.parents]
    resumed = [path for path in files if path not in cached and not outdated(path)]
    room, chosen = cap, []
    if sum(files[path].st_size for path in resumed) <= room:
        chosen, room = resumed, room - sum(files[path].st_size for path in resumed)
    for path in sorted(cached, key=lambda path: -files[path].st_mtime):
        if files[path].st_size <= room:
            chosen.append(path)
            room -= files[path].st_size
    for old in out.glob("archive.*"):
        old.unlink()
    if not chosen:
        return 0
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:  # the entries are compressed already
        for path in chosen:
            tar.add(path, path.relative_to(work))
    content = buffer.getvalue()
    for number, start in enumerate(range(0, len(content), PIECE)):
        (out / f"archive.{number}").write_bytes(content[start : start + PIECE])
    return len(chosen)


def outdated(path: Path) -> bool:
    """Whether it belongs to a checkpoint beside which there is a later one."""
    folders = [folder for folder in path.parents if folder.parent.name == "checkpoints" and folder.name.isdigit()]
    steps = lambda folder: [int(other.name) for other in folder.parent.iterdir() if other.name.isdigit()]
    return any(int(folder.name) < max(steps(folder)) for folder in folders)


def unpack(out: Path, work: Path) -> int:
    """Restore what `pack` has kept, where there is no work yet; returns how many files that were."""
    pieces = sorted(out.glob("archive.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces or any(work.glob("*")):
        return 0
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        tar.extractall(work, filter="data")
        return len(tar.getmembers())
