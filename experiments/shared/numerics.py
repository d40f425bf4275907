"""Numerical tools of several pages: float64 for a while, GMRES, the norm of a Jacobian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stretch(
    f: Callable, z: Float[Array, "batch time dim"], context: Any, iterations: int = 30
) -> Float[Array, " batch"]:
    """‖J‖₂ at z, by the power method for JᵀJ: at most 1 where f is non-expansive."""
    push = lambda v: jax.jvp(lambda z: f(z, context), (z,), (v,))[1]
    _, pull = jax.vjp(lambda z: f(z, context), z)
    size = lambda v: jnp.linalg.norm(v.reshape(len(v), -1), axis=-1)[:, None, None]

    def body(_, v):
        w = pull(push(v))[0]
        return w / jnp.where(size(w) > 0, size(w), 1)

    v = jax.lax.fori_loop(0, iterations, body, jax.random.normal(jax.random.key(0), z.shape, z.dtype))
    return (size(push(v)) / size(v))[:, 0, 0]


GMRES: Any = dict(difference=1.0)  # on a linear map a difference of any size is exact: Newton–Krylov is GMRES


class float64:
    """float64 within; what the caller had is restored."""

    def __enter__(self):
        self.before = jax.config.read("jax_enable_x64")
        jax.config.update("jax_enable_x64", True)

    def __exit__(self, *_):
        jax.config.update("jax_enable_x64", self.before)
