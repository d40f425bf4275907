"""What a history in a narrower dtype costs in evaluations, on the random cells of the robustness study.

python -m experiments.studies.history  # two minutes on one core; nothing is written
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import deq_jax as deq
from experiments.shared.cell_batch import Problems, draw
from experiments.shared.cells import DIM, FAMILIES
from experiments.shared.plots import markdown_table


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluations with histories in the dtype of the computation and in bfloat16, side by side."""

    seeds: int = 4
    history: tuple[int, ...] = (5, 8)
    cases: tuple[tuple[str, float], ...] = (("float32", 1e-4), ("float32", 1e-5), ("bfloat16", 1e-2))


def main(config: Config = Config()) -> None:  # noqa: B008
    problems = draw(tuple(FAMILIES), range(config.seeds))
    rows = [compare(problems, m, *case) for case in config.cases for m in config.history]
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, seeds 0 to {config.seeds - 1}, at most 100 evaluations"
    )
    head = ["state", "rtol", "history", "cells", "solved", "in bfloat16", "evaluations", "in bfloat16", "ratio"]
    print("\n".join(markdown_table(head, rows)))


def compare(problems: Problems, history: int, dtype: str, rtol: float) -> list[Any]:
    """A row of the table; evaluations are means over the cells that both solve."""
    wide, narrow = (statistics(problems, history, dtype, rtol, kept) for kept in (None, "bfloat16"))
    both = wide.converged & narrow.converged
    steps = [float(np.mean(stats.steps[both])) for stats in (wide, narrow)]
    solved = [int(stats.converged.sum()) for stats in (wide, narrow)]
    ratio = f"{steps[1] / steps[0]:.3f}"
    return [dtype, rtol, history, both.size, *solved, *(f"{n:.2f}" for n in steps), ratio]


def statistics(problems: Problems, history: int, dtype: str, rtol: float, kept: str | None) -> deq.Stats:
    params = jax.tree.map(lambda x: x.astype(dtype), problems.params)
    z0 = jnp.zeros((sum(len(jax.tree.leaves(p)[0]) for p in params), DIM), dtype)
    solver = deq.Anderson(history=history, rtol=rtol, history_dtype=kept)
    solve = lambda params: deq.solve(problems.f, z0, params, solver=solver, batch_ndim=1).stats
    return jax.tree.map(np.asarray, jax.jit(solve)(params))


if __name__ == "__main__":
    main(tyro.cli(Config))
