"""Carried leaves of z0: counters, flags and keys that f returns the next value of, and that nothing solves for."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax._programs import programs
from deq_jax._states import holding, join, split
from deq_jax._trace import axes_of

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")

BATCH, DIM = 4, 3
SOLVERS = {
    "picard": deq.Picard(rtol=1e-8, max_steps=300),
    "picard, rarely tested": deq.Picard(rtol=1e-8, max_steps=300, test_every=3),
    "anderson": deq.Anderson(rtol=1e-8),
    "anderson, rarely tested": deq.Anderson(rtol=1e-8, test_every=4),
    "broyden": deq.Broyden(rtol=1e-8),
    "newton-krylov": deq.NewtonKrylov(rtol=1e-8),
    "robust": deq.Robust(rtol=1e-8),
}
BACKWARD = deq.Anderson(rtol=1e-11, history=8)
ADJOINTS = {
    "implicit": deq.Implicit(BACKWARD),
    "implicit, jvp": deq.ImplicitJVP(BACKWARD),
    "shine": deq.Shine(),
    "phantom": deq.Phantom(),
    "neumann": deq.Neumann(),
    "jfb": deq.JFB(),
    "unroll": deq.Unroll(),
    "unroll, checkpointed": deq.Unroll(checkpoint=True, stop=True),
}
at_equilibrium = [name for name in ADJOINTS if name != "shine" and "unroll" not in name]
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
each_key = pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])


def keys_for(make_key, count=BATCH):
    return jax.vmap(make_key)(jnp.arange(count))


def bits(key):
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def assert_same(got, want):
    """Trees of keys, counts and floats that are equal bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.fixture
def params(x64):
    x = jnp.linspace(-0.2, 3, BATCH * DIM).reshape(BATCH, DIM)
    return {"w": 0.3 * jnp.cos(jnp.arange(9.0)).reshape(DIM, DIM), "x": x}


GAIN = np.array([0.1, 0.5, 0.9, 0.99])  # of problems that stop at different times


def counted(z, params):
    """A cell that counts its evaluations, and in a raw product of ints mixes what it counts."""
    gain = jnp.asarray(GAIN)[:, None]
    h = gain * jnp.cos(z["h"] @ params["w"] + params["x"])
    return {"h": h, "n": z["n"] + 1, "mixed": 3 * z["mixed"] + 1}


def counting_start():
    return {"h": jnp.zeros((BATCH, DIM)), "n": jnp.zeros(BATCH, jnp.int32), "mixed": jnp.arange(BATCH, dtype=jnp.uint8)}


def noisy(z, params, fresh):
    """A batched cell whose weights are noisy: with a fresh noise at each evaluation, or with the same one."""
    both = jax.vmap(lambda key: jax.random.split(key))(z["key"])
    noise = jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(both[:, 1])
    h = 0.5 * jnp.tanh((1 + 0.1 * noise) * (z["h"] @ params["w"]) + params["x"])
    return {"h": h, "key": both[:, 0] if fresh else z["key"], "n": z["n"] + 1}


same_noise = functools.partial(noisy, fresh=False)
fresh_noise = functools.partial(noisy, fresh=True)


def noisy_start(make_key):
    return {"h": jnp.zeros((BATCH, DIM)), "key": keys_for(make_key), "n": jnp.zeros(BATCH, jnp.int32)}


# ---- values ------------------------------------------------------------------------------------------------


@each_solver
def test_a_counter_equals_the_steps_and_a_problem_that_has_stopped_keeps_its_own(solver, params):
    z, stats = deq.fixed_point(counted, counting_start(), params, solver=solver, batch_ndim=1)
    assert stats.converged.all() and len(set(stats.steps.tolist())) > 1
    np.testing.assert_array_equal(z["n"], stats.steps)
    mixed = np.arange(BATCH)
    for i, n in enumerate(z["n"].tolist()):
        for _ in range(n):
            mixed[i] = (3 * mixed[i] + 1) % 256
    np.testing.assert_array_equal(z["mixed"], mixed)
    assert z["mixed"].dtype == jnp.uint8


@each_solver
def test_the_floats_are_those_of_a_solve_without_carried_leaves(solver, params):
    plain = lambda h, params: counted(counting_start() | {"h": h}, params)["h"]
    want = deq.solve(plain, jnp.zeros((BATCH, DIM)), params, solver=solver, batch_ndim=1)
    got = deq.solve(counted, counting_start(), params, solver=solver, batch_ndim=1)
    np.testing.assert_allclose(got.value["h"], want.value, rtol=1e-14)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    assert types(got.memory) == types(want.memory)


@each_key
def test_a_key_of_a_problem_is_split_as_often_as_it_is_evaluated(make_key, params):
    solver = deq.Picard(rtol=3e-2, max_steps=50)
    z, stats = deq.fixed_point(fresh_noise, noisy_start(make_key), params, solver=solver, batch_ndim=1)
    assert len(set(stats.steps.tolist())) > 1
    for i in range(BATCH):
        key = make_key(i)
        for _ in range(int(stats.steps[i])):
            key = jax.random.split(key)[0]
        np.testing.assert_array_equal(bits(z["key"][i]), bits(key))


