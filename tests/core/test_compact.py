"""Compaction: the same solutions and gradients as a batch that is carried whole, for fewer evaluations of a problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")


BATCH, DIM = 30, 6
START = {"a": np.zeros((BATCH, DIM))}
FORWARD, BACKWARD = deq.Anderson(rtol=1e-10, history=4), deq.Anderson(rtol=1e-10, history=8)


def cell(z, gain, w, x):
    return jnp.tanh(gain * (z["a"] @ w) + x)


def tree_cell(z, gain, w, x):
    return {"a": cell(z, gain, w, x)}


@pytest.fixture
def problems():
    keys = jax.random.split(jax.random.key(0), 2)
    w = jnp.linalg.qr(jax.random.normal(keys[0], (DIM, DIM), jnp.float64))[0]
    gain = jnp.linspace(0.05, 0.98, BATCH)[::-1, None]  # the hardest first: they have to be moved
    return gain, w, 0.1 * jax.random.normal(keys[1], (BATCH, DIM), jnp.float64)


def whole(z0, *args, probe=None):
    adjoint = deq.Implicit(BACKWARD)
    return deq.fixed_point(tree_cell, z0, *args, solver=FORWARD, adjoint=adjoint, batch_ndim=1, probe=probe)


def compacted(z0, *args, probe=None):
    options = dict(axes=(0, None, 0), solver=FORWARD, backward=BACKWARD, sizes=(9, 3))
    return deq.compact(tree_cell, z0, *args, probe=probe, **options)


def run(solve, args):
    """((value, stats), gradients of the args, the probe's) of a loss with cotangents of very unequal size."""
    weight = jnp.logspace(-30, 3, BATCH)[:, None]

    def loss(args, probe):
        z, stats = solve(START, *args, probe=probe)
        return (weight * z["a"] ** 2).sum(), (z["a"], stats)

    zeros = deq.Probe.zeros((BATCH,))
    (_, found), (grads, probe) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(args, zeros)
    return found, grads, probe


def test_compact_equals_the_whole_batch(problems):
    (z, stats), grads, probe = run(whole, problems)
    (z_compact, stats_compact), grads_compact, probe_compact = run(compacted, problems)
    np.testing.assert_allclose(z_compact, z, atol=1e-9)
    assert stats_compact.converged.all() and (probe_compact.status == 0).all()
    np.testing.assert_array_equal(stats_compact.steps, stats.steps)  # each problem's own
    fourth, tenth = jnp.sort(stats.steps)[jnp.array([-4, -10])]
    assert tenth < fourth < stats.steps.max()  # and it has passed through every size
    np.testing.assert_allclose(probe_compact.steps, probe.steps, atol=2)
    for got, want in zip(grads_compact, grads, strict=True):
        assert jnp.linalg.norm(want) > 0
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9 * float(jnp.abs(want).max()))


def test_the_residuals_are_those_of_the_values_that_are_returned():
    # z ← γz + 1 from 0. The last three are left alone after two evaluations, at ‖f(z)‖ ≈ 2, and end near 1 / (1 − γ).
    gain = np.array([0.0] * 6 + [0.9, 0.95, 0.98])[:, None]
    solver = deq.Picard(rtol=1e-3, max_steps=1000)
    run = lambda z0: deq.compact(lambda z, gain: gain * z + 1, z0, gain, axes=(0,), solver=solver, sizes=(3, 1))
    z, stats = jax.jit(run)(jnp.zeros((9, 1)))
    assert stats.converged.all() and stats.steps[5] == 2 and (z[6:, 0] > 0.9 / (1 - gain[6:, 0])).all()
    f = gain * z + 1
    np.testing.assert_allclose(stats.residual, np.abs(f - z)[:, 0], rtol=1e-9)
    np.testing.assert_allclose(stats.relative_residual, np.abs((f - z) / f)[:, 0], rtol=1e-9)


# ---- options for each problem ------------------------------------------------------------------------------


SHUFFLED = np.arange(BATCH) * 7 % BATCH  # those left in the end neither come first nor stand in order
RTOL = np.logspace(-9, -2, BATCH)[SHUFFLED]
PER_PROBLEM = {
    "rtol": lambda: deq.Anderson(rtol=jnp.asarray(RTOL), history=4),
    "a NumPy rtol": lambda: deq.Anderson(rtol=RTOL, history=4),
    "atol": lambda: deq.Broyden(rtol=0.0, atol=jnp.asarray(RTOL), rank=10),
    "max_steps": lambda: deq.Picard(rtol=1e-9, max_steps=jnp.asarray(2 + 2 * SHUFFLED)),
    "damping": lambda: deq.Anderson(rtol=1e-8, damping=jnp.asarray(0.4 + SHUFFLED / 50), history=4),
    "rtol of stages": lambda: deq.Robust(rtol=jnp.asarray(RTOL)),
}


