"""One loop for every solver: it calls f, tests convergence, counts, freezes and keeps the best iterate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._arrays import half_power
from deq_jax._checks import check_flat
from deq_jax._config import cast_options, with_options
from deq_jax._states import Layout, choose, join, split, wide_dtype
from deq_jax._trace import axes_of
from deq_jax._vectors import Vec, scaled, shape_of, zero_of
from deq_jax.solvers.protocol import Evaluation, Fold, Solver, SolveResult, Stats, Status, member
from deq_jax.solvers.stopping import (
    RUNNING,
    STALE_EVALUATIONS,
    Growth,
    Norms,
    assess,
    by_leaf,
    coupling,
    grown,
    guards,
    has_converged,
    is_out_of_scale,
    next_status,
    norms_at,
    progress,
    relative_residual,
    whole,
)


class Carry(NamedTuple):
    """What the loop carries from evaluation to evaluation."""

    z: Vec  # where f is evaluated next
    best: Vec
    best_norms: Norms  # of the residual and of f(z) at the best z
    first_scale: Float[Array, "*batch"]  # max(‖f(z0)‖, ‖f(z0) − z0‖)
    growth: Growth
    stale: Int[Array, "*batch"]  # evaluations since the best residual last fell
    steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    solver: Any
    folded: Any
    evaluation: Int[Array, ""]
    # The leaves of z that are carried (see `split`), of which there may be none:
    carried: PyTree  # what f is given next, beside z
    best_carried: PyTree  # what f was given beside the best z
    returned: PyTree  # what f returned last, before the problem stopped


def run_loop(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int = 0, *, memory: Any = None, fold: Fold | None = None
) -> SolveResult:
    """Iterate `solver` on f(z) = z from z0 until each problem has stopped.

    A solver works on one vector a problem, float32 or wider, so that inner products run over the whole state; f sees
    the state in its own structure and dtypes, with its carried leaves. The loop is native to the batch: a problem that
    has stopped is frozen at its best iterate, and the loop ends with the last one. `memory` is that of an earlier solve
    with the same solver and shapes. If f communicates along named axes (`f.axes`, see `_trace.Bound`), the problems
    along them are one coupled problem, and stop together.
    """
    solver = cast_options(solver, wide_dtype(z0))
    body = make_body(f, z0, solver, batch_ndim, fold)
    carry = init_carry(z0, solver, batch_ndim, memory, fold)
    end = jax.lax.while_loop(lambda carry: jnp.any(carry.status == RUNNING), body, carry)
    return finalize(end, layout_for(solver, z0, batch_ndim))


def init_carry(z0: PyTree, solver: Solver, batch_ndim: int, memory: Any = None, fold: Fold | None = None) -> Carry:
    """The carry before the first evaluation."""
    layout = layout_for(solver, z0, batch_ndim)
    z = layout.pack(z0)
    # Carries are made from the data, never from a bare constant: under sharding they inherit its type.
    zero = zero_of(z)
    norms = jnp.stack([zero] * len(layout.leaves), axis=-1) if layout.several else zero
    count = zero.astype(jnp.int32)
    # Where z0 is a constant, XLA would fold its norm when it compiles: 10 s for zeros of 4096 × 1024.
    start = layout.norms(jax.lax.optimization_barrier(z))
    status = jnp.where(jnp.asarray(solver.max_steps) > 0, RUNNING, Status.MAX_STEPS).astype(jnp.int32) + count
    carried = split(z0)[1]
    return Carry(
        z=z,
        best=z,
        best_norms=Norms(norms + jnp.inf, norms),
        first_scale=zero,
        growth=Growth(scale=norms, worst=norms, before=norms + jnp.inf, start=start),
        stale=count,
        steps=count,
        status=status,
        solver=solver.init(z) if memory is None else member(solver, "resume")(memory),
        folded=None if fold is None else fold.init(z0, batch_ndim),
        evaluation=jnp.zeros((), jnp.int32),
        carried=carried,
        best_carried=carried,
        returned=carried,
    )


def make_body(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int, fold: Fold | None = None
) -> Callable[[Carry], Carry]:
    """The body of the loop: one evaluation that is tested, after `test_every` − 1 that only move z."""
    layout = layout_for(solver, z0, batch_ndim)
    tested = make_evaluation(f, layout, solver, fold)
    if member(solver, "test_every") == 1:
        return tested
    untested = make_plain_steps(f, layout, solver)
    return lambda carry: tested(untested(carry))


def layout_for(solver: Solver, z0: PyTree, batch_ndim: int) -> Layout:
    """How this solver is shown states such as z0."""
    flat = member(solver, "flat")
    if flat:
        check_flat(solver, z0, batch_ndim)
    return Layout(z0, batch_ndim, flat)


def vector_type(solver: Solver, z0: PyTree, batch_ndim: int) -> Any:
    """The type of z0 as this solver sees it."""
    return jax.eval_shape(lambda z0: layout_for(solver, z0, batch_ndim).pack(z0), z0)


def finalize(end: Carry, layout: Layout) -> SolveResult:
    """The result of a loop, with values in the structure of z0."""
    relative = relative_residual(end.best_norms, layout)
    stats = Stats(end.steps, whole(end.best_norms.residuals, layout), relative, end.status)
    value = join(layout.unpack(end.best), end.returned)
    return SolveResult(value, stats, end.solver, end.folded, end.best_carried)


# ---- one evaluation ----------------------------------------------------------------------------------------


def make_evaluation(f: Callable, layout: Layout, solver: Solver, fold: Fold | None) -> Callable[[Carry], Carry]:
    """One evaluation of f, what it says of each problem, and the next iterate."""
    judged = make_verdict(layout, solver, axes_of(f))

    def evaluate(carry: Carry) -> Carry:
        z_tree = join(layout.unpack(carry.z), carry.carried)
        with jax.named_scope("f"):
            fz_tree = f(z_tree)
        fz = layout.pack(fz_tree)
        norms, residual = norms_at(carry.z, fz, layout), fz - carry.z
        verdict = judged(carry, norms)
        if member(solver, "scale_free"):
            # The verdict is computed once, and not again by each kernel that works on vectors: they read its results.
            verdict, residual = jax.lax.optimization_barrier((verdict, residual))
        after = noted(carry, verdict, split(fz_tree)[1])
        with jax.named_scope(type(solver).__name__):
            z, state = advance(solver, carry.solver, residual, carry.z, verdict)
        # A problem that has stopped is given its best z again, with what it was given there.
        then, stay = (layout.round(z), after.returned), (after.best, after.best_carried)
        z, carried = choose(after.status == RUNNING, then, stay)
        return after._replace(
            z=z,
            carried=carried,
            solver=state,
            folded=None if fold is None else fold.update(carry.folded, shown(carry, z_tree, fz_tree, norms, layout)),
            evaluation=carry.evaluation + 1,
        )

    return evaluate


class Verdict(NamedTuple):
    """What an evaluation says of each problem."""

    best_norms: Norms  # and the others, as in the carry
    first_scale: Float[Array, "*batch"]
    growth: Growth
    stale: Int[Array, "*batch"]
    steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    better: Bool[Array, "*batch"]  # whether this z is the best one so far
    unit: Float[Array, "*batch"]  # by which the vectors are divided that a `scale_free` solver is shown
    per_unit: Float[Array, "*batch"]


def make_verdict(layout: Layout, solver: Solver, axes: tuple) -> Callable[[Carry, Norms], Verdict]:
    """The function that judges the evaluation of f at the carry's z."""
    patience, recovers = max(STALE_EVALUATIONS, member(solver, "patience")), member(solver, "recovers")
    coupled = coupling(axes)

    def judged(carry: Carry, norms: Norms) -> Verdict:
        running, first = carry.status == RUNNING, carry.steps == 0
        residual, scale = (whole(x, layout) for x in norms)
        steps = carry.steps + running.astype(jnp.int32)
        first_scale = jnp.where(first, jnp.maximum(residual, scale), carry.first_scale)
        finite = coupled.everywhere(jnp.isfinite(residual) & jnp.isfinite(scale))
        growth = grown(carry.growth, norms, by_leaf(finite, layout))
        lost, reduced = guards(growth, norms, layout, coupled)
        converged = coupled.everywhere(has_converged(norms, solver, layout)) & finite & ~lost & reduced
        made = progress(norms, carry.best_norms, growth, layout, coupled)
        stale = jnp.where(finite & made.enough, 0, carry.stale + 1)

        spent = steps >= solver.max_steps
        out_of_scale = coupled.anywhere(is_out_of_scale(residual, first_scale, spent))
        status = next_status(
            converged=converged,
            finite=finite | (member(solver, "can_backtrack")(carry.solver) & ~first),
            diverged=(lost | out_of_scale) & (not recovers),
            stalled=made.at_floor & (stale >= patience),
            spent=spent,
        )
        status = jnp.where(running, status, carry.status).astype(jnp.int32)
        # An iterate so far out that its residual is all rounding is not a better one.
        better = running & finite & ~lost & (converged | made.improved)
        pick = lambda new, old: jnp.where(by_leaf(better, layout), new, old)
        best_norms, unit = Norms(*map(pick, norms, carry.best_norms)), half_power(first_scale)
        return Verdict(best_norms, first_scale, growth, stale, steps, status, better, unit, 1 / unit)

    return judged


