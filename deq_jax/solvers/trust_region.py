"""The trust region of Newton's methods: what a step has promised, what it has brought, and how far the next may go.

With g = f(z) − z and J its Jacobian, a trial of a step p of at most the trust radius is compared with the model:

    (1)  ρ = (‖g(z)‖² − ‖g(z + p)‖²) / (‖g(z)‖² − ‖g + J p‖²)
    (2)  accepted  ρ > ACCEPTED:  z ← z + p; the radius grows if ρ > GOOD and shrinks if ρ < POOR
         rejected  the radius shrinks, and the next trial goes less far
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deq_jax._arrays import ratio

ACCEPTED = 1e-4  # part of the predicted decrease of ‖g‖² that a step must bring
POOR, GOOD = 0.25, 0.75  # below, the radius shrinks; above, it may grow

# What an evaluation is for: it is the first one of f, or for a product J q, or the trial of a step.
START, PRODUCT, TRIAL = range(3)
# What it has brought: a new iterate; a product; a difference that was lost in rounding, so h is widened and q tried
# again; and, where a step comes next, no finite product; a trial that is rejected; one that is so short that Newton's
# own step is taken next, whatever it brings.
NEW, USED, LOST, FAILED, REJECTED, STUCK = range(6)


class Trial(NamedTuple):
    """What is known of the iterate and of the step from it."""

    purpose: Int[Array, "*batch"]  # of the last evaluation
    g_norm: Float[Array, "*batch"]
    z_norm: Float[Array, "*batch"]
    radius: Float[Array, "*batch"]
    promised: Float[Array, "*batch"]  # decrease of ‖g‖²; below zero for a step that is taken whatever it brings


class TrialResult(NamedTuple):
    event: Int[Array, "*batch"]  # NEW, REJECTED or STUCK
    radius: Float[Array, "*batch"]


def assess_trial(
    trial: Trial, g_norm: Float[Array, "*batch"], distance: Float[Array, "*batch"], eps: float
) -> TrialResult:
    """(1) and (2), in the problems where the last evaluation was a trial, at this distance from the iterate."""
    last, finite, tried = trial.g_norm, jnp.isfinite(g_norm), trial.purpose == TRIAL
    rho = jnp.where(finite & (trial.promised > 0), ratio((last - g_norm) * (last + g_norm), trial.promised), -1)
    accepted = finite & (rho > ACCEPTED)
    shrunk = jnp.where(finite, 0.25, 0.1) * jnp.minimum(trial.radius, distance)
    adapted = jnp.where(rho < POOR, jnp.maximum(0.5 * distance, 0.25 * trial.radius), trial.radius)
    adapted = jnp.where(rho > GOOD, jnp.maximum(adapted, 2 * distance), adapted)
    radius = jnp.where(tried, jnp.where(accepted, adapted, shrunk), trial.radius)
    # No step that the arithmetic can tell from zero has helped: a local minimum of ‖g‖. Newton's own step leaves it,
    # whatever it brings.
    stuck = tried & ~accepted & (radius <= 4 * eps * trial.z_norm)
    # How far a step may go is a decision, not a function of the inputs, and may be infinite: constant in `Unroll`.
    radius = jax.lax.stop_gradient(jnp.where(stuck, jnp.inf, radius))
    taken = accepted | (finite & (trial.promised < 0))
    return TrialResult(jnp.where(taken, NEW, jnp.where(stuck, STUCK, REJECTED)), radius)
