"""The entry point: states of any structure, caching that cannot go stale, memory, and configuration objects."""

import contextlib
import copy
import dataclasses
import pickle
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import Status

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICK = deq.Picard(rtol=1e-6)  # the cheapest to compile, where the solver is not the subject
BACK = deq.Implicit(QUICK)


# ---- states of any structure -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [QUICK, deq.Anderson(history=3), deq.Broyden(rank=6)], ids=repr)
def test_states_of_any_structure(x64, solver):
    z0 = {"a": (jnp.zeros((2, 3)), [jnp.zeros((2,))]), "none": None, "b": jnp.zeros((2, 1, 2))}
    f = lambda z: jax.tree.map(lambda leaf: jnp.cos(leaf) * 0.5 + 0.25, z)
    z, stats = deq.fixed_point(f, z0, solver=solver, batch_ndim=1)
    assert jax.tree.structure(z) == jax.tree.structure(z0)
    assert [leaf.shape for leaf in jax.tree.leaves(z)] == [leaf.shape for leaf in jax.tree.leaves(z0)]
    assert stats.steps.shape == (2,) and jnp.all(stats.converged)
    for leaf in jax.tree.leaves(z):
        np.testing.assert_allclose(leaf, 0.5 * jnp.cos(leaf) + 0.25, rtol=1e-3)


@pytest.mark.parametrize("shape, batch_ndim", [((), 0), ((1,), 0), ((1,), 1), ((3,), 1), ((2, 3), 2), ((2, 3), 0)])
def test_shapes_of_stats(shape, batch_ndim):
    z, stats = deq.fixed_point(jnp.cos, jnp.zeros(shape), solver=QUICK, batch_ndim=batch_ndim)
    assert z.shape == shape
    assert {leaf.shape for leaf in jax.tree.leaves(stats)} == {shape[:batch_ndim]}
    assert stats.steps.dtype == jnp.int32 and stats.residual.dtype == jnp.float32
    assert jnp.issubdtype(stats.status.dtype, jnp.integer) and stats.converged.dtype == bool


@pytest.mark.full_compile
def test_defaults():
    solution = deq.fixed_point(jnp.cos, jnp.zeros(2))
    assert type(solution) is deq.Solution and solution._fields == ("value", "stats")
    assert solution.stats.status == Status.CONVERGED and solution.stats.steps < 10
    np.testing.assert_allclose(solution.value, 0.739085, rtol=1e-3)
    with_aux = deq.fixed_point(lambda z: (jnp.cos(z), 2 * z), jnp.zeros(2), solver=QUICK, has_aux=True)
    assert with_aux._fields == ("value", "stats", "aux")
    np.testing.assert_array_equal(with_aux.aux, 2 * with_aux.value)


# ---- caching -----------------------------------------------------------------------------------------------

SHIFT = 1.0
WEIGHT = np.full(3, 0.5, np.float32)


def counted_cell(z, x):
    return 0.5 * jnp.cos(z) + x


@contextlib.contextmanager
def python_calls(f):
    """A list with an entry for each run of f's Python, which is left as it is: what f reads decides on caching."""
    calls, before = [], sys.getprofile()
    sys.setprofile(lambda frame, event, _: calls.append(1) if event == "call" and frame.f_code is f.__code__ else None)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def plain_cell(z):
    return 0.5 * z + SHIFT


def array_cell(z):
    return WEIGHT * z + 1


def helper(z):
    return 0.5 * z + 1


def helped_cell(z):
    return helper(z)


def defaults_cell(z, shift=1.0):
    return 0.5 * z + shift


def run(f, *args, **options):
    return deq.fixed_point(f, jnp.zeros(3), *args, **({"solver": QUICK, "adjoint": BACK} | options)).value


def test_a_second_eager_call_traces_f_once_and_compiles_nothing(count_compilations):
    run(counted_cell, 2 * jnp.ones(3), solver=deq.Picard(max_steps=90))
    x, tight, loose = jnp.ones(3), deq.Picard(max_steps=90), deq.Picard(rtol=1e-2, damping=0.5, max_steps=90)
    with python_calls(counted_cell) as calls, count_compilations() as compiled:
        run(counted_cell, x, solver=tight)
        run(counted_cell, x, solver=loose)
    assert len(calls) == 2 and compiled.count == 0
    with count_compilations() as compiled:
        run(counted_cell, x, solver=deq.Picard(max_steps=91))  # an int is structure
    assert compiled.count == 1


def test_a_swept_tolerance_still_has_its_effect():
    tight, loose = (
        deq.fixed_point(counted_cell, jnp.zeros(3), jnp.ones(3), solver=deq.Picard(rtol=rtol)).stats.steps
        for rtol in (1e-6, 1e-1)
    )
    assert loose < tight