def noted(carry: Carry, verdict: Verdict, returned: PyTree) -> Carry:
    """The carry, up to date with the evaluation of f at its z, except what f is given next."""
    better, running = verdict.better, carry.status == RUNNING
    return carry._replace(
        best=choose(better, carry.z, carry.best),
        best_carried=choose(better, carry.carried, carry.best_carried),
        returned=choose(running, returned, carry.returned),
        best_norms=verdict.best_norms,
        first_scale=verdict.first_scale,
        growth=verdict.growth,
        stale=verdict.stale,
        steps=verdict.steps,
        status=verdict.status,
    )


def shown(carry: Carry, z: PyTree, fz: PyTree, norms: Norms, layout: Layout) -> Evaluation:
    """This evaluation, as a fold sees it."""
    residual, relative = whole(norms.residuals, layout), relative_residual(norms, layout)
    return Evaluation(carry.evaluation, z, fz, residual, relative, carry.status == RUNNING)


def advance(solver: Solver, state: Any, residual: Vec, z: Vec, verdict: Verdict) -> tuple[Vec, Any]:
    """The next iterate, and the solver's state."""
    if member(solver, "scale_free"):
        solver = with_options(solver, atol=solver.atol / verdict.unit)
        z, state = _next_point(solver, state, scaled(verdict.per_unit, residual), scaled(verdict.per_unit, z))
        return scaled(verdict.unit, z), state
    return _next_point(solver, state, residual, z)


