"""Explicit networks to compare an equilibrium with: an untied stack of the same cell, LSTM, GRU and TCN.

The weight-tied network of L layers needs nothing of its own: it is `Picard(max_steps=L)` with `Unroll(checkpoint)` on
the equilibrium's own parameters. `TIED` has its three ways of keeping what the backward pass needs.
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import deq_jax as deq
from deq_jax.models import TransformerConfig
from deq_jax.models.common import Weight
from deq_jax.models.transformer_cell import History, TransformerCell
from experiments.training.loop import count_params

# What is kept of L layers: all linearizations; every state and one linearization; √L of each.
TIED: dict[str, Callable[[int], deq.Unroll]] = {
    "plain": lambda layers: deq.Unroll(),
    "checkpointed": lambda layers: deq.Unroll(checkpoint=1),
    "√L-checkpointed": lambda layers: deq.Unroll(checkpoint=True),
}


class StackOutput(NamedTuple):
    logits: Float[Array, "batch time vocab"]
    history: History  # of every layer, leaves [layers, batch, ...]


class TransformerStack(nnx.Module):
    """`layers` of the DEQ-Transformer's cell, each with weights of its own and none injected into: Transformer-XL.

    The embedding is the first state. A layer's history is what it read in the segment before, so `history` has one
    leading axis more than the equilibrium's: memory and history grow with depth. Dropout is not here.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = TransformerConfig(vocab_size=27, dim=16, heads=2, inner_dim=32, mem_len=8)
    >>> stack = TransformerStack(config, layers=3, rngs=nnx.Rngs(0))
    >>> logits, history = stack(jnp.zeros((2, 5), jnp.int32))
    >>> logits.shape, history.z.shape
    ((2, 5, 27), (3, 2, 8, 16))
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layers: int,
        checkpoint: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """With `checkpoint`, the backward pass keeps the state before each layer and computes the layer again."""
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.config, self.layers, self.checkpoint = config, layers, checkpoint
        table = (config.vocab_size, config.dim)
        draw = nnx.initializers.normal(config.embedding_std)
        self.embedding = nnx.Param(draw(rngs.params(), table, param_dtype))
        cells = [TransformerCell(config, param_dtype=param_dtype, rngs=rngs) for _ in range(layers)]
        graphdef, first = nnx.split(cells[0], nnx.Param)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), first, *(nnx.split(c, nnx.Param)[1] for c in cells[1:]))
        self.cells = nnx.merge(graphdef, stacked)  # one module whose leaves have a leading axis of layers
        self.decoder = None if config.tie else nnx.Param(draw(rngs.params(), table, param_dtype))
        self.decoder_bias = nnx.Param(jnp.zeros((config.vocab_size,), param_dtype))

    def __call__(self, tokens: Int[Array, "batch time"], history: History | None = None) -> StackOutput:
        """Logits for the token after each of `tokens`, and every layer's history for the next segment."""
        history = self.empty_history(len(tokens)) if history is None else history
        graphdef, params = nnx.split(self.cells, nnx.Param)
        z = math.sqrt(self.config.dim) * jnp.take(self.embedding[...], tokens, axis=0)
        nothing = jnp.zeros((*tokens.shape, 3, *self.config.head_shape), z.dtype)
        mem, time = self.config.mem_len, tokens.shape[1]

        def layer(z, own):
            params, before = own
            read = jnp.concatenate([before.z, z], axis=1)[:, time:]
            length = jnp.minimum(before.length + time, mem)
            z = nnx.merge(graphdef, params)(z, nothing, before)
            return z, jax.lax.stop_gradient(History(read, before.injection, length))

        layer = jax.checkpoint(layer, prevent_cse=False) if self.checkpoint else layer
        z, history = jax.lax.scan(layer, z, (params, history))
        table = self.embedding if self.decoder is None else self.decoder
        return StackOutput(jnp.einsum("btd,vd->btv", z, table[...]) + self.decoder_bias[...], history)

    def empty_history(self, batch: int) -> History:
        """The history of a first segment, for every layer."""
        config, leading = self.config, (self.layers, batch)
        return History(
            z=jnp.zeros((*leading, config.mem_len, config.dim)),
            injection=jnp.zeros((*leading, config.mem_len, 3, *config.head_shape)),
            length=jnp.zeros(leading, jnp.int32),
        )


