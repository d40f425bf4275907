"""Penalties that keep an equilibrium easy to find."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax.solvers.base import raveler


def jacobian_penalty(f: Callable, z: PyTree, *args: PyTree, key: Array, samples: int = 1) -> Float[Array, ""]:
    """An unbiased estimate of ‖∂f/∂z‖²_F over the number of entries of z, at this z.

    For a batch of independent problems that is the mean over them of their own ‖J‖²_F / dim. It is
    differentiable in args and in all that f captures, not in z: as in the paper's code z is held fixed, for the
    derivative through z* would cost another backward solve. Each sample costs one evaluation of f and one
    vector-Jacobian product; add it to a loss with a small weight, on some of the steps if it is dear.

    Source: Bai, Koltun & Kolter (2021), "Stabilizing Equilibrium Models by Jacobian Regularization", Eq 9, with
    signs in place of normal numbers: the same mean, less variance.

    >>> import jax, jax.numpy as jnp
    >>> cell = lambda z, w: w * z
    >>> float(jacobian_penalty(cell, jnp.ones(4), jnp.arange(4.0), key=jax.random.key(0)))  # (0 + 1 + 4 + 9) / 4
    3.5
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an int >= 1, got {samples!r}")
    ravel, unravel = raveler(z, 0)
    flat, pull = jax.vjp(lambda flat: ravel(f(unravel(flat), *args)), ravel(jax.lax.stop_gradient(z)))

    def one(key):
        # E[vvᵀ] = I  ⇒  E‖Jᵀv‖² = E[tr(vᵀJJᵀv)] = tr(JJᵀ) = ‖J‖²_F
        v = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.sum(pull(v)[0] ** 2) / flat.size

    return jnp.mean(jax.lax.map(one, jax.random.split(key, samples))) if samples > 1 else one(key)