def test_a_problem_of_a_batch_ends_as_it_does_alone(params):
    solver = deq.Picard(rtol=3e-2, max_steps=50)
    z, stats = deq.fixed_point(fresh_noise, noisy_start(jax.random.key), params, solver=solver, batch_ndim=1)
    for i in range(BATCH):
        start = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], noisy_start(jax.random.key))
        alone = deq.fixed_point(fresh_noise, start, params | {"x": params["x"][i : i + 1]}, solver=solver, batch_ndim=1)
        assert int(alone.stats.steps[0]) == int(stats.steps[i])
        assert_same(split(alone.value)[1], split(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], z))[1])
        np.testing.assert_allclose(alone.value["h"][0], z["h"][i], rtol=1e-12)


@each_solver
def test_the_residual_is_that_of_the_value_under_the_noise_in_which_it_was_found(solver, params):
    solved = deq.solve(fresh_noise, noisy_start(jax.random.key), params, solver=solver, batch_ndim=1)
    h = solved.value["h"]
    residual = fresh_noise(join({"h": h, "key": None, "n": None}, solved.given), params)["h"] - h
    np.testing.assert_allclose(jnp.linalg.norm(residual, axis=1), solved.stats.residual, rtol=1e-9)
    other = fresh_noise(solved.value, params)["h"] - h
    assert (jnp.abs(jnp.linalg.norm(other, axis=1) / solved.stats.residual - 1) > 1e-3).all()
    assert (solved.given["n"] < solved.stats.steps).all()


def test_a_flag_halts_a_problem():
    def cell(z):
        h = 0.5 * (z["h"] + 2 / z["h"])
        done = z["done"] | (jnp.abs(h - z["h"]) < 0.1)
        return {"h": jnp.where(z["done"], z["h"], h), "done": done}

    start = {"h": jnp.array([1.0, 50.0]), "done": jnp.zeros(2, bool)}
    z, stats = deq.fixed_point(cell, start, solver=deq.Picard(rtol=1e-15, max_steps=50), batch_ndim=1)
    want = np.array([1.0, 50.0])
    for i in range(2):
        while abs(0.5 * (want[i] + 2 / want[i]) - want[i]) >= 0.1:
            want[i] = 0.5 * (want[i] + 2 / want[i])
        want[i] = 0.5 * (want[i] + 2 / want[i])
    np.testing.assert_allclose(z["h"], want, rtol=1e-14)
    assert z["done"].all() and stats.converged.all() and (jnp.abs(z["h"] - 2**0.5) > 1e-9).any()


def test_without_a_budget_they_come_back_as_given(params):
    start = noisy_start(jax.random.key)
    solved = deq.solve(fresh_noise, start, params, solver=deq.Picard(max_steps=0), batch_ndim=1)
    assert_same(solved.value, start)
    assert_same(solved.given, split(start)[1])


@pytest.mark.parametrize("status", [deq.Status.MAX_STEPS, deq.Status.NONFINITE, deq.Status.DIVERGED])
def test_a_failed_solve_has_counted_its_evaluations(status):
    grow = {deq.Status.MAX_STEPS: 1.0, deq.Status.NONFINITE: jnp.nan, deq.Status.DIVERGED: 1e9}[status]
    cell = lambda z: {"h": jnp.where(z["n"] >= 3, grow, 1.0) * (z["h"] + 1), "n": z["n"] + 1}
    z, stats = deq.fixed_point(cell, {"h": 0.0, "n": 0}, solver=deq.Picard(max_steps=6))
    assert int(stats.status) == status and int(z["n"]) == int(stats.steps)


def test_a_problem_that_stopped_after_its_best_iterate_keeps_its_last():
    # The first problem moves away from z0, its best iterate, until its budget of 3 is spent; the second one goes on.
    cell = lambda z: {"h": jnp.array([2.0, 0.9]) * z["h"] + 1, "n": z["n"] + 1}
    start = {"h": jnp.ones(2), "n": jnp.zeros(2, int)}
    solver = deq.Picard(rtol=1e-8, max_steps=jnp.array([3, 500]))
    solved = deq.solve(cell, start, solver=solver, batch_ndim=1)
    assert solved.stats.steps[0] == 3 and solved.stats.steps[1] > 100
    np.testing.assert_array_equal(solved.value["n"], solved.stats.steps)
    assert solved.value["h"][0] == 1 and solved.given["n"].tolist() == [0, int(solved.stats.steps[1]) - 1]


@pytest.mark.parametrize("leaves", [1, 3, 20])
def test_they_lie_anywhere_among_leaves_of_floats(leaves):
    start = [jnp.full((2, k % 3 + 1), 0.1) for k in range(leaves)]
    start = {"a": (jnp.zeros(2, int), start), "b": None, "c": jnp.ones((2, 2), complex)}
    start |= {"d": keys_for(jax.random.key, 2)}

    def cell(z):
        (n, hs), c, key = z["a"], z["c"], z["d"]
        return {"a": (n + 1, [0.5 * jnp.cos(h) for h in hs]), "b": None, "c": 0.5j * c + 1, "d": key}

    z, stats = deq.fixed_point(cell, start, batch_ndim=1)
    assert stats.converged.all() and jax.tree.structure(z) == jax.tree.structure(start)
    np.testing.assert_array_equal(z["a"][0], stats.steps)
    np.testing.assert_allclose(z["c"], 1 / (1 - 0.5j), rtol=1e-3)
    assert_same(z["d"], start["d"])


