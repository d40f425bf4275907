"""Some of the problems of a batch, as a smaller batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from deq_jax.solvers.protocol import Solver


def first(where: Bool[Array, "batch"], count: int) -> Int[Array, "some"]:
    """Indices of `count` problems: of those of `where`, then of others."""
    # By counting: a sort takes eight times as long.
    place = jnp.where(where, jnp.cumsum(where) - 1, jnp.sum(where) + jnp.cumsum(~where) - 1)
    return jnp.zeros_like(place).at[place].set(jnp.arange(where.size), unique_indices=True)[:count]


def gather(tree: PyTree, who: Int[Array, "some"]) -> PyTree:
    """The part of some of the problems; a scalar, which all problems share, stays."""
    return jax.tree.map(lambda leaf: leaf[who] if leaf.ndim else leaf, tree)


def gather_options(solver: Solver, who: Int[Array, "some"], count: int) -> Solver:
    """The solver of some of `count` problems: options that are arrays with an entry for each of them are gathered."""
    pick = lambda leaf: jnp.asarray(leaf)[who] if jnp.shape(leaf)[:1] == (count,) else leaf
    return jax.tree.map(pick, solver)
