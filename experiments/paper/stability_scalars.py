"""Scalar maps with known fixed points: what each solver reports on them, and the gradient it gives."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from experiments.shared.numerics import float64

# ---- scalar maps whose answers are known -------------------------------------------------------------------


class Scalar(NamedTuple):
    """f(z) = c₀ + c₁z + c₂z² + c₃z³ + tanh(az), where it starts, and its real fixed points."""

    name: str
    c: tuple[float, float, float, float]
    a: float
    z0: float
    roots: tuple[float, ...]


def scalar_maps() -> list[Scalar]:
    maps = [Scalar("1.2 z + 1", (1.0, 1.2, 0.0, 0.0), 0.0, 0.0, (-5.0,))]
    maps += [Scalar(f"{r:g} z (1 − z)", (0.0, r, -r, 0.0), 0.0, 0.4, (0.0, 1 - 1 / r)) for r in (2.8, 3.2, 3.5, 3.9)]
    for a in (0.5, 0.9, 1.1, 2.0, 4.0):
        # z = tanh(a z): one root up to a = 1, where two more branch off and 0 becomes unstable
        z = 1.0
        for _ in range(2000):
            z = float(np.tanh(a * z))
        roots = (0.0,) if a <= 1 else (-z, 0.0, z)
        maps += [Scalar(f"tanh({a:g} z)", (0.0, 0.0, 0.0, 0.0), a, 0.5, roots)]
    maps += [
        Scalar("z − z³ (f′ = 1 at 0)", (0.0, 1.0, 0.0, -1.0), 0.0, 0.5, (0.0,)),
        Scalar("z² + 1 (no root)", (1.0, 0.0, 1.0, 0.0), 0.0, 0.0, ()),
        Scalar("z + 0.01 (drifts)", (0.01, 1.0, 0.0, 0.0), 0.0, 0.0, ()),
    ]
    return maps


def scalar_cell(z, c, a):
    return c[:, 0] + c[:, 1] * z + c[:, 2] * z**2 + c[:, 3] * z**3 + jnp.tanh(a * z)


# The absolute tolerance is for roots at zero, where a relative one is never met.
SCALAR_BUDGET: dict[str, Any] = dict(rtol=1e-10, atol=1e-10, max_steps=200)
SCALAR_SOLVERS: dict[str, Any] = {
    "Picard": deq.Picard(),
    "Picard, damping 0.5": deq.Picard(damping=0.5),
    "Anderson": deq.Anderson(),
    "Broyden": deq.Broyden(),
    "NewtonKrylov": deq.NewtonKrylov(),
    "Robust": deq.Robust(),
}


def solve_scalars(solver: Any, adjoint: Any) -> tuple[np.ndarray, Any, np.ndarray, Any]:
    """(z, forward statistics, dz/dc₀, backward statistics) of all maps, each an independent problem."""
    maps = scalar_maps()
    c, a, z0 = (jnp.array([getattr(m, name) for m in maps]) for name in ("c", "a", "z0"))

    @jax.jit
    def run(c, probe):
        def total(c, probe):
            options: dict[str, Any] = dict(solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe)
            z, stats = deq.fixed_point(scalar_cell, z0, c, a, **options)
            return z.sum(), (z, stats)

        (c_bar, backward), (z, stats) = jax.grad(total, argnums=(0, 1), has_aux=True)(c, probe)
        return z, stats, c_bar[:, 0], backward

    return jax.tree.map(np.asarray, run(c, deq.Probe.zeros((len(maps),))))


def scalar_rows(name: str) -> list[dict[str, Any]]:
    solver = SCALAR_SOLVERS[name]
    with float64():
        solver = dataclasses.replace(solver, **SCALAR_BUDGET)
        z, stats, slope, backward = solve_scalars(solver, deq.Implicit())
    rows = []
    for i, m in enumerate(scalar_maps()):
        root = min(m.roots, key=lambda r: abs(r - z[i])) if m.roots else None
        # dz/dc₀ = 1 / (1 − f′(z))
        tangent = m.c[1] + 2 * m.c[2] * (root or 0) + 3 * m.c[3] * (root or 0) ** 2
        tangent += m.a * (1 - np.tanh(m.a * (root or 0)) ** 2)
        rows.append({
            "map": m.name,
            "solver": name,
            "status": deq.Status(int(stats.status[i])).name,
            "evaluations": int(stats.steps[i]),
            "z": z[i],
            "residual": stats.residual[i],
            "distance": None if root is None else abs(z[i] - root),
            "root": root,
            "tangent": None if root is None else tangent,
            "gradient": slope[i],
            "expected": None if root is None or tangent == 1 else 1 / (1 - tangent),
            # Computed here, because stored numbers have six digits.
            "error": None if root is None or tangent == 1 else abs(slope[i] * (1 - tangent) - 1),
            "backward": deq.Status(int(backward.status[i])).name,
        })  # fmt: skip
    return rows


def policy_rows() -> list[dict[str, Any]]:
    """The gradient of the maps without a root under each policy: finite, and flagged."""
    rows = []
    for name in ("Picard", "Anderson", "Broyden"):
        for policy in deq.OnFailure:
            with float64():
                solver = dataclasses.replace(SCALAR_SOLVERS[name], **SCALAR_BUDGET)
                z, stats, slope, backward = solve_scalars(solver, deq.Implicit(on_failure=policy))
            for i, m in enumerate(scalar_maps()):
                if not m.roots:
                    rows.append({
                        "map": m.name,
                        "solver": name,
                        "policy": policy.name,
                        "status": deq.Status(int(stats.status[i])).name,
                        "z": z[i],
                        "residual": stats.residual[i],
                        "gradient": slope[i],
                        "finite": bool(np.isfinite(slope[i])),
                        "backward": deq.Status(int(backward.status[i])).name,
                    })  # fmt: skip
    return rows
