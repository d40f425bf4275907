"""The backward equilibrium, which `Implicit`, `ImplicitJVP`, `Shine` and `compact` solve each in its own way.

    (1)  z = f(z, a)  ⇒  dz = (I − J)⁻¹ fₐ da
    (2)  ā = fₐᵀ u  with  u = z̄ + Jᵀ u

(2) is a fixed point again. It is linear, so it is solved for u / scale, with scale a power of two for each problem:
that keeps the digits of a cotangent of any size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from deq_jax._arrays import leading_power, varying_axes
from deq_jax._states import add, choose, corner, divide, multiply, wide_dtype, zeros_like
from deq_jax.adjoints.protocol import Problem
from deq_jax.solvers import Stats
from deq_jax.solvers.stopping import coupling

HEADROOM = 2.0**-6  # of a float16 cotangent: room for digits below, and for the sum of a million entries above


def solve_backward(
    problem: Problem, z: PyTree, z_bar: PyTree, solve: Callable[[PyTree], tuple[PyTree, Stats]]
) -> tuple[PyTree, Stats]:
    """(ā, the stats of the solve) of equation (2), where `solve(unit)` finds u = unit + Jᵀ u.

    During the solve only its history and the linearization in z are kept. The linearization in the inputs is computed
    afterwards, at the cost of one extra evaluation of f.
    """
    z_bar = unfolded(z_bar, z, problem.batch_ndim)
    scale = power_of_two(z_bar, problem.batch_ndim, (*problem.axes, *problem.over))
    with jax.named_scope("backward_solve"):
        u, stats = solve(divide(z_bar, scale))
    z = after(z, u, stats)
    pull = lambda u: jax.vjp(lambda inputs: problem(z, inputs), problem.inputs)[1](u)[0]
    return pull_scaled(pull, problem.inputs, u, scale), stats


def backward_cell(problem: Problem, z: PyTree, unit: PyTree) -> Callable[[PyTree], PyTree]:
    """The map u ↦ unit + Jᵀ u of equation (2), linearized at z once."""
    along_z = transposed_product(problem, z)
    return lambda u: add(unit, along_z(u))


def transposed_product(problem: Problem, z: PyTree) -> Callable[[PyTree], PyTree]:
    """The map u ↦ Jᵀ u, linearized at z once."""
    _, along_z = jax.vjp(problem, z)
    return lambda u: along_z(u)[0]


def after(z: PyTree, u: PyTree, stats: Stats) -> PyTree:
    """z, with a fake dependency on the backward solve that found u, so that XLA schedules the uses of z after it.

    The condition always holds, and XLA cannot know it. (The CPU's compiler removes an optimization_barrier before it
    orders the program.)
    """
    return choose(stats.steps >= 0, z, u)


def unfolded(z_bar: PyTree, z: PyTree, batch_ndim: int) -> PyTree:
    """z̄, hidden from constant folding: for a loss such as z.sum(), XLA would spend seconds on the norms of ones."""
    entry = jax.lax.stop_gradient(corner(z, batch_ndim).real)
    return choose(~(entry > jnp.inf), z_bar, zeros_like(z_bar))


# ---- powers of two -----------------------------------------------------------------------------------------


def power_of_two(tree: PyTree, batch_ndim: int, axes: tuple = ()) -> Float[Array, "*batch"]:
    """The power of two just above the largest entry of each problem; 1 for zero, Inf and NaN. It has no gradient.

    Problems that are coupled along named axes share one.
    """
    top = coupling(axes).most(_top(tree, batch_ndim))
    usable = jnp.isfinite(top) & (top > 0)
    return jnp.where(usable, 2 * leading_power(jnp.where(usable, top, 1)), 1)


def _top(tree: PyTree, batch_ndim: int) -> Float[Array, "*batch"]:
    """The largest entry of each problem, in float32 or wider, without a gradient."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(tree))
    wide = wide_dtype(leaves)
    tops = [jnp.max(jnp.abs(leaf), axis=tuple(range(batch_ndim, leaf.ndim))).astype(wide) for leaf in leaves]
    return functools.reduce(jnp.maximum, tops)


# ---- float16 -----------------------------------------------------------------------------------------------


def unit_in_float16(z_bar: PyTree, problem: Problem) -> tuple[PyTree, Any]:
    """(z̄ / scale, scale) where float16 would lose digits of z̄, and (z̄, None) elsewhere."""
    if not _has_float16(z_bar):
        return z_bar, None
    scale = power_of_two(z_bar, problem.batch_ndim, (*problem.axes, *problem.over))
    return divide(z_bar, scale), scale


def pull_scaled(pull: Callable, inputs: PyTree, u: PyTree, scale: Any = None) -> PyTree:
    """pull(scale · u), a pullback to inputs, also where scale · u leaves the range of a float16 state.

    In that case one more power of two, common to all problems because they share the inputs, brings the largest entry
    to HEADROOM. The result is multiplied by it again, in the dtype of the inputs.
    """
    if scale is None or not _has_float16(u):
        return pull(u if scale is None else multiply(u, scale))
    tops = _top(u, scale.ndim).astype(scale.dtype) * scale
    top = over_shards(jnp.max(jnp.where(jnp.isfinite(tops), tops, 0)), inputs)
    common = power_of_two(top, 0) / HEADROOM
    return multiply(pull(multiply(u, scale / common)), common)


def _has_float16(tree: PyTree) -> bool:
    return any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(tree))


def over_shards(most: Num[Array, ""], inputs: PyTree) -> Num[Array, ""]:
    """The maximum over the axes of a shard_map whose shards share some of the inputs: a pullback sums over them.

    So they have to make pullbacks equally often: one that left a loop before another would keep it waiting for ever.
    """
    varies = lambda x: varying_axes(jax.typeof(x))
    axes = varies(most) - frozenset.intersection(varies(most), *map(varies, jax.tree.leaves(inputs)))
    return jax.lax.pmax(most, tuple(sorted(axes))) if axes else most
