"""The halves of `fixed_point`: `solve` finds an equilibrium, and `attach` gives one a derivative."""

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import jax

from deq_jax._checks import check_arguments, check_axis_name, check_is_split, check_start
from deq_jax._hoisting import hoist_cell, hoist_fold, in_types_of, with_fold
from deq_jax._programs import run_compiled
from deq_jax._returned import check_found, check_memory
from deq_jax._states import join, split
from deq_jax._trace import Bound, flag
from deq_jax.adjoints import Adjoint, ForwardResult, Implicit, IterationAdjoint, Probe, Problem
from deq_jax.adjoints.equilibrium import at_equilibrium
from deq_jax.adjoints.preconditioner import solver_bound
from deq_jax.adjoints.protocol import bound_to, member
from deq_jax.diagnostics import with_error
from deq_jax.solvers import Anderson, Fold, Solver, SolveResult, run_loop
from deq_jax.solvers.carry import vector_type
from deq_jax.solvers.norms import with_rtol
from deq_jax.solvers.protocol import check_sees_all

Z = TypeVar("Z")


def solve(
    f: Callable[..., Any],
    z0: Z,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008
    batch_ndim: int = 0,
    gather: Literal["once", "each"] = "once",
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    estimate_error: bool = False,
    memory: Any = None,
    fold: Fold | None = None,
) -> SolveResult[Z]:
    """The forward half of `fixed_point`, with all that the solver leaves. No gradient flows through it.

    Args:
      f, z0, *args, solver, batch_ndim, gather, axis_name, estimate_error: as for `fixed_point`.
      memory: that of an earlier solve with the same solver and the same shapes of z0. Where f has changed little, a
        quasi-Newton method then starts with the Jacobian it has learned.
      fold: accumulates over the evaluations inside the loop: `ResidualTrace`, `Snapshots`, or an object of your
        own with `init(z0, batch_ndim)` and `update(folded, evaluation)`, see `Evaluation`.

    Returns:
      SolveResult(value, stats, memory, folded, given). `attach` gives the value a derivative. `given` has the carried
        leaves with which f was evaluated at the value.

    Raises:
      TypeError, ValueError: as `fixed_point`.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, x: jnp.tanh(2 * z[::-1] + x)
    >>> first = deq.solve(cell, jnp.zeros(2), jnp.array([0.1, 0.2]), solver=deq.Broyden())
    >>> again = deq.solve(cell, first.value, jnp.array([0.1, 0.21]), solver=deq.Broyden(), memory=first.memory)
    >>> bool(again.stats.steps < first.stats.steps), bool(again.stats.converged)
    (True, True)
    """
    start = jax.lax.stop_gradient(check_arguments(f, z0, args, solver, Implicit(), batch_ndim, None))
    check_start(start)
    solver = with_rtol(solver_bound(solver, start), start)
    if getattr(fold, "sees_all", False):
        check_sees_all(solver, f"fold={fold!r}")
    over = check_axis_name(axis_name)
    cell, start, inputs, other = hoist_cell(f, start, args, gather=gather)
    check_is_split(start, over)
    if memory is not None:
        check_memory(memory, solver, vector_type(solver, start, batch_ndim, over))
    if flag("jax_disable_jit"):
        typed = lambda z: in_types_of(z, f(z, *args))
        result = run_loop(typed, start, solver, batch_ndim, memory=memory, fold=fold, over=over)
        return _reported(result, Problem(cell, inputs, other, batch_ndim, over), estimate_error)
    hoisted, fold_reads = hoist_fold(fold, start, batch_ndim, over)
    reads = jax.lax.stop_gradient((inputs, other, fold_reads))
    static = cell, batch_ndim, over, estimate_error, *hoisted
    return run_compiled(_solve, static, start, reads, solver, memory, differentiates=estimate_error)


def _solve(cell, batch_ndim, over, estimate_error, fold_init, fold_update, z0, reads, solver, memory):
    inputs, other, fold_reads = reads
    fold = with_fold(fold_init, fold_update, fold_reads)
    result = run_loop(Bound(cell, inputs, other), z0, solver, batch_ndim, memory=memory, fold=fold, over=over)
    return _reported(result, Problem(cell, inputs, other, batch_ndim, over), estimate_error)


def _reported(result, problem, estimate_error):
    if estimate_error:
        result = result._replace(stats=with_error(result.stats, problem, result.value, result.given))
    return jax.lax.stop_gradient(result)


def attach(
    f: Callable[..., Any],
    z: Z,
    *args: Any,
    adjoint: Adjoint = Implicit(),  # noqa: B008
    solver: Solver = Anderson(),  # noqa: B008
    batch_ndim: int = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    found: SolveResult[Z] | None = None,
    probe: Probe | None = None,
) -> Z:
    """z, however it was found, with the derivative that a fixed point of f has in args and in what f captures.

    The value is z itself, and no gradient flows to z. The derivative is that of `adjoint`, taken as if f(z, *args) = z.
    So a solver of your own, a cached equilibrium, or a state on the way to an equilibrium becomes differentiable.

    Args:
      f, *args, batch_ndim, axis_name, probe: as for `fixed_point`.
      adjoint: one at the equilibrium: `Implicit`, `ImplicitJVP`, `Phantom`, `Neumann`, `JFB`, or `Shine` with `found`.
      solver: what the adjoint derives its own backward solver from, where it was given none.
      found: the result of the `solve` that z comes from, for `Shine` and for `Implicit(on_failure=...)`. With it, f is
        linearized with the carried leaves `found.given`, without it with those of z.

    Raises:
      TypeError, ValueError: as `fixed_point`; for an adjoint that goes through the iterations.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def square_root(a):  # by bisection, say; here by numpy
    ...     z = jnp.sqrt(jax.lax.stop_gradient(a))
    ...     return deq.attach(lambda z: 0.5 * (z + a / z), z)
    >>> bool(abs(jax.grad(square_root)(4.0) - 0.25) < 1e-6)
    True
    """
    start = jax.lax.stop_gradient(check_arguments(f, z, args, solver, adjoint, batch_ndim, probe))
    solver = with_rtol(solver, start)
    if isinstance(adjoint, IterationAdjoint):
        raise TypeError(
            f"{type(adjoint).__name__} differentiates the iterations of a solve, and z comes without them; "
            "use Implicit, ImplicitJVP, Phantom, Neumann or JFB"
        )
    member(adjoint, "check")(start, solver)
    over = check_axis_name(axis_name)
    cell, start, inputs, other = hoist_cell(f, start, args)
    check_is_split(start, over)
    adjoint = bound_to(adjoint, start)
    probe = Probe.like(start, batch_ndim, over) if probe is None else probe
    if found is not None:
        check_found(found, start, batch_ndim)
    stats, memory = (None, None) if found is None else (found.stats, found.memory)
    floats, carried = split(start)
    given = carried if found is None else found.given
    forward = ForwardResult(floats, stats, memory, solver)
    z_star = run_compiled(_attach, (cell, batch_ndim, over), forward, inputs, other, given, adjoint, probe)
    return join(z_star, carried)


def _attach(cell, batch_ndim, over, forward, inputs, other, given, adjoint, probe):
    problem = Problem(cell, inputs, other, batch_ndim, over).with_carried(given)
    return at_equilibrium(adjoint, problem, forward, probe)
