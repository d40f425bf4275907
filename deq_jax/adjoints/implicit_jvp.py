"""The exact derivative in every mode: forward, reverse and any mix of them."""

from typing import Any

import jax
from jaxtyping import PyTree

from deq_jax._config import config
from deq_jax._states import divide, multiply
from deq_jax.adjoints.backward import power_of_two
from deq_jax.adjoints.implicit import (
    OnFailure,
    check_exact,
    check_system,
    exact_pullback,
    solve_linear,
    with_backward_solver,
)
from deq_jax.adjoints.preconditioner import bound
from deq_jax.adjoints.protocol import ForwardResult, Probe, Problem
from deq_jax.solvers import Solver


@config
class ImplicitJVP:
    """The derivative of `Implicit` in every mode: jvp, jacfwd, linearize, hessian, and reverse mode too.

    Forward mode solves the tangent equation (I − J) ż = fₐ ȧ, reverse mode the backward equilibrium of `Implicit`,
    both by `solver`, or by `Implicit`'s default. Each mode asks of f that mode alone: an f with a `while_loop` has a
    forward derivative only, and that is enough for jvp and jacfwd.

    `on_failure`, `linear` and `preconditioner` are those of `Implicit`, in both modes. In forward mode matvec is
    v ↦ v − J v, and the preconditioner is used as it is. In reverse mode `Probe` says how the backward solve ended.
    Forward mode has no cotangent to say it in: by default a tangent solve that fails gives its best iterate without a
    flag, and with another policy its tangent is zero or that of one application of f.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> root = lambda a: deq.fixed_point(lambda z: jnp.cos(a * z), 0.0, adjoint=deq.ImplicitJVP()).value
    >>> first, second = jax.jacfwd(root)(1.0), jax.hessian(root)(1.0)
    >>> bool(abs(first + 0.29747) < 1e-3), bool(abs(second - 0.15334) < 1e-3)
    (True, True)
    """

    solver: Solver | None = None
    on_failure: OnFailure = OnFailure.KEEP
    linear: Any = None
    preconditioner: Any = None

    def keep(self, problem: Problem, forward: ForwardResult) -> ForwardResult:
        return with_backward_solver(self, problem, forward)

    def __post_init__(self):
        check_exact(self)

    def check(self, z0: PyTree, solver: Solver) -> None:
        check_system(self, z0)

    def bind(self, z0: PyTree) -> "ImplicitJVP":
        return bound(self, z0)

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe]:
        return exact_pullback(self, problem, forward, z_bar)

    def pushforward(self, problem: Problem, forward: ForwardResult, inputs_dot: list) -> PyTree:
        # z = f(z, a)  ⇒  ż = fₐ ȧ + J ż: a fixed point too, solved for ż / scale, a power of two a problem.
        _, b = jax.jvp(lambda inputs: problem(forward.z, inputs), (problem.inputs,), (inputs_dot,))
        _, along_z = jax.linearize(problem, forward.z)
        scale = power_of_two(b, problem.batch_ndim, (*problem.axes, *problem.over))
        v, _ = solve_linear(self, along_z, divide(b, scale), problem, forward)
        return multiply(v, scale)
