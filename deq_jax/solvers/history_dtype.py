"""The dtype of a history."""

from typing import Any

import jax.numpy as jnp

HISTORY_DTYPES = "bfloat16", "float32", "float64"  # the range of float16 is too small for residuals that fall


def check_history_dtype(solver: Any) -> None:
    """Make `history_dtype` the name of a dtype, or raise TypeError or ValueError."""
    name, value = f"{type(solver).__name__}.history_dtype", solver.history_dtype
    if value is None:
        return
    try:
        dtype = jnp.dtype(value).name
    except TypeError:
        raise TypeError(f"{name} must be a dtype of floats or None, got {value!r}") from None
    if dtype not in HISTORY_DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(HISTORY_DTYPES)}, or None; got {dtype}")
    object.__setattr__(solver, "history_dtype", dtype)


def history_dtype(solver: Any, dtype: Any) -> Any:
    """The dtype of the history of a solver that computes in `dtype`."""
    narrow = jnp.dtype(solver.history_dtype or dtype)
    if narrow.itemsize > dtype.itemsize:
        raise ValueError(
            f"{type(solver).__name__}.history_dtype is {narrow}, wider than the {dtype} in which this state is solved"
        )
    return narrow
