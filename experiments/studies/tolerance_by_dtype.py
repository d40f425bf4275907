"""How many digits a relative tolerance buys, and what they cost: the default of `rtol` by dtype was chosen from this.

python -m experiments.studies.tolerance_by_dtype  # two minutes on one core; nothing is written
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import deq_jax as deq
from experiments.shared.cell_batch import Problems, draw
from experiments.shared.cells import DIM, FAMILIES
from experiments.shared.plots import markdown_table

SOLVERS: dict[str, Any] = {"Picard": deq.Picard(), "Anderson": deq.Anderson(), "Broyden": deq.Broyden()}
NEWTON = 4  # steps from what a solver found to the fixed point beside it


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluations against the error that is left, on the random cells, and for Kepler's equation at large angles.

    The error is ‖z − z*‖ / ‖z*‖, with z* by Newton's method in float64 from z, over the cells that converged.
    """

    seeds: int = 2
    first_seed: int = 1000
    max_steps: int = 100
    float64: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12)
    float32: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)
    bfloat16: tuple[float, ...] = (1e-2, 1e-3, 1e-4)


def main(config: Config = Config()) -> None:  # noqa: B008
    jax.config.update("jax_enable_x64", True)
    problems = draw(tuple(FAMILIES), range(config.first_seed, config.first_seed + config.seeds))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {config}")
    head = ["state", "rtol", "solver", "cells", "converged", "stalled", "evaluations", "median error", "error, 90 %"]
    rows = []
    for dtype in ("float64", "float32", "bfloat16"):
        for name in SOLVERS:
            solve = solve_all(problems, config, dtype, name)
            rows += [row(problems, dtype, rtol, name, solve) for rtol in getattr(config, dtype)]
    print(*markdown_table(head, rows), sep="\n", flush=True)
    angles = [[f"{rtol:g}", *kepler(rtol)] for rtol in config.float64]
    print("\nKepler's equation, M = 60 to 90 rad, e = 0.1 to 0.9, float64, Anderson:\n")
    print(*markdown_table(["rtol", "evaluations", "largest error of a position, in semi-major axes"], angles), sep="\n")


def solve_all(problems: Problems, config: Config, dtype: str, name: str) -> Any:
    """rtol ↦ (z, stats, params) of all cells, by one program."""
    params = jax.tree.map(lambda x: x.astype(dtype), problems.params)
    z0 = jnp.zeros((sum(len(jax.tree.leaves(p)[0]) for p in params), DIM), dtype)
    with_rtol = lambda rtol: dataclasses.replace(SOLVERS[name], rtol=rtol, max_steps=config.max_steps)
    run = jax.jit(lambda rtol: deq.solve(problems.f, z0, params, solver=with_rtol(rtol), batch_ndim=1)[:2])
    return lambda rtol: (*run(rtol), params)


def row(problems: Problems, dtype: str, rtol: float, name: str, solve: Any) -> list[Any]:
    z, stats, params = solve(rtol)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)  # the cell that was solved, without its rounding
    error = errors(problems, np.asarray(z, np.float64), wide)
    converged, stalled = np.asarray(stats.converged), np.asarray(stats.status == deq.Status.STALLED)
    kept = error[converged & np.isfinite(error)]
    marks = [f"{np.quantile(kept, q):.1e}" for q in (0.5, 0.9)] if len(kept) else ["", ""]
    steps = f"{np.mean(np.asarray(stats.steps)):.1f}"
    return [dtype, f"{rtol:g}", name, len(error), int(converged.sum()), int(stalled.sum()), steps, *marks]


def errors(problems: Problems, z: np.ndarray, params: Any) -> np.ndarray:
    """‖z − z*‖ / ‖z*‖ of each problem; NaN where Newton's method has not found z*."""
    counts = np.cumsum([len(jax.tree.leaves(p)[0]) for p in params])[:-1]
    found = []
    for cell, part, p in zip(problems.cells, np.split(z, counts), params, strict=True):
        root, residual = nearest(cell, part, p)
        size = np.linalg.norm(root, axis=-1)
        error = np.linalg.norm(part - root, axis=-1) / size
        found.append(np.where(residual <= 1e-12 * size, error, np.nan))
    return np.concatenate(found)


def nearest(cell: Any, z: np.ndarray, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Fixed points beside z by Newton's method with a dense Jacobian, and their residuals."""
    g, jacobian = with_jacobian(cell)
    with np.errstate(all="ignore"):
        for _ in range(NEWTON):
            step = np.nan_to_num(np.asarray(jacobian(z, params))), np.asarray(g(z, params))[..., None]
            z = z - np.stack([np.linalg.lstsq(a, b, rcond=None)[0][:, 0] for a, b in zip(*step, strict=True)])
        return z, np.linalg.norm(np.asarray(g(z, params)), axis=-1)


@functools.cache
def with_jacobian(cell: Any) -> tuple[Any, Any]:
    g = lambda z, p: cell(z, p) - z
    return jax.jit(jax.vmap(g)), jax.jit(jax.vmap(jax.jacfwd(g)))


def kepler(rtol: float) -> list[str]:
    """E = M + e sin E. The position is (cos E − e, √(1 − e²) sin E)."""
    m, e = (x.ravel() for x in jnp.meshgrid(jnp.linspace(60.0, 90.0, 61), jnp.linspace(0.1, 0.9, 9)))
    solve = lambda rtol: deq.fixed_point(
        lambda angle, m, e: m + e * jnp.sin(angle), m, m, e, batch_ndim=1, solver=deq.Anderson(rtol=rtol)
    )
    (angle, stats), (exact, _) = solve(rtol), solve(1e-15)
    where = lambda angle: jnp.stack([jnp.cos(angle) - e, jnp.sqrt(1 - e**2) * jnp.sin(angle)])
    error = jnp.linalg.norm(where(angle) - where(exact), axis=0)
    return [f"{float(jnp.mean(stats.steps)):.1f}", f"{float(jnp.max(error)):.1e}"]


if __name__ == "__main__":
    main(tyro.cli(Config))
