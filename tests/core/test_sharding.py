"""One problem over several devices: a state keeps its shape and its sharding, and nothing of it is gathered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import ADJOINTS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax._vectors import Vector, norm
from experiments.benchmarks import programs

pytestmark = [pytest.mark.usefixtures("x64", "quick_compile")]

SOLVERS = {
    "picard": deq.Picard(),
    "anderson": deq.Anderson(history=4),
    "broyden": deq.Broyden(rank=4),
    "newton_krylov": deq.NewtonKrylov(krylov=6),
    "robust": deq.Robust(stages=(deq.Broyden(rank=4), deq.NewtonKrylov(krylov=4)), stall=(8,)),
}
FEATURES, SEQUENCE = P("data", None, "model"), P("data", "model", None)
KINDS = ("Auto", "Explicit")


@functools.cache
def mesh(kind: str) -> jax.sharding.Mesh:
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


ONE = numbers(4, 8, 8)
SEVERAL = {"a": ONE, "b": numbers(4, 8, 4, seed=1), "c": numbers(4, 8, seed=2)}
SPECS = {"a": FEATURES, "b": SEQUENCE, "c": P("data")}


def put(kind: str, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh(kind), spec)), tree, specs)


def neighbor(z):
    """Along an axis that no mesh shards, if there is one."""
    return jnp.flip(z, axis=1) if z.ndim == 2 else z


def cell(z, x):  # not affine, and not diagonal
    return jax.tree.map(lambda z, x: 0.6 * jnp.sin(1.3 * neighbor(z)) + x, z, x)


def solve_and_pull(solver, adjoint=None):
    """x → (z*, stats), the gradient of a loss in x, and the probe of the backward solve."""
    adjoint = deq.Implicit(dataclasses.replace(solver, max_steps=300)) if adjoint is None else adjoint

    def loss(x, probe):
        f = dict(solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe)
        solution = deq.fixed_point(cell, jax.tree.map(jnp.zeros_like, x), x, **f)
        return sum(jnp.sum(jnp.cos(z)) for z in jax.tree.leaves(solution.value)), solution

    return jax.jit(lambda x: jax.grad(loss, argnums=(0, 1), has_aux=True)(x, deq.Probe.zeros((4,))))


def assert_equal(got, want, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=rtol, atol=1e-11), got, want)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_over_a_mesh_is_solved_as_on_one_device(name, kind):
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-7, max_steps=300)
    run = solve_and_pull(solver)
    (want_bar, _), want = run(SEVERAL)
    (x_bar, probe), got = run(put(kind, SEVERAL, SPECS))
    assert jnp.all(want.stats.converged) and jnp.all(probe.status == 0)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)
    # Sums in another order: far apart where a solver amplifies rounding, and never by more than the tolerance.
    assert_equal((got.value, x_bar), (want.value, want_bar), rtol=1e-6)
    for leaf, spec in SPECS.items():
        expected = NamedSharding(mesh(kind), spec)
        assert got.value[leaf].sharding.is_equivalent_to(expected, got.value[leaf].ndim), leaf
        assert x_bar[leaf].sharding.is_equivalent_to(expected, x_bar[leaf].ndim), leaf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADJOINTS)
def test_every_adjoint_takes_a_sharded_problem(name, kind):
    solver = deq.Broyden(rank=30, rtol=1e-7) if name == "shine" else deq.Picard(max_steps=40, rtol=1e-7)
    run = solve_and_pull(solver, ADJOINTS[name])
    (want_bar, _), want = run(ONE)
    (x_bar, _), got = run(put(kind, ONE, FEATURES))
    assert_equal((got.value, x_bar), (want.value, want_bar), rtol=1e-6)
    assert x_bar.sharding.is_equivalent_to(NamedSharding(mesh(kind), FEATURES), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_and_a_trajectory_are_sharded_as_the_state(kind):
    x, solver = put(kind, ONE, FEATURES), deq.Broyden(rank=6, rtol=1e-7)
    z0 = jnp.zeros_like(x)
    first = deq.solve(cell, z0, x, solver=solver, batch_ndim=1)
    again = deq.solve(cell, first.value, x, solver=solver, batch_ndim=1, memory=first.memory)
    assert jnp.all(again.stats.steps <= 2)
    options = dict(solver=deq.Picard(max_steps=5), batch_ndim=1, at=(1, 4))
    path = deq.trajectory(cell, z0, x, **options)
    want = deq.trajectory(cell, jnp.zeros_like(ONE), jnp.asarray(ONE), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-9), path, want)


def test_an_own_solver_of_flat_vectors_still_works_on_several_leaves():
    class Halving:
        rtol, atol, max_steps = 1e-10, 0.0, 400

        def init(self, z):
            assert z.ndim == 2
            return ()

        def update(self, residual, state, z):
            return 0.5 * residual, state

    solution = deq.fixed_point(cell, jax.tree.map(jnp.zeros_like, SEVERAL), SEVERAL, solver=Halving(), batch_ndim=1)
    want = deq.fixed_point(
        cell, jax.tree.map(jnp.zeros_like, SEVERAL), SEVERAL, solver=deq.Anderson(rtol=1e-10), batch_ndim=1
    )
    assert jnp.all(solution.stats.converged)
    assert_equal(solution.value, want.value, rtol=1e-5)


SLOW_TOGETHER = deq.Unroll(stop=True), deq.Unroll(stop=True, checkpoint=4), deq.Reversible()


@pytest.mark.parametrize("adjoint", SLOW_TOGETHER, ids=str)
def test_devices_that_stop_at_different_times_share_weights(adjoint):
    # Their cotangents are summed over the devices, which must not wait for that inside of a loop.
    w, x = 0.7 * jnp.eye(4), jnp.asarray(np.geomspace(1e-3, 3, 8)[:, None] * np.ones((8, 4)))

    def loss(w, x):
        f, options = lambda z, w, x: jnp.tanh(z @ w + x), dict(solver=deq.Picard(rtol=1e-3, max_steps=80))
        z, stats = deq.fixed_point(f, jnp.zeros_like(x), w, x, batch_ndim=1, adjoint=adjoint, **options)
        return jnp.sum(jnp.sin(z)), stats.steps

    pull = lambda w, x: jax.grad(loss, argnums=(0, 1), has_aux=True)(w, x)
    (w_bar, x_bar), steps = jax.jit(pull)(w, x)
    over = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = ((P(), P("data")), P("data"))
    run = jax.jit(jax.shard_map(pull, mesh=over, in_specs=(P(), P("data")), out_specs=specs))
    got, got_steps = run(w, x)
    assert len(set(np.asarray(steps))) > 2
    np.testing.assert_array_equal(got_steps, steps)
    assert_equal(got, (w_bar, x_bar), rtol=1e-7)


# ---- bad input ---------------------------------------------------------------------------------------------


def test_leaves_on_two_meshes_are_refused_by_name():
    other = jax.make_mesh((8,), ("all",))
    z0 = {"a": put("Auto", ONE, FEATURES), "b": jax.device_put(ONE, NamedSharding(other, P()))}
    with pytest.raises(ValueError, match=r"one mesh.*z0\['b'\] is on \(all: 8\), z0\['a'\] on \(data: 2, model: 4\)"):
        deq.fixed_point(lambda z: z, z0, batch_ndim=1)
    half = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[4:])
    quarter = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    z0 = [jax.device_put(ONE, NamedSharding(mesh, P())) for mesh in (half, quarter)]
    with pytest.raises(ValueError, match=r"of the same devices: z0\[1\]"):
        deq.fixed_point(lambda z: z, z0, batch_ndim=1)


def test_a_flat_solver_refuses_a_problem_over_several_devices():
    class Flat(deq.Picard):
        flat = True

    x = put("Explicit", ONE, FEATURES)
    with pytest.raises(TypeError, match=r"Flat works on flat vectors.*z0 is sharded over model"):
        deq.fixed_point(cell, jnp.zeros_like(x), x, solver=Flat(), batch_ndim=1)


# ---- collectives -------------------------------------------------------------------------------------------


def collectives_of(run, x):
    """(outside of loops, in each loop) of the compiled program."""
    module = programs.read(run.lower(x).compile().as_text())
    outside = [k for k in programs.launched(module, module.entry) if isinstance(k, programs.Kernel)]
    in_loops = [programs.collectives(loop) for loop in programs.loops(module)]
    return [found for kernel in outside for found in programs.collectives_of(kernel)], in_loops


@pytest.mark.full_compile
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [FEATURES, SEQUENCE], ids=["features", "sequence"])
@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_of_a_state_is_gathered(name, spec, kind):
    run = solve_and_pull(SOLVERS[name])
    outside, in_loops = collectives_of(run, put(kind, ONE, spec))
    every = outside + [found for loop in in_loops for found in loop]
    assert len(in_loops) >= 2 and every
    assert {what for what, _ in every} == {"all-reduce"}


@pytest.mark.full_compile
@pytest.mark.parametrize("x, specs", [(ONE, FEATURES), (SEVERAL, SPECS)], ids=["one leaf", "three leaves"])
@pytest.mark.parametrize("name, rounds", [("picard", 1), ("anderson", 3)])
def test_how_often_the_devices_wait_for_each_other(name, rounds, x, specs):
    # Of each step: whether all problems have stopped, and so many rounds of sums, the small products of a problem.
    _, in_loops = collectives_of(solve_and_pull(SOLVERS[name]), put("Auto", x, specs))
    assert len(in_loops) == 2  # forward and backward
    for loop in in_loops:
        assert len(loop) <= 1 + rounds, loop
        assert max(size for _, size in loop) <= 3 * 4 * 5 * 8 * 2  # leaves × problems × history + 1, in float64, twice


@pytest.mark.full_compile
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_three_axes_share_a_state_of_batch_sequence_and_features(name, kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"), axis_types=kinds)
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-7, max_steps=300)
    local = lambda z, x: 0.6 * jnp.sin(1.3 * z) + x  # needs nothing of another device

    def solve(x):
        z, stats = deq.fixed_point(local, jnp.zeros_like(x), x, solver=solver, batch_ndim=1)
        return jnp.sum(jnp.cos(z)), (z, stats.steps)

    run = jax.jit(jax.grad(solve, has_aux=True))
    x_bar, (z, steps) = run(jnp.asarray(ONE))
    sharded = jax.device_put(ONE, NamedSharding(mesh, P("data", "seq", "model")))
    got_bar, (got, got_steps) = run(sharded)
    assert_equal((got, got_bar, got_steps), (z, x_bar, steps), rtol=1e-6)
    outside, in_loops = collectives_of(run, sharded)
    assert {what for what, _ in outside + sum(in_loops, [])} == {"all-reduce"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_norm_in_one_pass_is_that_in_two(dtype):
    x = jnp.asarray(numbers(3, 8, 8), dtype)
    one_pass = jax.jit(lambda x: norm(Vector((x,), 1)))  # a part with two axes of its own
    two_passes = jax.jit(lambda x: norm(Vector((x.reshape(3, 64),), 1)))
    tiny, huge = (-126, 126) if dtype == jnp.float32 else (-1022, 1022)
    for exponent in (tiny + 30, tiny // 2, -10, 0, 10, huge // 2, huge - 8):
        y = x * jnp.asarray(2.0**exponent, dtype)
        np.testing.assert_allclose(one_pass(y), two_passes(y), rtol=4 * float(jnp.finfo(dtype).eps))
    y = x.at[0].set(0).at[1, 0, 0].set(jnp.inf).at[2, 0, 0].set(jnp.nan)
    np.testing.assert_array_equal(one_pass(y), [0, jnp.inf, jnp.nan])
    gradient = lambda norm: jax.grad(lambda x: jnp.sum(norm(x)))(x)
    np.testing.assert_allclose(gradient(one_pass), gradient(two_passes), rtol=1e-5)
    zero = jnp.zeros((3, 8, 8), dtype)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(one_pass(x)))(zero), zero)


@pytest.mark.full_compile
def test_the_memory_of_a_device_falls_with_its_shard():
    run = solve_and_pull(deq.Anderson())
    x = numbers(4, 64, 64)
    temporaries = lambda x: run.lower(x).compile().memory_analysis().temp_size_in_bytes
    on_batch, on_both = (temporaries(put("Auto", x, spec)) for spec in (P("data"), FEATURES))
    assert on_both < 0.3 * on_batch


# ---- roots -------------------------------------------------------------------------------------------------

ROOT_SOLVERS = {
    "default": None,
    "newton_krylov": deq.NewtonKrylov(krylov=10, products="jvp", max_steps=300),
    "broyden": deq.Broyden(rank=8, max_steps=300),
}


def root_and_pull(name):
    """As `solve_and_pull`, of z³ + 4 z less a neighbor's and x, in units of its own."""
    solver = ROOT_SOLVERS[name]
    tight = dict(rtol=1e-9)
    solver = solver if solver is None else dataclasses.replace(solver, **tight)
    backward = ROOT_SOLVERS["newton_krylov"] if solver is None else solver
    F = lambda z, x: jax.tree.map(lambda z, x: 1e6 * (z**3 + 4 * z - neighbor(z) - x), z, x)

    def loss(x, probe):
        options = dict(solver=solver, adjoint=deq.Implicit(backward), batch_ndim=1, probe=probe)
        z0 = jax.tree.map(lambda x: 0 * x, x)  # sharded as x; jax 0.12's zeros_like drops an explicit sharding
        solution = deq.root(F, z0, x, **options)
        return sum(jnp.sum(jnp.cos(z)) for z in jax.tree.leaves(solution.value)), solution

    return jax.jit(lambda x: jax.grad(loss, argnums=(0, 1), has_aux=True)(x, deq.Probe.zeros((4,))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["newton_krylov", "broyden"])
def test_a_root_over_a_mesh_is_found_as_on_one_device(name, kind):
    run = root_and_pull(name)
    (want_bar, want_probe), want = run(SEVERAL)
    (x_bar, probe), got = run(put(kind, SEVERAL, SPECS))
    assert jnp.all(want.stats.converged) and not jnp.any(want_probe.status)
    jax.tree.map(
        np.testing.assert_array_equal, (got.stats.steps, got.stats.status), (want.stats.steps, want.stats.status)
    )
    np.testing.assert_array_equal(probe.status, want_probe.status)
    assert_equal((got.value, x_bar), (want.value, want_bar), rtol=1e-7)
    for leaf, spec in SPECS.items():
        assert got.value[leaf].sharding.is_equivalent_to(NamedSharding(mesh(kind), spec), got.value[leaf].ndim), leaf


@pytest.mark.full_compile
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "broyden"])
def test_nothing_of_a_root_is_gathered(name, kind):
    outside, in_loops = collectives_of(root_and_pull(name), put(kind, SEVERAL, SPECS))
    every = outside + [found for loop in in_loops for found in loop]
    assert len(in_loops) >= 2 and {what for what, _ in every} == {"all-reduce"}
