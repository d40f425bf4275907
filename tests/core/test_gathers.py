"""Weights that are sharded for storage: gathered once, before the loop, or at each evaluation if the user says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax._jaxprs import sub_jaxprs
from experiments.benchmarks import programs

pytestmark = pytest.mark.usefixtures("x64", "quick_compile")

BATCH, DIM = 16, 32
SOLVER = deq.Anderson(history=3, rtol=1e-9)


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def plain(z, w, x):
    return jnp.tanh(z @ w + x)


def constrained(mesh):
    def cell(z, w, x):
        w = jax.lax.with_sharding_constraint(2 * w["half"], NamedSharding(mesh, P()))
        return plain(z, w, x)

    return cell


def gathering(z, w, x):
    # As a library of modules would: inside a jit of its own.
    whole = jax.jit(lambda w: jax.lax.all_gather(2 * w, "data", axis=0, tiled=True))
    return plain(z, whole(w["half"]), x)


def problem():
    rng = np.random.default_rng(0)
    gains = np.linspace(0.1, 3, BATCH)[:, None]  # problems of unlike length
    w, x = rng.normal(size=(DIM, DIM)) / (2 * DIM**0.5), gains * rng.normal(size=(BATCH, DIM))
    return {"half": jnp.asarray(w) / 2}, jnp.asarray(x)


def pull(cell, **options):
    """(w, x) → ((z*, steps), the gradient of a loss in w)."""

    def loss(w, x):
        z, stats = deq.fixed_point(cell, jnp.zeros_like(x), w, x, solver=SOLVER, batch_ndim=1, **options)
        return jnp.sum(jnp.cos(z)), (z, stats.steps)

    return lambda w, x: jax.grad(loss, has_aux=True)(w, x)[::-1]


FORMS = {
    "constraint": lambda mesh, **options: pull(constrained(mesh), **options),
    "shard_map": lambda mesh, **options: jax.shard_map(
        pull(gathering, **options),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=((P("data"), P("data")), P("data")),
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


def gathers(jaxpr, in_loop=False):
    """(gathers outside of loops, inside of them)"""
    found = np.zeros(2, int)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        found[int(in_loop)] += name in ("all_gather", "sharding_constraint")
        for sub in sub_jaxprs(eqn):
            found += gathers(sub, in_loop or name == "while")
    return found


@forms
def test_weights_are_gathered_once_before_the_loop(form):
    w, x = problem()
    outside, inside = gathers(jax.make_jaxpr(FORMS[form](mesh()))(w, x).jaxpr)
    assert (outside > 0, inside) == (True, 0)


@forms
def test_or_at_each_evaluation(form):
    w, x = problem()
    _, inside = gathers(jax.make_jaxpr(FORMS[form](mesh(), gather="each"))(w, x).jaxpr)
    assert inside >= 2, "forward and backward"
    program = jax.jit(FORMS[form](mesh(), gather="each"))
    w, x = jax.device_put((w, x), NamedSharding(mesh(), P("data")))
    forward = programs.loops(programs.read(program.lower(w, x).compile().as_text()))[0]
    assert [what for what, _ in programs.collectives(forward)].count("all-gather") == 1


@forms
@pytest.mark.parametrize("gather", ["once", "each"])
def test_values_steps_and_gradients_are_those_of_one_device(form, gather):
    w, x = problem()
    (z, steps), w_bar = pull(lambda z, w, x: plain(z, 2 * w["half"], x))(w, x)
    sharded = jax.device_put((w, x), NamedSharding(mesh(), P("data")))
    (got_z, got_steps), got_bar = jax.jit(FORMS[form](mesh(), gather=gather))(*sharded)
    np.testing.assert_allclose(got_z, z, rtol=1e-7)
    np.testing.assert_allclose(got_bar["half"], w_bar["half"], rtol=1e-6, atol=1e-9)
    if (form, gather) != ("shard_map", "each"):  # there the problems that an f couples stop together
        np.testing.assert_array_equal(got_steps, steps)
        assert len(set(np.asarray(steps))) > 3


def test_what_depends_on_z_stays_where_it_is():
    def cell(z, w):
        mean = jax.lax.pmean(z, "data")
        return 0.5 * jnp.cos(mean) + jax.lax.all_gather(w, "data", tiled=True)[:3]

    solve = lambda z, w: deq.solve(cell, z, w, solver=deq.Picard(rtol=1e-9)).value
    run = jax.shard_map(solve, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=P("data"))
    w = jnp.arange(8.0) / 8
    jaxpr = jax.make_jaxpr(run)(jnp.zeros(24), w).jaxpr
    assert gathers(jaxpr)[1] == 0 and "psum" in str(jaxpr)
    z = run(jnp.zeros(24), w)
    np.testing.assert_allclose(z[:3], 0.5 * jnp.cos(z.reshape(8, 3).mean(0)) + w[:3], rtol=1e-8)


def test_a_callback_is_called_at_each_evaluation():
    seen = []

    def cell(z, w):
        jax.debug.callback(lambda: seen.append(1))
        return 0.5 * jnp.cos(z) + jax.lax.all_gather(w, "data", tiled=True)[:3]

    solve = lambda z, w: deq.solve(cell, z, w, solver=deq.Picard(max_steps=5, rtol=1e-15))[:2]
    run = jax.shard_map(solve, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=P(), check_vma=False)
    jax.block_until_ready(jax.jit(run)(jnp.zeros(24), jnp.arange(8.0) / 8))
    jax.effects_barrier()
    assert len(seen) == 5 * 8
