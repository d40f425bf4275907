"""What the models share: normalised kernels, masks of dropout, and checks before tracing."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from deq_jax.solvers.base import aligned

T = TypeVar("T")


class Weight(nnx.Module):
    """A kernel that sums over its first `fan_in_axes`; with `weight_norm`, w = g v/‖v‖ per output unit."""

    def __init__(
        self,
        shape: tuple[int, ...],
        std: float | None,
        *,
        weight_norm: bool = False,
        fan_in_axes: int = 1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws N(0, std²), or U(±1/√fan_in) for None; g begins at ‖v‖, so that w begins at v."""
        self.axes = tuple(range(fan_in_axes))
        bound = 1 / math.sqrt(math.prod(shape[:fan_in_axes]))
        key = rngs.params()
        if std is None:
            v = jax.random.uniform(key, shape, param_dtype, -bound, bound)
        else:
            v = std * jax.random.normal(key, shape, param_dtype)
        self.kernel = nnx.Param(v)
        self.scale = nnx.Param(jnp.sqrt(jnp.sum(v**2, self.axes))) if weight_norm else None

    def __call__(self, dtype: Any, mask: Array | None = None) -> Array:
        """The effective kernel, in `dtype`; a mask of weight dropout acts on v, so that the row keeps its norm g."""
        v = drop(self.kernel[...], mask)
        if self.scale is None:
            return v.astype(dtype)
        square = jnp.sum(v**2, self.axes)
        # A zero row stays zero, with the finite gradient g.
        inverse = jax.lax.rsqrt(jnp.where(square > 0, square, 1))
        return (aligned(self.scale[...] * inverse, v) * v).astype(dtype)


def keep_mask(key: Array, rate: float, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """0 or 1/(1 − rate) for each entry; None, which keeps everything, for a rate of 0."""
    return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate) if rate else None


def drop(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask.astype(x.dtype)


def wide(dtype: Any) -> Any:
    """float32 or wider."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def check_tokens(tokens: Array) -> None:
    """TypeError or ValueError unless tokens are integer ids of shape (batch, time)."""
    if not hasattr(tokens, "dtype"):
        raise TypeError(f"tokens must be an array of integer ids, got a {type(tokens).__name__}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integer ids, got dtype {tokens.dtype}")
    require(tokens.ndim == 2, f"tokens must have shape (batch, time), got {tokens.shape}")
    require(tokens.shape[1] >= 1, f"tokens must have at least one column of time, got {tokens.shape}")


def checked_history(tokens: Array, history: T | None, empty: Callable[[int], T]) -> T:
    """The history, or `empty(batch)` for None; TypeError or ValueError unless it and the tokens fit."""
    check_tokens(tokens)
    if history is None:
        return empty(len(tokens))
    expected: Any = jax.eval_shape(lambda: empty(len(tokens)))
    given: Any = history
    for name, got, want in zip(expected._fields, given, expected, strict=True):
        got, want = (f"{x.dtype}{list(x.shape)}" for x in (got, want))
        require(got == want, f"history.{name} must be {want}, as of `empty_history`, got {got}")
    return history


def check_sizes(config: Any, **at_least: int) -> None:
    """ValueError unless each of these fields of a configuration has its least value or a larger one."""
    for name, least in at_least.items():
        require(getattr(config, name) >= least, f"{name} must be at least {least}, got {getattr(config, name)}")


def check_rates(config: Any, *names: str) -> None:
    """ValueError unless each of these fields is a rate of dropout."""
    for name in names:
        require(0 <= getattr(config, name) < 1, f"{name} must be in [0, 1), got {getattr(config, name)}")


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless `condition` holds."""
    if not condition:
        raise ValueError(message)
