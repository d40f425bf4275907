"""What one solve hands to another: a memory or a result that does not fit is named, before anything is traced."""

import jax
import jax.numpy as jnp
import pytest

import deq_jax as deq

pytestmark = pytest.mark.usefixtures("quick_compile")

cell = lambda z: 0.5 * jnp.tanh(z) + 0.1
BROYDEN = deq.Broyden(rank=3)


def solved(solver=BROYDEN, shape=(2, 6), batch_ndim=1, dtype=jnp.float32):
    return deq.solve(cell, jnp.zeros(shape, dtype), solver=solver, batch_ndim=batch_ndim)


OTHERS = {
    "another solver": (dict(solver=deq.Picard()), TypeError, "memory must be the memory of a Broyden, BroydenState"),
    "a richer one": (dict(solver=deq.Robust()), TypeError, "memory must be the memory of a Broyden, BroydenState"),
    "another rank": (
        dict(solver=deq.Broyden(rank=2)),
        ValueError,
        r"memory\.steps must have shape \(2, 4, 6\), got \(2, 3",
    ),
    "another batch": (dict(shape=(3, 6)), ValueError, r"memory\.z must have shape \(2, 6\), got \(3, 6\)"),
    "no batch": (dict(batch_ndim=0), ValueError, r"memory\.z must have shape \(2, 6\), got \(12,\)"),
    "another size": (dict(shape=(2, 5)), ValueError, r"memory\.z must have shape \(2, 6\), got \(2, 5\)"),
}


@pytest.mark.parametrize(("options", "error", "words"), OTHERS.values(), ids=OTHERS)
def test_a_memory_of_another_solve_is_an_error(options, error, words):
    memory = solved(**options).memory
    for wrap in (lambda f: f, jax.jit):
        again = lambda memory: deq.solve(cell, jnp.zeros((2, 6)), solver=BROYDEN, batch_ndim=1, memory=memory)
        with pytest.raises(error, match=words):
            wrap(again)(memory)


def test_a_memory_of_another_dtype_is_an_error(x64):
    memory = solved(dtype=jnp.float64).memory
    with pytest.raises(TypeError, match=r"memory\.z must have dtype float32, got float64"):
        deq.solve(cell, jnp.zeros((2, 6), jnp.float32), solver=BROYDEN, batch_ndim=1, memory=memory)


def test_what_is_no_memory_is_an_error():
    with pytest.raises(TypeError, match="memory must be the memory of a Anderson, AndersonState.*got SolveResult of"):
        deq.solve(cell, jnp.zeros(3), memory=deq.solve(cell, jnp.zeros(3)))
    with pytest.raises(TypeError, match="got str of 1 array"):
        deq.solve(cell, jnp.zeros(3), memory="warm")


SOLVERS = [
    deq.Picard(),
    deq.Anderson(),
    deq.Anderson(ridge=1e-6, rtol=jnp.float32(1e-3)),
    BROYDEN,
    deq.NewtonKrylov(),
    deq.Robust(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=[f"{i}-{type(s).__name__}" for i, s in enumerate(SOLVERS)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64], ids=lambda dtype: dtype.__name__)
def test_its_own_memory_fits_every_solver(solver, dtype):
    z0 = {"a": jnp.zeros((2, 3), dtype), "b": jnp.ones((2, 1), jnp.float32)}
    f = lambda z: {"a": 0.5 * z["a"] + jnp.asarray(0.1, dtype), "b": 0.3 * z["b"]}
    run = jax.jit(lambda memory: deq.solve(f, z0, solver=solver, batch_ndim=1, memory=memory))
    assert (run(run(None).memory).stats.relative_residual < 1e-2).all()


def attached(found, z=jnp.zeros((2, 6)), adjoint=deq.Shine(), solver=BROYDEN, batch_ndim=1):
    return deq.attach(
        lambda z, a: a * cell(z), z, 1.0, adjoint=adjoint, solver=solver, found=found, batch_ndim=batch_ndim
    )


FOUND = {
    "no solve": (lambda: "a solve", TypeError, "found must be what solve returns"),
    "only its memory": (lambda: solved().memory, TypeError, "found must be what solve returns"),
    "another batch": (
        lambda: solved(shape=(3, 6)),
        ValueError,
        r"found.value must have shape \(2, 6\) as z has, got \(3, 6",
    ),
    "no batch": (
        lambda: solved(batch_ndim=0),
        ValueError,
        r"batch_ndim=1, found.stats.status must have shape \(2,\), got",
    ),
    "another solver": (lambda: solved(deq.Anderson()), TypeError, "found.memory must be the memory of a Broyden"),
    "another rank": (
        lambda: solved(deq.Broyden(rank=2)),
        ValueError,
        r"found.memory.steps must have shape \(2, 4, 6\)",
    ),
    "another state": (lambda: solved()._replace(value=[0.0]), TypeError, "found.value must have the structure of z"),
}


@pytest.mark.parametrize(("found", "error", "words"), FOUND.values(), ids=FOUND)
def test_a_result_of_another_solve_is_an_error(found, error, words):
    with pytest.raises(error, match=words):
        attached(found())


def test_an_adjoint_that_reads_no_memory_takes_any_solvers_result():
    found = solved(deq.Anderson())
    assert attached(found, adjoint=deq.Implicit(on_failure=deq.OnFailure.ZERO)).shape == (2, 6)
    assert attached(solved(), solver=deq.Broyden(rank=3, rtol=1e-6)).shape == (2, 6)
