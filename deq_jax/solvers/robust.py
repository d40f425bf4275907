"""Robust: several solvers in turn. Each problem moves on to the next one when the present one fails."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._checks import check_solver
from deq_jax._config import config, with_options
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Vec, norm, zero_of
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.newton_krylov import NewtonKrylov
from deq_jax.solvers.protocol import LoopOptions, Renewing, Solver, check_differentiates_nothing, check_sees_all, member

BLOWN_UP = 1e4  # a residual this many times the best one ends a stage


class RobustState(NamedTuple):
    stage: Int[Array, "*batch"]  # index of the solver in charge
    z0: Vec
    g0: Vec  # its residual
    g0_norm: Float[Array, "*batch"]  # inf before it is known
    least: Float[Array, "*batch"]  # the smallest residual so far
    mark: Float[Array, "*batch"]  # the residual that has to be halved
    since: Int[Array, "*batch"]  # evaluations since it was
    next_z: Vec  # where f is to be evaluated next
    inner: tuple  # a state for each solver


@config
class Robust(LoopOptions):
    """Starts cheap and falls back: each problem goes through `stages`, each of which begins at z0.

    The point where one solver went astray is seldom a good start for another. Started from the best iterate of the
    stage before, Newton–Krylov solved fewer of the classical systems of experiments/studies/robustness.py, and no more
    random cells. A problem moves on when its residual is not halved within as many evaluations as `stall` says for its
    stage, or when its residual blows up; the last stage keeps it. The problems of a batch that move on wait for each
    other, so that each stage has a loop of its own (not with a fold, in `compact`, or for an f that communicates: there
    a stage may take some evaluations more or less). The tolerances are those of the composite. Memory is that of all
    stages together, so this is a bad choice where memory is short or where one solver is known to work.

    Broyden comes first because it was cheapest in evaluations as well (experiments/studies/robustness.py); a short
    Anderson stage before it cost evaluations and solved fewer problems.

    >>> [type(stage).__name__ for stage in Robust(rtol=1e-6).stages]
    ['Broyden', 'NewtonKrylov']
    """

    stages: tuple[Solver, ...] = (Broyden(rank=60), NewtonKrylov())
    stall: tuple[int, ...] = (60,)

    recovers = True

    scale_free = True

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "Robust")
        if not isinstance(self.stages, tuple) or not self.stages:
            raise TypeError(f"Robust.stages must be a tuple of solvers, got {self.stages!r}")
        for stage in self.stages:
            check_solver(stage, "a stage of Robust.stages")
            check_sees_all(stage, "Robust")
            check_differentiates_nothing(stage, "Robust")
            if isinstance(stage, Robust):
                raise TypeError(f"Robust.stages cannot hold another Robust: put its stages here, got {stage!r}")
        if not isinstance(self.stall, tuple) or not all(type(n) is int and n > 0 for n in self.stall):
            raise TypeError(f"Robust.stall must be a tuple of ints > 0, got {self.stall!r}")
        if len(self.stall) < len(self.stages) - 1:
            raise ValueError(f"Robust.stall must have an entry for all stages but the last, got {self.stall!r}")

    @property
    def patience(self) -> int:
        """Evaluations that may pass without a better residual."""
        return max(member(stage, "patience") for stage in self.stages) + max((0, *self.stall))

    @property
    def flat(self) -> bool:
        """Whether a stage works on arrays alone."""
        return any(member(stage, "flat") for stage in self.stages)

    @property
    def may_begin_apart(self) -> bool:
        return all(member(stage, "may_begin_apart") for stage in self.stages)

    def init(self, z: Vec) -> RobustState:
        zero, none = zeros_like(z), zero_of(z)
        count = none.astype(jnp.int32)
        # Inside shard_map, what the branches of a shard's own cond return belongs to that shard: counts, too.
        nothing = jnp.any(none > 0)
        own = lambda leaf: leaf + nothing.astype(leaf.dtype) if leaf.ndim == 0 else leaf
        inner = jax.tree.map(own, tuple(stage.init(z) for stage in self.stages))
        unknown = none + jnp.inf
        return RobustState(count, z, zero, unknown, unknown, unknown, count, z, inner)

    def resume(self, state: RobustState) -> RobustState:
        """From the first stage again, with what each of them remembers."""
        resumed = [member(stage, "resume")(s) for stage, s in zip(self.stages, state.inner, strict=True)]
        return self.init(zeros_like(state.z0))._replace(inner=tuple(resumed))

    def can_backtrack(self, state: RobustState) -> Bool[Array, "*batch"]:
        return state.stage >= 0

    def next_point(self, state: RobustState, z: Vec) -> Vec:
        return state.next_z

    @property
    def parts(self) -> "tuple[Part, ...]":
        return tuple(Part(self, index) for index in range(len(self.stages)))

    def update(self, residual: Vec, state: RobustState, z: Vec) -> tuple[Vec, RobustState]:
        state, switch = self.watch(residual, state, z)
        # The next stage sees z0 and its residual, both known: no evaluation is spent on the change.
        here, g = choose(switch, (state.z0, state.g0), (z, residual))
        next_z, inner = self._run_stages(state.stage, switch, state.inner, here, g)
        return next_z - z, state._replace(next_z=next_z, inner=inner)

    def watch(
        self, residual: Vec, state: RobustState, z: Vec, where: Bool[Array, "*batch"] | bool = True
    ) -> tuple[RobustState, Bool[Array, "*batch"]]:
        """(the state with what one more residual says, where the next stage begins), in the problems of `where`."""
        g_norm = norm(residual)
        first = state.g0_norm == jnp.inf
        z0, g0, g0_norm = choose(first, (z, residual, g_norm), (state.z0, state.g0, state.g0_norm))
        # So far out that rounding in z is more than the whole residual at z0, g says nothing; see (2) of `stopping`.
        lost = ~first & (float(jnp.finfo(z.dtype).eps) * norm(z) > g0_norm)
        least = jnp.where(where & ~lost & (g_norm < state.least), g_norm, state.least)  # false for NaN
        halved = where & ~lost & (g_norm <= 0.5 * state.mark)
        since = jnp.where(halved, 0, jnp.where(where, state.since + 1, state.since))

        switch = where & self._has_failed(state, g_norm, lost, least, since)
        stage = state.stage + switch.astype(jnp.int32)
        since = jnp.where(switch, 0, since)
        mark = jnp.where(switch, jnp.inf, jnp.where(halved, g_norm, state.mark))
        return RobustState(stage, z0, g0, g0_norm, least, mark, since, state.next_z, state.inner), switch

    def _has_failed(
        self, state: RobustState, g_norm: Array, lost: Array, least: Array, since: Array
    ) -> Bool[Array, "*batch"]:
        """Where the stage in charge has failed, and there is another one."""
        last = len(self.stages) - 1
        limit = of_stage((*self.stall[:last], 0), state.stage)
        recovers = of_stage([member(stage, "recovers") for stage in self.stages], state.stage)
        can_backtrack = [
            member(stage, "can_backtrack")(inner) & (state.stage == i)
            for i, (stage, inner) in enumerate(zip(self.stages, state.inner, strict=True))
        ]
        can_backtrack = functools.reduce(jnp.logical_or, can_backtrack)
        ended = jnp.where(jnp.isfinite(g_norm), g_norm > BLOWN_UP * least, ~can_backtrack)
        failed = (since >= limit) | ((lost | ended) & ~recovers)
        return failed & (state.stage < last) & (least < jnp.inf)

    def _run_stages(self, stage: Array, enters: Array, inner: tuple, z: Vec, g: Vec) -> tuple[Vec, tuple]:
        """(next_z, inner) after one update of each solver that is in charge of a problem."""
        next_z, states = z, []
        for i, old in enumerate(inner):
            solver, in_charge = stage_of(self, i), stage == i
            begins = in_charge & enters

            def run(old, solver=solver, begins=begins):
                fresh = lambda: choose(begins, solver.init(z), old)
                state = jax.lax.cond(jnp.any(begins), fresh, lambda: old)
                return updated(solver, solver.update, g, state, z)

            point, new = jax.lax.cond(jnp.any(in_charge), run, lambda old: (z, old), old)
            next_z = choose(in_charge, point, next_z)
            states.append(new)
        return next_z, tuple(states)


def stage_of(composite: "Robust | Part", index: int) -> Solver:
    """One of the stages, with the tolerances of the composite."""
    return with_options(composite.stages[index], rtol=composite.rtol, atol=composite.atol)


def updated(solver: Solver, update: Callable, g: Vec, state: Any, z: Vec) -> tuple[Vec, Any]:
    """(the next point, the state) of one solver."""
    step, state = update(g, state, z)
    return member(solver, "next_point")(state, z + step), state


@jax.tree_util.register_pytree_node_class
class Part(Renewing):
    """One stage of a `Robust`, for a loop of its own. Its state is that of the whole."""

    recovers = scale_free = True

    def __init__(self, whole: Robust, index: int):
        self.whole, self.index = whole, index
        self.rtol, self.atol, self.max_steps = whole.rtol, whole.atol, whole.max_steps
        self.norm, self.min_steps = whole.norm, whole.min_steps
        self.stages, self.patience, self.flat = whole.stages, whole.patience, whole.flat
        self.init, self.can_backtrack, self.next_point = whole.init, whole.can_backtrack, whole.next_point

    def tree_flatten(self) -> tuple[tuple[Robust], int]:
        return (self.whole,), self.index

    @classmethod
    def tree_unflatten(cls, index: int, whole: tuple[Robust]) -> "Part":
        return cls(*whole, index)

    @property
    def solver(self) -> Solver:
        return stage_of(self, self.index)

    def takes(self, state: RobustState) -> Bool[Array, "*batch"]:
        return state.stage == self.index

    def begun(self, state: RobustState) -> RobustState:
        """The stage begins at z0, whose residual is known, in the problems that have come to it."""
        here, old = self.takes(state), state.inner[self.index]
        fresh = choose(here, self.solver.init(state.z0), old)
        next_z, new = updated(self.solver, self.solver.update, state.g0, fresh, state.z0)
        return self._replaced(state, choose(~here, old, new), choose(here, next_z, state.next_z))

    def round(self, residual: Vec, state: RobustState, z: Vec) -> tuple[Vec, RobustState]:
        state, _ = self.whole.watch(residual, state, z, self.takes(state))
        update = member(self.solver, "round") or self.solver.update
        next_z, inner = updated(self.solver, update, residual, state.inner[self.index], z)
        return next_z - z, self._replaced(state, inner, next_z)

    def is_full(self, state: RobustState) -> Bool[Array, "*#batch"] | bool:
        return member(self.solver, "is_full")(state.inner[self.index])

    def renewed(self, state: RobustState) -> RobustState:
        inner = member(self.solver, "renewed")(state.inner[self.index])
        return self._replaced(state, inner, member(self.solver, "next_point")(inner, state.next_z))

    def _replaced(self, state: RobustState, new: Any, next_z: Vec) -> RobustState:
        inner = (*state.inner[: self.index], new, *state.inner[self.index + 1 :])
        return state._replace(next_z=next_z, inner=inner)


def of_stage(values: Sequence, stage: Int[Array, "*batch"]) -> Array:
    """values[stage]. (Indexing by an array that is sharded over Explicit axes needs the mesh in the context.)"""
    return functools.reduce(
        lambda chosen, i: jnp.where(stage == i, values[i], chosen), range(1, len(values)), jnp.asarray(values[0])
    )
