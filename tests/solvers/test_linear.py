"""The linear system of the derivative, given to other solvers and preconditioned: what they claim is measured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax import OnFailure, Status

pytestmark = pytest.mark.usefixtures("quick_compile", "x64")

DIM, BATCH = 6, 3
TIGHT = deq.Anderson(rtol=1e-13, history=8)


def gmres(matvec, rmatvec, b):
    return jax.scipy.sparse.linalg.gmres(matvec, b, tol=1e-13, atol=0.0)


def normal_cg(matvec, rmatvec, b):
    """The normal equations (I − A)ᵀ(I − A) u = (I − A)ᵀ b, which ask for both products."""
    return jax.scipy.sparse.linalg.cg(lambda v: rmatvec(matvec(v)), rmatvec(b), tol=1e-15, atol=0.0)


@pytest.fixture
def problem(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    return 0.2 * jax.random.normal(keys[0], (DIM, DIM)), jax.random.normal(keys[1], (BATCH, DIM))


def cell(z, w, x):
    return jnp.tanh(z @ w + x)


def inverse_near(w):
    """P v = (I − J)⁻¹ v, with the Jacobian that the cell would have if tanh had slope 1. P captures the factors."""
    factors = jax.scipy.linalg.lu_factor(jnp.eye(DIM) - w.T)
    return lambda v: jax.scipy.linalg.lu_solve(factors, v.T).T


def loss(w, x, adjoint, probe=None, f=cell):
    z = deq.fixed_point(f, jnp.zeros_like(x), w, x, solver=TIGHT, adjoint=adjoint, batch_ndim=1, probe=probe).value
    return jnp.sum(z**3)


def dense_gradient(w, x, f=cell):
    """d loss / d w, from the matrix I − J of each problem."""
    total = 0
    for row in x:
        z = deq.solve(f, jnp.zeros(DIM), w, row, solver=TIGHT).value
        u = jnp.linalg.solve((jnp.eye(DIM) - jax.jacobian(f)(z, w, row)).T, 3 * z**2)
        total = total + jax.vjp(lambda w: f(z, w, row), w)[1](u)[0]
    return total


WAYS = {
    "dense": lambda w: dict(linear=deq.Dense()),
    "gmres": lambda w: dict(linear=gmres),
    "both products": lambda w: dict(linear=normal_cg),
    "preconditioner": lambda w: dict(preconditioner=inverse_near(w)),
    "gmres, preconditioner": lambda w: dict(linear=gmres, preconditioner=inverse_near(w)),
    "both products, preconditioner": lambda w: dict(linear=normal_cg, preconditioner=inverse_near(w)),
    "dense, preconditioner": lambda w: dict(linear=deq.Dense(), preconditioner=inverse_near(w)),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_a_dense_solve(problem, way):
    w, x = problem
    # Everything from w is traced and differentiated where the adjoint is made.
    of = lambda w, probe: loss(w, x, deq.Implicit(**WAYS[way](w)), probe)
    grad, probe = jax.jit(jax.grad(of, (0, 1)))(w, deq.Probe.zeros((BATCH,)))
    np.testing.assert_allclose(grad, dense_gradient(w, x), rtol=1e-10, atol=1e-12)
    assert jnp.all(probe.status == Status.CONVERGED) and jnp.all(probe.residual < 1e-12)


@pytest.mark.parametrize("way", ["dense", "both products, preconditioner", "preconditioner"])
def test_derivatives_of_every_order_and_mode(problem, way):
    w, x = problem
    adjoints = lambda A: (A(TIGHT), A(TIGHT, **WAYS[way](w)))
    direction = jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)
    second = lambda adjoint: jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w, x, adjoint), direction))(w)
    plain, ours = map(second, adjoints(deq.Implicit))
    np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-11)
    along = lambda adjoint: jax.jvp(jax.grad(lambda w: loss(w, x, adjoint)), (w,), (direction,))
    for adjoint in adjoints(deq.ImplicitJVP):
        gradient, curvature = jax.jit(lambda adjoint=adjoint: along(adjoint))()
        np.testing.assert_allclose(gradient, dense_gradient(w, x), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(curvature, plain, rtol=1e-9, atol=1e-11)
        tangent = jax.jvp(lambda w, adjoint=adjoint: loss(w, x, adjoint), (w,), (direction,))[1]
        np.testing.assert_allclose(tangent, jnp.vdot(gradient, direction), rtol=1e-10)


@pytest.mark.parametrize("adjoint", [deq.Implicit, deq.ImplicitJVP])
def test_a_symmetric_root_at_condition_1e4_by_conjugate_gradients(adjoint):
    n = 300
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    H, a = jnp.asarray(q * np.geomspace(1e-4, 1, n) @ q.T), jnp.asarray(rng.standard_normal(n))

    def cg(matvec, rmatvec, b):
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-12, maxiter=20 * n)

    root = jax.scipy.linalg.solve(H, a, assume_a="pos")
    z_bar = jnp.asarray(rng.standard_normal(n))

    def of(a, probe):  # F(z) = H z − a as f = z − F
        z = deq.attach(lambda z, a: z - (H @ z - a), root, a, adjoint=adjoint(TIGHT, linear=cg), probe=probe)
        return jnp.vdot(z, z_bar)

    grad, probe = jax.grad(of, (0, 1))(a, deq.Probe.zeros())
    want = jax.scipy.linalg.solve(H, z_bar, assume_a="pos")
    error = jnp.linalg.norm(grad - want) / jnp.linalg.norm(want)
    assert error < 1e-6 and probe.residual < 1e-9


# ---- what a solver claims ----------------------------------------------------------------------------------


def test_what_a_callable_claims_is_measured_problem_by_problem(problem):
    w, x = problem

    def liar(matvec, rmatvec, b):  # right in the first problem, nothing in the second, NaN in the third
        u = gmres(matvec, rmatvec, b)[0]
        return u * jnp.asarray([1.0, 0.0, jnp.nan])[:, None], {"status": "converged", "steps": 0}

    adjoint = lambda policy: deq.Implicit(linear=liar, on_failure=policy)
    pull = lambda adjoint: jax.grad(lambda x, probe: loss(w, x, adjoint, probe), (0, 1))(x, deq.Probe.zeros((BATCH,)))
    kept, probe = pull(adjoint(OnFailure.KEEP))
    assert probe.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE]
    assert probe.residual[0] < 1e-12 and probe.residual[1] == 1 and probe.residual[2] == jnp.inf
    exact, jfb = (pull(other)[0] for other in (deq.Implicit(TIGHT), deq.JFB()))
    np.testing.assert_allclose(kept[0], exact[0], rtol=1e-10)
    np.testing.assert_array_equal(kept[1], 0)
    np.testing.assert_allclose(kept[2], jfb[2], rtol=1e-14)  # z̄, and no NaN
    for policy, failed in ((OnFailure.ZERO, 0 * jfb), (OnFailure.ONE_STEP, jfb)):
        got, _ = pull(adjoint(policy))
        np.testing.assert_allclose(got[0], exact[0], rtol=1e-10)
        np.testing.assert_allclose(got[1:], failed[1:], rtol=1e-14)


@pytest.mark.parametrize("linear", [None, lambda matvec, rmatvec, b: (jax.tree.map(jnp.zeros_like, b), 0)])
def test_forward_mode_applies_the_failure_policy(problem, linear):
    w, x = problem
    solver = deq.Picard(rtol=1e-13, max_steps=2)

    def tangent(adjoint):
        return jax.jvp(
            lambda w: deq.fixed_point(cell, jnp.zeros(DIM), w, x[0], solver=TIGHT, adjoint=adjoint)[0], (w,), (w,)
        )[1]

    kept, zero, one_step = (tangent(deq.ImplicitJVP(solver, policy, linear)) for policy in OnFailure)
    z = deq.solve(cell, jnp.zeros(DIM), w, x[0], solver=TIGHT).value
    np.testing.assert_array_equal(zero, 0)
    np.testing.assert_allclose(one_step, jax.jvp(lambda w: cell(z, w, x[0]), (w,), (w,))[1], rtol=1e-12)
    assert (jnp.linalg.norm(kept) > 0) == (linear is None) and jnp.any(kept != one_step)


def test_the_tolerance_that_is_asked_for_is_that_of_the_solver(problem):
    w, x = problem
    rough = lambda matvec, rmatvec, b: (jax.scipy.sparse.linalg.gmres(matvec, b, tol=1e-5, atol=0.0)[0] * (1 + 1e-4), 0)
    status = lambda solver: (
        jax.grad(lambda probe: loss(w, x, deq.Implicit(solver, linear=rough), probe))(deq.Probe.zeros((BATCH,))).status
    )
    assert jnp.all(status(deq.Picard(rtol=1e-2)) == Status.CONVERGED)
    assert jnp.all(status(deq.Picard(rtol=1e-6)) == Status.MAX_STEPS)
    assert jnp.all(status(None) == Status.MAX_STEPS)  # a tenth of 1e-13


@pytest.mark.parametrize("share", [1e-3, 1e3])
def test_a_preconditioner_of_another_scale_does_not_move_the_tolerance(problem, share):
    w, x = problem
    adjoint = deq.Implicit(deq.Anderson(rtol=1e-8, history=10), preconditioner=lambda v: share * inverse_near(w)(v))
    probe = jax.grad(lambda probe: loss(w, x, adjoint, probe))(deq.Probe.zeros((BATCH,)))
    assert jnp.all(probe.status == Status.CONVERGED) and jnp.all(probe.residual <= 1e-8)


def test_a_good_preconditioner_saves_products(x64):
    n = 40
    keys = jax.random.split(jax.random.key(1), 2)
    w, a = 1.5 * jax.random.normal(keys[0], (n, n)) / n**0.5, jax.random.normal(keys[1], (n,))
    factors = jax.scipy.linalg.lu_factor(jnp.eye(n) - w)
    near = lambda v: jax.scipy.linalg.lu_solve(factors, v)

    def products(**options):
        adjoint = deq.Implicit(deq.Anderson(rtol=1e-8, history=10, max_steps=500), **options)
        f = lambda z: w @ z + 0.05 * jnp.sin(a * z) + a
        return jax.grad(lambda p: jnp.sum(deq.attach(f, a, adjoint=adjoint, probe=p)))(deq.Probe.zeros())

    plain, good = products(), products(preconditioner=near)
    assert good.status == Status.CONVERGED and good.residual <= 1e-8 and good.steps < plain.steps / 3


# ---- states, batches, devices ------------------------------------------------------------------------------


def on_states(dtype):
    """(f, z0, a): a pair of leaves and a carried count, in another dtype or complex."""
    a = jnp.linspace(0.2, 0.5, 4).astype(dtype)

    def f(z, a):
        u, v = z["u"], z["v"]
        a = jnp.broadcast_to(a, u.shape)
        turned = 0.3j * u if jnp.iscomplexobj(u) else 0.3 * u
        return {"u": jnp.sin(a * v + jnp.conj(turned)), "v": jnp.cos(a * u[..., ::-1]), "n": z["n"] + 1}

    zero = jnp.zeros((BATCH, 4), dtype)
    return f, {"u": zero, "v": zero + jnp.asarray(0.1, dtype), "n": jnp.zeros((BATCH,), jnp.int32)}, a


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "complex128"])
@pytest.mark.parametrize("options", [dict(linear=deq.Dense()), dict(linear=gmres)], ids=["dense", "gmres"])
@pytest.mark.parametrize("batch_ndim", [0, 1])
def test_states_of_every_kind(dtype, options, batch_ndim):
    f, z0, a = on_states(dtype)
    z0 = z0 if batch_ndim else z0 | {"n": jnp.zeros((), jnp.int32)}
    solver = deq.Anderson(rtol=100 * float(jnp.finfo(dtype).eps))

    def value(a, probe, adjoint):
        z = deq.fixed_point(f, z0, a, solver=solver, adjoint=adjoint, batch_ndim=batch_ndim, probe=probe).value
        return sum(jnp.sum(jnp.abs(z[k] - 0.1).astype("float64") ** 2) for k in "uv")

    pull = lambda adjoint: jax.jit(jax.grad(lambda *args: value(*args, adjoint), (0, 1)))(
        a, deq.Probe.zeros((BATCH,) * batch_ndim)
    )
    eps = float(jnp.finfo(dtype).eps)
    # What the default would ask for is less than gmres is told: it stops at 1e-13.
    judge = deq.Picard(rtol=max(10 * eps, 2e-13)) if options.get("linear") is gmres else None
    (plain, _), (got, probe) = pull(deq.Implicit()), pull(deq.Implicit(judge, **options))
    distance = jnp.linalg.norm((got - plain).astype("complex128")) / jnp.linalg.norm(plain.astype("complex128"))
    assert distance < max(100 * eps, 1e-12)  # gmres stops at 1e-13
    assert jnp.all(probe.status == Status.CONVERGED)
    unknowns = 8 * (2 if dtype == "complex128" else 1) * (1 if batch_ndim else BATCH)
    assert jnp.all(probe.steps == (unknowns + 2 if options["linear"] == deq.Dense() else 1))


def test_under_vmap_each_problem_gets_what_it_gets_alone(problem):
    w, x = problem
    adjoint = deq.Implicit(linear=gmres, preconditioner=inverse_near(w))
    alone = lambda row: jax.grad(lambda w: loss(w, row[None], adjoint))(w)
    np.testing.assert_allclose(jax.vmap(alone)(x), jnp.stack([alone(row) for row in x]), rtol=1e-11, atol=1e-13)


def test_a_batch_that_is_sharded(problem):
    w, x = problem
    x = jnp.concatenate([x, x + 1])[:4]
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    for options in (dict(linear=deq.Dense()), dict(preconditioner=inverse_near(w))):
        grad = jax.grad(lambda w, x, options=options: loss(w, x, deq.Implicit(**options)))
        inside = jax.shard_map(lambda w, x: grad(w, x), mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
        np.testing.assert_allclose(jax.jit(inside)(w, x), grad(w, x), rtol=1e-10, atol=1e-12)


def test_a_callable_solves_a_system_that_lies_on_several_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = lambda z: jax.lax.pmean(jnp.mean(z), "x")
    f = lambda z, a: 0.5 * jnp.cos(a * z) + 0.3 * mean(z)

    def richardson(matvec, rmatvec, b):  # as often everywhere, so no decision has to be shared
        return jax.lax.fori_loop(0, 100, lambda k, u: u + b - matvec(u), b), None

    def pull(a, adjoint):
        def value(a, probe):
            return jnp.sum(deq.fixed_point(f, 0 * a, a, solver=TIGHT, adjoint=adjoint, probe=probe).value ** 2)

        grad, probe = jax.grad(value, (0, 1))(a, deq.Probe.like(a, 0))
        return grad, probe.status[None]

    a = jnp.linspace(0.5, 1.0, 4)
    over = lambda adjoint: jax.jit(
        jax.shard_map(functools.partial(pull, adjoint=adjoint), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    )(a)
    (want, _), (got, status) = over(deq.Implicit(TIGHT)), over(deq.Implicit(deq.Picard(rtol=1e-12), linear=richardson))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert jnp.all(status == Status.CONVERGED)


# ---- lineax ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gmres", "lu", "tagged"])
def test_solvers_of_lineax(problem, name):
    lineax = pytest.importorskip("lineax", reason="lineax is optional")
    w, x = problem
    w = 0.5 * (w + w.T) if name == "tagged" else w
    f = (lambda z, w, x: 0.5 * z @ w + x + 0.1) if name == "tagged" else cell  # I − J symmetric and definite
    linear = {
        "gmres": lambda: lineax.GMRES(rtol=1e-13, atol=1e-13),
        "lu": lambda: lineax.LU(),
        "tagged": lambda: deq.Lineax(lineax.CG(rtol=1e-13, atol=1e-13), lineax.positive_semidefinite_tag),
    }[name]()
    adjoint = deq.ImplicitJVP(deq.Picard(rtol=1e-11), linear=linear)
    assert adjoint == deq.ImplicitJVP(deq.Picard(rtol=1e-11), linear=linear)
    of = lambda w, probe: loss(w, x, adjoint, probe, f)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grad, probe = jax.grad(of, (0, 1))(w, deq.Probe.zeros((BATCH,)))
        tangent = jax.jvp(lambda w: of(w, None), (w,), (w,))[1]
    np.testing.assert_allclose(grad, dense_gradient(w, x, f), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(tangent, jnp.vdot(grad, w), rtol=1e-9)
    assert jnp.all(probe.status == Status.CONVERGED)


# ---- programs ----------------------------------------------------------------------------------------------


def test_an_eager_call_with_a_new_closure_compiles_nothing_new(problem, count_compilations):
    w, x = problem
    call = lambda w: jax.grad(lambda x: loss(w, x, deq.Implicit(preconditioner=lambda v: v @ w + v)))(x)
    call(w)
    other = w + 0.01
    with count_compilations() as compiled:
        call(other)
    assert compiled.count == 0
