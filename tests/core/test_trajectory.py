"""Traces, snapshots and states along the way: constant in number, true in residual, differentiable each by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import Status

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 4
PICARD = deq.Picard(rtol=1e-10, max_steps=300)


def cell(z, w, x):
    return jnp.tanh(z @ w.T) + x


@pytest.fixture
def w(x64, rng):
    w = jax.random.normal(rng, (DIM, DIM))
    return 0.8 * w / jnp.linalg.norm(w, 2)


@pytest.fixture
def xs(x64, rng):
    # from easy to hard: the first row converges at once
    return jnp.array([[0.0], [0.1], [1.0]]) * jax.random.normal(jax.random.fold_in(rng, 1), (3, DIM))


def iterate(k, w, x):
    z = jnp.zeros_like(x)
    for _ in range(k):
        z = cell(z, w, x)
    return z


# ---- ResidualTrace -----------------------------------------------------------------------------------------


@pytest.mark.full_compile
@pytest.mark.parametrize("solver", [deq.Picard(rtol=1e-6), deq.Anderson(rtol=1e-6, history=3)], ids=repr)
def test_a_trace_is_the_residual_of_each_evaluation(w, xs, solver):
    run = lambda size: deq.solve(cell, 0 * xs, w, xs, solver=solver, batch_ndim=1, fold=deq.ResidualTrace(size))
    _, stats, _, trace, _ = jax.jit(run, static_argnums=0)(100)
    assert trace.shape == (3, 100)
    np.testing.assert_array_equal(jnp.sum(~jnp.isnan(trace), axis=-1), stats.steps)
    last = trace[jnp.arange(3), stats.steps - 1]
    np.testing.assert_array_equal(last, stats.relative_residual)
    if isinstance(solver, deq.Picard):
        for k in range(3):
            z = iterate(k, w, xs[2])
            fz = cell(z, w, xs[2])
            np.testing.assert_allclose(trace[2, k], np.linalg.norm(fz - z) / np.linalg.norm(fz), rtol=1e-12)
    np.testing.assert_array_equal(run(2).folded, trace[:, :2])  # what does not fit is dropped


@pytest.mark.full_compile
def test_a_trace_says_where_f_was_not_finite():
    solved = deq.solve(lambda z: jnp.sqrt(z - 1), jnp.zeros(2), fold=deq.ResidualTrace(4))
    np.testing.assert_array_equal(solved.folded, [jnp.inf, jnp.nan, jnp.nan, jnp.nan])


def traced(size=8):
    """A trace that three entries of are used; compiled anew, for JAX's caches do not know the debug flags."""
    run = lambda z0: deq.solve(lambda z: 0.1 * z + 1, z0, solver=deq.Picard(rtol=1e-3), fold=deq.ResidualTrace(size))
    folded = jax.jit(run)(jnp.zeros(2)).folded
    assert (folded[:4] < 2).all()
    return folded


def test_a_trace_passes_the_debug_flags():
    plain = traced()
    assert jnp.isnan(plain[4:]).all() and jnp.isfinite(plain[:4]).all()
    with jax.debug_nans(True):
        np.testing.assert_array_equal(traced(), jnp.where(jnp.isnan(plain), jnp.inf, plain))
    with jax.debug_nans(True), jax.debug_infs(True):
        np.testing.assert_array_equal(traced(), jnp.where(jnp.isnan(plain), jnp.finfo(plain.dtype).max, plain))
    with jax.debug_infs(True):
        np.testing.assert_array_equal(traced(), plain)
    np.testing.assert_array_equal(traced(), plain)


def test_snapshots_begin_without_inf_where_infs_are_looked_for():
    start = lambda: deq.Snapshots(at=(1, 2)).init(jnp.zeros(2), 0)
    assert all(snapshot.residual == snapshot.relative_residual == jnp.inf for snapshot in start())
    with jax.debug_infs(True):
        assert all(snapshot.residual == snapshot.relative_residual > 1e38 for snapshot in start())
        f = lambda z: 0.5 * jnp.cos(z) + 0.1
        _, _, states, _ = jax.jit(lambda z0: deq.trajectory(f, z0, at=(1, 90), solver=deq.Picard()))(jnp.zeros(2))
    np.testing.assert_allclose(states[0], 0.6, rtol=1e-6)


