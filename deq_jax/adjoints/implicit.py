"""The exact gradient, by the implicit function theorem, in reverse mode."""

import enum
from typing import Any

import jax

from deq_jax._config import check_solver, config
from deq_jax._trace import hoist
from deq_jax.adjoints.base import (
    Found,
    Probe,
    add,
    as_probe,
    at_equilibrium,
    divide,
    inputs_bar,
    multiply,
    power_of_two,
    run_at_equilibrium,
)
from deq_jax.solvers import Anderson, Solver
from deq_jax.solvers.base import choose, zeros_from


class OnFailure(enum.IntEnum):
    """What the gradient of a problem is whose forward or backward solve did not converge."""

    KEEP = 0  # what the best backward iterate gives; the statistics carry the flag
    ZERO = 1  # nothing, so that the problem has no say in the parameters' gradient
    ONE_STEP = 2  # that of one application of f at the returned z (as JFB)

    def __repr__(self):
        return f"OnFailure.{self.name}"


@config
class Implicit:
    """The exact gradient by the implicit function theorem (paper Theorem 1), in memory free of depth.

    Through the backward solve are kept its history and the linearization in z; that in the parameters is computed when
    it has ended, for one evaluation of f.

    The backward equilibrium is solved by `solver`, any of the forward ones; None takes Anderson with a longer
    history (the system is linear, so that is GMRES), a tenth of the forward tolerance and twice its budget, as
    experiments/backward_study.py decided. Reverse mode of any order; for forward mode use `ImplicitJVP`.

    `on_failure` decides, problem by problem, about a solve that did not converge, in either direction. The
    default keeps the best iterate, which is finite and no larger than its residual allows, and leaves the flag
    to `Stats.status` and `Probe.status`. Where f itself is NaN or Inf at the returned z, as are its derivatives,
    no policy helps the gradient of shared parameters: mask such a problem's input.

    >>> import deq_jax as deq
    >>> deq.Implicit(deq.Broyden(rtol=1e-6)).solver.rtol
    1e-06
    >>> deq.Implicit(on_failure=deq.OnFailure.ZERO).on_failure.name
    'ZERO'
    """

    solver: Any = None
    on_failure: OnFailure = OnFailure.KEEP

    def __post_init__(self):
        check_backward_solver(self)
        if not isinstance(self.on_failure, OnFailure):
            names = ", ".join(f"OnFailure.{p.name}" for p in OnFailure)
            raise TypeError(f"Implicit.on_failure must be one of {names}; got {self.on_failure!r}")

    run = run_at_equilibrium
    at = at_equilibrium

    def pullback(self, f, found: Found, inputs, z_bar, solver, batch_ndim):
        # z = f(z, a)  ⇒  dz = (I − J)⁻¹ fₐ da, so ā = fₐᵀu with u = z̄ + Jᵀu: a fixed point again.
        _, along_z = jax.vjp(lambda z: f(z, inputs), found.z)
        # Solved for u / scale, a power of two a problem: exact, and tiny cotangents keep their digits.
        scale = power_of_two(z_bar, batch_ndim)

        def backward_cell(u):
            return divide(add(z_bar, along_z(multiply(u, scale))[0]), scale)

        one_step = divide(z_bar, scale)
        backward = default_backward(solver) if self.solver is None else self.solver
        fun, u_inputs, u_other = hoist(backward_cell, one_step)
        probe = Probe.like(one_step, batch_ndim)
        u, stats = self.run(fun, one_step, u_inputs, u_other, backward, batch_ndim, probe)
        if self.on_failure != OnFailure.KEEP:
            sound = stats.converged if found.stats is None else stats.converged & found.stats.converged
            instead = one_step if self.on_failure == OnFailure.ONE_STEP else jax.tree.map(zeros_from, one_step)
            u = choose(sound, u, instead)
        return inputs_bar(f, found.z, inputs, multiply(u, scale), stats), as_probe(stats)


def default_backward(forward: Solver) -> Solver:
    # A step multiplies the residual of GMRES, which falls, by J: where J expands, what Anderson sees grows and all is
    # well. A history begun anew for it lost backward solves of experiments/backward_study.py, as half the budget did.
    return Anderson(rtol=0.1 * forward.rtol, max_steps=2 * forward.max_steps, history=16, growth=10.0)


def check_backward_solver(adjoint: Any) -> None:
    if adjoint.solver is not None:
        check_solver(adjoint.solver, f"{type(adjoint).__name__}.solver")
