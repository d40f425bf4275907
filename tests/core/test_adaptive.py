"""The adaptive embedding and softmax against sums over words, one at a time, and against a plain softmax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.models import AdaptiveVocabulary, adaptive

pytestmark = pytest.mark.usefixtures("quick_compile")

VOCAB, DIM, CUTOFFS = 23, 8, (6, 13)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rngs():
    return nnx.Rngs(params=jax.random.key(1, impl="unsafe_rbg"))  # half the compilation of threefry


@functools.cache
def build(**options):
    defaults = dict(cutoffs=CUTOFFS, div_val=2, draw=nnx.initializers.normal(1.0), param_dtype=jnp.float64)
    words = AdaptiveVocabulary(VOCAB, DIM, **(defaults | options), rngs=rngs())
    graphdef, params = nnx.split(words)
    rng = np.random.default_rng(0)  # biases begin at zero: others are more of a test
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), p.dtype), params))


def states(*shape, seed=2):
    return jnp.array(np.random.default_rng(seed).normal(size=(*shape, DIM)))


def reference_row(weights, token):
    for table, projection in zip(weights.tables, weights.projections, strict=True):
        if token < len(table):
            return np.asarray(table[token]) @ (np.eye(DIM) if projection is None else np.asarray(projection))
        token -= len(table)
    raise AssertionError


def reference_log_p(h, weights):
    """log p of every word: each cluster is a softmax of its own, and the head has one entry for each tail."""
    scores = []
    for i, (table, projection, bias) in enumerate(zip(*weights[:3], strict=True)):
        table, bias = np.asarray(table), np.asarray(bias)
        if i == 0 and weights.tails is not None:
            table = np.concatenate([table, weights.tails])
            bias = np.concatenate([bias, weights.tail_biases])
        s = table @ (h if projection is None else np.asarray(projection) @ h) + bias
        scores.append(s - np.log(np.exp(s).sum()))
    words = len(weights.tables[0])
    rest = [scores[0][words + i] + tail for i, tail in enumerate(scores[1:])]
    return np.concatenate([scores[0][:words], *rest])


@pytest.mark.parametrize("options", [{}, {"div_val": 1}, {"tie": False}, {"cutoffs": (), "div_val": 1}], ids=str)
def test_rows_and_probabilities_are_those_of_the_definition(x64, options):
    words, h = build(**options), states(3)
    rows = jit(lambda: words.embed(jnp.arange(VOCAB), jnp.float64))()
    want = np.array([reference_row(words.embedding, t) for t in range(VOCAB)])
    np.testing.assert_allclose(rows, want, rtol=1e-13)
    log_p = jax.nn.log_softmax(jit(lambda: words.logits(h))())
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-13)
    # Of scores of some tens: a log p near zero is a difference of two of them.
    want = [reference_log_p(np.asarray(row), words.softmax) for row in h]
    np.testing.assert_allclose(log_p, want, rtol=1e-12, atol=1e-13)
    if words.softmax.tails is not None:  # the logits are log p themselves
        np.testing.assert_allclose(words.logits(h), log_p, rtol=1e-12)


def test_it_is_a_plain_softmax_whose_tail_scores_are_normalized(x64):
    """p is softmax(s) over the whole vocabulary, where a tail's scores are shifted to sum to its entry in the head."""
    words, h = build(), states(4)
    w = words.softmax
    project = lambda i: np.asarray(h) @ np.asarray(w.projections[i]).T
    scores = [project(i) @ np.asarray(w.tables[i]).T + np.asarray(w.biases[i]) for i in range(3)]
    entry = project(0) @ np.asarray(w.tails).T + np.asarray(w.tail_biases)
    for i in (1, 2):
        scores[i] += (entry[:, i - 1] - np.log(np.exp(scores[i]).sum(axis=1)))[:, None]
    plain = adaptive.SoftmaxWeights((jnp.eye(VOCAB),), (None,), (jnp.zeros(VOCAB),))
    targets = jnp.array([0, 5, 12, 22])
    want = adaptive.nll(jnp.array(np.concatenate(scores, axis=1)), targets, plain)
    np.testing.assert_allclose(words.nll(h, targets), want, rtol=1e-12)


