"""SHINE: the forward solve's inverse Jacobian, used again in the backward pass."""

import dataclasses

import jax
import jax.numpy as jnp

from deq_jax._config import check_number, config
from deq_jax._trace import Bound
from deq_jax.adjoints.base import (
    add,
    as_probe,
    at_equilibrium,
    conj,
    divide,
    first_order_only,
    inputs_bar,
    power_of_two,
    run_at_equilibrium,
    unfolded,
)
from deq_jax.solvers import Broyden, solve
from deq_jax.solvers.broyden import BroydenState


@config
class Shine:
    """The gradient from forward Broyden's own inverse Jacobian, improved by `refine` backward steps.

    Ramzi et al. (2022), "SHINE: SHaring the INverse Estimate". The forward solve leaves B ≈ (J − I)⁻¹, whose
    transpose is the inverse that the backward equation u = z̄ + Jᵀu asks for. So the first quasi-Newton step from
    u = z̄ is nearly the whole solution, and `refine` further ones extend the memory with what they learn of Jᵀ.
    In all refine + 2 vector-Jacobian products. Of the iterates that with the least residual counts, so a problem
    whose estimate is worse than z̄ itself falls back to z̄ (as JFB). Exact as `refine` grows; first order only.

    The forward solver must be `Broyden`.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def root(a):
    ...     f = lambda z: jnp.cos(a * z)
    ...     return deq.fixed_point(f, 0.0, solver=deq.Broyden(rtol=1e-6), adjoint=deq.Shine(refine=2)).value
    >>> bool(abs(jax.grad(root)(1.0) + 0.29747) < 1e-4)
    True
    """

    refine: int = 5

    reads_memory = True

    def __post_init__(self):
        check_number(self, "refine", at_least=0)

    def run(self, f, z0, inputs, other, solver, batch_ndim, probe):
        self._check(solver)
        return run_at_equilibrium(self, f, z0, inputs, other, solver, batch_ndim, probe)

    def at(self, f, found, inputs, other, solver, batch_ndim, probe):
        self._check(solver)
        if found.memory is None:
            raise TypeError("Shine needs the memory of a Broyden solve, and this z was found without: use Implicit()")
        return at_equilibrium(self, f, found, inputs, other, solver, batch_ndim, probe)

    def _check(self, solver):
        if not isinstance(solver, Broyden):
            raise TypeError(
                f"Shine reuses the inverse Jacobian of a forward Broyden; got solver={type(solver).__name__}. "
                "Use solver=Broyden(), or adjoint=Implicit()"
            )

    def pullback(self, f, found, inputs, z_bar, solver, batch_ndim):
        _, along_z = jax.vjp(lambda z: f(z, inputs), found.z)
        z_bar = unfolded(z_bar, found.z, batch_ndim)
        scale = power_of_two(z_bar, batch_ndim, f)
        unit = divide(z_bar, scale)

        def cell(u):
            return conj(add(unit, along_z(conj(u))[0]))

        products = self.refine + 2
        memory = _transposed(found.memory, room=products + 1)
        backward = dataclasses.replace(solver, rtol=0.01 * solver.rtol, max_steps=products, damping=1.0)
        u, stats, *_ = solve(Bound(cell, axes=f.axes), conj(unit), backward, batch_ndim, memory=memory)
        ended = first_order_only(inputs_bar(f, found.z, inputs, conj(u), stats, scale), "Shine")
        return ended, as_probe(stats)


def _transposed(state: BroydenState, room: int) -> BroydenState:
    """Bᵀ = −I + Σ middleⱼᵢ sᵢ sⱼᵀ as the memory of a solve of its own, with `room` more slots."""
    none, more = [(0, 0)] * (state.middle.ndim - 2), (0, room)
    steps = jnp.pad(state.steps, [*none, more, (0, 0)])
    middle = jnp.pad(jnp.swapaxes(state.middle, -2, -1), [*none, more, more])
    # The next step to be written is the first of them.
    return state._replace(count=state.count * 0 + state.steps.shape[-2], steps=steps, middle=middle)
