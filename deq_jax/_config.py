"""Option objects: the decorator that makes a class of declared options a solver or an adjoint, and their checks."""

import collections.abc
import copy
import dataclasses
import difflib
import enum
import functools
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from deq_jax._export import register_options

T = TypeVar("T")

Budget = Annotated[int, "structure as a Python int, a leaf as an array"]  # swept by being an array
STATIC = {"static": True}  # `tx: Any = dataclasses.field(metadata=STATIC)`, as for jax.tree_util.register_dataclass
MAX_STEPS = 2**31 - 1  # evaluations are counted in int32


class Role(enum.Enum):
    """What a field is in the pytree of its object, as its annotation says."""

    NUMBER = "float"  # a leaf: traced and swept without compiling again
    BUDGET = "Budget"  # structure as an int, a leaf as an array
    STRUCTURE = "int, bool, str, an enum, a function, tuples of them, STATIC"  # fixes a shape or a program
    OBJECT = "all else: an option object, a tuple of them, an array"  # a pytree of its own
    ANY = "Any"  # an object, unless its value says that it is structure


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Frozen dataclass of options that is also a pytree, a value that compares and hashes, and exportable.

    The annotation of a field says what it is. A `float` is a leaf, and a number given for it becomes a Python float.
    An `int`, a `bool`, an enum, a function, a tuple of such is structure. A `Budget` is structure as an int, and a
    leaf as an array. An option object, a tuple of them, an array is a pytree of its own, and so is `Any`, unless its
    value is a function or of one of the kinds above. An object that is no pytree is declared with
    `dataclasses.field(metadata=STATIC)`: it is compared by its own `==`.

    Ranges are the class's own affair: its `__post_init__` calls `check_number`.

    Raises:
      TypeError: when an object is made with an option that it does not have, or with a value of another kind.

    >>> @config
    ... class Relaxation:
    ...     rtol: float = 1e-4
    ...     max_steps: Budget = 100
    ...     sweeps: int = 2
    >>> jax.tree.leaves(Relaxation(rtol=1)), jax.tree.leaves(Relaxation(max_steps=np.array(7)))
    ([1.0], [0.0001, array(7)])
    """
    own_checks = getattr(cls, "__post_init__", lambda self: None)

    def post_init(self):
        for name, role in roles.items():
            where = f"{type(self).__name__}.{name}"
            object.__setattr__(self, name, _coerced(where, getattr(self, name), kinds[name], role))
        own_checks(self)

    cls.__post_init__ = post_init  # pyright: ignore[reportAttributeAccessIssue]
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    annotations = {field.name: _annotation(cls, field) for field in fields}
    kinds = {name: _kinds(annotation) for name, annotation in annotations.items()}
    roles = {field.name: _role(annotations[field.name], field.metadata) for field in fields}
    cls.__init__ = _with_suggestions(cls.__init__, cls.__name__, list(annotations))

    # Option objects are keys of jit's caches, where 1 == True would answer with another one's program.
    key = lambda self: tuple(_comparable(getattr(self, name)) for name in annotations)
    cls.__eq__ = lambda self, other: key(self) == key(other) if type(other) is cls else NotImplemented
    cls.__hash__ = lambda self: hash((cls, key(self)))

    structure = lambda value: (_comparable(value), value)
    keys = {name: jax.tree_util.GetAttrKey(name) for name in annotations}

    def flatten(self):
        values = {name: getattr(self, name) for name in annotations}
        children = {name for name, value in values.items() if _is_child(roles[name], value)}
        entries = tuple(_CHILD if name in children else structure(value) for name, value in values.items())
        return [(keys[name], value) for name, value in values.items() if name in children], entries

    def unflatten(entries, children):
        # Around __init__: JAX also builds trees of placeholders, which no check should see.
        children, self = iter(children), object.__new__(cls)
        for name, entry in zip(annotations, entries, strict=True):
            object.__setattr__(self, name, next(children) if entry is _CHILD else entry[1])
        return self

    cls.__option_roles__ = roles  # pyright: ignore[reportAttributeAccessIssue]
    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    register_options(cls, annotations, _CHILD, structure)
    return cls


class _Placeholder(enum.Enum):  # an enum member stays itself through deepcopy and pickle
    CHILD = "child"


_CHILD = _Placeholder.CHILD


def _with_suggestions(plain_init: Callable, owner: str, names: list[str]) -> Callable:
    @functools.wraps(plain_init)
    def init(self, *args, **options):
        for option in options.keys() - set(names):
            close = difflib.get_close_matches(option, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its options are {', '.join(names)}"
            raise TypeError(f"{owner} has no option {option!r}{hint}")
        plain_init(self, *args, **options)

    # The values are checked here, with better messages; and arrays are meant to come where `float` is written.
    return typing.no_type_check(init)


# ---- what a field is ---------------------------------------------------------------------------------------


def _annotation(cls: type, field: dataclasses.Field) -> Any:
    if not isinstance(field.type, str):
        return field.type
    try:  # from __future__ import annotations
        return eval(field.type, dict(getattr(sys.modules.get(cls.__module__), "__dict__", {})))
    except NameError:  # imported for the type checker alone
        return Any


def _role(annotation: Any, metadata: Any) -> Role:
    if metadata.get("static"):
        return Role.STRUCTURE
    if annotation == Budget:
        return Role.BUDGET
    kinds = _kinds(annotation)
    if float in kinds and kinds <= {float, int, types.NoneType}:
        return Role.NUMBER
    if annotation is Any:
        return Role.ANY
    return Role.STRUCTURE if all(map(_is_structural, kinds)) else Role.OBJECT


def _kinds(annotation: Any) -> set:
    """The members of a union, or the annotation itself; without the extras of an `Annotated`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    return set().union(*map(_kinds, args)) if origin in (typing.Union, types.UnionType) else {annotation}


