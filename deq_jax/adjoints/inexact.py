"""Inexact derivatives, taken at the equilibrium: cheaper than `Implicit`, and biased. In forward mode too.

The value is found as ever, and its derivative is that of a few plain calls of f that start at stop_gradient(z*).
"""

import jax

from deq_jax._config import check_number, config
from deq_jax.adjoints.base import (
    add,
    at_equilibrium_in_every_mode,
    lerp,
    pull_scaled,
    run_at_equilibrium,
    unit_in_float16,
    unmeasured,
)


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

    run = run_at_equilibrium
    at = at_equilibrium_in_every_mode

    def pullback(self, f, found, inputs, z_bar, solver, batch_ndim):
        z_bar, scale = unit_in_float16(z_bar, batch_ndim, f)
        _, vjp = jax.vjp(f, found.z, inputs)
        # u_{k+1} = z̄ + Jᵀuₖ from u₁ = z̄
        u = jax.lax.fori_loop(1, self.terms, lambda k, u: add(z_bar, vjp(u)[0]), z_bar)
        return pull_scaled(lambda u: vjp(u)[1], inputs, u, scale), unmeasured(self.terms - 1, z_bar, batch_ndim)

    def pushforward(self, f, found, inputs, inputs_dot, solver, batch_ndim):
        _, b = jax.jvp(lambda inputs: f(found.z, inputs), (inputs,), (inputs_dot,))
        _, along_z = jax.linearize(lambda z: f(z, inputs), found.z)
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

    run = run_at_equilibrium
    at = at_equilibrium_in_every_mode

    def pullback(self, f, found, inputs, z_bar, solver, batch_ndim):
        return Neumann(1).pullback(f, found, inputs, z_bar, solver, batch_ndim)

    def pushforward(self, f, found, inputs, inputs_dot, solver, batch_ndim):
        return Neumann(1).pushforward(f, found, inputs, inputs_dot, solver, batch_ndim)


@config
class Phantom:
    """The gradient of `steps` damped applications of f that start at the equilibrium.

    Geng et al. (2021), unrolled phantom gradient: h ← h + damping (f(h) − h) from h = z*. The value that is
    returned is z* itself. Backward memory grows with `steps`.

    >>> import deq_jax as deq
    >>> deq.Phantom(steps=5, damping=0.8)
    Phantom(steps=5, damping=0.8)
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        check_number(self, "steps", at_least=1)
        check_number(self, "damping", above=0, at_most=1)

    run = run_at_equilibrium
    at = at_equilibrium_in_every_mode

    def pullback(self, f, found, inputs, z_bar, solver, batch_ndim):
        z_bar, scale = unit_in_float16(z_bar, batch_ndim, f)
        _, vjp = jax.vjp(lambda inputs: self._unroll(f, found.z, inputs), inputs)
        return pull_scaled(lambda u: vjp(u)[0], inputs, z_bar, scale), unmeasured(self.steps, z_bar, batch_ndim)

    def pushforward(self, f, found, inputs, inputs_dot, solver, batch_ndim):
        return jax.jvp(lambda inputs: self._unroll(f, found.z, inputs), (inputs,), (inputs_dot,))[1]

    def _unroll(self, f, z, inputs):
        step = lambda h, _: (lerp(h, f(h, inputs), self.damping), None)
        return jax.lax.scan(step, z, length=self.steps)[0]
