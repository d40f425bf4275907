"""The iterates on the way to a fixed point: residual traces, snapshots, and losses on several iterates."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._arrays import one_hot
from deq_jax._checks import check_count
from deq_jax._config import plain_at_runtime, with_suggestions
from deq_jax._hoisting import zero_residuals
from deq_jax._states import choose, join, split
from deq_jax._trace import flag
from deq_jax.adjoints import Adjoint, Implicit, Phantom, Probe
from deq_jax.halves import attach, solve
from deq_jax.solvers import Anderson, Evaluation, Solver, Stats, Status
from deq_jax.solvers.protocol import check_sees_all

Z = TypeVar("Z")


@plain_at_runtime
class Trajectory(NamedTuple, Generic[Z]):
    """What `trajectory` returns. Gradients flow through `value` and `states`."""

    value: Z  # as z0
    stats: Stats  # of the value
    states: tuple[Z, ...]  # one for each entry of `at`, each as z0
    state_stats: tuple[Stats, ...]  # one for each state: its own residual, and the evaluations spent to measure it


def trajectory(
    f: Callable[..., Any],
    z0: Z,
    *args: Any,
    at: int | Sequence[int],
    solver: Solver = Anderson(),  # noqa: B008  frozen
    adjoint: Adjoint = Implicit(),  # noqa: B008
    correction: Adjoint | Sequence[Adjoint] = Phantom(),  # noqa: B008
    batch_ndim: int = 0,
    axis_name: Hashable | tuple[Hashable, ...] | None = None,
    probe: Probe | None = None,
) -> Trajectory[Z]:
    """`fixed_point`, and the iterates after each number of steps in `at`, so that a loss can use them all.

    There are always len(at) states, so a loss over them compiles once. If a problem had stopped by then, or if its f
    was not finite there, its state is the z that it returns. With `Picard` the state at k is f applied k times to z0.
    The carried leaves of a state are those with which f was evaluated there.

    Args:
      f, z0, *args, solver, adjoint, batch_ndim, axis_name, probe: as for `fixed_point`.
      at: increasing numbers of steps. 0 is z0. Each must be below the solver's `max_steps`, because the state after k
        steps is seen by evaluation k + 1.
      correction: how to differentiate the states, each as if it were the fixed point: one adjoint for all, or one for
        each. Inexact ones are meant, `Phantom` or `JFB`, because they use f near the state alone.

    Returns:
      Trajectory(value, stats, states, state_stats).

    Raises:
      TypeError, ValueError: as `fixed_point`; for an `at` or a `correction` that does not fit.

    Source: Bai, Geng, Savani & Kolter (2022), "Deep Equilibrium Optical Flow Estimation". Its sparse fixed-point
    correction is this function with `fixed_point_correction`.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, x: 0.5 * jnp.cos(z) + x
    >>> def loss(x):
    ...     z, _, states, _ = deq.trajectory(cell, jnp.zeros(3), x, at=(1, 2), solver=deq.Picard())
    ...     return deq.fixed_point_correction([jnp.sum((s - 1) ** 2) for s in (*states, z)])
    >>> jax.grad(loss)(jnp.arange(3.0)).shape
    (3,)
    """
    at = _check_at(at)
    if isinstance(solver.max_steps, int) and at[-1] >= solver.max_steps:
        raise ValueError(
            f"at={at} asks for the state after {at[-1]} steps, which evaluation {at[-1] + 1} is the first to see, "
            f"and {type(solver).__name__}.max_steps={solver.max_steps}: take max_steps >= {at[-1] + 1}"
        )
    check_sees_all(solver, "trajectory")
    corrections = tuple(correction) if isinstance(correction, Sequence) else (correction,) * len(at)
    if len(corrections) != len(at):
        raise ValueError(f"correction must be one adjoint, or one for each of at={at}; got {len(corrections)}")

    options: dict[str, Any] = dict(solver=solver, batch_ndim=batch_ndim, axis_name=axis_name)
    solved = solve(f, z0, *args, fold=Snapshots(at), **options)
    value = attach(f, solved.value, *args, adjoint=adjoint, found=solved, probe=probe, **options)

    states, state_stats = [], []
    for k, snapshot, mode in zip(at, solved.folded, corrections, strict=True):
        there = (k < solved.stats.steps) & jnp.isfinite(snapshot.residual)
        z = choose(there, snapshot.z, join(split(solved.value)[0], solved.given))
        states.append(attach(f, z, *args, adjoint=mode, **options))
        state_stats.append(_stats_at(k, there, snapshot, solved.stats))
    return Trajectory(value, solved.stats, tuple(states), tuple(state_stats))


def _stats_at(k: int, there: Array, snapshot: "Snapshot", end: Stats) -> Stats:
    ended = end.steps <= k + 1
    return Stats(
        jnp.minimum(end.steps, k + 1),
        jnp.where(there, snapshot.residual, end.residual),
        jnp.where(there, snapshot.relative_residual, end.relative_residual),
        jnp.where(ended, end.status, Status.MAX_STEPS),
    )


def fixed_point_correction(losses: Sequence[Any] | Array, gamma: float = 0.8) -> Array:
    """Σₖ γⁿ⁻ᵏ⁻¹ lossesₖ over n losses in the order of the trajectory. The last one, at the equilibrium, has weight 1.

    Source: Bai et al. (2022), see `trajectory`, after the sequence loss of RAFT (Teed & Deng 2020), γ = 0.8.

    >>> import jax.numpy as jnp
    >>> float(fixed_point_correction([jnp.array(4.0), jnp.array(2.0), jnp.array(1.0)], gamma=0.5))
    3.0
    """
    if len(losses) == 0:
        raise ValueError("fixed_point_correction needs at least one loss")
    n = len(losses)
    return jnp.asarray(sum(gamma ** (n - k - 1) * loss for k, loss in enumerate(losses)))


# ---- folds -------------------------------------------------------------------------------------------------


@with_suggestions
@dataclasses.dataclass(frozen=True)
class ResidualTrace:
    """A fold that records the relative residual of each problem at each evaluation, `[*batch, size]`.

    Entry k belongs to evaluation k; entry 0 is the residual of z0. It is NaN for an evaluation that the problem never
    had, so that means and plots leave it out (`jnp.nanmean`), and inf if f was not finite. Evaluations after the first
    `size` are dropped. XLA removes the buffer if nothing reads it. With `axis_name` all devices of the axis hold equal
    residuals, in the type of values that may differ: `jax.lax.pmax` returns them as one.

    `jax.debug_nans` would raise on that NaN, so the fold then writes inf instead; under `jax.debug_infs` it writes the
    largest finite number instead of inf. The flags are read while tracing: a program compiled before they were set
    still writes NaN.

    Your own fold is any object with pure methods `init` and `update` on arrays. This one returns the largest change of
    any entry by f during the solve:

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> class LargestChange:
    ...     def init(self, z0, batch_ndim):
    ...         return jnp.zeros(())
    ...     def update(self, largest, seen):
    ...         return jnp.maximum(largest, jnp.max(jnp.abs(seen.fz - seen.z)))
    >>> solved = jax.jit(lambda z0: deq.solve(jnp.cos, z0, fold=LargestChange()))(jnp.zeros(2))
    >>> float(solved.folded)
    1.0

    And `ResidualTrace` itself:

    >>> solved = deq.solve(jnp.cos, jnp.zeros(2), solver=deq.Picard(rtol=0.1), fold=ResidualTrace(10))
    >>> [f"{residual:.2f}" for residual in solved.folded]
    ['1.00', '0.85', '0.37', '0.31', '0.18', '0.13', '0.08', 'nan', 'nan', 'nan']
    """

    size: int

    def __post_init__(self):
        check_count("ResidualTrace.size", self.size, 1)

    def init(self, z0: PyTree, batch_ndim: int) -> Float[Array, "*batch size"]:
        zero = zero_residuals(z0, batch_ndim)[..., None]
        return jnp.repeat(zero, self.size, axis=-1) + _marker(zero.dtype, jnp.nan)

    def update(self, folded: Float[Array, "*batch size"], seen: Evaluation) -> Float[Array, "*batch size"]:
        inf = _marker(folded.dtype, jnp.inf)
        now = jnp.where(jnp.isfinite(seen.residual), seen.relative_residual, inf)[..., None]
        here = seen.running[..., None] & (one_hot(seen.step, self.size, folded) > 0)
        return jnp.where(here, now, folded)


class Snapshot(NamedTuple):
    """An iterate, and its residuals: inf until it is reached, or under `jax.debug_infs` the largest finite number."""

    z: PyTree  # as z0
    residual: Float[Array, "*batch"]
    relative_residual: Float[Array, "*batch"]


@with_suggestions
@dataclasses.dataclass(frozen=True)
class Snapshots:
    """A fold that records a `Snapshot` of the iterate after each of the given numbers of steps.

    If the solve ends earlier, the snapshot is that of the last iterate it evaluated. (`trajectory` has the returned
    value there, and makes all states differentiable.) Memory is len(at) states. The fold must see every iterate, so
    `solve` refuses solvers with `test_every` above 1.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> solved = deq.solve(jnp.cos, jnp.zeros(()), solver=deq.Picard(), fold=Snapshots(at=(0, 1, 2)))
    >>> [round(float(s.z), 3) for s in solved.folded]
    [0.0, 1.0, 0.54]
    """

    at: Any  # increasing numbers of steps, or one number; a tuple after `__post_init__`
    sees_all: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "at", _check_at(self.at))

    def init(self, z0: PyTree, batch_ndim: int) -> tuple[Snapshot, ...]:
        zero = zero_residuals(z0, batch_ndim)
        unseen = zero + _marker(zero.dtype, jnp.inf)
        return (Snapshot(z0, unseen, unseen),) * len(self.at)

    def update(self, folded: tuple[Snapshot, ...], seen: Evaluation) -> tuple[Snapshot, ...]:
        new = Snapshot(seen.z, seen.residual, seen.relative_residual)
        keep = lambda k, old: jax.tree.map(lambda new, old: jnp.where(seen.step <= k, new, old), new, old)
        return tuple(keep(k, old) for k, old in zip(self.at, folded, strict=True))


def _marker(dtype: Any, mark: float) -> float:
    """The value for an absent residual: the first of NaN, inf and max, from `mark` on, that no debug flag forbids."""
    if math.isnan(mark) and flag("jax_debug_nans"):
        mark = jnp.inf
    if mark == jnp.inf and flag("jax_debug_infs"):
        mark = float(jnp.finfo(dtype).max)
    return mark


def _check_at(at: Any) -> tuple[int, ...]:
    """`at` as a tuple, or ValueError."""
    steps = tuple(at) if isinstance(at, list | tuple | range) else (at,)
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in steps)
    if not steps or not whole or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"at must be increasing numbers of steps, ints >= 0 such as (2, 5); got {at!r}")
    return steps
