"""The problems: P1 to P6, drawn by numpy and written once for JAX and for PyTorch.

Each is a loss of an equilibrium: `x = inject(ops, params, data)`, then z = cell(ops, z, params, x), then
`readout(ops, z, params, data)`. Only the solve between the two belongs to a contender.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """A draw of a problem; arrays are float32 or int32, of numpy."""

    what: str
    cell: Callable
    z_shape: tuple[int, ...]  # the first axis counts independent problems
    params: dict[str, np.ndarray]  # all that a gradient is taken of
    data: dict[str, np.ndarray]
    inject: Callable
    readout: Callable
    dense: bool  # whether the referee solves with dense Jacobians; otherwise it iterates


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def given(ops: Any, params: dict, data: dict) -> Any:
    return params["x"]


def along(ops: Any, z: Any, params: dict, data: dict) -> Any:
    """The inner product with a fixed direction: its gradient is a plain cotangent."""
    return ops.total(z * data["direction"])


def tanh_cell(ops: Any, z: Any, params: dict, x: Any) -> Any:
    return ops.tanh(z @ params["w"] + x)


def small(batch: int, dim: int) -> Problem:
    """P1: W of spectral radius 0.6, and a nonlinearity that makes it less: a dozen Picard steps."""
    rng = np.random.default_rng(1)
    params = {"w": normal(rng, dim, dim, scale=0.6 / dim**0.5), "x": normal(rng, batch, dim)}
    data = {"direction": normal(rng, batch, dim)}
    return Problem("easy tanh cell", tanh_cell, (batch, dim), params, data, given, along, dense=True)


def monotone(batch: int, dim: int) -> Problem:
    """P3: W = (1 − m) I − A Aᵀ + B − Bᵀ. I − W is positive, so there is one fixed point; ρ(J) is 1.15 to 1.19."""
    rng = np.random.default_rng(3)
    a, b = normal(rng, dim, dim, scale=0.75 / dim**0.5), normal(rng, dim, dim, scale=0.4 / dim**0.5)
    w = (0.8 * np.eye(dim) - a @ a.T + b - b.T).astype(np.float32)
    params = {"w": w, "x": normal(rng, batch, dim, scale=0.1)}
    data = {"direction": normal(rng, batch, dim)}
    return Problem("monotone W, ρ(J) > 1", tanh_cell, (batch, dim), params, data, given, along, dense=True)


def scaled_cell(ops: Any, z: Any, params: dict, x: Any) -> Any:
    gain, x = x
    return ops.tanh(gain * (z @ params["w"]) + x)


def many(batch: int, dim: int) -> Problem:
    """P4: one W of spectral radius 1, and a gain a problem: from ten Picard steps to more than a hundred."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((dim, dim))
    w = (w / np.abs(np.linalg.eigvals(w)).max()).astype(np.float32)
    params = {"w": w, "x": normal(rng, batch, dim, scale=0.05)}
    gain = rng.uniform(0.1, 1.0, (batch, 1)).astype(np.float32) ** 0.5
    data = {"gain": 0.93 * gain, "direction": normal(rng, batch, dim)}
    inject = lambda ops, params, data: (data["gain"], params["x"])
    return Problem("many small, of unequal difficulty", scaled_cell, (batch, dim), params, data, inject, along, True)


def transformer_cell(ops: Any, z: Any, params: dict, x: Any) -> Any:
    """One post-norm transformer layer: causal attention, then a feed-forward network, x added before each norm.

    A smooth one: at the kinks of a ReLU the last digits of z decide about a derivative, and in float32 no contender's
    gradient came within 1e-4.
    """
    batch, length, dim = z.shape
    heads = 4
    qkv = (z @ params["qkv"]).reshape(batch, length, 3, heads, dim // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = ops.einsum("bihd,bjhd->bhij", q, k) * (dim // heads) ** -0.5
    weights = ops.softmax(ops.where(ops.causal(length), scores, -1e9))
    mixed = ops.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, length, dim)
    z = ops.layer_norm(z + mixed @ params["out"] + x, params["norm1"])
    return ops.layer_norm(z + ops.gelu(z @ params["up"]) @ params["down"] + x, params["norm2"])


