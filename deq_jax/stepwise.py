"""A solve in the hands of the caller: some evaluations at a time, with new problems in place of those that are done.

For loops that log or stream what a solve does, and for continuous batching: a batch of slots, each of which takes the
next problem of a queue as soon as its own has stopped, instead of waiting for the slowest of the batch.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from deq_jax._arrays import zeros_from
from deq_jax._checks import check_arguments, check_start
from deq_jax._config import MAX_STEPS
from deq_jax._gathers import gathered_once
from deq_jax._hoisting import hoist_cell, in_types_of
from deq_jax._programs import run_compiled
from deq_jax._returned import check_axes, check_is_pytree, check_replaces
from deq_jax._states import Layout, choose, join, split
from deq_jax._trace import Bound, Traced, is_array_like
from deq_jax._values import concrete, describe, is_real
from deq_jax.adjoints import Implicit
from deq_jax.solvers import Anderson, Solver, SolveResult, Status
from deq_jax.solvers.carry import Carry, finalize, layout_for
from deq_jax.solvers.norms import for_state, with_rtol
from deq_jax.solvers.pieces import as_memory, has_stopped, init_pieces, refilled, run_piece, shared_leaves
from deq_jax.solvers.protocol import check_sees_all

Z = TypeVar("Z")


class Reads(NamedTuple):
    """Where the leaves of one of args are among the arrays that the traced f reads."""

    treedef: Any
    places: tuple[tuple[bool, int], ...]  # (whether a leaf is in inputs or other, its index there)


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed in a `SolveState`; equal for equal programs, however often f was traced."""

    cell: Traced = dataclasses.field(compare=False)
    key: Hashable  # of the cell
    batch_ndim: int
    args: tuple[Reads | None, ...]  # None for those that problems share


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolveState(Generic[Z]):
    """A solve that goes on, as `start` begins it. A pytree: carried by `scan`, returned from `jit`, saved, donated.

    It holds all that f reads, so that donating it gives up the args as well. Only `value` is meant to be read; the
    other fields are those of the loop.
    """

    value: Z  # the best iterate of each problem, as z0
    carry: Carry  # of the loop, without what is in value
    entered: Int[Array, "*batch"]  # the stage of `Robust` that has begun with each problem
    reads: tuple[list, list]  # the arrays that f reads
    solver: Solver
    form: Form = dataclasses.field(metadata=dict(static=True))


def start(
    f: Callable[..., Any],
    z0: Z,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008  frozen
    batch_ndim: int = 0,
    axes: tuple[int | None, ...] | None = None,
) -> SolveState[Z]:
    """A solve of f(z, *args) = z before its first evaluation, for `advance`, `finished`, `refill` and `result`.

    `advance` until all problems are `finished`, in pieces of any size, then `result`, is `solve`: the same value, stats
    and memory, bit for bit where XLA rounds alike in both programs. No gradient flows through any of it; `attach` makes
    the values differentiable.

    Args:
      f, z0, *args, solver, batch_ndim: as for `solve`. f is traced here, once. The solver must be a pytree, as those of
        this library are, and look at each iterate (`test_every=1`).
      axes: one entry for each of args: 0 if all its leaves begin with the batch axes, so that `refill` can replace the
        part of a problem; None if the problems share it. By default they share all.

    Raises:
      TypeError, ValueError: as `solve`; if axes do not fit args.

    Here a batch of two slots takes three problems:

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, gain: gain * jnp.cos(z)
    >>> gains = jnp.array([0.9, 0.1, 0.5])
    >>> state = deq.start(cell, jnp.zeros(2), gains[:2], batch_ndim=1, axes=(0,))
    >>> state = deq.advance(state, 4)
    >>> deq.finished(state).tolist()
    [False, True]
    >>> first = deq.result(state).value[1]
    >>> state = deq.refill(state, jnp.array([False, True]), jnp.zeros(2), (jnp.full(2, gains[2]),))
    >>> state = deq.advance(state, 100)
    >>> zero, second = deq.result(state).value
    >>> z = jnp.stack([zero, first, second])
    >>> loss = lambda gains: deq.attach(cell, z, gains, batch_ndim=1).sum()
    >>> jax.grad(loss)(gains).shape
    (3,)
    """
    z0 = jax.lax.stop_gradient(check_arguments(f, z0, args, solver, Implicit(), batch_ndim, None))
    check_start(z0)
    solver = with_rtol(solver, z0)
    check_sees_all(solver, "start")
    check_is_pytree("start", "solver", solver)
    axes = (None,) * len(args) if axes is None else axes
    check_axes(args, axes, jnp.shape(jax.tree.leaves(z0)[0])[:batch_ndim])
    cell, z0, inputs, other = hoist_cell(f, z0, args)
    form = Form(cell, cell.key, batch_ndim, _places(cell, args, axes))
    solver, reads = jax.lax.stop_gradient((solver, (inputs, other)))
    value, carry, entered = run_compiled(_start, (batch_ndim,), z0, solver)
    return SolveState(value, carry, entered, reads, solver, form)


