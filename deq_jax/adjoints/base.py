"""What all adjoints share: the custom rule at an equilibrium, and `Probe`.

Throughout this package f is pure in three arguments: `f(z, inputs, other)`, where `inputs` is a list of all
float arrays it reads (arguments and captured values alike) and `other` of all the rest (ints, keys, masks).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

from deq_jax._trace import Bound, varying_axes
from deq_jax.adjoints.linear_map import linear_map
from deq_jax.solvers import Solver, Stats, Status, solve
from deq_jax.solvers.base import choose, leading_power, over_axes, wide_dtype, zeros_from

HEADROOM = 2.0**-6  # of a float16 cotangent: room for digits below, and for the sum of a million entries above


class Probe(NamedTuple):
    """The backward solve's statistics, handed out as a cotangent: an entry per problem.

    Pass zeros, differentiate with respect to them, and read. Calls that share one probe add up in it. An
    adjoint that solves no backward equation reports its vector-Jacobian products, and a residual of inf;
    `Unroll` and `Reversible` leave the zeros as they are, and forward mode has no cotangents to report in.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def loss(w, probe):
    ...     return deq.fixed_point(lambda z: jnp.cos(w * z), jnp.zeros(()), probe=probe).value
    >>> _, backward = jax.grad(loss, argnums=(0, 1))(1.0, deq.Probe.zeros())
    >>> bool(backward.steps > 0), deq.Status(int(backward.status)).name
    (True, 'CONVERGED')
    """

    steps: Float[Array, "*batch"]  # Jᵀ-vector products
    residual: Float[Array, "*batch"]  # ‖z̄ + Jᵀu − u‖₂ over ‖z̄ + Jᵀu‖₂
    status: Float[Array, "*batch"]  # a Status, as a float

    @classmethod
    def zeros(cls, batch_shape: tuple[int, ...] = ()) -> "Probe":
        zero = jnp.zeros(batch_shape, jnp.float32)
        return cls(zero, zero, zero)

    @classmethod
    def like(cls, z: PyTree, batch_ndim: int) -> "Probe":
        """Zeros made from z, so that they share its sharding."""
        leaf = jax.tree.leaves(z)[0]
        corner = leaf.reshape(*leaf.shape[:batch_ndim], -1)[..., 0]
        zero = zeros_from(corner.real.astype(jnp.float32))
        return cls(zero, zero, zero)


class Found(NamedTuple):
    """What the forward solve leaves for the backward pass."""

    z: PyTree
    stats: Stats | None  # None where another solver found z
    memory: Any  # the solver's; None where another solver found z


@runtime_checkable
class Adjoint(Protocol):
    """`run` solves and returns a value whose derivative is this adjoint's."""

    def run(
        self, f: Callable, z0: PyTree, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
    ) -> tuple[PyTree, Stats]: ...


# ---- the rule at an equilibrium ----------------------------------------------------------------------------


def run_at_equilibrium(
    self, f: Callable, z0: PyTree, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
) -> tuple[PyTree, Stats]:
    """`run` for adjoints that do not care how z* was found: solve, then `at` it."""
    # The derivative is that of `at` alone, so the loop must not be differentiated.
    frozen_z0, frozen, solver = jax.lax.stop_gradient((z0, inputs, solver))
    solved = solve(Bound(f, frozen, other), frozen_z0, solver, batch_ndim)
    found = Found(solved.value, solved.stats, solved.memory)
    return self.at(f, found, inputs, other, solver, batch_ndim, probe), solved.stats


def at_equilibrium(
    self, f: Callable, found: Found, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
) -> PyTree:
    """`at` for adjoints with a `pullback(f, found, inputs, z_bar, solver, batch_ndim)`: z*, differentiable."""
    if not getattr(self, "reads_memory", False):
        found = found._replace(memory=None)  # it would be kept until the backward pass
    try:
        return _value(f, batch_ndim, self, solver, found, reverse_mode_only(inputs), other, probe)
    except TypeError as error:  # under jit(jacfwd(...)) jax's own refusal comes first
        if "forward-mode" not in str(error):
            raise
        raise TypeError(_FORWARD_MODE) from error


def _take_z(f, batch_ndim, adjoint, solver, found, inputs, other, probe):
    return found.z


_value: Any = jax.custom_vjp(_take_z, nondiff_argnums=(0, 1))


def _value_fwd(f, batch_ndim, adjoint, solver, found, inputs, other, probe):
    # Through the rule itself: z* depends on the inputs, so a second derivative takes the implicit path again.
    z_star = _value(f, batch_ndim, adjoint, solver, found, reverse_mode_only(inputs), other, probe)
    return z_star, (adjoint, solver, found._replace(z=z_star), inputs, other)


def _value_bwd(f, batch_ndim, saved, z_bar):
    adjoint, solver, found, inputs, other = saved
    pure = Bound(f, other)
    inputs_bar, probe_bar = adjoint.pullback(pure, found, inputs, z_bar, solver, batch_ndim)
    return None, None, None, inputs_bar, None, probe_bar


