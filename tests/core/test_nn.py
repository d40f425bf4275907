"""deq_jax.nn.DEQ: gradients, state that stands still during a solve, transforms, other frameworks' cells."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import deq_jax as deq
from deq_jax.nn import DEQ

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 6
TIGHT = {"solver": deq.Anderson(rtol=1e-6), "adjoint": deq.Implicit(deq.Anderson(rtol=1e-6))}


class Cell(nnx.Module):
    def __init__(self, rngs, dim=DIM):
        self.linear = nnx.Linear(dim, dim, kernel_init=nnx.initializers.normal(0.2), rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z) + x)


class StatefulCell(nnx.Module):
    """Dropout and batch norm inside the cell, and a record of how often it really advanced."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, kernel_init=nnx.initializers.normal(0.2), rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(0.3 * self.norm(self.dropout(self.linear(z))) + x)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (4, DIM))


def unrolled(layer, x, steps=60):
    z = jnp.zeros_like(x)
    for _ in range(steps):
        z = layer.cell(z, x)
    return z


def loss_and_grad(layer, x, apply):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return (apply(model, x) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


def test_value_and_gradient_equal_a_long_unroll(x):
    layer = DEQ(Cell(nnx.Rngs(0)), **TIGHT)
    got = loss_and_grad(layer, x, lambda model, x: model(x).value)
    want = loss_and_grad(layer, x, unrolled)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nnx_transforms(x):
    layer = DEQ(Cell(nnx.Rngs(0)), **TIGHT)
    plain = layer(x).value
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x).value)(layer, x), plain, atol=1e-6)
    _, state = nnx.split(layer)
    np.testing.assert_allclose(copy.deepcopy(layer)(x).value, plain, atol=1e-6)
    grads = nnx.grad(lambda m: (m(x).value ** 2).sum())(layer)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(layer, nnx.Param))
    remat = nnx.remat(lambda m, x: m(x).value)
    np.testing.assert_allclose(remat(layer, x), plain, atol=1e-6)

    @nnx.vmap(in_axes=0, out_axes=0)
    def ensemble(rngs):
        return DEQ(Cell(rngs), **TIGHT)

    members = ensemble(nnx.Rngs(0).fork(split=2) if hasattr(nnx.Rngs, "fork") else nnx.Rngs(0))
    values = nnx.vmap(lambda m, x: m(x).value, in_axes=(0, None))(members, x)
    assert values.shape == (2, 4, DIM)
    assert not np.allclose(values[0], values[1])


@pytest.mark.full_compile
def test_dropout_mask_is_fixed_in_a_solve_and_changes_between_steps(x):
    layer = DEQ(StatefulCell(nnx.Rngs(0)), solver=deq.Picard(rtol=1e-5, max_steps=200))
    first, second = layer(x), layer(x)
    assert first.stats.converged.all()  # a mask drawn anew at each evaluation never converges
    assert not np.allclose(first.value, second.value, atol=1e-3)
    layer.eval()
    np.testing.assert_array_equal(layer(x).value, layer(x).value)


def test_state_advances_once_per_call(x):
    layer = DEQ(StatefulCell(nnx.Rngs(0)))
    before = layer.cell.norm.mean[...] if hasattr(layer.cell.norm.mean, "__getitem__") else layer.cell.norm.mean.value
    z = layer(x).value
    # momentum 0.9: the running mean moves a tenth of the way to the batch mean, once.
    count = int(layer.cell.dropout.rngs.count[...])
    assert count == 1
    reference = nnx.clone(layer)
    reference.cell.norm.mean[...] = before
    reference.cell.dropout.rngs.count[...] = jnp.zeros_like(reference.cell.dropout.rngs.count[...])
    reference.cell(z, x)
    np.testing.assert_allclose(layer.cell.norm.mean[...], reference.cell.norm.mean[...], atol=1e-6)
    assert not np.allclose(layer.cell.norm.mean[...], before)


def test_stateful_cell_trains_under_plain_jit(x):
    graphdef, params, rest = nnx.split(DEQ(StatefulCell(nnx.Rngs(0))), nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            value = (model(x).value ** 2).mean()
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest_new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), rest_new

    losses = []
    for _ in range(20):
        value, params, rest = step(params, rest, x)
        losses.append(float(value))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert step._cache_size() == 1


def test_warm_start_takes_one_evaluation(x):
    layer = DEQ(Cell(nnx.Rngs(0)))
    cold = layer(x)
    warm = layer(x, z0=cold.value)
    assert (warm.stats.steps == 1).all() and (cold.stats.steps > 1).all()


