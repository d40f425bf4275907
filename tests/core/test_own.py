"""Solvers and adjoints of a user's own: plain classes, in every transform, refused where incomplete."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

cell = lambda z, a: 0.5 * jnp.cos(a * z)
A = jnp.array([0.3, 0.7, 1.1])


def value(a, adjoint, solver=deq.Anderson(rtol=1e-6), probe=None):  # noqa: B008
    return deq.fixed_point(cell, jnp.zeros(3), a, solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe).value


class OneStep:
    def pullback(self, problem, forward, z_bar):
        _, pull = jax.vjp(lambda inputs: problem(forward.z, inputs), problem.inputs)
        return pull(z_bar)[0], None


class OneStepBothWays(OneStep):
    def pushforward(self, problem, forward, inputs_dot):
        return jax.jvp(lambda inputs: problem(forward.z, inputs), (problem.inputs,), (inputs_dot,))[1]


class Keeps(OneStep):
    """The gradient is nothing but what was kept of the forward solve: how many updates the memory has seen."""

    def keep(self, problem, forward):
        assert problem.batch_ndim == 1 and isinstance(forward.solver, deq.Anderson)
        return forward._replace(solver=None)

    def pullback(self, problem, forward, z_bar):
        assert forward.solver is None
        seen = forward.memory.count.astype(jnp.float32)
        return jax.tree.map(lambda x: seen + 0 * x, problem.inputs), deq.Probe.unmeasured(7, z_bar, 1)


class Iterates:
    def run(self, problem, z0, solver):
        z = jax.lax.fori_loop(0, 30, lambda k, z: problem(z), z0)
        return z, problem.stats_at(z, solver, steps=30)


def jfb(a):
    return jax.grad(lambda a: value(a, deq.JFB()).sum())(a)


@pytest.mark.parametrize(
    "adjoint", [OneStep(), OneStepBothWays(), deq.config(OneStepBothWays)()], ids=["pullback", "both", "config"]
)
def test_an_adjoint_at_the_equilibrium(adjoint):
    grad = jax.grad(lambda a: value(a, adjoint).sum())
    np.testing.assert_array_equal(grad(A), jfb(A))
    np.testing.assert_allclose(jax.jit(grad)(A), jfb(A), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(grad)(A[None]), jfb(A)[None], rtol=1e-6)
    np.testing.assert_allclose(jax.lax.scan(lambda c, a: (c, grad(a)), 0, A[None])[1], jfb(A)[None], rtol=1e-6)


def test_an_adjoint_with_a_pushforward_has_forward_mode():
    of = lambda adjoint: jax.jacfwd(lambda a: value(a, adjoint))(A)
    np.testing.assert_allclose(of(OneStepBothWays()), of(deq.JFB()), rtol=1e-6)
    with pytest.raises(TypeError, match="this adjoint is for reverse mode"):
        of(OneStep())


def test_what_an_adjoint_keeps_and_reports():
    grad, probe = jax.grad(lambda a, p: value(a, Keeps(), probe=p).sum(), argnums=(0, 1))(A, deq.Probe.zeros((3,)))
    evaluations = int(
        deq.fixed_point(cell, jnp.zeros(3), A, solver=deq.Anderson(rtol=1e-6), batch_ndim=1).stats.steps.max()
    )
    assert grad.tolist() == [evaluations] * 3
    assert probe.steps.tolist() == [7.0] * 3
    unmeasured = jax.grad(lambda p: value(A, OneStep(), probe=p).sum())(deq.Probe.zeros((3,)))
    assert unmeasured.steps.tolist() == [0.0] * 3 and np.all(np.isinf(unmeasured.residual))


def test_an_adjoint_through_the_iterations():
    unrolled = lambda a: value(a, deq.Unroll(), deq.Picard(max_steps=30)).sum()
    for of in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(of(lambda a: value(a, Iterates()).sum())(A), of(unrolled)(A), rtol=1e-5)


def test_attach_takes_an_adjoint_of_ones_own():
    z = value(A, deq.JFB())
    attached = lambda a, adjoint: deq.attach(cell, z, a, adjoint=adjoint, batch_ndim=1).sum()
    np.testing.assert_array_equal(jax.grad(attached)(A, OneStep()), jax.grad(attached)(A, deq.JFB()))


class FirstEdition:
    """As it was written for the first edition: flat vectors, and a few optional members."""

    rtol, atol, max_steps = 1e-5, 0.0, 100
    patience = 20

    def init(self, z):
        return jnp.zeros_like(z)

    def resume(self, state):
        return state

    def update(self, residual, state, z):
        assert residual.ndim == 2 and residual.shape[-1] == 5
        return 0.9 * residual, state + jnp.abs(residual)


def test_a_solver_written_for_the_first_edition_still_runs():
    z0 = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 3))}
    f = lambda z, x: jax.tree.map(lambda leaf: 0.5 * jnp.cos(leaf) + x, z)
    options = dict(batch_ndim=1, solver=FirstEdition())
    solution = deq.check(deq.fixed_point(f, z0, jnp.float32(0.1), **options))
    reference = deq.fixed_point(f, z0, jnp.float32(0.1), solver=deq.Picard(rtol=1e-5, damping=0.9), batch_ndim=1)
    assert solution.stats.steps.tolist() == reference.stats.steps.tolist()
    loss = lambda x, adjoint: sum(
        leaf.sum() for leaf in jax.tree.leaves(deq.fixed_point(f, z0, x, adjoint=adjoint, **options)[0])
    )
    for wrap in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        exact = wrap(lambda x: loss(x, deq.Implicit()))(jnp.float32(0.1))
        with_own = wrap(lambda x: loss(x, deq.Implicit(FirstEdition())))(jnp.float32(0.1))
        np.testing.assert_allclose(exact, with_own, rtol=1e-4)
    result = deq.solve(f, z0, jnp.float32(0.1), **options)
    again = deq.solve(f, result.value, jnp.float32(0.1), memory=result.memory, **options)
    assert again.stats.steps.tolist() == [1] * 4


class Overflows(FirstEdition):
    scale_free = True
    max_steps = 20


def test_a_plain_class_may_be_scale_free_and_a_stage_of_robust():
    f = lambda z: 0.5 * z + 1e-30
    assert deq.fixed_point(f, jnp.zeros((1, 5)), solver=Overflows(), batch_ndim=1).stats.converged.all()
    robust = deq.Robust(stages=(FirstEdition(), deq.Broyden()))
    assert deq.fixed_point(f, jnp.zeros((1, 5)), solver=robust, batch_ndim=1).stats.converged.all()
    with pytest.raises(TypeError, match="compact: solver must be a pytree, as deq.config makes a class, got <"):
        deq.compact(f, jnp.zeros((3, 5)), axes=(), solver=FirstEdition())


def test_stats_of_iterations_are_those_of_the_value_they_return():
    solver = deq.Picard(rtol=1e-9)
    solution = deq.fixed_point(cell, jnp.zeros(3), A, adjoint=Iterates(), solver=solver, batch_ndim=1)
    np.testing.assert_array_equal(solution.stats.residual, jnp.abs(cell(solution.value, A) - solution.value))
    assert solution.stats.steps.tolist() == [31] * 3


def returning(result, name="pullback"):
    return type("Own", (OneStep,) if name == "pullback" else (), {name: lambda *_: result})()


@pytest.mark.parametrize(
    ("adjoint", "words"),
    [
        (returning(None), r"Own.pullback must return the cotangents of problem.inputs and a Probe or None; got None"),
        (returning([jnp.zeros(3)]), r"Own.pullback must return the cotangents of problem.inputs and a Probe"),
        (returning(((jnp.zeros(3),), None)), r"Own.pullback must return inputs_bar in the structure .*, got "),
        (
            returning(([jnp.zeros(2)], None)),
            r"Own.pullback must return inputs_bar\[0\] as float32\[3\], got float32\[2\]",
        ),
        (returning(([jnp.zeros(3, jnp.float16)], None)), r"as float32\[3\], got float16\[3\]"),
        (returning((jnp.zeros(2), None), "run"), r"Own.run must return z as float32\[3\], got float32\[2\]"),
        (type("Own", (OneStep,), {"keep": 3})(), r"adjoint: Own.keep must be a method of an adjoint, got 3"),
    ],
    ids=["none", "no pair", "structure", "shape", "dtype", "run", "reserved"],
)
def test_what_an_adjoint_returns_is_checked(adjoint, words):
    with pytest.raises((TypeError, ValueError), match=words):
        jax.grad(lambda a: value(a, adjoint).sum())(A)


def test_a_step_of_another_shape_is_refused():
    class Wrong(FirstEdition):
        def update(self, residual, state, z):
            return residual[:1], state

    with pytest.raises(ValueError, match=r"Wrong.update must return a step of the shape of z, \(2, 5\); got \(1, 5\)"):
        deq.fixed_point(lambda z: 0.5 * z, jnp.ones((2, 5)), solver=Wrong(), batch_ndim=1)


def without(cls, name):
    members = {k: v for k, v in vars(cls).items() if k != name and not k.startswith("__")}
    return type("Incomplete", (), members)()


@pytest.mark.parametrize("name", ["init", "rtol", "atol", "max_steps"])
def test_a_solver_that_lacks_a_member_is_refused_by_name(name):
    traced = []
    f = lambda z: traced.append(1) or 0.5 * z
    with pytest.raises(TypeError, match=rf"^solver must be a solver, and Incomplete has no {name}; a solver has init"):
        deq.fixed_point(f, jnp.ones(2), solver=without(FirstEdition, name))
    with pytest.raises(TypeError, match=rf"^Implicit.solver must be a solver, and Incomplete has no {name};"):
        deq.Implicit(without(FirstEdition, name))
    assert not traced


@pytest.mark.parametrize(
    "adjoint", [without(OneStep, "pullback"), OneStep, object(), None], ids=["incomplete", "class", "object", "None"]
)
def test_an_adjoint_without_a_method_is_refused_by_name(adjoint):
    traced = []
    f = lambda z: traced.append(1) or 0.5 * z
    words = (
        r"^adjoint must be an adjoint such as Implicit\(\), got .*; an adjoint has pullback\(problem, forward, z_bar\)"
    )
    with pytest.raises(TypeError, match=words):
        deq.fixed_point(f, jnp.ones(2), adjoint=adjoint)
    assert not traced


def test_progress_is_a_fold_of_a_few_lines(capfd):
    class Progress:
        def init(self, z0, batch_ndim):
            return ()

        def update(self, folded, seen):
            jax.debug.print("{} {:.0e}", seen.step, seen.relative_residual)
            return folded

    solution = deq.solve(lambda z: 0.5 * jnp.cos(z), 0.0, solver=deq.Picard(), fold=Progress())
    jax.effects_barrier()
    lines = capfd.readouterr().out.split("\n")
    assert lines[0] == "0 1e+00" and len(lines) - 1 == int(solution.stats.steps)


def test_a_profile_names_f_the_solver_and_the_backward_solve():
    options = dict(solver=deq.Broyden(), adjoint=deq.Implicit(deq.Anderson()))
    grad = jax.jit(jax.grad(lambda a: deq.fixed_point(cell, jnp.zeros(3), a, **options).value.sum()))
    text = grad.lower(A).compile().as_text()
    for name in (
        "while/body/f",
        "while/body/Broyden",
        "backward_solve.*while/body/f",
        "backward_solve.*while/body/Anderson",
    ):
        assert re.search(f'op_name="[^"]*{name}', text), name
