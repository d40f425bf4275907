"""Gradients against dense solves, closed forms and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import Status

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 5
FORWARD = {
    "picard": deq.Picard(rtol=1e-13, max_steps=2000),
    "anderson": deq.Anderson(rtol=1e-13, max_steps=300, history=3),
    "broyden": deq.Broyden(rtol=1e-13, max_steps=300, rank=8),
}
PRECISE = FORWARD["picard"]  # the quickest of the three to compile


def cell(z, params, x):
    return jnp.tanh(params["w"] @ z + params["u"] * x)


@pytest.fixture
def problem(x64, rng):
    w = jax.random.normal(rng, (DIM, DIM))
    params = {"w": 0.7 * w / jnp.linalg.norm(w, 2), "u": jnp.linspace(-1.0, 1.0, DIM)}
    return params, jax.random.normal(jax.random.fold_in(rng, 1), (DIM,)), jnp.arange(1.0, DIM + 1)


def root(f):
    """The fixed point of f, by plain iteration in NumPy's own loop."""
    z = jnp.zeros(DIM)
    f = jax.jit(f)
    for _ in range(300):
        z = f(z)
    return z


def dense_gradient(params, x, z_bar):
    """((I − J)⁻ᵀ z̄) pulled back through f, with J written out."""
    z = root(lambda z: cell(z, params, x))
    J = jax.jacobian(cell)(z, params, x)
    u = jnp.linalg.solve(jnp.eye(DIM) - J.T, z_bar)
    return jax.vjp(lambda params, x: cell(z, params, x), params, x)[1](u)


def assert_close(got, want, rtol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def gradient(params, x, z_bar, **options):
    options = {"solver": PRECISE, "adjoint": deq.Implicit(PRECISE)} | options
    loss = lambda params, x: z_bar @ deq.fixed_point(cell, jnp.zeros(DIM), params, x, **options).value
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


# ---- Implicit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", FORWARD.values(), ids=FORWARD.keys())
@pytest.mark.parametrize("forward", FORWARD.values(), ids=FORWARD.keys())
def test_implicit_equals_a_dense_solve(problem, forward, backward):
    got = gradient(*problem, solver=forward, adjoint=deq.Implicit(backward))
    assert_close(got, dense_gradient(*problem))


def test_the_default_backward_solve(problem):
    got = gradient(*problem, solver=deq.Anderson(rtol=1e-12), adjoint=deq.Implicit())
    assert_close(got, dense_gradient(*problem))
    # Its error follows the forward tolerance: it is no constant.
    exact = dense_gradient(*problem)[0]["w"]
    for rtol in (1e-3, 1e-6):
        w_bar = gradient(*problem, solver=deq.Picard(rtol=rtol), adjoint=deq.Implicit())[0]["w"]
        assert np.linalg.norm(w_bar - exact) < 20 * rtol * np.linalg.norm(exact)


def test_implicit_where_plain_iteration_diverges(problem):
    _, x, z_bar = problem
    w = jnp.diag(jnp.array([-3.0, -2.0, -1.5, 0.5, 0.2]))  # I − J is regular and J expands
    options = dict(solver=FORWARD["broyden"], adjoint=deq.Implicit(FORWARD["broyden"]))

    def loss(x):
        z, stats = deq.fixed_point(lambda z: w @ z + x, jnp.zeros(DIM), **options)
        return z_bar @ z, stats

    x_bar, stats = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert stats.converged
    assert_close(x_bar, jnp.linalg.solve(jnp.eye(DIM) - w.T, z_bar))


@pytest.mark.parametrize("capture", ["params", "x", "both"])
def test_closures_equal_arguments(problem, capture):
    params, x, z_bar = problem

    def loss(params, x):
        f = {
            "params": lambda z, x: cell(z, params, x),
            "x": lambda z, params: cell(z, params, x),
            "both": lambda z: cell(z, params, x),
        }[capture]
        args = {"params": (x,), "x": (params,), "both": ()}[capture]
        options = dict(solver=PRECISE, adjoint=deq.Implicit(PRECISE))
        return z_bar @ deq.fixed_point(f, jnp.zeros(DIM), *args, **options).value

    assert_close(jax.grad(loss, argnums=(0, 1))(params, x), dense_gradient(*problem))


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 2)])
def test_batches(problem, rng, batch_shape):
    params, _, z_bar = problem
    xs = jax.random.normal(rng, (*batch_shape, DIM))

    def loss(params, xs):
        f = lambda z, params, xs: jnp.tanh(z @ params["w"].T + jnp.broadcast_to(params["u"], xs.shape) * xs)
        options = dict(solver=PRECISE, adjoint=deq.Implicit(PRECISE), batch_ndim=len(batch_shape))
        return jnp.sum(deq.fixed_point(f, jnp.zeros_like(xs), params, xs, **options).value @ z_bar)

    params_bar, xs_bar = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, xs)
    exact = [dense_gradient(params, x, z_bar) for x in xs.reshape(-1, DIM)]
    assert_close(xs_bar.reshape(-1, DIM), jnp.stack([x_bar for _, x_bar in exact]))
    assert_close(params_bar, jax.tree.map(lambda *leaves: sum(leaves), *[p for p, _ in exact]))


