"""The decorator that makes a frozen dataclass of numbers a solver's or adjoint's own configuration."""

import dataclasses
import difflib
import enum
import functools
import math
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Frozen dataclass that is also a pytree, and that answers a misspelled option with a suggestion.

    Floats and arrays are leaves, so that a tolerance can be traced and swept without compiling again.
    Python ints, bools, None and functions are structure, and tuples of them (an optimizer of optax): they fix
    shapes (a history) or a program (unrolled steps).
    An int that must be swept inside one compiled function (`max_steps`) becomes a leaf by being an array.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self, *args, **options):
        for option in options.keys() - set(names):
            close = difflib.get_close_matches(option, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its options are {', '.join(names)}"
            raise TypeError(f"{cls.__name__} has no option {option!r}{hint}")
        plain_init(self, *args, **options)

    cls.__init__ = init

    # Configurations are keys of jit's caches, where 1 == True would answer with another one's program.
    key = lambda self: tuple((isinstance(v, bool), v) for v in (getattr(self, name) for name in names))
    cls.__eq__ = lambda self, other: key(self) == key(other) if type(other) is cls else NotImplemented
    cls.__hash__ = lambda self: hash((cls, key(self)))

    def flatten(self):
        values = [getattr(self, name) for name in names]
        static = tuple((isinstance(v, bool), v) if _is_static(v) else _LEAF for v in values)
        return [v for v in values if not _is_static(v)], static

    def unflatten(static, leaves):
        # Around __init__: JAX also builds trees of placeholders, which no range check should see.
        leaves, self = iter(leaves), object.__new__(cls)
        for name, value in zip(names, static, strict=True):
            object.__setattr__(self, name, next(leaves) if value is _LEAF else value[1])
        return self

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls


class _Placeholder(enum.Enum):  # an enum member stays itself through deepcopy and pickle
    LEAF = "leaf"


_LEAF = _Placeholder.LEAF


def _is_static(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_static, value))
    return value is None or callable(value) or isinstance(value, bool | int | str)


def check_stopping(solver: object) -> None:
    """Raise unless the three numbers that every solver begins with are in their ranges."""
    check_number(solver, "rtol", at_least=0)
    check_number(solver, "atol", at_least=0)
    check_number(solver, "max_steps", at_least=0, whole=True)


def check_solver(value: Any, where: str) -> None:
    """Raise TypeError unless the value, which a user passed as `where`, is a solver."""
    if isinstance(value, type) or not hasattr(value, "update"):
        raise TypeError(f"{where} must be a solver such as Anderson(), got {value!r}")


def check_sees_all(solver: Any, who: str) -> None:
    """Raise ValueError if a solver asks to see one iterate in `test_every`, where `who` shows it all."""
    if getattr(solver, "test_every", 1) > 1:
        raise ValueError(f"{who} looks at each iterate, and {solver} at few of them: take test_every=1")


def check_number(
    owner: object, name: str, *, at_least: float, whole: bool = False, static: bool = False, below: float = math.inf
):
    """Raise TypeError or ValueError unless the field is a number in [at_least, below], or an array of one."""
    value, where = getattr(owner, name), f"{type(owner).__name__}.{name}"
    if not static and (isinstance(value, jax.Array) or not isinstance(value, int | float | str | bool | None)):
        return  # traced or an array: its value is not ours to read
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{where} must be {'an int' if whole else 'a number'}, got {value!r}")
    if not at_least <= value <= below:  # also catches NaN
        bounds = f">= {at_least:g}" if below == math.inf else f"between {at_least:g} and {below:g}"
        raise ValueError(f"{where} must be {bounds}, got {value!r}")


def cast_options(solver: Any, dtype: Any) -> Any:
    return solver
