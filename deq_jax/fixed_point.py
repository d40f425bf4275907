"""`fixed_point`: find z with f(z, *args) = z, and differentiate it."""

from collections.abc import Callable, Hashable
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, overload

import jax
import numpy as np
from jaxtyping import Array

from deq_jax._checks import check_arguments, check_axis_name, check_is_split, check_start
from deq_jax._config import plain_at_runtime
from deq_jax._hoisting import hoist_cell
from deq_jax._programs import run_compiled
from deq_jax._states import join, split
from deq_jax._trace import Bound, flag
from deq_jax.adjoints import Adjoint, Implicit, IterationAdjoint, Probe, Problem
from deq_jax.adjoints.equilibrium import solve_differentiably
from deq_jax.adjoints.preconditioner import solver_bound
from deq_jax.adjoints.protocol import bound_to, member
from deq_jax.diagnostics import with_error
from deq_jax.halves import attach, solve
from deq_jax.solvers import Anderson, Solver, Stats
from deq_jax.solvers.norms import with_rtol

Z = TypeVar("Z")
Aux = TypeVar("Aux")
Number = float | complex | np.ndarray  # a z0 that JAX makes an array of


@plain_at_runtime
class Solution(NamedTuple, Generic[Z]):
    """What `fixed_point` returns. Gradients flow through `value` alone."""

    value: Z  # as z0: structure, shapes and dtypes
    stats: Stats


@plain_at_runtime
class SolutionWithAux(NamedTuple, Generic[Z, Aux]):
    """What `fixed_point(..., has_aux=True)` returns."""

    value: Z
    stats: Stats
    aux: Aux  # f's second output at the value, differentiable


class Options(TypedDict, total=False):
    """The options of `fixed_point` that do not change what it returns."""

    solver: Solver
    adjoint: Adjoint
    batch_ndim: int
    gather: Literal["once", "each"]
    axis_name: Hashable | tuple[Hashable, ...] | None
    estimate_error: bool
    probe: Probe | None


@overload
def fixed_point(
    f: Callable[..., Any], z0: Number, *args: Any, has_aux: Literal[False] = ..., **options: Unpack[Options]
) -> Solution[Array]: ...


@overload
def fixed_point(
    f: Callable[..., Any], z0: Z, *args: Any, has_aux: Literal[False] = ..., **options: Unpack[Options]
) -> Solution[Z]: ...