def test_numbers_as_starts_and_results():
    cell = lambda z: {"h": 0.5 * jnp.cos(z["h"]), "n": z["n"] + 1, "one": 1, "flag": True}
    z, stats = deq.fixed_point(cell, {"h": 0.0, "n": 0, "one": np.int16(7), "flag": False})
    assert int(z["n"]) == int(stats.steps) and z["one"] == 1 and z["one"].dtype == jnp.int16 and z["flag"]
    assert not jax.typeof(z["n"]).weak_type


def test_disable_jit(params):
    solver = deq.Picard(rtol=1e-3)
    run = functools.partial(deq.fixed_point, solver=solver, batch_ndim=1, has_aux=True)
    f = lambda z, params: (same_noise(z, params), z["n"])
    want = run(f, noisy_start(jax.random.key), params)
    with jax.disable_jit():
        got = run(f, noisy_start(jax.random.key), params)
    np.testing.assert_allclose(got.value["h"], want.value["h"], rtol=1e-12)
    assert_same((split(got.value)[1], got.stats.steps, got.aux), (split(want.value)[1], want.stats.steps, want.aux))


def test_aux_is_that_of_the_evaluation_at_the_value(params):
    f = lambda z, params: (fresh_noise(z, params), fresh_noise(z, params)["h"])
    options = dict(solver=deq.Picard(max_steps=9), batch_ndim=1)
    z, stats, aux = deq.fixed_point(f, noisy_start(jax.random.key), params, has_aux=True, **options)
    np.testing.assert_allclose(jnp.linalg.norm(aux - z["h"], axis=1), stats.residual, rtol=1e-9)
    np.testing.assert_array_equal(z["n"], stats.steps - 1)  # the evaluation for aux carries nothing


def test_another_key_is_no_other_program(params, count_compilations):
    run = lambda key: deq.fixed_point(same_noise, noisy_start(key), params, batch_ndim=1)
    run(jax.random.key)
    start = noisy_start(lambda i: jax.random.key(i + 7))
    with count_compilations() as compiled:
        deq.fixed_point(same_noise, start, params, batch_ndim=1)
    assert compiled.count == 0


# ---- gradients ---------------------------------------------------------------------------------------------


def loss_of(z):
    return jnp.sum(jnp.sin(z["h"]) @ jnp.arange(1.0, DIM + 1))


def pull(f, start, params, **options):
    """(value, gradient in params), and as a loss alone for other modes."""

    def loss(params):
        z, stats = deq.fixed_point(f, start, params, batch_ndim=1, **options)
        return loss_of(z), (z, stats)

    return jax.value_and_grad(loss, has_aux=True)(params)


def without_carried(make_key):
    """(f, start) of the same noise, from keys that f captures."""
    start = noisy_start(make_key)
    floats, carried = split(start)
    return holding(same_noise, carried), floats


