"""The DEQ-Transformer against a loop in NumPy, and what its equilibrium keeps: causality, history, masks."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import VOCAB, jit, normal, run, sequences

import deq_jax as deq
from deq_jax import models
from deq_jax.models import DEQTransformer, TransformerConfig
from deq_jax.models.common import Weight
from deq_jax.models.transformer_cell import History, Masks, TransformerCell, draw_masks

# A strong injection: Picard converges, so that equilibria are known to 1e-12 and a long unroll agrees.
TINY = TransformerConfig(
    vocab_size=VOCAB, dim=8, heads=2, inner_dim=12, mem_len=4, init_std=0.2, embedding_std=3.0, tie=False
)
DROPOUT = dict(io_dropout=0.1, attention_dropout=0.2, hidden_dropout=0.1)
SOLVER = deq.Picard(rtol=1e-13, max_steps=1000)


def rngs():
    # Half the compilation of threefry; the draws differ between backends, the tests do not read them.
    return nnx.Rngs(params=jax.random.key(2, impl="unsafe_rbg"))


@functools.cache
def build(dtype=jnp.float64, state_dtype=None, **changes):
    options = dict(solver=SOLVER, adjoint=deq.Implicit(SOLVER), dtype=state_dtype, param_dtype=dtype)
    return DEQTransformer(dataclasses.replace(TINY, **changes), **options, rngs=rngs())


def random_history(config, batch, length):
    z = normal(batch, config.mem_len, config.dim, seed=7)
    injection = normal(batch, config.mem_len, 3, *config.head_shape, seed=8)
    return History(z, injection, jnp.array(length, jnp.int32))


# ---- the cell ----------------------------------------------------------------------------------------------


def layer_normalize(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def rotated(x, position):
    half = len(x) // 2
    angle = position / 10_000 ** (np.arange(half) / half)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def reference_cell(cell, z, injection, history):
    """f(z; x) for one sequence, one query, one head and one key at a time."""
    config, (heads, head_dim) = cell.config, cell.config.head_shape
    normalize = (lambda x: x / np.sqrt((x**2).mean() + 1e-5)) if config.rms_norm else layer_normalize
    pre = normalize if config.pre_norm else lambda x: x
    p = {name: np.asarray(value[...]) for name, value in vars(cell).items() if isinstance(value, nnx.Param)}
    w = {name: np.asarray(value(float)) for name, value in vars(cell).items() if isinstance(value, Weight)}
    first = config.mem_len - int(history.length)
    columns = [*zip(history.z, history.injection, strict=True)][first:] + [*zip(z, injection, strict=True)]
    qkv = [np.einsum("d,dchk->chk", pre(np.asarray(column)), w["qkv"]) + u for column, u in columns]
    out = []
    for t in range(len(z)):
        now = len(columns) - len(z) + t
        total = p["attended_bias"].copy()
        for head in range(heads):
            scores, values = [], []
            for s in range(max(0, now - config.window + 1), now + 1):
                q, k = qkv[now][0, head], qkv[s][1, head]
                if config.rotary:
                    score = rotated(q, now - s) @ k
                else:
                    angle = (now - s) / 10_000 ** (np.arange(0, config.dim, 2) / config.dim)
                    r = np.concatenate([np.sin(angle), np.cos(angle)]) @ w["positions"][:, head]
                    score = (q + p["content_bias"][head]) @ k + (q + p["position_bias"][head]) @ r
                scores.append(score / math.sqrt(head_dim))
                values.append(qkv[s][2, head])
            probability = np.exp(scores) / np.exp(scores).sum()
            total += (probability @ np.array(values)) @ w["attended"][head]
        h = total + z[t] if config.pre_norm else normalize(total + z[t])
        n = normalize(h) if config.pre_norm else h
        inner = np.einsum("d,d...->...", n, w["inner"]) + p["inner_bias"]
        inner = inner[0] / (1 + np.exp(-inner[0])) * inner[1] if config.gated else np.maximum(inner, 0)
        step = inner @ w["outer"] + p["outer_bias"] + n
        out.append(step if config.pre_norm else normalize(step))
    return np.array(out)


MODERN = dict(rotary=True, rms_norm=True, gated=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"pre_norm": True, "heads": 3, "head_dim": 5},
        {**MODERN, "window": 3},
        {**MODERN, "pre_norm": True, "heads": 3, "head_dim": 6},
    ],
    ids=str,
)
def test_cell_is_the_papers_loop(x64, changes):
    config = dataclasses.replace(TINY, **changes)
    cell = TransformerCell(config, param_dtype=float, rngs=rngs())
    for bias in (cell.attended_bias, cell.inner_bias, cell.outer_bias):
        bias[...] = normal(*bias[...].shape, seed=3)
    history = random_history(config, batch=3, length=[0, 2, 4])
    z = normal(3, 5, config.dim, seed=5)
    injection = normal(3, 5, 3, *config.head_shape, seed=6)
    got = jit(lambda: cell(z, injection, history))()
    for i in range(3):
        row = jax.tree.map(lambda x, i=i: np.asarray(x[i]), history)
        want = reference_cell(cell, np.asarray(z[i]), np.asarray(injection[i]), row)
        np.testing.assert_allclose(got[i], want, rtol=1e-12, atol=1e-12)


def test_the_attention_kernel_is_the_formula(x64):
    """float64 has the formula and float32 has JAX's kernel, whose softmax is in float32 always."""
    config = dataclasses.replace(TINY, **MODERN, window=3)
    wide, narrow = (TransformerCell(config, param_dtype=dtype, rngs=rngs()) for dtype in (jnp.float64, jnp.float32))
    z, injection = normal(3, 5, config.dim, seed=5), normal(3, 5, 3, *config.head_shape, seed=6)
    args = z, injection, random_history(config, 3, [0, 2, 4])
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == float else x, tree)
    narrow = nnx.merge(nnx.split(narrow)[0], cast(nnx.split(wide)[1]))
    exact = jit(lambda: wide(*args))()
    got = jit(lambda: narrow(*cast(args)))()
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=5e-6)


