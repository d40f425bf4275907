"""Option objects: which fields are leaves, which values they take, equality, precision, and what is exported."""

import copy
import dataclasses
import enum
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import _checks, _config, _export
from deq_jax._config import config

pytestmark = pytest.mark.usefixtures("quick_compile")


class Mode(enum.Enum):
    PLAIN = 1
    FANCY = 2


@config
class Sample:
    """A field of every kind."""

    rate: float = 1.0
    offset: float | None = None
    budget: _config.Budget = 10
    size: int = 3
    most: int | None = None
    flag: bool = False
    mode: Mode = Mode.PLAIN
    sizes: tuple[int, ...] = (1, 2)
    function: Callable = jnp.tanh
    inner: Any = None
    matrix: jax.Array | None = None


@config
class Spelled:
    """Its annotations are strings, as `from __future__ import annotations` makes them."""

    rate: "float" = 1.0
    budget: "_config.Budget" = 10
    size: "int" = 3
    foreign: "ImportedForTheTypeChecker" = None


# ---- leaves and structure ----------------------------------------------------------------------------------


def test_the_annotation_decides_what_is_a_leaf():
    one = Sample(rate=1, inner=deq.Picard(1e-3), matrix=jnp.eye(2))
    assert jax.tree.leaves(one)[:4] == [1.0, 1e-3, 0.0, 1.0] and len(jax.tree.leaves(one)) == 5
    assert jax.tree.leaves(Sample(offset=2)) == [1.0, 2.0]
    assert jax.tree.leaves(Sample(inner=(deq.JFB(), deq.Phantom(damping=0.25)))) == [1.0, 0.25]
    assert jax.tree.leaves(Spelled(rate=2, foreign=3)) == [2.0]
    structure = [jax.tree.structure(Sample(**option)) for option in (
        {}, {"size": 4}, {"most": 3}, {"flag": True}, {"mode": Mode.FANCY}, {"sizes": (1, 3)}, {"budget": 11},
        {"function": jnp.sin}, {"inner": 1}, {"inner": True}, {"inner": "1"}, {"inner": (1,)}, {"inner": (True,)},
    )]  # fmt: skip
    assert len(set(structure)) == len(structure)


def test_an_int_for_a_float_is_that_float(count_traces):
    one, same = deq.Picard(damping=1, rtol=0), deq.Picard(damping=1.0, rtol=0.0)
    assert one == same and hash(one) == hash(same) and repr(one) == repr(same)
    assert jax.tree.structure(one) == jax.tree.structure(same)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a - b, one, same)) == [0.0, 0.0, 0.0]
    traced = count_traces(lambda solver, x: solver.damping * x)
    run = jax.jit(traced)
    assert [float(run(solver, 3.0)) for solver in (one, same, deq.Picard(0, damping=2))] == [3.0, 3.0, 6.0]
    assert traced.traces == 1


def test_a_budget_is_structure_as_an_int_and_a_leaf_as_an_array():
    tree = jax.tree.structure
    assert tree(deq.Picard(max_steps=7)) != tree(deq.Picard(max_steps=8)) and len(jax.tree.leaves(deq.Picard())) == 2
    swept = deq.Picard(max_steps=jnp.asarray(7))
    assert tree(swept) == tree(deq.Picard(max_steps=np.asarray(8))) and len(jax.tree.leaves(swept)) == 3
    again = jax.tree.map(lambda leaf: object(), swept)  # what JAX does to look at a tree
    assert tree(again) == tree(swept)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(swept)]
    assert paths == [".atol", ".max_steps", ".damping"]


def test_an_object_that_is_no_pytree_is_declared_static():
    class Descent:  # neither callable nor a tuple of functions
        init = staticmethod(lambda z: ())
        update = staticmethod(lambda updates, state, params=None: (-updates, state))

    tx = Descent()
    solver = deq.adapters.Optax(tx, rtol=1e-3)
    assert jax.tree.leaves(solver) == [1e-3, 0.0] and solver == deq.adapters.Optax(tx, rtol=1e-3)
    run = jax.jit(lambda solver: deq.fixed_point(jnp.cos, jnp.zeros(()), solver=solver, adjoint=deq.JFB()).value)
    np.testing.assert_allclose(run(solver), 0.739085, rtol=1e-2)


