"""A history in a narrower dtype than the vectors that are computed with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.adjoints.implicit import default_backward
from deq_jax.solvers import run_loop

NARROW = deq.Anderson(history_dtype="bfloat16")


def cell(z, a, b):
    return jnp.tanh((a @ z[..., None])[..., 0] + b)


def problem(dtype, gain=0.9, n=16, dim=24):
    rng = np.random.default_rng(0)
    a = gain * rng.normal(size=(n, dim, dim)) / dim**0.5
    return jnp.asarray(a, dtype), jnp.asarray(rng.normal(size=(n, dim)), dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "dtype, kept, rtol", [("float32", "bfloat16", 1e-5), ("float64", "float32", 1e-11), ("float64", jnp.bfloat16, 1e-9)]
)
def test_it_holds_half_and_what_it_reports_is_true(dtype, kept, rtol):
    a, b = problem(dtype)
    wide, narrow = deq.Anderson(rtol=rtol), deq.Anderson(rtol=rtol, history_dtype=kept)
    solve = lambda solver: deq.solve(cell, jnp.zeros_like(b), a, b, solver=solver, batch_ndim=1)
    full, half = solve(wide), solve(narrow)
    assert full.stats.converged.all() and half.stats.converged.all()
    assert half.memory.dw.dtype == half.memory.dg.dtype == jnp.dtype(kept) and half.memory.g.dtype == dtype
    assert np.mean(half.stats.steps) <= 1.1 * np.mean(full.stats.steps) + 0.5
    residual = jnp.linalg.norm(cell(half.value, a, b) - half.value, axis=-1)
    rounding = 4 * float(jnp.finfo(dtype).eps) * float(jnp.max(jnp.linalg.norm(half.value, axis=-1)))
    np.testing.assert_allclose(residual, half.stats.residual, rtol=1e-3, atol=rounding)
    assert jnp.all(half.stats.residual <= rtol * jnp.linalg.norm(cell(half.value, a, b), axis=-1))


@pytest.mark.usefixtures("x64")
def test_rounding_does_not_add_up():
    # Far more steps than the history has slots, and a solution to a part of what bfloat16 resolves.
    a, b = problem("float64", gain=0.6, dim=48)
    a = (a + jnp.swapaxes(a, -1, -2)) / 2**0.5 / 2
    f = lambda z, a, b: (a @ z[..., None])[..., 0] + b
    solver = deq.Anderson(history=3, rtol=1e-10, max_steps=400, history_dtype="bfloat16")
    stats = deq.solve(f, jnp.zeros_like(b), a, b, solver=solver, batch_ndim=1).stats
    assert stats.converged.all() and stats.steps.max() > 12


def test_gradients_inherit_it_and_are_those_of_a_wide_history():
    a, b = problem("float32")
    solve = lambda b, solver: deq.fixed_point(cell, jnp.zeros_like(b), a, b, solver=solver, batch_ndim=1)
    loss = lambda b, solver: jnp.sum(jnp.sin(solve(b, solver).value))
    wide, narrow = (jax.grad(loss)(b, deq.Anderson(rtol=1e-5, history_dtype=kept)) for kept in (None, "bfloat16"))
    np.testing.assert_allclose(narrow, wide, rtol=1e-3, atol=1e-4)
    assert default_backward(NARROW, jnp.zeros(3), 0).history_dtype == "bfloat16"


def test_it_unrolls_and_maps():
    a, b = problem("float32", n=3)
    unrolled = lambda b, kept: jnp.sum(
        deq.fixed_point(
            cell, jnp.zeros_like(b), a, b, batch_ndim=1, adjoint=deq.Unroll(),
            solver=deq.Anderson(max_steps=8, history_dtype=kept),
        ).value
    )  # fmt: skip
    np.testing.assert_allclose(jax.grad(unrolled)(b, "bfloat16"), jax.grad(unrolled)(b, None), rtol=0.05, atol=0.05)
    alone = jax.vmap(lambda a, b: deq.fixed_point(cell, jnp.zeros_like(b), a, b, solver=NARROW).stats.steps)(a, b)
    whole = deq.fixed_point(cell, jnp.zeros_like(b), a, b, solver=NARROW, batch_ndim=1).stats.steps
    np.testing.assert_array_equal(alone, whole)


def test_a_memory_is_resumed():
    a, b = problem("float32")
    first = run_loop(lambda z: cell(z, a, b), jnp.zeros_like(b), NARROW, 1)
    again = run_loop(lambda z: cell(z, a, b + 0.01), first.value, NARROW, 1, memory=first.memory)
    cold = run_loop(lambda z: cell(z, a, b + 0.01), first.value, NARROW, 1)
    assert again.stats.converged.all() and again.stats.steps.sum() < cold.stats.steps.sum()


@pytest.mark.parametrize(
    "value, error, words",
    [
        ("floaty", TypeError, r"Anderson.history_dtype must be a dtype of floats or None, got 'floaty'"),
        ("int32", ValueError, r"Anderson.history_dtype must be one of bfloat16, float32, float64, or None; got int32"),
        ("float16", ValueError, r"one of bfloat16, float32, float64, or None; got float16"),
    ],
)
def test_bad_input_is_named(value, error, words):
    with pytest.raises(error, match=words):
        deq.Anderson(history_dtype=value)


def test_one_that_is_wider_than_the_state_is_refused():
    with pytest.raises(ValueError, match="Anderson.history_dtype is float64, wider than the float32 in which"):
        deq.fixed_point(jnp.cos, jnp.zeros(3, jnp.float32), solver=deq.Anderson(history_dtype="float64"))