def _next_point(solver: Solver, state: Any, residual: Vec, z: Vec) -> tuple[Vec, Any]:
    step, state = solver.update(residual, state, z)
    if shape_of(step) != shape_of(z):
        name = type(solver).__name__
        raise ValueError(f"{name}.update must return a step of the shape of z, {shape_of(z)}; got {shape_of(step)}")
    return member(solver, "next_point")(state, z + step), state


# ---- evaluations that are not tested -----------------------------------------------------------------------


def make_plain_steps(f: Callable, layout: Layout, solver: Solver) -> Callable[[Carry], Carry]:
    """The evaluations between two that are tested: steps of damping · (f(z) − z), and nothing else."""
    every, damping = member(solver, "test_every"), member(solver, "damping")

    def untested(carry: Carry) -> Carry:
        running = carry.status == RUNNING
        # z0 is tested, because its residual sets the scale. The last evaluation of the budget is tested too.
        left = jnp.min(jnp.asarray(solver.max_steps, jnp.int32)) - carry.evaluation
        count = jnp.where(carry.evaluation == 0, 0, jnp.clip(left, 1, every) - 1)

        def move(_, old):
            z, carried = old
            fz = f(join(layout.unpack(z), carried))
            step = scaled(damping, layout.pack(fz) - z)
            return choose(running, (layout.round(z + step), split(fz)[1]), old)

        z, carried = jax.lax.fori_loop(0, count, move, (carry.z, carry.carried))
        steps = carry.steps + count * running.astype(jnp.int32)
        return carry._replace(z=z, carried=carried, steps=steps, evaluation=carry.evaluation + count)

    return untested


def stats_at(f: Callable, z: PyTree, solver: Solver, steps: Any, batch_ndim: int) -> Stats:
    """The stats of a z that is returned as it is, after `steps` evaluations and the one that is made here."""
    layout = Layout(z, batch_ndim)
    norms = norms_at(layout.pack(z), layout.pack(f(z)), layout)
    return assess(norms, cast_options(solver, layout.dtype), steps + 1, layout)
