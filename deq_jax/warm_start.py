"""Starting points for a solve: the last equilibrium of the same example, or a learned guess."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._checks import check_count
from deq_jax._states import choose, join, named_leaves, ravel, split, wide_dtype


class FixedPointCache(NamedTuple):
    """The last equilibrium of each of N examples, with the time at which it was found.

    It is a plain pytree with pure functions: carry it through jit (donated, so that it is updated in place) and put it
    into the checkpoint. Times are your own ints, such as the training step or the epoch. Memory is N states in the
    dtype of the example. Carried leaves are not kept: `lookup` returns those of its default.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, x: 0.9 * jnp.cos(z + x)
    >>> x, zeros, indices = jnp.array([[0.1], [0.2]]), jnp.zeros((2, 1)), jnp.array([7, 3])
    >>> cache = FixedPointCache.create(jnp.zeros(1), size=10)
    >>> for step in range(2):
    ...     z0 = cache.lookup(indices, zeros, now=step, max_age=100)
    ...     z, stats = deq.fixed_point(cell, z0, x, batch_ndim=1)
    ...     cache = cache.store(indices, z, now=step, where=stats.converged)
    ...     print(stats.steps.tolist())
    [5, 5]
    [1, 1]
    """

    z: PyTree  # [N, *] for each leaf of an example's state
    written: Int[Array, " N"]  # the time of writing; -1 means never

    @classmethod
    def create(cls, example_z: PyTree, size: int) -> "FixedPointCache":
        """An empty cache for `size` examples whose states have the shape of `example_z`, which has no batch axis."""
        check_count("size", size, 1)
        example_z = split(example_z)[0]
        z = jax.tree.map(lambda leaf: jnp.zeros((size, *jnp.shape(leaf)), jnp.result_type(leaf)), example_z)
        return cls(z, jnp.full((size,), -1, jnp.int32))

    def fresh(self, indices: Int[Array, " batch"], now: Any, max_age: Any = None) -> Bool[Array, " batch"]:
        """Which of these entries were written, at any time or, given a `max_age`, at most so long before `now`."""
        written = self.written.at[self._valid(indices)].get(mode="fill", fill_value=-1)
        return (written >= 0) if max_age is None else (written >= 0) & (now - written <= max_age)

    def lookup(self, indices: Int[Array, " batch"], default: PyTree, now: Any, max_age: Any = None) -> PyTree:
        """z0 for a batch of examples: the entry of each example if it is `fresh`, else its part of `default`."""
        default, carried = split(jax.tree.map(jnp.asarray, default))
        self._check(default, "default")
        fresh, valid = self.fresh(indices, now, max_age), self._valid(indices)
        read = lambda cached, like: cached.at[valid].get(mode="fill", fill_value=0).astype(like.dtype)
        return join(choose(fresh, jax.tree.map(read, self.z, default), default), carried)

    def store(
        self, indices: Int[Array, " batch"], z: PyTree, now: Any, where: Bool[Array, " batch"] | None = None
    ) -> "FixedPointCache":
        """The cache with these equilibria written at time `now`, only where `where` is true. No gradient flows in.

        Pass `where=stats.converged`, because the result of a failed solve is no good start for the next one. Indices
        outside of [0, N) are dropped, so they can be padding. The indices of a batch should be distinct.
        """
        z = split(z)[0]
        self._check(z, "z")
        valid = self._valid(indices)
        valid = valid if where is None else jnp.where(where, valid, self.size)
        put = lambda cached, z: cached.at[valid].set(jax.lax.stop_gradient(z).astype(cached.dtype), mode="drop")
        written = self.written.at[valid].set(jnp.asarray(now, self.written.dtype), mode="drop")
        return FixedPointCache(jax.tree.map(put, self.z, z), written)

    @property
    def size(self) -> int:
        return self.written.shape[0]

    def _valid(self, indices):
        # Negative indices, which JAX would count from the end, become out of range.
        return jnp.where(indices < 0, self.size, indices)

    def _check(self, batch: PyTree, name: str) -> None:
        """Raise TypeError or ValueError unless this is a batch of states, which a user passed as `name`."""
        expected, got = jax.tree.structure(self.z), jax.tree.structure(batch)
        if got != expected:
            raise TypeError(f"{name} must have the structure {expected}, got {got}")
        for (where, leaf), cached in zip(named_leaves(name, batch), jax.tree.leaves(self.z), strict=True):
            if jnp.shape(leaf)[1:] != cached.shape[1:] or jnp.ndim(leaf) == 0:
                want = ", ".join(["batch", *map(str, cached.shape[1:])])
                raise ValueError(f"{where} must have the shape ({want}), got {jnp.shape(leaf)}")


def first_guess_loss(z_star: PyTree, z0: PyTree) -> Float[Array, ""]:
    """‖z0 − z*‖² over the number of entries, with z* held fixed: the loss that trains a learned first guess.

    Carried leaves do not count.

    A fixed point does not depend on where its solve began, so this loss is the only source of a gradient for z0:

        z0 = guess(x)
        z, stats = deq.fixed_point(cell, z0, params, x, batch_ndim=1)
        loss = task_loss(z) + first_guess_loss(z, z0)

    Source: Pal, Edelman & Rackauckas (2022), "Continuous Deep Equilibrium Models" (Skip DEQ).

    >>> import jax.numpy as jnp
    >>> float(first_guess_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
    2.0
    """
    (z_star, _), (z0, _) = split(z_star), split(z0)
    wide = wide_dtype((z_star, z0))
    reals = lambda leaf: ravel(leaf).astype(wide)
    square = lambda z, z0: jnp.sum((reals(z0) - reals(jax.lax.stop_gradient(z))) ** 2)
    sums = jax.tree.leaves(jax.tree.map(square, z_star, z0))
    return jnp.asarray(sum(sums) / sum(leaf.size for leaf in jax.tree.leaves(z0)))
