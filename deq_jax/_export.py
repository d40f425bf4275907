"""Registration of option objects and results with `jax.export`."""

import enum
import json
import typing
from collections.abc import Callable
from typing import Any

from jax import export


def register_results(*classes: type) -> None:
    """Let exported functions take and return these NamedTuples."""
    for cls in classes:
        _register(export.register_namedtuple_serialization, cls)


def register_options(cls: type, annotations: dict[str, Any], leaf: enum.Enum, structure: Callable) -> None:
    """Let exported functions take and return option objects of this class. Their structure is written as JSON.

    Args:
      annotations: the annotation of each field, in the order of the class's auxiliary data.
      leaf: the entry in the auxiliary data of a field that is a leaf or a pytree.
      structure: makes the entry of any other field from its value: a pair whose last member is the value.
    """

    def serialize(entries: tuple) -> bytes:
        named = zip(annotations, entries, strict=True)
        return json.dumps({n: [] if e is leaf else [_encode(f"{cls.__name__}.{n}", e[-1])] for n, e in named}).encode()

    def deserialize(text: bytes) -> tuple:
        written = json.loads(text)
        return tuple(structure(_decode(kind, *written[n])) if written[n] else leaf for n, kind in annotations.items())

    _register(
        export.register_pytree_node_serialization, cls, serialize_auxdata=serialize, deserialize_auxdata=deserialize
    )


def _register(register: Callable, cls: type, **functions: Callable) -> None:
    try:
        register(cls, serialized_name=f"{cls.__module__}.{cls.__qualname__}", **functions)
    except ValueError:  # a notebook cell that runs again defines its classes again: the first class keeps the name
        pass


# An exported file is only data. Nothing is unpickled, so reading a file runs nobody's code. So functions are refused.


def _encode(where: str, value: Any) -> Any:
    match value:
        case enum.Enum():
            return {"name": value.name}
        case None | bool() | int() | float() | str():
            return value
        case tuple() if type(value) is tuple:
            return [_encode(where, entry) for entry in value]
    raise TypeError(
        f"jax.export can write numbers, strings, enums and tuples of them, and {where} is {value!r}: "
        "let the exported function capture it, instead of taking or returning it"
    )


def _decode(annotation: Any, value: Any) -> Any:
    match value:
        case list():
            return tuple(_decode(annotation, entry) for entry in value)
        case {"name": name}:
            return next(kind[name] for kind in _enums(annotation) if name in kind.__members__)
    return value


def _enums(annotation: Any) -> list[type[enum.Enum]]:
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [annotation]
    return [kind for part in typing.get_args(annotation) for kind in _enums(part)]
