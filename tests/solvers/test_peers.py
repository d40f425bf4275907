"""Every fault that was measured in another library, as a test that it fails: one name, one fault."""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import gaussian, symmetric

import deq_jax as deq
from deq_jax import Status
from deq_jax.nn import DEQ
from deq_jax.stability import spectral_normalize, spectral_radius

pytestmark = pytest.mark.usefixtures("quick_compile")

SOLVERS = {
    "picard": deq.Picard,
    "anderson": functools.partial(deq.Anderson, history=4),
    "broyden": functools.partial(deq.Broyden, rank=8),
}
each_solver = pytest.mark.parametrize("Solver", SOLVERS.values(), ids=SOLVERS.keys())
TIGHT = deq.Picard(rtol=1e-13, max_steps=2000)


def cell(z, w, x):
    return jnp.tanh(w @ z) + x


@pytest.fixture
def problem(x64, rng):
    w = jax.random.normal(rng, (5, 5))
    return 0.7 * w / jnp.linalg.norm(w, 2), jax.random.normal(jax.random.fold_in(rng, 1), (5,))


@jax.jit
def dense_gradient(w, x, z_bar, z=None):
    z = jax.lax.fori_loop(0, 300, lambda _, z: cell(z, w, x), x) if z is None else z
    u = jnp.linalg.solve(jnp.eye(5) - jax.jacobian(cell)(z, w, x).T, z_bar)
    return jax.vjp(lambda w, x: cell(z, w, x), w, x)[1](u)


