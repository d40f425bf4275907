"""A solve in pieces is the same solve, and a problem that takes the place of another is solved as it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from experiments.studies import streaming

pytestmark = pytest.mark.usefixtures("quick_compile")  # bits are compared within one program

SLOTS, DIM, COUNT = 6, 4, 20
RNG = np.random.default_rng(0)
W = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0].astype(np.float32)
# From 3 to some hundred evaluations: more than what any of the histories below holds.
GAIN = np.geomspace(0.1, 2.5, COUNT, dtype=np.float32)[RNG.permutation(COUNT)]
X = (0.3 * RNG.normal(size=(COUNT, DIM))).astype(np.float32)
SOLVERS = {
    "picard": deq.Picard(),
    "anderson": deq.Anderson(history=3),
    "anderson in bfloat16": deq.Anderson(history=3, history_dtype="bfloat16"),
    "broyden": deq.Broyden(rank=4),
    "newton_krylov": deq.NewtonKrylov(krylov=3),
    "robust": deq.Robust(stages=(deq.Broyden(rank=3), deq.NewtonKrylov(krylov=3)), stall=(3,)),
    "robust, two histories": deq.Robust(stages=(deq.Anderson(history=2), deq.Broyden(rank=3)), stall=(2,)),
}
SOLVERS = {name: dataclasses.replace(solver, rtol=1e-5, max_steps=60) for name, solver in SOLVERS.items()}
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def cell(z, gain, x, w):
    """Beside the state a count is carried, and the key of a noise that stays the same."""
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(z["key"])
    return {"a": jnp.tanh(gain[:, None] * (z["a"] @ w)) + x + noise, "n": z["n"] + 1, "key": z["key"]}


def begin(which):
    """z0 of these problems."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(which))
    return {"a": jnp.zeros((len(which), DIM)), "n": jnp.zeros(len(which), jnp.int32), "key": keys}


def arguments(which):
    return jnp.asarray(GAIN[which]), jnp.asarray(X[which]), jnp.asarray(W)


def start(which, solver):
    return deq.start(cell, begin(which), *arguments(which), solver=solver, batch_ndim=1, axes=(0, 0, None))


def refill(state, where, which):
    gain, x, _ = arguments(which)
    return deq.refill(state, where, begin(which), (gain, x, None))