def test_weight_norm_gives_rows_of_norm_g_and_begins_at_the_draw(x64):
    options = dict(fan_in_axes=2, param_dtype=float)
    plain = Weight((2, 3, 4), 0.3, rngs=nnx.Rngs(0), **options)
    weight = Weight((2, 3, 4), 0.3, weight_norm=True, rngs=nnx.Rngs(0), **options)
    np.testing.assert_allclose(weight(float), plain(float), rtol=1e-14)
    weight.kernel[...] = 5 * weight.kernel[...]
    np.testing.assert_allclose(weight(float), plain(float), rtol=1e-14)
    weight.scale[...] = jnp.arange(1.0, 5.0)
    np.testing.assert_allclose(jnp.linalg.norm(weight(float).reshape(6, 4), axis=0), [1, 2, 3, 4], rtol=1e-14)


def test_weight_norm_of_a_zero_row_is_zero_with_a_finite_gradient(x64):
    weight = Weight((3, 2), 0.0, weight_norm=True, param_dtype=float, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(weight)
    grads = jax.grad(lambda p: nnx.merge(graphdef, p)(float).sum())(params)
    assert not weight(float).any()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("std, want", [(0.03, 0.03), (None, 1 / math.sqrt(3 * 400))])
def test_initial_spread(std, want):
    weight = Weight((400, 300), std, rngs=rngs())
    np.testing.assert_allclose(weight(jnp.float32).std(), want, rtol=0.02)


# ---- the equilibrium ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [False, True])
def test_output_is_an_equilibrium_of_the_cell(x64, pre_norm):
    model, tokens = build(pre_norm=pre_norm), sequences(5)
    z, stats = run(model, tokens).solution
    assert (stats.status == deq.Status.CONVERGED).all() and stats.steps.shape == (2,)
    again = jit(lambda: model.cell.f(z, model.context(tokens)))()
    np.testing.assert_allclose(again, z, atol=1e-11)


def test_solvers_and_starts_agree(x64):
    model, tokens = build(), sequences(5)
    want = run(model, tokens)
    broyden = run(model, tokens, solver=deq.Broyden(rtol=1e-12, max_steps=100))
    warm = run(model, tokens, z0=want.solution.value)
    np.testing.assert_allclose(broyden.logits, want.logits, atol=1e-9)
    np.testing.assert_allclose(warm.logits, want.logits, atol=1e-11)
    assert (warm.solution.stats.steps < want.solution.stats.steps).all()


def test_a_later_token_changes_nothing_before_it(x64):
    model, tokens = build(), sequences(6)
    later = tokens.at[:, 4].set((tokens[:, 4] + 1) % TINY.vocab_size)
    got, want = run(model, later).logits, run(model, tokens).logits
    np.testing.assert_allclose(got[:, :4], want[:, :4], atol=1e-10)
    assert (jnp.abs(got[:, 4:] - want[:, 4:]).max(axis=-1) > 1e-3).all()


def test_no_gradient_reaches_a_later_token(x64):
    model, tokens = build(), jnp.arange(6)[None]  # token t is row t of the table
    graphdef, params = nnx.split(model)

    def logit(table, t):
        moved = nnx.merge(graphdef, params, copy=True)
        moved.embedding[...] = table
        return moved(tokens).logits[0, t, 0]

    grads = jit(jax.vmap(jax.grad(logit), (None, 0)))(model.embedding[...], jnp.arange(6))
    size = np.abs(grads).max(axis=-1)[:, :6]  # [logit at, token at]
    assert (size[np.triu_indices(6, k=1)] < 1e-12).all()
    assert (size.diagonal() > 1e-4).all() and (np.tril(size, -1)[1:].max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("segment, mem_len, changes", [(4, 2, {}), (2, 4, {}), (2, 4, MODERN)], ids=str)
def test_segments_with_history_are_one_long_sequence(x64, segment, mem_len, changes):
    # A window of 3 reaches two columns back: a history of two or more holds all that a token may see.
    model, tokens = build(window=3, mem_len=mem_len, **changes), sequences(8)
    history, logits = model.empty_history(2), []
    for start in range(0, 8, segment):
        out, history, _ = run(model, tokens[:, start : start + segment], history)
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), run(model, tokens).logits, atol=1e-9)


