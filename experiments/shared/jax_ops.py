"""What a cell needs of JAX; `torch_ops` has the same names, so that each cell is written once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

einsum, tanh, softmax = jnp.einsum, jnp.tanh, jax.nn.softmax
gelu = jax.nn.gelu  # by its default, the approximation with tanh


def layer_norm(x, scale):
    """Over the last axis, times `scale`."""
    centered = x - x.mean(-1, keepdims=True)
    return scale * centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


def group_norm(x, scale, groups):
    """Of `[batch, height, width, channels]`, times a `scale` a channel."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    centered = split - split.mean((1, 2, 4), keepdims=True)
    unit = centered * jax.lax.rsqrt((centered**2).mean((1, 2, 4), keepdims=True) + 1e-5)
    return unit.reshape(x.shape) * scale


@jax.custom_jvp
def conv3(x, kernel):
    """A 3×3 convolution, same size, `[batch, height, width, in]` and `[3, 3, in, out]`.

    Its derivatives are spelt out, for those that JAX derives take 120 ms instead of 4 inside a loop on a CPU: XLA has
    no fast kernel for a reversed window whose contents it does not know.
    """
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv3_jvp(primals: Any, tangents: Any) -> Any:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    along = lambda kernel, t: conv3(t, kernel)
    back = lambda kernel, u: conv3(u, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    out, terms = conv3(x, kernel), []
    if type(x_dot) is not SymbolicZero:
        terms.append(jax.custom_derivatives.linear_call(along, back, kernel, x_dot))
    if type(kernel_dot) is not SymbolicZero:  # as nine products
        _, height, width, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        terms += [padded[:, i : i + height, j : j + width] @ kernel_dot[i, j] for i in range(3) for j in range(3)]
    return out, sum(terms) if terms else SymbolicZero(jax.typeof(out))


conv3.defjvp(_conv3_jvp, symbolic_zeros=True)


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
