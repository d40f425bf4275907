"""Rows of vectors: the histories that solvers hold, in an array `[*batch, m, dim]` or in the parts of a `Vector`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import einsum, per_entry
from deq_jax._vectors import Rows, Vec, Vector, each, has_one_axis, norm, own_axes, reduced


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


def row(rows: Rows, index: Int[Array, ""]) -> Vec:
    """The row at an index that all problems share."""
    at = lambda part: jax.lax.dynamic_index_in_dim(part, index, axis=_row_axis(rows, part, 1), keepdims=False)
    return each(at, rows)


def write_row(rows: Rows, new: Vec, index: Int[Array, ""], where: Bool[Array, "*batch"]) -> Rows:
    """The rows with `new` written at one index, in the problems of `where`. In a loop XLA writes it in place."""

    def of_parts(part, new):
        # Both slices have the same start, so that one kernel reads the old row and writes the new one in place.
        axis = _row_axis(rows, part, 1)
        start = [jnp.zeros((), index.dtype)] * part.ndim
        start[axis] = index
        old = jax.lax.dynamic_slice(part, start, part.shape[:axis] + (1,) + part.shape[axis + 1 :])
        new = jnp.where(per_entry(where, old), jnp.expand_dims(new, axis), old)
        return jax.lax.dynamic_update_slice(part, new, start)

    return each(of_parts, rows, new)


def products(rows: Rows, x: Vec) -> Float[Array, "*batch rows"]:
    """⟨rowᵢ, x⟩."""

    def of_parts(part, x_part):
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
            return einsum("...id,...jd->...ij", part, part)
        by_i, by_j = (jnp.expand_dims(part, rows.batch_ndim + k) for k in (1, 0))
        return jnp.sum(by_i * by_j, axis=own_axes(rows, by_i, 2))

    return reduced(jnp.add, of_part, rows)


def row_norms(rows: Rows) -> Float[Array, "*batch rows"]:
    """‖rowᵢ‖₂."""
    return norm(Vector(rows.parts, rows.batch_ndim + 1) if isinstance(rows, Vector) else rows)


def combine(weights: Float[Array, "*batch rows"], rows: Rows) -> Vec:
    """Σ weightsᵢ rowᵢ."""

    def of_part(part):
        if has_one_axis(rows, part, 1):
            return einsum("...m,...md->...d", weights, part)
        return jnp.sum(per_entry(weights, part) * part, axis=rows.batch_ndim)

    return each(of_part, rows)


def combine_rows(weights: Float[Array, "*batch new rows"], rows: Rows) -> Rows:
    """Rows Σ weightsₖᵢ rowᵢ, one for each k."""

    def of_part(part):
        if has_one_axis(rows, part, 1):
            return einsum("...km,...md->...kd", weights, part)
        part = jnp.expand_dims(part, rows.batch_ndim)
        return jnp.sum(per_entry(weights, part) * part, axis=rows.batch_ndim + 1)

    return each(of_part, rows)


def outer(weights: Float[Array, "*#batch rows"], x: Vec) -> Rows:
    """Rows weightsᵢ x."""

    def of_part(part):
        part = jnp.expand_dims(part, _row_axis(x, part))
        return per_entry(weights, part) * part

    return each(of_part, x)


def _row_axis(x: Any, part: Array, rows: int = 0) -> int:
    """The axis of rows in a part: of rows, or of a vector that is to become one."""
    return x.batch_ndim if isinstance(x, Vector) else part.ndim - 1 - rows
