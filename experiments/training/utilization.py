"""How much of a device's peak the evaluations of f use: model FLOPs utilization."""

import jax
from flax import nnx

from experiments.training.data import Segment
from experiments.training.loop import TrainState

# Published peaks of dense products, operations a second, by the beginning of `device_kind`: in bfloat16, and at JAX's
# default precision in float32, which is TF32 on a GPU and one pass of bfloat16 on a TPU.
PEAKS = {
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100": (989.4e12, 494.7e12),
    "NVIDIA H200": (989.4e12, 494.7e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),  # v5p
    "TPU v6 lite": (918e12, 918e12),
}


def peak(dtype: str) -> float | None:
    """Of all devices together; None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAKS if kind.startswith(name)]
    return jax.device_count() * PEAKS[max(known, key=len)][dtype != "bfloat16"] if known else None


def evaluation_flops(graphdef: nnx.GraphDef, state: TrainState, batch: Segment) -> float | None:
    """Operations of an evaluation of f for a whole batch, as XLA counts them before it optimizes; None if it cannot."""

    def solved(params, history):
        model = nnx.merge(graphdef, params)
        return model.hidden(batch.inputs, history).solution.value, model.context(batch.inputs, history)

    z, context = jax.eval_shape(solved, state.params, state.carry)
    f = lambda params, z, context: nnx.merge(graphdef, params).cell.f(z, context)
    return (jax.jit(f).lower(state.params, z, context).cost_analysis() or {}).get("flops")
