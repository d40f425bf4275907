"""Inexact derivatives at the equilibrium: cheaper than `Implicit`, and biased. They have forward mode too.

The value is z* itself. Its derivative is that of a few plain calls of f that start at stop_gradient(z*).
"""

import jax
from jaxtyping import PyTree

from deq_jax._checks import check_number
from deq_jax._config import Number, config
from deq_jax._states import add, lerp
from deq_jax.adjoints.backward import pull_scaled, unit_in_float16
from deq_jax.adjoints.protocol import ForwardResult, Probe, Problem


@config
class Neumann:
    """The first `terms` terms of the Neumann series of the exact gradient: u = Σ (Jᵀ)ᵏ z̄, k < terms.

    Biased unless the series has converged, and useless where the spectral radius is above one.
    Geng et al. (2021), "On Training Implicit Models", NPG with damping 1.

    >>> import deq_jax as deq
    >>> deq.Neumann(terms=5)
    Neumann(terms=5)
    """

    terms: int = 5

    def __post_init__(self):
        check_number(self, "terms", at_least=1)

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        z_bar, scale = unit_in_float16(z_bar, problem)
        _, vjp = jax.vjp(problem, forward.z, problem.inputs)
        # u_{k+1} = z̄ + Jᵀuₖ from u₁ = z̄
        u = jax.lax.fori_loop(1, self.terms, lambda k, u: add(z_bar, vjp(u)[0]), z_bar)
        inputs_bar = pull_scaled(lambda u: vjp(u)[1], problem.inputs, u, scale)
        return inputs_bar, Probe.unmeasured(self.terms - 1, z_bar, problem.batch_ndim, problem.over)

    def pushforward(self, problem: Problem, forward: ForwardResult, inputs_dot: list) -> PyTree:
        _, b = jax.jvp(lambda inputs: problem(forward.z, inputs), (problem.inputs,), (inputs_dot,))
        _, along_z = jax.linearize(problem, forward.z)
        # v_{k+1} = fₐȧ + J vₖ from v₁ = fₐȧ
        return jax.lax.fori_loop(1, self.terms, lambda k, v: add(b, along_z(v)), b)


@config
class JFB:
    """Jacobian-free backpropagation, u = z̄: the gradient of one application of f at the equilibrium.

    The cheapest, and a descent direction for a strong enough contraction. Fung et al. (2022), Eq 9.

    >>> import deq_jax as deq
    >>> deq.JFB()
    JFB()
    """

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        return Neumann(1).pullback(problem, forward, z_bar)

    def pushforward(self, problem: Problem, forward: ForwardResult, inputs_dot: list) -> PyTree:
        return Neumann(1).pushforward(problem, forward, inputs_dot)


@config
class Phantom:
    """The gradient of `steps` damped applications of f that start at the equilibrium.

    Geng et al. (2021), unrolled phantom gradient: h ← h + damping (f(h) − h) from h = z*. The value that is
    returned is z* itself. The memory of the backward pass grows with `steps`.

    >>> import deq_jax as deq
    >>> deq.Phantom(steps=5, damping=0.8)
    Phantom(steps=5, damping=0.8)
    """

    steps: int = 5
    damping: Number = 0.5

    def __post_init__(self):
        check_number(self, "steps", at_least=1)
        check_number(self, "damping", above=0, at_most=1)

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        z_bar, scale = unit_in_float16(z_bar, problem)
        _, vjp = jax.vjp(lambda inputs: self._unroll(problem, forward.z, inputs), problem.inputs)
        inputs_bar = pull_scaled(lambda u: vjp(u)[0], problem.inputs, z_bar, scale)
        return inputs_bar, Probe.unmeasured(self.steps, z_bar, problem.batch_ndim, problem.over)

    def pushforward(self, problem: Problem, forward: ForwardResult, inputs_dot: list) -> PyTree:
        return jax.jvp(lambda inputs: self._unroll(problem, forward.z, inputs), (problem.inputs,), (inputs_dot,))[1]

    def _unroll(self, problem, z, inputs):
        step = lambda h, _: (lerp(h, problem(h, inputs), self.damping), None)
        return jax.lax.scan(step, z, length=self.steps)[0]
