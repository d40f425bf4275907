"""`root`: F(z) = 0 at the scale of F, its statuses and derivatives, and the solvers that differentiate F."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from experiments.shared.systems import classical, start

pytestmark = pytest.mark.usefixtures("quick_compile")
SCALES = (1.0, 1e6, 1e-6)
SOLVERS = {
    "default": None,
    "Newton–Krylov": deq.NewtonKrylov(rtol=1e-9, max_steps=500, products="jvp"),
    "differences": deq.NewtonKrylov(rtol=1e-9, max_steps=500),
    "Broyden": deq.Broyden(rtol=1e-9, max_steps=500),
    "Robust": deq.Robust(rtol=1e-9, max_steps=500),
}


def names(stats):
    return [deq.Status(int(s)).name for s in np.ravel(stats.status)]


def matrix(eigenvalues, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return Q @ np.diag(eigenvalues) @ Q.T


@pytest.fixture
def affine(x64):
    """A system with eigenvalues 1 … 50 and a little more: (F(z, b, scale), b, its Jacobian at z)."""
    A, b = jnp.asarray(matrix(np.linspace(1.0, 50.0, 20))), jnp.linspace(-1.0, 1.0, 20)
    F = lambda z, b, scale: scale * (A @ z + jnp.tanh(z) - b)
    return F, b, lambda z: np.asarray(A) + np.diag(1 - np.tanh(z) ** 2)


# ---- scale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_the_scale_of_F_changes_neither_steps_nor_status_nor_z(affine, name):
    F, b, jacobian = affine
    found = [deq.root(F, jnp.zeros(20), b, scale, solver=SOLVERS[name]) for scale in SCALES]
    exact = np.linalg.solve(jacobian(found[0].value), -np.asarray(F(found[0].value, b, 1.0))) + found[0].value
    for (z, stats), scale in zip(found, SCALES, strict=True):
        assert names(stats) == ["CONVERGED"]
        assert np.linalg.norm(z - exact) <= 1e-7 * np.linalg.norm(exact)
        # Rounding is another, as 1e6 is no power of two, and secants pass it on.
        assert abs(int(stats.steps) - int(found[0].stats.steps)) <= (3 if name in ("Broyden", "Robust") else 0)
        assert np.isclose(stats.residual, np.linalg.norm(F(z, b, scale)), rtol=1e-6, atol=scale * 1e-13)


@pytest.mark.parametrize("name", ["default", "Newton–Krylov", "Broyden"])
def test_powers_of_two_change_no_bit(affine, name):
    F, b, _ = affine
    one, other = (deq.root(F, jnp.zeros(20), b, 2.0**k, solver=SOLVERS[name]) for k in (0, 20))
    assert (one.value == other.value).all() and one.stats.steps == other.stats.steps
    assert one.stats.residual * 2.0**20 == other.stats.residual
    assert one.stats.relative_residual == other.stats.relative_residual


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adjoint", [deq.Implicit(), deq.ImplicitJVP()], ids=["Implicit", "ImplicitJVP"])
def test_gradients_at_every_scale(affine, adjoint, scale):
    F, b, jacobian = affine
    weights = jnp.cos(jnp.arange(20.0))

    def loss(b, probe):
        z = deq.root(F, jnp.zeros(20), b, scale, adjoint=adjoint, probe=probe).value
        return z @ weights, z

    (grad, backward), z = jax.grad(loss, argnums=(0, 1), has_aux=True)(b, deq.Probe.zeros())
    exact = np.linalg.solve(jacobian(z).T, weights)
    assert np.abs(grad - exact).max() <= 1e-12 * np.abs(exact).max()
    assert backward.status == deq.Status.CONVERGED
    if isinstance(adjoint, deq.ImplicitJVP):
        forward = jax.jacfwd(lambda b: loss(b, None)[0])(b)
        assert np.abs(forward - exact).max() <= 1e-12 * np.abs(exact).max()


@pytest.mark.parametrize("unknowns", [40, 300])
def test_a_gradient_at_condition_1e4_is_right_or_flagged(x64, unknowns):
    A, b = jnp.asarray(matrix(np.geomspace(1.0, 1e4, unknowns))), jnp.ones(unknowns)
    loss = lambda b, probe: deq.root(lambda z, b: 1e-6 * (A @ z - b), jnp.zeros(unknowns), b, probe=probe).value.sum()
    grad, backward = jax.grad(loss, argnums=(0, 1))(b, deq.Probe.zeros())
    exact = np.linalg.solve(A.T, np.ones(unknowns))
    error = np.linalg.norm(grad - exact) / np.linalg.norm(exact)
    assert error <= 1e-6 or backward.status != deq.Status.CONVERGED
    assert unknowns > 256 or error <= 1e-10


def test_second_derivatives(x64):
    z = lambda a, adjoint: deq.root(lambda z: 1e5 * (z**3 - a), 1.0, adjoint=adjoint).value
    for adjoint in (deq.Implicit(), deq.ImplicitJVP()):  # the cube root
        assert np.isclose(jax.grad(jax.grad(z))(8.0, adjoint), -2 / 9 * 8.0 ** (-5 / 3), rtol=1e-8)
    assert np.isclose(jax.hessian(z)(8.0, deq.ImplicitJVP()), -2 / 9 * 8.0 ** (-5 / 3), rtol=1e-8)


# ---- what CONVERGED means ----------------------------------------------------------------------------------


def test_the_relative_residual_estimates_the_move_that_is_left(x64):
    F = lambda z: 1e-4 * jnp.stack([z[0] ** 2 + z[1] - 3, jnp.exp(z[0]) - 2 * z[1]])
    far = deq.root(F, jnp.ones(2), solver=deq.Broyden(rtol=1e-4))
    exact = deq.root(F, far.value).value
    error = np.linalg.norm(far.value - exact) / np.linalg.norm(exact)
    assert names(far.stats) == ["CONVERGED"] and far.stats.relative_residual <= 1e-4
    assert 0.05 * error <= far.stats.relative_residual <= 20 * error


def test_a_badly_scaled_row_is_not_taken_for_a_solved_one(x64):
    # Powell: (1e4 x y − 1, e⁻ˣ + e⁻ʸ − 1.0001). At the start F is 1e-4 of ‖J‖ ‖z‖ already.
    F = functools.partial(classical, 3, xp=jnp)
    z, stats = deq.root(F, jnp.asarray(start(3, 2, 1.0)), solver=deq.Newton(rtol=1e-4, max_steps=500))
    assert names(stats) == ["CONVERGED"] and np.allclose(z, [1.0981593e-5, 9.1061467], rtol=1e-3)


def test_no_root_is_never_converged(x64):
    F = lambda z: jnp.stack([z[0] ** 2 + 1, z[1] - 3])  # and none but the first has no zero
    for solver in (None, *(s for s in SOLVERS.values() if s)):
        assert names(deq.root(F, jnp.array([1.0, 1.0]), solver=solver).stats) != ["CONVERGED"]
    assert names(deq.root(lambda z: jnp.exp(-z), 0.0, solver=deq.Newton(rtol=1e-4)).stats) != ["CONVERGED"]
    assert names(deq.root(lambda z: z * jnp.nan, 1.0).stats) == ["NONFINITE"]


def test_a_root_at_the_start_and_a_warm_start(x64):
    z, stats = deq.root(lambda z: z**3 + z, 0.0)
    assert (float(z), names(stats), float(stats.residual)) == (0.0, ["CONVERGED"], 0.0)
    F = lambda z, a: z**3 + z - a
    cold = deq.root(F, 0.0, 2.0)
    warm = deq.root(F, cold.value, 2.0 + 1e-7)
    assert names(warm.stats) == ["CONVERGED"] and warm.stats.steps < cold.stats.steps
    assert abs(F(warm.value, 2.0 + 1e-7)) <= 1e-10


def test_atol_is_in_the_units_of_F(x64):
    F = lambda z: 1e6 * (z**2 - 2)
    z, stats = deq.root(F, 1.0, solver=deq.Newton(rtol=0.0, atol=1e3))
    assert names(stats) == ["CONVERGED"] and 0 < stats.residual <= 1e3 and np.isclose(stats.residual, abs(F(z)))


def test_a_singular_root_at_zero_ends_at_the_floor(x64):
    _, stats = deq.root(lambda z: z**2, jnp.ones(2))
    assert names(stats) == ["STALLED"] and stats.residual < 1e-28 and stats.steps < 100


def test_leaves_have_units_of_their_own(x64):
    def F(z, units):  # each equation, and each unknown, in a unit of its own
        flow, pressure = z["flow"] / units[0], z["pressure"] / units[1]
        return {"flow": units[2] * (flow + pressure**3 - 3), "pressure": units[3] * (pressure - jnp.sqrt(flow))}

    for units in ((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1e4, 1e-4), (1e-4, 1e4, 1.0, 1.0)):
        start = {"flow": jnp.full(2, units[0]), "pressure": jnp.full(3, units[1])[:2]}
        z, stats = deq.root(F, start, jnp.array(units))
        assert names(stats) == ["CONVERGED"]
        for leaf, unit in zip(jax.tree.leaves(F(z, jnp.array(units))), units[2:], strict=True):
            assert np.abs(leaf).max() <= 1e-10 * unit


def test_an_equation_that_holds_exactly_is_no_overflow(x64):
    F = lambda z, a: {"x": z["x"] ** 3 - a, "y": 1e3 * (z["y"] - z["x"][:3])}
    z, stats = deq.root(F, {"x": jnp.ones(40), "y": jnp.ones(3)}, jnp.full(40, 8.0), solver=deq.NewtonKrylov(rtol=1e-9))
    assert names(stats) == ["CONVERGED"] and np.allclose(z["y"], 2.0)


# ---- transforms and kinds of states ------------------------------------------------------------------------


def cubic(z, a):
    return z**3 + z - a


def test_a_batch_is_what_each_problem_gets_alone(x64):
    a, scales = jnp.array([[2.0, 10.0], [30.0, 1.0], [-5.0, 0.5]]), jnp.array([1.0, 1e6, 1e-6])
    F = lambda z, a, scale: scale[..., None] * cubic(z, a)
    batched = deq.root(F, jnp.zeros((3, 2)), a, scales, batch_ndim=1)
    mapped = jax.vmap(lambda a, scale: deq.root(F, jnp.zeros(2), a, scale))(a, scales)
    for i in range(3):
        alone = deq.root(F, jnp.zeros(2), a[i], scales[i])
        for many in (batched, mapped):
            assert np.allclose(many.value[i], alone.value, rtol=1e-13)
            assert many.stats.steps[i] == alone.stats.steps and many.stats.status[i] == alone.stats.status
    grads = jax.jit(jax.grad(lambda a: deq.root(F, jnp.zeros((3, 2)), a, scales, batch_ndim=1).value.sum()))(a)
    assert np.allclose(grads, 1 / (3 * batched.value**2 + 1), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_other_dtypes(dtype):
    z0 = jnp.ones(3, dtype)
    z, stats = deq.root(cubic, z0, jnp.asarray([2.0, 10.0, 30.0], dtype))
    assert z.dtype == z0.dtype and set(names(stats)) <= {"CONVERGED", "STALLED"}
    assert np.allclose(np.asarray(z, complex), [1, 2, 3], rtol=3 * float(jnp.finfo(dtype).eps) ** (2 / 3))


def test_a_complex_root_and_its_gradient(x64):
    F = lambda z, a: z**2 + a
    z, stats = deq.root(F, jnp.asarray(1.0 + 1.0j), 4.0)
    assert names(stats) == ["CONVERGED"] and np.isclose(complex(z), 2.0j)
    slope = jax.grad(lambda a: deq.root(F, jnp.asarray(1.0 + 1.0j), a).value.imag)(4.0)  # √a
    assert np.isclose(slope, 0.25)


def test_jit_scan_and_no_second_trace(x64):
    traces = []

    @jax.jit
    def solve(a):
        traces.append(None)
        return deq.root(cubic, jnp.zeros(2), a)

    once, again = solve(jnp.array([2.0, 10.0])), solve(jnp.array([2.0, 30.0]))
    assert np.allclose(once.value, [1, 2]) and np.allclose(again.value, [1, 3]) and len(traces) == 1
    follow = lambda z, a: (deq.root(cubic, z, a).value,) * 2
    path = jax.lax.scan(follow, jnp.zeros(()), jnp.array([2.0, 10.0, 30.0]))[1]
    assert np.allclose(path, [1, 2, 3])


def test_aux_and_carried_leaves(x64):
    F = lambda z: {"h": z["h"] ** 3 - 8, "count": z["count"] + 1}
    z, stats = deq.root(F, {"h": jnp.ones(()), "count": 0})
    assert np.isclose(z["h"], 2.0) and int(z["count"]) == int(stats.steps) - 1  # not where the scale is measured
    z, stats, aux = deq.root(lambda z, a: (cubic(z, a), a * z), 0.0, 10.0, has_aux=True)
    assert np.isclose(aux, 20.0)
    aux = lambda a: deq.root(lambda z, a: (cubic(z, a), a * z), 0.0, a, has_aux=True).aux
    assert np.isclose(jax.grad(aux)(10.0), 2 + 10 / 13)


def test_without_jit_F_is_called_at_each_evaluation(x64):
    calls = []

    def F(z):
        calls.append(not isinstance(z, jax.core.Tracer))
        return z**2 - 2

    with jax.disable_jit():
        z, stats = deq.root(F, jnp.ones(()), solver=deq.Broyden(rtol=1e-8))
    assert names(stats) == ["CONVERGED"] and sum(calls) >= stats.steps - 1


@pytest.mark.parametrize("adjoint", [deq.Unroll(), deq.Phantom(steps=40), deq.Neumann(terms=60)])
def test_the_other_adjoints(x64, adjoint):
    a = jnp.array([2.0, 2.5])
    solver = deq.Newton(rtol=1e-10, max_steps=12) if isinstance(adjoint, deq.Unroll) else None
    grad = jax.grad(lambda a: deq.root(cubic, jnp.ones(2), a, solver=solver, adjoint=adjoint).value.sum())(a)
    z = deq.root(cubic, jnp.ones(2), a).value
    assert np.allclose(grad, 1 / (3 * z**2 + 1), rtol=1e-3)


# ---- a black box -------------------------------------------------------------------------------------------


def test_an_F_without_forward_mode(x64):
    @jax.custom_vjp
    def cube(z):
        return z**3

    cube.defvjp(lambda z: (z**3, z), lambda z, ct: (3 * z**2 * ct,))
    F = lambda z, a: 1e6 * (cube(z) + z - a)
    for solver in (deq.NewtonKrylov(rtol=1e-8), deq.Broyden(rtol=1e-8)):
        solve = lambda a, solver=solver: deq.root(F, jnp.ones(2), a, solver=solver)
        found = solve(jnp.array([2.0, 10.0]))
        assert names(found.stats) == ["CONVERGED"] and np.allclose(found.value, [1, 2])
        slopes = jax.grad(lambda a, solve=solve: solve(a).value.sum())(jnp.array([2.0, 10.0]))
        assert np.allclose(slopes, [1 / 4, 1 / 13])


# ---- exact products ----------------------------------------------------------------------------------------


def test_exact_products_take_no_digits(x64):
    """Where a difference is lost in rounding: bfloat16."""
    A = jnp.asarray(matrix(np.linspace(1.0, 8.0, 6)), jnp.bfloat16)
    f = lambda z: z - (A @ z + jnp.tanh(z) - 1).astype(z.dtype)
    z0 = jnp.zeros(6, jnp.bfloat16)
    residuals = [
        float(deq.fixed_point(f, z0, solver=deq.NewtonKrylov(rtol=2e-2, products=products)).stats.relative_residual)
        for products in ("differences", "jvp")
    ]
    assert residuals[1] <= 0.02


def test_a_solver_is_shown_the_product_that_it_asks_for(x64):
    A = jnp.array([[2.0, 1.0], [0.5, 3.0]])
    seen = []

    class Asks:
        rtol, atol, max_steps = 1e-6, 0.0, 3

        def init(self, z):
            return jnp.zeros(())

        def direction(self, state):
            return jnp.array([1.0, 2.0])

        def update(self, residual, state, z, product):
            seen.append(product)
            return residual, jnp.sum(product)

    # g(z) = A z − z, whose Jacobian is A − I; the state carries the sum of the product.
    memory = deq.solve(lambda z: A @ z, jnp.ones(2), solver=Asks()).memory
    assert np.isclose(memory, ((A - jnp.eye(2)) @ jnp.array([1.0, 2.0])).sum()) and len(seen) > 0


@pytest.mark.parametrize("solver", [deq.Newton(rtol=1e-9), deq.NewtonKrylov(rtol=1e-9, products="jvp")])
def test_solvers_by_derivatives_find_fixed_points(x64, solver):
    f = lambda z, a: 3 * jnp.cos(a * z)
    z, stats = deq.fixed_point(f, jnp.ones((3, 2)), 1.1, solver=solver, batch_ndim=1)
    assert stats.converged.all() and np.abs(f(z, 1.1) - z).max() <= 1e-8
    swap = lambda z: {"a": jnp.cos(z["b"]), "b": jnp.sin(z["a"])}
    assert deq.fixed_point(swap, {"a": jnp.ones(2), "b": jnp.ones(2)}, solver=solver).stats.converged


@pytest.mark.parametrize("condition", [1.0, 1e8])
def test_newton_solves_a_linear_system_in_two_evaluations(x64, condition):
    A = jnp.asarray(matrix(np.geomspace(1.0, condition, 12)))
    b = A @ jnp.ones(12)
    z, stats = deq.fixed_point(lambda z: z - A @ z + b, jnp.zeros(12), solver=deq.Newton(rtol=1e-7))
    assert stats.converged and stats.steps == 2 and np.allclose(z, 1.0, atol=1e-14 * condition)


def test_a_singular_jacobian_on_the_way(x64):
    # J is zero at the start: no Newton step leads away, and no NaN may.
    z, stats = deq.root(lambda z: z**2 - 2, jnp.zeros(2))
    assert np.isfinite(z).all() and names(stats) != ["CONVERGED"]
    # It has rank one at the start.
    z, stats = deq.root(lambda z: jnp.stack([z[0] + z[1] - 3, z[0] * z[1] - 2]), jnp.ones(2))
    assert names(stats) == ["CONVERGED"] and np.allclose(sorted(z), [1, 2])


def test_a_step_to_where_F_is_not_finite_is_cut(x64):
    z, stats = deq.root(lambda z: jnp.log(z), 4.0)  # Newton's step from 4 is to −1.5
    assert names(stats) == ["CONVERGED"] and np.isclose(z, 1.0)


@pytest.mark.parametrize(("number", "n", "factor"), [(11, 10, 100.0), (8, 10, 1.0), (7, 6, 1.0), (3, 2, 1.0)])
def test_classical_systems(x64, promotes, number, n, factor):
    """One of them, the first, ends in a minimum unless the solve begins anew with shorter steps."""
    F = functools.partial(classical, number, xp=jnp)
    z, stats = deq.root(F, jnp.asarray(start(number, n, factor)), solver=deq.Newton(rtol=0.0, atol=1e-8, max_steps=500))
    assert names(stats) == ["CONVERGED"] and np.linalg.norm(classical(number, np.asarray(z))) <= 1e-8


# ---- the backward system, given to others ------------------------------------------------------------------


def gmres(matvec, rmatvec, b):
    return jax.scipy.sparse.linalg.gmres(matvec, b, tol=1e-14, atol=0.0)


def inverse_near(F, n):
    """(∂F)⁻¹ at another point than the root, which P(v) applies to each problem of a batch."""
    factors = jax.scipy.linalg.lu_factor(jax.jacobian(F)(jnp.full(n, 0.1)))
    return lambda v: jax.scipy.linalg.lu_solve(factors, v.T).T


WAYS = {
    "dense": lambda P: dict(linear=deq.Dense()),
    "a callable": lambda P: dict(linear=gmres),
    "preconditioner": lambda P: dict(preconditioner=P),
    "dense, preconditioner": lambda P: dict(linear=deq.Dense(), preconditioner=P),
    "a callable, preconditioner": lambda P: dict(linear=gmres, preconditioner=P),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adjoint", [deq.Implicit, deq.ImplicitJVP])
def test_derivatives_by_other_linear_solvers(affine, adjoint, way):
    F, b, jacobian = affine
    b, weights = jnp.stack([b, 3 * b[::-1]]), jnp.cos(jnp.arange(20.0))

    @jax.jit
    def derivatives(b, scale):  # P is made from traced arrays
        options = dict(adjoint=adjoint(**WAYS[way](inverse_near(lambda z: F(z, b[0], scale), 20))), batch_ndim=1)
        rows = lambda z, b: jax.vmap(lambda z, b: F(z, b, scale))(z, b)
        solve = lambda b, probe: deq.root(rows, jnp.zeros_like(b), b, probe=probe, **options).value
        loss = lambda b, probe: jnp.sum(solve(b, probe) @ weights)
        forward = jax.jvp(lambda b: solve(b, None), (b,), (jnp.ones_like(b),)) if adjoint is deq.ImplicitJVP else ()
        return solve(b, None), jax.grad(loss, (0, 1))(b, deq.Probe.zeros((2,))), forward

    for scale in SCALES:
        z, (grad, probe), forward = derivatives(b, scale)
        exact = np.stack([np.linalg.solve(jacobian(row).T, weights) for row in np.asarray(z)])
        assert np.abs(grad - exact).max() <= 1e-11 * np.abs(exact).max()
        assert not probe.status.any() and probe.residual.max() <= 1e-11
        if forward:
            exact = np.stack([np.linalg.solve(jacobian(row), np.ones(20)) for row in np.asarray(z)])
            assert np.abs(forward[1] - exact).max() <= 1e-11 * np.abs(exact).max()


def test_a_preconditioner_of_the_backward_solve_is_at_the_scale_of_F(x64):
    n = 300  # which no default solver factors
    A, b = jnp.asarray(matrix(np.geomspace(1.0, 1e4, n))), jnp.ones(n)

    @functools.partial(jax.jit, static_argnums=3)
    def gradient(b, scale, inverse, good):
        adjoint = deq.Implicit(preconditioner=(lambda v: inverse @ v) if good else None)
        solve = lambda b, probe: deq.root(lambda z, b: scale * (A @ z - b), b, b, adjoint=adjoint, probe=probe)
        return jax.grad(lambda b, probe: jnp.sum(solve(b, probe).value), (0, 1))(b, deq.Probe.zeros())

    plain = gradient(b, 1.0, A, False)[1].steps
    for scale in SCALES:
        for share in (1.0, 3.0):
            grad, probe = gradient(b, scale, share * jnp.linalg.inv(scale * A), True)
            assert probe.status == deq.Status.CONVERGED and probe.steps <= 8 < plain / 20
            assert np.allclose(grad, np.linalg.solve(A.T, np.ones(n)), rtol=1e-8, atol=1e-10)


def test_what_another_linear_solver_claims_is_judged_in_the_units_of_the_cotangent(x64):
    """Not by an `atol` that is in the units of F."""
    solver = deq.Newton(rtol=0.0, atol=1e3)
    adjoint = deq.Implicit(linear=lambda matvec, rmatvec, b: (0.95 * gmres(matvec, rmatvec, b)[0], "solved"))
    F = lambda z, a: 1e6 * cubic(z, a)
    loss = lambda a, probe: deq.root(F, 0.0, a, solver=solver, adjoint=adjoint, probe=probe).value
    probe = jax.grad(loss, (0, 1))(2.0, deq.Probe.zeros())[1]
    assert probe.status == deq.Status.MAX_STEPS and 0.05 < probe.residual < 0.1


# ---- a preconditioner of the forward solve -----------------------------------------------------------------


def boundary_value_problem(n):
    """(F, P): −u″ + u³ = s x on n inner points, and the inverse of its linear part by the sine transform."""
    h, k = 1 / (n + 1), jnp.arange(1.0, n + 1)
    sines = jnp.sqrt(2 * h) * jnp.sin(jnp.pi * h * jnp.outer(k, k))
    second = lambda u: (2 * u - jnp.pad(u[1:], (0, 1)) - jnp.pad(u[:-1], (1, 0))) / h**2
    F = lambda u, s, scale: scale * (second(u) + u**3 - 30 * jnp.sin(s * k * h))
    return F, lambda v, scale: sines @ (sines @ v / (scale * (2 - 2 * jnp.cos(jnp.pi * h * k)) / h**2))


def test_a_preconditioner_saves_products(x64):
    F, P = boundary_value_problem(63)
    solver = deq.NewtonKrylov(rtol=1e-10, max_steps=1000, krylov=50, products="jvp")

    @jax.jit
    def solve(scale):  # P reads a traced array
        right = dataclasses.replace(solver, preconditioner=lambda v: P(v, scale))
        adjoint = deq.Implicit(preconditioner=lambda v: P(v, scale))
        of = lambda s, solver: deq.root(F, jnp.zeros(63), s, scale, solver=solver, adjoint=adjoint)
        return of(3.0, solver), of(3.0, right), jax.grad(lambda s: of(s, right).value.sum())(3.0)

    for scale in SCALES:
        plain, preconditioned, slope = solve(scale)
        assert names(plain.stats) == names(preconditioned.stats) == ["CONVERGED"]
        assert np.allclose(preconditioned.value, plain.value, rtol=1e-8)
        assert preconditioned.stats.steps < 25 < 250 < plain.stats.steps
        J, F_s = (jax.jacobian(F, i)(preconditioned.value, 3.0, scale) for i in (0, 1))
        assert np.isclose(slope, -np.linalg.solve(J, F_s).sum(), rtol=1e-9)


def test_a_preconditioner_of_states_in_a_batch(x64):
    A = jnp.asarray(matrix(np.geomspace(1.0, 1e4, 40)))
    inverse = jnp.linalg.inv(A + 0.1 * jnp.eye(40))
    F = lambda z, a: {"x": z["x"] @ A + 0.1 * jnp.tanh(z["x"]) - a, "y": 1e3 * (z["y"] - z["x"][..., :3])}
    P = lambda v: {"x": v["x"] @ inverse, "y": v["x"] @ inverse[:, :3] + v["y"] / 1e3}
    start = lambda a: {"x": jnp.zeros_like(a), "y": jnp.zeros((*a.shape[:-1], 3))}
    options: dict[str, Any] = dict(solver=deq.NewtonKrylov(rtol=1e-9, products="jvp", preconditioner=P))
    a = jnp.stack([size * jnp.linspace(1.0, 2.0, 40) for size in (1.0, 30.0, 1e-3)])
    z, stats = deq.root(F, start(a), a, batch_ndim=1, **options)
    assert stats.converged.all() and (stats.steps < 20).all()
    f = lambda z, a: jax.tree.map(jnp.subtract, z, F(z, a))  # P is (I − J)⁻¹
    fixed = deq.fixed_point(f, start(a), a, batch_ndim=1, **options)
    assert fixed.stats.converged.all() and (fixed.stats.steps < 20).all()
    for i in range(3):
        alone = deq.root(F, start(a[i]), a[i], **options)
        assert alone.stats.steps == stats.steps[i]
        assert np.allclose(alone.value["x"], z["x"][i], rtol=1e-12)
        assert np.allclose(fixed.value["x"][i], z["x"][i], rtol=1e-6)


def test_a_poor_preconditioner_costs_steps_and_no_truth(x64):
    F = lambda z: jnp.stack([z[0] ** 2 + z[1] - 3, jnp.exp(z[0]) - 2 * z[1]])
    solver = deq.NewtonKrylov(rtol=1e-9, products="jvp", preconditioner=lambda v: jnp.stack([1e3 * v[1], -v[0]]))
    z, stats = deq.root(F, jnp.ones(2), solver=solver)
    assert names(stats) == ["CONVERGED"] and np.abs(F(z)).max() <= 1e-8
    solver = dataclasses.replace(solver, preconditioner=lambda v: 0 * v)  # a step is none
    assert names(deq.root(F, jnp.ones(2), solver=solver).stats) != ["CONVERGED"]


@pytest.mark.parametrize("solver", [None, deq.NewtonKrylov(), deq.NewtonKrylov(products="jvp"), deq.Anderson()])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_minimum_of_the_norm_that_is_no_root_is_not_sound(solver, dtype, request):
    """z² + 1, cosh(z − 1) and z⁴ + z² + 1/2 from several starts, as one batch."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    F = lambda z, kind: jnp.select([kind == 0, kind == 1], [z**2 + 1, jnp.cosh(z - 1)], z**4 + z**2 + 0.5)
    kind, z0 = jnp.repeat(jnp.arange(3), 4), jnp.tile(jnp.array([1.0, 3.0, 0.0, -1.0], dtype), 3)
    z, stats = deq.root(F, z0, kind, solver=solver, batch_ndim=1)
    assert z.dtype == dtype and not stats.sound.any(), stats
    # A root at zero is one that rounding hides.
    z, stats = deq.root(lambda z: z * jnp.exp(z), jnp.array([1.0, 0.3], dtype), solver=solver, batch_ndim=1)
    assert stats.sound.all() and (jnp.abs(z) < 1e-6).all()
