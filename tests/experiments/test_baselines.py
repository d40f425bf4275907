"""The explicit networks: causal, equal to their definition, and as large as they are asked to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.models import TransformerConfig
from deq_jax.models.transformer_cell import NO_DROPOUT, History
from experiments.training.baselines import TCN, Recurrent, TransformerStack, causal_convolution, fitted, parameters

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")  # the explicit networks rely on the former

CONFIG = TransformerConfig(vocab_size=11, dim=8, heads=2, inner_dim=12, mem_len=6)


def tokens(batch: int, time: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (batch, time)))


def run(model, *args):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params, rest, copy=True)(*args))(params, *args)


def test_two_segments_are_one():
    """With room for all of the first segment, every layer's history makes the second what it is in one pass."""
    x = tokens(2, 10)
    model = TransformerStack(CONFIG, layers=3, rngs=nnx.Rngs(0))
    whole, _ = run(model, x)
    first, history = run(model, x[:, :5])
    second, history = run(model, x[:, 5:], history)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=2e-5)
    assert history.length.tolist() == [[6, 6]] * 3


def test_a_stack_is_its_cells_in_turn():
    x = tokens(2, 4)
    model = TransformerStack(CONFIG, layers=2, rngs=nnx.Rngs(1))
    graphdef, stacked = nnx.split(model.cells, nnx.Param)
    z = CONFIG.dim**0.5 * model.embedding[...][x]
    nothing = jnp.zeros((*x.shape, 3, *CONFIG.head_shape))
    history = History(jnp.zeros((2, 0, 8)), jnp.zeros((2, 0, 3, 2, 4)), jnp.zeros(2, jnp.int32))
    for layer in range(2):
        cell = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
        z = cell.f(z, cell.context(nothing, history, NO_DROPOUT))
    logits = z @ model.embedding[...].T + model.decoder_bias[...]
    np.testing.assert_allclose(run(model, x).logits, logits, atol=2e-5)


def test_checkpoints_leave_the_gradient():
    x = tokens(2, 4)

    def gradient(checkpoint):
        model = TransformerStack(CONFIG, layers=2, checkpoint=checkpoint, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model, nnx.Param)
        loss = lambda params: jnp.sum(nnx.merge(graphdef, params)(x).logits ** 2)
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for got, want in zip(gradient(True), gradient(False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_causal_convolution_is_its_sum():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3, 5))
    want = np.zeros((2, 9, 5))
    for t in range(9):
        for k in range(4):
            if (s := t - (3 - k) * 2) >= 0:
                want[:, t] += x[:, s] @ kernel[k]
    got = causal_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), dilation=2)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.full_compile
def test_a_tcn_sees_what_it_says():
    model = TCN(vocab_size=11, dim=6, levels=2, width=3, rngs=nnx.Rngs(0))
    assert model.sees == 13
    x = tokens(1, 15)
    change = lambda at: run(model, x.at[0, at].set((x[0, at] + 1) % 11))[0, -1]
    last = run(model, x)[0, -1]
    assert jnp.array_equal(change(14 - 13), last)
    assert not jnp.array_equal(change(14 - 12), last)


@pytest.mark.full_compile
@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_recurrent_networks_are_causal(cell):
    model = Recurrent(cell, vocab_size=11, dim=6, rngs=nnx.Rngs(0))
    x = tokens(2, 7)
    before, after = run(model, x), run(model, x.at[:, 4].set((x[:, 4] + 1) % 11))
    assert jnp.array_equal(before[:, :4], after[:, :4])
    assert not jnp.array_equal(before[:, -1], after[:, -1])


def test_fitted_is_the_nearest():
    build = lambda dim: Recurrent(nnx.GRUCell, vocab_size=11, dim=dim, rngs=nnx.Rngs(0))
    sizes = range(2, 12)
    for wanted in (1, 500, 10**9):
        every = min(sizes, key=lambda dim: abs(parameters(lambda: build(dim)) - wanted))
        assert fitted(build, wanted, sizes) == every
    assert parameters(lambda: build(4)) == sum(x.size for x in jax.tree.leaves(nnx.state(build(4), nnx.Param)))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        TransformerStack(CONFIG, layers=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="levels and width must be at least 1, got 0 and 3"):
        TCN(vocab_size=11, dim=6, levels=0, width=3, rngs=nnx.Rngs(0))
