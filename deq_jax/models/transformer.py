"""The DEQ-Transformer of Bai, Kolter and Koltun (NeurIPS 2019, arXiv 1909.01377, section 4.2).

One weight-tied, input-injected Transformer-XL layer f(z; x) is solved for z* = f(z*; x), and a language
model stands around it: embed, inject, solve, decode. Whatever does not depend on z (normalised weights, the
injection, keys and values of the history, relative positions, dropout masks) is computed once, into a
`Context`, so that what the solver evaluates is a pure function f(z, context).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from deq_jax.adjoints import Adjoint, Implicit, Probe
from deq_jax.fixed_point import Solution, fixed_point
from deq_jax.solvers import Anderson, Solver


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything about a `DEQTransformer` but its solver and its precision; `wikitext103` is the paper's.

    `init_std` is an experiment, not a constant. The paper says N(0, 0.05), its code and the Jacobian
    regularisation paper N(0, 0.01²); but with weight norm the released code overwrites that draw, and what it
    trained began at U(±1/√fan_in), which `None` gives. Biases begin at zero. A larger `embedding_std` is a
    stronger injection and an easier equilibrium: at dim 256, 80 Picard steps reach a relative residual of
    2e-2 for 0.01 (the released code's), 2e-3 for 0.05 and 3e-5 for 0.1.
    """

    vocab_size: int
    dim: int = 256
    heads: int = 8
    head_dim: int | None = None  # None: dim // heads
    inner_dim: int = 1024  # of the feed-forward part, relu
    mem_len: int = 128  # columns of history; 0 for none
    window: int = 1000  # a token sees itself and the window - 1 tokens before it
    io_dropout: float = 0.0  # embedding and output, one mask for all times
    attention_dropout: float = 0.0  # attention probabilities
    hidden_dropout: float = 0.0  # positions and inside the cell, one mask for all times
    pre_norm: bool = False  # False: LN after each residual sum, the paper's
    weight_norm: bool = True
    init_std: float | None = None
    embedding_std: float = 0.05  # table and attention biases; the table is read times √dim
    tie: bool = True  # logits = h Eᵀ + b, with the embedding's own E

    def __post_init__(self):
        for name in ("vocab_size", "dim", "heads", "inner_dim", "window"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.head_dim is None or self.head_dim >= 1, f"head_dim must be at least 1, got {self.head_dim}")
        _require(self.mem_len >= 0, f"mem_len must be at least 0, got {self.mem_len}")
        _require(self.dim % 2 == 0, f"dim must be even (sines and cosines), got {self.dim}")
        _require(
            self.head_dim is not None or self.dim % self.heads == 0,
            f"dim must be divisible by heads when head_dim is None, got dim={self.dim}, heads={self.heads}",
        )
        for name in ("io_dropout", "attention_dropout", "hidden_dropout"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")

    @classmethod
    def wikitext103(cls, vocab_size: int = 267_735) -> "TransformerConfig":
        """The paper's Table 3, from its script: 71.2M parameters without the embedding.

        The adaptive embedding of the paper (25.7M) is not here: a full table of that vocabulary is 187M.
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
        )

    @property
    def head_shape(self) -> tuple[int, int]:
        """(heads, head_dim), with head_dim resolved."""
        return self.heads, self.head_dim or self.dim // self.heads


class History(NamedTuple):
    """z* and u of the columns before a segment, of which the last `length` are valid.

    The shapes never change, so a first segment (length 0) and every later one run the same compiled program.
    """

    z: Float[Array, "batch mem dim"]
    injection: Float[Array, "batch mem 3 heads head_dim"]
    length: Int[Array, " batch"]


class Masks(NamedTuple):
    """Dropout masks, 0 or 1/(1 - rate), drawn once and fixed over a whole solve; None keeps everything."""

    embedding: Float[Array, "batch 1 dim"] | None = None
    positions: Float[Array, "1 dim"] | None = None
    attention: Float[Array, "batch heads time keys"] | None = None
    attended: Float[Array, "batch 1 dim"] | None = None
    inner: Float[Array, "batch 1 inner"] | None = None
    outer: Float[Array, "batch 1 dim"] | None = None
    output: Float[Array, "batch 1 dim"] | None = None


NO_DROPOUT = Masks()


class Weights(NamedTuple):
    """The cell's weights as they are multiplied: normalised and cast."""

    qkv: Float[Array, "dim 3 heads head_dim"]
    content_bias: Float[Array, "heads head_dim"]
    position_bias: Float[Array, "heads head_dim"]
    attended: Float[Array, "heads head_dim dim"]
    attended_bias: Float[Array, " dim"]
    inner: Float[Array, "dim inner"]
    inner_bias: Float[Array, " inner"]
    outer: Float[Array, "inner dim"]
    outer_bias: Float[Array, " dim"]


class Context(NamedTuple):
    """All that the cell needs beside z; keys run over the history and then the segment."""

    weights: Weights
    injection: Float[Array, "batch time 3 heads head_dim"]
    memory_keys: Float[Array, "batch mem heads head_dim"]
    memory_values: Float[Array, "batch mem heads head_dim"]
    positions: Float[Array, "keys heads head_dim"]
    visible: Bool[Array, "batch time keys"]
    masks: Masks


class Hidden(NamedTuple):
    """What `DEQTransformer.hidden` returns; `hidden` is the equilibrium after output dropout."""

    hidden: Float[Array, "batch time dim"]
    history: History
    solution: Solution


class Output(NamedTuple):
    """What `DEQTransformer` returns; logits are float32 or wider, and `history` goes into the next call."""

    logits: Float[Array, "batch time vocab"]
    history: History
    solution: Solution


class DEQTransformer(nnx.Module):
    """A language model whose one layer is at equilibrium.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from deq_jax.models import DEQTransformer, TransformerConfig
    >>> config = TransformerConfig(vocab_size=27, dim=16, heads=2, inner_dim=32, mem_len=8)
    >>> model = DEQTransformer(config, rngs=nnx.Rngs(0))
    >>> logits, history, solution = model(jnp.arange(10).reshape(2, 5))
    >>> logits, history, solution = model(jnp.arange(10, 20).reshape(2, 5), history)
    >>> logits.shape, history.length.tolist(), solution.stats.steps.shape
    ((2, 5, 27), [8, 8], (2,))

    The module holds parameters only and nothing in a call is stateful: `nnx.split` once, then plain `jax.jit`
    and `jax.grad` of `nnx.merge(graphdef, params)`. Every sequence is a problem of its own, with its own
    residual and stopping time. `solver` and `adjoint` are defaults that a call may replace:
    `Picard(max_steps=L)` with `Unroll()` is the weight-tied L-layer baseline on the same parameters, and the
    paper's warm-up.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        solver: Solver = Anderson(),  # noqa: B008  frozen
        adjoint: Adjoint = Implicit(),  # noqa: B008
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`dtype` is that of the state and of the arithmetic; None means `param_dtype`."""
        self.config = config
        self.solver = solver
        self.adjoint = adjoint
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        table = (config.vocab_size, config.dim)
        draw = nnx.initializers.normal(config.embedding_std)
        self.embedding = nnx.Param(draw(rngs.params(), table, param_dtype))
        # The injection is outside the fixed point, and is not weight-normed.
        inject_shape = (config.dim, 3, *config.head_shape)
        self.inject = Weight(inject_shape, config.init_std, param_dtype=param_dtype, rngs=rngs)
        self.inject_bias = nnx.Param(jnp.zeros((3, *config.head_shape), param_dtype))
        self.cell = TransformerCell(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.decoder = None if config.tie else nnx.Param(draw(rngs.params(), table, param_dtype))
        self.decoder_bias = nnx.Param(jnp.zeros((config.vocab_size,), param_dtype))

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        history: History | None = None,
        *,
        z0: Float[Array, "batch time dim"] | None = None,
        key: Array | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        probe: Probe | None = None,
    ) -> Output:
        """Logits for the token after each of `tokens`, the history for the next segment, and the `Solution`.

        A `key` turns dropout on, None is evaluation. `z0` defaults to zeros. Raises TypeError or ValueError,
        before tracing, for tokens, a history or a z0 that do not fit. A token id outside the vocabulary, also
        a negative one, cannot be seen then: it gives NaN, and the status NONFINITE.
        """
        hidden, history, solution = self.hidden(
            tokens, history, z0=z0, key=key, solver=solver, adjoint=adjoint, probe=probe
        )
        return Output(self.decode(hidden), history, solution)

    def hidden(
        self,
        tokens: Int[Array, "batch time"],
        history: History | None = None,
        *,
        z0: Float[Array, "batch time dim"] | None = None,
        key: Array | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        probe: Probe | None = None,
    ) -> Hidden:
        """All but the logits, so that `decode` can take a large vocabulary a few columns at a time."""
        history = self._checked(tokens, history)
        shape = (*tokens.shape, self.config.dim)
        z0 = jnp.zeros(shape, self.dtype) if z0 is None else z0
        _require(z0.shape == shape, f"z0 must have shape {shape}, got {z0.shape}")
        context = self.context(tokens, history, key=key)
        solution = fixed_point(
            self.cell.f,
            z0.astype(self.dtype),
            context,
            solver=self.solver if solver is None else solver,
            adjoint=self.adjoint if adjoint is None else adjoint,
            batch_ndim=1,
            probe=probe,
        )
        hidden = _drop(solution.value, context.masks.output)
        return Hidden(hidden, _extend(history, solution.value, context.injection), solution)

    def decode(self, hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Logits h Eᵀ + b, in float32 or wider: a cross entropy of bfloat16 logits is a poor one."""
        table = self.embedding if self.decoder is None else self.decoder
        # The operands are widened, for the CPU of jax 0.7 has no product of bfloat16 that gives float32.
        table, bias, h = (x.astype(_wide(self.dtype)) for x in (table[...], self.decoder_bias[...], hidden))
        return jnp.einsum("...d,vd->...v", h, table) + bias

    def context(
        self, tokens: Int[Array, "batch time"], history: History | None = None, *, key: Array | None = None
    ) -> Context:
        """What `model.cell.f(z, context)` is solved with: for penalties and diagnostics at the equilibrium.

        With a call's own `key` it is that call's context, masks included, and under jit computed once.
        """
        config = self.config
        history = self._checked(tokens, history)
        masks = draw_masks(config, key, *tokens.shape, dtype=self.dtype)
        # `take` gives NaN past the table, where indexing would clamp and answer with another token's row.
        rows = jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
        # It counts −1 from the end, though: padding would read as the last word.
        rows = jnp.where((tokens < 0)[..., None], jnp.nan, rows)
        embedded = _drop(math.sqrt(config.dim) * rows, masks.embedding)
        # u = W_u E + b_u, once for the whole solve.
        injection = jnp.einsum("btd,dchk->btchk", embedded, self.inject(self.dtype))
        injection += self.inject_bias[...].astype(self.dtype)
        return self.cell.context(injection, history, masks)

    def empty_history(self, batch: int) -> History:
        """The history of a first segment: full shapes, no valid column."""
        config = self.config
        return History(
            z=jnp.zeros((batch, config.mem_len, config.dim), self.dtype),
            injection=jnp.zeros((batch, config.mem_len, 3, *config.head_shape), self.dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )

    def _checked(self, tokens: Array, history: History | None) -> History:
        """The history, or an empty one, once it and the tokens are known to fit."""
        _check_tokens(tokens)
        if history is None:
            return self.empty_history(len(tokens))
        expected = jax.eval_shape(lambda: self.empty_history(len(tokens)))
        for name, got, want in zip(History._fields, history, expected, strict=True):
            got, want = (f"{x.dtype}{list(x.shape)}" for x in (got, want))
            _require(got == want, f"history.{name} must be {want}, as of `empty_history`, got {got}")
        return history


class TransformerCell(nnx.Module):
    """The parameters of f(z; x): relative attention and a feed-forward part, LN without affine parameters."""

    def __init__(self, config: TransformerConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dim, inner, (heads, head_dim) = config.dim, config.inner_dim, config.head_shape
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        def weight(*shape: int, fan_in_axes: int = 1) -> Weight:
            options: dict[str, Any] = dict(weight_norm=config.weight_norm, fan_in_axes=fan_in_axes)
            return Weight(shape, config.init_std, **options, param_dtype=param_dtype, rngs=rngs)

        def bias(*shape: int, std: float = 0.0) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, param_dtype))

        self.qkv = weight(dim, 3, heads, head_dim)
        self.positions = weight(dim, heads, head_dim)
        self.content_bias = bias(heads, head_dim, std=config.embedding_std)
        self.position_bias = bias(heads, head_dim, std=config.embedding_std)
        self.attended = weight(heads, head_dim, dim, fan_in_axes=2)
        self.attended_bias = bias(dim)
        self.inner = weight(dim, inner)
        self.inner_bias = bias(inner)
        self.outer = weight(inner, dim)
        self.outer_bias = bias(dim)

    @property
    def f(self) -> Callable[[Array, Context], Array]:
        """The function that is solved, f(z, context): pure, and the same object at every call."""
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
        """All of f that does not depend on z, and so is computed once."""
        dtype = self.dtype
        weights = Weights(
            qkv=self.qkv(dtype),
            content_bias=self.content_bias[...].astype(dtype),
            position_bias=self.position_bias[...].astype(dtype),
            attended=self.attended(dtype),
            attended_bias=self.attended_bias[...].astype(dtype),
            inner=self.inner(dtype),
            inner_bias=self.inner_bias[...].astype(dtype),
            outer=self.outer(dtype),
            outer_bias=self.outer_bias[...].astype(dtype),
        )
        # The paper's code forms K, V from [z_hist; z] at every evaluation. z_hist is fixed while z is solved
        # for, and W_qkv and LN (pre-norm) act on one column at a time: the same numbers, computed once.
        # No gradient flows into the history, but it does into the weights that are applied to it.
        z, u, length = jax.lax.stop_gradient(history)
        z = layer_norm(z) if self.config.pre_norm else z
        memory = jnp.einsum("bmd,dchk->bmchk", z, weights.qkv[:, 1:]) + u[:, :, 1:]
        # R = W_r PE for the distances keys − 1 … 0.
        keys = z.shape[1] + injection.shape[1]
        encoding = _drop(sinusoids(keys, self.config.dim, dtype), masks.positions)
        positions = jnp.einsum("sd,dhk->shk", encoding, self.positions(dtype))
        visible = visibility(injection.shape[1], z.shape[1], self.config.window, length)
        return Context(weights, injection, memory[:, :, 0], memory[:, :, 1], positions, visible, masks)


class Weight(nnx.Module):
    """A kernel that sums over its first `fan_in_axes`; with `weight_norm`, w = g v/‖v‖ per output unit."""

    def __init__(
        self,
        shape: tuple[int, ...],
        std: float | None,
        *,
        weight_norm: bool = False,
        fan_in_axes: int = 1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws N(0, std²), or U(±1/√fan_in) for None; g begins at ‖v‖, so that w begins at v."""
        self.axes = tuple(range(fan_in_axes))
        bound = 1 / math.sqrt(math.prod(shape[:fan_in_axes]))
        key = rngs.params()
        if std is None:
            v = jax.random.uniform(key, shape, param_dtype, -bound, bound)
        else:
            v = std * jax.random.normal(key, shape, param_dtype)
        self.kernel = nnx.Param(v)
        self.scale = nnx.Param(jnp.sqrt(jnp.sum(v**2, self.axes))) if weight_norm else None

    def __call__(self, dtype: Any) -> Array:
        """The effective kernel, in `dtype`."""
        v = self.kernel[...]
        if self.scale is None:
            return v.astype(dtype)
        square = jnp.sum(v**2, self.axes)
        # A zero row stays zero, with the finite gradient g.
        inverse = jax.lax.rsqrt(jnp.where(square > 0, square, 1))
        return (self.scale[...] * inverse * v).astype(dtype)


def post_norm_step(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """f(z; x) = LN(φ(h) + h) with h = LN(attention(z) + z): the paper's cell."""
    h = layer_norm(attention(z, context) + z)
    return layer_norm(feed_forward(h, context) + h)


def pre_norm_step(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """The released pre-norm cell; its second residual starts, as there, from the normalised n, not from h."""
    h = attention(layer_norm(z), context) + z
    n = layer_norm(h)
    return feed_forward(n, context) + n


def attention(z: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """W_o softmax(score) V + b_o of causal multi-head attention with relative positions (Transformer-XL)."""
    w, masks = context.weights, context.masks
    # (q, k, v) = W_qkv z + u, and K = [k_hist; k], V = [v_hist; v]
    qkv = jnp.einsum("btd,dchk->btchk", z, w.qkv) + context.injection
    q, k, v = (qkv[:, :, i] for i in range(3))
    k = jnp.concatenate([context.memory_keys, k], axis=1)
    v = jnp.concatenate([context.memory_values, v], axis=1)
    # score = ((q + b_w) Kᵀ + relshift((q + b_r) Rᵀ)) / √head_dim
    content = jnp.einsum("bthk,bshk->bhts", q + w.content_bias, k)
    position = jnp.einsum("bthk,shk->bhts", q + w.position_bias, context.positions)
    score = (content + relative_shift(position)).astype(_wide(z.dtype)) / math.sqrt(q.shape[-1])
    # The softmax is in float32 or wider. A token sees itself, so no row is −inf throughout.
    score = jnp.where(context.visible[:, None], score, -jnp.inf)
    weights = _drop(jax.nn.softmax(score, axis=-1).astype(z.dtype), masks.attention)
    attended = jnp.einsum("bhts,bshk->bthk", weights, v)
    return _drop(jnp.einsum("bthk,hkd->btd", attended, w.attended) + w.attended_bias, masks.attended)


def feed_forward(h: Float[Array, "batch time dim"], context: Context) -> Float[Array, "batch time dim"]:
    """φ(h) = W_2 relu(W_1 h + b_1) + b_2, position by position."""
    w, masks = context.weights, context.masks
    inner = _drop(jax.nn.relu(h @ w.inner + w.inner_bias), masks.inner)
    return _drop(inner @ w.outer + w.outer_bias, masks.outer)


def layer_norm(x: Float[Array, "*batch dim"], eps: float = 1e-5) -> Float[Array, "*batch dim"]:
    """(x − mean)/√(var + eps) over the last axis, no affine parameters, computed in float32 or wider."""
    wide = x.astype(_wide(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def relative_shift(scores: Float[Array, "batch heads time keys"]) -> Float[Array, "batch heads time keys"]:
    """Moves scores from columns by descending distance to columns by key; what has no distance is arbitrary.

    Column r of `scores` is the distance keys − 1 − r. Query t stands at key mem + t, so key s is at distance
    mem + t − s, which is column r = s + time − 1 − t: row t moves left by time − 1 − t.
    """
    batch, heads, time, keys = scores.shape
    # One zero column makes the rows keys + 1 long; read again in rows of keys, each starts one further left.
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(batch, heads, keys + 1, time)
    return padded[:, :, 1:].reshape(scores.shape)


def sinusoids(length: int, dim: int, dtype: Any = jnp.float32) -> Float[Array, "length dim"]:
    """[sin; cos] of the distances length − 1 … 0 at the frequencies 10000^(−2i/dim)."""
    wide = _wide(dtype)  # bfloat16 holds no integer above 256 exactly
    frequency = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=wide) / dim)
    angle = jnp.arange(length - 1, -1, -1, dtype=wide)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(dtype)


def visibility(time: int, mem: int, window: int, length: Int[Array, " batch"]) -> Bool[Array, "batch time keys"]:
    """Which keys a query sees: 0 ≤ distance < window, and of the history only the last `length` columns."""
    key = jnp.arange(mem + time)
    distance = mem + jnp.arange(time)[:, None] - key
    return (0 <= distance) & (distance < window) & (key >= mem - length[:, None])[:, None]


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

    def draw(key: Array, rate: float, shape: tuple[int, ...]) -> Array | None:
        return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate) if rate else None

    keys = jax.random.split(key, len(draws))
    return Masks(**{name: draw(key, *draws[name]) for name, key in zip(draws, keys, strict=True)})


def _extend(history: History, z: Array, injection: Array) -> History:
    """The last mem columns of the old history followed by the new segment, detached."""
    mem, time = history.z.shape[1], z.shape[1]
    join = lambda old, new: jnp.concatenate([old, new], axis=1)[:, time:]
    length = jnp.minimum(history.length + time, mem)
    extended = History(join(history.z, z), join(history.injection, injection), length)
    return jax.lax.stop_gradient(extended)


def _drop(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _check_tokens(tokens: Array) -> None:
    if not hasattr(tokens, "dtype"):
        raise TypeError(f"tokens must be an array of integer ids, got a {type(tokens).__name__}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integer ids, got dtype {tokens.dtype}")
    _require(tokens.ndim == 2, f"tokens must have shape (batch, time), got {tokens.shape}")
    _require(tokens.shape[1] >= 1, f"tokens must have at least one column of time, got {tokens.shape}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
