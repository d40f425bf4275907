"""Robust: several solvers in turn, each problem moving on to the next when the present one fails."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._config import Budget, check_sees_all, check_solver, check_stopping, config
from deq_jax.solvers.base import can_backtrack, choose, next_point, norm, zeros_from
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.newton_krylov import NewtonKrylov

BLOWN_UP = 1e4  # a residual this many times the best one ends a stage


class RobustState(NamedTuple):
    stage: Int[Array, "*batch"]  # index of the solver in charge
    start: Float[Array, "*batch dim"]
    start_g: Float[Array, "*batch dim"]
    first: Float[Array, "*batch"]  # ‖start_g‖; inf before it is known
    least: Float[Array, "*batch"]  # the least residual so far
    mark: Float[Array, "*batch"]  # the residual that has to be halved
    since: Int[Array, "*batch"]  # evaluations since it was
    ask: Float[Array, "*batch dim"]  # where f is to be evaluated next
    inner: tuple  # a state for each solver


@config
class Robust:
    """Starts cheap and falls back: each problem goes through `stages`, each of which begins at z0.

    Where one solver went astray is seldom a start for another: from the best iterate of the stage before,
    Newton–Krylov solved fewer of the classical systems of experiments/robustness_study.py, and no more random cells.
    A problem moves on when its residual is not halved within as many evaluations as `stall` says for its stage,
    or blows up; the last stage keeps it. Only the stages in use are computed; the tolerances are those of the
    composite. Memory is that of all stages together, so it is a bad choice where memory is short or where one
    solver is known to work.

    Broyden comes first because it was cheapest in evaluations as well (experiments/robustness_study.py); a short
    Anderson stage before it cost evaluations and solved fewer problems.

    >>> [type(stage).__name__ for stage in Robust(rtol=1e-6).stages]
    ['Broyden', 'NewtonKrylov']
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: Budget = 100
    stages: tuple[Any, ...] = (Broyden(rank=60), NewtonKrylov())
    stall: tuple[int, ...] = (60,)

    recovers = True

    scale_free = True

    def __post_init__(self):
        check_stopping(self)
        if not isinstance(self.stages, tuple) or not self.stages:
            raise TypeError(f"Robust.stages must be a tuple of solvers, got {self.stages!r}")
        for stage in self.stages:
            check_solver(stage, "a stage of Robust.stages")
            check_sees_all(stage, "Robust")
            if isinstance(stage, Robust):
                raise TypeError(f"Robust.stages cannot hold another Robust: put its stages here, got {stage!r}")
        if not isinstance(self.stall, tuple) or not all(type(n) is int and n > 0 for n in self.stall):
            raise TypeError(f"Robust.stall must be a tuple of ints > 0, got {self.stall!r}")
        if len(self.stall) < len(self.stages) - 1:
            raise ValueError(f"Robust.stall must have an entry for all stages but the last, got {self.stall!r}")

    @property
    def patience(self) -> int:
        """Evaluations that may pass without a better residual."""
        return max(getattr(stage, "patience", 0) for stage in self.stages) + max((0, *self.stall))

    def init(self, z: Float[Array, "*batch dim"]) -> RobustState:
        zero = zeros_from(z)
        none, count = zero[..., 0], zero[..., 0].astype(jnp.int32)
        # Inside shard_map, what the branches of a shard's own cond return belongs to that shard: counts, too.
        nothing = jnp.any(none > 0)
        own = lambda leaf: leaf + nothing.astype(leaf.dtype) if leaf.ndim == 0 else leaf
        inner = jax.tree.map(own, tuple(stage.init(z) for stage in self.stages))
        unknown = none + jnp.inf
        return RobustState(count, z, zero, unknown, unknown, unknown, count, z, inner)

    def resume(self, state: RobustState) -> RobustState:
        """From the first stage again, with what each of them remembers."""
        resumed = [getattr(stage, "resume", lambda s: s)(s) for stage, s in zip(self.stages, state.inner, strict=True)]
        return self.init(zeros_from(state.start))._replace(inner=tuple(resumed))

    def can_backtrack(self, state: RobustState) -> Bool[Array, "*batch"]:
        return state.stage >= 0

    def next_point(self, state: RobustState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return state.ask

    def update(
        self, residual: Float[Array, "*batch dim"], state: RobustState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], RobustState]:
        g_norm, last = norm(residual), len(self.stages) - 1
        new = state.first == jnp.inf
        start = jnp.where(new[..., None], z, state.start)
        start_g = jnp.where(new[..., None], residual, state.start_g)
        first = jnp.where(new, g_norm, state.first)
        # As in `solve`: so far out that rounding in z is more than the whole residual at the start, g says nothing.
        lost = ~new & (float(jnp.finfo(z.dtype).eps) * norm(z) > first)
        least = jnp.where(~lost & (g_norm < state.least), g_norm, state.least)  # false for NaN
        halved = ~lost & (g_norm <= 0.5 * state.mark)
        since = jnp.where(halved, 0, state.since + 1)

        limit = jnp.asarray((*self.stall[:last], 0), jnp.int32)[state.stage]
        safe = jnp.asarray([getattr(stage, "recovers", False) for stage in self.stages])[state.stage]
        backs = [
            can_backtrack(stage, old, new) & (state.stage == i)
            for i, (stage, old) in enumerate(zip(self.stages, state.inner, strict=True))
        ]
        ended = jnp.where(jnp.isfinite(g_norm), g_norm > BLOWN_UP * least, ~functools.reduce(jnp.logical_or, backs))
        blown = (lost | ended) & ~safe
        switch = ((since >= limit) | blown) & (state.stage < last) & (least < jnp.inf)
        stage = state.stage + switch.astype(jnp.int32)
        since = jnp.where(switch, 0, since)
        mark = jnp.where(switch, jnp.inf, jnp.where(halved, g_norm, state.mark))

        # The next stage sees z0 and its residual, both known: no evaluation is spent on the change.
        here = jnp.where(switch[..., None], start, z)
        g = jnp.where(switch[..., None], start_g, residual)
        ask, inner = here, []
        for i, (solver, old) in enumerate(zip(self.stages, state.inner, strict=True)):
            solver = dataclasses.replace(solver, rtol=self.rtol, atol=self.atol)
            mine = stage == i
            enters = mine & switch

            def run(old, solver=solver, enters=enters):
                fresh = lambda: choose(enters, solver.init(here), old)
                new = jax.lax.cond(jnp.any(enters), fresh, lambda: old)
                step, new = solver.update(g, new, here)
                return next_point(solver, new, here + step), new

            point, new = jax.lax.cond(jnp.any(mine), run, lambda old: (here, old), old)
            ask = jnp.where(mine[..., None], point, ask)
            inner.append(new)
        state = RobustState(stage, start, start_g, first, least, mark, since, ask, tuple(inner))
        return ask - z, state
