"""The loop in pieces: some evaluations at a time. Between them new problems may take the place of those that stopped.

So that a problem that begins later has the bits it would have alone, all that the loop and a solver know of it is its
own, counts too. What remains common to all is how many evaluations there were.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from deq_jax._arrays import zeros_from
from deq_jax._config import MAX_STEPS
from deq_jax._states import Layout, choose
from deq_jax.solvers.carry import Carry, init_carry
from deq_jax.solvers.equation import FIXED_POINT
from deq_jax.solvers.loop import coupled_axes, make_body
from deq_jax.solvers.protocol import Solver, member
from deq_jax.solvers.renewal import begun, is_on, run_while
from deq_jax.solvers.stopping import RUNNING


def init_pieces(z0: PyTree, solver: Solver, layout: Layout) -> Carry:
    """The carry before the first evaluation, in which each problem has the solver's counts for itself."""
    carry = init_carry(z0, solver, layout)
    if not member(solver, "may_begin_apart"):
        return carry
    own = lambda leaf: leaf if leaf.ndim else leaf + zeros_from(carry.steps).astype(leaf.dtype)
    return carry._replace(solver=jax.tree.map(own, carry.solver))


def run_piece(
    f: Callable, carry: Carry, entered: Int[Array, "*batch"], solver: Solver, layout: Layout, n: Int[Array, ""]
) -> tuple[Carry, Int[Array, "*batch"]]:
    """(carry, entered) after at most n evaluations of f; fewer if all problems stop.

    `entered` is the part of the solver that has begun with each problem. As in `run_loop`, a part waits until no
    problem is left to the parts before it. While problems that were refilled go through the first parts, those that
    had come further keep what they had.
    """
    parts = () if coupled_axes(f, layout) else member(solver, "parts")
    parts = parts or (solver,)
    limit = carry.evaluation + jnp.minimum(n, MAX_STEPS - carry.evaluation)
    for i, part in enumerate(parts):
        goes_on = lambda carry, part=part: jnp.any(is_on(carry, part)) & (carry.evaluation < limit)
        if i:
            comes = is_on(carry, part) & (entered < i) & (carry.evaluation < limit)
            carry = jax.lax.cond(jnp.any(comes), _enter(i, part, entered, layout), lambda carry: carry, carry)
            entered = jnp.where(comes, i, entered)
        end = run_while(goes_on, make_body(f, part, layout), carry, part, layout)
        carry = end if i == len(parts) - 1 else choose(entered > i, carry, end)
    return carry, entered


def _enter(i: int, part: Solver, entered: Int[Array, "*batch"], layout: Layout) -> Callable[[Carry], Carry]:
    """Part i begins with the problems that have come to it, and not again with those that it has begun with."""
    return lambda carry: choose(entered >= i, carry, begun(carry, part, layout, FIXED_POINT))


def refilled(carry: Carry, where: Bool[Array, "*batch"], z0: PyTree, solver: Solver, layout: Layout) -> Carry:
    """The carry in which the problems of `where` begin at their part of z0."""
    return choose(where, init_pieces(z0, solver, layout), carry)


def has_stopped(carry: Carry) -> Bool[Array, "*batch"]:
    return carry.status != RUNNING


def shared_leaves(state: Any, like: Array) -> list[tuple]:
    """The shapes of leaves of a solver's state that do not begin with the batch axes, those of `like`."""
    return [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape[: like.ndim] != like.shape]


def as_memory(carry: Carry, solver: Solver) -> Any:
    """The solver's state as a memory for `run_loop`, where all problems share its counts.

    Where problems began apart, that is the largest: what a problem with fewer updates lacks counts as not in use.
    """
    like = jax.eval_shape(lambda z: solver.init(z), carry.z)
    merge = lambda leaf, like: leaf if leaf.ndim == like.ndim else jnp.max(leaf)
    return jax.tree.map(merge, carry.solver, like)
