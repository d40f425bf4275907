"""Checks of what an earlier solve returned, and a user hands back: a memory, or a whole result."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from deq_jax._states import named_leaves, split


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
