"""The DEQ-TrellisNet against a loop in NumPy, and what its equilibrium keeps: causality, history, masks, layers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import VOCAB, jit, normal, run, sequences

import deq_jax as deq
from deq_jax.models import DEQTrellisNet, TrellisNetConfig
from deq_jax.models.trellisnet import History, Masks, State, draw_masks

TINY = TrellisNetConfig(vocab_size=VOCAB, hidden_dim=3, output_dim=4, init_std=0.3, embedding_range=2.0)
DROPOUT = dict.fromkeys(
    ("input_dropout", "embedding_dropout", "weight_dropout", "hidden_dropout", "output_dropout"), 0.2
)
SOLVER = deq.Picard(rtol=1e-13, max_steps=300)


@functools.cache
def build(dtype=jnp.float64, state_dtype=None, **changes):
    options = dict(solver=SOLVER, adjoint=deq.Implicit(SOLVER), dtype=state_dtype, param_dtype=dtype)
    model = DEQTrellisNet(dataclasses.replace(TINY, **changes), **options, rngs=nnx.Rngs(params=rbg(2)))
    model.cell.bias[...] = jnp.array(np.random.default_rng(9).normal(size=(4, 7)), dtype)
    return model


def rbg(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # half the compilation of threefry


def random_history(model, batch):
    return History(*(normal(*leaf.shape, seed=5) for leaf in model.empty_history(batch)))


# ---- the cell ----------------------------------------------------------------------------------------------


def reference_step(cell, h, c, embedded, history):
    """f(z; x) for one sequence, one column and one tap at a time."""
    taps, sigmoid = cell.config.kernel, lambda a: 1 / (1 + np.exp(-a))
    inject, kernel = np.asarray(cell.inject(float)), np.asarray(cell.kernel(float))
    xs, hs = [*history.embedded, *embedded], [*history.h, *h]
    new_h, new_c = [], []
    for t in range(len(h)):
        a = np.asarray(cell.bias[...]).copy()
        for j in range(taps):  # the last tap is column t itself
            a += np.einsum("w,wgc->gc", xs[t + j], inject[j]) + np.einsum("w,wgc->gc", hs[t + j], kernel[j])
        before = history.c[0] if t == 0 else c[t - 1]
        new_c.append(sigmoid(a[3]) * before + sigmoid(a[0]) * np.tanh(a[2]))
        new_h.append(sigmoid(a[1]) * np.tanh(new_c[-1]))
    return np.array(new_h), np.array(new_c)


@pytest.mark.parametrize("changes", [{}, {"kernel": 3, "weight_norm": False}, {"kernel": 1}], ids=str)
def test_cell_is_the_papers_loop(x64, changes):
    model = build(**changes)
    history = random_history(model, 2)
    z, embedded = State(normal(2, 5, 7, seed=1), normal(2, 5, 7, seed=2)), normal(2, 5, 4, seed=3)
    got = jit(lambda: model.cell.f(z, model.cell.context(embedded, history)))()
    for i in range(2):
        row = jax.tree.map(lambda x, i=i: np.asarray(x[i]), (z, embedded, history))
        np.testing.assert_allclose(
            [leaf[i] for leaf in got], reference_step(model.cell, *row[0], row[1], row[2]), rtol=1e-12, atol=1e-13
        )


def test_weight_norm_is_one_number_for_each_channel_of_each_gate(x64):
    cell = build().cell
    cell = nnx.merge(*nnx.split(cell), copy=True)
    assert cell.kernel.scale.shape == cell.inject.scale.shape == (4, 7)
    cell.kernel.scale[...] = jnp.full((4, 7), 2.0)
    np.testing.assert_allclose(jnp.sum(cell.kernel(float) ** 2, axis=(0, 1)), 4, rtol=1e-13)
    mask = draw_masks(dataclasses.replace(TINY, **DROPOUT), rbg(0), 2, dtype=float).kernel
    np.testing.assert_allclose(jnp.sum(cell.kernel(float, mask) ** 2, axis=(0, 1)), 4, rtol=1e-13)


# ---- the equilibrium ---------------------------------------------------------------------------------------


def test_output_is_an_equilibrium_and_its_last_channels_are_decoded(x64):
    model, tokens = build(), sequences(6)
    logits, history, solution = run(model, tokens)
    assert (solution.stats.status == deq.Status.CONVERGED).all() and solution.stats.steps.shape == (2,)
    again = jit(lambda: model.cell.f(solution.value, model.context(tokens)))()
    for got, want in zip(again, solution.value, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-11)
    np.testing.assert_allclose(logits, model.decode(solution.value.h[..., -4:]), rtol=1e-13)
    np.testing.assert_array_equal(history.h[:, 0], solution.value.h[:, -1])
    np.testing.assert_array_equal(history.c[:, 0], solution.value.c[:, -1])
    broyden = run(model, tokens, solver=deq.Broyden(rtol=1e-12), z0=solution.value._replace(h=solution.value.h + 1))
    np.testing.assert_allclose(broyden.logits, logits, atol=1e-9)


def test_a_later_token_changes_nothing_before_it(x64):
    model, tokens = build(), sequences(6)
    later = tokens.at[:, 4].set((tokens[:, 4] + 1) % TINY.vocab_size)
    got, want = run(model, later).logits, run(model, tokens).logits
    np.testing.assert_allclose(got[:, :4], want[:, :4], atol=1e-11)
    assert (jnp.abs(got[:, 4:] - want[:, 4:]).max(axis=-1) > 1e-4).all()


def test_no_gradient_reaches_a_later_token(x64):
    model, tokens = build(tie=False), jnp.arange(5)[None]  # token t is row t of the table
    graphdef, params = nnx.split(model)

    def logit(table, t):
        moved = nnx.merge(graphdef, params, copy=True)
        moved.vocabulary.table_0[...] = table
        return moved(tokens).logits[0, t, 0]

    grads = jit(jax.vmap(jax.grad(logit), (None, 0)))(model.vocabulary.table_0[...], jnp.arange(5))
    size = np.abs(grads).max(axis=-1)[:, :5]  # [logit at, token at]
    assert (size[np.triu_indices(5, k=1)] < 1e-12).all() and (size[np.tril_indices(5)] > 1e-7).all()


@pytest.mark.parametrize("kernel, segment", [(2, 3), (2, 1), (3, 2)])
def test_subsequences_with_history_are_exactly_one_long_sequence(x64, kernel, segment):
    """z*_t depends on z*_s for t − kernel < s < t alone, and a history holds those; the attention's window does not."""
    model, tokens = build(kernel=kernel), sequences(6)
    pieces = tokens.reshape(2, 6 // segment, segment).swapaxes(0, 1)

    def step(history, tokens):
        logits, history, _ = model(tokens, history)
        return history, logits

    _, logits = jit(lambda *carry_xs: jax.lax.scan(step, *carry_xs))(model.empty_history(2), pieces)
    want = run(model, tokens).logits
    np.testing.assert_allclose(logits.swapaxes(0, 1).reshape(want.shape), want, atol=1e-11)


def test_no_gradient_leaves_a_segment(x64):
    model, tokens = build(), sequences(3)
    graphdef, params = nnx.split(model)
    history = random_history(model, 2)
    forward = lambda p, history: nnx.merge(graphdef, p)(tokens, history)
    into = jit(jax.grad(lambda history: forward(params, history).logits.sum()))(history)
    out = jit(jax.grad(lambda p: sum(leaf.sum() for leaf in forward(p, history).history)))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves((into, out)))


