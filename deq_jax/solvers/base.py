"""One loop for every solver: it calls f, tests convergence, counts, freezes and keeps the best iterate."""

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

RUNNING = -1
STALE_EVALUATIONS = 10  # this many without a better residual, at the dtype's floor, end a solve as STALLED
DIVERGED_GROWTH = 1e6  # a residual this many times the scale at the start ends it as DIVERGED


class Status(enum.IntEnum):
    """Why a solve of one problem ended."""

    CONVERGED = 0  # ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖, all of it finite
    MAX_STEPS = 1  # the budget of evaluations is spent
    STALLED = 2  # the floor of the dtype is reached: more evaluations find nothing better
    DIVERGED = 3  # the residual or the iterate left the scale of the problem
    NONFINITE = 4  # f returned NaN or Inf, or a norm overflowed


class Stats(NamedTuple):
    """What a solve reports, an entry per problem. No gradient flows through it."""

    steps: Int[Array, "*batch"]  # evaluations of f
    residual: Float[Array, "*batch"]  # ‖f(z) − z‖₂ at the z that is returned; inf if f was never finite there
    relative_residual: Float[Array, "*batch"]  # the same over ‖f(z)‖₂
    status: Int[Array, "*batch"]  # a Status

    @property
    def converged(self) -> Bool[Array, "*batch"]:
        return self.status == Status.CONVERGED


class Solver(Protocol):
    """Frozen numbers and two pure functions, with optax's signature. A solver never calls f.

    A problem that has stopped is evaluated at its best z again while others run: where z did not move, `update`
    keeps what the state remembers. Optional are
    - `resume(state) -> state`: prepares the memory of an earlier solve for this one;
    - `can_backtrack(state) -> Bool[*batch]`: whether an evaluation that is not finite, of the point which the state has
      asked for, is not the end, since `update` answers it with another point;
    - `recovers = True`: nor is one that is huge, and only the best iterate is worth returning (`Unroll`);
    - `next_point(state, z) -> z`: the next point itself, which z + step, given as `z`, would round;
    - `patience`: evaluations that may pass without a better residual before a solve counts as stalled;
    - `test_every`: evaluations for one that is tested and shown to `update`; those before it are steps of
      `damping`·(f(z) − z).
    """

    @property
    def rtol(self) -> Any: ...
    @property
    def atol(self) -> Any: ...
    @property
    def max_steps(self) -> Any: ...

    def init(self, z: Float[Array, "*batch dim"]) -> Any: ...

    def update(
        self, residual: Float[Array, "*batch dim"], state: Any, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], Any]: ...


class Seen(NamedTuple):
    """One evaluation of f, as a `Fold` sees it, of those that are tested (see `Picard`).

    A problem that has stopped shows its best iterate again.
    """

    step: Int[Array, ""]  # 0 at z0, and one more at each evaluation
    z: PyTree
    fz: PyTree
    residual: Float[Array, "*batch"]
    relative_residual: Float[Array, "*batch"]
    running: Bool[Array, "*batch"]  # problems that had not stopped before this evaluation


class Fold(Protocol):
    """Accumulates over the evaluations of a solve inside its loop: no callback, no change to the solve."""

    def init(self, z0: PyTree, batch_ndim: int) -> Any: ...

    def update(self, folded: Any, seen: Seen) -> Any: ...


class Solved(NamedTuple):
    """What `solve` returns; not differentiable."""

    value: PyTree
    stats: Stats
    memory: Any  # the solver's state after its last update: a start for a solve of a similar problem
    folded: Any  # the fold's result, or None


class Loop(NamedTuple):
    z: Float[Array, "*batch dim"]
    best: Float[Array, "*batch dim"]
    best_residual: Float[Array, "*batch"]
    best_norm: Float[Array, "*batch"]  # ‖f(z)‖ at the best z
    first_residual: Float[Array, "*batch"]
    first_scale: Float[Array, "*batch"]  # max(‖f(z0)‖, ‖f(z0) − z0‖)
    stale: Int[Array, "*batch"]  # evaluations since the best residual last fell
    steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    solver: Any
    folded: Any
    evaluation: Int[Array, ""]


