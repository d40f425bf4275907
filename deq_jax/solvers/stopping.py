"""When the solve of a problem ends, and as what.

A problem has converged when each leaf of its state meets

    (1)  ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖

in its own unit, if the residual is more than rounding. Two guards are needed besides (1): z ↦ z + 1 has no fixed point,
and yet its relative residual 1/‖z‖ falls below any rtol as z runs away. The iterates are cut into stretches, within
which ‖f(z)‖ grows by less than OUTGROWN. `worst` is the largest residual of the present stretch and the one before, and
inf in the first stretch:

    (2)  lost      worst < eps ‖f(z)‖: all residuals are less than a unit in the last place of z
    (3)  reduced   ‖f(z) − z‖ ≤ worst / OUTGROWN: z may have grown, but its residual fell by itself

and (1) counts only for a residual that is reduced and not lost. `*norms` is the shape of `Layout.norms`: that is
`*batch leaves`, or `*batch` for a state of one leaf. With another `norm` of the solver, (1) and the progress of a solve
are judged by its pieces, see `norms`; the guards remain those of the leaves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import zeros_from
from deq_jax._states import Layout
from deq_jax._vectors import Vec, norm
from deq_jax.solvers.norms import Score, relative_to, score_at
from deq_jax.solvers.protocol import Solver, Stats, Status

RUNNING = -1  # the status of a problem whose solve goes on
STALE_EVALUATIONS = 10  # this many without a better residual, at the dtype's floor, end a solve as STALLED
DIVERGED_GROWTH = 1e6  # a residual this many times the scale at the start, when the budget is spent, is DIVERGED
HOPELESS_GROWTH = 1e15  # this many times, and above 1, ends a solve at once: tanh(3 z + h) grows from any small h to 1
OUTGROWN = 10  # a stretch ends where the iterate has grown by this factor; see (3)


# ---- norms, leaf by leaf -----------------------------------------------------------------------------------


class Norms(NamedTuple):
    """The norms of f(z) − z and of f(z) at one z, leaf by leaf."""

    residuals: Float[Array, "*norms"]
    scales: Float[Array, "*norms"]
    score: Score | None = None  # in the norm of the solver, if that is not the default


def norms_at(z: Vec, fz: Vec, layout: Layout, solver: Solver) -> Norms:
    residual = fz - z
    residuals, scales = layout.norms_of(residual, fz)
    return with_score(Norms(residuals, scales), residual, fz, layout, solver)


def with_score(norms: Norms, residual: Vec, fz: Vec, layout: Layout, solver: Solver) -> Norms:
    return norms._replace(score=score_at(residual, fz, norms[:2], solver, layout))


def where_better(better: Bool[Array, "*batch"], new: Norms, old: Norms, layout: Layout) -> Norms:
    """The norms of some problems in place of the old ones."""
    pick = lambda new, old: jnp.where(by_leaf(better, layout), new, old)
    score = jax.tree.map(lambda new, old: jnp.where(better, new, old), new.score, old.score)
    return Norms(pick(new.residuals, old.residuals), pick(new.scales, old.scales), score)


def has_converged(norms: Norms, solver: Solver, layout: Layout) -> Bool[Array, "*batch"]:
    """The stopping test (1). The norms must be finite too, because inf ≤ rtol · inf is true."""
    if norms.score is not None:
        return norms.score.converged
    finite = jnp.isfinite(norms.residuals) & jnp.isfinite(norms.scales)
    tolerance = tolerances(comparable(norms, layout), solver, layout)
    return over_leaves(jnp.all, finite & (norms.residuals <= tolerance), layout)


def tolerances(sizes: Float[Array, "*norms"], solver: Solver, layout: Layout) -> Float[Array, "*norms"]:
    """atol + rtol · size, for each leaf."""
    return by_leaf(solver.atol, layout) + by_leaf(solver.rtol, layout) * sizes


def comparable(norms: Norms, layout: Layout) -> Float[Array, "*norms"]:
    """The norm that the residual of each leaf is compared with: that of the leaf's f(z).

    A leaf that is zero up to the rounding of the whole state must not hold the solve up: it is compared with the whole.
    """
    residuals, scales, _ = norms
    if not layout.several:
        return scales
    total = whole(scales, layout)[..., None]
    negligible = (scales <= layout.eps * total) & (residuals <= layout.eps * total)
    return jnp.where(negligible, total, scales)


def residual_of(norms: Norms, layout: Layout) -> Float[Array, "*batch"]:
    """The residual that is reported: ‖f(z) − z‖, or the largest of a piece in the solver's norm."""
    return whole(norms.residuals, layout) if norms.score is None else norms.score.residual


