"""The exact gradient of a finite number of iterations, without keeping any of them.

Two coupled sequences are relaxed by β, the damping, each toward f of the other:

    (1)  y ← (1 − β) y + β f(z)
    (2)  z ← (1 − β) z + β f(y)

A step can be undone, (2) first, so the backward pass walks back to z0 instead of keeping the states:

    (3)  z₋ = (z − β f(y)) / (1 − β)
    (4)  y₋ = (y − β f(z₋)) / (1 − β)
"""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from deq_jax._checks import check_number
from deq_jax._config import Number, cast_options, config
from deq_jax._reverse_only import first_order_only, reverse_mode_only
from deq_jax._states import Layout, add, check_no_carried, choose, conj, frozen, wide_dtype, zeros_like
from deq_jax._vectors import Vec, divided, scaled, zero_of
from deq_jax.adjoints.backward import over_shards
from deq_jax.adjoints.protocol import Problem
from deq_jax.solvers import Picard, Solver, Stats, Status
from deq_jax.solvers.norms import for_state
from deq_jax.solvers.protocol import member
from deq_jax.solvers.stopping import assess, has_converged, norms_at

SPOILED = 1e-2  # relative error of a state walked back to z0 from which on we warn


@config
class Reversible:
    """Backpropagation through reversible iterations, which are walked back instead of kept: O(1) memory.

    Two coupled sequences, each relaxed by `damping` toward f of the other (McCallum et al. 2025, "Reversible Deep
    Equilibrium Models"). Of the solver only the tolerances and the budget of evaluations count; a step takes two
    evaluations. The gradient is that of the steps taken, converged or not, and reaches z0. First order only.

    Walking back multiplies rounding errors by 1/(1 − damping) a step, so the sequences are kept in float64 where
    JAX has x64 enabled, whatever dtype f computes in. Without x64 a long budget raises a warning: at damping 0.5
    float32 can walk back about ten steps (`max_steps=21`). Carried leaves of z0 are refused.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def root(a, adjoint):
    ...     f = lambda z: 0.5 * jnp.cos(a * z)
    ...     return deq.fixed_point(f, 0.0, solver=deq.Picard(max_steps=21), adjoint=adjoint).value
    >>> exact, walked_back = (jax.grad(root)(1.0, adjoint) for adjoint in (deq.Implicit(), deq.Reversible(0.5)))
    >>> bool(abs(walked_back - exact) < 1e-3)
    True
    """

    damping: Number = 0.5

    def __post_init__(self):
        why = (
            "at 0 nothing moves, and at 1 a step forgets the state before it. For undamped steps use "
            "Unroll(checkpoint=True)"
        )
        check_number(self, "damping", above=0, below=1, why=why)

    def check(self, z0: PyTree, solver: Solver) -> None:
        """Refuse carried leaves, and warn if rounding would spoil the way back."""
        check_no_carried(z0, "z0", "Reversible cannot walk back what f returns for it: use Implicit() or Unroll()")
        if not (isinstance(self.damping, int | float) and isinstance(solver.max_steps, int)):
            return  # traced
        eps = float(jnp.finfo(_working_dtype(z0)).eps)
        steps = max(solver.max_steps - 1, 0) // 2
        digits_a_step, digits = math.log10(1 / (1 - self.damping)), -math.log10(eps)
        if steps * digits_a_step - digits > math.log10(SPOILED):
            fits = int((math.log10(SPOILED) + digits) / digits_a_step)
            warnings.warn(
                f"Reversible(damping={self.damping}) with max_steps={solver.max_steps}: walking back {steps} steps "
                f"multiplies rounding errors by 1e{steps * digits_a_step:.0f}, too much for the state's precision of "
                f"{eps:.0e}. Take max_steps <= {2 * fits + 1}, a smaller damping, or enable x64",
                stacklevel=3,
            )

    def run(self, problem: Problem, z0: PyTree, solver: Solver) -> tuple[PyTree, Stats]:
        options: Any = dict(norm=member(solver, "norm"), min_steps=member(solver, "min_steps"))
        stopping = Picard(solver.rtol, solver.atol, solver.max_steps, **options)  # the part of the solver that counts
        rules = self.damping, for_state(stopping, z0, problem.batch_ndim)
        rules = cast_options(frozen(rules), _working_dtype(z0))
        z0, inputs = reverse_mode_only((z0, problem.inputs))
        return _solve(rules, z0, dataclasses.replace(problem, inputs=inputs))


def _working_dtype(z0: PyTree) -> Any:
    return jnp.dtype(jnp.float64) if jax.config.read("jax_enable_x64") else wide_dtype(z0)


# ---- forward -----------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """The two sequences after some steps."""

    y: Vec
    z: Vec
    fz: Vec
    running: Bool[Array, "*batch"]
    steps: Int[Array, "*batch"]  # of two evaluations each


