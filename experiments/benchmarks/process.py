"""What every contender's process measures of itself, and what it leaves for the referee."""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def clock(run: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each run; `run` returns when its result is there."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def resident() -> int:
    """Bytes this process has ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def leave(path: str, z: Any, grads: dict[str, Any]) -> None:
    np.savez(path, z=z, **{f"grad_{name}": grad for name, grad in grads.items()})
