"""Random cells in families, each with a fixed point: the problems of the robustness study and of others.

A family is `make(key) -> params` and `cell(z, params)` for one problem with z of `DIM` numbers, drawn so that a
fixed point exists: the cell maps a compact convex set into itself (Brouwer), or is affine with an invertible
I − A, or is strongly monotone, or its bias is chosen so that a random z* is one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

DIM = 48


class Family(NamedTuple):
    exists: str  # why it has a fixed point
    make: Callable
    cell: Callable


# ---- matrices ----------------------------------------------------------------------------------------------


def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(key, shape, jnp.float32)


def gaussian(key, radius):
    """Spectral radius `radius` on average, non-normal, complex eigenvalues."""
    return normal(key, DIM, DIM, scale=radius / DIM**0.5)


def orthogonal(key, radius=1.0):
    return radius * jnp.linalg.qr(normal(key, DIM, DIM))[0]


def with_eigenvalues(key, values):
    q = orthogonal(key)
    return (q * values) @ q.T


def symmetric(key, radius):
    a = normal(key, DIM, DIM)
    a = a + a.T
    return a * (radius / jnp.abs(jnp.linalg.eigvalsh(a)).max())


def non_normal(key, radius, above=1.0):
    """Triangular in a hidden basis: eigenvalues within ±radius, and much larger norms above the diagonal."""
    first, second, third = jax.random.split(key, 3)
    t = jnp.triu(normal(first, DIM, DIM, scale=above / DIM**0.5), 1)
    q = orthogonal(third)
    return q @ (t + jnp.diag(jax.random.uniform(second, (DIM,), jnp.float32, -radius, radius))) @ q.T


def skew(key, size):
    a = normal(key, DIM, DIM)
    return size * (a - a.T) / jnp.linalg.norm(a - a.T, 2)


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


# ---- cells -------------------------------------------------------------------------------------------------

BOUNDED, AFFINE, MONOTONE, PLANTED = "bounded image", "I − A invertible", "strongly monotone", "planted"


def layer(act: Callable, matrix: Callable, exists: str, bias: float = 1.0) -> Family:
    """z ↦ act(W z + b)."""

    def make(key):
        first, second = jax.random.split(key)
        return {"w": matrix(first), "b": normal(second, DIM, scale=bias)}

    return Family(exists, make, lambda z, p: act(p["w"] @ z + p["b"]))


def affine(matrix: Callable) -> Family:
    return layer(lambda y: y, matrix, AFFINE)


def planted(make_weights: Callable, core: Callable) -> Family:
    """z ↦ core(z) + b with b chosen so that a random z* is a fixed point."""

    def make(key):
        first, second = jax.random.split(key)
        weights, z_star = make_weights(first), normal(second, DIM)
        return {"w": weights, "b": z_star - core(z_star, weights)}

    return Family(PLANTED, make, lambda z, p: core(z, p["w"]) + p["b"])


def split(n: int, make: Callable) -> Callable:
    return lambda key: make(*jax.random.split(key, n))


def attention(z, p):
    """One head of self-attention over 6 tokens of 8 numbers, added to the input and normalized."""
    x = z.reshape(6, 8)
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    mixed = jax.nn.softmax(q @ k.T / 8**0.5) @ v
    return layer_norm(x + mixed + p["x"]).ravel()


def transformer(z, p):
    x = attention(z, p).reshape(6, 8)
    return layer_norm(x + jax.nn.relu(x @ p["in"]) @ p["out"] + p["x"]).ravel()


def attention_weights(gain):
    names = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "x": (6, 8), "in": (8, 32), "out": (32, 8)}

    def make(*keys):
        draws = [normal(k, *s, scale=gain / s[0] ** 0.5) for k, s in zip(keys, names.values(), strict=True)]
        params = dict(zip(names, draws, strict=True))
        return params | {"x": params["x"] * (6**0.5 / gain)}

    return split(len(names), make)


def convolution(z, p):
    """tanh of a circular 3 × 3 convolution of 3 channels of 4 × 4."""
    x = jnp.pad(z.reshape(3, 4, 4), ((0, 0), (1, 1), (1, 1)), mode="wrap")
    y = jax.lax.conv_general_dilated(x[None], p["w"], (1, 1), "VALID")[0]
    return jnp.tanh(y.ravel() + p["b"])


def gru(z, p):
    update = jax.nn.sigmoid(p["u"] @ z + p["bu"])
    reset = jax.nn.sigmoid(p["r"] @ z + p["br"])
    return (1 - update) * z + update * jnp.tanh(p["h"] @ (reset * z) + p["bh"])


def gru_weights(gain):
    def make(*keys):
        matrices = {name: gaussian(k, gain) for name, k in zip("urh", keys, strict=False)}
        return matrices | {name: normal(k, DIM) for name, k in zip(("bu", "br", "bh"), keys[3:], strict=True)}

    return split(6, make)


def convolution_weights(gain):
    return split(2, lambda a, b: {"w": normal(a, 3, 3, 3, 3, scale=gain / 27**0.5), "b": normal(b, DIM)})


def monotone(margin):
    """W = (1 − m) I − AᵀA + B − Bᵀ (Winston & Kolter 2020)."""

    def make(a, b):
        a = gaussian(a, 1.0)
        return (1 - margin) * jnp.eye(DIM, dtype=jnp.float32) - a.T @ a + skew(b, 1.5)

    return split(2, make)


def post_ln(z, p):
    return layer_norm(z + p["out"] @ jax.nn.relu(p["in"] @ z + p["b"]))


def scaled_tanh(z, p):
    """tanh in coordinates that differ by six orders of magnitude."""
    return p["d"] * jnp.tanh(p["w"] @ (z / p["d"]) + p["b"])


def eye(scale):
    return scale * jnp.eye(DIM, dtype=jnp.float32)


def spread(key, low, high):
    return jax.random.uniform(key, (DIM,), jnp.float32, low, high)


def matrix(make: Callable, *numbers: float) -> Callable:
    return lambda key: make(key, *numbers)


def tanh(make: Callable, *numbers: float, bias: float = 1.0) -> Family:
    return layer(jnp.tanh, matrix(make, *numbers), BOUNDED, bias)


def signed(key, low, high):
    """Symmetric with eigenvalues of both signs, low ≤ |λ| ≤ high."""
    a, b, c = jax.random.split(key, 3)
    return with_eigenvalues(a, spread(b, low, high) * jax.random.rademacher(c, (DIM,)).astype(jnp.float32))


def ranged(key, low, high):
    a, b = jax.random.split(key)
    return with_eigenvalues(a, spread(b, low, high))


def shifted_skew(key, shift, size):
    return eye(shift) + skew(key, size)


def relu_core(z, w):
    return w @ jax.nn.relu(z)


def mlp(first: float, second: float) -> Family:
    weights = split(2, lambda a, b: (gaussian(a, first), gaussian(b, second)))
    return planted(weights, lambda z, w: w[1] @ jax.nn.relu(w[0] @ z))


def post_ln_mlp(gain: float) -> Family:
    make = split(3, lambda a, b, c: {"in": gaussian(a, gain), "out": gaussian(b, gain), "b": normal(c, DIM)})
    return Family(BOUNDED, make, post_ln)


def badly_scaled(radius: float) -> Family:
    make = split(3, lambda a, b, c: {"w": gaussian(a, radius), "b": normal(b, DIM), "d": 10 ** spread(c, -3.0, 3.0)})
    return Family(BOUNDED, make, scaled_tanh)


# As hard as the mix of 115 cells on which other libraries were measured: there full-memory Broyden solved 99 %,
# default Andersons 75 to 87 %, Picard 64 %.
CELLS: dict[str, Family] = {
    **{f"tanh {r:g}": tanh(gaussian, r) for r in (0.5, 0.9, 1.2, 1.5, 2.0, 3.0)},
    "symmetric .5": affine(matrix(symmetric, 0.5)),
    "symmetric .95": affine(matrix(symmetric, 0.95)),
    "symmetric tanh 1.5": tanh(symmetric, 1.5),
    "rotation .9": affine(matrix(orthogonal, 0.9)),
    "rotation tanh 1.2": tanh(orthogonal, 1.2),
    "non-normal .7": affine(matrix(non_normal, 0.7, 2.0)),
    "non-normal tanh": tanh(non_normal, 0.7, 4.0),
    "expanding −5…−1": affine(matrix(ranged, -5.0, -1.0)),
    "expanding 1.5…3": affine(matrix(ranged, 1.5, 3.0)),
    "skewed monotone 1": affine(matrix(shifted_skew, 0.5, 1.0)),
    "skewed monotone tanh 3": tanh(shifted_skew, -1.0, 3.0),
    "monotone operator": layer(jax.nn.relu, monotone(0.2), MONOTONE),
    "attention": Family(BOUNDED, attention_weights(1.0), attention),
    "transformer, post-LN": Family(BOUNDED, attention_weights(1.0), transformer),
    "convolution .7": Family(BOUNDED, convolution_weights(0.7), convolution),
    "convolution 2": Family(BOUNDED, convolution_weights(2.0), convolution),
    "GRU 1": Family(BOUNDED, gru_weights(1.0), gru),
    "GRU 1.5": Family(BOUNDED, gru_weights(1.5), gru),
    "ReLU .9": planted(matrix(gaussian, 0.9), relu_core),
    "post-LN MLP": post_ln_mlp(1.5),
    "badly scaled tanh 1.2": badly_scaled(1.2),
}

# Beyond what a solver without a linear model of full rank can do in 100 evaluations, or chaotic.
HARD: dict[str, Family] = {
    "tanh 1.5, small bias": tanh(gaussian, 1.5, bias=0.3),
    "symmetric tanh 2": tanh(symmetric, 2.0),
    "rotation 1.2": affine(matrix(orthogonal, 1.2)),
    "rotation tanh 2": tanh(orthogonal, 2.0),
    "expanding, both signs": affine(matrix(signed, 1.5, 3.0)),
    "skewed monotone 3": affine(matrix(shifted_skew, 0.5, 3.0)),
    "attention, gain 2": Family(BOUNDED, attention_weights(2.0), attention),
    "GRU 3": Family(BOUNDED, gru_weights(3.0), gru),
    "ReLU 1.5": planted(matrix(gaussian, 1.5), relu_core),
    "relu-MLP 2": mlp(2.0, 1.0),
    "sine 1.5": layer(jnp.sin, matrix(gaussian, 1.5), BOUNDED),
}

FAMILIES = CELLS | HARD
