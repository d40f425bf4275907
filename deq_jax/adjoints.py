"""How a fixed point is differentiated: at the equilibrium, or through the iterations.

Below, f is pure in three arguments: `f(z, inputs, other)`, where `inputs` is a list of all float arrays it
reads (arguments and captured values alike) and `other` of all the rest (ints, keys, masks).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jaxtyping import Array, Float, PyTree

from deq_jax._config import check_number, config
from deq_jax.solvers import Anderson, Solver, Stats, Status, solve
from deq_jax.solvers.base import measure, raveler, zeros_from


class Probe(NamedTuple):
    """The backward solve's statistics, handed out as a cotangent: an entry per problem.

    Pass zeros, differentiate with respect to them, and read. Calls that share one probe add up in it.

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


class Adjoint(Protocol):
    """`run` solves and returns a value whose derivative is this adjoint's."""

    def run(
        self, f: Callable, z0: PyTree, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
    ) -> tuple[PyTree, Stats]: ...


# ---- at the equilibrium ------------------------------------------------------------------------------------


def _solve(f, batch_ndim, adjoint, solver, z0, inputs, other, probe):
    return solve(lambda z: f(z, inputs, other), z0, solver, batch_ndim)[:2]


_equilibrium: Any = jax.custom_vjp(_solve, nondiff_argnums=(0, 1))


def _equilibrium_fwd(f, batch_ndim, adjoint, solver, z0, inputs, other, probe):
    # Through the rule itself, not `solve`: a second derivative then takes the implicit path again.
    z_star, stats = _equilibrium(f, batch_ndim, adjoint, solver, z0, inputs, other, probe)
    return (z_star, stats), (adjoint, solver, z_star, inputs, other)


def _equilibrium_bwd(f, batch_ndim, saved, cotangents):
    adjoint, solver, z_star, inputs, other = saved
    z_bar, _ = cotangents
    inputs_bar, probe_bar = adjoint.pullback(
        lambda z, inputs: f(z, inputs, other), z_star, inputs, z_bar, solver, batch_ndim
    )
    return None, None, None, inputs_bar, None, probe_bar


_equilibrium.defvjp(_equilibrium_fwd, _equilibrium_bwd)


def _run_at_equilibrium(
    self, f: Callable, z0: PyTree, inputs: list, other: list, solver: Solver, batch_ndim: int, probe: Probe
) -> tuple[PyTree, Stats]:
    return _equilibrium(f, batch_ndim, self, solver, z0, inputs, other, probe)


@config
class Implicit:
    """The exact gradient by the implicit function theorem (paper Theorem 1), in memory free of depth.

    The backward equilibrium is solved by `solver`, any of the forward ones; None takes Anderson with a longer
    history (the system is linear, so that is GMRES) and a tolerance a hundredth of the forward one. Reverse
    mode of any order; for forward mode use an adjoint that has one.

    >>> import deq_jax as deq
    >>> deq.Implicit(deq.Broyden(rtol=1e-6)).solver.rtol
    1e-06
    """

    solver: Any = None

    def __post_init__(self):
        if self.solver is not None and (isinstance(self.solver, type) or not hasattr(self.solver, "update")):
            raise TypeError(f"Implicit.solver must be a solver such as Anderson(), got {self.solver!r}")

    run = _run_at_equilibrium

    def pullback(self, f, z_star, inputs, z_bar, solver, batch_ndim):
        # z = f(z, a)  ⇒  dz = (I − J)⁻¹ fₐ da, so ā = fₐᵀu with u = z̄ + Jᵀu: a fixed point again.
        _, vjp = jax.vjp(f, z_star, inputs)
        # Solved for u / scale, a power of two a problem: exact, and tiny cotangents keep their digits.
        scale = _power_of_two(z_bar, batch_ndim)

        def backward_cell(u):
            return _divide(_add(z_bar, vjp(_multiply(u, scale))[0]), scale)

        u0 = _divide(z_bar, scale)
        backward = _default_backward(solver) if self.solver is None else self.solver
        fun, u_inputs, u_other = hoist(backward_cell, u0)
        u, stats = _equilibrium(fun, batch_ndim, self, backward, u0, u_inputs, u_other, Probe.like(u0, batch_ndim))
        return vjp(_multiply(u, scale))[1], _as_probe(stats)


