"""Where a solve begins: at the last equilibrium of the same example, or at a learned guess."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax.solvers.base import choose, raveler, wide_dtype


class FixedPointCache(NamedTuple):
    """The last equilibrium of each of N examples, with the time at which it was found.

    A plain pytree and pure functions: carry it through jit (donated, so that it is updated in place) and put it
    into the checkpoint. Times are ints of yours, the training step or the epoch. Memory is N states; they are
    kept in the dtype of the example.

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
    written: Int[Array, " N"]  # when; -1 is never

    @classmethod
    def create(cls, example_z: PyTree, size: int) -> "FixedPointCache":
        """Empty, for `size` examples whose state is shaped as `example_z`, which has no batch axis."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an int >= 1, got {size!r}")
        z = jax.tree.map(lambda leaf: jnp.zeros((size, *jnp.shape(leaf)), jnp.result_type(leaf)), example_z)
        return cls(z, jnp.full((size,), -1, jnp.int32))

    def fresh(self, indices: Int[Array, " batch"], now: Any, max_age: Any = None) -> Bool[Array, " batch"]:
        """Which of these were written, and at most `max_age` before `now` (None: ever)."""
        written = self.written.at[self._valid(indices)].get(mode="fill", fill_value=-1)
        return (written >= 0) if max_age is None else (written >= 0) & (now - written <= max_age)

    def lookup(self, indices: Int[Array, " batch"], default: PyTree, now: Any, max_age: Any = None) -> PyTree:
        """z0 for a batch of examples: their entries, and `default`'s where one is not `fresh`."""
        self._check(default, "default")
        fresh, valid = self.fresh(indices, now, max_age), self._valid(indices)

        default = jax.tree.map(jnp.asarray, default)
        read = lambda cached, like: cached.at[valid].get(mode="fill", fill_value=0).astype(like.dtype)
        return choose(fresh, jax.tree.map(read, self.z, default), default)

    def store(
        self, indices: Int[Array, " batch"], z: PyTree, now: Any, where: Bool[Array, " batch"] | None = None
    ) -> "FixedPointCache":
        """The cache with these equilibria written at time `now`, where `where` says so; no gradient flows in.

        Pass `where=stats.converged`: what a failed solve leaves is no start for the next one. Indices outside of
        [0, N) are dropped, which serves for padding; those of a batch should differ from each other.
        """
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
        # JAX would count negative indices from the end.
        return jnp.where(indices < 0, self.size, indices)

    def _check(self, batch: PyTree, name: str) -> None:
        if jax.tree.structure(batch) != jax.tree.structure(self.z):
            expected = jax.tree.structure(self.z)
            raise TypeError(f"{name} must have the structure {expected}, got {jax.tree.structure(batch)}")
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        for (path, leaf), cached in zip(leaves, jax.tree.leaves(self.z), strict=True):
            if jnp.shape(leaf)[1:] != cached.shape[1:] or jnp.ndim(leaf) == 0:
                where = name + jax.tree_util.keystr(path)
                want = ", ".join(["batch", *map(str, cached.shape[1:])])
                raise ValueError(f"{where} must have the shape ({want}), got {jnp.shape(leaf)}")


def first_guess_loss(z_star: PyTree, z0: PyTree) -> Float[Array, ""]:
    """‖z0 − z*‖² over the number of entries, with z* held fixed: what a learned first guess is trained by.

    A fixed point does not depend on where its solve began, so z0 gets its gradient from here alone:

        z0 = guess(x)
        z, stats = deq.fixed_point(cell, z0, params, x, batch_ndim=1)
        loss = task_loss(z) + first_guess_loss(z, z0)

    Source: Pal, Edelman & Rackauckas (2022), "Continuous Deep Equilibrium Models" (Skip DEQ).

    >>> import jax.numpy as jnp
    >>> float(first_guess_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
    2.0
    """
    wide = wide_dtype((z_star, z0))
    reals = lambda leaf: raveler(leaf, 0)[0](leaf).astype(wide)
    square = lambda z, z0: jnp.sum((reals(z0) - reals(jax.lax.stop_gradient(z))) ** 2)
    sums = jax.tree.leaves(jax.tree.map(square, z_star, z0))
    return jnp.asarray(sum(sums) / sum(leaf.size for leaf in jax.tree.leaves(z0)))
