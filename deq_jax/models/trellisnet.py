"""The DEQ-TrellisNet of Bai, Kolter and Koltun (NeurIPS 2019, arXiv 1909.01377, section 4.1).

A TrellisNet (Bai, Kolter & Koltun, ICLR 2019) is a temporal convolution. All its layers share one kernel, every layer
reads the input again, and every layer ends in the gates of an LSTM. This model solves for the limit of infinitely many
layers: z = (h, c), a hidden and a cell state for each column of time. Whatever does not depend on z (normalized and
dropped weights, the injection, masks, the columns before the segment) is computed once, into a `Context`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deq_jax._config import with_suggestions
from deq_jax.adjoints import Adjoint, Phantom, Probe, Unroll
from deq_jax.fixed_point import Solution, fixed_point
from deq_jax.models import common
from deq_jax.models.adaptive import AdaptiveVocabulary, SoftmaxWeights
from deq_jax.models.common import Weight, drop, param, require
from deq_jax.models.language_model import LanguageModel, Prepared
from deq_jax.solvers import Picard, Solver
from deq_jax.trajectory import trajectory


@with_suggestions
@dataclasses.dataclass(frozen=True)
class TrellisNetConfig:
    """Everything about a `DEQTrellisNet` except its solver and its precision; `penn_treebank` is the paper's.

    The state has `hidden_dim + output_dim` channels. The model decodes the last `output_dim` of them.
    """

    vocab_size: int
    hidden_dim: int = 256  # nhid: channels that are not decoded
    output_dim: int = 128  # nout
    embedding_dim: int | None = None  # None: output_dim, which a tied table requires
    kernel: int = 2  # columns that one layer of the convolution reads
    input_dropout: float = 0.0  # of the embedding; one mask for all times
    embedding_dropout: float = 0.0  # of whole words
    weight_dropout: float = 0.0  # of the kernels' taps on earlier columns
    hidden_dropout: float = 0.0  # of h before its convolution; one mask for all times and layers
    output_dropout: float = 0.0
    weight_norm: bool = True  # the paper requires it for stability
    init_std: float | None = 0.01  # of kernels; None: U(±1/√fan_in)
    embedding_range: float = 0.1  # tables start at U(±embedding_range)
    tie: bool = True  # logits = h Eᵀ + b, where E is the embedding
    cutoffs: tuple[int, ...] = ()  # where to cut the vocabulary into clusters, see `AdaptiveVocabulary`; (): plain
    div_val: int = 1
    projection_std: float | None = None

    def __post_init__(self):
        common.check_sizes(self, vocab_size=1, hidden_dim=0, output_dim=1, kernel=1)
        rates = ("input_dropout", "embedding_dropout", "weight_dropout", "hidden_dropout", "output_dropout")
        common.check_rates(self, *rates)
        width = self.embedding_width
        require(width >= 1, f"embedding_dim must be at least 1, got {width}")
        require(
            not self.tie or width == self.output_dim,
            f"a tied table needs embedding_dim == output_dim, got {width} and {self.output_dim}",
        )
        require(
            self.tie or width == self.output_dim or not self.cutoffs,
            f"a vocabulary with cutoffs needs embedding_dim == output_dim, got {width} and {self.output_dim}",
        )

    @classmethod
    def penn_treebank(cls, vocab_size: int = 10_000) -> "TrellisNetConfig":
        """Table 2 of the paper: 20.2M parameters plus 4M of the embedding, with its script's dropout rates."""
        return cls(
            vocab_size,
            hidden_dim=1000,
            output_dim=400,
            input_dropout=0.45,
            embedding_dropout=0.1,
            weight_dropout=0.5,
            hidden_dropout=0.28,
            output_dropout=0.45,
        )

    @classmethod
    def wikitext103(cls, vocab_size: int = 267_735) -> "TrellisNetConfig":
        """Table 3 of the paper: 44.4M parameters outside the vocabulary (its script has 40.0M, with 1500 and 500).

        The clusters are those of the script's softmax. Their rows keep the full width.
        """
        rates = dict.fromkeys(("input_dropout", "embedding_dropout", "weight_dropout", "hidden_dropout"), 0.1)
        cutoffs = (2_800, 20_000, 76_000)
        return cls(vocab_size, hidden_dim=1600, output_dim=512, output_dropout=0.1, cutoffs=cutoffs, **rates)

    @property
    def channels(self) -> int:
        return self.hidden_dim + self.output_dim

    @property
    def embedding_width(self) -> int:
        return self.output_dim if self.embedding_dim is None else self.embedding_dim


