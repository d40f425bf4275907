"""Option objects: `config` turns a class of annotated options into a solver or an adjoint."""

import copy
import dataclasses
import difflib
import enum
import functools
import sys
import types
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    no_type_check,
)

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax._export import register_options
from deq_jax._values import as_float, check_int, comparable, describe, is_array, is_real, without_numpy

T = TypeVar("T")

if TYPE_CHECKING:  # arrays are welcome, for a sweep; the command line offers numbers
    Number = float | jax.Array | np.ndarray
    Budget = int | jax.Array | np.ndarray
    Scales = Any
else:
    Number = float
    Scales = Annotated[float, "or a pytree of numbers and arrays, as the state is"]
    Budget = Annotated[int, "structure as a Python int, a leaf as an array"]
STATIC = {"static": True}  # `tx: Any = dataclasses.field(metadata=STATIC)`, as for jax.tree_util.register_dataclass
MAX_STEPS = 2**31 - 1  # evaluations are counted in int32


class Role(enum.Enum):
    """What a field is in the pytree of its object, as its annotation says."""

    NUMBER = "float"  # a leaf: traced and swept without compiling again
    SCALES = "Scales"  # a leaf, or a pytree of leaves
    BUDGET = "Budget"  # structure as an int, a leaf as an array
    STRUCTURE = "int, bool, str, an enum, a function, tuples of them, STATIC"  # fixes a shape or a program
    OBJECT = "anything else: an option object, a tuple of them, an array"  # a pytree of its own
    ANY = "Any"  # an object, unless its value shows that it is structure


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """A frozen dataclass of options that is a pytree, compares and hashes by value, and can be exported.

    The annotation of a field decides its role. A `float` is a leaf, and a number given for it becomes a Python float.
    `Scales` may be a pytree of numbers too. An `int`, a `bool`, a `str`, an enum, a function, and a tuple of these are
    structure. A `Budget` is structure as an int, and a leaf as an array. An option object, a tuple of them, and an
    array are pytrees of their own. So is `Any`, unless its value is structure, such as a function. An object that is no
    pytree is declared with `dataclasses.field(metadata=STATIC)`, and compared by its own `==`.

    The class checks ranges itself, with `check_number` in its `__post_init__`.

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
            object.__setattr__(self, name, _converted(where, getattr(self, name), kinds[name], role))
        own_checks(self)

    cls.__post_init__ = post_init  # pyright: ignore[reportAttributeAccessIssue]
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    annotations = {field.name: _annotation(cls, field) for field in fields}
    kinds = {name: _kinds(annotation) for name, annotation in annotations.items()}
    roles = {field.name: _role(annotations[field.name], field.metadata) for field in fields}
    with_suggestions(cls)

    # Option objects are keys of jit's caches. Without types, 1 == True would find the program of the other.
    key = lambda self: tuple(comparable(getattr(self, name)) for name in annotations)
    cls.__eq__ = lambda self, other: key(self) == key(other) if type(other) is cls else NotImplemented
    cls.__hash__ = lambda self: hash((cls, key(self)))

    structure = lambda value: (comparable(value), value)
    keys = {name: jax.tree_util.GetAttrKey(name) for name in annotations}

    def flatten(self):
        values = {name: getattr(self, name) for name in annotations}
        children = {name for name, value in values.items() if _is_child(roles[name], value)}
        entries = tuple(_CHILD if name in children else structure(value) for name, value in values.items())
        return [(keys[name], value) for name, value in values.items() if name in children], entries

    def unflatten(entries, children):
        # Without __init__: JAX also builds trees of placeholders, which the checks would refuse.
        children, self = iter(children), object.__new__(cls)
        for name, entry in zip(annotations, entries, strict=True):
            object.__setattr__(self, name, next(children) if entry is _CHILD else entry[1])
        return self

    cls.__option_roles__ = roles  # pyright: ignore[reportAttributeAccessIssue]
    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    register_options(cls, annotations, _CHILD, structure)
    return cls


_CHILD = Role.OBJECT  # stands for a child in the auxiliary data: an enum member survives deepcopy and pickle


def with_suggestions(cls: type[T]) -> type[T]:
    """The dataclass, whose constructor suggests an option for a misspelled one."""
    plain_init, owner = cls.__init__, cls.__name__
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    @functools.wraps(plain_init)
    def init(self, *args, **options):
        for option in options.keys() - set(names):
            close = difflib.get_close_matches(option, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its options are {', '.join(names)}"
            raise TypeError(f"{owner} has no option {option!r}{hint}")
        plain_init(self, *args, **options)

    # No runtime type checker: our checks have better messages, and arrays are welcome where `float` is written.
    cls.__init__ = no_type_check(init)
    return cls


# ---- what a field is ---------------------------------------------------------------------------------------


def _annotation(cls: type, field: dataclasses.Field) -> Any:
    if not isinstance(field.type, str):
        return field.type
    try:  # a string, by `from __future__ import annotations`
        return eval(field.type, dict(getattr(sys.modules.get(cls.__module__), "__dict__", {})))
    except NameError:  # a name imported for type checkers alone
        return Any


def _role(annotation: Any, metadata: Any) -> Role:
    if metadata.get("static"):
        return Role.STRUCTURE
    if annotation in (Budget, Scales):
        return Role.BUDGET if annotation == Budget else Role.SCALES
    kinds = _kinds(annotation)
    if float in kinds and kinds <= {float, int, types.NoneType}:
        return Role.NUMBER
    if annotation is Any:
        return Role.ANY
    return Role.STRUCTURE if all(map(_is_structural, kinds)) else Role.OBJECT


def _kinds(annotation: Any) -> set:
    """The members of a union, or the annotation itself, without the metadata of an `Annotated`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(args[0])
    return set().union(*map(_kinds, args)) if origin in (Union, types.UnionType) else {annotation}


