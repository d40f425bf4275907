"""What a cell needs of JAX; `torch_ops` has the same names, so that each cell is written once."""

import jax
import jax.numpy as jnp

einsum, tanh, relu, softmax = jnp.einsum, jnp.tanh, jax.nn.relu, jax.nn.softmax
gelu = jax.nn.gelu  # by its default, the approximation with tanh


def layer_norm(x, scale):
    """Over the last axis, times `scale`."""
    centred = x - x.mean(-1, keepdims=True)
    return scale * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def group_norm(x, scale, groups):
    """Of `[batch, channels, height, width]`, times a `scale` a channel."""
    split = x.reshape(x.shape[0], groups, -1)
    centred = split - split.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit.reshape(x.shape) * scale[:, None, None]


def conv3(x, kernel):
    """A 3×3 convolution, same size, `[batch, channels, height, width]` and `[out, in, 3, 3]`."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")


def take(table, tokens):
    return table[tokens]


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def total(x):
    return jnp.sum(x)


def causal(length):
    return jnp.tril(jnp.ones((length, length), bool))


def where(condition, x, otherwise):
    return jnp.where(condition, x, otherwise)
