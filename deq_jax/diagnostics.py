"""What a training run should be asked now and then."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax.adjoints import Adjoint, Implicit
from deq_jax.solvers.base import norm, ratio, raveler


class GradientBias(NamedTuple):
    """What `gradient_bias` returns; all are scalars."""

    cosine: Float[Array, ""]  # of the angle between the two gradients; 0 where one of them is zero
    relative_error: Float[Array, ""]  # ‖inexact − exact‖ / ‖exact‖
    size: Float[Array, ""]  # ‖inexact‖ / ‖exact‖


def gradient_bias(
    loss: Callable,
    params: PyTree,
    *args: PyTree,
    inexact: Adjoint,
    exact: Adjoint = Implicit(),  # noqa: B008  frozen
) -> GradientBias:
    """How far a cheap gradient of `loss` in params is from the exact one, at these very params and data.

    `loss(params, *args, adjoint=...) -> scalar` passes its adjoint on to `fixed_point`. Costs two gradients: call
    it every few hundred steps, jitted once. A cosine above 0 means descent in exact arithmetic; `exact` is no
    better than its solves, so give it a tighter solver where the forward tolerance is loose.

    >>> import functools, jax, jax.numpy as jnp, deq_jax as deq
    >>> def loss(w, x, *, adjoint):
    ...     return deq.fixed_point(lambda z: jnp.tanh(w @ z + x), x, adjoint=adjoint).value.sum()
    >>> meter = jax.jit(functools.partial(gradient_bias, loss, inexact=deq.JFB()))
    >>> bias = meter(jnp.array([[0.5, -0.8], [0.8, 0.5]]), jnp.ones(2))
    >>> 0 < float(bias.cosine) < 1, 0 < float(bias.relative_error)
    (True, True)
    """
    ravel, _ = raveler(params, 0)
    pull = lambda adjoint: ravel(jax.grad(lambda params: loss(params, *args, adjoint=adjoint))(params))
    cheap, true = pull(inexact), pull(exact)
    size = lambda x: jnp.where(norm(x) > 0, norm(x), 1)
    cosine = jnp.sum((cheap / size(cheap)) * (true / size(true)))
    return GradientBias(cosine, ratio(norm(cheap - true), norm(true)), ratio(norm(cheap), norm(true)))
