"""Text from a trained `DEQTransformer`, one equilibrium a token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.training.tokenizer import Vocabulary


def generate(
    graphdef: Any,
    params: PyTree,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    length: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and `length` tokens after it; the same seed gives the same text.

    `temperature` 0 takes the likeliest token. ValueError for an empty prompt, a character outside the
    vocabulary, a negative temperature, or nothing to generate.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    ids = vocabulary.encode(prompt)
    if not len(ids):
        raise ValueError("the prompt is empty: give at least one token to start from")
    # -1: nothing is given, the model decides. The last token generated is never fed back.
    given = np.concatenate([ids[1:], np.full(length, -1, np.int32)])
    following = sample_tokens(graphdef, params, ids[0], given, jax.random.key(seed), temperature)
    return vocabulary.decode([int(ids[0]), *np.asarray(following)])


@functools.partial(jax.jit, static_argnums=0)
def sample_tokens(
    graphdef: Any,
    params: PyTree,
    first: Int[Array, ""],
    given: Int[Array, " steps"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
) -> Int[Array, " steps"]:
    """The token after each one: `given` unless negative, else drawn from softmax(logits / temperature).

    The equilibrium is causal: z*_t depends on z*_s for s < t alone, and these stand in the history. So a step
    solves for one column, and gives what solving the whole text again would, up to the tolerance.
    """
    model = nnx.merge(graphdef, params)

    def step(carry, given_and_key):
        token, history = carry
        given, key = given_and_key
        logits, history, _ = model(token[None, None], history)
        logits = logits[0, -1]
        drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
        drawn = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
        token = jnp.where(given >= 0, given, drawn).astype(jnp.int32)
        return (token, history), token

    keys = jax.random.split(key, len(given))
    start = jnp.asarray(first, jnp.int32), model.empty_history(1)
    return jax.lax.scan(step, start, (given, keys))[1]