def advance(state: SolveState[Z], n: int | Array) -> SolveState[Z]:
    """The state after at most n evaluations of f for each problem; fewer if all of them stop.

    Cutting n evaluations into several calls changes no bit. With `Robust` a stage waits until no problem is left to the
    stages before it, as in `solve`: problems that came to a later stage wait while new ones go through the first.

    Args:
      n: an int, or an integer array, which may be traced.

    Raises:
      TypeError, ValueError: if n is not an int >= 0.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> state = deq.start(jnp.cos, jnp.zeros(()))
    >>> while not deq.finished(state):
    ...     state = deq.advance(state, 3)
    ...     print(int(deq.result(state).stats.steps), f"{deq.result(state).stats.relative_residual:.0e}")
    3 1e-01
    5 8e-05
    """
    if not is_real(n, jnp.integer) or jnp.shape(n):
        raise TypeError(f"n must be an int, or an integer array of shape (), got {describe(n)}")
    known = n if isinstance(n, int) else concrete(n)
    if known is not None and known < 0:
        raise ValueError(f"n must be an int >= 0, got {known}")
    n = jnp.asarray(n if known is None else min(int(known), MAX_STEPS), jnp.int32)
    value, carry, entered = run_compiled(_advance, (state.form,), state, n)
    return dataclasses.replace(state, value=value, carry=carry, entered=entered)


def finished(state: SolveState[Any]) -> Bool[Array, "*batch"]:
    """Whether the solve of each problem has ended, `[*batch]`: converged or not, see `result(state).stats.status`."""
    return has_stopped(state.carry)


def refill(state: SolveState[Z], which: Any, new_z0: Z, new_args: tuple[Any, ...] = ()) -> SolveState[Z]:
    """The state in which new problems begin in the places of some that are finished.

    Each problem has the bits that it would have had in that place of a batch that began with it. The others keep
    theirs. Options of the solver that are arrays belong to the places. With problems that began apart, `Anderson` and
    `Broyden` write their histories one by one, and `Broyden` compresses those that are full in batches of an eighth:
    for what that costs, see `python -m experiments.studies.streaming`.

    Args:
      which: booleans `[*batch]`: the problems to replace. They must be `finished`. Under a trace, where that cannot be
        known, those that still run are left alone.
      new_z0: as z0. Only the part of the problems of `which` is read.
      new_args: one entry for each of args: as that one was for those whose entry in `axes` is 0, and None for the
        others. May be left out if there are none of the former. What f captures stays as it is.

    Raises:
      TypeError, ValueError: if a problem of `which` still runs; if something has another structure, shape or dtype than
        what it replaces; if the solver's state holds something that all problems share, such as a count.
    """
    form, status = state.form, state.carry.status
    if not is_array_like(which) or jnp.result_type(which) != bool:
        raise TypeError(f"which must be booleans, one for each problem, got {describe(which)}")
    if jnp.shape(which) != status.shape:
        raise ValueError(f"which must have the batch shape of the state, {status.shape}; got {jnp.shape(which)}")
    if shared := shared_leaves(state.carry.solver, status):
        raise TypeError(
            f"refill: the state of {type(state.solver).__name__} has a leaf of shape {shared[0]}, which all problems "
            "share, so that none can begin later than the others"
        )
    which = jnp.asarray(which)
    running = concrete(which & ~finished(state))
    if running is not None and running.any():
        raise ValueError(f"refill: of the problems in `which`, these still run: {_listed(running)}; advance them first")
    new_z0 = _as_replacement(new_z0, state.value, "new_z0", "z0")
    if not isinstance(new_args, tuple) or (new_args and len(new_args) != len(form.args)):
        raise ValueError(f"new_args must be a tuple with an entry for each of {len(form.args)} args; got {new_args!r}")
    new_args = new_args or (None,) * len(form.args)
    new = [_new_reads(state, i, arg) for i, arg in enumerate(new_args)]
    value, carry, entered, reads = run_compiled(_refill, (form,), state, which, new_z0, new)
    return dataclasses.replace(state, value=value, carry=carry, entered=entered, reads=reads)


