"""Broyden's good method with limited memory: a secant model of the inverse Jacobian, held as the steps taken."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import Budget, check_number, check_stopping, config
from deq_jax.solvers.base import at_most, choose, norm, one_hot, per_problem, root, write_slot, zeros_from

GROWTH = 1.5  # a residual that grew by this factor is a step too far
DAMPED_BELOW = 0.1  # Moré & Trangenstein's σ: an update may shrink det B⁻¹ by no more than this
USELESS = 1e-6  # B g this much shorter than g, and no step to take, is the end of a memory


class BroydenState(NamedTuple):
    """B = −I + Σ middleᵢⱼ sᵢ sⱼᵀ estimates the inverse Jacobian of g = f(z) − z."""

    count: Int[Array, ""]  # residuals seen
    z: Float[Array, "*batch dim"]  # the last iterate that was kept
    g: Float[Array, "*batch dim"]  # and its residual
    g_norm: Float[Array, "*batch"]
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    steps: Float[Array, "*batch slots dim"]  # sᵢ: the steps taken, then that asked for now; others hold anything finite
    middle: Float[Array, "*batch slots slots"]  # zero for slots not in use
    stretch: Float[Array, "*batch"]  # the step asked for is −stretch · B g
    cuts: Int[Array, "*batch"]  # of the present step
    ask: Float[Array, "*batch dim"]  # where f is to be evaluated next


@config
class Broyden:
    """Broyden's good method, paper Eq 10, holding `rank` updates; when they are full, their sum is compressed.

    Memory is rank + 1 states, half of what pairs take; a problem of few entries holds twice as many updates as entries,
    for no more are of use (Gay 1979). An update adds a multiple of (dz − B dg) dzᵀB. Where dz = −t B g was a step of
    this method, dz − B dg is in the span of dz and of the next step: so steps are all that is kept of the past
    (Kelley 1995, §7.3), around a small matrix (Byrd, Nocedal & Schnabel 1994).

    A full memory is never overwritten as a ring: what is left after dropping the oldest update is not an inverse of
    anything. Instead B + I is projected on the `keep` directions that lead in it and in its transpose, half of `rank`
    by default (compare Broyden rank reduction, van de Rotten & Verduyn Lunel 2005); 0 starts afresh from −I. The
    update is damped where it would make B singular (Moré & Trangenstein 1976). A step that makes the residual grow by
    half, or f not finite, is taken back and shortened, up to `line_search` times in a row; its pair still improves B.
    One cut solves more of the random cells of experiments/robustness_study.py at no more evaluations; four pay on
    roots far away, and cost evaluations on linear problems, where good Broyden's residual grows before it falls. With
    0 a step is never taken back.

    >>> Broyden(rank=12).rank
    12
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: Budget = 100
    rank: int = 20
    damping: float = 1.0
    keep: int | None = None
    line_search: int = 1

    scale_free = True

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "rank", at_least=1)
        check_number(self, "damping", above=0, at_most=2)
        if self.keep is not None:
            check_number(self, "keep", at_least=0, at_most=self.rank - 1)
        check_number(self, "line_search", at_least=0)

    @property
    def recovers(self) -> bool:
        """Whether a step to where f is huge or not finite is cut rather than the end."""
        return self.line_search > 0

    def can_backtrack(self, state: BroydenState) -> Bool[Array, "*batch"]:
        return (state.cuts >= 0) & (self.line_search > 0)

    def init(self, z: Float[Array, "*batch dim"]) -> BroydenState:
        zero, slots = zeros_from(z), at_most(self.rank, 2 * z.shape[-1]) + 1
        steps, none = jnp.stack([zero] * slots, axis=-2), zero[..., 0]
        middle, cuts = jnp.stack([steps[..., 0]] * slots, axis=-1), none.astype(jnp.int32)
        count = jnp.zeros((), jnp.int32)
        return BroydenState(count, zero, zero, none, none > 0, steps, middle, none + 1, cuts, z)

    def next_point(self, state: BroydenState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return state.ask

    def resume(self, state: BroydenState) -> BroydenState:
        """The memory of a solve of a similar problem: its estimate is a start, its last residual is not ours."""
        return state._replace(known=state.known & False)

    def update(
        self, residual: Float[Array, "*batch dim"], state: BroydenState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], BroydenState]:
        # Slots are filled in turn; when the last one is, what they hold is put into the first ones.
        rank = state.steps.shape[-2] - 1
        last, new = self._slot(state.count - 1, rank, compressed=True), self._slot(state.count, rank)
        is_last, is_new = (one_hot(slot, rank + 1, z) for slot in (last, new))
        dot = lambda x, y: jnp.einsum("...d,...d->...", x, y)

        # Was the step that was asked for also taken, but for rounding and a factor (of an optax chain)? It was not
        # where a problem that stopped is shown its best z; where z does not move at all, what is held must survive.
        asked = jax.lax.dynamic_index_in_dim(state.steps, last, axis=-2, keepdims=False)
        dz = z - state.z
        length, onto, planned = dot(dz, dz), dot(dz, asked), dot(asked, asked)
        share = onto / jnp.where(planned > 0, planned, 1)
        moved = ~state.known | (length > 0)
        taken = state.known & (onto > 0) & (onto * share > 0.9 * length)
        share, stretch = jnp.where(taken, share, 1), jnp.where(taken, state.stretch * share, 1)

        # A step that makes the residual grow is not kept: its pair is, and the next step begins where it began.
        g_norm = norm(residual)
        finite = jnp.isfinite(g_norm)
        worse = g_norm > GROWTH * state.g_norm
        back = taken & jnp.where(finite, worse & (state.cuts < self.line_search), self.line_search > 0)
        g = jnp.where(finite[..., None], residual, 0)
        here_z, here_g, here_norm = choose(back, (state.z, state.g, state.g_norm), (z, g, g_norm))

        # A slot in turn that is in use is held still, in a memory that was resumed: the estimate starts afresh.
        in_turn = jnp.maximum(is_new[..., :, None], is_new[..., None, :])
        afresh = moved & jnp.any(state.middle * in_turn != 0, axis=(-2, -1))
        middle = jnp.where(afresh[..., None, None], 0, state.middle)
        steps, dz_in_steps = write_slot(state.steps, dz / share[..., None], last, taken), share[..., None] * is_last
        along = lambda x: jnp.einsum("...sd,...d->...s", steps, x)  # a pass for each: as one product they are slower
        s_g = along(g)
        weights = jnp.einsum("...ij,...j->...i", middle, s_g)  # B g = −g + Σ weightsᵢ sᵢ
        row = jnp.einsum("...ij,...i->...j", middle, along(dz)) - dz_in_steps  # dzᵀB = Σ rowⱼ sⱼᵀ
        slope = jnp.einsum("...s,...s->...", row, s_g)  # dzᵀB g

        # B ← B + (dz − B dg) dzᵀB / (dzᵀB dg): the secant equation B dg = dz, least change. B dg is B g + dz / stretch.
        factor, usable = damped(slope + length / stretch, length, taken & finite & ~afresh)

        # With u = factor (dz − B dg) the next direction is −(B + u dzᵀB) g: of the new g it is −B g less slope u; of
        # the old one, where a step is taken back, dz / stretch plus u length / stretch.
        rest, idle = 1 - factor * slope, 1 - 1 / stretch
        of_bg = jnp.where(back, -factor * length / stretch, -rest)
        of_dz = jnp.where(back, (1 + factor * length * idle) / stretch, -factor * slope * idle)
        mixed = of_bg[..., None] * weights + of_dz[..., None] * dz_in_steps
        direction = jnp.einsum("...s,...sd->...d", mixed, steps) - of_bg[..., None] * g

        # At most half as far as the step that failed, a tenth where f was not finite.
        step, cuts = per_problem(self.damping) * direction, jnp.where(back, state.cuts + 1, 0)
        reach, ahead = jnp.where(finite, 0.5, 0.1) * root(length), norm(step)
        short = jnp.where(back & (ahead > reach), reach / jnp.where(ahead > 0, ahead, 1), 1)
        step, next_stretch = short[..., None] * step, short * self.damping
        # A memory that has overflowed, or that leaves nothing to do about a residual, is given up.
        stays = jnp.all(here_z + step == here_z, axis=-1)
        lost = ~jnp.isfinite(ahead) | (stays & (ahead < USELESS * here_norm))
        step = jnp.where(lost[..., None], per_problem(self.damping) * here_g, step)
        next_stretch = jnp.where(lost, self.damping, next_stretch)

        # The same the other way around: u by dz and by the step that follows.
        safe = jnp.where(length > 0, length, 1)
        u_dz = jnp.where(back, -1 / safe, factor * idle / rest)
        u_new = jnp.where(back, stretch / safe, factor / rest) / jnp.where(next_stretch > 0, next_stretch, 1)
        u = u_dz[..., None] * dz_in_steps + u_new[..., None] * is_new
        middle = middle + jnp.where(usable[..., None, None], u[..., :, None] * row[..., None, :], 0)
        middle = jnp.where((lost & moved)[..., None, None], 0, middle)
        steps = write_slot(steps, step, new, moved)

        # By the count that all problems share: to ask whether one is full is one more collective in a sharded solve.
        compress = lambda: self._compressed(moved, steps, middle, step, next_stretch, here_g)
        steps, middle, step = jax.lax.cond(new == rank, compress, lambda: (steps, middle, step))
        ask = here_z + step
        known = state.known | True
        memory = BroydenState(state.count + 1, here_z, here_g, here_norm, known, steps, middle, next_stretch, cuts, ask)
        return ask - z, memory

    def _slot(self, count: Int[Array, ""], rank: int, compressed: bool = False) -> Int[Array, ""]:
        """Where the step after `count` earlier residuals is written, or where it is once the memory is compressed."""
        kept = self._kept(rank)
        slot = jnp.where(count <= rank, count, kept + 1 + (count - rank - 1) % (rank - kept))
        return jnp.where(slot == rank, kept, slot) if compressed else slot

    def _kept(self, rank: int) -> int:
        return rank // 2 if self.keep is None else min(self.keep, rank - 1)

    def _compressed(self, where, steps, middle, step, stretch, g) -> tuple:
        """(steps, middle, step) with B + I projected, in the problems of `where`, and the step −stretch · B g anew."""
        kept = self._kept(steps.shape[-2] - 1)
        rows, core = projected(steps, middle, kept)
        weights = jnp.einsum("...ij,...j->...i", core, jnp.einsum("...kd,...d->...k", rows, g))
        again = stretch[..., None] * (g - jnp.einsum("...k,...kd->...d", weights, rows))
        rows = jnp.concatenate([rows, again[..., None, :]], axis=-2)
        rim = (0, middle.shape[-1] - kept)
        core = jnp.pad(core, [(0, 0)] * (core.ndim - 2) + [rim, rim])
        rows, core, again = choose(where, (rows, core, again), (steps[..., : kept + 1, :], middle, step))
        return jax.lax.dynamic_update_slice_in_dim(steps, rows, 0, axis=-2), core, again


