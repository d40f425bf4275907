"""Problems with a known Jacobian, their exact gradient, and what one adjoint makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import deq_jax as deq

# ---- problems with a known Jacobian, and their exact gradient ----------------------------------------------


class Problems(NamedTuple):
    w: Float[np.ndarray, "batch dim dim"]
    b: Float[np.ndarray, "batch dim"]
    z: Float[np.ndarray, "batch dim"]  # a fixed point, to float64
    z_bar: Float[np.ndarray, "batch dim"]  # the loss is ⟨z̄, z*⟩


def cell(z, w, b):
    return jnp.tanh(jnp.einsum("...ij,...j->...i", w, z) + b)


def build(config: Any, radius: float, dtype: str) -> Problems:
    """Cells whose Jacobian has spectral radius `radius` at a planted fixed point; weights are rounded to dtype."""
    rng = np.random.default_rng([config.seed, round(100 * radius)])
    draw = lambda *shape: rng.normal(size=(config.problems, *shape))
    n = config.dim
    a, z_bar = 0.5 * draw(n), draw(n)
    z, slope = np.tanh(a), 1 - np.tanh(a) ** 2
    if radius < 1:
        w = draw(n, n)
    else:
        # I − W ⪰ I, so that the fixed point is unique (Winston & Kolter 2020), while Picard runs away from it.
        s, k = draw(n, n), draw(n, n)
        w = (k - k.swapaxes(-1, -2)) - 0.5 * s @ s.swapaxes(-1, -2) / n**0.5
    w *= radius / np.abs(np.linalg.eigvals(slope[..., None] * w)).max(-1)[:, None, None]
    b = a - np.einsum("bij,bj->bi", w, z)
    w, b, z_bar = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (w, b, z_bar))
    for _ in range(20):  # Newton: the rounded weights have a fixed point a little beside the planted one
        fz = np.tanh(np.einsum("bij,bj->bi", w, z) + b)
        z = z + np.linalg.solve(np.eye(n) - (1 - fz**2)[..., None] * w, (fz - z)[..., None])[..., 0]
    return Problems(w, b, z, z_bar)


def dense_gradient(p: Problems) -> Float[np.ndarray, "batch params"]:
    # z = f(z, a)  ⇒  ā = fₐᵀ (I − J)⁻ᵀ z̄, with J = D W, D = diag(1 − z²), and fₐ for a = (W, b)
    slope = 1 - p.z**2
    i_minus_j = np.eye(p.z.shape[-1]) - slope[..., None] * p.w
    b_bar = slope * np.linalg.solve(i_minus_j.swapaxes(-1, -2), p.z_bar[..., None])[..., 0]
    return flat(b_bar[..., None] * p.z[:, None, :], b_bar)


def flat(w_bar: Any, b_bar: Any) -> Float[np.ndarray, "batch params"]:
    both = [np.asarray(x, np.float64) for x in (w_bar, b_bar)]
    return np.concatenate([x.reshape(len(x), -1) for x in both], axis=-1)


@jax.jit
def gradient(w, b, z_bar, solver, adjoint):
    """(gradients in w and b, the backward statistics) and the forward ones. A tolerance does not compile anew."""

    def loss(w, b, probe):
        z, stats = deq.fixed_point(
            cell, jnp.zeros_like(b), w, b, solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe
        )
        return jnp.sum(z_bar * z), stats

    probe = deq.Probe.zeros(b.shape[:1])
    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(w, b, probe)


def measure(p: Problems, dtype: str, solver: Any, adjoint: Any) -> dict[str, Any]:
    """Error, cosine and counts of one gradient against the dense one: medians, and the worst problem's."""
    (w_bar, b_bar, probe), stats = run(p, dtype, solver, adjoint)
    got, exact = flat(w_bar, b_bar), dense_gradient(p)
    with np.errstate(all="ignore"):
        error = np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        cosine = np.sum(got * exact, -1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(exact, axis=-1)
    forward, backward = np.asarray(stats.converged), np.asarray(probe.status) == deq.Status.CONVERGED
    return {
        "error": float(np.median(error)),
        "worst": float(np.max(error)),
        "cosine": float(np.min(cosine)),
        "evaluations": float(np.mean(stats.steps)),
        "converged": float(np.mean(forward)),
        "products": products(adjoint, probe, stats),
        "backward_converged": float(np.mean(backward[forward])) if forward.any() else None,
    }


def run(p: Problems, dtype: str, solver: Any, adjoint: Any) -> Any:
    return program(p.b.shape, dtype, solver, adjoint)(*arrays(p, dtype), solver, adjoint)


PROGRAMS: dict[Any, Any] = {}


def program(shape: tuple[int, ...], dtype: str, solver: Any, adjoint: Any) -> Any:
    """The compiled gradient: one for all tolerances, whose memory can be asked for too."""
    batch, dim = shape
    key = shape, dtype, jax.tree.structure((solver, adjoint))
    if key not in PROGRAMS:
        shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((batch, dim, dim), shape, shape)]
        PROGRAMS[key] = gradient.lower(*shapes, solver, adjoint).compile()
    return PROGRAMS[key]


def arrays(p: Problems, dtype: str) -> list[Array]:
    return [jnp.asarray(x, dtype) for x in (p.w, p.b, p.z_bar)]


def products(adjoint: Any, probe: deq.Probe, stats: deq.Stats) -> float | None:
    """Jᵀ-vector products a problem: the probe's, or one for each iteration that is walked back."""
    if isinstance(adjoint, deq.ImplicitJVP):
        return None  # it has no probe
    walked = isinstance(adjoint, deq.Unroll | deq.Reversible)
    return float(np.mean(stats.steps) - 1) if walked else float(np.mean(probe.steps))
