"""Anderson acceleration (type II): extrapolate with the residuals' own differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import Budget, check_number, check_stopping, config
from deq_jax.solvers.base import aligned, choose, norm, one_hot, per_problem, root, write_slot, zeros_from

# After WINDOW·history evaluations in which the residual has not fallen below FALLEN times its mark, steps are plain
# until it is below RESTED times the mark, or grows. Without this 473 of 14,000 kinked contractions in one and two
# dimensions (medians and maxima of affine maps; float64, 1e-9, at most 1000 evaluations) do not converge; with it all
# do. A fixed number of plain steps leaves 453 of them where the history is 2. RESTED = 0.9 costs 5 % more evaluations
# there, and WINDOW = 2 loses 10 of 909 random cells (experiments/robustness_cells.py, seeds 0 to 29) with type 1,
# WINDOW = 3 one.
WINDOW, FALLEN, RESTED = 3, 0.9, 0.5


class AndersonState(NamedTuple):
    """In type II, w is z + damping·g: the mix of z and g that a step extrapolates. In type I, w is z."""

    count: Int[Array, ""]  # residuals seen
    w: Float[Array, "*batch dim"]  # of the previous iterate
    g: Float[Array, "*batch dim"]  # and its residual, of which target tells
    known: Bool[Array, "*batch"]  # whether w and g belong to this f
    dw: Float[Array, "*batch history dim"]  # slot k mod history holds w_{k+1} − w_k; zeros where none is held
    dg: Float[Array, "*batch history dim"]
    gram: Float[Array, "*batch history history"]  # ⟨dg_i, dg_j⟩, or ⟨dw_i, dg_j⟩ for type I
    target: Float[Array, "*batch history"]  # ⟨dg_i, g⟩, or ⟨dw_i, g⟩ for type I
    lengths: Float[Array, "*batch rows history"]  # ‖dg_i‖, for type I after a row of ‖dw_i‖; zero where not in use
    least: Float[Array, "*batch"]  # the smallest residual since the history began
    accelerated: Bool[Array, "*batch"]  # whether the last step was extrapolated
    mark: Float[Array, "*batch"]  # the residual when it last fell enough
    since: Int[Array, "*batch"]  # evaluations since then; −1 during plain steps


@config
class Anderson:
    """Anderson acceleration: Walker & Ni (2011), type II, with the last `history` differences.

    Equivalent to GMRES on linear problems while the history lasts. Memory is 2·history states. `ridge` is
    relative: it is added to a Gram matrix scaled to unit diagonal, so the scale of the problem is immaterial.
    A difference that depends on newer ones is left out, and a residual of more than `growth` times the least
    one since the history began starts a new history: it spoils no later step. A step to where f is not finite is
    replaced by the plain one from the iterate before. A residual that stagnates, as it may about the kinks of a
    contraction, is followed by plain steps until it has fallen. `type=1` projects on the
    differences of z instead (Fang & Saad 2009): less robust, at times faster where f is nearly symmetric.

    With `test_every=k`, k − 1 plain steps lie between two iterates that are tested and mixed (Pratapa, Suryanarayana &
    Pask 2016, "Anderson acceleration of the Jacobi iterative method"): more evaluations, and fewer of all else. That
    pays where f costs less than a step of the history and contracts; where f expands, an eigenvalue of Jᵏ may be
    greater than 1, and a short history fails. `Picard(test_every=k)` says what is kept.

    >>> Anderson(history=4).damping
    1.0
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: Budget = 100
    history: int = 8
    ridge: float = 0.0
    damping: float = 1.0
    type: int = 2
    growth: float = 1.5
    test_every: int = 1

    scale_free = True

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "history", at_least=1)
        check_number(self, "ridge", at_least=0)
        check_number(self, "damping", above=0, at_most=2)
        check_number(self, "type", at_least=1, at_most=2)
        check_number(self, "growth", at_least=1, finite=False)
        check_number(self, "test_every", at_least=1)

    def init(self, z: Float[Array, "*batch dim"]) -> AndersonState:
        zero, m = zeros_from(z), self.history
        slots = jnp.stack([zero] * m, axis=-2)
        gram = jnp.stack([slots[..., 0]] * m, axis=-1)
        none, lengths = zero[..., 0], jnp.stack([slots[..., 0]] * (1 if self.type == 2 else 2), axis=-2)
        count, no, since = jnp.zeros((), jnp.int32), none > 0, none.astype(jnp.int32)
        return AndersonState(count, zero, zero, no, slots, slots, gram, slots[..., 0], lengths, none, no, none, since)

    def resume(self, state: AndersonState) -> AndersonState:
        """The memory of a solve of a similar problem: its differences are a start, its last residual is not ours."""
        no = state.known & False
        return state._replace(known=no, accelerated=no, since=zeros_from(state.since))

    def can_backtrack(self, state: AndersonState) -> Bool[Array, "*batch"]:
        """Where f may turn out not finite: after a step that was extrapolated. The plain one is taken instead."""
        return state.accelerated

    def next_point(self, state: AndersonState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """z, the iterate and the step added up; exactly the plain iterate where the step is the plain one.

        So a step back is exact from an iterate that is huge or not finite.
        """
        return jnp.where(state.accelerated[..., None], z, self._plain(state))

    def _plain(self, state: AndersonState) -> Float[Array, "*batch dim"]:
        return state.w if self.type == 2 else state.w + per_problem(self.damping) * state.g

    def update(
        self, residual: Float[Array, "*batch dim"], state: AndersonState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], AndersonState]:
        slot, second = (state.count - 1) % self.history, self.type == 2
        damping = per_problem(self.damping)
        w = z + damping * residual if second else z
        dw, dg, g_norm = w - state.w, residual - state.g, norm(residual)
        finite_g = jnp.isfinite(g_norm)
        # Extrapolated to where f is not finite: go on from the iterate before, whose w and g are kept.
        back = state.accelerated & ~finite_g
        length = root(jnp.einsum("...d,...d->...", dg, dg)) if second else norm(dg)
        # A problem that stopped is shown its best z again: nothing changes, and what it holds must survive.
        stays = state.known & (length == 0)
        moved = state.known & ~stays
        new = moved & jnp.isfinite(length)
        dws, dgs = write_slot(state.dw, dw, slot, new), write_slot(state.dg, dg, slot, new)

        # A residual that grew too much ends the history: a length of zero leaves a difference unused.
        grown = moved & ~back & ~(g_norm <= self.growth * state.least)
        least = jnp.where(finite_g & (~state.known | grown | (g_norm < state.least)), g_norm, state.least)
        # Since a stagnating residual is not always a growing one, it is compared with a mark as well.
        resting = state.since < 0
        fallen = finite_g & (~state.known | (g_norm < jnp.where(resting, RESTED, FALLEN) * state.mark))
        mark = jnp.where(fallen, g_norm, state.mark)
        since = jnp.where(fallen | (grown & resting), 0, jnp.where(resting, -1, state.since + 1))
        since = jnp.where(moved, jnp.where(back | (since >= WINDOW * self.history), -1, since), state.since)
        here = one_hot(slot, self.history, z) > 0
        pair = jnp.stack([length] if second else [norm(dw), length], axis=-1)
        lengths = jnp.where((grown | back)[..., None, None], 0, state.lengths)
        lengths = jnp.where(new[..., None, None] & here[..., None, :], pair[..., None], lengths)

        tests = dgs if second else dws
        along = lambda rows, x: jnp.einsum("...md,...d->...m", rows, x)
        # Kept finite, so that an overflow in a difference out of use, times its length of zero, is no NaN.
        finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)
        column = jnp.where(back[..., None], 0, finite(along(tests, dg)))
        row = column if second else finite(along(dgs, dw))
        gram = jnp.where(new[..., None, None] & here[..., None, :], column[..., :, None], state.gram)
        gram = write_slot(gram, row, slot, new)
        # g is the previous g and dg: its products, but that with the newest difference, need no pass over the history.
        # Rounding gathers for as long as a difference is held, and costs no evaluation (experiments/gains_study.py, 6).
        newest = jnp.einsum("...d,...d->...", dg if second else dw, residual)
        target = finite(jnp.where(new[..., None] & here, newest[..., None], state.target + column))

        # γ = argmin ‖g − Σ γᵢ dgᵢ‖ (type I: g − Σ γᵢ dgᵢ ⟂ all dzᵢ); then z + damping·g, both less Σ γᵢ times their
        # differences, is the new iterate: with dw = dz + damping·dg, one history is read the less.
        gamma = _project(gram, target, lengths[..., 0, :], lengths[..., -1, :], self.ridge, slot)
        # A z that did not move belongs to a problem that stopped, or γ leads back to it: for a piecewise affine f the
        # least-squares step may be exactly zero. The plain step goes on.
        gamma = jnp.where((back | stays | (since < 0))[..., None], 0, gamma)
        accelerated = jnp.where(stays, state.accelerated, jnp.any(gamma != 0, axis=-1))
        mixed = lambda rows: jnp.einsum("...m,...md->...d", gamma, rows)
        step = damping * (residual if second else residual - mixed(dgs)) - mixed(dws)
        step = jnp.where(back[..., None], self._plain(state) - z, step)
        w, g = choose(back, (state.w, state.g), (w, residual))
        known = state.known | True
        return step, AndersonState(
            state.count + 1, w, g, known, dws, dgs, gram, target, lengths, least, accelerated, mark, since
        )


