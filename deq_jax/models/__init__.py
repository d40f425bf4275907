"""The models of the DEQ papers, as Flax NNX modules."""

from deq_jax.models.adaptive import AdaptiveVocabulary
from deq_jax.models.config import from_config, to_config
from deq_jax.models.transformer import DEQTransformer
from deq_jax.models.transformer_cell import TransformerConfig
from deq_jax.models.trellisnet import DEQTrellisNet, TrellisNetConfig

__all__ = [
    "AdaptiveVocabulary",
    "DEQTransformer",
    "DEQTrellisNet",
    "TransformerConfig",
    "TrellisNetConfig",
    "from_config",
    "to_config",
]
