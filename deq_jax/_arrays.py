"""Arithmetic on arrays whose leading axes index independent problems. Knows nothing of solvers or adjoints."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

T = TypeVar("T")

# ---- division and roots ------------------------------------------------------------------------------------


def ratio(
    a: Float[Array, "*#shape"] | float, b: Float[Array, "*#shape"], where: Bool[Array, "*#shape"] | None = None
) -> Float[Array, "..."]:
    """a / b, and 0 where b ≤ 0, or where `where` is false if it is given. NaN stays NaN.

    The way to divide in this library: neither the value nor its derivative is ever that of a division by zero.

    >>> ratio(jnp.array([1.0, 1.0, 0.0]), jnp.array([2.0, 0.0, 0.0])).tolist()
    [0.5, 0.0, 0.0]
    """
    allowed = ~(b <= 0) if where is None else where
    return jnp.where(allowed, a / jnp.where(allowed, b, 1), 0)


def reciprocal(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / x, and 0 where x ≤ 0."""
    return ratio(1, x)


def einsum(subscripts: str, *arrays: Array) -> Array:
    """`jnp.einsum` in the full precision of the arrays: by default a GPU takes TF32, and a TPU bfloat16."""
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)


def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """√x, and 0 with a derivative of 0 where x ≤ 0. NaN stays NaN."""
    none = x <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, x)))


# ---- scales --------------------------------------------------------------------------------------


def leading_power(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^⌊log₂ x⌋ of x ≥ 0: the exponent's bits alone, since frexp and ldexp take thirty operations for it.

    Clipped so that both the power and its reciprocal are normal numbers (XLA flushes the others to zero): x = 0 gives
    the smallest such power, Inf and NaN the largest.
    """
    info, bits = jnp.finfo(x.dtype), jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    mask = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), bits)
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) & mask, x.dtype)
    return jnp.clip(power, 2.0 ** (info.minexp + 2), 2.0 ** (info.maxexp - 3))


def squares_in_range(x: Float[Array, "*#shape"]) -> tuple[Array, Array, Array]:
    """The squares of x, of x times a large power of two, and times a small one: for each size of x, one in range."""
    _, _, up, down = _range_of_squares(x.dtype)
    return x**2, (x * up) ** 2, (x * down) ** 2


def root_of_sums(
    plain: Float[Array, "*shape"], ups: Float[Array, "*shape"] | None, downs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """‖x‖ from the sums of the three squares above: its bits are those of the sum that is in range.

    Without `ups` it is the root of `plain` where x is small, and 0 where that is less than the dtype can hold.
    """
    low, high, up, down = _range_of_squares(plain.dtype)
    large = ~(plain <= high)
    square, unit = jnp.where(large, downs, plain), jnp.where(large, 1 / down, 1)
    if ups is not None:
        square, unit = jnp.where(plain < low, ups, square), jnp.where(plain < low, 1 / up, unit)
    return safe_sqrt(square) * unit


def _range_of_squares(dtype: Any) -> tuple[float, float, float, float]:
    """(low, high, up, down): between low and high a sum of squares has lost nothing; up and down bring others there."""
    middle = jnp.finfo(dtype).maxexp // 4 * 2
    return 2.0 ** -(middle + 16), 2.0 ** (middle + 36), 2.0 ** (middle + 26), 2.0 ** -(middle + 12)


def half_power(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A power of two near √x; 1 where x is zero or not finite.

    Divided by it, vectors of size x are as far from one end of the dtype's range as vectors of size 1 are from the
    other end, so the squares of both are in range.
    """
    usable = (x > 0) & jnp.isfinite(x)
    return leading_power(jnp.sqrt(jnp.where(usable, x, 1)))


# ---- shapes ------------------------------------------------------------------------------------------------


def at_most(limit: int, size: Any) -> int:
    """The smaller of the two. A symbolic size, as in `jax.export`, counts as large."""
    return min(limit, size) if isinstance(size, int) else limit


def varying_axes(aval: Any) -> frozenset:
    """The axes of `shard_map` along which values of this type vary."""
    manual = getattr(aval, "manual_axis_type", None)  # since jax 0.10
    return frozenset(getattr(aval, "vma", None) or getattr(manual, "varying", ()))


def settled(tree: T) -> T:
    """The arrays, all computed before any is used: a GPU else computes small ones in each kernel that reads them.

    Inside shard_map, arrays that vary along other axes have a barrier of their own: one makes its results vary alike.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds = [varying_axes(jax.typeof(leaf)) for leaf in leaves]
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        for i, leaf in zip(places, jax.lax.optimization_barrier([leaves[i] for i in places]), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def zeros_from(x: Array) -> Array:
    """Zeros with the shape, dtype and sharding of x: jax 0.12's zeros_like drops an explicit sharding."""
    return jnp.where(False, x, jnp.zeros((), x.dtype))


def per_problem(option: Any) -> Any:
    """An option given as one number, or as one number a problem, in a shape that multiplies vectors."""
    return jnp.asarray(option)[..., None] if jnp.ndim(option) else option


def per_entry(scale: Any, part: Array) -> Any:
    """A number, or one a problem (or one a row), in a shape that multiplies the part."""
    return jax.lax.expand_dims(scale, range(jnp.ndim(scale), part.ndim)) if jnp.ndim(scale) else scale


def aligned(x: Array, like: Array) -> Array:
    """x with as many leading axes of size one as make its rank that of `like`."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def one_hot(index: Any, size: int, like: Num[Array, "*batch rows"]) -> Num[Array, "..."]:
    """1 at one index of a last axis of this size and 0 elsewhere, with the rank and dtype of `like`."""
    here = jnp.asarray(index, jnp.int32)[..., None]
    return (aligned(jnp.arange(size, dtype=jnp.int32), like) == aligned(here, like)).astype(like.dtype)


def may_be_sharded(x: Any) -> bool:
    """Whether a mesh in the type of x, or in the context, has axes over which x may be sharded.

    Manual axes are not among them. (Auto axes leave no trace in a type of how the array is sharded; of one device they
    shard nothing, while Explicit ones remain in the type.)
    """
    meshes = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
    axis = jax.sharding.AxisType
    return any(
        kind == axis.Explicit or (kind == axis.Auto and size > 1)
        for mesh in meshes
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )
