"""Backpropagation through the iterations, with or without checkpoints."""

import math

import jax
import jax.numpy as jnp

from deq_jax._config import cast_options, check_number, check_sees_all, config
from deq_jax.solvers.base import (
    choose,
    comparable,
    leaf_norms,
    leaves_of,
    measure,
    next_point,
    ratio,
    raveler,
    whole,
    wide_dtype,
    within,
    zeros_from,
)

ROUNDING = 8  # a relative residual of so many eps, of the solver's dtype, tells an acceleration nothing more


@config
class Unroll:
    """Backpropagation through the iterations of the solver: for `Picard`, the weight-tied network of that depth.

    All `max_steps` iterations are run, and the last iterate is the value. With `stop=True` a problem keeps the first
    iterate that meets the tolerances, and f is not called once all have. A value that has converged says nothing of
    its derivative, so the residual must also meet the tolerance relative to the distance from z0: from a start near
    the solution a problem goes on, and from one at the solution to the end of the budget. A start at zero changes
    nothing. A solver with a memory stands still once the residual is rounding, and the derivative is that of the
    steps before: in a direction along which the solve never moved it may be far from that of the fixed point.

    Of a solver that may take a step back (`Broyden` with its line search, `NewtonKrylov`, `Robust`) the value is the
    best iterate it has seen, and which steps it took and how far a trust region let them go are constants.
    Stats.steps counts the one evaluation more that measures the value (XLA drops it where the stats are not used).
    The derivative reaches z0 too, in forward and in reverse mode.

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

    def __post_init__(self):
        if self.checkpoint is not None and self.checkpoint is not True:
            check_number(self, "checkpoint", at_least=1)

    def run(self, f, z0, inputs, other, solver, batch_ndim, probe):
        if not isinstance(solver.max_steps, int):
            raise TypeError(
                "Unroll needs max_steps as a Python int, for it fixes the depth of the program; got "
                f"{solver.max_steps}. Use Implicit, Phantom, Neumann or JFB to sweep a traced step budget."
            )
        ravel, unravel = raveler(z0, batch_ndim)
        solver = cast_options(solver, wide_dtype(z0))
        recovers = getattr(solver, "recovers", False)
        accelerated = bool(jax.tree.leaves(jax.eval_shape(lambda: solver.init(ravel(z0)))))
        if accelerated:  # without memory, rarer tests change no iterate
            check_sees_all(solver, "Unroll")
        norms, leaves = leaf_norms(z0, batch_ndim), leaves_of(z0)
        start = jax.lax.stop_gradient(ravel(z0))

        def iterate(carry):
            z, state, running, steps, best, least = carry
            g, steps = ravel(f(unravel(z), inputs, other)) - z, steps + running.astype(jnp.int32)
            frozen_g, fz = jax.lax.stop_gradient((g, g + z))
            residuals, scales = norms(frozen_g), norms(fz)  # XLA drops what nothing below reads
            residual, scale = whole(residuals, leaves), whole(scales, leaves)
            if recovers:
                better = running & (residual < least)
                best, least = jnp.where(better[..., None], z, best), jnp.where(better, residual, least)
            if self.stop:
                running = running & ~self._ended(residuals, scales, norms(fz - start), solver, leaves)
            rounding = (residual <= ROUNDING * float(jnp.finfo(z.dtype).eps) * scale) & accelerated
            if not self.stop and not accelerated:
                return ravel(unravel(z + solver.update(g, state, z)[0])), state, running, steps, best, least
            held = rounding | ~running if self.stop else rounding
            # No step is taken where a problem is held, and the derivative of one that is not taken may be infinite.
            step, new_state = solver.update(*choose(held, jax.lax.stop_gradient((g, state, z)), (g, state, z)))
            new_z = ravel(unravel(next_point(solver, new_state, z + step)))
            new_z, new_state = choose(held, (z, state), (new_z, new_state))
            return new_z, new_state, running, steps, best, least

        def body(carry, _):
            if not self.stop:
                return iterate(carry), None
            _, _, running, *_ = carry
            return jax.lax.cond(jnp.any(running), iterate, lambda carry: carry, carry), None

        z, length = ravel(z0), solver.max_steps
        state = solver.init(z)
        zero = zeros_from(jax.lax.stop_gradient(z[..., 0]))
        carry = z, state, zero == 0, zero.astype(jnp.int32), z, zero + jnp.inf
        every = math.isqrt(length - 1) + 1 if self.checkpoint is True and length else self.checkpoint
        if not every:
            carry, _ = jax.lax.scan(body, carry, length=length)
        else:
            segment = lambda carry, n: jax.lax.scan(body, carry, length=n)[0]
            segment = jax.checkpoint(segment, static_argnums=1, prevent_cse=False)
            segments, rest = divmod(length, every)
            carry, _ = jax.lax.scan(lambda c, _: (segment(c, every), None), carry, length=segments)
            carry = segment(carry, rest) if rest else carry

        last, _, _, steps, best, _ = carry
        z = unravel(best if recovers else last)
        z_frozen, frozen, solver = jax.lax.stop_gradient((z, inputs, solver))
        return z, measure(lambda z: f(z, frozen, other), z_frozen, solver, steps, batch_ndim)

    def _ended(self, residuals, scales, travelled, solver, leaves):
        """Within the tolerance of the value, and of how far the start was: that many times smaller is Jᵏ too."""
        sizes = comparable(residuals, scales, leaves)
        tolerance = leaves.each(solver.atol) + leaves.each(solver.rtol) * sizes
        # What rounding hides is no contraction.
        seen = jnp.maximum(residuals, jnp.minimum(leaves.eps * sizes, tolerance))
        contracted = leaves.over(jnp.all, seen <= tolerance * ratio(travelled, sizes))
        return within(residuals, scales, solver, leaves) & contracted
