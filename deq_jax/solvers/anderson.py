"""Anderson acceleration (type II): extrapolate with the residuals' own differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deq_jax._config import check_number, config
from deq_jax.solvers.base import zeros_from

UNROLLED = 8  # eliminate without a loop up to this history: faster to run, slower to compile


class AndersonState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual
    dz: Float[Array, "*batch history dim"]  # slot k mod history holds z_{k+1} − z_k
    dg: Float[Array, "*batch history dim"]
    gram: Float[Array, "*batch history history"]  # ⟨dg_i, dg_j⟩, newest first


@config
class Anderson:
    """Anderson acceleration: Walker & Ni (2011), type II, with the last `history` differences.

    Equivalent to GMRES on linear problems while the history lasts. Memory is 2·history states. `ridge` is
    relative: it is added to a Gram matrix scaled to unit diagonal, so the scale of the problem is immaterial.

    >>> Anderson(history=4)
    Anderson(rtol=0.0001, atol=0.0, max_steps=100, history=4, ridge=0.0, damping=1.0)
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100
    history: int = 8
    ridge: float = 0.0
    damping: float = 1.0

    def __post_init__(self):
        check_number(self, "rtol", at_least=0)
        check_number(self, "atol", at_least=0)
        check_number(self, "max_steps", at_least=0, whole=True)
        check_number(self, "history", at_least=1, whole=True, static=True)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", at_least=0, below=2)

    def init(self, z: Float[Array, "*batch dim"]) -> AndersonState:
        zero, m = zeros_from(z), self.history
        slots = jnp.stack([zero] * m, axis=-2)
        gram = jnp.stack([slots[..., 0]] * m, axis=-1)
        return AndersonState(jnp.zeros((), jnp.int32), zero, zero, slots, slots, gram)

    def update(
        self, residual: Float[Array, "*batch dim"], state: AndersonState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], AndersonState]:
        m = self.history
        # The first call has no difference yet: its column stays zero, and a zero column is dropped below.
        known = (state.count > 0).astype(z.dtype)
        dz, dg = known * (z - state.z), known * (residual - state.g)
        slot = (state.count - 1) % m
        dzs = jax.lax.dynamic_update_index_in_dim(state.dz, dz, slot, axis=-2)
        dgs = jax.lax.dynamic_update_index_in_dim(state.dg, dg, slot, axis=-2)

        row = _newest_first(jnp.einsum("...md,...d->...m", dgs, dg), slot)
        gram = jnp.concatenate([row[..., 1:, None], state.gram[..., :-1, :-1]], axis=-1)
        gram = jnp.concatenate([row[..., None, :], gram], axis=-2)
        target = _newest_first(jnp.einsum("...md,...d->...m", dgs, residual), slot)

        # γ = argmin ‖g − Σ γᵢ dgᵢ‖; then z + g, both less Σ γᵢ times their differences, is the new iterate.
        gamma = _newest_first(_least_squares(gram, target, self.ridge), slot)  # the order is its own inverse
        step = self.damping * residual - jnp.einsum("...m,...md->...d", gamma, dzs + self.damping * dgs)
        return step, AndersonState(state.count + 1, z, residual, dzs, dgs, gram)


def _newest_first(x: Float[Array, "*batch m"], slot: Int[Array, ""]) -> Float[Array, "*batch m"]:
    """x at (slot − i) mod m for i = 0 … m − 1."""
    flipped = jnp.flip(x, axis=-1)
    twice = jnp.concatenate([flipped, flipped], axis=-1)
    return jax.lax.dynamic_slice_in_dim(twice, (-1 - slot) % x.shape[-1], x.shape[-1], axis=-1)


def _least_squares(
    gram: Float[Array, "*batch m m"], target: Float[Array, "*batch m"], ridge: float
) -> Float[Array, "*batch m"]:
    """Solve gram γ = target, leaving out each column that depends on those before it (the newer ones).

    Gauss-Jordan elimination, all problems at once: batched LAPACK calls on small matrices cost more than f.
    """
    m, eps = gram.shape[-1], jnp.finfo(gram.dtype).eps
    unit = jnp.eye(m, dtype=gram.dtype)
    diagonal = jnp.einsum("...mm->...m", gram)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    a = gram * scale[..., :, None] * scale[..., None, :] + ridge * unit
    table = jnp.concatenate([a, (target * scale)[..., None]], axis=-1)

    def eliminate(j, carry):
        table, kept = carry
        column = jax.lax.dynamic_index_in_dim(table, j, axis=-1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(table, j, axis=-2, keepdims=False)
        pivot = jnp.einsum("...m,m->...", column, unit[j])  # sin² of the angle to the span of newer columns
        keep = pivot > 10 * m * eps
        row = row * jnp.where(keep, 1 / jnp.where(keep, pivot, 1), 0)[..., None]
        return table - (column - unit[j])[..., :, None] * row[..., None, :], kept + keep[..., None] * unit[j]

    carry = table, jnp.zeros_like(target)
    table, kept = jax.lax.fori_loop(0, m, eliminate, carry, unroll=m if m <= UNROLLED else 1)
    return jnp.where(kept > 0, table[..., -1], 0) * scale