def test_second_order_equals_a_long_unroll(problem):
    params, x, z_bar = problem

    def loss(x, solve):
        return jnp.sum(jnp.sin(solve(lambda z: cell(z, params, x))) * z_bar)

    implicit = lambda f: deq.fixed_point(f, jnp.zeros(DIM), solver=PRECISE, adjoint=deq.Implicit(PRECISE)).value
    unrolled = lambda f: jax.lax.scan(lambda z, _: (f(z), None), jnp.zeros(DIM), length=200)[0]
    hessian = lambda solve: jax.jit(jax.jacrev(jax.grad(functools.partial(loss, solve=solve))))(x)
    assert_close(hessian(implicit), hessian(unrolled), rtol=1e-9)


def test_complex_states(problem, rng):
    _, x, z_bar = problem
    w = 0.5 * jnp.exp(1j * jnp.arange(DIM * DIM, dtype=complex)).reshape(DIM, DIM) / DIM

    def loss(w, x, solve):
        z = solve(lambda z: jnp.sin(w @ z) + x.astype(z.dtype))
        return jnp.sum(jnp.abs(z - 1j) ** 2 * z_bar)

    z0 = jnp.zeros(DIM, jnp.complex128)
    implicit = lambda f: deq.fixed_point(f, z0, solver=PRECISE, adjoint=deq.Implicit(PRECISE)).value
    unrolled = lambda f: jax.lax.scan(lambda z, _: (f(z), None), z0, length=120)[0]
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, solve=s), argnums=(0, 1)))(w, x) for s in (implicit, unrolled)
    )
    assert_close(got, want)


def test_z0_gets_no_cotangent(problem):
    params, x, z_bar = problem

    def loss(z0, scale):
        options = dict(solver=PRECISE, adjoint=deq.Implicit(PRECISE))
        z0 = {"z": scale * z0}
        f = lambda z, x: {"z": cell(z["z"], params, x)}
        return z_bar @ deq.fixed_point(f, z0, x, **options).value["z"]

    z0_bar, scale_bar = jax.grad(loss, argnums=(0, 1))(jnp.ones(DIM), 0.5)
    np.testing.assert_array_equal(z0_bar, 0)
    assert scale_bar == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORWARD)
def test_gradients_are_proportional_to_their_cotangents(problem, name, dtype):
    params, x, z_bar = jax.tree.map(lambda leaf: leaf.astype(dtype), problem)
    rtol = 1e-5 if dtype == "float32" else 1e-12
    solver = {"picard": deq.Picard, "anderson": functools.partial(deq.Anderson, history=3), "broyden": deq.Broyden}
    solver = solver[name](rtol=rtol, max_steps=300)

    @jax.jit
    def pull(z_bar):
        fixed = lambda x, probe: deq.fixed_point(
            cell, jnp.zeros(DIM, dtype), params, x, solver=solver, adjoint=deq.Implicit(solver), probe=probe
        )
        _, vjp, _ = jax.vjp(lambda x, probe: tuple(fixed(x, probe)), x, deq.Probe.zeros(), has_aux=True)
        return vjp(z_bar)

    one, probe = pull(z_bar)
    for scale in (2.0**-100, 1e-30, 1e-20, 1e-4, 1e4, 1e20, 1e30):
        scaled, scaled_probe = pull(scale * z_bar)
        assert jnp.all(jnp.isfinite(scaled))
        np.testing.assert_allclose(scaled / scale, one, rtol=20 * rtol)
        assert scaled_probe.steps == probe.steps and scaled_probe.status == Status.CONVERGED
    zero, zero_probe = pull(0 * z_bar)
    np.testing.assert_array_equal(zero, 0)
    assert jnp.all(jnp.isfinite(jnp.stack(zero_probe)))


