"""Traces of f: f as a pure function that takes every array it reads, captured ones too, as an argument."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from deq_jax._jaxprs import communicating_axes, gathers, program_key, tree_key, without_constants
from deq_jax._states import named_leaves

# ---- what f reads ------------------------------------------------------------------------------------------


class Traced:
    """A traced function, pure in `(*example, inputs, other)`. Its `key` identifies what it computes.

    It holds none of the arrays that f read: a trace outlives its call and would keep them alive, tracers among them.
    """

    def __init__(self, jaxpr: Jaxpr, out_tree: Any, order: tuple[tuple[bool, int], ...]):
        self.jaxpr, self.out_tree = jaxpr, out_tree
        self.order = order  # for each argument before the example: (whether it is in inputs or other, its index there)

    def __call__(self, *arguments: Any) -> PyTree:
        *example, inputs, other = arguments
        reads = [(inputs if is_input else other)[i] for is_input, i in self.order]
        out = eval_jaxpr(self.jaxpr, (), *reads, *jax.tree.leaves(example))
        # A number that f returns is a literal of the jaxpr, not yet an array.
        as_array = lambda x, v: x if isinstance(x, jax.Array) else jnp.asarray(x, v.aval.dtype)
        return jax.tree.unflatten(self.out_tree, map(as_array, out, self.jaxpr.outvars))

    @property
    def out(self) -> PyTree:
        """The types of what it returns."""
        return jax.tree.unflatten(self.out_tree, [v.aval for v in self.jaxpr.outvars])

    @functools.cached_property
    def axes(self) -> tuple:
        """Named axes (of vmap, pmap or shard_map) along which the function communicates."""
        return tuple(sorted(communicating_axes(self.jaxpr), key=str))

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether it brings together what lies on several devices."""
        return gathers(self.jaxpr)

    @functools.cached_property
    def key(self) -> Hashable:
        return program_key(self.jaxpr), tree_key(self.out_tree), self.order


def hoist(f: Callable, *example: PyTree, args: tuple = ()) -> tuple[Traced, list, list]:
    """(pure, inputs, other) with f(*example, *args) = pure(*example, inputs, other).

    `inputs` lists all float arrays that f reads, whether arguments or captured; `other` lists all other arrays (ints,
    keys, masks). (`jax.closure_convert` hoists floats only.) f is traced once, and `pure` replays the trace. Leaves of
    args that are not arrays, such as an activation function, become part of the program.
    """
    leaves, treedef = jax.tree.flatten(args)
    arrays = [jnp.asarray(leaf) if is_array_like(leaf) else None for leaf in leaves]

    # A fresh function each time: JAX caches traces by identity, and a module updated in place keeps its identity.
    def flat(arrays, example):
        merged = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
        return check_arrays(f(*example, *jax.tree.unflatten(treedef, merged)))

    closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(arrays, example)
    staged = is_staged()
    closed = closed if staged else _with_inner_constants_lifted(closed)
    # NumPy arrays are copied, because they may change while a program still reads them.
    constants = [value if isinstance(value, jax.Array) else jnp.array(value) for value in closed.consts]
    jaxpr = without_constants(closed)
    jaxpr, numbers = (jaxpr, []) if staged else _with_numbers_lifted(jaxpr)
    inputs, other, order = [], [], []
    for i, value in enumerate((*numbers, *constants, *jax.tree.leaves(arrays))):
        is_input = jnp.issubdtype(value.dtype, jnp.inexact) and i >= len(numbers)
        group = inputs if is_input else other
        order.append((is_input, len(group)))
        group.append(value)
    return Traced(jaxpr, jax.tree.structure(out_shape), tuple(order)), inputs, other


def axes_of(f: Callable) -> tuple:
    """Named axes along which f communicates, as far as they are known: those of a `Traced` or `Bound` function."""
    return getattr(f, "axes", ())


def gathers_of(f: Callable) -> bool:
    """Whether f is known to bring together what lies on several devices."""
    return getattr(f, "gathers", False)


class Bound:
    """f with its last arguments given. It communicates as f does, or as the function `like` that f calls."""

    def __init__(self, f: Callable, *reads: Any, like: Callable | None = None):
        self.f, self.reads = f, reads
        self.axes, self.gathers = axes_of(like or f), gathers_of(like or f)

    def __call__(self, *args: PyTree) -> PyTree:
        return self.f(*args, *self.reads)


def vary(x: jax.Array, axes: tuple) -> jax.Array:
    """x, which is constant along these axes of `shard_map`, in the type of values that vary along them."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009  before jax 0.9
    return pvary(x, axes)


def is_array_like(leaf: Any) -> bool:
    """Whether JAX would treat this as an array: an array of JAX or NumPy, or a number."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMmV" or jnp.issubdtype(leaf.dtype, jnp.inexact)  # bfloat16 is of kind V
    return isinstance(leaf, jax.Array | int | float | complex) or hasattr(leaf, "__jax_array__")


