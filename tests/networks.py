"""What the tests of the two language models share: compiled calls, tokens and draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCAB = 11
# Half the time of these tests is compilation; the level halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=0)
def apply(graphdef, params, *args, **options):
    return nnx.merge(graphdef, params)(*args, **options)


def run(model, *args, **options):
    return apply(*nnx.split(model), *args, **options)


def sequences(time, batch=2, seed=0):
    return jnp.array(np.random.default_rng(seed).integers(VOCAB, size=(batch, time)), jnp.int32)


def normal(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape))
