"""Inside the compiled step of a language model: its history, its loss, and what its metrics say of the solves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

import deq_jax as deq


def forget_at_start(history: PyTree, is_start: Bool[Array, ""] | bool) -> PyTree:
    """The history, emptied where the streams start anew: zeros, in every model."""
    return jax.tree.map(lambda leaf: jnp.where(is_start, jnp.zeros_like(leaf), leaf), history)


def cross_entropy(
    logits: Float[Array, "batch time vocab"],
    targets: Int[Array, "batch time"],
    weights: Float[Array, "batch time"] | None = None,
) -> Float[Array, ""]:
    """Σ weights · −log softmax(logits)[target], in nats, of models that have no `nll`; without weights, the mean."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses) if weights is None else jnp.sum(weights * losses)


def solve_metrics(stats: deq.Stats) -> dict[str, Array]:
    """The forward solve as scalars: mean and greatest number of evaluations, residual, share converged."""
    return {
        "fwd_steps": jnp.mean(stats.steps.astype(jnp.float32)),
        # The loop runs until its slowest problem has stopped: this is what the step costs.
        "fwd_steps_max": jnp.max(stats.steps),
        "fwd_residual": jnp.mean(stats.relative_residual),
        "converged": jnp.mean(stats.converged.astype(jnp.float32)),
    }


def backward_probe(adjoint: Any, batch: int) -> deq.Probe | None:
    """What `make_train_step` needs to log the backward solve of so many problems; None where there is none."""
    # These leave the probe as it is, and zeros in the log would read as a solve that converged at once.
    silent = isinstance(adjoint, deq.Unroll | deq.Reversible | deq.ImplicitJVP)
    return None if silent else deq.Probe.zeros((batch,))


def backward(line: dict[str, Any]) -> dict[str, float]:
    """What the metrics of a step, or a line of them, say of the backward solve."""
    return {name: float(value) for name, value in line.items() if name.startswith("bwd_")}
