"""The models of the DEQ papers, as Flax NNX modules."""

from deq_jax.models.transformer import DEQTransformer, TransformerConfig

__all__ = ["DEQTransformer", "TransformerConfig"]
