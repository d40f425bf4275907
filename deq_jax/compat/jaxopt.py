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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax import solvers
from deq_jax._states import Layout, ravel, subtract
from deq_jax._vectors import norm
from deq_jax.adjoints import Unroll
from deq_jax.compat.implicit_diff import (
    custom_fixed_point as custom_fixed_point,
)
from deq_jax.compat.implicit_diff import (
    custom_root as custom_root,
)
from deq_jax.compat.implicit_diff import (
    linear_adjoint,
)
from deq_jax.compat.implicit_diff import (
    root_jvp as root_jvp,
)
from deq_jax.compat.implicit_diff import (
    root_vjp as root_vjp,
)
from deq_jax.fixed_point import fixed_point
from deq_jax.halves import attach, solve


class OptStep(NamedTuple):
    """What `run` and `update` return."""

    params: Any
    state: Any


class State(NamedTuple):
    """The state of all solvers here."""

    iter_num: Any  # evaluations
    error: Any  # ‖f(x) − x‖₂, or ‖F(x)‖₂, of the evaluation before
    aux: Any = None
    num_fun_eval: Any = 0
    memory: Any = None  # of this library's solver
    status: Any = None  # after `run`: a `deq_jax.Status`
    solver_state: Any = None  # of a wrapped solver


