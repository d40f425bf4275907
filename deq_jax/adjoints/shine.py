"""SHINE: the forward solve's inverse Jacobian, used again in the backward pass."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._checks import check_number
from deq_jax._config import config
from deq_jax._returned import check_memory
from deq_jax._reverse_only import first_order_only
from deq_jax._rows import with_more_rows
from deq_jax._states import conj
from deq_jax._trace import Bound
from deq_jax.adjoints.backward import backward_cell, solve_backward
from deq_jax.adjoints.protocol import ForwardResult, Probe, Problem
from deq_jax.solvers import Broyden, Solver, run_loop
from deq_jax.solvers.broyden import BroydenState
from deq_jax.solvers.carry import vector_type
from deq_jax.solvers.norms import for_state


@config
class Shine:
    """The gradient from forward Broyden's own inverse Jacobian, improved by `refine` backward steps.

    Ramzi et al. (2022), "SHINE: SHaring the INverse Estimate". The forward solve leaves B ≈ (J − I)⁻¹, and its
    transpose is the inverse that the backward equation u = z̄ + Jᵀu asks for. So the first quasi-Newton step from
    u = z̄ is nearly the whole solution, and `refine` further steps extend the memory with what they learn of Jᵀ. The
    cost is refine + 2 vector-Jacobian products. The iterate with the least residual is used, so a problem whose
    estimate is worse than z̄ itself falls back to z̄ (as JFB). Exact as `refine` grows; first order only.

    The forward solver must be `Broyden`.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def root(a):
    ...     f = lambda z: jnp.cos(a * z)
    ...     return deq.fixed_point(f, 0.0, solver=deq.Broyden(rtol=1e-6), adjoint=deq.Shine(refine=2)).value
    >>> bool(abs(jax.grad(root)(1.0) + 0.29747) < 1e-4)
    True
    """

    refine: int = 5

    def __post_init__(self):
        check_number(self, "refine", at_least=0)

    def check(self, z0: PyTree, solver: Solver) -> None:
        if not isinstance(solver, Broyden):
            raise TypeError(
                f"Shine reuses the inverse Jacobian of a forward Broyden; got solver={type(solver).__name__}. "
                "Use solver=Broyden(), or adjoint=Implicit()"
            )

    def keep(self, problem: Problem, forward: ForwardResult) -> ForwardResult:
        if forward.memory is None:
            raise TypeError("Shine needs the memory of a Broyden solve, and this z was found without: use Implicit()")
        check_memory(
            forward.memory,
            forward.solver,
            vector_type(forward.solver, forward.z, problem.batch_ndim, problem.over),
            "found.memory",
        )
        return forward

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        products = self.refine + 2
        memory = _transposed(forward.memory, room=products + 1)
        known = for_state(forward.solver, forward.z, problem.batch_ndim)
        options: Any = dict(rtol=0.01 * known.rtol, norm="leaf", min_steps=0, returns="best")
        options |= dict(atol=0.0 if isinstance(known.atol, tuple) else forward.solver.atol)
        options |= dict(max_steps=products, damping=1.0)
        solver = dataclasses.replace(forward.solver, **options)

        def solve(unit):
            cell = backward_cell(problem, forward.z, unit)
            conjugated = Bound(lambda u: conj(cell(conj(u))), like=problem.f)
            u, stats, *_ = run_loop(
                conjugated, conj(unit), solver, problem.batch_ndim, memory=memory, over=problem.over
            )
            return conj(u), stats

        inputs_bar, stats = solve_backward(problem, forward.z, z_bar, solve)
        return first_order_only(inputs_bar, "Shine"), Probe.of(stats)


def _transposed(state: BroydenState, room: int) -> BroydenState:
    """Bᵀ = −I + Σ coreⱼᵢ sᵢ sⱼᵀ as the memory of a solve of its own, with `room` more slots."""
    none, more = [(0, 0)] * (state.core.ndim - 2), (0, room)
    core = jnp.pad(jnp.swapaxes(state.core, -2, -1), [*none, more, more])
    # The next step to be written is the first of them.
    count = state.count * 0 + state.core.shape[-1]
    return state._replace(count=count, steps=with_more_rows(state.steps, room), core=core)