def test_history_is_the_last_columns_detached(x64):
    model, tokens = build(), sequences(3)
    first = run(model, tokens)
    second = run(model, tokens, first.history)
    assert first.history.length.tolist() == [3, 3] and second.history.length.tolist() == [4, 4]
    np.testing.assert_array_equal(second.history.z[:, :1], first.solution.value[:, -1:])
    np.testing.assert_array_equal(second.history.z[:, 1:], second.solution.value)
    np.testing.assert_allclose(second.history.injection[:, 1:], model.context(tokens).injection, rtol=1e-12)
    graphdef, params = nnx.split(model)
    merged = lambda p: nnx.merge(graphdef, p)
    through = jit(jax.grad(lambda p: merged(p)(tokens).history.z.sum()))(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(through))
    back = jit(jax.grad(lambda z: model(tokens, first.history._replace(z=z)).logits.sum()))(first.history.z)
    assert not back.any()


def test_without_a_history_it_is_empty(x64):
    model, tokens = build(mem_len=0), sequences(5)
    out = run(model, tokens)
    assert out.history.z.shape == (2, 0, TINY.dim)
    np.testing.assert_allclose(out.logits, run(build(), tokens).logits, atol=1e-11)


def test_picard_and_unroll_are_the_weight_tied_explicit_model(x64):
    model, tokens = build(), sequences(5)
    context, z, f = model.context(tokens), jnp.zeros((2, 5, TINY.dim)), jit(model.cell.f)
    for _ in range(3):
        z = f(z, context)
    explicit = run(model, tokens, solver=deq.Picard(rtol=0.0, max_steps=3), adjoint=deq.Unroll())
    np.testing.assert_allclose(explicit.solution.value, z, atol=1e-13)


# ---- gradients and transforms ------------------------------------------------------------------------------


def nll(model, tokens, history=None, **options):
    return model.nll(model.hidden(tokens[:, :-1], history, **options).hidden, tokens[:, 1:]).mean()


