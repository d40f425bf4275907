"""The exact gradient, by the implicit function theorem, in reverse mode."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._arrays import ratio
from deq_jax._checks import check_preconditioner, check_solver
from deq_jax._config import MAX_STEPS, config
from deq_jax._states import Layout, add, choose, eps_of, frozen, split, zeros_like
from deq_jax._trace import Bound, hoist
from deq_jax.adjoints.backward import solve_backward, transposed_product
from deq_jax.adjoints.equilibrium import at_equilibrium, solve_differentiably
from deq_jax.adjoints.linear import check_call, check_fits, check_linear, is_plain, solve_system
from deq_jax.adjoints.preconditioner import bound, check_is_linear, with_transposed
from deq_jax.adjoints.protocol import ForwardResult, Probe, Problem
from deq_jax.solvers import Anderson, Solver, Stats
from deq_jax.solvers.norms import for_state, is_default, relative_atol, with_rtol
from deq_jax.solvers.stopping import by_leaf, over_leaves

LOOSEST = 0.1  # relative tolerance that an absolute one may ask for, of a state near zero


class OnFailure(enum.IntEnum):
    """What the gradient of a problem is whose forward or backward solve did not converge."""

    KEEP = 0  # what the best backward iterate gives; the statistics carry the flag
    ZERO = 1  # nothing, so that the problem has no say in the parameters' gradient
    ONE_STEP = 2  # that of one application of f at the returned z (as JFB)

    def __repr__(self):
        return f"OnFailure.{self.name}"


@config
class Implicit:
    """The exact gradient by the implicit function theorem (paper Theorem 1), in memory that does not grow with depth.

    `solver` solves the backward equilibrium, and may be any of the forward solvers. None takes Anderson with a longer
    history (the system is linear, so that is GMRES), a tenth of the forward tolerance and twice its budget, as
    experiments/studies/backward.py decided. An absolute forward tolerance is first converted to the relative one that
    it is at z*. The tolerance never asks for more than the state's dtype can hold. Reverse mode of any order; for
    forward mode use `ImplicitJVP`.

    `linear` is another solver for the linear system, (I − Jᵀ) u = z̄: `Dense()` for small problems, a solver of
    lineax (with tags, `Lineax(solver, tags)`), or a callable (matvec, rmatvec, b) -> (u, info). matvec is v ↦ v − Jᵀ v,
    rmatvec its transpose v ↦ v − J v, and b and u are pytrees like z, of floats alone, with all its batch axes: f takes
    a whole batch, so a callable sees one block-diagonal system, and problems share its inner products. Where f
    communicates along named axes, a callable has to sum over them too. It may be a `jax.tree_util.Partial`, and must be
    one where it reads traced arrays. `preconditioner` is a linear function P ≈ (I − J)⁻¹ of a state like z, whose
    transpose is used here: by our solvers on the left, by others on the right. It may capture any array.

    For any of these solvers, one more product measures the residual ‖z̄ + Jᵀu − u‖ of each problem, and the tolerance of
    `solver` judges it: CONVERGED, MAX_STEPS if it is not met, or NONFINITE, in which case u = z̄ is taken. info is not
    read. `Probe.steps` counts this product and those of our solvers and of `Dense`. A callable's are not known.

    `on_failure` decides, problem by problem, what happens when a solve did not converge, in either direction. The
    default keeps the best iterate, which is finite and no larger than its residual allows, and leaves the flag to
    `Stats.status` and `Probe.status`. No policy helps where f itself is NaN or Inf at the returned z, because then its
    derivatives are too, and the gradient of shared parameters with them: mask the input of such a problem.

    >>> import deq_jax as deq
    >>> deq.Implicit(deq.Broyden(rtol=1e-6)).solver.rtol
    1e-06
    >>> deq.Implicit(on_failure=deq.OnFailure.ZERO).on_failure.name
    'ZERO'
    """

    solver: Solver | None = None
    on_failure: OnFailure = OnFailure.KEEP
    linear: Any = None
    preconditioner: Any = None

    def __post_init__(self):
        check_exact(self)

    def check(self, z0: PyTree, solver: Solver) -> None:
        check_system(self, z0)

    def bind(self, z0: PyTree) -> "Implicit":
        return bound(self, z0)

    def keep(self, problem: Problem, forward: ForwardResult) -> ForwardResult:
        return with_backward_solver(self, problem, forward)

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        return exact_pullback(self, problem, forward, z_bar)


def exact_pullback(adjoint: Any, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
    """The pullback of `Implicit` and of `ImplicitJVP`."""
    product = transposed_product(problem, forward.z)
    solve = lambda unit: solve_linear(with_transposed(adjoint), product, unit, problem, forward)
    inputs_bar, stats = solve_backward(problem, forward.z, z_bar, solve)
    return inputs_bar, Probe.of(stats)


def solve_linear(
    adjoint: Any, product: Callable, unit: PyTree, problem: Problem, forward: ForwardResult
) -> tuple[PyTree, Stats]:
    """(u, stats) with u = unit + product(u), or what the failure policy says, differentiable by the same adjoint.

    So a derivative of any order is implicit too. A preconditioner of the adjoint is one for this equation.
    """
    pure, inputs, other = hoist(product, unit)
    cell = Bound(lambda u, inputs, other: add(inputs[0], pure(u, inputs[1], other)), like=pure)
    linear, solver = Problem(cell, [unit, inputs], other, problem.batch_ndim, problem.over), forward.solver
    probe = Probe.like(unit, problem.batch_ndim, problem.over)
    if is_plain(adjoint):
        u, stats, _ = solve_differentiably(adjoint, linear, unit, solver, probe)
    else:
        constant = Bound(pure, jax.lax.stop_gradient(inputs), other)
        u, stats = solve_system(adjoint, constant, frozen(unit), linear, frozen(solver))
        u = at_equilibrium(adjoint, linear, ForwardResult(u, stats, None, solver), probe)
    if adjoint.on_failure == OnFailure.KEEP:
        return u, stats
    sound = stats.sound if forward.stats is None else stats.sound & forward.stats.sound
    return choose(sound, u, unit if adjoint.on_failure == OnFailure.ONE_STEP else zeros_like(unit)), stats


def with_backward_solver(adjoint: Any, problem: Problem, forward: ForwardResult) -> ForwardResult:
    """What `Implicit` and `ImplicitJVP` keep: z, and the solver of their own equations in place of the forward one."""
    check_fits(adjoint, problem, forward.z)
    solver = adjoint.solver
    if solver is None:
        solver = default_backward(forward.solver, forward.z, problem.batch_ndim, problem.over)
    solver = with_rtol(solver, forward.z)
    return forward._replace(memory=None, solver=solver)


def default_backward(forward: Solver, z: PyTree, batch_ndim: int, over: tuple = ()) -> Solver:
    """Anderson as GMRES, with a tenth of the relative tolerance that `forward` had at z, and twice its budget."""
    # Anderson sees the GMRES residual multiplied by J, so it can grow while GMRES is converging. Restarting then lost
    # backward solves of experiments/studies/backward.py, hence `growth`; so did half the budget.
    options: Any = dict(max_steps=_twice(forward.max_steps), history=16, growth=10.0)
    options |= dict(history_dtype=getattr(forward, "history_dtype", None))
    rtol: Any = 0.1 * _relative_tolerance(forward, jax.lax.stop_gradient(z), batch_ndim, over)
    # f rounds u to the state's dtype. In four dtypes, all solves converged at 1 eps, with an error of 1 to 3 eps. With
    # no floor most ended as STALLED after up to 4 times the products, hardly nearer; at 2 eps the error was double.
    floor = eps_of(z)
    rtol = max(rtol, floor) if isinstance(rtol, float) else jnp.maximum(rtol, floor)
    return Anderson(rtol=rtol, **options)


def _twice(max_steps: Any) -> Any:
    return min(2 * max_steps, MAX_STEPS) if isinstance(max_steps, int) else 2 * jnp.minimum(max_steps, MAX_STEPS // 2)


def _relative_tolerance(solver: Solver, z: PyTree, batch_ndim: int, over: tuple) -> Any:
    """‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ as a relative tolerance: the strictest of the pieces' that are not zero."""
    solver = for_state(solver, z, batch_ndim)
    if isinstance(solver.atol, int | float) and solver.atol == 0:
        return float(solver.rtol) if isinstance(solver.rtol, int | float) else solver.rtol
    layout = Layout(z, batch_ndim, over=over)
    sizes = layout.norms(layout.pack(z))
    cast = lambda number: jnp.asarray(number).astype(sizes.dtype)
    if not is_default(solver, layout):
        asked = relative_atol(layout.pack(z), sizes, solver, layout)
    else:
        of_leaves = jnp.where(sizes > 0, ratio(by_leaf(cast(solver.atol), layout), sizes), jnp.inf)
        asked = over_leaves(jnp.min, of_leaves, layout)
    return cast(solver.rtol) + jnp.minimum(asked, LOOSEST)


def check_exact(adjoint: Any) -> None:
    """Raise TypeError unless the options of `Implicit` or `ImplicitJVP` are of their kinds."""
    name = type(adjoint).__name__
    if adjoint.solver is not None:
        check_solver(adjoint.solver, f"{name}.solver")
    if not isinstance(adjoint.on_failure, OnFailure):
        names = ", ".join(f"OnFailure.{p.name}" for p in OnFailure)
        raise TypeError(f"{name}.on_failure must be one of {names}; got {adjoint.on_failure!r}")
    check_linear(adjoint)
    check_preconditioner(adjoint)


def check_system(adjoint: Any, z0: PyTree) -> None:
    """Raise unless `linear` and `preconditioner` return states like z0, and the latter is linear."""
    if not is_plain(adjoint):
        floats = frozen(split(z0)[0])
        check_call(adjoint, floats)
        check_is_linear(adjoint, floats)