def relative_residual(norms: Norms, layout: Layout) -> Float[Array, "*batch"]:
    """The largest ‖f(z) − z‖ / ‖f(z)‖ of a leaf, or of a piece in the solver's norm."""
    return _relative_by_leaf(norms, layout) if norms.score is None else norms.score.relative


def _relative_by_leaf(norms: Norms, layout: Layout) -> Float[Array, "*batch"]:
    return over_leaves(jnp.max, relative_to(norms.residuals, comparable(norms, layout)), layout)


def whole(norms: Float[Array, "*norms"], layout: Layout) -> Float[Array, "*batch"]:
    """The norm of the state, from the norms of its leaves."""
    return norm(norms) if layout.several else norms


def over_leaves(reduce: Callable, norms: Array, layout: Layout) -> Array:
    """A reduction over the leaves of each problem."""
    return reduce(norms, axis=-1) if layout.several else norms


def by_leaf(x: Any, layout: Layout) -> Any:
    """What is given for each problem, or once for all, in a shape that goes with `*norms`."""
    return jnp.asarray(x)[..., None] if layout.several and jnp.ndim(x) else x


# ---- guards ------------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """How far the iterates have come, leaf by leaf; a stretch ends where ‖f(z)‖ has grown by OUTGROWN."""

    scale: Float[Array, "*norms"]  # ‖f(z)‖ where the present stretch began
    worst: Float[Array, "*norms"]  # the largest residual of the present stretch
    before: Float[Array, "*norms"]  # of the stretch before; inf in the first one
    start: Float[Array, "*norms"]  # ‖z0‖, or the first ‖f(z)‖ that is not zero


def grown(growth: Growth, norms: Norms, finite: Bool[Array, "*norms"]) -> Growth:
    """The growth after one more evaluation; one that is not finite changes nothing."""
    residuals, scales, _ = norms
    first = growth.scale == 0
    opens = first | (scales > OUTGROWN * growth.scale)
    new = Growth(
        scale=jnp.where(opens, jnp.where(first, jnp.maximum(residuals, scales), scales), growth.scale),
        worst=jnp.where(opens, residuals, jnp.maximum(growth.worst, residuals)),
        before=jnp.where(opens & ~first, growth.worst, growth.before),
        start=jnp.where(growth.start == 0, scales, growth.start),
    )
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, growth)


class Coupling(NamedTuple):
    """How what is known of each problem is brought together where f couples the problems along named axes."""

    everywhere: Callable  # all
    anywhere: Callable  # any
    most: Callable  # max


def coupling(axes: tuple) -> Coupling:
    """The identity without axes: each problem then stands for itself."""
    if not axes:
        same = lambda x: x
        return Coupling(same, same, same)
    axes = tuple(dict.fromkeys(axes))
    anywhere = lambda yes: jax.lax.pmax(yes.astype(jnp.int32), axes) > 0
    return Coupling(lambda yes: ~anywhere(~yes), anywhere, lambda x: jax.lax.pmax(x, axes))


def guards(
    growth: Growth, norms: Norms, layout: Layout, coupled: Coupling
) -> tuple[Bool[Array, "*batch"], Bool[Array, "*batch"]]:
    """(lost, reduced), as in (2) and (3)."""
    worst = jnp.maximum(growth.worst, growth.before)
    lost = coupled.anywhere(over_leaves(jnp.any, layout.eps * norms.scales > worst, layout))
    return lost, coupled.everywhere(over_leaves(jnp.all, norms.residuals <= worst / OUTGROWN, layout))