class State(NamedTuple):
    """z, the state that the solver solves for."""

    h: Float[Array, "batch time channels"]
    c: Float[Array, "batch time channels"]


class History(NamedTuple):
    """The last columns before a segment, detached: everything that later columns depend on.

    With the paper's kernel of two, each field has one column. (The released code forgets the embedding between segments
    and starts the convolution of the input with zeros. Keeping it makes segments exactly one long sequence.)
    """

    h: Float[Array, "batch past channels"]  # past = kernel − 1
    c: Float[Array, "batch 1 channels"]
    embedded: Float[Array, "batch past embedding"]


class Masks(NamedTuple):
    """Dropout masks, 0 or 1/(1 − rate), drawn once and fixed during a whole solve; None keeps everything."""

    words: Float[Array, " vocab"] | None = None
    embedding: Float[Array, "batch 1 embedding"] | None = None
    inject: Float[Array, "kernel embedding 4 channels"] | None = None  # ones at the tap of the column itself
    kernel: Float[Array, "kernel channels 4 channels"] | None = None
    hidden: Float[Array, "batch 1 channels"] | None = None
    output: Float[Array, "batch 1 output"] | None = None


class Context(NamedTuple):
    """Everything that the cell needs apart from z."""

    kernel: Float[Array, "kernel channels 4 channels"]
    injection: Float[Array, "batch time 4 channels"]
    past_h: Float[Array, "batch past channels"]  # after dropout
    past_c: Float[Array, "batch 1 channels"]
    masks: Masks


class Hidden(NamedTuple):
    """The result of `DEQTrellisNet.hidden`; `auxiliary` holds the outputs of intermediate layers, if requested."""

    hidden: Float[Array, "batch time output"]
    history: History
    solution: Solution
    auxiliary: tuple[Float[Array, "batch time output"], ...]


