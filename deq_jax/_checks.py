"""Checks of what a user passes, before anything is traced. A solver or adjoint is recognized by its members alone."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from deq_jax._arrays import varying_axes
from deq_jax._config import MAX_STEPS, Role
from deq_jax._scales import check_judged, check_scales
from deq_jax._states import is_carried, is_float, named_leaves
from deq_jax._trace import is_array_like
from deq_jax._values import check_value, is_array

# ---- arguments of a call -----------------------------------------------------------------------------------


def check_arguments(f, z0, args, solver, adjoint, batch_ndim, probe) -> Any:
    """z0 as arrays. TypeError or ValueError if an argument does not fit, before anything is traced."""
    if not callable(f):
        raise TypeError(f"f must be callable as f(z, *args), got {type(f).__name__}")
    check_solver(solver, "solver")
    check_adjoint(adjoint, "adjoint")
    check_count("batch_ndim", batch_ndim, 0)
    for where, leaf in named_leaves("args", args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{where} must be an array, got {leaf!r}")
    batch_shape = check_state(z0, batch_ndim)
    _check_meshes(z0)
    check_options(solver, batch_shape, "solver")
    check_options(adjoint, batch_shape, "adjoint")
    check_judged(solver, z0, batch_ndim, "solver")
    check_judged(adjoint, z0, batch_ndim, "adjoint")
    shapes = [jnp.shape(p) for p in jax.tree.leaves(probe)]
    if probe is not None and set(shapes) != {batch_shape}:
        raise ValueError(f"probe must be Probe.zeros({batch_shape}), the batch shape of z0; got shapes {shapes}")
    return jax.tree.map(_as_array, z0)


def _as_array(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    # A count given as a Python number is of a weak type, and f(z) of a strong one.
    is_weak_count = jax.typeof(array).weak_type and not is_float(array)
    return array.astype(array.dtype) if is_weak_count else array


def check_state(z0: PyTree, batch_ndim: int, name: str = "z0") -> tuple[int, ...]:
    """The batch shape that all leaves of a state share, or TypeError or ValueError."""
    leaves = named_leaves(name, z0)
    if not leaves:
        raise ValueError(f"{name} has no arrays: expected a pytree with at least one, got {z0!r}")
    batch_shape: Any = None
    for where, leaf in leaves:
        if not is_array_like(leaf):
            raise TypeError(f"{where} must be an array of floats, or of integers, booleans or keys; got {leaf!r}")
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not (is_carried(leaf) or (is_float(leaf) and jnp.finfo(dtype).bits >= 16)):
            kinds = "floats of 16 bits or more, or of integers, booleans or keys"
            raise TypeError(f"{where} must be an array of {kinds}; got dtype {dtype}")
        if 0 in shape:
            raise ValueError(f"{where} is empty: got shape {shape}")
        if len(shape) < batch_ndim:
            raise ValueError(f"batch_ndim={batch_ndim} is beyond the rank of {where}, of shape {shape}")
        batch_shape = shape[:batch_ndim] if batch_shape is None else batch_shape
        if shape[:batch_ndim] != batch_shape:
            raise ValueError(
                f"all leaves of {name} must agree in their {batch_ndim} batch axes: {where} has shape {shape}, "
                f"expected it to begin with {batch_shape}"
            )
    if not any(is_float(leaf) for _, leaf in leaves):
        why = "since integers, booleans and keys are only carried"
        raise TypeError(f"{name} must have at least one array of floats, {why}; got {describe(z0)}")
    return batch_shape


def _check_meshes(z0: PyTree) -> None:
    """Raise ValueError if two leaves of z0 lie on different meshes."""
    first: Any = None
    for where, leaf in named_leaves("z0", z0):
        mesh = jax.typeof(leaf).sharding.mesh if isinstance(leaf, jax.Array) else None
        if mesh is None or mesh.empty:
            continue
        devices = None if isinstance(leaf, Tracer) else leaf.sharding.device_set
        if first is None:
            first = where, mesh.shape, devices
        if mesh.shape != first[1] or (devices and first[2] and devices != first[2]):
            describe = lambda shape: ", ".join(f"{axis}: {size}" for axis, size in shape.items())
            both = f"{where} is on ({describe(mesh.shape)}), {first[0]} on ({describe(first[1])})"
            raise ValueError(f"all leaves of z0 must lie on one mesh of the same devices: {both}")


def check_flat(solver: Any, z0: PyTree, batch_ndim: int, over: tuple = ()) -> None:
    """Raise TypeError if a leaf is sharded beyond its batch axes, as far as its type tells, for a flat solver."""
    if over:
        raise TypeError(
            f"{type(solver).__name__} works on flat vectors (`flat`), which have to lie on one device, and each "
            f"problem is split over axis_name={over}: split the batch alone, or take another solver of this library, "
            "such as NewtonKrylov()"
        )
    for where, leaf in named_leaves("z0", z0):
        spec = getattr(jax.typeof(leaf).sharding, "spec", ())[batch_ndim:]
        if axes := [axis for axis in spec if axis is not None]:
            raise TypeError(
                f"{type(solver).__name__} works on flat vectors (`flat`), which have to lie on one device, and {where} "
                f"is sharded over {', '.join(map(str, axes))}: shard the batch alone, or take another solver of this "
                "library, such as NewtonKrylov()"
            )


def check_axis_name(axis_name: Any) -> tuple:
    """The named axes over which a problem is split, as a tuple; ValueError where one is not bound here."""
    over = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for axis in over:
        try:
            jax.lax.axis_index(axis)
        except NameError:
            raise ValueError(f"axis_name={axis!r} is no axis of a `shard_map` around this call") from None
    return over


def check_is_split(z0: PyTree, over: tuple) -> None:
    """Raise ValueError if a leaf of z0 and of f(z0) is the same all along one of the axes, as far as types tell."""
    told = [axis for axis in over if axis in varying_axes(jax.typeof(jax.lax.axis_index(axis)))]
    for where, leaf in named_leaves("z0", z0):
        same = [axis for axis in told if is_float(leaf) and axis not in varying_axes(jax.typeof(leaf))]
        if same:
            raise ValueError(
                f"axis_name={same[0]!r} names an axis over which each problem is split, but {where}, and what f "
                "returns for it, is the same on all devices along it: a sum over it would count it several times"
            )


def check_count(where: str, value: Any, at_least: int) -> None:
    """Raise ValueError unless the value, which a user passed as `where`, is an int of at least this size."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{where} must be an int >= {at_least}, got {value!r}")


