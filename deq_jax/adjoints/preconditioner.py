"""Preconditioners: linear functions P ≈ (I − J)⁻¹ of a state, their transposes, and our own solvers with one.

A solver of this library is given, for u = b + A u with A = J and M = P, or with A = Jᵀ and M = Pᵀ, the fixed point of

    (1)  u ← u + M (b + A u − u)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from deq_jax._arrays import ratio, zeros_from
from deq_jax._checks import check_like
from deq_jax._config import STATIC, config, with_options
from deq_jax._states import Layout, add, choose, eps_of, frozen, multiply, split, subtract
from deq_jax._trace import Bound, Traced, hoist, is_staged
from deq_jax._values import concrete
from deq_jax._vectors import norm, zero_of
from deq_jax.adjoints.protocol import Problem
from deq_jax.solvers import Solver, Stats, Status, run_loop
from deq_jax.solvers.protocol import member as solver_member
from deq_jax.solvers.stopping import coupling

ROUNDS = 4  # of our own solver, each of which has the solver's budget


@config
class Transposed:
    """v ↦ Pᵀ v."""

    of: Any

    def __call__(self, v: PyTree) -> PyTree:
        return jax.linear_transpose(self.of, v)(v)[0]


def transposed(linear: Any) -> Any:
    """The transpose of a linear function; that of a transpose is the function itself."""
    return linear.of if isinstance(linear, Transposed) else Transposed(linear)


def with_transposed(adjoint: Any) -> Any:
    """The adjoint for the equation whose Jacobian is the transpose."""
    P = adjoint.preconditioner
    return adjoint if P is None else with_options(adjoint, preconditioner=transposed(P))


class _Program:
    """A traced function that is compared by what it computes, for a function that is not differentiated."""

    def __init__(self, traced: Traced):
        self.traced = traced

    def __eq__(self, other):
        return isinstance(other, _Program) and self.traced.key == other.traced.key

    def __hash__(self):
        return hash(self.traced.key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hoisted:
    """A function of v with all arrays that it reads as leaves."""

    reads: Any
    program: Any = dataclasses.field(metadata=STATIC)

    def __call__(self, v: PyTree) -> PyTree:
        return self.program.traced(v, *self.reads)


def bound(options: Any, z: PyTree) -> Any:
    """The options with the arrays that their preconditioner reads as leaves: they may be traced, by `grad` for one."""
    if options.preconditioner is None:
        return options
    traced, *reads = hoist(options.preconditioner, frozen(split(z)[0]))
    return with_options(options, preconditioner=Hoisted(frozen(reads), _Program(traced)))


def solver_bound(solver: Solver, z0: PyTree) -> Solver:
    """The solver with its preconditioner, if it has one, checked and bound."""
    if solver_member(solver, "preconditioner") is None:
        return solver
    check_is_linear(solver, frozen(split(z0)[0]))
    return bound(solver, z0)


@config
class Scaled:
    """v ↦ scale · P v, with a scale for each problem."""

    of: Any
    scale: Array

    def __call__(self, v: PyTree) -> PyTree:
        return multiply(self.of(v), self.scale)


def scaled_by(options: Any, scale: Float[Array, "*batch"]) -> Any:
    """The adjoint or solver for the equation z = z − F(z) / scale, if it has a preconditioner, which is one for F."""
    P = getattr(options, "preconditioner", None)
    return options if P is None else with_options(options, preconditioner=Scaled(P, scale))


# ---- a solve -----------------------------------------------------------------------------------------------


def measured(problem: Problem, u: PyTree, solver: Solver, products: Any) -> Stats:
    """The statistics of u, from one more product. Problems that are coupled along named axes share a status."""
    stats = problem.stats_at(u, solver, products)
    # The maximum does not vary along the axes, in the types of shard_map, and a status does.
    return stats._replace(status=coupling(problem.axes).most(stats.status) + zeros_from(stats.status))


def solve_preconditioned(
    adjoint: Any, product: Callable, unit: PyTree, problem: Problem, solver: Solver
) -> tuple[PyTree, Int[Array, "*batch"]]:
    """(u, products) by our own solver on (1).

    It sees the residual times M, so it may have converged too early. Then it goes on to a smaller tolerance.
    """
    M, coupled = adjoint.preconditioner, coupling(problem.axes)
    cell = Bound(lambda u: add(u, M(subtract(add(unit, product(u)), u))), like=problem.f)

    def again(carry):
        count, u, products, share, on = carry
        options = dict(rtol=solver.rtol * share, atol=solver.atol * share)
        found = run_loop(cell, u, with_options(solver, **options), problem.batch_ndim, over=problem.over)
        stats = measured(problem, found.value, solver, products + found.stats.steps)
        # A loop that has converged where the equation is not met gets a tolerance as much smaller as its residual is.
        size = ratio(stats.residual, stats.relative_residual)
        wanted = 0.5 * ratio(solver.atol + solver.rtol * size, stats.residual)
        new = found.value, stats.steps, share * jnp.minimum(wanted.astype(share.dtype), 0.5)
        u, products, share = choose(on, new, (u, products, share))
        return count + 1, u, products, share, on & found.stats.converged & (stats.status == Status.MAX_STEPS)

    one = zero_of(Layout(unit, problem.batch_ndim, over=problem.over).pack(unit)) + 1
    carry = 0, M(unit), one.astype(jnp.int32) - 1, one, one > 0
    goes_on = lambda carry: coupled.anywhere(jnp.any(carry[-1])) & (carry[0] < ROUNDS)
    _, u, products, *_ = jax.lax.while_loop(goes_on, again, carry)
    return u, products


# ---- checks ------------------------------------------------------------------------------------------------


def check_is_linear(options: Any, z: PyTree) -> None:
    """Raise unless the preconditioner returns a state like z, and P(x − 2 y) = P x − 2 P y for one random pair.

    Under a trace nothing is computed, and only types are compared.
    """
    P, who = options.preconditioner, f"{type(options).__name__}.preconditioner"
    if P is None:
        return
    check_like(jax.eval_shape(lambda z: P(z), z), z, who, "P(v)")
    if is_staged():
        return
    layout, keys = Layout(z, 0), iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(z))))
    noise = lambda leaf: zeros_from(leaf) + jax.random.normal(next(keys), leaf.shape, leaf.dtype)
    x, y = jax.tree.map(noise, z), jax.tree.map(noise, z)
    Px, Py, both = (layout.pack(P(v)) for v in (x, y, jax.tree.map(lambda x, y: x - 2 * y, x, y)))
    gap = concrete(norm(both - Px + Py + Py))
    size = concrete(norm(Px) + norm(Py))
    if gap is None or size is None:  # z or what P reads is traced
        return
    # The rounding of an inverse grows with its condition: to a fourth root of eps, 2 % in float32, we ask nothing.
    if not gap <= eps_of(z) ** 0.25 * size:
        raise ValueError(
            f"{who} must be linear: for random x and y, P(x - 2 y) differs from P(x) - 2 P(y) by {gap:.2g}, where "
            f"P(x) and P(y) have the norm {size:.2g}"
        )
