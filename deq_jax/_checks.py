"""Checks of what one solve hands to another, before anything is traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

# Nothing here knows the solvers or `Solved`: both are told by their attributes.


def check_memory(memory: Any, solver: Any, flat: Any, where: str = "memory") -> None:
    """Raise unless `memory` has the structure, shapes and dtypes of `solver.init(flat)`.

    Args:
      memory: what a user passed as `where`.
      flat: the state as the solver sees it, or a `jax.ShapeDtypeStruct` of it.

    Raises:
      TypeError: the memory of another solver, or in another dtype.
      ValueError: of the same solver with other shapes: another history, batch or size of the state.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> memory = deq.solve(jnp.cos, jnp.zeros(3), solver=deq.Anderson(history=2)).memory
    >>> check_memory(memory, deq.Anderson(history=2), jnp.zeros(3))
    >>> check_memory(memory, deq.Anderson(history=4), jnp.zeros(3))
    Traceback (most recent call last):
    ValueError: memory does not fit Anderson: memory.dw must have shape (4, 3), got (2, 3); take the memory of a ...
    """
    # eval_shape would cache its trace by the bound method, and solvers that are equal are not of one program.
    want = jax.eval_shape(lambda z: solver.init(z), flat)
    name, remedy = type(solver).__name__, "take the memory of a solve with the same solver and the same shapes of z0"
    expected, got = jax.tree.structure(want), jax.tree.structure(memory)
    if got != expected:
        raise TypeError(f"{where} must be the memory of a {name}, {_describe(want)}; got {_describe(memory)}; {remedy}")
    leaves = zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(memory), strict=True)
    for (path, like), leaf in leaves:
        leaf_name = where + jax.tree_util.keystr(path)
        if jnp.shape(leaf) != like.shape:
            wrong = f"{leaf_name} must have shape {like.shape}, got {jnp.shape(leaf)}"
            raise ValueError(f"{where} does not fit {name}: {wrong}; {remedy}")
        if _dtype(leaf) != like.dtype:
            wrong = f"{leaf_name} must have dtype {like.dtype}, got {_dtype(leaf)}"
            raise TypeError(f"{where} does not fit {name}: {wrong}; {remedy}")


def check_found(found: Any, z: PyTree, batch_ndim: int) -> None:
    """Raise unless `found` can be the result of the `solve` that z comes from.

    Its value must have z's structure and shapes, and its statistics one entry for each of z's problems. The memory is
    of interest to few adjoints: see `check_memory`.

    Raises:
      TypeError: not what `solve` returns, or a value of another structure.
      ValueError: another shape or batch.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> check_found(deq.solve(jnp.cos, jnp.zeros(3)), jnp.zeros(4), 0)
    Traceback (most recent call last):
    ValueError: found is of another solve: found.value must have shape (4,) as z has, got (3,)
    """
    if isinstance(found, type) or not all(hasattr(found, name) for name in ("value", "stats", "memory")):
        raise TypeError(f"found must be what solve returns, Solved(value, stats, memory, folded); got {found!r}")
    expected, got = jax.tree.structure(z), jax.tree.structure(found.value)
    if got != expected:
        raise TypeError(f"found is of another solve: found.value must have the structure of z, {expected}; got {got}")
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(found.value), jax.tree.leaves(z), strict=True):
        if jnp.shape(leaf) != jnp.shape(like):
            where = "found.value" + jax.tree_util.keystr(path)
            raise ValueError(
                f"found is of another solve: {where} must have shape {jnp.shape(like)} as z has, got {jnp.shape(leaf)}"
            )
    batch = jnp.shape(jax.tree.leaves(z)[0])[:batch_ndim]
    if jnp.shape(found.stats.status) != batch:
        raise ValueError(
            f"found is of another solve: with batch_ndim={batch_ndim}, found.stats.status must have shape {batch}, "
            f"got {jnp.shape(found.stats.status)}"
        )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _describe(memory: Any) -> str:
    """The kind of a memory in a few words: the name of its class, and how many arrays are in it."""
    arrays = len(jax.tree.leaves(memory))
    return f"{type(memory).__name__} of {arrays} array{'s' if arrays != 1 else ''}"
