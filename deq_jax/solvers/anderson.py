"""Anderson acceleration (type II): extrapolate with the differences of earlier iterates and residuals.

With g = f(z) − z, the damping β and the last m differences of two successive iterates, one step is

    (1)  w = z + β g                                     the plain step
    (2)  dwᵢ = wᵢ₊₁ − wᵢ,  dgᵢ = gᵢ₊₁ − gᵢ                  the history
    (3)  A γ = b  with  Aᵢⱼ = ⟨dgᵢ, dgⱼ⟩,  bᵢ = ⟨dgᵢ, g⟩      so γ = argmin ‖g − Σ γᵢ dgᵢ‖
    (4)  z ← w − Σ γᵢ dwᵢ

The textbook form of (4) is z + β g − Σ γᵢ (dzᵢ + β dgᵢ). Since dw = dz + β dg, storing dw in place of dz saves a pass
over one of the two histories. With D = diag(1 / ‖dgᵢ‖), (3) is solved in the form

    (5)  (D A D + ridge I) y = D b,  γ = D y
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import aligned, one_hot, per_problem, ratio, reciprocal, safe_sqrt, zeros_from
from deq_jax._checks import check_number
from deq_jax._config import Number, config
from deq_jax._rows import combine, products, repeated, write_row
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, dot, norm, scaled, zero_of
from deq_jax.solvers.protocol import LoopOptions

# After WINDOW·history evaluations in which the residual has not fallen below FALLEN times its mark, steps are plain
# until it is below RESTED times the mark, or grows. Without this 473 of 14,000 kinked contractions in one and two
# dimensions (medians and maxima of affine maps; float64, 1e-9, at most 1000 evaluations) do not converge; with it all
# do. A fixed number of plain steps leaves 453 of them where the history is 2. RESTED = 0.9 costs 5 % more evaluations
# there. Of 909 random cells (experiments/robustness_cells.py, seeds 0 to 29), WINDOW = 2 lost 10 and WINDOW = 3 lost
# one, both with type I, which was removed since.
WINDOW, FALLEN, RESTED = 3, 0.9, 0.5


class AndersonState(NamedTuple):
    count: Int[Array, ""]  # residuals seen
    w: Vec  # (1) at the previous iterate
    g: Vec  # and its residual; `target` holds its products with the history
    known: Bool[Array, "*batch"]  # whether w and g belong to this f
    dw: Rows  # slot k mod history holds w_{k+1} − w_k; zeros where none is held
    dg: Rows
    gram: Float[Array, "*batch history history"]  # A in (3)
    target: Float[Array, "*batch history"]  # b in (3)
    lengths: Float[Array, "*batch history"]  # ‖dg_i‖; zero where not in use
    least: Float[Array, "*batch"]  # the smallest residual since the history began
    accelerated: Bool[Array, "*batch"]  # whether the last step was extrapolated
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
    experiments/robustness_study.py (seeds 1000 to 1019, float32) both types solved 95.0 % of the plain random cells,
    but type I solved 40.5 % of the hard ones against 56.8 %, and 14 of the 54 classical systems against 18. On the
    symmetric families it saved no evaluations.

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

    scale_free = True
    flat = False

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "history", at_least=1)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", above=0, at_most=2)
        check_number(self, "growth", at_least=1, finite=False)

    def init(self, z: Vec) -> AndersonState:
        zero, none = zeros_like(z), zero_of(z)
        slots, row = repeated(zero, self.history), jnp.stack([none] * self.history, axis=-1)
        gram = jnp.stack([row] * self.history, axis=-1)
        count, no, since = jnp.zeros((), jnp.int32), none > 0, none.astype(jnp.int32)
        return AndersonState(count, zero, zero, no, slots, slots, gram, row, row, none, no, none, since)

    def resume(self, state: AndersonState) -> AndersonState:
        """The memory of a solve of a similar problem: its differences are a start, its last residual is not ours."""
        no = state.known & False
        return state._replace(known=no, accelerated=no, since=zeros_from(state.since))

    def can_backtrack(self, state: AndersonState) -> Bool[Array, "*batch"]:
        """Whether f may turn out not finite: after a step that was extrapolated. The plain one is taken instead."""
        return state.accelerated

    def next_point(self, state: AndersonState, z: Vec) -> Vec:
        """z, the sum of iterate and step; exactly the plain iterate w where the step is the plain one.

        So a step back is exact from an iterate that is huge or not finite.
        """
        return choose(state.accelerated, z, state.w)

    def update(self, residual: Vec, state: AndersonState, z: Vec) -> tuple[Vec, AndersonState]:
        slot, g, g_norm = (state.count - 1) % self.history, residual, norm(residual)
        w = z + scaled(self.damping, g)  # (1)
        dw, dg = w - state.w, g - state.g  # (2)
        length = safe_sqrt(dot(dg, dg))
        # Extrapolated to where f is not finite: go on from the iterate before, whose w and g are kept.
        back = state.accelerated & ~jnp.isfinite(g_norm)
        # A problem that stopped is shown its best z again: nothing changes, and what it holds must survive.
        stays = state.known & (length == 0)
        moved = state.known & ~stays

        grown = moved & ~back & ~(g_norm <= self.growth * state.least)
        state = self._watch_residual(state, g_norm, moved, back, grown)
        # A residual that grew too much ends the history: a length of zero leaves a difference unused.
        state = state._replace(lengths=jnp.where((grown | back)[..., None], 0, state.lengths))
        state = add_difference(state, dw, dg, length, g, slot, moved & jnp.isfinite(length), back)

        gamma = solve_gram(state.gram, state.target, state.lengths, self.ridge, slot)
        # If z did not move, either the problem has stopped or γ leads back to z: for a piecewise affine f the
        # least-squares step may be exactly zero. Take the plain step in both cases.
        gamma = jnp.where((back | stays | (state.since < 0))[..., None], 0, gamma)
        step = scaled(self.damping, g) - combine(gamma, state.dw)  # (4)
        step = choose(back, state.w - z, step)
        w, g = choose(back, (state.w, state.g), (w, g))
        accelerated = jnp.where(stays, state.accelerated, jnp.any(gamma != 0, axis=-1))
        return step, state._replace(count=state.count + 1, w=w, g=g, known=state.known | True, accelerated=accelerated)

    def _watch_residual(
        self,
        state: AndersonState,
        g_norm: Float[Array, "*batch"],
        moved: Bool[Array, "*batch"],
        back: Bool[Array, "*batch"],
        grown: Bool[Array, "*batch"],
    ) -> AndersonState:
        """The state with `least`, `mark` and `since` after one more residual.

        A stagnating residual is not always a growing one, so it is compared with a mark as well.
        """
        finite, resting = jnp.isfinite(g_norm), state.since < 0
        least = jnp.where(finite & (~state.known | grown | (g_norm < state.least)), g_norm, state.least)
        fallen = finite & (~state.known | (g_norm < jnp.where(resting, RESTED, FALLEN) * state.mark))
        mark = jnp.where(fallen, g_norm, state.mark)
        since = jnp.where(fallen | (grown & resting), 0, jnp.where(resting, -1, state.since + 1))
        since = jnp.where(moved, jnp.where(back | (since >= WINDOW * self.history), -1, since), state.since)
        return state._replace(least=least, mark=mark, since=since)


# ---- the history -------------------------------------------------------------------------------------------


def add_difference(
    state: AndersonState,
    dw: Vec,
    dg: Vec,
    length: Float[Array, "*batch"],
    g: Vec,
    slot: Int[Array, ""],
    new: Bool[Array, "*batch"],
    back: Bool[Array, "*batch"],
) -> AndersonState:
    """The state with one more difference (2) at `slot`, where `new`, and with A and b of (3) brought up to date."""
    dws, dgs = write_row(state.dw, dw, slot, new), write_row(state.dg, dg, slot, new)
    here = new[..., None] & (one_hot(slot, state.lengths.shape[-1], state.lengths) > 0)
    lengths = jnp.where(here, length[..., None], state.lengths)

    # Kept finite, so that an overflow in a difference out of use, times its length of zero, is no NaN.
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
    column = jnp.where(back[..., None], 0, finite(products(dgs, dg)))  # ⟨dg_i, dg⟩
    gram = jnp.where(here[..., None, :], column[..., :, None], state.gram)
    gram = write_row(gram, column, slot, new)
    # g = g_prev + dg, so ⟨dg_i, g⟩ is updated from the stored products; only the product with the newest difference
    # is computed from scratch. Rounding errors add up for as long as a difference is held, and cost no evaluation
    # (experiments/gains_study.py, 6).
    newest = dot(dg, g)
    target = finite(jnp.where(here, newest[..., None], state.target + column))
    return state._replace(dw=dws, dg=dgs, gram=gram, target=target, lengths=lengths)


def solve_gram(
    gram: Float[Array, "*batch m m"],
    target: Float[Array, "*batch m"],
    lengths: Float[Array, "*batch m"],
    ridge: Float[Array, "*#batch"] | Number,
    newest: Int[Array, ""],
) -> Float[Array, "*batch m"]:
    """γ of (3), solved in the form (5). A column that depends on newer ones, from slot `newest` back, gets γᵢ = 0."""
    unit = aligned(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram)
    d = reciprocal(lengths)
    a = gram * d[..., :, None] * d[..., None, :] + per_problem(per_problem(ridge)) * unit
    # Gauss-Jordan elimination of all problems at once: batched LAPACK calls on small matrices cost more than f. The
    # problems come last, side by side in the vector registers.
    last = lambda x, axes: jnp.moveaxis(x, range(-axes, 0), range(axes))
    y = eliminate(last(a, 2), last(target * d, 1), newest)
    return jnp.moveaxis(y, 0, -1) * d


def eliminate(
    a: Float[Array, "m m *batch"], b: Float[Array, "m *batch"], newest: Int[Array, ""]
) -> Float[Array, "m *batch"]:
    """y with a y = b over the columns that are independent, from `newest` back; 0 at the others."""
    m, eps = a.shape[0], float(jnp.finfo(a.dtype).eps)
    entry = lambda x, j, axis, keepdims=False: jax.lax.dynamic_index_in_dim(x, j, axis=axis, keepdims=keepdims)

    def body(age, carry):
        a, b, kept = carry
        j = (newest - age) % m
        here = jax.lax.expand_dims((jnp.arange(m, dtype=jnp.int32) == j).astype(a.dtype), range(1, b.ndim))
        column, row = entry(a, j, 1), entry(a, j, 0)
        pivot = entry(row, j, 0)  # sin² of the angle to newer columns
        keep = jnp.abs(pivot) > 10 * m * eps
        column = (column - here) * ratio(1, pivot, where=keep)[None]
        a = a - column[:, None] * row[None]
        b = b - column * entry(b, j, 0, keepdims=True)
        return a, b, kept + jnp.where(keep, here, 0)

    # Unrolled, the loop ran slower (4096 problems: 3.6 ms a step against 2.4) and took half again as long to compile.
    _, b, kept = jax.lax.fori_loop(0, m, body, (a, b, zeros_from(b)))
    return jnp.where(kept > 0, b, 0)
