"""Measurements to make now and then during a training run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, PyTree

from deq_jax._arrays import ratio
from deq_jax._states import ravel
from deq_jax._vectors import dot, norm
from deq_jax.adjoints import Adjoint, Implicit


class GradientBias(NamedTuple):
    """What `gradient_bias` returns: three scalars."""

    cosine: Float[Array, ""]  # of the angle between the two gradients; 0 if either is zero
    relative_error: Float[Array, ""]  # ‖inexact − exact‖ / ‖exact‖
    size: Float[Array, ""]  # ‖inexact‖ / ‖exact‖


def gradient_bias(
    loss: Callable,
    params: PyTree,
    *args: PyTree,
    inexact: Adjoint,
    exact: Adjoint = Implicit(),  # noqa: B008  frozen
) -> GradientBias:
    """How far a cheap gradient of `loss` in params is from the exact one, at these params and data.

    `loss(params, *args, adjoint=...) -> scalar` passes its adjoint on to `fixed_point`. It costs two gradients: jit it
    once, and call it every few hundred steps. A cosine above 0 means descent in exact arithmetic. The exact gradient is
    only as good as its solves, so give `exact` a tighter solver if the forward tolerance is loose.

    >>> import functools, jax, jax.numpy as jnp, deq_jax as deq
    >>> def loss(w, x, *, adjoint):
    ...     return deq.fixed_point(lambda z: jnp.tanh(w @ z + x), x, adjoint=adjoint).value.sum()
    >>> meter = jax.jit(functools.partial(gradient_bias, loss, inexact=deq.JFB()))
    >>> bias = meter(jnp.array([[0.5, -0.8], [0.8, 0.5]]), jnp.ones(2))
    >>> 0 < float(bias.cosine) < 1, 0 < float(bias.relative_error)
    (True, True)
    """
    pull = lambda adjoint: ravel(jax.grad(lambda params: loss(params, *args, adjoint=adjoint))(params))
    cheap, true = pull(inexact), pull(exact)
    unit = lambda x: ratio(x, norm(x)[None])
    cosine = dot(unit(cheap), unit(true))
    return GradientBias(cosine, ratio(norm(cheap - true), norm(true)), ratio(norm(cheap), norm(true)))
