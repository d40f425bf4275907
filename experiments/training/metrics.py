"""The file of a run's metrics: lines of JSON that a kill or a resume leaves consistent."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax

from experiments.training.sealed import write_atomically


class MetricsLog:
    """A file of JSON lines, one dict a line, that a kill or a resume leaves consistent.

    Lines with a step above `after` are dropped, since a resume from there writes them again; a last line that
    a kill cut short goes too; every other line stays byte for byte. `seconds` counts the training time over
    all resumes; with `tokens_per_step` a line also says `tokens_per_second`, measured since the line before.
    Non-finite numbers are written as Python's `NaN` and `Infinity`.

    ```python
    with MetricsLog(run.metrics_path, after=int(state.step), tokens_per_step=32 * 150) as log:
        log.write(step + 1, metrics)
    ```
    """

    def __init__(self, path: Path, *, after: int, tokens_per_step: int | None = None):
        lines = _keep_lines(path, after)
        last = next(filter(_step, reversed(lines)), b"")
        self._tokens_per_step = tokens_per_step
        self._step, self._seconds = _step(last), _parse(last).get("seconds", 0.0)
        self._file = open(path, "a", encoding="utf-8")
        self._clock = time.perf_counter()

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Append and flush one line; waits for the metrics to be computed, and returns what it wrote."""
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        elapsed = now - self._clock
        line = {"step": step, "seconds": round(self._seconds + elapsed, 3), **values}
        if self._tokens_per_step is not None:
            line["tokens_per_second"] = round((step - self._step) * self._tokens_per_step / elapsed, 1)
        self._step, self._seconds, self._clock = step, self._seconds + elapsed, now
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return line

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def fingerprint(path: Path) -> dict[str, Any]:
    """What the file holds now, for a checkpoint to remember; synced to the disk."""
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    content = _content(path)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "steps": _steps(content)}


def what_is_lost(path: Path, before: dict[str, Any] | None) -> str | None:
    """What the file no longer holds of that which `fingerprint` found; None if all is there."""
    if before is None:  # a checkpoint of an earlier version
        return None
    content = _content(path)
    if hashlib.sha256(content[: before["bytes"]]).hexdigest() == before["sha256"]:
        return None
    missing = sorted(set(before["steps"]) - set(_steps(content)))
    if not missing:
        return "some of its lines have changed since the checkpoint was saved"
    some = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
    return f"the lines of {len(missing)} steps before the checkpoint are lost: {some}"


def last_step(path: Path) -> int:
    """The last step that the file has a line of; 0 if it has none."""
    return max(_steps(_content(path)), default=0)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _steps(content: bytes) -> list[int]:
    return [step for step in map(_step, content.splitlines()) if step]


def _keep_lines(path: Path, after: int) -> list[bytes]:
    content = _content(path)
    lines = content.splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= after]
    if len(kept) < len(lines):
        write_atomically(path, b"".join(kept))
    return kept


def _step(line: bytes) -> int:
    """The step of a line, 0 for one that has none."""
    step = _parse(line).get("step")
    return step if isinstance(step, int) else 0


def _parse(line: bytes) -> dict[str, Any]:
    # A line that is not one of ours says nothing, and is not ours to delete.
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    return {}
