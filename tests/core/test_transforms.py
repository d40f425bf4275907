"""The axis of this file is a transformation: each gives the value and gradient of the plain call."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax import Status
from deq_jax._arrays import aligned

pytestmark = pytest.mark.usefixtures("quick_compile")

N, DIM = 4, 3
SOLVERS = {
    "picard": deq.Picard(rtol=1e-12, max_steps=300),
    "anderson": deq.Anderson(rtol=1e-12, history=2, max_steps=300),
    "broyden": deq.Broyden(rtol=1e-12, rank=4, max_steps=300),
}
PICARD = SOLVERS["picard"]
ADJOINTS = {
    "implicit": deq.Implicit(PICARD),
    "phantom": deq.Phantom(steps=3),
    "neumann": deq.Neumann(terms=3),
    "jfb": deq.JFB(),
    "unroll": deq.Unroll(),
    "unroll, checkpointed": deq.Unroll(checkpoint=7),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
RARELY = deq.Picard(rtol=1e-12, max_steps=300, test_every=3)


@pytest.fixture
def params(x64):
    w = 0.3 * jnp.cos(jnp.arange(DIM * DIM, dtype=float)).reshape(DIM, DIM)
    return {"w": w, "b": jnp.linspace(-1.0, 1.0, DIM)}


@pytest.fixture
def xs(x64):
    return jnp.sin(jnp.arange(N * DIM, dtype=float)).reshape(N, DIM) * jnp.arange(1.0, N + 1)[:, None]


def cell(z, params, x):
    product = z @ params["w"]
    return jnp.tanh(product + aligned(params["b"], product)) + x


def loss(params, x, solver=PICARD, adjoint=ADJOINTS["implicit"], batch_ndim=0):
    """A number, from parameters that f captures and an x that is its argument."""
    f = lambda z, x: cell(z, params, x)
    z = deq.fixed_point(f, jnp.zeros_like(x), x, solver=solver, adjoint=adjoint, batch_ndim=batch_ndim).value
    return jnp.sum(z**2)


def pull(params, x, **options):
    return jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1))(params, x)


def reference(params, xs):
    """The same by a dense solve, one problem at a time."""

    def one(x):
        z = jnp.zeros_like(x)
        for _ in range(100):
            z = cell(z, params, x)
        J = jax.jacobian(cell)(z, params, x)
        u = jnp.linalg.solve(jnp.eye(DIM) - J.T, 2 * z)
        return jnp.sum(z**2), jax.vjp(lambda params, x: cell(z, params, x), params, x)[1](u)

    return stack([one(x) for x in xs])


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_close(got, want, rtol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


# ---- each transformation maps `pull` over xs ---------------------------------------------------------------


def jit(pull, params, xs):
    pull = jax.jit(pull)
    return stack([pull(params, x) for x in xs])


def eager(pull, params, xs):
    # A closure is compiled anew at each eager call: once here, and the rest in one go.
    one, rest = pull(params, xs[0]), jit(pull, params, xs[1:])
    return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), one, rest)


def value_then_grad(pull, params, xs):
    value = jax.jit(loss)
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return stack([(value(params, x), grad(params, x)) for x in xs])


def vmap_of_grad(pull, params, xs):
    return jax.jit(jax.vmap(pull, in_axes=(None, 0)))(params, xs)


def eager_vmap_of_grad(pull, params, xs):
    return jax.vmap(pull, in_axes=(None, 0))(params, xs)


def grad_of_vmap(pull, params, xs):
    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), params)
    values = jax.vmap(loss)
    grads = jax.grad(lambda each, xs: values(each, xs).sum(), argnums=(0, 1))
    return jax.jit(values)(each, xs), jax.jit(grads)(each, xs)


def scan(pull, params, xs):
    return jax.jit(lambda xs: jax.lax.scan(lambda carry, x: (carry, pull(params, x)), None, xs)[1])(xs)


def grad_of_scan(pull, params, xs):
    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), params)
    values = lambda each, xs: jax.lax.scan(lambda c, p: (c, loss(*p)), None, (each, xs))[1]
    grads = jax.grad(lambda each, xs: values(each, xs).sum(), argnums=(0, 1))
    return jax.jit(values)(each, xs), jax.jit(grads)(each, xs)


def remat(pull, params, xs):
    value_and_grad = jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)))
    return stack([value_and_grad(params, x) for x in xs])


def remat_saving_nothing_in_scan(pull, params, xs):
    body = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    value_and_grad = jax.value_and_grad(body, argnums=(0, 1))
    return jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, value_and_grad(params, x)), None, xs)[1])(xs)


def cond(pull, params, xs):
    both = lambda p, x: jax.lax.cond(x[0] > 0, loss, lambda p, x: loss(p, x) + 0.0, p, x)
    value_and_grad = jax.jit(jax.value_and_grad(both, argnums=(0, 1)))
    return stack([value_and_grad(params, x) for x in xs])


def in_a_while_loop(pull, params, xs):
    def body(i, out):
        return jax.tree.map(lambda all, one: all.at[i].set(one), out, pull(params, xs[i]))

    shapes = jax.eval_shape(pull, params, xs[0])
    empty = jax.tree.map(lambda leaf: jnp.zeros((N, *leaf.shape), leaf.dtype), shapes)
    return jax.jit(lambda: jax.lax.fori_loop(0, N, body, empty))()


def ahead_of_time(pull, params, xs):
    compiled = jax.jit(pull).lower(params, xs[0]).compile()
    return stack([compiled(params, x) for x in xs])


def donation(pull, params, xs):
    donating = jax.jit(lambda x, params: pull(params, x), donate_argnums=0)
    return stack([donating(jnp.array(x), params) for x in xs])


def without_jit(pull, params, xs):
    first = jit(pull, params, xs[1:])
    with jax.disable_jit():
        one = pull(params, xs[0])
    return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), one, first)


def pmap(pull, params, xs):
    return jax.pmap(pull, in_axes=(None, 0))(params, xs)


def shard_map(pull, params, xs):
    # The parameters are given to each shard as its own: their gradients are then of its own problem.
    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), params)
    one = lambda params, x: jax.tree.map(
        lambda leaf: leaf[None], pull(jax.tree.map(lambda leaf: leaf[0], params), x[0])
    )
    return jax.jit(jax.shard_map(one, mesh=auto_mesh(), in_specs=P("data"), out_specs=P("data")))(each, xs)


def threads(pull, params, xs):
    out, pull = [None] * N, jax.jit(pull)

    def work(i):
        with_x64 = jax.config.read("jax_enable_x64")
        assert with_x64
        out[i] = pull(params, xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(N)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return stack(out)


TRANSFORMS = [
    eager,
    jit,
    value_then_grad,
    vmap_of_grad,
    eager_vmap_of_grad,
    grad_of_vmap,
    scan,
    grad_of_scan,
    remat,
    remat_saving_nothing_in_scan,
    cond,
    in_a_while_loop,
    ahead_of_time,
    donation,
    without_jit,
    pmap,
    shard_map,
    threads,
]


def auto_mesh():
    return Mesh(np.array(jax.devices()[:N]), ("data",))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
def test_transform(params, xs, transform):
    assert_close(transform(pull, params, xs), reference(params, xs))


@pytest.mark.parametrize("transform", [vmap_of_grad, shard_map], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_accelerated_solvers(params, xs, name, transform):
    both = functools.partial(pull, solver=SOLVERS[name], adjoint=deq.Implicit(SOLVERS[name]))
    assert_close(transform(both, params, xs), reference(params, xs))


@pytest.mark.parametrize("transform", [vmap_of_grad, scan, shard_map], ids=lambda t: t.__name__)
@pytest.mark.parametrize("adjoint", list(ADJOINTS)[1:])
def test_other_adjoints(params, xs, adjoint, transform):
    solver = deq.Picard(rtol=1e-12, max_steps=20) if adjoint.startswith("unroll") else PICARD
    one = functools.partial(pull, solver=solver, adjoint=ADJOINTS[adjoint])
    assert_close(transform(one, params, xs), jit(one, params, xs), rtol=1e-12)


def test_vmap_over_parameters_and_budgets(params, xs):
    def steps(scale, budget):
        solver = deq.Picard(rtol=1e-10, max_steps=budget)
        return deq.fixed_point(lambda z: scale * jnp.cos(z), 0.0, solver=solver).stats

    scales, budgets = jnp.array([0.1, 0.5, 0.9, 0.9]), jnp.array([100, 100, 100, 3])
    stats = jax.jit(jax.vmap(steps))(scales, budgets)
    alone = [steps(s, b) for s, b in zip(scales, budgets, strict=True)]
    np.testing.assert_array_equal(stats.steps, [s.steps for s in alone])
    np.testing.assert_array_equal(stats.status, [s.status for s in alone])
    assert stats.steps[3] == 3 and stats.status[3] == Status.MAX_STEPS


@pytest.mark.full_compile
def test_a_compiled_solve_repeats_its_bits(params, xs):
    run = jax.jit(functools.partial(pull, batch_ndim=1))
    for a, b in zip(jax.tree.leaves(run(params, xs)), jax.tree.leaves(run(params, xs)), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- a batch over four devices -----------------------------------------------------------------------------


def batch_pull(params, xs, solver):
    def value(params, xs):
        f = lambda z, xs: cell(z, params, xs)
        z, stats = deq.fixed_point(f, jnp.zeros_like(xs), xs, solver=solver, adjoint=deq.Implicit(solver), batch_ndim=1)
        return jnp.sum(z**2), (z, stats)

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, xs)


def meshes():
    kinds = {"auto": auto_mesh()}
    if hasattr(jax.sharding, "AxisType"):
        explicit = (jax.sharding.AxisType.Explicit,)
        kinds["explicit"] = jax.make_mesh((N,), ("data",), axis_types=explicit, devices=jax.devices()[:N])
    return kinds


@pytest.mark.full_compile
@each_solver
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_a_sharded_batch_equals_a_single_device(params, xs, solver, kind):
    mesh = meshes().get(kind)
    if mesh is None:
        pytest.skip("this jax has no explicit axes")
    want = jax.jit(batch_pull)(params, xs, solver)
    sharded = jax.device_put(xs, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    got = jax.jit(batch_pull)(replicated, sharded, solver)
    (_, (z, stats)), (_, xs_bar) = got
    for leaf in (z, xs_bar, stats.steps, stats.residual):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), leaf.ndim), leaf.sharding
    assert_close(jax.device_get(got), jax.device_get(want))
    np.testing.assert_array_equal(stats.steps, want[0][1][1].steps)


def test_eager_call_on_an_explicitly_sharded_batch(params, xs):
    mesh = meshes().get("explicit", auto_mesh())
    sharded = jax.device_put(xs, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    z, stats = deq.fixed_point(cell, jnp.zeros_like(sharded), replicated, sharded, solver=PICARD, batch_ndim=1)
    want, _ = deq.fixed_point(cell, jnp.zeros_like(xs), params, xs, solver=PICARD, batch_ndim=1)
    np.testing.assert_allclose(z, want, rtol=1e-12)
    assert jnp.all(stats.converged)


@pytest.mark.parametrize("solver", [*SOLVERS.values(), RARELY], ids=[*SOLVERS, "picard, tested rarely"])
def test_shard_map_with_shared_parameters(params, xs, solver):
    # Two problems a shard, each shard stopping by itself; the sum over shards is outside the solve.
    xs = jnp.concatenate([xs, -xs])

    def value(params, xs):
        f = lambda z, xs: cell(z, params, xs)
        z = deq.fixed_point(f, jnp.zeros_like(xs), xs, solver=solver, adjoint=deq.Implicit(solver), batch_ndim=1)
        return jnp.sum(z.value**2)[None]

    def sharded(params, xs):
        each = jax.shard_map(value, mesh=auto_mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
        return jnp.sum(each(params, xs))

    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(params, xs)
    want = jax.jit(jax.value_and_grad(lambda params, xs: value(params, xs)[0], argnums=(0, 1)))(params, xs)
    assert_close(got, want)