def solve(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int = 0, *, memory: Any = None, fold: Fold | None = None
) -> Solved:
    """Iterate `solver` on f(z) = z from z0 until each problem has stopped.

    The state is handled as one vector a problem, float32 or wider, so that inner products run over the whole
    of it; f sees it in its own structure and dtypes. The loop is native to the batch: a problem that stopped
    is frozen at its best iterate, and the loop ends with the last one. `memory` is that of an earlier solve,
    with the same solver and shapes.
    """
    body = round_of_evaluations(f, z0, solver, batch_ndim, fold)
    start = beginning(z0, solver, batch_ndim, memory, fold)
    end = jax.lax.while_loop(lambda loop: jnp.any(loop.status == RUNNING), body, start)
    return ending(end, z0, batch_ndim)


def beginning(z0: PyTree, solver: Solver, batch_ndim: int, memory: Any = None, fold: Fold | None = None) -> Loop:
    """What the loop carries before the first evaluation."""
    z = raveler(z0, batch_ndim)[0](z0)
    # Carries are made from the data, never from a bare constant: under sharding they inherit its type.
    zero = zeros_from(z[..., 0])
    count = zero.astype(jnp.int32)
    status = jnp.where(jnp.asarray(solver.max_steps) > 0, RUNNING, Status.MAX_STEPS).astype(jnp.int32) + count
    # The previous z and residual of another problem's memory must not be paired with this f: see `Solver`.
    resume = getattr(solver, "resume", lambda memory: memory)
    memory = solver.init(z) if memory is None else resume(memory)
    folded = None if fold is None else fold.init(z0, batch_ndim)
    return Loop(z, z, zero + jnp.inf, zero, zero, zero, count, count, status, memory, folded, jnp.zeros((), jnp.int32))


def ending(end: Loop, z0: PyTree, batch_ndim: int) -> Solved:
    """What came of a loop, with values in the structure of z0."""
    stats = Stats(end.steps, end.best_residual, ratio(end.best_residual, end.best_norm), end.status)
    return Solved(raveler(z0, batch_ndim)[1](end.best), stats, end.solver, end.folded)


def evaluation(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int, fold: Fold | None = None
) -> Callable[[Loop], Loop]:
    """The body of the loop: one evaluation of f, what it says of each problem, and the next iterate."""
    ravel, unravel = raveler(z0, batch_ndim)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z0))
    floor = min(64 * eps, 0.05)  # relative residual at which rounding in f may hide all progress
    recovers, next_point = getattr(solver, "recovers", False), getattr(solver, "next_point", lambda state, z: z)
    patience = max(STALE_EVALUATIONS, getattr(solver, "patience", 0))

    def body(loop: Loop) -> Loop:
        running = loop.status == RUNNING
        z_tree = unravel(loop.z)
        fz_tree = f(z_tree)
        fz = ravel(fz_tree)
        g = fz - loop.z
        residual, scale = norm(g), norm(fz)

        first = loop.steps == 0
        first_residual = jnp.where(first, residual, loop.first_residual)
        first_scale = jnp.where(first, jnp.maximum(residual, scale), loop.first_scale)
        steps = loop.steps + running

        finite = jnp.isfinite(residual) & jnp.isfinite(scale)
        # z ↦ z + 1 has no fixed point, and yet its relative residual 1/‖z‖ falls below any rtol as z runs away.
        # Where the iterate has outgrown its start, the residual itself must have fallen as well; and once the
        # residual at the start is less than a unit in the last place of z, all residuals are rounding.
        outgrown = scale > 10 * first_scale
        lost = outgrown & (eps * scale > first_residual)
        escaped = lost | (residual > DIVERGED_GROWTH * first_scale)
        converged = within(residual, scale, solver) & ~lost & (~outgrown | (residual <= 0.1 * first_residual))
        stale = jnp.where(finite & (residual < 0.99 * loop.best_residual), 0, loop.stale + 1)
        stalled = (stale >= patience) & (loop.best_residual <= floor * loop.best_norm)

        status = jnp.where(steps >= solver.max_steps, Status.MAX_STEPS, RUNNING)
        status = jnp.where(stalled, Status.STALLED, status)
        status = jnp.where(escaped & (not recovers), Status.DIVERGED, status)
        status = jnp.where(finite | (can_backtrack(solver, loop.solver, first) & ~first), status, Status.NONFINITE)
        status = jnp.where(converged, Status.CONVERGED, status)
        status = jnp.where(running, status, loop.status)

        # An iterate so far out that its residual is all rounding is not a better one.
        better = running & finite & ~lost & (converged | (residual < loop.best_residual))
        best = jnp.where(better[..., None], loop.z, loop.best)
        step, state = solver.update(g, loop.solver, loop.z)
        z = next_point(state, loop.z + step)
        z = jnp.where((status == RUNNING)[..., None], ravel(unravel(z)), best)
        seen = Seen(loop.evaluation, z_tree, fz_tree, residual, ratio(residual, scale), running)
        return Loop(
            z=z,
            best=best,
            best_residual=jnp.where(better, residual, loop.best_residual),
            best_norm=jnp.where(better, scale, loop.best_norm),
            first_residual=first_residual,
            first_scale=first_scale,
            stale=stale,
            steps=steps,
            status=status,
            solver=state,
            folded=None if fold is None else fold.update(loop.folded, seen),
            evaluation=loop.evaluation + 1,
        )

    return body


