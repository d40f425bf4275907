"""Checks of calls that share a batch or a solve: what counts its problems, and what is handed back or replaced."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._states import named_leaves, split
from deq_jax._trace import is_array_like


def check_memory(memory: Any, solver: Any, flat: Any, where: str = "memory") -> None:
    """Raise unless `memory` has the structure, shapes and dtypes of `solver.init(flat)`.

    `memory` is what a user passed as `where`, and `flat` the state as the solver sees it, or its type. The memory of
    another solver, or in another dtype, is a TypeError. Other shapes (history, batch, size) are a ValueError.
    """
    # A lambda, because eval_shape would cache by the bound method, and equal solvers can be different programs.
    want = jax.eval_shape(lambda z: solver.init(z), flat)
    name, remedy = type(solver).__name__, "take the memory of a solve with the same solver and the same shapes of z0"
    if jax.tree.structure(memory) != jax.tree.structure(want):
        both = f"{_describe_memory(want)}; got {_describe_memory(memory)}"
        raise TypeError(f"{where} must be the memory of a {name}, {both}; {remedy}")
    for (part, like), leaf in zip(named_leaves(where, want), jax.tree.leaves(memory), strict=True):
        if jnp.shape(leaf) != like.shape:
            wrong = f"{part} must have shape {like.shape}, got {jnp.shape(leaf)}"
            raise ValueError(f"{where} does not fit {name}: {wrong}; {remedy}")
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if dtype != like.dtype:
            wrong = f"{part} must have dtype {like.dtype}, got {dtype}"
            raise TypeError(f"{where} does not fit {name}: {wrong}; {remedy}")


def check_axes(args: tuple, axes: Any, batch_shape: tuple) -> None:
    """Raise ValueError unless `axes` says of each of args whether its leaves begin with the batch axes: 0 or None."""
    if not isinstance(axes, tuple) or len(axes) != len(args) or any(axis not in (0, None) for axis in axes):
        raise ValueError(f"axes must be a tuple of 0 or None, one for each of {len(args)} args; got {axes!r}")
    batch = " x ".join(map(str, batch_shape))
    for i, (arg, axis) in enumerate(zip(args, axes, strict=True)):
        for where, leaf in named_leaves(f"args[{i}]", arg):
            if axis == 0 and jnp.shape(leaf)[: len(batch_shape)] != batch_shape:
                raise ValueError(
                    f"axes[{i}] is 0, so {where} must begin with the batch of {batch}; got shape {jnp.shape(leaf)}"
                )


def check_is_pytree(who: str, where: str, option: Any) -> None:
    """Raise TypeError unless an option object is a pytree of arrays and numbers."""
    if not all(map(is_array_like, jax.tree.leaves(option))):
        raise TypeError(f"{who}: {where} must be a pytree, as deq.config makes a class, got {option!r}")


def check_replaces(tree: PyTree, like: PyTree, name: str, old: str) -> None:
    """Raise unless `tree`, which a user passed as `name`, has the structure, shapes and dtypes of what it replaces."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise TypeError(f"{name} must have the structure of {old}, {expected}; got {got}")
    for (where, leaf), want in zip(named_leaves(name, tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != want.shape:
            raise ValueError(f"{where} must have the shape of {old}, {want.shape}; got {jnp.shape(leaf)}")
        if jnp.result_type(leaf) != want.dtype:
            raise TypeError(f"{where} must have the dtype of {old}, {want.dtype}; got {jnp.result_type(leaf)}")


def _describe_memory(memory: Any) -> str:
    """The kind of a memory in a few words: the name of its class, and how many arrays are in it."""
    arrays = len(jax.tree.leaves(memory))
    return f"{type(memory).__name__} of {arrays} array{'s' if arrays != 1 else ''}"


def check_found(found: Any, z: PyTree, batch_ndim: int) -> None:
    """Raise unless `found` can be the result of the `solve` that z comes from.

    Another type or structure is a TypeError, and another shape or batch is a ValueError. The memory is not checked,
    because few adjoints read it: see `check_memory`.
    """
    if isinstance(found, type) or not all(hasattr(found, name) for name in ("value", "stats", "memory", "given")):
        raise TypeError(f"found must be what solve returns, SolveResult(value, stats, memory, ...); got {found!r}")
    other = "found is of another solve:"
    for name, tree in (("value", z), ("given", split(z)[1])):
        part = getattr(found, name)
        expected, got = jax.tree.structure(tree), jax.tree.structure(part)
        if got != expected:
            raise TypeError(f"{other} found.{name} must have the structure of z, {expected}; got {got}")
        for (where, leaf), like in zip(named_leaves(f"found.{name}", part), jax.tree.leaves(tree), strict=True):
            if jnp.shape(leaf) != jnp.shape(like):
                raise ValueError(f"{other} {where} must have shape {jnp.shape(like)} as z has, got {jnp.shape(leaf)}")
    batch = jnp.shape(jax.tree.leaves(z)[0])[:batch_ndim]
    if jnp.shape(found.stats.status) != batch:
        raise ValueError(
            f"{other} with batch_ndim={batch_ndim}, found.stats.status must have shape {batch}, "
            f"got {jnp.shape(found.stats.status)}"
        )


# ---- options where a solve begins --------------------------------------------------------------------------