@pytest.mark.parametrize("max_steps", [0, 1, 2])
@pytest.mark.parametrize("name", FORWARD)
def test_tiny_budgets_have_finite_gradients(problem, name, max_steps):
    make = {"picard": deq.Picard, "anderson": functools.partial(deq.Anderson, history=3), "broyden": deq.Broyden}
    solver = make[name](max_steps=jnp.asarray(max_steps))
    grads = gradient(*problem, solver=solver, adjoint=deq.Implicit(solver))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_implicit_stays_implicit_when_the_solve_stops_early(problem):
    params, x, z_bar = problem
    solver = deq.Picard(max_steps=3)
    z, stats = deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=solver)
    assert not stats.converged
    J = jax.jacobian(cell)(z, params, x)
    u = np.linalg.solve(np.eye(DIM) - J.T, z_bar)
    want = jax.vjp(lambda params, x: cell(z, params, x), params, x)[1](jnp.asarray(u))
    assert_close(gradient(*problem, solver=solver, adjoint=deq.Implicit(PRECISE)), want)


# ---- Probe -------------------------------------------------------------------------------------------------


def probed(x, probe, params, solver=PRECISE):
    options = dict(solver=solver, adjoint=deq.Implicit(deq.Picard(rtol=1e-8)), probe=probe)
    return deq.fixed_point(cell, jnp.zeros(DIM), params, x, **options).value.sum()


def test_probe_reports_the_backward_solve(problem):
    params, x, _ = problem
    x_bar, probe = jax.jit(jax.grad(probed, argnums=(0, 1)))(x, deq.Probe.zeros(), params)
    assert isinstance(probe, deq.Probe)
    assert 1 < probe.steps < 100 and probe.residual <= 1e-8 and probe.status == Status.CONVERGED
    exact = dense_gradient(params, x, jnp.ones(DIM))[1]
    assert_close(x_bar, exact, rtol=1e-7)


def test_probe_counts_vector_jacobian_products(x64, count_calls):
    jvp = count_calls(lambda z_bar: -jnp.sin(1.0) * z_bar)

    @jax.custom_vjp
    def f(z):
        return jnp.cos(z)

    f.defvjp(lambda z: (jnp.cos(z), z), lambda z, z_bar: (jvp(-jnp.sin(z) * z_bar),))
    options = dict(solver=PRECISE, adjoint=deq.Implicit(deq.Picard(rtol=1e-6)))
    loss = lambda c, probe: deq.fixed_point(lambda z, c: f(z) + c, jnp.zeros(3), c, probe=probe, **options).value.sum()
    _, probe = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.zeros(3), deq.Probe.zeros())
    # One more product at the end pulls u back to the inputs, and its half that leads to z may be dropped.
    assert jvp.calls - probe.steps in (0, 1)


def test_probe_in_vmap_and_scan(problem, rng):
    params, x, _ = problem
    xs = jnp.stack([x, 2 * x, 0 * x])
    pull = jax.jit(jax.grad(probed, argnums=(0, 1)))
    alone = [pull(x, deq.Probe.zeros(), params) for x in xs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    mapped = jax.jit(jax.vmap(pull, in_axes=(0, None, None)))(xs, deq.Probe.zeros(), params)
    _, scanned = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, pull(x, deq.Probe.zeros(), params)), 0.0, xs))(xs)
    for got in (mapped, scanned):
        assert_close(got[0], stacked[0])
        np.testing.assert_array_equal(got[1].steps, stacked[1].steps)
        np.testing.assert_array_equal(got[1].status, stacked[1].status)