@config
class Neumann:
    """The first `terms` terms of the Neumann series of the exact gradient: u = Σ (Jᵀ)ᵏ z̄, k < terms.

    Biased unless the series has converged, and useless where the spectral radius is above one.
    Geng et al. (2021), "On Training Implicit Models", NPG with damping 1.

    >>> import deq_jax as deq
    >>> deq.Neumann(terms=5)
    Neumann(terms=5)
    """

    terms: int = 5

    def __post_init__(self):
        check_number(self, "terms", at_least=1, whole=True, static=True)

    run = _run_at_equilibrium

    def pullback(self, f, z_star, inputs, z_bar, solver, batch_ndim):
        _, vjp = jax.vjp(f, z_star, inputs)
        # u_{k+1} = z̄ + Jᵀuₖ from u₁ = z̄
        u = jax.lax.fori_loop(1, self.terms, lambda k, u: _add(z_bar, vjp(u)[0]), z_bar)
        return vjp(u)[1], _unmeasured(self.terms - 1, z_bar, batch_ndim)


@config
class JFB:
    """Jacobian-free backpropagation, u = z̄: the gradient of one application of f at the equilibrium.

    The cheapest, and a descent direction for a strong enough contraction. Fung et al. (2022), Eq 9.

    >>> import deq_jax as deq
    >>> deq.JFB()
    JFB()
    """

    run = _run_at_equilibrium

    def pullback(self, f, z_star, inputs, z_bar, solver, batch_ndim):
        return Neumann(1).pullback(f, z_star, inputs, z_bar, solver, batch_ndim)