class IterativeSolver:
    """What all solvers here have in common: `run`, and `init_state` and `update` for loops of your own."""

    maxiter: int
    tol: float
    verbose: bool | int
    implicit_diff: bool
    implicit_diff_solve: Callable | None
    jit: bool
    has_aux = False
    mixing_frequency: int | None = 1
    unit = 1.0  # by which `cell` multiplies what is to be zero

    @property
    def function(self) -> Callable:
        """What jaxopt calls `fixed_point_fun`, or `fun`."""
        return getattr(self, "fixed_point_fun", None) or getattr(self, "fun")  # noqa: B009

    @property
    def solver_of_ours(self) -> Any:
        """This library's solver with these options."""
        raise NotImplementedError

    @property
    def loop_options(self) -> dict[str, Any]:
        return dict(rtol=0.0, atol=self.tol * abs(self.unit), max_steps=self.maxiter)

    def cell(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(f(params), aux), for the f whose fixed point is found."""
        return _with_aux(self, params, *args, **kwargs)

    def optimality_fun(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """What is zero at the solution, for `custom_root`."""
        return subtract(self.cell(params, *args, **kwargs)[0], params)

    def l2_optimality_error(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The norm of `optimality_fun`."""
        return norm(ravel(self.optimality_fun(params, *args, **kwargs)))

    def init_state(self, init_params: Any, *args: Any, **kwargs: Any) -> State:
        """The state before the first step."""
        start, count = ravel(init_params), jnp.asarray(0)
        aux = self.cell(init_params, *args, **kwargs)[1] if self.has_aux else None
        return State(count, jnp.asarray(jnp.inf, start.dtype), aux, count, self.solver_of_ours.init(start))

    def update(self, params: Any, state: State, *args: Any, **kwargs: Any) -> OptStep:
        """One evaluation, and the step that follows from it."""
        value, aux = self.cell(params, *args, **kwargs)
        params, state = self.stepped(params, value, state._replace(aux=aux))
        return self.reported(OptStep(params, state))

    def stepped(self, params: Any, value: Any, state: State) -> OptStep:
        """The step from params, whose f is `value`; of `mixing_frequency` steps all but one are plain."""
        layout = Layout(params, 0, flat=True)
        x, fx = layout.pack(params), layout.pack(value)
        step, memory = self.solver_of_ours.update(fx - x, state.memory, x)
        step = jnp.where(state.iter_num % self.mixing_frequency == 0, step, fx - x)
        count, error = state.iter_num + 1, norm(fx - x) / abs(self.unit)
        state = state._replace(iter_num=count, error=error, num_fun_eval=state.num_fun_eval + 1, memory=memory)
        return OptStep(layout.unpack(x + step), state)

    def reported(self, step: OptStep) -> OptStep:
        if self.verbose:
            text = f"INFO: {type(self).__name__}: Iter: {{}} Error (stopping criterion): {{}}"
            jax.debug.print(text, step.state.iter_num, step.state.error, ordered=True)
        return step

    def run(self, init_params: Any, *args: Any, **kwargs: Any) -> OptStep:
        """The solution, after at most `maxiter` evaluations, and the state."""
        if not self.jit:
            return OptStep(*self._differentiably(self._loop)(init_params, *args, **kwargs))
        solver, cell = self.solver_of_ours, lambda z, *args: self.cell(z, *args, **kwargs)[0]
        start, adjoint = jax.tree.map(jnp.asarray, init_params), linear_adjoint(self.implicit_diff_solve)
        if self.implicit_diff:
            found = solve(cell, start, *args, solver=solver, fold=_Progress(self) if self.verbose else None)
            params = attach(cell, found.value, *args, adjoint=adjoint)
        else:
            found = fixed_point(cell, start, *args, solver=solver, adjoint=Unroll())
            params = found.value
        aux = self.cell(params, *args, **kwargs)[1] if self.has_aux else None
        steps, error = found.stats.steps, found.stats.residual / abs(self.unit)
        return OptStep(params, State(steps, error, aux, steps, None, found.stats.status))

    def _loop(self, params: Any, *args: Any, **kwargs: Any) -> OptStep:
        """`update` again and again."""
        goes_on = lambda at: (at.state.error > self.tol) & (at.state.iter_num < self.maxiter)
        step = lambda at: self.update(at.params, at.state, *args, **kwargs)
        # The first step by itself: the state before it may be of another type than after.
        at = step(OptStep(params, self.init_state(params, *args, **kwargs)))
        if self.jit:
            return jax.lax.while_loop(goes_on, step, at)
        while goes_on(at):
            at = step(at)
        return at

    def _differentiably(self, run: Callable) -> Callable:
        if not self.implicit_diff:
            return run
        reference = getattr(self, "reference_signature", None) or self.function
        return custom_root(self.optimality_fun, True, self.implicit_diff_solve, reference)(run)


def _with_aux(self: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    out = self.function(params, *args, **kwargs)
    return out if self.has_aux else (out, None)


class _Progress:
    """A fold that reports each evaluation."""

    def __init__(self, of: IterativeSolver):
        self.of = of

    def init(self, z0: PyTree, batch_ndim: int) -> None: ...

    def update(self, folded: None, seen: solvers.Evaluation) -> None:
        self.of.reported(OptStep(None, State(seen.step + 1, seen.residual / abs(self.of.unit))))


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
    has_aux: bool = False
    verbose: bool | int = False
    implicit_diff: bool = True
    implicit_diff_solve: Callable | None = None
    jit: bool = True
    unroll: Any = "auto"

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
    has_aux: bool = False
    verbose: bool | int = False
    implicit_diff: bool = True
    implicit_diff_solve: Callable | None = None
    jit: bool = True
    unroll: Any = "auto"

    @property
    def solver_of_ours(self) -> solvers.Anderson:
        options = self.loop_options | dict(history=self.history_size, damping=self.beta, ridge=self.ridge)
        return solvers.Anderson(**options, test_every=self.mixing_frequency)


@dataclasses.dataclass(eq=False)
class AndersonWrapper(IterativeSolver):
    """Anderson acceleration of another solver with jaxopt's interface, as jaxopt's own.

    The map is `mixing_frequency` steps of the solver, which begins anew after each of them at the point that the mix of
    the maps before has led to.
    """

    solver: Any
    history_size: int = 5
    mixing_frequency: int | None = None
    beta: float = 1.0
    ridge: float = 0.0
    verbose: bool | int = False
    implicit_diff: bool = True
    implicit_diff_solve: Callable | None = None
    jit: bool = True
    unroll: Any = "auto"

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
        return OptStep(*self._differentiably(self._loop)(init_params, *args, **kwargs))


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
    has_aux: bool = False
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
    implicit_diff: bool = True
    implicit_diff_solve: Callable | None = None
    jit: bool = True
    unroll: Any = "auto"
    verbose: bool | int = False

    def __post_init__(self):
        if callable(self.stepsize):
            raise ValueError(f"Broyden.stepsize must be a number, got {self.stepsize!r}: rules are not supported")
        self.unit = self.gamma

    @property
    def solver_of_ours(self) -> solvers.Broyden:
        rank = self.history_size or min(self.maxiter, 40)
        options = self.loop_options | dict(max_steps=2 * self.maxiter)
        if self.stepsize > 0:
            return solvers.Broyden(**self.loop_options, rank=rank, damping=self.stepsize, line_search=0)
        return solvers.Broyden(**options, rank=rank)

    def cell(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, aux = _with_aux(self, params, *args, **kwargs)
        return jax.tree.map(lambda x, F: x - self.gamma * F, params, value), aux

    def optimality_fun(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_aux(self, params, *args, **kwargs)[0]