def test_probe_has_an_entry_per_problem_and_flags_the_failed_one(x64):
    slope = jnp.array([[0.5], [0.999], [1.0]])  # the last has a singular I − J

    def loss(x, probe):
        f = lambda z, x: slope * z + (1 - slope) * 0 + x
        options = dict(solver=PRECISE, adjoint=deq.Implicit(deq.Picard(rtol=1e-6, max_steps=50)))
        return deq.fixed_point(f, jnp.zeros((3, 1)), x, batch_ndim=1, probe=probe, **options).value.sum()

    _, probe = jax.grad(loss, argnums=(0, 1))(jnp.ones((3, 1)), deq.Probe.zeros((3,)))
    assert probe.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.MAX_STEPS]
    assert probe.steps[0] < 50 and probe.steps[1] == 50


def test_singular_systems_end_in_a_flag(x64):
    # z − z³ at 0, and the identity: I − J is singular there.
    for f in (lambda z, x: z - z**3 + 0 * x, lambda z, x: z + 0 * x):
        loss = lambda x, probe: deq.fixed_point(f, jnp.zeros(2), x, solver=PRECISE, probe=probe).value.sum()
        x_bar, probe = jax.grad(loss, argnums=(0, 1))(jnp.ones(2), deq.Probe.zeros())
        assert probe.status != Status.CONVERGED
        assert jnp.all(jnp.isfinite(x_bar))


# ---- inexact gradients -------------------------------------------------------------------------------------


def closed_form(problem, matrix):
    """f's pullback of matrix(J) z̄ at the fixed point."""
    params, x, z_bar = problem
    z = root(lambda z: cell(z, params, x))
    J = np.asarray(jax.jacobian(cell)(z, params, x))
    u = jnp.asarray(matrix(J.T) @ z_bar)
    return jax.vjp(lambda params, x: cell(z, params, x), params, x)[1](u)


def power_sum(A, terms):
    return sum(np.linalg.matrix_power(A, k) for k in range(terms))


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_truncated_series(problem, terms):
    assert_close(gradient(*problem, adjoint=deq.Neumann(terms)), closed_form(problem, lambda J: power_sum(J, terms)))


def test_neumann_tends_to_implicit(problem):
    assert_close(gradient(*problem, adjoint=deq.Neumann(300)), dense_gradient(*problem))


def test_jfb_is_one_application(problem):
    assert_close(gradient(*problem, adjoint=deq.JFB()), closed_form(problem, lambda J: np.eye(DIM)))


@pytest.mark.parametrize("steps, damping", [(1, 1.0), (1, 0.3), (4, 0.5), (6, 1.0)])
def test_phantom_is_the_damped_series(problem, steps, damping):
    # dh ← (1 − λ) dh + λ (J dh + fₐ da), so ā = fₐᵀ λ Σ ((1 − λ) I + λ Jᵀ)ᵏ z̄, k < steps.
    series = lambda J: damping * power_sum((1 - damping) * np.eye(DIM) + damping * J, steps)
    got = gradient(*problem, adjoint=deq.Phantom(steps=steps, damping=damping))
    assert_close(got, closed_form(problem, series))


def test_phantom_tends_to_implicit(problem):
    assert_close(gradient(*problem, adjoint=deq.Phantom(steps=400, damping=0.7)), dense_gradient(*problem))


@pytest.mark.full_compile
@pytest.mark.parametrize("adjoint", [deq.Implicit(PRECISE), deq.Neumann(3), deq.JFB(), deq.Phantom(3)], ids=repr)
def test_the_value_does_not_depend_on_the_adjoint(problem, adjoint):
    params, x, _ = problem
    got = deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=PRECISE, adjoint=adjoint)
    want = deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=PRECISE, adjoint=deq.JFB())
    np.testing.assert_array_equal(got.value, want.value)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)


@pytest.mark.parametrize("adjoint", [deq.Neumann(4), deq.JFB(), deq.Phantom(4)], ids=repr)
def test_inexact_gradients_say_they_were_not_measured(problem, adjoint):
    params, x, _ = problem
    loss = lambda probe: deq.fixed_point(
        cell, jnp.zeros(DIM), params, x, solver=PRECISE, adjoint=adjoint, probe=probe
    ).value.sum()
    probe = jax.grad(loss)(deq.Probe.zeros())
    assert probe.status == Status.MAX_STEPS and probe.residual == jnp.inf


