"""What each adjoint promises beyond a right gradient: modes, orders, counts, memory, failures and messages."""

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
    return jnp.tanh(z @ params["w"].T + params["u"] * x)


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
        return jnp.sum(deq.fixed_point(f, jnp.zeros_like(x), x, **options).value * z_bar)

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
    memory = solved.memory._replace(middle=solved.memory.middle * spoilt)

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
REFUSED += [(a, m) for a in (deq.Phantom(), deq.Neumann(), deq.JFB(), deq.Shine()) for m in ("jvp", "jit of hessian")]
REFUSED += [(deq.Reversible(), mode) for mode in ("jvp", "jit of jacfwd", "linearize")]


@pytest.mark.parametrize("adjoint, mode", REFUSED, ids=str)
def test_forward_mode_names_the_adjoint_that_has_it(params, x, adjoint, mode):
    def solve(x):
        return root(params, x, solver=deq.Broyden(max_steps=11, rank=2), adjoint=adjoint)

    with pytest.raises(TypeError, match=r"reverse mode \(grad, vjp, jacrev\) alone.*adjoint=ImplicitJVP\(\)"):
        FORWARD_MODE[mode](solve, x)


def test_checkpoints_at_every_step_are_not_those_of_root_l():
    one, root = deq.Unroll(checkpoint=1), deq.Unroll(checkpoint=True)
    assert one != root and one == deq.Unroll(checkpoint=1) and hash(one) != hash(root)
    assert jax.tree.structure(one) != jax.tree.structure(root)
