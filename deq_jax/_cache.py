"""What a function reads besides its arguments, as a key: JAX's own caches go by identity alone."""

import types
from collections.abc import Callable
from typing import Any


def reads(f: Callable) -> tuple | None:
    """The values f reads besides its arguments, as a hashable key; None where they cannot be compared.

    JAX caches a compiled function by the identity of f, and would miss that a global array, a closure or a
    module's weights have changed. Only functions whose surroundings can be compared by value are cached.
    """
    values: dict[Any, Any] = {}
    return tuple(values.items()) if _collect(f, values) else None


def _collect(f: Any, values: dict) -> bool:
    f = getattr(f, "__wrapped__", f) if type(f).__module__.startswith("jax") else f
    if not isinstance(f, types.FunctionType):
        return False
    if f in values:
        return True
    defaults = tuple(f.__defaults__ or ()) + tuple((f.__kwdefaults__ or {}).values())
    if f.__closure__ or not all(_is_constant(v) for v in defaults):
        return False
    values[f] = f.__code__, defaults
    for name in _names(f.__code__):
        if name not in f.__globals__:
            continue
        value = f.__globals__[name]
        if _is_constant(value):
            values[f, name] = type(value), value
        elif not (_is_library(value) or _collect(value, values)):
            return False
        else:
            values[f, name] = id(value)
    return True


def _names(code: types.CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_constant(v) for v in value)
    return value is None or isinstance(value, int | float | complex | str | bytes)


def _is_library(value: Any) -> bool:
    """A module, class or function that nobody changes under us; a user's own may hold anything."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
    else:
        name = getattr(value, "__module__", None) if callable(value) else None  # an array is not callable
    return (name or "").split(".")[0] in {"jax", "jaxlib", "numpy", "builtins", "math"}
