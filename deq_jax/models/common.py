"""What the models share: normalized kernels, dropout masks, and checks before tracing."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from deq_jax._arrays import aligned
from deq_jax._states import named_leaves

T = TypeVar("T")


def param(value: Array, *names: str | None) -> nnx.Param:
    """A parameter with a logical name for each axis, for the rules by which a program shards it; None: never sharded.

    The models use "vocab", "dim", "heads", "inner", "channels", and "width" for the rows of an adaptive embedding. They
    are Flax's own metadata: `nnx.get_partition_spec` returns them.
    """
    # Flax 0.12 would shard at once, and asks for a mesh where there is none.
    return nnx.Param(value, sharding_names=names, eager_sharding=False)


class Weight(nnx.Module):
    """A kernel that sums over its first `fan_in_axes`; with `weight_norm`, w = g v/‖v‖ per output unit."""

    def __init__(
        self,
        shape: tuple[int, ...],
        std: float | None,
        *,
        names: tuple[str | None, ...] | None = None,
        weight_norm: bool = False,
        fan_in_axes: int = 1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws v from N(0, std²), or from U(±1/√fan_in) if std is None. g starts at ‖v‖, so w starts at v.

        `names`: of the axes, see `param`.
        """
        names = (None,) * len(shape) if names is None else names
        self.axes = tuple(range(fan_in_axes))
        bound = 1 / math.sqrt(math.prod(shape[:fan_in_axes]))
        key = rngs.params()
        if std is None:
            v = jax.random.uniform(key, shape, param_dtype, -bound, bound)
        else:
            v = std * jax.random.normal(key, shape, param_dtype)
        self.kernel = param(v, *names)
        norms = jnp.sqrt(jnp.sum(v**2, self.axes))
        self.scale = param(norms, *names[fan_in_axes:]) if weight_norm else None

    def __call__(self, dtype: Any, mask: Array | None = None) -> Array:
        """The effective kernel, in `dtype`. A mask of weight dropout acts on v, so each unit keeps its norm g."""
        v = drop(self.kernel[...], mask)
        if self.scale is None:
            return v.astype(dtype)
        square = jnp.sum(v**2, self.axes)
        # A zero row stays zero, with the finite gradient dw/dv = g.
        inverse = jax.lax.rsqrt(jnp.where(square > 0, square, 1))
        return (aligned(self.scale[...] * inverse, v) * v).astype(dtype)


def keep_masks(key: Array, draws: dict[str, tuple[float, tuple[int, ...]]], dtype: Any) -> dict[str, Any]:
    """One dropout mask for each (rate, shape), with entries 0 or 1/(1 − rate); a rate of 0 gives None: keep all."""
    keys = zip(draws.items(), jax.random.split(key, len(draws)), strict=True)
    return {
        name: jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate) if rate else None
        for (name, (rate, shape)), key in keys
    }


def drop(x: Array, mask: Array | None) -> Array:
    """x times the mask, or x itself if the mask is None."""
    return x if mask is None else x * mask.astype(x.dtype)


def wide(dtype: Any) -> Any:
    """`dtype` if it has more than 32 bits, else float32."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def checked_history(tokens: Array, history: T | None, empty: Callable[[int], T]) -> T:
    """The history, or `empty(batch)` for None; TypeError or ValueError unless the tokens and the history fit."""
    if not hasattr(tokens, "dtype"):
        raise TypeError(f"tokens must be an array of integer ids, got a {type(tokens).__name__}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integer ids, got dtype {tokens.dtype}")
    require(tokens.ndim == 2, f"tokens must have shape (batch, time), got {tokens.shape}")
    require(tokens.shape[1] >= 1, f"tokens must have at least one column of time, got {tokens.shape}")
    if history is None:
        return empty(len(tokens))
    expected: Any = jax.eval_shape(lambda: empty(len(tokens)))
    given: Any = history
    for name, got, want in zip(expected._fields, given, expected, strict=True):
        got, want = (f"{x.dtype}{list(x.shape)}" for x in (got, want))
        require(got == want, f"history.{name} must be {want}, as of `empty_history`, got {got}")
    return history


def initial_state(z0: T | None, zeros: T) -> T:
    """z0 in the dtype of `zeros`, or `zeros` for None; ValueError unless their shapes agree."""
    if z0 is None:
        return zeros
    for (name, got), want in zip(named_leaves("z0", z0), jax.tree.leaves(zeros), strict=True):
        require(got.shape == want.shape, f"{name} must have shape {want.shape}, got {got.shape}")
    return jax.tree.map(lambda x, zero: x.astype(zero.dtype), z0, zeros)


def check_sizes(config: Any, **at_least: int) -> None:
    """ValueError unless each of these fields of a configuration is at least the given size."""
    for name, least in at_least.items():
        require(getattr(config, name) >= least, f"{name} must be at least {least}, got {getattr(config, name)}")


def check_rates(config: Any, *names: str) -> None:
    """ValueError unless each of these fields is a dropout rate, in [0, 1)."""
    for name in names:
        require(0 <= getattr(config, name) < 1, f"{name} must be in [0, 1), got {getattr(config, name)}")


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless `condition` holds."""
    if not condition:
        raise ValueError(message)
