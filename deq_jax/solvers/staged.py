"""The loop on a batch that shrinks as its problems finish."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from deq_jax.solvers.carry import Carry, finalize, init_carry, layout_for
from deq_jax.solvers.loop import make_body
from deq_jax.solvers.norms import for_state
from deq_jax.solvers.protocol import Solver, SolveResult
from deq_jax.solvers.renewal import run_while
from deq_jax.solvers.stopping import RUNNING
from deq_jax.solvers.subset import first, gather, gather_options


def run_loop_in_stages(
    bind: Callable[[tuple], Callable], z0: PyTree, args: tuple, axes: tuple, solver: Solver, sizes: tuple[int, ...]
) -> SolveResult:
    """`run_loop(bind(args), z0, solver, 1)` in batches that shrink to each of `sizes` in turn; without memory.

    Those of args whose entry in `axes` is 0 have the problems along their first axis, and are gathered with them.
    """

    def run(carry: Carry, solver: Solver, args: tuple, sizes: tuple[int, ...]) -> Carry:
        left, count = sizes[0] if sizes else 0, carry.status.size
        body = make_body(bind(args), solver, layout)
        carry = run_while(lambda carry: jnp.sum(carry.status == RUNNING) > left, body, carry, solver, layout)
        if not sizes:
            return carry
        who = first(carry.status == RUNNING, left)
        some = [arg if axis is None else gather(arg, who) for arg, axis in zip(args, axes, strict=True)]
        part = run(gather(carry, who), gather_options(solver, who, count), tuple(some), sizes[1:])
        return _scatter(carry, part, who)

    solver = for_state(solver, z0, 1)
    layout = layout_for(solver, z0, 1)
    end = run(init_carry(z0, solver, layout), solver, args, sizes)
    return finalize(end, layout)._replace(memory=None)


def _scatter(carry: Carry, part: Carry, who: Int[Array, "left"]) -> Carry:
    """The carry with the results of some of its problems. Their memory is not copied back: nothing reads it."""
    put = lambda whole, part: whole.at[who].set(part)
    names = "best", "best_norms", "last_norms", "steps", "status", "best_carried", "returned"
    results = {name: getattr(carry, name) for name in names}
    return carry._replace(**jax.tree.map(put, results, {name: getattr(part, name) for name in names}))
