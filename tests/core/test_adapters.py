"""Other people's solvers with our derivative, and the other way round."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deq_jax as deq
from deq_jax.adapters import Optax, as_optimizer, implicit, scipy_root

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 4
TIGHT = deq.Picard(rtol=1e-12, max_steps=300)


def cell(z, w, x):
    return jnp.tanh(w @ z) + x


@pytest.fixture
def problem(x64, rng):
    w = jax.random.normal(rng, (DIM, DIM))
    return 0.8 * w / jnp.linalg.norm(w, 2), jax.random.normal(jax.random.fold_in(rng, 1), (DIM,))


@jax.jit
def dense_gradient(w, x):
    """Of the sum of squares of z*."""
    z = jax.lax.fori_loop(0, 300, lambda _, z: cell(z, w, x), x)
    u = jnp.linalg.solve(jnp.eye(DIM) - jax.jacobian(cell)(z, w, x).T, 2 * z)
    return jax.vjp(lambda w, x: cell(z, w, x), w, x)[1](u)


def assert_close(got, want, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# ---- implicit ----------------------------------------------------------------------------------------------


@implicit(cell, adjoint=deq.Implicit(TIGHT))
def undifferentiable(z0, w, x, *, tol=1e-12):
    """A while loop of one's own, which reverse mode refuses."""
    change = lambda z: jnp.linalg.norm(cell(z, w, x) - z)
    return jax.lax.while_loop(lambda z: change(z) > tol, lambda z: cell(z, w, x), z0)


def test_any_solver_gets_the_implicit_derivative(problem):
    loss = lambda w, x: jnp.sum(undifferentiable(jnp.zeros(DIM), w, x) ** 2)
    for transform in (lambda f: f, jax.jit):
        assert_close(jax.grad(transform(loss), argnums=(0, 1))(*problem), dense_gradient(*problem))
    assert undifferentiable.__doc__.startswith("A while loop") and undifferentiable.__name__ == "undifferentiable"
    loose = undifferentiable(jnp.zeros(DIM), *problem, tol=1e-1)  # options reach the solver
    assert jnp.linalg.norm(cell(loose, *problem) - loose) > 1e-3


def test_any_solver_in_forward_mode_and_vmap(problem):
    w, x = problem
    forward = implicit(cell, adjoint=deq.ImplicitJVP(TIGHT))(lambda z0, w, x: undifferentiable(z0, w, x))
    loss = lambda w, x: jnp.sum(forward(jnp.zeros(DIM), w, x) ** 2)
    assert_close(jax.jit(jax.jacfwd(loss, argnums=(0, 1)))(w, x), dense_gradient(w, x))
    xs = jnp.stack([x, -2 * x])
    loss = lambda w, x: jnp.sum(undifferentiable(jnp.zeros(DIM), w, x) ** 2)
    got = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0)))(w, xs)
    want = [dense_gradient(w, x) for x in xs]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want))


def test_a_root_as_jaxopts_custom_root_has_it(x64):
    # Ridge regression's optimality F(z) = Xᵀ(X z − y) + θ z = 0, solved directly.
    X, y = jnp.cos(jnp.arange(15.0)).reshape(5, 3), jnp.arange(5.0)
    F = lambda z, theta: X.T @ (X @ z - y) + theta * z

    @implicit(lambda z, theta: z - F(z, theta), adjoint=deq.Implicit(deq.Anderson(rtol=1e-12, history=4)))
    def ridge(z0, theta):
        return jnp.linalg.solve(X.T @ X + theta * jnp.eye(3), X.T @ y)

    direct = lambda theta: jnp.linalg.solve(X.T @ X + theta * jnp.eye(3), X.T @ y)
    got, want = (jax.jit(jax.jacrev(f))(2.0) for f in (lambda theta: ridge(None, theta), direct))
    assert_close(got, want)