def assert_close(got, want, rtol=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@each_key
@pytest.mark.parametrize("name", ADJOINTS)
def test_a_gradient_is_that_of_f_with_the_carried_values_closed_over(name, make_key, params):
    solver = deq.Broyden(rtol=1e-6) if name == "shine" else deq.Picard(rtol=1e-10, max_steps=60)
    options = dict(solver=solver, adjoint=ADJOINTS[name])
    (value, (z, stats)), grads = jax.jit(lambda p: pull(same_noise, noisy_start(make_key), p, **options))(params)
    (want, (z_want, _)), grads_want = pull(*without_carried(make_key), params, **options)
    assert stats.converged.all()
    assert_close((value, z["h"], grads), (want, z_want["h"], grads_want))
    assert_same(z["key"], keys_for(make_key))
    np.testing.assert_array_equal(z["n"], stats.steps - int("unroll" in name))  # its last evaluation only measures


@pytest.mark.parametrize("name", at_equilibrium)
def test_a_gradient_is_taken_under_the_noise_in_which_z_was_found(name, params):
    adjoint, solver = ADJOINTS[name], deq.Picard(max_steps=9)
    start = noisy_start(jax.random.key)
    (_, (z, _)), grads = pull(fresh_noise, start, params, adjoint=adjoint, solver=solver)
    given = deq.solve(fresh_noise, start, params, solver=solver, batch_ndim=1).given
    assert (given["n"] < z["n"] - 1).any()  # the best iterate is seldom the last

    def at_value(params, carried):
        floats = {"h": z["h"], "key": None, "n": None}
        f = lambda z, params: holding(fresh_noise, carried)(z, params)
        return loss_of(deq.attach(f, floats, params, adjoint=adjoint, solver=solver, batch_ndim=1))

    assert_close(grads, jax.grad(at_value)(params, given))
    other = jax.grad(at_value)(params, split(z)[1])
    assert jnp.linalg.norm(other["w"] - grads["w"]) > 1e-3 * jnp.linalg.norm(grads["w"])


@pytest.mark.parametrize("adjoint", [deq.Unroll(), deq.Unroll(checkpoint=2), deq.Unroll(stop=True)])
def test_unroll_is_the_composition_of_f(adjoint, params):
    start, solver = noisy_start(jax.random.key), deq.Picard(rtol=1e-15, max_steps=5)

    def composition(params):
        z = start
        for _ in range(5):
            z = fresh_noise(z, params)
        return loss_of(z), z

    (_, (z, stats)), grads = pull(fresh_noise, start, params, solver=solver, adjoint=adjoint)
    grads_want, z_want = jax.grad(composition, has_aux=True)(params)
    assert_close((z["h"], grads), (z_want["h"], grads_want))
    assert_same(split(z)[1], split(z_want)[1])
    np.testing.assert_array_equal(stats.steps, 6)
    residual = jnp.linalg.norm(fresh_noise(z, params)["h"] - z["h"], axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-9)


@pytest.mark.parametrize("solver", [deq.Picard(rtol=3e-2, max_steps=30), deq.Broyden(rtol=3e-2, max_steps=30)])
def test_unroll_measures_a_stopped_problem_under_its_own_noise(solver, params):
    options = dict(solver=solver, adjoint=deq.Unroll(stop=True), batch_ndim=1)
    z, stats = deq.fixed_point(fresh_noise, noisy_start(jax.random.key), params, **options)
    if isinstance(solver, deq.Picard):
        assert stats.converged.all() and len(set(stats.steps.tolist())) > 1
        path = [noisy_start(jax.random.key)]
        for _ in range(int(z["n"].max())):
            path.append(fresh_noise(path[-1], params))
        for i, n in enumerate(z["n"].tolist()):  # it stopped at evaluation n, which is the first to see path[n - 1]
            np.testing.assert_allclose(z["h"][i], path[n - 1]["h"][i], rtol=1e-12)
            residual = jnp.linalg.norm(path[n]["h"][i] - path[n - 1]["h"][i])
            np.testing.assert_allclose(stats.residual[i], residual, rtol=1e-9)
    assert (z["n"] == stats.steps - 1).all()


def test_second_derivatives(params):
    def hessians(f, start, adjoint, derivative):
        def loss(scale):
            scaled = params | {"w": scale * params["w"]}
            options = dict(solver=deq.Picard(rtol=1e-12, max_steps=200), adjoint=adjoint, batch_ndim=1)
            return loss_of(deq.fixed_point(f, start, scaled, **options).value)

        return jax.jit(derivative(loss))(1.5)

    for adjoint, derivative in [
        (ADJOINTS["implicit"], lambda loss: jax.grad(jax.grad(loss))),
        (ADJOINTS["implicit, jvp"], lambda loss: jax.grad(jax.grad(loss))),
        (ADJOINTS["implicit, jvp"], jax.hessian),
        (ADJOINTS["implicit, jvp"], lambda loss: jax.jacfwd(jax.jacfwd(loss))),
        (deq.Unroll(), jax.hessian),
    ]:
        got = hessians(same_noise, noisy_start(jax.random.key), adjoint, derivative)
        want = hessians(*without_carried(jax.random.key), adjoint, derivative)
        assert abs(want) > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-7)


@pytest.mark.parametrize("name", ["implicit, jvp", "phantom", "neumann", "jfb", "unroll"])
def test_forward_mode(name, params):
    dot = jax.tree.map(jnp.ones_like, params)

    def push(f, start):
        options = dict(solver=deq.Picard(rtol=1e-10, max_steps=60), adjoint=ADJOINTS[name], batch_ndim=1)
        run = lambda params: deq.fixed_point(f, start, params, **options).value
        return jax.jvp(run, (params,), (dot,))

    _, got = push(same_noise, noisy_start(jax.random.key))
    _, want = push(*without_carried(jax.random.key))
    np.testing.assert_allclose(got["h"], want["h"], rtol=1e-9)
    assert got["n"].dtype == jax.dtypes.float0 and got["key"].dtype == jax.dtypes.float0


def test_a_key_that_depends_on_what_is_differentiated(params):
    # A count made from a parameter, by rounding, is an integer like any other.
    def loss(scale):
        start = noisy_start(jax.random.key) | {"n": jnp.full(BATCH, jnp.round(scale).astype(jnp.int32))}
        z = deq.fixed_point(same_noise, start, params | {"x": scale * params["x"]}, batch_ndim=1).value
        return loss_of(z), z["n"]

    (_, n), slope = jax.value_and_grad(loss, has_aux=True)(5.0)
    assert n.min() > 5 and jnp.isfinite(slope)


class OneStep:
    def pullback(self, problem, forward, z_bar):
        return jax.vjp(lambda inputs: problem(forward.z, inputs), problem.inputs)[1](z_bar)[0], None


class TenSteps:
    def run(self, problem, z0, solver):
        z = jax.lax.fori_loop(0, 10, lambda _, z: problem(z), z0)
        return z, problem.stats_at(z, solver, steps=10)


def test_adjoints_of_a_users_own(params):
    start, solver = noisy_start(jax.random.key), deq.Picard(max_steps=10)
    one, jfb = (pull(fresh_noise, start, params, adjoint=a, solver=solver)[1] for a in (OneStep(), deq.JFB()))
    assert_close(one, jfb)
    (_, (z, stats)), grads = pull(fresh_noise, start, params, adjoint=TenSteps(), solver=solver)
    (_, (z_want, stats_want)), want = pull(fresh_noise, start, params, adjoint=deq.Unroll(), solver=solver)
    assert_close((z["h"], grads, stats.residual), (z_want["h"], want, stats_want.residual))
    assert_same((split(z)[1], stats.steps), (split(z_want)[1], stats_want.steps))


