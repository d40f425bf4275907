"""Clocks of the parts that run JAX in their own process."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

CALLS = 20  # of which the least and the median are kept


def seconds(run: Callable[[], Any], calls: int = CALLS) -> list[float]:
    """Seconds of each call, its result awaited, after one that does not count."""
    times = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return times[1:]


def least_and_median(times: list[float]) -> tuple[float, float]:
    return min(times), statistics.median(times)
