"""What a solver is, and what a solve reports."""

import dataclasses
import enum
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._checks import check_number, check_stopping
from deq_jax._config import Budget, Number, Scales, plain_at_runtime
from deq_jax._scales import check_norm
from deq_jax._values import concrete
from deq_jax._vectors import Vec

Z = TypeVar("Z")


class Status(enum.IntEnum):
    """Why the solve of one problem ended."""

    CONVERGED = 0  # ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ in each leaf of z (see `LoopOptions.norm`), and all of it is finite
    MAX_STEPS = 1  # the budget of evaluations is spent
    STALLED = 2  # the dtype's floor is reached: more evaluations find nothing better
    DIVERGED = 3  # the residual grew without bound, or z grew until its rounding exceeded all residuals
    NONFINITE = 4  # f returned NaN or Inf, or a norm overflowed


class Stats(NamedTuple):
    """What a solve reports, one entry a problem. No gradient flows through it."""

    steps: Int[Array, "*batch"]  # evaluations of f
    # With a `norm` of the solver that is not the default, the two are the largest of a piece in that norm.
    residual: Float[Array, "*batch"]  # ‖f(z) − z‖₂ at the z that is returned; inf if f was never finite there
    relative_residual: Float[Array, "*batch"]  # ‖f(z) − z‖₂ / ‖f(z)‖₂, the largest of the leaves'
    status: Int[Array, "*batch"]  # a Status
    error: Float[Array, "*batch"] | None = None  # about ‖z − z*‖₂, see `estimate_error` of `fixed_point`

    @property
    def converged(self) -> Bool[Array, "*batch"]:
        return self.status == Status.CONVERGED

    @property
    def sound(self) -> Bool[Array, "*batch"]:
        """Converged, or stopped where rounding hides all progress."""
        return (self.status == Status.CONVERGED) | (self.status == Status.STALLED)


@plain_at_runtime
class SolveResult(NamedTuple, Generic[Z]):
    """What `solve` returns; not differentiable."""

    value: Z  # as z0: structure, shapes and dtypes
    stats: Stats
    memory: Any  # the solver's state after its last update: a start for the solve of a similar problem
    folded: Any  # the fold's result, or None
    given: Any  # the carried leaves with which f was evaluated at the value; None in place of all others


@runtime_checkable
class Solver(Protocol):
    """A solver: three numbers and two pure functions, with optax's signature. It never calls f.

    The loop calls `init(z)` once, and `update(residual, state, z)` after each evaluation, with residual = f(z) − z;
    the next iterate is z + step. All problems of a batch are updated at once. A problem that has stopped is evaluated
    at its best z again while others run. So if z has not moved, `update` must leave what it remembers unchanged.

    Any class with these members is a solver. What a solver may define besides is in `Defaults`.
    """

    @property
    def rtol(self) -> Any: ...
    @property
    def atol(self) -> Any: ...
    @property
    def max_steps(self) -> Any: ...

    def init(self, z: Float[Array, "*batch dim"]) -> Any: ...

    def update(
        self, residual: Float[Array, "*batch dim"], state: Any, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], Any]: ...