def test_aux_has_no_gradient_and_z0_neither(problem):
    @implicit(cell, has_aux=True)
    def run(z0, w, x):
        z = jax.lax.fori_loop(0, 100, lambda _, z: cell(z, w, x), z0)
        return z, {"norm": jnp.linalg.norm(z)}

    w, x = problem
    z, aux = run(jnp.zeros(DIM), w, x)
    np.testing.assert_allclose(aux["norm"], jnp.linalg.norm(z))
    np.testing.assert_array_equal(jax.grad(lambda x: run(jnp.zeros(DIM), w, x)[1]["norm"])(x), 0)
    np.testing.assert_array_equal(jax.grad(lambda z0: run(z0, w, x)[0].sum())(x), 0)


# ---- options of implicit -----------------------------------------------------------------------------------


def scaled(z, a, gain=0.5):
    return gain * jnp.cos(a * z)


def solves(f, **options):
    """A run with an option of f's (gain), and options of its own: a number, a string and a function."""

    @implicit(f, adjoint=deq.Implicit(deq.Picard(rtol=1e-12, max_steps=500)), **options)
    def run(z0, a, gain=0.5, *, tol=1e-12, mode="loop", note=None):
        assert mode in ("loop", "for")  # a string, as it was passed
        if note is not None:
            note(mode)
        if mode == "for":
            return jax.lax.fori_loop(0, 200, lambda _, z: gain * jnp.cos(a * z), z0)
        apart = lambda z: jnp.max(jnp.abs(gain * jnp.cos(a * z) - z)) > tol
        return jax.lax.while_loop(apart, lambda z: gain * jnp.cos(a * z), z0)

    return run


def slopes(a, gain):
    """dz/da and dz/dgain of z = gain · cos(a z)."""
    z = 0.0
    for _ in range(300):
        z = gain * np.cos(a * z)
    # dz (1 + gain·a·sin(a z)) = −gain·z·sin(a z) da + cos(a z) dgain
    inner = 1 + gain * a * np.sin(a * z)
    return -gain * z * np.sin(a * z) / inner, np.cos(a * z) / inner


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_options_of_f_reach_f_and_are_differentiable(x64, wrap):
    run = solves(scaled)
    want = slopes(1.0, 0.9)
    assert abs(want[0] + 0.253) < 1e-3
    by_name = wrap(jax.grad(lambda a, gain: run(0.0, a, gain=gain), argnums=(0, 1)))(1.0, 0.9)
    np.testing.assert_allclose(by_name, want, rtol=1e-9)
    by_place = wrap(jax.grad(lambda a, gain: run(0.0, a, gain), argnums=(0, 1)))(1.0, 0.9)
    np.testing.assert_allclose(by_place, want, rtol=1e-9)
    a_too = wrap(jax.grad(lambda a, gain: run(0.0, gain=gain, a=a), argnums=(0, 1)))(1.0, 0.9)
    np.testing.assert_allclose(a_too, want, rtol=1e-9)
    np.testing.assert_allclose(wrap(jax.grad(lambda a: run(0.0, a, gain=0.9)))(1.0), want[0], rtol=1e-9)
    np.testing.assert_allclose(wrap(jax.grad(lambda a: run(0.0, a)))(1.0), slopes(1.0, 0.5)[0], rtol=1e-9)


def test_options_of_f_are_mapped(x64):
    gains = jnp.array([0.3, 0.9])
    got = jax.jit(jax.vmap(jax.grad(lambda gain: solves(scaled)(0.0, 1.0, gain=gain))))(gains)
    np.testing.assert_allclose(got, [slopes(1.0, float(gain))[1] for gain in gains], rtol=1e-9)


def test_options_of_run_alone_stay_with_run(x64):
    noted = []
    run = solves(scaled)
    slope = jax.grad(lambda a: run(0.0, a, gain=0.9, mode="for", note=noted.append))(1.0)
    np.testing.assert_allclose(slope, slopes(1.0, 0.9)[0], rtol=1e-9)
    assert noted == ["for"]
    loose = jax.grad(lambda tol: run(0.0, 1.0, tol=tol))(0.1)  # an array by now, and the loop is not differentiated
    assert loose == 0


