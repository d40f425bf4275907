"""Broyden's good method with limited memory: a secant model of the inverse Jacobian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deq_jax._config import check_number, config
from deq_jax.solvers.base import zeros_from

DAMPED_BELOW = 0.1  # Moré & Trangenstein's σ: an update may shrink det B⁻¹ by no more than this


class BroydenState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual
    u: Float[Array, "*batch rank dim"]  # B = −I + Σ uᵢ vᵢᵀ estimates the inverse Jacobian of g = f(z) − z
    v: Float[Array, "*batch rank dim"]


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
        slots = jnp.stack([zero] * self.rank, axis=-2)
        return BroydenState(jnp.zeros((), jnp.int32), zero, zero, slots, slots)

    def update(
        self, residual: Float[Array, "*batch dim"], state: BroydenState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], BroydenState]:
        # Pair k goes to slot k mod rank; slot 0 begins a new estimate from B = −I with the latest pair.
        slot = (state.count - 1) % self.rank
        held = (jnp.arange(self.rank) < slot).astype(z.dtype)
        u, v = state.u, state.v
        dz, dg = z - state.z, residual - state.g

        both = jnp.stack([dg, residual], axis=-2)
        weights = held * jnp.einsum("...kd,...rd->...kr", both, v)
        b_dg, b_g = jnp.moveaxis(jnp.einsum("...kr,...rd->...kd", weights, u) - both, -2, 0)

        # B ← B + (dz − B dg) vᵀ / (vᵀ dg) with v = Bᵀ dz: the secant equation B dg = dz, least change.
        new_v = jnp.einsum("...r,...rd->...d", held * jnp.einsum("...rd,...d->...r", u, dz), v) - dz
        curvature = jnp.einsum("...d,...d->...", dz, b_dg)
        length = jnp.einsum("...d,...d->...", dz, dz)
        gamma = curvature / jnp.where(length > 0, length, 1)
        sign = jnp.where(gamma < 0, -1, 1)
        near_singular = jnp.abs(gamma) < DAMPED_BELOW
        theta = jnp.where(near_singular, (1 - sign * DAMPED_BELOW) / jnp.where(near_singular, 1 - gamma, 1), 1)
        denominator = (1 - theta) * length + theta * curvature
        usable = (state.count > 0) & (denominator != 0)
        factor = jnp.where(usable, theta / jnp.where(usable, denominator, 1), 0)
        new_u = factor[..., None] * (dz - b_dg)
        b_g = b_g + new_u * jnp.einsum("...d,...d->...", new_v, residual)[..., None]

        u = jax.lax.dynamic_update_index_in_dim(u, new_u, slot, axis=-2)
        v = jax.lax.dynamic_update_index_in_dim(v, new_v, slot, axis=-2)
        return -self.damping * b_g, BroydenState(state.count + 1, z, residual, u, v)