@pytest.mark.parametrize("solver", PER_PROBLEM.values(), ids=PER_PROBLEM)
def test_an_option_may_be_an_array_with_an_entry_for_each_problem(problems, solver):
    solver = solver()
    z, stats = jax.jit(lambda z: deq.fixed_point(tree_cell, z, *problems, solver=solver, batch_ndim=1))(START)
    options = dict(axes=(0, None, 0), solver=solver, sizes=(17, 9, 3))
    z_compact, stats_compact = jax.jit(lambda z: deq.compact(tree_cell, z, *problems, **options))(START)
    np.testing.assert_array_equal(stats_compact.steps, stats.steps)
    np.testing.assert_array_equal(stats_compact.status, stats.status)
    np.testing.assert_allclose(z_compact["a"], z["a"], rtol=1e-9)
    assert len(set(stats.steps.tolist())) > 3


def test_each_problem_has_its_own_backward_tolerance(problems):
    gain, w, x = problems
    rtol = jnp.where(jnp.arange(BATCH) % 2 == 0, 1e-2, 1e-8)
    z_star = jax.jit(lambda: deq.fixed_point(tree_cell, START, *problems, solver=FORWARD, batch_ndim=1).value)()

    def pull(backward, sizes):
        def loss(x, probe):
            options = dict(axes=(0, None, 0), solver=FORWARD, backward=backward, sizes=sizes, probe=probe)
            return deq.compact(tree_cell, z_star, gain, w, x, **options).value["a"].sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, deq.Probe.zeros((BATCH,)))

    x_bar, probe = pull(deq.Anderson(rtol=rtol, history=4), (17, 9, 3))
    # Alone, a problem takes one of two scalar tolerances.
    for one, which in ((1e-2, 0), (1e-8, 1)):
        want, alone = pull(deq.Anderson(rtol=one, history=4), ())
        np.testing.assert_array_equal(probe.steps[which::2], alone.steps[which::2])
        np.testing.assert_allclose(x_bar[which::2], want[which::2], rtol=1e-9)
    assert (probe.residual <= rtol).all() and (probe.residual[::2] > 1e-8).any()
    # By default it is derived from the forward one: ten times as tight.
    loss = lambda x, probe: deq.compact(
        tree_cell, z_star, gain, w, x, axes=(0, None, 0), solver=deq.Anderson(rtol=rtol), probe=probe
    ).value["a"].sum()  # fmt: skip
    _, probe = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, deq.Probe.zeros((BATCH,)))
    assert (probe.status == 0).all() and (probe.residual <= rtol).all() and (probe.residual[::2] > 1e-9).any()


# ---- derivatives that it has not ---------------------------------------------------------------------------


def total(gain, x):
    cell = lambda z, gain, x: jnp.tanh(gain * z) + x
    return deq.compact(cell, 0 * x, gain, x, axes=(0, 0), sizes=(3,)).value.sum()


GAIN, X = np.linspace(0.1, 0.8, 9)[:, None], np.ones((9, 2))
FORWARD_MODE = {
    "jvp": lambda: jax.jvp(lambda x: total(GAIN, x), (X,), (X,)),
    "jacfwd": lambda: jax.jacfwd(total)(GAIN, X),
    "jit(jacfwd)": lambda: jax.jit(jax.jacfwd(total))(GAIN, X),
    "jacfwd(jit)": lambda: jax.jacfwd(jax.jit(total))(GAIN, X),
    "linearize": lambda: jax.linearize(lambda x: total(GAIN, x), X)[1](X),
    "hessian": lambda: jax.hessian(total)(GAIN, X),
    "jvp of grad": lambda: jax.jvp(lambda x: jax.grad(total)(GAIN, x), (X,), (X,)),
}
SECOND_ORDER = {
    "grad of grad": lambda: jax.grad(lambda gain: jax.grad(total)(gain, X).sum())(GAIN),
    "in the other argument": lambda: jax.grad(lambda x: jax.grad(total)(GAIN, x).sum())(X),
    "in the cotangent": lambda: jax.grad(lambda s: jax.grad(lambda x: s * total(GAIN, x) ** 2)(X).sum())(2.0),
    "jit outside": lambda: jax.jit(jax.grad(lambda gain: jax.grad(total)(gain, X).sum()))(GAIN),
    "jit inside": lambda: jax.grad(lambda gain: jax.jit(jax.grad(total))(gain, X).sum())(GAIN),
    "jacrev of jacrev": lambda: jax.jacrev(jax.jacrev(total))(GAIN, X),
}


