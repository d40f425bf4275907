"""`error_estimate`: how far a z is from the fixed point, where a solver knows the residual alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax.diagnostics import error_estimate
from experiments.studies import error

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")

DISCOUNT = 0.999


def bellman(values):
    """The values of 30 states under the best of 4 actions with random transitions."""
    rng = np.random.default_rng(0)
    transitions = jnp.asarray(rng.dirichlet(np.full(30, 0.3), size=(4, 30)))
    rewards = jnp.asarray(rng.normal(size=(4, 30)))
    return jnp.max(rewards + DISCOUNT * jnp.einsum("ast,...t->...as", transitions, values), axis=-2)


@pytest.mark.parametrize(
    "solver", [deq.Anderson(rtol=1e-4), deq.Picard(rtol=1e-4, max_steps=20_000)], ids=["anderson", "picard"]
)
def test_an_error_that_a_small_residual_hides(solver):
    z, stats = deq.fixed_point(bellman, jnp.zeros(30), solver=solver, estimate_error=True)
    exact = deq.solve(bellman, z, solver=deq.NewtonKrylov(rtol=1e-12, max_steps=500)).value
    error = np.linalg.norm(exact - z)
    assert stats.converged and error > 3e-3 * np.linalg.norm(exact)  # at rtol 1e-4
    assert 0.5 < stats.error / error < 2
    np.testing.assert_array_equal(stats.error, error_estimate(bellman, z).error)


def cell(z, x):
    a = 0.6 * jnp.conj(z["a"]) * jax.lax.complex(jnp.cos(x), jnp.sin(x)) + jax.lax.complex(x, x)
    return {"a": a, "b": 0.9 * jnp.cos(z["b"] + a.real), "n": z["n"] + 1}


def start(x):
    return {"a": jax.lax.complex(0 * x, 0 * x), "b": 0 * x, "n": jnp.zeros(x.shape[:1], int)}


def test_each_problem_has_the_estimate_that_it_has_alone():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))
    z, stats = deq.fixed_point(cell, start(x), x, batch_ndim=1, estimate_error=True)
    exact = deq.solve(cell, z, x, batch_ndim=1, solver=deq.Anderson(rtol=1e-13)).value
    error = np.sqrt(sum(np.linalg.norm(exact[k] - z[k], axis=1) ** 2 for k in "ab"))
    np.testing.assert_allclose(stats.error, error, rtol=0.2)
    for i in range(5):
        alone = error_estimate(cell, jax.tree.map(lambda leaf: leaf[i : i + 1], z), x[i : i + 1], batch_ndim=1)
        np.testing.assert_allclose(stats.error[i], alone.error[0], rtol=1e-5)
    over_vmap = jax.vmap(lambda z, x: error_estimate(cell, z, x).error)(z, x)
    np.testing.assert_allclose(over_vmap, stats.error, rtol=1e-5)


@pytest.mark.parametrize("adjoint", [deq.Implicit(), deq.ImplicitJVP(), deq.Unroll(), deq.Reversible()], ids=repr)
def test_a_gradient_does_not_see_the_estimate(adjoint):
    def loss(w, estimate_error):
        solver = deq.Picard(max_steps=41)
        z, stats = deq.fixed_point(
            lambda z: jnp.cos(w * z), jnp.zeros(3), solver=solver, adjoint=adjoint, estimate_error=estimate_error
        )
        return jnp.sum(z**2) + (jnp.sum(stats.error) if estimate_error else 0)

    with_it, without = jax.grad(loss)(0.7, True), jax.grad(loss)(0.7, False)
    np.testing.assert_array_equal(with_it, without)
    assert abs(without) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_states_of_low_precision(dtype):
    f = lambda z: (jnp.asarray(0.95, dtype) * jnp.cos(z)).astype(dtype)
    z = jnp.full((3,), 0.5, dtype)
    exact = deq.fixed_point(lambda z: 0.95 * jnp.cos(z), jnp.zeros(3, jnp.float64)).value
    np.testing.assert_allclose(error_estimate(f, z).error, np.linalg.norm(exact - 0.5), rtol=0.1)


def test_where_there_is_nothing_to_estimate():
    at_root = error_estimate(lambda z: 0.5 * z, jnp.zeros(3))
    assert at_root.error == 0 and at_root.relative_error == 0
    assert error_estimate(lambda z: jnp.sqrt(z - 1), jnp.zeros(3)).error == jnp.inf
    slow = error_estimate(lambda z: jnp.linspace(0, 0.9999, 50) * z + 1, jnp.zeros(50), products=3)
    assert slow.residual > 0.1  # which says that the estimate may be too small


def test_a_problem_that_is_split_over_devices():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 16)))
    whole = lambda z, x: 0.9 * jnp.cos(z + jnp.sum(z, axis=1, keepdims=True) / 16 + x)
    piece = lambda z, x: 0.9 * jnp.cos(z + jax.lax.psum(jnp.sum(z, axis=1, keepdims=True), "model") / 16 + x)
    options = dict(solver=deq.Anderson(rtol=1e-4), batch_ndim=1, estimate_error=True)
    run = lambda x: deq.solve(piece, 0 * x, x, axis_name="model", **options).stats.error
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(run, mesh=mesh, in_specs=P(None, "model"), out_specs=P())(x)
    alone = deq.solve(whole, 0 * x, x, **options).stats.error
    np.testing.assert_allclose(split, alone, rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="products must be an int >= 1, got 0"):
        error_estimate(jnp.cos, jnp.zeros(3), products=0)
    with pytest.raises(ValueError, match="shape of z0"):
        error_estimate(lambda z: z[:1], jnp.zeros(3))


@pytest.mark.usefixtures("promotes")  # last, because it lasts to the end of the module
def test_estimates_over_the_random_cells():
    rows = error.rows_of("Broyden", *error.cells(seeds=1), products=(16,))
    within = {row[2]: float(row[3].split()[0]) for row in rows}
    assert within["16 products"] >= 95 > within["the residual"]