def _is_structural(kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return all(_is_structural(member) for part in args if part is not Ellipsis for member in _kinds(part))
    if origin is Literal or collections.abc.Callable in (kind, origin):
        return True
    return isinstance(kind, type) and issubclass(kind, int | str | enum.Enum | types.NoneType)


def _is_child(role: Role, value: Any) -> bool:
    """Whether a field with this value is a leaf, or a pytree of leaves."""
    if role is Role.ANY:
        return not _is_plainly_structure(value)
    return role in (Role.NUMBER, Role.OBJECT) or (role is Role.BUDGET and type(value) is not int)


def _is_plainly_structure(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plainly_structure, value))
    is_function = callable(value) and jax.tree_util.all_leaves([value])  # and no module with weights
    return value is None or is_function or isinstance(value, int | str)


# ---- values ------------------------------------------------------------------------------------------------


def _coerced(where: str, value: Any, kinds: set, role: Role) -> Any:
    """The value as the field keeps it, or TypeError: numbers of NumPy become Python's."""
    if type(value) is float and role is Role.NUMBER:  # the everyday case, first
        return value
    if type(value) in kinds & {types.NoneType}:
        return value
    if role is Role.NUMBER:
        if not _is_real(value, jnp.floating, jnp.integer):
            raise TypeError(f"{where} must be a number or an array of numbers, got {_describe(value)}")
        return value if _is_array(value) else _as_float(value)
    if role is Role.BUDGET:
        if not _is_real(value, jnp.integer):
            raise TypeError(f"{where} must be an int or an array of ints, got {_describe(value)}")
        return value if _is_array(value) else int(value)
    if role is not Role.STRUCTURE:
        return value
    value = _plain(value)
    if kinds <= {int, types.NoneType}:
        _check_int(where, value)
    if kinds <= {bool, types.NoneType} and not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False, got {_describe(value)}")
    return value


