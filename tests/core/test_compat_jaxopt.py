"""jaxopt's interfaces over this library. jaxopt's own tests: `python -m experiments.studies.jaxopt_tests CHECKOUT`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.compat import jaxopt
from experiments.studies import jaxopt_tests

pytestmark = pytest.mark.usefixtures("promotes", "x64")


def cell(x, a, *, shift=0.0):
    return {"u": jnp.cos(a * x["u"]) + shift, "v": 0.5 * x["v"] + x["u"]}


def start():
    return {"u": jnp.full(3, 0.5), "v": jnp.zeros(3)}


A = np.array([0.5, 0.8, 1.0])  # a NumPy array: the fixture x64 does not reach what a module makes
SOLVERS = {
    "picard": jaxopt.FixedPointIteration(cell, maxiter=200, tol=1e-9),
    "anderson": jaxopt.AndersonAcceleration(cell, tol=1e-9),
    "mixing": jaxopt.AndersonAcceleration(cell, tol=1e-9, mixing_frequency=3),
    "broyden": jaxopt.Broyden(lambda x, a, shift=0.0: subtract(cell(x, a, shift=shift), x), tol=1e-9, gamma=-1),
}


def subtract(a, b):
    return jax.tree.map(jnp.subtract, a, b)


@pytest.mark.parametrize("name", SOLVERS)
def test_run_finds_the_solution_and_its_derivative(name):
    solver = SOLVERS[name]
    params, state = solver.run(start(), A, shift=0.1)
    error = solver.l2_optimality_error(params, A, shift=0.1)
    assert state.status == deq.Status.CONVERGED and state.iter_num < 200
    np.testing.assert_allclose(state.error, error, rtol=1e-5, atol=1e-15)
    assert error <= 1e-9
    loss = lambda a, shift: jnp.sum(solver.run(start(), a, shift=shift).params["v"] ** 2)
    exact = lambda a, shift: jnp.sum(
        deq.fixed_point(functools.partial(cell, shift=shift), start(), a, solver=deq.Anderson(rtol=1e-12)).value["v"]
        ** 2
    )
    for got, want in zip(jax.grad(loss, (0, 1))(A, 0.1), jax.grad(exact, (0, 1))(A, 0.1), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("jit", [True, False])
def test_steps_by_hand_and_a_loop_in_python_lead_to_the_same(name, jit):
    solver = SOLVERS[name]
    kind, options = type(solver), dict(vars(solver))
    options.pop("unit", None)
    function = solver.function
    options = {k: v for k, v in options.items() if k not in ("fixed_point_fun", "fun")} | {"jit": jit}
    again = kind(function, **options)
    params, state = start(), again.init_state(start(), A)
    while state.error > 1e-9:
        params, state = again.update(params, state, A)
    assert state.iter_num < 200
    for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(again.run(start(), A).params), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-7)


def test_a_function_that_jax_cannot_trace_is_iterated_without_jit():
    solver = jaxopt.AndersonAcceleration(lambda x: np.cos(np.asarray(x)), jit=False, tol=1e-10)
    assert abs(solver.run(jnp.array([0.3])).params[0] - 0.7390851332151607) < 1e-9


def test_derivatives_of_the_iterations():
    solver = jaxopt.FixedPointIteration(lambda x, a: jnp.cos(a * x), maxiter=80, tol=0.0, implicit_diff=False)
    implicit = jaxopt.FixedPointIteration(lambda x, a: jnp.cos(a * x), maxiter=200, tol=1e-12)
    slopes = [jax.grad(lambda a, s=s: s.run(jnp.array(0.5), a).params)(0.9) for s in (solver, implicit)]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


@pytest.mark.parametrize("kind", [jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration, jaxopt.Broyden])
def test_aux_is_that_of_the_solution(kind):
    sign = -1 if kind is jaxopt.Broyden else 1
    fun = lambda x, a: (jnp.cos(a * x) - (x if sign < 0 else 0), {"square": x**2})
    params, state = kind(fun, has_aux=True, tol=1e-8).run(jnp.array([0.5]), 1.0)
    np.testing.assert_allclose(state.aux["square"], params**2)


def test_progress_is_reported(capfd):
    jaxopt.FixedPointIteration(lambda x: 0.1 * jnp.cos(x), verbose=True).run(jnp.array(0.0))
    jax.effects_barrier()
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("INFO: FixedPointIteration: Iter: 1 Error") and len(lines) == 3


# ---- implicit differentiation ------------------------------------------------------------------------------


def condition(n=300):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    return jnp.asarray((q * np.geomspace(1e-4, 1, n)) @ q.T)


def test_a_symmetric_root_of_condition_10000_by_conjugate_gradients():
    matrix = condition()
    conjugate = lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-12, maxiter=5000)[0]
    decorate = jaxopt.custom_root(lambda x, b: matrix @ x - b, solve=conjugate)
    root = decorate(lambda init, b: jnp.linalg.solve(matrix, b))
    b = jnp.ones(len(matrix))
    slope = jax.grad(lambda b: jnp.sum(jnp.sin(root(None, b))))(b)
    want = jnp.linalg.solve(matrix, jnp.cos(jnp.linalg.solve(matrix, b)))
    assert np.linalg.norm(slope - want) <= 1e-6 * np.linalg.norm(want)


def squares(x, data, *, weight=1.0):
    matrix, y = data
    return jnp.mean((matrix @ x - y) ** 2) + weight * jnp.sum(x**2)


def exactly(init, data, weight=1.0):
    matrix, y = data
    return jnp.linalg.solve(matrix.T @ matrix + len(y) * weight * jnp.eye(matrix.shape[1]), matrix.T @ y)


def data():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=8))


def test_arguments_by_name_are_bound_by_a_reference():
    optimality = lambda x, data, weight: jax.grad(squares)(x, data, weight=weight)
    root = jaxopt.custom_root(optimality)(lambda init, **named: exactly(init, **named))
    got = jax.jacrev(lambda w: root(None, weight=w, data=data()))(0.7)
    np.testing.assert_allclose(got, jax.jacrev(lambda w: exactly(None, data(), w))(0.7), rtol=1e-4)
    catch_all = lambda x, **named: optimality(x, **named)
    named = jaxopt.custom_root(catch_all, reference_signature=optimality)(exactly)
    with pytest.raises(TypeError, match=r"unexpected|positional"):
        jax.grad(lambda w: jnp.sum(named(None, data=data(), weight=w)))(0.7)
    with pytest.raises(TypeError, match=r"\['data', 'weight'\] have no position in the signature \(x, \*\*named\)"):
        unbound = jaxopt.custom_root(catch_all)(lambda init, **named: exactly(init, **named))
        jax.grad(lambda w: jnp.sum(unbound(None, data=data(), weight=w)))(0.7)


def test_products_at_a_root():
    optimality = lambda x, matrix, y: jax.grad(squares)(x, (matrix, y))
    matrix, y = data()
    sol, (dot, bar) = exactly(None, (matrix, y)), (jnp.ones(8), jnp.arange(3.0))
    pushed = jaxopt.root_jvp(optimality, sol, (matrix, y), (jnp.zeros_like(matrix), dot))
    np.testing.assert_allclose(pushed, jax.jvp(lambda y: exactly(None, (matrix, y)), (y,), (dot,))[1], rtol=1e-4)
    _, pulled = jaxopt.root_vjp(optimality, sol, (matrix, y), bar)
    np.testing.assert_allclose(pulled, jax.vjp(lambda y: exactly(None, (matrix, y)), y)[1](bar)[0], rtol=1e-4)
    with pytest.raises(ValueError, match="got 2 and 1"):
        jaxopt.root_jvp(optimality, sol, (matrix, y), (dot,))


def test_a_fixed_point_found_elsewhere_with_aux():
    decorate = jaxopt.custom_fixed_point(lambda x, a: 0.5 * (x + a / x), has_aux=True)
    root = decorate(lambda init, a: (jnp.sqrt(a), "found"))
    slope, aux = jax.grad(root, argnums=1, has_aux=True)(None, 4.0)
    np.testing.assert_allclose(slope, 0.25, rtol=1e-6)
    assert aux == "found"


# ---- a solver that is wrapped ------------------------------------------------------------------------------


class Inner(NamedTuple):
    error: Any
    velocity: Any


class Descent:
    """Gradient descent with momentum on a quadratic, with jaxopt's interface."""

    maxiter, tol = 400, 1e-6

    def optimality_fun(self, x, b):
        return jnp.array([1.0, 5.0, 30.0]) * x - b

    reference_signature = staticmethod(lambda x, b: None)

    def init_state(self, x, b):
        return Inner(jnp.asarray(jnp.inf), jnp.zeros_like(x))

    def update(self, x, state, b):
        gradient = self.optimality_fun(x, b)
        velocity = 0.5 * state.velocity - 0.02 * gradient
        return x + velocity, Inner(jnp.linalg.norm(gradient), velocity)