# ---- gradients, layers and masks -----------------------------------------------------------------------------


def nll(model, tokens, *args, **options):
    return model.nll(model.hidden(tokens[:, :-1], *args, **options).hidden, tokens[:, 1:]).mean()


@pytest.mark.parametrize("changes", [{}, {**DROPOUT, "cutoffs": (4, 7), "div_val": 2, "weight_norm": False}], ids=str)
def test_gradient_is_that_of_a_long_unroll(x64, changes):
    model, tokens = build(**changes), sequences(5)
    graphdef, params = nnx.split(model)
    options = dict(history=random_history(model, 2), key=rbg(0) if changes else None)
    loss = lambda p, **extra: nll(nnx.merge(graphdef, p), tokens, **options, **extra)
    unroll = dict(solver=deq.Picard(rtol=0.0, max_steps=150), adjoint=deq.Unroll())
    got = jit(jax.value_and_grad(loss))(params)
    want = jit(jax.value_and_grad(lambda p: loss(p, **unroll)))(params)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-8, atol=1e-10)


def test_unroll_is_the_explicit_network_with_its_auxiliary_losses(x64):
    model, tokens = build(), sequences(5)
    graphdef, params = nnx.split(model)
    explicit = dict(solver=deq.Picard(rtol=0.0, max_steps=8), adjoint=deq.Unroll())

    def outputs(p):
        model = nnx.merge(graphdef, p)
        context = model.context(tokens)
        z, out = State(jnp.zeros((2, 5, 7)), jnp.zeros((2, 5, 7))), []
        for _ in range(8):
            z = model.cell.f(z, context)
            out.append(z.h[..., -4:])
        return out[-1], (out[2], out[5])  # of layers 3 and 6

    def ours(p):
        out = nnx.merge(graphdef, p).hidden(tokens, **explicit, aux_every=3)
        return out.hidden, out.auxiliary

    def loss(outputs, p):
        model, (last, auxiliary) = nnx.merge(graphdef, p), outputs(p)
        total = sum((0.1 * model.nll(hidden, tokens).sum() for hidden in auxiliary), model.nll(last, tokens).sum())
        return total, (last, auxiliary)

    got, want = (jit(jax.value_and_grad(functools.partial(loss, f), has_aux=True))(params) for f in (ours, outputs))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)
    stats = jit(lambda: model.hidden(tokens, **explicit, aux_every=3).solution.stats)()
    assert stats.steps.tolist() == [9, 9]  # 8 layers, and the one evaluation that measures
    assert not model.hidden(tokens, **explicit | {"solver": deq.Picard(max_steps=3)}, aux_every=3).auxiliary


