"""Broyden's good method with limited memory: a secant model of the inverse Jacobian."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import check_number, config
from deq_jax.solvers.base import write_slot, zeros_from

DAMPED_BELOW = 0.1  # Moré & Trangenstein's σ: an update may shrink det B⁻¹ by no more than this


class BroydenState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    held: Bool[Array, "*batch rank"]  # slots in use; the others hold anything finite
    u: Float[Array, "*batch rank dim"]  # B = −I + Σ uᵢ vᵢᵀ over the held slots estimates the inverse Jacobian
    v: Float[Array, "*batch rank dim"]  # of g = f(z) − z


@config
class Broyden:
    """Broyden's good method, paper Eq 10, holding `rank` updates and starting afresh when they are full.

    Memory is 2·rank states. A full memory is never overwritten as a ring: B is a product of updates, and
    what is left after dropping the oldest factor is not an inverse of anything. The update is damped where
    it would make B singular (Moré & Trangenstein 1976).

    >>> Broyden(rank=12).rank
    12
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100
    rank: int = 20
    damping: float = 1.0

    def __post_init__(self):
        check_number(self, "rtol", at_least=0)
        check_number(self, "atol", at_least=0)
        check_number(self, "max_steps", at_least=0, whole=True)
        check_number(self, "rank", at_least=1, whole=True, static=True)
        check_number(self, "damping", at_least=0, below=2)

    def init(self, z: Float[Array, "*batch dim"]) -> BroydenState:
        zero = zeros_from(z)
        slots, known = jnp.stack([zero] * self.rank, axis=-2), zero[..., 0] > 0
        return BroydenState(jnp.zeros((), jnp.int32), zero, zero, known, slots[..., 0] > 0, slots, slots)

    def resume(self, state: BroydenState) -> BroydenState:
        """The memory of a solve of a similar problem: its estimate is a start, its last residual is not ours."""
        return state._replace(known=state.known & False)

    def update(
        self, residual: Float[Array, "*batch dim"], state: BroydenState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], BroydenState]:
        slot = (state.count - 1) % self.rank
        dz, dg = z - state.z, residual - state.g
        # A problem that stopped is shown its best z again: it does not move, and what it holds must survive.
        moved = state.known & jnp.any(dz != 0, axis=-1)
        # The slot in turn is held already: the memory is full, and a new estimate begins from −I with this pair.
        here = jnp.arange(self.rank) == slot
        full = moved & jnp.any(state.held & here, axis=-1)
        held = state.held & ~full[..., None]
        u, v, mask = state.u, state.v, held.astype(z.dtype)

        both = jnp.stack([dg, residual], axis=-2)
        weights = mask[..., None, :] * jnp.einsum("...kd,...rd->...kr", both, v)
        b_dg, b_g = jnp.moveaxis(jnp.einsum("...kr,...rd->...kd", weights, u) - both, -2, 0)

        # B ← B + (dz − B dg) vᵀ / (vᵀ dg) with v = Bᵀ dz: the secant equation B dg = dz, least change.
        new_v = jnp.einsum("...r,...rd->...d", mask * jnp.einsum("...rd,...d->...r", u, dz), v) - dz
        curvature = jnp.einsum("...d,...d->...", dz, b_dg)
        length = jnp.einsum("...d,...d->...", dz, dz)
        gamma = curvature / jnp.where(length > 0, length, 1)
        sign = jnp.where(gamma < 0, -1, 1)
        near_singular = jnp.abs(gamma) < DAMPED_BELOW
        theta = jnp.where(near_singular, (1 - sign * DAMPED_BELOW) / jnp.where(near_singular, 1 - gamma, 1), 1)
        denominator = (1 - theta) * length + theta * curvature
        usable = moved & (denominator != 0) & jnp.isfinite(denominator)
        factor = jnp.where(usable, theta / jnp.where(usable, denominator, 1), 0)
        new_u = jnp.where(usable[..., None], factor[..., None] * (dz - b_dg), 0)
        new_v = jnp.where(usable[..., None], new_v, 0)
        b_g = b_g + new_u * jnp.einsum("...d,...d->...", new_v, residual)[..., None]

        u, v = write_slot(u, new_u, slot, usable), write_slot(v, new_v, slot, usable)
        known = state.known | True
        state = BroydenState(state.count + 1, z, residual, known, held | (here & usable[..., None]), u, v)
        return -self.damping * b_g, state