@pytest.mark.parametrize("solver", [deq.Picard(test_every=5), deq.Anderson(test_every=2)], ids=repr)
def test_a_fold_of_every_iterate_refuses_a_solver_that_shows_few(solver):
    class All:
        sees_all = True

        def init(self, z0, batch_ndim):
            return ()

        def update(self, folded, seen):
            return folded

    for fold in (deq.Snapshots((1, 2)), All()):
        with pytest.raises(ValueError, match=r"fold=.*looks at each iterate.*test_every=\d.*take test_every=1"):
            deq.solve(jnp.cos, jnp.zeros(2), solver=solver, fold=fold)
    with pytest.raises(ValueError, match="take test_every=1"):
        deq.trajectory(jnp.cos, jnp.zeros(2), at=(1, 2), solver=solver)
    # A trace shows what was tested, and says NaN of the rest.
    trace = deq.solve(jnp.cos, jnp.zeros(2), solver=solver, fold=deq.ResidualTrace(40)).folded
    every = solver.test_every
    assert jnp.isfinite(trace[jnp.array([0, every])]).all() and jnp.isnan(trace[1:every]).all()


@pytest.mark.full_compile
def test_an_unused_trace_is_removed():
    size = 4321

    def run(z0, used):
        solved = deq.solve(jnp.cos, z0, solver=deq.Picard(), batch_ndim=1, fold=deq.ResidualTrace(size))
        return (solved.value, solved.stats) + ((solved.folded,) if used else ())

    z0 = jnp.zeros((8, 4))
    with_it, without = (jax.jit(run, static_argnums=1).lower(z0, used).compile() for used in (True, False))
    assert f"[8,{size}]" in with_it.as_text() and str(size) not in without.as_text()
    plain = jax.jit(lambda z0: deq.solve(jnp.cos, z0, solver=deq.Picard(), batch_ndim=1)[:2]).lower(z0).compile()
    assert without.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes
    assert with_it.memory_analysis().temp_size_in_bytes > without.memory_analysis().temp_size_in_bytes


@pytest.mark.full_compile
def test_a_fold_leaves_the_bits_of_the_solve(w, xs):
    solver = deq.Anderson(history=3)
    plain, folded = (
        deq.solve(cell, 0 * xs, w, xs, solver=solver, batch_ndim=1, fold=fold) for fold in (None, deq.ResidualTrace(20))
    )
    np.testing.assert_array_equal(plain.value, folded.value)
    np.testing.assert_array_equal(plain.stats.steps, folded.stats.steps)


class Visited:
    """A user's fold: the mean of the iterates that were not frozen, with jax arrays and no callback."""

    def init(self, z0, batch_ndim):
        return 0 * z0, 0 * z0[..., :1]

    def update(self, folded, seen):
        total, count = folded
        running = seen.running[..., None]
        return total + jnp.where(running, seen.z, 0), count + running.astype(count.dtype)


@pytest.mark.full_compile
def test_a_fold_of_ones_own(w, xs):
    run = lambda xs: deq.solve(cell, 0 * xs, w, xs, solver=deq.Picard(), batch_ndim=1, fold=Visited())
    solved = jax.jit(run)(xs)
    total, count = solved.folded
    np.testing.assert_array_equal(count[:, 0], solved.stats.steps)
    steps = int(solved.stats.steps[2])
    np.testing.assert_allclose(total[2], sum(iterate(k, w, xs[2]) for k in range(steps)), rtol=1e-12)
    mapped = jax.vmap(lambda x: run(x[None]).folded[0][0])(xs)
    np.testing.assert_allclose(mapped, total, rtol=1e-12)


# ---- trajectory --------------------------------------------------------------------------------------------


