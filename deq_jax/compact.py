"""A batch of unequal problems, solved without carrying those that have finished."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from deq_jax._config import cast_options, check_solver
from deq_jax._trace import hoist, run_compiled
from deq_jax.adjoints import Implicit, Probe
from deq_jax.adjoints.base import (
    add,
    as_probe,
    divide,
    first_order_only,
    inputs_bar,
    power_of_two,
    reverse_mode_only,
    unfolded,
)
from deq_jax.adjoints.implicit import default_backward
from deq_jax.fixed_point import Solution, check_arguments, check_start
from deq_jax.solvers import Anderson, Solved, Solver
from deq_jax.solvers.base import RUNNING, Loop, beginning, ending, round_of_evaluations, wide_dtype

FORWARD_MODE = (
    "compact is for reverse mode (grad, vjp, jacrev) alone; for jvp, jacfwd, linearize or hessian use "
    "fixed_point(..., batch_ndim=1, adjoint=ImplicitJVP())"
)


def compact(
    f: Callable,
    z0: PyTree,
    *args: PyTree,
    axes: tuple[int | None, ...],
    solver: Solver = Anderson(),  # noqa: B008  frozen
    backward: Solver | None = None,
    sizes: tuple[int, ...] | None = None,
    probe: Probe | None = None,
) -> Solution:
    """`fixed_point(..., batch_ndim=1)` with the exact gradient, on a batch that shrinks as its problems finish.

    Once no more than `sizes[0]` problems are left, they are gathered into a batch of that size and go on there,
    then those left of them in one of `sizes[1]`, and so on, in the backward solve too. That pays where f is cheap
    and the problems differ much in difficulty, for a batch is otherwise evaluated until its last problem stops;
    each size is one more loop to compile. A problem's iterates are the same, up to the rounding of f on a batch of
    another size. Reverse mode of first order only: for forward mode and second derivatives use `fixed_point`.

    Args:
      f, z0, solver, probe: as for `fixed_point`; the problems are along the first axis of every leaf of z0. f is
        called on smaller batches, and reads all that has a gradient or a batch axis from args. An option of the
        solver may be an array whose first axis counts the problems, such as a tolerance for each.
      axes: for each of args 0, if the first axis of all its leaves counts problems, or None if they share it.
      backward: of the backward equilibrium; None chooses as `Implicit` does, for each problem by its own tolerance.
      sizes: decreasing; by default a third and a ninth of the batch.

    Raises:
      TypeError, ValueError: as `fixed_point`; for axes that do not match args; for an f that captures a tracer; for
        a derivative in forward mode or of second order.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> gain, x = jnp.linspace(0.1, 0.99, 90)[:, None], jnp.ones((90, 2))
    >>> cell = lambda z, gain, x, w: jnp.tanh(gain * (z @ w) + x)
    >>> z, stats = deq.compact(cell, 0 * x, gain, x, jnp.eye(2), axes=(0, 0, None))
    >>> z.shape, bool(stats.converged.all())
    ((90, 2), True)
    """
    z0 = check_arguments(f, z0, args, solver, Implicit(), 1, probe)
    check_start(z0)
    if backward is not None:
        check_solver(backward, "backward")
    count = jax.tree.leaves(z0)[0].shape[0]
    _check_axes(args, axes, count)
    sizes = tuple(size for size in (count // 3, count // 9) if size) if sizes is None else tuple(sizes)
    if any(not 0 < small < large for small, large in zip(sizes, (count, *sizes), strict=False)):
        raise ValueError(f"sizes must decrease from below the batch of {count} to 1 at the least, got {sizes}")
    cells, reads = _cells(f, z0, args, axes, (count, *sizes))
    probe = Probe.like(z0, 1) if probe is None else probe
    z0, solver, backward = jax.lax.stop_gradient((z0, solver, backward))
    try:
        value, stats = run_compiled(_run, (axes, sizes, *cells), reads, solver, backward, z0, args, probe)
    except TypeError as error:  # that of `reverse_mode_only`, or under jit(jacfwd(...)) JAX's own, which comes first
        if not any(words in str(error) for words in ("forward-mode", "for reverse mode")):
            raise
        raise TypeError(FORWARD_MODE) from error
    return Solution(value, jax.lax.stop_gradient(stats))


def _run(axes, sizes, *cells_and_arrays):
    cells, (reads, solver, backward, z0, args, probe) = cells_and_arrays[:-6], cells_and_arrays[-6:]
    args = _where_inexact(reverse_mode_only, jax.tree.map(jnp.asarray, args))

    def f(z, args, reads):  # on a batch of one of the sizes
        i = (jax.tree.leaves(z0)[0].shape[0], *sizes).index(jax.tree.leaves(z)[0].shape[0])
        return cells[i](z, args, *reads[i])

    return _compact(f, axes, sizes, solver, backward, z0, reads, args, probe)


def _solve(f, axes, sizes, solver, backward, z0, reads, args, probe):
    solved = staged(lambda args: lambda z: f(z, args, reads), z0, args, axes, solver, sizes)
    return solved.value, solved.stats


_compact: Any = jax.custom_vjp(_solve, nondiff_argnums=(0, 1, 2))


def _compact_fwd(f, axes, sizes, solver, backward, z0, reads, args, probe):
    value, stats = _compact(f, axes, sizes, solver, backward, z0, reads, args, probe)
    backward = default_backward(solver, value, 1) if backward is None else backward
    return (value, stats), (backward, value, reads, args)


def _compact_bwd(f, axes, sizes, saved, cotangents):
    # z = f(z, a)  ⇒  ā = fₐᵀu with u = z̄ + Jᵀu, as in `Implicit`. The problems are independent, so that each may
    # have its own scale, a power of two: u / scale = z̄ / scale + Jᵀ(u / scale).
    (backward, z, reads, args), (z_bar, _) = saved, cotangents
    z_bar = unfolded(z_bar, z, 1)
    scale = power_of_two(z_bar, 1)
    unit = divide(z_bar, scale)

    def bind(gathered):
        unit, z, *args = gathered
        # Here, outside the loop: once for each size of the batch.
        _, vjp = jax.vjp(lambda z: f(z, tuple(args), reads), z)
        return lambda u: add(unit, vjp(u)[0])

    u, stats, *_ = staged(bind, unit, (unit, z, *args), (0, 0, *axes), backward, sizes)
    args_bar = inputs_bar(lambda z, args: f(z, args, reads), z, args, u, stats, scale)
    args_bar = _where_inexact(lambda x: first_order_only(x, "compact", "use fixed_point(..., batch_ndim=1)"), args_bar)
    return None, None, None, None, args_bar, as_probe(stats)


_compact.defvjp(_compact_fwd, _compact_bwd)


def _where_inexact(identity: Callable, tree: PyTree) -> PyTree:
    """The tree, with what can have a derivative passed through an identity: counts, masks and keys cannot."""
    return jax.tree.map(lambda leaf: identity(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, tree)


def staged(
    bind: Callable[[tuple], Callable], z0: PyTree, args: tuple, axes: tuple, solver: Solver, sizes: tuple[int, ...]
) -> Solved:
    """`solve(bind(args), z0, solver, 1)`, in batches that shrink to each of `sizes` in turn; without memory."""

    def run(loop: Loop, solver: Solver, args: tuple, sizes: tuple[int, ...]) -> Loop:
        left, count = sizes[0] if sizes else 0, loop.status.size
        body = round_of_evaluations(bind(args), z0, solver, 1)
        loop = jax.lax.while_loop(lambda loop: jnp.sum(loop.status == RUNNING) > left, body, loop)
        if not sizes:
            return loop
        who = _first(loop.status == RUNNING, left)
        part = run(_gather(loop, who), _gather_options(solver, who, count), _gather_args(args, axes, who), sizes[1:])
        return _scatter(loop, part, who)

    solver = cast_options(solver, wide_dtype(z0))
    return ending(run(beginning(z0, solver, 1), solver, args, sizes), z0, 1)._replace(memory=None)


def _first(running: Bool[Array, "batch"], left: int) -> Int[Array, "left"]:
    """Indices of `left` problems: of those that run, then of others. By counting: a sort takes eight times as long."""
    place = jnp.where(running, jnp.cumsum(running) - 1, jnp.sum(running) + jnp.cumsum(~running) - 1)
    return jnp.zeros_like(place).at[place].set(jnp.arange(running.size), unique_indices=True)[:left]


def _gather(loop: Loop, who: Int[Array, "left"]) -> Loop:
    """The loop of some of the problems; what all share has no axis."""
    return jax.tree.map(lambda leaf: leaf[who] if leaf.ndim else leaf, loop)


def _gather_args(args: tuple, axes: tuple, who: Int[Array, "left"]) -> tuple:
    pick = lambda tree, axis: tree if axis is None else jax.tree.map(lambda leaf: leaf[who], tree)
    return tuple(map(pick, args, axes))


def _gather_options(solver: Solver, who: Int[Array, "left"], count: int) -> Solver:
    """The solver of some of `count` problems: options that are arrays with an entry for each of them are gathered."""
    pick = lambda leaf: jnp.asarray(leaf)[who] if jnp.shape(leaf)[:1] == (count,) else leaf
    return jax.tree.map(pick, solver)


def _scatter(loop: Loop, part: Loop, who: Int[Array, "left"]) -> Loop:
    """The loop with the results of some of its problems; their memory stays where it was, for no one reads it."""
    names = ("best", "best_residuals", "best_scales", "steps", "status")
    return loop._replace(**{name: getattr(loop, name).at[who].set(getattr(part, name)) for name in names})


def _check_axes(args: tuple, axes: tuple, count: int) -> None:
    if not isinstance(axes, tuple) or len(axes) != len(args) or any(axis not in (0, None) for axis in axes):
        raise ValueError(f"axes must be a tuple of 0 or None, one for each of {len(args)} args; got {axes!r}")
    for i, (arg, axis) in enumerate(zip(args, axes, strict=True)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if axis == 0 and jnp.shape(leaf)[:1] != (count,):
                where = f"args[{i}]" + jax.tree_util.keystr(path)
                raise ValueError(
                    f"axes[{i}] is 0, so {where} must begin with the batch of {count}; got shape {jnp.shape(leaf)}"
                )


def _cells(f: Callable, z0: PyTree, args: tuple, axes: tuple, sizes: tuple[int, ...]) -> tuple[list, list]:
    """(cells, reads): f(z, *args) traced on a batch of each size, and the arrays that it captures there."""
    cells, reads = [], []
    for size in sizes:
        part = lambda leaf, size=size: jax.ShapeDtypeStruct((size, *jnp.shape(leaf)[1:]), jnp.result_type(leaf))
        some = [arg if axis is None else jax.tree.map(part, arg) for arg, axis in zip(args, axes, strict=True)]
        cell, *read = hoist(lambda z, args: f(z, *args), jax.tree.map(part, z0), tuple(some))
        # A captured tracer would have no gradient, and no batch axis to gather along.
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