def test_auxiliary_outputs_on_the_way_to_the_equilibrium(x64):
    model, tokens = build(), sequences(4)
    graphdef, params = nnx.split(model)

    def hidden(p):
        out = nnx.merge(graphdef, p).hidden(tokens, solver=deq.Picard(rtol=1e-12, max_steps=90), aux_every=40)
        return out.auxiliary[0].sum(), out

    (_, out), grads = jit(jax.value_and_grad(hidden, has_aux=True))(params)
    assert len(out.auxiliary) == 2 and out.solution.stats.converged.all()
    np.testing.assert_allclose(out.auxiliary[1], out.hidden, atol=1e-9)
    assert jnp.abs(grads["cell"]["kernel"]["kernel"][...]).max() > 1e-4
    with pytest.raises(ValueError, match="auxiliary outputs through Unroll need solver=Picard, got Anderson"):
        model.hidden(tokens, solver=deq.Anderson(), adjoint=deq.Unroll(), aux_every=3)


def test_masks_are_fixed_over_a_solve_and_new_with_each_key(x64):
    model, tokens = build(**DROPOUT), sequences(5)
    out = run(model, tokens, key=rbg(0))
    z = out.solution.value
    again = jit(lambda: model.cell.f(z, model.context(tokens, key=rbg(0))))()
    np.testing.assert_allclose(again.h, z.h, atol=1e-11)
    np.testing.assert_array_equal(run(model, tokens, key=rbg(0)).logits, out.logits)
    assert jnp.abs(run(model, tokens, key=rbg(1)).logits - out.logits).max() > 1e-3
    np.testing.assert_array_equal(run(model, tokens).logits, run(build(), tokens).logits)
    assert build().context(tokens, key=rbg(0)).masks == Masks()


