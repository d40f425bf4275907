"""Backpropagation through the iterations, with or without checkpoints."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._checks import check_number
from deq_jax._config import config, with_options
from deq_jax._states import Layout, choose, join, split
from deq_jax._values import concrete
from deq_jax._vectors import Vec, zero_of
from deq_jax.adjoints.backward import over_shards
from deq_jax.adjoints.protocol import Problem
from deq_jax.solvers import Solver, Stats
from deq_jax.solvers.carry import layout_for
from deq_jax.solvers.loop import evaluated
from deq_jax.solvers.norms import for_state, holds, pieces_of, relative_to, sizes_of
from deq_jax.solvers.protocol import check_sees_all, member
from deq_jax.solvers.stopping import Norms, comparable, has_converged, over_leaves, tolerances, whole, with_score

ROUNDING = 8  # a relative residual of so many eps, of the solver's dtype, tells an acceleration nothing more


@config
class Unroll:
    """Backpropagation through the iterations of the solver: for `Picard`, the weight-tied network of that depth.

    All `max_steps` iterations are run, and the last iterate is the value. Where `max_steps` is an array, each problem
    has its own number of them, and the program is as deep as the largest, or as `depth` if the array is traced. With
    `stop=True` a problem keeps the first iterate that meets the tolerances, and f is not called once all problems have
    stopped. A value that has converged says nothing about its derivative, so the residual must also meet the tolerance
    relative to the distance from z0: a problem that starts near the solution goes on, and one that starts at the
    solution runs to the end of the budget. With z0 = 0 the two conditions are the same. Once the residual is rounding,
    a solver with a memory stands still, and the derivative is that of the steps before. In a direction along which the
    solve never moved, this derivative may be far from that of the fixed point.

    For a solver that may take a step back (`Broyden` with its line search, `NewtonKrylov`, `Robust`) the value is the
    best iterate it has seen. Which steps it took, and how far a trust region let them go, are constants. `Stats.steps`
    counts the one extra evaluation that measures the value (XLA drops it where the stats are not used). The derivative
    reaches z0 too, in forward and in reverse mode. Carried leaves are those after the iterations: the extra evaluation
    does not advance them.

    Memory of the backward pass for L iterations, in linearizations of f: L with `checkpoint=None`; with
    `checkpoint=k`, L/k states and k linearizations, for one more forward pass. So 1 keeps every state and one
    linearization, and True takes k = ⌈√L⌉ (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> depth_3 = deq.fixed_point(jnp.cos, 0.0, solver=deq.Picard(max_steps=3), adjoint=deq.Unroll())
    >>> bool(jnp.allclose(depth_3.value, jnp.cos(jnp.cos(jnp.cos(0.0)))))
    True
    >>> stopped = deq.fixed_point(jnp.cos, 0.0, solver=deq.Picard(rtol=0.1), adjoint=deq.Unroll(stop=True))
    >>> int(stopped.stats.steps), bool(stopped.stats.converged)
    (8, True)
    """

    checkpoint: int | bool | None = None
    stop: bool = False
    depth: int | None = None

    def __post_init__(self):
        if self.depth is not None:
            check_number(self, "depth", at_least=0)
        if self.checkpoint is not None and self.checkpoint is not True:
            check_number(self, "checkpoint", at_least=1)

    def check(self, z0: PyTree, solver: Solver) -> "Unroll | None":
        """This adjoint, with the depth of the program where the budgets of the problems say it."""
        if isinstance(solver.max_steps, int):
            return None
        budgets = concrete(solver.max_steps)
        if budgets is None and self.depth is None:
            raise TypeError(
                "Unroll needs max_steps as a Python int, or as an array whose entries are known, because it fixes the "
                f"depth of the program; got {solver.max_steps}. Unroll(depth=...) fixes it too. Use Implicit, Phantom, "
                "Neumann or JFB to sweep a traced step budget."
            )
        if budgets is not None and self.depth is not None and budgets.max() > self.depth:
            raise ValueError(f"Unroll.depth must be at least max_steps={budgets.max()}, got {self.depth}")
        return self if budgets is None else with_options(self, depth=int(budgets.max()))

    def run(self, problem: Problem, z0: PyTree, solver: Solver) -> tuple[PyTree, Stats]:
        layout = layout_for(solver, z0, problem.batch_ndim, problem.over)
        given_solver, solver = solver, for_state(solver, z0, problem.batch_ndim, problem.over)
        iterate, start = self._iteration(problem, layout, solver, z0)
        if self.stop:
            running = lambda carry: over_shards(jnp.any(carry.running).astype(jnp.int32), problem.inputs) > 0
            body = lambda carry: jax.lax.cond(running(carry), iterate, lambda carry: carry, carry)
        else:
            body = iterate
        depth: Any = solver.max_steps if isinstance(solver.max_steps, int) else self.depth
        end = self._scanned(body, start, depth)
        z, given = (end.best, end.best_carried) if member(solver, "recovers") else (end.z, end.carried)
        z = layout.unpack(z)
        return join(z, end.returned), problem.stats_at(join(z, given), given_solver, end.steps)

    def _iteration(self, problem, layout, solver, z0) -> "tuple[Callable[[Iterate], Iterate], Iterate]":
        """The map from iterate to iterate, and the first one."""
        z0, carried = layout.pack(z0), split(z0)[1]
        state, frozen_z0 = solver.init(z0), jax.lax.stop_gradient(z0)
        accelerated, recovers = bool(jax.tree.leaves(state)), member(solver, "recovers")
        budgets = None if isinstance(solver.max_steps, int) else solver.max_steps
        if accelerated:  # without memory, rarer tests change no iterate
            check_sees_all(solver, "Unroll")

        def iterate(carry: Iterate) -> Iterate:
            z, given, running = carry.z, carry.carried, carry.running
            fz, fz_tree, products = evaluated(problem, solver, layout, carry.state, z, given)
            g = fz - z
            returned = choose(running, split(fz_tree)[1], carry.returned)
            carry = carry._replace(steps=carry.steps + running.astype(jnp.int32), carried=returned, returned=returned)
            frozen_g, fz = jax.lax.stop_gradient((g, g + z))
            norms = Norms(layout.norms(frozen_g), layout.norms(fz))  # XLA drops what nothing below reads
            norms = with_score(norms, frozen_g, fz, layout, solver)
            residual = whole(norms.residuals, layout)
            if recovers:
                better = running & (residual < carry.least)
                best, least = choose(better, (z, residual), (carry.best, carry.least))
                best_carried = choose(better, given, carry.best_carried)
                carry = carry._replace(best=best, least=least, best_carried=best_carried)
            if self.stop:
                ended = _has_ended(norms, frozen_g, fz, frozen_z0, solver, layout)
                least = member(solver, "min_steps")
                running = running & ~(ended & (carry.steps >= least) if least else ended)
                carry = carry._replace(running=running, carried=choose(running, returned, given))
            elif not accelerated and budgets is None:
                return carry._replace(z=layout.round(z + solver.update(g, carry.state, z)[0]))
            eps = float(jnp.finfo(z.dtype).eps)
            rounding = (residual <= ROUNDING * eps * whole(norms.scales, layout)) & accelerated
            held = rounding if budgets is None and not self.stop else rounding | ~running
            new_z, state = _step(solver, layout, carry, g, held, products)
            running = carry.running if budgets is None else running & (carry.steps < budgets)
            return carry._replace(z=new_z, state=state, running=running)

        zero = zero_of(frozen_z0)
        running = zero == 0 if budgets is None else (zero == 0) & (budgets > 0)
        start = Iterate(z0, state, running, zero.astype(jnp.int32), z0, zero + jnp.inf, carried, carried, carried)
        return iterate, start

    def _scanned(self, body: Callable, carry: "Iterate", length: int) -> "Iterate":
        """The carry after `length` iterations, with a checkpoint after each segment of them."""
        every = math.isqrt(length - 1) + 1 if self.checkpoint is True and length else self.checkpoint
        scan = lambda body, carry, length: jax.lax.scan(lambda c, _: (body(c), None), carry, length=length)[0]
        if not every:
            return scan(body, carry, length)
        segment = jax.checkpoint(lambda carry, n: scan(body, carry, n), static_argnums=1, prevent_cse=False)
        segments, rest = divmod(length, every)
        carry = scan(lambda c: segment(c, every), carry, segments)
        return segment(carry, rest) if rest else carry


class Iterate(NamedTuple):
    """What is carried from iteration to iteration."""

    z: Vec
    state: Any  # the solver's
    running: Bool[Array, "*batch"]
    steps: Int[Array, "*batch"]
    best: Vec  # with `least`, of a solver whose steps may be trials
    least: Float[Array, "*batch"]
    carried: PyTree  # carried leaves, as in the loop's own `Carry`: what f is given beside z,
    best_carried: PyTree  # what it was given beside the best z,
    returned: PyTree  # and what it returned last


def _step(
    solver: Solver, layout: Layout, carry: Iterate, g: Vec, held: Bool[Array, "*batch"], products: tuple
) -> tuple[Vec, Any]:
    """The next z and state; a problem that is held keeps both."""
    # A step that is not taken has no derivative: that of the arithmetic behind it may be infinite.
    arguments = g, carry.state, carry.z, *products
    step, state = solver.update(*choose(held, jax.lax.stop_gradient(arguments), arguments))
    z = layout.round(member(solver, "next_point")(state, carry.z + step))
    return choose(held, (carry.z, carry.state), (z, state))


def _has_ended(norms: Norms, residual: Vec, fz: Vec, z0: Vec, solver: Solver, layout: Layout) -> Bool[Array, "*batch"]:
    """Within the tolerance of the value, and of the distance from the start: that many times smaller is Jᵏ too."""
    traveled = layout.norms(fz - z0)
    if norms.score is not None:
        pieces = pieces_of(residual, fz, norms[:2], solver, layout)
        distances = sizes_of(fz - z0, traveled, solver, layout)
        contracted = [_has_contracted(*piece, d, layout) for piece, d in zip(pieces, distances, strict=True)]
        return has_converged(norms, solver, layout) & holds(contracted, solver, layout)
    sizes = comparable(norms, layout)
    tolerance = tolerances(sizes, solver, layout)
    contracted = over_leaves(jnp.all, _has_contracted(norms.residuals, sizes, tolerance, traveled, layout), layout)
    return has_converged(norms, solver, layout) & contracted


def _has_contracted(residuals: Array, sizes: Array, tolerance: Array, traveled: Array, layout: Layout) -> Array:
    # What rounding hides is no contraction.
    residuals = jnp.maximum(residuals, jnp.minimum(layout.eps * sizes, tolerance))
    return residuals <= tolerance * relative_to(traveled, sizes)
