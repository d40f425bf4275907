"""One loop for every solver: it calls f, tests convergence, counts, freezes and keeps the best iterate."""

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._config import cast_options

RUNNING = -1
STALE_EVALUATIONS = 10  # this many without a better residual, at the dtype's floor, end a solve as STALLED
DIVERGED_GROWTH = 1e6  # a residual this many times the scale at the start, when the budget is spent, ends as DIVERGED
HOPELESS_GROWTH = 1e15  # the same at once, unless all is still small: tanh(3 z + h) grows from any small h to 1
OUTGROWN = 10  # an iterate that has grown by this factor must also have reduced its residual, by the same factor
FEW_LEAVES = 16  # from here on, leaves of one size are measured together


class Status(enum.IntEnum):
    """Why a solve of one problem ended."""

    CONVERGED = 0  # ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ in each leaf of z, all of it finite
    MAX_STEPS = 1  # the budget of evaluations is spent
    STALLED = 2  # the floor of the dtype is reached: more evaluations find nothing better
    DIVERGED = 3  # the residual grew without bound, or rounding in z is more than all residuals
    NONFINITE = 4  # f returned NaN or Inf, or a norm overflowed


class Stats(NamedTuple):
    """What a solve reports, an entry per problem. No gradient flows through it."""

    steps: Int[Array, "*batch"]  # evaluations of f
    residual: Float[Array, "*batch"]  # ‖f(z) − z‖₂ at the z that is returned; inf if f was never finite there
    relative_residual: Float[Array, "*batch"]  # the largest of the leaves' ‖f(z) − z‖₂ over ‖f(z)‖₂
    status: Int[Array, "*batch"]  # a Status

    @property
    def converged(self) -> Bool[Array, "*batch"]:
        return self.status == Status.CONVERGED

    @property
    def sound(self) -> Bool[Array, "*batch"]:
        """Converged, or stopped where rounding hides all progress."""
        return (self.status == Status.CONVERGED) | (self.status == Status.STALLED)


@runtime_checkable
class Solver(Protocol):
    """Frozen numbers and two pure functions, with optax's signature. A solver never calls f.

    A problem that has stopped is evaluated at its best z again while others run: where z did not move, `update`
    keeps what the state remembers. Optional are
    - `resume(state) -> state`: prepares the memory of an earlier solve for this one;
    - `can_backtrack(state) -> Bool[*batch]`: whether an evaluation that is not finite, of the point that the state has
      asked for, is not the end, because `update` will go back to an earlier iterate;
    - `recovers = True`: nor is one that is huge, and only the best iterate is worth returning (`Unroll`);
    - `scale_free = True`: `update` sees residual and z divided by a power of two, one for each problem, that keeps
      products of two of them within the range of the dtype (and `atol` divided by the same);
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


@runtime_checkable
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


class Leaves(NamedTuple):
    """How to read the norms of a state's leaves, of shape `*norms`: `*batch leaves`, or `*batch` if there is one leaf.

    An axis of one entry would keep the compiler from vectorizing over problems.
    """

    several: bool
    eps: float  # the machine epsilon of the coarsest leaf

    def over(self, reduce: Callable, norms: Array) -> Array:
        return reduce(norms, axis=-1) if self.several else norms

    def each(self, x: Any) -> Any:
        """What is given for each problem, beside norms."""
        return per_problem(x) if self.several else x


class Growth(NamedTuple):
    """How far the iterates have come, leaf by leaf; a new stretch begins where ‖f(z)‖ is 10 times what it was."""

    scale: Float[Array, "*norms"]  # ‖f(z)‖ where the present stretch began
    worst: Float[Array, "*norms"]  # the largest residual of the present stretch
    before: Float[Array, "*norms"]  # that of the stretch before; inf in the first one
    largest: Float[Array, "*norms"]  # the largest ‖f(z)‖ of all


class Loop(NamedTuple):
    z: Float[Array, "*batch dim"]
    best: Float[Array, "*batch dim"]
    best_residuals: Float[Array, "*norms"]
    best_scales: Float[Array, "*norms"]  # ‖f(z)‖ at the best z
    first_scale: Float[Array, "*batch"]  # max(‖f(z0)‖, ‖f(z0) − z0‖)
    growth: Growth
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
    with the same solver and shapes. Where f communicates along named axes (`f.axes`, see `_trace.Bound`), the problems
    along those are one coupled problem: they stop together.
    """
    solver = cast_options(solver, wide_dtype(z0))
    body = round_of_evaluations(f, z0, solver, batch_ndim, fold)
    start = beginning(z0, solver, batch_ndim, memory, fold)
    end = jax.lax.while_loop(lambda loop: jnp.any(loop.status == RUNNING), body, start)
    return ending(end, z0, batch_ndim)