def round_of_evaluations(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int, fold: Fold | None = None
) -> Callable[[Loop], Loop]:
    """The body of the loop of a solver that tests one evaluation in `test_every`: those before it only move z."""
    body, every = evaluation(f, z0, solver, batch_ndim, fold), getattr(solver, "test_every", 1)
    if every == 1:
        return body
    ravel, unravel = raveler(z0, batch_ndim)

    def untested(loop: Loop) -> Loop:
        running = loop.status == RUNNING
        # z0 is tested, for its residual sets the scale, and so is the last evaluation of the budget.
        left = jnp.min(jnp.asarray(solver.max_steps, jnp.int32)) - loop.evaluation
        count = jnp.where(loop.evaluation == 0, 0, jnp.clip(left, 1, every) - 1)

        def move(_, z):
            step: Any = getattr(solver, "damping", 1.0) * (ravel(f(unravel(z))) - z)
            return jnp.where(running[..., None], ravel(unravel(z + step)), z)

        z = jax.lax.fori_loop(0, count, move, loop.z)
        return loop._replace(z=z, steps=loop.steps + count * running, evaluation=loop.evaluation + count)

    return lambda loop: body(untested(loop))


def measure(f: Callable, z: PyTree, solver: Solver, steps: Any, batch_ndim: int) -> Stats:
    """Stats of a z that is returned as it is, after `steps` evaluations and the one made here."""
    ravel, _ = raveler(z, batch_ndim)
    fz = ravel(f(z))
    return judge(norm(fz - ravel(z)), norm(fz), solver, steps + 1)


def judge(residual: Float[Array, "*batch"], scale: Float[Array, "*batch"], solver: Solver, steps: Any) -> Stats:
    """Stats of a z with ‖f(z) − z‖ = residual and ‖f(z)‖ = scale, known after `steps` evaluations."""
    finite = jnp.isfinite(residual) & jnp.isfinite(scale)
    status = jnp.where(within(residual, scale, solver), Status.CONVERGED, Status.MAX_STEPS)
    status = jnp.where(finite, status, Status.NONFINITE)
    residual = jnp.where(finite, residual, jnp.inf)
    count = zeros_from(residual).astype(jnp.int32)
    return Stats(count + steps, residual, ratio(residual, scale), status + count)


def within(residual: Float[Array, "*batch"], scale: Float[Array, "*batch"], solver: Solver) -> Bool[Array, "*batch"]:
    """The stopping test. Finite, for inf ≤ rtol · inf is true, and so is NaN's `not (residual > tolerance)`."""
    finite = jnp.isfinite(residual) & jnp.isfinite(scale)
    return finite & (residual <= solver.atol + solver.rtol * scale)


