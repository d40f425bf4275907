"""States: pytrees whose leaves share leading batch axes. Their layout as vectors, and arithmetic on them.

Leaves of floats (real or complex) are solved for. All others, integers, booleans and keys, are carried: f returns their
next value, and no vector, norm or derivative has a part of them. `split` and `join` tell the two kinds apart.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from deq_jax._arrays import may_be_sharded, per_entry, zeros_from
from deq_jax._vectors import Vec, Vector, norm, norms

FEW_LEAVES = 16  # above, a state is laid out in one array


class Layout:
    """How a state is laid out as the vectors that solvers work on, in float32 or wider.

    A state of one leaf is an array `[*batch, dim]`, and each of several leaves is a part of a `Vector`. Where the state
    may be sharded over devices, a part keeps the shape of its leaf; else its axes are merged. With `flat`, and for more
    than FEW_LEAVES, all leaves lie one after the other in one array: a thousand parts would take minutes to compile.
    There, leaves are sorted by size, and those of one size are measured together. A complex number is two reals, so
    that norms and inner products are real. Carried leaves have no part in a vector: `pack` passes over them, and
    `unpack` leaves None in their places, for `join` to fill.

    >>> layout = Layout({"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 1))}, batch_ndim=1, flat=True)
    >>> vector = layout.pack({"a": jnp.ones((2, 3)), "b": jnp.full((2, 1), 7.0)})
    >>> vector.tolist(), layout.norms(vector).shape
    ([[1.0, 1.0, 1.0, 7.0], [1.0, 1.0, 1.0, 7.0]], (2, 2))
    """

    def __init__(self, example: PyTree, batch_ndim: int, flat: bool = False, over: tuple = ()):
        floats = split(example)[0]
        self.leaves, self.treedef = jax.tree.flatten(floats)
        self.batch_ndim, self.over = batch_ndim, over
        self.several = len(self.leaves) > 1
        self.dtype = wide_dtype(floats)
        self.eps = eps_of(floats)
        self.keeps_shapes = not flat and any(map(may_be_sharded, self.leaves))
        self.flat = flat or not (over or self.keeps_shapes or 1 < len(self.leaves) <= FEW_LEAVES)
        sizes = [self._reals(leaf) for leaf in self.leaves]
        self.order = list(range(len(sizes)))
        if self.flat and len(sizes) > FEW_LEAVES:
            self.order.sort(key=sizes.__getitem__)
        self.sizes = [sizes[i] for i in self.order]  # in the order of a flat vector
        self._is_exact = all(leaf.real.dtype == self.dtype for leaf in self.leaves)

    @property
    def size(self) -> Any:
        """Reals a problem."""
        return sum(self.sizes)

    @property
    def entries(self) -> Any:
        """Entries a problem, a complex number as one; over all devices where a problem is split."""
        own = sum(math.prod(leaf.shape[self.batch_ndim :]) for leaf in self.leaves)
        return own * math.prod(map(jax.lax.axis_size, self.over))

    def pack(self, tree: PyTree) -> Vec:
        """The state as vectors."""
        reals = [self._to_reals(leaf) for leaf in jax.tree.leaves(tree) if is_float(leaf)]
        if not self.flat:
            return Vector(tuple(itertools.chain.from_iterable(reals)), self.batch_ndim, self.over)
        parts = [part for i in self.order for part in reals[i]]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def unpack(self, vector: Vec) -> PyTree:
        """The state that vectors stand for, in the structure and the dtypes of the example."""
        return jax.tree.unflatten(self.treedef, map(self._from_reals, self._values(vector), self.leaves))

    def moduli(self, vector: Vec) -> list[Array]:
        """|x| of each entry: an array for each leaf, of its shape and in the dtype of the vectors."""
        sizes = [jnp.hypot(*x) if isinstance(x, list) else jnp.abs(x) for x in self._values(vector)]
        return [self._shaped(size, leaf) for size, leaf in zip(sizes, self.leaves, strict=True)]

    def _values(self, vector: Vec) -> list:
        """The part of each leaf, or its two parts if it is complex."""
        values: list = [None] * len(self.leaves)
        if self.flat:
            ends = list(itertools.accumulate(self.sizes, initial=0))
            for i, start, end in zip(self.order, ends, ends[1:], strict=False):
                values[i] = jax.lax.slice_in_dim(vector, start, end, axis=-1) if self.several else vector
                if jnp.iscomplexobj(self.leaves[i]):
                    values[i] = list(jnp.split(values[i], 2, axis=-1))
        else:
            parts = iter(vector.parts)
            for i, leaf in enumerate(self.leaves):
                values[i] = [next(parts), next(parts)] if jnp.iscomplexobj(leaf) else next(parts)
        return values

    def round(self, vector: Vec) -> Vec:
        """The vectors, rounded to the dtypes of the leaves."""
        return vector if self._is_exact else self.pack(self.unpack(vector))

    def norms_of(self, *vectors: Vec) -> tuple[Float[Array, "*norms"], ...]:
        """`norms` of each vector, in one pass over all where that is possible."""
        return tuple(map(self.norms, vectors)) if self.several else norms(*vectors)

    def norms(self, vector: Vec) -> Float[Array, "*norms"]:
        """The norm of each leaf: `*norms` is `*batch leaves`, or `*batch` for a single leaf.

        (A last axis of one entry would keep the compiler from vectorizing over problems.)
        """
        if not self.several:
            return norm(vector)
        if not self.flat:
            parts = iter(vector.parts)
            of_leaves = [tuple(itertools.islice(parts, 1 + jnp.iscomplexobj(leaf))) for leaf in self.leaves]
            return jnp.stack([norm(vector.of(parts)) for parts in of_leaves], axis=-1)
        parts, start = [], 0
        for size, run in itertools.groupby(self.sizes):
            count = len(list(run))
            part = jax.lax.slice_in_dim(vector, start, start + size * count, axis=-1)
            parts.append(norm(part.reshape(*vector.shape[:-1], count, size)))
            start += size * count
        return jnp.concatenate(parts, axis=-1)

    def _reals(self, leaf: Array) -> int:
        return math.prod(leaf.shape[self.batch_ndim :]) * (2 if jnp.iscomplexobj(leaf) else 1)

    def _to_reals(self, leaf: Array) -> list[Array]:
        """The leaf as one or two real arrays, for vectors."""
        parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
        merged = lambda part: part if self.keeps_shapes else part.reshape(*part.shape[: self.batch_ndim], -1)
        return [merged(part).astype(self.dtype) for part in parts]

    def _from_reals(self, value: Any, like: Array) -> Array:
        if jnp.iscomplexobj(like):
            value = jax.lax.complex(*value)
        return self._shaped(value, like).astype(like.dtype)

    def _shaped(self, part: Array, like: Array) -> Array:
        own = like.shape[self.batch_ndim :]
        return part if self.keeps_shapes else part.reshape(*part.shape[: self.batch_ndim], *own)


def ravel(tree: PyTree) -> Float[Array, " dim"]:
    """All entries of a tree as one vector, in float32 or wider; a complex number is two reals."""
    return Layout(tree, 0, flat=True).pack(tree)


def eps_of(tree: PyTree) -> float:
    """The machine epsilon of the coarsest leaf."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(tree))


def wide_dtype(tree: PyTree) -> Any:
    """float32, or float64 if a leaf needs it."""
    wide = any(jnp.finfo(leaf.dtype).bits > 32 for leaf in jax.tree.leaves(tree) if is_float(leaf))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


# ---- carried leaves ----------------------------------------------------------------------------------------


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """(floats, carried): the tree with only its leaves of floats, and with only the others; None is in their places.

    >>> split({"n": jnp.array(3), "z": jnp.array(0.5)})[1]
    {'n': Array(3, dtype=int32, weak_type=True), 'z': None}
    """
    pick = lambda kind: jax.tree.map(lambda leaf: leaf if is_float(leaf) == kind else None, tree)
    return pick(True), pick(False)


def join(floats: PyTree, carried: PyTree) -> PyTree:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, carried, is_leaf=lambda x: x is None)


def holding(f: Callable, carried: PyTree) -> Callable:
    """f as a function of the floats alone, which is given the same carried leaves at each call."""
    return lambda z, *reads: split(f(join(z, carried), *reads))[0]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is solved for, not carried."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def is_carried(leaf: Any) -> bool:
    """Whether a leaf is of a kind that can be carried."""
    return any(jnp.issubdtype(jnp.result_type(leaf), kind) for kind in (jnp.integer, jnp.bool_, jax.dtypes.prng_key))


def check_no_carried(tree: PyTree, name: str, why: str) -> None:
    """Raise TypeError if a leaf of this tree, which a user passed as `name`, would be carried."""
    for where, leaf in named_leaves(name, tree):
        if is_carried(leaf):
            raise TypeError(f"{where} is of dtype {jnp.result_type(leaf)}, and would be carried; {why}")


# ---- arithmetic --------------------------------------------------------------------------------------------


def choose(where: Bool[Array, "*batch"], a: PyTree, b: PyTree) -> PyTree:
    """a in the problems of `where`, b in the others. A leaf without batch axes, which all problems share, is b's."""

    def pick(a, b):
        if b.ndim < where.ndim:
            return b
        return jnp.where(per_entry(where, b), a, b)

    return jax.tree.map(pick, a, b)


def zeros_like(tree: PyTree) -> PyTree:
    """`zeros_from` of each leaf."""
    return jax.tree.map(zeros_from, tree)


def frozen(tree: PyTree) -> PyTree:
    """The tree without derivatives. Leaves that are no arrays stay as they are."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, a, b)


def conj(tree: PyTree) -> PyTree:
    """The complex conjugate. A solver takes a complex state as two reals, where Jᵀ acts as vjp does on conjugates."""
    return jax.tree.map(jnp.conj, tree)


def lerp(a: PyTree, b: PyTree, weight: Any) -> PyTree:
    """a + weight (b − a), with one weight for all problems or one for each."""

    def mix(a, b):
        return a + per_entry(jnp.asarray(weight).astype(a.dtype), a) * (b - a)

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
    return operation(leaf.astype(wide), per_entry(scale.astype(wide), leaf)).astype(leaf.dtype)


def corner(tree: PyTree, batch_ndim: int) -> Array:
    """One entry a problem, of the first leaf of floats: something of shape `*batch` with the sharding of the state."""
    leaf = next(filter(is_float, jax.tree.leaves(tree)))
    if may_be_sharded(leaf):  # where an entry may be on one of the devices
        return jnp.min(leaf.real, axis=tuple(range(batch_ndim, leaf.ndim)))
    return leaf.reshape(*leaf.shape[:batch_ndim], -1)[..., 0]


def named_leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree that the user knows as `name`, each with its full name for an error message.

    >>> named_leaves("z0", {"a": 1, "b": [2]})
    [("z0['a']", 1), ("z0['b'][0]", 2)]
    """
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
