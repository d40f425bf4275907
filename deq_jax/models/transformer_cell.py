"""The cell of the DEQ-Transformer: its configuration, its parameters, and f(z; x) as pure functions.

`TransformerCell.context` computes whatever does not depend on z, once. A solver evaluates the functions at the end of
the file. The paper's cell comes first everywhere. The modern cell replaces three of its parts, each by a separate
option: rotary positions, RMSNorm, and a gated feed-forward part.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import aligned
from deq_jax._config import with_suggestions
from deq_jax.models.adaptive import clusters
from deq_jax.models.common import Weight, check_rates, check_sizes, drop, keep_masks, param, require, wide


@with_suggestions
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything about a `DEQTransformer` except its solver and its precision; `wikitext103` is the paper's.

    `init_std` is an experiment, not a constant. The paper says N(0, 0.05); its code and the Jacobian regularization
    paper say N(0, 0.01²). With weight norm, however, the released code overwrites that draw, so the models it trained
    started at U(±1/√fan_in). `None` gives this start. Biases start at zero. A larger `embedding_std` is a stronger
    injection and makes the equilibrium easier to find: at dim 256, 80 Picard steps reach a relative residual of 2e-2
    for 0.01 (the released code's), 2e-3 for 0.05 and 3e-5 for 0.1.
    """

    vocab_size: int
    dim: int = 256
    heads: int = 8
    head_dim: int | None = None  # None: dim // heads
    inner_dim: int = 1024  # of the feed-forward part, with relu
    mem_len: int = 128  # columns of history; 0 for none
    window: int = 1000  # a token sees itself and the window - 1 tokens before it
    io_dropout: float = 0.0  # embedding and output; one mask for all times
    attention_dropout: float = 0.0  # attention probabilities
    hidden_dropout: float = 0.0  # positions and inside the cell; one mask for all times
    pre_norm: bool = False  # False: LN after each residual sum, as in the paper
    weight_norm: bool = True
    init_std: float | None = None
    embedding_std: float = 0.05  # table and attention biases; a row of the table is multiplied by √dim
    tie: bool = True  # logits = h Eᵀ + b, where E is the embedding
    cutoffs: tuple[int, ...] = ()  # where to cut the vocabulary into clusters, see `AdaptiveVocabulary`; (): plain
    div_val: int = 1  # a cluster's rows are this many times narrower than the previous cluster's
    projection_std: float | None = None  # of the clusters' projections; None: 1/√width
    rotary: bool = False  # positions rotate q and k, instead of Transformer-XL's relative scores
    rms_norm: bool = False  # x/rms(x) instead of LN
    gated: bool = False  # φ(h) = W_2 (silu(W_g h) ∘ W_1 h) instead of relu
    flash: bool = False  # cuDNN's attention kernel; needs a GPU, rotary positions and a 16-bit state

    def __post_init__(self):
        check_sizes(self, vocab_size=1, dim=1, heads=1, inner_dim=1, window=1, mem_len=0)
        require(self.head_dim is None or self.head_dim >= 1, f"head_dim must be at least 1, got {self.head_dim}")
        require(self.dim % 2 == 0, f"dim must be even (sines and cosines), got {self.dim}")
        require(
            self.head_dim is not None or self.dim % self.heads == 0,
            f"dim must be divisible by heads when head_dim is None, got dim={self.dim}, heads={self.heads}",
        )
        check_rates(self, "io_dropout", "attention_dropout", "hidden_dropout")
        clusters(self.vocab_size, self.dim, self.cutoffs, self.div_val)  # raises
        if not self.rotary:
            require(not self.flash, "flash=True needs rotary=True: there is no kernel for relative scores")
            return
        require(self.head_shape[1] % 2 == 0, f"head_dim must be even with rotary=True, got {self.head_shape[1]}")
        require(
            not self.attention_dropout,
            f"attention_dropout must be 0 with rotary=True, whose kernel has none; got {self.attention_dropout}",
        )

    @classmethod
    def wikitext103(cls, vocab_size: int = 267_735) -> "TransformerConfig":
        """The paper's Table 3, from its script: 71.2M parameters, plus 25.7M of the adaptive embedding.

        The softmax adds 0.8M parameters that it does not share with the embedding.
        """
        return cls(
            vocab_size,
            dim=700,
            heads=10,
            inner_dim=48_000,
            mem_len=150,
            embedding_std=0.01,
            io_dropout=0.05,
            hidden_dropout=0.05,
            cutoffs=(20_000, 40_000, 200_000),
            div_val=4,
            projection_std=0.01,
        )

    @classmethod
    def modern(cls, vocab_size: int, **options: Any) -> "TransformerConfig":
        """The usual choices today: rotary positions, RMSNorm after each residual sum, a gated feed-forward part.

        Attention is `jax.nn.dot_product_attention`. On a GPU with a bfloat16 state, `flash=True` selects cuDNN's
        kernel, which does not form the matrix of scores.

        >>> config = TransformerConfig.modern(1000, dim=64, heads=4)
        >>> config.rotary, config.rms_norm, config.gated, config.dim
        (True, True, True, 64)
        """
        options = {"rotary": True, "rms_norm": True, "gated": True} | options
        return cls(vocab_size, **options)

    @property
    def head_shape(self) -> tuple[int, int]:
        """(heads, head_dim), with head_dim resolved."""
        return self.heads, self.head_dim or self.dim // self.heads