def raveler(example: PyTree, batch_ndim: int) -> tuple[Callable, Callable]:
    """The two maps between a pytree and `[*batch, dim]` in float32 or wider; complex leaves as two reals."""
    leaves, treedef = jax.tree.flatten(example)
    wide = jnp.result_type(jnp.float32, *(jnp.finfo(leaf.dtype).dtype for leaf in leaves))
    # A complex number is two reals, so that norms and inner products are real.
    sizes = [math.prod(leaf.shape[batch_ndim:]) * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def ravel_leaf(leaf):
        flat = leaf.reshape(*leaf.shape[:batch_ndim], -1)
        if jnp.iscomplexobj(flat):
            flat = jnp.concatenate([flat.real, flat.imag], axis=-1)
        return flat.astype(wide)

    def ravel(tree: PyTree) -> Float[Array, "*batch dim"]:
        flat = [ravel_leaf(leaf) for leaf in jax.tree.leaves(tree)]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)

    def unravel_leaf(flat, like):
        if jnp.iscomplexobj(like):
            flat = jax.lax.complex(*jnp.split(flat, 2, axis=-1))
        return flat.reshape(*flat.shape[:-1], *like.shape[batch_ndim:]).astype(like.dtype)

    def unravel(flat: Float[Array, "*batch dim"]) -> PyTree:
        parts = [flat] if len(leaves) == 1 else jnp.split(flat, ends[:-1], axis=-1)
        return jax.tree.unflatten(treedef, [unravel_leaf(p, leaf) for p, leaf in zip(parts, leaves, strict=True)])

    return ravel, unravel


def zeros_from(x: Array) -> Array:
    """Zeros with the shape, dtype and sharding of x: jax 0.12's zeros_like drops an explicit sharding."""
    return jnp.where(False, x, jnp.zeros((), x.dtype))


def choose(where: Bool[Array, "*batch"], a: PyTree, b: PyTree) -> PyTree:
    """a in the problems named by `where`, b in the others; of a leaf that all problems share, b's."""

    def pick(a, b):
        if b.ndim < where.ndim:
            return b
        return jnp.where(where.reshape(where.shape + (1,) * (b.ndim - where.ndim)), a, b)

    return jax.tree.map(pick, a, b)


def write_slot(
    slots: Float[Array, "*batch slots dim"],
    new: Float[Array, "*batch dim"],
    slot: Int[Array, ""],
    where: Bool[Array, "*batch"],
) -> Float[Array, "*batch slots dim"]:
    """slots with `new` at one index, in the problems named by `where`; XLA writes it in place in a loop."""
    old = jax.lax.dynamic_index_in_dim(slots, slot, axis=-2, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(slots, jnp.where(where[..., None], new, old), slot, axis=-2)


def norm(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """‖x‖₂ over the last axis, right also where the squares leave the range of the dtype.

    Scaled by a power of two, which changes no bit where it was not needed. Always: a branch on "is it needed"
    would be one more collective in each step of a sharded solve.
    """
    scale = leading_power(jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1))  # no part in the derivative
    unit = x * (1 / scale)[..., None]
    square = jnp.einsum("...d,...d->...", unit, unit)
    return scale * root(square)


def root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """√x; 0, with a derivative of 0 for `Unroll`, where x is zero or rounded to less; NaN of NaN."""
    none = x <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, x)))


def leading_power(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """2^⌊log₂ x⌋ of x ≥ 0: the bits of the exponent alone (frexp and ldexp take thirty operations for it).

    Held away from both ends of the range, so that it and its reciprocal are normal numbers (XLA flushes the others
    to zero): the least one for x = 0, the greatest for Inf and NaN.
    """
    info, bits = jnp.finfo(x.dtype), jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    mask = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), bits)
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) & mask, x.dtype)
    return jnp.clip(power, 2.0 ** (info.minexp + 2), 2.0 ** (info.maxexp - 3))


def can_backtrack(solver: Solver, state: Any, like: Bool[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Where the point that the state asks for may turn out not finite: nowhere, for a solver that does not say."""
    return solver.can_backtrack(state) if hasattr(solver, "can_backtrack") else like & False


def ratio(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """a / b, with 0 / 0 = 0."""
    return jnp.where(a == 0, 0, a / jnp.where(b == 0, 1, b) + jnp.where((b == 0) & (a != 0), jnp.inf, 0))