def test_a_probe_and_a_policy(params):
    def loss(params, probe):
        options = dict(adjoint=deq.Implicit(on_failure=deq.OnFailure.ZERO), probe=probe, batch_ndim=1)
        return loss_of(deq.fixed_point(same_noise, noisy_start(jax.random.key), params, **options).value)

    probe = jax.grad(loss, argnums=1)(params, deq.Probe.zeros((BATCH,)))
    assert (probe.steps > 0).all() and (probe.status == 0).all()


# ---- the halves, and what is built on them -----------------------------------------------------------------


def test_attach_holds_the_carried_leaves_of_z_or_those_that_were_given(params):
    solver = deq.Picard(max_steps=9)
    solved = deq.solve(fresh_noise, noisy_start(jax.random.key), params, solver=solver, batch_ndim=1)
    options = dict(adjoint=deq.JFB(), solver=solver, batch_ndim=1)
    floats = split(solved.value)[0]
    own, given = (
        jax.grad(lambda p: loss_of(deq.attach(fresh_noise, solved.value, p, found=found, **options)))(params)
        for found in (None, solved)
    )
    for got, carried in ((own, split(solved.value)[1]), (given, solved.given)):
        z_bar = jax.grad(loss_of)(floats)
        want = jax.vjp(lambda p: holding(fresh_noise, carried)(floats, p), params)[1](z_bar)[0]  # noqa: B023
        assert_close(got, want)
    assert_same(deq.attach(fresh_noise, solved.value, params, found=solved, **options), solved.value)


def test_trajectory_and_snapshots_hold_whole_trees(params):
    solver = deq.Picard(rtol=1e-15, max_steps=12)
    run = lambda p: deq.trajectory(
        fresh_noise, noisy_start(jax.random.key), p, at=(0, 3), solver=solver, correction=deq.JFB(), batch_ndim=1
    )
    found, z = run(params), noisy_start(jax.random.key)
    assert_close(split(found.states[0])[0], split(z)[0])
    for _ in range(3):
        z = fresh_noise(z, params)
    assert_close(found.states[1]["h"], z["h"])
    assert_same(split(found.states[1])[1], split(z)[1])
    np.testing.assert_array_equal(found.value["n"], found.stats.steps)
    grads = jax.grad(lambda p: loss_of(run(p).states[1]))(params)
    want = jax.vjp(lambda p: fresh_noise(z, p)["h"], params)[1](jax.grad(loss_of)({"h": found.states[1]["h"]})["h"])[0]
    assert_close(grads, want)


def test_a_state_after_the_end_is_the_value_with_what_f_was_given_there(params):
    solver = deq.Picard(rtol=3e-2, max_steps=50)
    start = noisy_start(jax.random.key)
    found = deq.trajectory(fresh_noise, start, params, at=(40,), solver=solver, batch_ndim=1)
    solved = deq.solve(fresh_noise, start, params, solver=solver, batch_ndim=1)
    assert_same(found.states[0], join(split(solved.value)[0], solved.given))


def test_a_fold_sees_what_f_was_given_and_returned(params):
    class LastCounts:
        def init(self, z0, batch_ndim):
            return z0["n"], z0["n"]

        def update(self, folded, seen):
            return seen.z["n"], seen.fz["n"]

    solved = deq.solve(counted, counting_start(), params, fold=LastCounts(), batch_ndim=1)
    given, returned = solved.folded
    assert_same(given, solved.given["n"])  # a problem that has stopped is shown at its best iterate again
    assert_same(returned, given + 1)
    trace = deq.solve(counted, counting_start(), params, fold=deq.ResidualTrace(5), batch_ndim=1).folded
    assert trace.shape == (BATCH, 5)


def test_a_warm_start_of_the_memory(params):
    solver = deq.Broyden(rtol=1e-8)
    first = deq.solve(counted, counting_start(), params, solver=solver, batch_ndim=1)
    again = deq.solve(counted, first.value, params, solver=solver, memory=first.memory, batch_ndim=1)
    np.testing.assert_array_equal(again.value["n"], first.stats.steps + again.stats.steps)
    assert (again.stats.steps < first.stats.steps).all()


def test_a_cache_keeps_the_floats_alone():
    cache = deq.FixedPointCache.create({"h": jnp.zeros(2), "key": jax.random.key(0), "n": 0}, size=5)
    batch = {"h": jnp.ones((2, 2)), "key": keys_for(jax.random.key, 2), "n": jnp.array([3, 4])}
    cache = cache.store(jnp.array([1, 2]), batch, now=0)
    fresh = jax.tree.map(lambda leaf: leaf[::-1], batch) | {"h": jnp.zeros((2, 2))}
    found = cache.lookup(jnp.array([1, 4]), fresh, now=1)
    np.testing.assert_array_equal(found["h"], [[1, 1], [0, 0]])
    assert_same(split(found)[1], split(fresh)[1])
    assert float(deq.first_guess_loss(batch, fresh)) == 1.0