@pytest.mark.full_compile
def test_a_second_eager_gradient_traces_f_once_and_compiles_nothing(count_compilations):
    grad = jax.grad(lambda x: run(counted_cell, x).sum())
    x = jnp.ones(3)
    want = grad(x)
    with python_calls(counted_cell) as calls, count_compilations() as compiled:
        np.testing.assert_array_equal(grad(x), want)
    assert len(calls) == 1 and compiled.count == 0


def test_a_changed_global_number_is_seen(monkeypatch):
    np.testing.assert_allclose(run(plain_cell), 2, rtol=1e-5)
    monkeypatch.setattr(f"{__name__}.SHIFT", 2.0)
    np.testing.assert_allclose(run(plain_cell), 4, rtol=1e-5)
    monkeypatch.setattr(f"{__name__}.SHIFT", np.full(3, 3.0, np.float32))
    np.testing.assert_allclose(run(plain_cell), 6, rtol=1e-5)


def test_a_global_array_changed_in_place_is_seen():
    np.testing.assert_allclose(run(array_cell), 2, rtol=1e-5)
    WEIGHT[:] = 0.75
    try:
        np.testing.assert_allclose(run(array_cell), 4, rtol=1e-5)
    finally:
        WEIGHT[:] = 0.5


def test_a_redefined_helper_is_seen(monkeypatch):
    np.testing.assert_allclose(run(helped_cell), 2, rtol=1e-5)
    monkeypatch.setattr(f"{__name__}.helper", lambda z: 0.5 * z + 2)
    np.testing.assert_allclose(run(helped_cell), 4, rtol=1e-5)


def test_a_changed_default_is_seen(monkeypatch):
    np.testing.assert_allclose(run(defaults_cell), 2, rtol=1e-5)
    monkeypatch.setattr(defaults_cell, "__defaults__", (2.0,))
    np.testing.assert_allclose(run(defaults_cell), 4, rtol=1e-5)


def test_changed_code_is_seen(monkeypatch):
    def target(z):
        return 0.5 * z + 1

    np.testing.assert_allclose(run(target), 2, rtol=1e-5)
    monkeypatch.setattr(target, "__code__", (lambda z: 0.5 * z + 2).__code__)
    np.testing.assert_allclose(run(target), 4, rtol=1e-5)


class Weights:
    shift = 1.0


def class_cell(z):
    return 0.5 * z + Weights.shift


elsewhere = types.ModuleType("elsewhere")
elsewhere.shift = 1.0


def module_cell(z):
    return 0.5 * z + elsewhere.shift


@pytest.mark.parametrize("cell, owner", [(class_cell, Weights), (module_cell, elsewhere)], ids=["class", "module"])
def test_a_changed_attribute_of_a_global_class_or_module_is_seen(monkeypatch, cell, owner):
    np.testing.assert_allclose(run(cell), 2, rtol=1e-5)
    monkeypatch.setattr(owner, "shift", 2.0)
    np.testing.assert_allclose(run(cell), 4, rtol=1e-5)


def test_a_changed_closure_is_seen():
    box = {"shift": jnp.ones(3)}
    f = lambda z: 0.5 * z + box["shift"]
    np.testing.assert_allclose(run(f), 2, rtol=1e-5)
    box["shift"] = 2 * jnp.ones(3)
    np.testing.assert_allclose(run(f), 4, rtol=1e-5)


def test_an_object_changed_in_place_is_seen():
    class Cell:
        shift = 1.0

        def __call__(self, z):
            return 0.5 * z + self.shift

    one, other = Cell(), Cell()
    for cell, owner in ((one, one), (other.__call__, other)):
        np.testing.assert_allclose(run(cell), 2, rtol=1e-5)
        owner.shift = 2.0
        np.testing.assert_allclose(run(cell), 4, rtol=1e-5)


def test_a_mode_of_jax_is_seen(request):
    assert run(plain_cell).dtype == jnp.float32
    request.getfixturevalue("x64")
    assert run(plain_cell).dtype == jnp.float64


def test_sweeps_inside_one_compiled_function(count_traces):
    f = count_traces(lambda z: 0.9 * jnp.cos(z))

    @jax.jit
    def solve(rtol, damping, max_steps):
        solver = deq.Picard(rtol=rtol, damping=damping, max_steps=max_steps)
        return deq.fixed_point(f, jnp.zeros(3), solver=solver).stats

    solve(1e-3, 1.0, jnp.asarray(100))
    traces = f.traces
    assert solve(1e-1, 1.0, jnp.asarray(100)).steps < solve(1e-6, 1.0, jnp.asarray(100)).steps
    assert solve(1e-6, 1.0, jnp.asarray(4)).steps == 4
    assert solve(1e-6, 0.1, jnp.asarray(100)).steps > 60
    assert f.traces == traces


