"""`check`: raise where a solve has failed, for those who would rather stop than look at `Stats`."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from deq_jax._checks import check_solver
from deq_jax._states import eps_of, split
from deq_jax.solvers import Solver, Stats, Status
from deq_jax.solvers.norms import default_rtol

S = TypeVar("S")
NAMED = 3  # problems that a message names


class SolveError(RuntimeError):
    """A solve has failed: what `check` raises."""


def check(solution: S, solver: Solver | None = None) -> S:
    """The solution itself, or an error where the solve of a problem has failed.

    A solve has failed unless its status is CONVERGED, or STALLED: at the floor of the dtype there is nothing better.

    Under jit the check is made when the program runs, by a callback to the host. The error then is JAX's own
    RuntimeError, which ends with the same message, where the result is first waited for. `jax.export` cannot write a
    program with such a callback.

    Args:
      solution: what `fixed_point`, `solve`, `trajectory` or a layer returns, or its `stats`.
      solver: the solver that was used, if the message should name its tolerances.

    Raises:
      SolveError: a RuntimeError that names the problems, their status, evaluations and residual.
      TypeError: for a value without `stats`.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> z, stats = check(deq.fixed_point(jnp.cos, jnp.zeros(2)))
    >>> solver = deq.Picard(max_steps=3)
    >>> check(deq.fixed_point(jnp.cos, jnp.zeros(2), solver=solver), solver)
    Traceback (most recent call last):
    deq_jax.check.SolveError: the solve failed: MAX_STEPS after 3 evaluations, relative residual 0.37; rtol is ...
    """
    stats = solution if isinstance(solution, Stats) else getattr(solution, "stats", None)
    if not isinstance(stats, Stats):
        raise TypeError(f"check takes a result with stats, such as that of fixed_point; got {type(solution).__name__}")
    if solver is not None:
        check_solver(solver, "solver")
    tolerances = () if solver is None else (_rtol(solver, solution, stats), solver.atol)
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((stats, tolerances))):
        _raise_if_failed(stats, stats.sound, tolerances)
        return solution
    report = functools.partial(jax.debug.callback, _raise_if_failed, stats, stats.sound, tolerances)
    jax.lax.cond(jnp.all(stats.sound), lambda: None, report)
    return solution


def _rtol(solver: Solver, solution: Any, stats: Stats) -> Any:
    """The relative tolerance of the solve, also where the solver leaves it to the dtype of the state."""
    state = split(getattr(solution, "value", stats.residual))[0]
    return default_rtol(eps_of(state)) if solver.rtol is None else solver.rtol


def _raise_if_failed(stats: Stats, sound: Any, tolerances: tuple) -> None:
    stats, sound, tolerances = jax.device_get((stats, sound, tolerances))
    failed = np.argwhere(~sound)
    if not len(failed):
        return

    def describe(index: Any) -> str:
        steps, relative, status = (x[index] for x in (stats.steps, stats.relative_residual, stats.status))
        return f"{Status(int(status)).name} after {steps} evaluations, relative residual {relative:.3g}"

    if stats.status.ndim:
        several = [f"problem {index}: {describe(tuple(index))}" for index in failed[:NAMED].tolist()]
        more = ["…"] * (len(failed) > NAMED)
        message = "; ".join([f"{len(failed)} of {stats.status.size} solves failed", *several, *more])
    else:
        message = f"the solve failed: {describe(())}"
    raise SolveError(message + ("; rtol is {}, atol {}".format(*tolerances) if tolerances else ""))
