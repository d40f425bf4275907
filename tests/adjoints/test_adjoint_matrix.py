"""Every adjoint with every solver, in every transformation and dtype, against the closed form of its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov

pytestmark = pytest.mark.usefixtures("quick_compile")

N, DIM = 4, 3
SOLVERS = {
    "picard": deq.Picard(rtol=1e-13, max_steps=200),
    "anderson": deq.Anderson(rtol=1e-13, max_steps=200, history=2),
    "broyden": deq.Broyden(rtol=1e-13, max_steps=200, rank=10),
    "newton": NewtonKrylov(rtol=1e-13, max_steps=200, krylov=3),
    "robust": deq.Robust(rtol=1e-13, max_steps=200, stages=(deq.Picard(), deq.Broyden(rank=10))),
}
PICARD = SOLVERS["picard"]
exact = lambda A: np.linalg.inv(np.eye(DIM) - A)
series = lambda A, terms: sum(np.linalg.matrix_power(A, k) for k in range(terms))
ADJOINTS = {  # name: (adjoint, the matrix M of its gradient's u = M(Jᵀ) z̄)
    "implicit": (deq.Implicit(PICARD), exact),
    "implicit jvp": (deq.ImplicitJVP(PICARD), exact),
    "phantom": (deq.Phantom(3, 0.4), lambda A: 0.4 * series(0.6 * np.eye(DIM) + 0.4 * A, 3)),
    "neumann": (deq.Neumann(3), lambda A: series(A, 3)),
    "jfb": (deq.JFB(), lambda A: np.eye(DIM)),
    "unroll": (deq.Unroll(), exact),
    "unroll, stopping": (deq.Unroll(checkpoint=True, stop=True), exact),
    "reversible": (deq.Reversible(0.5), exact),
    "shine": (deq.Shine(refine=8), exact),
}
# Of an unrolled solve: enough for 1e-10.
DEPTH = {"picard": 40, "anderson": 16, "broyden": 16, "newton": 30, "robust": 40}
PAIRS = [(a, s) for a in ADJOINTS for s in SOLVERS if a != "shine" or s == "broyden"]
RTOL = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-3}
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 0.03}


def options(adjoint, solver, dtype="float64"):
    kind, rtol = ADJOINTS[adjoint][0], RTOL[dtype]
    budget = DEPTH[solver] if adjoint.startswith("unroll") else 200
    if adjoint == "reversible":  # its steps are walked back at the price of rounding
        rtol, budget = max(rtol, 1e-10), 89
    if hasattr(kind, "solver"):
        kind = dataclasses.replace(kind, solver=dataclasses.replace(PICARD, rtol=rtol))
    return dict(solver=dataclasses.replace(SOLVERS[solver], rtol=rtol, max_steps=budget), adjoint=kind)


def problem(dtype="float64"):
    w = np.cos(np.arange(DIM * DIM) ** 2).reshape(DIM, DIM)
    params = {"w": 0.3 * w / np.linalg.norm(w, 2), "u": np.linspace(-1.0, 1.0, DIM)}
    xs = np.sin(np.arange(N * DIM)).reshape(N, DIM)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, xs))


def flat(z):
    return jnp.concatenate([z["a"], *z["b"]], axis=-1)


def cell(z, params, x, rest):
    noise = 0.1 * jax.random.key_data(rest["key"])[-1].astype(x.dtype)  # a draw would take long to compile
    wide = lambda row: jnp.broadcast_to(row, x.shape)
    y = flat(z)[..., rest["order"]] @ params["w"].T + wide(params["u"]) * x + wide(jnp.where(rest["mask"], noise, 0))
    y = jnp.tanh(y)
    return {"a": y[..., :2], "b": (y[..., 2:],)}, {"uz": wide(params["u"]) * y, "n": rest["order"]}


def score(z, aux):
    """Any number that reads the value and the aux."""
    return jnp.sum(flat(z) @ jnp.arange(1.0, DIM + 1).astype(flat(z).dtype)) + jnp.sum(aux["uz"] ** 2)


def rest_of():
    return {"key": jax.random.key(3), "order": jnp.array([2, 0, 1]), "mask": jnp.array([True, False, True])}


def loss(params, x, batch_ndim=0, **options):
    rest = rest_of()
    f = lambda z, x: cell(z, params, x, rest)  # params, a key, ints and bools are captured, x is an argument
    z0 = {"a": jnp.zeros_like(x)[..., :2], "b": (jnp.zeros_like(x)[..., 2:],)}
    z, stats, aux = deq.fixed_point(f, z0, x, batch_ndim=batch_ndim, has_aux=True, **options)
    return score(z, aux).astype(x.dtype)


def pull(params, x, **options):
    return jax.value_and_grad(lambda params, x: loss(params, x, **options).sum(), argnums=(0, 1))(params, x)


@functools.cache
def closed_form(name, dtype="float64"):
    """The sum of all problems' values and its gradient, in float64 from the numbers as the dtype rounds them."""
    params, xs = jax.tree.map(lambda leaf: leaf.astype("float64"), problem(dtype))
    of = lambda flat: {"a": flat[:2], "b": (flat[2:],)}
    f = lambda z, params, x: flat(cell(of(z), params, x, rest_of())[0])
    value = lambda z, params, x: score(of(z), cell(of(z), params, x, rest_of())[1])

    def one(x):
        z = jax.lax.fori_loop(0, 60, lambda _, z: f(z, params, x), jnp.zeros(DIM))
        z_bar, *direct = jax.grad(value, argnums=(0, 1, 2))(z, params, x)
        return value(z, params, x), z_bar, tuple(direct), z, jax.jacobian(f)(z, params, x)

    values, z_bar, (params_bar, xs_bar), z, J = jax.jit(jax.vmap(one))(xs)
    u = np.stack([ADJOINTS[name][1](np.asarray(J).T) @ z_bar for J, z_bar in zip(J, z_bar, strict=True)])
    each = jax.vmap(lambda z, x, u: jax.vjp(lambda params, x: f(z, params, x), params, x)[1](u))
    through = each(z, xs, jnp.asarray(u))
    params_bar = jax.tree.map(lambda a, b: jnp.sum(a + b, axis=0), params_bar, through[0])
    return values.sum(), (params_bar, xs_bar + through[1])