def bits(tree):
    """The bytes of each leaf, by its name."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(data(leaf)).tobytes() for path, leaf in leaves}


def in_pieces(solver, sizes):
    """The state at the end of a solve in pieces of these sizes, again and again."""
    state, pieces = start(np.arange(SLOTS), solver), 0
    while not deq.finished(state).all():
        state, pieces = deq.advance(state, sizes[pieces % len(sizes)]), pieces + 1
    return state, pieces


@by_solver
def test_pieces_of_any_size_are_the_solve(solver):
    end, pieces = in_pieces(solver, (2**40,))
    got = deq.result(end)
    for sizes in ((1,), (2, 5)):
        state, pieces = in_pieces(solver, sizes)
        assert bits(deq.result(state)) == bits(got) and pieces >= int(got.stats.steps.max()) / max(sizes)
        assert bits(deq.advance(state, 3).value) == bits(got.value)  # nothing is left to do
    # The loop of a solve is another program, which XLA may round otherwise.
    which = np.arange(SLOTS)
    want = deq.solve(cell, begin(which), *arguments(which), solver=solver, batch_ndim=1)
    assert len(set(np.asarray(want.stats.steps).tolist())) > 3
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)
    np.testing.assert_array_equal(got.stats.status, want.stats.status)
    np.testing.assert_array_equal(got.value["n"], want.value["n"])
    np.testing.assert_allclose(got.value["a"], want.value["a"], rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, got.memory) == jax.tree.map(jnp.shape, want.memory)


@by_solver
@pytest.mark.parametrize("n", [3, 7])
def test_each_problem_of_a_stream_has_the_bits_it_has_alone(solver, n):
    """Alone in the program of the stream: the test above compares that with the one of a solve."""
    found, history = stream(solver, n)
    assert len(found) == COUNT
    late = 0
    for round_ in range(max(map(len, history))):  # the problems that each slot had first, second, ...
        which = np.array([own[min(round_, len(own) - 1)] for own in history])
        state = start(which, solver)
        while not deq.finished(state).all():
            state = deq.advance(state, n)
        alone = deq.result(state)
        for slot, own in enumerate(history):
            if round_ < len(own):
                problem = lambda leaf, slot=slot: leaf[slot]
                want = jax.tree.map(problem, (alone.value, alone.stats, alone.given))
                assert bits(found[own[round_]]) == bits(want), (round_, slot)
                late += round_ > 0
    assert late == COUNT - SLOTS


def stream(solver, n):
    """({problem: what was found}, the problems of each slot) of all problems, in slots that are refilled."""
    history, found, state = [[slot] for slot in range(SLOTS)], {}, start(np.arange(SLOTS), solver)
    following = SLOTS
    while len(found) < COUNT:
        state = deq.advance(state, n)
        done, end = np.asarray(deq.finished(state)), deq.result(state)
        takes = np.zeros(SLOTS, bool)
        for slot in np.flatnonzero(done):
            found.setdefault(history[slot][-1], jax.tree.map(lambda x: x[slot], (end.value, end.stats, end.given)))  # noqa: B023
            if following < COUNT:
                history[slot].append(following)
                takes[slot], following = True, following + 1
        before = deq.result(state)
        state = refill(state, takes, np.array([own[-1] for own in history]))
        kept = lambda result: jax.tree.map(lambda x: x[~takes], (result.value, result.stats))  # noqa: B023
        assert bits(kept(deq.result(state))) == bits(kept(before))
    return found, history


def test_what_still_runs_is_reported_as_if_its_budget_were_spent():
    state = start(np.arange(SLOTS), SOLVERS["picard"])
    assert not deq.finished(state).any() and jnp.isinf(deq.result(state).stats.residual).all()
    state = deq.advance(state, 12)
    done, stats = deq.finished(state), deq.result(state).stats
    assert 0 < done.sum() < SLOTS
    assert (stats.status[~done] == deq.Status.MAX_STEPS).all() and (stats.steps[~done] == 12).all()
    assert stats.converged[done].all() and (stats.steps[done] <= 12).all()
    which, solver = np.arange(SLOTS), dataclasses.replace(SOLVERS["picard"], max_steps=12)
    want = deq.solve(cell, begin(which), *arguments(which), solver=solver, batch_ndim=1)
    assert bits(stats) == bits(want.stats)


def test_under_a_trace_a_running_problem_is_left_alone():
    state = deq.advance(start(np.arange(SLOTS), SOLVERS["anderson"]), 6)
    done = np.asarray(deq.finished(state))
    assert 0 < done.sum() < SLOTS
    new = np.arange(SLOTS, 2 * SLOTS)
    eager = deq.result(deq.advance(refill(state, done, new), 100))
    traced = jax.jit(lambda state, where: refill(state, where, new))(state, np.ones(SLOTS, bool))
    assert bits(deq.result(deq.advance(traced, 100))) == bits(eager)


def driver(solver, n, gain, x):
    """Three rounds of problems, each slot's harder by half than the one before, in one program."""
    z0, rounds = jnp.zeros_like(x), jnp.zeros(gain.shape, jnp.int32)
    f = lambda z, gain, x: 0.5 * jnp.tanh(gain[:, None] * jnp.roll(z, 1, axis=1)) + x
    state = deq.start(f, z0, gain, x, solver=solver, batch_ndim=1, axes=(0, 0))

    def turn(carry, _):
        state, rounds, total = carry
        state = deq.advance(state, n)
        done = deq.finished(state) & (rounds < 3)
        total = total + jnp.where(done[:, None], deq.result(state).value, 0)
        rounds = rounds + done.astype(jnp.int32)
        state = deq.refill(state, done & (rounds < 3), z0, (gain * 1.5 ** rounds.astype(gain.dtype), x))
        return (state, rounds, total), rounds

    (_, rounds, total), _ = jax.lax.scan(turn, (state, rounds, z0), length=60)
    return rounds, total


@by_solver
def test_a_loop_of_the_caller_is_one_program_also_over_a_mesh(solver):
    gain, x = jnp.linspace(0.2, 0.8, 8), jnp.asarray(RNG.normal(size=(8, DIM)), jnp.float32)
    run = jax.jit(lambda n, gain, x: driver(solver, n, gain, x))
    rounds, total = run(4, gain, x)
    assert (rounds == 3).all()
    f = lambda z, gain: 0.5 * jnp.tanh(gain[:, None] * jnp.roll(z, 1, axis=1)) + x
    options = dict(solver=deq.Picard(rtol=1e-6, max_steps=500), batch_ndim=1)
    want = sum(deq.solve(f, jnp.zeros_like(x), gain * 1.5**k, **options).value for k in range(3))
    np.testing.assert_allclose(total, want, rtol=1e-3, atol=1e-4)
    for kind in ("Auto", "Explicit"):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
        put = lambda a, mesh=mesh: jax.device_put(a, NamedSharding(mesh, P("data")))
        rounds, sharded = run(4, put(gain), put(x))
        assert (rounds == 3).all()
        np.testing.assert_allclose(sharded, total, rtol=1e-4, atol=1e-5)
        assert sharded.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


