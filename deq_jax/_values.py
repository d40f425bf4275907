"""Values of options: numbers and arrays, traced or not."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_int(where: str, value: Any) -> None:
    """Raise TypeError unless the value, which a user passed as `where`, is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an int, got {describe(value)}")


def without_numpy(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return math.inf if value > 0 else -math.inf


def is_array(value: Any) -> bool:
    """Whether the value is an array, traced or not, or the type of one (`jax.ShapeDtypeStruct`)."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic | float | int)


def is_real(value: Any, *kinds: Any) -> bool:
    """Whether the value is a real number, or an array of them, of one of these kinds of dtype."""
    if hasattr(value, "dtype"):
        return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)  # includes ml_dtypes
    number = int | float if jnp.floating in kinds else int
    return isinstance(value, number) and not isinstance(value, bool)


def describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if is_array(value) else repr(value)


def concrete(value: Any) -> np.ndarray | None:
    """The entries of an array, or None if they are unknown here: for a traced array, or one of another process."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, jax.Array) or isinstance(value, Tracer) or value.is_deleted():
        return None
    if not value.is_fully_addressable or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return None
    return np.asarray(jax.device_get(value))


def comparable(value: Any) -> Any:
    """A hashable key of a value. Arrays are compared by dtype, shape and bits, traced ones by identity."""
    if type(value) is tuple:
        return tuple(map(comparable, value))
    if not is_array(value):
        return type(value), value
    entries = concrete(value)
    return id(value) if entries is None else (str(entries.dtype), entries.shape, entries.tobytes())