class Progress(NamedTuple):
    """What one evaluation brought, compared with the best one before."""

    improved: Bool[Array, "*batch"]  # on the best residual so far
    enough: Bool[Array, "*batch"]  # by 1 %, and not by rounding alone
    at_floor: Bool[Array, "*batch"]  # the residual is so small that rounding may hide progress


def progress(now: Norms, best: Norms, growth: Growth, layout: Layout, coupled: Coupling) -> Progress:
    start, eps = growth.start, layout.eps

    def error(norms: Norms) -> Float[Array, "*batch"]:
        # A sum of leaves in their units means nothing: progress is that of the leaf that is the furthest from its goal.
        if not layout.several:
            return coupled.most(norms.residuals)
        units = jnp.maximum(jnp.maximum(now.scales, best.scales), start)
        return coupled.most(_relative_by_leaf(norms._replace(scales=units), layout))

    def rounded(norms: Norms) -> Bool[Array, "*batch"]:
        # Next to where the solve began it is zero: from here on z and its residual may fall together for ever.
        return coupled.everywhere(over_leaves(jnp.all, norms.residuals <= eps * start, layout))

    relative = lambda norms: coupled.most(_relative_by_leaf(norms, layout))
    error_now, error_best = error(now), error(best)
    if now.score is not None and best.score is not None:
        excess_now, excess_best = coupled.most(now.score.excess), coupled.most(best.score.excess)
        # Where a piece falls with its residual for ever, the leaves tell whether z is nearer.
        nearer = (excess_now <= (1 + 8 * eps) * excess_best) & (error_now < error_best)
        at_floor = coupled.everywhere(best.score.resolved) | rounded(best)
        return Progress((excess_now < excess_best) | nearer, excess_now < 0.99 * excess_best, at_floor)
    enough = (error_now < 0.99 * error_best) & (~rounded(now) | (relative(now) < 0.99 * relative(best)))
    floor = min(64 * eps, 0.05)  # relative residual at which rounding in f may hide all progress
    resolved = coupled.everywhere(whole(best.residuals, layout) <= floor * whole(best.scales, layout))
    return Progress(error_now < error_best, enough, resolved | rounded(best))


# ---- verdicts ----------------------------------------------------------------------------------------------


def next_status(
    *,
    converged: Bool[Array, "*batch"],
    finite: Bool[Array, "*batch"],
    diverged: Bool[Array, "*batch"],
    stalled: Bool[Array, "*batch"],
    spent: Bool[Array, "*batch"],
) -> Int[Array, "*batch"]:
    """The status of problems that were running, in order of priority: the last line first."""
    # `jnp.select` would say the same, and compile to one kernel more: it takes an argmax over the conditions.
    status = jnp.where(spent, Status.MAX_STEPS, RUNNING)
    status = jnp.where(stalled, Status.STALLED, status)
    status = jnp.where(diverged, Status.DIVERGED, status)
    status = jnp.where(finite, status, Status.NONFINITE)
    return jnp.where(converged, Status.CONVERGED, status)


def is_out_of_scale(
    residual: Float[Array, "*batch"], first_scale: Float[Array, "*batch"], spent: Bool[Array, "*batch"]
) -> Bool[Array, "*batch"]:
    """Whether a residual is so much larger than the problem was at its start that the solve has diverged."""
    return residual > jnp.where(spent, DIVERGED_GROWTH * first_scale, jnp.maximum(HOPELESS_GROWTH * first_scale, 1))


def assess(norms: Norms, solver: Solver, steps: Any, layout: Layout) -> Stats:
    """The stats of a z that is returned as it is, known after `steps` evaluations."""
    residual, relative = residual_of(norms, layout), relative_residual(norms, layout)
    finite = jnp.isfinite(residual) & jnp.isfinite(whole(norms.scales, layout))
    count = zeros_from(residual).astype(jnp.int32)
    converged = has_converged(norms, solver, layout)
    met = jnp.where(converged, count + Status.CONVERGED, count + Status.MAX_STEPS)
    status = jnp.where(finite, met, count + Status.NONFINITE)
    return Stats(count + steps, jnp.where(finite, residual, jnp.inf), jnp.where(finite, relative, jnp.inf), status)
