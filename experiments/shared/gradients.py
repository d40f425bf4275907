"""The gradient of a language model, and its angle to the one in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov
from experiments.shared import study
from experiments.shared.numerics import GMRES, float64
from experiments.training import data, lm_model

# ---- the gradient ------------------------------------------------------------------------------------------


def gradient_of(graphdef: Any):
    """A compiled (params, segment, carry, solver, adjoint) -> (gradient, forward and backward statistics)."""

    @jax.jit
    def gradient(params, segment, carry, solver, adjoint):
        def loss(params, probe):
            key = jax.random.key(0)
            value, (_, _, metrics) = lm_model.loss_fn(graphdef, solver, adjoint, params, probe, (), segment, key, carry)
            return value, metrics

        probe = deq.Probe.zeros(segment.inputs.shape[:1])
        (grads, backward), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probe)
        return grads, {
            "evaluations": metrics["fwd_steps"],
            "residual": metrics["fwd_residual"],
            "products": backward.steps.mean(),
            "backward_residual": backward.residual.max(),
        }

    return gradient


def flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def angle(got: PyTree, want: np.ndarray) -> dict[str, float]:
    got = flat(got)
    sizes = np.linalg.norm(got), np.linalg.norm(want)
    return {
        "cosine": float(got @ want / (sizes[0] * sizes[1])),
        "error": float(np.linalg.norm(got - want) / sizes[1]),
        "size": float(sizes[0] / sizes[1]),
    }


def reference(
    config: lm_model.Config, vocabulary: Any, state: Any, segment: data.Segment
) -> tuple[np.ndarray, dict[str, Any]]:
    """The gradient in float64, both equilibria to 1e-10: by GMRES behind Anderson with a long memory."""
    with float64():
        wide = dataclasses.replace(config, dtype="float64")
        graphdef, _ = nnx.split(lm_model.build(wide, vocabulary), nnx.Param)
        to_wide = functools.partial(
            jax.tree.map, lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        )
        solver = deq.Anderson(rtol=1e-10, max_steps=400, history=20)
        backward = NewtonKrylov(rtol=1e-10, max_steps=400, krylov=60, forcing=1e-11, **GMRES)
        grads, told = gradient_of(graphdef)(
            to_wide(state.params), segment, to_wide(state.carry), solver, deq.Implicit(backward)
        )
        return flat(grads), study.plain(told)