# ---- Unroll ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, checkpoint", [(0, None), (0, 3), (1, None), (10, None), (9, 1), (9, 3), (10, 3), (10, 100)]
)
def test_unroll_is_the_plain_loop(problem, length, checkpoint):
    params, x, z_bar = problem

    def plain(params, x, z0):
        z = z0
        for _ in range(length):
            z = z + 0.8 * (cell(z, params, x) - z)
        return z_bar @ z, z

    def unrolled(params, x, z0):
        solver = deq.Picard(max_steps=length, damping=0.8)
        z, stats = deq.fixed_point(cell, z0, params, x, solver=solver, adjoint=deq.Unroll(checkpoint))
        return z_bar @ z, (z, stats)

    z0 = jnp.linspace(0.0, 1.0, DIM)
    (_, want), want_grads = jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True)(params, x, z0)
    (_, (z, stats)), grads = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1, 2), has_aux=True))(params, x, z0)
    assert_close(z, want, rtol=1e-13)
    assert_close(grads, want_grads, rtol=1e-12)
    assert stats.steps == length + 1
    np.testing.assert_allclose(stats.residual, np.linalg.norm(cell(z, params, x) - z), rtol=1e-9)


def test_unroll_stats_are_the_truth(problem):
    params, x, _ = problem
    run = lambda n: (
        deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=deq.Picard(max_steps=n), adjoint=deq.Unroll()).stats
    )
    assert run(2).status == Status.MAX_STEPS and run(60).status == Status.CONVERGED
    bad = deq.fixed_point(lambda z: jnp.sqrt(z - 1), 0.0, solver=deq.Picard(max_steps=3), adjoint=deq.Unroll())
    assert bad.stats.status == Status.NONFINITE and bad.stats.residual == jnp.inf


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_unroll_through_an_accelerated_solver(problem, name):
    # Enough steps reach the fixed point, and the derivative of the iterates tends to the implicit one.
    params, x, z_bar = problem
    solver = {"anderson": deq.Anderson(max_steps=8, history=3), "broyden": deq.Broyden(max_steps=8, rank=8)}[name]
    loss = lambda x: (
        z_bar @ deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=solver, adjoint=deq.Unroll(checkpoint=3)).value
    )
    x_bar = jax.jit(jax.grad(loss))(x)
    eps, direction = 1e-5, jnp.cos(jnp.arange(DIM))
    difference = (loss(x + eps * direction) - loss(x - eps * direction)) / (2 * eps)
    np.testing.assert_allclose(x_bar @ direction, difference, rtol=1e-6)


# ---- what the gradient reaches -----------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [deq.Implicit(PRECISE), deq.Phantom(3), deq.Unroll()], ids=repr)
def test_has_aux(problem, adjoint):
    params, x, z_bar = problem
    solver = deq.Picard(max_steps=120, rtol=1e-13)

    def loss(params, x, aux_of):
        f = lambda z, params, x: (cell(z, params, x), {"m": params["u"] @ z, "z": z, "n": jnp.arange(2)})
        z, stats, aux = deq.fixed_point(f, jnp.zeros(DIM), params, x, solver=solver, adjoint=adjoint, has_aux=True)
        by_hand = deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=solver, adjoint=adjoint)
        aux = aux if aux_of else {"m": params["u"] @ by_hand.value, "z": by_hand.value, "n": jnp.arange(2)}
        assert aux["n"].dtype == jnp.arange(2).dtype
        return z_bar @ aux["z"] + aux["m"] ** 2, stats.steps - by_hand.stats.steps

    pull = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (value, more), grads = pull(params, x, True)
    (want_value, _), want = pull(params, x, False)
    np.testing.assert_allclose(value, want_value, rtol=1e-13)
    assert more == 1  # aux costs one more evaluation, and says so
    assert_close(grads, want)


def test_stats_have_no_gradient(problem):
    params, x, _ = problem
    for adjoint in (deq.Implicit(PRECISE), deq.Unroll()):
        solver = deq.Picard(max_steps=4)
        residual = lambda x: (
            deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=solver, adjoint=adjoint).stats.residual
        )
        np.testing.assert_array_equal(jax.grad(residual)(x), 0)