def assert_close(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# ---- what a solve says of itself ---------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_overflow_are_never_converged(x64, Solver, dtype):
    maps = [lambda z: jnp.sqrt(z - 1), lambda z: 1e30 * z * z + 1, lambda z: z * z + 1]
    f = lambda z: jnp.stack([g(row) for g, row in zip(maps, z, strict=True)])
    z, stats = deq.fixed_point(f, jnp.ones((3, 4), dtype) * 0.5, solver=Solver(), batch_ndim=1)
    assert not stats.converged.any() and jnp.all(jnp.isfinite(z))
    z, stats = deq.fixed_point(lambda z: 10 * z + 1, jnp.zeros(3, dtype), solver=Solver())
    # no value of 1.6e18: either the one fixed point there is, or no claim
    assert not stats.converged or jnp.allclose(z, -1 / 9, rtol=1e-3)


@each_solver
def test_the_best_iterate_survives_a_later_nan(x64, Solver):
    f = lambda z: jnp.where(z > 1, jnp.nan, z + 0.5 - 0.3 * z)
    z, stats = deq.fixed_point(f, jnp.zeros(2), solver=Solver())
    # Broyden takes a step to where f is NaN back, for as long as its budget lasts.
    assert stats.status == (Status.MAX_STEPS if Solver is SOLVERS["broyden"] else Status.NONFINITE)
    assert jnp.all(z >= 0.49) and jnp.all(z <= 1)
    np.testing.assert_allclose(stats.residual, jnp.linalg.norm(f(z) - z), rtol=1e-12)


@each_solver
@pytest.mark.parametrize("damping", [0.01, 0.5, 0.99])
def test_the_residual_is_undamped_and_of_the_returned_value(problem, Solver, damping):
    solver = Solver(rtol=1e-3, max_steps=jnp.asarray(30), damping=damping)
    z, stats = deq.fixed_point(cell, jnp.zeros(5), *problem, solver=solver)
    fz = cell(z, *problem)
    relative = jnp.linalg.norm(fz - z) / jnp.linalg.norm(fz)
    np.testing.assert_allclose(stats.relative_residual, relative, rtol=1e-9)
    assert bool(stats.converged) == bool(relative <= 1e-3)


@each_solver
@pytest.mark.parametrize("max_steps", [0, 1, 2])
def test_budgets_of_zero_one_and_two_tell_the_truth(Solver, max_steps):
    z, stats = deq.fixed_point(jnp.cos, jnp.zeros(2), solver=Solver(max_steps=jnp.asarray(max_steps)))
    assert (stats.steps, stats.status) == (max_steps, Status.MAX_STEPS)
    np.testing.assert_allclose(z, 1.0 if max_steps == 2 else 0.0, rtol=1e-6)
    true = jnp.linalg.norm(jnp.cos(z) - z) if max_steps else jnp.inf
    np.testing.assert_allclose(stats.residual, true, rtol=1e-6)


# ---- convergence -------------------------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scaling_a_problem_changes_no_iteration_count(x64, rng, Solver, dtype):
    c = jnp.array([1, 1e-4, 1e-2, 1e2, 1e4], dtype)[:, None]
    a = symmetric(rng, 1, 8, 0.9)[0].astype(dtype)
    b = jax.random.normal(rng, (8,), dtype)
    f = lambda z: c * (jnp.einsum("ij,nj->ni", a, z / c) + b[None])
    _, stats = deq.fixed_point(f, 0 * c * b[None], solver=Solver(max_steps=300), batch_ndim=1)
    assert stats.converged.all()
    np.testing.assert_array_equal(stats.steps, stats.steps[0])


@pytest.mark.parametrize("make", [symmetric, gaussian])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_anderson_needs_at_most_a_fifth_more_evaluations_than_picard(x64, make, dtype):
    # ten seeds, spectral radius .95; defaults, where a peer's needs 85 for 33, or converges in 0 of 10
    a = jnp.concatenate([make(jax.random.key(seed), 1, 30, 0.95) for seed in range(10)]).astype(dtype)
    b = jax.random.normal(jax.random.key(99), (10, 30), dtype)
    run = lambda solver: (
        deq.fixed_point(lambda z: jnp.einsum("nij,nj->ni", a, z) + b, 0 * b, solver=solver, batch_ndim=1).stats
    )
    picard, anderson = run(deq.Picard(max_steps=1000)), run(deq.Anderson(max_steps=1000))
    assert jnp.all(anderson.converged | ~picard.converged) and picard.converged.any()
    assert jnp.all(jnp.where(picard.converged, anderson.steps / picard.steps, 0) <= 1.2)


@pytest.mark.parametrize("kind", ["linear", "tanh"])
@pytest.mark.parametrize("make", [symmetric, gaussian])
def test_limited_memory_broyden_converges_on_30_of_30(x64, rng, make, kind):
    a, b = make(rng, 30, 50, 0.9), jax.random.normal(rng, (30, 50))
    a = a * jnp.asarray(0.9 / np.abs(np.linalg.eigvals(a)).max(-1))[:, None, None]
    act = jnp.tanh if kind == "tanh" else lambda y: y
    f = lambda z: act(jnp.einsum("nij,nj->ni", a, z)) + b
    _, stats = deq.fixed_point(f, 0 * b, solver=deq.Broyden(rtol=1e-6, rank=6, max_steps=300), batch_ndim=1)
    assert stats.converged.all(), stats


def test_acceleration_is_really_happening(x64, rng):
    a, b = symmetric(rng, 10, 30, 0.95), jax.random.normal(rng, (10, 30))
    f = lambda z: jnp.einsum("nij,nj->ni", a, z) + b
    run = lambda solver: deq.solve(f, 0 * b, solver=solver, batch_ndim=1).stats
    picard = run(deq.Picard(rtol=1e-8, max_steps=1000))
    for solver in (deq.Anderson(rtol=1e-8, max_steps=300), deq.Broyden(rtol=1e-8, max_steps=300, rank=40)):
        stats = run(solver)
        assert stats.converged.all() and stats.steps.mean() < 0.4 * picard.steps.mean()


# ---- states ------------------------------------------------------------------------------------------------


@each_solver
def test_two_leaves_are_solved_as_one_vector_and_judged_one_by_one(x64, rng, Solver):
    a, b = symmetric(rng, 1, 8, 0.9)[0], jax.random.normal(rng, (8,))
    f = lambda z: jnp.tanh(a @ z + b)
    split = lambda z: {"one": z[:1], "rest": z[1:]}
    joined = lambda leaves: jnp.concatenate([leaves["one"], leaves["rest"]])
    leaves, stats = deq.fixed_point(lambda z: split(f(joined(z))), split(jnp.zeros(8)), solver=Solver())
    for leaf, residual in zip(
        jax.tree.leaves(leaves), jax.tree.leaves(split(f(joined(leaves)) - joined(leaves))), strict=True
    ):
        assert np.linalg.norm(residual) <= 1.001e-4 * np.linalg.norm(leaf + residual)
    solver = Solver(rtol=0.0, max_steps=int(stats.steps))  # the same evaluations, whoever judges them
    z, vector_stats = deq.fixed_point(f, jnp.zeros(8), solver=solver)
    assert stats.converged and vector_stats.steps == stats.steps
    np.testing.assert_allclose(joined(leaves), z, rtol=1e-12)


@each_solver
def test_complex_residuals_are_real_norms(x64, Solver):
    # Σ g² (not |g|²) vanishes at the start: a complex square claims CONVERGED after one step
    angle, b = jnp.array([0.3, 1.2]), jnp.array([1.0, 1j])
    c = 0.9 * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    f = lambda z: c * z + b
    z, stats = deq.fixed_point(f, jnp.zeros(2, complex), solver=Solver(max_steps=300))
    assert stats.converged and stats.steps > 2 and not jnp.iscomplexobj(stats.residual)
    np.testing.assert_allclose(stats.residual, np.linalg.norm(f(z) - z), rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(z, b / (1 - c), rtol=1e-3)


@each_solver
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("with_x64", [False, True])
def test_low_precision_and_float32_under_x64(request, Solver, dtype, with_x64):
    if with_x64:
        request.getfixturevalue("x64")
    x = jnp.linspace(-1.0, 1.0, 8).astype(dtype)
    rtol = 8 * float(jnp.finfo(dtype).eps)

    def loss(x):
        z, stats = deq.fixed_point(
            lambda z, x: jnp.tanh(0.5 * z[::-1]) + x, 0 * x, x, solver=Solver(rtol=rtol), adjoint=deq.JFB()
        )
        return z.astype(jnp.float32).sum(), (z, stats)

    x_bar, (z, stats) = jax.grad(loss, has_aux=True)(x)
    assert stats.converged and z.dtype == x_bar.dtype == dtype and stats.residual.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(x_bar))


# ---- derivatives -------------------------------------------------------------------------------------------


def test_a_closure_over_parameters_is_differentiable(problem):
    w, x = problem
    loss = lambda w, x: deq.fixed_point(
        lambda z: cell(z, w, x), jnp.zeros(5), solver=TIGHT, adjoint=deq.Implicit(TIGHT)
    ).value.sum()
    for transform in (lambda f: f, jax.jit):
        got = transform(jax.grad(loss, argnums=(0, 1)))(w, x)
        assert_close(got, dense_gradient(w, x, jnp.ones(5)), 1e-10)


def test_z0_may_depend_on_parameters(problem):
    w, x = problem
    loss = lambda w, x: deq.fixed_point(cell, w @ x, w, x, solver=TIGHT, adjoint=deq.Implicit(TIGHT)).value.sum()
    assert_close(jax.grad(loss, argnums=(0, 1))(w, x), dense_gradient(w, x, jnp.ones(5)), 1e-10)


ADJOINTS = {
    "implicit": (deq.Implicit(TIGHT), TIGHT),
    "implicit jvp": (deq.ImplicitJVP(TIGHT), TIGHT),
    "phantom": (deq.Phantom(steps=200, damping=0.9), TIGHT),
    "neumann": (deq.Neumann(terms=200), TIGHT),
    "jfb": (deq.JFB(), TIGHT),
    "unroll": (deq.Unroll(), deq.Picard(max_steps=200)),
    "unroll, checkpointed": (deq.Unroll(checkpoint=True), deq.Picard(max_steps=200)),
    "reversible": (deq.Reversible(0.5), deq.Picard(max_steps=81)),
    "shine": (deq.Shine(refine=20), deq.Broyden(rtol=1e-12, rank=40)),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_has_aux_has_a_gradient_for_every_adjoint(problem, name):
    w, x = problem
    adjoint, solver = ADJOINTS[name]
    z_bar = jnp.arange(1.0, 6)

    options = dict(solver=solver, adjoint=adjoint)

    def by_aux(w, x):
        f = lambda z, w, x: (cell(z, w, x), {"twice": 2 * z * z_bar, "int": jnp.arange(2)})
        return jnp.sum(deq.fixed_point(f, jnp.zeros(5), w, x, has_aux=True, **options).aux["twice"])

    def by_value(w, x):
        return 2 * z_bar @ deq.fixed_point(cell, jnp.zeros(5), w, x, **options).value

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(w, x) for f in (by_aux, by_value))
    assert_close(got, want, 1e-11)
    if name != "jfb":
        rtol = {"reversible": 2e-2, "shine": 1e-6}.get(name, 1e-9)
        assert_close(got, dense_gradient(w, x, 2 * z_bar), rtol)


PAIRS = {
    "picard": TIGHT,
    "anderson": deq.Anderson(rtol=1e-13, max_steps=300, history=4),
    "broyden": deq.Broyden(rtol=1e-13, max_steps=300, rank=12),
}


@pytest.mark.parametrize("backward", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("forward", PAIRS.values(), ids=PAIRS.keys())
def test_the_float64_gradient_equals_a_dense_solve(problem, forward, backward):
    loss = lambda w, x: deq.fixed_point(
        cell, jnp.zeros(5), w, x, solver=forward, adjoint=deq.Implicit(backward)
    ).value.sum()
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*problem)
    assert_close(got, dense_gradient(*problem, jnp.ones(5)), 1e-10)


def test_jvp_hessian_and_both_second_orders(problem):
    w, x = problem

    def loss(x, solve):
        return jnp.sum(jnp.sin(solve(lambda z: cell(z, w, x))) ** 2)

    fixed = lambda adjoint: lambda f: deq.fixed_point(f, jnp.zeros(5), solver=TIGHT, adjoint=adjoint).value
    unrolled = lambda f: jax.lax.scan(lambda z, _: (f(z), None), jnp.zeros(5), length=150)[0]
    with_jvp, reverse = (functools.partial(loss, solve=fixed(a(TIGHT))) for a in (deq.ImplicitJVP, deq.Implicit))
    plain = functools.partial(loss, solve=unrolled)
    along = jnp.cos(jnp.arange(5.0))
    assert_close(jax.jvp(with_jvp, (x,), (along,)), jax.jvp(plain, (x,), (along,)), 1e-10)
    want = jax.jit(jax.hessian(plain))(x)
    assert_close(jax.jit(jax.hessian(with_jvp))(x), want, 1e-9)  # forward over reverse
    assert_close(jax.jit(jax.jacrev(jax.grad(with_jvp)))(x), want, 1e-9)
    assert_close(jax.jit(jax.jacrev(jax.grad(reverse)))(x), want, 1e-9)  # reverse over reverse


@pytest.mark.full_compile
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_one_diverging_sample_of_64_leaves_the_others_gradients_bit_for_bit(rng, name):
    solver = {"anderson": deq.Anderson(history=4), "broyden": deq.Broyden(rank=8)}[name]
    a, x = symmetric(rng, 64, 4, 0.7), jax.random.normal(rng, (64, 4))

    @jax.jit
    def pull(a, x):
        def loss(a, x):
            f = lambda z, a, x: jnp.einsum("nij,nj->ni", a, jnp.sin(z)) + x + 0 * z**3
            options = dict(solver=solver, adjoint=deq.Implicit(solver, deq.OnFailure.ZERO), batch_ndim=1)
            z, stats = deq.fixed_point(f, 0 * x, a, x, **options)
            return jnp.sum(z**2), stats

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(a, x)

    clean, stats = pull(a, x)
    assert stats.converged.all()
    spoilt, stats = pull(a.at[17].set(1e9 * jnp.eye(4)), x)
    others = np.arange(64) != 17
    assert not stats.converged[17] and stats.converged[others].all()
    for before, after in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(before[others], after[others])
        assert jnp.all(jnp.isfinite(after))


@each_solver
def test_cotangents_of_any_size_give_proportional_finite_gradients(Solver):
    w, x = 0.7 * jnp.eye(5)[::-1], jnp.linspace(-1.0, 1.0, 5)
    solver = Solver(rtol=1e-5)
    value = lambda x: deq.fixed_point(cell, 0 * x, w, x, solver=solver, adjoint=deq.Implicit(solver)).value
    pull = jax.jit(lambda z_bar: jax.vjp(value, x)[1](z_bar)[0])
    one = pull(jnp.ones(5))
    for scale in (1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30):
        np.testing.assert_allclose(pull(scale * jnp.ones(5)) / scale, one, rtol=1e-3)


def test_implicit_stays_implicit_when_the_solve_stops_early(problem):
    w, x = problem
    loss = lambda w, x, adjoint: (lambda s: (s.value.sum(), s))(
        deq.fixed_point(cell, jnp.zeros(5), w, x, solver=deq.Picard(max_steps=3), adjoint=adjoint)
    )
    got, (z, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(w, x, deq.Implicit(TIGHT))
    assert not stats.converged
    assert_close(got, dense_gradient(w, x, jnp.ones(5), z), 1e-10)
    one_step, _ = jax.grad(loss, argnums=(0, 1), has_aux=True)(w, x, deq.JFB())
    assert np.linalg.norm(one_step[0] - got[0]) > 0.05 * np.linalg.norm(got[0])


# ---- trajectories, spectra, options ------------------------------------------------------------------------


@each_solver
def test_trajectory_states_have_a_constant_count_and_true_residuals(problem, Solver):
    w, x = problem
    xs = jnp.stack([0 * x, x, 30 * x])
    f = lambda z, w, xs: jnp.tanh(z @ w.T) + xs
    _, stats, states, of_states = deq.trajectory(f, 0 * xs, w, xs, at=(1, 4, 60), solver=Solver(), batch_ndim=1)
    assert len(states) == len(of_states) == 3 and stats.converged.all()
    for state, of_state in zip(states, of_states, strict=True):
        np.testing.assert_allclose(
            of_state.residual, np.linalg.norm(f(state, w, xs) - state, axis=-1), rtol=1e-8, atol=1e-15
        )
    np.testing.assert_allclose(states[0][1:], f(0 * xs, w, xs)[1:], rtol=1e-12)  # not off by one, not stale


def test_the_spectral_radius_of_a_complex_pair():
    radius = jax.jit(lambda A: spectral_radius(lambda z: A @ z, jnp.ones(3)))
    for angle in (0.3, 1.0, jnp.pi / 2, 3.0):
        c, s = jnp.cos(angle), jnp.sin(angle)
        rotation = 0.9 * jnp.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 0.3]])
        np.testing.assert_allclose(radius(rotation), 0.9, rtol=1e-4)


