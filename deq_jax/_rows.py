"""Rows of vectors: the histories that solvers hold, in an array `[*batch, m, dim]` or in the parts of a `Vector`.

Rows may be of a narrower dtype than the vectors that are computed with: what is read of them is made as wide.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import einsum, may_be_sharded, one_hot, per_entry
from deq_jax._vectors import Rows, Vec, Vector, each, has_one_axis, norm, own_axes, reduced

SHORT = 128  # rows of at most so many entries are multiplied as small matrices are


def repeated(x: Vec, count: int) -> Rows:
    """Rows that are all x."""
    return each(lambda part: jnp.stack([part] * count, axis=_row_axis(x, part)), x)


def appended(rows: Rows, x: Vec) -> Rows:
    """The rows, and x as the last of them."""

    def of_parts(part, new):
        axis = _row_axis(x, new)
        return jnp.concatenate([part, jnp.expand_dims(new, axis)], axis=axis)

    return each(of_parts, rows, x)


def count_rows(rows: Rows) -> int:
    """How many rows there are."""
    part = rows.parts[0] if isinstance(rows, Vector) else rows
    return part.shape[_row_axis(rows, part, 1)]


def first_rows(rows: Rows, count: int) -> Rows:
    return each(lambda part: jax.lax.slice_in_dim(part, 0, count, axis=_row_axis(rows, part, 1)), rows)


def with_more_rows(rows: Rows, count: int) -> Rows:
    """The rows, and as many zero rows after them."""

    def of_part(part):
        room = [(0, 0)] * part.ndim
        room[_row_axis(rows, part, 1)] = (0, count)
        return jnp.pad(part, room)

    return each(of_part, rows)


def with_first_rows(rows: Rows, first: Rows) -> Rows:
    """The rows, with the first of them replaced."""
    replaced = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, 0, axis=_row_axis(rows, a, 1))
    return each(replaced, rows, first)


def row(rows: Rows, index: Int[Array, "..."]) -> Vec:
    """The row at an index that all problems share, or at one of each problem's own. A negative one is from the end."""

    def at(part):
        axis = _row_axis(rows, part, 1)
        if not index.ndim:
            return jax.lax.dynamic_index_in_dim(part, index, axis=axis, keepdims=False)
        own = per_entry(index % part.shape[axis], part)
        return jnp.squeeze(jnp.take_along_axis(part, own, axis=axis), axis)

    return each(at, rows)


def rolled(x: Array, shift: Int[Array, "..."], axis: int) -> Array:
    """`jnp.roll` along an axis, by a shift that all problems share, or by one of each problem's own, 0 to the size."""
    if not shift.ndim:
        return jnp.roll(x, shift, axis=axis)
    for k in range(x.shape[axis].bit_length()):
        x = jnp.where(per_entry((shift >> k) & 1 == 1, x), jnp.roll(x, 1 << k, axis=axis), x)
    return x


def write_row(rows: Rows, new: Vec, index: Int[Array, "..."], where: Bool[Array, "*batch"]) -> Rows:
    """The rows with `new` written at one index, in the problems of `where`. In a loop XLA writes it in place.

    The index may also be one of each problem's own, which costs a pass over all rows where the platform is a CPU.
    """
    if index.ndim:
        return write_row_of_each(rows, new, index, where)

    def of_parts(part, new):
        # Both slices have the same start, so that one kernel reads the old row and writes the new one in place.
        axis = _row_axis(rows, part, 1)
        start = [jnp.zeros((), index.dtype)] * part.ndim
        start[axis] = index
        old = jax.lax.dynamic_slice(part, start, part.shape[:axis] + (1,) + part.shape[axis + 1 :])
        new = jnp.where(per_entry(where, old), jnp.expand_dims(new, axis).astype(part.dtype), old)
        return jax.lax.dynamic_update_slice(part, new, start)

    return each(of_parts, rows, new)


def write_row_of_each(rows: Rows, new: Vec, index: Int[Array, "*batch"], where: Bool[Array, "*batch"]) -> Rows:
    """The rows with `new` written at an index of each problem's own, in the problems of `where`."""

    def selected(part, new):
        axis = _row_axis(rows, part, 1)
        here = one_hot(jnp.where(where, index, part.shape[axis]), part.shape[axis], index[..., None]) > 0
        return jnp.where(per_entry(here, part), jnp.expand_dims(new, axis).astype(part.dtype), part)

    def scattered(part, new):
        # Elsewhere the index is that of no row, and nothing is written.
        problem = jnp.meshgrid(*map(jnp.arange, index.shape), indexing="ij")
        at = (*problem, jnp.where(where, index, part.shape[index.ndim]))
        return part.at[at].set(new.astype(part.dtype), mode="drop", unique_indices=True)

    def of_parts(part, new):
        if not has_one_axis(rows, part, 1) or may_be_sharded(part):
            return selected(part, new)
        # In a loop a GPU scatters in place: it moves one row, where a selection moves them all.
        return jax.lax.platform_dependent(part, new, cuda=scattered, rocm=scattered, default=selected)

    return each(of_parts, rows, new)