def test_arguments_of_every_kind(problem):
    params, x, z_bar = problem
    mask = np.array([True, True, False, True, True])

    def f(z, params, rest):
        noise = jax.random.normal(rest["key"], (DIM,)) + jax.random.normal(rest["raw"], (DIM,))
        z = jnp.where(rest["mask"], z, 0) * rest["half"] + rest["shift"] + rest["many"][rest["index"]] + 0.01 * noise
        assert rest["none"] is None
        return cell(z, params, x)

    rest = {
        "key": jax.random.key(3),
        "raw": jax.random.PRNGKey(4),
        "mask": mask,
        "half": 0.5,
        "shift": np.linspace(0.0, 0.1, DIM),
        "many": jnp.eye(DIM),
        "index": 2,
        "none": None,
    }
    options = dict(solver=PRECISE, adjoint=deq.Implicit(PRECISE))
    by_args = lambda params: z_bar @ deq.fixed_point(f, jnp.zeros(DIM), params, rest, **options).value
    by_closure = lambda params: z_bar @ deq.fixed_point(lambda z: f(z, params, rest), jnp.zeros(DIM), **options).value

    def unrolled(params):
        z = jnp.zeros(DIM)
        return z_bar @ jax.lax.fori_loop(0, 100, lambda _, z: f(z, params, rest), z)

    want = jax.jacfwd(unrolled)(params)
    for loss in (by_args, by_closure, jax.jit(by_closure), jax.checkpoint(by_closure)):
        assert_close(jax.grad(loss)(params), want)


def test_nested_fixed_points(problem):
    # y = tanh(w y + z) inside, z = y(z)/2 + x outside: together one fixed point in the pair (y, z).
    params, x, z_bar = problem
    options = dict(solver=PRECISE, adjoint=deq.Implicit(PRECISE))

    def nested(params, x):
        def outer(z):
            inner = deq.fixed_point(lambda y: jnp.tanh(params["w"] @ y + z), jnp.zeros(DIM), **options)
            return inner.value / 2 + x

        return z_bar @ deq.fixed_point(outer, jnp.zeros(DIM), **options).value

    def joint(params, x):
        f = lambda s: (jnp.tanh(params["w"] @ s[0] + s[1]), s[0] / 2 + x)
        return z_bar @ deq.fixed_point(f, (jnp.zeros(DIM),) * 2, **options).value[1]

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (nested, joint))
    assert_close(got, want)


def test_the_default_backward_solve_converges_where_the_jacobian_expands(x64):
    # Spectral radius 6, not normal: what a step of Anderson shows grows while the residual of GMRES falls. With
    # Anderson's own `growth` a quarter of these converge, in twice the budget.
    rng, dim = np.random.default_rng(0), 20
    A = rng.standard_normal((32, dim, dim))
    A = 6 * A / np.abs(np.linalg.eigvals(A)).max(-1)[:, None, None]
    b, z_bar = rng.standard_normal((2, 32, dim))
    z_star = np.linalg.solve(np.eye(dim) - A, b[..., None])[..., 0]

    def loss(b, probe):
        f = lambda z: jnp.einsum("nij,nj->ni", A, z) + b
        z = deq.attach(f, z_star, solver=deq.Anderson(rtol=1e-5), batch_ndim=1, probe=probe)
        return jnp.sum(z * z_bar)

    b_bar, backward = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(b), deq.Probe.zeros((32,)))
    assert jnp.all(backward.status == deq.Status.CONVERGED)
    want = np.linalg.solve((np.eye(dim) - A).swapaxes(-1, -2), z_bar[..., None])[..., 0]
    np.testing.assert_allclose(b_bar, want, rtol=0, atol=1e-4 * np.abs(want).max())


# ---- what the backward solve is asked for ------------------------------------------------------------------


