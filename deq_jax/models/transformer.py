"""The DEQ-Transformer of Bai, Kolter and Koltun (NeurIPS 2019, arXiv 1909.01377, section 4.2).

The model solves z* = f(z*; x), where f is one weight-tied, input-injected Transformer-XL layer. The language model
around it has four stages: embed, inject, solve, decode. Whatever does not depend on z (normalized weights, the
injection, keys and values of the history, relative positions, dropout masks) is computed once, into a `Context`, so
that the solver evaluates a pure function f(z, context).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deq_jax.adjoints import Adjoint, Probe
from deq_jax.fixed_point import Solution, fixed_point
from deq_jax.models.adaptive import AdaptiveVocabulary, SoftmaxWeights
from deq_jax.models.common import Weight, checked_history, drop, initial_state, param
from deq_jax.models.language_model import LanguageModel, Prepared
from deq_jax.models.transformer_cell import History, TransformerCell, TransformerConfig, draw_masks
from deq_jax.solvers import Solver


class Hidden(NamedTuple):
    """The result of `DEQTransformer.hidden`; `hidden` is the equilibrium after output dropout."""

    hidden: Float[Array, "batch time dim"]
    history: History
    solution: Solution


class DEQTransformer(LanguageModel[TransformerConfig]):
    """A language model with a single layer, evaluated at its equilibrium.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from deq_jax.models import DEQTransformer, TransformerConfig
    >>> config = TransformerConfig(vocab_size=27, dim=16, heads=2, inner_dim=32, mem_len=8)
    >>> model = DEQTransformer(config, rngs=nnx.Rngs(0))
    >>> logits, history, solution = model(jnp.arange(10).reshape(2, 5))
    >>> logits, history, solution = model(jnp.arange(10, 20).reshape(2, 5), history)
    >>> logits.shape, history.length.tolist(), solution.stats.steps.shape
    ((2, 5, 27), [8, 8], (2,))

    The module holds only parameters, and a call changes no state: call `nnx.split` once, then apply plain `jax.jit`
    and `jax.grad` to `nnx.merge(graphdef, params)`. Every sequence is a separate problem, with its own residual and
    stopping time. `solver` and `adjoint` are defaults that a call may replace. `Picard(max_steps=L)` with `Unroll()`
    is the weight-tied L-layer baseline on the same parameters, and the paper's warm-up.
    """

    def _init_params(self, param_dtype: Any, rngs: nnx.Rngs) -> None:
        config = self.config
        draw = nnx.initializers.normal(config.embedding_std)
        table = lambda: param(draw(rngs.params(), (config.vocab_size, config.dim), param_dtype), "vocab", "dim")
        # A vocabulary without cutoffs is one table. It keeps the names that existing checkpoints use.
        plain = not config.cutoffs
        self.embedding = table() if plain else None
        # The injection is outside the fixed point, so it has no weight norm.
        inject_shape, names = (config.dim, 3, *config.head_shape), ("dim", None, "heads", None)
        self.inject = Weight(inject_shape, config.init_std, names=names, param_dtype=param_dtype, rngs=rngs)
        self.inject_bias = param(jnp.zeros((3, *config.head_shape), param_dtype), *names[1:])
        self.cell = TransformerCell(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.decoder = table() if plain and not config.tie else None
        self.decoder_bias = param(jnp.zeros((config.vocab_size,), param_dtype), "vocab") if plain else None
        if plain:
            self.vocabulary = None
        else:
            options: dict[str, Any] = {n: getattr(config, n) for n in ("cutoffs", "div_val", "tie", "projection_std")}
            size = config.vocab_size, config.dim
            self.vocabulary = AdaptiveVocabulary(*size, **options, draw=draw, param_dtype=param_dtype, rngs=rngs)

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
        """A call without the logits: `decode` computes them, and `nll` computes a loss without them."""
        previous, _, context = self._prepare(tokens, history, key)
        z0 = initial_state(z0, jnp.zeros((*tokens.shape, self.config.dim), self.dtype))
        solution = fixed_point(self.cell.f, z0, context, **self._options(solver, adjoint, probe))
        hidden = drop(solution.value, context.masks.output)
        return Hidden(hidden, _extend(previous, solution.value, context.injection), solution)

    @property
    def softmax(self) -> SoftmaxWeights:
        """The arrays of the decoder: its own, or those that it shares with the embedding."""
        if self.vocabulary is not None:
            return self.vocabulary.softmax
        assert self.embedding is not None and self.decoder_bias is not None
        table = self.embedding if self.decoder is None else self.decoder
        return SoftmaxWeights((table[...],), (None,), (self.decoder_bias[...],))

    def empty_history(self, batch: int) -> History:
        """The history of a first segment: full shapes, no valid column."""
        config = self.config
        return History(
            z=jnp.zeros((batch, config.mem_len, config.dim), self.dtype),
            injection=jnp.zeros((batch, config.mem_len, 3, *config.head_shape), self.dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )

    def _prepare(self, tokens: Array, history: History | None, key: Array | None) -> Prepared:
        history = checked_history(tokens, history, self.empty_history)
        masks = draw_masks(self.config, key, *tokens.shape, dtype=self.dtype)
        embedded = drop(math.sqrt(self.config.dim) * self._embed(tokens), masks.embedding)
        # u = W_u E + b_u, once for the whole solve.
        injection = jnp.einsum("btd,dchk->btchk", embedded, self.inject(self.dtype))
        injection += self.inject_bias[...].astype(self.dtype)[None, None]
        return Prepared(history, embedded, self.cell.context(injection, history, masks))


def _extend(history: History, z: Array, injection: Array) -> History:
    """The last mem columns of the old history followed by the new segment, detached."""
    mem, time = history.z.shape[1], z.shape[1]
    join = lambda old, new: jnp.concatenate([old, new], axis=1)[:, time:]
    length = jnp.minimum(history.length + time, mem)
    extended = History(join(history.z, z), join(history.injection, injection), length)
    return jax.lax.stop_gradient(extended)