def products(rows: Rows, x: Vec) -> Float[Array, "*batch rows"]:
    """⟨rowᵢ, x⟩."""

    def of_parts(part, x_part):
        part = part.astype(x_part.dtype)
        if has_one_axis(x, x_part):
            return einsum("...md,...d->...m", part, x_part)
        return jnp.sum(part * jnp.expand_dims(x_part, x.batch_ndim), axis=own_axes(x, part, 1))

    return reduced(jnp.add, of_parts, rows, x)


def rows_one_by_one(rows: Rows) -> list[Vec]:
    """Each row, as a vector."""
    at = lambda i: each(lambda part: jax.lax.index_in_dim(part, i, _row_axis(rows, part, 1), keepdims=False), rows)
    return [at(i) for i in range(count_rows(rows))]


def gram(rows: Rows) -> Float[Array, "*batch rows rows"]:
    """⟨rowᵢ, rowⱼ⟩."""

    def of_part(part):
        if has_one_axis(rows, part, 1):
            return _contracted(part, jnp.swapaxes(part, -2, -1), length=part.shape[-1])
        by_i, by_j = (jnp.expand_dims(part, rows.batch_ndim + k) for k in (1, 0))
        return jnp.sum(by_i * by_j, axis=own_axes(rows, by_i, 2))

    return reduced(jnp.add, of_part, rows)


def row_norms(rows: Rows) -> Float[Array, "*batch rows"]:
    """‖rowᵢ‖₂."""
    return norm(Vector(rows.parts, rows.batch_ndim + 1, rows.over) if isinstance(rows, Vector) else rows)


def combine(weights: Float[Array, "*batch rows"], rows: Rows) -> Vec:
    """Σ weightsᵢ rowᵢ."""

    def of_part(part):
        part = part.astype(weights.dtype)
        if has_one_axis(rows, part, 1):
            return einsum("...m,...md->...d", weights, part)
        return jnp.sum(per_entry(weights, part) * part, axis=rows.batch_ndim)

    return each(of_part, rows)


def combine_rows(weights: Float[Array, "*batch new rows"], rows: Rows) -> Rows:
    """Rows Σ weightsₖᵢ rowᵢ, one for each k."""

    def of_part(part):
        if has_one_axis(rows, part, 1):
            return _contracted(weights, part, length=part.shape[-1])
        part = jnp.expand_dims(part, rows.batch_ndim)
        return jnp.sum(per_entry(weights, part) * part, axis=rows.batch_ndim + 1)

    return each(of_part, rows)


def matmul(
    x: Float[Array, "*batch i j"], y: Float[Array, "*batch j k"], weights: Float[Array, "*batch j"] | None = None
) -> Float[Array, "*batch i k"]:
    """Σⱼ xᵢⱼ weightsⱼ yⱼₖ of small matrices: where the platform is no CPU one kernel, without the memory of cuBLAS.

    (As a matrix of its own, x with weights would be held: it is 8 more states for Broyden(20) at 4096 × 32.)
    """
    w = jnp.ones_like(x[..., :1, :]) if weights is None else weights[..., None, :]
    product = lambda x, y, w: _product(x if weights is None else x * w, y)
    by_sums = lambda x, y, w: jnp.sum(x[..., None] * y[..., None, :, :] * w[..., None], axis=-2)
    return jax.lax.platform_dependent(x, y, w, cpu=product, default=by_sums)


def _contracted(x: Array, y: Array, length: int) -> Array:
    """The product of two matrices a problem, of which one holds vectors of this length."""
    return matmul(x, y) if length <= SHORT else _product(x, y)


def _product(x: Array, y: Array) -> Array:
    return einsum("...ij,...jk->...ik", x, y)


def _row_axis(x: Any, part: Array, rows: int = 0) -> int:
    """The axis of rows in a part: of rows, or of a vector that is to become one."""
    return x.batch_ndim if isinstance(x, Vector) else part.ndim - 1 - rows
