"""The vectors that solvers work on, and all that a solver does with them. Knows arrays and batch axes, no solvers.

A vector, one for each problem, is an array `[*batch, dim]`, or a `Vector` of several parts, each an array of its own.
Rows are m vectors a problem, in an array `[*batch, m, dim]` or in the parts of a `Vector`. Inner products are sums over
the parts, and small: `[*batch]` or `[*batch, m]`.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deq_jax._arrays import (
    einsum,
    leading_power,
    may_be_sharded,
    per_entry,
    reciprocal,
    root_of_sums,
    safe_sqrt,
    squares_in_range,
    zeros_from,
)


@jax.tree_util.register_pytree_node_class
class Vector:
    """A vector in several parts `[*batch, n]`, or rows of such vectors in parts `[*batch, m, n]`.

    A part that may be sharded over devices keeps its own shape, `[*batch, *shape]`: to merge its axes would gather it.
    Sums and differences are those of arrays, part by part. Over the named axes `over` (of shard_map, vmap or pmap) each
    device has a piece of every part, and an inner product is the sum over all devices.

    >>> x = Vector((jnp.ones((2, 3)), jnp.ones((2, 4, 5))), batch_ndim=1)
    >>> dot(x + x, x).tolist(), size(x)
    ([46.0, 46.0], 23)
    """

    def __init__(self, parts: tuple, batch_ndim: int, over: tuple = ()):
        self.parts, self.batch_ndim, self.over = parts, batch_ndim, over

    def tree_flatten(self) -> tuple[tuple, tuple]:
        return self.parts, (self.batch_ndim, self.over)

    @classmethod
    def tree_unflatten(cls, form: tuple, parts: Any) -> "Vector":
        return cls(tuple(parts), *form)

    def of(self, parts: Any) -> "Vector":
        """Another vector of this form."""
        return Vector(tuple(parts), self.batch_ndim, self.over)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def astype(self, dtype: Any) -> "Vector":
        return each(lambda part: part.astype(dtype), self)

    def __add__(self, other: "Vector") -> "Vector":
        return each(jnp.add, self, other)

    def __sub__(self, other: "Vector") -> "Vector":
        return each(jnp.subtract, self, other)


if TYPE_CHECKING:  # a checker of types cannot know that two operands are of one kind
    Vec: TypeAlias = Any
    Rows: TypeAlias = Any
else:
    Vec = Float[Array, "*batch dim"] | Vector
    Rows = Float[Array, "*batch _ dim"] | Vector


def each(operation: Callable, x: Any, *others: Any) -> Any:
    """The operation on the arrays, or on the parts."""
    if not isinstance(x, Vector):
        return operation(x, *others)
    return x.of(map(operation, x.parts, *(other.parts for other in others)))


def reduced(merge: Callable, operation: Callable, x: Any, *others: Any) -> Array:
    """The operation's results on the parts, merged by `jnp.add`, say, over the parts and over the axes `over`."""
    if not isinstance(x, Vector):
        return operation(x, *others)
    found = functools.reduce(merge, map(operation, x.parts, *(other.parts for other in others)))
    return OVER_DEVICES[merge](found, x.over) if x.over else found


OVER_DEVICES: dict[Callable, Callable] = {
    jnp.add: jax.lax.psum,
    jnp.maximum: jax.lax.pmax,
    jnp.logical_and: lambda x, axes: jax.lax.pmin(x.astype(jnp.int32), axes) > 0,
}


def own_axes(x: Any, part: Array, rows: int = 0) -> Any:
    """The axes of a part that are neither the batch's nor the rows'."""
    return tuple(range(x.batch_ndim + rows, part.ndim)) if isinstance(x, Vector) else -1


# ---- vectors -----------------------------------------------------------------------------------------------


def size(x: Vec) -> Any:
    """Entries a problem."""
    if not isinstance(x, Vector):
        return x.shape[-1]
    devices = math.prod(map(jax.lax.axis_size, x.over))
    return devices * sum(math.prod(part.shape[x.batch_ndim :]) for part in x.parts)


def zero_of(x: Vec) -> Float[Array, "*batch"]:
    """A zero for each problem, with the dtype of x and the sharding of its batch."""
    if not isinstance(x, Vector):
        return zeros_from(x[..., 0])
    return reduced(jnp.add, lambda part: jnp.sum(zeros_from(part), axis=own_axes(x, part)), x.of(x.parts[:1]))


def scaled(scale: Any, x: Vec) -> Vec:
    """x times a number, or times one number a problem."""
    return each(lambda part: per_entry(scale, part) * part, x)


def divided(x: Vec, scale: Any) -> Vec:
    """x over a number, or over one number a problem."""
    return each(lambda part: part / per_entry(scale, part), x)


def rounded(x: Vec, dtype: Any) -> Vec:
    """x with its entries rounded to those of a narrower dtype. (XLA takes a cast there and back for none.)"""
    info = jnp.finfo(dtype)
    return each(lambda part: jax.lax.reduce_precision(part, info.nexp, info.nmant), x)