@overload
def fixed_point(
    f: Callable[..., tuple[Any, Aux]], z0: Z, *args: Any, has_aux: Literal[True], **options: Unpack[Options]
) -> SolutionWithAux[Z, Aux]: ...


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008  frozen
    adjoint: Adjoint = Implicit(),  # noqa: B008
    batch_ndim: int = 0,
    has_aux: bool = False,
    gather: Literal["once", "each"] = "once",
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    estimate_error: bool = False,
    probe: Probe | None = None,
) -> Any:
    """The fixed point z* = f(z*, *args), differentiable in args and in all that f captures.

    Args:
      f: returns z's structure, shapes and dtypes exactly; with `has_aux`, a pair (z, aux). Called under a
        trace, so it must be pure. An eager call traces f, and compiles only what has not been compiled before.
      z0: where to start, a pytree of float or complex arrays. Its cotangent is zero (but see `Unroll`). Integers,
        booleans and keys in it are carried, see below.
      *args: pytrees of arrays, of any dtype. Other leaves (a module's activation function) go to f as they are.
      solver: `Picard`, `Anderson`, `Broyden`, `NewtonKrylov` or `Robust`; for hard problems see `Robust`. Its
        tolerances, its norm and its budget are those of `deq_jax.solvers.LoopOptions`.
      adjoint: exact, `Implicit` or for forward mode `ImplicitJVP`; cheaper and biased, `Shine`, `Phantom`,
        `Neumann` or `JFB`; through the iterations, `Unroll` or `Reversible`.
      batch_ndim: how many leading axes of every leaf index independent problems, each with its own tolerance
        test and stopping time.
      has_aux: return aux of one more evaluation, at the solution. It does not advance carried leaves.
      gather: when to gather args that f gathers over devices (weights sharded for storage, by `all_gather` in
        `shard_map` or a sharding constraint): "once", before the loop, or at "each" evaluation if memory is short.
      axis_name: the named axes of an enclosing `shard_map` over which each problem is split: every device then holds a
        piece of z, and norms and inner products are summed over them. Do not name axes that distribute problems.
      estimate_error: also return `stats.error`, an estimate of ‖z − z*‖₂, for up to 17 evaluations more of f or its
        derivative, which are not counted in `stats.steps`. See `diagnostics.error_estimate`.
      probe: zeros, shaped as `Probe.zeros(batch_shape)`; its cotangent is the backward solve's statistics.

    Returns:
      Solution(value, stats), and aux third with `has_aux`. A solve that failed says so in `stats.status` and
      returns its best iterate: nothing is raised once tracing is over. To follow a solve (its progress, its residuals)
      take `solve` with a `fold`, and `attach` for the derivative.

    Raises:
      TypeError, ValueError: before anything is solved, naming the leaf, what was expected and what came.

    Carried leaves: f is given the integers, booleans and keys of z0 and returns their next values. So a cell counts its
    evaluations, draws noise at each of them, or halts. No norm, tolerance or solver looks at them. Like all leaves they
    have the batch axes, and a problem that has stopped keeps its own. `value` holds what f returned last for them.
    Derivatives take them as constants: f is linearized at the floats of `value` with the carried leaves that f was
    given there, that is, under the noise in which they were found. With a new noise at each evaluation, residuals stay
    as large as the noise, so the tolerance must be larger. If f returns a key unchanged, the noise stays the same.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", section 3.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def cell(z, params, x):
    ...     return jnp.tanh(z @ params["w"] + x)
    >>> params, x = {"w": 0.1 * jnp.ones((3, 3))}, jnp.ones((2, 3))
    >>> z, stats = deq.fixed_point(cell, jnp.zeros((2, 3)), params, x, batch_ndim=1)
    >>> [deq.Status(int(s)).name for s in stats.status]
    ['CONVERGED', 'CONVERGED']
    >>> grads = jax.grad(lambda p: deq.fixed_point(cell, z, p, x, batch_ndim=1).value.sum())(params)
    >>> grads["w"].shape
    (3, 3)

    With a carried count, and a carried key for the same noise at each evaluation:

    >>> def noisy(z, x):
    ...     h = jnp.cos(x * z["h"]) + 0.1 * jax.random.normal(z["key"], z["h"].shape)
    ...     return {"h": h, "key": z["key"], "count": z["count"] + 1}
    >>> start = {"h": jnp.zeros(3), "key": jax.random.key(0), "count": 0}
    >>> z, stats = deq.fixed_point(noisy, start, 0.5)
    >>> bool(stats.converged), bool(z["count"] == stats.steps)
    (True, True)
    """
    z0 = check_arguments(f, z0, args, solver, adjoint, batch_ndim, probe)
    check_start(z0)
    solver = with_rtol(solver_bound(solver, z0), z0)
    over = check_axis_name(axis_name)
    # Here, outside the jit below, its numbers are still numbers.
    adjoint = member(adjoint, "check")(z0, solver) or adjoint
    cell, z0, inputs, other = hoist_cell(f, z0, args, has_aux, gather)
    check_is_split(z0, over)
    adjoint = bound_to(adjoint, z0)
    probe = Probe.like(z0, batch_ndim, over) if probe is None else probe
    if flag("jax_disable_jit") and not isinstance(adjoint, IterationAdjoint):
        options: dict[str, Any] = dict(solver=solver, batch_ndim=batch_ndim, axis_name=axis_name)
        return _step_by_step(f, z0, args, options, adjoint, has_aux, estimate_error, probe)
    static = cell, batch_ndim, over, has_aux, estimate_error
    return run_compiled(_fixed_point, static, z0, inputs, other, solver, adjoint, probe, differentiates=estimate_error)


def _fixed_point(cell, batch_ndim, over, has_aux, estimate_error, z0, inputs, other, solver, adjoint, probe):
    f = Bound(lambda *reads: cell(*reads)[0], like=cell) if has_aux else cell
    problem = Problem(f, inputs, other, batch_ndim, over)
    z, stats, given = solve_differentiably(adjoint, problem, z0, solver, probe)
    stats = jax.lax.stop_gradient(stats)
    if estimate_error:
        stats = with_error(stats, problem, z, given)
    if not has_aux:
        return Solution(z, stats)
    _, aux = cell(join(split(z)[0], given), inputs, other)
    return SolutionWithAux(z, stats._replace(steps=stats.steps + 1), aux)


def _step_by_step(f, z0, args, options, adjoint, has_aux, estimate_error, probe):
    """Under `jax.disable_jit` f itself is called at each evaluation: a print or a breakpoint in it sees numbers."""
    first = (lambda z, *args: f(z, *args)[0]) if has_aux else f
    found = solve(first, z0, *args, estimate_error=estimate_error, **options)
    z = attach(first, found.value, *args, adjoint=adjoint, found=found, probe=probe, **options)
    if not has_aux:
        return Solution(z, found.stats)
    stats = found.stats._replace(steps=found.stats.steps + 1)
    return SolutionWithAux(z, stats, f(join(split(z)[0], found.given), *args)[1])
