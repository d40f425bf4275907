"""Anderson acceleration (type II): extrapolate with the residuals' own differences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import check_number, config
from deq_jax.solvers.base import write_slot, zeros_from

UNROLLED = 8  # eliminate without a loop up to this history: faster to run, slower to compile


class AndersonState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    dz: Float[Array, "*batch history dim"]  # slot k mod history holds z_{k+1} − z_k; zeros where none is held
    dg: Float[Array, "*batch history dim"]
    gram: Float[Array, "*batch history history"]  # ⟨dg_i, dg_j⟩


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
        return AndersonState(jnp.zeros((), jnp.int32), zero, zero, zero[..., 0] > 0, slots, slots, gram)

    def resume(self, state: AndersonState) -> AndersonState:
        """The memory of a solve of a similar problem: its differences are a start, its last residual is not ours."""
        return state._replace(known=state.known & False)

    def update(
        self, residual: Float[Array, "*batch dim"], state: AndersonState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], AndersonState]:
        slot = (state.count - 1) % self.history
        dz, dg = z - state.z, residual - state.g
        # A problem that stopped is shown its best z again: it does not move, and what it holds must survive.
        new = state.known & jnp.any(dz != 0, axis=-1) & jnp.isfinite(jnp.einsum("...d,...d->...", dg, dg))
        dzs, dgs = write_slot(state.dz, dz, slot, new), write_slot(state.dg, dg, slot, new)

        row = jnp.einsum("...md,...d->...m", dgs, jnp.where(new[..., None], dg, 0))
        here = jnp.arange(self.history) == slot
        fresh = new[..., None, None] & (here[:, None] | here)
        gram = jnp.where(fresh, jnp.where(here, row[..., :, None], row[..., None, :]), state.gram)
        target = jnp.einsum("...md,...d->...m", dgs, residual)

        # γ = argmin ‖g − Σ γᵢ dgᵢ‖; then z + g, both less Σ γᵢ times their differences, is the new iterate.
        turn = lambda x, axes: functools.reduce(lambda x, axis: _newest_first(x, slot, axis), axes, x)
        gamma = turn(_least_squares(turn(gram, (-1, -2)), turn(target, (-1,)), self.ridge), (-1,))
        step = self.damping * residual - jnp.einsum("...m,...md->...d", gamma, dzs + self.damping * dgs)
        return step, AndersonState(state.count + 1, z, residual, state.known | True, dzs, dgs, gram)


def _newest_first(x: Float[Array, "..."], slot: Int[Array, ""], axis: int) -> Float[Array, "..."]:
    """x at (slot − i) mod m for i = 0 … m − 1, along an axis of length m. It is its own inverse."""
    flipped, m = jnp.flip(x, axis=axis), x.shape[axis]
    twice = jnp.concatenate([flipped, flipped], axis=axis)
    return jax.lax.dynamic_slice_in_dim(twice, (-1 - slot) % m, m, axis=axis)


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