_value.defvjp(_value_fwd, _value_bwd)


# ---- the rule at an equilibrium, in every mode -------------------------------------------------------------


def at_equilibrium_in_every_mode(
    self, f: Callable, found: Found, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
) -> PyTree:
    """`at` for adjoints that also have a `pushforward(f, found, inputs, inputs_dot, solver, batch_ndim)`."""
    return _value_in_every_mode(f, batch_ndim, self, solver, found._replace(memory=None), inputs, other, probe)


_value_in_every_mode: Any = jax.custom_jvp(_take_z, nondiff_argnums=(0, 1))


@_value_in_every_mode.defjvp
def _value_jvp(f, batch_ndim, primals, tangents):
    adjoint, solver, found, inputs, other, probe = primals
    *_, inputs_dot, _, probe_dot = tangents
    # Through the rule itself: z* depends on the inputs, so derivatives of the rule are right as well.
    z_star = _value_in_every_mode(f, batch_ndim, adjoint, solver, found, inputs, other, probe)

    def push(saved, dots):
        (adjoint, solver, found, inputs, other), (inputs_dot, _) = saved, dots
        pure = Bound(f, other)
        return adjoint.pushforward(pure, found, inputs, inputs_dot, solver, batch_ndim)

    def pull(saved, z_bar):
        adjoint, solver, found, inputs, other = saved
        pure = Bound(f, other)
        return adjoint.pullback(pure, found, inputs, z_bar, solver, batch_ndim)

    saved = adjoint, solver, found._replace(z=z_star), inputs, other
    return z_star, linear_map(push, pull, saved, (inputs_dot, probe_dot))


# ---- refusals ----------------------------------------------------------------------------------------------


# A custom_vjp refuses forward mode with a message that cannot say what to do. The identity below has a
# derivative that can be transposed but not evaluated or batched: reverse mode passes, forward mode meets our
# message. (It is a primitive, for a custom_jvp would have its rule batched in grad(vmap(f)), which is right.)
_FORWARD_MODE = (
    "this adjoint is for reverse mode (grad, vjp, jacrev) alone; for jvp, jacfwd, linearize or hessian use "
    "fixed_point(..., adjoint=ImplicitJVP()), or Unroll()"
)


def _refuse(*_, **__):
    raise TypeError(_FORWARD_MODE)


_tangent_p = Primitive("reverse_mode_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)

_identity_p = Primitive("reverse_mode_only")
_identity_p.def_impl(lambda x: x)
_identity_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_identity_p] = lambda primals, tangents: (
    primals[0],
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent_p.bind(tangents[0]),
)
batching.defvectorized(_identity_p)
mlir.register_lowering(_identity_p, lambda _, x: [x])


def reverse_mode_only(tree: PyTree) -> PyTree:
    """The tree itself; forward-mode differentiation through it is a TypeError that names ImplicitJVP."""
    return jax.tree.map(_identity_p.bind, tree)


# Where a backward rule iterates, JAX refuses to differentiate it in reverse mode, with a message about loops. This
# identity stands behind the rule, so that its transpose is asked for first.
_first_order_p = Primitive("first_order_in_reverse_mode")
_first_order_p.def_impl(lambda x, **_: x)
_first_order_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_first_order_p, lambda cotangent, _, message: _refuse_twice(message))
batching.defvectorized(_first_order_p)
mlir.register_lowering(_first_order_p, lambda _, x, **__: [x])


def _refuse_twice(message):
    raise TypeError(message)


def first_order_only(tree: PyTree, who: str, remedy: str = "use adjoint=Implicit()") -> PyTree:
    """The tree itself, what a backward rule returns; reverse mode through it is a TypeError that names the remedy."""
    message = f"{who} has first derivatives only; for grad of grad {remedy}, for any mix of modes adjoint=ImplicitJVP()"
    return jax.tree.map(functools.partial(_first_order_p.bind, message=message), tree)


# ---- after the backward solve ------------------------------------------------------------------------------


def held_back(z: PyTree, u: PyTree, stats: Stats) -> PyTree:
    """z itself, but not before the backward solve has ended, which found u and stats.

    The condition always holds, and XLA cannot know it; an optimization_barrier is gone from a CPU's program before its
    order is chosen.
    """
    return choose(stats.steps >= 0, z, u)


def inputs_bar(f: Callable, z: PyTree, inputs: PyTree, u: PyTree, stats: Stats, scale: Any = None) -> PyTree:
    """fₐᵀ(scale · u) at f(z, inputs), linearized after the backward solve that found u and stats.

    For one evaluation of f, what this needs of f at z is not kept through the solve, beside its history.
    """
    z = held_back(z, u, stats)
    pull = lambda u: jax.vjp(lambda inputs: f(z, inputs), inputs)[1](u)[0]
    return pull_scaled(pull, inputs, u, scale)


# ---- arithmetic on states ----------------------------------------------------------------------------------


def as_probe(stats: Stats) -> Probe:
    return jax.tree.map(lambda x: x.astype(jnp.float32), Probe(stats.steps, stats.relative_residual, stats.status))


