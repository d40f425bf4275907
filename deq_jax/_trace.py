"""Traces of f: what it reads becomes arguments, and what it computes is the key of its compiled programs.

JAX's own caches go by the identity of a function, so they compile a fresh closure again at each eager call, and they
miss that a global has changed. Here an eager call traces f, which takes milliseconds, and looks the compiled program up
by the trace: its equations, their parameters, shapes and dtypes. All arrays that f reads are arguments of the program.
"""

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

PROGRAMS = 256  # how many compiled programs are kept; the one that was called least recently goes first

# ---- what f reads ------------------------------------------------------------------------------------------


class Traced:
    """A function as it was traced, pure in `(*example, inputs, other)`; its `key` tells what it computes.

    It holds no array that f read: a trace that outlives its call would keep those alive, tracers among them.
    """

    def __init__(self, jaxpr: Jaxpr, out_tree: Any, order: tuple[tuple[bool, int], ...]):
        self.jaxpr, self.out_tree = jaxpr, out_tree
        self.order = order  # where each value that the jaxpr takes before the example is: (in inputs or other, index)

    def __call__(self, *arguments: Any) -> PyTree:
        *example, inputs, other = arguments
        reads = [(inputs if is_input else other)[i] for is_input, i in self.order]
        example = jax.tree.leaves(example)
        out = eval_jaxpr(self.jaxpr, (), *reads, *example)
        # A number in the result of f is a literal of the jaxpr, not yet an array.
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
    def key(self) -> Hashable:
        return program_key(self.jaxpr), _tree_key(self.out_tree), self.order


def hoist(f: Callable, *example: PyTree, args: tuple = ()) -> tuple[Traced, list, list]:
    """(pure, inputs, other) with f(*example, *args) = pure(*example, inputs, other).

    `inputs` is a list of all float arrays that f reads, arguments and captured values alike; `other` holds all the
    rest (ints, keys, masks). f is traced once, and `pure` replays the trace; `jax.closure_convert` hoists floats only.
    Leaves of args that are no arrays, such as an activation function, are part of the program.
    """
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [is_array_like(leaf) for leaf in leaves]
    arrays = [jnp.asarray(leaf) for leaf, is_array in zip(leaves, dynamic, strict=True) if is_array]

    # A fresh function each time: JAX caches traces by identity, and a module updated in place keeps its own.
    def flat(arrays, example):
        values = iter(arrays)
        merged = [next(values) if is_array else leaf for leaf, is_array in zip(leaves, dynamic, strict=True)]
        return checked(f(*example, *jax.tree.unflatten(treedef, merged)))

    closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(arrays, example)
    staged = is_staged()
    closed = closed if staged else _with_arrays_at_the_top(closed)
    # Copied, for NumPy's arrays may change while a program still reads them.
    constants = [value if isinstance(value, jax.Array) else jnp.array(value) for value in closed.consts]
    jaxpr = without_constants(closed)
    jaxpr, numbers = (jaxpr, []) if staged else _with_numbers_lifted(jaxpr)
    inputs, other, order = [], [], []
    for i, value in enumerate((*numbers, *constants, *arrays)):
        is_input = jnp.issubdtype(value.dtype, jnp.inexact) and i >= len(numbers)
        place = inputs if is_input else other
        order.append((is_input, len(place)))
        place.append(value)
    return Traced(jaxpr, jax.tree.structure(out_shape), tuple(order)), inputs, other


def without_constants(closed: Any) -> Jaxpr:
    """The jaxpr that takes its constants as first arguments: on jax 0.12 it would keep their values."""
    return closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])


class Bound:
    """f with its last arguments given, and the named axes along which it communicates."""

    def __init__(self, f: Callable, *reads: Any, axes: tuple | None = None):
        self.f, self.reads = f, reads
        self.axes = getattr(f, "axes", ()) if axes is None else axes

    def __call__(self, *args: PyTree) -> PyTree:
        return self.f(*args, *self.reads)


def vary(x: jax.Array, axes: tuple) -> jax.Array:
    """x, which is the same everywhere along axes of `shard_map`, in the type of what differs there."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009  before jax 0.9
    return pvary(x, axes)


def varying_axes(aval: Any) -> frozenset:
    """The axes of `shard_map` along which values of this type differ."""
    manual = getattr(aval, "manual_axis_type", None)  # since jax 0.10
    return frozenset(getattr(aval, "vma", None) or getattr(manual, "varying", ()))


def is_array_like(leaf: Any) -> bool:
    """Whether JAX would take this for an array: one of its own or of NumPy's, or a number."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMmV" or jnp.issubdtype(leaf.dtype, jnp.inexact)  # bfloat16 is of kind V
    return isinstance(leaf, jax.Array | int | float | complex) or hasattr(leaf, "__jax_array__")


