"""Values of options: numbers and arrays, traced or not."""

import math
import operator
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
        if not isinstance(value, dict | list | tuple):
            return type(value), value
        leaves, treedef = jax.tree.flatten(value)
        return treedef, tuple(map(comparable, leaves))
    entries = concrete(value)
    return id(value) if entries is None else (str(entries.dtype), entries.shape, entries.tobytes())


# ---- ranges ------------------------------------------------------------------------------------------------


def check_value(
    where: str, value: Any, *, at_least=None, above=None, at_most=None, below=None, finite=True, why=""
) -> None:
    """Raise as `_checks.check_number` does unless a value, which a user passed as `where`, is in this range."""
    array = is_array(value)
    if not array and not isinstance(value, float):
        check_int(where, value)
    entries: Any = concrete(value) if array else value
    if entries is None:
        return
    # The same code serves a number and an array. Every comparison is false for NaN.
    is_float = jnp.issubdtype(entries.dtype, jnp.floating) if array else isinstance(value, float)
    wide = entries.astype(np.float64) if array and is_float else entries
    valid = (abs(wide) < math.inf) | (not finite)
    limits = (at_least, operator.ge), (above, operator.gt), (at_most, operator.le), (below, operator.lt)
    for bound, holds in limits:
        valid &= bound is None or holds(wide, bound)
    if not (np.all(valid) if array else valid):
        index = tuple(np.argwhere(~valid)[0].tolist()) if array else ()
        got = f"{entries[index]} at index {index}" if index else repr(entries.item() if array else value)
        bounds = _bounds("finite and " if finite and is_float else "", at_least, above, at_most, below)
        raise ValueError(f"{where} must be {bounds}, got {got}{why and ': '}{why}")


def _bounds(finite: str, at_least, above, at_most, below) -> str:
    low, high = (at_least if above is None else above), (at_most if below is None else below)
    if high is None:
        return f"{finite}{'>=' if above is None else '>'} {low}"
    if above is not None and below is not None:
        return f"between {low} and {high}, both excluded"
    excluded = low if above is not None else high if below is not None else None
    return f"between {low} and {high}" + ("" if excluded is None else f", {excluded} excluded")