@config
class Phantom:
    """The gradient of `steps` damped applications of f that start at the equilibrium.

    Geng et al. (2021), unrolled phantom gradient: h ← h + damping (f(h) − h) from h = z*. The value that is
    returned is z* itself. Backward memory grows with `steps`.

    >>> import deq_jax as deq
    >>> deq.Phantom(steps=5, damping=0.8)
    Phantom(steps=5, damping=0.8)
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self):
        check_number(self, "steps", at_least=1, whole=True, static=True)
        check_number(self, "damping", at_least=0, below=1)

    run = _run_at_equilibrium

    def pullback(self, f, z_star, inputs, z_bar, solver, batch_ndim):
        def unrolled(inputs):
            step = lambda h, _: (_lerp(h, f(h, inputs), self.damping), None)
            return jax.lax.scan(step, z_star, length=self.steps)[0]

        return jax.vjp(unrolled, inputs)[1](z_bar)[0], _unmeasured(self.steps, z_bar, batch_ndim)


# ---- through the iterations --------------------------------------------------------------------------------


@config
class Unroll:
    """Backpropagation through all `max_steps` iterations: the weight-tied network of that depth.

    No stopping test: the value is the last iterate, and Stats.steps counts the one evaluation more that
    measures it (XLA drops it where the stats are not used). The derivative reaches z0 too. `checkpoint=k`
    keeps one state every k iterations and recomputes between them: 1 for every step, √max_steps for least
    memory; None keeps all intermediate values.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> depth_3 = deq.fixed_point(jnp.cos, 0.0, solver=deq.Picard(max_steps=3), adjoint=deq.Unroll())
    >>> bool(jnp.allclose(depth_3.value, jnp.cos(jnp.cos(jnp.cos(0.0)))))
    True
    """

    checkpoint: int | None = None

    def __post_init__(self):
        if self.checkpoint is not None:
            check_number(self, "checkpoint", at_least=1, whole=True, static=True)

    def run(self, f, z0, inputs, other, solver, batch_ndim, probe):
        if not isinstance(solver.max_steps, int):
            raise TypeError(
                "Unroll needs max_steps as a Python int, for it fixes the depth of the program; got "
                f"{solver.max_steps}. Use Implicit, Phantom, Neumann or JFB to sweep a traced step budget."
            )
        ravel, unravel = raveler(z0, batch_ndim)

        def step(carry, _):
            z, state = carry
            step, state = solver.update(ravel(f(unravel(z), inputs, other)) - z, state, z)
            return (ravel(unravel(z + step)), state), None

        z = ravel(z0)
        carry, length = (z, solver.init(z)), solver.max_steps
        if self.checkpoint is None:
            carry, _ = jax.lax.scan(step, carry, length=length)
        else:
            segment = lambda carry, n: jax.lax.scan(step, carry, length=n)[0]
            segment = jax.checkpoint(segment, static_argnums=1, prevent_cse=False)
            whole, rest = divmod(length, self.checkpoint)
            carry, _ = jax.lax.scan(lambda c, _: (segment(c, self.checkpoint), None), carry, length=whole)
            carry = segment(carry, rest) if rest else carry
        z = unravel(carry[0])
        frozen = jax.lax.stop_gradient((z, inputs))
        return z, measure(lambda z: f(z, frozen[1], other), frozen[0], solver, length, batch_ndim)


# ---- shared ------------------------------------------------------------------------------------------------


def hoist(f: Callable, *example: PyTree) -> tuple[Callable, list, list]:
    """(pure, inputs, other) with f(*z) = pure(*z, inputs, other): all that f captures becomes an argument.

    f is traced once, and `pure` replays the trace. `jax.closure_convert` hoists floats only.
    """
    # A fresh lambda: JAX caches traces by function identity, and a module updated in place keeps its own.
    closed, out_shape = jax.make_jaxpr(lambda *example: f(*example), return_shape=True)(*example)
    out_tree = jax.tree.structure(out_shape)
    inexact = [jnp.issubdtype(c.dtype, jnp.inexact) for c in closed.consts]
    inputs = [c for c, diff in zip(closed.consts, inexact, strict=True) if diff]
    other = [c for c, diff in zip(closed.consts, inexact, strict=True) if not diff]

    def pure(*args):
        *example, inputs, other = args
        inputs, other = iter(inputs), iter(other)
        consts = [next(inputs) if diff else next(other) for diff in inexact]
        return jax.tree.unflatten(out_tree, eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(example)))

    return pure, inputs, other


def _default_backward(forward: Solver) -> Solver:
    return Anderson(rtol=0.01 * forward.rtol, max_steps=forward.max_steps, history=16)


def _as_probe(stats: Stats) -> Probe:
    return jax.tree.map(lambda x: x.astype(jnp.float32), Probe(stats.steps, stats.relative_residual, stats.status))


def _unmeasured(products: int, like: PyTree, batch_ndim: int) -> Probe:
    zero = Probe.like(like, batch_ndim)
    return Probe(zero.steps + products, zero.residual + jnp.inf, zero.status + Status.MAX_STEPS)


def _power_of_two(tree: PyTree, batch_ndim: int) -> Float[Array, "*batch"]:
    """The power of two just below the largest entry of each problem; 1 for zero, no gradient."""
    tops = [
        jnp.max(jnp.abs(leaf.reshape(*leaf.shape[:batch_ndim], -1)), axis=-1).astype(jnp.float32)
        for leaf in jax.tree.leaves(jax.lax.stop_gradient(tree))
    ]
    top = functools.reduce(jnp.maximum, tops)
    usable = jnp.isfinite(top) & (top > 0)
    _, exponent = jnp.frexp(jnp.where(usable, top, 1))
    return jnp.ldexp(zeros_from(top) + 1, jnp.clip(exponent, -120, 120))


def _broadcast(scale: Float[Array, "*batch"], leaf: Array) -> Array:
    return scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim)).astype(leaf.real.dtype)


def _multiply(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf * _broadcast(scale, leaf), tree)


def _divide(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / _broadcast(scale, leaf), tree)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _lerp(a: PyTree, b: PyTree, weight: float) -> PyTree:
    return jax.tree.map(lambda a, b: (a + weight * (b - a)).astype(a.dtype), a, b)