@pytest.mark.parametrize("frequency", [None, 1, 4])
def test_a_wrapped_solver_is_faster_and_differentiable(frequency):
    inner, b = Descent(), jnp.ones(3)
    alone, x, state = 0, jnp.zeros(3), inner.init_state(jnp.zeros(3), b)
    while state.error > inner.tol:
        (x, state), alone = inner.update(x, state, b), alone + 1
    wrapper = jaxopt.AndersonWrapper(inner, history_size=5, mixing_frequency=frequency)
    params, found = wrapper.run(jnp.zeros(3), b)
    assert found.error <= inner.tol and 3 * found.iter_num < alone
    np.testing.assert_allclose(params, b / jnp.array([1.0, 5.0, 30.0]), rtol=1e-5)
    slope = jax.jacrev(lambda b: wrapper.run(jnp.zeros(3), b).params)(b)
    np.testing.assert_allclose(slope, jnp.diag(1 / jnp.array([1.0, 5.0, 30.0])), rtol=1e-4, atol=1e-6)


def test_rules_for_the_step_are_refused():
    with pytest.raises(ValueError, match=r"Broyden.stepsize must be a number, got <function"):
        jaxopt.Broyden(lambda x: x, stepsize=lambda k: 0.1)


# ---- the script that runs jaxopt's tests -------------------------------------------------------------------


def test_imports_are_changed():
    text = "import jaxopt\nfrom jaxopt import Broyden\nfrom jaxopt import implicit_diff as idf\njaxopt.Broyden(f)\n"
    assert jaxopt_tests.changed(text).splitlines() == [
        "import jaxopt",
        "import deq_jax.compat.jaxopt",
        "from deq_jax.compat.jaxopt import Broyden",
        "from deq_jax.compat import jaxopt as idf",
        "deq_jax.compat.jaxopt.Broyden(f)",
    ]


def test_a_path_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no checkout of jaxopt: .* has no fixed_point_iteration_test.py"):
        jaxopt_tests.main(jaxopt_tests.Config(tmp_path))