@pytest.mark.parametrize(
    "given, kept",
    [
        (deq.Anderson(history=np.int64(5)), deq.Anderson(history=5)),
        (deq.Picard(max_steps=np.int32(7)), deq.Picard(max_steps=7)),
        (deq.Picard(rtol=np.float32(1e-3)), deq.Picard(rtol=float(np.float32(1e-3)))),
        (deq.Picard(damping=np.int8(1)), deq.Picard(damping=1.0)),
        (deq.Phantom(damping=jnp.bfloat16.dtype.type(0.25)), deq.Phantom(damping=0.25)),
        (deq.Broyden(keep=np.uint8(3)), deq.Broyden(keep=3)),
        (deq.Unroll(np.int64(3), np.True_), deq.Unroll(3, True)),
        (deq.Robust(stall=(np.int64(9),)), deq.Robust(stall=(9,))),
        (deq.NewtonKrylov(difference=np.float64(0.5)), deq.NewtonKrylov(difference=0.5)),
    ],
    ids=repr,
)
def test_numbers_of_numpy_become_pythons(given, kept):
    assert given == kept and hash(given) == hash(kept) and repr(given) == repr(kept)
    assert jax.tree.structure(given) == jax.tree.structure(kept)
    for field in dataclasses.fields(given):
        assert type(getattr(given, field.name)) is type(getattr(kept, field.name))


# ---- values that are refused -------------------------------------------------------------------------------

