"""The base class of the two language models: embed, solve for the equilibrium, decode."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from deq_jax.adjoints import Adjoint, Implicit, Probe
from deq_jax.fixed_point import Solution
from deq_jax.models import adaptive
from deq_jax.models.adaptive import AdaptiveVocabulary, EmbeddingWeights, SoftmaxWeights
from deq_jax.models.common import wide
from deq_jax.solvers import Anderson, Solver

Config = TypeVar("Config")


class Output(NamedTuple):
    """The result of calling a model. Logits are float32 or wider; pass `history` to the next call."""

    logits: Float[Array, "batch time vocab"]
    history: Any  # the model's `History`
    solution: Solution


class Prepared(NamedTuple):
    """What a model computes before it solves, once it has checked that the tokens and the history fit."""

    history: Any  # an empty one if the call passed None
    embedded: Float[Array, "batch time embedding"]
    context: Any


class LanguageModel(nnx.Module, Generic[Config]):
    """The shared part of `DEQTransformer` and `DEQTrellisNet`.

    A model defines `hidden`, `empty_history` and `softmax`; `_init_params`, which draws its parameters; and `_prepare`,
    which checks the arguments of a call and computes the context. `embedding` holds a table if the model does not embed
    with its `vocabulary`.
    """

    embedding: nnx.Param | None
    vocabulary: AdaptiveVocabulary | None
    softmax: SoftmaxWeights
    hidden: Callable[..., Any]
    _init_params: Callable[[Any, nnx.Rngs], None]
    _prepare: Callable[..., Prepared]

    def __init__(
        self,
        config: Config,
        *,
        solver: Solver = Anderson(),  # noqa: B008  frozen
        adjoint: Adjoint = Implicit(),  # noqa: B008
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`dtype` is the precision of the state and of the arithmetic; None means `param_dtype`."""
        self.config = config
        self.solver = solver
        self.adjoint = adjoint
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self._init_params(param_dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        history: Any = None,
        *,
        z0: PyTree | None = None,
        key: Array | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        probe: Probe | None = None,
    ) -> Output:
        """Logits for the token after each of `tokens`, the history for the next segment, and the `Solution`.

        Args:
          tokens: ids. An id outside the vocabulary, including a negative one, cannot be detected before tracing. It
            gives NaN and the status NONFINITE.
          history: from the call on the previous segment; None for a first segment.
          z0: the initial state; None for zeros.
          key: turns dropout on; None is evaluation.
          solver, adjoint: replace the model's own.
          probe: passed to `fixed_point`.

        Raises:
          TypeError, ValueError: before tracing, if the tokens, the history or z0 do not fit.
        """
        out = self.hidden(tokens, history, z0=z0, key=key, solver=solver, adjoint=adjoint, probe=probe)
        return Output(self.decode(out.hidden), out.history, out.solution)

    def decode(self, hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Logits h Eᵀ + b, in float32 or wider. With an adaptive softmax they are log p itself."""
        return adaptive.logits(hidden.astype(wide(self.dtype)), self.softmax)

    def nll(self, hidden: Float[Array, "*batch dim"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """−log p of each target given the `hidden` of its column, in nats.

        It never holds all logits of a large vocabulary at once.

        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from deq_jax.models import DEQTransformer, TransformerConfig
        >>> config = TransformerConfig(1000, dim=16, heads=2, inner_dim=32, mem_len=8, cutoffs=(100,), div_val=4)
        >>> model, tokens = DEQTransformer(config, rngs=nnx.Rngs(0)), jnp.arange(12).reshape(2, 6)
        >>> losses = model.nll(model.hidden(tokens[:, :-1]).hidden, tokens[:, 1:])
        >>> losses.shape
        (2, 5)
        """
        return adaptive.nll(hidden.astype(wide(self.dtype)), targets, self.softmax)

    def context(self, tokens: Int[Array, "batch time"], history: Any = None, *, key: Array | None = None) -> Any:
        """The context with which a call solves z = `model.cell.f(z, context)`.

        Use it for penalties and diagnostics at the equilibrium. Pass the `key` of a call to get the context of that
        call, with the same masks; under jit it is computed only once.
        """
        return self._prepare(tokens, history, key).context

    def _embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time embedding"]:
        if self.embedding is not None:
            return adaptive.embed(tokens, EmbeddingWeights((self.embedding[...],), (None,)), self.dtype)
        assert self.vocabulary is not None
        return self.vocabulary.embed(tokens, self.dtype)

    def _options(self, solver: Solver | None, adjoint: Adjoint | None, probe: Probe | None) -> dict[str, Any]:
        """The options of `fixed_point`, with the model's own solver and adjoint in place of None."""
        solver = self.solver if solver is None else solver
        adjoint = self.adjoint if adjoint is None else adjoint
        return {"solver": solver, "adjoint": adjoint, "batch_ndim": 1, "probe": probe}
