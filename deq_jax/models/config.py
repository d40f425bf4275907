"""Models from what a JSON file holds, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deq_jax.models.language_model import LanguageModel
from deq_jax.models.transformer import DEQTransformer
from deq_jax.models.transformer_cell import TransformerConfig
from deq_jax.models.trellisnet import DEQTrellisNet, TrellisNetConfig

MODELS: dict[str, tuple[type[LanguageModel], type]] = {
    "DEQTransformer": (DEQTransformer, TransformerConfig),
    "DEQTrellisNet": (DEQTrellisNet, TrellisNetConfig),
}


def from_config(config: Mapping[str, Any] | TransformerConfig | TrellisNetConfig, **options: Any) -> Any:
    """The model that a config describes.

    Args:
      config: a `TransformerConfig` or `TrellisNetConfig`; or a mapping, as `to_config` makes it: the fields of one of
        them, and the name of the model as "model". Fields that are left out have their defaults.
      options: those of the model's constructor: `rngs`, which is required, `solver`, `adjoint`, `dtype`, `param_dtype`.

    Raises:
      TypeError, ValueError: if the config is neither, names no model, or has a field that the model does not have.

    >>> import json
    >>> from flax import nnx
    >>> from deq_jax import models
    >>> text = '{"model": "DEQTransformer", "vocab_size": 100, "dim": 16, "heads": 2, "inner_dim": 32, "mem_len": 8}'
    >>> model = models.from_config(json.loads(text), rngs=nnx.Rngs(0))
    >>> again = models.from_config(json.loads(json.dumps(models.to_config(model))), rngs=nnx.Rngs(0))
    >>> again.config == model.config, again.config.window
    (True, 1000)
    """
    if isinstance(config, Mapping):
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items()}
        name = fields.pop("model", None)
        if name not in MODELS:
            raise ValueError(f'from_config: config["model"] must be one of {", ".join(MODELS)}; got {name!r}')
        model, kind = MODELS[name]
        return model(kind(**fields), **options)
    for model, kind in MODELS.values():
        if isinstance(config, kind):
            return model(config, **options)
    kinds = " or ".join(kind.__name__ for _, kind in MODELS.values())
    raise TypeError(f"from_config: config must be a {kinds}, or a mapping; got {type(config).__name__}")


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The mapping that `from_config` takes, as JSON can hold it. Solver, adjoint and precision have no part in it."""
    return {"model": type(model).__name__, **dataclasses.asdict(model.config)}