def transformer_params(rng: np.random.Generator, dim: int, inner: int, size: float) -> dict[str, np.ndarray]:
    return {
        "qkv": normal(rng, dim, 3 * dim, scale=dim**-0.5),
        "out": normal(rng, dim, dim, scale=size * dim**-0.5),
        "up": normal(rng, dim, inner, scale=(2 / dim) ** 0.5),
        "down": normal(rng, inner, dim, scale=size * inner**-0.5),
        "norm1": np.ones(dim, np.float32),
        "norm2": np.ones(dim, np.float32),
    }


def transformer(batch: int, length: int, dim: int) -> Problem:
    """P2: a transformer cell with ρ(J) ≈ 0.8."""
    rng = np.random.default_rng(2)
    params = transformer_params(rng, dim, 4 * dim, size=1.0) | {"x": normal(rng, batch, length, dim, scale=0.7)}
    data = {"direction": normal(rng, batch, length, dim)}
    shape = (batch, length, dim)
    return Problem("transformer cell", transformer_cell, shape, params, data, given, along, dense=False)


def conv_cell(ops: Any, z: Any, params: dict, x: Any) -> Any:
    """The residual block of a multiscale DEQ, at one scale (Bai et al. 2020, Fig 2); smooth as `transformer_cell`."""
    hidden = ops.gelu(ops.group_norm(ops.conv3(z, params["conv1"]), params["norm1"], 8))
    hidden = ops.group_norm(ops.conv3(hidden, params["conv2"]) + x, params["norm2"], 8)
    return ops.group_norm(ops.gelu(hidden + z), params["norm3"], 8)


def convolution(batch: int, channels: int, size: int) -> Problem:
    """P5: a residual block of convolutions and group norms."""
    rng = np.random.default_rng(5)
    kernel = lambda: normal(rng, 3, 3, channels, channels, scale=(9 * channels) ** -0.5)
    norms = {f"norm{i}": np.full(channels, scale, np.float32) for i, scale in ((1, 1.0), (2, 1.0), (3, 0.5))}
    shape = (batch, size, size, channels)
    params = {"conv1": kernel(), "conv2": 0.5 * kernel(), "x": normal(rng, *shape)} | norms
    data = {"direction": normal(rng, *shape)}
    return Problem("convolutional block (MDEQ)", conv_cell, shape, params, data, given, along, dense=False)


def language_model(batch: int, length: int, dim: int, vocabulary: int) -> Problem:
    """P6: a training step of a language model: embedding, equilibrium, cross-entropy; gradients of all of it."""
    rng = np.random.default_rng(6)
    tables = {"embedding": normal(rng, vocabulary, dim, scale=0.7), "position": normal(rng, length, dim, scale=0.3)}
    params = transformer_params(rng, dim, 4 * dim, size=1.0) | tables
    tokens = rng.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    data = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def inject(ops, params, data):
        return ops.take(params["embedding"], data["tokens"]) + params["position"]

    def readout(ops, z, params, data):
        return ops.cross_entropy((z @ params["embedding"].T) * dim**-0.5, data["labels"])

    shape = (batch, length, dim)
    return Problem("language-model training step", transformer_cell, shape, params, data, inject, readout, dense=False)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "P1": lambda: small(64, 512),
    "P2": lambda: transformer(8, 128, 128),
    "P3": lambda: monotone(64, 512),
    "P4": lambda: many(4096, 32),
    "P5": lambda: convolution(16, 32, 32),
    "P6": lambda: language_model(8, 150, 256, 512),
}
# The same mathematics at a size that a test can afford.
TINY: dict[str, Callable[[], Problem]] = {
    "P1": lambda: small(4, 16),
    "P2": lambda: transformer(2, 8, 16),
    "P3": lambda: monotone(4, 16),
    "P4": lambda: many(32, 8),
    "P5": lambda: convolution(2, 8, 6),
    "P6": lambda: language_model(2, 8, 16, 20),
}
# And at sizes that fill an accelerator: states of 4 MB (P1, P3), 17 MB (P2, P5) and 8 MB (P4, P6).
LARGE: dict[str, Callable[[], Problem]] = {
    "P1": lambda: small(256, 1024),
    "P2": lambda: transformer(16, 512, 512),
    "P3": lambda: monotone(256, 1024),
    "P4": lambda: many(65_536, 32),
    "P5": lambda: convolution(64, 64, 32),
    "P6": lambda: language_model(16, 256, 512, 10_000),
}
TABLES = {"usual": PROBLEMS, "tiny": TINY, "large": LARGE}
