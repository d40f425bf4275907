"""What a solve makes zero, and what it is compared with: f(z) − z with f(z), or F(z) with a scale that is measured.

A solver sees a root of F as a fixed point of

    (1)  f(z) = z − F(z) / σ,  σ = ‖J d‖ / ‖d‖ at z0, rounded to a power of two

J is the Jacobian of F. Each entry of d is plus or minus the root mean square of its leaf of z0. The residual f(z) − z
is computed as −F(z) / σ, so z is not rounded in it.

The norm of z does not say when F is small, so the scale of F is measured during the solve. For each leaf, U is the
larger of ‖F(z0)‖ and ‖J d‖. The error e(z) is the largest ‖F(z)‖ / U of the leaves. Whenever it has been halved, from
e₁ at z₁ to e at z, the scale is

    (2)  S = min U (e₁ − e) / ρ,  ρ = ‖z − z₁‖ / ‖z‖, the largest of the leaves

which is how much F changes by a relative change of z. The minimum is over the last two times that e was halved. Before
the first time, S is U e(z0). The tests of `stopping` take S in place of ‖f(z)‖: ‖F‖ / S estimates the relative change
of z that is left to make. A constant factor of F changes none of it.

Rounding in F limits how close a solve can come. It has come there if

    (3)  a move of at most TINY eps ‖z‖ from the best z has made F no smaller,  and  ‖F‖ ≤ √eps S

or if z is no larger than the rounding error of z0, and F has become small with it:

    (4)  ‖z‖ ≤ eps ‖z0‖  and  e ≤ eps^(3/4)

Elsewhere, a z that no longer moves is a minimum of ‖F‖ and not a root, and the solve spends its budget.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from deq_jax._arrays import aligned, leading_power, ratio, zeros_from
from deq_jax._config import with_options
from deq_jax._jaxprs import has_forward_mode
from deq_jax._states import Layout, choose, join, split, wide_dtype
from deq_jax._vectors import Vec, divided, scaled
from deq_jax.solvers.protocol import Solver
from deq_jax.solvers.stopping import (
    Norms,
    by_leaf,
    coupling,
    norms_at,
    over_leaves,
    relative_residual,
    relative_to,
    whole,
)


class FixedPoint:
    """f(z) = z, at the scale of f(z)."""

    def init(self, z: Vec, layout: Layout) -> tuple[()]:
        return ()

    def start(self, z: Vec, layout: Layout) -> Float[Array, "*norms"]:
        """The norms of z0, in the units of the residual; zero if they have to be measured."""
        # Where z0 is a constant, XLA would fold its norm when it compiles: 10 s for zeros of 4096 × 1024.
        return layout.norms(jax.lax.optimization_barrier(z))

    def measured(self, carry: Any, fz: Vec, layout: Layout, solver: Solver) -> tuple[Norms, Vec, Any]:
        """(the norms for the tests, the residual for the solver, what the next evaluation is to know of this one)."""
        return norms_at(carry.z, fz, layout, solver), fz - carry.z, carry.seen

    def at_floor(self, at_floor: Bool[Array, "*batch"], seen: Any) -> Bool[Array, "*batch"]:
        """Where rounding may hide all progress, from what the residuals say and from what has been seen."""
        return at_floor

    def residual(self, z: Vec, fz: Vec) -> Vec:
        return fz - z

    def product(self, direction: Vec, pushed: Vec) -> Vec:
        """The product of the residual's Jacobian with a direction, from that of f's."""
        return pushed - direction

    def asked(self, solver: Solver, norms: Norms, layout: Layout) -> Solver:
        """The solver with tolerances in the units of the residual that it is shown."""
        return solver

    def in_z(self, size: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """A norm of what is to be zero, in the units of z."""
        return size


FIXED_POINT = FixedPoint()
TINY = 16  # in units of eps, a move that is rounding


class Seen(NamedTuple):
    """What is known of the scale of F."""

    z: Vec  # where the error was last halved
    error: Float[Array, "*batch"]  # e there
    last: Float[Array, "*batch"]  # (e₁ − e) / ρ of (2), measured there; inf before
    gain: Float[Array, "*batch"]  # the smaller one of that and the one before, S / U
    start: Float[Array, "*norms"]  # ‖z0‖
    close: Bool[Array, "*batch"]  # a move as small as rounding has not made the best residual smaller
    at_floor: Bool[Array, "*batch"]


class Root(NamedTuple):
    """F(z) = 0, at the scale (2)."""

    sigma: Float[Array, "*batch"]
    units: Float[Array, "*norms"]  # U

    def init(self, z: Vec, layout: Layout) -> Seen:
        unknown = self.sigma + jnp.inf
        return Seen(z, unknown, unknown, unknown, layout.norms(z), unknown < 0, unknown < 0)

    def start(self, z: Vec, layout: Layout) -> Float[Array, "*norms"]:
        return zeros_from(self.units)

    def measured(self, carry: Any, fz: Vec, layout: Layout, solver: Solver) -> tuple[Norms, Vec, Seen]:
        z, seen, sizes = carry.z, carry.seen, layout.norms(fz)
        z_norms = layout.norms(z)
        moved = lambda past: relative_residual(Norms(layout.norms(z - past), z_norms), layout)
        error = self._error(sizes, layout)
        first = seen.error == jnp.inf
        halved = ~first & (error <= 0.5 * seen.error)
        last = jnp.where(halved, ratio(seen.error - error, moved(seen.z)), seen.last)  # (2)
        gain = jnp.where(halved, jnp.minimum(last, seen.last), jnp.where(first, error, seen.gain))

        best, since_best = self._error(carry.best_norms.residuals, layout), moved(carry.best)
        close = (error >= best) & (seen.close | ((since_best > 0) & (since_best <= TINY * layout.eps)))  # (3)
        vanishes = over_leaves(jnp.all, z_norms <= layout.eps * seen.start, layout) & (best <= layout.eps**0.75)  # (4)
        at_floor = vanishes | (close & (relative_residual(carry.best_norms, layout) <= layout.eps**0.5))
        mark, error = choose(first | halved, (z, error), (seen.z, seen.error))
        norms = Norms(sizes, self.units * by_leaf(gain, layout))
        return norms, self.residual(z, fz), Seen(mark, error, last, gain, seen.start, close, at_floor)

    def at_floor(self, at_floor: Bool[Array, "*batch"], seen: Seen) -> Bool[Array, "*batch"]:
        return seen.at_floor

    def _error(self, sizes: Float[Array, "*norms"], layout: Layout) -> Float[Array, "*batch"]:
        """e."""
        return over_leaves(jnp.max, relative_to(sizes, self.units), layout)

    def residual(self, z: Vec, fz: Vec) -> Vec:
        return divided(fz, -self.sigma)

    def product(self, direction: Vec, pushed: Vec) -> Vec:
        return divided(pushed, -self.sigma)

    def asked(self, solver: Solver, norms: Norms, layout: Layout) -> Solver:
        tolerance: Any = solver.atol + solver.rtol * whole(norms.scales, layout)
        return with_options(solver, rtol=0.0, atol=tolerance / self.sigma)

    def in_z(self, size: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return size / self.sigma


Equation = FixedPoint | Root


def root_of(F: Callable, z0: PyTree, layout: Layout, axes: tuple = ()) -> tuple[Root, int]:
    """(the equation F(z) = 0 with the scales that F has at z0, the evaluations of F that it took to measure them)."""
    floats, carried = split(z0)
    z, coupled = layout.pack(z0), coupling(axes)
    direction = layout.pack(jax.tree.map(lambda leaf: typical(leaf, layout.batch_ndim, layout.over), floats))
    at = lambda z: layout.pack(F(join(layout.unpack(z), carried)))
    value, pushed, evaluations = _pushed(at, z, direction, layout)
    sizes, changes, length = layout.norms(value), layout.norms(pushed), whole(layout.norms(direction), layout)
    gain_of = lambda norms: coupled.most(ratio(whole(norms, layout), length))
    sigma = gain_of(changes)
    sigma = jnp.where(sigma > 0, sigma, gain_of(sizes))
    sigma = leading_power(jnp.where((sigma > 0) & jnp.isfinite(sigma), sigma, 1))
    largest = jnp.maximum(sizes, changes)
    return Root(sigma, jnp.where(largest > 0, largest, by_leaf(sigma * length, layout))), evaluations


def _pushed(at: Callable, z: Vec, direction: Vec, layout: Layout) -> tuple[Vec, Vec, int]:
    """(at(z), its derivative in a direction, evaluations); by a difference if `at` has no forward mode."""
    push = lambda z, direction: jax.jvp(at, (z,), (direction,))
    if has_forward_mode(push, z, direction):
        return *push(z, direction), 1
    h, value = layout.eps**0.5, at(z)
    return value, divided(at(layout.round(z + scaled(h, direction))) - value, h), 2


def typical(leaf: Array, batch_ndim: int, over: tuple = ()) -> Array:
    """Entries ±r, of no regular pattern, with the root mean square r of the leaf, or 1 where that is zero."""
    own, shape = tuple(range(batch_ndim, leaf.ndim)), leaf.shape[batch_ndim:]
    moduli = jnp.abs(leaf).astype(wide_dtype(leaf))
    top = jnp.max(moduli, axis=own, keepdims=True)
    top = jax.lax.pmax(top, over) if over else top
    unit = moduli / jnp.where(top > 0, top, 1)
    mean = jnp.mean(unit**2, axis=own, keepdims=True)
    size = jnp.where(top > 0, top * jnp.sqrt(jax.lax.pmean(mean, over) if over else mean), 1)
    count = aligned(jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape), leaf)
    # No device repeats the pattern of another one: the pieces count on, as those of a first axis that is split.
    count = count + jax.lax.axis_index(over).astype(jnp.float32) * math.prod(shape) if over else count
    count = count + zeros_from(moduli).astype(jnp.float32)  # which is sharded as the leaf is
    # Not by `where`: of two numbers jax 0.12 makes an array that is not sharded.
    is_negative = (jnp.cos(2.4 * count * (1 + count)) < 0).astype(size.dtype)
    return ((1 - 2 * is_negative) * size).astype(leaf.dtype)