def check_arrays(out: PyTree, name: str = "f") -> PyTree:
    """What f returned, or a TypeError if a leaf of it is not an array. The user knows f as `name`."""
    for where, leaf in named_leaves(f"{name}(z)", out):
        if not is_array_like(leaf):
            hint = "; is a `yield` left in it?" if hasattr(leaf, "send") else ""
            raise TypeError(f"{name} must return arrays: {where} is {leaf!r}{hint}")
    return out


def flag(name: str) -> bool:
    """A flag of JAX, including values set by a context manager, which `jax.config.read` does not see."""
    return getattr(jax.config, name)


def is_staged() -> bool:
    """Whether operations are recorded now, as under jit, rather than run. (grad and vmap alone run them.)"""
    return isinstance(jax.lax.add(np.float32(0), np.float32(0)), Tracer)


# ---- one trace for many closures ---------------------------------------------------------------------------


class Cache:
    """A thread-safe mapping of at most `size` entries. It drops the least recently used entry first."""

    def __init__(self, size: int):
        self.size, self._lock, self._entries = size, threading.Lock(), OrderedDict[Hashable, Any]()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of this key, made by `make()` if there is none."""
        with self._lock:
            value = self._entries.pop(key) if key in self._entries else make()
            self._entries[key] = value
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


numbers_seen = Cache(256)  # for each program, the numbers of its first call


def _with_numbers_lifted(jaxpr: Jaxpr) -> tuple[Jaxpr, list[jax.Array]]:
    """The jaxpr with its numbers as arguments, and these numbers; unchanged while they are those of the first call.

    A Python float that a closure captures is a literal of the trace. So each value of it would be compiled again, as
    in `for gain in gains: fixed_point(lambda z: gain * jnp.cos(z), z0)`. From the second value on, one program serves
    all. (Not from the first: literals let the compiler simplify. Exponents always stay literals.)
    """

    def may_lift(eqn: Any, v: Any) -> bool:
        if not isinstance(v, Literal) or eqn.primitive.name == "pow":
            return False
        value = np.asarray(v.val)
        return value.shape == () and jnp.issubdtype(value.dtype, jnp.inexact)

    numbers: list[Any] = [v for eqn in jaxpr.eqns for v in eqn.invars if may_lift(eqn, v)]
    if not numbers:
        return jaxpr, []
    variables = jax.make_jaxpr(lambda *xs: xs)(*[v.aval for v in numbers]).jaxpr.invars
    fresh = iter(variables)
    lift = lambda eqn: eqn.replace(invars=[next(fresh) if may_lift(eqn, v) else v for v in eqn.invars])
    lifted = jaxpr.replace(invars=[*variables, *jaxpr.invars], eqns=[lift(eqn) for eqn in jaxpr.eqns])
    as_bytes = [np.asarray(v.val).tobytes() for v in numbers]
    if numbers_seen.get(program_key(lifted), lambda: as_bytes) == as_bytes:
        return jaxpr, []
    return lifted, [jnp.asarray(v.val, v.aval.dtype) for v in numbers]


_inlines: Any = getattr(jax, "Inline", None)
INLINE = True if _inlines is None else _inlines.JAX_EARLY  # the value for jax.jit; an enumeration since jax 0.12


def _with_inner_constants_lifted(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, with every constant of a `jit` inside it as a constant of the whole, to be hoisted later."""

    def captures(closed: ClosedJaxpr) -> bool:
        return bool(closed.consts) or any(captures(eqn.params["jaxpr"]) for eqn in closed.jaxpr.eqns if is_jit(eqn))

    return inlined(closed, captures)


def is_jit(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit")


def inlined(closed: ClosedJaxpr, which: Callable[[ClosedJaxpr], bool]) -> ClosedJaxpr:
    """The same program, in which the equations of a `jit` that `which` is true of stand by themselves."""
    opens = lambda eqn: is_jit(eqn) and which(eqn.params["jaxpr"])
    if not any(map(opens, closed.jaxpr.eqns)):
        return closed

    def inline(eqn):
        if not opens(eqn):
            return eqn
        inner = inlined(eqn.params["jaxpr"], which)
        return eqn.replace(params=eqn.params | {"jaxpr": inner, "inline": INLINE})

    jaxpr = closed.jaxpr.replace(eqns=list(map(inline, closed.jaxpr.eqns)))
    return jax.make_jaxpr(lambda *args: eval_jaxpr(jaxpr, closed.consts, *args))(*[v.aval for v in jaxpr.invars])
