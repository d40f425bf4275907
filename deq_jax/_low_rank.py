"""Compression of a low-rank matrix that is held as a small core between long vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deq_jax._arrays import einsum, one_hot, ratio, reciprocal, safe_sqrt, zeros_from
from deq_jax._rows import combine_rows, gram, matmul, row_norms
from deq_jax._vectors import Rows


class Steps(NamedTuple):
    """What the projection needs to know of the steps sᵢ."""

    lengths: Float[Array, "*batch slots"]
    gram: Float[Array, "*batch slots slots"]  # inner products of the steps, made unit


def projected(
    steps: Rows, core: Float[Array, "*batch slots slots"], keep: int
) -> tuple[Rows, Float[Array, "*batch keep keep"]]:
    """A = Σ coreᵢⱼ sᵢ sⱼᵀ, projected on what leads in A and Aᵀ: (orthonormal rows, the small core between them)."""
    # All in coordinates of the steps, made unit: no LAPACK calls on small matrices, one pass over the steps each way.
    lengths = row_norms(steps)
    inverse = reciprocal(lengths)
    products = gram(steps) * inverse[..., :, None] * inverse[..., None, :]
    rows = leading_rows(core, Steps(lengths, products), keep)
    rows_s = matmul(rows, products) * lengths[..., None, :]  # inner products of the rows with the steps
    small = matmul(matmul(rows_s, core), jnp.swapaxes(rows_s, -2, -1))
    return combine_rows(rows * inverse[..., None, :], steps), small


def leading_rows(
    core: Float[Array, "*batch slots slots"], steps: Steps, keep: int
) -> Float[Array, "*batch keep slots"]:
    """Orthonormal rows that span the longest images of the unit steps by Aᵀ and A; zeros where nothing is left.

    Gram–Schmidt, always on the longest of the images that remain. Of all images only the lengths are held.
    """
    slots, lengths = core.shape[-1], steps.lengths
    with_gram = lambda x: einsum("...i,...ij->...j", x, steps.gram)
    by_A = lambda x: einsum("...ij,...j->...i", core, x * lengths) * lengths
    by_A_transposed = lambda x: einsum("...i,...ij->...j", x * lengths, core) * lengths
    squares = squared_images(core, steps)
    floor = jnp.finfo(core.dtype).eps * jnp.max(squares, axis=-1)  # below it, `gram` is rounding

    def pick(i, carry):
        squares, rows = carry
        longest = one_hot(jnp.argmax(squares, axis=-1), 2 * slots, squares)
        image = by_A_transposed(with_gram(longest[..., :slots])) + by_A(with_gram(longest[..., slots:]))
        for _ in range(2):  # once leaves rounding of what is taken away
            along = einsum("...ks,...s->...k", rows, with_gram(image))
            image = image - einsum("...k,...ks->...s", along, rows)
        lowered = with_gram(image)
        square = einsum("...s,...s->...", image, lowered)
        scale = ratio(1, safe_sqrt(square), where=square > floor)[..., None]
        unit, lowered = scale * image, scale * lowered
        along = jnp.concatenate([with_gram(by_A(lowered)), with_gram(by_A_transposed(lowered))], axis=-1)
        squares = jnp.where(longest > 0, 0, squares - along**2)
        return squares, jax.lax.dynamic_update_index_in_dim(rows, unit, i, axis=-2)

    none = zeros_from(core[..., :keep, :])
    return jax.lax.fori_loop(0, keep, pick, (squares, none))[1] if keep else none


def squared_images(core: Float[Array, "*batch slots slots"], steps: Steps) -> Float[Array, "*batch images"]:
    """‖Aᵀ ŝᵢ‖² of the unit steps ŝᵢ, and then ‖A ŝᵢ‖²."""
    lengths, products = steps
    images = matmul(products * lengths[..., None, :], core) * lengths[..., None, :]
    first = jnp.sum(matmul(images, products) * images, axis=-1)
    # The images by A when those by Aᵀ are gone: it is here that a solve needs most memory.
    core, products, first = jax.lax.optimization_barrier((core, products, first))
    images = lengths[..., :, None] * matmul(core, lengths[..., :, None] * products)
    return jnp.concatenate([first, jnp.sum(matmul(products, images) * images, axis=-2)], axis=-1)