def checked(out: PyTree) -> PyTree:
    """What f returned, or a TypeError where that is no arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(out):
        if not is_array_like(leaf):
            where = "f(z)" + jax.tree_util.keystr(path)
            hint = "; is a `yield` left in it?" if hasattr(leaf, "send") else ""
            raise TypeError(f"f must return arrays: {where} is {leaf!r}{hint}")
    return out


COLLECTIVES = (
    "psum", "pmax", "pmin", "pbroadcast", "ppermute", "pgather", "psend", "precv", "preduced",
    "all_gather", "all_to_all", "reduce_scatter",
)  # fmt: skip


def communicating_axes(jaxpr: Jaxpr) -> set:
    """The named axes of the collectives in a jaxpr, less those that a `shard_map` or `pmap` in it binds itself."""
    found = set()
    for eqn in jaxpr.eqns:
        # Their variants have something before or after: psum_invariant, ragged_all_to_all.
        if any(name in eqn.primitive.name for name in COLLECTIVES):
            names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
            names = names if isinstance(names, tuple | list | set | frozenset) else (names,)
            found |= {name for name in names if not isinstance(name, int)}  # an int is an axis of the array
        inner = set().union(*(communicating_axes(sub) for sub in sub_jaxprs(eqn)))
        found |= inner - _own_axes(eqn)
    return found


def _own_axes(eqn: Any) -> set:
    if "pmap" in eqn.primitive.name:
        return {eqn.params["axis_name"]}
    # A shard_map may bind some axes of its mesh, while one around f binds others.
    names = "newly_manual_axes", "manual_axes"  # the second before jax 0.10
    return set().union(*(eqn.params.get(name, ()) for name in names))


def sub_jaxprs(eqn: Any) -> list[Jaxpr]:
    is_jaxpr = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    found = filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in found]


# ---- compiled once -----------------------------------------------------------------------------------------


_seen: OrderedDict[Hashable, list] = OrderedDict()


def _with_numbers_lifted(jaxpr: Jaxpr) -> tuple[Jaxpr, list[jax.Array]]:
    """The jaxpr, and the numbers of it that have become arguments: none, until they differ from call to call.

    A Python float that a closure captures is a literal of the trace, and so each value would be compiled anew, in
    `for gain in gains: fixed_point(lambda z: gain * jnp.cos(z), z0)`. From the second value on, one program serves all.
    (Not from the first: literals let the compiler simplify, and exponents stay literals always.)
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
    key, as_bytes = program_key(lifted), [np.asarray(v.val).tobytes() for v in numbers]
    with _lock:
        first = _seen.setdefault(key, as_bytes)
        _seen.move_to_end(key)
        while len(_seen) > PROGRAMS:
            _seen.popitem(last=False)
    if first == as_bytes:
        return jaxpr, []
    return lifted, [jnp.asarray(v.val, v.aval.dtype) for v in numbers]


_inlines: Any = getattr(jax, "Inline", None)
INLINE = True if _inlines is None else _inlines.JAX_EARLY  # of jax.jit; an enumeration since jax 0.12


def _with_arrays_at_the_top(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, where what a `jit` in it captures is a constant of the whole, and so an argument later."""
    captures = lambda jaxpr: bool(jaxpr.consts) or any(map(opens, jaxpr.jaxpr.eqns))
    opens = lambda eqn: eqn.primitive.name in ("jit", "pjit") and captures(eqn.params["jaxpr"])
    if not any(map(opens, closed.jaxpr.eqns)):
        return closed

    def inline(eqn):
        if not opens(eqn):
            return eqn
        inner = _with_arrays_at_the_top(eqn.params["jaxpr"])
        return eqn.replace(params=eqn.params | {"jaxpr": inner, "inline": INLINE})

    jaxpr = closed.jaxpr.replace(eqns=list(map(inline, closed.jaxpr.eqns)))
    return jax.make_jaxpr(lambda *args: eval_jaxpr(jaxpr, closed.consts, *args))(*[v.aval for v in jaxpr.invars])


_programs: OrderedDict[Hashable, Callable] = OrderedDict()
_lock = threading.Lock()


def run_compiled(run: Callable, static: tuple, *arrays: PyTree, differentiates: bool = False) -> PyTree:
    """run(*static, *arrays), as a compiled program where the call is eager; equal `static` share their program.

    `static` holds `Traced` functions and hashable options, `arrays` all values. Under a trace of the user's own (jit,
    scan) the call is simply part of it. `differentiates`: whether run itself takes derivatives of what is `Traced`.
    """
    values = jax.tree.leaves(arrays)
    # A solver or adjoint of the user's own that is no pytree cannot be compared: its methods may read anything.
    if flag("jax_disable_jit") or is_staged() or not all(map(is_array_like, values)):
        return run(*static, *arrays)
    order = max(map(_derivatives, values), default=0) + differentiates
    # Folds read these flags while they are traced, and JAX's own caches do not tell them apart.
    flags = flag("jax_debug_nans"), flag("jax_debug_infs")
    key = run, flags, tuple(_key(item, order) for item in static)
    with _lock:
        program = _programs.pop(key, None) or jax.jit(lambda *arrays: run(*static, *arrays))
        _programs[key] = program
        while len(_programs) > PROGRAMS:
            _programs.popitem(last=False)
    return program(*arrays)


def clear_caches() -> None:
    """Forget all programs that eager calls have compiled; `jax.clear_caches` forgets JAX's own."""
    with _lock:
        _programs.clear()
        _seen.clear()


