"""Penalties that keep an equilibrium easy to find."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._checks import check_count
from deq_jax._states import Layout, holding, split


def jacobian_penalty(f: Callable, z: PyTree, *args: PyTree, key: Array, samples: int = 1) -> Float[Array, ""]:
    """An unbiased estimate of ‖∂f/∂z‖²_F over the number of entries of z, at this z.

    For a batch of independent problems, this is the mean of their ‖J‖²_F / dim. It is differentiable in args and in all
    that f captures, but not in z. As in the paper's code, z is held fixed, because the derivative through z* would cost
    another backward solve. Each sample costs one evaluation of f and one vector-Jacobian product. Add the penalty to a
    loss with a small weight, or only on some of the steps if it is too expensive.

    Raises:
      ValueError: if `samples` is not an int >= 1.

    Source: Bai, Koltun & Kolter (2021), "Stabilizing Equilibrium Models by Jacobian Regularization", Eq 9, with random
    signs instead of normal numbers, for the same mean with less variance.

    >>> import jax, jax.numpy as jnp
    >>> cell = lambda z, w: w * z
    >>> float(jacobian_penalty(cell, jnp.ones(4), jnp.arange(4.0), key=jax.random.key(0)))  # (0 + 1 + 4 + 9) / 4
    3.5
    """
    check_count("samples", samples, 1)
    z, carried = split(z)
    layout, cell = Layout(z, 0, flat=True), holding(f, carried)
    of_flat = lambda flat: layout.pack(cell(layout.unpack(flat), *args))
    flat, pull = jax.vjp(of_flat, layout.pack(jax.lax.stop_gradient(z)))

    def one(key):
        # E[vvᵀ] = I  ⇒  E‖Jᵀv‖² = E[tr(vᵀJJᵀv)] = tr(JJᵀ) = ‖J‖²_F
        v = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.sum(pull(v)[0] ** 2) / flat.size

    return jnp.mean(jax.lax.map(one, jax.random.split(key, samples))) if samples > 1 else one(key)
