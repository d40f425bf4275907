"""The exact gradient of a finite number of iterations, without keeping any of them."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax._config import cast_options, check_number, config
from deq_jax.adjoints.base import conj, first_order_only, reverse_mode_only
from deq_jax.solvers.base import (
    Stats,
    Status,
    judge,
    leaf_norms,
    leaves_of,
    per_problem,
    raveler,
    wide_dtype,
    within,
    zeros_from,
)

SPOILED = 1e-2  # relative error of a state walked back to z0 from which on we warn


@config
class Reversible:
    """Backpropagation through reversible iterations, which are walked back instead of kept: O(1) memory.

    Two coupled sequences, each relaxed by `damping` toward f of the other (McCallum et al. 2025,
    "Reversible Deep Equilibrium Models"): the solver gives its tolerances and its budget of evaluations only,
    two a step. The gradient is that of the steps taken, converged or not, and reaches z0. First order only.

    Walking back multiplies rounding errors by 1/(1 − damping) a step, so the sequences are kept in float64 where
    JAX has x64 enabled, whatever f computes in. Without x64 a long budget is warned about: at damping 0.5 about
    ten steps (`max_steps=21`) are what float32 can walk back.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> def root(a, adjoint):
    ...     f = lambda z: 0.5 * jnp.cos(a * z)
    ...     return deq.fixed_point(f, 0.0, solver=deq.Picard(max_steps=21), adjoint=adjoint).value
    >>> exact, walked_back = (jax.grad(root)(1.0, adjoint) for adjoint in (deq.Implicit(), deq.Reversible(0.5)))
    >>> bool(abs(walked_back - exact) < 1e-3)
    True
    """

    damping: float = 0.5

    def __post_init__(self):
        why = (
            "at 0 nothing moves, and at 1 a step forgets the state before it. For undamped steps use "
            "Unroll(checkpoint=True)"
        )
        check_number(self, "damping", above=0, below=1, why=why)

    def run(self, f, z0, inputs, other, solver, batch_ndim, probe):
        rules = cast_options(jax.lax.stop_gradient((self.damping, solver)), _wide(wide_dtype(z0)))
        return _solve(f, batch_ndim, rules, *reverse_mode_only((z0, inputs)), other)

    def warn(self, z0, solver):
        if not (isinstance(self.damping, int | float) and isinstance(solver.max_steps, int)):
            return  # traced
        eps = float(jnp.finfo(_wide(raveler(z0, 0)[0](z0).dtype)).eps)
        steps = max(solver.max_steps - 1, 0) // 2
        lost = steps * math.log10(1 / (1 - self.damping)) + math.log10(eps)
        if lost > math.log10(SPOILED):
            fits = int((math.log10(SPOILED) - math.log10(eps)) / math.log10(1 / (1 - self.damping)))
            warnings.warn(
                f"Reversible(damping={self.damping}) with max_steps={solver.max_steps}: walking back {steps} steps "
                f"multiplies rounding errors by 1e{lost - math.log10(eps):.0f}, more than the state's precision of "
                f"{eps:.0e} bears. Take max_steps <= {2 * fits + 1}, a smaller damping, or enable x64",
                stacklevel=3,
            )


def _wide(dtype):
    return jnp.dtype(jnp.float64) if jax.config.read("jax_enable_x64") else dtype


def _walk(f, batch_ndim, rules, z0, inputs, other):
    """(y, z) after the steps taken, the number of them for each problem, and the statistics of z."""
    ravel, unravel = raveler(z0, batch_ndim)
    start = ravel(z0)
    start = start.astype(_wide(start.dtype))
    damping, solver = per_problem(rules[0]), rules[1]
    call = lambda z: ravel(f(unravel(z), inputs, other)).astype(start.dtype)

    leaves, of_leaves = leaves_of(z0), leaf_norms(z0, batch_ndim)
    norms = lambda z, fz: (of_leaves(fz - ravel(unravel(z)).astype(fz.dtype)), of_leaves(fz))

    def body(carry):
        y, z, fz, running, steps = carry
        move = lambda old, new: jnp.where(running[..., None], new, old)
        # y ← (1 − β) y + β f(z), then z ← (1 − β) z + β f(y)
        y = move(y, (1 - damping) * y + damping * fz)
        z = move(z, (1 - damping) * z + damping * call(y))
        fz, steps = call(z), steps + running.astype(jnp.int32)
        return y, z, fz, running & ~within(*norms(z, fz), solver, leaves) & (2 * steps + 3 <= solver.max_steps), steps

    fz = call(start)
    running = ~within(*norms(start, fz), solver, leaves) & (solver.max_steps >= 3)
    carry = start, start, fz, running, zeros_from(start[..., 0]).astype(jnp.int32)
    y, z, fz, _, steps = jax.lax.while_loop(lambda carry: jnp.any(carry[3]), body, carry)

    stats = judge(*norms(z, fz), solver, 2 * steps + 1, leaves)
    nothing = 0, jnp.inf, jnp.inf, Status.MAX_STEPS  # what is known where no evaluation was allowed
    stats = Stats(*(jnp.where(solver.max_steps > 0, known, none) for known, none in zip(stats, nothing, strict=True)))
    return y, z, steps, stats


def _walk_forward(f, batch_ndim, rules, z0, inputs, other):
    return _solve_fwd(f, batch_ndim, rules, z0, inputs, other)[0]


_solve: Any = jax.custom_vjp(_walk_forward, nondiff_argnums=(0, 1))


def _solve_fwd(f, batch_ndim, rules, z0, inputs, other):
    y, z, steps, stats = _walk(f, batch_ndim, rules, z0, inputs, other)
    return (raveler(z0, batch_ndim)[1](z), stats), (rules, y, z, steps, inputs, other)


def _solve_bwd(f, batch_ndim, saved, cotangents):
    (damping, _), y, z, steps, inputs, other = saved
    z_bar, _ = cotangents
    ravel, unravel = raveler(z_bar, batch_ndim)
    damping = per_problem(damping)
    keep = 1 - damping

    def pull(at, weight):
        """f(at), and the pullbacks of `weight` through f at `at`."""
        fz, vjp = jax.vjp(lambda z, inputs: f(z, inputs, other), unravel(at), inputs)
        at_bar, inputs_bar = vjp(conj(unravel(weight)))
        return ravel(fz).astype(at.dtype), ravel(conj(at_bar)).astype(at.dtype), inputs_bar

    def body(k, carry):
        y, z, y_bar, z_bar, inputs_bar = carry
        active = (k < steps)[..., None]
        # z = (1 − β) z₋ + β f(y)  ⇒  z₋ = (z − β f(y)) / (1 − β), and its cotangents
        fy, from_z, more = pull(y, jnp.where(active, damping * z_bar, 0))
        inputs_bar = jax.tree.map(jnp.add, inputs_bar, more)
        y_bar = y_bar + from_z
        z = jnp.where(active, (z - damping * fy) / keep, z)
        z_bar = jnp.where(active, keep * z_bar, z_bar)
        # y = (1 − β) y₋ + β f(z₋), likewise
        fz, from_y, more = pull(z, jnp.where(active, damping * y_bar, 0))
        inputs_bar = jax.tree.map(jnp.add, inputs_bar, more)
        z_bar = z_bar + from_y
        y = jnp.where(active, (y - damping * fz) / keep, y)
        y_bar = jnp.where(active, keep * y_bar, y_bar)
        return y, z, y_bar, z_bar, inputs_bar

    # The last step is undone first; a problem that took fewer steps starts undoing at once and then waits.
    z_bar = ravel(conj(z_bar)).astype(z.dtype)
    carry = y, z, zeros_from(z_bar), z_bar, jax.tree.map(zeros_from, inputs)
    *_, y_bar, z_bar, inputs_bar = jax.lax.fori_loop(0, jnp.max(steps), body, carry)
    z0_bar, inputs_bar = first_order_only((conj(unravel(y_bar + z_bar)), inputs_bar), "Reversible")
    return None, z0_bar, inputs_bar, None


_solve.defvjp(_solve_fwd, _solve_bwd)
