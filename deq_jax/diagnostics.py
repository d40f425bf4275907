"""Measurements to make now and then during a training run."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._arrays import ratio
from deq_jax._checks import check_arguments, check_axis_name, check_count
from deq_jax._hoisting import hoist_cell
from deq_jax._programs import run_compiled
from deq_jax._states import Layout, add, divide, ravel, split
from deq_jax._trace import Bound
from deq_jax._vectors import dot, norm
from deq_jax.adjoints import Adjoint, Implicit, Problem
from deq_jax.adjoints.backward import power_of_two
from deq_jax.solvers import Anderson, Stats, run_loop
from deq_jax.solvers.stopping import whole

PRODUCTS = 16  # Jacobian-vector products of an estimate
REDUCED = 0.01  # relative residual of the linear system at which the estimate is good enough


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


class ErrorEstimate(NamedTuple):
    """What `error_estimate` returns, one entry a problem."""

    error: Float[Array, "*batch"]  # ‖z − z*‖₂; inf where f or its derivative is not finite at z
    relative_error: Float[Array, "*batch"]  # over ‖z‖₂
    residual: Float[Array, "*batch"]  # relative, of the linear system (1): of a large one the estimate may be too small


def error_estimate(
    f: Callable,
    z: PyTree,
    *args: PyTree,
    batch_ndim: int = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    products: int = PRODUCTS,
) -> ErrorEstimate:
    """The error of z, its distance from the fixed point of f near it. (A solver knows only the residual.)

    To first order the error e = z* − z of a z near z* is found from the residual r = f(z) − z:

        (1)  (I − J) e = r

    So where I − J is nearly singular, the error is much larger than the residual: with a discount of 0.999 a thousand
    times. (1) is solved by GMRES, in at most `products` Jacobian-vector products and `2 products` states of memory. In
    `python -m experiments.studies.error` the estimate is within a factor of 3 of the truth for all cells. `fixed_point`
    and `solve` report it with `estimate_error=True`. It is not differentiable.

    Args:
      f, z, *args, batch_ndim, axis_name: as for `fixed_point`, with z in place of z0.

    Raises:
      TypeError, ValueError: as `fixed_point`; if `products` is not an int >= 1.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> discounted = lambda z: 1.0 + 0.999 * z  # its fixed point is 1000
    >>> z, stats = deq.fixed_point(discounted, 0.0, solver=deq.Picard(max_steps=10_000))
    >>> deq.Status(int(stats.status)).name, round(1000 - float(z))
    ('CONVERGED', 91)
    >>> round(float(error_estimate(discounted, z).error))
    91
    """
    check_count("products", products, 1)
    over = check_axis_name(axis_name)
    z = check_arguments(f, z, args, Anderson(), Implicit(), batch_ndim, None)
    cell, *reads = hoist_cell(f, z, args)
    key = cell, batch_ndim, over, products
    return run_compiled(_error_estimate, key, *jax.lax.stop_gradient(reads), differentiates=True)


def _error_estimate(cell, batch_ndim, over, products, z, inputs, other):
    floats, carried = split(z)
    return error_at(Problem(cell, inputs, other, batch_ndim, over).with_carried(carried), floats, products)


def with_error(stats: Stats, problem: Problem, z: PyTree, given: PyTree) -> Stats:
    """The stats of z, with its error; `given` are the carried leaves with which f was evaluated there."""
    return stats._replace(error=error_at(problem.with_carried(given), split(z)[0]).error)


def error_at(problem: Problem, z: PyTree, products: int = PRODUCTS) -> ErrorEstimate:
    """The error of a z that consists of floats alone."""
    z = jax.lax.stop_gradient(z)
    fz, along_z = jax.linearize(problem.frozen, z)
    r = jax.tree.map(jnp.subtract, fz, z)
    scale = power_of_two(r, problem.batch_ndim, (*problem.axes, *problem.over))
    unit = divide(r, scale)
    linear = Bound(lambda e: add(unit, along_z(e)), like=problem.f)  # (1) as e = r + J e
    gmres = Anderson(history=products, max_steps=products, rtol=REDUCED, growth=10.0)
    found = run_loop(linear, unit, gmres, problem.batch_ndim, over=problem.over)
    layout = Layout(z, problem.batch_ndim, over=problem.over)
    size = lambda tree: whole(layout.norms(layout.pack(tree)), layout)
    error = jnp.where(jnp.isfinite(size(r)), size(found.value) * scale, jnp.inf)
    return jax.lax.stop_gradient(ErrorEstimate(error, ratio(error, size(z)), found.stats.relative_residual))