def beginning(z0: PyTree, solver: Solver, batch_ndim: int, memory: Any = None, fold: Fold | None = None) -> Loop:
    """What the loop carries before the first evaluation."""
    z = raveler(z0, batch_ndim)[0](z0)
    # Carries are made from the data, never from a bare constant: under sharding they inherit its type.
    zero = zeros_from(z[..., 0])
    leaves = jnp.stack([zero] * len(jax.tree.leaves(z0)), axis=-1) if leaves_of(z0).several else zero
    count = zero.astype(jnp.int32)
    status = jnp.where(jnp.asarray(solver.max_steps) > 0, RUNNING, Status.MAX_STEPS).astype(jnp.int32) + count
    # The previous z and residual of another problem's memory must not be paired with this f: see `Solver`.
    resume = getattr(solver, "resume", lambda memory: memory)
    memory = solver.init(z) if memory is None else resume(memory)
    return Loop(
        z=z,
        best=z,
        best_residuals=leaves + jnp.inf,
        best_scales=leaves,
        first_scale=zero,
        growth=Growth(leaves, leaves, leaves + jnp.inf, leaves),
        stale=count,
        steps=count,
        status=status,
        solver=memory,
        folded=None if fold is None else fold.init(z0, batch_ndim),
        evaluation=jnp.zeros((), jnp.int32),
    )


def ending(end: Loop, z0: PyTree, batch_ndim: int) -> Solved:
    """What came of a loop, with values in the structure of z0."""
    leaves = leaves_of(z0)
    relative = largest_ratio(end.best_residuals, end.best_scales, leaves)
    stats = Stats(end.steps, whole(end.best_residuals, leaves), relative, end.status)
    return Solved(raveler(z0, batch_ndim)[1](end.best), stats, end.solver, end.folded)


