"""Anderson acceleration (type II): extrapolate with the differences of earlier iterates and residuals.

With g = f(z) − z, the damping β and the last m differences of two successive iterates, one step is

    (1)  w = z + β g                                     the plain step
    (2)  dwᵢ = wᵢ₊₁ − wᵢ,  dgᵢ = gᵢ₊₁ − gᵢ                  the history
    (3)  A γ = b  with  Aᵢⱼ = ⟨dgᵢ, dgⱼ⟩,  bᵢ = ⟨dgᵢ, g⟩      so γ = argmin ‖g − Σ γᵢ dgᵢ‖
    (4)  z ← w − Σ γᵢ dwᵢ

The textbook form of (4) is z + β g − Σ γᵢ (dzᵢ + β dgᵢ). Since dw = dz + β dg, storing dw in place of dz saves a pass
over one of the two histories. How (3) is kept up to date and solved, with a ridge, is in `deq_jax._gram`.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax import _gram
from deq_jax._arrays import root_of_sums, settled, zeros_from
from deq_jax._checks import check_number
from deq_jax._config import STATIC, Number, config
from deq_jax._rows import combine, count_rows, products, repeated, rolled, row, rows_one_by_one, write_row
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, dot, norm, product, rounded, scaled, squares, sums, zero_of
from deq_jax.solvers.history_dtype import check_history_dtype, history_dtype
from deq_jax.solvers.protocol import LoopOptions

# After WINDOW·history evaluations in which the residual has not fallen below FALLEN times its mark, steps are plain
# until it is below RESTED times the mark, or grows. Without this 473 of 14,000 kinked contractions in one and two
# dimensions (medians and maxima of affine maps; float64, 1e-9, at most 1000 evaluations) do not converge; with it all
# do. A fixed number of plain steps leaves 453 of them where the history is 2. RESTED = 0.9 costs 5 % more evaluations
# there. Of 909 random cells (experiments/shared/cells.py, seeds 0 to 29), WINDOW = 2 lost 10 and WINDOW = 3 lost
# one, both with type I, which was removed since.
WINDOW, FALLEN, RESTED = 3, 0.9, 0.5

NONE, PLAIN, MIXED, BACK = range(4)  # the last step: unknown, plain, extrapolated, or back to the plain one before
FEW = 5  # up to this history a GPU takes all products of a step in one kernel


class AndersonState(NamedTuple):
    count: Int[Array, "*#batch"]  # residuals seen, by all problems, or by each where they began apart
    w: Vec  # (1) at the previous iterate
    g: Vec  # and its residual; `gram` holds its products with the history
    last: Int[Array, "*batch"]  # what the last step was; NONE where w and g belong to another f
    dw: Rows  # slot k mod history holds w_{k+1} − w_k; zeros where none is held
    dg: Rows
    gram: Float[Array, "*batch rows history"]  # A of (3), with zeros on the diagonal where not in use, and b below it
    least: Float[Array, "*batch"]  # the smallest residual since the history began
    mark: Float[Array, "*batch"]  # the residual when it last fell enough
    since: Int[Array, "*batch"]  # evaluations since then; −1 during plain steps


@config
class Anderson(LoopOptions):
    """Anderson acceleration: Walker & Ni (2011), type II, with the last `history` differences.

    Equivalent to GMRES on linear problems while the history lasts. Memory is 2·history states. `ridge` is relative: it
    is added to a Gram matrix scaled to unit diagonal, so the scale of the problem is immaterial. A difference that
    depends on newer ones is left out, and a residual of more than `growth` times the smallest one since the history
    began starts a new history, so a bad iterate spoils no later step. A step to where f is not finite is replaced by
    the plain step from the iterate before. A residual that stagnates, as it may near the kinks of a contraction, is
    followed by plain steps until it has fallen.

    Type I, which projects on the differences of z (Fang & Saad 2009), is not offered: it is less robust. In
    experiments/studies/robustness.py (seeds 1000 to 1019, float32) both types solved 95.0 % of the plain random cells,
    but type I solved 40.5 % of the hard ones against 56.8 %, and 14 of the 54 classical systems against 18. On the
    symmetric families it saved no evaluations.

    With `history_dtype="bfloat16"` (or "float32" for float64 states) the differences take half the memory, and moving
    them half the time. What their rounding leaves out is part of the next difference, so that it does not add up, and
    the residual that is tested remains exact. On the random cells of experiments/shared/cells.py it costs 1 to 3 %
    more evaluations (float32 states, rtol 1e-4 and 1e-5); of bfloat16 states at rtol 1e-2, 4 to 6 of 127 cells are no
    longer solved. Hence it is not the default (`python -m experiments.studies.history`). The backward solver that
    `Implicit` derives has it too.

    With `test_every=k`, k − 1 plain steps lie between two iterates that are tested and mixed (Pratapa, Suryanarayana &
    Pask 2016, "Anderson acceleration of the Jacobi iterative method"): more evaluations, and fewer of all else. That
    pays where f costs less than a step of the history and contracts. Where f expands, an eigenvalue of Jᵏ may be
    greater than 1, and a short history fails. `Picard(test_every=k)` describes what stays the same.

    >>> Anderson(history=4).damping
    1.0
    """

    history: int = 8
    ridge: Number = 0.0
    damping: Number = 1.0
    growth: Number = 1.5
    history_dtype: Any = dataclasses.field(default=None, kw_only=True, metadata=STATIC)

    scale_free = True
    flat = False
    may_begin_apart = True

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "history", at_least=1)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", above=0, at_most=2)
        check_number(self, "growth", at_least=1, finite=False)
        check_history_dtype(self)

    def init(self, z: Vec) -> AndersonState:
        zero, none = zeros_like(z), zero_of(z)
        slots = repeated(zero.astype(history_dtype(self, z.dtype)), self.history)
        column = jnp.stack([none] * (self.history + 1), axis=-1)
        gram = jnp.stack([column] * self.history, axis=-1)
        count, unknown = jnp.zeros((), jnp.int32), none.astype(jnp.int32)
        return AndersonState(count, zero, zero, unknown, slots, slots, gram, none, none, unknown)

    def resume(self, state: AndersonState) -> AndersonState:
        """The memory of a solve of a similar problem: its differences are a start, its last residual is not ours."""
        return state._replace(last=zeros_from(state.last), since=zeros_from(state.since))

    def can_backtrack(self, state: AndersonState) -> Bool[Array, "*batch"]:
        """Whether f may turn out not finite: after a step that was extrapolated. The plain one is taken instead."""
        return state.last == MIXED

    def next_point(self, state: AndersonState, z: Vec) -> Vec:
        """z, the sum of iterate and step; exactly the plain iterate w where the step is the plain one.

        So a step back is exact from an iterate that is huge or not finite.
        """
        return choose((state.last == MIXED) if self.history_dtype is None else (state.last != BACK), z, state.w)

    def update(self, residual: Vec, state: AndersonState, z: Vec) -> tuple[Vec, AndersonState]:
        slot, g, known = (state.count - 1) % self.history, residual, state.last != NONE
        plain_step = scaled(self.damping, g)
        w = z + plain_step  # (1)
        if self.history_dtype is not None:
            # w and g are kept as the sums of what the history holds of them, so that its rounding does not add up.
            summed = lambda new, old: old + rounded(new - old, state.dg.dtype)
            w, g = choose(known, (summed(w, state.w), summed(g, state.g)), (w, g))
        dgs, of_dg, square, of_g, g_norm, finite = add_difference(state.dg, g, state.g, known, slot)
        # Extrapolated to where f is not finite: go on from the iterate before, whose w and g are kept.
        back = (state.last == MIXED) & ~finite
        # A problem that stopped is shown its best z again: nothing changes, and what it holds must survive.
        stays = known & (square == 0)
        moved = known & ~stays
        # A residual that grew too much ends the history.
        grown = moved & ~back & ~(g_norm <= self.growth * state.least)
        state = self._watch_residual(state, g_norm, finite, moved, back, grown)

        new = is_new(square, known)
        gram = _gram.with_column(state.gram, of_dg, square, of_g, slot, new, back, grown | back)
        gamma = _gram.solve(gram, jnp.asarray(self.ridge, gram.dtype), slot)
        # If z did not move, either the problem has stopped or γ leads back to z: for a piecewise affine f the
        # least-squares step may be exactly zero. Take the plain step in both cases.
        plain = back | stays | (state.since < 0)
        gamma = [jnp.where(plain, 0, y) for y in gamma]
        mixed = jnp.where(stays, state.last == MIXED, functools.reduce(jnp.logical_or, [y != 0 for y in gamma]))
        last = jnp.where(back, BACK, jnp.where(mixed, MIXED, PLAIN)).astype(jnp.int32)

        # What was found of each problem is computed by one kernel, and not again by each that works on vectors. `new`
        # is asked in other words than above: of the same words XLA makes one mask, with a kernel of its own.
        new = known & (jnp.isfinite(square) & (square > 0))
        last, gamma, new, back = settled((last, gamma, new, last == BACK))
        dws = write_row(state.dw, w - state.w, slot, new)  # (2)
        step = plain_step - weighted_sum(gamma, dws, slot)  # (4)
        step = choose(back, state.w - z, step)
        w, g = choose(back, (state.w, state.g), (w, g))
        return step, state._replace(count=state.count + 1, w=w, g=g, last=last, dw=dws, dg=dgs, gram=gram)

    def _watch_residual(
        self,
        state: AndersonState,
        g_norm: Float[Array, "*batch"],
        finite: Bool[Array, "*batch"],
        moved: Bool[Array, "*batch"],
        back: Bool[Array, "*batch"],
        grown: Bool[Array, "*batch"],
    ) -> AndersonState:
        """The state with `least`, `mark` and `since` after one more residual.

        A stagnating residual is not always a growing one, so it is compared with a mark as well.
        """
        resting = state.since < 0
        least = jnp.where(finite & ((state.last == NONE) | grown | (g_norm < state.least)), g_norm, state.least)
        fallen = finite & ((state.last == NONE) | (g_norm < jnp.where(resting, RESTED, FALLEN) * state.mark))
        mark = jnp.where(fallen, g_norm, state.mark)
        since = jnp.where(fallen | (grown & resting), 0, jnp.where(resting, -1, state.since + 1))
        since = jnp.where(moved, jnp.where(back | (since >= WINDOW * self.history), -1, since), state.since)
        return state._replace(least=least, mark=mark, since=since)


# ---- the history -------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A history dg with one more difference d = g − before, and what a step needs to know of d and g."""

    dg: Rows
    products: Float[Array, "*batch history"]  # ⟨dg_i, d⟩ with the differences before it
    square: Float[Array, "*batch"]  # ⟨d, d⟩
    newest: Float[Array, "*batch"]  # ⟨d, g⟩
    g_norm: Float[Array, "*batch"]
    finite: Bool[Array, "*batch"]  # whether g is: asked of a sum, because a mask with a root in it takes a kernel more


