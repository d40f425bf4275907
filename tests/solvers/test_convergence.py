"""When a solve may say that it has converged: leaf by leaf, at any scale, from any start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import Status

pytestmark = pytest.mark.usefixtures("quick_compile")

# Short memories compile quickly.
SOLVERS = {
    "picard": deq.Picard(),
    "anderson": deq.Anderson(history=4),
    "broyden": deq.Broyden(rank=8),
    "newton-krylov": deq.NewtonKrylov(krylov=4),
    "robust": deq.Robust(stages=(deq.Broyden(rank=8), deq.NewtonKrylov(krylov=4))),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
accelerated = pytest.mark.parametrize("solver", list(SOLVERS.values())[1:], ids=list(SOLVERS)[1:])


def name_of(stats):
    return Status(int(stats.status)).name


# ---- leaves have units of their own ------------------------------------------------------------------------


def recycle(z, feed):
    """Two flows in mol/s beside a pressure in Pa, as of a flowsheet whose streams are fed back."""
    return {
        "flow": feed * jnp.array([10.0, 25.0]) + jnp.array([2 / 3, 0.8]) * z["flow"],
        "pressure": z["pressure"] * 0 + 101325,
    }


@each_solver
def test_small_flows_beside_a_large_pressure(solver):
    z0 = {"flow": jnp.zeros(2), "pressure": jnp.asarray(101325.0)}
    z, stats = deq.fixed_point(recycle, z0, jnp.asarray(1.0), solver=solver)
    assert stats.converged
    np.testing.assert_allclose(z["flow"], [30, 125], rtol=1e-3)
    # The flows are proportional to the feed.
    total = lambda feed: deq.fixed_point(recycle, z0, feed, solver=solver).value["flow"].sum()
    np.testing.assert_allclose(jax.grad(total)(1.0), 155, rtol=1e-3)


@each_solver
def test_each_leaf_meets_the_tolerance_and_a_leaf_of_zeros_holds_nothing_up(solver):
    f = lambda z: {"big": 0.5 * z["big"] + 500, "small": 0.9 * z["small"] + 1e-7 * z["big"], "zero": 0.5 * z["zero"]}
    z0 = {"big": jnp.zeros(2), "small": jnp.zeros(2), "zero": jnp.ones(2)}
    z, stats = deq.fixed_point(f, z0, solver=solver)
    assert stats.converged and stats.relative_residual <= 1e-4
    np.testing.assert_allclose(z["big"], 1000, rtol=1e-3)
    np.testing.assert_allclose(z["small"], 1e-3, rtol=2e-3)
    assert jnp.all(jnp.abs(z["zero"]) < 1e-7 * 1000)


def test_relative_residual_is_the_largest_of_the_leaves():
    f = lambda z: {"a": z["a"] * 0 + 1000.0, "b": z["b"] * 0 + 1.0}
    z0 = {"a": jnp.array([999.0]), "b": jnp.array([0.9])}
    stats = deq.fixed_point(f, z0, solver=deq.Picard(max_steps=1, rtol=1e-9)).stats
    np.testing.assert_allclose(stats.relative_residual, 0.1, rtol=1e-5)
    np.testing.assert_allclose(stats.residual, (1 + 0.01) ** 0.5, rtol=1e-5)


def test_one_leaf_that_drifts_beside_a_large_one_is_not_converged():
    f = lambda z: {"big": z["big"], "drift": z["drift"] + 1}
    for solver in SOLVERS.values():
        solver = dataclasses.replace(solver, rtol=1e-2, max_steps=300)
        stats = deq.fixed_point(f, {"big": jnp.full(2, 1e6), "drift": jnp.zeros(2)}, solver=solver).stats
        assert not stats.converged, solver


@pytest.mark.parametrize("solver", [deq.Anderson(history=4, rtol=1e-6), deq.Broyden(rank=8, rtol=1e-6)], ids=repr)
def test_the_backward_solve_looks_at_each_leaf_too(x64, solver):
    # dx = a, dy = 1e-6 (x + y): the cotangents of x and y differ by six orders of magnitude.
    f = lambda z, a: {"x": 0.5 * z["x"] + a, "y": 0.9 * z["y"] + 1e-6 * z["x"] * a}
    z0 = {"x": jnp.zeros(1), "y": jnp.zeros(1)}
    y = lambda a: deq.fixed_point(f, z0, a, solver=solver).value["y"][0]
    # x = 2 a and y = 1e-5 x a = 2e-5 a², so dy/da = 4e-5 a.
    np.testing.assert_allclose(jax.grad(y)(3.0), 12e-5, rtol=1e-5)


def test_many_leaves_are_measured_as_few_are():
    sizes = [1 + i % 5 for i in range(40)]
    b = [jnp.cos(jnp.arange(n * 1.0) + i) for i, n in enumerate(sizes)]
    f = lambda z, b: jax.tree.map(lambda z, b: 0.4 * jnp.sin(z) + b, z, b)
    z, stats = deq.fixed_point(f, jax.tree.map(jnp.zeros_like, b), b, solver=deq.Picard(rtol=1e-5))
    ratios = [jnp.linalg.norm(f - z) / jnp.linalg.norm(f) for f, z in zip(f(z, b), z, strict=True)]
    assert stats.converged
    np.testing.assert_allclose(stats.relative_residual, max(ratios), rtol=1e-2)


# ---- scale -------------------------------------------------------------------------------------------------

A = np.array([[0.3, 0.5, 0.0], [-0.4, 0.2, 0.3], [0.1, -0.3, 0.6]])


@each_solver
@pytest.mark.parametrize(
    "dtype, exponents", [("float32", (-84, -40, 40, 84, 110)), ("float64", (-900, -300, 300, 900))]
)
def test_powers_of_two_over_the_whole_range_change_no_step(x64, solver, dtype, exponents):
    a, b = jnp.asarray(A, dtype), jnp.arange(1.0, 4, dtype=dtype)
    run = jax.jit(lambda c: deq.fixed_point(lambda z: a @ z + c * b, jnp.zeros(3, dtype), solver=solver))
    z, stats = run(jnp.asarray(1, dtype))
    assert stats.converged
    for exponent in exponents:
        scaled, scaled_stats = run(jnp.asarray(2.0**exponent, dtype))
        assert scaled_stats.steps == stats.steps, exponent
        np.testing.assert_array_equal(scaled, z * jnp.asarray(2.0**exponent, dtype))


@pytest.mark.parametrize("h", [1e-3, 1e-6, 1e-7, 1e-9, 1e-12, 1e-20, 1e-30])
def test_a_small_start_is_no_reason_to_deny_convergence(h):
    z, stats = deq.fixed_point(lambda z, h: jnp.tanh(3 * z + h), jnp.zeros(()), jnp.float32(h), solver=deq.Picard())
    assert name_of(stats) == "CONVERGED"
    np.testing.assert_allclose(z, 0.9949, rtol=1e-3)


@each_solver
def test_a_fixed_point_of_zero_ends_at_the_rounding_of_where_the_solve_has_been(x64, solver):
    a = jnp.array([[0.3, 0.9], [-0.9, 0.3]])  # an implicit midpoint rule of a linear equation is such a map
    z, stats = deq.fixed_point(lambda z: a @ z, jnp.ones(2), solver=dataclasses.replace(solver, max_steps=2000))
    assert stats.sound and stats.steps < 800
    assert jnp.all(jnp.abs(z) < 1e-14)


def test_one_evaluation_far_out_hides_no_progress_afterwards():
    # From 1 the iteration is thrown to 1e12 and back; then 3 is approached by 0.5 % an evaluation.
    f = lambda z: jnp.where(z == 1, 1e12, jnp.where(z > 100, 5.0, 3 + 0.995 * (z - 3)))
    z, stats = deq.fixed_point(f, jnp.ones(()), solver=deq.Picard(rtol=1e-5, max_steps=2000))
    assert name_of(stats) == "CONVERGED"
    np.testing.assert_allclose(z, 3, rtol=5e-3)


def test_what_is_returned_as_stalled_is_at_the_floor():
    # The residual at z0 is 1e-30, and none is smaller: z0 is what comes back, two thirds off.
    _, stats = deq.fixed_point(lambda z: jnp.tanh(3 * z + 1e-30), jnp.zeros(()), solver=deq.Picard(rtol=0.0))
    assert not stats.sound and stats.relative_residual == 1
    # A leaf that starts at zero has no scale before it is driven.
    f = lambda z: {"a": 0.9 * z["a"], "b": 0.9 * z["b"] + 0.1 * z["a"], "c": 0.9 * z["c"] + 0.1 * z["b"]}
    z0 = {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    z, stats = deq.fixed_point(f, z0, solver=deq.Picard(max_steps=2000))
    assert name_of(stats) == "STALLED" and stats.steps < 300
    assert max(jnp.max(x) for x in z.values()) < 1e-6


@each_solver
def test_what_has_no_fixed_point_nearby_is_not_converged(solver):
    solver = dataclasses.replace(solver, max_steps=400)
    for shift in (1.0, 0.01, 1e-4):
        assert not deq.fixed_point(lambda z: z + shift, jnp.zeros(2), solver=solver).stats.converged
        assert not deq.fixed_point(lambda z: z + shift, jnp.full(2, 1e-6), solver=solver).stats.converged
    z, stats = deq.fixed_point(lambda z: 1.2 * z + 1, jnp.zeros(2), solver=solver)
    if isinstance(solver, deq.Picard):
        assert name_of(stats) == "DIVERGED"
    else:
        np.testing.assert_allclose(z, -5, rtol=1e-3)


# ---- starts ------------------------------------------------------------------------------------------------


@each_solver
def test_a_start_with_infinite_entries_is_refused_by_name(solver):
    with pytest.raises(ValueError, match=r"z0\['cost'\] has infinite entries"):
        deq.fixed_point(lambda z: z, {"cost": jnp.array([0.0, jnp.inf])}, solver=solver)


@each_solver
def test_a_traced_start_that_is_not_finite_is_said_to_be(solver):
    f = lambda z: 0.5 * jnp.where(jnp.isfinite(z), z, 1) + 0.2
    run = jax.jit(lambda z0: deq.fixed_point(f, z0, batch_ndim=1, solver=solver))
    z, stats = run(jnp.array([[0.0, 0], [jnp.inf, 0], [jnp.nan, 0]]))
    alone = deq.fixed_point(f, jnp.zeros((1, 2)), batch_ndim=1, solver=solver)
    assert [Status(int(s)).name for s in stats.status] == ["CONVERGED", "NONFINITE", "NONFINITE"]
    np.testing.assert_array_equal(z[0], alone.value[0])
    assert stats.steps[0] == alone.stats.steps[0]


# ---- differences -------------------------------------------------------------------------------------------


def test_newton_krylov_widens_a_difference_that_rounding_has_lost():
    # In float32 z + 1e-8 z is z: the products with J are lost until the difference is wider.
    a = jnp.array([[1.5, 0.4, 0.0], [-0.3, -1.2, 0.5], [0.2, 0.1, 2.0]])
    f = lambda z: jnp.tanh(a @ z) + jnp.array([0.3, -0.2, 0.1])
    for difference in (1e-9, 1e-8, 1e-7):
        solver = deq.NewtonKrylov(difference=difference, krylov=3)
        z, stats = deq.fixed_point(f, jnp.full(3, 0.5), solver=solver)
        assert stats.converged, difference
        np.testing.assert_allclose(z, [1.2540, -0.0164, 1.0842], atol=1e-3)