def dot(x: Vec, y: Vec) -> Float[Array, "*batch"]:
    """⟨x, y⟩."""
    product = lambda a, b: einsum("...d,...d->...", a, b) if has_one_axis(x, a) else jnp.sum(a * b, own_axes(x, a))
    return reduced(jnp.add, product, x, y)


def product(x: Vec, y: Vec) -> Vec:
    """The products of the entries."""
    return each(jnp.multiply, x, y)


def squares(x: Vec) -> list[Vec]:
    """The three `squares_in_range` of each entry: `root_of_sums` takes their sums."""
    if not isinstance(x, Vector):
        return list(squares_in_range(x))
    of_parts = zip(*map(squares_in_range, x.parts), strict=True)
    return [x.of(parts) for parts in of_parts]


def sums(*xs: Vec) -> list[Float[Array, "*batch"]]:
    """The sum of the entries of each vector, in one pass over all of them."""
    if not isinstance(xs[0], Vector):
        return list(_sums(xs, (xs[0].ndim - 1,)))
    of_parts = [_sums(parts, own_axes(xs[0], parts[0])) for parts in zip(*(x.parts for x in xs), strict=True)]
    found = [functools.reduce(jnp.add, of_one) for of_one in zip(*of_parts, strict=True)]
    return jax.lax.psum(found, xs[0].over) if xs[0].over else found


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sums(xs: tuple[Array, ...], axes: tuple[int, ...]) -> tuple[Array, ...]:
    """One reduction of all, unless they may be sharded. XLA merges the sums of several only as long as they are few."""
    if may_be_sharded(xs[0]):
        return tuple(jnp.sum(x, axes) for x in xs)
    zeros = [jnp.zeros((), x.dtype) for x in xs]
    return tuple(jax.lax.reduce(xs, tuple(zeros), lambda a, b: tuple(map(jax.lax.add, a, b)), axes))


@_sums.defjvp
def _(axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    return _sums(*primals, axes), tuple(jnp.sum(dx, axes) for dx in tangents[0])


def norm(x: Vec) -> Float[Array, "*batch"]:
    """‖x‖₂, also where the squares leave the range of the dtype."""
    return norms(x)[0]


def norms(*xs: Vec) -> tuple[Float[Array, "*batch"], ...]:
    """‖x‖₂ of each vector; in one pass over all of them, but on CPUs, which take two over each."""
    if isinstance(xs[0], Vector) and (xs[0].over or not all(has_one_axis(xs[0], part) for part in xs[0].parts)):
        return _norms_in_one_pass(*xs)
    return jax.lax.platform_dependent(*xs, cpu=_norms_in_two_passes, default=_norms_in_one_pass)


def _norms_in_two_passes(*xs: Vec) -> tuple[Float[Array, "*batch"], ...]:
    """x is scaled by a power of two, which changes no bit where no scaling was needed."""

    def of_one(x: Vec) -> Array:
        top = largest(x)
        # Not the smallest power where x is zero: XLA would multiply its reciprocal with a factor of x, 1e3 say, to inf.
        scale = leading_power(jnp.where(top == 0, 1, top))
        unit = each(lambda part: part * per_entry(1 / scale, part), x)
        return scale * safe_sqrt(dot(unit, unit))

    return tuple(map(of_one, xs))


@jax.custom_jvp
def _norms_in_one_pass(*xs: Vec) -> tuple[Float[Array, "*batch"], ...]:
    """By sums alone: one kernel, and one message between devices, where a maximum and then a sum take two."""
    found = sums(*itertools.chain.from_iterable(map(squares, xs)))
    return tuple(root_of_sums(*found[i : i + 3]) for i in range(0, len(found), 3))


@_norms_in_one_pass.defjvp
def _(xs: tuple, dxs: tuple) -> tuple[tuple, tuple]:
    lengths = _norms_in_one_pass(*xs)
    # d‖x‖ = ⟨x, dx⟩ / ‖x‖
    return lengths, tuple(dot(scaled(reciprocal(n), x), dx) for n, x, dx in zip(lengths, xs, dxs, strict=True))


def largest(x: Vec) -> Float[Array, "*batch"]:
    """The largest modulus of an entry. It has no derivative."""
    of_part = lambda part: jnp.max(jnp.abs(jax.lax.stop_gradient(part)), axis=own_axes(x, part))
    return reduced(jnp.maximum, of_part, x)


def is_same(x: Vec, y: Vec) -> Bool[Array, "*batch"]:
    """Whether all entries of a problem are equal."""
    return reduced(jnp.logical_and, lambda a, b: jnp.all(a == b, axis=own_axes(x, a)), x, y)


def shape_of(x: Vec) -> tuple:
    """The shape of the array, or of each part."""
    return tuple(part.shape for part in x.parts) if isinstance(x, Vector) else jnp.shape(x)


def has_one_axis(x: Any, part: Array, rows: int = 0) -> bool:
    """Whether a contraction of this part is one over its last axis, which is not sharded.

    One over axes that are sharded has to be told how its result is, and a sum of products has not.
    """
    return not isinstance(x, Vector) or (part.ndim == x.batch_ndim + rows + 1 and not may_be_sharded(part))