class Defaults:
    """The optional members of a solver, with what the loop assumes where a solver leaves them out."""

    test_every = 1
    """Of `test_every` evaluations only the last is tested for convergence and shown to `update`."""
    norm = "leaf"
    """The norm that judges, see `LoopOptions`."""
    min_steps = 0
    """Evaluations before a solve may end as CONVERGED or STALLED."""
    returns = "best"
    """Whether the value is the best iterate, or the "last" one."""
    damping = 1.0
    """With `test_every` above 1, each evaluation that is not tested is followed by a step of damping · (f(z) − z)."""
    patience = 0
    """How many evaluations may pass without a better residual before a solve counts as stalled."""
    recovers = False
    """Whether some steps are trials: a huge residual is then no failure, and only the best iterate is of use."""
    scale_free = False
    """Whether the loop divides residual, z and `atol` by a power of two for each problem before it calls `update`.

    Products of two vectors are then within the range of the dtype."""

    flat = True
    """Whether vectors are arrays `[*batch, dim]`. If not, a state of several leaves, or one that may be sharded, is a
    `Vector`, and the solver computes with the functions of `deq_jax._vectors`, as those of this library do."""

    may_begin_apart = False
    """Whether the scalars of a state, such as a count that all problems share, may be arrays with an entry for each.

    `deq.refill` needs it, where a problem begins while others go on. A state without scalars can always be refilled."""

    @staticmethod
    def resume(memory: Any) -> Any:
        """The memory of an earlier solve, made ready for this one. Its last iterate belongs to another f."""
        return memory

    @staticmethod
    def can_backtrack(state: Any) -> Bool[Array, "*batch"] | bool:
        """Where an evaluation that is not finite is no failure, because `update` returns to an earlier iterate."""
        return False

    @staticmethod
    def next_point(state: Any, z: Vec) -> Vec:
        """The exact next iterate, for a solver that loses precision in z + step, which is given as `z`."""
        return z

    direction = None
    """`(state) -> d`, for a solver that asks for exact derivatives: the direction in which f is differentiated at the
    next z, or the rows `[*batch, m, dim]` of several, for a `flat` solver. `update` and `round` are given the product
    J d with the Jacobian J of the residual, or one row for each, as a fourth argument."""

    preconditioner = None
    """A linear function P v ≈ (I − J)⁻¹ v of a state like z, which `fixed_point`, `solve` and `root` check and bind; in
    `root` the user's is P ≈ (∂F)⁻¹, and the solver is given P times the scale of F."""

    in_layout = None
    """`(layout) -> solver`, called once where a solve begins: the solver for vectors that are laid out so."""

    # What is seldom done to the memory is done between two loops, so that no round has a branch for it. A solver that
    # defines these three takes its `update` from `Renewing`, for those who call it outside of the loop.

    round = None
    """`update` without the renewal of the memory. The loop calls `round` in place of `update`."""

    @staticmethod
    def is_full(state: Any) -> Bool[Array, "*#batch"] | bool:
        """Whether the memory is to be renewed before the next evaluation: of all problems, or of each that is true."""
        return False

    @staticmethod
    def renewed(state: Any) -> Any:
        """The state with its memory renewed. It is asked for its `next_point` again."""
        return state

    # And for a solver that is several: see `Robust`.

    parts = ()
    """Solvers with the state of this one, each of which the loop runs until none of its problems is left."""

    @staticmethod
    def takes(state: Any) -> Bool[Array, "*batch"] | bool:
        """Which problems a part updates. The others wait."""
        return True

    @staticmethod
    def begun(state: Any) -> Any:
        """The state when the loop of a part begins. It is asked for its `next_point` again."""
        return state


class Renewing:
    """A solver whose memory has to be compressed now and then, which the loop does between its rounds.

    The solver defines `round`, which is `update` without the compression, `is_full(state)`, read from scalars alone,
    and `renewed(state)`: the compressed memory, with the next iterate that follows from it in `next_point(state)`.
    """

    def update(self: Any, residual: Vec, state: Any, z: Vec) -> tuple[Vec, Any]:
        step, state = self.round(residual, state, z)
        state = jax.lax.cond(jnp.any(self.is_full(state)), self.renewed, lambda state: state, state)
        return self.next_point(state, z + step) - z, state