X = jnp.asarray
REFUSED = {
    "a negative scalar of numpy": (
        lambda: deq.Picard(rtol=np.float32(-1)),
        ValueError,
        ["Picard.rtol", ">= 0", "-1.0"],
    ),
    "an infinite tolerance": (lambda: deq.Anderson(rtol=math.inf), ValueError, ["Anderson.rtol", "finite", "inf"]),
    "a huge int": (lambda: deq.Picard(atol=10**400), ValueError, ["Picard.atol", "finite", "inf"]),
    "a budget beyond int32": (
        lambda: deq.Picard(max_steps=2**40),
        ValueError,
        ["Picard.max_steps", "between 0 and 2147483647", f"got {2**40}", "int32"],
    ),
    "a budget beyond int64": (lambda: deq.Picard(max_steps=2**80), ValueError, ["2147483647", f"got {2**80}"]),
    "an array of budgets beyond int32": (
        lambda: deq.Picard(max_steps=np.array([3, 2**40])),
        ValueError,
        ["Picard.max_steps", f"got {2**40} at index (1,)"],
    ),
    "a negative budget in an array": (lambda: deq.Picard(max_steps=X(-1)), ValueError, ["Picard.max_steps", "got -1"]),
    "a fractional budget": (
        lambda: deq.Picard(max_steps=X(2.0)),
        TypeError,
        ["Picard.max_steps", "int or an array of ints", "got float32[]"],
    ),
    "a traced fractional budget": (
        lambda: jax.jit(lambda n: deq.Picard(max_steps=n).rtol)(2.0),
        TypeError,
        ["Picard.max_steps", "got float32[]"],
    ),
    "a negative entry": (
        lambda: deq.Picard(rtol=X([1e-3, -1.0])),
        ValueError,
        ["Picard.rtol", ">= 0", "got -1.0 at index (1,)"],
    ),
    "NaN in an array of numpy": (
        lambda: deq.Picard(atol=np.array([[1.0, np.nan]])),
        ValueError,
        ["Picard.atol", "finite", "got nan at index (0, 1)"],
    ),
    "an infinite bfloat16": (lambda: deq.Picard(rtol=X(jnp.inf, jnp.bfloat16)), ValueError, ["Picard.rtol", "got inf"]),
    "an array of booleans": (lambda: deq.Picard(rtol=np.array([True])), TypeError, ["Picard.rtol", "got bool[1]"]),
    "an array of strings": (lambda: deq.Picard(rtol=np.array("x")), TypeError, ["Picard.rtol", "array of numbers"]),
    "an array of complex numbers": (lambda: deq.Picard(rtol=X(1j)), TypeError, ["Picard.rtol", "got complex64[]"]),
    "a key": (lambda: deq.Picard(rtol=jax.random.key(0)), TypeError, ["Picard.rtol", "array of numbers"]),
    "a tolerance that is no number": (
        lambda: deq.Picard(atol={"watt": "1"}),
        TypeError,
        ["Picard.atol['watt'] must be a number or an array of numbers", "got '1'"],
    ),
    "a list": (lambda: deq.Picard(rtol=[1e-3]), TypeError, ["Picard.rtol", "[0.001]"]),
    "Picard that never moves": (lambda: deq.Picard(damping=0), ValueError, ["Picard.damping", "0 excluded", "got 0.0"]),
    "Anderson that never moves": (lambda: deq.Anderson(damping=0.0), ValueError, ["Anderson.damping", "and 2"]),
    "Broyden that never moves": (lambda: deq.Broyden(damping=X(0.0)), ValueError, ["Broyden.damping", "got 0.0"]),
    "Phantom that never moves": (lambda: deq.Phantom(damping=0.0), ValueError, ["Phantom.damping", "between 0 and 1"]),
    "a difference of nothing": (lambda: deq.NewtonKrylov(difference=0), ValueError, ["NewtonKrylov.difference", "> 0"]),
    "Reversible by an array of ones": (
        lambda: deq.Reversible(X([0.5, 1.0])),
        ValueError,
        ["Reversible.damping", "both excluded", "got 1.0 at index (1,)", "at 1 a step forgets"],
    ),
    "a fractional scalar of numpy": (lambda: deq.Anderson(history=np.float64(2.5)), TypeError, ["an int", "2.5"]),
    "checkpoint is False": (lambda: deq.Unroll(checkpoint=False), TypeError, ["Unroll.checkpoint", "an int", "False"]),
    "stall of booleans": (lambda: deq.Robust(stall=(True,)), TypeError, ["Robust.stall", "ints > 0", "(True,)"]),
    "an int for a bool": (lambda: Sample(flag=1), TypeError, ["Sample.flag", "True or False", "got 1"]),
    "None for an int": (lambda: Sample(size=None), TypeError, ["Sample.size", "an int", "None"]),
    "None for a float": (lambda: Sample(rate=None), TypeError, ["Sample.rate", "a number", "None"]),
    "too many": (lambda: deq.JFB(1), TypeError, ["JFB.__init__()", "positional"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, exception, words = REFUSED[name]
    with pytest.raises(exception) as caught:
        make()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing from {str(caught.value)!r}"


def test_the_ends_of_the_ranges_are_taken():
    assert deq.Picard(damping=2, rtol=0, max_steps=2**31 - 1).max_steps == 2**31 - 1
    assert deq.Phantom(damping=1).damping == 1.0
    assert deq.Anderson(growth=math.inf).growth == math.inf
    assert deq.Picard(rtol=X([0.0, 1e-3])).rtol.shape == (2,)


def test_what_is_traced_passes_and_so_does_a_shape():
    nothing = jax.jit(lambda d: deq.Picard(damping=d, rtol=-d).damping)(0.0)
    assert nothing == 0.0
    each = jax.vmap(lambda d: deq.Anderson(damping=d, ridge=d).damping)(jnp.array([-1.0, 2.0]))
    np.testing.assert_array_equal(each, [-1.0, 2.0])
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    assert deq.Picard(rtol=shape) == deq.Picard(rtol=shape)


# ---- equality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [np.array, jnp.array], ids=["numpy", "jax"])
def test_options_that_hold_arrays_are_compared_by_their_bits(of):
    make = lambda *rtol, **options: deq.Anderson(rtol=of(rtol, **options))
    one = make(1e-4, 1e-5)
    assert one == make(1e-4, 1e-5) and hash(one) == hash(make(1e-4, 1e-5))
    others = [
        make(1e-4, 1e-6),
        make(1e-4),
        make(1e-4, 1e-5, dtype=np.float16),
        deq.Anderson(rtol=of([[1e-4, 1e-5]])),
        deq.Anderson(),
        deq.Anderson(rtol=1e-4),
    ]
    for other in others:
        assert (one == other) is False and (one != other) is True
    nested = lambda last: deq.Implicit(deq.Robust(stages=(deq.Picard(damping=of([1.0, last])), deq.Broyden())))
    assert nested(0.5) == nested(0.5) and hash(nested(0.5)) == hash(nested(0.5))
    assert (nested(0.5) == nested(0.25)) is False
    assert deq.Picard(max_steps=of(3)) != deq.Picard(max_steps=3)
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), dataclasses.replace(one)):
        assert copied == one and hash(copied) == hash(one)


def test_traced_options_are_compared_by_identity():
    @jax.jit
    def f(a, b):
        one, same, other = deq.Picard(rtol=a), deq.Picard(rtol=a), deq.Picard(rtol=b)
        assert (one == same) is True and hash(one) == hash(same)
        assert (one == other) is False and (one == deq.Picard()) is False
        return a

    f(1e-3, 1e-3)


def test_what_is_equal_in_python_only_is_not_one_option():
    assert Sample(inner=True) != Sample(inner=1) and Sample(inner=(True,)) != Sample(inner=(1,))
    assert Sample(inner=Mode.PLAIN) != Sample(inner=1) != Sample(inner="1")
    assert deq.Unroll(True) != deq.Unroll(1) and jax.tree.structure(deq.Unroll(True)) != jax.tree.structure(
        deq.Unroll(1)
    )


# ---- where a solve begins ----------------------------------------------------------------------------------


def test_options_of_a_batch_have_its_shape():
    check = lambda options, shape=(4,): _checks.check_options(options, shape, "solver")
    for good in (deq.Anderson(), deq.Anderson(rtol=X(1e-3)), deq.Broyden(damping=jnp.ones(4)), object()):
        check(good)
    check(deq.Robust(stages=(deq.Picard(rtol=np.ones(4)), deq.Broyden()), max_steps=jnp.arange(4)))
    check(deq.Picard(rtol=jnp.ones((2, 3))), (2, 3))
    bad = {
        "solver.rtol": deq.Anderson(rtol=jnp.ones(3)),
        "solver.max_steps": deq.Picard(max_steps=np.arange(3)),
        "solver.solver.damping": deq.Implicit(deq.Picard(damping=jnp.ones(3))),
        "solver.stages[1].rtol": deq.Robust(stages=(deq.Picard(), deq.Broyden(rtol=np.ones(3)))),
    }
    for path, options in bad.items():
        with pytest.raises(ValueError) as caught:
            check(options)
        assert str(caught.value).startswith(f"{path} must be a number or an array of shape (4,), an entry for each")
        assert str(caught.value).endswith("got shape (3,)")
    for options, shape in (
        (bad["solver.rtol"], ()),
        (deq.Picard(rtol=np.ones(1)), (4,)),
        (deq.Picard(rtol=np.ones(3)), (2, 3)),
    ):
        with pytest.raises(ValueError, match=r"solver\.rtol must be .* shape"):
            check(options, shape)
    jax.vmap(lambda rtol: check(deq.Picard(rtol=rtol), ()))(jnp.ones(3))


def test_a_solver_of_ones_own_is_checked_by_what_the_loop_reads():
    class Own:
        rtol, atol, max_steps, other = np.ones(3), 0.0, 10, np.ones(7)

    with pytest.raises(ValueError, match=r"solver\.rtol .*\(4,\).* got shape \(3,\)"):
        _checks.check_options(Own(), (4,), "solver")


def test_options_are_cast_to_the_precision_of_the_state(x64):
    wide = np.array([0.5, 0.25])
    stages = (deq.Picard(damping=jnp.asarray(wide), rtol=X(1e-3)), deq.Broyden())
    solver = deq.Robust(rtol=wide, atol=np.float64(0.0), max_steps=jnp.arange(2), stages=stages)
    got = _config.cast_options(solver, jnp.float32)
    assert got.rtol.dtype == np.float32 and type(got.rtol) is np.ndarray and type(got.atol) is float
    assert got.max_steps.dtype == jnp.int32 and got.stages[0].damping.dtype == jnp.float32
    assert got.stages[0].rtol is stages[0].rtol and got.stages[1] == stages[1] and type(got) is deq.Robust
    np.testing.assert_array_equal(got.rtol, wide)
    assert solver.rtol.dtype == np.float64  # the one given stays what it was
    assert _config.cast_options(deq.Picard(rtol=wide), jnp.complex64).rtol.dtype == np.float32
    assert _config.cast_options(deq.Picard(damping=np.array(1)), jnp.float64).damping.dtype == np.float64
    assert _config.cast_options(solver, jnp.float64).rtol is wide
    plain = deq.Anderson(rtol=1e-3, damping=0.5)
    assert _config.cast_options(plain, jnp.float32) == plain and jax.tree.leaves(plain)[0] == 1e-3
    foreign = _config.cast_options({"rtol": wide, "key": jax.random.key(0), "name": "x"}, jnp.float32)
    assert foreign["rtol"].dtype == np.float32 and foreign["name"] == "x"


@pytest.mark.parametrize("solver", [deq.Picard(), deq.Anderson(history=3), deq.Broyden(rank=3)], ids=repr)
def test_wide_options_solve_a_narrow_problem(x64, solver):
    def solve(damping, rtol):
        options = dataclasses.replace(solver, damping=damping, rtol=rtol)
        options = _config.cast_options(options, jnp.float32)
        z, stats = deq.fixed_point(jnp.cos, jnp.zeros(2, jnp.float32), solver=options, adjoint=deq.JFB())
        return z, stats.converged

    z, converged = jax.vmap(solve)(jnp.linspace(0.3, 1.0, 3), jnp.full(3, 1e-5))
    assert z.dtype == jnp.float32 and converged.all()
    np.testing.assert_allclose(z, np.full((3, 2), 0.7390851), rtol=1e-4)


# ---- export ------------------------------------------------------------------------------------------------


def exported(f, *args):
    pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    program = jax.export.export(jax.jit(f))(*args)
    read = jax.export.deserialize(program.serialize())
    assert read.in_tree == program.in_tree and read.out_tree == program.out_tree
    return read.call(*args)


@pytest.mark.parametrize(
    "options",
    [
        (deq.Picard(), deq.Implicit(on_failure=deq.OnFailure.ZERO)),
        (deq.Anderson(max_steps=jnp.asarray(20)), deq.Implicit(deq.Picard(damping=0.5))),
        (deq.Robust(), deq.JFB()),
        (deq.Picard(max_steps=9), deq.Unroll(checkpoint=True)),
    ],
    ids=["picard", "anderson", "robust", "unroll"],
)
def test_an_exported_function_takes_options_and_returns_solutions(options):
    def f(x, solver, adjoint):
        return deq.fixed_point(lambda z: 0.5 * jnp.cos(z) + x, jnp.zeros(2), solver=solver, adjoint=adjoint)

    got, want = exported(f, jnp.ones(2), *options), f(jnp.ones(2), *options)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    np.testing.assert_allclose(got.value, want.value, rtol=1e-6)


@pytest.mark.parametrize("solver", [deq.Picard(), deq.Anderson(), deq.Broyden(), deq.NewtonKrylov(), deq.Robust()])
def test_an_exported_function_returns_what_a_solve_leaves(solver):
    f = lambda z0: (
        deq.solve(jnp.cos, z0, solver=solver, fold=deq.Snapshots((0, 1))),
        deq.fixed_point(lambda z: (jnp.cos(z), z), z0, solver=solver, adjoint=deq.JFB(), has_aux=True),
        deq.trajectory(jnp.cos, z0, at=(1,), solver=deq.Picard(), adjoint=deq.JFB()),
        deq.Probe.zeros(),
        deq.FixedPointCache.create(z0, 3),
    )
    got = exported(f, jnp.zeros(2))
    assert [type(result).__name__ for result in got[:3]] == ["SolveResult", "SolutionWithAux", "Trajectory"]
    assert jax.tree.structure(got) == jax.tree.structure(jax.eval_shape(f, jnp.zeros(2)))


def test_structure_is_written_as_json_and_read_back(monkeypatch):
    registered = {}
    monkeypatch.setattr(_export.export, "register_pytree_node_serialization", lambda cls, **f: registered.update(f))

    @config
    class Written:
        rate: float = 1.0
        budget: _config.Budget = 10
        most: int | None = None
        flag: bool | None = True
        mode: Mode | None = Mode.FANCY
        sizes: tuple[int, ...] = (1, 2)
        nothing: tuple[int, ...] = ()
        inner: Any = None

    write, read = registered["serialize_auxdata"], registered["deserialize_auxdata"]
    entries = lambda options: jax.tree.structure(options).node_data()[1]
    for options in (Written(), Written(budget=X(3)), Written(flag=None, mode=None), Written(inner=deq.Picard())):
        text = write(entries(options))
        assert read(text) == entries(options) and json.loads(text).keys() == Written.__dataclass_fields__.keys()
    with pytest.raises(TypeError, match=r"jax.export can write numbers.* and Written.inner is <function"):
        write(entries(Written(inner=lambda x: x)))


def test_a_class_may_be_defined_again():
    def define():
        @config
        class Again:
            rate: float = 1.0

        return Again

    first, second = define(), define()
    assert first() != second() and jax.tree.leaves(second(2)) == [2.0]


# ---- other people's tools ----------------------------------------------------------------------------------


def test_runtime_type_checkers_leave_the_arrays_alone():
    jaxtyping = pytest.importorskip("jaxtyping")

    def strict(f):  # a type checker that takes nothing
        def refuse(*args, **options):
            raise TypeError("an array is no float")

        return refuse

    @jaxtyping.jaxtyped(typechecker=strict)  # as jaxtyping's import hook does
    @config
    class Checked:
        rate: float = 1.0
        size: int = 3

    assert Checked(jnp.ones(2)).rate.shape == (2,)
    with pytest.raises(TypeError, match=r"Checked\.size must be an int, got 'x'"):
        Checked(size="x")