def test_an_f_of_keywords_gets_all_of_them(x64):
    seen = {}

    def f(z, a, **options):
        seen.update(options)
        return scaled(z, a, options["gain"])

    slope = jax.grad(lambda a: solves(f)(0.0, a, gain=0.9, mode="for"))(1.0)
    np.testing.assert_allclose(slope, slopes(1.0, 0.9)[0], rtol=1e-9)
    assert seen["mode"] == "for"


def test_a_default_of_run_is_what_was_solved_for(x64):
    @implicit(scaled, adjoint=deq.Implicit(TIGHT))  # f's own default is 0.5
    def run(z0, a, gain=0.9):
        return jax.lax.fori_loop(0, 300, lambda _, z: scaled(z, a, gain), z0)

    np.testing.assert_allclose(jax.grad(run, argnums=1)(0.0, 1.0), slopes(1.0, 0.9)[0], rtol=1e-9)


def test_a_keyword_that_run_does_not_take_is_named():
    run = implicit(scaled)(lambda z0, a: z0)
    with pytest.raises(TypeError, match="takes no keyword 'gain' .*another f"):
        run(0.0, 1.0, gain=0.9)
    with pytest.raises(TypeError, match="takes no keyword 'gian' .*nor does f"):
        run(0.0, 1.0, gian=0.9)


# ---- how the backward solve ended --------------------------------------------------------------------------


def test_a_probe_says_how_the_backward_solve_ended(problem):
    w, x = problem

    def pull(backward, has_aux=False, jit=lambda f: f):
        run = implicit(cell, adjoint=deq.Implicit(backward), has_aux=has_aux)(
            lambda z0, w, x: (undifferentiable(z0, w, x), 1.0) if has_aux else undifferentiable(z0, w, x)
        )
        first = lambda out: out[0] if has_aux else out
        loss = lambda x, probe: jnp.sum(first(run(jnp.zeros(DIM), w, x, probe=probe)) ** 2)
        return jit(jax.grad(loss, argnums=(0, 1)))(x, deq.Probe.zeros())

    for options in ({}, {"has_aux": True}, {"jit": jax.jit}):
        x_bar, good = pull(TIGHT, **options)
        assert good.status == deq.Status.CONVERGED and 0 < good.residual <= 1e-12 and good.steps > 5
        assert_close(x_bar, dense_gradient(w, x)[1])
    _, bad = pull(deq.Picard(rtol=1e-12, max_steps=3))
    assert bad.status == deq.Status.MAX_STEPS and bad.steps == 3 and bad.residual > 1e-6


def test_a_probe_for_each_problem_of_a_batch(problem):
    w, x = problem
    f = lambda z, x: jnp.tanh(z @ w.T) + x
    run = implicit(f, adjoint=deq.Implicit(TIGHT), batch_ndim=1)(
        lambda z0, x: jax.lax.fori_loop(0, 300, lambda _, z: f(z, x), z0)
    )
    xs = jnp.stack([x, 3 * x, 0 * x])
    loss = lambda probe: jnp.sum(run(0 * xs, xs, probe=probe) ** 2)
    probe = jax.jit(jax.grad(loss))(deq.Probe.zeros((3,)))
    assert probe.steps.shape == (3,) and len(set(probe.steps.tolist())) > 1 and (probe.status == 0).all()
    with pytest.raises(ValueError, match=r"probe must be Probe.zeros\(\(3,\)\)"):
        loss(deq.Probe.zeros())


def test_scipy_takes_a_probe(problem):
    w, x = problem
    for max_steps, status in ((300, deq.Status.CONVERGED), (3, deq.Status.MAX_STEPS)):
        adjoint = deq.Implicit(deq.Picard(rtol=1e-10, max_steps=max_steps))
        loss = lambda probe, adjoint=adjoint: scipy_root(cell, 0 * x, w, x, adjoint=adjoint, probe=probe).value.sum()
        assert jax.grad(loss)(deq.Probe.zeros()).status == status


def test_the_name_probe_is_taken():
    with pytest.raises(TypeError, match="run has a parameter called probe"):
        implicit(scaled)(lambda z0, a, *, probe=3: z0)
    with pytest.raises(TypeError, match="f has a parameter called probe"):
        implicit(lambda z, probe: z)(lambda z0, a: z0)