def test_init_shapes_a_state_unlike_x():
    layer = DEQ(
        lambda z, x: {"h": jnp.tanh(0.3 * z["h"] + x.sum(-1, keepdims=True)), "c": 0.5 * z["c"] + z["h"].mean()},
        init=lambda x: {"h": jnp.zeros((x.shape[0], 3)), "c": jnp.zeros((x.shape[0], 2, 2))},
    )
    solution = layer(jnp.ones((4, DIM)))
    assert solution.value["c"].shape == (4, 2, 2) and solution.stats.converged.all()


def test_same_layer_twice_and_probe(x):
    layer = DEQ(Cell(nnx.Rngs(0)), **TIGHT)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, probe):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return (model(model(x).value, probe=probe).value ** 2).sum()

    _, probe = jax.grad(loss, argnums=(0, 1))(params, deq.Probe.zeros((4,)))
    assert (probe.status == deq.Status.CONVERGED).all() and (probe.steps > 1).all()


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this flax has no tree mode")
def test_tree_mode(x):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        layer = DEQ(Cell(nnx.Rngs(0)), **TIGHT)
        got = loss_and_grad(layer, x, lambda model, x: model(x).value)
    want = loss_and_grad(DEQ(Cell(nnx.Rngs(0)), **TIGHT), x, unrolled)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_changed_in_place_are_seen(x):
    layer = DEQ(Cell(nnx.Rngs(0)))
    before = layer(x).value
    layer.cell.linear.bias[...] = jnp.ones(DIM)
    assert not np.allclose(layer(x).value, before)


def test_linen_recipe(x):
    class LinenCell(linen.Module):
        @linen.compact
        def __call__(self, z, x):
            return jnp.tanh(linen.Dense(DIM, kernel_init=linen.initializers.normal(0.2))(z) + x)

    cell = LinenCell()
    variables = cell.init(jax.random.key(0), x, x)

    def value(variables):
        return deq.fixed_point(lambda z: cell.apply(variables, z, x), jnp.zeros_like(x), batch_ndim=1, **TIGHT).value

    def by_unroll(variables):
        z = jnp.zeros_like(x)
        for _ in range(60):
            z = cell.apply(variables, z, x)
        return z

    got, want = (jax.grad(lambda v, f=f: (f(v) ** 2).sum())(variables) for f in (value, by_unroll))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_equinox_recipe(x):
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(DIM, DIM, key=jax.random.key(0))
    linear = eqx.tree_at(lambda m: m.weight, linear, 0.4 * linear.weight)

    def value(linear):
        cell = lambda z: jnp.tanh(jax.vmap(linear)(z) + x)
        return deq.fixed_point(cell, jnp.zeros_like(x), batch_ndim=1, **TIGHT).value

    def by_unroll(linear):
        z = jnp.zeros_like(x)
        for _ in range(60):
            z = jnp.tanh(jax.vmap(linear)(z) + x)
        return z

    got, want = (eqx.filter_grad(lambda m, f=f: (f(m) ** 2).sum())(linear) for f in (value, by_unroll))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_may_count_its_evaluations_and_draw_noise():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, z, x):
            key, now = jax.vmap(jax.random.split, out_axes=1)(z["key"])
            noise = jax.vmap(lambda key: jax.random.normal(key, (3,), jnp.float32))(now)
            h = jnp.tanh(0.1 * self.linear(z["h"]) + x + 1e-6 * noise)
            return {"h": h, "key": key, "count": z["count"] + 1}

    layer, x = DEQ(Noisy(nnx.Rngs(0))), jnp.outer(jnp.array([0.1, 1.0]), jnp.ones(3))
    z0 = {"h": jnp.zeros((2, 3)), "key": jax.random.split(jax.random.key(1), 2), "count": jnp.zeros(2, jnp.int32)}

    @nnx.jit
    def step(layer, x):
        loss = lambda layer: (lambda z, stats: (jnp.sum(z["h"]), (z, stats)))(*layer(x, z0))
        return nnx.grad(loss, has_aux=True)(layer)

    grads, (z, stats) = step(layer, x)
    assert stats.converged.all() and jnp.all(z["count"] == stats.steps) and stats.steps.min() > 2
    assert jnp.all(jax.random.key_data(z["key"]) != jax.random.key_data(z0["key"]))
    assert jnp.any(grads.cell.linear.kernel[...] != 0)
