"""Starting near the answer: a cache per example, a learned guess, a solver's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import deq_jax as deq
from deq_jax.nn import DEQ

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 6


def cell(z, w, x):
    return jnp.tanh(z @ w) + x


@pytest.fixture
def w(rng):
    w = jax.random.normal(rng, (DIM, DIM))
    return 0.9 * w / jnp.linalg.norm(w, 2)


# ---- FixedPointCache ---------------------------------------------------------------------------------------


def example_cache():
    return deq.FixedPointCache.create({"a": jnp.zeros(2), "b": jnp.zeros((), jnp.bfloat16)}, size=5)


def test_lookup_gives_what_was_stored_and_the_default_elsewhere():
    default = {"a": -jnp.ones((4, 2)), "b": -jnp.ones(4)}
    cache = example_cache()
    for leaf in jax.tree.leaves(cache.lookup(jnp.arange(4), default, now=0)):
        np.testing.assert_array_equal(leaf, -1)  # nothing was written yet
    z = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([1.0, 2.0, 3.0])}
    cache = cache.store(jnp.array([3, 0, 4]), z, now=7, where=jnp.array([True, False, True]))
    got = cache.lookup(jnp.array([4, 0, 3, 1]), default, now=8)
    np.testing.assert_array_equal(got["a"], [[4, 5], [-1, -1], [0, 1], [-1, -1]])
    np.testing.assert_array_equal(got["b"], [3, -1, 1, -1])
    assert got["b"].dtype == jnp.float32 and cache.z["b"].dtype == jnp.bfloat16
    assert cache.size == 5 and cache.written.tolist() == [-1, -1, -1, 7, 7]


def test_old_entries_are_stale():
    cache = deq.FixedPointCache.create(jnp.zeros(()), size=3)
    cache = cache.store(jnp.array([0]), jnp.array([5.0]), now=10).store(jnp.array([1]), jnp.array([6.0]), now=15)
    run = jax.jit(lambda now, max_age: cache.lookup(jnp.arange(3), jnp.zeros(3), now, max_age))
    np.testing.assert_array_equal(run(15, 5), [5, 6, 0])
    np.testing.assert_array_equal(run(16, 5), [0, 6, 0])
    np.testing.assert_array_equal(run(99, 5), [0, 0, 0])
    np.testing.assert_array_equal(cache.fresh(jnp.arange(3), now=99), [True, True, False])


def test_indices_outside_are_padding():
    cache = deq.FixedPointCache.create(jnp.zeros(()), size=3)
    cache = cache.store(jnp.array([-1, 3, 2]), jnp.array([1.0, 2.0, 3.0]), now=0)
    assert cache.written.tolist() == [-1, -1, 0]
    np.testing.assert_array_equal(cache.lookup(jnp.array([-1, 3, 2]), jnp.zeros(3), now=0), [0, 0, 3])


def test_no_gradient_flows_into_the_cache():
    cache = deq.FixedPointCache.create(jnp.zeros(()), size=3)
    stored = lambda z: cache.store(jnp.arange(2), z, now=0).z.sum()
    np.testing.assert_array_equal(jax.grad(stored)(jnp.ones(2)), 0)


def train_epochs(w, xs, epochs, cache):
    """Evaluations per epoch, over batches of two examples that come in another order each time."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, indices, now):
        z0 = cache.lookup(indices, jnp.zeros((2, DIM)), now, max_age=3)
        z, stats = deq.fixed_point(cell, z0, w + 1e-3 * now, xs[indices], solver=deq.Picard(), batch_ndim=1)
        return cache.store(indices, z, now, where=stats.converged), jnp.sum(stats.steps)

    spent = []
    for epoch in range(epochs):
        total = 0
        for indices in jax.random.permutation(jax.random.key(epoch), 8).reshape(4, 2):
            cache, steps = step(cache, indices, epoch)
            total += int(steps)
        spent.append(total)
    return cache, spent


def test_warm_starts_save_evaluations_and_the_cache_is_donated(w, rng):
    xs = jax.random.normal(rng, (8, DIM))
    first = deq.FixedPointCache.create(jnp.zeros(DIM), size=8)
    cache, spent = train_epochs(w, xs, 3, first)
    assert first.z.is_deleted() and first.written.is_deleted()
    assert max(spent[1:]) < 0.7 * spent[0], spent
    assert cache.written.tolist() == [2] * 8


