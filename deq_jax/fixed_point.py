"""`fixed_point`: find z with f(z, *args) = z, and differentiate it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._cache import reads as what_it_reads
from deq_jax._checks import check_fold, check_found, check_memory
from deq_jax._config import check_solver
from deq_jax.adjoints import Adjoint, Found, Implicit, Probe, hoist
from deq_jax.solvers import Anderson, Broyden, Fold, Solved, Solver, Stats
from deq_jax.solvers import solve as _solve
from deq_jax.solvers.base import raveler


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
        trace, so it must be pure. A function without captured arrays is compiled once; a closure each time
        it is called eagerly, so wrap the caller in `jax.jit`.
      z0: where to start, a pytree of float or complex arrays. Its cotangent is zero (but see `Unroll`).
      *args: pytrees of arrays, of any dtype.
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
    warn = getattr(adjoint, "warn", None)
    if warn is not None:  # here, outside the jit below, its numbers are still numbers
        warn(z0, solver)
    reads = what_it_reads(f)
    run = _fixed_point if reads is None else _compiled
    return run(f, reads, batch_ndim, has_aux, z0, args, solver, adjoint, probe)


def _fixed_point(f, reads, batch_ndim, has_aux, z0, args, solver, adjoint, probe):
    del reads
    # Arguments are captured too: what f reads is one list, sorted by whether it has a derivative.
    fun, inputs, other = hoist(lambda z: f(z, *args), z0)
    out = jax.eval_shape(fun, z0, inputs, other)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"with has_aux=True, f must return a pair (z, aux), got {_describe(out)}")
    out = out[0] if has_aux else out
    _check_output(out, z0)
    z0 = jax.tree.map(_shard_like, z0, out)

    cell = (lambda z, inputs, other: fun(z, inputs, other)[0]) if has_aux else fun
    probe = Probe.like(z0, batch_ndim) if probe is None else probe
    z, stats = adjoint.run(cell, z0, inputs, other, solver, batch_ndim, probe)
    stats = jax.lax.stop_gradient(stats)
    if not has_aux:
        return Solution(z, stats)
    _, aux = fun(z, inputs, other)
    return SolutionWithAux(z, stats._replace(steps=stats.steps + 1), aux)


# An eager call would trace its loop anew each time (70 to 700 ms); this one is traced once for each f.
_compiled = jax.jit(_fixed_point, static_argnums=(0, 1, 2, 3))


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
    z0 = check_arguments(f, z0, args, solver, Implicit(), batch_ndim, None)
    check_fold(fold, solver)
    frozen = jax.lax.stop_gradient(args)
    z0 = jax.lax.stop_gradient(z0)
    out = jax.eval_shape(f, z0, *frozen)
    _check_output(out, z0)
    z0 = jax.tree.map(_shard_like, z0, out)
    if memory is not None:
        check_memory(memory, solver, raveler(z0, batch_ndim)[0](z0))
    return jax.lax.stop_gradient(_solve(lambda z: f(z, *frozen), z0, solver, batch_ndim, memory=memory, fold=fold))


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
    at = getattr(adjoint, "at", None)
    if at is None:
        raise TypeError(
            f"{type(adjoint).__name__} differentiates the iterations of a solve, and z comes without them; "
            "use Implicit, ImplicitJVP, Phantom, Neumann or JFB"
        )
    fun, inputs, other = hoist(lambda z: f(z, *args), z)
    _check_output(jax.eval_shape(fun, z, inputs, other), z)
    probe = Probe.like(z, batch_ndim) if probe is None else probe
    if found is not None:
        check_found(found, z, batch_ndim)
        if getattr(adjoint, "reads_memory", False) and isinstance(solver, Broyden) and found.memory is not None:
            check_memory(found.memory, solver, raveler(z, batch_ndim)[0](z), "found.memory")
    stats, memory = (None, None) if found is None else (found.stats, found.memory)
    return at(fun, Found(z, stats, memory), inputs, other, solver, batch_ndim, probe)


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
        if not _is_array_like(leaf):
            where = "args" + jax.tree_util.keystr(path)
            raise TypeError(f"{where} must be an array, got {leaf!r}; let f capture what is not an array")

    leaves = jax.tree_util.tree_leaves_with_path(z0)
    if not leaves:
        raise ValueError(f"z0 has no arrays: expected a pytree with at least one, got {z0!r}")
    batch_shape = None
    for path, leaf in leaves:
        where = "z0" + jax.tree_util.keystr(path)
        if not _is_array_like(leaf):
            raise TypeError(f"{where} must be an array of floats, got {leaf!r}")
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"{where} must be an array of floats, got dtype {dtype}")
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
    if probe is not None and {jnp.shape(p) for p in jax.tree.leaves(probe)} != {batch_shape}:
        raise ValueError(
            f"probe must be Probe.zeros({batch_shape}), the batch shape of z0; got shapes "
            f"{[jnp.shape(p) for p in jax.tree.leaves(probe)]}"
        )
    return jax.tree.map(jnp.asarray, z0)


def _is_array_like(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)


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


def _shard_like(z: jax.Array, out: jax.ShapeDtypeStruct) -> jax.Array:
    """z with the explicit sharding of f(z), if there is one: jnp.zeros_like drops it on jax 0.12."""
    if out.sharding is None or out.sharding == jax.typeof(z).sharding:
        return z
    return jax.sharding.reshard(z, out.sharding)


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))