def _project(
    gram: Float[Array, "*batch m m"],
    target: Float[Array, "*batch m"],
    left: Float[Array, "*batch m"],
    right: Float[Array, "*batch m"],
    ridge: Float[Array, "*#batch"] | float,
    newest: Int[Array, ""],
) -> Float[Array, "*batch m"]:
    """Solve gram γ = target, leaving out each column that depends on those before it, from slot `newest` back.

    `left` and `right` are the lengths of the vectors whose products `gram` holds. Gauss-Jordan elimination, all
    problems at once: batched LAPACK calls on small matrices cost more than f.
    """
    m, eps = gram.shape[-1], float(jnp.finfo(gram.dtype).eps)
    unit = aligned(jnp.eye(m, dtype=gram.dtype), gram)
    inverse = lambda length: jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    left, right = inverse(left), inverse(right)
    # The problems last, side by side in the vector registers.
    last = lambda x, axes: jnp.moveaxis(x, range(-axes, 0), range(axes))
    a = gram * left[..., :, None] * right[..., None, :] + per_problem(per_problem(ridge)) * unit

    def eliminate(age, carry):
        a, b, kept = carry
        j = (newest - age) % m
        here = jax.lax.expand_dims((jnp.arange(m, dtype=jnp.int32) == j).astype(gram.dtype), range(1, b.ndim))
        column = jax.lax.dynamic_index_in_dim(a, j, axis=1, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(a, j, axis=0, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, j, axis=0, keepdims=False)  # sin² of the angle to newer columns
        keep = jnp.abs(pivot) > 10 * m * eps
        column = (column - here) * jnp.where(keep, 1 / jnp.where(keep, pivot, 1), 0)[None]
        a = a - column[:, None] * row[None]
        b = b - column * jax.lax.dynamic_index_in_dim(b, j, axis=0)
        return a, b, kept + jnp.where(keep, here, 0)

    carry = last(a, 2), last(target * left, 1), zeros_from(last(target, 1))
    # A loop: unrolled, it ran slower (4096 problems: 2.4 ms a step against 3.6) and compiled half again as long.
    _, b, kept = jax.lax.fori_loop(0, m, eliminate, carry)
    return jnp.moveaxis(jnp.where(kept > 0, b, 0), 0, -1) * right
