"""What jaxopt's iterative solvers have in common, over this library's loop and solvers."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax import solvers
from deq_jax._states import Layout, ravel, subtract
from deq_jax._vectors import norm
from deq_jax.adjoints import Unroll
from deq_jax.compat.implicit_diff import custom_root, linear_adjoint
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


@dataclasses.dataclass(eq=False, kw_only=True)
class IterativeSolver:
    """What all solvers here have in common: `run`, and `init_state` and `update` for loops of your own."""

    has_aux: bool = False
    verbose: bool | int = False
    implicit_diff: bool = True
    implicit_diff_solve: Callable | None = None
    jit: bool = True
    unroll: Any = "auto"

    # Not annotated: dataclasses would keep these places for the fields of these names below.
    mixing_frequency = 1
    unit = 1.0  # by which `cell` multiplies what is to be zero
    if TYPE_CHECKING:
        maxiter: int
        tol: float

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
        return dict(rtol=0.0, atol=self.tol * abs(self.unit), norm="l2", max_steps=self.maxiter)

    def cell(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(f(params), aux), for the f whose fixed point is found."""
        return with_aux(self, params, *args, **kwargs)

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
            return OptStep(*self.differentiably(self.loop)(init_params, *args, **kwargs))
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

    def loop(self, params: Any, *args: Any, **kwargs: Any) -> OptStep:
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

    def differentiably(self, run: Callable) -> Callable:
        """`run`, with the derivative of a root of `optimality_fun`."""
        if not self.implicit_diff:
            return run
        reference = getattr(self, "reference_signature", None) or self.function
        return custom_root(self.optimality_fun, True, self.implicit_diff_solve, reference)(run)


def with_aux(self: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(what the function returns, aux), aux None where it returns none."""
    out = self.function(params, *args, **kwargs)
    return out if self.has_aux else (out, None)


class _Progress:
    """A fold that reports each evaluation."""

    def __init__(self, of: IterativeSolver):
        self.of = of

    def init(self, z0: PyTree, batch_ndim: int) -> None: ...

    def update(self, folded: None, seen: solvers.Evaluation) -> None:
        self.of.reported(OptStep(None, State(seen.step + 1, seen.residual / abs(self.of.unit))))