def test_the_spectral_norm_meets_its_target_at_the_first_call(rng):
    for seed, shape in enumerate([(64, 64), (16, 100)]):
        w = spectral_normalize(jax.random.normal(jax.random.key(seed), shape), target=0.9)
        np.testing.assert_allclose(jnp.linalg.norm(w, 2), 0.9, rtol=0.01)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: deq.Anderson(max_iter=3), "no option 'max_iter'"),
        (lambda: deq.Broyden(rnk=3), "did you mean 'rank'"),
        (lambda: deq.Phantom(step=3), "did you mean 'steps'"),
        (lambda: deq.Implicit(solvr=deq.Picard()), "did you mean 'solver'"),
        (lambda: deq.fixed_point(jnp.cos, jnp.zeros(2), solver_=deq.Picard()), "solver_"),
    ],
)
def test_an_unknown_option_is_an_error(make, words):
    with pytest.raises(TypeError, match=words):
        make()


# ---- programs ----------------------------------------------------------------------------------------------


def plain_cell(z, x):
    return 0.5 * jnp.cos(z) + x


@pytest.mark.full_compile
def test_a_second_eager_call_compiles_nothing(count_compilations):
    solve = lambda x, rtol: deq.fixed_point(plain_cell, jnp.zeros(3), x, solver=deq.Picard(rtol=rtol)).value.sum()
    grad, xs = jax.value_and_grad(solve), (jnp.ones(3), jnp.linspace(0.0, 1.0, 3))
    grad(xs[0], 1e-4), solve(xs[0], 1e-4)
    with count_compilations() as compiled:
        grad(xs[1], 1e-4), solve(xs[1], 1e-2)
    assert compiled.count == 0