class Recurrent(nnx.Module):
    """One layer of Flax's LSTM or GRU on one-hot tokens, and a linear decoder.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> Recurrent(nnx.GRUCell, vocab_size=10, dim=8, rngs=nnx.Rngs(0))(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 10)
    """

    def __init__(self, cell: type, *, vocab_size: int, dim: int, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.cell = cell(vocab_size, dim, rngs=rngs)
        self.decoder = nnx.Linear(dim, vocab_size, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        graphdef, params, rest = nnx.split(self.cell, nnx.Param, ...)
        step = lambda carry, x: nnx.merge(graphdef, params, rest, copy=True)(carry, x)
        carry = self.cell.initialize_carry((len(tokens), self.vocab_size), nnx.Rngs(0))  # zeros
        _, h = jax.lax.scan(step, carry, jax.nn.one_hot(tokens.T, self.vocab_size))
        return self.decoder(h.swapaxes(0, 1))


class TCN(nnx.Module):
    """The temporal convolutional network of Bai, Kolter and Koltun (2018, arXiv 1803.01271), on one-hot tokens.

    Level l has two causal convolutions of dilation 2ˡ, weight-normed, with relu, and a residual around both: it sees
    1 + 2 (width − 1) (2^levels − 1) tokens. Dropout is not here.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> tcn = TCN(vocab_size=10, dim=8, levels=2, width=3, rngs=nnx.Rngs(0))
    >>> tcn(jnp.zeros((2, 5), jnp.int32)).shape, tcn.sees
    ((2, 5, 10), 13)
    """

    def __init__(self, *, vocab_size: int, dim: int, levels: int, width: int, rngs: nnx.Rngs):
        if min(levels, width) < 1:
            raise ValueError(f"levels and width must be at least 1, got {levels} and {width}")
        self.vocab_size, self.levels, self.width = vocab_size, levels, width
        # Named attributes, for a list of modules is written differently in the Flax versions that we support.
        for level in range(levels):
            for half in (0, 1):
                channels = vocab_size if level == half == 0 else dim
                options: dict[str, Any] = dict(weight_norm=True, fan_in_axes=2, rngs=rngs)
                setattr(self, f"kernel_{level}_{half}", Weight((width, channels, dim), None, **options))
                setattr(self, f"bias_{level}_{half}", nnx.Param(jnp.zeros((dim,))))
        self.widen = nnx.Linear(vocab_size, dim, rngs=rngs)
        self.decoder = nnx.Linear(dim, vocab_size, rngs=rngs)

    @property
    def sees(self) -> int:
        return 1 + 2 * (self.width - 1) * (2**self.levels - 1)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        x = jax.nn.one_hot(tokens, self.vocab_size)
        for level in range(self.levels):
            h = x
            for half in (0, 1):
                kernel, bias = (getattr(self, f"{name}_{level}_{half}") for name in ("kernel", "bias"))
                h = jax.nn.relu(causal_convolution(h, kernel(h.dtype), dilation=2**level) + bias[...])
            x = jax.nn.relu(h + (self.widen(x) if level == 0 else x))
        return self.decoder(x)


def causal_convolution(
    x: Float[Array, "batch time channels"], kernel: Float[Array, "width channels dim"], *, dilation: int = 1
) -> Float[Array, "batch time dim"]:
    """y_t = Σ_k kernel[k] x_{t − (width − 1 − k) · dilation}, with zeros before the first x."""
    padding = [((len(kernel) - 1) * dilation, 0)]
    layout = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (1,), padding, rhs_dilation=(dilation,), dimension_numbers=layout)


def parameters(build: Callable[[], nnx.Module]) -> int:
    """The number of parameters of the module that `build()` makes, of which nothing is computed."""
    return count_params(nnx.state(nnx.eval_shape(build), nnx.Param))


def fitted(build: Callable[[int], nnx.Module], wanted: int, sizes: Sequence[int]) -> int:
    """The one of `sizes`, a rising sequence, at which `build(size)` has nearest to `wanted` parameters.

    `build` is traced, so what it draws from has to be made inside it.

    >>> from flax import nnx
    >>> fitted(lambda dim: Recurrent(nnx.GRUCell, vocab_size=10, dim=dim, rngs=nnx.Rngs(0)), 14_000, range(8, 128, 2))
    62
    """
    count = functools.cache(lambda size: parameters(lambda: build(size)))
    above = min(bisect.bisect_left(sizes, wanted, key=count), len(sizes) - 1)
    return min(sizes[max(above - 1, 0)], sizes[above], key=lambda size: abs(count(size) - wanted))