@pytest.mark.parametrize(
    "changes, key",
    [
        ({}, None),
        ({"pre_norm": True, "weight_norm": False, "tie": True, **DROPOUT}, 0),
        ({**MODERN, "cutoffs": (3, 7), "div_val": 2, "tie": True}, None),
    ],
    ids=str,
)
def test_gradient_is_that_of_a_long_unroll_and_of_finite_differences(x64, changes, key):
    model, tokens = build(**changes), sequences(6)
    history = random_history(model.config, 2, [4, 1])
    graphdef, params = nnx.split(model)
    options = dict(history=history, key=None if key is None else jax.random.key(key))
    loss = lambda p, **extra: nll(nnx.merge(graphdef, p), tokens, **options, **extra)
    grads = jit(jax.grad(loss))(params)
    unroll = dict(solver=deq.Picard(rtol=0.0, max_steps=500), adjoint=deq.Unroll())
    unrolled = jit(jax.grad(lambda p: loss(p, **unroll)))(params)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)

    move = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=float)).reshape(p.shape), params)
    at = jit(lambda h: loss(jax.tree.map(lambda p, d: p + h * d, params, move)))
    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(move), strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-6)


def test_first_and_later_segments_are_one_program(count_traces):
    model = build(jnp.float32)
    graphdef, params = nnx.split(model)
    step = count_traces(lambda p, tokens, history: nnx.merge(graphdef, p)(tokens, history)[:2])
    jitted, history = jit(step), model.empty_history(2)
    for seed in range(3):
        _, history = jitted(params, sequences(3, seed=seed), history)
    assert step.traces == 1


def test_a_scan_over_segments_is_the_loop(x64):
    model, segments = build(), sequences(9).reshape(2, 3, 3).swapaxes(0, 1)

    def step(history, tokens):
        logits, history, _ = model(tokens, history)
        return history, logits

    _, scanned = jit(lambda *carry_xs: jax.lax.scan(step, *carry_xs))(model.empty_history(2), segments)
    history = model.empty_history(2)
    for tokens, want in zip(segments, scanned, strict=True):
        logits, history, _ = run(model, tokens, history)
        np.testing.assert_allclose(logits, want, atol=1e-11)


def test_vmap_over_parameters_is_an_ensemble(x64):
    models, tokens = [build(), build(init_std=0.1)], sequences(4)
    graphdef, first = nnx.split(models[0])
    stacked = jax.tree.map(lambda *p: jnp.stack(p), first, nnx.split(models[1])[1])
    # The graphdef carries the config of the first, which init_std does not change the arithmetic of.
    got = jit(jax.vmap(lambda p: nnx.merge(graphdef, p)(tokens).logits))(stacked)
    for logits, model in zip(got, models, strict=True):
        np.testing.assert_allclose(logits, run(model, tokens).logits, atol=1e-10)


def test_the_options_of_a_context_are_static(x64):
    """Contexts whose arrays have equal shapes and whose options differ are different programs, in every transform."""
    model, f, z0 = build(), build().cell.f, jnp.zeros((2, 4, TINY.dim))
    context = jit(lambda: model.context(sequences(4)))()
    solve = lambda context: deq.fixed_point(f, z0, context, solver=SOLVER, batch_ndim=1).value
    loss = lambda injection, context: jnp.sum(solve(context._replace(injection=injection)) ** 3)
    first = lambda tree: jax.tree.map(lambda x: x[None], tree)
    jitted, grad = jit(solve), jit(jax.grad(loss))
    batched, scanned = (
        jit(lambda context: jax.vmap(solve)(first(context))[0]),
        jit(lambda context: jax.lax.scan(lambda carry, _: (carry, solve(carry)), context, None, length=1)[1][0]),
    )
    for rms_norm in (False, True, False):
        context = context._replace(options=dataclasses.replace(context.options, rms_norm=rms_norm))
        z = solve(context)
        assert (jnp.abs(z.mean(axis=-1)).max() > 0.01) == rms_norm  # a layer norm ends with mean 0
        for way in (jitted, batched, scanned):
            np.testing.assert_allclose(way(context), z, atol=1e-11)
        np.testing.assert_allclose(
            grad(context.injection, context), jax.grad(loss)(context.injection, context), atol=1e-9
        )


