"""What an adjoint is: two kinds, and what they are given.

An adjoint decides how a fixed point z = f(z, a) is differentiated in a, which is all that f reads. One kind works at
the equilibrium: it turns the cotangent of z* into that of a, and does not care how z* was found. The other kind works
through the iterations: it runs them itself, in a way that JAX can differentiate.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._arrays import zeros_from
from deq_jax._states import corner, frozen, holding
from deq_jax._trace import Bound, axes_of
from deq_jax.solvers import Solver, Stats, Status
from deq_jax.solvers.loop import stats_at


@dataclasses.dataclass(frozen=True)
class Problem:
    """The equation z = f(z, inputs, other), as a pytree.

    `problem(z)` is f at z, and `problem(z, inputs)` is f with other inputs: differentiate that one.

    >>> problem = Problem(lambda z, inputs, other: inputs[0] * z, [jnp.array(3.0)], [], batch_ndim=0)
    >>> float(problem(2.0)), float(problem(2.0, [jnp.array(5.0)]))
    (6.0, 10.0)
    """

    f: Callable  # pure
    inputs: Any  # all float and complex arrays that f reads, arguments and captured values alike
    other: Any  # all other arrays that f reads: ints, keys, masks
    batch_ndim: int
    over: tuple = ()  # named axes over which each problem is split

    def __call__(self, z: PyTree, inputs: PyTree = None) -> PyTree:
        return self.f(z, self.inputs if inputs is None else inputs, self.other)

    @property
    def axes(self) -> tuple:
        """Named axes along which f communicates, and so couples the problems."""
        return axes_of(self.f)

    def stats_at(self, z: PyTree, solver: Solver, steps: Any) -> Stats:
        """The statistics of a z that was found in `steps` evaluations; one more is made here."""
        return stats_at(self.frozen, jax.lax.stop_gradient(z), frozen(solver), steps, self.batch_ndim, self.over)

    def with_carried(self, carried: PyTree) -> "Problem":
        """The equation in the floats alone: f is given these carried leaves at each evaluation, as constants."""
        if not jax.tree.leaves(carried):
            return self
        f = lambda z, inputs, other: holding(self.f, other[1])(z, inputs, other[0])
        return Problem(Bound(f, like=self.f), self.inputs, (self.other, carried), self.batch_ndim, self.over)

    @property
    def frozen(self) -> Callable[[PyTree], PyTree]:
        """f of z alone, with no derivative in the inputs."""
        return Bound(self.f, jax.lax.stop_gradient(self.inputs), self.other)


jax.tree_util.register_dataclass(Problem, data_fields=["inputs", "other"], meta_fields=["f", "batch_ndim", "over"])


class ForwardResult(NamedTuple):
    """What the forward solve leaves for the backward pass, as far as the adjoint keeps it (see `Defaults.keep`)."""

    z: PyTree  # the equilibrium: the floats alone, where z0 has carried leaves
    stats: Stats | None  # None where another solver found z
    memory: Any  # of the solver; None where another solver found z
    solver: Any  # the solver of the call; `keep` may put another one here


class Probe(NamedTuple):
    """The statistics of the backward solve, returned as a cotangent: one entry a problem.

    Pass zeros, differentiate with respect to them, and read. Calls that share one probe add up in it. An adjoint
    that solves no backward equation reports its vector-Jacobian products, and a residual of inf; `Unroll` and
    `Reversible` leave the zeros as they are, and forward mode has no cotangents to report in.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def loss(w, probe):
    ...     return deq.fixed_point(lambda z: jnp.cos(w * z), jnp.zeros(()), probe=probe).value
    >>> _, backward = jax.grad(loss, argnums=(0, 1))(1.0, deq.Probe.zeros())
    >>> bool(backward.steps > 0), deq.Status(int(backward.status)).name
    (True, 'CONVERGED')
    """

    steps: Float[Array, "*batch"]  # Jᵀ-vector products
    residual: Float[Array, "*batch"]  # ‖z̄ + Jᵀu − u‖₂ / ‖z̄ + Jᵀu‖₂
    status: Float[Array, "*batch"]  # a Status, as a float

    @classmethod
    def zeros(cls, batch_shape: tuple[int, ...] = ()) -> "Probe":
        """What to pass as `probe=`."""
        zero = jnp.zeros(batch_shape, jnp.float32)
        return cls(zero, zero, zero)

    @classmethod
    def like(cls, z: PyTree, batch_ndim: int, over: tuple = ()) -> "Probe":
        """Zeros made from z, so that they share its sharding."""
        zero = zeros_from(corner(z, batch_ndim).real.astype(jnp.float32))
        zero = jax.lax.psum(zero, over) if over else zero
        return cls(zero, zero, zero)

    @classmethod
    def of(cls, stats: Stats) -> "Probe":
        """The statistics of a backward solve."""
        return jax.tree.map(lambda x: x.astype(jnp.float32), cls(stats.steps, stats.relative_residual, stats.status))

    @classmethod
    def unmeasured(cls, products: int, z: PyTree, batch_ndim: int, over: tuple = ()) -> "Probe":
        """The report of a pullback that solves no equation and takes so many vector-Jacobian products."""
        zero = cls.like(z, batch_ndim, over)
        return cls(zero.steps + products, zero.residual + jnp.inf, zero.status + Status.MAX_STEPS)


@runtime_checkable
class EquilibriumAdjoint(Protocol):
    """An adjoint at the equilibrium. Any class with this method is one.

    `pullback` returns the cotangents of `problem.inputs`, and what `Probe` is to report (None: nothing was measured).
    """

    def pullback(self, problem: Problem, forward: ForwardResult, z_bar: PyTree) -> tuple[list, Probe | None]: ...


@runtime_checkable
class IterationAdjoint(Protocol):
    """An adjoint through the iterations: `run` solves the problem in a way that JAX can differentiate.

    z0, and the z that it returns, have the carried leaves too.
    """

    def run(self, problem: Problem, z0: PyTree, solver: Solver) -> tuple[PyTree, Stats]: ...


Adjoint = EquilibriumAdjoint | IterationAdjoint


class Defaults:
    """The optional members of an adjoint, with what is assumed where an adjoint leaves them out."""

    pushforward: Any = None
    """`(problem, forward, inputs_dot) -> z_dot`, the tangent of z*: with it, an adjoint has forward mode too."""

    @staticmethod
    def keep(problem: Problem, forward: ForwardResult) -> ForwardResult:
        """The part of the forward result that the backward pass reads. Nothing else is kept until then."""
        return forward._replace(memory=None, solver=None)

    @staticmethod
    def check(z0: PyTree, solver: Solver) -> Any:
        """Called before tracing, when options are still numbers, to raise or warn about what does not fit.

        It may return another adjoint to take in place of this one, which knows what only numbers can say.
        """

    bind: Any = None
    """`(z0) -> adjoint`, called before tracing: the adjoint with all arrays that its functions capture as leaves."""


def member(adjoint: Adjoint, name: str) -> Any:
    """An optional member of an adjoint: its own, or that of `Defaults`."""
    return getattr(adjoint, name, getattr(Defaults, name))


def bound_to(adjoint: Adjoint, z0: PyTree) -> Adjoint:
    """The adjoint as its `bind` returns it, if it has one."""
    bind = member(adjoint, "bind")
    return adjoint if bind is None else bind(z0)
