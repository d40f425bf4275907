"""Continuous batching against whole batches: evaluations of f and time for a queue of unequal problems.

python -m experiments.studies.streaming
python -m experiments.studies.streaming --tiny
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int

import deq_jax as deq
from experiments.shared.study import conditions, paragraph, plain
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

SOLVERS = {
    "Picard": deq.Picard(rtol=1e-4, max_steps=1000),
    "Anderson": deq.Anderson(rtol=1e-4, max_steps=1000),
    "Broyden": deq.Broyden(rtol=1e-4, max_steps=1000),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """About ten minutes on one CPU core. With slots that are refilled, f is evaluated about a third as often.

    You should see plain iteration gain as much time, Anderson most of it if f is not too cheap, and Broyden less: each
    problem writes its history at a place of its own, and the memories that are full are compressed in batches of an
    eighth. XLA rounds those otherwise than whole batches, so that some of Broyden's problems take another number of
    steps.

    python -m experiments.studies.streaming
    """

    out: Path = Path("experiments/studies/results/streaming")
    problems: int = 4096
    slots: int = 256
    pieces: int = 8  # evaluations between two looks at what has finished
    widths: tuple[tuple[int, int], ...] = ((64, 256), (128, 1024))  # (dim, hidden): a cheap f and a dear one
    repeats: int = 5
    seed: int = 0
    solvers: tuple[str, ...] = tuple(SOLVERS)
    tiny: bool = False  # the same mathematics at a test's size


class Problems(NamedTuple):
    gain: Float[Array, "problems 1"]
    x: Float[Array, "problems dim"]
    w: tuple[Float[Array, "dim hidden"], Float[Array, "hidden dim"]]


class Solved(NamedTuple):
    value: Float[Array, "problems dim"]
    steps: Int[Array, " problems"]
    status: Int[Array, " problems"]
    evaluations: Int[Array, ""]  # of f on the batch


def cell(z, gain, x, w):
    return gain * (jnp.tanh(z @ w[0]) @ w[1]) + x


def build(config: Config, dim: int, hidden: int) -> Problems:
    """Problems whose contraction is from 0.1 to 0.99: 1 − gain is uniform on a logarithmic scale."""
    rng = np.random.default_rng(config.seed)
    gain = 1 - np.exp(rng.uniform(np.log(0.01), np.log(0.9), (config.problems, 1)))
    x = 0.3 * rng.normal(size=(config.problems, dim))
    w = np.linalg.qr(rng.normal(size=(hidden, dim)))[0].T
    turned = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    as_array = lambda x: jnp.asarray(x, jnp.float32)
    return Problems(as_array(gain), as_array(x), (as_array(w), as_array(w.T @ turned)))


def whole_batches(solver: deq.Solver, slots: int, problems: Problems) -> Solved:
    """Batch after batch, each until its last problem has stopped."""

    def solve(part):
        gain, x = part
        found = deq.solve(cell, jnp.zeros_like(x), gain, x, problems.w, solver=solver, batch_ndim=1)
        return found.value, found.stats.steps, found.stats.status, jnp.max(found.stats.steps)

    cut = lambda x: x.reshape(-1, slots, *x.shape[1:])
    *found, evaluations = jax.lax.map(solve, (cut(problems.gain), cut(problems.x)))
    value, steps, status = (x.reshape(-1, *x.shape[2:]) for x in found)
    return Solved(value, steps, status, jnp.sum(evaluations))


def stream(solver: deq.Solver, slots: int, pieces: int, problems: Problems) -> Solved:
    """Slots, each of which takes the next problem as soon as its own has stopped."""
    count, dim = problems.x.shape
    part = lambda which: (problems.gain[which], problems.x[which], None)
    z0, first = jnp.zeros((slots, dim)), jnp.arange(slots)
    state = deq.start(cell, z0, *part(first)[:2], problems.w, solver=solver, batch_ndim=1, axes=(0, 0, None))
    nothing = jnp.zeros(count, jnp.int32)

    def turn(carry):
        state, owner, following, solved = carry
        state = deq.advance(state, pieces)
        found, done = deq.result(state), deq.finished(state)
        to = jnp.where(done, owner, count)
        put = lambda all, new: all.at[to].set(new, mode="drop")
        solved = Solved(
            put(solved.value, found.value),
            put(solved.steps, found.stats.steps),
            put(solved.status, found.stats.status),
            state.carry.evaluation,
        )
        coming = following + jnp.cumsum(done) - 1
        takes = done & (coming < count)
        owner = jnp.where(takes, coming, jnp.where(done, count, owner))
        state = deq.refill(state, takes, z0, part(jnp.minimum(coming, count - 1)))
        return state, owner, following + jnp.sum(takes), solved

    solved = Solved(jnp.zeros((count, dim)), nothing, nothing, jnp.zeros((), jnp.int32))
    carry = state, first, jnp.asarray(slots), solved
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < count), turn, carry)[-1]


def compare(name: str, config: Config, width: tuple[int, int]) -> dict[str, Any]:
    """Both ways on the same problems, in turn; the medians of their times."""
    solver, problems = SOLVERS[name], build(config, *width)
    ways: dict[str, Callable] = {
        "whole": jax.jit(functools.partial(whole_batches, solver, config.slots)),
        "stream": jax.jit(functools.partial(stream, solver, config.slots, config.pieces)),
    }
    found = {way: jax.block_until_ready(run(problems)) for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(config.repeats):
        for way, run in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(problems))
            seconds[way].append(time.perf_counter() - begin)
    row: dict[str, Any] = {"solver": name, "width": width}
    for way, solved in found.items():
        row[way] = {
            "evaluations": int(solved.evaluations),
            "seconds": statistics.median(seconds[way]),
            "converged": int((solved.status == deq.Status.CONVERGED).sum()),
            "steps": [int(q) for q in np.quantile(solved.steps, [0, 0.5, 0.9, 1])],
        }
    row["fewer_evaluations"] = row["whole"]["evaluations"] / row["stream"]["evaluations"]
    row["throughput"] = row["whole"]["seconds"] / row["stream"]["seconds"]
    row["other_steps"] = int((found["whole"].steps != found["stream"].steps).sum())
    return row


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Continuous batching against whole batches",
        "",
        f"    {results['command']}",
        "",
        conditions(results),
        "",
    ]
    config = results["config"]
    lines += paragraph(
        f"{config['problems']} problems on {config['slots']} slots; medians of {config['repeats']} runs, in turn.",
        "f is two layers, of dim entries to hidden ones and back; one evaluation is that of all slots. Steps are",
        "the median, the 90th percentile and the maximum over the problems. The last three columns are whole batches",
        "over slots that are refilled, and how many problems took another number of steps.",
    )
    lines += [
        "| dim, hidden | solver | steps | evaluations, whole | refilled | seconds, whole | refilled | evaluations "
    ]
    lines[-1] += "| seconds | differ |"
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        whole, flow = row["whole"], row["stream"]
        cells = [", ".join(map(str, row["width"])), row["solver"], ", ".join(map(str, whole["steps"][1:]))]
        cells += [whole["evaluations"], flow["evaluations"], f"{whole['seconds']:.2f}", f"{flow['seconds']:.2f}"]
        cells += [f"{row['fewer_evaluations']:.2f}", f"{row['throughput']:.2f}", row["other_steps"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def main(config: Config) -> dict[str, Any]:
    if config.tiny:
        config = dataclasses.replace(config, problems=64, slots=8, widths=((8, 16),), repeats=1)
    results: dict[str, Any] = {"command": "python -m experiments.studies.streaming" + " --tiny" * config.tiny}
    results |= {"config": dataclasses.asdict(config) | {"out": None}, **environment(), "rows": []}
    config.out.mkdir(parents=True, exist_ok=True)
    for width, name in itertools.product(config.widths, config.solvers):
        results["rows"].append(plain(compare(name, config, width)))
        write_atomically(config.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(config.out / "table.md", markdown(results).encode())
    print(markdown(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
