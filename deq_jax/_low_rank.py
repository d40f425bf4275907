"""Compression of a low-rank matrix that is held as a small core between long vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deq_jax._arrays import einsum, one_hot, ratio, reciprocal, safe_sqrt, settled
from deq_jax._rows import combine_rows, gram, matmul, row_norms
from deq_jax._vectors import Rows


class Steps(NamedTuple):
    """What is to be known of the steps sᵢ for a projection. (A core scaled by lengths would be one more to hold.)"""

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
    rows, rows_s = leading_rows(core, Steps(lengths, products), keep)
    rows_s = rows_s * lengths[..., None, :]
    small = matmul(matmul(rows_s, core), jnp.swapaxes(rows_s, -2, -1))
    return combine_rows(rows * inverse[..., None, :], steps), small


def leading_rows(
    core: Float[Array, "*batch slots slots"], steps: Steps, keep: int
) -> tuple[Float[Array, "*batch keep slots"], Float[Array, "*batch keep slots"]]:
    """Orthonormal rows that span the longest images of the steps by Aᵀ and A, and their inner products with the steps.

    Gram–Schmidt, always on the longest of the images that remain, of which only the lengths are held. Rows are zero
    where nothing is left.
    """
    slots, lengths, gram = core.shape[-1], *steps
    images, squares = images_of_steps(core, steps)
    floor = jnp.finfo(core.dtype).eps * jnp.max(squares, axis=-1)  # below it, `gram` is rounding

    def pick(i, carry):
        squares, rows, rows_s = carry
        which = jnp.argmax(squares, axis=-1)
        longest, is_first = one_hot(which, 2 * slots, squares), (which < slots)[..., None]
        s = times(longest[..., :slots] + longest[..., slots:], gram) * lengths
        image = jnp.where(is_first, times(s, core), times_transposed(s, core)) * lengths
        for _ in range(2):  # once leaves rounding of what is taken away
            image = image - times(times_transposed(image, rows_s), rows)
        image_s = times(image, gram)
        square = jnp.sum(image * image_s, axis=-1)
        scale = ratio(1, safe_sqrt(square), where=square > floor)[..., None]
        row, row_s = scale * image, scale * image_s
        along = jnp.concatenate([times_transposed(row, images), times(row, images)], axis=-1)
        squares = jnp.where(longest > 0, 0, squares - along**2)
        put = lambda rows, new: jax.lax.dynamic_update_index_in_dim(rows, new, i, axis=-2)
        return squares, put(rows, row), put(rows_s, row_s)

    # Zeros, but no constant: XLA would write it early, while the memory is needed for the images.
    none = jnp.where((floor < 0)[..., None, None], core[..., :keep, :], 0)
    return jax.lax.fori_loop(0, keep, pick, (squares, none, none))[1:] if keep else (none, none)


def images_of_steps(
    core: Float[Array, "*batch slots slots"], steps: Steps
) -> tuple[Float[Array, "*batch slots slots"], Float[Array, "*batch images"]]:
    """(⟨Aᵀ sᵢ, sⱼ⟩, the squared lengths of all Aᵀ sᵢ and then of all A sᵢ)."""
    lengths, gram = steps
    by_transposed = matmul(gram, core, lengths) * lengths[..., None, :]  # Aᵀ sᵢ in coordinates
    images = matmul(by_transposed, gram)
    first = jnp.sum(images * by_transposed, axis=-1)
    # The images by A when those by Aᵀ are gone: it is here that a solve needs most memory.
    core, gram, images, first = settled((core, gram, images, first))
    by_A = lengths[..., :, None] * matmul(core, gram, lengths)
    return images, jnp.concatenate([first, jnp.sum(images * by_A, axis=-2)], axis=-1)


def times(x: Float[Array, "*batch i"], y: Float[Array, "*batch i j"]) -> Float[Array, "*batch j"]:
    """xᵀy, as a sum: on a CPU it takes as long as a matrix product, and less long to compile."""
    return jnp.sum(x[..., :, None] * y, axis=-2)


def times_transposed(x: Float[Array, "*batch j"], y: Float[Array, "*batch i j"]) -> Float[Array, "*batch i"]:
    """y x."""
    return einsum("...ij,...j->...i", y, x)