@pytest.mark.full_compile
def test_the_cache_goes_into_a_checkpoint(tmp_path):
    z = {"a": jnp.arange(4.0).reshape(2, 2), "b": jnp.array([1.0, 2.0])}
    cache = example_cache().store(jnp.array([1, 4]), z, now=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "plain", example_cache())
    assert isinstance(restored, deq.FixedPointCache)

    from experiments.training.checkpoints import RunDirectory

    config = {"run": 1}
    with RunDirectory(tmp_path / "run", config) as run:
        run.save(1, {"cache": cache})
    with RunDirectory(tmp_path / "run", config) as run:
        wrapped, _ = run.restore({"cache": example_cache()})
    for other in (restored, wrapped["cache"]):
        assert jax.tree.structure(other) == jax.tree.structure(cache)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(cache), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "default, error, words",
    [
        (jnp.zeros((4, 2)), TypeError, "default must have the structure"),
        ({"a": jnp.zeros((4, 3)), "b": jnp.zeros(4)}, ValueError, r"default\['a'\].*\(batch, 2\), got \(4, 3\)"),
        ({"a": jnp.zeros((4, 2)), "b": jnp.zeros(())}, ValueError, r"default\['b'\].*got \(\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(default, error, words):
    with pytest.raises(error, match=words):
        example_cache().lookup(jnp.arange(4), default, now=0)
    with pytest.raises(error, match=words.replace("default", "z")):
        example_cache().store(jnp.arange(4), default, now=0)
    with pytest.raises(ValueError, match="size must be an int >= 1"):
        deq.FixedPointCache.create(jnp.zeros(2), size=0)


# ---- a learned first guess ---------------------------------------------------------------------------------


def test_first_guess_loss_is_per_element_and_pulls_on_the_guess_alone(x64):
    z_star, z0 = (
        {"a": jnp.array([1.0, 2.0]), "b": jnp.array(1j)},
        {"a": jnp.array([3.0, 2.0]), "b": jnp.array(1.0 + 0j)},
    )
    np.testing.assert_allclose(deq.first_guess_loss(z_star, z0), (4 + 2) / 3)
    real = lambda tree: tree["a"]
    at_star, at_guess = jax.grad(deq.first_guess_loss, argnums=(0, 1))(real(z_star), real(z0))
    np.testing.assert_array_equal(at_star, 0)
    np.testing.assert_allclose(at_guess, [2, 0])
    assert deq.first_guess_loss(jnp.ones(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
    mixed = deq.first_guess_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0], jnp.float16))
    assert mixed == 2 and mixed.dtype == jnp.float64


class Cell(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, kernel_init=nnx.initializers.orthogonal(0.9), rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z)) + x


def train_skip_deq(guess_weight, steps=120):
    """Evaluations on fresh data before and after, of a DEQ whose `init` is a module."""
    layer = DEQ(Cell(nnx.Rngs(0)), init=nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1)), solver=deq.Picard(rtol=1e-2))
    graphdef, params = nnx.split(layer)

    def loss(params, x):
        model = nnx.merge(graphdef, params, copy=True)
        z0 = model.init(x)
        z, stats = model(x, z0)
        return jnp.mean((z - jnp.sin(x)) ** 2) * 1e-3 + guess_weight * deq.first_guess_loss(z, z0), stats

    @jax.jit
    def step(params, key):
        x = 0.3 * jax.random.normal(key, (32, DIM))
        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
        return jax.tree.map(lambda p, g: p - 1.0 * g, params, grads), stats, grads

    _, before, grads = step(params, jax.random.key(999))
    for i in range(steps):
        params, *_ = step(params, jax.random.key(i))
    _, after, _ = step(params, jax.random.key(999))
    return before.steps.mean(), after.steps.mean(), grads


def test_a_learned_guess_cuts_evaluations():
    before, after, grads = train_skip_deq(1.0)
    assert after < 0.7 * before, (before, after)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["init"]))


def test_a_guess_learns_from_first_guess_loss_alone():
    _, _, grads = train_skip_deq(0.0, steps=0)
    for leaf in jax.tree.leaves(grads["init"]):
        np.testing.assert_array_equal(leaf, 0)
    assert jnp.any(jax.tree.leaves(grads["cell"])[0] != 0)


@pytest.mark.full_compile
def test_a_guess_may_be_a_module_in_every_mode():
    x = jnp.ones((2, DIM))
    make = lambda: DEQ(Cell(nnx.Rngs(0)), init=nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1)))
    layer = make()
    want = layer(x)
    np.testing.assert_array_equal(layer(x, layer.init(x)).value, want.value)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x).value)(layer, x), want.value, rtol=1e-6)
    if hasattr(nnx, "set_graph_mode"):
        with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
            layer = make()
            graphdef, params = nnx.split(layer)
            loss = lambda params: (lambda m: deq.first_guess_loss(m(x).value, m.init(x)))(nnx.merge(graphdef, params))
            grads = jax.jit(jax.grad(loss))(params)
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["init"]))


# ---- a solver's memory -------------------------------------------------------------------------------------


def test_broydens_memory_saves_evaluations_on_the_next_problem(w, rng):
    xs = jax.random.normal(rng, (8, DIM))
    solver = deq.Broyden(rtol=1e-5, rank=30)
    first = deq.solve(cell, 0 * xs, w, xs, solver=solver, batch_ndim=1)
    nearby = lambda **options: deq.solve(cell, first.value, w, xs + 0.05, solver=solver, batch_ndim=1, **options)
    cold, warm = nearby(), nearby(memory=first.memory)
    assert cold.stats.converged.all() and warm.stats.converged.all()
    assert warm.stats.steps.mean() < 0.7 * cold.stats.steps.mean(), (cold.stats.steps, warm.stats.steps)
    np.testing.assert_allclose(warm.value, cold.value, atol=1e-3)