def check_start(z0: PyTree) -> None:
    """Raise ValueError if z0, where its value is known, has infinite entries. (A traced Inf ends as NONFINITE.)

    So an eager call waits for z0. A loop that must not wait belongs under `jax.jit`.
    """
    known = lambda leaf: is_float(leaf) and not isinstance(leaf, Tracer) and leaf.is_fully_addressable
    found = {where: leaf for where, leaf in named_leaves("z0", z0) if known(leaf)}
    if not found:
        return
    # JAX's own test for infinite entries compares with inf, which `jax.debug_infs` would raise on.
    with jax.ensure_compile_time_eval(), jax.debug_infs(False):
        infinite = np.asarray(_infinite(list(found.values())))  # all leaves in one program and one transfer
    if infinite.any():
        where = list(found)[infinite.argmax()]
        raise ValueError(f"{where} has infinite entries; a solve begins at finite ones: take f(z0), or replace them")


_infinite = jax.jit(lambda leaves: jnp.stack([jnp.any(jnp.isinf(leaf)) for leaf in leaves]))


def check_like(tree: PyTree, like: PyTree, who: str, name: str) -> None:
    """Raise TypeError or ValueError unless what `who` returned as `name` is of the type of `like`, leaf by leaf."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise TypeError(f"{who} must return {name} in the structure {expected}, got {got}")
    for (where, leaf), want in zip(named_leaves(name, tree), jax.tree.leaves(like), strict=True):
        wrong = TypeError if jnp.result_type(leaf) != jnp.result_type(want) else ValueError
        if describe(leaf) != describe(want):
            raise wrong(f"{who} must return {where} as {describe(want)}, got {describe(leaf)}")


def check_output(out: PyTree, z0: PyTree, name: str = "f") -> None:
    """Raise TypeError or ValueError unless `out`, the types of what f returned, are those of z0."""
    got, want = jax.tree.structure(out), jax.tree.structure(z0)
    if got != want:
        raise TypeError(f"{name} must return the structure of z0, {want}; got {got}")
    for (where, got), want in zip(named_leaves(f"{name}(z)", out), jax.tree.leaves(z0), strict=True):
        if got.shape != want.shape:
            raise ValueError(f"{where} must have the shape of z0, {want.shape}; got {got.shape}")
        if got.dtype != want.dtype:
            raise TypeError(
                f"{where} must have the dtype of z0, {want.dtype}; got {got.dtype}. Cast z0, or what {name} returns"
            )


def describe(tree: PyTree) -> str:
    """The tree with the dtype and shape of each leaf in its place, for an error message."""
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))


def check_options(options: Any, batch_shape: tuple, where: str) -> None:
    """Raise ValueError if an array among these options is neither a scalar nor shaped as the batch of problems.

    Options inside options are checked too: with `where` = "solver", a message may name `solver.stages[0].rtol`.
    """
    for path, value in _numbers(options, where):
        shape = np.shape(value)
        if shape not in ((), tuple(batch_shape)):
            expected = f"shape {tuple(batch_shape)}, an entry for each problem" if batch_shape else "shape ()"
            raise ValueError(f"{path} must be a number or an array of {expected}; got shape {shape}")


def _numbers(options: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The full name and the value of each array among the numeric options."""
    if isinstance(options, tuple):
        for i, option in enumerate(options):
            yield from _numbers(option, f"{where}[{i}]")
    roles = getattr(type(options), "__option_roles__", None)
    if roles is None:  # not a `config` class: the options that the loop reads
        roles = {name: Role.NUMBER for name in ("rtol", "atol", "max_steps", "damping") if hasattr(options, name)}
    for name, role in roles.items():
        value = getattr(options, name)
        if role in (Role.OBJECT, Role.ANY):
            yield from _numbers(value, f"{where}.{name}")
        elif role not in (Role.STRUCTURE, Role.SCALES) and is_array(value):  # for scales see `_scales`
            yield f"{where}.{name}", value


