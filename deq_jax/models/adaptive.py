"""The adaptive embedding and softmax of language models with a large vocabulary.

Token ids are ordered by frequency and cut into clusters: a head of common words, and tails of rarer words with
narrower rows. Cluster i has rows of width ⌊dim / div_valⁱ⌋ and a projection P_i between that width and the model's. The
softmax of the head runs over its own words and one entry for each tail. A word w of tail i has

    log p(w | h) = log softmax_head(h)[tail i] + log softmax_i(h)[w].

Everything here is a pure function of arrays, `EmbeddingWeights` and `SoftmaxWeights`. `AdaptiveVocabulary` holds these
arrays as parameters. Without cutoffs it is the plain embedding and the plain softmax.

Sources: Grave et al. (2017), "Efficient softmax approximation for GPUs"; Baevski & Auli (2019), "Adaptive Input
Representations". The conventions are those of Transformer-XL's code, on which the DEQ-Transformer's code is built.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deq_jax._arrays import aligned
from deq_jax.models.common import param, require, wide

# `nll` holds at most this many logits at once, 128 MB in float32; it computes more of them block by block.
LOGITS_AT_ONCE = 2**25


class EmbeddingWeights(NamedTuple):
    """E_i and P_i of each cluster; a projection is None if the rows already have the model's width."""

    tables: tuple[Float[Array, "size width"], ...]
    projections: tuple[Float[Array, "width dim"] | None, ...]


class SoftmaxWeights(NamedTuple):
    """E_i, P_i and the biases of each cluster, and the rows and biases of the tails' entries in the head, if any."""

    tables: tuple[Float[Array, "size width"], ...]
    projections: tuple[Float[Array, "width dim"] | None, ...]
    biases: tuple[Float[Array, " size"], ...]
    tails: Float[Array, "tails width"] | None = None
    tail_biases: Float[Array, " tails"] | None = None


def embed(tokens: Int[Array, "*batch"], weights: EmbeddingWeights, dtype: Any) -> Float[Array, "*batch dim"]:
    """The row of each token, E_i[token] P_i; NaN for an id outside the vocabulary, including a negative one.

    Every token looks up a row in every cluster and selects one of them. This costs Σ width_i · dim multiplications a
    token, less than one evaluation of a cell of that width.

    >>> import jax.numpy as jnp
    >>> weights = EmbeddingWeights((jnp.eye(2), jnp.array([[3.0]])), (None, jnp.array([[1.0, 1.0]])))
    >>> embed(jnp.array([1, 2, 3]), weights, jnp.float32).tolist()
    [[0.0, 1.0], [3.0, 3.0], [nan, nan]]
    """
    first, rows = 0, None
    for table, projection in zip(weights.tables, weights.projections, strict=True):
        here = (first <= tokens) & (tokens < first + len(table))
        found = jnp.take(table, jnp.where(here, tokens - first, 0), axis=0).astype(dtype)
        if projection is not None:
            found = found @ projection.astype(dtype)
        rows = jnp.where(here[..., None], found, jnp.nan if rows is None else rows)
        first += len(table)
    return rows  # type: ignore[return-value]  there is at least one table


def logits(h: Float[Array, "*batch dim"], weights: SoftmaxWeights) -> Float[Array, "*batch vocab"]:
    """Scores whose softmax is the probability of each word, in float32 or wider.

    Without tails they are h Eᵀ + b; with tails they are log p itself. For a loss, use `nll`, which needs no such array.

    >>> import jax, jax.numpy as jnp
    >>> tail = SoftmaxWeights((jnp.eye(2), jnp.ones((3, 2))), (None, None), (jnp.zeros(2), jnp.zeros(3)),
    ...                       tails=jnp.zeros((1, 2)), tail_biases=jnp.zeros(1))
    >>> p = jax.nn.softmax(logits(jnp.zeros(2), tail))  # both words and the tail: 1/3 each
    >>> [f"{x:.3f}" for x in p.tolist()]
    ['0.333', '0.333', '0.111', '0.111', '0.111']
    """
    head = _head(h, weights)
    if weights.tails is None:
        return head
    head, words = jax.nn.log_softmax(head), len(weights.tables[0])
    parts = [head[..., :words]]
    for i in range(1, len(weights.tables)):
        parts.append(head[..., words + i - 1, None] + jax.nn.log_softmax(_cluster(h, weights, i)))
    return jnp.concatenate(parts, axis=-1)