def evaluation(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int, fold: Fold | None = None
) -> Callable[[Loop], Loop]:
    """The body of the loop: one evaluation of f, what it says of each problem, and the next iterate."""
    ravel, unravel = raveler(z0, batch_ndim)
    rounded_to_state, norms, leaves = rounder(z0, batch_ndim), leaf_norms(z0, batch_ndim), leaves_of(z0)
    eps = leaves.eps
    floor = min(64 * eps, 0.05)  # relative residual at which rounding in f may hide all progress
    patience, recovers = max(STALE_EVALUATIONS, getattr(solver, "patience", 0)), getattr(solver, "recovers", False)
    everywhere, anywhere, most = over_axes(getattr(f, "axes", ()))

    def trust(growth: Growth, residuals: Array, scales: Array) -> tuple[Array, Array]:
        """(lost, fallen): whether all residuals are rounding, and whether this one may be small on its own account."""
        # z ↦ z + 1 has no fixed point, and yet its relative residual 1/‖z‖ falls below any rtol as z runs away.
        # Where the iterate has outgrown a scale, the residual itself must have fallen since; and where all residuals
        # since are less than a unit in the last place of z, they are rounding.
        worst = jnp.maximum(growth.worst, growth.before)
        lost = anywhere(leaves.over(jnp.any, eps * scales > worst))
        return lost, everywhere(leaves.over(jnp.all, residuals <= worst / OUTGROWN))

    def progress(loop: Loop, largest: Array, residuals: Array, ratios: Array) -> tuple[Array, Array, Array]:
        """(improved, progressed, at_floor): on the best residual; by enough of it; where rounding hides progress."""
        # A sum of leaves in their units means nothing: progress is that of the leaf that is the furthest from its goal.
        error = lambda residuals: largest_ratio(residuals, largest, leaves) if leaves.several else residuals
        now, least = most(error(residuals)), most(error(loop.best_residuals))
        best_ratios = most(largest_ratio(loop.best_residuals, loop.best_scales, leaves))
        # Below the rounding of the largest f(z) of the solve, a residual that falls as z itself does is no progress.
        rounded = everywhere(leaves.over(jnp.all, residuals <= eps * largest))
        progressed = (now < 0.99 * least) & (~rounded | (most(ratios) < 0.99 * best_ratios))
        resolved = everywhere(whole(loop.best_residuals, leaves) <= floor * whole(loop.best_scales, leaves))
        return now < least, progressed, resolved | rounded

    def body(loop: Loop) -> Loop:
        running, first = loop.status == RUNNING, loop.steps == 0
        z_tree = unravel(loop.z)
        fz_tree = f(z_tree)
        fz = ravel(fz_tree)
        g = fz - loop.z
        residuals, scales = norms(g), norms(fz)
        residual, scale = whole(residuals, leaves), whole(scales, leaves)
        ratios = largest_ratio(residuals, scales, leaves)

        steps = loop.steps + running.astype(jnp.int32)
        first_scale = jnp.where(first, jnp.maximum(residual, scale), loop.first_scale)
        finite = everywhere(jnp.isfinite(residual) & jnp.isfinite(scale))
        growth = grown(loop.growth, residuals, scales, leaves.each(finite))
        lost, fallen = trust(growth, residuals, scales)
        converged = everywhere(within(residuals, scales, solver, leaves)) & finite & ~lost & fallen
        improved, progressed, at_floor = progress(loop, growth.largest, residuals, ratios)
        stale = jnp.where(finite & progressed, 0, loop.stale + 1)

        # An iterate so far out that its residual is all rounding is not a better one.
        better = running & finite & ~lost & (converged | improved)
        best = jnp.where(better[..., None], loop.z, loop.best)

        spent = steps >= solver.max_steps
        bound = jnp.where(spent, DIVERGED_GROWTH * first_scale, jnp.maximum(HOPELESS_GROWTH * first_scale, 1))
        diverged = (lost | anywhere(residual > bound)) & (not recovers)
        backtracks = can_backtrack(solver, loop.solver, running) & ~first
        # In order of priority, the last line first. Not `jnp.select`: it compiles to an argmax over the conditions.
        status = jnp.where(spent, Status.MAX_STEPS, RUNNING)
        status = jnp.where(at_floor & (stale >= patience), Status.STALLED, status)
        status = jnp.where(diverged, Status.DIVERGED, status)
        status = jnp.where(finite | backtracks, status, Status.NONFINITE)
        status = jnp.where(converged, Status.CONVERGED, status)
        status = jnp.where(running, status, loop.status).astype(jnp.int32)

        z, state = advance(solver, loop.solver, g, loop.z, half_power(first_scale))
        z = jnp.where((status == RUNNING)[..., None], rounded_to_state(z), best)
        seen = Seen(loop.evaluation, z_tree, fz_tree, residual, ratios, running)
        return Loop(
            z=z,
            best=best,
            best_residuals=jnp.where(leaves.each(better), residuals, loop.best_residuals),
            best_scales=jnp.where(leaves.each(better), scales, loop.best_scales),
            first_scale=first_scale,
            growth=growth,
            stale=stale,
            steps=steps,
            status=status,
            solver=state,
            folded=None if fold is None else fold.update(loop.folded, seen),
            evaluation=loop.evaluation + 1,
        )

    return body


def advance(solver: Solver, state: Any, residual: Array, z: Array, unit: Array) -> tuple[Array, Any]:
    """The next iterate, and the solver's state."""
    if not getattr(solver, "scale_free", False):
        step, state = solver.update(residual, state, z)
        return next_point(solver, state, z + step), state
    scale, inverse = unit[..., None], (1 / unit)[..., None]
    solver = dataclasses.replace(solver, atol=solver.atol / unit)  # pyright: ignore[reportArgumentType]
    step, state = solver.update(residual * inverse, state, z * inverse)
    return scale * next_point(solver, state, z * inverse + step), state