def check_stopping(solver: Any) -> None:
    """Raise unless the three numbers that every solver has are in their ranges."""
    if solver.rtol is not None:  # None: the default of the state's dtype
        check_number(solver, "rtol", at_least=0)
    check_scales(f"{type(solver).__name__}.atol", solver.atol)
    check_number(solver, "max_steps", at_least=0, at_most=MAX_STEPS, why="evaluations are counted in int32")


def check_solver(value: Any, where: str) -> None:
    """Raise TypeError unless the value, which a user passed as `where`, has all members of a solver."""
    missing = [name for name in ("init", "update", "rtol", "atol", "max_steps") if not hasattr(value, name)]
    if isinstance(value, type) or "update" in missing:
        raise TypeError(f"{where} must be a solver such as Anderson(), got {value!r}")
    if missing:
        raise TypeError(
            f"{where} must be a solver, and {type(value).__name__} has no {' and no '.join(missing)}; a solver has "
            "init(z), update(residual, state, z), rtol, atol and max_steps"
        )


def check_adjoint(value: Any, where: str) -> None:
    """Raise TypeError unless the value, which a user passed as `where`, is an adjoint of either kind."""
    method = lambda name: getattr(value, name, None)
    for name in ("pullback", "run", "pushforward", "keep", "check", "bind"):
        if not isinstance(value, type) and method(name) is not None and not callable(method(name)):
            raise TypeError(
                f"{where}: {type(value).__name__}.{name} must be a method of an adjoint, got {method(name)!r}"
            )
    if isinstance(value, type) or not (method("pullback") or method("run")):
        raise TypeError(
            f"{where} must be an adjoint such as Implicit(), got {value!r}; an adjoint has "
            "pullback(problem, forward, z_bar), or run(problem, z0, solver)"
        )


def check_preconditioner(options: Any) -> None:
    """Raise TypeError unless the preconditioner is None or a callable."""
    P = options.preconditioner
    if P is not None and (isinstance(P, type) or not callable(P)):
        raise TypeError(
            f"{type(options).__name__}.preconditioner must be a linear function of a state like z, got {P!r}"
        )


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
    """Raise ValueError unless the field is a number in this range, and finite if `finite`, or an array of such numbers.

    Traced arrays pass, because their entries are unknown. `why` ends the message.
    """
    bounds: Any = dict(at_least=at_least, above=above, at_most=at_most, below=below, finite=finite, why=why)
    check_value(f"{type(owner).__name__}.{name}", getattr(owner, name), **bounds)
