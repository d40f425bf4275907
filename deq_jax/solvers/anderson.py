"""Anderson acceleration (type II): extrapolate with the residuals' own differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deq_jax._config import check_number, config


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
        check_number(self, "history", at_least=1, whole=True)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", at_least=0, below=2)

    def init(self, z: Float[Array, "*batch dim"]) -> AndersonState:
        zero, m = jnp.zeros_like(z), self.history
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

        newest_first = (slot - jnp.arange(m)) % m
        row = jnp.take(jnp.einsum("...md,...d->...m", dgs, dg), newest_first, axis=-1)
        gram = jnp.concatenate([row[..., 1:, None], state.gram[..., :-1, :-1]], axis=-1)
        gram = jnp.concatenate([row[..., None, :], gram], axis=-2)
        target = jnp.take(jnp.einsum("...md,...d->...m", dgs, residual), newest_first, axis=-1)

        # γ = argmin ‖g − Σ γᵢ dgᵢ‖; then z + g, both less Σ γᵢ times their differences, is the new iterate.
        gamma = jnp.take(_least_squares(gram, target, self.ridge), newest_first, axis=-1)
        step = self.damping * residual - jnp.einsum("...m,...md->...d", gamma, dzs + self.damping * dgs)
        return step, AndersonState(state.count + 1, z, residual, dzs, dgs, gram)


def _least_squares(
    gram: Float[Array, "*batch m m"], target: Float[Array, "*batch m"], ridge: float
) -> Float[Array, "*batch m"]:
    """Solve gram γ = target, leaving out each column that depends on those before it (the newer ones).

    Elimination goes through all problems at once: batched LAPACK calls on small matrices cost more than f.
    """
    m, eps = gram.shape[-1], jnp.finfo(gram.dtype).eps
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    a = gram * scale[..., :, None] * scale[..., None, :] + ridge * jnp.eye(m, dtype=gram.dtype)
    b = target * scale
    below = jnp.arange(m)

    def eliminate(j, carry):
        a, b, inverse = carry
        pivot = a[..., j, j]  # sin² of the angle between column j and the span of the newer ones
        keep = pivot > 10 * m * eps
        inv = jnp.where(keep, 1 / jnp.where(keep, pivot, 1), 0)
        factor = jnp.where(below > j, a[..., :, j] * inv[..., None], 0)
        a = a - factor[..., :, None] * a[..., None, j, :]
        b = b - factor * b[..., j, None]
        return a, b, inverse.at[..., j].set(inv)

    def substitute(k, carry):
        a, b, inverse, gamma = carry
        j = m - 1 - k
        value = (b[..., j] - jnp.einsum("...l,...l->...", a[..., j, :], gamma)) * inverse[..., j]
        return a, b, inverse, gamma.at[..., j].set(value)

    unroll = m <= 16
    a, b, inverse = jax.lax.fori_loop(0, m, eliminate, (a, b, jnp.zeros_like(b)), unroll=unroll)
    *_, gamma = jax.lax.fori_loop(0, m, substitute, (a, b, inverse, jnp.zeros_like(b)), unroll=unroll)
    return gamma * scale
