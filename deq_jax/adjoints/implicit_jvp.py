"""The exact derivative in every mode: forward, reverse and any mix of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax._config import config
from deq_jax._trace import Bound
from deq_jax.adjoints.base import divide, multiply, power_of_two, run_at_equilibrium
from deq_jax.adjoints.implicit import check_backward_solver, default_backward
from deq_jax.solvers import solve
from deq_jax.solvers.base import over_axes


@config
class ImplicitJVP:
    """The derivative of `Implicit`, as a custom JVP: jvp, jacfwd, linearize, hessian, and reverse mode too.

    The tangent equation (I − J) ż = fₐ ȧ is a `lax.custom_linear_solve`, whose transpose is the backward
    equilibrium; both are solved by `solver`, or by `Implicit`'s default. The price: no `Probe` (its cotangent
    stays zero), and no policy for a solve that failed.

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
        linear_solver = default_backward(solver) if self.solver is None else self.solver
        return _value(f, batch_ndim, linear_solver, found.z, inputs, other)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value(f, batch_ndim, solver, z, inputs, other):
    return z


@_value.defjvp
def _value_jvp(f, batch_ndim, primals, tangents):
    solver, z, inputs, other = primals
    _, _, inputs_dot, _ = tangents
    # Through the rule itself: z* depends on the inputs, so derivatives of the rule are right as well.
    z_star = _value(f, batch_ndim, solver, z, inputs, other)

    # z = f(z, a)  ⇒  (I − J) ż = fₐ ȧ
    _, along_inputs = jax.jvp(lambda inputs: f(z_star, inputs, other), (inputs,), (inputs_dot,))
    _, along_z = jax.linearize(lambda z: f(z, inputs, other), z_star)
    i_minus_j = lambda v: jax.tree.map(jnp.subtract, v, along_z(v))

    def equilibrium(matvec, b):
        # (I − J) v = b as the fixed point v = b + v − (I − J) v, on a right side of unit size. What f couples along
        # named axes is one system, and has one scale.
        axes = getattr(f, "axes", ())
        scale = over_axes(axes)[2](power_of_two(b, batch_ndim))
        unit = divide(b, scale)
        cell = lambda v: jax.tree.map(lambda b, v, mv: b + (v - mv), unit, v, matvec(v))
        return multiply(solve(Bound(cell, axes=axes), unit, solver, batch_ndim).value, scale)

    z_dot = jax.lax.custom_linear_solve(i_minus_j, along_inputs, equilibrium, transpose_solve=equilibrium)
    return z_star, z_dot
