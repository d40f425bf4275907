"""`root`: find z with F(z, *args) = 0, at F's own scale, and differentiate it."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
import numpy as np
from jaxtyping import Array, PyTree

from deq_jax._arrays import may_be_sharded
from deq_jax._checks import check_arguments, check_axis_name, check_count, check_is_split, check_start
from deq_jax._hoisting import hoist_cell, in_types_of
from deq_jax._programs import run_compiled
from deq_jax._scales import norm_of
from deq_jax._states import Layout, add, divide, eps_of, frozen, join, split
from deq_jax._trace import Bound, flag
from deq_jax.adjoints import Adjoint, Implicit, ImplicitJVP, IterationAdjoint, Probe, Problem
from deq_jax.adjoints.equilibrium import solve_differentiably
from deq_jax.adjoints.preconditioner import scaled_by, solver_bound
from deq_jax.adjoints.protocol import bound_to, member
from deq_jax.fixed_point import Solution, SolutionWithAux
from deq_jax.solvers import Newton, NewtonKrylov, Solver, run_loop
from deq_jax.solvers.carry import layout_for
from deq_jax.solvers.equation import root_of
from deq_jax.solvers.loop import coupled_axes
from deq_jax.solvers.norms import with_rtol
from deq_jax.solvers.protocol import member as solver_member

Z = TypeVar("Z")
Aux = TypeVar("Aux")
Number = float | complex | np.ndarray  # a z0 that JAX makes an array of

DENSE = 256  # unknowns a problem, up to which the default solver holds the whole Jacobian
KRYLOV = 50  # vectors that it holds beyond


class Options(TypedDict, total=False):
    """The options of `root` that do not change what it returns."""

    solver: Solver | None
    adjoint: Adjoint
    batch_ndim: int
    axis_name: Hashable | tuple[Hashable, ...] | None
    probe: Probe | None


@overload
def root(
    F: Callable[..., Any], z0: Number, *args: Any, has_aux: Literal[False] = ..., **options: Unpack[Options]
) -> Solution[Array]: ...


@overload
def root(
    F: Callable[..., Any], z0: Z, *args: Any, has_aux: Literal[False] = ..., **options: Unpack[Options]
) -> Solution[Z]: ...


@overload
def root(
    F: Callable[..., tuple[Any, Aux]], z0: Z, *args: Any, has_aux: Literal[True], **options: Unpack[Options]
) -> SolutionWithAux[Z, Aux]: ...


def root(
    F: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
    batch_ndim: int = 0,
    has_aux: bool = False,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    probe: Probe | None = None,
) -> Any:
    """The root z* with F(z*, *args) = 0, differentiable in args and in all that F captures.

    F has a scale of its own: c F takes the same steps for any c, up to rounding, to the same z and statuses. As many
    equations as unknowns, in the same structure; none of them needs to belong to a leaf of z.

    CONVERGED says that each leaf of F meets ‖F(z)‖ ≤ atol + rtol S, where S is how much F changes by a relative change
    of z, measured over the last moves that halved F (`solvers/equation.py` has the formula), or that F(z) is zero. So
    `atol` is in the units of F, and `Stats.relative_residual`, ‖F‖ / S, estimates the relative change of z that is left
    to make. Like all that is read from a residual, it may be off by the condition of ∂F. `Stats.residual` is ‖F(z)‖ at
    the value. A root at z = 0 has no relative size: it ends as STALLED, at rounding, if there is no `atol`.

    Args:
      F: returns z's structure, shapes and dtypes; with `has_aux`, a pair (F(z), aux). Must be pure.
      z0: as for `fixed_point`, carried leaves too.
      *args, batch_ndim, has_aux, axis_name, probe: as for `fixed_point`.
      solver: any solver. None takes `Newton` up to 256 unknowns a problem, and `NewtonKrylov(products="jvp")` above
        and where the state may be sharded, both with rtol = eps^(2/3). These take derivatives of F in forward mode: for
        an F without, pass `NewtonKrylov()` or `Broyden()`. Solvers are shown f(z) − z = −F(z) / σ, with σ the measured
        gain of F at z0, as a power of two.
      adjoint: as for `fixed_point`. `Implicit()` and `ImplicitJVP()` without a solver take the same two for the
        backward solve, to eps^(3/4) of the cotangent's scale; its status is in `Probe`, as always. Their `linear` is
        given products with ∂Fᵀ / σ, or ∂F / σ. `Unroll` and `Reversible` iterate on f, and test it as `fixed_point`
        does. The `preconditioner` of an adjoint, and that of `NewtonKrylov`, is here a P ≈ (∂F)⁻¹ at F's own scale.

    Returns:
      Solution(value, stats), and aux third with `has_aux`. `stats.steps` has the evaluation that measures σ, too.

    Raises:
      TypeError, ValueError: before anything is solved, naming the leaf, what was expected and what came.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> F = lambda z, a: 1e6 * (z**3 + z - a)
    >>> z, stats = deq.root(F, jnp.zeros(2), jnp.array([2.0, 10.0]))
    >>> z.round(4).tolist(), deq.Status(int(stats.status)).name
    ([1.0, 2.0], 'CONVERGED')
    >>> jax.grad(lambda a: deq.root(F, 0.0, a).value)(2.0).round(4).tolist()
    0.25
    """
    if not callable(F):
        raise TypeError(f"F must be callable as F(z, *args), got {type(F).__name__}")
    if solver is not None:
        check_norm_of_root(solver, batch_ndim)
    z0 = check_arguments(F, z0, args, Newton() if solver is None else solver, adjoint, batch_ndim, probe)
    check_start(z0)
    over = check_axis_name(axis_name)
    dense = few_unknowns(z0, batch_ndim, over)
    solver = default_solver(z0, dense) if solver is None else solver
    adjoint = with_linear_solver(adjoint, z0, dense)
    solver = with_rtol(solver_bound(solver, z0), z0)
    adjoint = member(adjoint, "check")(z0, solver) or adjoint
    cell, z0, inputs, other = hoist_cell(F, z0, args, has_aux, name="F")
    check_is_split(z0, over)
    adjoint = bound_to(adjoint, z0)
    probe = Probe.like(z0, batch_ndim, over) if probe is None else probe
    static = cell, batch_ndim, over, has_aux
    if flag("jax_disable_jit"):  # F itself is called at each evaluation: a print or a breakpoint in it sees numbers
        first = (lambda z: F(z, *args)[0]) if has_aux else (lambda z: F(z, *args))
        return _root(*static, z0, inputs, other, solver, adjoint, probe, lambda z: in_types_of(z, first(z)))
    return run_compiled(_root, static, z0, inputs, other, solver, adjoint, probe)


def _root(cell, batch_ndim, over, has_aux, z0, inputs, other, solver, adjoint, probe, direct=None):
    F = Bound(lambda *reads: cell(*reads)[0], like=cell) if has_aux else cell
    problem = Problem(F, inputs, other, batch_ndim, over)
    evaluate = problem.frozen if direct is None else direct
    layout = layout_for(solver, z0, batch_ndim, over)
    scale_at = lambda z: root_of(evaluate, frozen(z), layout, coupled_axes(problem.f, layout))

    def find(z0, solver):
        equation, evaluations = scale_at(z0)
        check_forward_mode(solver, evaluations)
        result = run_loop(evaluate, z0, scaled_by(solver, equation.sigma), batch_ndim, over=over, equation=equation)
        stats = result.stats._replace(steps=result.stats.steps + evaluations)
        # XLA drops this evaluation where no derivative is taken.
        sigma = scale_at(join(split(result.value)[0], result.given))[0].sigma
        return scaled_by(adjoint, sigma), as_fixed_point(problem, sigma), result._replace(stats=stats)

    if isinstance(adjoint, IterationAdjoint):
        sigma = scale_at(z0)[0].sigma
        problem, solver = as_fixed_point(problem, sigma), scaled_by(solver, sigma)
    z, stats, given = solve_differentiably(adjoint, problem, z0, solver, probe, find)
    stats = jax.lax.stop_gradient(stats)
    if not has_aux:
        return Solution(z, stats)
    _, aux = cell(join(split(z)[0], given), inputs, other)
    return SolutionWithAux(z, stats._replace(steps=stats.steps + 1), aux)


def check_forward_mode(solver: Solver, evaluations: int) -> None:
    """Raise TypeError if the solver differentiates an F whose scale had to be measured by a difference."""
    if evaluations > 1 and solver_member(solver, "direction") is not None:
        raise TypeError(
            f"{type(solver).__name__} differentiates F in forward mode, which F does not have (a custom_vjp, a "
            "callback or a kernel in it); pass solver=NewtonKrylov() or Broyden(), which take differences"
        )


def as_fixed_point(problem: Problem, sigma: Array) -> Problem:
    """The equation z = z − F(z) / σ. Its I − J is ∂F / σ, so it has the derivatives of the root."""

    def f(z: PyTree, inputs: PyTree, other: PyTree) -> PyTree:
        floats, carried = split(problem.f(z, inputs, other[0]))
        return join(add(split(z)[0], divide(floats, -other[1])), carried)

    return Problem(Bound(f, like=problem.f), problem.inputs, (problem.other, sigma), problem.batch_ndim, problem.over)


def check_norm_of_root(solver: Solver, batch_ndim: int) -> None:
    """Raise ValueError for a norm, or scales, that the scale of F is not measured in."""
    check_count("batch_ndim", batch_ndim, 0)
    remedy = "put quantities of different scale into separate leaves of z"
    if norm_of(solver) != ("leaf", None):
        raise ValueError(
            f"root judges F by leaf, at a scale that it measures: norm must be 'leaf', got {solver!r}; {remedy}"
        )
    atol = getattr(solver, "atol", 0.0)
    if not jax.tree_util.all_leaves([atol]) or np.ndim(atol) > batch_ndim:
        raise ValueError(f"root: atol must be one number, or one a problem, in the units of F; got {atol!r}; {remedy}")


# ---- what is taken by default ------------------------------------------------------------------------------


def few_unknowns(z0: PyTree, batch_ndim: int, over: tuple) -> bool:
    """Whether the Jacobian of each problem is small, and on one device."""
    floats = split(z0)[0]
    count = Layout(floats, batch_ndim, flat=True).size
    on_one = not over and not any(map(may_be_sharded, jax.tree.leaves(floats)))
    return on_one and isinstance(count, int) and count <= DENSE


def default_solver(z0: PyTree, dense: bool) -> Solver:
    return few_or_many(dense, eps_of(split(z0)[0]) ** (2 / 3), 0.01)


def with_linear_solver(adjoint: Adjoint, z0: PyTree, dense: bool) -> Adjoint:
    """The adjoint; one that would derive its solver, or the tolerance of `linear`, from a fixed point's gets a solver.

    It is one for any matrix.
    """
    if not isinstance(adjoint, Implicit | ImplicitJVP) or adjoint.solver is not None:
        return adjoint
    # For a linear equation, Newton's method is elimination, and with forcing=0 Newton–Krylov is restarted GMRES.
    return dataclasses.replace(adjoint, solver=few_or_many(dense, eps_of(split(z0)[0]) ** 0.75, 0.0))


def few_or_many(dense: bool, rtol: float, forcing: float) -> Solver:
    if dense:
        return Newton(rtol=rtol, max_steps=500)
    return NewtonKrylov(rtol=rtol, max_steps=2000, krylov=KRYLOV, forcing=forcing, products="jvp")
