"""Programs timed in turn, and the ratios that are told of them."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training import lm_step


def interleaved(
    programs: dict[str, Any], states: dict[str, Any], batch: Any, repeats: int
) -> dict[str, dict[str, Any]]:
    """Least and median seconds, on the clock and of the processor, and what the solver did. Steps are not kept."""
    clocks: dict[str, list] = {name: [] for name in programs}
    metrics: dict[str, Any] = {}
    for _ in range(repeats):
        for name, program in programs.items():
            own = jax.block_until_ready(jax.tree.map(jnp.copy, states[name]))  # a step donates its state
            before = time.perf_counter(), time.process_time()
            _, metrics[name] = jax.block_until_ready(program(own, batch))
            clocks[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    rows = {}
    for name, pairs in clocks.items():
        wall, cpu = zip(*pairs, strict=True)
        rows[name] = {"wall_min": min(wall), "wall_median": statistics.median(wall)}
        rows[name] |= {"cpu_min": min(cpu), "cpu_median": statistics.median(cpu)}
        # The solver runs until its slowest problem has stopped: that is what a step costs.
        if "fwd_steps_max" in metrics[name]:
            rows[name]["fwd_steps"] = float(metrics[name]["fwd_steps_max"])
        rows[name] |= lm_step.backward(metrics[name])
    return rows


def over(rows: dict[str, Any], name: str, base: str) -> str:
    least, middle = (rows[name][key] / rows[base][key] for key in ("cpu_min", "cpu_median"))
    return f"{least:.2f} ({middle:.2f})"