def test_implicit_takes_the_function_not_the_solver():
    with pytest.raises(TypeError, match=r"function whose fixed point is found, as f\(z, \*args\); got Implicit"):
        implicit(deq.Implicit())
    with pytest.raises(TypeError, match="Unroll differentiates the iterations"):
        implicit(jnp.cos, adjoint=deq.Unroll())(lambda z0: z0)(jnp.ones(2))


# ---- scipy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hybr", "krylov", "df-sane"])
def test_scipy_finds_the_root_and_the_derivative_is_implicit(problem, method):
    def loss(w, x):
        z, stats = scipy_root(cell, jnp.zeros(DIM), w, x, method=method, rtol=1e-10, adjoint=deq.Implicit(TIGHT))
        return jnp.sum(z**2), stats

    grads, stats = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*problem)
    assert stats.converged and stats.steps > 1
    assert_close(grads, dense_gradient(*problem), rtol=1e-8)


def test_scipy_with_captured_values_float32_pytrees_and_vmap():
    w = 0.3 * jnp.eye(DIM)

    def root(x):
        f = lambda z: {"a": jnp.tanh(w @ z["a"]) + x, "b": 0.5 * z["b"] + z["a"][:2]}
        return scipy_root(f, {"a": jnp.zeros(DIM), "b": jnp.zeros(2)})

    x = jnp.linspace(0.0, 1.0, DIM)
    root = jax.jit(root)
    z, stats = root(x)
    assert stats.converged and z["b"].dtype == jnp.float32
    np.testing.assert_allclose(z["b"], 2 * z["a"][:2], rtol=1e-5)
    mapped = jax.jit(jax.vmap(lambda x: root(x).value["a"]))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(mapped[1], root(2 * x).value["a"], rtol=1e-5)
    grad = jax.jit(jax.grad(lambda x: root(x).value["b"].sum()))(x)
    np.testing.assert_allclose(grad[2:], 0, atol=1e-6)
    assert jnp.all(grad[:2] > 1)


def test_scipy_cannot_lie():
    for method in ("hybr", "krylov"):
        z, stats = scipy_root(lambda z: z**2 + 1, jnp.zeros(2), method=method)
        assert not stats.converged
        z, stats = scipy_root(lambda z: jnp.sqrt(z - 1), jnp.zeros(2), method=method)
        assert stats.status == deq.Status.NONFINITE and stats.residual == jnp.inf
    with pytest.raises(ValueError, match="no method 'hybrid'; did you mean 'hybr'"):
        scipy_root(jnp.cos, jnp.zeros(2), method="hybrid")


# ---- optax -------------------------------------------------------------------------------------------------


