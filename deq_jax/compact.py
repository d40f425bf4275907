"""Solve a batch of problems of unequal difficulty on ever smaller batches, without the problems that have finished.

This is a separate entry point, not an option of a solver, because f is called on smaller batches: the caller has to say
which arguments have a batch axis, and f may capture nothing that has one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from deq_jax._checks import check_arguments, check_output, check_solver, check_start
from deq_jax._hoisting import in_types_of
from deq_jax._programs import run_compiled
from deq_jax._returned import check_axes, check_is_pytree
from deq_jax._reverse_only import first_order_only, reverse_mode_only
from deq_jax._states import join, split
from deq_jax._trace import hoist
from deq_jax.adjoints import Implicit, Probe, Problem
from deq_jax.adjoints.backward import backward_cell, solve_backward
from deq_jax.adjoints.implicit import default_backward
from deq_jax.fixed_point import Solution
from deq_jax.solvers import Anderson, Solver
from deq_jax.solvers.norms import with_rtol
from deq_jax.solvers.staged import run_loop_in_stages

Z = TypeVar("Z")
FORWARD_MODE = (
    "compact is for reverse mode (grad, vjp, jacrev) alone; for jvp, jacfwd, linearize or hessian use "
    "fixed_point(..., batch_ndim=1, adjoint=ImplicitJVP())"
)


def compact(
    f: Callable[..., Any],
    z0: Z,
    *args: Any,
    axes: tuple[int | None, ...],
    solver: Solver = Anderson(),  # noqa: B008  frozen
    backward: Solver | None = None,
    sizes: tuple[int, ...] | None = None,
    probe: Probe | None = None,
) -> Solution[Z]:
    """`fixed_point(..., batch_ndim=1)` with the exact gradient, on a batch that shrinks as its problems finish.

    When at most `sizes[0]` problems are left, they move into a batch of that size. When at most `sizes[1]` are left,
    they move into one of that size, and so on. The backward solve does the same. This pays if f is cheap and the
    problems differ much in difficulty: otherwise a batch is evaluated until its last problem stops. Each size is
    one more loop to compile. The iterates of a problem are the same as in `fixed_point`, up to the rounding of f on a
    batch of another size; with `Robust` they may differ, see there. Only first derivatives in reverse mode exist here:
    for others use `fixed_point`.

    Args:
      f, z0, solver, probe: as for `fixed_point`, with the problems along the first axis of every leaf of z0. f is
        called on smaller batches, and must read from args all that has a gradient or a batch axis. An option of the
        solver may be an array whose first axis indexes the problems, such as one tolerance for each.
      axes: one entry for each of args: 0 if the first axis of all its leaves indexes the problems, None if the
        problems share it.
      backward: solver of the backward equilibrium. None chooses as `Implicit` does, with each problem's own tolerance.
      sizes: decreasing batch sizes; by default a third and a ninth of the batch.

    Returns:
      Solution(value, stats).

    Raises:
      TypeError, ValueError: as `fixed_point`; if axes do not match args; if f captures a tracer; for a derivative in
        forward mode or of second order.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> gain, x = jnp.linspace(0.1, 0.99, 90)[:, None], jnp.ones((90, 2))
    >>> cell = lambda z, gain, x, w: jnp.tanh(gain * (z @ w) + x)
    >>> z, stats = deq.compact(cell, 0 * x, gain, x, jnp.eye(2), axes=(0, 0, None))
    >>> z.shape, bool(stats.converged.all())
    ((90, 2), True)
    """
    z0 = check_arguments(f, z0, args, solver, Implicit(), 1, probe)
    check_start(z0)
    solver = with_rtol(solver, z0)
    if backward is not None:
        check_solver(backward, "backward")
    count = jax.tree.leaves(z0)[0].shape[0]
    check_axes(args, axes, (count,))
    sizes = tuple(size for size in (count // 3, count // 9) if size) if sizes is None else tuple(sizes)
    if any(not 0 < small < large for small, large in zip(sizes, (count, *sizes), strict=False)):
        raise ValueError(f"sizes must decrease from below the batch of {count} to 1 at the least, got {sizes}")
    for where, option in (("solver", solver), ("backward", backward)):
        check_is_pytree("compact", where, option)
    cells, reads = _cells(f, z0, args, axes, (count, *sizes))
    probe = Probe.like(z0, 1) if probe is None else probe
    z0, solver, backward = jax.lax.stop_gradient((z0, solver, backward))
    try:
        value, stats = run_compiled(_run, (axes, sizes, *cells), reads, solver, backward, z0, args, probe)
    except TypeError as error:  # under jit(jacfwd(...)) JAX's own refusal comes before `reverse_mode_only`
        if "forward-mode" not in str(error):
            raise
        raise TypeError(FORWARD_MODE) from error
    return Solution(value, jax.lax.stop_gradient(stats))


def _run(axes, sizes, *cells_and_arrays):
    cells, (reads, solver, backward, z0, args, probe) = cells_and_arrays[:-6], cells_and_arrays[-6:]
    args = _where_inexact(lambda leaf: reverse_mode_only(leaf, FORWARD_MODE), jax.tree.map(jnp.asarray, args))

    def f(z, args, reads):  # on a batch of one of the sizes
        i = (jax.tree.leaves(z0)[0].shape[0], *sizes).index(jax.tree.leaves(z)[0].shape[0])
        return cells[i](z, args, *reads[i])

    value, carried, _, stats = _compact(axes, sizes, solver, backward, z0, Problem(f, args, reads, 1), probe)
    return join(value, carried), stats


def _solve(axes, sizes, solver, backward, z0, problem, probe):
    bind = lambda args: lambda z: problem(z, args)
    result = run_loop_in_stages(bind, z0, problem.inputs, axes, solver, sizes)
    floats, carried = split(result.value)
    return floats, carried, result.given, result.stats


_compact: Any = jax.custom_vjp(_solve, nondiff_argnums=(0, 1))


def _compact_fwd(axes, sizes, solver, backward, z0, problem, probe):
    value, carried, given, stats = _compact(axes, sizes, solver, backward, z0, problem, probe)
    backward = default_backward(solver, value, 1) if backward is None else backward
    return (value, carried, given, stats), (backward, value, given, problem)


def _compact_bwd(axes, sizes, saved, cotangents):
    (backward, z, given, problem), (z_bar, *_) = saved, cotangents

    def solve(unit):
        def bind(gathered):  # linearizes f outside the loop, once for each size of the batch
            unit, z, given, *args = gathered
            part = dataclasses.replace(problem, inputs=tuple(args)).with_carried(given)
            return backward_cell(part, z, unit)

        gathered = unit, z, given, *problem.inputs
        result = run_loop_in_stages(bind, unit, gathered, (0, 0, 0, *axes), backward, sizes)
        return result.value, result.stats

    args_bar, stats = solve_backward(problem.with_carried(given), z, z_bar, solve)
    args_bar = _where_inexact(lambda x: first_order_only(x, "compact", "use fixed_point(..., batch_ndim=1)"), args_bar)
    return None, None, None, dataclasses.replace(problem, inputs=args_bar, other=None), Probe.of(stats)


_compact.defvjp(_compact_fwd, _compact_bwd)


def _where_inexact(identity: Callable, tree: PyTree) -> PyTree:
    """The tree, with leaves that can have a derivative (not counts, masks and keys) passed through an identity."""
    return jax.tree.map(lambda leaf: identity(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree)


def _cells(f: Callable, z0: PyTree, args: tuple, axes: tuple, sizes: tuple[int, ...]) -> tuple[list, list]:
    """(cells, reads): f(z, *args) traced on a batch of each size, and the arrays that each trace captures."""
    cells, reads = [], []
    for size in sizes:
        part = lambda leaf, size=size: jax.ShapeDtypeStruct((size, *jnp.shape(leaf)[1:]), jnp.result_type(leaf))
        start = jax.tree.map(part, z0)
        some = [arg if axis is None else jax.tree.map(part, arg) for arg, axis in zip(args, axes, strict=True)]
        cell, *read = hoist(lambda z, args: in_types_of(z, f(z, *args)), start, tuple(some))
        check_output(cell.out, start)
        # A captured tracer would get no gradient, and its batch axis could not be gathered.
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(read)):
            raise TypeError("compact: f captures a traced array; pass it in args, with axes None if problems share it")
        if cell.axes:
            raise TypeError(
                f"compact: f communicates along {cell.axes}, so its problems are coupled, and none can go on without "
                "the others; use fixed_point(..., batch_ndim=1)"
            )
        cells.append(cell)
        reads.append(read)
    return cells, reads