def _is_structural(kind: Any) -> bool:
    """Whether all values of this annotation are structure."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return all(_is_structural(member) for part in args if part is not Ellipsis for member in _kinds(part))
    if origin is Literal or Callable in (kind, origin):
        return True
    return isinstance(kind, type) and issubclass(kind, int | str | enum.Enum | types.NoneType)


def _is_child(role: Role, value: Any) -> bool:
    """Whether a field with this value is a leaf, or a pytree of leaves."""
    if role is Role.ANY:
        return not _is_structure(value)
    return role in (Role.NUMBER, Role.SCALES, Role.OBJECT) or (role is Role.BUDGET and type(value) is not int)


def _is_structure(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_structure, value))
    is_function = callable(value) and jax.tree_util.all_leaves([value])  # not a module with weights
    return value is None or is_function or isinstance(value, int | str)


# ---- values ------------------------------------------------------------------------------------------------


def _converted(where: str, value: Any, kinds: set, role: Role) -> Any:
    """The value that the field keeps, with NumPy's numbers as Python's, or TypeError."""
    if type(value) is float and role in (Role.NUMBER, Role.SCALES):  # the most common case
        return value
    if type(value) in kinds & {types.NoneType}:
        return value
    if role is Role.SCALES and _is_tree(value):
        leaf = lambda path, leaf: _converted(where + jax.tree_util.keystr(path), leaf, {float}, Role.NUMBER)
        return jax.tree_util.tree_map_with_path(leaf, value)
    if role in (Role.NUMBER, Role.SCALES):
        if not is_real(value, jnp.floating, jnp.integer):
            raise TypeError(f"{where} must be a number or an array of numbers, got {describe(value)}")
        return value if is_array(value) else as_float(value)
    if role is Role.BUDGET:
        if not is_real(value, jnp.integer):
            raise TypeError(f"{where} must be an int or an array of ints, got {describe(value)}")
        return value if is_array(value) else int(value)
    if role is not Role.STRUCTURE:
        return value
    value = without_numpy(value)
    if kinds <= {int, types.NoneType}:
        check_int(where, value)
    if kinds <= {bool, types.NoneType} and not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False, got {describe(value)}")
    return value


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and len(jax.tree.leaves(value)) > 0


# ---- precision -----------------------------------------------------------------------------------------------


def cast_options(options: T, dtype: Any) -> T:
    """The options with their arrays in this precision (of a complex dtype, the real one), and budgets in int32.

    Call it once where a solve begins, with the dtype of the vectors that the solver works on. Python numbers and arrays
    of a weak type stay as they are: they adopt the precision of the other operand. Of a pytree that `config` did not
    make, all arrays of floats are cast.
    """
    dtype = jnp.finfo(dtype).dtype
    if type(options) is tuple:
        return tuple(cast_options(option, dtype) for option in options)  # pyright: ignore[reportReturnType]
    roles = getattr(type(options), "__option_roles__", None)
    if roles is None:
        is_float = lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda leaf: _cast(leaf, dtype) if is_float(leaf) else leaf, options)
    targets = {Role.NUMBER: dtype, Role.SCALES: dtype, Role.BUDGET: jnp.dtype(jnp.int32)}
    to = lambda value, dtype: jax.tree.map(lambda leaf: _cast(leaf, dtype), value)
    cast = lambda value, role: to(value, targets[role]) if role in targets else cast_options(value, dtype)
    values = {name: (getattr(options, name), role) for name, role in roles.items() if role is not Role.STRUCTURE}
    return with_options(options, **{name: cast(*value) for name, value in values.items()})


def with_options(options: T, **changes: Any) -> T:
    """A copy with other values, of an object of any class. They are not checked."""
    new = copy.copy(options)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new


def _cast(value: Any, dtype: Any) -> Any:
    if not hasattr(value, "astype") or value.dtype == dtype:
        return value
    weak = isinstance(value, jax.Array) and jax.typeof(value).weak_type
    return value if weak else value.astype(dtype)


def plain_at_runtime(cls: T) -> T:
    """The named tuple, generic for type checkers alone: beartype (0.23) refuses one whose bases include Generic."""
    generic: Any = cls
    plain: Any = NamedTuple(generic.__name__, list(generic.__annotations__.items()))
    for name in ("__doc__", "__module__", "__qualname__"):
        setattr(plain, name, getattr(generic, name))
    plain.__class_getitem__ = classmethod(lambda cls, _: cls)
    return plain
