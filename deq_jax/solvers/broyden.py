"""Broyden's good method with limited memory: a secant model of the inverse Jacobian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import check_number, check_stopping, config
from deq_jax.solvers.base import choose, norm, orthogonalize, write_slot, zeros_from

GROWTH = 1.5  # a residual that grew by this factor is a step too far
SWEEPS = 4  # orthogonal iterations that find the leading part of a full memory
DAMPED_BELOW = 0.1  # Moré & Trangenstein's σ: an update may shrink det B⁻¹ by no more than this


class BroydenState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the last iterate that was kept
    g: Float[Array, "*batch dim"]  # and its residual
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    held: Bool[Array, "*batch rank"]  # slots in use; the others hold anything finite
    u: Float[Array, "*batch rank dim"]  # B = −I + Σ uᵢ vᵢᵀ over the held slots estimates the inverse Jacobian
    v: Float[Array, "*batch rank dim"]  # of g = f(z) − z
    cuts: Int[Array, "*batch"]  # of the present step
    ask: Float[Array, "*batch dim"]  # where f is to be evaluated next


@config
class Broyden:
    """Broyden's good method, paper Eq 10, holding `rank` updates; when they are full, their sum is compressed.

    Memory is 2·rank states. A full memory is never overwritten as a ring: B is a product of updates, and
    what is left after dropping the oldest factor is not an inverse of anything. Instead B + I is replaced by
    (close to) its best approximation of rank `keep`, half of `rank` by default (Broyden rank reduction, van de
    Rotten & Verduyn Lunel 2005); 0 starts afresh from −I. The update is damped where it would make B singular
    (Moré & Trangenstein 1976). A step that makes the residual grow by half, or f not finite, is taken back and
    shortened, up to `line_search` times in a row; its pair still improves B. One cut solves more of the random cells
    of experiments/robustness_study.py at no more evaluations; four pay on roots far away, and cost evaluations on
    linear problems, where good Broyden's residual grows before it falls. With 0 a step is never taken back.

    >>> Broyden(rank=12).rank
    12
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100
    rank: int = 20
    damping: float = 1.0
    keep: int | None = None
    line_search: int = 1

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "rank", at_least=1, whole=True, static=True)
        check_number(self, "damping", at_least=0, below=2)
        if self.keep is not None:
            check_number(self, "keep", at_least=0, below=self.rank - 1, whole=True, static=True)
        check_number(self, "line_search", at_least=0, whole=True, static=True)

    @property
    def recovers(self) -> bool:
        """Whether a step to where f is huge or not finite is cut rather than the end."""
        return self.line_search > 0

    def init(self, z: Float[Array, "*batch dim"]) -> BroydenState:
        zero = zeros_from(z)
        slots, known = jnp.stack([zero] * self.rank, axis=-2), zero[..., 0] > 0
        cuts = zero[..., 0].astype(jnp.int32)
        return BroydenState(jnp.zeros((), jnp.int32), zero, zero, known, slots[..., 0] > 0, slots, slots, cuts, z)

    def asks(self, state: BroydenState) -> Float[Array, "*batch dim"]:
        return state.ask

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
        # A step that makes the residual grow is not kept: its pair is, and the next step begins where it began.
        g_norm = norm(residual)
        finite = jnp.isfinite(g_norm)
        worse = ~finite | (g_norm > GROWTH * norm(state.g))
        back = moved & jnp.where(finite, worse & (state.cuts < self.line_search), self.line_search > 0)
        dg = jnp.where(finite[..., None], dg, 0)
        moved = moved & finite
        here_z, g = (jnp.where(back[..., None], old, new) for old, new in ((state.z, z), (state.g, residual)))
        here = jnp.arange(self.rank) == slot
        u, v, held = self._make_room(state, slot, state.known & jnp.any(dz != 0, axis=-1))
        # The slot in turn is held still: the estimate starts afresh, for a ring of updates estimates nothing.
        held = held & ~(moved & jnp.any(held & here, axis=-1))[..., None]
        mask = held.astype(z.dtype)

        both = jnp.stack([dg, g], axis=-2)
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
        b_g = b_g + new_u * jnp.einsum("...d,...d->...", new_v, g)[..., None]

        u, v = write_slot(u, new_u, slot, usable), write_slot(v, new_v, slot, usable)
        step, cuts = -self.damping * b_g, jnp.where(back, state.cuts + 1, 0)
        # At most half as far as the step that failed, a tenth where f was not finite.
        reach, ahead = jnp.where(finite, 0.5, 0.1) * norm(dz), norm(step)
        short = jnp.where(back & (ahead > reach), reach / jnp.where(ahead > 0, ahead, 1), 1)
        ask = here_z + short[..., None] * step
        held = held | (here & usable[..., None])
        return ask - z, BroydenState(state.count + 1, here_z, g, state.known | True, held, u, v, cuts, ask)

    def _make_room(self, state: BroydenState, slot: Int[Array, ""], where: Bool[Array, "*batch"]) -> tuple:
        """(u, v, held), in the problems of `where` cut down to `keep` updates in the last slots to be reached.

        When is read off the count that all problems share: asking whether some memory is full would be one more
        collective in each step of a sharded solve. Fewer updates than `keep` lose nothing.
        """
        keep = self.rank // 2 if self.keep is None else self.keep
        if keep == 0:
            return state.u, state.v, state.held
        overdue = state.count - 1 - self.rank
        due = (overdue >= 0) & (overdue % (self.rank - keep) == 0)

        def compress():
            mask = state.held[..., None].astype(state.u.dtype)
            u, v = compressed(mask * state.u, mask * state.v, keep)
            room = [(0, 0)] * (u.ndim - 2) + [(0, self.rank - keep), (0, 0)]
            place = lambda x: jnp.roll(jnp.pad(x, room), slot - keep, axis=-2)
            kept = (state.held & False) | jnp.roll(jnp.arange(self.rank) < keep, slot - keep)
            return choose(where, (place(u), place(v), kept), (state.u, state.v, state.held))

        return jax.lax.cond(due, compress, lambda: (state.u, state.v, state.held))


