"""The tasks of the backward study: cells that decode their equilibrium, and the data they are trained on."""

import csv
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deq_jax.models import DEQTransformer, TransformerConfig
from experiments.training import lm

# ---- cells and their data ----------------------------------------------------------------------------------


class Task(NamedTuple):
    """z* = cell(z*, context(params, x)) is decoded to logits."""

    init: Callable  # key -> params
    scaled: Callable  # (params, scale) -> params with a stronger or weaker cell
    context: Callable  # (params, x) -> what the cell reads
    cell: Callable  # (z, context) -> z
    zeros: Callable  # x -> z0
    logits: Callable  # (params, z) -> logits


def build(name: str) -> Task:
    return {"tanh": tanh_task, "convolution": convolution_task, "transformer": transformer_task}[name]()


def normal(key: Array, *shape: int, fan_in: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape) / fan_in**0.5


def tanh_task(dim: int = 48) -> Task:
    def init(key):
        cell, inject, decode = jax.random.split(key, 3)
        return {
            "cell": normal(cell, dim, dim, fan_in=dim),
            "inject": normal(inject, 64, dim, fan_in=64),
            "decode": normal(decode, dim, 10, fan_in=dim),
        }

    return Task(
        init,
        lambda p, scale: p | {"cell": scale * p["cell"]},
        lambda p, x: (p["cell"], x @ p["inject"]),
        lambda z, context: jnp.tanh(z @ context[0] + context[1]),
        lambda x: jnp.zeros((len(x), dim)),
        lambda p, z: z @ p["decode"],
    )


def convolution_task(channels: int = 4) -> Task:
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def init(key):
        cell, inject, decode = jax.random.split(key, 3)
        return {
            "cell": normal(cell, 3, 3, channels, channels, fan_in=9 * channels),
            "inject": normal(inject, 3, 3, 1, channels, fan_in=9),
            "decode": normal(decode, 64 * channels, 10, fan_in=64 * channels),
        }

    return Task(
        init,
        lambda p, scale: p | {"cell": scale * p["cell"]},
        lambda p, x: (p["cell"], conv(x.reshape(-1, 8, 8, 1), p["inject"])),
        lambda z, context: jnp.tanh(conv(z, context[0]) + context[1]),
        lambda x: jnp.zeros((len(x), 8, 8, channels)),
        lambda p, z: z.reshape(len(z), -1) @ p["decode"],
    )


def transformer_task(dim: int = 24) -> Task:
    config = TransformerConfig(vocab_size=65, dim=dim, heads=2, inner_dim=2 * dim, mem_len=0)
    split = lambda key: nnx.split(DEQTransformer(config, rngs=nnx.Rngs(params=key)), nnx.Param)
    graphdef, _ = split(jax.random.key(0))
    merge = lambda params: nnx.merge(graphdef, params)
    step = merge(split(jax.random.key(0))[1]).cell.f
    return Task(
        lambda key: nnx.to_pure_dict(split(key)[1]),
        # A layer norm takes the size out of all else; sharper attention is what makes this cell expand.
        lambda p, scale: p | {"cell": p["cell"] | {"qkv": jax.tree.map(lambda w: scale * w, p["cell"]["qkv"])}},
        lambda p, x: merge(p).context(x),
        step,
        lambda x: jnp.zeros((*x.shape, dim)),
        lambda p, z: merge(p).decode(z),
    )


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels), an example a row."""
    if name == "transformer":
        corpus, time = lm.load_corpus("shakespeare", level="char"), 16
        tokens = np.asarray(corpus.train[: 4000 * time + 1], np.int32)
        return tokens[:-1].reshape(-1, time), tokens[1:].reshape(-1, time)
    file = Path(os.environ.get("DEQ_JAX_DATA", ""), "digits", "digits.csv.gz")
    if file.is_file():
        with gzip.open(file, "rt") as lines:
            rows = np.array([[float(x) for x in row] for row in csv.reader(lines)], np.float32)
        return rows[:, :-1] / 16, rows[:, -1].astype(np.int32)
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=1800).astype(np.int32)
    images = rng.uniform(size=(10, 64))[labels] + 0.3 * rng.normal(size=(1800, 64))
    return images.astype(np.float32), labels