def sharded_solve(solver):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    xs = jax.random.normal(jax.random.key(0), (8, 6))
    w = 0.12 * jax.random.normal(jax.random.key(1), (6, 6))
    run = jax.jit(
        lambda w, xs: deq.fixed_point(lambda z, w, xs: jnp.tanh(z @ w) + xs, 0 * xs, w, xs, solver=solver, batch_ndim=1)
    )
    sharded = jax.device_put(xs, NamedSharding(mesh, P("data"))), jax.device_put(w, NamedSharding(mesh, P()))
    return run, (w, xs), sharded[::-1]


@pytest.mark.full_compile
@each_solver
def test_sharded_equals_single_device_with_one_small_all_reduce_a_step(Solver):
    run, single, sharded = sharded_solve(Solver(rtol=1e-5))
    want, got = run(*single), run(*sharded)
    np.testing.assert_allclose(got.value, want.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)
    collectives, sizes = collectives_in_loops(run.lower(*sharded).compile().as_text())
    # Whether all have stopped. Broyden asks in two loops, one in the other, and in a step in the inner one alone.
    loops = 2 if isinstance(Solver(), deq.Broyden) else 1
    assert collectives == ["all-reduce"] * loops and max(sizes) <= 4, (collectives, sizes)


def collectives_in_loops(text):
    """Names and element counts of the collectives of a compiled program whose while loop is all there is."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+|\([^=]*?\)) ({names})(?:-start)?\(", text)
    size = lambda shapes: sum(
        int(np.prod([int(d) for d in dims.split(",") if d])) for dims in re.findall(r"\[([\d,]*)\]", shapes)
    )
    return [name for _, name in found], [size(shapes) for shapes, _ in found]


# ---- modules -----------------------------------------------------------------------------------------------


class Cell(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(4, 4, kernel_init=nnx.initializers.normal(0.2), rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.dropout(self.linear(z)) + x)


QUICK = {"solver": deq.Picard(rtol=1e-6), "adjoint": deq.Implicit(deq.Picard(rtol=1e-6))}


def module_grads(layer, x, apply):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    loss = lambda params: jnp.sum(apply(nnx.merge(graphdef, params, rest, copy=True), x) ** 2)
    return jax.jit(jax.grad(loss))(params)


def test_the_same_module_twice_in_one_step():
    layer, x = DEQ(Cell(nnx.Rngs(0)), **QUICK), jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)

    def unrolled(model, x):
        for _ in range(2):
            z = jnp.zeros_like(x)
            for _ in range(40):
                z = model.cell(z, x)
            x = z
        return x

    got = module_grads(layer, x, lambda model, x: model(model(x).value).value)
    assert_close(got, module_grads(layer, x, unrolled), 1e-4)


def test_deepcopy_and_ema_of_a_module():
    x = jnp.ones((2, 4))
    layer = DEQ(Cell(nnx.Rngs(0)), **QUICK)
    twin = copy.deepcopy(layer)
    np.testing.assert_array_equal(twin(x).value, layer(x).value)
    twin.cell.linear.bias[...] = jnp.ones(4)
    assert not np.allclose(twin(x).value, layer(x).value)  # two modules, not one
    ema = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, nnx.state(layer, nnx.Param), nnx.state(twin, nnx.Param))
    averaged = nnx.clone(layer)
    nnx.update(averaged, ema)
    np.testing.assert_allclose(averaged.cell.linear.bias[...], 0.5)
    assert averaged(x).stats.converged.all()


def test_gradients_in_eval_mode():
    layer, x = DEQ(Cell(nnx.Rngs(0), rate=0.5), **QUICK), jnp.ones((2, 4))
    layer.eval()
    grads = module_grads(layer, x, lambda model, x: model(x).value)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    x_bar = jax.jit(jax.grad(lambda x: layer(x).value.sum()))(x)
    assert jnp.all(x_bar != 0)
