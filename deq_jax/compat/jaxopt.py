"""jaxopt's fixed-point and root solvers, and its implicit differentiation, over this library.

For programs that were written for jaxopt, which is archived: `from deq_jax.compat.jaxopt import AndersonAcceleration`.
Signatures and meanings are jaxopt's (0.8.5): `run(init_params, *args, **kwargs) -> (params, state)`, one step by
`init_state` and `update`, `tol` an absolute tolerance of the norm over all leaves, `iter_num` the evaluations that were
made until it was met. What differs:

- `run` returns the params at which `state.error` was measured; where the solve failed, the best of them.
- `state.status` says why a solve ended, as a `deq_jax.Status`, and a solve ends where rounding hides all progress.
- A closure over traced arrays is differentiable, and so is a derivative.
- The solvers are this library's. `ridge` is relative to the scale of the problem. `unroll` and the options of jaxopt's
  line search are accepted and not read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax import solvers
from deq_jax._states import ravel
from deq_jax.compat.implicit_diff import custom_fixed_point, custom_root, root_jvp, root_vjp
from deq_jax.compat.iterative import IterativeSolver, OptStep, State, with_aux

__all__ = [
    "AndersonAcceleration",
    "AndersonWrapper",
    "Broyden",
    "FixedPointIteration",
    "OptStep",
    "custom_fixed_point",
    "custom_root",
    "root_jvp",
    "root_vjp",
]


@dataclasses.dataclass(eq=False)
class FixedPointIteration(IterativeSolver):
    """x ← f(x), as jaxopt's; `Picard` of this library.

    >>> import jax.numpy as jnp
    >>> params, state = FixedPointIteration(lambda x, a: jnp.cos(a * x)).run(jnp.array(0.5), 1.0)
    >>> f"{params:.4f}", bool(state.error <= 1e-5)
    ('0.7391', True)
    """

    fixed_point_fun: Callable
    maxiter: int = 100
    tol: float = 1e-5

    @property
    def solver_of_ours(self) -> solvers.Picard:
        return solvers.Picard(**self.loop_options)


@dataclasses.dataclass(eq=False)
class AndersonAcceleration(IterativeSolver):
    """Anderson acceleration, as jaxopt's; `Anderson` of this library.

    >>> import jax.numpy as jnp
    >>> solver = AndersonAcceleration(lambda x, a: jnp.cos(a * x), history_size=3)
    >>> bool(solver.run(jnp.array(0.5), 1.0).state.iter_num < 10)
    True
    """

    fixed_point_fun: Callable
    history_size: int = 5
    mixing_frequency: int = 1
    beta: float = 1.0
    maxiter: int = 100
    tol: float = 1e-5
    ridge: float = 0.0

    @property
    def solver_of_ours(self) -> solvers.Anderson:
        options: Any = self.loop_options | dict(history=self.history_size, damping=self.beta, ridge=self.ridge)
        return solvers.Anderson(**options, test_every=self.mixing_frequency)


@dataclasses.dataclass(eq=False)
class AndersonWrapper(IterativeSolver):
    """Anderson acceleration of another solver with jaxopt's interface, as jaxopt's own.

    It accelerates a map that consists of `mixing_frequency` steps of the solver. After each application of this map the
    iterates are mixed, and the solver starts anew at the mixed point.
    """

    solver: Any
    history_size: int = 5
    mixing_frequency: int | None = None
    beta: float = 1.0
    ridge: float = 0.0

    def __post_init__(self):
        self.maxiter, self.tol = self.solver.maxiter, self.solver.tol
        self.mixing_frequency = self.mixing_frequency or self.history_size
        self.reference_signature = self.solver.reference_signature
        self.optimality_fun = self.solver.optimality_fun

    @property
    def solver_of_ours(self) -> solvers.Anderson:
        return solvers.Anderson(history=self.history_size, damping=self.beta, ridge=self.ridge)

    def init_state(self, init_params: Any, *args: Any, **kwargs: Any) -> State:
        state = self.solver.init_state(init_params, *args, **kwargs)
        memory = init_params, self.solver_of_ours.init(ravel(init_params))
        return State(jnp.asarray(0), state.error, None, jnp.asarray(0), memory, None, state)

    def update(self, params: Any, state: State, *args: Any, **kwargs: Any) -> OptStep:
        value, inner = self.solver.update(params, state.solver_state, *args, **kwargs)
        count = state.iter_num + 1
        start, memory = state.memory

        def mix() -> tuple:
            new, mixed = self.stepped(start, value, state._replace(iter_num=0, memory=memory))
            return new, self.solver.init_state(new, *args, **kwargs), (new, mixed.memory)

        # All steps from one mix to the next are one map, for the solver begins anew at each.
        go_on = lambda: (value, inner, (start, memory))
        mixes = (count % self.mixing_frequency == 0) & (inner.error > self.tol)
        params, solver_state, memory = jax.lax.cond(mixes, mix, go_on)
        return self.reported(OptStep(params, State(count, inner.error, None, count, memory, None, solver_state)))

    def run(self, init_params: Any, *args: Any, **kwargs: Any) -> OptStep:
        return OptStep(*self.differentiably(self.loop)(init_params, *args, **kwargs))


@dataclasses.dataclass(eq=False)
class Broyden(IterativeSolver):
    """A root of `fun`, as jaxopt's; `Broyden` of this library for x ↦ x − gamma · fun(x).

    A `stepsize` above zero is the damping. `history_size` is the rank; without one it is at most 40.

    >>> import jax.numpy as jnp
    >>> params, state = Broyden(lambda x, a: x**2 - a, tol=1e-5).run(jnp.array(1.0), 2.0)
    >>> f"{params:.4f}"
    '1.4142'
    """

    fun: Callable
    maxiter: int = 500
    tol: float = 1e-3
    stepsize: float = 0.0
    linesearch: str = "backtracking"
    stop_if_linesearch_fails: bool = False
    condition: str = "wolfe"
    maxls: int = 15
    decrease_factor: float = 0.8
    increase_factor: float = 1.5
    max_stepsize: float = 1.0
    min_stepsize: float = 1e-6
    history_size: int | None = None
    gamma: float = 1.0

    def __post_init__(self):
        if callable(self.stepsize):
            raise ValueError(f"Broyden.stepsize must be a number, got {self.stepsize!r}: rules are not supported")
        self.unit = self.gamma

    @property
    def solver_of_ours(self) -> solvers.Broyden:
        options: Any = self.loop_options | dict(rank=self.history_size or min(self.maxiter, 40))
        if self.stepsize > 0:
            return solvers.Broyden(**options, damping=self.stepsize, line_search=0)
        # An iteration of jaxopt's may evaluate several times.
        return solvers.Broyden(**(options | dict(max_steps=2 * self.maxiter)))

    def cell(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, aux = with_aux(self, params, *args, **kwargs)
        return jax.tree.map(lambda x, F: x - self.gamma * F, params, value), aux

    def optimality_fun(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        return with_aux(self, params, *args, **kwargs)[0]