def damped(
    curvature: Float[Array, "*batch"], length: Float[Array, "*batch"], where: Bool[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """(factor, usable): 1 / dzᵀB dg, or θ over what it is with B dg drawn to dz where B would become singular.

    curvature is dzᵀB dg, length dzᵀdz; factor is 0 where the pair is not usable, as out of `where`.
    """
    gamma = curvature / jnp.where(length > 0, length, 1)
    sign = jnp.where(gamma < 0, -1, 1)
    near_singular = jnp.abs(gamma) < DAMPED_BELOW
    theta = jnp.where(near_singular, (1 - sign * DAMPED_BELOW) / jnp.where(near_singular, 1 - gamma, 1), 1)
    denominator = (1 - theta) * length + theta * curvature
    usable = where & (denominator != 0) & jnp.isfinite(denominator)
    return jnp.where(usable, theta / jnp.where(usable, denominator, 1), 0), usable


def projected(
    steps: Float[Array, "*batch slots dim"], middle: Float[Array, "*batch slots slots"], keep: int
) -> tuple[Float[Array, "*batch keep dim"], Float[Array, "*batch keep keep"]]:
    """A = Σ middleᵢⱼ sᵢ sⱼᵀ, projected on what leads in A and Aᵀ: (orthonormal rows, the middle between them)."""
    # All in coordinates of the steps, made unit: no LAPACK calls on small matrices, one pass over the steps each way.
    lengths = norm(steps)
    inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    times = lambda x, y: jnp.einsum("...ij,...jk->...ik", x, y)
    turned = lambda x: jnp.swapaxes(x, -2, -1)
    gram = jnp.einsum("...id,...jd->...ij", steps, steps) * inverse[..., :, None] * inverse[..., None, :]
    middle = middle * lengths[..., :, None] * lengths[..., None, :]
    images = jnp.concatenate([times(gram, middle), times(gram, turned(middle))], axis=-2)  # of the steps, by Aᵀ and A
    rows = leading_rows(images, gram, keep)
    onto = times(rows, gram)
    core = times(times(onto, middle), turned(onto))
    return jnp.einsum("...ks,...sd->...kd", rows * inverse[..., None, :], steps), core


def leading_rows(
    x: Float[Array, "*batch rows slots"], gram: Float[Array, "*batch slots slots"], keep: int
) -> Float[Array, "*batch keep slots"]:
    """Gram–Schmidt in the inner product of `gram`, by turns on the longest row that is left; zeros where none is."""
    lowered = jnp.einsum("...rs,...st->...rt", x, gram)
    squares = lambda x, lowered: jnp.einsum("...rs,...rs->...r", x, lowered)
    enough = jnp.finfo(x.dtype).eps * jnp.max(squares(x, lowered), axis=-1)  # below is what `gram` has rounded

    def pick(i, carry):
        x, lowered, picked = carry
        square = squares(x, lowered)
        longest, most = one_hot(jnp.argmax(square, axis=-1), x.shape[-2], square), jnp.max(square, axis=-1)
        scale = jnp.where(most > enough, 1 / jnp.sqrt(jnp.where(most > enough, most, 1)), 0)
        unit, down = (scale[..., None] * jnp.einsum("...r,...rs->...s", longest, y) for y in (x, lowered))
        along = jnp.einsum("...rs,...s->...r", x, down)[..., None]
        picked = jax.lax.dynamic_update_index_in_dim(picked, unit, i, axis=-2)
        return x - along * unit[..., None, :], lowered - along * down[..., None, :], picked

    none = zeros_from(x[..., :keep, :])
    return jax.lax.fori_loop(0, keep, pick, (x, lowered, none))[2] if keep else none