@pytest.mark.parametrize("fresh", [False, True])
def test_compact(fresh, params):
    count = 12
    keys = keys_for(jax.random.key, count)
    start = {"h": jnp.zeros((count, DIM)), "key": keys, "n": jnp.zeros(count, jnp.int32)}
    gain, x = jnp.linspace(0.05, 1.5, count)[::-1, None], jnp.linspace(-1, 1, count * DIM).reshape(count, DIM)
    solver = deq.Picard(rtol=3e-2 if fresh else 1e-10, max_steps=200)

    def cell(z, gain, x, w):
        return noisy(z, {"w": w, "x": x}, fresh) | {"h": noisy(z, {"w": w * 0 + 1, "x": x}, fresh)["h"] * gain * 0.5}

    def loss(w, solve):
        z, stats = solve(start, gain, x, w)
        return loss_of(z), (z, stats)

    whole = functools.partial(deq.fixed_point, cell, solver=solver, adjoint=deq.Implicit(BACKWARD), batch_ndim=1)
    options = dict(axes=(0, 0, None), solver=solver, backward=BACKWARD, sizes=(6, 2))
    parts = functools.partial(deq.compact, cell, **options)
    w = params["w"]
    (_, (z, stats)), grads = jax.jit(jax.value_and_grad(lambda w: loss(w, parts), has_aux=True))(w)
    (_, (z_want, stats_want)), grads_want = jax.value_and_grad(lambda w: loss(w, whole), has_aux=True)(w)
    assert_close((z["h"], grads), (z_want["h"], grads_want), rtol=1e-7)
    assert_same((split(z)[1], stats.steps), (split(z_want)[1], stats_want.steps))
    assert len(set(stats.steps.tolist())) > 3
    np.testing.assert_array_equal(z["n"], stats.steps)


def test_adapters(params):
    @deq.adapters.implicit(same_noise, adjoint=ADJOINTS["implicit"], batch_ndim=1)
    def run(z0, params):
        return jax.lax.fori_loop(0, 100, lambda _, z: same_noise(z, params), z0)

    start = noisy_start(jax.random.key)
    grads = jax.grad(lambda p: loss_of(run(start, p)))(params)
    _, want = pull(same_noise, start, params, adjoint=ADJOINTS["implicit"], solver=deq.Picard(rtol=1e-13))
    assert_close(grads, want, rtol=1e-7)
    assert (run(start, params)["n"] == 100).all()


def test_measurements_at_a_solution_hold_its_carried_leaves(params):
    z = deq.fixed_point(same_noise, noisy_start(jax.random.key), params, batch_ndim=1).value
    floats, carried = split(z)
    f = holding(same_noise, carried)
    radius = lambda f, z: deq.stability.spectral_radius(f, z, params, batch_ndim=1)
    penalty = lambda f, z: deq.regularizers.jacobian_penalty(f, z, params, key=jax.random.key(1))
    for measure in (radius, penalty):
        assert_close(measure(same_noise, z), measure(f, floats))


# ---- transformations ---------------------------------------------------------------------------------------


def test_vmap(params):
    alone = lambda start, x: deq.fixed_point(one, start, params["w"], x, solver=deq.Picard(rtol=3e-2))

    def one(z, w, x):
        lifted = jax.tree.map(lambda leaf: leaf[None], (z, x))
        return jax.tree.map(lambda leaf: leaf[0], fresh_noise(lifted[0], {"w": w, "x": lifted[1]}))

    start = noisy_start(jax.random.key)
    z, stats = jax.vmap(alone)(start, params["x"])
    z_want, stats_want = deq.fixed_point(fresh_noise, start, params, solver=deq.Picard(rtol=3e-2), batch_ndim=1)
    np.testing.assert_allclose(z["h"], z_want["h"], rtol=1e-12)
    assert_same((split(z)[1], stats.steps), (split(z_want)[1], stats_want.steps))


def test_vmap_of_a_gradient_over_keys_alone(params):
    def grads(key):
        start = noisy_start(jax.random.key) | {"key": key}
        return pull(same_noise, start, params, solver=deq.Picard(rtol=1e-10))[1]

    keys = jax.vmap(lambda i: jax.vmap(lambda j: jax.random.key(10 * i + j))(jnp.arange(BATCH)))(jnp.arange(2))
    both = jax.jit(jax.vmap(grads))(keys)
    for i in range(2):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], both), grads(keys[i]), rtol=1e-7)


def test_scan_continues_what_is_carried(params):
    """A sequence of equilibria: the carried leaves of one are the start of the next."""

    def step(z, x):
        z, stats = deq.fixed_point(counted, z, params | {"x": x}, solver=deq.Picard(rtol=1e-6), batch_ndim=1)
        return z, stats.steps

    xs = jnp.stack([params["x"], 2 * params["x"]])
    total = lambda scale: loss_of(jax.lax.scan(step, counting_start(), scale * xs)[0])
    z, steps = jax.lax.scan(step, counting_start(), xs)
    np.testing.assert_array_equal(z["n"], steps.sum(0))
    slope, eps = jax.jit(jax.grad(total))(1.0), 1e-3
    assert jnp.isfinite(slope) and slope != 0
    np.testing.assert_allclose(slope, (total(1 + eps) - total(1 - eps)) / (2 * eps), rtol=1e-2)


def sharded_loss(params, start):
    z, stats = deq.fixed_point(same_noise, start, params, solver=deq.Picard(rtol=1e-10), batch_ndim=1)
    return loss_of(z), (z, stats.steps)