def test_weights_in_time_alone_are_dropped_and_whole_words():
    config = dataclasses.replace(TINY, **DROPOUT, kernel=3, vocab_size=5000)
    masks = draw_masks(config, rbg(0), 50, dtype=jnp.float32)
    assert masks.kernel.shape == (3, 7, 4, 7) and masks.inject.shape == (3, 4, 4, 7)
    for mask in masks.kernel, masks.inject:
        assert (mask[-1] == 1).all() and (mask[:-1] == 0).any() and (mask[:-1] == np.float32(1.25)).any()
    assert masks.words.shape == (5000,) and masks.hidden.shape == (50, 1, 7) and masks.output.shape == (50, 1, 4)
    np.testing.assert_allclose(masks.words.mean(), 1, atol=0.03)


# ---- sizes, precision and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, outside, millions",
    [
        (TrellisNetConfig.penn_treebank(), 10_000 * 401, 20.2),
        (TrellisNetConfig.wikitext103(), 267_735 * 513 + 3 * 513, 44.4),
    ],
    ids=["ptb", "wikitext-103"],
)
def test_the_papers_sizes(config, outside, millions):
    params = nnx.eval_shape(lambda: nnx.split(DEQTrellisNet(config, rngs=nnx.Rngs(0)))[1])
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params)) - outside
    channels, width = config.hidden_dim + config.output_dim, config.output_dim
    # Two kernels of two taps, a bias, and the norms g of both.
    assert count == 2 * 4 * channels * (channels + width) + 3 * 4 * channels
    assert round(count / 1e6, 1) == millions


def test_bfloat16_state_with_float32_parameters():
    model = build(jnp.float32, jnp.bfloat16, **DROPOUT)
    tokens, graphdef, params = sequences(6), *nnx.split(model)
    out = run(model, tokens, key=rbg(0), solver=deq.Picard(rtol=2e-2))
    assert out.solution.value.h.dtype == out.history.c.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    assert out.solution.stats.converged.all()
    grads = jit(jax.grad(lambda p: nll(nnx.merge(graphdef, p), tokens)))(params)
    assert all(jnp.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("token", [11, -1])
def test_a_token_outside_the_vocabulary_is_reported(token):
    out = run(build(jnp.float32), jnp.array([[1, token], [1, 2]]), solver=deq.Picard(rtol=1e-4))
    assert out.solution.stats.status.tolist() == [deq.Status.NONFINITE, deq.Status.CONVERGED]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kernel": 0}, "kernel must be at least 1, got 0"),
        ({"embedding_dim": 3}, "a tied table needs embedding_dim == output_dim, got 3 and 4"),
        ({"embedding_dim": 3, "tie": False, "cutoffs": (5,)}, "a vocabulary with cutoffs needs embedding_dim"),
        ({"weight_dropout": 1.0}, r"weight_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_call_says_what_is_wrong():
    model, tokens = build(jnp.float32), sequences(3)
    with pytest.raises(TypeError, match="tokens must be integer ids, got dtype float32"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"z0.c must have shape \(2, 3, 7\), got \(2, 3, 6\)"):
        model(tokens, z0=State(jnp.zeros((2, 3, 7)), jnp.zeros((2, 3, 6))))
    with pytest.raises(ValueError, match=r"history.h must be float32\[2, 1, 7\], as of `empty_history`, got float32"):
        model(tokens, model.empty_history(3))


def test_an_embedding_of_another_width_is_a_table_of_its_own():
    model, tokens = build(jnp.float32, embedding_dim=3, tie=False), sequences(3)
    assert run(model, tokens).logits.shape == (2, 3, 11)
    shapes = sorted(p.shape for p in jax.tree.leaves(nnx.split(model)[1]) if p.shape[0] == 11)
    assert shapes == [(11,), (11, 3), (11, 4)]
