"""The DEQ-Transformer of Bai, Kolter and Koltun (NeurIPS 2019, arXiv 1909.01377, section 4.2).

One weight-tied, input-injected Transformer-XL layer f(z; x) is solved for z* = f(z*; x), and a language
model stands around it: embed, inject, solve, decode. Whatever does not depend on z (normalised weights, the
injection, keys and values of the history, relative positions, dropout masks) is computed once, into a
`Context`, so that what the solver evaluates is a pure function f(z, context).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deq_jax.adjoints import Adjoint, Implicit, Probe
from deq_jax.fixed_point import Solution, fixed_point
from deq_jax.models import adaptive
from deq_jax.models.adaptive import AdaptiveVocabulary, EmbeddingWeights, SoftmaxWeights
from deq_jax.models.common import Weight, checked_history, drop, require, wide
from deq_jax.models.transformer_cell import Context, History, TransformerCell, TransformerConfig, draw_masks
from deq_jax.solvers import Anderson, Solver


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
        draw = nnx.initializers.normal(config.embedding_std)
        table = lambda: nnx.Param(draw(rngs.params(), (config.vocab_size, config.dim), param_dtype))
        # A vocabulary without cutoffs is one table, under names that its checkpoints have always had.
        plain = not config.cutoffs
        self.embedding = table() if plain else None
        # The injection is outside the fixed point, and is not weight-normed.
        inject_shape = (config.dim, 3, *config.head_shape)
        self.inject = Weight(inject_shape, config.init_std, param_dtype=param_dtype, rngs=rngs)
        self.inject_bias = nnx.Param(jnp.zeros((3, *config.head_shape), param_dtype))
        self.cell = TransformerCell(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.decoder = table() if plain and not config.tie else None
        self.decoder_bias = nnx.Param(jnp.zeros((config.vocab_size,), param_dtype)) if plain else None
        if plain:
            self.vocabulary = None
        else:
            options: dict[str, Any] = {n: getattr(config, n) for n in ("cutoffs", "div_val", "tie", "projection_std")}
            size = config.vocab_size, config.dim
            self.vocabulary = AdaptiveVocabulary(*size, **options, draw=draw, param_dtype=param_dtype, rngs=rngs)

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
        """All but the logits: `decode` gives them, and `nll` a loss without them."""
        history = checked_history(tokens, history, self.empty_history)
        shape = (*tokens.shape, self.config.dim)
        z0 = jnp.zeros(shape, self.dtype) if z0 is None else z0
        require(z0.shape == shape, f"z0 must have shape {shape}, got {z0.shape}")
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
        hidden = drop(solution.value, context.masks.output)
        return Hidden(hidden, _extend(history, solution.value, context.injection), solution)

    def decode(self, hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Logits h Eᵀ + b, in float32 or wider; of an adaptive softmax, log p itself."""
        return adaptive.logits(hidden.astype(wide(self.dtype)), self.softmax)

    def nll(self, hidden: Float[Array, "*batch dim"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """−log p of each target given the `hidden` of its column, in nats: never all logits of a large vocabulary.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> config = TransformerConfig(1000, dim=16, heads=2, inner_dim=32, mem_len=8, cutoffs=(100,), div_val=4)
        >>> model, tokens = DEQTransformer(config, rngs=nnx.Rngs(0)), jnp.arange(12).reshape(2, 6)
        >>> losses = model.nll(model.hidden(tokens[:, :-1]).hidden, tokens[:, 1:])
        >>> losses.shape
        (2, 5)
        """
        return adaptive.nll(hidden.astype(wide(self.dtype)), targets, self.softmax)

    @property
    def softmax(self) -> SoftmaxWeights:
        """The arrays of the decoder; its own, or those that it shares with the embedding."""
        if self.vocabulary is not None:
            return self.vocabulary.softmax
        assert self.embedding is not None and self.decoder_bias is not None
        table = self.embedding if self.decoder is None else self.decoder
        return SoftmaxWeights((table[...],), (None,), (self.decoder_bias[...],))

    def context(
        self, tokens: Int[Array, "batch time"], history: History | None = None, *, key: Array | None = None
    ) -> Context:
        """What `model.cell.f(z, context)` is solved with: for penalties and diagnostics at the equilibrium.

        With a call's own `key` it is that call's context, masks included, and under jit computed once.
        """
        config = self.config
        history = checked_history(tokens, history, self.empty_history)
        masks = draw_masks(config, key, *tokens.shape, dtype=self.dtype)
        if self.vocabulary is not None:
            rows = self.vocabulary.embed(tokens, self.dtype)
        else:
            assert self.embedding is not None
            rows = adaptive.embed(tokens, EmbeddingWeights((self.embedding[...],), (None,)), self.dtype)
        embedded = drop(math.sqrt(config.dim) * rows, masks.embedding)
        # u = W_u E + b_u, once for the whole solve.
        injection = jnp.einsum("btd,dchk->btchk", embedded, self.inject(self.dtype))
        injection += self.inject_bias[...].astype(self.dtype)[None, None]
        return self.cell.context(injection, history, masks)

    def empty_history(self, batch: int) -> History:
        """The history of a first segment: full shapes, no valid column."""
        config = self.config
        return History(
            z=jnp.zeros((batch, config.mem_len, config.dim), self.dtype),
            injection=jnp.zeros((batch, config.mem_len, 3, *config.head_shape), self.dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )


def _extend(history: History, z: Array, injection: Array) -> History:
    """The last mem columns of the old history followed by the new segment, detached."""
    mem, time = history.z.shape[1], z.shape[1]
    join = lambda old, new: jnp.concatenate([old, new], axis=1)[:, time:]
    length = jnp.minimum(history.length + time, mem)
    extended = History(join(history.z, z), join(history.injection, injection), length)
    return jax.lax.stop_gradient(extended)