def _walk(rules: tuple, z0: PyTree, problem: Problem) -> tuple[Walk, Stats]:
    """The sequences where they ended, and the statistics of z."""
    layout = Layout(z0, problem.batch_ndim, over=problem.over)
    damping, solver = rules
    start = layout.pack(z0).astype(_working_dtype(z0))
    call = lambda z: layout.pack(problem(layout.unpack(z))).astype(start.dtype)

    # At the z that f sees, which is rounded to the dtypes of z0.
    norms = lambda z, fz: norms_at(layout.pack(layout.unpack(z)).astype(fz.dtype), fz, layout, solver)

    def converged(z, fz, steps):
        met = has_converged(norms(z, fz), solver, layout)
        return met & (2 * steps + 1 >= solver.min_steps) if solver.min_steps else met

    def body(walk):
        relaxed = lambda old, f_other: choose(walk.running, scaled(1 - damping, old) + scaled(damping, f_other), old)
        y = relaxed(walk.y, walk.fz)  # (1)
        z = relaxed(walk.z, call(y))  # (2)
        fz, steps = call(z), walk.steps + walk.running.astype(jnp.int32)
        running = walk.running & ~converged(z, fz, steps) & (2 * steps + 3 <= solver.max_steps)
        return Walk(y, z, fz, running, steps)

    fz = call(start)
    running = ~converged(start, fz, 0) & (solver.max_steps >= 3)
    walk = Walk(start, start, fz, running, zero_of(start).astype(jnp.int32))
    walk = jax.lax.while_loop(lambda walk: jnp.any(walk.running), body, walk)
    stats = assess(norms(walk.z, walk.fz), solver, 2 * walk.steps + 1, layout)
    nothing: Any = (0, jnp.inf, jnp.inf, Status.MAX_STEPS)  # what is known where no evaluation was allowed
    return walk, jax.tree.map(lambda known, none: jnp.where(solver.max_steps > 0, known, none), stats, Stats(*nothing))


def _value(rules, z0, problem):
    return _solve_fwd(rules, z0, problem)[0]


_solve: Any = jax.custom_vjp(_value)


def _solve_fwd(rules, z0, problem):
    walk, stats = _walk(rules, z0, problem)
    z = Layout(z0, problem.batch_ndim, over=problem.over).unpack(walk.z)
    return (z, stats), (rules[0], z, walk.y, walk.z, walk.steps, problem)


# ---- backward ----------------------------------------------------------------------------------------------


def _solve_bwd(saved, cotangents):
    damping, value, y, z, steps, problem = saved
    z_bar, _ = cotangents
    layout = Layout(value, problem.batch_ndim, over=problem.over)  # as on the way forward
    pull = _pullback(problem, layout)

    def undo(k, carry):
        y, z, y_bar, z_bar, inputs_bar = carry
        active = k < steps
        back = lambda new, f_old: choose(active, divided(new - scaled(damping, f_old), 1 - damping), new)
        weight = lambda bar: choose(active, scaled(damping, bar), zeros_like(bar))
        keep = lambda bar: choose(active, scaled(1 - damping, bar), bar)
        fy, from_z, more = pull(y, weight(z_bar))
        z, y_bar, z_bar, inputs_bar = back(z, fy), y_bar + from_z, keep(z_bar), add(inputs_bar, more)  # (3)
        fz, from_y, more = pull(z, weight(y_bar))
        y, z_bar, y_bar, inputs_bar = back(y, fz), z_bar + from_y, keep(y_bar), add(inputs_bar, more)  # (4)
        return y, z, y_bar, z_bar, inputs_bar

    # The last step is undone first; a problem that took fewer steps starts undoing at once and then waits.
    z_bar = layout.pack(conj(z_bar)).astype(z.dtype)
    carry = y, z, zeros_like(z_bar), z_bar, zeros_like(problem.inputs)
    *_, y_bar, z_bar, inputs_bar = jax.lax.fori_loop(0, over_shards(jnp.max(steps), problem.inputs), undo, carry)
    z0_bar, inputs_bar = first_order_only((conj(layout.unpack(y_bar + z_bar)), inputs_bar), "Reversible")
    return None, z0_bar, dataclasses.replace(problem, inputs=inputs_bar, other=None)


def _pullback(problem: Problem, layout: Layout) -> Any:
    """(at, weight) -> f(at), and the pullbacks of `weight` through f at `at`, to z and to the inputs."""

    def pull(at, weight):
        fz, vjp = jax.vjp(problem, layout.unpack(at), problem.inputs)
        at_bar, inputs_bar = vjp(conj(layout.unpack(weight)))
        return layout.pack(fz).astype(at.dtype), layout.pack(conj(at_bar)).astype(at.dtype), inputs_bar

    return pull


_solve.defvjp(_solve_fwd, _solve_bwd)
