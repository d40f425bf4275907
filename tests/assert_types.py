"""What a type checker knows of the public API: `make lint` reads this file, and nothing runs it.

Lines that end in an ignore are mistakes that pyright must find: it reports an ignore that is not needed.
"""

# ruff: noqa: B018
# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import jax.numpy as jnp
from jax import Array

import deq_jax as deq


def cell(z: Array, x: Array) -> Array:
    return jnp.tanh(z + x)


def pair(z: Array, x: Array) -> tuple[Array, dict[str, Array]]:
    return jnp.tanh(z + x), {"x": x}


x = jnp.zeros(3)
sol = deq.fixed_point(cell, jnp.zeros(3), x)
assert_type(sol, deq.Solution[Array])
assert_type(sol.value, Array)
assert_type(sol.stats, deq.Stats)
assert_type(sol.stats.converged, Array)
z, stats = sol
assert_type(z, Array)
assert_type(stats, deq.Stats)
sol.valeu  # pyright: ignore[reportAttributeAccessIssue]
sol.stats.residuals  # pyright: ignore[reportAttributeAccessIssue]
wrong: str = sol.value  # pyright: ignore[reportAssignmentType]

assert_type(deq.fixed_point(cell, 0.0, x).value, Array)
state = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
assert_type(deq.fixed_point(lambda z: z, state).value, dict[str, Array])
with_aux = deq.fixed_point(pair, jnp.zeros(3), x, has_aux=True)
assert_type(with_aux, deq.SolutionWithAux[Array, dict[str, Array]])
assert_type(with_aux.aux, dict[str, Array])
sol.aux  # pyright: ignore[reportAttributeAccessIssue]

solved = deq.solve(cell, jnp.zeros(3), x)
assert_type(solved, deq.SolveResult[Array])
assert_type(solved.memory, Any)
assert_type(deq.attach(cell, solved.value, x, found=solved), Array)
assert_type(deq.check(sol), deq.Solution[Array])
assert_type(deq.compact(cell, jnp.zeros((9, 3)), x, axes=(None,)), deq.Solution[Array])
state = deq.advance(deq.start(cell, jnp.zeros((9, 3)), x, batch_ndim=1), 4)
assert_type(state, deq.SolveState[Array])
assert_type(deq.result(deq.refill(state, deq.finished(state), jnp.zeros((9, 3)))), deq.SolveResult[Array])
assert_type(deq.trajectory(cell, jnp.zeros(3), x, at=2).states, tuple[Array, ...])

solver: deq.Solver = deq.Anderson(history=4)
solver = deq.Picard(rtol=jnp.array(1e-3), max_steps=jnp.array(3))
deq.Anderson(histroy=4)  # pyright: ignore[reportCallIssue]
deq.Anderson(rtol="small")  # pyright: ignore[reportArgumentType]
adjoint: deq.Adjoint = deq.Implicit(deq.Broyden())
adjoint = deq.Unroll()
deq.fixed_point(cell, jnp.zeros(3), x, solver=deq.Implicit())  # pyright: ignore[reportArgumentType, reportCallIssue]
deq.fixed_point(cell, jnp.zeros(3), x, adjoint=deq.Anderson())  # pyright: ignore[reportArgumentType, reportCallIssue]


class Own:
    def pullback(self, problem: deq.Problem, forward: deq.ForwardResult, z_bar: Any) -> tuple[list, None]:
        return problem.inputs, None


assert_type(deq.fixed_point(cell, jnp.zeros(3), x, adjoint=Own()), deq.Solution[Array])