def compressed(
    u: Float[Array, "*batch rank dim"], v: Float[Array, "*batch rank dim"], keep: int
) -> tuple[Float[Array, "*batch keep dim"], Float[Array, "*batch keep dim"]]:
    """Fewer pairs with nearly the sum Σ uᵢ vᵢᵀ: its projection on leading right singular vectors."""
    # v = C q with orthonormal rows q, so Σ u vᵀ = wᵀ q with w = Cᵀ u, whose right singular vectors are those of
    # w wᵀ in the coordinates q. A few orthogonal iterations find them, without LAPACK calls on small matrices.
    q = orthonormal(v)
    w = jnp.einsum("...ij,...id->...jd", jnp.einsum("...id,...jd->...ij", v, q), u)
    gram = jnp.einsum("...id,...jd->...ij", w, w)
    scale = jnp.einsum("...ii->...", gram)[..., None, None]
    gram = gram / jnp.where(scale > 0, scale, 1)
    p = jax.lax.fori_loop(0, SWEEPS, lambda _, p: orthonormal(jnp.einsum("...ki,...ij->...kj", p, gram)), gram)
    p = p[..., :keep, :]
    return jnp.einsum("...ki,...id->...kd", p, w), jnp.einsum("...ki,...id->...kd", p, q)


def orthonormal(x: Float[Array, "*batch rows dim"]) -> Float[Array, "*batch rows dim"]:
    """The rows of x after Gram–Schmidt; zeros for a row that depends on those before it."""
    eps, rows = jnp.finfo(x.dtype).eps, x.shape[-2]

    def clean(i, q):
        row = jax.lax.dynamic_index_in_dim(x, i, axis=-2, keepdims=False)
        rest, _ = orthogonalize(row, q)
        length = norm(rest)
        good = length > 10 * rows * eps * norm(row)
        unit = jnp.where(good, 1 / jnp.where(good, length, 1), 0)[..., None] * rest
        return jax.lax.dynamic_update_index_in_dim(q, unit, i, axis=-2)

    return jax.lax.fori_loop(0, rows, clean, zeros_from(x))
