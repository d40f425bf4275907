"""The exact gradient, by the implicit function theorem, in reverse mode."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._config import MAX_STEPS, check_solver, config
from deq_jax._trace import hoist
from deq_jax.adjoints.base import (
    Found,
    Probe,
    add,
    as_probe,
    at_equilibrium,
    divide,
    inputs_bar,
    power_of_two,
    run_at_equilibrium,
    unfolded,
)
from deq_jax.solvers import Anderson, Solver
from deq_jax.solvers.base import choose, eps_of, leaf_norms, leaves_of, raveler, zeros_from

LOOSEST = 0.1  # that an absolute tolerance may ask for, of a state near zero


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
    experiments/backward_study.py decided. An absolute forward tolerance counts as the relative one that it is at z*,
    and no less is asked than the state's dtype can hold. Reverse mode of any order; for forward mode use `ImplicitJVP`.

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

    def at(self, f, found, inputs, other, solver, batch_ndim, probe):
        backward = backward_solver(self, solver, found.z, batch_ndim)
        return at_equilibrium(self, f, found, inputs, other, backward, batch_ndim, probe)

    def pullback(self, f, found: Found, inputs, z_bar, solver, batch_ndim):
        # z = f(z, a)  ⇒  dz = (I − J)⁻¹ fₐ da, so ā = fₐᵀu with u = z̄ + Jᵀu: a fixed point again, solved by `solver`.
        _, along_z = jax.vjp(lambda z: f(z, inputs), found.z)
        z_bar = unfolded(z_bar, found.z, batch_ndim)
        # The equation is linear: solved for u / scale, a power of two a problem, it keeps the digits of any cotangent.
        scale = power_of_two(z_bar, batch_ndim, f)
        unit = divide(z_bar, scale)
        fun, u_inputs, u_other = hoist(lambda u: add(unit, along_z(u)[0]), unit)
        u, stats = self.run(fun, unit, u_inputs, u_other, solver, batch_ndim, Probe.like(unit, batch_ndim))
        if self.on_failure != OnFailure.KEEP:
            sound = stats.sound if found.stats is None else stats.sound & found.stats.sound
            instead = unit if self.on_failure == OnFailure.ONE_STEP else jax.tree.map(zeros_from, unit)
            u = choose(sound, u, instead)
        return inputs_bar(f, found.z, inputs, u, stats, scale), as_probe(stats)


def backward_solver(adjoint: Any, forward: Solver, z: PyTree, batch_ndim: int) -> Solver:
    """The solver of an adjoint's linear equations at z: its own, or one that is derived from the forward solver."""
    return default_backward(forward, z, batch_ndim) if adjoint.solver is None else adjoint.solver


def default_backward(forward: Solver, z: PyTree | None = None, batch_ndim: int = 0) -> Solver:
    """Anderson as GMRES, with a tenth of the relative tolerance that `forward` had at z, and twice its budget."""
    # Anderson sees the residual of GMRES multiplied by J, so it can grow while GMRES converges. To start a new history
    # then lost backward solves of experiments/backward_study.py, as half the budget did.
    options: Any = dict(max_steps=_twice(forward.max_steps), history=16, growth=10.0)
    if z is None:
        return Anderson(rtol=0.1 * forward.rtol, **options)
    rtol: Any = 0.1 * _relative_tolerance(forward, jax.lax.stop_gradient(z), batch_ndim)
    # f rounds u to the state's dtype. In four dtypes, all solves converged at 1 eps, with an error of 1 to 3 eps. With
    # no floor most ended as STALLED after up to 4 times the products, hardly nearer; at 2 eps the error was double.
    floor = eps_of(z)
    rtol = max(rtol, floor) if isinstance(rtol, float) else jnp.maximum(rtol, floor)
    return Anderson(rtol=rtol, **options)


def _twice(max_steps: Any) -> Any:
    return min(2 * max_steps, MAX_STEPS) if isinstance(max_steps, int) else 2 * jnp.minimum(max_steps, MAX_STEPS // 2)


def _relative_tolerance(solver: Solver, z: PyTree, batch_ndim: int) -> Any:
    """‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ as a relative tolerance; of several leaves the strictest, if it is not zero."""
    if isinstance(solver.atol, int | float) and solver.atol == 0:
        return float(solver.rtol) if isinstance(solver.rtol, int | float) else solver.rtol
    leaves, sizes = leaves_of(z), leaf_norms(z, batch_ndim)(raveler(z, batch_ndim)[0](z))
    cast = lambda number: jnp.asarray(number).astype(sizes.dtype)
    asked = jnp.where(sizes > 0, leaves.each(cast(solver.atol)) / jnp.where(sizes > 0, sizes, 1), jnp.inf)
    return cast(solver.rtol) + jnp.minimum(leaves.over(jnp.min, asked), LOOSEST)


def check_backward_solver(adjoint: Any) -> None:
    if adjoint.solver is not None:
        check_solver(adjoint.solver, f"{type(adjoint).__name__}.solver")
