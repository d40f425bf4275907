"""Jaxprs: a key that is equal for two traces of one computation, and the named axes they communicate along."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def without_constants(closed: Any) -> Jaxpr:
    """The jaxpr with its constants as its first arguments. (On jax 0.12 `closed.jaxpr` would keep their values.)"""
    return closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])


def sub_jaxprs(eqn: Any) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    found = filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in found]


def has_forward_mode(push: Callable, *args: Any) -> bool:
    """Whether `push`, which takes a JVP, can: not of a `custom_vjp`, a callback or a kernel without a rule for it."""
    try:
        closed = jax.make_jaxpr(push)(*args)
    except (TypeError, ValueError, NotImplementedError):
        return False
    refuses = lambda jaxpr: any(
        e.primitive.name == "custom_lin" or any(map(refuses, sub_jaxprs(e))) for e in jaxpr.eqns
    )
    return not refuses(closed.jaxpr)


# ---- named axes --------------------------------------------------------------------------------------------

COLLECTIVES = (
    "psum", "pmax", "pmin", "pbroadcast", "ppermute", "pgather", "psend", "precv", "preduced",
    "all_gather", "all_to_all", "reduce_scatter",
)  # fmt: skip


def communicating_axes(jaxpr: Jaxpr) -> set:
    """The named axes of the collectives in a jaxpr, except those that a `shard_map` or `pmap` inside it binds."""
    found = set()
    for eqn in jaxpr.eqns:
        # `in`, because variants have a prefix or a suffix: psum_invariant, ragged_all_to_all.
        if any(name in eqn.primitive.name for name in COLLECTIVES):
            names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
            names = names if isinstance(names, tuple | list | set | frozenset) else (names,)
            found |= {name for name in names if not isinstance(name, int)}  # an int is a positional axis
        inner = set().union(*(communicating_axes(sub) for sub in sub_jaxprs(eqn)))
        found |= inner - _bound_axes(eqn)
    return found


def gathers(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr brings together what lies on several devices, or says where it is to lie."""
    return any(is_gather(eqn.primitive) or any(map(gathers, sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


def is_gather(primitive: Any) -> bool:
    return any(name in primitive.name for name in (*COLLECTIVES, "sharding_constraint", "reshard"))


def _bound_axes(eqn: Any) -> set:
    """The named axes that this equation binds for the jaxprs inside it."""
    if "pmap" in eqn.primitive.name:
        return {eqn.params["axis_name"]}
    # A shard_map may bind only some axes of its mesh, while another one around f binds the rest.
    names = "newly_manual_axes", "manual_axes"  # the second before jax 0.10
    return set().union(*(eqn.params.get(name, ()) for name in names))


# ---- keys --------------------------------------------------------------------------------------------------

# Primitives whose derivative rules are Python functions, new objects at each trace. `linear_map` adds its own.
RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class ByIdentity:
    """A key that equals only the key of the same object. It keeps the object alive, so that no other gets its id."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def program_key(jaxpr: Jaxpr) -> tuple:
    """A hashable value that holds everything the jaxpr's result depends on. Variables are numbered as they appear.

    Functions inside, such as a callback's, are compared by identity. The derivative rules of `jax.custom_jvp` and
    `jax.custom_vjp` are left out, because the value does not depend on them: see `derivative_key`.
    """
    numbers: dict[Any, int] = {}

    def atom(v):
        if isinstance(v, Literal):
            return value_key(np.asarray(v.val)), v.aval
        return numbers.setdefault(v, len(numbers))

    inputs = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    constants = tuple(map(value_key, getattr(jaxpr, "consts", ())))  # on jax 0.12, where all jaxprs are closed
    equations = tuple(
        (
            eqn.primitive,
            tuple(map(atom, eqn.invars)),
            _params_key(eqn.primitive.name, eqn.params),
            tuple((atom(v), v.aval) for v in eqn.outvars),
            _context_key(eqn),
        )
        for eqn in jaxpr.eqns
    )
    return len(jaxpr.constvars), inputs, constants, equations, tuple(map(atom, jaxpr.outvars))


def tree_key(treedef: Any) -> Hashable:
    """A key of a PyTreeDef. Unlike the PyTreeDef, it distinguishes 1 from True in the static data of a user's node."""
    return value_key(treedef.node_data()), tuple(map(tree_key, treedef.children()))


def _params_key(primitive: str, params: dict) -> tuple:
    is_compared = lambda value: primitive not in RULES or isinstance(value, ClosedJaxpr | Jaxpr | int)
    return tuple((name, value_key(params[name])) for name in sorted(params) if is_compared(params[name]))


def _context_key(eqn: Any) -> tuple:
    """What surrounded the operation when it was traced: a mesh, `compute_on`, metadata."""
    public = [name for name in getattr(type(eqn.ctx), "__slots__", ()) if not name.startswith("_")]
    return tuple((name, value_key(getattr(eqn.ctx, name, None))) for name in public)


def value_key(value: Any) -> Hashable:
    """A key of a parameter or constant of a jaxpr, by value where that is possible and by identity elsewhere."""
    if isinstance(value, ClosedJaxpr):
        return program_key(value.jaxpr), tuple(map(value_key, value.consts))
    if isinstance(value, Jaxpr):
        return program_key(value)
    if isinstance(value, jax.Array):
        return ByIdentity(value)  # JAX's arrays do not change
    if isinstance(value, np.ndarray | np.generic):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple | list):
        return type(value), tuple(map(value_key, value))
    if isinstance(value, dict):
        return dict, tuple((value_key(k), value_key(v)) for k, v in value.items())
    if isinstance(value, float | complex):
        return type(value), repr(value)  # NaN equals NaN, and −0.0 differs from 0.0
    try:
        hash(value)
    except TypeError:
        return ByIdentity(value)
    return type(value), value  # with the type, because 1 == True == 1.0


# ---- keys of derivatives -----------------------------------------------------------------------------------


def has_rules(jaxpr: Jaxpr) -> bool:
    """Whether the jaxpr calls anything with derivative rules of its own."""
    return any(eqn.primitive.name in RULES or any(map(has_rules, sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


def derivative_key(jaxpr: Jaxpr, order: int) -> Hashable:
    """A key of what the derivatives up to `order` compute: the first derivative's program, then that program's rules.

    It takes the program of reverse mode, or of forward mode if f does not support reverse mode.
    """
    types: list[Any] = [v.aval for v in jaxpr.invars]
    is_float = [jnp.issubdtype(t.dtype, jnp.inexact) for t in types]
    floats = [t for t, yes in zip(types, is_float, strict=True) if yes]

    def run(floats, values):
        floats = iter(floats)
        values = [next(floats) if yes else value for yes, value in zip(is_float, values, strict=True)]
        out = eval_jaxpr(jaxpr, (), *values)
        return [jnp.asarray(x) for x in out if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    def pull(floats, values):
        out, vjp = jax.vjp(lambda floats: run(floats, values), floats)
        return vjp(out)

    push = lambda floats, values: jax.jvp(lambda floats: run(floats, values), (floats,), (floats,))
    for derivative in (pull, push):
        try:
            closed = jax.make_jaxpr(derivative)(floats, types)
        except Exception:  # a user's rule may raise anything; if both modes raise, no two traces count as equal
            continue
        bare = without_constants(closed)
        further = derivative_key(bare, order - 1) if order > 1 and has_rules(bare) else None
        return value_key(closed), further
    return ByIdentity(object())