def _check_int(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an int, got {_describe(value)}")


def _plain(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _is_array(value: Any) -> bool:
    """Whether it is an array, traced or not, or stands for one (`jax.ShapeDtypeStruct`)."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic | float | int)


def _is_real(value: Any, *kinds: Any) -> bool:
    """Whether it is a real number, or an array of those, of these kinds of dtype."""
    if hasattr(value, "dtype"):
        return any(jnp.issubdtype(value.dtype, kind) for kind in kinds)  # of ml_dtypes too
    number = int | float if jnp.floating in kinds else int
    return isinstance(value, number) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if _is_array(value) else repr(value)


def _concrete(value: Any) -> np.ndarray | None:
    """The entries of an array that has them here and now; None of a traced one, or of one of another process."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, jax.Array) or isinstance(value, Tracer) or value.is_deleted():
        return None
    if not value.is_fully_addressable or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return None
    return np.asarray(jax.device_get(value))


def _comparable(value: Any) -> Any:
    """A hashable key, the same for equal values: arrays by dtype, shape and bits, traced ones by identity."""
    if type(value) is tuple:
        return tuple(map(_comparable, value))
    if not _is_array(value):
        return type(value), value
    entries = _concrete(value)
    return id(value) if entries is None else (str(entries.dtype), entries.shape, entries.tobytes())


# ---- checks ------------------------------------------------------------------------------------------------


def check_stopping(solver: object) -> None:
    """Raise unless the three numbers that every solver begins with are in their ranges."""
    check_number(solver, "rtol", at_least=0)
    check_number(solver, "atol", at_least=0)
    check_number(solver, "max_steps", at_least=0, at_most=MAX_STEPS, why="evaluations are counted in int32")


def check_solver(value: Any, where: str) -> None:
    """Raise TypeError unless the value, which a user passed as `where`, is a solver."""
    if isinstance(value, type) or not hasattr(value, "update"):
        raise TypeError(f"{where} must be a solver such as Anderson(), got {value!r}")


def check_sees_all(solver: Any, who: str) -> None:
    """Raise ValueError if a solver asks to see one iterate in `test_every`, where `who` shows it all."""
    if getattr(solver, "test_every", 1) > 1:
        raise ValueError(f"{who} looks at each iterate, and {solver} at few of them: take test_every=1")


def check_number(
    owner: object,
    name: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    why: str = "",
) -> None:
    """Raise ValueError unless the field is in this range, and `finite`, or is an array of such numbers.

    Traced arrays pass, for nobody knows their entries. `why` ends the message.
    """
    value, where = getattr(owner, name), f"{type(owner).__name__}.{name}"
    is_array = _is_array(value)
    if not is_array and not isinstance(value, float):
        _check_int(where, value)
    entries: Any = _concrete(value) if is_array else value
    if entries is None:
        return
    # The same for a number and for an array of them; all are false for NaN.
    is_float = jnp.issubdtype(entries.dtype, jnp.floating) if is_array else isinstance(value, float)
    wide = entries.astype(np.float64) if is_array and is_float else entries
    valid = (abs(wide) < math.inf) | (not finite)
    limits = (at_least, operator.ge), (above, operator.gt), (at_most, operator.le), (below, operator.lt)
    for bound, holds in limits:
        valid &= bound is None or holds(wide, bound)
    if not (np.all(valid) if is_array else valid):
        index = tuple(np.argwhere(~valid)[0].tolist()) if is_array else ()
        got = f"{entries[index]} at index {index}" if index else repr(entries.item() if is_array else value)
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


# ---- options where a solve begins --------------------------------------------------------------------------


def check_options(options: Any, batch_shape: tuple, where: str) -> None:
    """Raise ValueError if an array among these options is neither a scalar nor shaped as the batch of problems.

    Options of options too: `where` is "solver", and the message names `solver.stages[0].rtol`.
    """
    for path, value in _numbers(options, where):
        shape = np.shape(value)
        if shape not in ((), tuple(batch_shape)):
            expected = f"shape {tuple(batch_shape)}, an entry for each problem" if batch_shape else "shape ()"
            raise ValueError(f"{path} must be a number or an array of {expected}; got shape {shape}")


def _numbers(options: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(options, tuple):
        for i, option in enumerate(options):
            yield from _numbers(option, f"{where}[{i}]")
    roles = getattr(type(options), "__option_roles__", None)
    if roles is None:  # a solver of another kind: what the loop reads
        roles = {name: Role.NUMBER for name in ("rtol", "atol", "max_steps", "damping") if hasattr(options, name)}
    for name, role in roles.items():
        value = getattr(options, name)
        if role in (Role.OBJECT, Role.ANY):
            yield from _numbers(value, f"{where}.{name}")
        elif role is not Role.STRUCTURE and _is_array(value):
            yield f"{where}.{name}", value


def cast_options(options: T, dtype: Any) -> T:
    """The options with their arrays in this precision (the real one of a complex dtype), and budgets in int32.

    Call it once where a solve begins, with the dtype of the vectors that the solver works on. Python numbers stay,
    and so do arrays of a weak type, which take the precision of what they meet. Of a pytree that `config` did not
    make, arrays of floats are cast.

    >>> @config
    ... class Relaxation:
    ...     damping: float = 1.0
    >>> cast_options(Relaxation(np.array([0.5, 0.25])), jnp.float32)
    Relaxation(damping=array([0.5 , 0.25], dtype=float32))
    """
    dtype = jnp.finfo(dtype).dtype
    if type(options) is tuple:
        return tuple(cast_options(option, dtype) for option in options)  # pyright: ignore[reportReturnType]
    roles = getattr(type(options), "__option_roles__", None)
    if roles is None:
        is_float = lambda leaf: _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda leaf: _cast(leaf, dtype) if is_float(leaf) else leaf, options)
    change = {
        Role.NUMBER: lambda value: _cast(value, dtype),
        Role.BUDGET: lambda value: _cast(value, jnp.dtype(jnp.int32)),
        Role.OBJECT: lambda value: cast_options(value, dtype),
        Role.ANY: lambda value: cast_options(value, dtype),
        Role.STRUCTURE: lambda value: value,
    }
    new = copy.copy(options)  # around __init__: these values have been checked
    for name, role in roles.items():
        object.__setattr__(new, name, change[role](getattr(options, name)))
    return new


def _cast(value: Any, dtype: Any) -> Any:
    if not hasattr(value, "astype") or value.dtype == dtype:
        return value
    weak = isinstance(value, jax.Array) and jax.typeof(value).weak_type
    return value if weak else value.astype(dtype)
