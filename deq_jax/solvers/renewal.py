"""The inner loops, and what a solver does to its memory between them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from deq_jax._arrays import half_power, may_be_sharded
from deq_jax._config import with_options
from deq_jax._states import Layout, choose
from deq_jax._vectors import scaled
from deq_jax.solvers.carry import Carry
from deq_jax.solvers.equation import FIXED_POINT, Equation
from deq_jax.solvers.norms import without_tolerances
from deq_jax.solvers.protocol import Solver, member
from deq_jax.solvers.stopping import RUNNING
from deq_jax.solvers.subset import first, gather, gather_options

PART = 8  # where each problem has counts of its own, an eighth of the batch is renewed at a time


def run_while(
    goes_on: Callable[[Carry], Array],
    body: Callable[[Carry], Carry],
    carry: Carry,
    solver: Solver,
    layout: Layout,
    equation: Equation = FIXED_POINT,
) -> Carry:
    """The carry once `goes_on` is false. What the solver does seldom to its memory is done between inner loops."""
    full = lambda carry: member(solver, "is_full")(carry.solver)
    if full(carry) is False:
        return jax.lax.while_loop(goes_on, body, carry)
    where = lambda carry, solver: is_on(carry, solver) & full(carry)
    renew = lambda carry, solver: with_next_point(carry, solver, "renewed", where(carry, solver), layout, equation)

    def until_full(carry: Carry) -> Carry:
        carry = jax.lax.while_loop(lambda carry: goes_on(carry) & ~jnp.any(full(carry)), body, carry)
        # Of problems that began apart few are full at once. (On a mesh, gathering them would be a collective.)
        if jnp.ndim(full(carry)) == 1 and not any(map(may_be_sharded, jax.tree.leaves(carry.z))):
            some = lambda carry: changed_in_some(renew, carry, solver, full(carry))
            return jax.lax.while_loop(lambda carry: jnp.any(full(carry)), some, carry)
        return jax.lax.cond(jnp.any(full(carry)), lambda carry: renew(carry, solver), lambda carry: carry, carry)

    return jax.lax.while_loop(goes_on, until_full, carry)


def changed_in_some(
    change: Callable[[Carry, Solver], Carry], carry: Carry, solver: Solver, where: Bool[Array, "batch"]
) -> Carry:
    """The carry with z and the memory changed in some of the problems of `where`."""
    count = where.size
    who = first(where, min(count, max(2, count // PART)))
    part = change(gather(carry, who), gather_options(solver, who, count))
    put = lambda whole, part: whole.at[who].set(part, unique_indices=True)
    return carry._replace(z=jax.tree.map(put, carry.z, part.z), solver=jax.tree.map(put, carry.solver, part.solver))


def begun(carry: Carry, part: Solver, layout: Layout, equation: Equation) -> Carry:
    """The carry when a part of a solver takes over: its problems go on from where it wants to begin."""
    on = is_on(carry, part)

    def begin(carry: Carry) -> Carry:
        carry = with_next_point(carry, part, "begun", on, layout, equation)
        return carry._replace(carried=choose(on, carry.returned, carry.carried))

    return jax.lax.cond(jnp.any(on), begin, lambda carry: carry, carry)


def is_on(carry: Carry, solver: Solver) -> Bool[Array, "*batch"]:
    """Which problems the present loop goes on with."""
    return (carry.status == RUNNING) & member(solver, "takes")(carry.solver)


def with_next_point(
    carry: Carry, solver: Solver, change: str, where: Array, layout: Layout, equation: Equation
) -> Carry:
    """The carry with the solver's state changed, and with its next point in the problems of `where`."""
    unit: Any = half_power(equation.in_z(carry.first_scale)) if member(solver, "scale_free") else 1.0
    solver = equation.asked(solver, carry.best_norms, layout)
    state = member(in_units(solver, unit, layout), change)(carry.solver)
    z = scaled(unit, member(solver, "next_point")(state, scaled(1 / unit, carry.z)))
    return carry._replace(z=choose(where, layout.round(z), carry.z), solver=state)


def in_units(solver: Solver, unit: Array, layout: Layout) -> Solver:
    """The solver for vectors that are divided by `unit`."""
    solver = without_tolerances(solver, layout)
    return with_options(solver, atol=solver.atol / unit)
