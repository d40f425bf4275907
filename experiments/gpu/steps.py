"""Microseconds of one step of each solver, beside a bare loop with a test of convergence and the copy bandwidth.

f is one multiply-add, so a step costs what the solver itself costs. The step is the slope of a line through two solves,
of N and of 2 N forced evaluations, so that starting the loop does not count; N is 100, or less where that takes too
long. Every program runs as JAX compiles it, and once more as one whose loops may run on the device (command buffers).
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

import deq_jax as deq
from experiments.gpu import kept, timing

SIZES = ((64, 512), (4096, 32), (4096, 1024), (16384, 4096))
TINY = ((4, 16),)
FEW = 2**26  # from this many numbers in a state on, fewer solvers, and no second compilation
SOLVERS: dict[str, Any] = {
    "Picard": deq.Picard(),
    "Picard, test 6": deq.Picard(test_every=6),
    "Anderson 5": deq.Anderson(history=5),
    "Anderson 5, test 3": deq.Anderson(history=5, test_every=3),
    "Anderson 8": deq.Anderson(history=8),
    "Anderson 16": deq.Anderson(history=16),
    "Broyden 20": deq.Broyden(rank=20),
}
LARGE = ("Picard", "Anderson 5", "Anderson 8")
TRIED = ("Picard", "Anderson 5, test 3")  # at a tiny size
BFLOAT16 = "Anderson 5, bfloat16"
DEVICE_LOOPS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL"}
WAYS: dict[str, dict[str, Any] | None] = {"plain": None, "command buffers": DEVICE_LOOPS}
STEPS, SECONDS = 100, 2.5  # N, and what all calls of a row may take
THREADS = 8  # that compile


def measure(rows: kept.Rows, job: kept.Job) -> None:
    rows.about(seed=0, dtype="float32", gradient="none", precision="no matrix product in f", f="slope * z + 1")
    rows.measure("copy", lambda: copy_bandwidth(job.tiny))
    for size in TINY if job.tiny else SIZES:
        state, found = start(*size), programs(*size, TRIED if job.tiny else tuple(SOLVERS))
        missing = {name: lowered for name, lowered in found.items() if f"{label(size)} {name}" not in rows}
        with ThreadPoolExecutor(THREADS) as pool:  # all are compiled before the first is timed
            tasks = {name: pool.submit(compiled, *lowered, state) for name, lowered in missing.items()}
        for name, task in tasks.items():
            rows.measure(f"{label(size)} {name}", lambda task=task: per_step(task.result(), state, job.tiny))


def label(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def start(batch: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """z and the slopes: 1 less than 1 by 1e-4 to 2, so that no solver here is done, or gives up, in 200 steps."""
    key, other = jax.random.split(jax.random.key(0))
    slope = 1 - 10 ** jax.random.uniform(other, (batch, dim), minval=-4.0, maxval=0.3)
    return jax.random.normal(key, (batch, dim)), slope


def programs(batch: int, dim: int, solvers: tuple[str, ...]) -> dict[str, tuple[Callable, Any, dict[str, Any] | None]]:
    """(function, dtype, options of the compiler) by name and way."""
    large = batch * dim >= FEW
    functions: dict[str, tuple[Callable, Any]] = {"bare loop": (bare_loop, jnp.float32)}
    for name in LARGE if large else solvers:
        functions[name] = (solve_with(SOLVERS[name]), jnp.float32)
    if batch * dim >= 2**22:
        functions[BFLOAT16] = (solve_with(SOLVERS["Anderson 5"]), jnp.bfloat16)
    ways = {"plain": None} if large else WAYS
    return {f"{name}, {way}": (*f, ways[way]) for way in ways for name, f in functions.items()}


def solve_with(solver: Any) -> Callable:
    def solve(z, slope, budget):
        forced = dataclasses.replace(solver, rtol=0.0, max_steps=budget)  # traced: one program for N and 2 N
        value, stats, *_ = deq.solve(lambda z: slope * z + 1, z, solver=forced, batch_ndim=1)
        return value, stats.steps.max()

    return solve


def bare_loop(z, slope, budget):
    """Evaluations and the norm of each residual, tested in every turn: the least that a solver can do."""

    def body(carry):
        z, _, count = carry
        fz = slope * z + 1
        return fz, jnp.linalg.norm(fz - z, axis=-1), count + 1

    going = lambda carry: jnp.any(carry[1] > 0) & (carry[2] < budget)
    z, _, count = jax.lax.while_loop(going, body, (z, jnp.full(z.shape[:1], jnp.inf), jnp.int32(0)))
    return z, count


def compiled(f: Callable, dtype: Any, options: dict[str, Any] | None, state: tuple) -> Callable:
    z, slope = (x.astype(dtype) for x in state)
    program: Any = jax.jit(f).lower(z, slope, jnp.int32(0)).compile(options)
    temporaries = program.memory_analysis().temp_size_in_bytes
    run = lambda budget: program(z, slope, jnp.int32(budget))
    run.temp_bytes = temporaries  # pyright: ignore[reportFunctionMemberAccess]
    return run


def per_step(run: Any, state: tuple, tiny: bool) -> dict[str, Any]:
    few = 5
    run(few)
    cost = min(timing.seconds(lambda: run(few), 3)) / few
    steps = 10 if tiny else max(10, min(STEPS, int(SECONDS / (3 * timing.CALLS * cost))))
    short, long = (timing.seconds(lambda n=n: run(n)) for n in (steps, 2 * steps))
    counts = [int(run(n)[1]) for n in (steps, 2 * steps)]
    if counts[1] - counts[0] < steps / 2:
        raise RuntimeError(f"of {2 * steps} forced evaluations only {counts[1]} were done")
    (least, median), (least2, median2) = timing.least_and_median(short), timing.least_and_median(long)
    each = 1 / (counts[1] - counts[0])
    return {
        "us": 1e6 * each * (least2 - least),
        "us_median": 1e6 * each * (median2 - median),
        "us_to_start": 1e6 * (least - counts[0] * each * (least2 - least)),
        "evaluations": counts,
        "calls": timing.CALLS,
        "temp_bytes": run.temp_bytes,
    }


def copy_bandwidth(tiny: bool) -> dict[str, Any]:
    """Bytes read and written a second by one pass over an array that no cache holds."""
    stats = jax.devices()[0].memory_stats() or {}
    size = 2**20 if tiny else min(2**32, stats.get("bytes_limit", 2**33) // 8)
    x = jnp.arange(size // 4, dtype=jnp.float32)
    least, median = timing.least_and_median(timing.seconds(lambda f=jax.jit(lambda x: 1.5 * x): f(x)))
    gigabytes = 2 * x.nbytes / 1e9
    return {"gb_per_s": gigabytes / least, "gb_per_s_median": gigabytes / median, "bytes": x.nbytes}


if __name__ == "__main__":
    kept.main(measure)
