"""The paper's two model families at the sizes that a page asks for, and their optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from deq_jax.models import DEQTransformer, DEQTrellisNet, TransformerConfig, TrellisNetConfig
from experiments.training import cli
from experiments.training.loop import make_optimizer


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it reads."""

    dim: int
    heads: int
    inner_dim: int
    batch: int
    length: int
    mem_len: int
    vocab_size: int = 64  # so small that the embedding does not count

    def __post_init__(self):
        for name in ("dim", "heads", "inner_dim", "batch", "length", "vocab_size"):
            cli.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


def transformer_config(shape: Shape) -> TransformerConfig:
    sizes = {name: getattr(shape, name) for name in ("dim", "heads", "inner_dim", "mem_len")}
    return TransformerConfig(shape.vocab_size, **sizes)


def transformer(shape: Shape) -> DEQTransformer:
    return DEQTransformer(transformer_config(shape), rngs=nnx.Rngs(0))


def trellisnet(shape: Shape) -> DEQTrellisNet:
    """Of `dim` channels that are not decoded and `inner_dim` that are; heads and memory mean nothing here."""
    config = TrellisNetConfig(shape.vocab_size, hidden_dim=shape.dim, output_dim=shape.inner_dim)
    return DEQTrellisNet(config, rngs=nnx.Rngs(0))


# A model family is one entry: its constructor, from a Shape. The model is called and read as a DEQTransformer is.
FAMILIES: dict[str, Callable[[Shape], Any]] = {"DEQTransformer": transformer, "DEQTrellisNet": trellisnet}


def optimizer(config: Any) -> Any:
    """Constant after its warm-up: every point of a curve is then a fair end of training, at equal steps and time."""
    return make_optimizer(lr=config.lr, warmup_steps=20, total_steps=10**9, clip=1.0)