@each_key
def test_pmap(make_key, params):
    apart = lambda tree: jax.tree.map(lambda leaf: leaf[:, None], tree)
    start = noisy_start(make_key)
    run = jax.value_and_grad(lambda p, x, s: sharded_loss({"w": p, "x": x}, s), argnums=(0, 1), has_aux=True)
    (_, (z, steps)), grads = jax.pmap(run, in_axes=(None, 0, 0))(params["w"], apart(params["x"]), apart(start))
    (_, (z_want, steps_want)), grads_want = jax.value_and_grad(sharded_loss, has_aux=True)(params, start)
    np.testing.assert_array_equal(steps[:, 0], steps_want)
    np.testing.assert_array_equal(z["n"][:, 0], steps_want)
    assert_close((grads[0].sum(0), grads[1][:, 0]), (grads_want["w"], grads_want["x"]), rtol=1e-7)


@each_key
@pytest.mark.parametrize("adjoint", [ADJOINTS["implicit"], ADJOINTS["implicit, jvp"], deq.Unroll()])
def test_shard_map(make_key, adjoint, params):
    mesh = Mesh(np.array(jax.devices()[:4]), ("i",))
    start = noisy_start(make_key) | {"n": jnp.zeros(BATCH, jnp.int32)}

    def values(w, x, start):
        options = dict(solver=deq.Picard(rtol=1e-10, max_steps=60), adjoint=adjoint, batch_ndim=1)
        z, stats = deq.fixed_point(same_noise, start, {"w": w, "x": x}, **options)
        return z, stats.steps

    specs = dict(in_specs=(P(), P("i"), P("i")), out_specs=P("i"))
    over_devices = jax.shard_map(values, mesh=mesh, **specs)

    def grads(run):
        loss = lambda w, x: loss_of(run(w, x, start)[0])
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params["w"], params["x"])

    z, steps = jax.jit(over_devices)(params["w"], params["x"], start)
    z_want, steps_want = values(params["w"], params["x"], start)
    np.testing.assert_allclose(z["h"], z_want["h"], rtol=1e-12)
    assert_same((split(z)[1], steps), (split(z_want)[1], steps_want))
    assert_close(grads(over_devices), grads(values), rtol=1e-7)


def test_a_shard_of_one_problem_keeps_a_count_that_all_shards_begin_with(params):
    mesh = Mesh(np.array(jax.devices()[:4]), ("i",))

    def count(gain):
        cell = lambda z: {"h": gain[0] * jnp.cos(z["h"]), "n": z["n"] + 1}
        z, stats = deq.fixed_point(cell, {"h": jnp.zeros(()), "n": jnp.zeros((), jnp.int32)})
        return z["n"][None], stats.steps[None]

    run = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    n, steps = run(jnp.asarray(GAIN))
    np.testing.assert_array_equal(n, steps)
    assert len(set(n.tolist())) > 1


def test_problems_that_f_couples_count_alike(params):
    def cell(z):
        return {"h": 0.5 * jnp.cos(z["h"]) + 0.1 * jax.lax.pmean(z["h"], "i"), "n": z["n"] + 1}

    run = jax.vmap(lambda h: deq.fixed_point(cell, {"h": h, "n": 0}), axis_name="i")
    z, stats = run(jnp.array([0.0, 5.0]))
    assert z["n"].tolist() == stats.steps.tolist() and z["n"][0] == z["n"][1]