def flag(name: str) -> bool:
    """A flag of JAX's that a context manager may set: `jax.config.read` does not tell those."""
    return getattr(jax.config, name)


def is_staged() -> bool:
    """Whether operations are recorded now, as under jit, rather than run (grad and vmap alone run them)."""
    return isinstance(jax.lax.add(np.float32(0), np.float32(0)), Tracer)


# ---- what f is ---------------------------------------------------------------------------------------------


# Primitives that hold derivative rules as Python functions, which are new at each trace. `linear_map` adds itself.
RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class _Same:
    """An object as a key: equal to itself alone, and kept alive, so that its id is nobody else's."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def program_key(jaxpr: Jaxpr) -> tuple:
    """All that decides what the jaxpr computes, as a hashable value; variables are numbered as they appear.

    Functions inside (a callback's) are compared by identity. The derivative rules of `jax.custom_jvp` and
    `jax.custom_vjp` are left out: they have no part in the value, and `_key` compares what they compute.
    """
    numbers: dict[Any, int] = {}

    def atom(v):
        if isinstance(v, Literal):
            return _value_key(np.asarray(v.val)), v.aval
        return numbers.setdefault(v, len(numbers))

    inputs = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    constants = tuple(map(_value_key, getattr(jaxpr, "consts", ())))  # on jax 0.12, where all jaxprs are closed
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


def _tree_key(treedef: Any) -> Hashable:
    """A PyTreeDef in which 1 and True, as static parts of the user's own nodes, are not the same."""
    return _value_key(treedef.node_data()), tuple(map(_tree_key, treedef.children()))


def _params_key(primitive: str, params: dict) -> tuple:
    compared = params.items()
    if primitive in RULES:
        compared = [(name, value) for name, value in compared if isinstance(value, ClosedJaxpr | Jaxpr | int)]
    return tuple((name, _value_key(value)) for name, value in sorted(compared))


def _context_key(eqn: Any) -> tuple:
    """What surrounded the operation when it was traced: a mesh, `compute_on`, metadata."""
    public = [name for name in getattr(type(eqn.ctx), "__slots__", ()) if not name.startswith("_")]
    return tuple((name, _value_key(getattr(eqn.ctx, name, None))) for name in public)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, ClosedJaxpr):
        return program_key(value.jaxpr), tuple(map(_value_key, value.consts))
    if isinstance(value, Jaxpr):
        return program_key(value)
    if isinstance(value, jax.Array):
        return _Same(value)  # an array of JAX does not change
    if isinstance(value, np.ndarray | np.generic):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_value_key, value))
    if isinstance(value, dict):
        return dict, tuple((_value_key(k), _value_key(v)) for k, v in value.items())
    if isinstance(value, float | complex):
        return type(value), repr(value)  # NaN is NaN, and −0.0 is not 0.0
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value  # 1, True and 1.0 are equal, and are not the same


def _derivatives(x: Any) -> int:
    """How many derivatives are being taken with respect to x: two inside grad(grad(...)), none under vmap."""
    if not isinstance(x, Tracer):
        return 0
    if hasattr(x, "primal"):  # of JVP and of linearize
        return 1 + _derivatives(x.primal)
    return _derivatives(x.val) if hasattr(x, "val") else 1  # vmap's, or unknown


def _key(static: Any, order: int) -> Hashable:
    """Of a call that is differentiated so many times, what custom derivatives compute is compared as well."""
    if not isinstance(static, Traced):
        return static
    rules = order and _has_rules(static.jaxpr)
    return static.key, _derivative_key(static.jaxpr, order) if rules else None


def _has_rules(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive.name in RULES or any(map(_has_rules, sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


def _derivative_key(jaxpr: Jaxpr, order: int) -> Hashable:
    """What the derivatives up to `order` compute: the first one's program, and those of its own derivative rules.

    The program is that of reverse mode, or of forward mode where f has no other.
    """
    types: list[Any] = [v.aval for v in jaxpr.invars]
    is_float = [jnp.issubdtype(t.dtype, jnp.inexact) for t in types]
    floats = [t for t, yes in zip(types, is_float, strict=True) if yes]
    rest = [t for t, yes in zip(types, is_float, strict=True) if not yes]

    def run(floats, rest):
        floats, rest = iter(floats), iter(rest)
        values = [next(floats) if yes else next(rest) for yes in is_float]
        out = eval_jaxpr(jaxpr, (), *values)
        return [jnp.asarray(x) for x in out if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    def pull(floats, rest):
        out, vjp = jax.vjp(lambda floats: run(floats, rest), floats)
        return vjp(out)

    push = lambda floats, rest: jax.jvp(lambda floats: run(floats, rest), (floats,), (floats,))
    for derivative in (pull, push):
        try:
            closed = jax.make_jaxpr(derivative)(floats, rest)
        except Exception:  # a rule of the user's may raise anything: then no two traces are taken for equal
            continue
        bare = without_constants(closed)
        further = _derivative_key(bare, order - 1) if order > 1 and _has_rules(bare) else None
        return _value_key(closed), further
    return _Same(object())
