"""The universality theorems of Bai, Kolter & Koltun (2019): one DEQ is as good as two, and as any feed-forward net.

Both are constructions, and both are exact: values and gradients agree to 1e-10 in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

pytestmark = pytest.mark.usefixtures("quick_compile")

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TIGHT = deq.Picard(rtol=1e-14, max_steps=300)
EXACT = dict(solver=TIGHT, adjoint=deq.Implicit(TIGHT), batch_ndim=1)


def normal(*shape, seed, scale=1.0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape)) * scale


def assert_same(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10)


# ---- Theorem 2: stacking two DEQs gives nothing that one does not have ----------------------------------------


def first(w, params, x):
    return jnp.tanh(w @ params["a"] + x @ params["b"])


def second(y, params, w):
    return jnp.sin(y @ params["c"] + w @ params["d"])


@pytest.fixture
def stacked(x64):
    params = {"a": normal(4, 4, seed=0, scale=0.2), "b": normal(3, 4, seed=1)}
    params |= {"c": normal(5, 5, seed=2, scale=0.2), "d": normal(4, 5, seed=3)}
    return params, normal(2, 3, seed=4)


def two_layers(params, x):
    w = deq.fixed_point(first, jnp.zeros((2, 4)), params, x, **EXACT).value
    return deq.fixed_point(second, jnp.zeros((2, 5)), params, w, **EXACT)


def one_layer(params, x):
    # Γ([w; y]; x) = [f(w; x); v(y; w)]
    pair = lambda z, params, x: (first(z[0], params, x), second(z[1], params, z[0]))
    solution = deq.fixed_point(pair, (jnp.zeros((2, 4)), jnp.zeros((2, 5))), params, x, **EXACT)
    return solution._replace(value=solution.value[1])


def test_two_stacked_equilibria_are_one(stacked):
    params, x = stacked
    cotangent = normal(2, 5, seed=5)

    def value_and_grad(model):
        loss = lambda params, x: (jnp.vdot(cotangent, model(params, x).value), model(params, x))
        return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    ((_, two), two_grads), ((_, one), one_grads) = value_and_grad(two_layers), value_and_grad(one_layer)
    assert one.stats.converged.all() and two.stats.converged.all()
    assert_same(one.value, two.value)
    assert_same(one_grads, two_grads)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(two_grads))


# ---- Theorem 3: every feed-forward net is a weight-tied, input-injected one -----------------------------------

WIDTHS = (3, 6, 2, 5, 4)  # of the input and of each of four layers
DEPTH = len(WIDTHS) - 1
ACTIVATIONS = (jnp.tanh, jnp.sin, jax.nn.softplus, lambda a: a)


@pytest.fixture
def network(x64):
    weights = [normal(m, n, seed=i) for i, (n, m) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))]
    return weights, [normal(m, seed=10 + i) for i, m in enumerate(WIDTHS[1:])], normal(2, WIDTHS[0], seed=20)


def plain_stack(weights, biases, x):
    for w, b, activation in zip(weights, biases, ACTIVATIONS, strict=True):
        x = activation(x @ w.T + b[None])
    return x


def tied(weights, biases):
    """W_z, W_x and b of the theorem, and σ on the concatenation of all layers' outputs."""
    ends = np.cumsum(WIDTHS[1:])
    w_z = jnp.zeros((ends[-1], ends[-1]))
    for i, w in enumerate(weights[1:], start=1):  # below the diagonal: layer i + 1 reads layer i
        w_z = w_z.at[ends[i - 1] : ends[i], ends[i - 1] - WIDTHS[i] : ends[i - 1]].set(w)
    w_x = jnp.zeros((ends[-1], WIDTHS[0])).at[: ends[0]].set(weights[0])
    return w_z, w_x, jnp.concatenate(biases)


def cell(z, w_z, w_x, b, x):
    a = jnp.split(z @ w_z.T + x @ w_x.T + b[None], np.cumsum(WIDTHS[1:-1]), axis=-1)
    return jnp.concatenate([f(part) for f, part in zip(ACTIVATIONS, a, strict=True)], axis=-1)


def as_deq(weights, biases, x, max_steps=100):
    solver = deq.Picard(rtol=0.0, atol=0.0, max_steps=max_steps)
    options = dict(solver=solver, adjoint=deq.Implicit(deq.Picard(rtol=0.0, max_steps=100)), batch_ndim=1)
    return deq.fixed_point(cell, jnp.zeros((2, sum(WIDTHS[1:]))), *tied(weights, biases), x, **options)


def test_a_feed_forward_network_is_an_equilibrium(network):
    last = slice(-WIDTHS[-1], None)
    cotangent = normal(2, WIDTHS[-1], seed=30)
    deep = lambda *args: jnp.vdot(cotangent, plain_stack(*args))
    equilibrium = lambda *args: jnp.vdot(cotangent, as_deq(*args).value[:, last])
    solution = jit(as_deq)(*network)
    assert_same(solution.value[:, last], plain_stack(*network))
    assert_same(jit(jax.grad(equilibrium, (0, 1, 2)))(*network), jit(jax.grad(deep, (0, 1, 2)))(*network))
    # With tolerances of zero it stops where nothing is left to change: after as many steps as layers, and one more on
    # versions whose product of a row with zeros beside it differs in the last bit.
    assert set(solution.stats.steps.tolist()) <= {DEPTH + 1, DEPTH + 2} and not solution.stats.residual.any()


def test_it_is_reached_in_exactly_as_many_steps_as_layers(network):
    weights, biases, x = network
    tied_weights = tied(weights, biases)
    z, ends = jnp.zeros((2, sum(WIDTHS[1:]))), np.cumsum(WIDTHS[1:])
    want = jit(as_deq)(*network).value
    for layers in range(1, DEPTH + 1):
        z = cell(z, *tied_weights, x)
        right = np.isclose(z, want, rtol=1e-12, atol=1e-12).all(axis=0)
        assert right[: ends[layers - 1]].all() and not right[ends[layers - 1] :].any()


def test_its_jacobian_is_nilpotent(network):
    weights, biases, x = network
    z = jit(as_deq)(*network).value[0]
    jacobian = jax.jacobian(lambda z: cell(z[None], *tied(weights, biases), x[:1])[0])(z)
    power = functools.reduce(jnp.matmul, [jacobian] * (DEPTH - 1))
    assert power.any() and not (power @ jacobian).any()
