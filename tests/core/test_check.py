"""`check` raises where a solve failed, eagerly and under jit, and says what failed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

SHORT = deq.Picard(max_steps=3)
GOOD = lambda z: 0.5 * jnp.cos(z)
cell = lambda z, gain: gain * z + 1.0


def test_a_solution_that_converged_comes_back_as_it_is():
    solution = deq.fixed_point(GOOD, jnp.zeros(2))
    assert deq.check(solution) is solution
    solved = deq.solve(GOOD, jnp.zeros(2))
    assert deq.check(solved) is solved


def test_the_floor_of_the_dtype_is_no_failure():
    solution = deq.fixed_point(GOOD, jnp.zeros(2))
    stalled = jnp.full_like(solution.stats.status, deq.Status.STALLED)
    solution = solution._replace(stats=solution.stats._replace(status=stalled))
    assert deq.check(solution) is solution


def test_one_problem():
    words = r"^the solve failed: MAX_STEPS after 3 evaluations, relative residual 0\.\d+; rtol is 0.0001, atol 0.0$"
    with pytest.raises(deq.SolveError, match=words):
        deq.check(deq.fixed_point(jnp.cos, jnp.zeros(2), solver=SHORT), SHORT)


def test_the_problems_of_a_batch_are_named():
    gain = jnp.array([[0.0, 3.0], [jnp.nan, 0.0]])[..., None]
    solution = deq.fixed_point(cell, jnp.zeros((2, 2, 1)), gain, solver=deq.Picard(max_steps=30), batch_ndim=2)
    words = (
        r"^2 of 4 solves failed; problem \[0, 1\]: (DIVERGED|MAX_STEPS) after 30 .*; problem \[1, 0\]: NONFINITE after"
    )
    with pytest.raises(deq.SolveError, match=words) as failed:
        deq.check(solution)
    assert "rtol" not in str(failed.value)


def test_a_long_list_is_cut():
    solution = deq.fixed_point(jnp.cos, jnp.zeros((9, 1)), solver=SHORT, batch_ndim=1)
    with pytest.raises(deq.SolveError, match=r"^9 of 9 solves failed; problem \[0\]:.*problem \[2\]:[^;]*; …$"):
        deq.check(solution)


def value(gain):
    return deq.check(deq.fixed_point(cell, jnp.zeros(()), gain, solver=deq.Picard(max_steps=60))).value


RUNS = {"jit": (value, ()), "grad": (jax.grad(value), ()), "vmap": (jax.vmap(value), (2,))}


@pytest.mark.parametrize(("run", "shape"), RUNS.values(), ids=RUNS.keys())
def test_under_jit_the_program_raises(run, shape):
    run = jax.jit(run)
    assert np.all(np.isfinite(run(jnp.full(shape, 0.5))))
    with pytest.raises(RuntimeError, match="the solve failed: DIVERGED after 60 evaluations"):
        jax.block_until_ready(run(jnp.full(shape, 1.5)))


def test_what_has_no_stats_is_refused():
    with pytest.raises(TypeError, match="check takes a result with stats.*got tuple"):
        deq.check((jnp.zeros(2), None))