@pytest.mark.full_compile
def test_with_picard_the_state_at_k_is_f_applied_k_times(w, xs):
    at = (0, 1, 3)
    run = jax.jit(lambda: deq.trajectory(cell, 0 * xs, w, xs, at=at, solver=PICARD, batch_ndim=1))
    value, stats, states, state_stats = run()
    assert len(states) == len(state_stats) == len(at)
    for k, state, of_state in zip(at, states, state_stats, strict=True):
        want = iterate(k, w, xs[1:])
        np.testing.assert_allclose(state[1:], want, rtol=1e-13, atol=1e-15)
        residual = np.linalg.norm(cell(want, w, xs[1:]) - want, axis=-1)
        np.testing.assert_allclose(of_state.residual[1:], residual, rtol=1e-12)
        np.testing.assert_array_equal(of_state.steps, jnp.minimum(k + 1, stats.steps))
        np.testing.assert_array_equal(of_state.status[1:], Status.MAX_STEPS)
    assert stats.steps[0] == 1 and state_stats[2].status[0] == Status.CONVERGED  # f(0) = 0 there
    want = deq.fixed_point(cell, 0 * xs, w, xs, solver=PICARD, batch_ndim=1)
    np.testing.assert_array_equal(value, want.value)


def test_a_state_has_ended_with_its_solve_and_not_an_evaluation_sooner_or_later():
    # z ← z/2 + 1 from 0: the relative residual after k steps is 2⁻ᵏ / (2 − 2⁻ᵏ), so evaluation 6 is the last.
    f, solver = lambda z: 0.5 * z + 1, deq.Picard(rtol=0.02)
    _, stats, _, state_stats = jax.jit(lambda: deq.trajectory(f, jnp.zeros(3), at=(3, 4, 5, 6, 7), solver=solver))()
    assert stats.steps == 6
    assert [int(s.steps) for s in state_stats] == [4, 5, 6, 6, 6]
    ended = [s.status == Status.CONVERGED for s in state_stats]
    assert [bool(e) for e in ended] == [False, False, True, True, True]
    relative = [2.0**-k / (2 - 2.0**-k) for k in (3, 4, 5, 5, 5)]
    np.testing.assert_allclose([s.relative_residual for s in state_stats], relative, rtol=1e-5)


@pytest.mark.full_compile
@pytest.mark.parametrize("solver", [deq.Anderson(history=3), deq.Broyden(rank=8)], ids=repr)
def test_states_have_their_true_residual_and_stopped_problems_repeat_their_last_state(w, xs, solver):
    value, stats, states, state_stats = deq.trajectory(cell, 0 * xs, w, xs, at=(2, 90), solver=solver, batch_ndim=1)
    assert stats.converged.all() and stats.steps.max() < 90
    np.testing.assert_array_equal(states[1], value)  # all had stopped
    for a, b in zip(state_stats[1], stats, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(states[0][0], value[0])
    for state, of_state in zip(states, state_stats, strict=True):
        true = np.linalg.norm(cell(state, w, xs) - state, axis=-1)
        np.testing.assert_allclose(of_state.residual, true, rtol=1e-9, atol=1e-15)


def test_a_problem_that_fails_has_finite_states():
    # 0, 0.5, 0.85, 1.095 under Picard, and undefined above 1: the state at 3 is seen, and f is NaN there
    f = lambda z: jnp.where(z > 1, jnp.nan, z + 0.5 - 0.3 * z)
    value, stats, states, state_stats = deq.trajectory(f, jnp.zeros(2), at=(2, 3, 9), solver=deq.Picard())
    assert stats.status == Status.NONFINITE
    for state, of_state in zip(states, state_stats, strict=True):
        np.testing.assert_allclose(state, 0.85, rtol=1e-6)
        np.testing.assert_allclose(of_state.residual, 0.245 * 2**0.5, rtol=1e-5)


def test_each_state_has_the_derivative_of_its_own_mode(w, xs):
    adjoints = deq.JFB(), deq.Phantom(steps=2, damping=0.5), deq.Implicit(PICARD)
    z_bar = jnp.cos(jnp.arange(3.0 * DIM)).reshape(3, DIM)

    def part(w, which):
        run = functools.partial(deq.trajectory, cell, 0 * xs, w, xs, solver=PICARD, batch_ndim=1)
        value, _, states, _ = run(at=(1, 2, 4), correction=adjoints, adjoint=deq.Neumann(3))
        return jnp.sum((*states, value)[which] * z_bar)

    def by_attach(w, which):
        z = iterate((1, 2, 4, 300)[which], w, xs)
        return jnp.sum(deq.attach(cell, z, w, xs, adjoint=(*adjoints, deq.Neumann(3))[which], batch_ndim=1) * z_bar)

    for which in range(4):
        got, want = (jax.jit(jax.grad(f), static_argnums=1)(w, which) for f in (part, by_attach))
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-12)


