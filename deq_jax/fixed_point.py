"""`fixed_point`: find z with f(z, *args) = z, and differentiate it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from deq_jax._checks import check_found, check_memory
from deq_jax._config import check_options, check_sees_all, check_solver
from deq_jax._trace import Bound, Traced, checked, flag, hoist, is_array_like, run_compiled, vary, varying_axes
from deq_jax.adjoints import Adjoint, Found, Implicit, Probe
from deq_jax.solvers import Anderson, Broyden, Fold, Seen, Solved, Solver, Stats
from deq_jax.solvers import solve as _solve
from deq_jax.solvers.base import raveler, wide_dtype


class Solution(NamedTuple):
    """What `fixed_point` returns. Gradients flow through `value` alone."""

    value: PyTree  # as z0: structure, shapes and dtypes
    stats: Stats


class SolutionWithAux(NamedTuple):
    """What `fixed_point(..., has_aux=True)` returns."""

    value: PyTree
    stats: Stats
    aux: PyTree  # f's second output at the value, differentiable


def fixed_point(
    f: Callable,
    z0: PyTree,
    *args: PyTree,
    solver: Solver = Anderson(),  # noqa: B008  frozen
    adjoint: Adjoint = Implicit(),  # noqa: B008
    batch_ndim: int = 0,
    has_aux: bool = False,
    probe: Probe | None = None,
) -> Any:
    """The fixed point z* = f(z*, *args), differentiable in args and in all that f captures.

    Args:
      f: returns z's structure, shapes and dtypes exactly; with `has_aux`, a pair (z, aux). Called under a
        trace, so it must be pure. An eager call traces f, and compiles only what has not been compiled before.
      z0: where to start, a pytree of float or complex arrays. Its cotangent is zero (but see `Unroll`).
      *args: pytrees of arrays, of any dtype. Other leaves (a module's activation function) go to f as they are.
      solver: `Picard`, `Anderson`, `Broyden`, `NewtonKrylov` or `Robust`; for hard problems see `Robust`.
      adjoint: exact, `Implicit` or for forward mode `ImplicitJVP`; cheaper and biased, `Shine`, `Phantom`,
        `Neumann` or `JFB`; through the iterations, `Unroll` or `Reversible`.
      batch_ndim: how many leading axes of every leaf index independent problems, each with its own tolerance
        test and stopping time.
      has_aux: return aux of one more evaluation, at the solution.
      probe: zeros, shaped as `Probe.zeros(batch_shape)`; its cotangent is the backward solve's statistics.

    Returns:
      Solution(value, stats), and aux third with `has_aux`. A solve that failed says so in `stats.status` and
      returns its best iterate: nothing is raised once tracing is over.

    Raises:
      TypeError, ValueError: before anything is solved, naming the leaf, what was expected and what came.

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
    """
    z0 = check_arguments(f, z0, args, solver, adjoint, batch_ndim, probe)
    check_start(z0)
    warn = getattr(adjoint, "warn", None)
    if warn is not None:  # here, outside the jit below, its numbers are still numbers
        warn(z0, solver)
    cell, z0, inputs, other = hoist_cell(f, z0, args, has_aux)
    probe = Probe.like(z0, batch_ndim) if probe is None else probe
    if flag("jax_disable_jit") and hasattr(adjoint, "at"):
        return _step_by_step(f, z0, args, solver, adjoint, batch_ndim, has_aux, probe)
    return run_compiled(_fixed_point, (cell, batch_ndim, has_aux), z0, inputs, other, solver, adjoint, probe)


def _fixed_point(cell, batch_ndim, has_aux, z0, inputs, other, solver, adjoint, probe):
    f = Bound(lambda *reads: cell(*reads)[0], axes=cell.axes) if has_aux else cell
    z, stats = adjoint.run(f, z0, inputs, other, solver, batch_ndim, probe)
    stats = jax.lax.stop_gradient(stats)
    if not has_aux:
        return Solution(z, stats)
    _, aux = cell(z, inputs, other)
    return SolutionWithAux(z, stats._replace(steps=stats.steps + 1), aux)


def _step_by_step(f, z0, args, solver, adjoint, batch_ndim, has_aux, probe):
    """Under `jax.disable_jit` f itself is called at each evaluation: a print or a breakpoint in it sees numbers."""
    first = (lambda z, *args: f(z, *args)[0]) if has_aux else f
    solved = solve(first, z0, *args, solver=solver, batch_ndim=batch_ndim)
    z = attach(
        first, solved.value, *args, adjoint=adjoint, solver=solver, batch_ndim=batch_ndim, found=solved, probe=probe
    )
    if not has_aux:
        return Solution(z, solved.stats)
    stats = solved.stats._replace(steps=solved.stats.steps + 1)
    return SolutionWithAux(z, stats, f(z, *args)[1])


def solve(
    f: Callable,
    z0: PyTree,
    *args: PyTree,
    solver: Solver = Anderson(),  # noqa: B008
    batch_ndim: int = 0,
    memory: Any = None,
    fold: Fold | None = None,
) -> Solved:
    """The forward half of `fixed_point`, with all that the solver leaves: no gradient flows through it.

    Args:
      f, z0, *args, solver, batch_ndim: as for `fixed_point`.
      memory: that of an earlier solve with the same solver and the same shapes of z0. Where f has changed little,
        a quasi-Newton method need not learn its Jacobian again.
      fold: accumulates over the evaluations inside the loop: `ResidualTrace`, `Snapshots`, or an object of your
        own with `init(z0, batch_ndim)` and `update(folded, seen)`, see `Seen`.

    Returns:
      Solved(value, stats, memory, folded). Give the value a derivative with `attach`.

    Raises:
      TypeError, ValueError: as `fixed_point`.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, x: jnp.tanh(2 * z[::-1] + x)
    >>> first = deq.solve(cell, jnp.zeros(2), jnp.array([0.1, 0.2]), solver=deq.Broyden())
    >>> again = deq.solve(cell, first.value, jnp.array([0.1, 0.21]), solver=deq.Broyden(), memory=first.memory)
    >>> bool(again.stats.steps < first.stats.steps), bool(again.stats.converged)
    (True, True)
    """
    z0 = jax.lax.stop_gradient(check_arguments(f, z0, args, solver, Implicit(), batch_ndim, None))
    check_start(z0)
    if getattr(fold, "sees_all", False):
        check_sees_all(solver, f"fold={fold!r}")
    cell, z0, inputs, other = hoist_cell(f, z0, args)
    if memory is not None:
        check_memory(memory, solver, flat_type(z0, batch_ndim))
    if flag("jax_disable_jit"):
        solved = _solve(lambda z: f(z, *args), z0, solver, batch_ndim, memory=memory, fold=fold)
        return jax.lax.stop_gradient(solved)
    hoisted, fold_reads = hoist_fold(fold, z0, batch_ndim)
    reads = jax.lax.stop_gradient((inputs, other, fold_reads))
    return run_compiled(_solve_frozen, (cell, batch_ndim, *hoisted), z0, reads, solver, memory)


def _solve_frozen(cell, batch_ndim, fold_init, fold_update, z0, reads, solver, memory):
    inputs, other, fold_reads = reads
    fold = None if fold_init is None else HoistedFold(fold_init, fold_update, fold_reads)
    solved = _solve(Bound(cell, inputs, other), z0, solver, batch_ndim, memory=memory, fold=fold)
    return jax.lax.stop_gradient(solved)


def attach(
    f: Callable,
    z: PyTree,
    *args: PyTree,
    adjoint: Adjoint = Implicit(),  # noqa: B008
    solver: Solver = Anderson(),  # noqa: B008
    batch_ndim: int = 0,
    found: Solved | None = None,
    probe: Probe | None = None,
) -> PyTree:
    """z, however it was found, with the derivative that a fixed point of f has in args and in what f captures.

    The value is z itself, and no gradient flows to z: that of `adjoint` is taken as if f(z, *args) = z. This is
    how a solver of your own, a cached equilibrium, or a state on the way to one becomes differentiable.

    Args:
      f, *args, batch_ndim, probe: as for `fixed_point`.
      adjoint: one that is taken at the equilibrium: `Implicit`, `ImplicitJVP`, `Phantom`, `Neumann`, `JFB`, or
        `Shine` with `found`.
      solver: what the adjoint derives its own backward solver from, where it was given none.
      found: the result of `solve` that z comes from, for `Shine` and for `Implicit(on_failure=...)`.

    Raises:
      TypeError, ValueError: as `fixed_point`; for an adjoint that goes through the iterations.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def square_root(a):  # by bisection, say; here by numpy
    ...     z = jnp.sqrt(jax.lax.stop_gradient(a))
    ...     return deq.attach(lambda z: 0.5 * (z + a / z), z)
    >>> bool(abs(jax.grad(square_root)(4.0) - 0.25) < 1e-6)
    True
    """
    z = jax.lax.stop_gradient(check_arguments(f, z, args, solver, adjoint, batch_ndim, probe))
    if not hasattr(adjoint, "at"):
        raise TypeError(
            f"{type(adjoint).__name__} differentiates the iterations of a solve, and z comes without them; "
            "use Implicit, ImplicitJVP, Phantom, Neumann or JFB"
        )
    cell, z, inputs, other = hoist_cell(f, z, args)
    probe = Probe.like(z, batch_ndim) if probe is None else probe
    if found is not None:
        check_found(found, z, batch_ndim)
        if getattr(adjoint, "reads_memory", False) and isinstance(solver, Broyden) and found.memory is not None:
            check_memory(found.memory, solver, flat_type(z, batch_ndim), "found.memory")
    stats, memory = (None, None) if found is None else (found.stats, found.memory)
    if not getattr(adjoint, "reads_memory", False):
        memory = None  # it would be kept until the backward pass
    return run_compiled(_attach, (cell, batch_ndim), z, stats, memory, inputs, other, solver, adjoint, probe)


def _attach(cell, batch_ndim, z, stats, memory, inputs, other, solver, adjoint, probe):
    return adjoint.at(cell, Found(z, stats, memory), inputs, other, solver, batch_ndim, probe)


# ---- what f and a fold read ----------------------------------------------------------------------------------


def hoist_cell(f: Callable, z0: PyTree, args: tuple, has_aux: bool = False) -> tuple[Traced, PyTree, list, list]:
    """(cell, z0, inputs, other) with f(z, *args) = cell(z, inputs, other), and z0 in the type that cell returns."""

    def settled(z, *args):
        out = checked(f(z, *args))
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with has_aux=True, f must return a pair (z, aux), got {_describe(out)}")
        value = out[0] if has_aux else out
        if jax.tree.structure(value) == jax.tree.structure(z):
            value = jax.tree.map(_settle, value, z)
        return (value, out[1]) if has_aux else value

    cell, inputs, other = hoist(settled, z0, args=args)
    out = cell.out[0] if has_aux else cell.out
    _check_output(out, z0)
    typed = jax.tree.map(_typed_like, z0, out)
    if any(jax.typeof(a) != jax.typeof(b) for a, b in zip(jax.tree.leaves(typed), jax.tree.leaves(z0), strict=True)):
        cell, inputs, other = hoist(settled, typed, args=args)
    return cell, typed, inputs, other


def _settle(leaf: Any, like: jax.Array) -> jax.Array:
    """A number in the dtype of z0; an array as it is."""
    array = jnp.asarray(leaf)
    loses_imaginary_part = jnp.iscomplexobj(array) and not jnp.iscomplexobj(like)
    return array.astype(like.dtype) if jax.typeof(array).weak_type and not loses_imaginary_part else array


def _typed_like(z: jax.Array, out: Any) -> jax.Array:
    """z with the explicit sharding of f(z), and varying over the axes of `shard_map` that f(z) varies over."""
    sharding = getattr(out, "sharding", None)
    if sharding is not None and sharding != jax.typeof(z).sharding:
        z = jax.sharding.reshard(z, sharding)  # jnp.zeros_like drops it on jax 0.12
    missing = varying_axes(out) - varying_axes(jax.typeof(z))
    return vary(z, tuple(missing)) if missing else z


class HoistedFold(NamedTuple):
    """A fold whose methods were traced: a fold too."""

    traced_init: Traced
    traced_update: Traced
    reads: tuple

    def init(self, z0: PyTree, batch_ndim: int) -> Any:
        return self.traced_init(z0, *self.reads[0])

    def update(self, folded: Any, seen: Seen) -> Any:
        return self.traced_update(folded, seen, *self.reads[1])


def hoist_fold(fold: Fold | None, z0: PyTree, batch_ndim: int) -> tuple[tuple, tuple]:
    """((init, update), reads) of a fold, both traced, so that what they read cannot go stale."""
    if fold is None:
        return (None, None), ()
    init, *init_reads = hoist(lambda z0: fold.init(z0, batch_ndim), z0)
    step = jnp.zeros((), jnp.int32)
    norm = jax.tree.leaves(Probe.like(z0, batch_ndim))[0].astype(wide_dtype(z0))
    seen = Seen(step, z0, z0, norm, norm, norm == 0)
    update, *update_reads = hoist(fold.update, init(z0, *init_reads), seen)
    return (init, update), (init_reads, update_reads)


# ---- checks ------------------------------------------------------------------------------------------------


def check_arguments(f, z0, args, solver, adjoint, batch_ndim, probe) -> PyTree:
    """z0 as arrays, or TypeError/ValueError."""
    if not callable(f):
        raise TypeError(f"f must be callable as f(z, *args), got {type(f).__name__}")
    check_solver(solver, "solver")
    if isinstance(adjoint, type) or not hasattr(adjoint, "run"):
        raise TypeError(f"adjoint must be an adjoint such as Implicit(), got {adjoint!r}")
    if isinstance(batch_ndim, bool) or not isinstance(batch_ndim, int) or batch_ndim < 0:
        raise ValueError(f"batch_ndim must be an int >= 0, got {batch_ndim!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"args{jax.tree_util.keystr(path)} must be an array, got {leaf!r}")

    leaves = jax.tree_util.tree_leaves_with_path(z0)
    if not leaves:
        raise ValueError(f"z0 has no arrays: expected a pytree with at least one, got {z0!r}")
    batch_shape: Any = None
    for path, leaf in leaves:
        where = "z0" + jax.tree_util.keystr(path)
        if not is_array_like(leaf):
            raise TypeError(f"{where} must be an array of floats, got {leaf!r}")
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 16:
            raise TypeError(f"{where} must be an array of floats of 16 bits or more, got dtype {dtype}")
        if 0 in shape:
            raise ValueError(f"{where} is empty: got shape {shape}")
        if len(shape) < batch_ndim:
            raise ValueError(f"batch_ndim={batch_ndim} is beyond the rank of {where}, of shape {shape}")
        batch_shape = shape[:batch_ndim] if batch_shape is None else batch_shape
        if shape[:batch_ndim] != batch_shape:
            raise ValueError(
                f"all leaves of z0 must agree in their {batch_ndim} batch axes: {where} has shape {shape}, "
                f"expected it to begin with {batch_shape}"
            )
    check_options(solver, batch_shape, "solver")
    check_options(adjoint, batch_shape, "adjoint")
    if probe is not None and {jnp.shape(p) for p in jax.tree.leaves(probe)} != {batch_shape}:
        raise ValueError(
            f"probe must be Probe.zeros({batch_shape}), the batch shape of z0; got shapes "
            f"{[jnp.shape(p) for p in jax.tree.leaves(probe)]}"
        )
    return jax.tree.map(jnp.asarray, z0)


def check_start(z0: PyTree) -> None:
    """ValueError if z0, where its value is known, has infinite entries. (A traced Inf ends as NONFINITE, like NaN.)

    So an eager call waits for z0. A loop that must not wait belongs under `jax.jit`.
    """
    known = lambda leaf: not isinstance(leaf, Tracer) and leaf.is_fully_addressable
    found = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(z0) if known(leaf)}
    if not found:
        return
    with jax.ensure_compile_time_eval():
        infinite = np.asarray(_infinite(list(found.values())))  # all leaves in one program and one transfer
    for path, is_infinite in zip(found, infinite, strict=True):
        if is_infinite:
            where = "z0" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where} has infinite entries; a solve begins at finite ones: take f(z0), or replace them"
            )


_infinite = jax.jit(lambda leaves: jnp.stack([jnp.any(jnp.isinf(leaf)) for leaf in leaves]))


def _check_output(out: PyTree, z0: PyTree) -> None:
    if jax.tree.structure(out) != jax.tree.structure(z0):
        raise TypeError(f"f must return the structure of z0, {jax.tree.structure(z0)}; got {jax.tree.structure(out)}")
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(z0), strict=True):
        where = "f(z)" + jax.tree_util.keystr(path)
        if got.shape != want.shape:
            raise ValueError(f"{where} must have the shape of z0, {want.shape}; got {got.shape}")
        if got.dtype != want.dtype:
            raise TypeError(
                f"{where} must have the dtype of z0, {want.dtype}; got {got.dtype}. Cast z0, or what f returns"
            )


def flat_type(z: PyTree, batch_ndim: int) -> jax.ShapeDtypeStruct:
    """The type of z as a solver sees it."""
    return jax.eval_shape(lambda z: raveler(z, batch_ndim)[0](z), z)


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))
