"""The loop cannot lie, scale is immaterial, and the solvers obey the laws of their papers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import gaussian, symmetric

import deq_jax as deq
from deq_jax import Status
from deq_jax import solvers as deq_solvers
from deq_jax._low_rank import projected

pytestmark = pytest.mark.usefixtures("quick_compile")

# Short memories: compiling Anderson's elimination takes time that grows with its history.
SOLVERS = {
    "picard": deq.Picard,
    "anderson": functools.partial(deq.Anderson, history=4),
    "broyden": functools.partial(deq.Broyden, rank=8),
}
each_solver = pytest.mark.parametrize("Solver", SOLVERS.values(), ids=SOLVERS.keys())


def solve(*args):
    """Value and stats of a solve."""
    return deq_solvers.run_loop(*args)[:2]


solve_jit = jax.jit(solve, static_argnums=(0, 3))  # solvers are pytrees: a tolerance or damping is traced


@functools.partial(jax.jit, static_argnames="kind")
def solve_batch(a, b, z0, solver, kind="affine"):
    """Problems z = a z + b (or its tanh), one a row."""
    act = jnp.tanh if kind == "tanh" else lambda y: y
    return solve(lambda z: act(jnp.einsum("nij,nj->ni", a, z) + b), z0, solver, 1)


def rotation(key, n, dim, radius):
    """n orthogonal matrices times `radius`: every eigenvalue is on that circle."""
    return radius * jnp.linalg.qr(jax.random.normal(key, (n, dim, dim)))[0]


def cosine(z):
    return jnp.cos(z)


# ---- a solve cannot lie ------------------------------------------------------------------------------------


@each_solver
def test_residual_is_undamped_and_belongs_to_the_returned_value(x64, rng, Solver):
    a, b = 0.9 * symmetric(rng, 1, 6, 1.0)[0], jax.random.normal(rng, (6,))
    f = lambda z: jnp.tanh(a @ z + b)
    for damping in (0.01, 0.3, 0.7, 0.99, 1.0):
        z, stats = solve_jit(f, jnp.zeros(6), Solver(rtol=1e-9, max_steps=40, damping=damping), 0)
        true = np.linalg.norm(f(z) - z)
        np.testing.assert_allclose(stats.residual, true, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(stats.relative_residual, true / np.linalg.norm(f(z)), rtol=1e-9, atol=1e-15)
        assert bool(stats.converged) == bool(true <= 1e-9 * np.linalg.norm(f(z)))


@each_solver
def test_steps_are_the_evaluations_of_f(x64, count_calls, Solver):
    f = count_calls(lambda z: jnp.cos(z))
    for max_steps in (0, 1, 2, 5, 100):
        before = f.calls
        _, stats = solve_jit(f, jnp.zeros(3), Solver(max_steps=jnp.asarray(max_steps)), 0)
        assert f.calls - before == stats.steps
        assert stats.steps == max_steps if max_steps <= 2 else stats.steps <= max_steps


@each_solver
def test_evaluations_of_a_batch_are_those_of_its_slowest_problem(x64, count_calls, Solver):
    slope = jnp.array([[0.0], [0.3], [0.9]])
    f = count_calls(lambda z: jnp.tanh(slope * z + 1.0))
    _, stats = solve_jit(f, jnp.zeros((3, 2)), Solver(rtol=1e-8, max_steps=400), 1)
    assert jnp.all(stats.converged)
    assert f.calls == stats.steps.max()
    assert stats.steps.min() < stats.steps.max()


@each_solver
def test_budgets_of_zero_one_and_two(x64, Solver):
    z0 = jnp.array([1.0, 2.0])
    budget = lambda n: solve_jit(cosine, z0, Solver(max_steps=jnp.asarray(n)), 0)
    z, stats = budget(0)
    np.testing.assert_array_equal(z, z0)
    assert (stats.steps, stats.residual, stats.status) == (0, jnp.inf, Status.MAX_STEPS)

    z, stats = budget(1)
    np.testing.assert_array_equal(z, z0)  # the only iterate whose residual is known
    np.testing.assert_allclose(stats.residual, np.linalg.norm(np.cos(z0) - z0), rtol=1e-14)
    assert (stats.steps, stats.status) == (1, Status.MAX_STEPS)

    z, stats = budget(2)
    np.testing.assert_allclose(z, np.cos(z0), rtol=1e-14)  # all three begin with one plain iteration
    assert (stats.steps, stats.status) == (2, Status.MAX_STEPS)

    for n in (0, 1, 2):  # a Python int is the same budget
        _, stats = solve(cosine, z0, deq.Picard(max_steps=n))
        assert (stats.steps, stats.status) == (n, Status.MAX_STEPS)


@each_solver
def test_each_status(Solver):
    f = lambda z: jnp.stack([jnp.cos(z[0]), jnp.sqrt(z[1] - 1), 1 / z[2], z[3] * 1e30 + 1])
    z0 = jnp.zeros((4, 4))
    z, stats = solve_jit(f, z0, Solver(max_steps=jnp.asarray(50)), 1)
    names = [Status(int(s)).name for s in stats.status]
    assert names[:3] == ["CONVERGED", "NONFINITE", "NONFINITE"]
    assert names[3] in ("DIVERGED", "NONFINITE", "STALLED", "MAX_STEPS")
    np.testing.assert_array_equal(stats.converged, stats.status == Status.CONVERGED)
    np.testing.assert_array_equal(z[1:3], 0)
    np.testing.assert_array_equal(stats.residual[1:3], jnp.inf)

    _, stats = solve_jit(f, z0, Solver(max_steps=jnp.asarray(3)), 1)
    assert (stats.status[0], stats.steps[0]) == (Status.MAX_STEPS, 3)
    _, stats = solve_jit(f, z0, Solver(max_steps=jnp.asarray(5000), rtol=0.0), 1)
    hit = stats.residual[0] == 0  # rounding may also reach f(z) == z exactly
    assert stats.status[0] == (Status.CONVERGED if hit else Status.STALLED)


def test_picard_diverges(x64):
    z, stats = solve(lambda z: 10 * z + 1, jnp.zeros(3), deq.Picard())
    assert stats.status == Status.DIVERGED
    np.testing.assert_array_equal(z, jnp.zeros(3))  # no later iterate had a smaller residual
    assert stats.steps < 20


NO_FIXED_POINT = {
    "z + 1": lambda z: z + 1,
    "z + v": lambda z: z + jnp.arange(1.0, 1 + z.shape[0], dtype=z.dtype),
    "z² + 1": lambda z: z**2 + 1,
    "exp z": jnp.exp,
    "sqrt(z - 1)": lambda z: jnp.sqrt(z - 1),
    "z + 1 + z²": lambda z: z + 1 + z**2,
    "log(-1 - z²)": lambda z: jnp.log(-1 - z**2),
}


@each_solver
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_map_without_a_fixed_point_never_converges(x64, dtype, Solver):
    # A row for each map and start; each row is a problem of its own.
    maps, starts = list(NO_FIXED_POINT.values()), jnp.array([0.0, 1.0, 30.0], dtype)
    f = lambda z: jnp.stack([jax.vmap(g)(rows) for g, rows in zip(maps, z, strict=True)])
    z0 = jnp.broadcast_to(starts[:, None], (len(maps), 3, 3))
    z, stats = solve(f, z0, Solver(), 2)
    for name, row in zip(NO_FIXED_POINT, stats.status, strict=True):
        assert not jnp.any(row == Status.CONVERGED), (name, row)
    assert jnp.all(jnp.isfinite(z)) and not jnp.any(jnp.isnan(stats.residual))


@each_solver
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_expanding_map_converges_only_to_its_fixed_point(x64, dtype, Solver):
    z, stats = solve(lambda z: 10 * z + 1, jnp.zeros(3, dtype), Solver())
    if Solver is deq.Picard:
        assert stats.status == Status.DIVERGED
    else:
        assert stats.converged
        np.testing.assert_allclose(z, -1 / 9, rtol=1e-3)


@each_solver
def test_the_best_iterate_survives_a_later_nan(x64, Solver):
    # z + (0.5 − 0.3 z) goes 0, 0.5, 0.85, 1.095 under Picard, and is undefined above 1.
    f = lambda z: jnp.where(z > 1, jnp.nan, z + 0.5 - 0.3 * z)
    z, stats = solve(f, jnp.zeros(2), Solver())
    steps_back = Solver is SOLVERS["broyden"]
    assert stats.status == (Status.MAX_STEPS if steps_back else Status.NONFINITE)
    assert jnp.all(jnp.isfinite(z)) and jnp.isfinite(stats.residual)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(f(z) - z), rtol=1e-12)
    if Solver is deq.Picard:
        np.testing.assert_allclose(z, 0.85, rtol=1e-12)
        assert stats.steps == 4
    elif steps_back:
        assert jnp.all((z > 0.9) & (z <= 1))  # as near the edge as it can get
    else:
        # The secant step lands on 5/3, and plain steps take its place until one is undefined as well.
        np.testing.assert_allclose(z, 0.85, rtol=1e-12)


def test_the_best_iterate_is_returned_not_the_last(x64):
    # A slow outward spiral: the residual grows from the first iterate on, too little to call it diverged.
    z, stats = solve(lambda z: -1.01 * z, jnp.ones(3), deq.Picard(max_steps=20))
    np.testing.assert_array_equal(z, jnp.ones(3))
    assert stats.status == Status.MAX_STEPS
    np.testing.assert_allclose(stats.residual, 2.01 * 3**0.5, rtol=1e-12)


@each_solver
def test_norms_beyond_the_square_root_of_the_range(Solver):
    # float32, where squares are 1e60 or 1e-60: such norms are right, and all solvers converge.
    c = jnp.array([1e30, 1e-30])[:, None]
    z, stats = solve(lambda z: 0.5 * z + c, c * jnp.ones((2, 5)), Solver(), 1)
    true = jnp.abs(0.5 * z + c - z).max(-1) * 5**0.5
    np.testing.assert_allclose(stats.residual, true, rtol=1e-3, atol=0)
    assert jnp.all(stats.converged)


@each_solver
def test_an_overflow_is_never_converged(Solver):
    # In float32 both norms become inf, and inf ≤ rtol·inf holds.
    z, stats = solve(lambda z: z * 1e20, jnp.ones(4), Solver(max_steps=5))
    assert stats.status != Status.CONVERGED
    assert jnp.all(jnp.isfinite(z))


@each_solver
def test_zero_is_a_fixed_point_like_any_other(Solver):
    z, stats = solve(lambda z: 0.5 * z, jnp.zeros(3), Solver())
    assert (stats.status, stats.steps, stats.residual, stats.relative_residual) == (Status.CONVERGED, 1, 0, 0)


@pytest.mark.full_compile
@each_solver
def test_a_start_at_the_solution_takes_one_evaluation(x64, Solver):
    z, _ = solve_jit(cosine, jnp.zeros(3), Solver(rtol=1e-10), 0)
    again, stats = solve_jit(cosine, z, Solver(rtol=1e-10), 0)
    assert stats.steps == 1 and stats.converged
    np.testing.assert_array_equal(again, z)


@each_solver
def test_an_absolute_tolerance(x64, Solver):
    _, stats = solve(cosine, jnp.zeros(3), Solver(rtol=0.0, atol=1e-3))
    assert stats.converged and 1e-8 < stats.residual <= 1e-3


# ---- problems of a batch are independent -------------------------------------------------------------------


@each_solver
def test_a_batch_equals_its_problems_solved_alone(x64, rng, Solver):
    radius = jnp.array([0.0, 0.3, 0.6, 0.9, 0.97])
    a = symmetric(rng, 5, 6, 1.0) * radius[:, None, None]
    b, z0 = jax.random.normal(rng, (5, 6)), jnp.zeros((5, 6))
    solver = Solver(rtol=1e-7, max_steps=150)
    z, stats = solve_batch(a, b, z0, solver)
    assert len(set(stats.steps.tolist())) > 2  # of mixed difficulty
    for i in range(5):
        alone, alone_stats = solve_batch(a[i, None], b[i, None], z0[i, None], solver)
        assert (stats.steps[i], stats.status[i]) == (alone_stats.steps[0], alone_stats.status[0])
        np.testing.assert_allclose(z[i], alone[0], rtol=1e-11, atol=1e-13)


def test_a_problem_that_failed_stays_failed_while_others_run(x64):
    rows = [lambda z: 0.95 * z + 1, lambda z: 10 * z + 1, lambda z: jnp.where(z > 2.5, jnp.nan, z + 1)]
    solver = deq.Picard(rtol=1e-6, max_steps=1000)
    _, stats = solve_jit(
        lambda z: jnp.stack([f(row) for f, row in zip(rows, z, strict=True)]), jnp.zeros((3, 2)), solver, 1
    )
    assert [Status(int(s)).name for s in stats.status] == ["CONVERGED", "DIVERGED", "NONFINITE"]
    for i, f in enumerate(rows):
        assert stats.steps[i] == solve_jit(f, jnp.zeros(2), solver, 0)[1].steps
    assert stats.steps[2] == 4 and stats.steps[1] / stats.steps[0] < 0.2


@pytest.mark.full_compile
@each_solver
def test_one_bad_problem_of_64_leaves_the_bits_of_the_others(x64, rng, Solver):
    a, x = 0.7 * symmetric(rng, 64, 4, 1.0), jax.random.normal(rng, (64, 4))

    @jax.jit
    def values_and_gradients(a, x):
        def loss(a, x):
            f = lambda z, a, x: jnp.sin(jnp.einsum("nij,nj->ni", a, z)) + x
            adjoint = deq.Implicit(Solver(rtol=1e-8))
            z, stats = deq.fixed_point(f, jnp.zeros((64, 4)), a, x, solver=Solver(), adjoint=adjoint, batch_ndim=1)
            return jnp.sum(z**2), (z, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(a, x)

    clean = values_and_gradients(a, x)
    assert jnp.all(clean[1][1].converged)
    others = np.arange(64) != 17
    diverging = (a.at[17].set(1e9 * jnp.eye(4)), x)
    for bad in (*((a, x.at[17].set(value)) for value in (jnp.nan, jnp.inf, 1e300)), diverging):
        spoilt = values_and_gradients(*bad)
        for before, after in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
            np.testing.assert_array_equal(before[others], after[others])
        assert jnp.all(jnp.isfinite(spoilt[1][0]))


@each_solver
def test_permuting_the_batch_permutes_the_answer(x64, rng, Solver):
    a = symmetric(rng, 5, 6, 1.0) * jnp.linspace(0.1, 0.9, 5)[:, None, None]
    b, z0, order = jax.random.normal(rng, (5, 6)), jnp.zeros((5, 6)), jnp.array([3, 0, 4, 1, 2])
    z, stats = solve_batch(a, b, z0, Solver())
    permuted, permuted_stats = solve_batch(a[order], b[order], z0, Solver())
    np.testing.assert_allclose(permuted, z[order], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(permuted_stats.steps, stats.steps[order])


def test_two_batch_axes_equal_one(x64, rng):
    a = symmetric(rng, 6, 4, 1.0) * jnp.linspace(0.1, 0.9, 6)[:, None, None]
    b = jax.random.normal(rng, (6, 4))
    flat, flat_stats = solve_batch(a, b, jnp.zeros((6, 4)), deq.Anderson())
    grid_f = lambda z: (jnp.einsum("nij,nj->ni", a, z.reshape(6, 4)) + b).reshape(2, 3, 4)
    grid, grid_stats = solve(grid_f, jnp.zeros((2, 3, 4)), deq.Anderson(), 2)
    np.testing.assert_allclose(grid.reshape(6, 4), flat, rtol=1e-12)
    np.testing.assert_array_equal(grid_stats.steps.reshape(6), flat_stats.steps)


# ---- scale, basis, leaves ----------------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_changes_no_iteration_count(x64, rng, Solver, dtype):
    # c·problem is f_c(z) = c f(z / c), here for seven c, a row each, and a linear and a tanh f.
    c = jnp.array([1, 1e-4, 1e-2, 1e2, 1e4, 2.0**-20, 2.0**20], dtype)[:, None, None]
    a = (0.9 * symmetric(rng, 1, 8, 1.0)[0]).astype(dtype)
    b = jax.random.normal(rng, (8,), dtype)

    def f(z):
        linear = jnp.einsum("ij,nkj->nki", a, z / c) + b[None, None]
        return c * jnp.where(jnp.arange(2)[None, :, None] == 0, linear, jnp.tanh(linear))

    z, stats = solve_jit(f, c * jnp.ones((1, 2, 8), dtype), Solver(max_steps=200), 2)
    assert jnp.all(stats.converged)
    np.testing.assert_array_equal(stats.steps, jnp.broadcast_to(stats.steps[0], (7, 2)))
    np.testing.assert_allclose(z / c, jnp.broadcast_to(z[0], z.shape), rtol=1e-3, atol=1e-3)


@each_solver
def test_a_rotation_of_the_basis_changes_no_iteration_count(x64, rng, Solver):
    a, q = 0.9 * symmetric(rng, 1, 8, 1.0)[0], rotation(jax.random.key(1), 1, 8, 1.0)[0]
    b = jax.random.normal(rng, (8,))
    f = lambda z: jnp.tanh(a @ z + b)
    z, stats = solve(f, jnp.zeros(8), Solver(rtol=1e-6))
    rotated, rotated_stats = solve(lambda y: q @ f(q.T @ y), jnp.zeros(8), Solver(rtol=1e-6))
    assert stats.steps == rotated_stats.steps
    np.testing.assert_allclose(q.T @ rotated, z, rtol=1e-9, atol=1e-12)


@pytest.mark.full_compile
@each_solver
def test_leaves_are_one_vector(x64, rng, Solver):
    a, b = 0.9 * symmetric(rng, 1, 8, 1.0)[0], jax.random.normal(rng, (8,))
    f = lambda z: jnp.tanh(a @ z + b)

    def split(z):
        return {"head": z[:1], "tail": (z[1:3].reshape(1, 2), [z[3:4], None, z[4:]])}

    def joined(tree):
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    # Only the test of convergence looks at leaves, so the iterates after any number of evaluations are the same.
    for evaluations in (3, 6, 9):
        solver = Solver(rtol=0.0, max_steps=evaluations)
        z, stats = solve(f, jnp.zeros(8), solver)
        tree, tree_stats = solve(lambda t: split(f(joined(t))), split(jnp.zeros(8)), solver)
        assert jax.tree.structure(tree) == jax.tree.structure(split(z))
        # To rounding: inner products are summed leaf by leaf.
        np.testing.assert_allclose(joined(tree), z, rtol=1e-10, atol=1e-13)
        np.testing.assert_array_equal(tree_stats.steps, stats.steps)
        np.testing.assert_allclose(tree_stats.residual, stats.residual, rtol=1e-8)


# ---- dtypes ------------------------------------------------------------------------------------------------


def slow_tanh(z):
    return jnp.tanh(0.8 * jnp.flip(z) + jnp.linspace(-1, 1, z.size).astype(z.dtype))


@each_solver
@pytest.mark.parametrize("wide", [False, True], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(request, Solver, dtype, wide):
    if dtype == "float64" and not wide:
        pytest.skip("float64 needs x64")
    if wide:
        request.getfixturevalue("x64")
    eps, stat = float(jnp.finfo(dtype).eps), jnp.float64 if dtype == "float64" else jnp.float32
    z, stats = solve_jit(slow_tanh, jnp.zeros(16, dtype), Solver(rtol=5 * eps, max_steps=5000), 0)
    assert stats.converged
    assert z.dtype == dtype and stats.residual.dtype == stat and stats.steps.dtype == jnp.int32
    # The reported residual is the norm, in float32 or wider, of what f itself returned in its dtype.
    true = jnp.linalg.norm(slow_tanh(z).astype(stat) - z.astype(stat))
    np.testing.assert_allclose(stats.residual, true, rtol=0.02, atol=4 * eps * 16**0.5)

    # At the floor of the dtype the solve ends, with all that the dtype can hold.
    z, stats = solve_jit(slow_tanh, jnp.zeros(16, dtype), Solver(rtol=0.0, max_steps=5000), 0)
    assert stats.status == (Status.CONVERGED if stats.residual == 0 else Status.STALLED)
    assert stats.steps < 300
    assert stats.relative_residual < 4 * eps


@each_solver
def test_a_large_low_precision_state_is_summed_in_float32(Solver):
    # ‖z‖ ≈ 6e4: a float16 norm overflows, and a bfloat16 sum stops growing at 256.
    for dtype in ("float16", "bfloat16"):
        z, stats = solve(lambda z: 0.5 * z + 100, jnp.zeros(100_000, dtype), Solver(rtol=2e-2))
        assert stats.converged, dtype
        np.testing.assert_allclose(z.astype(jnp.float32), 200, rtol=0.05)


def test_mixed_dtypes_in_one_state():
    f = lambda z: {"a": jnp.cos(z["a"]), "b": (0.5 * z["b"] + 1).astype(jnp.bfloat16)}
    z, stats = solve(f, {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16)}, deq.Anderson(rtol=1e-3))
    assert stats.converged and z["a"].dtype == jnp.float32 and z["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(z["a"], 0.739085, rtol=5e-3)


@each_solver
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_states(x64, Solver, dtype):
    # z = c z + 1 with |c| = .9: the residual must be a norm, not a complex square that can vanish.
    c = (0.9 * jnp.exp(jnp.array([0.3j, 1.2j, 2.8j]))).astype(dtype)
    z, stats = solve(lambda z: c * z + 1, jnp.zeros(3, dtype), Solver(rtol=1e-5, max_steps=300))
    assert stats.converged and z.dtype == dtype and not jnp.iscomplexobj(stats.residual)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(c * z + 1 - z), rtol=0.05)
    np.testing.assert_allclose(z, 1 / (1 - c), rtol=1e-3)


# ---- laws --------------------------------------------------------------------------------------------------

FAMILIES = {
    "symmetric .5": (symmetric, 0.5, "affine"),
    "symmetric .95": (symmetric, 0.95, "affine"),
    "symmetric .95 tanh": (symmetric, 0.95, "tanh"),
    "gaussian .6 tanh": (gaussian, 0.6, "tanh"),
    "gaussian .9 tanh": (gaussian, 0.9, "tanh"),
    "rotation .5": (rotation, 0.5, "affine"),
    "rotation .9": (rotation, 0.9, "affine"),
    "rotation .9 tanh": (rotation, 0.9, "tanh"),
}


def family(name, key, n, dim):
    make, radius, kind = FAMILIES[name]
    return make(key, n, dim, radius), jax.random.normal(jax.random.fold_in(key, 1), (n, dim)), kind


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("name", FAMILIES)
def test_anderson_needs_at_most_a_fifth_more_than_picard(x64, rng, name, rtol):
    a, b, kind = family(name, rng, 20, 30)
    z0 = jnp.zeros_like(b)
    _, picard = solve_batch(a, b, z0, deq.Picard(rtol=rtol, max_steps=1000), kind)
    _, anderson = solve_batch(a, b, z0, deq.Anderson(rtol=rtol, max_steps=1000), kind)
    assert jnp.all(anderson.converged | ~picard.converged)
    worst = jnp.max(jnp.where(picard.converged, anderson.steps / picard.steps, 0))
    assert worst <= 1.2, f"{name}: {anderson.steps} against Picard's {picard.steps}"


def test_acceleration_is_really_happening(x64, rng):
    a, b, kind = family("symmetric .95", rng, 20, 30)
    z0 = jnp.zeros_like(b)
    _, picard = solve_batch(a, b, z0, deq.Picard(rtol=1e-8, max_steps=1000), kind)
    for solver in (deq.Anderson(rtol=1e-8, max_steps=1000), deq.Broyden(rtol=1e-8, max_steps=1000, rank=40)):
        _, stats = solve_batch(a, b, z0, solver, kind)
        assert jnp.all(stats.converged)
        assert jnp.mean(stats.steps) < 0.4 * jnp.mean(picard.steps)


def test_a_linear_system_ends_within_the_dimension(x64, rng):
    # Gay (1979): good Broyden ends on a d-dimensional linear system within 2d steps, so 2d + 1 evaluations;
    # Anderson with d differences is GMRES.
    d = 20
    a = jnp.concatenate([gaussian(rng, 10, d, 0.9), symmetric(rng, 10, d, 0.95)])
    b, z0 = jax.random.normal(rng, (20, d)), jnp.zeros((20, d))
    _, broyden = solve_batch(a, b, z0, deq.Broyden(rtol=1e-9, rank=50))
    assert jnp.all(broyden.converged) and broyden.steps.max() <= 2 * d + 1, broyden.steps
    _, anderson = solve_batch(a, b, z0, deq.Anderson(rtol=1e-9, history=d))
    assert jnp.all(anderson.converged) and anderson.steps.max() <= d + 9, anderson.steps


@pytest.mark.parametrize("kind", ["affine", "tanh"])
@pytest.mark.parametrize("make", [symmetric, gaussian])
def test_limited_memory_broyden_converges_on_30_of_30(x64, rng, make, kind):
    a, b = make(rng, 30, 50, 0.9), jax.random.normal(rng, (30, 50))
    solver = deq.Broyden(rtol=1e-6, rank=6, max_steps=300)
    z, stats = solve_batch(a, b, jnp.zeros((30, 50)), solver, kind)
    assert jnp.all(stats.converged), stats


def test_anderson_survives_dependent_differences(x64):
    # A rank-one map: after two iterations every new difference depends on the older ones.
    a = 0.9 * jnp.ones((6, 6)) / 6
    z, stats = solve(lambda z: a @ z + jnp.arange(6.0), jnp.zeros(6), deq.Anderson(rtol=1e-12, history=6))
    assert stats.converged and stats.steps < 10
    np.testing.assert_allclose(z, np.linalg.solve(np.eye(6) - a, np.arange(6.0)), rtol=1e-9)


def test_anderson_step_is_the_least_squares_one(x64, rng):
    f = lambda z: jnp.cos(jnp.arange(1.0, 9) * z[::-1])
    solver = deq.Anderson(history=3, damping=0.7)
    z, zs, gs = jax.random.normal(rng, (8,)), [], []
    state = solver.init(z)
    for _ in range(7):
        g = f(z) - z
        step, state = solver.update(g, state, z)
        zs, gs = [*zs, z], [*gs, g]
        dz, dg = np.diff(zs, axis=0)[-3:], np.diff(gs, axis=0)[-3:]
        gamma = np.linalg.lstsq(dg.T, g, rcond=None)[0] if len(dg) else np.zeros(0)
        expected = 0.7 * g - gamma @ (dz + 0.7 * dg) if len(dg) else 0.7 * g
        np.testing.assert_allclose(step, expected, rtol=1e-8, atol=1e-10)
        z = z + step


def test_anderson_knows_the_products_of_its_residual_with_the_history(x64, rng):
    solver = deq.Anderson(history=3, damping=0.7, growth=1e9)
    z = jax.random.normal(rng, (8,))
    state = solver.init(z)
    for k in range(12):
        g = jnp.cos(jnp.arange(1.0, 9) * z[::-1]) + float(k >= 8) - z
        state = solver.resume(state) if k == 8 else state  # another problem
        step, state = solver.update(g * (jnp.nan if k == 5 else 1.0), state, z)
        if k != 5:
            in_use, target = jnp.diagonal(state.gram) > 0, state.gram[-1]
            # NaN ends a history, but is no part of the next pair; the problem's change gives none.
            assert in_use.sum() == {6: 1, 7: 2, 8: 2, 9: 2, 10: 2}.get(k, min(k, 3))
            np.testing.assert_allclose(target[in_use], (state.dg @ g)[in_use], rtol=1e-10, atol=1e-13)
            z = z + step


def test_anderson_ridge_is_relative(x64, rng):
    # The differences of a problem a million times larger are regularized no less.
    solver = deq.Anderson(history=3, ridge=1e-3)
    zs, gs = jax.random.normal(rng, (2, 4, 6))

    def steps(scale):
        state = solver.init(zs[0])
        for z, g in zip(zs, gs, strict=True):
            step, state = solver.update(scale * g, state, scale * z)
        return step / scale

    for scale in (2.0**-20, 2.0**20):
        np.testing.assert_allclose(steps(scale), steps(1.0), rtol=1e-12)


LOG = np.array([2.0, 3.75, 5.0, 8.0])[:, None]


def log_cell(n, c):
    """Defined for n > 1. Plain iteration stays there; an extrapolated iterate may not."""
    return 1 + jnp.log(3 / n) / jnp.log(c * n / (n - 1))


def plain_iteration(f, z, count, *args):
    for _ in range(count):
        z = f(z, *args)
    return z


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_anderson_takes_back_a_step_out_of_the_domain_of_f(x64, dtype):
    c, rtol = jnp.asarray(LOG, dtype), {"float32": 1e-5, "float64": 1e-10}[dtype]
    want = plain_iteration(log_cell, jnp.full((4, 1), 1.3), 200, LOG)
    run = jax.jit(lambda c, z0, solver: solve(lambda z: log_cell(z, c), z0, solver, 1))
    for start in (1.001, 1.01, 1.4):
        for damping in (0.7, 1.0):
            solver = deq.Anderson(rtol=rtol, damping=damping, history=3)
            n, stats = run(c, jnp.full((4, 1), start, dtype), solver)
            assert stats.converged.all(), (start, damping, stats)
            np.testing.assert_allclose(n, want, rtol=20 * rtol)


def over_devices(f):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    return jax.shard_map(f, mesh=mesh, in_specs=(spec, spec), out_specs=spec)


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap, over_devices], ids=["batch", "vmap", "shard_map"])
def test_the_step_back_under_transforms(x64, transform):
    run = lambda z0, c: solve(lambda z: log_cell(z, c), z0, deq.Anderson(rtol=1e-9, history=3), z0.ndim - 1)
    n, stats = jax.jit(transform(run))(jnp.full((4, 1), 1.001), LOG)
    assert stats.converged.all()
    np.testing.assert_allclose(n, plain_iteration(log_cell, jnp.full((4, 1), 1.3), 200, LOG), rtol=1e-7)


@pytest.mark.parametrize("every", [2, 3])
def test_anderson_steps_back_from_an_iterate_that_plain_steps_made_nan(x64, every):
    solver = deq.Anderson(rtol=1e-9, history=3, test_every=every)
    n, stats = solve_jit(lambda n: log_cell(n, LOG), jnp.full((4, 1), 1.001), solver, 1)
    assert stats.converged.all()
    np.testing.assert_allclose(n, plain_iteration(log_cell, jnp.full((4, 1), 1.3), 200, LOG), rtol=1e-7)


def test_a_problem_that_leaves_its_domain_changes_no_bit_of_the_others():
    c = jnp.asarray(LOG, jnp.float32)
    run = jax.jit(lambda z0: deq_solvers.run_loop(lambda n: log_cell(n, c), z0, deq.Anderson(rtol=1e-5, history=3), 1))
    near = jnp.full((4, 1), 1.4)
    stays, leaves = run(near), run(near.at[2].set(1.001))
    assert leaves.stats.converged.all() and leaves.stats.steps[2] > stays.stats.steps[2]
    others = np.arange(4) != 2
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(leaves))
    before_and_after = map(jax.tree.leaves, ((stays.value, stays.stats), (leaves.value, leaves.stats)))
    for before, after in zip(*before_and_after, strict=True):
        np.testing.assert_array_equal(before[others], after[others])


@pytest.mark.parametrize("bad", ["NaN", "Inf", "Inf at Inf", "huge"])
def test_what_is_not_finite_leaves_no_trace_in_the_history(x64, rng, bad):
    f = lambda z: jnp.cos(jnp.arange(1.0, 9) * z[::-1])
    solver = deq.Anderson(history=3, damping=0.7)
    z = jax.random.normal(rng, (8,))
    state = solver.init(z)
    for _ in range(4):
        last, g = z, f(z) - z
        step, state = solver.update(g, state, z)
        z = z + step
    assert solver.can_backtrack(state)
    where = {"NaN": z, "Inf": z, "Inf at Inf": z.at[1].set(jnp.inf), "huge": 1e200 * z}[bad]
    worst = jnp.zeros(8).at[3].set(jnp.nan if bad == "NaN" else jnp.inf)
    step, after = solver.update(worst, state, where)
    np.testing.assert_allclose(solver.next_point(after, where + step), last + 0.7 * g, rtol=1e-15)
    assert not solver.can_backtrack(after)  # from a plain step there is no way back
    for name, old, new in zip(state._fields, state, after, strict=True):
        assert jnp.all(jnp.isfinite(new))
        if name == "gram":  # of differences that are in use no longer the diagonal is zero, and all else as it was
            np.testing.assert_array_equal(jnp.where(jnp.eye(4, 3, dtype=bool), 0, old), new)
        elif name in ("w", "g", "dw", "dg", "least", "mark"):
            np.testing.assert_array_equal(old, new, err_msg=name)
    # The next pair is that of the two iterates on either side of it.
    z = solver.next_point(after, where + step)
    _, then = solver.update(f(z) - z, after, z)
    np.testing.assert_allclose(then.dg[(after.count - 1) % 3], f(z) - z - g, rtol=1e-12)
    assert jnp.sum(jnp.diagonal(then.gram) > 0) == 1


def test_nan_at_a_plain_step_is_final(x64, count_calls):
    for limit, calls in ((0.4, 2), (0.6, 4)):  # z1 = .5 is beyond; z2 is, and so is .975 in its place
        f = count_calls(lambda z, limit=limit: jnp.where(z > limit, jnp.nan, 0.95 * z + 0.5))
        z, stats = solve_jit(f, jnp.zeros(()), deq.Anderson(), 0)
        assert (stats.status, stats.steps, f.calls) == (Status.NONFINITE, calls, calls)
        assert z == (0.0 if limit < 0.5 else 0.5)


def test_robust_lets_anderson_step_back(x64):
    stages = deq.Anderson(history=3), deq.NewtonKrylov(krylov=1)
    solver = deq.Robust(rtol=1e-9, stages=stages)
    solved = jax.jit(lambda z0: deq_solvers.run_loop(lambda n: log_cell(n, LOG), z0, solver, 1))(
        jnp.full((4, 1), 1.001)
    )
    assert solved.stats.converged.all() and jnp.all(solved.memory.stage == 0)


def test_robust_gives_each_problem_of_a_batch_what_it_is_given_alone(x64, rng):
    # They fail at different times: those that come to a stage wait for each other, and then begin it together.
    stages = deq.Anderson(history=2), deq.Broyden(rank=4), deq.NewtonKrylov(krylov=6)
    solver = deq.Robust(rtol=1e-9, max_steps=300, stages=stages, stall=(4, 8))
    gains = jnp.linspace(0.5, 3, 24)[:, None, None]
    a, b = (
        gains * jax.random.normal(rng, (24, 12, 12)) / 12**0.5,
        jax.random.normal(jax.random.fold_in(rng, 1), (24, 12)),
    )
    f = lambda z, a, b: jnp.tanh((a @ z[..., None])[..., 0] + b)
    options = dict(solver=solver)
    together = jax.jit(lambda a, b: deq.solve(f, jnp.zeros((24, 12)), a, b, batch_ndim=1, **options))(a, b)
    alone = jax.jit(jax.vmap(lambda a, b: deq.solve(f, jnp.zeros(12), a, b, **options)))(a, b)
    assert set(np.asarray(alone.memory.stage)) == {0, 1, 2}
    assert len(set(np.asarray(alone.stats.steps))) > 12
    np.testing.assert_array_equal(together.stats.status, alone.stats.status)
    np.testing.assert_array_equal(together.stats.steps, alone.stats.steps)
    np.testing.assert_allclose(together.value, alone.value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_anderson_does_not_stand_still_where_plain_iteration_goes_on(x64, dtype):
    # Job search: in units of wages that are declined, f is the same number, and the history has no step to offer.
    wage, beta = jnp.linspace(10, 20, 11, dtype=dtype)[None], jnp.linspace(0.5, 0.97, 200, dtype=dtype)[:, None]
    p = jnp.exp(-0.5 * ((wage[0] - 15) / 2) ** 2)
    p, rtol = p / p.sum(), {"float32": 1e-5, "float64": 1e-9}[dtype]
    f = lambda v: jnp.maximum(wage / (1 - beta), 12 + beta * (v @ p)[:, None])
    z0 = wage / (1 - beta)
    v, plain = solve_jit(f, z0, deq.Picard(rtol=rtol, max_steps=400), 1)
    got, stats = solve_jit(f, z0, deq.Anderson(rtol=rtol, max_steps=400, history=4), 1)
    assert plain.converged.all() and stats.converged.all(), stats.steps.max()
    assert jnp.all(stats.steps / plain.steps <= 1.2)
    np.testing.assert_allclose(got, v, rtol=40 * rtol)


def test_anderson_leaves_a_cycle_by_plain_steps(x64):
    # On a line Anderson is the secant method, which cycles about kinks; the median of contractions is one.
    draws = np.random.default_rng(1)
    slope, at = 0.95 * draws.choice([-1.0, 1.0], (400, 5, 1)), draws.standard_normal((400, 5, 1))
    f = lambda z: jnp.sort(slope * z[:, None] + at, axis=1)[:, 2]
    z0 = jnp.asarray(3 * draws.standard_normal((400, 1)))
    want, plain = solve_jit(f, z0, deq.Picard(rtol=1e-9, max_steps=1000), 1)
    assert plain.converged.all()
    for scale in (1.0, 2.0**60, 2.0**-60):
        scaled = lambda z, scale=scale: scale * f(z / scale)
        z, stats = solve_jit(scaled, scale * z0, deq.Anderson(rtol=1e-9, max_steps=500, history=2), 1)
        assert stats.converged.all(), stats.status
        np.testing.assert_allclose(z / scale, want, rtol=1e-6, atol=1e-9)
        steps = stats.steps if scale == 1 else steps
        np.testing.assert_array_equal(stats.steps, steps)


def test_picard_step():
    step, _ = deq.Picard(damping=0.25).update(jnp.array([4.0, -8.0]), (), jnp.zeros(2))
    np.testing.assert_array_equal(step, [1.0, -2.0])


@pytest.mark.parametrize("every", [2, 5])
def test_a_rarer_test_ends_at_the_next_iterate_that_is_tested(x64, rng, count_calls, every):
    a, b = symmetric(rng, 4, 6, 1.0), jax.random.normal(rng, (4, 6))
    a = a * jnp.array([0.2, 0.5, 0.8, 0.9])[:, None, None]
    f = count_calls(lambda z: jnp.einsum("nij,nj->ni", a, z) + b)
    each = solve_batch(a, b, b, deq.Picard(rtol=1e-6, max_steps=500))[1].steps
    z, stats = solve_jit(f, b, deq.Picard(rtol=1e-6, max_steps=500, test_every=every), 1)
    assert f.calls == stats.steps.max()
    rounds = -(-(each - 1) // every)  # after z0
    np.testing.assert_array_equal(stats.steps, 1 + every * rounds)
    assert stats.converged.all() and len(set(each.tolist())) == 4
    for i, steps in enumerate(stats.steps.tolist()):  # the iterate of a problem that stopped is not moved on
        want = b[i]
        for _ in range(steps - 1):
            want = a[i] @ want + b[i]
        np.testing.assert_allclose(z[i], want, rtol=1e-13)


@pytest.mark.parametrize("budget", [1, 2, 5, 6, 8])
def test_a_rarer_test_keeps_the_budget_and_tests_its_last_iterate(x64, budget):
    z, stats = solve_jit(cosine, jnp.zeros(()), deq.Picard(rtol=1e-9, max_steps=budget, test_every=4), 0)
    same, of_each = solve_jit(cosine, jnp.zeros(()), deq.Picard(rtol=1e-9, max_steps=budget), 0)
    assert (stats.steps, stats.status) == (budget, Status.MAX_STEPS)
    np.testing.assert_allclose((z, stats.residual), (same, of_each.residual), rtol=1e-14)


def test_anderson_mixes_what_it_is_shown_and_steps_plainly_between(x64, rng):
    a, b = 0.9 * symmetric(rng, 1, 6, 1.0)[0], jax.random.normal(rng, (6,))
    f, solver = lambda z: a @ z + b, deq.Anderson(rtol=1e-9, history=2, damping=0.7, test_every=3)
    z, state, evaluations = jnp.zeros(6), solver.init(jnp.zeros(6)), 1
    while (residual := f(z) - z) @ residual > 1e-18 * f(z) @ f(z):
        step, state = solver.update(residual, state, z)
        z = z + step
        for _ in range(2):
            z = z + 0.7 * (f(z) - z)
        evaluations += 3
    found, stats = solve_jit(f, jnp.zeros(6), solver, 0)
    assert stats.converged and stats.steps == evaluations
    np.testing.assert_allclose(found, z, rtol=1e-10)
    plain = solve_jit(f, jnp.zeros(6), deq.Picard(rtol=1e-9, max_steps=1000, damping=0.7, test_every=3), 0)[1]
    assert stats.steps / plain.steps < 0.7


def test_a_problem_that_stopped_keeps_its_iterate_while_others_are_mixed_rarely(x64, rng):
    a, b = gaussian(rng, 5, 8, 1.0), jax.random.normal(rng, (5, 8))
    a = a * jnp.array([0.1, 0.3, 0.5, 0.7, 0.8])[:, None, None]
    solver = deq.Anderson(rtol=1e-8, history=3, test_every=4)
    together, stats = solve_batch(a, b, b, solver)
    assert stats.converged.all() and len(set(stats.steps.tolist())) > 2
    for i in range(5):
        alone, of_it = solve_batch(a[i : i + 1], b[i : i + 1], b[i : i + 1], solver)
        assert of_it.steps[0] == stats.steps[i]
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-12)


# ---- Broyden's estimate, from its public state -------------------------------------------------------------


def dense(state):
    """B = −I + Σ coreᵢⱼ sᵢ sⱼᵀ."""
    return np.einsum("ij,ia,jb->ab", state.core, state.steps, state.steps) - np.eye(state.z.shape[-1])


def trajectory(solver, f, z, count):
    """Iterates, residuals and states after each update."""
    state, out = solver.init(z), []
    for _ in range(count):
        g = f(z) - z
        step, state = solver.update(g, state, z)
        out.append((np.asarray(z), np.asarray(g), np.asarray(step), state))
        z = z + step
    return out


@pytest.fixture
def contraction(x64, rng):
    a, b = gaussian(rng, 1, 10, 0.6)[0], jax.random.normal(rng, (10,))
    return lambda z: jnp.tanh(a @ z + b)


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_broyden_meets_the_secant_condition(contraction, damping):
    run = trajectory(deq.Broyden(rank=12, damping=damping), contraction, jnp.zeros(10), 9)
    for k in range(1, 9):
        (z0, g0, *_), (z1, g1, step, state) = run[k - 1], run[k]
        B = dense(state)
        np.testing.assert_allclose(B @ (g1 - g0), z1 - z0, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(step, -damping * B @ g1, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_low_rank_broyden_equals_the_dense_update(contraction, damping):
    run, B = trajectory(deq.Broyden(rank=12, damping=damping), contraction, jnp.zeros(10), 9), -np.eye(10)
    for k in range(1, 9):
        dz, dg = run[k][0] - run[k - 1][0], run[k][1] - run[k - 1][1]
        B = B + np.outer(dz - B @ dg, dz @ B) / (dz @ B @ dg)
        np.testing.assert_allclose(dense(run[k][3]), B, rtol=1e-8, atol=1e-10)


def test_broyden_learns_from_a_step_that_it_takes_back(x64):
    # From z = 0 the first step is to z = g, where the residual is greater: back it goes, with what it has learned.
    a = jnp.array([[-3.0, 1.0], [0.5, -2.0]])
    f = lambda z: a @ z + jnp.array([1.0, 2.0])
    solver = deq.Broyden(rank=4)
    state = solver.init(jnp.zeros(2))
    step, state = solver.update(f(jnp.zeros(2)), state, jnp.zeros(2))
    z1, g0 = step, f(jnp.zeros(2))
    g1 = f(z1) - z1
    step, state = solver.update(g1, state, z1)
    assert state.cuts == 1
    np.testing.assert_array_equal(state.z, jnp.zeros(2))
    np.testing.assert_allclose(dense(state) @ (g1 - g0), z1, rtol=1e-12)
    np.testing.assert_allclose(z1 + step, -float(state.step_size) * dense(state) @ g0, rtol=1e-12)
    z2 = state.next_z
    _, state = solver.update(f(z2) - z2, state, z2)  # whose pair is that of a shortened step
    np.testing.assert_allclose(dense(state) @ (f(z2) - z2 - g0), z2, rtol=1e-12)


def test_broyden_restarts_when_full_and_nothing_is_kept(contraction):
    run = trajectory(deq.Broyden(rank=3, keep=0), contraction, jnp.zeros(10), 9)
    B = -np.eye(10)
    for k in range(1, 9):
        dz, dg = run[k][0] - run[k - 1][0], run[k][1] - run[k - 1][1]
        B = B + np.outer(dz - B @ dg, dz @ B) / (dz @ B @ dg)
        B = -np.eye(10) if k % 3 == 0 else B  # the last pair, too, is gone
        np.testing.assert_allclose(run[k][2], -B @ run[k][1], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(dense(run[k][3]), B, rtol=1e-8, atol=1e-10)


def test_broyden_whose_memory_was_compressed_steps_by_what_is_left_and_learns_on(contraction):
    run = trajectory(deq.Broyden(rank=6), contraction, jnp.zeros(10), 15)
    for k in range(1, 15):
        (z0, g0, *_), (z1, g1, step, state) = run[k - 1], run[k]
        np.testing.assert_allclose(step, -dense(state) @ g1, rtol=1e-7, atol=1e-12)
        full = k >= 6 and k % 3 == 0
        missed = np.linalg.norm(dense(state) @ (g1 - g0) - (z1 - z0)) / np.linalg.norm(z1 - z0)
        assert missed < 1e-6 or full, (k, missed)
        assert np.linalg.matrix_rank(dense(state) + np.eye(10), 1e-9) <= (3 if full else 6)


def test_the_loop_compresses_a_memory_as_update_does(contraction):
    solver = deq.Broyden(rank=4, max_steps=12, rtol=0.0)
    run = trajectory(solver, contraction, jnp.zeros(10), 12)
    z, _, memory, *_ = deq_solvers.run_loop(contraction, jnp.zeros(10), solver)
    best, *_ = min(run, key=lambda seen: np.linalg.norm(seen[1]))
    np.testing.assert_allclose(z, best, rtol=1e-9)
    solve_from = lambda z0: deq_solvers.run_loop(contraction, z0, solver).value
    starts = jnp.stack([jnp.zeros(10), jnp.ones(10)])
    np.testing.assert_allclose(jax.vmap(solve_from)(starts), [z, solve_from(starts[1])], rtol=1e-9)
    np.testing.assert_allclose(dense(memory), dense(run[-1][-1]), atol=1e-6)


def test_a_memory_that_a_solve_leaves_full_is_compressed_when_it_is_resumed(contraction):
    solver = deq.Broyden(rank=4, max_steps=5, rtol=0.0)
    memory = deq_solvers.run_loop(contraction, jnp.zeros(10), solver).memory
    *_, (_, _, _, after) = trajectory(solver, contraction, jnp.zeros(10), 5)
    resumed = solver.resume(memory)
    np.testing.assert_allclose(dense(resumed), dense(after), rtol=1e-9, atol=1e-12)
    assert not solver.is_full(resumed) and resumed.count == 3
    again = deq_solvers.run_loop(contraction, jnp.ones(10), deq.Broyden(rank=4, rtol=1e-8), memory=memory)
    assert again.stats.converged


def test_a_compressed_memory_keeps_what_leads(x64, rng):
    steps, core = jax.random.normal(rng, (2, 9, 30)), jax.random.normal(jax.random.key(1), (2, 9, 9))
    weights = 10.0 ** -jnp.arange(9.0)[:, None]
    steps, core = steps * weights[None], core / weights[None] / weights.T[None]  # of any length
    u, _, v = np.linalg.svd(core[1] * weights * weights.T)
    small = 1e-2 * (u @ v) + 10.0 * np.outer(u[:, 0], v[0])  # one part leads
    core = core.at[1].set(small / weights / weights.T)
    whole = np.einsum("bij,bia,bjd->bad", core, steps, steps)
    for keep, bound in (9, 1e-10), (2, 0.9):
        rows, between = projected(steps, core, keep)
        np.testing.assert_allclose(np.einsum("bia,bja->bij", rows, rows), np.stack([np.eye(keep)] * 2), atol=1e-8)
        np.testing.assert_allclose(
            np.einsum("bia,bad,bjd->bij", rows, whole, rows), between, atol=1e-8 * abs(whole).max()
        )
        left = whole - np.einsum("bij,bia,bjd->bad", between, rows, rows)
        lost = np.linalg.norm(left, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
        assert np.all(lost < bound), (keep, lost)
    assert lost[1] < 0.02  # two directions, left and right, hold the part that leads


def test_a_broyden_step_that_was_scaled_on_its_way_is_learned_from_and_another_point_is_not(contraction):
    solver = deq.Broyden(rank=12)
    state, z, seen = solver.init(jnp.zeros(10)), jnp.zeros(10), []
    for _ in range(6):
        g = contraction(z) - z
        step, state = solver.update(g, state, z)
        seen.append((z, g))
        z = z + 0.8 * step
    (z0, g0), (z1, g1) = seen[-2:]
    np.testing.assert_allclose(dense(state) @ (g1 - g0), z1 - z0, rtol=1e-9, atol=1e-11)
    elsewhere = seen[2][0]  # as a problem that stopped is shown its best z
    _, after = solver.update(seen[2][1], state, elsewhere)
    np.testing.assert_array_equal(dense(after), dense(state))
    _, again = solver.update(seen[2][1], after, elsewhere)
    for name in ("steps", "core"):
        np.testing.assert_array_equal(getattr(after, name), getattr(again, name), err_msg=name)


def test_a_resumed_broyden_whose_slot_is_in_use_starts_afresh(contraction):
    # The problems of a batch share a count, and one that stopped early holds what another's turn falls on.
    solver = deq.Broyden(rank=12)
    *_, (z, _, _, state) = trajectory(solver, contraction, jnp.zeros(10), 6)
    z = jnp.asarray(z)
    g = contraction(z + 1) - z - 1
    step, free = solver.update(g, solver.resume(state), z + 1)
    np.testing.assert_allclose(step, -dense(state) @ g, rtol=1e-8)
    np.testing.assert_array_equal(dense(free), dense(state))
    step, taken = solver.update(g, solver.resume(state._replace(count=jnp.int32(2))), z + 1)
    np.testing.assert_allclose(step, g, rtol=1e-8)
    np.testing.assert_array_equal(dense(taken), -np.eye(10))


def test_a_broyden_memory_that_leaves_no_step_or_overflows_is_given_up(contraction):
    solver = deq.Broyden(rank=12)
    *_, (z, g, _, state) = trajectory(solver, contraction, jnp.zeros(10), 6)
    state = solver.resume(state)
    singular = np.linalg.pinv(state.steps[:7]).T @ np.linalg.pinv(state.steps[:7])
    core = jnp.zeros_like(state.core).at[:7, :7].set(singular)  # B is zero on the span of the steps
    inside = 1e-3 * state.steps[2]
    for spoilt in (core, jnp.full_like(core, jnp.inf)):
        step, after = solver.update(inside, state._replace(core=spoilt), jnp.asarray(z))
        np.testing.assert_allclose(step, inside, rtol=1e-8)
        np.testing.assert_array_equal(dense(after), -np.eye(10))


def test_broyden_holds_no_more_updates_than_are_of_use():
    state = jax.eval_shape(deq.Broyden(rank=20).init, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert state.steps.shape == (4, 2 * 3 + 1, 3) and state.core.shape == (4, 7, 7)


def test_broyden_that_may_not_move_says_so(x64):
    # As a number a damping of zero is refused; a traced one nobody knows.
    z, stats = jax.jit(lambda d: solve(jnp.cos, jnp.zeros(3), deq.Broyden(damping=d, max_steps=5))[:2])(0.0)
    assert stats.status == Status.MAX_STEPS and jnp.all(z == 0)


def test_broyden_holds_the_steps_and_no_pairs():
    solver = deq.Broyden(rank=20)
    state = jax.eval_shape(solver.init, jax.ShapeDtypeStruct((4, 1000), jnp.float32))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert numbers < 4 * ((20 + 1) + 3.5) * 1000, numbers  # z, g and the next point besides


def test_broyden_update_that_would_be_singular_is_damped(x64):
    # g(z) = f(z) − z with dg ⟂ dz: the undamped denominator dzᵀ B dg is zero.
    solver = deq.Broyden(rank=4)
    state = solver.init(jnp.zeros(2))
    step, state = solver.update(jnp.array([1.0, 0.0]), state, jnp.zeros(2))
    step, state = solver.update(jnp.array([1.0, 1.0]), state, jnp.array([1.0, 0.0]))
    assert jnp.all(jnp.isfinite(step))
    assert abs(np.linalg.det(dense(state))) >= 0.0999


# ---- memory ------------------------------------------------------------------------------------------------

WITH_MEMORY = {
    "anderson": functools.partial(deq.Anderson, history=4),
    "broyden": functools.partial(deq.Broyden, rank=4),
}
with_memory = pytest.mark.parametrize("Solver", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())


@with_memory
def test_the_memory_of_a_problem_that_stopped_is_frozen(x64, rng, Solver):
    # The first problem stops long before the second, whose memory wraps around more than once meanwhile.
    a, b = symmetric(rng, 2, 30, 1.0) * jnp.array([0.2, 0.98])[:, None, None], jax.random.normal(rng, (2, 30))
    f = lambda a, b: lambda z: jnp.einsum("nij,nj->ni", a, z) + b
    both = deq_solvers.run_loop(f(a, b), jnp.zeros((2, 30)), Solver(rtol=1e-6), 1)
    alone = deq_solvers.run_loop(f(a[:1], b[:1]), jnp.zeros((1, 30)), Solver(rtol=1e-6), 1)
    assert both.stats.steps[1] > both.stats.steps[0] + 8
    first = lambda leaf: leaf[0] if leaf.ndim else leaf
    for name, before, after in zip(alone.memory._fields, alone.memory, both.memory, strict=True):
        if name not in ("count", "motion"):  # of the last round, in which one problem ran
            if name == "core":  # between steps of any length: what counts is the estimate that they make up
                after, before = (dense(jax.tree.map(first, m))[None] for m in (both.memory, alone.memory))
            # Alone and in a batch differ in rounding, which a chain of secant updates amplifies.
            np.testing.assert_allclose(after[0], before[0], rtol=1e-7, atol=1e-12, err_msg=name)


@with_memory
def test_a_memory_helps_the_solve_of_a_similar_problem_and_harms_no_other(x64, rng, Solver):
    solver = dataclasses.replace(Solver(rtol=1e-6), **{"rank" if Solver.func is deq.Broyden else "history": 20})
    a, b = 0.9 * symmetric(rng, 4, 8, 1.0), jax.random.normal(rng, (4, 8))
    cell = lambda a, b: lambda z: jnp.tanh(jnp.einsum("nij,nj->ni", a, z) + b)
    first = deq_solvers.run_loop(cell(a, b), jnp.zeros((4, 8)), solver, 1)
    near, other = cell(a, b + 0.01), cell(-a, 3 * b)
    cold = deq_solvers.run_loop(near, first.value, solver, 1).stats
    warm = deq_solvers.run_loop(near, first.value, solver, 1, memory=first.memory).stats
    assert jnp.all(warm.converged) and jnp.sum(warm.steps) < jnp.sum(cold.steps)
    far = deq_solvers.run_loop(other, first.value, solver, 1, memory=first.memory)
    assert jnp.all(far.stats.converged)


@pytest.mark.full_compile
@with_memory
def test_the_first_pair_after_a_resume_does_not_mix_two_problems(x64, Solver):
    solver = Solver()
    state = solver.init(jnp.zeros(3))
    for z, g in ([0.0, 0, 0], [1.0, 2, 3]), ([1.0, 0, 0], [0.5, 1, 1]):
        _, state = solver.update(jnp.array(g), state, jnp.array(z))
    resumed = solver.resume(state)
    _, after = solver.update(jnp.array([9.0, 9, 9]), resumed, jnp.array([5.0, 5, 5]))
    for name, old, new in zip(state._fields, state, after, strict=True):
        if name == "gram":  # but for its last row, the products with the residual
            np.testing.assert_array_equal(old[:-1], new[:-1])
        elif name in ("core", "dw", "dg"):  # what is remembered of pairs
            np.testing.assert_array_equal(old, new, err_msg=name)


@with_memory
def test_a_healthy_solve_remembers_no_inf(Solver):
    solver, f = Solver(), lambda z: 0.5 * jnp.cos(z) + jnp.array([0.1, 0.2])
    memory = deq_solvers.run_loop(f, jnp.zeros(2), solver).memory
    for state in (solver.init(jnp.zeros(2)), memory, solver.resume(memory)):
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@with_memory
def test_a_problem_that_met_nan_remembers_only_finite_pairs(x64, Solver):
    f = lambda z: jnp.where(z > 1, jnp.nan, z + 0.5 - 0.3 * z)
    slow = lambda z: jnp.cos(jnp.arange(1.0, 3.0) * z)
    solved = deq_solvers.run_loop(lambda z: jnp.stack([f(z[0]), slow(z[1])]), jnp.zeros((2, 2)), Solver(rtol=1e-9), 1)
    steps_back = Solver is WITH_MEMORY["broyden"]
    assert solved.stats.status[0] == (Status.MAX_STEPS if steps_back else Status.NONFINITE)
    for leaf in jax.tree.leaves(solved.memory):
        assert jnp.all(jnp.isfinite(leaf))


@each_solver
def test_every_product_is_in_full_precision(Solver):
    # On a GPU the default is TF32, on a TPU bfloat16. Here f has no product of its own.
    f = lambda z: jax.tree.map(lambda z: 0.5 * jnp.cos(z), z)
    for z0 in (jnp.ones((2, 6)), {"a": jnp.ones((2, 6)), "b": jnp.ones((2, 3))}):
        solve = jax.jit(lambda z0: deq.solve(f, z0, solver=Solver(), batch_ndim=1)[:2])
        products = [line for line in solve.lower(z0).as_text().splitlines() if "dot_general" in line]
        assert products
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products), products