def nll(
    h: Float[Array, "*batch dim"],
    targets: Int[Array, "*batch"],
    weights: SoftmaxWeights,
    *,
    block: int | None = None,
) -> Float[Array, "*batch"]:
    """−log p(target | h) of each token, in nats and float32 or wider; NaN for an id outside the vocabulary.

    The result is exact. If there are more than `block` tokens, they are sorted by target and processed one block at a
    time. A tail is computed only for blocks that contain one of its words, and the backward pass recomputes the logits
    of each block. A tail therefore costs its share of the text, rounded up to blocks, and memory is that of
    block · (largest cluster) logits. None chooses the block size that holds `LOGITS_AT_ONCE` logits. (Under `vmap`, XLA
    cannot branch, so every tail is computed for every block. With a sharded batch, the sort gathers h.)

    >>> import jax.numpy as jnp
    >>> tail = SoftmaxWeights((jnp.eye(2), jnp.ones((3, 2))), (None, None), (jnp.zeros(2), jnp.zeros(3)),
    ...                       tails=jnp.zeros((1, 2)), tail_biases=jnp.zeros(1))
    >>> [f"{x:.3f}" for x in jnp.exp(-nll(jnp.zeros((3, 2)), jnp.array([0, 4, 5]), tail))]
    ['0.333', '0.111', 'nan']
    """
    sizes = [len(table) for table in weights.tables]
    if block is None:
        block = max(1, LOGITS_AT_ONCE // max(sizes[0] + len(sizes) - 1, *sizes))
    if targets.size <= block:
        return _block_nll(h, targets, weights)

    flat, ids = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    # A cluster is a range of ids, so sorting by id groups the words of each cluster.
    order = jnp.argsort(ids) if len(sizes) > 1 else jnp.arange(len(ids))
    fill = -len(ids) % block
    pad = lambda x: jnp.concatenate([jnp.zeros((fill, *x.shape[1:]), x.dtype), x[order]])
    blocks = jax.tree.map(lambda x: pad(x).reshape(-1, block, *x.shape[1:]), (flat, ids))
    one = jax.checkpoint(lambda x: _block_nll(x[0], x[1], weights), prevent_cse=False)
    losses = jax.lax.map(one, blocks).reshape(-1)[fill:]
    return jnp.zeros_like(losses).at[order].set(losses).reshape(targets.shape)


class AdaptiveVocabulary(nnx.Module):
    """The parameters of the embedding and of the softmax; `tie` shares their tables and the tails' projections.

    The head of the softmax always has its own projection, as in the paper's script (which sets `tie_projs` for all
    clusters except the head). With `div_val=1` there are no projections. Biases start at zero.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> words = AdaptiveVocabulary(100, 16, cutoffs=(10, 40), div_val=4, rngs=nnx.Rngs(0))
    >>> [table.shape for table in words.embedding.tables]
    [(10, 16), (30, 4), (60, 1)]
    >>> h = words.embed(jnp.array([[3, 99]]), jnp.float32)
    >>> h.shape, bool(jnp.allclose(words.nll(h, jnp.array([[5, 50]])), -words.logits(h)[:, [0, 1], [5, 50]]))
    ((1, 2, 16), True)
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        cutoffs: Sequence[int] = (),
        div_val: int = 1,
        tie: bool = True,
        draw: Callable = nnx.initializers.normal(0.05),  # noqa: B008
        projection_std: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`draw(key, shape, dtype)` gives the tables. Projections are drawn from N(0, `projection_std`²).

        If `projection_std` is None, it is 1/√width. The projected rows of every cluster then have the spread of `draw`.
        """
        self.sizes, self.widths = clusters(vocab_size, dim, cutoffs, div_val)
        self.tie = tie

        def projection(width: int) -> nnx.Param:
            std = width**-0.5 if projection_std is None else projection_std
            return param(nnx.initializers.normal(std)(rngs.params(), (width, dim), param_dtype), "width", "dim")

        # Named attributes instead of lists, because versions of Flax treat a list in a module differently.
        for i, (size, width) in enumerate(zip(self.sizes, self.widths, strict=True)):
            table = lambda size=size, width=width: param(
                draw(rngs.params(), (size, width), param_dtype), "vocab", "width"
            )
            setattr(self, f"table_{i}", table())
            setattr(self, f"projection_{i}", projection(width) if div_val > 1 else None)
            setattr(self, f"out_table_{i}", None if tie else table())
            own = div_val > 1 and (i == 0 or not tie)
            setattr(self, f"out_projection_{i}", projection(width) if own else None)
            setattr(self, f"bias_{i}", param(jnp.zeros((size,), param_dtype), "vocab"))
        tails = len(self.sizes) - 1
        self.tails = param(draw(rngs.params(), (tails, self.widths[0]), param_dtype), None, "width") if tails else None
        self.tail_biases = param(jnp.zeros((tails,), param_dtype), None) if tails else None

    @property
    def embedding(self) -> EmbeddingWeights:
        return EmbeddingWeights(self._arrays("table"), self._arrays("projection"))

    @property
    def softmax(self) -> SoftmaxWeights:
        tied = lambda name: self._arrays(f"out_{name}", otherwise=name if self.tie else None)
        tails = (_value(self.tails), _value(self.tail_biases))
        return SoftmaxWeights(tied("table"), tied("projection"), self._arrays("bias"), *tails)

    def embed(self, tokens: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """`embed` with these weights."""
        return embed(tokens, self.embedding, dtype)

    def logits(self, h: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """`logits` with these weights."""
        return logits(h, self.softmax)

    def nll(self, h: Float[Array, "*batch dim"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """`nll` with these weights."""
        return nll(h, targets, self.softmax)

    def _arrays(self, name: str, otherwise: str | None = None) -> tuple:
        """The arrays name_0, name_1, …; where one is None, that of `otherwise`."""
        found = [getattr(self, f"{name}_{i}") for i in range(len(self.sizes))]
        if otherwise is not None:
            found = [getattr(self, f"{otherwise}_{i}") if f is None else f for i, f in enumerate(found)]
        return tuple(map(_value, found))


def clusters(vocab_size: int, dim: int, cutoffs: Sequence[int], div_val: int) -> tuple[tuple, tuple]:
    """Sizes and widths of the clusters, the head first; ValueError if cutoffs or div_val are invalid.

    >>> clusters(267_735, 700, (20_000, 40_000, 200_000), 4)
    ((20000, 20000, 160000, 67735), (700, 175, 43, 10))
    """
    ends = (0, *cutoffs, vocab_size)
    require(
        all(a < b for a, b in pairwise(ends)),
        f"cutoffs must be increasing and between 0 and vocab_size={vocab_size}, got {tuple(cutoffs)}",
    )
    require(div_val >= 1, f"div_val must be at least 1, got {div_val}")
    widths = tuple(dim // div_val**i for i in range(len(ends) - 1))
    require(widths[-1] >= 1, f"div_val={div_val} leaves no width for cluster {len(widths) - 1} of dim={dim}")
    return tuple(b - a for a, b in pairwise(ends)), widths


def _block_nll(h, targets, weights: SoftmaxWeights):
    ends, end = [], 0
    for table in weights.tables:
        ends.append(end := end + len(table))
    words, vocab_size = ends[0], ends[-1]
    tail = sum(((targets >= end).astype(targets.dtype) for end in ends[:-1]), jnp.zeros_like(targets))  # 0 is the head
    loss = _picked(_head(h, weights), jnp.where(tail == 0, targets, words + tail - 1))
    for i, (first, end) in enumerate(pairwise(ends), start=1):
        here = (first <= targets) & (targets < end)
        inside = jnp.where(here, targets - first, 0)
        of_tail = lambda h, inside, i=i: _picked(_cluster(h, weights, i), inside)
        more = jax.lax.cond(jnp.any(here), of_tail, lambda h, inside: jnp.zeros(inside.shape, loss.dtype), h, inside)
        loss += jnp.where(here, more, 0)
    return jnp.where((0 <= targets) & (targets < vocab_size), loss, jnp.nan)


def _picked(scores: Float[Array, "*batch words"], index: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """−log softmax(scores)[index]: the normalizer is subtracted from one score, not from all of them."""
    chosen = jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen


def _head(h, weights: SoftmaxWeights):
    if weights.tails is None or weights.tail_biases is None:
        return _cluster(h, weights, 0)
    table = jnp.concatenate([weights.tables[0], weights.tails])
    bias = jnp.concatenate([weights.biases[0], weights.tail_biases])
    return _scores(h, table, weights.projections[0], bias)


def _cluster(h, weights: SoftmaxWeights, i: int):
    return _scores(h, weights.tables[i], weights.projections[i], weights.biases[i])


def _scores(h, table, projection, bias):
    # In float32 or wider, because a cross entropy of bfloat16 logits is inaccurate. The operands are widened, because
    # jax 0.7 has no product of bfloat16 arrays that returns float32 on a CPU.
    dtype = wide(h.dtype)
    h, table, bias = (x.astype(dtype) for x in (h, table, bias))
    if projection is not None:
        h = jnp.einsum("...d,wd->...w", h, projection.astype(dtype))
    scores = jnp.einsum("...w,vw->...v", h, table)
    return scores + aligned(bias, scores)


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]
