"""The Jacobian penalty against dense Jacobians, the spectral radius against NumPy's, the bias meter by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax._arrays import aligned
from deq_jax.diagnostics import gradient_bias
from deq_jax.regularizers import jacobian_penalty
from deq_jax.stability import spectral_normalize, spectral_radius

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 4


def cell(z, params, x):
    moved = jnp.tanh(z @ params["w"])
    return moved * aligned(params["s"], moved) + jnp.sin(x * z)


@pytest.fixture
def problem(x64, rng):
    keys = jax.random.split(rng, 3)
    params = {"w": jax.random.normal(keys[0], (DIM, DIM)), "s": jnp.linspace(0.5, 1.5, DIM)}
    return params, jax.random.normal(keys[1], (3, DIM)), jax.random.normal(keys[2], (3, DIM))


# ---- jacobian_penalty --------------------------------------------------------------------------------------


def dense_penalty(z, params, x):
    """The mean over the batch of ‖J‖²_F / dim."""
    J = jax.vmap(jax.jacobian(cell), in_axes=(0, None, 0))(z, params, x)
    return jnp.mean(jnp.sum(J**2, axis=(1, 2))) / DIM


def test_penalty_and_its_gradient_equal_a_dense_jacobian_in_expectation(problem):
    params, x, z = problem
    estimate = lambda z, params, x, key: jacobian_penalty(cell, z, params, x, key=key, samples=4000)
    pull = lambda f: jax.value_and_grad(f, argnums=(1, 2))
    value, grads = jax.jit(pull(estimate))(z, params, x, jax.random.key(0))
    want, want_grads = pull(dense_penalty)(z, params, x)
    np.testing.assert_allclose(value, want, rtol=0.03)
    for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert np.linalg.norm(got - exact) < 0.06 * np.linalg.norm(exact)


def test_penalty_gradient_equals_finite_differences_for_one_sample(problem):
    params, x, z = problem
    value = lambda w: jacobian_penalty(cell, z, params | {"w": w}, x, key=jax.random.key(3))
    along = jnp.cos(jnp.arange(DIM * DIM)).reshape(DIM, DIM)
    difference = (value(params["w"] + 1e-6 * along) - value(params["w"] - 1e-6 * along)) / 2e-6
    np.testing.assert_allclose(jnp.sum(jax.grad(value)(params["w"]) * along), difference, rtol=1e-7)


@pytest.mark.full_compile
def test_penalty_sees_captured_parameters_and_holds_z_fixed(problem):
    params, x, z = problem
    by_args = jax.grad(lambda p: jacobian_penalty(cell, z, p, x, key=jax.random.key(1)))(params)
    by_capture = jax.grad(lambda p: jacobian_penalty(lambda z: cell(z, p, x), z, key=jax.random.key(1)))(params)
    for a, b in zip(jax.tree.leaves(by_args), jax.tree.leaves(by_capture), strict=True):
        np.testing.assert_array_equal(a, b)
    z_bar = jax.grad(lambda z: jacobian_penalty(cell, z, params, x, key=jax.random.key(1)))(z)
    np.testing.assert_array_equal(z_bar, 0)


def test_penalty_of_pytrees_and_low_precision(problem):
    params, x, z = problem
    halves = lambda z: {"a": z[:, :2], "b": z[:, 2:]}
    f = lambda z: halves(cell(jnp.concatenate([z["a"], z["b"]], -1), params, x))
    got = jacobian_penalty(f, halves(z), key=jax.random.key(0), samples=2000)
    np.testing.assert_allclose(got, dense_penalty(z, params, x), rtol=0.05)
    low = jacobian_penalty(lambda z: 2 * z, jnp.ones(1000, jnp.bfloat16), key=jax.random.key(0))
    assert low == 4 and low.dtype == jnp.float32
    with pytest.raises(ValueError, match="samples must be an int >= 1"):
        jacobian_penalty(f, halves(z), key=jax.random.key(0), samples=0)


def test_training_with_the_penalty_makes_the_solve_shorter(problem):
    params, x, _ = problem
    solve = lambda params: deq.fixed_point(
        lambda z, w, x: jnp.tanh(z @ w) + x, jnp.zeros_like(x), params, x, solver=deq.Picard(), batch_ndim=1
    )

    @jax.jit
    def step(w, key):
        def loss(w):
            f = lambda z, w: jnp.tanh(z @ w) + x
            return jacobian_penalty(f, solve(w).value, w, key=key)

        return w - 0.1 * jax.grad(loss)(w)

    w = 0.4 * params["w"]
    before = solve(w).stats.steps
    for i in range(30):
        w = step(w, jax.random.key(i))
    assert solve(w).stats.steps.max() / before.max() < 0.5


# ---- spectral_radius ---------------------------------------------------------------------------------------


def radii(matrices, **options):
    A = jnp.asarray(matrices)
    f = lambda z, A: jnp.einsum("nij,nj->ni", A, z)
    run = lambda A: spectral_radius(f, jnp.zeros(A.shape[:2], A.dtype), A, batch_ndim=1, **options)
    return jax.jit(run)(A)


def exact_radii(matrices):
    return np.abs(np.linalg.eigvals(matrices)).max(-1)


def families(rng):
    """By name: matrices, and the accuracy that 100 products reach."""
    gaussian = rng.normal(size=(8, 40, 40)) / 40**0.5
    symmetric = rng.normal(size=(8, 40, 40))
    spectra = np.array([np.diag(np.linspace(-0.8, 0.8, 20)) for _ in range(8)])
    for s, angle in zip(spectra, np.linspace(0.05, 3.1, 8), strict=True):
        s[:2, :2] = 0.9 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    basis = rng.normal(size=(8, 20, 20))
    return {
        "gaussian": (gaussian, 1e-2),
        "symmetric": (symmetric + symmetric.swapaxes(1, 2), 1e-3),
        "orthogonal": (0.9 * np.linalg.qr(rng.normal(size=(8, 40, 40)))[0], 1e-5),
        "complex pair, non-normal": (basis @ spectra @ np.linalg.inv(basis), 1e-3),
        "complex pair, two by two": (0.9 * np.linalg.qr(rng.normal(size=(8, 2, 2)))[0], 1e-5),
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_spectral_radius_equals_numpys(x64, dtype):
    cases = families(np.random.default_rng(0))
    pad = lambda A: np.pad(A, [(0, 0)] + [(0, 40 - A.shape[-1])] * 2)  # to one size, for one compilation
    got = radii(np.concatenate([pad(matrices) for matrices, _ in cases.values()]).astype(dtype)).reshape(-1, 8)
    assert got.dtype == dtype
    for name, row in zip(cases, got, strict=True):
        matrices, accuracy = cases[name]
        np.testing.assert_allclose(row, exact_radii(matrices), rtol=accuracy, err_msg=name)


def test_spectral_radius_of_one_by_one():
    np.testing.assert_allclose(radii(np.array([[[-0.3]], [[1.2]]], np.float32)), [0.3, 1.2], rtol=1e-6)


def test_spectral_radius_of_special_matrices():
    nilpotent, zero = jnp.diag(jnp.ones(4), 1), jnp.zeros((5, 5))
    big, small = (c * jnp.pad(jnp.array([[0.0, -1.0], [1.0, 0.0]]), (0, 3)) for c in (1e25, 1e-25))
    got = radii(jnp.stack([nilpotent, zero, big, small]))
    np.testing.assert_allclose(got, [0, 0, 1e25, 1e-25], rtol=1e-4)


def test_spectral_radius_of_a_cell_at_its_equilibrium(problem):
    params, x, _ = problem
    params = {"w": 0.4 * params["w"], "s": params["s"]}
    x = 0.1 * x
    z = deq.fixed_point(cell, jnp.ones_like(x), params, x, batch_ndim=1).value
    J = jax.vmap(jax.jacobian(cell), in_axes=(0, None, 0))(z, params, x)
    want = exact_radii(np.asarray(J))
    radius = jax.jit(spectral_radius, static_argnums=0, static_argnames="batch_ndim")
    np.testing.assert_allclose(radius(cell, z, params, x, batch_ndim=1), want, rtol=1e-6)
    alone = radius(cell, z[1], params, x[1])
    assert alone.shape == ()
    np.testing.assert_allclose(alone, want[1], rtol=1e-6)
    split = {"a": z[:, :2], "b": z[:, 2:]}
    f = lambda s: (lambda out: {"a": out[:, :2], "b": out[:, 2:]})(cell(jnp.concatenate([*s.values()], -1), params, x))
    np.testing.assert_allclose(radius(f, split, batch_ndim=1), want, rtol=1e-6)
    with pytest.raises(ValueError, match="iterations must be an int >= 2"):
        spectral_radius(cell, z, params, x, iterations=1)


def test_spectral_radius_of_a_complex_state():
    angle = jnp.array([0.3, 2.0])
    c = 0.9 * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    radius = jax.jit(lambda c: spectral_radius(lambda z: c * z, jnp.ones_like(c)))
    np.testing.assert_allclose(radius(c), 0.9, rtol=1e-5)


@pytest.mark.full_compile
def test_no_eigensolver_for_nonsymmetric_matrices_is_in_the_program():
    run = lambda A: spectral_radius(lambda z: A @ z, jnp.ones(8))
    text = jax.jit(run).lower(jnp.eye(8)).compile().as_text()
    assert "geev" not in text and "custom-call" not in text  # XLA has one for the CPU alone


# ---- spectral_normalize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 50), (3, 3, 8, 16), (1, 7), (5,)])
def test_spectral_norm_is_met_at_the_first_call(rng, shape):
    for scale, target in [(1.0, 0.9), (1e-20, 2.0)]:
        w = spectral_normalize(scale * jax.random.normal(rng, shape), target)
        assert w.shape == shape
        np.testing.assert_allclose(np.linalg.norm(np.asarray(w).reshape(-1, shape[-1]), 2), target, rtol=2e-3)


def test_spectral_normalize_of_orthogonal_zero_and_small_weights(rng):
    q = jnp.linalg.qr(jax.random.normal(rng, (30, 30)))[0]
    np.testing.assert_allclose(np.linalg.norm(spectral_normalize(3 * q, 0.9), 2), 0.9, rtol=1e-5)
    np.testing.assert_array_equal(spectral_normalize(jnp.zeros((30, 30)), 0.9), 0)
    grad = jax.jit(jax.grad(lambda w: spectral_normalize(w).sum()))
    assert jnp.all(jnp.isfinite(grad(jnp.zeros((3, 4)))))
    np.testing.assert_allclose(spectral_normalize(0.5 * q, 0.9, only_shrink=True), 0.5 * q, rtol=1e-6)
    low = spectral_normalize(q.astype(jnp.bfloat16), 0.9)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(np.asarray(low, np.float32), 2), 0.9, rtol=1e-2)


def test_spectral_normalize_has_the_derivative_of_w_over_its_norm(x64, rng):
    w, weights = jax.random.normal(rng, (6, 4)), jnp.cos(jnp.arange(24.0)).reshape(6, 4)
    got = jax.jit(jax.grad(lambda w: jnp.sum(weights * spectral_normalize(w, 0.9))))(w)
    want = jax.grad(lambda w: jnp.sum(weights * 0.9 * w / jnp.linalg.norm(w, 2)))(w)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


# ---- gradient_bias -----------------------------------------------------------------------------------------

TIGHT = deq.Picard(rtol=1e-12, max_steps=500)


def loss(params, x, *, adjoint):
    f = lambda z, w, x: jnp.tanh(z @ w) + x
    z = deq.fixed_point(f, jnp.zeros_like(x), params["w"], x, solver=TIGHT, adjoint=adjoint, batch_ndim=1).value
    return jnp.sum(z**2) * params["c"]


def test_gradient_bias_equals_the_gradients_by_hand(problem):
    params, x, _ = problem
    params = {"w": 0.3 * params["w"], "c": jnp.array(0.5)}
    exact = deq.Implicit(TIGHT)
    meter = jax.jit(functools.partial(gradient_bias, loss, inexact=deq.JFB(), exact=exact))
    grad = jax.jit(jax.grad(loss), static_argnames="adjoint")
    cheap, true = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad(params, x, adjoint=adjoint))])
        for adjoint in (deq.JFB(), exact)
    )
    bias = meter(params, x)
    np.testing.assert_allclose(bias.cosine, cheap @ true / np.linalg.norm(cheap) / np.linalg.norm(true), rtol=1e-9)
    np.testing.assert_allclose(bias.relative_error, np.linalg.norm(cheap - true) / np.linalg.norm(true), rtol=1e-9)
    np.testing.assert_allclose(bias.size, np.linalg.norm(cheap) / np.linalg.norm(true), rtol=1e-9)
    assert 0.5 < bias.cosine < 1
    close = jax.jit(functools.partial(gradient_bias, loss, inexact=deq.Neumann(60), exact=exact))(params, x)
    assert close.relative_error < 1e-6 < bias.relative_error


def test_gradient_bias_every_few_steps_of_a_training_loop(problem):
    params, x, _ = problem
    params = {"w": 0.3 * params["w"], "c": jnp.array(0.5)}
    phantom, exact = deq.Phantom(3), deq.Implicit(deq.Picard(rtol=1e-8))

    @jax.jit
    def step(params, i):
        value, grads = jax.value_and_grad(loss)(params, x, adjoint=phantom)
        measure = lambda: gradient_bias(loss, params, x, inexact=phantom, exact=exact).cosine
        cosine = jax.lax.cond(i % 4 == 0, measure, lambda: jnp.nan * value)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), cosine

    cosines = []
    for i in range(9):
        params, cosine = step(params, i)
        cosines.append(float(cosine))
    assert np.isfinite(cosines).tolist() == [i % 4 == 0 for i in range(9)]
    assert np.nanmin(cosines) > 0.9


def test_gradient_bias_of_zero_and_extreme_gradients():
    still = lambda p, *, adjoint: 0.0 * p.sum()
    bias = gradient_bias(still, jnp.ones(3), inexact=deq.JFB())
    assert (bias.cosine, bias.relative_error, bias.size) == (0, 0, 0)
    big = lambda p, *, adjoint: 1e30 * jnp.sum(p * (1 if isinstance(adjoint, deq.Implicit) else 2))
    bias = gradient_bias(big, jnp.ones(3), inexact=deq.JFB())
    np.testing.assert_allclose([*bias], [1, 1, 2], rtol=1e-6)
