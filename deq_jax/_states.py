"""States: pytrees whose leaves share leading batch axes. Their layout as vectors, and arithmetic on them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from deq_jax._arrays import norm, zeros_from

FEW_LEAVES = 16  # from here on, leaves of one size are measured together


class Layout:
    """How a state is laid out as one vector a problem, `[*batch, dim]` in float32 or wider.

    A complex number is two reals, so that norms and inner products are real. Many leaves are sorted by size, and those
    of one size are measured together: a thousand norms would take minutes to compile.

    >>> layout = Layout({"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 1))}, batch_ndim=1)
    >>> flat = layout.ravel({"a": jnp.ones((2, 3)), "b": jnp.full((2, 1), 7.0)})
    >>> flat.tolist(), layout.norms(flat).shape
    ([[1.0, 1.0, 1.0, 7.0], [1.0, 1.0, 1.0, 7.0]], (2, 2))
    """

    def __init__(self, example: PyTree, batch_ndim: int):
        self.leaves, self.treedef = jax.tree.flatten(example)
        self.batch_ndim = batch_ndim
        self.several = len(self.leaves) > 1
        self.dtype = wide_dtype(example)
        self.eps = eps_of(example)
        sizes = [self._reals(leaf) for leaf in self.leaves]
        self.order = list(range(len(sizes)))
        if len(sizes) > FEW_LEAVES:
            self.order.sort(key=sizes.__getitem__)
        self.sizes = [sizes[i] for i in self.order]  # in the order of the vector
        self._is_exact = all(leaf.real.dtype == self.dtype for leaf in self.leaves)

    def ravel(self, tree: PyTree) -> Float[Array, "*batch dim"]:
        """The state as vectors."""
        values = jax.tree.leaves(tree)
        flat = [self._ravel_leaf(values[i]) for i in self.order]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)

    def unravel(self, flat: Float[Array, "*batch dim"]) -> PyTree:
        """The state that vectors stand for, in the structure and the dtypes of the example."""
        values, ends = [flat] * len(self.leaves), list(itertools.accumulate(self.sizes, initial=0))
        for i, start, end in zip(self.order, ends, ends[1:], strict=False):
            part = jax.lax.slice_in_dim(flat, start, end, axis=-1) if self.several else flat
            values[i] = self._unravel_leaf(part, self.leaves[i])
        return jax.tree.unflatten(self.treedef, values)

    def round(self, flat: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """The vectors, rounded to the dtypes of the leaves."""
        return flat if self._is_exact else self.ravel(self.unravel(flat))

    def norms(self, flat: Float[Array, "*batch dim"]) -> Float[Array, "*norms"]:
        """The norm of each leaf: `*norms` is `*batch leaves`, or `*batch` for a single leaf.

        (A last axis of one entry would keep the compiler from vectorizing over problems.)
        """
        if not self.several:
            return norm(flat)
        parts, start = [], 0
        for size, run in itertools.groupby(self.sizes):
            count = len(list(run))
            part = jax.lax.slice_in_dim(flat, start, start + size * count, axis=-1)
            parts.append(norm(part.reshape(*flat.shape[:-1], count, size)))
            start += size * count
        return jnp.concatenate(parts, axis=-1)

    def _reals(self, leaf: Array) -> int:
        return math.prod(leaf.shape[self.batch_ndim :]) * (2 if jnp.iscomplexobj(leaf) else 1)

    def _ravel_leaf(self, leaf: Array) -> Float[Array, "*batch dim"]:
        flat = leaf.reshape(*leaf.shape[: self.batch_ndim], -1)
        if jnp.iscomplexobj(flat):
            flat = jnp.concatenate([flat.real, flat.imag], axis=-1)
        return flat.astype(self.dtype)

    def _unravel_leaf(self, flat: Float[Array, "*batch dim"], like: Array) -> Array:
        if jnp.iscomplexobj(like):
            flat = jax.lax.complex(*jnp.split(flat, 2, axis=-1))
        return flat.reshape(*flat.shape[:-1], *like.shape[self.batch_ndim :]).astype(like.dtype)


def ravel(tree: PyTree) -> Float[Array, " dim"]:
    """All entries of a tree as one vector, in float32 or wider; a complex number is two reals."""
    return Layout(tree, 0).ravel(tree)


def eps_of(tree: PyTree) -> float:
    """The machine epsilon of the coarsest leaf."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(tree))


def wide_dtype(tree: PyTree) -> Any:
    """float32, or float64 if a leaf needs it."""
    wide = any(jnp.finfo(leaf.dtype).bits > 32 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


# ---- arithmetic --------------------------------------------------------------------------------------------


def choose(where: Bool[Array, "*batch"], a: PyTree, b: PyTree) -> PyTree:
    """a in the problems of `where`, b in the others. A leaf without batch axes, which all problems share, is b's."""

    def pick(a, b):
        if b.ndim < where.ndim:
            return b
        return jnp.where(where.reshape(where.shape + (1,) * (b.ndim - where.ndim)), a, b)

    return jax.tree.map(pick, a, b)


def zeros_like(tree: PyTree) -> PyTree:
    """`zeros_from` of each leaf."""
    return jax.tree.map(zeros_from, tree)


def frozen(tree: PyTree) -> PyTree:
    """The tree without derivatives. Leaves that are no arrays stay as they are."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def conj(tree: PyTree) -> PyTree:
    """The complex conjugate. A solver takes a complex state as two reals, where Jᵀ acts as vjp does on conjugates."""
    return jax.tree.map(jnp.conj, tree)


def lerp(a: PyTree, b: PyTree, weight: Any) -> PyTree:
    """a + weight (b − a), with one weight for all problems or one for each."""

    def mix(a, b):
        w = jnp.asarray(weight).astype(a.dtype)
        return a + (jax.lax.expand_dims(w, range(w.ndim, a.ndim)) if w.ndim else w) * (b - a)

    return jax.tree.map(mix, a, b)


def multiply(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    """The state of each problem times its scale."""
    return jax.tree.map(lambda leaf: _with_scale(jnp.multiply, leaf, scale), tree)


def divide(tree: PyTree, scale: Float[Array, "*batch"]) -> PyTree:
    """The state of each problem over its scale."""
    return jax.tree.map(lambda leaf: _with_scale(jnp.divide, leaf, scale), tree)


def _with_scale(operation: Callable, leaf: Array, scale: Float[Array, "*batch"]) -> Array:
    """In float32 or wider: float16 may hold neither the scale nor its reciprocal."""
    if jnp.iscomplexobj(leaf):
        return jax.lax.complex(*(_with_scale(operation, part, scale) for part in (leaf.real, leaf.imag)))
    wide = wide_dtype((leaf, scale))
    scale = jax.lax.expand_dims(scale.astype(wide), range(scale.ndim, leaf.ndim))
    return operation(leaf.astype(wide), scale).astype(leaf.dtype)


def corner(tree: PyTree, batch_ndim: int) -> Array:
    """One entry a problem, of the first leaf: something of shape `*batch` with the sharding of the state."""
    leaf = jax.tree.leaves(tree)[0]
    return leaf.reshape(*leaf.shape[:batch_ndim], -1)[..., 0]


def flat_type(z: PyTree, batch_ndim: int) -> jax.ShapeDtypeStruct:
    """The type of a state as a solver sees it."""
    return jax.eval_shape(lambda z: Layout(z, batch_ndim).ravel(z), z)


def named_leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree that the user knows as `name`, each with its full name for an error message.

    >>> named_leaves("z0", {"a": 1, "b": [2]})
    [("z0['a']", 1), ("z0['b'][0]", 2)]
    """
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