def result(state: SolveState[Z]) -> SolveResult[Z]:
    """What `solve` would return if it ended now.

    A problem that still runs has the status `MAX_STEPS`, as if its budget had been spent, and its best iterate so far.
    Where problems began at different times, `memory` has the largest of their counts as the one they share.
    """
    return run_compiled(_result, (state.form.batch_ndim,), state.value, state.carry, state.solver)


# ---- programs ----------------------------------------------------------------------------------------------


def _start(batch_ndim, z0, solver):
    solver, layout = _loop_options(solver, z0, batch_ndim)
    carry = init_pieces(z0, solver, layout)
    return *_taken_apart(carry, layout), zeros_from(carry.steps)


def _advance(form, state, n):
    f = gathered_once(Bound(form.cell, *state.reads), state.value)
    solver, layout = _loop_options(state.solver, state.value, form.batch_ndim)
    carry, entered = run_piece(f, _put_together(state.value, state.carry, layout), state.entered, solver, layout, n)
    return *_taken_apart(carry, layout), entered


def _refill(form, state, which, new_z0, new_reads):
    which = which & finished(state)
    solver, layout = _loop_options(state.solver, state.value, form.batch_ndim)
    z0 = choose(which, new_z0, state.value)
    carry = refilled(_put_together(state.value, state.carry, layout), which, z0, solver, layout)
    reads = [list(group) for group in state.reads]
    for arg, new in zip(form.args, new_reads, strict=True):
        for (is_input, i), leaf in zip([] if arg is None else arg.places, new, strict=True):
            group = reads[0 if is_input else 1]
            group[i] = choose(which, leaf, group[i])
    return *_taken_apart(carry, layout), jnp.where(which, 0, state.entered), tuple(reads)


def _result(batch_ndim, value, carry, solver):
    solver, layout = _loop_options(solver, value, batch_ndim)
    end = finalize(_put_together(value, carry, layout), layout)
    status = jnp.where(has_stopped(carry), carry.status, Status.MAX_STEPS)
    return end._replace(stats=end.stats._replace(status=status), memory=as_memory(carry, solver))


def _loop_options(solver: Solver, value: PyTree, batch_ndim: int) -> tuple[Solver, Layout]:
    solver = for_state(solver, value, batch_ndim)
    return solver, layout_for(solver, value, batch_ndim)


def _taken_apart(carry: Carry, layout: Layout) -> tuple[PyTree, Carry]:
    """(value, the carry without it): the best iterate with the leaves that f returned last, as z0."""
    return join(layout.unpack(carry.best), carry.returned), carry._replace(best=None, returned=None)


def _put_together(value: PyTree, carry: Carry, layout: Layout) -> Carry:
    """The carry that was taken apart. (The best iterate has been rounded to the dtypes of z0: nothing is lost.)"""
    return carry._replace(best=layout.pack(value), returned=split(value)[1])


# ---- args --------------------------------------------------------------------------------------------------


def _places(cell: Traced, args: tuple, axes: tuple) -> tuple[Reads | None, ...]:
    """Where the arrays of each of args are read; they are the last ones in `cell.order`."""
    counts = [sum(map(is_array_like, jax.tree.leaves(arg))) for arg in args]
    order, found = cell.order[len(cell.order) - sum(counts) :], []
    for arg, axis, count in zip(args, axes, counts, strict=True):
        found.append(None if axis is None else Reads(jax.tree.structure(arg), order[:count]))
        order = order[count:]
    return tuple(found)


def _new_reads(state: SolveState, i: int, new: Any) -> list[Array]:
    """The leaves of one of new_args, or TypeError or ValueError if it does not fit."""
    arg = state.form.args[i]
    if arg is None:
        if new is not None:
            raise ValueError(f"new_args[{i}] must be None: by `axes`, the problems share args[{i}]; got {new!r}")
        return []
    old = [state.reads[0 if is_input else 1][k] for is_input, k in arg.places]
    return jax.tree.leaves(_as_replacement(new, jax.tree.unflatten(arg.treedef, old), f"new_args[{i}]", f"args[{i}]"))


def _as_replacement(new: PyTree, old: PyTree, name: str, what: str) -> PyTree:
    new = jax.lax.stop_gradient(in_types_of(old, new))
    check_replaces(new, old, name, what)
    return jax.tree.map(jnp.asarray, new)


def _listed(mask: Any) -> list:
    """The indices of a mask, for an error message."""
    return [index[0] if len(index) == 1 else tuple(index) for index in np.argwhere(mask).tolist()]