@pytest.mark.parametrize("Solver", [deq.Anderson, deq.Broyden])
def test_accelerated_solvers_take_traced_numbers(Solver):
    @jax.jit
    def solve(solver):
        return deq.fixed_point(jnp.cos, jnp.zeros(3), solver=solver, adjoint=deq.JFB()).stats

    small = {"history": 2} if Solver is deq.Anderson else {"rank": 2}
    for rtol in (1e-2, 1e-5):
        assert solve(Solver(rtol=rtol, max_steps=jnp.asarray(50), **small)).converged
    assert solve(Solver(rtol=1e-5, max_steps=jnp.asarray(2), **small)).steps == 2
    assert solve._cache_size() == 1


def test_a_swept_backward_tolerance_changes_the_gradient_not_the_program(x64):
    @jax.jit
    def x_bar(x, rtol):
        adjoint = deq.Implicit(deq.Picard(rtol=rtol, max_steps=jnp.asarray(200)))
        solver = deq.Picard(rtol=1e-13, max_steps=200)
        return jax.grad(
            lambda x: deq.fixed_point(lambda z, x: jnp.cos(z) * x, 0.0, x, solver=solver, adjoint=adjoint).value
        )(x)

    z = deq.fixed_point(lambda z: jnp.cos(z) * 0.9, 0.0, solver=deq.Picard(rtol=1e-14)).value
    exact = jnp.cos(z) / (1 + 0.9 * jnp.sin(z))
    assert abs(x_bar(0.9, 1e-13) - exact) < 1e-11 < 1e-4 < abs(x_bar(0.9, 1e-1) - exact)
    assert x_bar._cache_size() == 1


def test_an_absolute_tolerance_of_leaves_in_two_dtypes_is_passed_on_to_the_backward_solve(x64):
    solver = deq.Picard(rtol=0.0, atol=1e-5, max_steps=200)

    def loss(x):
        z0 = {"single": jnp.zeros(2, jnp.float32), "double": jnp.zeros(3)}
        return (
            deq.fixed_point(
                lambda z: jax.tree.map(lambda leaf: (0.9 * jnp.cos(leaf) + x).astype(leaf.dtype), z), z0, solver=solver
            )
            .value["double"]
            .sum()
        )

    z = deq.fixed_point(lambda z: 0.9 * jnp.cos(z) + 0.5, 0.0, solver=deq.Picard(rtol=1e-14, max_steps=500)).value
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), 3 / (1 + 0.9 * jnp.sin(z)), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_a_swept_damping_of_phantom_is_of_the_precision_of_the_state(x64, dtype):
    def gradient(w, damping):
        f = lambda z, w: 0.5 * jnp.sin(w * z) + w
        loss = lambda w: deq.fixed_point(f, jnp.zeros(3, dtype), w, adjoint=deq.Phantom(3, damping)).value.real.sum()
        return jax.grad(loss)(w)

    w = jnp.asarray(0.5, dtype)
    swept, fixed = jax.jit(gradient)(w, jnp.float32(0.25)), jax.jit(lambda w: gradient(w, 0.25))(w)
    assert swept.dtype == w.dtype and swept != 0
    np.testing.assert_array_equal(swept, fixed)


