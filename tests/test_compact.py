"""Compaction: the same solutions and gradients as a batch that is carried whole, for fewer evaluations of a problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")


BATCH, DIM = 30, 6
START = {"a": np.zeros((BATCH, DIM))}
FORWARD, BACKWARD = deq.Anderson(rtol=1e-10, history=4), deq.Anderson(rtol=1e-10, history=8)


def cell(z, gain, w, x):
    return jnp.tanh(gain * (z["a"] @ w) + x)


def tree_cell(z, gain, w, x):
    return {"a": cell(z, gain, w, x)}


@pytest.fixture
def problems():
    keys = jax.random.split(jax.random.key(0), 2)
    w = jnp.linalg.qr(jax.random.normal(keys[0], (DIM, DIM), jnp.float64))[0]
    gain = jnp.linspace(0.05, 0.98, BATCH)[::-1, None]  # the hardest first: they have to be moved
    return gain, w, 0.1 * jax.random.normal(keys[1], (BATCH, DIM), jnp.float64)


def whole(z0, *args, probe=None):
    adjoint = deq.Implicit(BACKWARD)
    return deq.fixed_point(tree_cell, z0, *args, solver=FORWARD, adjoint=adjoint, batch_ndim=1, probe=probe)


def compacted(z0, *args, probe=None):
    options = dict(axes=(0, None, 0), solver=FORWARD, backward=BACKWARD, sizes=(9, 3))
    return deq.compact(tree_cell, z0, *args, probe=probe, **options)


def run(solve, args):
    """((value, stats), gradients of the args, the probe's) of a loss with cotangents of very unequal size."""
    weight = jnp.logspace(-30, 3, BATCH)[:, None]

    def loss(args, probe):
        z, stats = solve(START, *args, probe=probe)
        return (weight * z["a"] ** 2).sum(), (z["a"], stats)

    zeros = deq.Probe.zeros((BATCH,))
    (_, found), (grads, probe) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(args, zeros)
    return found, grads, probe


def test_compact_equals_the_whole_batch(problems):
    (z, stats), grads, probe = run(whole, problems)
    (z_compact, stats_compact), grads_compact, probe_compact = run(compacted, problems)
    np.testing.assert_allclose(z_compact, z, atol=1e-9)
    assert stats_compact.converged.all() and (probe_compact.status == 0).all()
    np.testing.assert_array_equal(stats_compact.steps, stats.steps)  # each problem's own
    fourth, tenth = jnp.sort(stats.steps)[jnp.array([-4, -10])]
    assert tenth < fourth < stats.steps.max()  # and it has passed through every size
    np.testing.assert_allclose(probe_compact.steps, probe.steps, atol=2)
    for got, want in zip(grads_compact, grads, strict=True):
        assert jnp.linalg.norm(want) > 0
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9 * float(jnp.abs(want).max()))


def test_a_finished_problem_is_not_evaluated():
    rows = []

    def counting(z, gain):
        jax.debug.callback(lambda: rows.append(z.shape[0]))
        return gain * z + 1

    gain = jnp.linspace(0.1, 0.97, 9)[:, None]
    solver = deq.Picard(rtol=1e-6, max_steps=1000)
    _, stats = jax.jit(lambda z: deq.compact(counting, z, gain, axes=(0,), solver=solver))(jnp.zeros((9, 1)))
    jax.effects_barrier()
    assert sorted(set(rows)) == [1, 3, 9] and len(rows) == stats.steps.max()
    assert sum(rows) < 0.6 * 9 * len(rows)


@pytest.mark.parametrize(
    "solver",
    [
        deq.Picard(rtol=1e-8, max_steps=1000, test_every=5),
        deq.Anderson(rtol=1e-8, max_steps=1000, history=2, test_every=5),
    ],
    ids=["picard", "anderson"],
)
def test_rounds_of_evaluations_go_on_in_a_smaller_batch(problems, solver):
    z, stats = jax.jit(lambda z: deq.fixed_point(tree_cell, z, *problems, solver=solver, batch_ndim=1))(START)
    options = dict(axes=(0, None, 0), solver=solver, sizes=(9, 3))
    z_compact, stats_compact = jax.jit(lambda z: deq.compact(tree_cell, z, *problems, **options))(START)
    np.testing.assert_allclose(z_compact["a"], z["a"], rtol=1e-12)
    np.testing.assert_array_equal(stats_compact.steps, stats.steps)
    assert stats.converged.all() and (stats.steps % 5 == 1).all() and len(set(stats.steps.tolist())) > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(axes=(0, None)), "one for each of 3 args"),
        (dict(axes=(0, 0, 0)), r"args\[1\] must begin with the batch of 30"),
        (dict(axes=(0, None, 0), sizes=(40,)), "sizes must decrease"),
    ],
)
def test_what_does_not_fit_is_an_error(problems, options, words):
    with pytest.raises(ValueError, match=words):
        deq.compact(tree_cell, START, *problems, **options)


def test_a_captured_tracer_is_an_error(problems):
    gain, w, x = problems

    def loss(w):
        return deq.compact(lambda z, x: jnp.tanh(0.1 * z @ w + x), 0 * x, x, axes=(0,)).value.sum()

    with pytest.raises(TypeError, match="captures a traced array"):
        jax.grad(loss)(w)