def unmeasured(products: int, like: PyTree, batch_ndim: int) -> Probe:
    zero = Probe.like(like, batch_ndim)
    return Probe(zero.steps + products, zero.residual + jnp.inf, zero.status + Status.MAX_STEPS)


def unfolded(z_bar: PyTree, z: PyTree, batch_ndim: int) -> PyTree:
    """z̄ itself. XLA cannot know that: of a loss such as z.sum(), it would spend seconds on folding norms of ones."""
    leaf = jax.tree.leaves(z)[0].real
    corner = jax.lax.stop_gradient(leaf.reshape(*leaf.shape[:batch_ndim], -1)[..., 0])
    return choose(~(corner > jnp.inf), z_bar, jax.tree.map(zeros_from, z_bar))


def power_of_two(tree: PyTree, batch_ndim: int, f: Callable | None = None) -> Float[Array, "*batch"]:
    """The power of two just above the largest entry of each problem; 1 for zero, Inf and NaN, no gradient.

    Problems that f couples, along named axes, share one.
    """
    *_, most = over_axes(getattr(f, "axes", ()))
    top = most(_top(tree, batch_ndim))
    usable = jnp.isfinite(top) & (top > 0)
    return jnp.where(usable, 2 * leading_power(jnp.where(usable, top, 1)), 1)


def _top(tree: PyTree, batch_ndim: int) -> Float[Array, "*batch"]:
    """The largest entry of each problem, in float32 or wider; no gradient."""
    leaves = jax.tree.leaves(jax.lax.stop_gradient(tree))
    wide = wide_dtype(leaves)
    tops = [jnp.max(jnp.abs(leaf.reshape(*leaf.shape[:batch_ndim], -1)), axis=-1).astype(wide) for leaf in leaves]
    return functools.reduce(jnp.maximum, tops)


def multiply(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    return jax.tree.map(lambda leaf: _with_scale(jnp.multiply, leaf, scale), tree)


def divide(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    return jax.tree.map(lambda leaf: _with_scale(jnp.divide, leaf, scale), tree)


def _with_scale(operation: Callable, leaf: Array, scale: Float[Array, "*batch"]) -> Array:
    """Computed in float32 or wider: neither a scale nor its reciprocal need be a number of float16."""
    if jnp.iscomplexobj(leaf):
        return jax.lax.complex(*(_with_scale(operation, part, scale) for part in (leaf.real, leaf.imag)))
    wide = wide_dtype((leaf, scale))
    scale = jax.lax.expand_dims(scale.astype(wide), range(scale.ndim, leaf.ndim))
    return operation(leaf.astype(wide), scale).astype(leaf.dtype)


def unit_in_float16(z_bar: PyTree, batch_ndim: int, f: Callable) -> tuple[PyTree, Any]:
    """(z̄ / scale, scale) where float16 would lose z̄, else (z̄, None)."""
    if not _has_float16(z_bar):
        return z_bar, None
    scale = power_of_two(z_bar, batch_ndim, f)
    return divide(z_bar, scale), scale


def pull_scaled(pull: Callable, inputs: PyTree, u: PyTree, scale: Any = None) -> PyTree:
    """pull(scale · u), a pullback to inputs, also where scale · u leaves the range of a float16 state.

    There all problems share the inputs, so one more power of two brings the largest of them to HEADROOM, and the
    result is multiplied by it again, in the dtype of the inputs.
    """
    if scale is None or not _has_float16(u):
        return pull(u if scale is None else multiply(u, scale))
    tops = _top(u, scale.ndim).astype(scale.dtype) * scale
    top = _over_shards(jnp.max(jnp.where(jnp.isfinite(tops), tops, 0)), inputs)
    common = power_of_two(top, 0) / HEADROOM
    return multiply(pull(multiply(u, scale / common)), common)


def _has_float16(tree: PyTree) -> bool:
    return any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(tree))


def _over_shards(top: Float[Array, ""], inputs: PyTree) -> Float[Array, ""]:
    """The maximum over the axes of a shard_map whose shards share some of the inputs: a pullback sums over them."""
    varies = lambda x: varying_axes(jax.typeof(x))
    axes = varies(top) - frozenset.intersection(varies(top), *map(varies, jax.tree.leaves(inputs)))
    return jax.lax.pmax(top, tuple(sorted(axes))) if axes else top


def add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def conj(tree: PyTree) -> PyTree:
    """A solver takes a complex state as two reals, and there vjp is the transpose on conjugates."""
    return jax.tree.map(jnp.conj, tree)


def lerp(a: PyTree, b: PyTree, weight: Any) -> PyTree:
    """a + weight (b − a), with one weight for all or one for each problem."""

    def mix(a, b):
        w = jnp.asarray(weight).astype(a.dtype)
        return a + (jax.lax.expand_dims(w, range(w.ndim, a.ndim)) if w.ndim else w) * (b - a)

    return jax.tree.map(mix, a, b)
