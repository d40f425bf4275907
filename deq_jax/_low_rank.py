"""Compression of a low-rank matrix that is held as a small core between long vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deq_jax._arrays import einsum, one_hot, reciprocal, zeros_from
from deq_jax._rows import combine_rows, gram, row_norms
from deq_jax._vectors import Rows


def projected(
    steps: Rows, core: Float[Array, "*batch slots slots"], keep: int
) -> tuple[Rows, Float[Array, "*batch keep keep"]]:
    """A = Σ coreᵢⱼ sᵢ sⱼᵀ, projected on what leads in A and Aᵀ: (orthonormal rows, the small core between them)."""
    # All in coordinates of the steps, made unit: no LAPACK calls on small matrices, one pass over the steps each way.
    lengths = row_norms(steps)
    inverse = reciprocal(lengths)
    times = lambda x, y: einsum("...ij,...jk->...ik", x, y)
    transposed = lambda x: jnp.swapaxes(x, -2, -1)
    products = gram(steps) * inverse[..., :, None] * inverse[..., None, :]
    core = core * lengths[..., :, None] * lengths[..., None, :]
    # The images of the steps by Aᵀ and by A.
    images = jnp.concatenate([times(products, core), times(products, transposed(core))], axis=-2)
    rows = leading_rows(images, products, keep)
    rows_s = times(rows, products)  # inner products of the rows with the steps
    small = times(times(rows_s, core), transposed(rows_s))
    return combine_rows(rows * inverse[..., None, :], steps), small


def leading_rows(
    x: Float[Array, "*batch rows slots"], gram: Float[Array, "*batch slots slots"], keep: int
) -> Float[Array, "*batch keep slots"]:
    """Orthonormal rows that span what is longest in x, in the inner product of `gram`; zeros where nothing is left.

    Gram–Schmidt, always on the longest of the rows that remain.
    """
    lowered = einsum("...rs,...st->...rt", x, gram)
    squares = lambda x, lowered: einsum("...rs,...rs->...r", x, lowered)
    floor = jnp.finfo(x.dtype).eps * jnp.max(squares(x, lowered), axis=-1)  # below it, `gram` is rounding

    def pick(i, carry):
        x, lowered, picked = carry
        square = squares(x, lowered)
        is_longest, most = one_hot(jnp.argmax(square, axis=-1), x.shape[-2], square), jnp.max(square, axis=-1)
        scale = jnp.where(most > floor, 1 / jnp.sqrt(jnp.where(most > floor, most, 1)), 0)
        unit, down = (scale[..., None] * einsum("...r,...rs->...s", is_longest, y) for y in (x, lowered))
        along = einsum("...rs,...s->...r", x, down)[..., None]
        picked = jax.lax.dynamic_update_index_in_dim(picked, unit, i, axis=-2)
        return x - along * unit[..., None, :], lowered - along * down[..., None, :], picked

    none = zeros_from(x[..., :keep, :])
    return jax.lax.fori_loop(0, keep, pick, (x, lowered, none))[2] if keep else none