class DEQTrellisNet(LanguageModel[TrellisNetConfig]):
    """A language model: one gated causal convolution at equilibrium, with the interface of `DEQTransformer`.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from deq_jax.models import DEQTrellisNet, TrellisNetConfig
    >>> model = DEQTrellisNet(TrellisNetConfig(vocab_size=27, hidden_dim=16, output_dim=8), rngs=nnx.Rngs(0))
    >>> logits, history, solution = model(jnp.arange(10).reshape(2, 5))
    >>> logits, history, solution = model(jnp.arange(10, 20).reshape(2, 5), history)
    >>> logits.shape, history.h.shape, solution.stats.steps.shape
    ((2, 5, 27), (2, 1, 24), (2,))

    `Picard(max_steps=L)` with `Unroll()` is the TrellisNet of L layers on the same parameters: the paper's baseline
    and its warm-up. The paper trains that network with auxiliary losses; `aux_every` gives the outputs for them:

    >>> import deq_jax as deq
    >>> twelve = dict(solver=deq.Picard(max_steps=12), adjoint=deq.Unroll())
    >>> hidden, _, _, auxiliary = model.hidden(jnp.arange(10).reshape(2, 5), **twelve, aux_every=5)
    >>> len(auxiliary), auxiliary[0].shape  # of layers 5 and 10
    (2, (2, 5, 8))
    """

    vocabulary: AdaptiveVocabulary

    def _init_params(self, param_dtype: Any, rngs: nnx.Rngs) -> None:
        config, bound = self.config, self.config.embedding_range
        width, output, vocab = config.embedding_width, config.output_dim, config.vocab_size
        draw = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        options: dict[str, Any] = dict(draw=draw, param_dtype=param_dtype, rngs=rngs)
        clusters: dict[str, Any] = {n: getattr(config, n) for n in ("cutoffs", "div_val", "projection_std")}
        # An embedding whose width differs from the output's is a separate table; the vocabulary then only decodes.
        self.vocabulary = AdaptiveVocabulary(vocab, output, tie=config.tie or width != output, **clusters, **options)
        own = width != output
        self.embedding = param(draw(rngs.params(), (vocab, width), param_dtype), "vocab", "width") if own else None
        self.cell = TrellisNetCell(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    def hidden(
        self,
        tokens: Int[Array, "batch time"],
        history: History | None = None,
        *,
        z0: State | None = None,
        key: Array | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        probe: Probe | None = None,
        aux_every: int = 0,
    ) -> Hidden:
        """A call without the logits: `decode` computes them, and `nll` computes a loss without them.

        `aux_every` adds the outputs of layers aux_every, 2 aux_every, … below `solver.max_steps`, with the same output
        mask. With `Unroll`, their gradient is that of the network with that many layers, and the solver must be
        `Picard`. With any other adjoint, they are states of `deq.trajectory`, with the gradient of `Phantom`.
        """
        previous, embedded, context = self._prepare(tokens, history, key)
        zeros = jnp.zeros((*tokens.shape, self.config.channels), self.dtype)
        start = common.initial_state(None if z0 is None else State(*z0), State(zeros, zeros))
        solution, states = _solve(self.cell.f, start, context, aux_every, self._options(solver, adjoint, probe))
        read = lambda z: drop(z.h[..., self.config.hidden_dim :], context.masks.output)
        z, past = solution.value, self.config.kernel - 1
        last = lambda old, new: jnp.concatenate([old, new], axis=1)[:, old.shape[1] + new.shape[1] - past :]
        after = History(last(previous.h, z.h), z.c[:, -1:], last(previous.embedded, embedded))
        return Hidden(read(z), jax.lax.stop_gradient(after), solution, tuple(map(read, states)))

    @property
    def softmax(self) -> SoftmaxWeights:
        """The arrays of the decoder."""
        return self.vocabulary.softmax

    def empty_history(self, batch: int) -> History:
        """The history of a first segment: zeros, as before the start of any sequence."""
        config, past = self.config, self.config.kernel - 1
        zeros = lambda columns, width: jnp.zeros((batch, columns, width), self.dtype)
        return History(zeros(past, config.channels), zeros(1, config.channels), zeros(past, config.embedding_width))

    def _prepare(self, tokens: Array, history: History | None, key: Array | None) -> Prepared:
        history = jax.lax.stop_gradient(common.checked_history(tokens, history, self.empty_history))
        masks = draw_masks(self.config, key, len(tokens), dtype=self.dtype)
        embedded = self._embed(tokens)
        if masks.words is not None:
            # An id outside the vocabulary may take any word's mask: its embedding is NaN already.
            embedded = embedded * jnp.take(masks.words, tokens, axis=0, mode="clip")[..., None]
        embedded = drop(embedded, masks.embedding)
        return Prepared(history, embedded, self.cell.context(embedded, history, masks))


class TrellisNetCell(nnx.Module):
    """The parameters of f(z; x): a kernel for the input, a kernel for h, and one bias."""

    def __init__(self, config: TrellisNetConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)

        def weight(width: int) -> Weight:
            # It sums over taps and channels, so weight norm is that of PyTorch's convolution with dim=0.
            shape = (config.kernel, width, 4, config.channels)
            names = (None, "dim", None, "channels")
            options: dict[str, Any] = dict(names=names, weight_norm=config.weight_norm, fan_in_axes=2)
            return Weight(shape, config.init_std, **options, param_dtype=param_dtype, rngs=rngs)

        self.inject = weight(config.embedding_width)
        self.kernel = weight(config.channels)
        self.bias = param(jnp.zeros((4, config.channels), param_dtype), None, "channels")

    @property
    def f(self) -> Callable[[State, Context], State]:
        """The function f(z, context) to solve: pure, and the same object at every call."""
        return step

    def context(
        self,
        embedded: Float[Array, "batch time embedding"],
        history: History,
        masks: Masks = Masks(),  # noqa: B008
    ) -> Context:
        """The part of f that does not depend on z, computed once."""
        # x̃ = W_x * x + b, starting from the last columns of the previous segment.
        x, bias = jnp.concatenate([history.embedded, embedded], axis=1), self.bias[...].astype(self.dtype)
        injection = causal_convolution(x, self.inject(self.dtype, masks.inject)) + bias[None, None]
        kernel = self.kernel(self.dtype, masks.kernel)
        return Context(kernel, injection, drop(history.h, masks.hidden), history.c, masks)


def step(z: State, context: Context) -> State:
    """f(z; x): one layer of a TrellisNet.

    i, o, g, f = x̃ + W * h are the gates of an LSTM, whose memory is c at the previous column:
    c' = σ(f) ∘ c₋₁ + σ(i) ∘ tanh(g),  h' = σ(o) ∘ tanh(c').
    """
    h = jnp.concatenate([context.past_h, drop(z.h, context.masks.hidden)], axis=1)
    a = causal_convolution(h, context.kernel) + context.injection
    i, o, g, f = (a[:, :, gate] for gate in range(4))
    previous = jnp.concatenate([context.past_c, z.c[:, :-1]], axis=1)
    c = jax.nn.sigmoid(f) * previous + jax.nn.sigmoid(i) * jnp.tanh(g)
    return z._replace(h=jax.nn.sigmoid(o) * jnp.tanh(c), c=c)


def causal_convolution(
    x: Float[Array, "batch columns width"], kernel: Float[Array, "taps width 4 channels"]
) -> Float[Array, "batch time 4 channels"]:
    """Σ_j x[t + j] W[j] for t = 0 … columns − taps: the last tap reads the column itself, the others earlier ones."""
    taps = kernel.shape[0]
    time = x.shape[1] - taps + 1
    windows = jnp.stack([x[:, j : j + time] for j in range(taps)], axis=2)
    return jnp.einsum("btkw,kwgc->btgc", windows, kernel)


def draw_masks(config: TrellisNetConfig, key: Array | None, batch: int, *, dtype: Any) -> Masks:
    """Masks for one forward pass, all None without a key; a rate of 0 draws nothing."""
    if key is None:
        return Masks()
    past, channels, width = config.kernel - 1, config.channels, config.embedding_width
    draws = dict(
        words=(config.embedding_dropout, (config.vocab_size,)),
        embedding=(config.input_dropout, (batch, 1, width)),
        inject=(config.weight_dropout, (past, width, 4, channels)),
        kernel=(config.weight_dropout, (past, channels, 4, channels)),
        hidden=(config.hidden_dropout, (batch, 1, channels)),
        output=(config.output_dropout, (batch, 1, config.output_dim)),
    )
    masks = common.keep_masks(key, draws, dtype)
    for name in ("inject", "kernel"):  # as in the paper's code, only taps on earlier columns are dropped
        if masks[name] is not None:
            masks[name] = jnp.concatenate([masks[name], jnp.ones_like(masks[name], shape=(1, *masks[name].shape[1:]))])
    return Masks(**masks)


def _solve(f, z0: State, context: Context, aux_every: int, options: dict) -> tuple[Solution, list[State]]:
    """The solution, and the states after every `aux_every` steps before the last step."""
    solver, adjoint = options["solver"], options["adjoint"]
    at = range(aux_every, solver.max_steps, aux_every) if aux_every else ()
    if not at:
        return fixed_point(f, z0, context, **options), []
    if not isinstance(adjoint, Unroll):
        found = trajectory(f, z0, context, at=tuple(at), correction=Phantom(), **options)
        return Solution(found.value, found.stats), list(found.states)

    # L layers are n blocks of aux_every layers and a remainder. Each block starts where the previous one ended; the
    # gradient flows through all of them, because `Unroll` is differentiable in z0.
    if not isinstance(solver, Picard):
        raise ValueError(f"auxiliary outputs through Unroll need solver=Picard, got {type(solver).__name__}")
    with_steps = lambda steps: {**options, "solver": dataclasses.replace(solver, max_steps=steps)}
    states, done = [], aux_every * len(at)
    for _ in at:
        states.append(z0 := fixed_point(f, z0, context, **with_steps(aux_every)).value)
    value, stats = fixed_point(f, z0, context, **with_steps(solver.max_steps - done))
    return Solution(value, stats._replace(steps=stats.steps + done)), states