@pytest.mark.parametrize("block", [None, 5, 100])
def test_nll_and_its_gradient_are_those_of_all_logits(x64, block):
    words, h = build(tie=False), states(3, 6)
    # Sorted, blocks of five hold the head alone, two clusters, and the last tail alone.
    targets = jnp.array(np.random.default_rng(3).permutation(np.r_[np.zeros(6), 3, 5, 6, 7, 12, np.full(7, 20)]))
    targets = targets.astype(jnp.int32).reshape(3, 6)
    graphdef, params = nnx.split(words)
    weight = jnp.arange(18.0).reshape(3, 6)

    def all_logits(params, h):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params).logits(h))
        return -jnp.vdot(weight, jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])

    def loss(params, h):
        return jnp.vdot(weight, adaptive.nll(h, targets, nnx.merge(graphdef, params).softmax, block=block))

    got, want = (jit(jax.value_and_grad(f, (0, 1)))(params, h) for f in (loss, all_logits))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12)


def test_nll_under_vmap_and_scan(x64):
    words, h, targets = build(), states(4, 7), jnp.arange(28).reshape(4, 7) % VOCAB
    one = lambda h, targets: adaptive.nll(h, targets, words.softmax, block=3)
    want = adaptive.nll(h, targets, words.softmax)
    np.testing.assert_allclose(jit(jax.vmap(one))(h, targets), want, rtol=1e-12)
    scanned = jit(lambda: jax.lax.scan(lambda _, x: (None, one(*x)), None, (h, targets))[1])()
    np.testing.assert_allclose(scanned, want, rtol=1e-12)


def test_an_id_outside_the_vocabulary_is_nan_and_spoils_no_gradient(x64):
    words, h = build(), states(4)
    ids = jnp.array([2, VOCAB, -1, 22])
    assert np.isnan(words.embed(ids, jnp.float64)).any(axis=1).tolist() == [False, True, True, False]
    loss = lambda h: adaptive.nll(h, ids, words.softmax, block=3)
    assert np.isnan(loss(h)).tolist() == [False, True, True, False]
    grads = jax.grad(lambda h: jnp.nansum(loss(h)))(h)
    assert np.isfinite(grads).all() and not grads[1:3].any() and grads[0].any() and grads[3].any()


@pytest.mark.full_compile
def test_memory_of_the_loss_does_not_grow_with_the_tokens():
    words = AdaptiveVocabulary(4000, 16, cutoffs=(500,), div_val=2, rngs=rngs())
    graphdef, params = nnx.split(words)

    def temporaries(tokens, block):
        loss = lambda p, h, t: adaptive.nll(h, t, nnx.merge(graphdef, p).softmax, block=block).sum()
        shapes = jax.ShapeDtypeStruct((tokens, 16), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
        compiled = jit(jax.grad(loss)).lower(params, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # What grows is h, its order and the losses: 18 numbers a token, where the logits would be 4001.
    growth = (temporaries(4096, 64) - temporaries(1024, 64)) / 3072
    assert growth < 6 * 18 * 4
    assert temporaries(1024, 1024) > 1024 * 3500 * 4


@pytest.mark.full_compile
def test_bfloat16_states_have_float32_losses():
    words = build(param_dtype=jnp.float32)
    h, targets = states(5).astype(jnp.bfloat16), jnp.arange(5) * 4
    assert words.nll(h, targets).dtype == words.logits(h).dtype == jnp.float32
    assert words.embed(targets, jnp.bfloat16).dtype == jnp.bfloat16
    exact = words.nll(h.astype(jnp.float32), targets)
    np.testing.assert_array_equal(words.nll(h, targets), exact)


@pytest.mark.parametrize("tie, own", [(True, DIM * DIM), (False, DIM * (8 + 4 + 2) + 6 * 8 + 7 * 4 + 10 * 2)])
def test_tables_and_the_tails_projections_are_shared(tie, own):
    words = build(tie=tie, param_dtype=jnp.float32)
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.split(words)[1]))
    embedding = 6 * 8 + 7 * 4 + 10 * 2 + DIM * (8 + 4 + 2)
    assert count == embedding + own + VOCAB + 2 * (DIM + 1)


def test_clusters_begin_with_the_same_spread():
    words = AdaptiveVocabulary(3000, 64, cutoffs=(1000, 2000), div_val=4, rngs=rngs())
    rows = words.embed(jnp.arange(3000), jnp.float32).reshape(3, -1)
    np.testing.assert_allclose(rows.std(axis=1), 0.05, rtol=0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cutoffs": (13, 6)}, r"cutoffs must be increasing and between 0 and vocab_size=23, got \(13, 6\)"),
        ({"cutoffs": (23,)}, "cutoffs must be increasing"),
        ({"cutoffs": (0,)}, "cutoffs must be increasing"),
        ({"div_val": 0}, "div_val must be at least 1, got 0"),
        ({"div_val": 3}, "div_val=3 leaves no width for cluster 2 of dim=8"),
    ],
)
def test_clusters_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveVocabulary(VOCAB, DIM, **({"cutoffs": CUTOFFS, "div_val": 1} | options), rngs=rngs())