def add_difference(
    dg: Rows, g: Vec, before: Vec, known: Bool[Array, "*batch"], slot: Int[Array, "*#batch"]
) -> Difference:
    """The history with g − before at `slot`, in the problems where both are residuals of one f."""
    given = dg, g, before, known, slot
    return jax.lax.platform_dependent(*given, cpu=write_and_measure, default=measure_and_write)


def write_and_measure(dg, g, before, known, slot) -> Difference:
    """The products with the history as it is written. (Of the one before, XLA would make a copy on a CPU.)"""
    d = g - before
    square = dot(d, d)
    dg = write_row(dg, d, slot, is_new(square, known))
    of_d, g_norm = products(dg, d), norm(jax.lax.stop_gradient(g))
    return Difference(dg, of_d, square, dot(d, g), g_norm, jnp.isfinite(g_norm))


def measure_and_write(dg, g, before, known, slot) -> Difference:
    """The same with all sums in one kernel where they are few, or else in two, before the one that writes."""
    d, few = g - before, count_rows(dg) <= FEW
    # ‖g‖ is only compared. Where its square underflows it counts as zero, as a difference does.
    plain, _, downs = squares(jax.lax.stop_gradient(g))
    one_by_one = [product(x.astype(d.dtype), d) for x in rows_one_by_one(dg)] if few else []
    *of_d, square, newest, plain, downs = sums(*one_by_one, product(d, d), product(d, g), plain, downs)
    of_d = _gram.stacked(of_d) if few else products(dg, d)
    # The kernel that writes computes d and its mask again, because to keep them would cost a pass and a kernel.
    before, square_again = settled((before, square))
    d = g - before if few else d
    dg = write_row(dg, d, slot, is_new(square_again, known))
    return Difference(dg, of_d, square, newest, root_of_sums(plain, None, downs), jnp.isfinite(downs))


def is_new(square: Float[Array, "*batch"], known: Bool[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether a difference of this square is one that a history takes: of the same f, and neither zero nor infinite."""
    return known & (square > 0) & (square < jnp.inf)


def weighted_sum(weights: list[Float[Array, "*batch"]], rows: Rows, newest: Int[Array, "*#batch"]) -> Vec:
    """Σ weightsᵢ rowᵢ, with the weights in the order of age, that of the row in slot `newest` first."""
    return jax.lax.platform_dependent(weights, rows, newest, cpu=sum_in_slots, default=sum_by_age)


def sum_in_slots(weights: list[Float[Array, "*batch"]], rows: Rows, newest: Int[Array, "*#batch"]) -> Vec:
    return combine(rolled(jnp.stack(weights[::-1], axis=-1), newest + 1, -1), rows)


def sum_by_age(weights: list[Float[Array, "*batch"]], rows: Rows, newest: Int[Array, "*#batch"]) -> Vec:
    """The same where a kernel that reads the rows reads the weights as they are. (A negative index is from the end.)"""
    terms = [scaled(weight, row(rows, newest - age).astype(weight.dtype)) for age, weight in enumerate(weights)]
    return functools.reduce(operator.add, terms)