class History(NamedTuple):
    """z* and u of the columns before a segment; the last `length` columns are valid.

    The shapes never change, so the first segment (length 0) and all later ones run the same compiled program.
    """

    z: Float[Array, "batch mem dim"]
    injection: Float[Array, "batch mem 3 heads head_dim"]
    length: Int[Array, " batch"]


class Masks(NamedTuple):
    """Dropout masks, 0 or 1/(1 - rate), drawn once and fixed during a whole solve; None keeps everything."""

    embedding: Float[Array, "batch 1 dim"] | None = None
    positions: Float[Array, "1 dim"] | None = None
    attention: Float[Array, "batch heads time keys"] | None = None
    attended: Float[Array, "batch 1 dim"] | None = None
    inner: Float[Array, "batch 1 inner"] | None = None
    outer: Float[Array, "batch 1 dim"] | None = None
    output: Float[Array, "batch 1 dim"] | None = None


NO_DROPOUT = Masks()


class Weights(NamedTuple):
    """The cell's weights after weight norm and the cast to the state's dtype."""

    qkv: Float[Array, "dim 3 heads head_dim"]
    content_bias: Float[Array, "heads head_dim"] | None  # None: rotary
    position_bias: Float[Array, "heads head_dim"] | None
    attended: Float[Array, "heads head_dim dim"]
    attended_bias: Float[Array, " dim"]
    inner: Float[Array, "dim *gate inner"]  # gated: *gate is 2, the argument of silu first
    inner_bias: Float[Array, "*gate inner"]
    outer: Float[Array, "inner dim"]
    outer_bias: Float[Array, " dim"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices of f. They are part of the structure of a `Context`, so each choice is a separate program."""

    rms_norm: bool  # RMSNorm instead of LN
    flash: bool  # cuDNN's attention kernel


class Turn(NamedTuple):
    """cos and sin of the angles by which rotary positions rotate each pair of channels."""

    cos: Float[Array, "columns 1 half"]
    sin: Float[Array, "columns 1 half"]


class Context(NamedTuple):
    """Everything that the cell needs apart from z. Keys run over the history, then over the segment."""

    weights: Weights
    injection: Float[Array, "batch time 3 heads head_dim"]
    memory_keys: Float[Array, "batch mem heads head_dim"]
    memory_values: Float[Array, "batch mem heads head_dim"]
    positions: Float[Array, "keys heads head_dim"] | None  # of relative scores
    turn: Turn | None  # of rotary positions, for the segment's columns; the memory's keys are rotated already
    visible: Bool[Array, "batch time keys"]
    masks: Masks
    options: Options


class TransformerCell(nnx.Module):
    """The parameters of f(z; x): relative attention and a feed-forward part. LN has no affine parameters."""

    def __init__(self, config: TransformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dim, inner, (heads, head_dim) = config.dim, config.inner_dim, config.head_shape
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        def weight(*named: tuple[str | None, int], fan_in_axes: int = 1) -> Weight:
            names, shape = zip(*named, strict=True)
            options: dict[str, Any] = dict(names=names, weight_norm=config.weight_norm, fan_in_axes=fan_in_axes)
            return Weight(shape, config.init_std, **options, param_dtype=param_dtype, rngs=rngs)

        def bias(*named: tuple[str | None, int], std: float = 0.0) -> nnx.Param:
            names, shape = zip(*named, strict=True)
            return param(nnx.initializers.normal(std)(rngs.params(), shape, param_dtype), *names)

        width, each, hidden = ("dim", dim), (("heads", heads), (None, head_dim)), ("inner", inner)
        self.qkv = weight(width, (None, 3), *each)
        relative = not config.rotary
        self.positions = weight(width, *each) if relative else None
        self.content_bias = bias(*each, std=config.embedding_std) if relative else None
        self.position_bias = bias(*each, std=config.embedding_std) if relative else None
        self.attended = weight(*each, width, fan_in_axes=2)
        self.attended_bias = bias(width)
        gate = ((None, 2),) if config.gated else ()
        self.inner = weight(width, *gate, hidden)
        self.inner_bias = bias(*gate, hidden)
        self.outer = weight(hidden, width)
        self.outer_bias = bias(width)

    @property
    def f(self) -> Callable[[Array, Context], Array]:
        """The function f(z, context) to solve: pure, and the same object at every call."""
        return pre_norm_step if self.config.pre_norm else post_norm_step

    def __call__(
        self,
        z: Float[Array, "batch time dim"],
        injection: Float[Array, "batch time 3 heads head_dim"],
        history: History,
        masks: Masks = NO_DROPOUT,
    ) -> Float[Array, "batch time dim"]:
        """One evaluation of f(z; x)."""
        return self.f(z, self.context(injection, history, masks))

    def context(
        self,
        injection: Float[Array, "batch time 3 heads head_dim"],
        history: History,
        masks: Masks = NO_DROPOUT,
    ) -> Context:
        """The part of f that does not depend on z, computed once."""
        config, dtype = self.config, self.dtype
        cast = lambda bias: bias[...].astype(dtype)
        weights = Weights(
            qkv=self.qkv(dtype),
            content_bias=None if config.rotary else cast(self.content_bias),
            position_bias=None if config.rotary else cast(self.position_bias),
            attended=self.attended(dtype),
            attended_bias=cast(self.attended_bias),
            inner=self.inner(dtype),
            inner_bias=cast(self.inner_bias),
            outer=self.outer(dtype),
            outer_bias=cast(self.outer_bias),
        )
        # The paper's code forms K, V from [z_hist; z] at every evaluation. But z_hist is fixed during the solve, and
        # W_qkv and LN (pre-norm) act on each column separately, so computing them once gives the same numbers.
        # The history gets no gradient; the weights applied to it do.
        z, u, length = jax.lax.stop_gradient(history)
        options = Options(config.rms_norm, config.flash)
        z = normalize(z, options) if config.pre_norm else z
        memory = jnp.einsum("bmd,dchk->bmchk", z, weights.qkv[:, 1:]) + u[:, :, 1:]
        memory_keys, positions, turned = memory[:, :, 0], None, None
        mem, time = z.shape[1], injection.shape[1]
        if self.positions is None:
            # A score depends only on the difference of two angles, so the memory may take the positions 0 … mem − 1.
            angle = angles(mem + time, config.head_shape[1], dtype)
            memory_keys = rotate(memory_keys, Turn(angle.cos[:mem], angle.sin[:mem]))
            turned = Turn(angle.cos[mem:], angle.sin[mem:])
        else:
            # R = W_r PE for the distances keys − 1 … 0.
            encoding = drop(sinusoids(mem + time, config.dim, dtype), masks.positions)
            positions = jnp.einsum("sd,dhk->shk", encoding, self.positions(dtype))
        visible = visibility(time, mem, config.window, length)
        return Context(weights, injection, memory_keys, memory[:, :, 1], positions, turned, visible, masks, options)


# f(z, context) and its parts, as pure functions.


def post_norm_step(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """f(z; x) = LN(φ(h) + h) with h = LN(attention(z) + z): the paper's cell."""
    h = normalize(attention(z, context) + z, context.options)
    return normalize(feed_forward(h, context) + h, context.options)


def pre_norm_step(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """The pre-norm cell of the released code, whose second residual adds the normalized n instead of h."""
    h = attention(normalize(z, context.options), context) + z
    n = normalize(h, context.options)
    return feed_forward(n, context) + n


def attention(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """W_o softmax(score) V + b_o of causal multi-head attention over the history and z."""
    w, masks = context.weights, context.masks
    # (q, k, v) = W_qkv z + u, and K = [k_hist; k], V = [v_hist; v]
    qkv = jnp.einsum("btd,dchk->btchk", z, w.qkv) + context.injection
    q, k, v = (qkv[:, :, i] for i in range(3))
    if context.turn is not None:
        q, k = rotate(q, context.turn), rotate(k, context.turn)
    k = jnp.concatenate([context.memory_keys, k], axis=1)
    v = jnp.concatenate([context.memory_values, v], axis=1)
    attended = relative_attention(q, k, v, context) if context.turn is None else rotary_attention(q, k, v, context)
    return drop(jnp.einsum("bthk,hkd->btd", attended, w.attended) + w.attended_bias[None, None], masks.attended)


def relative_attention(q: Array, k: Array, v: Array, context: Context) -> Float[Array, "batch time heads head_dim"]:
    """softmax(score) V with the relative positions of Transformer-XL."""
    w = context.weights
    assert w.content_bias is not None and w.position_bias is not None
    # score = ((q + b_w) Kᵀ + relshift((q + b_r) Rᵀ)) / √head_dim
    content = jnp.einsum("bthk,bshk->bhts", q + w.content_bias[None, None], k)
    position = jnp.einsum("bthk,shk->bhts", q + w.position_bias[None, None], context.positions)
    return weighted_sum(content + relative_shift(position), v, context)


def rotary_attention(q: Array, k: Array, v: Array, context: Context) -> Float[Array, "batch time heads head_dim"]:
    """softmax(q Kᵀ / √head_dim) V, where positions have rotated q and K; a kernel need not form the scores."""
    if q.dtype == jnp.float64:  # JAX's kernel always computes the softmax in float32
        return weighted_sum(jnp.einsum("bthk,bshk->bhts", q, k), v, context)
    kernel = "cudnn" if context.options.flash else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=context.visible[:, None], implementation=kernel)


def weighted_sum(score: Array, v: Array, context: Context) -> Float[Array, "batch time heads head_dim"]:
    """softmax(score / √head_dim) V over the visible keys, with the softmax in float32 or wider.

    A token sees itself, so no row is empty.
    """
    score = score.astype(wide(v.dtype)) / math.sqrt(v.shape[-1])
    score = jnp.where(context.visible[:, None], score, -jnp.inf)
    weights = drop(jax.nn.softmax(score, axis=-1).astype(v.dtype), context.masks.attention)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def feed_forward(h: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """φ(h) = W_2 relu(W_1 h + b_1) + b_2, at each position; a gated cell has silu(a) ∘ b instead of relu."""
    w, masks = context.weights, context.masks
    inner = jnp.einsum("btd,d...->bt...", h, w.inner)
    inner += aligned(w.inner_bias, inner)
    inner = jax.nn.relu(inner) if inner.ndim == 3 else jax.nn.silu(inner[:, :, 0]) * inner[:, :, 1]
    return drop(drop(inner, masks.inner) @ w.outer + w.outer_bias[None, None], masks.outer)


def normalize(x: Float[Array, "*batch dim"], options: Options) -> Float[Array, "*batch dim"]:
    """LN(x) in the paper's cell, RMSNorm in the modern one."""
    return rms_norm(x) if options.rms_norm else layer_norm(x)


def layer_norm(x: Float[Array, "*batch dim"], eps: float = 1e-5) -> Float[Array, "*batch dim"]:
    """(x − mean)/√(var + eps) over the last axis, without affine parameters, computed in float32 or wider."""
    x_wide = x.astype(wide(x.dtype))
    centered = x_wide - jnp.mean(x_wide, axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rms_norm(x: Float[Array, "*batch dim"], eps: float = 1e-5) -> Float[Array, "*batch dim"]:
    """x/√(mean x² + eps) over the last axis, without a gain, computed in float32 or wider."""
    x_wide = x.astype(wide(x.dtype))
    return (x_wide * jax.lax.rsqrt(jnp.mean(x_wide**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def angles(columns: int, head_dim: int, dtype: Any = jnp.float32) -> Turn:
    """The angles t · 10000^(−2i/head_dim) of columns t = 0 … columns − 1."""
    angle = jnp.arange(columns, dtype=wide(dtype))[:, None, None] * frequencies(head_dim, dtype)[None, None]
    return Turn(jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))


def rotate(x: Float[Array, "batch columns heads head_dim"], by: Turn) -> Float[Array, "batch columns heads head_dim"]:
    """x with each pair of channels (i, i + head_dim/2) rotated; ⟨rotate(q, s), rotate(k, t)⟩ depends only on s − t.

    Source: Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = by.cos[None], by.sin[None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def relative_shift(scores: Float[Array, "batch heads time keys"]) -> Float[Array, "batch heads time keys"]:
    """Scores with one column for each key, given scores with one column for each distance, largest distance first.

    Column r of `scores` is the distance keys − 1 − r. Query t is at key mem + t, so key s is at distance mem + t − s,
    which is column r = s + time − 1 − t. Row t therefore moves left by time − 1 − t. Entries of keys after the query,
    which have no distance, are arbitrary.
    """
    batch, heads, time, keys = scores.shape
    # One zero column makes the rows keys + 1 long. Read again in rows of length keys, each row starts one further left.
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(batch, heads, keys + 1, time)
    return padded[:, :, 1:].reshape(scores.shape)


def sinusoids(length: int, dim: int, dtype: Any = jnp.float32) -> Float[Array, "length dim"]:
    """[sin; cos] of the distances length − 1 … 0 at the frequencies 10000^(−2i/dim)."""
    angle = jnp.arange(length - 1, -1, -1, dtype=wide(dtype))[:, None] * frequencies(dim, dtype)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(dtype)


def frequencies(dim: int, dtype: Any) -> Float[Array, " half"]:
    """10000^(−2i/dim) for i = 0 … dim/2 − 1, in float32 or wider."""
    # Positions and angles stay wide until after sin and cos: bfloat16 does not hold every integer above 256 exactly.
    return 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=wide(dtype)) / dim)


def visibility(time: int, mem: int, window: int, length: Int[Array, " batch"]) -> Bool[Array, "batch time keys"]:
    """True where a query sees a key: 0 ≤ distance < window, and only the last `length` columns of the history."""
    key = jnp.arange(mem + time, dtype=length.dtype)[None]
    distance = mem + jnp.arange(time, dtype=length.dtype)[:, None] - key
    return ((0 <= distance) & (distance < window))[None] & (key >= mem - length[:, None])[:, None]


def draw_masks(config: TransformerConfig, key: Array | None, batch: int, time: int, *, dtype: Any) -> Masks:
    """Masks for one forward pass, all None without a key; a rate of 0 draws nothing."""
    if key is None:
        return NO_DROPOUT
    column, io, hidden = (batch, 1, config.dim), config.io_dropout, config.hidden_dropout
    draws = dict(
        embedding=(io, column),
        positions=(hidden, (1, config.dim)),
        attention=(config.attention_dropout, (batch, config.heads, time, config.mem_len + time)),
        attended=(hidden, column),
        inner=(hidden, (batch, 1, config.inner_dim)),
        outer=(hidden, column),
        output=(io, column),
    )
    return Masks(**keep_masks(key, draws, dtype))
