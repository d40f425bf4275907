"""A training step before anything is there: its state and batch as shapes with shardings, and its lowered program."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from experiments.training import data, lm_train
from experiments.training.lm_model import Config, build
from experiments.training.loop import TrainState
from experiments.training.mesh import ONE_DEVICE, Placement, parse

# Words and characters of the corpora that have a name, so that none of them has to be read.
VOCABULARIES = {
    ("shakespeare", "char"): 65,
    ("ptb", "word"): 10_000,
    ("wikitext-2", "word"): 33_278,
    ("wikitext-103", "word"): 267_735,
}


class Step(NamedTuple):
    state: TrainState  # of shapes
    batch: data.Segment  # likewise
    lowered: Any


def vocabulary_size(config: Config) -> int:
    """Of the configuration's corpus; ValueError for a text of the user's."""
    key = config.data, config.level
    if key not in VOCABULARIES:
        known = ", ".join(f"{name} ({level})" for name, level in VOCABULARIES)
        raise ValueError(f"--vocab-size is known of {known}; give it for {config.data!r} at level {config.level}")
    return VOCABULARIES[key]


def lower(config: Config, words: int, placement: Placement = ONE_DEVICE) -> Step:
    """The step after the warm-up, lowered for the devices of the placement, which need not exist.

    >>> from experiments.training.lm_model import Config
    >>> step = lower(Config(batch=8, length=16, mem_len=16, dim=32, inner_dim=64), 65)
    >>> step.batch.inputs.shape, step.state.params["embedding"].shape
    ((8, 16), (65, 32))
    """
    vocabulary: Any = range(words)  # `build` asks only for its length
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(config, vocabulary)), nnx.Param)
    state = jax.eval_shape(lambda: lm_train.start_state(config, vocabulary)[1])
    tokens, flag = jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)
    batch = data.Segment(tokens, tokens, flag)  # type: ignore[arg-type]  shapes stand for arrays
    if placement.mesh is not None:
        state = placed(state, placement.state(params, state, lm_train.optimizer(config)))
        batch = placed(batch, placement.of_batch(batch))
    _, step = lm_train.make_steps(config, graphdef, state, placement)
    return Step(state, batch, step.lower(state, batch))


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_of(shapes: PyTree) -> int:
    """The bytes of these arrays that one device holds."""

    def held(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return math.prod(shape) * (8 if is_key else x.dtype.itemsize)

    return sum(map(held, jax.tree.leaves(shapes)))


def history_bytes(solver: Any, config: Config, devices: int) -> int:
    """The bytes of a device's part of what a solver remembers: rows of states, in float32."""
    if solver is None:
        return 0
    z = jax.ShapeDtypeStruct((1, config.batch * config.length * state_width(config) // devices), jnp.float32)
    rows = [x for x in jax.tree.leaves(jax.eval_shape(solver.init, z)) if x.ndim == 3 and x.shape[-1] == z.shape[-1]]
    return sum(x.size * x.dtype.itemsize for x in rows)


def state_width(config: Config) -> int:
    """The numbers in a column of z; a TrellisNet's has two of each of its channels, hidden and decoded."""
    return config.dim if config.model == "transformer" else 2 * (config.dim + (config.output_dim or config.dim))


def gradient_bytes(params: PyTree) -> int:
    """The bytes of a device's part of the gradient, which is that of the parameters once gathered over fsdp."""

    def parts(x) -> int:
        return 1 if x.sharding is None or "fsdp" not in x.sharding.spec else x.sharding.mesh.shape["fsdp"]

    return sum(bytes_of(x) * parts(x) for x in jax.tree.leaves(params))


def memory(config: Config, step: Step, program: Any) -> dict[str, int]:
    """Bytes of one device, by what they are for.

    Parameters, optimizer and history of the text are exact, and so is the total, by the compiler's plan. Within the
    temporaries, which XLA uses again and again, are the gradient, as many bytes of parameters gathered over fsdp, and
    the rows of states that the solves remember.
    """
    plan, sizes = program.memory_analysis(), parse(config.mesh or "data=1")
    devices = math.prod(sizes.values())
    return {
        "parameters": bytes_of(step.state.params),
        "optimizer": bytes_of(step.state.opt_state),
        "text": bytes_of(step.state.carry) + bytes_of(step.batch),
        "gradient": gradient_bytes(step.state.params),
        "forward": history_bytes(config.solver, config, devices),
        "backward": history_bytes(getattr(config.adjoint, "solver", None), config, devices),
        "temporaries": int(plan.temp_size_in_bytes),
        "total": sum(
            int(getattr(plan, f"{name}_size_in_bytes")) * sign
            for name, sign in (("argument", 1), ("output", 1), ("alias", -1), ("temp", 1))
        ),
    }
