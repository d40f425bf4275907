"""Broyden's good method with limited memory: a secant model of the inverse Jacobian, held as the steps taken.

With g = f(z) − z, a step asks for f at z + s,

    (1)  s = −t B g,  B = −I + Σ coreᵢⱼ sᵢ sⱼᵀ

where t is the step size and the sᵢ are the steps before. If the step taken is a multiple of s, dz = scaling · s, then
t stands for scaling · t below. With the new residual g⁺ and dg = g⁺ − g, the least change of B for which B dg = dz is

    (2)  B⁺ = B + u dzᵀB,  u = α (dz − B dg),  α = 1 / dzᵀB dg

By (1), B g = −dz / t, so B g⁺ is the only product needed: B dg = B g⁺ + dz / t. With slope = dzᵀB g⁺

    (3)  dzᵀB dg = slope + ‖dz‖² / t,  u = α ((1 − 1/t) dz − B g⁺)

The next direction d is −B⁺ g⁺ from the new iterate, or −B⁺ g from the old one if the step is rejected:

    (4)  accepted  d = −(1 − α slope) B g⁺ − α slope (1 − 1/t) dz
         rejected  d = −(α ‖dz‖² / t) B g⁺ + (1 + α ‖dz‖² (1 − 1/t)) / t dz

Solved for B g⁺, (4) gives u in terms of dz and d, hence of dz and the next step, the two vectors that are stored:

    (5)  accepted  u = α (1 − 1/t) / (1 − α slope) dz + α / (1 − α slope) d
         rejected  u = −1 / ‖dz‖² dz + t / ‖dz‖² d
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax import _low_rank
from deq_jax._arrays import at_most, einsum, one_hot, ratio, safe_sqrt, settled
from deq_jax._checks import check_number
from deq_jax._config import Number, config
from deq_jax._rows import appended, combine, first_rows, products, repeated, row, with_first_rows, write_row
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, divided, dot, is_same, norm, scaled, size, zero_of
from deq_jax.solvers.protocol import LoopOptions, Renewing, check_sees_all

GROWTH = 1.5  # a step that makes the residual grow by this factor is rejected
DAMPED_BELOW = 0.1  # Moré & Trangenstein's σ: an update may shrink det B⁻¹ by no more than this
USELESS = 1e-6  # reset the memory when ‖B g‖ is less than this part of ‖g‖ and the step rounds to zero
UNKNOWN, STILL, MOVED = range(3)  # what is known of the last move: nothing in a new solve, or whether z moved


class BroydenState(NamedTuple):
    """B = −I + Σ coreᵢⱼ sᵢ sⱼᵀ estimates the inverse Jacobian of g = f(z) − z."""

    count: Int[Array, "*#batch"]  # slots that are filled, as for Anderson; the step after z is in the last of them
    z: Vec  # the last iterate that was accepted
    g: Vec  # and its residual
    g_norm: Float[Array, "*batch"]
    motion: Int[Array, "*batch"]  # UNKNOWN where z and g belong to another f; else STILL or MOVED, by the last update
    steps: Rows  # sᵢ: the steps taken, then the next one; other slots hold anything finite
    core: Float[Array, "*batch slots slots"]  # zero for slots not in use
    last_used: Int[Array, "*batch"]  # the last slot with an entry in the core, −1 for none
    step_size: Float[Array, "*batch"]  # t: the next step is −t B g
    cuts: Int[Array, "*batch"]  # of the present step
    next_z: Vec  # where f is to be evaluated next


class Move(NamedTuple):
    """How z has moved since the last iterate that was accepted, and what its residual says of it."""

    dz_dz: Float[Array, "*batch"]  # ‖dz‖²
    moved: Bool[Array, "*batch"]
    reset: Bool[Array, "*batch"]  # whether B is set to −I
    taken: Bool[Array, "*batch"]  # whether dz is the step that was asked for, up to rounding and a factor
    scaling: Float[Array, "*batch"]  # that factor; 1 where not taken
    step_size: Float[Array, "*batch"]  # t with dz = −t B g; 1 where not taken
    finite: Bool[Array, "*batch"]  # whether g⁺ is
    rejected: Bool[Array, "*batch"]


@config
class Broyden(Renewing, LoopOptions):
    """Broyden's good method, paper Eq 10, holding `rank` updates; when they are full, their sum is compressed.

    Memory is rank + 1 states, half of what pairs take. A problem of few entries holds twice as many updates as entries,
    because more are of no use (Gay 1979). An update adds a multiple of (dz − B dg) dzᵀB. If dz = −t B g was a step of
    this method, dz − B dg is in the span of dz and the next step. So the solver keeps only its past steps (Kelley
    1995, §7.3) and a small matrix between them (Byrd, Nocedal & Schnabel 1994).

    A full memory is never overwritten as a ring, because B without its oldest update is not an inverse of
    anything. Instead B + I is projected on the `keep` directions that lead in it and in its transpose, half of `rank`
    by default (compare Broyden rank reduction, van de Rotten & Verduyn Lunel 2005); 0 restarts from −I. The
    update is damped where it would make B singular (Moré & Trangenstein 1976). A step that makes the residual grow by
    half, or f not finite, is taken back and shortened, up to `line_search` times in a row; its pair still improves B.
    One cut solves more of the random cells of experiments/studies/robustness.py at no more evaluations; four pay on
    roots far away, and cost evaluations on linear problems, where good Broyden's residual grows before it falls. With
    0 a step is never taken back.

    >>> Broyden(rank=12).rank
    12
    """

    rank: int = 20
    damping: Number = 1.0
    keep: int | None = None
    line_search: int = 1

    scale_free = True
    flat = False
    may_begin_apart = True

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "Broyden")
        check_number(self, "rank", at_least=1)
        check_number(self, "damping", above=0, at_most=2)
        if self.keep is not None:
            check_number(self, "keep", at_least=0, at_most=self.rank - 1)
        check_number(self, "line_search", at_least=0)

    @property
    def recovers(self) -> bool:
        """Whether a step to a point where f is huge or not finite is cut, instead of ending the solve."""
        return self.line_search > 0

    def can_backtrack(self, state: BroydenState) -> Bool[Array, "*batch"]:
        return (state.cuts >= 0) & (self.line_search > 0)

    def init(self, z: Vec) -> BroydenState:
        zero, none, slots = zeros_like(z), zero_of(z), max(1, at_most(self.rank, 2 * size(z))) + 1
        core, no = jnp.stack([jnp.stack([none] * slots, axis=-1)] * slots, axis=-1), none.astype(jnp.int32)
        count = jnp.zeros((), jnp.int32)
        return BroydenState(count, zero, zero, none, no, repeated(zero, slots), core, no - 1, none + 1, no, z)

    def next_point(self, state: BroydenState, z: Vec) -> Vec:
        return state.next_z

    def resume(self, state: BroydenState) -> BroydenState:
        """The memory of a solve of a similar problem: its estimate is a start, its last residual is not ours."""
        return state._replace(motion=zeros_like(state.motion))

    def is_full(self, state: BroydenState) -> Bool[Array, "*#batch"]:
        """Whether all slots are filled, so that the memory has to be compressed before the next round."""
        # By the count that all problems share: to ask whether one is full is one more collective in a sharded solve.
        return state.count == state.core.shape[-1]

    def round(self, residual: Vec, state: BroydenState, z: Vec) -> tuple[Vec, BroydenState]:
        """One update. Slots are filled in turn; once the last one is, `renewed` compresses them into the first ones."""
        slots, last, new = state.core.shape[-1], state.count - 1, state.count
        is_last, is_new = (one_hot(slot, slots, state.core[..., 0]) for slot in (last, new))
        dz, g_norm = z - state.z, norm(residual)
        move = settled(last_move(state, dz, row(state.steps, last), g_norm, self.line_search))
        g = choose(move.finite, residual, zeros_like(residual))
        from_z, from_g, from_norm = choose(move.rejected, (state.z, state.g, state.g_norm), (z, g, g_norm))

        steps = write_row(state.steps, divided(dz, move.scaling), last, move.taken)
        core = jnp.where(move.reset[..., None, None], 0, state.core)
        with_B = products_with_B(core, steps, g, dz, move.scaling[..., None] * is_last)
        weights = settled(weights_of(dot(with_B.dz_B, with_B.s_g), move))
        B_g = combine(with_B.g_in_steps, steps) - g
        direction = scaled(weights.d_of_Bg, B_g) + scaled(weights.d_of_dz, dz)  # (4)
        step, step_size, useless = self._next_step(direction, from_z, from_g, from_norm, move)

        # (5) in coordinates of the steps; d is the next step over its size. NaN, if any, is found a step later.
        motion, cuts = jnp.where(move.moved, MOVED, STILL), jnp.where(move.rejected, state.cuts + 1, 0)
        last_used = jnp.where(weights.usable, new, jnp.where(move.reset, -1, state.last_used))
        useless, last_used = useless & move.moved, jnp.where(useless & move.moved, -1, last_used)
        small = ratio(weights.u_of_d, step_size), step_size, useless, last_used, motion.astype(jnp.int32), cuts
        of_new, step_size, useless, last_used, motion, cuts = settled(small)
        u = (weights.u_of_dz * move.scaling)[..., None] * is_last + of_new[..., None] * is_new
        core = core + jnp.where(weights.usable[..., None, None], u[..., :, None] * with_B.dz_B[..., None, :], 0)  # (2)
        core = jnp.where(useless[..., None, None], 0, core)
        steps = write_row(steps, step, new, move.moved)
        next_z, start = from_z + step, (state.count + 1, from_z, from_g, from_norm, motion)
        return next_z - z, BroydenState(*start, steps, core, last_used, step_size, cuts, next_z)

    def renewed(self, state: BroydenState) -> BroydenState:
        """The memory with B + I projected, in the problems that moved, and the step −t B g computed anew."""
        slots = state.core.shape[-1]
        kept = (slots - 1) // 2 if self.keep is None else min(self.keep, slots - 2)
        rows, small = _low_rank.projected(state.steps, state.core, kept)
        weights = einsum("...ij,...j->...i", small, products(rows, state.g))
        step = scaled(state.step_size, state.g - combine(weights, rows))
        rim = (0, slots - kept)
        small = jnp.pad(small, [(0, 0)] * (small.ndim - 2) + [rim, rim])
        compressed = appended(rows, step), small, state.z + step
        before = first_rows(state.steps, kept + 1), state.core, state.next_z
        full = self.is_full(state)
        # Not `full & …`: the shared count makes jax 0.12 gather that mask over the devices of the problems.
        moved = state.motion == jnp.where(full, MOVED, UNKNOWN - 1)
        rows, core, next_z = choose(moved, compressed, before)
        steps = with_first_rows(state.steps, rows)
        count, last_used = jnp.where(full, kept + 1, state.count), jnp.where(moved, kept - 1, state.last_used)
        return state._replace(count=count, steps=steps, core=core, last_used=last_used, next_z=next_z)

    def _next_step(
        self, direction: Vec, z: Vec, g: Vec, g_norm: Array, move: Move
    ) -> tuple[Vec, Float[Array, "*batch"], Bool[Array, "*batch"]]:
        """(step, t, useless): the step (1) from z. Where the memory is useless, it is to be reset: a plain step."""
        # At most half as far as the step that was rejected, a tenth where f was not finite.
        step = scaled(self.damping, direction)
        length, longest = norm(step), jnp.where(move.finite, 0.5, 0.1) * safe_sqrt(move.dz_dz)
        cut = jnp.where(move.rejected & (length > longest), ratio(longest, length), 1)
        cut, length = settled((cut, length))
        step, step_size = scaled(cut, step), cut * self.damping
        # A memory is useless if it has overflowed, or if it gives no step although there is a residual.
        stays = is_same(z + step, z)
        useless = ~jnp.isfinite(length) | (stays & (length < USELESS * g_norm))
        step = choose(useless, scaled(self.damping, g), step)
        return step, jnp.where(useless, self.damping, step_size), useless


# ---- one update --------------------------------------------------------------------------------------------


def last_move(state: BroydenState, dz: Vec, s: Vec, g_norm: Float[Array, "*batch"], line_search: int) -> Move:
    """How z has moved, compared with the step s that was asked for.

    An optax chain may scale the step. A problem that stopped is shown its best z again, which is another point. Where z
    does not move at all, the state must not change.
    """
    dz_dz, dz_s, s_s = dot(dz, dz), dot(dz, s), dot(s, s)
    scaling = dz_s / jnp.where(s_s > 0, s_s, 1)  # not `ratio`: `taken` masks it
    known = state.motion != UNKNOWN
    taken = known & (dz_s > 0) & (dz_s * scaling > 0.9 * dz_dz)
    scaling, step_size = jnp.where(taken, scaling, 1), jnp.where(taken, state.step_size * scaling, 1)
    # A rejected step is taken back: its pair improves B, and the next step starts where it started.
    finite, grown = jnp.isfinite(g_norm), g_norm > GROWTH * state.g_norm
    rejected = taken & jnp.where(finite, grown & (state.cuts < line_search), line_search > 0)
    moved = ~known | (dz_dz > 0)
    # A resumed memory may still use the slot whose turn it is: B is reset to −I then.
    reset = moved & (state.last_used >= state.count)
    return Move(dz_dz, moved, reset, taken, scaling, step_size, finite, rejected)


class ProductsWithB(NamedTuple):
    """Products with B, in coordinates of the steps."""

    s_g: Float[Array, "*batch slots"]  # ⟨sᵢ, g⁺⟩
    g_in_steps: Float[Array, "*batch slots"]  # B g⁺ = −g⁺ + Σ g_in_stepsᵢ sᵢ
    dz_B: Float[Array, "*batch slots"]  # dzᵀB = Σ dz_Bⱼ sⱼᵀ


def products_with_B(core: Array, steps: Rows, g: Vec, dz: Vec, dz_in_steps: Array) -> ProductsWithB:
    """B g⁺ and dzᵀB, from two passes over the steps."""
    s_g, s_dz = products(steps, g), products(steps, dz)  # a pass for each: as one product they are slower
    g_in_steps = einsum("...ij,...j->...i", core, s_g)
    dz_B = einsum("...ij,...i->...j", core, s_dz) - dz_in_steps
    return settled(ProductsWithB(s_g, g_in_steps, dz_B))


def damped(
    curvature: Float[Array, "*batch"], dz_dz: Float[Array, "*batch"], where: Bool[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """(α of (2), where it is usable). α = 1 / dzᵀB dg, where `curvature` is dzᵀB dg.

    Where the update would make B nearly singular, (1 − θ) dz + θ B dg takes the place of B dg, and α = θ / its product
    with dz. α is 0 outside `where`, and where it is not finite.
    """
    gamma = curvature / jnp.where(dz_dz > 0, dz_dz, 1)  # not `ratio`: `where` masks it
    sign = jnp.where(gamma < 0, -1, 1)
    near_singular = jnp.abs(gamma) < DAMPED_BELOW
    theta = jnp.where(near_singular, (1 - sign * DAMPED_BELOW) / jnp.where(near_singular, 1 - gamma, 1), 1)
    denominator = (1 - theta) * dz_dz + theta * curvature
    usable = where & (denominator != 0) & jnp.isfinite(denominator)
    return ratio(theta, denominator, where=usable), usable


class Weights(NamedTuple):
    """The weights of (4) and (5)."""

    d_of_Bg: Float[Array, "*batch"]
    d_of_dz: Float[Array, "*batch"]
    u_of_dz: Float[Array, "*batch"]
    u_of_d: Float[Array, "*batch"]
    usable: Bool[Array, "*batch"]  # whether B is updated


def weights_of(slope: Float[Array, "*batch"], move: Move) -> Weights:
    """From slope = dzᵀB g⁺."""
    t, dz_dz, rejected = move.step_size, move.dz_dz, move.rejected
    curvature = slope + dz_dz / t  # (3)
    alpha, usable = damped(curvature, dz_dz, move.taken & move.finite & ~move.reset)
    remaining = 1 - alpha * slope
    d_of_Bg = jnp.where(rejected, -alpha * dz_dz / t, -remaining)
    d_of_dz = jnp.where(rejected, (1 + alpha * dz_dz * (1 - 1 / t)) / t, -alpha * slope * (1 - 1 / t))
    dz_dz = jnp.where(rejected, dz_dz, 1)  # positive: a step that is rejected was taken
    u_of_dz = jnp.where(rejected, -1 / dz_dz, alpha * (1 - 1 / t) / remaining)
    return Weights(d_of_Bg, d_of_dz, u_of_dz, jnp.where(rejected, t / dz_dz, alpha / remaining), usable)