def test_a_state_crosses_the_boundary_of_jit_is_donated_and_saved():
    solver, which, traces = SOLVERS["anderson"], np.arange(SLOTS), []

    @jax.jit
    def step(state, n):
        traces.append(n)
        return deq.advance(state, n)

    donating = jax.jit(deq.advance, donate_argnums=0)
    want = deq.result(deq.advance(start(which, solver), 100))
    for take in (step, donating):
        state = jax.jit(lambda: start(which, solver))()
        for n in (3, 4, 100):
            state = take(state, n)
        assert bits(deq.result(state).stats) == bits(want.stats)
    state = step(step(start(which, solver), 2), 5)
    saved, treedef = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if not key(leaf)], jax.tree.structure(state)
    # Another trace of f has an equal structure: the leaves of a file fit it, and no program is compiled again.
    fresh = start(which, solver)
    assert treedef == jax.tree.structure(fresh) and len(traces) == 1
    leaves = iter(saved)
    again = jax.tree.map(lambda leaf: leaf if key(leaf) else jnp.asarray(next(leaves)), fresh)
    assert bits(deq.result(deq.advance(again, 100)).stats) == bits(want.stats)


def key(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def test_one_problem_and_two_batch_axes():
    f = lambda z, a: a * jnp.cos(z)
    state = deq.start(f, jnp.zeros(()), 0.9, axes=(0,))
    state = deq.advance(state, 50)
    assert deq.finished(state)
    state = deq.advance(deq.refill(state, True, 0.0, (0.5,)), 50)
    want = deq.solve(f, jnp.zeros(()), 0.5)
    assert bits(deq.result(state)[:2]) == bits(want[:2])

    a = jnp.linspace(0.1, 0.9, 6).reshape(2, 3)
    state = deq.advance(deq.start(f, jnp.zeros((2, 3)), a, batch_ndim=2, axes=(0,)), 4)
    done = deq.finished(state)
    assert 0 < done.sum() < 6
    state = deq.advance(deq.refill(state, done, jnp.zeros((2, 3)), (a[::-1],)), 100)
    want = deq.solve(f, jnp.zeros((2, 3)), jnp.where(done, a[::-1], a), batch_ndim=2)
    assert bits(deq.result(state)[:2]) == bits(want[:2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_other_dtypes(dtype):
    f = lambda z, a: {"a": a * jnp.cos(z["b"]), "b": 0.5 * z["a"]}
    z0, a = {"a": jnp.zeros((4, 2), dtype), "b": jnp.zeros((4, 2), dtype)}, jnp.full((4, 2), 0.5, dtype)
    options = dict(solver=deq.Anderson(rtol=1e-2), batch_ndim=1)
    state = deq.start(f, z0, a, **options, axes=(0,))
    for _ in range(20):
        state = deq.advance(state, 2)
    want = deq.solve(f, z0, a, **options)
    assert want.stats.converged.all() and bits(deq.result(state)) == bits(want)
    done = np.array([True, False, True, False])
    state = deq.advance(deq.refill(state, done, z0, (a,)), 50)
    assert bits(deq.result(state)[:2]) == bits(want[:2])


def test_options_that_are_arrays_belong_to_the_places():
    f, a = lambda z, a: a * jnp.cos(z), jnp.full(3, 0.9)
    solver = deq.Picard(rtol=jnp.array([1e-1, 1e-3, 1e-6]))
    state = deq.advance(deq.start(f, jnp.zeros(3), a, solver=solver, batch_ndim=1, axes=(0,)), 200)
    first = deq.result(state)
    state = deq.advance(deq.refill(state, np.ones(3, bool), jnp.zeros(3), (a,)), 200)
    assert bits(deq.result(state)) == bits(first) and len(set(first.stats.steps.tolist())) == 3


def test_a_memory_of_problems_that_began_apart_is_a_start_for_others():
    which, solver = np.arange(SLOTS), SOLVERS["broyden"]
    state = deq.advance(start(which, solver), 9)
    state = deq.advance(refill(state, deq.finished(state), which), 100)
    end = deq.result(state)
    args = arguments(which)
    again = deq.solve(cell, end.value, *args, solver=solver, batch_ndim=1, memory=end.memory)
    assert (again.stats.converged == end.stats.converged).all() and again.stats.converged.sum() >= SLOTS - 1
    assert (again.stats.steps[again.stats.converged] <= 2).all()


def test_no_gradient_flows_and_attach_makes_one():
    def found(x):
        state = deq.start(lambda z: 0.5 * jnp.cos(z) + x, jnp.zeros(3))
        return deq.result(deq.advance(state, 50)).value

    x = jnp.arange(3.0)
    assert (jax.grad(lambda x: found(x).sum())(x) == 0).all()
    attached = lambda x: deq.attach(lambda z: 0.5 * jnp.cos(z) + x, found(x)).sum()
    want = jax.grad(lambda x: deq.fixed_point(lambda z: 0.5 * jnp.cos(z) + x, jnp.zeros(3)).value.sum())(x)
    np.testing.assert_allclose(jax.grad(attached)(x), want, rtol=1e-4)


def test_the_streaming_study_solves_the_same_problems_with_fewer_evaluations(tmp_path):
    rows = streaming.main(streaming.Config(out=tmp_path, tiny=True, solvers=("Picard",)))["rows"]
    (row,) = rows
    assert row["whole"]["converged"] == row["stream"]["converged"] == 64 and row["other_steps"] == 0
    assert row["fewer_evaluations"] > 1.5
    assert "| Picard |" in (tmp_path / "table.md").read_text()
