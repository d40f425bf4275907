"""The exact derivative in every mode: forward, reverse and any mix of them."""

from typing import Any

import jax

from deq_jax._config import config
from deq_jax._trace import hoist
from deq_jax.adjoints.base import (
    Probe,
    add,
    at_equilibrium_in_every_mode,
    divide,
    multiply,
    power_of_two,
    run_at_equilibrium,
)
from deq_jax.adjoints.implicit import Implicit, OnFailure, backward_solver, check_backward_solver


@config
class ImplicitJVP:
    """The derivative of `Implicit` in every mode: jvp, jacfwd, linearize, hessian, and reverse mode too.

    Forward mode solves the tangent equation (I − J) ż = fₐ ȧ, reverse mode the backward equilibrium of `Implicit`;
    both by `solver`, or by `Implicit`'s default. Each asks of f that mode alone: an f with a `while_loop` has a forward
    derivative only, and that is enough for jvp and jacfwd.

    In reverse mode `Probe` says how the backward solve ended. Forward mode has no cotangent to say it in: there, a
    tangent solve that failed gives its best iterate without a flag. There is no policy for a solve that failed.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> root = lambda a: deq.fixed_point(lambda z: jnp.cos(a * z), 0.0, adjoint=deq.ImplicitJVP()).value
    >>> first, second = jax.jacfwd(root)(1.0), jax.hessian(root)(1.0)
    >>> bool(abs(first + 0.29747) < 1e-3), bool(abs(second - 0.15334) < 1e-3)
    (True, True)
    """

    solver: Any = None

    def __post_init__(self):
        check_backward_solver(self)

    run = run_at_equilibrium

    def at(self, f, found, inputs, other, solver, batch_ndim, probe):
        solver = backward_solver(self, solver, found.z, batch_ndim)
        return at_equilibrium_in_every_mode(self, f, found, inputs, other, solver, batch_ndim, probe)

    on_failure = OnFailure.KEEP  # no option yet, but what the pullback asks for
    pullback = Implicit.pullback

    def pushforward(self, f, found, inputs, inputs_dot, solver, batch_ndim):
        # z = f(z, a)  ⇒  ż = fₐ ȧ + J ż: a fixed point too, solved for ż / scale, a power of two a problem.
        _, b = jax.jvp(lambda inputs: f(found.z, inputs), (inputs,), (inputs_dot,))
        _, along_z = jax.linearize(lambda z: f(z, inputs), found.z)
        scale = power_of_two(b, batch_ndim, f)
        unit = divide(b, scale)
        fun, v_inputs, v_other = hoist(lambda v: add(unit, along_z(v)), unit)
        v, _ = self.run(fun, unit, v_inputs, v_other, solver, batch_ndim, Probe.like(unit, batch_ndim))
        return multiply(v, scale)