def member(solver: Solver, name: str) -> Any:
    """An optional member of a solver: its own, or that of `Defaults`."""
    return getattr(solver, name, getattr(Defaults, name))


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """What the loop, rather than the method, reads from a solver. All solvers of this library have these fields.

    Args:
      rtol, atol: a problem has converged where ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ for each piece of its state. Either may
        be an array `[*batch]`, one number a problem. By default rtol is 1e-4, or 1e-6 where all of z is float64.
      norm: what a piece is. A leaf ("leaf"), each at its own scale; the whole state, in the 2-norm ("l2"), the root
        mean square ("rms", which differs from "l2" in what atol means) or by its largest entry ("max"); the vectors
        along the last axis ("token"), so that no token hides behind the others; each entry ("entry"), as ODE solvers
        judge. Or `Weighted(weights, norm)`. With "leaf", "token" and "entry", atol may be a pytree like z, of numbers
        or of arrays that broadcast to the pieces of each leaf; for a z that is one array, such an array. `Stats`
        reports the largest residual of a piece. In every norm, the guards against growth and overflow look at leaves. A
        piece that is zero up to the rounding of the whole state is compared with the whole; with "entry" it needs an
        atol instead.
      max_steps, min_steps: the budget of evaluations, which may be an array `[*batch]` too, and how many a solve makes
        at least before it may end as CONVERGED or STALLED.
      returns: "best", the iterate with the smallest residual, or "last", the last one at which f was evaluated (and was
        finite), for a model with a fixed number of loops. Its residual is known, so `Picard(max_steps=n + 1,
        returns="last")` gives f applied n times, as `Unroll` does with max_steps=n. "last" never ends as STALLED.
    """

    rtol: Number | None = None
    atol: Scales = 0.0
    max_steps: Budget = 100
    test_every: int = dataclasses.field(default=1, kw_only=True)
    norm: Any = dataclasses.field(default="leaf", kw_only=True)
    min_steps: int = dataclasses.field(default=0, kw_only=True)
    returns: Literal["best", "last"] = dataclasses.field(default="best", kw_only=True)

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "test_every", at_least=1)
        check_norm(self)
        check_steps(self)


def check_sees_all(solver: Solver, who: str) -> None:
    """Raise ValueError if a solver sees only one iterate in `test_every`, when `who` needs each of them."""
    if member(solver, "test_every") > 1:
        raise ValueError(f"{who} looks at each iterate, and {solver} at few of them: take test_every=1")


def check_differentiates_nothing(solver: Solver, who: str) -> None:
    """Raise ValueError if a solver asks for derivatives of f, where `who` has none to give."""
    if member(solver, "direction") is not None:
        raise ValueError(f"{who} has no derivatives of f to show to a solver, and {solver} asks for them")


def check_steps(solver: Any) -> None:
    """Raise ValueError unless `min_steps` and `returns` fit the solver."""
    check_number(solver, "min_steps", at_least=0)
    name, budgets = type(solver).__name__, solver.max_steps
    budgets = budgets if isinstance(budgets, int) else concrete(budgets)
    if budgets is not None and solver.min_steps > (least := np.min(budgets)):
        raise ValueError(f"{name}.min_steps must be at most max_steps={least}, got {solver.min_steps}")
    if solver.returns not in ("best", "last"):
        raise ValueError(f"{name}.returns must be 'best' or 'last', got {solver.returns!r}")
    if solver.returns == "last" and member(solver, "recovers"):
        raise ValueError(f"{name}.returns must be 'best', got 'last': some of its evaluations are trials")


# ---- folds -------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """One evaluation of f as a `Fold` sees it. With `test_every` above 1, only those that are tested are shown.

    A problem that has stopped shows its best iterate again. z and fz have the carried leaves of z0 too: what f was
    given, and what it returned.
    """

    step: Int[Array, ""]  # 0 at z0, and one more at each evaluation
    z: PyTree
    fz: PyTree
    residual: Float[Array, "*batch"]
    relative_residual: Float[Array, "*batch"]
    running: Bool[Array, "*batch"]  # problems that had not stopped before this evaluation


@runtime_checkable
class Fold(Protocol):
    """Accumulates over the evaluations of a solve, inside its loop, without changing the solve.

    A fold that defines `sees_all = True` is refused with a solver whose `test_every` is above 1.

    It may also report while the solve runs. This one shows the progress of one problem:

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> class Progress:
    ...     def init(self, z0, batch_ndim): ...
    ...     def update(self, folded, seen):
    ...         jax.debug.print("{} {:.0e}", seen.step, seen.relative_residual)
    >>> solver = deq.Picard(rtol=1e-2)
    >>> result = deq.solve(lambda z: 0.1 * jnp.cos(z), 0.0, solver=solver, fold=Progress()); jax.effects_barrier()
    0 1e+00
    1 5e-03
    """

    def init(self, z0: PyTree, batch_ndim: int) -> Any: ...

    def update(self, folded: Any, seen: Evaluation) -> Any: ...