def next_point(solver: Solver, state: Any, z: Array) -> Array:
    """Where f is evaluated next: z, which is the iterate and the step added up, unless the solver says it exactly."""
    exact = getattr(solver, "next_point", None)
    return z if exact is None else exact(state, z)


def can_backtrack(solver: Solver, state: Any, like: Bool[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Where the point that the state asks for may turn out not finite: nowhere, for a solver that does not say."""
    answer = getattr(solver, "can_backtrack", None)
    return like & False if answer is None else answer(state)


def grown(growth: Growth, residuals: Array, scales: Array, finite: Array) -> Growth:
    """What is known of the growth after one more evaluation; one that is not finite tells nothing."""
    first = growth.largest == 0
    opens = first | (scales > OUTGROWN * growth.scale)
    new = Growth(
        jnp.where(opens, jnp.where(first, jnp.maximum(residuals, scales), scales), growth.scale),
        jnp.where(opens, residuals, jnp.maximum(growth.worst, residuals)),
        jnp.where(opens & ~first, growth.worst, growth.before),
        jnp.maximum(growth.largest, scales),
    )
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, growth)


def round_of_evaluations(
    f: Callable, z0: PyTree, solver: Solver, batch_ndim: int, fold: Fold | None = None
) -> Callable[[Loop], Loop]:
    """The body of the loop of a solver that tests one evaluation in `test_every`: those before it only move z."""
    body, every = evaluation(f, z0, solver, batch_ndim, fold), getattr(solver, "test_every", 1)
    if every == 1:
        return body
    ravel, unravel = raveler(z0, batch_ndim)
    rounded_to_state = rounder(z0, batch_ndim)

    def untested(loop: Loop) -> Loop:
        running = loop.status == RUNNING
        # z0 is tested, for its residual sets the scale, and so is the last evaluation of the budget.
        left = jnp.min(jnp.asarray(solver.max_steps, jnp.int32)) - loop.evaluation
        count = jnp.where(loop.evaluation == 0, 0, jnp.clip(left, 1, every) - 1)

        def move(_, z):
            step: Any = per_problem(getattr(solver, "damping", 1.0)) * (ravel(f(unravel(z))) - z)
            return jnp.where(running[..., None], rounded_to_state(z + step), z)

        z = jax.lax.fori_loop(0, count, move, loop.z)
        return loop._replace(
            z=z, steps=loop.steps + count * running.astype(jnp.int32), evaluation=loop.evaluation + count
        )

    return lambda loop: body(untested(loop))


def measure(f: Callable, z: PyTree, solver: Solver, steps: Any, batch_ndim: int) -> Stats:
    """Stats of a z that is returned as it is, after `steps` evaluations and the one made here."""
    ravel, _ = raveler(z, batch_ndim)
    norms, fz = leaf_norms(z, batch_ndim), ravel(f(z))
    return judge(norms(fz - ravel(z)), norms(fz), solver, steps + 1, leaves_of(z))


def judge(
    residuals: Float[Array, "*norms"],
    scales: Float[Array, "*norms"],
    solver: Solver,
    steps: Any,
    leaves: Leaves,
) -> Stats:
    """Stats of a z whose leaves have these norms of f(z) − z and of f(z), known after `steps` evaluations."""
    residual, relative = whole(residuals, leaves), largest_ratio(residuals, scales, leaves)
    finite = jnp.isfinite(residual) & jnp.isfinite(whole(scales, leaves))
    count = zeros_from(residual).astype(jnp.int32)
    met = jnp.where(within(residuals, scales, solver, leaves), count + Status.CONVERGED, count + Status.MAX_STEPS)
    status = jnp.where(finite, met, count + Status.NONFINITE)
    return Stats(count + steps, jnp.where(finite, residual, jnp.inf), jnp.where(finite, relative, jnp.inf), status)


# ---- norms, leaf by leaf -----------------------------------------------------------------------------------


def within(
    residuals: Float[Array, "*norms"], scales: Float[Array, "*norms"], solver: Solver, leaves: Leaves
) -> Bool[Array, "*batch"]:
    """The stopping test, ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ in each leaf, which may have a unit of its own.

    Finite, for inf ≤ rtol · inf is true, and so is NaN's `not (residual > tolerance)`.
    """
    finite = jnp.isfinite(residuals) & jnp.isfinite(scales)
    tolerance = leaves.each(solver.atol) + leaves.each(solver.rtol) * comparable(residuals, scales, leaves)
    return leaves.over(jnp.all, finite & (residuals <= tolerance))


def comparable(
    residuals: Float[Array, "*norms"], scales: Float[Array, "*norms"], leaves: Leaves
) -> Float[Array, "*norms"]:
    """What each leaf's residual is compared with: ‖f(z)‖ of the leaf.

    Of a leaf that is zero to the rounding of the whole state, that of the whole: it must not hold a solve up.
    """
    if not leaves.several:
        return scales
    total = whole(scales, leaves)[..., None]
    negligible = (scales <= leaves.eps * total) & (residuals <= leaves.eps * total)
    return jnp.where(negligible, total, scales)


def largest_ratio(
    residuals: Float[Array, "*norms"], scales: Float[Array, "*norms"], leaves: Leaves
) -> Float[Array, "*batch"]:
    """The largest relative residual of a leaf."""
    return leaves.over(jnp.max, ratio(residuals, comparable(residuals, scales, leaves)))


def whole(norms: Float[Array, "*norms"], leaves: Leaves) -> Float[Array, "*batch"]:
    """The norm of the state, from those of its leaves."""
    return norm(norms) if leaves.several else norms


def leaf_norms(example: PyTree, batch_ndim: int) -> Callable[[Float[Array, "*batch dim"]], Float[Array, "*norms"]]:
    """The map from a raveled state to the norms of its leaves, in the raveler's order."""
    sizes = sorted_sizes(jax.tree.leaves(example), batch_ndim)[0]
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]

    def norms(flat: Float[Array, "*batch dim"]) -> Float[Array, "*norms"]:
        if len(sizes) == 1:
            return norm(flat)
        parts, start = [], 0
        for size, count in runs:
            part = jax.lax.slice_in_dim(flat, start, start + size * count, axis=-1)
            parts.append(norm(part.reshape(*flat.shape[:-1], count, size)))
            start += size * count
        return jnp.concatenate(parts, axis=-1)

    return norms


def over_axes(axes: tuple) -> tuple[Callable, Callable, Callable]:
    """(everywhere, anywhere, most): all, any and max of a problem's values along named axes, if there are any."""
    if not axes:
        same = lambda x: x
        return same, same, same
    anywhere = lambda yes: jax.lax.pmax(yes.astype(jnp.int32), axes) > 0
    return lambda yes: ~anywhere(~yes), anywhere, lambda x: jax.lax.pmax(x, axes)


# ---- states as vectors -------------------------------------------------------------------------------------


def leaves_of(example: PyTree) -> Leaves:
    return Leaves(len(jax.tree.leaves(example)) > 1, eps_of(example))


def eps_of(example: PyTree) -> float:
    """The machine epsilon of the coarsest leaf."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(example))


def wide_dtype(example: PyTree) -> Any:
    """The dtype of a raveled state: float32, or float64 if a leaf needs it."""
    wide = any(jnp.finfo(leaf.dtype).bits > 32 for leaf in jax.tree.leaves(example))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def sorted_sizes(leaves: list, batch_ndim: int) -> tuple[list[int], list[int]]:
    """(sizes, order): reals a problem in each leaf, and which leaf that is, in the order of the raveler.

    A complex number is two reals, so that norms and inner products are real. Many leaves are sorted by size, so that
    those of one size are measured together: a thousand norms would take minutes to compile.
    """
    sizes = [math.prod(leaf.shape[batch_ndim:]) * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves]
    order = list(range(len(sizes)))
    if len(sizes) > FEW_LEAVES:
        order.sort(key=sizes.__getitem__)
    return [sizes[i] for i in order], order


def raveler(example: PyTree, batch_ndim: int) -> tuple[Callable, Callable]:
    """The two maps between a pytree and `[*batch, dim]` in float32 or wider; complex leaves as two reals."""
    leaves, treedef = jax.tree.flatten(example)
    wide = wide_dtype(example)
    sizes, order = sorted_sizes(leaves, batch_ndim)
    ends = list(itertools.accumulate(sizes, initial=0))

    def ravel_leaf(leaf):
        flat = leaf.reshape(*leaf.shape[:batch_ndim], -1)
        if jnp.iscomplexobj(flat):
            flat = jnp.concatenate([flat.real, flat.imag], axis=-1)
        return flat.astype(wide)

    def ravel(tree: PyTree) -> Float[Array, "*batch dim"]:
        values = jax.tree.leaves(tree)
        flat = [ravel_leaf(values[i]) for i in order]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)

    def unravel_leaf(flat, like):
        if jnp.iscomplexobj(like):
            flat = jax.lax.complex(*jnp.split(flat, 2, axis=-1))
        return flat.reshape(*flat.shape[:-1], *like.shape[batch_ndim:]).astype(like.dtype)

    def unravel(flat: Float[Array, "*batch dim"]) -> PyTree:
        values = [flat] * len(leaves)
        for i, start, end in zip(order, ends, ends[1:], strict=False):
            part = flat if len(leaves) == 1 else jax.lax.slice_in_dim(flat, start, end, axis=-1)
            values[i] = unravel_leaf(part, leaves[i])
        return jax.tree.unflatten(treedef, values)

    return ravel, unravel


def rounder(example: PyTree, batch_ndim: int) -> Callable[[Float[Array, "*batch dim"]], Float[Array, "*batch dim"]]:
    """The map that rounds a raveled state to the dtypes of its leaves."""
    ravel, unravel = raveler(example, batch_ndim)
    exact = all(leaf.real.dtype == wide_dtype(example) for leaf in jax.tree.leaves(example))
    return (lambda flat: flat) if exact else lambda flat: ravel(unravel(flat))


def at_most(limit: int, size: Any) -> int:
    """The smaller of the two; a size that is a symbol, as in `jax.export`, counts as large."""
    return min(limit, size) if isinstance(size, int) else limit


def zeros_from(x: Array) -> Array:
    """Zeros with the shape, dtype and sharding of x: jax 0.12's zeros_like drops an explicit sharding."""
    return jnp.where(False, x, jnp.zeros((), x.dtype))


def per_problem(option: Any) -> Any:
    """An option that may be one number or one for each problem, as a factor of vectors."""
    return jnp.asarray(option)[..., None] if jnp.ndim(option) else option


def aligned(x: Array, like: Array) -> Array:
    """x with axes of size one in front, as many as make its rank that of `like`."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


def one_hot(index: Any, size: int, like: Float[Array, "*batch dim"]) -> Float[Array, "..."]:
    """1 at one index of a last axis of this size, and 0 elsewhere, with the rank and dtype of `like`."""
    here = jnp.asarray(index, jnp.int32)[..., None]
    return (aligned(jnp.arange(size, dtype=jnp.int32), like) == aligned(here, like)).astype(like.dtype)


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


def half_power(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """About √x, a power of two; 1 for what is zero or not finite.

    In units of it, vectors of size x are as far from the one end of the dtype's range as those of size 1 are from the
    other: both may be squared.
    """
    usable = (x > 0) & jnp.isfinite(x)
    return leading_power(jnp.sqrt(jnp.where(usable, x, 1)))


def ratio(a: Float[Array, "*#shape"], b: Float[Array, "*#shape"]) -> Float[Array, "..."]:
    """a / b, with 0 / 0 = 0."""
    return jnp.where(a == 0, 0, a / jnp.where(b == 0, 1, b) + jnp.where((b == 0) & (a != 0), jnp.inf, 0))