@pytest.fixture
def adam_promotes():
    """Implicit promotion of dtypes, which optax's Adam relies on to raise its decay to the power of a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("tx", [optax.sgd(0.3, momentum=0.5), optax.adam(0.1), optax.lion(0.1)], ids=range(3))
def test_optimizers_are_solvers(adam_promotes, problem, tx):
    w, x = problem
    xs = jnp.stack([x, -x, 0.1 * x])
    f = lambda z, w, xs: jnp.tanh(z @ w.T) + xs

    def loss(w, solver):
        z, stats = deq.fixed_point(f, 0 * xs, w, xs, solver=solver, adjoint=deq.Implicit(TIGHT), batch_ndim=1)
        return jnp.sum(z**2), stats

    rtol = 1e-3
    solver = Optax(tx, rtol=rtol, max_steps=3000)
    w_bar, stats = jax.jit(jax.grad(loss, has_aux=True))(w, solver)
    if stats.converged.all():
        assert_close(w_bar, jax.grad(loss, has_aux=True)(w, TIGHT)[0], rtol=20 * rtol)
    else:  # sign steps of one size end on a grid, and say so
        assert (stats.status == deq.Status.MAX_STEPS).any()


@pytest.mark.full_compile
def test_sgd_of_rate_one_is_picard(problem):
    w, x = problem
    run = lambda solver: deq.fixed_point(cell, 0 * x, w, x, solver=solver)
    (z, stats), (want, want_stats) = run(Optax(optax.sgd(1.0), max_steps=100)), run(deq.Picard())
    np.testing.assert_array_equal(z, want)
    assert stats.steps == want_stats.steps


def test_an_optimizer_as_solver_is_a_value_that_compiles_once(adam_promotes):
    tx = optax.adam(0.1)
    solver = Optax(tx, rtol=1e-2)
    assert solver == Optax(tx, rtol=1e-2) != Optax(tx, rtol=1e-3) and hash(solver) == hash(Optax(tx, rtol=1e-2))
    assert jax.tree.leaves(solver) == [1e-2, 0.0]
    run = jax.jit(lambda solver: deq.fixed_point(jnp.cos, jnp.zeros(2), solver=solver).stats)
    assert run(solver).steps < run(Optax(tx, rtol=1e-5)).steps
    assert run._cache_size() == 1
    with pytest.raises(TypeError, match=r"must be an optimizer such as optax.adam\(1e-2\), got 0.1"):
        Optax(0.1)
    with pytest.raises(TypeError, match="no option 'tol'"):
        Optax(tx, tol=1e-3)


def test_the_backward_solve_may_be_an_optimizer_too(problem):
    w, x = problem
    adjoint = deq.Implicit(Optax(optax.sgd(1.0), rtol=1e-11))
    loss = lambda w, x: jnp.sum(deq.fixed_point(cell, 0 * x, w, x, solver=TIGHT, adjoint=adjoint).value ** 2)
    assert_close(jax.jit(jax.grad(loss, argnums=(0, 1)))(w, x), dense_gradient(w, x))


@pytest.mark.parametrize("solver", [deq.Anderson(history=4), deq.Broyden(rank=8)], ids=["anderson", "broyden"])
def test_a_solver_is_an_optimizer(solver):
    scales = jnp.array([1.0, 2.0, 5.0, 10.0])
    loss = lambda p: 0.5 * jnp.sum(scales * (p["a"] - 1) ** 2) + 0.5 * jnp.sum((p["b"] + 2) ** 2)

    def train(tx, steps):
        p = {"a": jnp.zeros(4), "b": jnp.zeros((2, 2))}
        state = tx.init(p)

        @jax.jit
        def step(p, state):
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return optax.apply_updates(p, updates), state

        for _ in range(steps):
            p, state = step(p, state)
        return loss(p)

    accelerated = train(optax.chain(optax.scale(0.1), as_optimizer(solver)), 15)
    assert accelerated < 1e-6 < 1e-2 < train(optax.sgd(0.1), 15)
    with pytest.raises(ValueError, match="needs params"):
        as_optimizer(solver).update(jnp.ones(2), solver.init(jnp.ones(2)))


@pytest.mark.parametrize(
    "solver",
    [deq.Anderson(history=2), deq.Anderson(history=2, test_every=3), deq.Broyden(rank=4, line_search=0)],
    ids=["anderson", "test_every=3", "broyden"],
)
def test_an_optimizer_of_a_batch_takes_the_steps_of_a_solve(solver):
    gains, widths, count = jnp.array([0.2, 0.7]), jnp.array([[1.0, 2.0, 3.0]]), 7
    of_b = lambda b: gains[:, None] * jnp.cosh((b - 2) / widths)
    loss = lambda p: 0.5 * jnp.sum(gains * (p["a"] - 1) ** 2) + jnp.sum(of_b(p["b"]))
    p = start = {"a": jnp.zeros(2), "b": jnp.ones((2, 3))}
    tx = as_optimizer(solver, batch_ndim=1)
    state, step = tx.init(p), jax.jit(tx.update)
    for _ in range(count - 1):
        updates, state = step(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
    f = lambda z: jax.tree.map(jnp.subtract, z, jax.grad(loss)(z))
    solver = dataclasses.replace(solver, rtol=0.0, max_steps=count, returns="last")
    want = deq.solve(f, start, solver=solver, batch_ndim=1).value  # the last of its evaluations is at the step before
    chex.assert_trees_all_close(p, want, rtol=1e-4)
    together = deq.solve(f, start, solver=solver).value
    assert jnp.abs(p["a"] - together["a"]).max() > 1e-3
