"""Anderson acceleration (type II): extrapolate with the residuals' own differences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import check_number, check_stopping, config
from deq_jax.solvers.base import norm, write_slot, zeros_from

UNROLLED = 8  # eliminate without a loop up to this history: faster to run, slower to compile


class AndersonState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    dz: Float[Array, "*batch history dim"]  # slot k mod history holds z_{k+1} − z_k; zeros where none is held
    dg: Float[Array, "*batch history dim"]
    gram: Float[Array, "*batch history history"]  # ⟨dg_i, dg_j⟩, or ⟨dz_i, dg_j⟩; zeros where none is in use
    lengths: Float[Array, "*batch 2 history"]  # ‖dz_i‖ and ‖dg_i‖
    least: Float[Array, "*batch"]  # the smallest residual since the history began


@config
class Anderson:
    """Anderson acceleration: Walker & Ni (2011), type II, with the last `history` differences.

    Equivalent to GMRES on linear problems while the history lasts. Memory is 2·history states. `ridge` is
    relative: it is added to a Gram matrix scaled to unit diagonal, so the scale of the problem is immaterial.
    A difference that depends on newer ones is left out, and a residual of more than `growth` times the least
    one since the history began starts a new history: it spoils no later step. `type=1` projects on the
    differences of z instead (Fang & Saad 2009): less robust, at times faster where f is nearly symmetric.

    >>> Anderson(history=4).damping
    1.0
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100
    history: int = 8
    ridge: float = 0.0
    damping: float = 1.0
    type: int = 2
    growth: float = 1.5

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "history", at_least=1, whole=True, static=True)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", at_least=0, below=2)
        check_number(self, "type", at_least=1, below=2, whole=True, static=True)
        check_number(self, "growth", at_least=1)

    def init(self, z: Float[Array, "*batch dim"]) -> AndersonState:
        zero, m = zeros_from(z), self.history
        slots = jnp.stack([zero] * m, axis=-2)
        gram = jnp.stack([slots[..., 0]] * m, axis=-1)
        none, lengths = zero[..., 0], jnp.stack([slots[..., 0]] * 2, axis=-2)
        count = jnp.zeros((), jnp.int32)
        return AndersonState(count, zero, zero, none > 0, slots, slots, gram, lengths, none + jnp.inf)

    def resume(self, state: AndersonState) -> AndersonState:
        """The memory of a solve of a similar problem: its differences are a start, its last residual is not ours."""
        return state._replace(known=state.known & False, least=zeros_from(state.least) + jnp.inf)

    def update(
        self, residual: Float[Array, "*batch dim"], state: AndersonState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], AndersonState]:
        slot = (state.count - 1) % self.history
        dz, dg, g_norm = z - state.z, residual - state.g, norm(residual)
        # A problem that stopped is shown its best z again: it does not move, and what it holds must survive.
        moved = state.known & jnp.any(dz != 0, axis=-1)
        new = moved & jnp.isfinite(norm(dg))
        dzs, dgs = write_slot(state.dz, dz, slot, new), write_slot(state.dg, dg, slot, new)

        # A residual that grew too much ends the history; with zeros in the Gram matrix a difference is unused.
        grown = moved & ~(g_norm <= self.growth * state.least)
        least = jnp.where(grown, g_norm, jnp.minimum(state.least, jnp.where(g_norm < jnp.inf, g_norm, jnp.inf)))
        here = jnp.arange(self.history) == slot
        tests = dgs if self.type == 2 else dzs
        dz, dg = (jnp.where(new[..., None], x, 0) for x in (dz, dg))
        column = jnp.einsum("...md,...d->...m", tests, dg)
        row = column if self.type == 2 else jnp.einsum("...md,...d->...m", dgs, dz)
        lengths = jnp.where(new[..., None, None] & here, jnp.stack([norm(dz), norm(dg)], -1)[..., None], state.lengths)
        old = jnp.where(grown[..., None, None], 0, state.gram)
        used = (jnp.einsum("...mm->...m", old) != 0) | here
        gram = jnp.where(new[..., None, None] & here, (used * column)[..., :, None], old)
        gram = jnp.where(new[..., None, None] & here[:, None], (used * row)[..., None, :], gram)
        target = jnp.einsum("...md,...d->...m", tests, residual)

        # γ = argmin ‖g − Σ γᵢ dgᵢ‖ (type I: g − Σ γᵢ dgᵢ ⟂ all dzᵢ); then z + g, both less Σ γᵢ times their
        # differences, is the new iterate.
        turn = lambda x, *axes: functools.reduce(lambda x, axis: _newest_first(x, slot, axis), axes, x)
        left, right = lengths[..., self.type - 1, :], lengths[..., 1, :]
        solved = _project(turn(gram, -1, -2), turn(target, -1), turn(left, -1), turn(right, -1), self.ridge)
        gamma = turn(solved, -1)
        step = self.damping * residual - jnp.einsum("...m,...md->...d", gamma, dzs + self.damping * dgs)
        known = state.known | True
        return step, AndersonState(state.count + 1, z, residual, known, dzs, dgs, gram, lengths, least)


def _newest_first(x: Float[Array, "..."], slot: Int[Array, ""], axis: int) -> Float[Array, "..."]:
    """x at (slot − i) mod m for i = 0 … m − 1, along an axis of length m. It is its own inverse."""
    flipped, m = jnp.flip(x, axis=axis), x.shape[axis]
    twice = jnp.concatenate([flipped, flipped], axis=axis)
    return jax.lax.dynamic_slice_in_dim(twice, (-1 - slot) % m, m, axis=axis)


def _project(
    gram: Float[Array, "*batch m m"],
    target: Float[Array, "*batch m"],
    left: Float[Array, "*batch m"],
    right: Float[Array, "*batch m"],
    ridge: float,
) -> Float[Array, "*batch m"]:
    """Solve gram γ = target, leaving out each column that depends on those before it (the newer ones).

    `left` and `right` are the lengths of the vectors whose products `gram` holds. Gauss-Jordan elimination, all
    problems at once: batched LAPACK calls on small matrices cost more than f.
    """
    m, eps = gram.shape[-1], jnp.finfo(gram.dtype).eps
    unit = jnp.eye(m, dtype=gram.dtype)
    used = jnp.einsum("...mm->...m", gram) != 0
    inverse = lambda length: jnp.where(used & (length > 0), 1 / jnp.where(length > 0, length, 1), 0)
    a = gram * inverse(left)[..., :, None] * inverse(right)[..., None, :] + ridge * unit
    table = jnp.concatenate([a, (target * inverse(left))[..., None]], axis=-1)

    def eliminate(j, carry):
        table, kept = carry
        column = jax.lax.dynamic_index_in_dim(table, j, axis=-1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(table, j, axis=-2, keepdims=False)
        pivot = jnp.einsum("...m,m->...", column, unit[j])  # sin² of the angle to the span of newer columns
        keep = jnp.abs(pivot) > 10 * m * eps
        row = row * jnp.where(keep, 1 / jnp.where(keep, pivot, 1), 0)[..., None]
        return table - (column - unit[j])[..., :, None] * row[..., None, :], kept + keep[..., None] * unit[j]

    carry = table, jnp.zeros_like(target)
    table, kept = jax.lax.fori_loop(0, m, eliminate, carry, unroll=m if m <= UNROLLED else 1)
    return jnp.where(kept > 0, table[..., -1], 0) * inverse(right)
