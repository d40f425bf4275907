"""The exact derivative in every mode: forward, reverse and any mix of them."""

import jax
from jaxtyping import PyTree

from deq_jax._config import config
from deq_jax._states import add, divide, multiply
from deq_jax.adjoints.backward import backward_cell, power_of_two, solve_backward
from deq_jax.adjoints.implicit import check_backward_solver, solve_linear, with_backward_solver
from deq_jax.adjoints.protocol import ForwardResult, Probe, Problem
from deq_jax.solvers import Solver


@config
class ImplicitJVP:
    """The derivative of `Implicit` in every mode: jvp, jacfwd, linearize, hessian, and reverse mode too.

    Forward mode solves the tangent equation (I − J) ż = fₐ ȧ, reverse mode the backward equilibrium of `Implicit`,
    both by `solver`, or by `Implicit`'s default. Each mode asks of f that mode alone: an f with a `while_loop` has a
    forward derivative only, and that is enough for jvp and jacfwd.

    In reverse mode `Probe` says how the backward solve ended. Forward mode has no cotangent to say it in: a tangent
    solve that fails gives its best iterate without a flag. There is no policy for a solve that failed.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> root = lambda a: deq.fixed_point(lambda z: jnp.cos(a * z), 0.0, adjoint=deq.ImplicitJVP()).value
    >>> first, second = jax.jacfwd(root)(1.0), jax.hessian(root)(1.0)
    >>> bool(abs(first + 0.29747) < 1e-3), bool(abs(second - 0.15334) < 1e-3)
    (True, True)
    """

    solver: Solver | None = None

    def __post_init__(self):
        check_backward_solver(self)

    def keep(self, problem: Problem, forward: ForwardResult) -> ForwardResult:
        return with_backward_solver(self, problem, forward)

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        solve = lambda unit: solve_linear(self, backward_cell(problem, forward.z, unit), unit, problem, forward)
        inputs_bar, stats = solve_backward(problem, forward.z, z_bar, solve)
        return inputs_bar, Probe.of(stats)

    def pushforward(self, problem: Problem, forward: ForwardResult, inputs_dot: list) -> PyTree:
        # z = f(z, a)  ⇒  ż = fₐ ȧ + J ż: a fixed point too, solved for ż / scale, a power of two a problem.
        _, b = jax.jvp(lambda inputs: problem(forward.z, inputs), (problem.inputs,), (inputs_dot,))
        _, along_z = jax.linearize(problem, forward.z)
        scale = power_of_two(b, problem.batch_ndim, (*problem.axes, *problem.over))
        unit = divide(b, scale)
        v, _ = solve_linear(self, lambda v: add(unit, along_z(v)), unit, problem, forward)
        return multiply(v, scale)
