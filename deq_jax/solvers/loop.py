"""One loop for every solver: it calls f, tests convergence, counts, freezes and keeps the best iterate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._arrays import half_power, settled
from deq_jax._config import MAX_STEPS
from deq_jax._gathers import gathered_once
from deq_jax._states import Layout, choose, join, split
from deq_jax._trace import axes_of
from deq_jax._vectors import Vec, scaled, shape_of
from deq_jax.solvers.carry import Carry, Verdict, finalize, init_carry, layout_for, noted
from deq_jax.solvers.equation import FIXED_POINT, Equation
from deq_jax.solvers.norms import for_state
from deq_jax.solvers.protocol import Evaluation, Fold, Solver, SolveResult, Stats, member
from deq_jax.solvers.renewal import begun, in_units, is_on, run_while
from deq_jax.solvers.stopping import (
    RUNNING,
    STALE_EVALUATIONS,
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
    residual_of,
    where_better,
    whole,
)


def run_loop(
    f: Callable,
    z0: PyTree,
    solver: Solver,
    batch_ndim: int = 0,
    *,
    memory: Any = None,
    fold: Fold | None = None,
    over: tuple = (),
    equation: Equation = FIXED_POINT,
) -> SolveResult:
    """Iterate `solver` on f(z) = z from z0, or on f(z) = 0 if `equation` is a `Root`, until each problem has stopped.

    A solver works on one vector a problem, float32 or wider, so that inner products run over the whole state; f sees
    the state in its own structure and dtypes, with its carried leaves. The loop is native to the batch: a problem that
    has stopped is frozen at its best iterate, and the loop ends with the last one. `memory` is that of an earlier solve
    with the same solver and shapes. If f communicates along named axes (`f.axes`, see `_trace.Bound`), the problems
    along them are one coupled problem, and stop together. Over the named axes `over` each problem is split.
    """
    f, solver = gathered_once(f, z0), for_state(solver, z0, batch_ndim, over)
    layout = layout_for(solver, z0, batch_ndim, over)
    carry = init_carry(z0, solver, layout, memory, fold, equation)
    # Not one after the other where problems are evaluated together: by an f that communicates, or for a fold, which
    # counts the evaluations of the batch.
    parts = member(solver, "parts") if fold is None and not coupled_axes(f, layout) else ()
    for i, part in enumerate(parts or (solver,)):
        body = make_body(f, part, layout, fold, equation)
        carry = begun(carry, part, layout, equation) if i else carry
        carry = run_while(lambda carry, part=part: jnp.any(is_on(carry, part)), body, carry, part, layout, equation)
    return finalize(carry, layout)


def make_body(
    f: Callable, solver: Solver, layout: Layout, fold: Fold | None = None, equation: Equation = FIXED_POINT
) -> Callable[[Carry], Carry]:
    """The body of the loop: one evaluation that is tested, after `test_every` − 1 that only move z."""
    tested = make_evaluation(f, layout, solver, fold, equation)
    if member(solver, "test_every") == 1:
        return tested
    untested = make_plain_steps(f, layout, solver, equation)
    return lambda carry: tested(untested(carry))


# ---- one evaluation ----------------------------------------------------------------------------------------


def make_evaluation(
    f: Callable, layout: Layout, solver: Solver, fold: Fold | None, equation: Equation
) -> Callable[[Carry], Carry]:
    """One evaluation of f, what it says of each problem, and the next iterate."""
    judged = make_verdict(layout, solver, coupled_axes(f, layout), equation)

    def evaluate(carry: Carry) -> Carry:
        z_tree = join(layout.unpack(carry.z), carry.carried)
        with jax.named_scope("f"):
            fz, fz_tree, products = evaluated(f, solver, layout, carry.solver, carry.z, carry.carried, equation)
        norms, residual, seen = equation.measured(carry, fz, layout, solver)
        verdict = judged(carry, norms, seen)
        if member(solver, "scale_free"):
            # The verdict is computed once, and not again by each kernel that works on vectors: they read its results.
            verdict, residual = settled((verdict, residual))
        after = noted(carry, verdict, is_on(carry, solver), split(fz_tree)[1])
        with jax.named_scope(type(solver).__name__):
            asked = equation.asked(solver, norms, layout)
            z, state = advance(asked, carry.solver, residual, carry.z, verdict, products, layout)
        after = after._replace(solver=state, seen=seen)
        # A problem that has stopped is given its best z again, with what it was given there; so is one that waits.
        then, stay = (layout.round(z), after.returned), (after.best, after.best_carried)
        z, carried = choose(is_on(after, solver), then, stay)
        return after._replace(
            z=z,
            carried=carried,
            folded=None if fold is None else fold.update(carry.folded, shown(carry, z_tree, fz_tree, norms, layout)),
            evaluation=carry.evaluation + 1,
        )

    return evaluate


def coupled_axes(f: Callable, layout: Layout) -> tuple:
    """The named axes along which f couples different problems."""
    return tuple(axis for axis in axes_of(f) if axis not in layout.over)


def evaluated(
    f: Callable, solver: Solver, layout: Layout, state: Any, z: Vec, carried: PyTree, equation: Equation = FIXED_POINT
) -> tuple[Vec, PyTree, tuple]:
    """(f(z) as a vector, all that f returned, the products that the solver is shown, if it asks for any)."""

    def at(z: Vec) -> tuple[Vec, PyTree]:
        tree = f(join(layout.unpack(z), carried))
        return layout.pack(tree), tree

    if member(solver, "direction") is None:
        return *at(z), ()
    directions = member(solver, "direction")(state)
    push = lambda direction: jax.jvp(at, (z,), (direction,), has_aux=True)
    if shape_of(directions) != shape_of(z):  # rows of an array
        push = jax.vmap(push, in_axes=layout.batch_ndim, out_axes=(None, layout.batch_ndim, None))
    fz, pushed, tree = push(directions)
    return fz, tree, (equation.product(directions, pushed),)


def make_verdict(
    layout: Layout, solver: Solver, axes: tuple, equation: Equation
) -> Callable[[Carry, Norms, Any], Verdict]:
    """The function that judges the evaluation of f at the carry's z."""
    patience, recovers = max(STALE_EVALUATIONS, member(solver, "patience")), member(solver, "recovers")
    if member(solver, "returns") == "last":
        patience = MAX_STEPS  # never STALLED: the last z may be far above the floor
    coupled, least = coupling(axes), member(solver, "min_steps")

    def judged(carry: Carry, norms: Norms, seen: Any) -> Verdict:
        running, first = is_on(carry, solver), carry.steps == 0
        residual, scale = (whole(x, layout) for x in norms[:2])
        steps = carry.steps + running.astype(jnp.int32)
        accepted = lambda ended: ended & (steps >= least) if least else ended
        first_scale = jnp.where(first, jnp.maximum(residual, scale), carry.first_scale)
        finite = coupled.everywhere(jnp.isfinite(residual) & jnp.isfinite(scale))
        growth = grown(carry.growth, norms, by_leaf(finite, layout))
        lost, reduced = guards(growth, norms, layout, coupled)
        converged = coupled.everywhere(has_converged(norms, solver, layout)) & finite & ~lost & reduced
        converged = accepted(converged)
        made = progress(norms, carry.best_norms, growth, layout, coupled)
        stale = jnp.where(finite & made.enough, 0, carry.stale + running.astype(jnp.int32))

        spent = steps >= solver.max_steps
        out_of_scale = coupled.anywhere(is_out_of_scale(residual, first_scale, spent))
        status = next_status(
            converged=converged,
            finite=finite | (member(solver, "can_backtrack")(carry.solver) & ~first),
            diverged=(lost | out_of_scale) & (not recovers),
            stalled=accepted(equation.at_floor(made.at_floor, seen) & (stale >= patience)),
            spent=spent,
        )
        status = jnp.where(running, status, carry.status).astype(jnp.int32)
        # An iterate so far out that its residual is all rounding is not a better one.
        better = running & finite & ~lost & (converged | made.improved)
        best_norms, unit = where_better(better, norms, carry.best_norms, layout), half_power(equation.in_z(first_scale))
        last_norms = None
        if carry.last_norms is not None:
            better = running & finite
            last_norms = where_better(better, norms, carry.last_norms, layout)
        return Verdict(best_norms, last_norms, first_scale, growth, stale, steps, status, better, unit, 1 / unit)

    return judged


