"""What each adjoint promises beyond a right gradient: modes, orders, counts, memory, failures and messages."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import OnFailure, Status

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM = 4
PRECISE = deq.Picard(rtol=1e-13, max_steps=400)
JVP = deq.ImplicitJVP(PRECISE)


def cell(z, params, x):
    return jnp.tanh(z @ params["w"].T + jnp.broadcast_to(params["u"], x.shape) * x)


@pytest.fixture
def params(x64):
    w = jnp.cos(jnp.arange(DIM * DIM, dtype=float) ** 2).reshape(DIM, DIM)
    return {"w": 0.6 * w / jnp.linalg.norm(w, 2), "u": jnp.linspace(0.5, 1.5, DIM)}


@pytest.fixture
def x(x64):
    return jnp.sin(1.0 + jnp.arange(DIM, dtype=float))


def root(params, x, f=cell, **options):
    options = {"solver": PRECISE, "adjoint": JVP} | options
    return deq.fixed_point(f, jnp.zeros_like(x), params, x, **options).value


def unrolled(params, x, f=cell, length=120):
    return jax.lax.scan(lambda z, _: (f(z, params, x), None), jnp.zeros_like(x), length=length)[0]


def assert_close(got, want, rtol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def relative_error(got, want):
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    return np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))


def temporary_bytes(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


# ---- ImplicitJVP -------------------------------------------------------------------------------------------


def test_forward_and_reverse_mode_agree_with_an_unroll(params, x):
    tangents = jax.tree.map(jnp.cos, (params, x))
    both = lambda solve: jax.jit(
        lambda params, x: (
            jax.jvp(solve, (params, x), tangents),
            jax.jacfwd(solve, 1)(params, x),
            jax.jacrev(solve, 1)(params, x),
        )
    )(params, x)
    got = both(root)
    assert_close(got, both(unrolled))
    assert_close(got[1], got[2])


def energy(x, params, solve):
    return jnp.sum(jnp.sin(solve(params, x)) * jnp.arange(1.0, DIM + 1))


def test_hessians_in_every_mode(params, x):
    modes = {"forward over reverse": (jax.jacfwd, jax.jacrev), "reverse over forward": (jax.jacrev, jax.jacfwd)}
    modes |= {"reverse over reverse": (jax.jacrev, jax.jacrev), "forward over forward": (jax.jacfwd, jax.jacfwd)}
    every = lambda solve: jax.jit(
        lambda x: {name: outer(inner(energy))(x, params, solve) for name, (outer, inner) in modes.items()}
    )(x)
    hessians = every(root)
    want = jax.jit(jax.hessian(energy), static_argnums=2)(x, params, unrolled)
    for hessian in hessians.values():
        assert_close(hessian, want)
        assert np.linalg.norm(hessian - hessian.T) <= 1e-9 * np.linalg.norm(hessian)


def test_a_hessian_with_traced_tolerances(params, x, count_traces):
    f = count_traces(cell)

    @jax.jit
    def hessian(x, rtol):
        solver = deq.Picard(rtol=rtol, max_steps=400)
        return jax.hessian(lambda x: jnp.sum(root(params, x, f, solver=solver, adjoint=deq.ImplicitJVP(solver)) ** 2))(
            x
        )

    want = jax.jit(jax.hessian(lambda x: jnp.sum(unrolled(params, x) ** 2)))(x)
    assert relative_error(hessian(x, 1e-13), want) < 1e-10
    traces = f.traces
    assert 1e-8 < relative_error(hessian(x, 1e-4), want) < 1e-2
    assert f.traces == traces


def jvp_of(solve, params, x):
    return jax.jvp(lambda x: solve(params, x), (x,), (jnp.cos(x),))


@pytest.mark.parametrize("inside", ["vmap", "scan", "remat"])
def test_forward_mode_inside(params, x, inside):
    xs = jnp.stack([x, -x, 2 * x])
    run = {
        "vmap": lambda xs: jax.vmap(lambda x: jvp_of(root, params, x))(xs),
        "scan": lambda xs: jax.lax.scan(lambda c, x: (c, jvp_of(root, params, x)), 0.0, xs)[1],
        "remat": lambda xs: jax.vmap(lambda x: jvp_of(jax.checkpoint(root), params, x))(xs),
    }[inside]
    assert_close(jax.jit(run)(xs), jax.vmap(lambda x: jvp_of(unrolled, params, x))(xs))


# ---- Reversible --------------------------------------------------------------------------------------------


def coupled(params, x, z0, steps, damping=0.5):
    """The iteration that Reversible walks, in plain Python."""
    y = z = z0
    for _ in range(steps):
        y = (1 - damping) * y + damping * cell(z, params, x)
        z = (1 - damping) * z + damping * cell(y, params, x)
    return z


@pytest.mark.parametrize("max_steps, steps", [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (21, 10)])
def test_reversible_is_the_exact_gradient_of_its_steps(params, x, max_steps, steps):
    z0 = jnp.linspace(-1.0, 1.0, DIM)

    def reversible(params, x, z0):
        solver, adjoint = deq.Picard(rtol=0.0, max_steps=max_steps), deq.Reversible(0.5)
        z, stats = deq.fixed_point(cell, z0, params, x, solver=solver, adjoint=adjoint)
        return jnp.sum(z**3), (z, stats)

    plain = lambda params, x, z0: jnp.sum(coupled(params, x, z0, steps) ** 3)
    (_, (z, stats)), got = jax.jit(jax.value_and_grad(reversible, argnums=(0, 1, 2), has_aux=True))(params, x, z0)
    assert_close(got, jax.grad(plain, argnums=(0, 1, 2))(params, x, z0), rtol=1e-8)
    assert_close(z, coupled(params, x, z0, steps), rtol=1e-14)
    assert stats.steps == (2 * steps + 1 if max_steps else 0) and stats.status == Status.MAX_STEPS
    if max_steps:
        np.testing.assert_allclose(stats.residual, np.linalg.norm(cell(z, params, x) - z), rtol=1e-10)


def test_the_hessian_of_reversible_is_that_of_its_steps(params, x):
    solver = deq.Picard(rtol=0.0, max_steps=9)
    solve = functools.partial(root, solver=solver, adjoint=deq.Reversible(0.5))
    plain = lambda params, x: coupled(params, x, jnp.zeros(DIM), 4)
    got, want = (jax.jit(jax.hessian(energy), static_argnums=2)(x, params, f) for f in (solve, plain))
    assert_close(got, want, rtol=1e-9)


def test_reversible_counts_and_stops_each_problem_by_itself(params, x, count_calls):
    f, xs = count_calls(cell), jnp.stack([x, 3 * x, 0.1 * x])
    solver = deq.Picard(rtol=3e-3, max_steps=91)

    def total(f, xs, batch_ndim):
        z0 = jnp.full_like(xs, 0.5)
        z, stats = deq.fixed_point(f, z0, params, xs, solver=solver, adjoint=deq.Reversible(0.5), batch_ndim=batch_ndim)
        return jnp.sum(z**3), stats

    pull = lambda f, n: jax.jit(jax.value_and_grad(functools.partial(total, f, batch_ndim=n), has_aux=True))
    (_, stats), grads = pull(cell, 1)(xs)
    alone = [pull(cell, 0)(x) for x in xs]
    assert len(set(stats.steps.tolist())) == 3 and jnp.all(stats.converged)
    assert stats.steps.tolist() == [int(a[0][1].steps) for a in alone]
    assert_close(grads, jnp.stack([a[1] for a in alone]))
    jax.jit(lambda x: total(f, x, 0)[1])(x)
    assert f.calls == stats.steps[0]


@pytest.mark.full_compile
def test_reversible_memory_does_not_grow_with_depth(params, x):
    def loss(x, length):
        return jnp.sum(root(params, x, solver=deq.Picard(rtol=0.0, max_steps=length), adjoint=deq.Reversible(0.1)))

    sizes = [temporary_bytes(jax.grad(functools.partial(loss, length=n)), x) for n in (5, 101)]
    assert sizes[0] == sizes[1]


def test_reversible_warns_where_rounding_would_spoil_it(params, x):
    solve = lambda max_steps, x: root(params, x, solver=deq.Picard(max_steps=max_steps), adjoint=deq.Reversible(0.5))
    with pytest.warns(UserWarning, match=r"Reversible\(damping=0\.5\) with max_steps=201.*max_steps <= 91, a smaller"):
        solve(201, x)
    with pytest.warns(UserWarning, match="walking back 100 steps"):
        jax.jit(lambda x: solve(201, x))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(91, x)


# ---- Shine -------------------------------------------------------------------------------------------------


@pytest.fixture
def linear(x64, rng):
    """z = w z + x in 30 dimensions, w of spectral radius 0.9, and the cotangent."""
    w = jax.random.normal(rng, (30, 30))
    w = 0.9 * w / np.max(np.abs(np.linalg.eigvals(w)))
    return w, *jax.random.normal(jax.random.key(1), (2, 30))


def shine(x, w, z_bar, refine):
    """(x̄, Probe) by Shine."""

    def loss(x, probe):
        solver = deq.Broyden(rtol=1e-4, rank=60)
        f = lambda z, x: z @ w.T + x
        options = dict(solver=solver, adjoint=deq.Shine(refine), probe=probe, batch_ndim=x.ndim - 1)
        return jnp.sum(deq.fixed_point(f, jnp.zeros_like(x), x, **options).value @ z_bar)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, deq.Probe.zeros(x.shape[:-1]))


def test_shine_beats_jfb_at_a_known_price(linear):
    w, x, z_bar = linear
    exact, jfb = np.linalg.solve(np.eye(30) - w.T, z_bar), z_bar
    errors = []
    for refine in (0, 5, 15):
        x_bar, probe = shine(x, w, z_bar, refine)
        errors.append(relative_error(x_bar, exact))
        assert probe.steps <= refine + 2
    assert errors[1] <= relative_error(jfb, exact) / 3
    assert errors[0] >= errors[1] >= errors[2]


def test_shine_gives_each_problem_of_a_batch_what_it_gets_alone(linear):
    w, x, z_bar = linear
    one = jnp.eye(30)[0]
    xs = jnp.stack([x, one - w @ one, 0 * x])  # they stop at different times, the last at once
    x_bar, probe = shine(xs, w, z_bar, 3)
    for i, x in enumerate(xs):
        alone, alone_probe = shine(x, w, z_bar, 3)
        np.testing.assert_allclose(x_bar[i], alone, rtol=1e-9, atol=1e-12)
        assert probe.steps[i] == alone_probe.steps


def test_shine_falls_back_problem_by_problem(params, x):
    # The first problem's memory is made useless: its estimate is worse than the cotangent itself.
    xs = jnp.stack([x, 2 * x])
    solver = deq.Broyden(rtol=1e-10, rank=20)
    solved = deq.solve(cell, jnp.zeros_like(xs), params, xs, solver=solver, batch_ndim=1)
    spoilt = jnp.array([1e4, 1.0])[:, None, None]
    memory = solved.memory._replace(core=solved.memory.core * spoilt)

    def pull(memory, adjoint):
        def loss(xs):
            return jnp.sum(
                deq.attach(
                    lambda z, xs: cell(z, params, xs), solved.value, xs, adjoint=adjoint, solver=solver,
                    batch_ndim=1, found=solved._replace(memory=memory),
                ) ** 2
            )  # fmt: skip

        return jax.jit(jax.grad(loss))(xs)

    good, bad, jfb = (pull(*of) for of in ((solved.memory, deq.Shine(0)), (memory, deq.Shine(0)), (memory, deq.JFB())))
    assert_close(bad[1], good[1], rtol=1e-12)
    assert_close(bad[0], jfb[0], rtol=1e-12)
    assert relative_error(good[0], jfb[0]) > 1e-3


# ---- Unroll(stop=True) -------------------------------------------------------------------------------------


def first_within(params, x, rtol, max_steps):
    """The first iterate z with ‖f(z) − z‖ ≤ rtol ‖f(z)‖ and its index, by a Python loop."""
    z = jnp.zeros_like(x)
    for k in range(max_steps):
        fz = cell(z, params, x)
        if np.linalg.norm(fz - z) <= rtol * np.linalg.norm(fz):
            return z, k
        z = fz
    return z, max_steps


@pytest.mark.parametrize(
    "solver", [deq.NewtonKrylov(rtol=0.0, max_steps=6), deq.Broyden(rtol=0.0, max_steps=6)], ids=["newton", "broyden"]
)
def test_unroll_returns_the_best_iterate_of_a_solver_that_steps_back(x64, solver):
    # From 5 the first step of each overshoots the root of arctan, and is taken back or is a mere difference.
    run = lambda x: deq.fixed_point(
        lambda z: z - 3 * jnp.arctan(z - x), jnp.full(2, 5.0), solver=solver, adjoint=deq.Unroll()
    )
    x = jnp.array([0.3, -0.2])
    best = deq.solve(lambda z: z - 3 * jnp.arctan(z - x), jnp.full(2, 5.0), solver=solver)
    value, stats = run(x)
    np.testing.assert_allclose(value, best.value, rtol=1e-12)
    np.testing.assert_allclose(stats.residual, best.stats.residual, rtol=1e-9)
    assert stats.steps == 7
    if isinstance(solver, deq.Broyden):  # a trust region's radius is a constant, Broyden's cuts are differentiated
        total, h = lambda x: run(x).value.sum(), 1e-6
        want = [(total(x + h * e) - total(x - h * e)) / (2 * h) for e in jnp.eye(2)]
        np.testing.assert_allclose(jax.jit(jax.grad(total))(x), want, rtol=1e-5)


def test_unroll_of_newton_krylov_is_differentiable_while_its_radius_is_infinite(params, x):
    # The radius is infinite until a trial fails, and none fails here.
    solver = deq.NewtonKrylov(rtol=0.0, max_steps=12, difference=1e-4)  # rounding is no part of the differences
    total = lambda x: jnp.sum(root(params, x, solver=solver, adjoint=deq.Unroll()) ** 3)
    h = 1e-5
    want = [(total(x + h * e) - total(x - h * e)) / (2 * h) for e in jnp.eye(DIM)]
    for derivative in (jax.grad, jax.jacfwd):
        got = jax.jit(derivative(total))(x)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("checkpoint", [None, True, 4])
def test_unroll_stops_at_the_first_iterate_within_tolerance(params, x, count_calls, checkpoint):
    f, xs = count_calls(cell), jnp.stack([x, 0.01 * x, 3 * x])

    def loss(f, xs, adjoint, batch_ndim, max_steps=30):
        solver = deq.Picard(rtol=1e-3, max_steps=max_steps)
        options = dict(solver=solver, adjoint=adjoint, batch_ndim=batch_ndim)
        z, stats = deq.fixed_point(f, jnp.zeros_like(xs), params, xs, **options)
        return jnp.sum(z**3), (z, stats)

    stopping = deq.Unroll(checkpoint, stop=True)
    (_, (z, stats)), got = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=(0, 2, 3))(
        cell, xs, stopping, 1
    )
    for i, x in enumerate(xs):
        want, k = first_within(params, x, 1e-3, 30)
        np.testing.assert_allclose(z[i], want, rtol=1e-13)
        # one evaluation for the test of each iterate, and one that measures the value
        assert stats.steps[i] == k + 2 and stats.converged[i]
        exact = jax.grad(loss, argnums=1, has_aux=True)(cell, x, deq.Unroll(), 0, k)[0]
        assert_close(got[i], exact, rtol=1e-12)
    assert len(set(stats.steps.tolist())) == 3
    _, stats = jax.jit(lambda xs: loss(f, xs, stopping, 1)[1])(xs)
    assert f.calls == stats.steps.max()


def test_unroll_that_is_never_met_runs_the_whole_budget(params, x):
    solver = deq.Picard(rtol=0.0, max_steps=6)
    run = lambda adjoint: deq.fixed_point(cell, jnp.zeros(DIM), params, x, solver=solver, adjoint=adjoint)
    np.testing.assert_allclose(run(deq.Unroll(stop=True)).value, run(deq.Unroll()).value, rtol=1e-14)
    assert run(deq.Unroll(stop=True)).stats.steps == 7
    none = deq.fixed_point(
        cell, x, params, x, solver=deq.Picard(max_steps=0), adjoint=deq.Unroll(stop=True, checkpoint=True)
    )
    np.testing.assert_array_equal(none.value, x)


@pytest.mark.full_compile
def test_two_level_checkpoints_grow_as_the_square_root(params, x):
    # Grown large, so that the states kept outweigh everything that does not depend on the length.
    x = jnp.tile(x, (256, 1))

    def bytes_of(length, checkpoint):
        options = dict(solver=deq.Picard(max_steps=length), adjoint=deq.Unroll(checkpoint=checkpoint))
        return temporary_bytes(jax.grad(lambda params, x: jnp.sum(root(params, x, **options))), params, x)

    lengths = [16, 64, 256, 1024]
    power = lambda checkpoint: np.polyfit(np.log(lengths), np.log([bytes_of(n, checkpoint) for n in lengths]), 1)[0]
    assert 0.3 < power(True) < 0.6
    assert power(None) > 0.85


# ---- OnFailure ---------------------------------------------------------------------------------------------

SLOPES = np.array([0.5, 0.3, 0.85, -0.5])  # the third is slow: plain iteration spends its budget


def slope_gradients(adjoint, forward, slopes):
    """d sum(z²) / d slope, a problem for each slope, with the forward and the backward statistics."""

    def loss(slopes, probe):
        f = lambda z, s: s[:, None] * z + 1 + 0.1 * jnp.sin(z)
        z0 = jnp.ones((len(slopes), 1), slopes.dtype)
        z, stats = deq.fixed_point(f, z0, slopes, solver=forward, adjoint=adjoint, batch_ndim=1, probe=probe)
        return jnp.sum(z**2), stats

    (grads, probe), stats = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(slopes, deq.Probe.zeros(slopes.shape))
    return grads, stats, probe


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_policies_act_on_the_failed_problem_alone(x64, failing):
    able, plain = deq.Broyden(rtol=1e-10), deq.Picard(rtol=1e-8, max_steps=40)
    forward, backward = (plain, able) if failing == "forward" else (able, plain)
    of = lambda adjoint: slope_gradients(adjoint, forward, jnp.asarray(SLOPES))
    kept, stats, probe = of(deq.Implicit(backward))
    assert stats.converged.tolist() == [True, True, failing != "forward", True]
    assert (probe.status == Status.CONVERGED).tolist() == [True, True, failing != "backward", True]
    zero, one_step = (of(deq.Implicit(backward, policy))[0] for policy in (OnFailure.ZERO, OnFailure.ONE_STEP))
    jfb, *_ = of(deq.JFB())
    others = np.array([0, 1, 3])
    for got in (zero, one_step):
        np.testing.assert_array_equal(got[others], kept[others])
    assert zero[2] == 0 and kept[2] != 0 and jnp.all(jnp.isfinite(kept))
    np.testing.assert_allclose(one_step[2], jfb[2], rtol=1e-14)
    assert abs(kept[2] - jfb[2]) > 1e-3 * abs(jfb[2])


@pytest.mark.full_compile
def test_one_diverging_problem_of_64_leaves_the_bits_of_the_others(x64):
    slopes = jnp.linspace(-0.8, 0.8, 64)
    backward = deq.Picard(rtol=1e-8)
    pull = lambda slopes, policy: slope_gradients(
        deq.Implicit(backward, policy), deq.Anderson(rtol=1e-6, history=2), slopes
    )
    clean = pull(slopes, OnFailure.KEEP)[0]
    bad = slopes.at[37].set(jnp.inf)
    for policy in OnFailure:
        got, stats, _ = pull(bad, policy)
        others = np.arange(64) != 37
        np.testing.assert_array_equal(got[others], clean[others])
        assert stats.status[37] != Status.CONVERGED and jnp.all(stats.converged[others])


# ---- cotangents of any size --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint",
    [deq.Implicit(), deq.ImplicitJVP(), deq.Shine(), deq.Phantom(), deq.Neumann(), deq.JFB(), deq.Reversible()],
    ids=repr,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_proportional_to_their_cotangents(params, x, adjoint, dtype):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    solver = deq.Broyden(rtol=1e-5, max_steps=21)

    @jax.jit
    def pull(z_bar):
        return jax.vjp(lambda x: root(params, x, solver=solver, adjoint=adjoint), x)[1](z_bar)[0]

    z_bar = jnp.arange(1.0, DIM + 1, dtype=dtype)
    one = pull(z_bar)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        scaled = pull(scale * z_bar)
        assert jnp.all(jnp.isfinite(scaled))
        np.testing.assert_allclose(scaled / scale, one, rtol=2e-4 if dtype == "float32" else 1e-7)
    np.testing.assert_array_equal(pull(0 * z_bar), 0)


# ---- solve and attach --------------------------------------------------------------------------------------

AT = [
    deq.Implicit(PRECISE), JVP, deq.Phantom(3, 0.4), deq.Neumann(3), deq.JFB(), deq.Shine(refine=4)
]  # fmt: skip


@pytest.mark.parametrize("adjoint", AT, ids=lambda a: type(a).__name__)
def test_attach_is_the_other_half_of_solve(params, x, adjoint):
    solver = deq.Broyden(rtol=1e-13, rank=10)

    def by_halves(params, x):
        found = deq.solve(cell, jnp.zeros(DIM), params, x, solver=solver)
        z = deq.attach(cell, found.value, params, x, adjoint=adjoint, solver=solver, found=found)
        return jnp.sum(z**3)

    whole = lambda params, x: jnp.sum(root(params, x, solver=solver, adjoint=adjoint) ** 3)
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (by_halves, whole))
    assert_close(got, want, rtol=1e-12)
    no_gradient = jax.grad(lambda x: jnp.sum(deq.solve(cell, jnp.zeros(DIM), params, x, solver=solver).value))(x)
    np.testing.assert_array_equal(no_gradient, 0)


def test_attach_with_a_policy_reads_what_was_found(params, x):
    few, adjoint = deq.Picard(rtol=1e-10, max_steps=3), deq.Implicit(PRECISE, OnFailure.ZERO)
    for solver, expected in ((few, True), (PRECISE, False)):
        found = deq.solve(cell, jnp.zeros(DIM), params, x, solver=solver)
        loss = lambda x: jnp.sum(deq.attach(cell, found.value, params, x, adjoint=adjoint, found=found))
        assert bool(jnp.all(jax.grad(loss)(x) == 0)) == expected


def test_solve_resumes_and_folds(params, x, count_calls):
    class Largest:
        def init(self, z0, batch_ndim):
            return jnp.zeros(())

        def update(self, folded, seen):
            return jnp.maximum(folded, seen.residual)

    f, solver = count_calls(cell), deq.Broyden(rtol=1e-9)
    first = deq.solve(f, jnp.zeros(DIM), params, x, solver=solver, fold=Largest())
    assert f.calls == first.stats.steps and first.stats.converged
    np.testing.assert_allclose(first.folded, np.linalg.norm(cell(jnp.zeros(DIM), params, x)), rtol=1e-12)
    again, fresh = (
        deq.solve(cell, first.value, params, 1.05 * x, solver=solver, memory=memory) for memory in (first.memory, None)
    )
    assert_close(again.value, fresh.value, rtol=1e-8)
    assert again.stats.steps < fresh.stats.steps


# ---- forward mode through an adjoint that has none ---------------------------------------------------------

FORWARD_MODE = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jit of jacfwd": lambda f, x: jax.jit(jax.jacfwd(f))(x),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
    "jit of hessian": lambda f, x: jax.jit(jax.hessian(lambda x: f(x).sum()))(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "jvp of vmap": lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
    "jacfwd in scan": lambda f, x: jax.lax.scan(lambda c, x: (c, jax.jacfwd(f)(x)), 0.0, x[None]),
}
# Implicit in every mode, the others in those that take another way through JAX. (The Hessian of Reversible, forward
# over reverse, is right: see above.)
REFUSED = [(deq.Implicit(), mode) for mode in FORWARD_MODE]
REFUSED += [(deq.Shine(), mode) for mode in ("jvp", "jit of hessian")]
REFUSED += [(deq.Reversible(), mode) for mode in ("jvp", "jit of jacfwd", "linearize")]


@pytest.mark.parametrize("adjoint, mode", REFUSED, ids=str)
def test_forward_mode_names_the_adjoint_that_has_it(params, x, adjoint, mode):
    def solve(x):
        return root(params, x, solver=deq.Broyden(max_steps=11, rank=2), adjoint=adjoint)

    with pytest.raises(TypeError, match=r"reverse mode \(grad, vjp, jacrev\) alone.*adjoint=ImplicitJVP\(\)"):
        FORWARD_MODE[mode](solve, x)


# Shine's rule iterates, and so does Reversible's: JAX would say that a while_loop has no reverse mode.
@pytest.mark.parametrize("adjoint", [deq.Shine(), deq.Reversible()], ids=repr)
@pytest.mark.parametrize("jit", [False, True])
def test_a_second_derivative_names_the_adjoint_that_has_it(params, x, adjoint, jit):
    solve = lambda x: root(params, x, solver=deq.Broyden(max_steps=11, rank=2), adjoint=adjoint)
    twice = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(solve(x) ** 2))(x) ** 2))
    name = type(adjoint).__name__
    with pytest.raises(TypeError, match=rf"{name} has first derivatives only.*adjoint=Implicit\(\)"):
        (jax.jit(twice) if jit else twice)(x)


# ---- both modes of the inexact adjoints --------------------------------------------------------------------

INEXACT = {  # what each differentiates: plain calls from a constant z*
    "neumann": (deq.Neumann(4), lambda f, z: functools.reduce(lambda h, _: f(h), range(4), z)),
    "jfb": (deq.JFB(), lambda f, z: f(z)),
    "phantom": (deq.Phantom(3, 0.4), lambda f, z: functools.reduce(lambda h, _: 0.6 * h + 0.4 * f(h), range(3), z)),
}


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_derivatives_in_both_modes(params, x, name):
    adjoint, calls = INEXACT[name]
    z_star = root(params, x)
    plain = lambda params, x: calls(lambda z: cell(z, params, x), z_star)
    solve = functools.partial(root, adjoint=adjoint)
    primals, tangents = (params, x), jax.tree.map(jnp.cos, (params, x))
    z, z_dot = jax.jit(lambda p, t: jax.jvp(solve, p, t))(primals, tangents)
    np.testing.assert_array_equal(z, jax.jit(solve)(*primals))
    assert_close(z_dot, jax.jvp(plain, primals, tangents)[1], rtol=1e-9)
    want = jax.jacrev(plain, argnums=(0, 1))(*primals)
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert_close(jax.jit(jacobian(solve, argnums=(0, 1)))(*primals), want, rtol=1e-9)
    xs = jnp.stack([x, -x])
    each = jax.vmap(jax.jacfwd(solve, argnums=1), in_axes=(None, 0))(params, xs)
    np.testing.assert_allclose(each[0], want[1], rtol=1e-8)
    assert_close(jax.linearize(lambda x: solve(params, x), x)[1](x), want[1] @ x, rtol=1e-8)


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_hessians_agree_in_every_mode(params, x, name):
    solve = functools.partial(root, adjoint=INEXACT[name][0])
    loss = lambda x: energy(x, params, solve)
    modes = [(jax.jacfwd, jax.jacfwd), (jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd), (jax.jacrev, jax.jacrev)]
    want, *others = (jax.jit(outer(inner(loss)))(x) for outer, inner in modes)
    for hessian in others:
        assert_close(hessian, want, rtol=1e-9)


@pytest.mark.full_compile
@pytest.mark.parametrize("adjoint", [deq.JFB(), deq.Neumann(5), JVP], ids=lambda a: type(a).__name__)
def test_no_linearization_is_kept_from_the_forward_pass(params, x, adjoint):
    # A caller's backward pass begins with all that the forward pass left it: the state and what f reads.
    xs, w = jnp.tile(x, (64, 1)), jnp.ones((DIM, 512))
    f = lambda z, w: 0.01 * jnp.tanh(jnp.tanh(z @ w) @ w.T) + xs
    solve = lambda w: deq.fixed_point(f, 0 * xs, w, solver=deq.Picard(max_steps=5), adjoint=adjoint, batch_ndim=1).value
    kept = jax.eval_shape(lambda w: jax.vjp(solve, w)[1], w)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= max(w.size, xs.size)


# ---- states of several leaves, inputs that drive some of them ----------------------------------------------


def three_leaves(s, p, n):
    """A nested state; p drives one leaf, another is handed on, and n is an integer."""
    a, b, c = s["a"], s["more"]["b"], s["more"]["c"]
    return {"a": 0.5 * a + 0.2 * b[0] + p, "more": {"b": 0.3 * jnp.sin(b) + 0.1 * a * c, "c": n * jnp.ones_like(c)}}


@pytest.mark.parametrize("adjoint", [deq.ImplicitJVP(PRECISE), deq.Neumann(60), deq.Implicit(PRECISE)], ids=repr)
def test_parameters_that_drive_some_leaves(x64, adjoint):
    n, z0 = jnp.array(2), {"a": jnp.zeros(()), "more": {"b": jnp.zeros(2), "c": jnp.zeros(())}}

    def value(p):
        s = deq.fixed_point(three_leaves, z0, p, n, solver=PRECISE, adjoint=adjoint).value
        return jnp.stack([s["a"], *s["more"]["b"], s["more"]["c"]])

    def looped(p):
        s = jax.lax.fori_loop(0, 200, lambda _, s: three_leaves(s, p, n), z0)
        return jnp.stack([s["a"], *s["more"]["b"], s["more"]["c"]])

    want = jax.jacfwd(looped)(0.7)
    assert_close(jax.jacrev(value)(0.7), want, rtol=1e-9)
    assert_close(jax.jit(jax.jacrev(value))(0.7), want, rtol=1e-9)
    assert_close(jax.vmap(jax.grad(lambda p: value(p)[1]))(jnp.array([0.7, 0.7])), jnp.tile(want[1], 2), rtol=1e-9)
    if not isinstance(adjoint, deq.Implicit):
        assert_close(jax.jit(jax.jacfwd(value))(0.7), want, rtol=1e-9)
    if not isinstance(adjoint, deq.Neumann):  # whose own second derivative is another
        second = jax.jacfwd(jax.jacfwd(looped))(0.7)
        assert_close(jax.jit(jax.jacrev(jax.jacrev(value)))(0.7), second, rtol=1e-8)
    if isinstance(adjoint, deq.ImplicitJVP):
        assert_close(jax.jit(jax.hessian(value))(0.7), second, rtol=1e-8)


def test_an_f_that_has_a_forward_derivative_alone(x64):
    def square_root(c):  # by Newton, a while_loop
        return jax.lax.while_loop(lambda s: s[1] < 12, lambda s: (0.5 * (s[0] + c / s[0]), s[1] + 1), (c, 0))[0]

    def repeated(z, a, n):
        return jax.lax.fori_loop(0, n, lambda _, z: 0.3 * jnp.cos(z) + a, z)

    # z² = a + z; and the fixed point of n steps is that of one
    solve = lambda a: deq.fixed_point(lambda z: square_root(a + z), 1.0, solver=PRECISE, adjoint=JVP).value
    np.testing.assert_allclose(jax.jit(jax.jacfwd(solve))(2.0), 1 / 3, rtol=1e-9)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(solve))(jnp.array([2.0, 6.0])), [1 / 3, 1 / 5], rtol=1e-9)
    if jax.__version_info__ >= (0, 8):  # before, jax.jvp of jax.linearize of a while_loop is a TypeError of JAX's own
        np.testing.assert_allclose(jax.jacfwd(jax.jacfwd(solve))(2.0), -2 / 27, rtol=1e-8)
    for adjoint in (JVP, deq.Neumann(200)):
        steps = lambda a, n, adjoint=adjoint: (
            deq.fixed_point(repeated, jnp.zeros(2), a, n, solver=PRECISE, adjoint=adjoint).value
        )
        a = jnp.array([0.2, 0.5])
        want = np.diag(1 / (1 + 0.3 * np.sin(steps(a, 1))))
        np.testing.assert_allclose(jax.jit(jax.jacfwd(steps))(a, 3), want, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(solve)(2.0)


# ---- Probe of the adjoints that have both modes ------------------------------------------------------------


def probed(adjoint, params, x, probe):
    options = dict(solver=PRECISE, adjoint=adjoint, probe=probe)
    return deq.fixed_point(cell, jnp.zeros(DIM), params, x, **options).value.sum()


def test_the_probe_of_implicit_jvp_is_that_of_implicit(params, x):
    few, able = deq.Picard(rtol=1e-9, max_steps=4), deq.Picard(rtol=1e-9)
    for solver, status in ((able, Status.CONVERGED), (few, Status.MAX_STEPS)):
        pull = lambda x, probe, adjoint: jax.grad(functools.partial(probed, adjoint, params), (0, 1))(x, probe)
        want = jax.jit(pull, static_argnums=2)(x, deq.Probe.zeros(), deq.Implicit(solver))
        got = jax.jit(pull, static_argnums=2)(x, deq.Probe.zeros(), deq.ImplicitJVP(solver))
        assert_close(got, want, rtol=1e-12)
        assert got[1].status == status and got[1].steps > 1
        alone = jax.grad(lambda probe: probed(deq.ImplicitJVP(solver), params, x, probe))(deq.Probe.zeros())
        assert alone.steps == got[1].steps
        mapped = jax.vmap(pull, in_axes=(0, None, None))(jnp.stack([x, 2 * x]), deq.Probe.zeros(), JVP)
        assert mapped[1].steps.shape == (2,) and bool(jnp.all(mapped[1].status == Status.CONVERGED))


@pytest.mark.parametrize("adjoint", [JVP, deq.Phantom(3), deq.Neumann(3)], ids=repr)
def test_a_probe_does_not_disturb_a_second_derivative(params, x, adjoint):
    def squared(x, probe):
        x_bar, probe_bar = jax.grad(functools.partial(probed, adjoint, params), (0, 1))(x, probe)
        return jnp.sum(x_bar**2), probe_bar

    with_probe, steps = jax.jit(jax.grad(squared, has_aux=True))(x, deq.Probe.zeros())
    without = jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(lambda x: root(params, x, adjoint=adjoint).sum())(x) ** 2)))
    assert_close(with_probe, without(x), rtol=1e-12)
    assert steps.steps > 1


# ---- the range of a dtype ----------------------------------------------------------------------------------

EVERY = [
    deq.Implicit(), deq.Implicit(deq.Picard(rtol=1e-4, max_steps=1), OnFailure.ONE_STEP), deq.ImplicitJVP(),
    deq.Shine(), deq.JFB(), deq.Neumann(4), deq.Phantom(3, 0.8)
]  # fmt: skip


@pytest.mark.parametrize("adjoint", EVERY, ids=lambda a: f"{type(a).__name__}{getattr(a, 'on_failure', '')}")
@pytest.mark.parametrize("batch_ndim", [0, 1])
def test_float16_gradients_are_those_of_float32(adjoint, batch_ndim):
    n = 2048
    gain, x = jnp.linspace(0.3, 0.7, n), jnp.sin(jnp.arange(float(n))).reshape(8, -1)
    solver = deq.Broyden(rtol=5e-3, rank=5) if isinstance(adjoint, deq.Shine) else deq.Anderson(rtol=5e-3, history=3)

    def pull(z_bar, dtype):
        f = lambda z, gain, shift: jnp.tanh(gain.reshape(8, -1).astype(dtype) * z + x.astype(dtype) + shift)
        solve = lambda gain, shift: (
            deq.fixed_point(
                f, jnp.zeros((8, n // 8), dtype), gain, shift, solver=solver, adjoint=adjoint, batch_ndim=batch_ndim
            ).value
        )
        return jax.vjp(solve, gain, jnp.zeros((), dtype))[1](z_bar.astype(dtype))

    pull = jax.jit(pull, static_argnums=1)
    for size in (1e-7, 2**-17, 1.0, 6e4):  # the mean of 131,072 entries has 2^-17
        z_bar = jnp.full((8, n // 8), size, jnp.float16)
        (got, shift16), (want, shift32) = pull(z_bar, jnp.float16), pull(z_bar, jnp.float32)
        assert got.dtype == jnp.float32 and shift16.dtype == jnp.float16
        assert relative_error(got, want) < 4e-3
        if abs(shift32) < 65504:
            np.testing.assert_allclose(shift16, shift32, rtol=1e-2)


def test_float64_cotangents_keep_their_digits(params, x):
    z_bar = jnp.arange(1.0, DIM + 1)
    for adjoint in (deq.Implicit(), deq.ImplicitJVP(), deq.Shine()):
        solver = deq.Broyden(rtol=1e-9)
        pull = jax.jit(jax.vjp(lambda x: root(params, x, solver=solver, adjoint=adjoint), x)[1])  # noqa: B023
        for scale in (1e-300, 1e-200, 1e200, 1e300):
            np.testing.assert_allclose(pull(scale * z_bar)[0] / scale, pull(z_bar)[0], rtol=1e-12)


def test_scales_are_powers_of_two_over_the_whole_range(x64):
    from deq_jax._states import divide, multiply
    from deq_jax.adjoints.backward import power_of_two

    for dtype, sizes in {
        "float16": [6e-8, 1e-7, 6e-5, 1.0, 65504.0],
        "bfloat16": [1e-37, 3e38],
        "float32": [1e-37, 1.0, 3e38],
        "float64": [1e-307, 1e-200, 1.7e308],
    }.items():
        z = {"a": jnp.asarray(sizes, dtype)[:, None] * jnp.asarray([[1, -0.5]], dtype)}
        scale = power_of_two(z, 1)
        assert scale.dtype == ("float64" if dtype == "float64" else "float32") and bool(
            jnp.all(jnp.frexp(scale)[0] == 0.5)
        )
        unit = divide(z, scale)
        assert unit["a"].dtype == dtype and bool(jnp.all(jnp.abs(unit["a"][:, 0]) <= 8))
        if dtype != "float16":
            assert bool(jnp.all(jnp.abs(unit["a"][:, 0]) >= 0.125))
        np.testing.assert_array_equal(multiply(unit, scale)["a"], z["a"])
    odd = jnp.asarray([[0.0, 0.0], [jnp.inf, 1.0], [jnp.nan, 1.0]])
    np.testing.assert_array_equal(power_of_two(odd, 1), 1)


@pytest.mark.parametrize("adjoint", [deq.Implicit(), deq.ImplicitJVP(), deq.Shine(), "compact"], ids=str)
def test_the_gradient_of_a_mean_of_131_072_float16_entries(adjoint):
    x = 0.5 + 0.3 * jnp.sin(jnp.arange(131_072.0)).reshape(4, -1)
    solver = deq.Broyden(rtol=5e-3, rank=5) if isinstance(adjoint, deq.Shine) else deq.Anderson(rtol=5e-3, history=3)

    def loss(gain, dtype):
        f = lambda z, gain, x: jnp.tanh(gain.astype(dtype) * z + x)
        z0, args = jnp.zeros(x.shape, dtype), (gain, x.astype(dtype))
        if adjoint == "compact":
            z = deq.compact(f, z0, *args, axes=(None, 0), solver=solver, sizes=(2,)).value
        else:
            z = deq.fixed_point(f, z0, *args, solver=solver, adjoint=adjoint, batch_ndim=1).value
        return jnp.mean(z)

    pull = jax.jit(jax.grad(loss), static_argnums=1)
    # Each is the gradient at a z that is known to the forward tolerance, 5e-3, which is a few eps of float16.
    np.testing.assert_allclose(pull(jnp.float32(0.5), "float16"), pull(jnp.float32(0.5), "float32"), rtol=1e-2)


def test_float16_gradients_under_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    P = jax.sharding.PartitionSpec
    z_bar = jnp.asarray([1e-6, 1e-3, 1.0, 3e4], jnp.float16)[:, None] * jnp.ones((4, 8), jnp.float16)

    def pull(dtype, adjoint):
        def local(gain, z_bar):
            f = lambda z, gain: jnp.tanh(gain.astype(dtype)[None] * z + jnp.asarray(1, dtype))
            solve = lambda gain: (
                deq.fixed_point(f, 0 * z_bar, gain, solver=deq.Anderson(rtol=5e-3), adjoint=adjoint, batch_ndim=1).value
            )
            return jax.vjp(solve, gain)[1](z_bar)[0]

        over = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        return jax.jit(over)(jnp.full((8,), 0.5), z_bar.astype(dtype))

    for adjoint in (deq.Implicit(), deq.ImplicitJVP(), deq.JFB()):
        assert relative_error(pull(jnp.float16, adjoint), pull(jnp.float32, adjoint)) < 4e-3


# ---- derivatives of an unrolled solve that has converged ---------------------------------------------------


@pytest.mark.parametrize("checkpoint", [None, True])
def test_a_stopping_unroll_from_a_warm_start_has_the_derivative(x64, checkpoint):
    # z* = 10 a. At the solution nothing is left to see, near it the residual has a way to go, at zero it is as ever.
    def solve(a, z0):
        solver = deq.Picard(rtol=1e-4, max_steps=300)
        adjoint = deq.Unroll(checkpoint, stop=True)
        z, stats = deq.fixed_point(lambda z: 0.9 * z + a, z0, solver=solver, adjoint=adjoint)
        return z, stats

    steps = {}
    for z0 in (10.0, 10.0 + 1e-9, 9.99, 9.0, 0.0):
        dz, stats = jax.jit(jax.grad(solve, has_aux=True))(1.0, z0)
        np.testing.assert_allclose(dz, 10.0, rtol=2e-3)
        assert stats.converged
        steps[z0] = int(stats.steps)
    assert steps[10.0] == 301 and steps[10.0 + 1e-9] < 120
    # 0.9^k ≤ 1e-4 · 10 (1 − 0.9^k): the test at the cold start, which is that of the value alone
    assert steps[0.0] == 2 + next(k for k in range(300) if 0.9**k <= 1e-3 * (1 - 0.9 ** (k + 1)))
    assert abs(steps[9.99] - steps[0.0]) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", [deq.Anderson(history=2), deq.Anderson(), deq.Broyden()], ids=str)
def test_an_accelerated_unroll_past_convergence_has_a_bounded_derivative(x64, solver, dtype):
    def jacobian(z0):
        f = lambda z, a: jnp.array([0.5, -2.0], dtype) * z + a
        solve = lambda a: (
            deq.fixed_point(
                f, jnp.asarray(z0, dtype), a, solver=dataclasses.replace(solver, max_steps=40), adjoint=deq.Unroll()
            ).value
        )
        return jax.jit(jax.jacrev(solve))(jnp.array([1.0, 3.0], dtype))

    exact, eps = np.diag([2.0, 1 / 3]), np.finfo(dtype).eps
    for z0 in ([0.0, 0.0], [0.3, -0.7]):
        np.testing.assert_allclose(jacobian(z0), exact, rtol=0, atol=100 * eps)
    # The second entry starts at its solution and the solve never moves along it: its derivative is that of the two
    # steps which the first one took, and no longer grows with the steps after them.
    np.testing.assert_allclose(jacobian([0.0, 1.0]), np.diag([2.0, -3.0]), rtol=0, atol=1e3 * eps)


def test_checkpoints_at_every_step_are_not_those_of_root_l():
    one, root = deq.Unroll(checkpoint=1), deq.Unroll(checkpoint=True)
    assert one != root and one == deq.Unroll(checkpoint=1) and hash(one) != hash(root)
    assert jax.tree.structure(one) != jax.tree.structure(root)