def assert_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(np.asarray(a, "float64") - b)
        assert error <= tolerance * np.linalg.norm(b), f"relative error {error / np.linalg.norm(b):.1e}"


# ---- each transformation sums over the problems xs ---------------------------------------------------------


def over_problems(each):
    values, (params_bar, xs_bar) = each
    return values.sum(), (jax.tree.map(lambda leaf: leaf.sum(0), params_bar), xs_bar)


def batch(params, xs, **options):
    return pull(params, xs, batch_ndim=1, **options)


def batch_of_two_axes(params, xs, **options):
    value, (params_bar, xs_bar) = pull(params, xs.reshape(2, 2, DIM), batch_ndim=2, **options)
    return value, (params_bar, xs_bar.reshape(N, DIM))


def vmap(params, xs, **options):
    return over_problems(jax.vmap(lambda x: pull(params, x, **options))(xs))


def scan_of_remat(params, xs, **options):
    saved = jax.checkpoint(lambda params, x: loss(params, x, **options))
    total = lambda params, xs: jax.lax.scan(lambda sum, x: (sum + saved(params, x), None), xs[0, 0] * 0, xs)[0]
    return jax.value_and_grad(total, argnums=(0, 1))(params, xs)


def shard_map(params, xs, **options):
    # The parameters are given to each shard as its own: their gradients are then of its own problem.
    each = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), params)
    mesh = Mesh(np.array(jax.devices()[:N]), ("data",))
    mine = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    one = lambda params, x: jax.tree.map(lambda leaf: leaf[None], pull(mine(params), mine(x), **options))
    return over_problems(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(each, xs))


TRANSFORMS = [batch, batch_of_two_axes, vmap, scan_of_remat, shard_map]
COMPILED_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Every pair of an adjoint and a solver in one transformation, so that an adjoint and a solver meet all but one of
# the five; with `THE_OTHERS` an adjoint meets all.
turn = lambda adjoint, solver: (list(ADJOINTS).index(adjoint) + list(SOLVERS).index(solver)) % len(TRANSFORMS)
PAIRED = [(*pair, TRANSFORMS[turn(*pair)]) for pair in PAIRS]
MET = {(adjoint, transform) for adjoint, _, transform in PAIRED}
THE_OTHERS = [
    (adjoint, "broyden" if adjoint == "shine" else "picard", transform)
    for adjoint in ADJOINTS
    for transform in TRANSFORMS
    if (adjoint, transform) not in MET
]
NAMES = [f"{a}-{s}-{t.__name__}" for a, s, t in PAIRED + THE_OTHERS]


@pytest.mark.parametrize("adjoint, solver, transform", PAIRED + THE_OTHERS, ids=NAMES)
def test_gradient_is_the_closed_form(x64, adjoint, solver, transform):
    run = functools.partial(transform, **options(adjoint, solver))
    got = jax.jit(run, compiler_options=COMPILED_QUICKLY)(*problem())
    assert_close(got, closed_form(adjoint), 1e-8 if adjoint == "reversible" else TOLERANCE["float64"])


IN_TURN = ["picard", "anderson", "broyden"]  # Newton-Krylov's differences are lost in 16 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("index, adjoint", enumerate(ADJOINTS), ids=ADJOINTS)
def test_gradient_in_low_precision(x64, index, adjoint, dtype):
    solver = "broyden" if adjoint == "shine" else IN_TURN[index % 3]
    params, xs = problem(dtype)
    run = jax.jit(functools.partial(batch, **options(adjoint, solver, dtype)), compiler_options=COMPILED_QUICKLY)
    got = run(params, xs)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert_close(got, closed_form(adjoint, dtype), TOLERANCE[dtype])