@pytest.mark.parametrize("differentiate", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_mode_is_refused_by_name(differentiate):
    with pytest.raises(TypeError, match=r"reverse mode .*use fixed_point\(.*adjoint=ImplicitJVP\(\)\)"):
        differentiate()


@pytest.mark.parametrize("differentiate", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_derivatives_are_refused_by_name(differentiate):
    with pytest.raises(TypeError, match=r"compact has first derivatives only.*fixed_point\(\.\.\., batch_ndim=1\)"):
        differentiate()


def test_first_derivatives_pass_every_transform():
    want = jax.jit(jax.grad(total))(GAIN, X)
    # z = tanh(γz) + x  ⇒  dz/dγ = s z / (1 − γ s) with s = 1 − tanh²(γz)
    z = X
    for _ in range(200):
        z = np.tanh(GAIN * z) + X
    s = 1 - np.tanh(GAIN * z) ** 2
    np.testing.assert_allclose(want, (s * z / (1 - GAIN * s)).sum(axis=-1, keepdims=True), rtol=1e-3)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(total))(GAIN, X), want, rtol=1e-9)
    mapped = jax.jit(jax.vmap(jax.grad(total), in_axes=(0, None)))(jnp.stack([GAIN, GAIN]), X)
    np.testing.assert_allclose(mapped[1], want, rtol=1e-9)
    scanned = lambda gain: jax.lax.scan(lambda c, _: (c + total(gain, X), None), 0.0, None, length=2)[0]
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(GAIN), 2 * want, rtol=1e-9)
    # A second derivative in what the solution does not depend on is none of compact's business.
    np.testing.assert_allclose(
        jax.grad(lambda s: jnp.sum(s**2 * jax.grad(total)(GAIN, X)))(3.0), 6 * want.sum(), rtol=1e-6
    )


def test_integers_and_keys_among_the_args(problems):
    gain, w, x = problems
    cell = lambda z, gain, shift, key: jnp.tanh(gain * z) + 0.1 * shift.astype(z.dtype) + 0 * jax.random.uniform(key[0])
    shift, keys = jnp.arange(BATCH)[:, None], jax.random.split(jax.random.key(0), BATCH)
    solve = lambda gain: deq.compact(cell, 0 * x, gain, shift, keys, axes=(0, 0, 0)).value
    grad = jax.jit(jax.grad(lambda gain: solve(gain).sum()))(gain)
    assert grad.shape == gain.shape and jnp.isfinite(grad).all() and (grad[1:] > 0).all()


def test_a_finished_problem_is_not_evaluated():
    rows = []

    def counting(z, gain):
        jax.debug.callback(lambda: rows.append(z.shape[0]))
        return gain * z + 1

    gain = jnp.linspace(0.1, 0.97, 9)[:, None]
    solver = deq.Picard(rtol=1e-6, max_steps=1000)
    _, stats = jax.jit(lambda z: deq.compact(counting, z, gain, axes=(0,), solver=solver))(jnp.zeros((9, 1)))
    jax.effects_barrier()
    assert sorted(set(rows)) == [1, 3, 9] and len(rows) == stats.steps.max()
    assert sum(rows) < 0.6 * 9 * len(rows)


@pytest.mark.parametrize(
    "solver",
    [
        deq.Picard(rtol=1e-8, max_steps=1000, test_every=5),
        deq.Anderson(rtol=1e-8, max_steps=1000, history=2, test_every=5),
    ],
    ids=["picard", "anderson"],
)
def test_rounds_of_evaluations_go_on_in_a_smaller_batch(problems, solver):
    z, stats = jax.jit(lambda z: deq.fixed_point(tree_cell, z, *problems, solver=solver, batch_ndim=1))(START)
    options = dict(axes=(0, None, 0), solver=solver, sizes=(9, 3))
    z_compact, stats_compact = jax.jit(lambda z: deq.compact(tree_cell, z, *problems, **options))(START)
    np.testing.assert_allclose(z_compact["a"], z["a"], rtol=1e-12)
    np.testing.assert_array_equal(stats_compact.steps, stats.steps)
    assert stats.converged.all() and (stats.steps % 5 == 1).all() and len(set(stats.steps.tolist())) > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(axes=(0, None)), "one for each of 3 args"),
        (dict(axes=(0, 0, 0)), r"args\[1\] must begin with the batch of 30"),
        (dict(axes=(0, None, 0), sizes=(40,)), "sizes must decrease"),
    ],
)
def test_what_does_not_fit_is_an_error(problems, options, words):
    with pytest.raises(ValueError, match=words):
        deq.compact(tree_cell, START, *problems, **options)


def test_a_captured_tracer_is_an_error(problems):
    gain, w, x = problems

    def loss(w):
        return deq.compact(lambda z, x: jnp.tanh(0.1 * z @ w + x), 0 * x, x, axes=(0,)).value.sum()

    with pytest.raises(TypeError, match="captures a traced array"):
        jax.grad(loss)(w)


def test_each_device_of_a_shard_map_compacts_its_own_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    over = jax.sharding.PartitionSpec("data")
    f, a = lambda z, a: a * jnp.cos(z), jnp.linspace(0.1, 1.2, 64)[:, None] * jnp.ones((64, 2))
    compact = lambda a: deq.compact(f, jnp.zeros_like(a), a, axes=(0,), sizes=(8, 3))
    pull = lambda solve: lambda a: jax.grad(lambda a: jnp.sum(jnp.sin(solve(a).value)))(a)
    both = lambda solve: lambda a: (*solve(a), pull(solve)(a))
    got = jax.jit(jax.shard_map(both(compact), mesh=mesh, in_specs=over, out_specs=over))(
        jax.device_put(a, jax.sharding.NamedSharding(mesh, over))
    )
    whole = lambda a: deq.fixed_point(f, jnp.zeros_like(a), a, batch_ndim=1)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(both(whole)(a)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)