def test_a_sequence_does_not_feel_its_neighbor(x64):
    model, tokens = build(), sequences(5)
    alone, both = run(model, tokens[:1]), run(model, tokens)
    np.testing.assert_allclose(both.logits[:1], alone.logits, atol=1e-11)
    assert both.solution.stats.steps[0] == alone.solution.stats.steps[0]


# ---- dropout -----------------------------------------------------------------------------------------------


def test_masks_are_fixed_over_a_solve_and_new_with_each_key(x64, rng):
    model, tokens = build(**DROPOUT), sequences(5)
    out = run(model, tokens, key=rng)
    assert (out.solution.stats.status == deq.Status.CONVERGED).all()
    z = out.solution.value
    again = jit(lambda: model.cell.f(z, model.context(tokens, key=rng)))()
    np.testing.assert_allclose(again, z, atol=1e-11)
    np.testing.assert_array_equal(run(model, tokens, key=rng).logits, out.logits)
    assert jnp.abs(run(model, tokens, key=jax.random.key(1)).logits - out.logits).max() > 1e-3


def test_without_a_key_nothing_is_dropped(x64):
    tokens = sequences(5)
    np.testing.assert_array_equal(run(build(**DROPOUT), tokens).logits, run(build(), tokens).logits)
    assert build().context(tokens, key=jax.random.key(0)).masks == Masks()


def test_masks_have_the_rates_and_keep_the_mean():
    config = dataclasses.replace(TINY, **DROPOUT)
    masks = draw_masks(config, jax.random.key(0, impl="unsafe_rbg"), 50, 30, dtype=jnp.float32)
    assert masks.attention.shape == (50, 2, 30, 34) and masks.inner.shape == (50, 1, 12)
    assert set(np.unique(masks.attention)) == {0.0, np.float32(1 / 0.8)}
    np.testing.assert_allclose(masks.attention.mean(), 1.0, atol=0.01)
    assert not np.array_equal(masks.embedding, masks.output)


# ---- precision, size and errors ----------------------------------------------------------------------------


def test_bfloat16_state_with_float32_parameters():
    model = build(jnp.float32, jnp.bfloat16, **DROPOUT)
    tokens, graphdef, params = sequences(6), *nnx.split(model)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = run(model, tokens, key=jax.random.key(0), solver=deq.Picard(rtol=2e-2))
    assert (out.solution.stats.status == deq.Status.CONVERGED).all()
    assert out.solution.value.dtype == out.history.z.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    grads = jit(jax.grad(lambda p: nll(nnx.merge(graphdef, p), tokens)))(params)
    assert all(jnp.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_decode_is_the_tied_table_or_its_own(x64):
    h = jnp.ones((2, 3, TINY.dim))
    tied, untied = build(tie=True), build()
    np.testing.assert_allclose(tied.decode(h)[0, 0], tied.embedding[...].sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(untied.decode(h)[0, 0], untied.decoder[...].sum(axis=1), rtol=1e-12)
    tokens = sequences(5)
    hidden = jit(lambda: untied.hidden(tokens).hidden)()
    np.testing.assert_allclose(untied.decode(hidden), run(untied, tokens).logits, atol=1e-11)


def test_wikitext103_has_the_papers_size():
    config = TransformerConfig.wikitext103()
    params = nnx.eval_shape(lambda: nnx.split(DEQTransformer(config, rngs=nnx.Rngs(0)))[1])
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    tables = 20_000 * 700 + 20_000 * 175 + 160_000 * 43 + 67_735 * 10
    embedding = tables + 700 * (700 + 175 + 43 + 10)
    assert round(embedding / 1e6, 1) == 25.7
    # Of the softmax alone: the head's projection, the biases, and three entries for the tails.
    outside = embedding + 700**2 + config.vocab_size + 3 * 701
    # qkv, positions, output, feed-forward, injection, then biases and the norms g
    kernels = (3 + 1 + 1) * 700**2 + 2 * 700 * 48_000 + 3 * 700**2
    vectors = 2 * 700 + (700 + 48_000 + 700) + 3 * 700 + (5 * 700 + 48_000 + 700)
    assert count - outside == kernels + vectors
    assert round((count - outside) / 1e6, 1) == 71.2


@pytest.mark.parametrize("token", [11, -1, -100])
def test_a_token_outside_the_vocabulary_is_reported(token):
    out = run(build(jnp.float32), jnp.array([[1, token], [1, 2]]), solver=deq.Picard(rtol=1e-4))
    assert out.solution.stats.status.tolist() == [deq.Status.NONFINITE, deq.Status.CONVERGED]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"dim": 10, "heads": 4},
            "dim must be divisible by heads when head_dim is None, got dim=10, heads=4",
        ),
        ({"dim": 9, "heads": 3}, "dim must be even .*, got 9"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"rotary": True, "attention_dropout": 0.1}, "attention_dropout must be 0 with rotary=True"),
        ({"rotary": True, "head_dim": 3}, "head_dim must be even with rotary=True, got 3"),
        ({"flash": True}, "flash=True needs rotary=True"),
        ({"cutoffs": (12,)}, "cutoffs must be increasing and between 0 and vocab_size=11"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"mem_len": -1}, "mem_len must be at least 0, got -1"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_config_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_call_says_what_is_wrong():
    model, tokens = build(jnp.float32), sequences(3)
    with pytest.raises(TypeError, match="tokens must be an array of integer ids, got a list"):
        model([[1, 2]])
    with pytest.raises(TypeError, match="tokens must be integer ids, got dtype float32"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, time\), got \(3,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"tokens must have at least one column of time, got \(2, 0\)"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"z0 must have shape \(2, 3, 8\), got \(3, 8\)"):
        model(tokens, z0=jnp.zeros((3, 8)))