@pytest.mark.full_compile
def test_one_solver_object_in_two_threads_and_two_shapes():
    solver, adjoint = deq.Broyden(rank=2), deq.Implicit(deq.Picard())
    pull = lambda x: jax.grad(
        lambda x: deq.fixed_point(counted_cell, jnp.zeros_like(x), x, solver=solver, adjoint=adjoint).value.sum()
    )(x)
    inputs = [jnp.linspace(0.0, 1.0, n) for n in (2, 5, 2, 5)]
    alone, together = [pull(x) for x in inputs], [None] * 4

    def work(i):
        together[i] = pull(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.full_compile
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden"])
def test_memory_does_not_grow_with_depth(name):
    make = {
        "picard": deq.Picard,
        "anderson": lambda **options: deq.Anderson(history=3, **options),
        "broyden": lambda **options: deq.Broyden(rank=20, **options),  # more than the smaller budget
    }[name]

    def temporaries(max_steps):
        solver = make(max_steps=max_steps)

        def loss(w):
            z = deq.fixed_point(
                lambda z, w: jnp.tanh(z @ w), jnp.ones((16, 64)), w, solver=solver, adjoint=deq.Implicit(solver)
            )
            return z.value.sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.eye(64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    shallow, deep = temporaries(10), temporaries(1000)
    assert shallow > 0
    assert abs(deep - shallow) <= 0.01 * shallow


@pytest.mark.full_compile
def test_the_parameters_linearization_is_not_kept_through_the_backward_solve(monkeypatch):
    """Jᵀv needs one activation of the hidden layer, the parameters' pullback another one."""
    params = {"up": jnp.ones((16, 512)), "down": jnp.ones((512, 16))}

    def temporaries():
        cell = lambda z, p: jnp.tanh(jax.nn.gelu(z @ p["up"]) @ p["down"])  # a new one: traces are kept by function
        solver = deq.Anderson(history=3)
        options = dict(solver=solver, adjoint=deq.Implicit(solver), batch_ndim=1)
        loss = lambda p: deq.fixed_point(cell, jnp.ones((64, 8, 16)), p, **options).value.sum()
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    recomputed = temporaries()
    monkeypatch.setattr("deq_jax.adjoints.backward.after", lambda z, u, stats: z)
    hidden = 64 * 8 * 512 * 4
    assert recomputed < temporaries() - 0.5 * hidden


@pytest.mark.full_compile
def test_checkpoints_save_memory_of_an_unroll():
    def temporaries(checkpoint):
        def loss(w):
            solver, adjoint = deq.Picard(max_steps=100), deq.Unroll(checkpoint)
            f = lambda z, w: jnp.tanh(jnp.sin(z @ w))
            return deq.fixed_point(f, jnp.ones((64, 64)), w, solver=solver, adjoint=adjoint).value.sum()

        return jax.jit(jax.grad(loss)).lower(jnp.eye(64)).compile().memory_analysis().temp_size_in_bytes

    plain, every, root = temporaries(None), temporaries(1), temporaries(10)
    assert root < 0.4 * plain and every < 0.8 * plain


# ---- configuration objects ---------------------------------------------------------------------------------

OBJECTS = [
    deq.Picard(rtol=1e-5),
    deq.Anderson(history=4, ridge=1e-9, damping=0.9),
    deq.Broyden(rank=7, max_steps=3),
    deq.NewtonKrylov(krylov=5),
    deq.Robust(rtol=1e-3, stages=(deq.Anderson(), deq.Broyden(rank=4)), stall=(9,)),
    deq.Implicit(),
    deq.Implicit(deq.Broyden(rank=3)),
    deq.Phantom(steps=2, damping=0.25),
    deq.Neumann(terms=3),
    deq.JFB(),
    deq.Unroll(checkpoint=4),
    deq.Unroll(checkpoint=True, stop=True),
    deq.ImplicitJVP(deq.Broyden(rank=3)),
    deq.Implicit(on_failure=deq.OnFailure.ZERO),
    deq.Reversible(0.3),
    deq.Shine(refine=2),
]


@pytest.mark.parametrize("thing", OBJECTS, ids=repr)
def test_configuration_objects_are_values(thing):
    namespace = {name: getattr(deq, name) for name in deq.__all__}
    copies = [
        eval(repr(thing), namespace),
        pickle.loads(pickle.dumps(thing)),
        copy.deepcopy(thing),
        dataclasses.replace(thing),
        jax.tree.unflatten(*reversed(jax.tree.flatten(thing))),
        jax.tree.map(lambda leaf: leaf, thing),
    ]
    for other in copies:
        assert other == thing and hash(other) == hash(thing) and repr(other) == repr(thing)
        assert type(other) is type(thing)
    assert all(thing != other for other in OBJECTS if other is not thing)
    for field in dataclasses.fields(thing):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field.name, 1)


def test_replace_changes_one_field():
    solver = dataclasses.replace(deq.Anderson(history=4), rtol=1e-2)
    assert solver == deq.Anderson(history=4, rtol=1e-2) != deq.Anderson(history=4)


def test_floats_are_leaves_and_ints_are_structure():
    tree = jax.tree.structure
    assert jax.tree.leaves(deq.Anderson(rtol=1e-5)) == [1e-5, 0.0, 0.0, 1.0, 1.5]
    assert tree(deq.Picard(rtol=1.0)) == tree(deq.Picard(rtol=2.0)) != tree(deq.Picard(max_steps=7))
    assert tree(deq.Picard()) != tree(deq.Broyden())
    swept = jax.vmap(lambda rtol: deq.fixed_point(jnp.cos, 0.0, solver=deq.Picard(rtol=rtol)).stats.steps)
    steps = swept(jnp.array([1e-1, 1e-3, 1e-5]))
    assert steps[0] < steps[1] < steps[2]


def test_status_and_stats():
    assert [s.name for s in Status] == ["CONVERGED", "MAX_STEPS", "STALLED", "DIVERGED", "NONFINITE"]
    stats = deq.Stats(*[jnp.arange(5)] * 4)
    np.testing.assert_array_equal(stats.converged, [True, False, False, False, False])