def test_an_exported_program_takes_keys():
    def cell(z, x):
        noise = 1e-6 * jax.random.normal(z["key"], z["h"].shape)
        return {"h": 0.5 * jnp.cos(z["h"]) + x + noise, "key": z["key"], "count": z["count"] + 1}

    def run(key, x):
        z, stats = deq.fixed_point(cell, {"h": jnp.zeros(3), "key": key, "count": 0}, x)
        return z["h"], z["count"], stats

    exported = jax.export.export(jax.jit(run))(jax.random.key(0), jnp.ones(3))
    again = jax.export.deserialize(exported.serialize())
    for key in map(jax.random.key, range(2)):
        got, want = again.call(key, jnp.ones(3)), run(key, jnp.ones(3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_donated_and_sharded_by_jit(params):
    mesh = Mesh(np.array(jax.devices()[:4]), ("i",))
    sharding = jax.sharding.NamedSharding(mesh, P("i"))
    start = jax.device_put(noisy_start(jax.random.key), sharding)
    z, stats = jax.jit(lambda s, p: deq.fixed_point(same_noise, s, p, batch_ndim=1))(start, params)
    want = deq.fixed_point(same_noise, noisy_start(jax.random.key), params, batch_ndim=1)
    np.testing.assert_array_equal(z["n"], want.stats.steps)
    np.testing.assert_array_equal(stats.steps, want.stats.steps)


# ---- bad input ---------------------------------------------------------------------------------------------


def call(f, z0=None, **options):
    z0 = {"h": jnp.zeros(2), "n": jnp.zeros((), jnp.int32)} if z0 is None else z0
    return lambda: deq.fixed_point(f, z0, **options)


next_of = lambda z, **other: {"h": jnp.cos(z["h"]), "n": z["n"] + 1} | other
KEYED = {"h": 0.0, "key": jax.random.key(0)}
CALLS = {
    "shape": (call(lambda z: next_of(z, n=z["n"][None])), ValueError, ["f(z)['n']", "shape of z0, ()", "got (1,)"]),
    "dtype": (
        call(lambda z: next_of(z, n=z["n"].astype(float))),
        TypeError,
        ["f(z)['n']", "dtype of z0, int32", "float"],
    ),
    "narrower": (
        call(lambda z: next_of(z, n=z["n"].astype(jnp.int8))),
        TypeError,
        ["f(z)['n']", "int32", "got int8"],
    ),
    "a number of floats": (call(lambda z: next_of(z, n=1.5)), TypeError, ["f(z)['n']", "int32", "got float"]),
    "a flag for a count": (call(lambda z: next_of(z, n=True)), TypeError, ["f(z)['n']", "int32", "got bool"]),
    "a count for a flag": (
        call(lambda z: {"h": z["h"], "n": 1}, {"h": 0.0, "n": False}),
        TypeError,
        ["f(z)['n']", "bool", "got int"],
    ),
    "data for a key": (
        call(lambda z: z | {"key": jax.random.key_data(z["key"])}, KEYED),
        (TypeError, ValueError),
        ["f(z)['key']", "()", "(2,)"],
    ),
    "a number for a key": (call(lambda z: z | {"key": 0}, KEYED), TypeError, ["f(z)['key']", "key<fry>", "got int"]),
    "another key": (
        call(lambda z: z | {"key": jax.random.key(0, impl="rbg")}, KEYED),
        TypeError,
        ["f(z)['key']", "key<fry>", "key<rbg>"],
    ),
    "a number for floats is cast": (call(lambda z: next_of(z, h=1j)), (TypeError, ValueError), ["f(z)['h']"]),
    "structure": (call(lambda z: {"h": z["h"]}), TypeError, ["structure of z0", "'n'", "got"]),
    "None for a count": (call(lambda z: next_of(z, n=None)), TypeError, ["structure of z0", "None"]),
    "text for a count": (call(lambda z: next_of(z, n="1")), TypeError, ["f(z)['n']", "'1'"]),
    "nothing to solve for": (call(lambda z: z, {"n": 0}), TypeError, ["z0", "at least one array of floats", "int"]),
    "keys alone": (call(lambda z: z, jax.random.key(0)), TypeError, ["z0", "floats", "carried", "key<fry>[]"]),
    "without the batch axis": (call(next_of, batch_ndim=1), ValueError, ["batch_ndim=1", "z0['n']", "()"]),
    "another batch": (
        call(next_of, {"h": jnp.zeros((2, 3)), "n": jnp.zeros(3, int)}, batch_ndim=1),
        ValueError,
        ["agree", "z0['n']", "(3,)"],
    ),
    "no entries": (call(next_of, {"h": jnp.zeros(2), "n": jnp.zeros(0, int)}), ValueError, ["z0['n'] is empty"]),
    "a state of 8 bits": (
        call(next_of, {"h": jnp.zeros(2, jnp.float8_e5m2), "n": 0}),
        TypeError,
        ["z0['h']", "16 bits", "booleans", "float8_e5m2"],
    ),
    "text": (call(next_of, {"h": 0.0, "n": "one"}), TypeError, ["z0['n']", "integers, booleans or keys", "'one'"]),
    "infinite floats": (call(next_of, {"h": jnp.inf, "n": 0}), ValueError, ["z0['h']", "infinite"]),
    "Reversible": (
        call(next_of, adjoint=deq.Reversible(0.1), solver=deq.Picard(max_steps=5)),
        TypeError,
        ["z0['n']", "int32", "carried", "Reversible", "Unroll()"],
    ),
    "SciPy": (
        lambda: deq.adapters.scipy_root(next_of, {"h": jnp.zeros(2), "n": jnp.zeros((), jnp.int32)}),
        TypeError,
        ["z0['n']", "int32", "SciPy", "fixed_point"],
    ),
    "an optimizer": (
        lambda: deq.adapters.as_optimizer(deq.Anderson()).init({"w": jnp.zeros(2), "n": jnp.zeros(2, int)}),
        TypeError,
        ["params['n']", "int64", "as_optimizer"],
    ),
    "compact": (
        lambda: deq.compact(
            lambda z: next_of(z, n=z["n"].astype(float)), {"h": jnp.zeros((2, 1)), "n": jnp.zeros(2, int)}, axes=()
        ),
        TypeError,
        ["f(z)['n']", "int64", "float64"],
    ),
    "solve": (
        lambda: deq.solve(lambda z: next_of(z, n=z["n"][None]), {"h": 0.0, "n": 0}),
        ValueError,
        ["f(z)['n']", "(1,)"],
    ),
    "attach": (
        lambda: deq.attach(lambda z: next_of(z, n=z["n"][None]), {"h": 0.0, "n": 0}),
        ValueError,
        ["f(z)['n']", "(1,)"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_named(name):
    bad, exception, words = CALLS[name]
    before = len(programs)
    with pytest.raises(exception) as caught:
        bad()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing from {str(caught.value)!r}"
    assert len(programs) == before  # nothing was compiled


def test_a_problem_without_carried_leaves_is_itself():
    problem = deq.adjoints.Problem(lambda z, inputs, other: z, [], [], 0)
    assert problem.with_carried(split({"z": jnp.zeros(2)})[1]) is problem
    assert axes_of(problem.f) == ()
