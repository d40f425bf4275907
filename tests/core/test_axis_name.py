"""A problem that is split over a named axis inside `shard_map`: inner products are summed over the axis."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import ADJOINTS
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax._states import Layout
from deq_jax.solvers.equation import root_of
from experiments.benchmarks import programs

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")

SOLVERS = {
    "picard": deq.Picard(),
    "anderson": deq.Anderson(history=4),
    "broyden": deq.Broyden(rank=6),
    "newton_krylov": deq.NewtonKrylov(krylov=6),
    "robust": deq.Robust(stages=(deq.Picard(), deq.Broyden(rank=12)), stall=(4,)),
}
BATCH, DIM = 4, 16
BOTH = P("data", "model")


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def problem():
    rng = np.random.default_rng(0)
    w = 0.9 * rng.normal(size=(DIM, DIM)) / DIM**0.5
    x = np.linspace(0.1, 2, BATCH)[:, None] * rng.normal(size=(BATCH, DIM))
    return jnp.asarray(w), jnp.asarray(x), deq.Probe.zeros((BATCH,))


def on_one_device(z, w, x):
    return jnp.tanh(z @ w + x)


def on_each(z, w, x):
    """The same with features split over "model": rows of w meet their features, and all devices add up."""
    return jnp.tanh(jax.lax.psum_scatter(z @ w, "model", scatter_dimension=1, tiled=True) + x)


def pull(cell, solver, adjoint, **options):
    """(w, x) → (z*, its stats, the backward solve's steps, the gradients in w and x)."""

    def loss(w, x, probe):
        options_ = dict(solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe, **options)
        z, stats = deq.fixed_point(cell, jnp.zeros_like(x), w, x, **options_)
        return jnp.sum(jnp.cos(z)), (z, stats)

    def run(w, x, probe):
        (w_bar, x_bar, probe_bar), (z, stats) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(w, x, probe)
        return z, stats, probe_bar.steps, w_bar, x_bar

    return run


# w_bar is summed over the problems of all devices, as the transpose of its replication along "data" says.
OF_PULL = dict(in_specs=(P("model"), BOTH, P("data")), out_specs=(BOTH, P("data"), P("data"), P("model"), BOTH))


def split(run, in_specs, out_specs):
    return jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=in_specs, out_specs=out_specs))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_split_problem_is_solved_as_on_one_device(name):
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-8, max_steps=300)
    adjoint = deq.Implicit(dataclasses.replace(solver, rtol=1e-9))
    args = problem()
    want = jax.jit(pull(on_one_device, solver, adjoint))(*args)
    got = split(pull(on_each, solver, adjoint, axis_name="model"), **OF_PULL)(*args)
    assert want[1].converged.all()
    np.testing.assert_array_equal(got[1].status, want[1].status)
    np.testing.assert_array_equal(got[1].steps, want[1].steps)
    np.testing.assert_array_equal(got[2], want[2])
    for a, b in zip((got[0], *got[3:]), (want[0], *want[3:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(got[1].relative_residual, want[1].relative_residual, rtol=0.1)


@pytest.mark.parametrize("name", ADJOINTS)
def test_every_adjoint_takes_a_split_problem(name):
    solver = deq.Broyden(rank=30, rtol=1e-9) if name == "shine" else deq.Picard(max_steps=30, rtol=1e-9)
    run = lambda cell, **options: pull(cell, solver, ADJOINTS[name], **options)
    w, x, probe = problem()
    args = 0.4 * w, x, probe
    want, got = jax.jit(run(on_one_device))(*args), split(run(on_each, axis_name="model"), **OF_PULL)(*args)
    for a, b in zip((got[0], *got[3:]), (want[0], *want[3:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def on_leaves(z, w, x):
    """A complex leaf, a real one, and a count; "c" is a number of each device alone."""
    total = jax.lax.psum(jnp.sum(z["c"], axis=1), "model") if w is None else jnp.sum(z["c"], axis=1)
    phase = jax.lax.complex(jnp.cos(x), jnp.sin(x))
    a = 0.3 * jnp.conj(z["a"]) * phase + jax.lax.complex(total[:, None] / DIM + 0 * x, x)
    return {"a": a, "c": 0.5 * jnp.cos(z["c"] + z["a"].real), "n": z["n"] + 1}


@pytest.mark.parametrize("name", ["anderson", "broyden", "newton_krylov"])
def test_leaves_of_several_kinds_are_split(name):
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-9, max_steps=200)

    def solve(x, on_one, **options):
        z0 = {"a": jax.lax.complex(0 * x, 0 * x), "c": jnp.zeros_like(x), "n": jnp.sum(0 * x, axis=1).astype(int)}
        cell = lambda z, x: on_leaves(z, on_one, x)
        return deq.fixed_point(cell, z0, x, solver=solver, batch_ndim=1, **options)

    x = problem()[1]
    want = jax.jit(lambda x: solve(x, True))(x)
    leaves = {"a": BOTH, "c": BOTH, "n": P("data")}

    def solve_split(x):
        z, stats = solve(x, None, axis_name="model")
        return z | {"n": jax.lax.pmax(z["n"], "model")}, stats

    z, stats = split(solve_split, in_specs=BOTH, out_specs=(leaves, P("data")))(x)
    assert want.stats.converged.all()
    np.testing.assert_array_equal(stats.steps, want.stats.steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), z, want.value)


def test_without_the_name_every_device_mixes_by_itself_and_takes_longer():
    solver, (w, x, _) = deq.Anderson(history=4, rtol=1e-8, max_steps=300), problem()

    def steps(axis_name):
        def solve(w, x):
            found = deq.solve(on_each, jnp.zeros_like(x), w, x, solver=solver, batch_ndim=1, axis_name=axis_name)
            return jax.lax.pmax(found.stats.steps, "model")

        return np.sum(split(solve, in_specs=(P("model"), BOTH), out_specs=P("data"))(w, x))

    assert 10 * steps("model") < 8 * steps(None)


@pytest.mark.full_compile
def test_how_often_the_devices_wait_for_each_other():
    w, x, _ = problem()
    options = dict(solver=SOLVERS["anderson"], batch_ndim=1, axis_name="model")
    solve = lambda w, x: deq.fixed_point(on_each, jnp.zeros_like(x), w, x, **options).value
    run = split(solve, in_specs=(P("model"), BOTH), out_specs=BOTH)
    [loop] = programs.loops(programs.read(run.lower(w, x).compile().as_text()))
    found = [what for what, _ in programs.collectives(loop)]
    assert found.count("all-reduce") <= 3
    assert set(found) == {"all-reduce", "reduce-scatter"}  # the second is f's own


def test_a_preconditioner_of_a_split_problem():
    w, x, probe = problem()
    solver = deq.Anderson(history=4, rtol=1e-9, max_steps=300)
    run = lambda cell, **options: pull(cell, solver, deq.Implicit(preconditioner=lambda v: 0.8 * v), **options)
    args = 0.4 * w, x, probe
    want, got = jax.jit(run(on_one_device))(*args), split(run(on_each, axis_name="model"), **OF_PULL)(*args)
    for a, b in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


# ---- roots -------------------------------------------------------------------------------------------------

ROOT_SOLVERS = {"newton_krylov": deq.NewtonKrylov(products="jvp"), "broyden": deq.Broyden(rank=30)}


def root_on(mixed):
    """Two leaves, each equation in a unit of its own; `mixed` is the product of a leaf with w."""

    def F(z, w, x):
        a, b = z["a"], z["b"]
        return {"a": 1e6 * (a**3 + 4 * a + mixed(b, w) - x), "b": 1e5 * (b + 0.5 * jnp.sin(a) - mixed(x, w))}

    return F


def pull_root(F, solver, **options):
    def loss(w, x, probe):
        adjoint = deq.Implicit(dataclasses.replace(ROOT_SOLVERS["newton_krylov"], rtol=1e-10, max_steps=500))
        z0 = {"a": jnp.zeros_like(x), "b": 0.1 * x}
        z, stats = deq.root(F, z0, w, x, solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe, **options)
        return jnp.sum(jnp.cos(z["a"]) + z["b"] ** 2), (z, stats)

    def run(w, x, probe):
        (w_bar, x_bar, probe_bar), (z, stats) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(w, x, probe)
        return z, stats, probe_bar, w_bar, x_bar

    return run


@pytest.mark.parametrize("name", ROOT_SOLVERS)
def test_a_root_that_is_split_is_found_as_on_one_device(name):
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="model", scatter_dimension=1, tiled=True)
    whole, pieces = root_on(lambda x, w: x @ w), root_on(lambda x, w: scatter(x @ w))
    # Far above rounding, to which the scale of F would be sensitive.
    solver, args = dataclasses.replace(ROOT_SOLVERS[name], rtol=1e-6, max_steps=300), problem()
    want = jax.jit(pull_root(whole, solver))(*args)
    got = split(pull_root(pieces, solver, axis_name="model"), **OF_PULL)(*args)
    assert want[1].converged.all() and not want[2].status.any()
    counts = lambda run: (run[1].steps, run[1].status, run[2].steps, run[2].status)
    jax.tree.map(np.testing.assert_array_equal, counts(got), counts(want))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
    jax.tree.map(close, (got[0], *got[3:]), (want[0], *want[3:]))
    # How many times F changes is measured over the whole of each problem.
    changes = [stats.residual / stats.relative_residual for stats in (got[1], want[1])]
    np.testing.assert_allclose(*changes, rtol=0.1)


def test_no_default_holds_the_jacobian_of_a_root_that_is_split():
    F = lambda z, x: z**3 + z + jax.lax.psum(jnp.sum(z, 1, keepdims=True), "model") - x
    solve = lambda x: tuple(deq.root(F, jnp.zeros_like(x), x, batch_ndim=1, axis_name="model"))
    z, stats = split(solve, in_specs=BOTH, out_specs=(BOTH, P("data")))(problem()[1])
    assert stats.converged.all()
    np.testing.assert_allclose(z**3 + z + jnp.sum(z, 1, keepdims=True), problem()[1], atol=1e-8)


def test_the_scale_of_a_root_sees_differences_between_devices():
    """F is zero in every direction that repeats on all devices."""
    mean = lambda z: jax.lax.pmean(z, "model")
    sigma = lambda z: root_of(lambda z: z - mean(z), z, Layout(z, 1, over=("model",)))[0].sigma
    got = split(sigma, in_specs=BOTH, out_specs=P("data"))(problem()[1])
    assert ((0.5 <= got) & (got <= 1)).all()


def test_a_preconditioner_of_a_root_that_is_split():
    def solve(z_sum, x, **options):
        F = lambda z: 100 * z + z**3 + z_sum(z) - x
        solver = deq.NewtonKrylov(products="jvp", rtol=1e-9, preconditioner=lambda v: v / 100)
        return tuple(deq.root(F, jnp.zeros_like(x), solver=solver, batch_ndim=1, **options))

    whole = lambda z: jnp.sum(z, 1, keepdims=True)
    want, x = solve(whole, problem()[1]), problem()[1]
    run = lambda x: solve(lambda z: jax.lax.psum(whole(z), "model"), x, axis_name="model")
    got = split(run, in_specs=BOTH, out_specs=(BOTH, P("data")))(x)
    np.testing.assert_array_equal(got[1].steps, want[1].steps)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-9)


@pytest.mark.parametrize("fold", [deq.ResidualTrace(8), deq.Snapshots((0, 2))], ids=["residuals", "snapshots"])
def test_a_fold_sees_the_whole_of_a_split_problem(fold):
    w, x, _ = problem()

    def run(cell, w, x, **options):
        found = deq.solve(cell, jnp.zeros_like(x), w, x, batch_ndim=1, fold=fold, **options).folded
        return found.T if isinstance(fold, deq.ResidualTrace) else jnp.stack([at.relative_residual for at in found])

    split = lambda w, x: jax.lax.pmax(run(on_each, w, x, axis_name="model"), "model")
    got = jax.jit(jax.shard_map(split, mesh=mesh(), in_specs=(P("model"), BOTH), out_specs=P(None, "data")))(w, x)
    np.testing.assert_allclose(got, run(on_one_device, w, x), rtol=1e-6)