def shown(carry: Carry, z: PyTree, fz: PyTree, norms: Norms, layout: Layout) -> Evaluation:
    """This evaluation, as a fold sees it."""
    residual, relative = residual_of(norms, layout), relative_residual(norms, layout)
    return Evaluation(carry.evaluation, z, fz, residual, relative, carry.status == RUNNING)


def advance(
    solver: Solver, state: Any, residual: Vec, z: Vec, verdict: Verdict, products: tuple, layout: Layout
) -> tuple[Vec, Any]:
    """The next iterate, and the solver's state."""
    if member(solver, "scale_free"):
        residual, z = scaled(verdict.per_unit, residual), scaled(verdict.per_unit, z)
        z, state = _next_point(in_units(solver, verdict.unit, layout), state, residual, z, products)
        return scaled(verdict.unit, z), state
    return _next_point(solver, state, residual, z, products)


def _next_point(solver: Solver, state: Any, residual: Vec, z: Vec, products: tuple) -> tuple[Vec, Any]:
    step, state = (member(solver, "round") or solver.update)(residual, state, z, *products)
    if shape_of(step) != shape_of(z):
        name = type(solver).__name__
        raise ValueError(f"{name}.update must return a step of the shape of z, {shape_of(z)}; got {shape_of(step)}")
    return member(solver, "next_point")(state, z + step), state


# ---- evaluations that are not tested -----------------------------------------------------------------------


def make_plain_steps(f: Callable, layout: Layout, solver: Solver, equation: Equation) -> Callable[[Carry], Carry]:
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
            step = scaled(damping, equation.residual(z, layout.pack(fz)))
            return choose(running, (layout.round(z + step), split(fz)[1]), old)

        z, carried = jax.lax.fori_loop(0, count, move, (carry.z, carry.carried))
        steps = carry.steps + count * running.astype(jnp.int32)
        return carry._replace(z=z, carried=carried, steps=steps, evaluation=carry.evaluation + count)

    return untested


def stats_at(f: Callable, z: PyTree, solver: Solver, steps: Any, batch_ndim: int, over: tuple = ()) -> Stats:
    """The stats of a z that is returned as it is, after `steps` evaluations and the one that is made here."""
    layout = Layout(z, batch_ndim, over=over)
    solver = for_state(solver, z, batch_ndim)
    norms = norms_at(layout.pack(z), layout.pack(f(z)), layout, solver)
    return assess(norms, solver, steps + 1, layout)