@pytest.mark.parametrize(
    "z, got",
    [
        (jnp.zeros((3, 4, 8)), r"float32\[3, 4, 8\]"),
        (jnp.zeros((2, 5, 8)), r"float32\[2, 5, 8\]"),
        (jnp.zeros((2, 4, 16)), r"float32\[2, 4, 16\]"),
        (jnp.zeros((2, 4, 8), jnp.bfloat16), r"bfloat16\[2, 4, 8\]"),
    ],
)
def test_a_history_of_another_shape_is_refused(z, got):
    model = build(jnp.float32)
    message = r"history.z must be float32\[2, 4, 8\], as of `empty_history`, got "
    with pytest.raises(ValueError, match=message + got):
        model(sequences(3), model.empty_history(2)._replace(z=z))


@pytest.mark.parametrize("field, value", [("length", jnp.int32(3)), ("injection", jnp.zeros((2, 4, 24)))])
def test_the_other_fields_of_a_history_are_checked_too(field, value):
    model = build(jnp.float32)
    with pytest.raises(ValueError, match=f"history.{field} must be "):
        model(sequences(3), model.empty_history(2)._replace(**{field: value}))


def test_a_misspelled_option_of_a_model_suggests_the_right_one():
    with pytest.raises(TypeError, match="^TransformerConfig has no option 'head'; did you mean 'heads'?"):
        TransformerConfig(27, head=2)


def test_a_config_of_a_model_goes_through_json():
    model = models.from_config(
        json.loads('{"model": "DEQTrellisNet", "vocab_size": 50, "hidden_dim": 8, "output_dim": 8, "cutoffs": [10]}'),
        rngs=nnx.Rngs(0),
    )
    again = models.from_config(json.loads(json.dumps(models.to_config(model))), rngs=nnx.Rngs(0))
    assert (
        isinstance(again, models.DEQTrellisNet)
        and again.config == model.config == models.from_config(model.config, rngs=nnx.Rngs(1)).config
    )


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"vocab_size": 3}, ValueError, r'config\["model"\] must be one of DEQTransformer, DEQTrellisNet; got None'),
        ({"model": "DEQTransformer", "vocab_size": 10, "dims": 4}, TypeError, "no option 'dims'; did you mean 'dim'"),
        (3, TypeError, "must be a TransformerConfig or TrellisNetConfig, or a mapping; got int"),
    ],
)
def test_a_config_that_describes_no_model(config, error, words):
    with pytest.raises(error, match=words):
        models.from_config(config, rngs=nnx.Rngs(0))