def test_the_default_backward_tolerance_is_a_tenth_of_the_forward_one(x64):
    # Slow enough that a residual is close to the tolerance when it first meets it.
    n = 200
    A = 0.95 * np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    for rtol in (1e-2, 1e-3):
        loss = lambda b, probe: deq.fixed_point(
            lambda z: A @ z + b, jnp.zeros(n), solver=deq.Anderson(rtol=rtol), probe=probe
        ).value.sum()
        probe = jax.jit(jax.grad(loss, 1))(jnp.ones(n), deq.Probe.zeros())
        assert probe.status == Status.CONVERGED and 0.02 * rtol < probe.residual <= 0.1 * rtol


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_an_absolute_tolerance_asks_the_same_of_the_backward_solve(x64, traced, scale):
    n = 200
    A = 0.95 * np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    b = scale * np.ones(n)
    atol = float(1e-3 * np.linalg.norm(np.linalg.solve(np.eye(n) - A, b)))

    def loss(b, probe, atol):
        solver = deq.Anderson(rtol=0.0, atol=atol)
        z, stats = deq.fixed_point(lambda z: A @ z + b, jnp.zeros(n), solver=solver, probe=probe)
        return z.sum(), stats

    pull = lambda b, probe, atol: jax.grad(loss, (0, 1), has_aux=True)(b, probe, atol)
    jitted = jax.jit(pull) if traced else jax.jit(functools.partial(pull, atol=atol))
    (b_bar, probe), stats = jitted(b, deq.Probe.zeros(), *([atol] if traced else []))
    assert stats.converged and probe.status == Status.CONVERGED and 0.02e-3 < probe.residual <= 0.11e-3
    want = np.linalg.solve(np.eye(n) - A.T, np.ones(n))
    assert np.linalg.norm(b_bar - want) < 5e-3 * np.linalg.norm(want)


def test_an_absolute_tolerance_costs_no_products_beyond_what_it_asks(rng):
    # Asked for nothing, this backward solve ended as STALLED after 52 products.
    A = np.asarray(jax.random.normal(rng, (30, 30)), "float64")
    A = jnp.asarray(0.8 * A / np.abs(np.linalg.eigvals(A)).max(), jnp.float32)
    f, solver = lambda z, b: A @ z + b, deq.Anderson(rtol=0.0, atol=1e-3)
    loss = lambda b, probe: deq.fixed_point(f, jnp.zeros(30), b, solver=solver, probe=probe).value.sum()
    probe = jax.jit(jax.grad(loss, 1))(jnp.ones(30), deq.Probe.zeros())
    assert probe.status == Status.CONVERGED and 17 <= probe.steps <= 23


def test_an_absolute_tolerance_does_not_fail_a_sound_backward_solve(rng):
    # float32: asked for nothing, the backward solve ended as STALLED, and ZERO took that for a failure.
    n = 60
    A = np.asarray(jax.random.normal(rng, (n, n)), "float64")
    A, b = 0.8 * A / np.abs(np.linalg.eigvals(A)).max(), np.ones(n)
    want = np.linalg.solve(np.eye(n) - A.T, np.ones(n))
    for solver in (deq.Anderson(rtol=0.0, atol=1e-3), deq.Anderson(rtol=3e-7), deq.Anderson(rtol=0.0, max_steps=300)):

        def loss(b, probe, solver=solver):
            f = lambda z: jnp.asarray(A, jnp.float32) @ z + b
            adjoint = deq.Implicit(on_failure=deq.OnFailure.ZERO)
            z, stats = deq.fixed_point(f, jnp.zeros(n), solver=solver, adjoint=adjoint, probe=probe)
            return z.sum(), stats

        (b_bar, probe), stats = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
            jnp.asarray(b, jnp.float32), deq.Probe.zeros()
        )
        assert stats.sound and probe.status == Status.CONVERGED and probe.steps < 60
        np.testing.assert_allclose(b_bar, want, rtol=0, atol=1e-3 * np.abs(want).max())


def test_the_strictest_leaf_sets_the_backward_tolerance(x64):
    from deq_jax.adjoints.implicit import default_backward

    z = {"big": jnp.full((2, 3), 1e3), "none": jnp.zeros((2, 1)), "small": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
    rtol = default_backward(deq.Picard(rtol=1e-3, atol=1e-2), z, batch_ndim=1).rtol
    np.testing.assert_allclose(rtol, 0.1 * (1e-3 + 1e-2 / (1e3 * np.sqrt(3))), rtol=1e-12)
    zero = jax.tree.map(lambda leaf: 0 * leaf, z)
    np.testing.assert_allclose(default_backward(deq.Picard(rtol=0.0, atol=1.0), zero, batch_ndim=1).rtol, 0.01)
    assert default_backward(deq.Picard(rtol=1e-3), z, 1).rtol == 0.1 * 1e-3
    assert default_backward(deq.Picard(rtol=0.0), z, 1).rtol == np.finfo("float64").eps
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), z)
    assert default_backward(deq.Picard(rtol=1e-3), half, 1).rtol == 2.0**-7
