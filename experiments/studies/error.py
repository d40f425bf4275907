"""How good `error_estimate` is: estimated over true errors of what solvers return, on the random cells.

python -m experiments.studies.error  # three minutes on one core; nothing is written

Cells and solves in float64, at the solvers' default tolerances unless said. The truth is ‖z − z*‖ with z* found from z
by Newton's method with the whole Jacobian; cells where it finds no fixed point are left out and counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import deq_jax as deq
from experiments.shared.cell_batch import draw
from experiments.shared.cells import DIM, FAMILIES
from experiments.shared.plots import markdown_table

NEWTON_STEPS = 12
SOLVERS = {"Anderson": deq.Anderson(), "Broyden": deq.Broyden(), "Robust": deq.Robust(max_steps=300)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Estimates by several numbers of Jacobian-vector products, for what each solver returns as CONVERGED."""

    seeds: int = 4
    products: tuple[int, ...] = (4, 8, 16, 32)


def main(config: Config = Config()) -> None:  # noqa: B008
    jax.config.update("jax_enable_x64", True)
    rows = [row for name in SOLVERS for row in rows_of(name, *cells(config.seeds), config.products)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float64, seeds 0 to {config.seeds - 1}")
    head = ["solver", "cells", "estimate", "within a factor of 3", "too small", "too large", "5 %", "median", "95 %"]
    print("\n".join(markdown_table(head, rows)))


def cells(seeds: int) -> tuple[Callable, Float[Array, "n dim"]]:
    """(f, z0) of all random cells as one batch, in float64."""
    problems = draw(tuple(FAMILIES), range(seeds))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), problems.params)
    count = sum(len(jax.tree.leaves(p)[0]) for p in params)
    return lambda z: problems.f(z, params), jnp.zeros((count, DIM))


def rows_of(name: str, f: Callable, z0: Float[Array, "n dim"], products: tuple[int, ...]) -> list[list[Any]]:
    """A row for the residual, taken as the error, and for each number of products."""
    z, stats, *_ = jax.jit(lambda z0: deq.solve(f, z0, solver=SOLVERS[name], batch_ndim=1))(z0)
    z_star = jax.jit(lambda z: newton(f, z))(z)
    size, norm = np.linalg.norm(z_star, axis=-1), lambda x: np.linalg.norm(x, axis=-1)
    true = norm(z_star - z)
    known = np.asarray(stats.converged) & (norm(f(z_star) - z_star) <= 1e-9 * size) & (true > 0)
    estimates = {"the residual": stats.residual}
    for k in products:
        estimate = jax.jit(lambda z, k=k: deq.diagnostics.error_estimate(f, z, batch_ndim=1, products=k).error)
        estimates[f"{k} products"] = estimate(z)
    return [[name, f"{known.sum()} of {known.size}", what, *judged(e, true, known)] for what, e in estimates.items()]


def judged(estimate: Any, true: np.ndarray, known: np.ndarray) -> list[str]:
    quotient = np.asarray(estimate)[known] / true[known]
    parts = (quotient > 1 / 3) & (quotient < 3), quotient <= 1 / 3, quotient >= 3
    shares = [f"{100 * part.mean():.1f} %" for part in parts]
    return [*shares, *(f"{q:.3f}" for q in np.quantile(quotient, (0.05, 0.5, 0.95)))]


def newton(f: Callable, z: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
    """z after some steps of Newton's method for f(z) = z, each problem by itself."""
    eye = jnp.eye(DIM, dtype=z.dtype)

    def step(_, z):
        push = lambda v: jax.jvp(f, (z,), (jnp.broadcast_to(v, z.shape),))[1]
        jacobian = jnp.moveaxis(jax.lax.map(push, eye), 0, -1)
        return z + jnp.linalg.solve(eye - jacobian, (f(z) - z)[..., None])[..., 0]

    return jax.lax.fori_loop(0, NEWTON_STEPS, step, z)


if __name__ == "__main__":
    main(tyro.cli(Config))
