"""How many classical systems `deq.root` solves from their standard starts, and that the scale of F makes no difference.

The referee computes F in float64 by numpy at the z that is returned. A system is solved if the solve says CONVERGED and
‖F(z)‖ is at most `ATOL` of the dtype: that is the tolerance asked for, 1e-8 in float64 as in
experiments/studies/robustness.py, and in float32 the 1e-4 that is as many of its digits.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import deq_jax as deq
from experiments.shared.systems import NAMES, NO_ZERO, RUNS, classical, start

ATOL = {"float64": 1e-8, "float32": 1e-4}
SCALES = (1.0, 1e6, 1e-6)
BUDGET = 500
QUICK = tuple(run for run in RUNS if run[:2] in ((1, 2), (3, 2), (9, 10), (14, 10)))


@dataclasses.dataclass(frozen=True)
class Config:
    """The systems solved by `deq.root`'s default solver, in float64 and float32.

        python -m experiments.studies.root          # 3 minutes on one core, nearly all of it compilation
        python -m experiments.studies.root --quick  # four systems

    You should see 54 of 54 in float64, 53 in float32, no false claim, and errors of the gradient far below 1e-6.
    """

    quick: bool = False


def main(config: Config) -> dict[str, Any]:
    jax.config.update("jax_enable_x64", True)
    record: dict[str, Any] = {name: systems(name, QUICK if config.quick else RUNS) for name in ATOL}
    for name, rows in record.items():
        count = sum((row["number"], row["n"]) != NO_ZERO for row in rows)
        solved, claimed = (sum(row[key] for row in rows) for key in ("solved", "false_claim"))
        print(f"{name}: {solved} of {count} solved, {claimed} false claims; not solved:")
        for row in rows:
            if not row["solved"]:
                line = "    {number:2} {name}, n = {n}, start × {start}: {status} after {steps}, ‖F‖ = {residual:.2g}"
                print(line.format(**row, name=NAMES[row["number"]]))
    record["gradients"] = gradients()
    for row in record["gradients"]:
        line = "n = {n}, condition {condition:.0e}, F × {scale:g}: {status}, {steps} evaluations, {products} products"
        print((line + ", gradient off by {error:.1e}").format(**row))
    return record


def systems(dtype: str, runs: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """One program a dimension, one batch a system."""
    rows = []
    solver = deq.Newton(rtol=0.0, atol=ATOL[dtype], max_steps=BUDGET)
    for n in sorted({n for _, n, _ in runs}):
        numbers = [number for number, size, _ in runs if size == n]
        branches = [lambda z, number=number: classical(number, z, jnp).astype(dtype) for number in numbers]
        F = lambda z, index, branches=branches: jax.lax.switch(index, branches, z)
        solve = jax.jit(lambda z0, index, F=F: deq.root(F, z0, index, solver=solver, batch_ndim=1))
        for index, number in enumerate(numbers):
            starts = next(count for other, size, count in runs if (other, size) == (number, n))
            z0 = np.stack([start(number, n, factor) for factor in (1.0, 10.0, 100.0)]).astype(dtype)
            z, stats = jax.tree.map(lambda x, starts=starts: np.asarray(x)[:starts], solve(z0, index))
            assert z.dtype == dtype
            with np.errstate(all="ignore"):
                residual = np.linalg.norm(classical(number, z.astype(np.float64)), axis=-1)
            for i in range(starts):
                converged, is_zero = stats.status[i] == deq.Status.CONVERGED, bool(residual[i] <= ATOL[dtype])
                rows.append(
                    dict(number=number, n=n, start=10**i, steps=int(stats.steps[i]), residual=float(residual[i]))
                    | dict(status=deq.Status(int(stats.status[i])).name)
                    | dict(solved=bool(converged and is_zero), false_claim=bool(converged and not is_zero))
                )
    return sorted(rows, key=lambda row: (row["number"], row["n"], row["start"]))


def gradients() -> list[dict[str, Any]]:
    """A root with a Jacobian of this condition, general or (where it is solved in a Krylov space) symmetric."""
    rows = []
    for n, condition, scale in ((n, c, s) for n in (100, 300) for c in (50.0, 1e4) for s in SCALES):
        rng = np.random.default_rng(0)
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        right = right if n < 256 else left.T
        A = jnp.asarray(left @ np.diag(np.geomspace(1, condition, n)) @ right)
        b, weights = jnp.asarray(rng.normal(size=n)), jnp.asarray(rng.normal(size=n))
        F = lambda z, b, A=A, scale=scale: scale * (A @ z + 0.1 * jnp.tanh(z) - b)

        @jax.jit
        def loss(b, probe, F=F, weights=weights):
            z, stats = deq.root(F, jnp.zeros_like(b), b, probe=probe)
            return z @ weights, (z, stats)

        began = time.perf_counter()
        (grad, backward), (z, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(b, deq.Probe.zeros())
        exact = np.linalg.solve((np.asarray(A) + 0.1 * np.diag(1 - np.tanh(z) ** 2)).T, weights)
        both = [deq.Status(int(s)).name for s in (stats.status, backward.status)]
        rows.append(
            dict(n=n, condition=condition, scale=scale, steps=int(stats.steps), products=int(backward.steps))
            | dict(status=" and ".join(both), error=float(np.linalg.norm(grad - exact) / np.linalg.norm(exact)))
            | dict(seconds=time.perf_counter() - began)
        )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config))