def test_training_with_fixed_point_correction_compiles_once(w, xs, count_traces):
    traced = count_traces(cell)

    @jax.jit
    def step(w):
        def loss(w):
            z, _, states, _ = deq.trajectory(traced, 0 * xs, w, xs, at=(1, 3), solver=deq.Picard(), batch_ndim=1)
            return deq.fixed_point_correction([jnp.mean((state - 0.5) ** 2) for state in (*states, z)])

        value, grad = jax.value_and_grad(loss)(w)
        return value, w - 0.5 * grad

    losses = []
    for _ in range(20):
        value, w = step(w)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0] and step._cache_size() == 1


def test_fixed_point_correction_weighs_the_last_most():
    losses = [jnp.array(1.0), jnp.array(10.0), jnp.array(100.0)]
    np.testing.assert_allclose(deq.fixed_point_correction(losses, gamma=0.5), 0.25 + 5 + 100)
    np.testing.assert_allclose(deq.fixed_point_correction(jnp.stack(losses), gamma=0.5), 105.25)
    with pytest.raises(ValueError, match="at least one loss"):
        deq.fixed_point_correction([])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"at": (2, 10), "solver": deq.Picard(max_steps=10)}, ValueError, r"at=\(2, 10\).*max_steps=10.*>= 11"),
        ({"at": (2,), "solver": deq.Picard(test_every=2)}, ValueError, "test_every=2.*take test_every=1"),
        ({"at": ()}, ValueError, "increasing numbers of steps"),
        ({"at": (3, 3)}, ValueError, "increasing"),
        ({"at": (-1,)}, ValueError, "ints >= 0"),
        ({"at": (1.5,)}, ValueError, "ints >= 0"),
        ({"at": (1, 2), "correction": (deq.JFB(),)}, ValueError, "one for each of at=.*got 1"),
        ({"at": (1,), "correction": deq.Unroll()}, TypeError, "Unroll differentiates the iterations"),
        ({"at": (1,), "adjoint": deq.Reversible()}, TypeError, "Reversible differentiates the iterations"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        deq.trajectory(jnp.cos, jnp.zeros(2), **options)


def test_bad_folds():
    with pytest.raises(ValueError, match="ResidualTrace.size must be an int >= 1"):
        deq.ResidualTrace(0)
    with pytest.raises(ValueError, match="increasing"):
        deq.Snapshots(at=(2, 1))
    assert deq.trajectory(jnp.cos, jnp.zeros(2), at=3, solver=deq.Picard()).states[0].shape == (2,)


def test_a_probe_says_how_the_backward_solve_ended():
    cell = lambda z, x: 0.5 * jnp.cos(z) + x
    solver, adjoint = deq.Picard(rtol=1e-5), deq.Implicit(deq.Picard(rtol=1e-5))
    loss = lambda x, probe: deq.trajectory(
        cell, jnp.zeros(3), x, at=(1,), solver=solver, adjoint=adjoint, probe=probe
    ).value.sum()
    probe = jax.grad(loss, argnums=1)(jnp.arange(3.0), deq.Probe.zeros())
    assert probe.status == deq.Status.CONVERGED and probe.steps > 1 and probe.residual <= 1e-5
