"""Eager calls: never stale, compiled once, bounded; and what f reads or couples becomes known by its trace."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax import Status, _programs, _trace
from deq_jax.stability import spectral_radius

pytestmark = pytest.mark.usefixtures("quick_compile")

PICARD = deq.Picard(rtol=1e-6, max_steps=60)
BACK = deq.Implicit(PICARD)
X = jnp.array([0.5, -1.0])
Z0 = jnp.zeros(2)


@pytest.fixture(autouse=True)
def no_programs():
    deq.clear_caches()
    yield
    deq.clear_caches()


def cell(c, z, x):
    """c may be of any dtype."""
    c = jnp.asarray(c).astype(z.dtype) if hasattr(c, "dtype") else c
    return 0.25 * c * jnp.sin(z) + x


# ---- never stale -------------------------------------------------------------------------------------------
# Each of these changes one thing between calls, and yields a function that reads it with the number it reads.


NUMBER = ARRAY = PARTIAL = FUNCTION = CLASS = TUPLE = None
IN_PLACE = {kind: np.ones(2, kind) for kind in ("float32", "float64", "int32", "int64", "uint8", "float16")}
POLYNOMIAL = np.poly1d([1.0, 0.0])
here = sys.modules[__name__]
elsewhere = types.ModuleType("deq_jax_tests_elsewhere")
sys.modules[elsewhere.__name__] = elsewhere
NUMBERS = (1.0, 2.0, -1.0, 1.0)


def a_global_number():
    f = lambda z, x: cell(NUMBER, z, x)
    for here.NUMBER in (1, *NUMBERS, np.float32(2), np.float64(3), np.int32(2)):
        yield f, NUMBER


def a_global_array():
    f = lambda z, x: cell(ARRAY, z, x)
    for c in NUMBERS:
        here.ARRAY = c * jnp.ones(2)
        yield f, c
        here.ARRAY = np.full(2, c, np.float32)
        yield f, c


def a_global_partial():
    for c in NUMBERS:
        here.PARTIAL = functools.partial(cell, c)
        yield (lambda z, x: PARTIAL(z, x)), c
        here.PARTIAL = jax.tree_util.Partial(cell, jnp.float32(c))
        yield (lambda z, x: PARTIAL(z, x)), c


def a_global_function():
    f = lambda z, x: FUNCTION(z, x)
    for c in NUMBERS:
        here.FUNCTION = lambda z, x, c=c: cell(c, z, x)
        yield f, c


def a_global_class():
    f = lambda z, x: CLASS().run(z, x)
    for c in NUMBERS:
        here.CLASS = type("CLASS", (), {"run": lambda self, z, x, c=c: cell(c, z, x)})
        yield f, c


def arrays_of_numpy_in_place():
    for array in IN_PLACE.values():
        f = lambda z, x, array=array: cell(array.astype(np.float32), z, x)
        g = lambda z, x, array=array: cell(array, z, x).astype(z.dtype)
        for c in (1, 2, 3, 1):
            array[:] = c
            yield f, c
            yield g, c


def a_polynomial():
    f = lambda z, x: cell(POLYNOMIAL(1.0), z, x)
    for c in NUMBERS:
        POLYNOMIAL.coeffs[0] = c
        yield f, c


def flags():
    f = lambda z, x: cell(1.0 if TUPLE[0] is True else 2.0, z, x)
    for here.TUPLE in ((True,), (1,), (True,)):
        yield f, 1.0 if TUPLE[0] is True else 2.0


def a_sign_of_zero():
    f = lambda z, x: cell(1.0 + jnp.signbit(TUPLE[0]).astype(float), z, x)
    for here.TUPLE in ((0.0,), (-0.0,), (0.0,)):
        yield f, 1.0 + np.signbit(TUPLE[0])


def a_function_attribute():
    def f(z, x):
        return cell(f.c, z, x)

    for f.c in NUMBERS:
        yield f, f.c


def a_default():
    def f(z, x, c=1.0):
        return cell(c, z, x)

    for c in NUMBERS:
        f.__defaults__ = (c,)
        yield f, c


def a_keyword_default():
    def f(z, x, *, c=1.0):
        return cell(c, z, x)

    for c in NUMBERS:
        f.__kwdefaults__ = {"c": c}
        yield f, c


def code():
    def f(z, x):
        return cell(1.0, z, x)

    yield f, 1.0
    f.__code__ = (lambda z, x: cell(2.0, z, x)).__code__
    yield f, 2.0


def a_closure_cell():
    c = None

    def f(z, x):
        return cell(c, z, x)

    for c in NUMBERS:
        yield f, c
    for c in (jnp.float32(1), np.float32(2), jnp.full(2, 3.0), np.full(2, 3.0)):
        yield f, np.asarray(c)


@dataclasses.dataclass(frozen=True)
class Frozen:
    c: float

    def __call__(self, z, x):
        return cell(self.c, z, x)

    def method(self, z, x):
        return cell(self.c, z, x)


class Plain:
    shared = 1.0

    def __init__(self, c):
        self.c = c

    def method(self, z, x):
        return cell(self.c, z, x)

    @property
    def property(self):
        return self.c

    @classmethod
    def of_class(cls, z, x):
        return cell(cls.shared, z, x)

    def __getattr__(self, name):
        return self.__dict__["c"] if name == "computed" else super().__getattribute__(name)


def an_attribute():
    frozen, plain = Frozen(1.0), Plain(1.0)
    for c in NUMBERS:
        object.__setattr__(frozen, "c", c)
        plain.c = c
        yield frozen, c
        yield frozen.method, c
        yield plain.method, c
        yield (lambda z, x: cell(plain.property, z, x)), c
        yield (lambda z, x: cell(plain.computed, z, x)), c


def the_self_of_a_method():
    for c in NUMBERS:
        yield Frozen(c).method, c
        yield Frozen(c), c


def a_class_attribute():
    for c in NUMBERS:
        Plain.shared = c
        yield Plain.of_class, c
        yield (lambda z, x: cell(Plain.shared, z, x)), c


def items():
    table, values = {"c": [0.0]}, [0.0]
    f = lambda z, x: cell(table["c"][0], z, x)
    g = lambda z, x: cell(sum(values), z, x)
    for c in NUMBERS:
        table["c"][0] = values[0] = c
        yield f, c
        yield g, c


def a_module():
    def f(z, x):
        import deq_jax_tests_elsewhere

        return cell(deq_jax_tests_elsewhere.c, z, x)

    for elsewhere.c in NUMBERS:
        yield f, elsewhere.c


def the_environment():
    f = lambda z, x: cell(float(os.environ["DEQ_JAX_TEST_NUMBER"]), z, x)
    for c in NUMBERS:
        os.environ["DEQ_JAX_TEST_NUMBER"] = str(c)
        yield f, c
    del os.environ["DEQ_JAX_TEST_NUMBER"]


def a_partial():
    for c in NUMBERS:
        yield functools.partial(cell, c), c
        yield functools.partial(lambda z, x, c: cell(c, z, x), c=c), c


def a_fresh_jit():
    for c in NUMBERS:
        small, large = c * jnp.ones(2), np.full((300, 300), c, np.float32)
        yield jax.jit(lambda z, x, c=small: cell(c, z, x)), c
        inner = jax.jit(lambda z, large=large: 0.25 * large[0, 0] * jnp.sin(z))
        yield (lambda z, x, inner=inner: jax.jit(lambda z: inner(z))(z) + x), c


def a_callback():
    scale = lambda z: np.float32(0.25) * here.NUMBER * np.sin(z)
    f = lambda z, x: jax.pure_callback(scale, jax.ShapeDtypeStruct((2,), z.dtype), z) + x
    for here.NUMBER in (np.float32(1), np.float32(2), np.float32(1)):
        yield f, NUMBER
    for c in NUMBERS:  # another function each time
        scale = lambda z, c=c: np.float32(0.25 * c) * np.sin(z)
        yield f, c


WORLDS = [
    a_global_number, a_global_array, a_global_partial, a_global_function, a_global_class, arrays_of_numpy_in_place,
    a_polynomial, flags, a_sign_of_zero, a_function_attribute, a_default, a_keyword_default, code, a_closure_cell,
    an_attribute, the_self_of_a_method, a_class_attribute, items, a_module, the_environment, a_partial, a_fresh_jit,
]  # fmt: skip
each_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)


def plain(c, x=X):
    """The fixed point by plain iteration, and the derivative of its sum with respect to x, by hand."""
    c, x, z = np.asarray(c, float), np.asarray(x, float), np.zeros(2)
    for _ in range(300):
        z = 0.25 * c * np.sin(z) + x
    return z, 1 / (1 - 0.25 * c * np.cos(z))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4)


@each_world
def test_a_solve_is_never_stale(world):
    for f, c in world():
        close(deq.fixed_point(f, Z0, X, solver=PICARD).value, plain(c)[0])


@each_world
def test_a_gradient_is_never_stale(world):
    for f, c in world():
        grad = jax.grad(lambda x, f=f: deq.fixed_point(f, Z0, x, solver=PICARD, adjoint=BACK).value.sum())(X)
        close(grad, plain(c)[1])


def other_functions(f, c):
    z, slope = plain(c)
    zs, options = jnp.asarray(z, jnp.float32), {"solver": PICARD}
    close(deq.solve(f, Z0, X, **options).value, z)
    close(jax.grad(lambda x: deq.attach(f, zs, x, adjoint=BACK, **options).sum())(X), slope)
    states = deq.trajectory(f, Z0, X, at=1, adjoint=BACK, **options)
    close(states.value, z)
    close(states.states[0], X)
    batched = lambda z, x: jax.vmap(f)(z, x)
    total = lambda xs: deq.compact(batched, 0 * xs, xs, axes=(0,), backward=PICARD, sizes=(), **options).value.sum()
    value, grad = jax.value_and_grad(total)(jnp.stack([X, X]))
    close(value, 2 * z.sum())
    close(grad[0], slope)
    close(spectral_radius(f, zs, X, iterations=4), np.max(np.abs(0.25 * np.asarray(c) * np.cos(z))))


@pytest.mark.parametrize("world", [a_global_number, a_closure_cell, an_attribute], ids=lambda world: world.__name__)
def test_no_other_function_is_stale(world):
    for f, c in itertools.islice(world(), 3):
        other_functions(f, c)


def test_a_callback_is_never_stale():
    for f, c in a_callback():
        close(deq.fixed_point(f, Z0, X, solver=PICARD).value, plain(c)[0])


def test_a_leaf_of_args_that_is_no_array_is_never_stale():
    for c in NUMBERS:
        f = lambda z, module: module["activation"](z, module["x"])
        args = {"activation": Frozen(c), "x": X}
        close(deq.fixed_point(f, Z0, args, solver=PICARD).value, plain(c)[0])


class Half:
    """A fold whose state is a multiple of the last residual."""

    def __init__(self, factor):
        self.factor = factor

    def init(self, z0, batch_ndim):
        return jnp.float32(self.factor)

    def update(self, folded, seen):
        return self.factor * (1 + 0 * folded)


def test_the_attribute_of_a_fold_is_never_stale():
    fold = Half(1.0)
    for fold.factor in NUMBERS:
        assert float(deq.solve(jnp.cos, Z0, solver=PICARD, fold=fold).folded) == fold.factor


SLOPE = 1.0


@jax.custom_jvp
def with_jvp(z):
    return 0.5 * z


@with_jvp.defjvp
def _(primals, tangents):
    return with_jvp(*primals), 0.5 * SLOPE * tangents[0]


@jax.custom_vjp
def with_vjp(z):
    return 0.5 * z


with_vjp.defvjp(lambda z: (0.5 * z, None), lambda _, z_bar: (0.5 * SLOPE * z_bar,))
each_rule = pytest.mark.parametrize("half", [with_jvp, with_vjp], ids=["custom_jvp", "custom_vjp"])


@each_rule
@pytest.mark.parametrize("adjoint", [BACK, deq.ImplicitJVP(PICARD)], ids=["Implicit", "ImplicitJVP"])
def test_a_derivative_rule_is_never_stale(monkeypatch, half, adjoint):
    if half is with_vjp and isinstance(adjoint, deq.ImplicitJVP):
        pytest.skip("a custom_vjp has no forward mode")
    f = lambda z, x: half(z) + x
    value = lambda x: deq.fixed_point(f, Z0, x, solver=PICARD, adjoint=adjoint).value.sum()
    for slope in (1.0, 0.5, -1.0, 1.0):
        monkeypatch.setattr(here, "SLOPE", slope)
        close(value(X), 2 * X.sum())
        close(jax.grad(value)(X), np.full(2, 1 / (1 - 0.5 * slope)))


def test_a_derivative_rule_is_never_stale_in_the_spectral_radius(monkeypatch):
    for slope in (1.0, 0.5, 1.0):
        monkeypatch.setattr(here, "SLOPE", slope)
        close(spectral_radius(with_jvp, X, iterations=4), 0.5 * slope)


@jax.custom_jvp
def cosine(x):
    return jnp.cos(x)


@cosine.defjvp
def _(primals, tangents):
    return cosine(*primals), -SLOPE * jnp.sin(primals[0]) * tangents[0]


@jax.custom_jvp
def sine(x):
    return jnp.sin(x)


@sine.defjvp
def _(primals, tangents):
    return sine(*primals), cosine(*primals) * tangents[0]


def test_the_rule_of_a_rule_is_never_stale_in_second_derivatives(monkeypatch):
    def value(a):
        f = lambda z: 0.5 * z + sine(a)
        return deq.fixed_point(f, jnp.zeros(()), solver=PICARD, adjoint=deq.ImplicitJVP(PICARD)).value

    for slope in (1.0, 2.0, 1.0):
        monkeypatch.setattr(here, "SLOPE", slope)
        want = -2 * slope * np.sin(1.0)
        close(jax.grad(jax.grad(value))(1.0), want)
        close(jax.hessian(value)(1.0), want)
        close(jax.vmap(jax.grad(jax.grad(value)))(jnp.ones(2)), np.full(2, want))


def test_the_rule_of_custom_vmap_is_never_stale(monkeypatch):
    @jax.custom_batching.custom_vmap
    def half(z):
        return 0.5 * z

    @half.def_vmap
    def _(axis_size, in_batched, z):
        return 0.5 * SLOPE * z, in_batched[0]

    for slope in (1.0, 0.5, 1.0):
        monkeypatch.setattr(here, "SLOPE", slope)
        solve = lambda x: deq.fixed_point(lambda z: half(z) + x, jnp.zeros(()), solver=PICARD).value
        close(jax.vmap(solve)(X), X / (1 - 0.5 * slope))


def test_the_configuration_is_never_stale():
    seen = []

    def f(z):
        seen.append((z.dtype, jax.config.jax_default_matmul_precision))
        return (0.3 * jnp.eye(2, dtype=z.dtype)) @ z + 1

    for precision in ("highest", None, "highest"):
        with jax.default_matmul_precision(precision):
            close(deq.fixed_point(f, Z0, solver=PICARD).value, 1 / 0.7)
    before = jax.config.read("jax_enable_x64")
    for x64 in (False, True, False):
        jax.config.update("jax_enable_x64", x64)
        z = deq.fixed_point(f, np.zeros(2), solver=deq.Picard(rtol=1e-6)).value
        jax.config.update("jax_enable_x64", before)
        assert z.dtype == (jnp.float64 if x64 else jnp.float32)
        close(z, 1 / 0.7)
    assert len(set(seen)) == 3


# ---- hits --------------------------------------------------------------------------------------------------

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """How many programs were compiled meanwhile, as a list of their durations."""
    found, listening = [], [True]
    listen = lambda event, seconds, **_: listening and event == COMPILED and found.append(seconds)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        listening.clear()


def test_compilations_are_counted():
    with compilations() as found:
        jax.block_until_ready(jax.jit(lambda x: x + 1.2345)(X))
    assert len(found) == 1


def never_again(call, numbers=(0.1, 0.2, 0.3, 0.4), known=2):
    """call(number), where all calls after the first `known` must compile nothing."""
    for number in numbers[:known]:
        jax.block_until_ready(call(number))
    programs = len(_programs.programs)
    with compilations() as found:
        out = [jax.block_until_ready(call(number)) for number in numbers[known:]]
    assert not found
    assert len(_programs.programs) == programs
    return out


@jax.custom_jvp
def squash(z):
    return jnp.tanh(z)


@squash.defjvp
def _(primals, tangents):
    return squash(*primals), (1 - jnp.tanh(primals[0]) ** 2) * tangents[0]


def add(z, x):
    return 0.5 * jnp.sin(z) + x


run = functools.partial(deq.fixed_point, solver=PICARD, adjoint=BACK)
HITS = {
    "a plain function": lambda c: run(add, Z0, c * X),
    "a fresh closure over an array": lambda c: (lambda w: run(lambda z: add(z, w), Z0))(c * X),
    "a fresh closure over a number": lambda c: run(lambda z: c * jnp.sin(z), Z0),
    "a fresh jit over an array": lambda c: (lambda w: run(jax.jit(lambda z: add(z, w)), Z0))(c * X),
    "relu": lambda c: run(lambda z: 0.5 * jax.nn.relu(z) + c * X, Z0),
    "silu": lambda c: run(lambda z: 0.5 * jax.nn.silu(z) + c * X, Z0),
    "softplus": lambda c: run(lambda z: 0.5 * jax.nn.softplus(z) + c * X, Z0),
    "custom_jvp": lambda c: run(lambda z: 0.5 * squash(z) + c * X, Z0),
    "custom_vjp": lambda c: run(lambda z: with_vjp(z) + c * X, Z0),
    "a callable object": lambda c: run(Frozen(c), Z0, X),
    "a bound method": lambda c: run(Frozen(c).method, Z0, X),
    "a partial": lambda c: run(functools.partial(cell, c), Z0, X),
    "another tolerance": lambda c: run(add, Z0, X, solver=deq.Picard(rtol=1e-3 * c, max_steps=60)),
    "a pair": lambda c: run(lambda z: (add(z, c * X), {"z": z, "n": 1}), Z0, has_aux=True),
    "a batch": lambda c: run(lambda z: add(z, c * X[None]), jnp.zeros((3, 2)), batch_ndim=1),
    "grad": lambda c: jax.grad(lambda x: run(lambda z: 0.5 * jax.nn.relu(z) + x, Z0).value.sum())(c * X),
    "grad of a custom_jvp": lambda c: jax.grad(lambda x: run(lambda z: 0.5 * squash(z) + x, Z0).value.sum())(c * X),
    "vmap": lambda c: jax.vmap(lambda x: run(lambda z: add(z, x), jnp.zeros(())).value)(c * X),
    "jvp": lambda c: jax.jvp(
        lambda x: run(lambda z: add(z, x), Z0, adjoint=deq.ImplicitJVP(PICARD)).value, (c * X,), (X,)
    ),
    "solve with a fold": lambda c: deq.solve(lambda z: add(z, c * X), Z0, solver=PICARD, fold=deq.ResidualTrace(5)),
    "trajectory": lambda c: deq.trajectory(lambda z: add(z, c * X), Z0, at=(1,), solver=PICARD, adjoint=BACK),
    "attach": lambda c: jax.grad(lambda x: deq.attach(lambda z: add(z, x), Z0, adjoint=BACK).sum())(c * X),
    "compact": lambda c: deq.compact(
        lambda z, x: add(z, x), jnp.zeros((3, 2)), jnp.full((3, 2), c), axes=(0,), solver=PICARD, sizes=(1,)
    ),
    "spectral_radius": lambda c: spectral_radius(lambda z: jax.nn.relu(add(z, c * X)), X, iterations=4),
}


@pytest.mark.parametrize("call", HITS.values(), ids=HITS.keys())
def test_what_is_compiled_is_used_again(call):
    never_again(call)


def test_a_module_of_nnx_is_compiled_once():
    from flax import nnx

    import deq_jax.nn

    class Cell(nnx.Module):
        def __init__(self, c):
            kernel = nnx.initializers.constant(0.1 * c)
            self.linear = nnx.Linear(2, 2, kernel_init=kernel, rngs=nnx.Rngs(0))

        def __call__(self, z, x):
            return jax.nn.relu(self.linear(z)) + x

    layers = {c: deq_jax.nn.DEQ(Cell(c), solver=PICARD, adjoint=BACK) for c in (0.1, 0.2, 0.3, 0.4)}
    out = never_again(lambda c: layers[c](jnp.ones((1, 2))).value, known=1)
    for got, c in zip(out, (0.2, 0.3, 0.4), strict=True):
        close(got, np.full((1, 2), 1 / (1 - 0.2 * c)))


# ---- misses ------------------------------------------------------------------------------------------------


def key_of(f, *example, args=()):
    traced, *_ = _trace.hoist(f, *(example or (Z0,)), args=args)
    return traced.key


@jax.tree_util.register_pytree_node_class
class Box:
    def __init__(self, value, mark):
        self.value, self.mark = value, mark

    def tree_flatten(self):
        return (self.value,), self.mark

    @classmethod
    def tree_unflatten(cls, mark, children):
        return cls(*children, mark)


def test_equal_programs_have_equal_keys():
    for f in (lambda: lambda z: 0.5 * z + 1, lambda: jax.nn.silu, lambda: jax.jit(lambda z: z + X)):
        assert key_of(f()) == key_of(f())
        assert hash(key_of(f())) == hash(key_of(f()))
    assert key_of(lambda z: z * jnp.nan) == key_of(lambda z: z * float("nan"))


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda z: z + 1, lambda z: z - 1),
        (lambda z: jnp.sum(z, keepdims=True), lambda z: jnp.max(z, keepdims=True)),
        (lambda z: z[::-1], lambda z: z),
        (lambda z: z.at[0].set(1), lambda z: z.at[1].set(1)),
        (lambda z: (z, z), lambda z: [z, z]),
        (lambda z: {"a": z}, lambda z: {"b": z}),
        (lambda z: jnp.dot(z, z, precision="highest"), lambda z: jnp.dot(z, z)),
        (lambda z: z.astype(jnp.float16), lambda z: z.astype(jnp.bfloat16)),
        (lambda z: z**2, lambda z: z**3),
        (lambda z: z**2.5, lambda z: z**3.5),
        (lambda z: jnp.where(z > 0, z, 0.0), lambda z: jnp.where(z > 0, z, -0.0)),
        (lambda z: z + jnp.inf, lambda z: z + jnp.nan),
        (lambda z: z + jnp.ones(2), lambda z: z + jnp.ones(2, int).astype(z.dtype)),
        (lambda z: z + jnp.ones(2), lambda z: z + jnp.ones(1)),
        (lambda z: jax.lax.scan(lambda c, _: (c + 1, None), z, length=2)[0],
         lambda z: jax.lax.scan(lambda c, _: (c + 1, None), z, length=3)[0]),
        (lambda z: jax.lax.cond(z[0] > 0, jnp.sin, jnp.cos, z), lambda z: jax.lax.cond(z[0] > 0, jnp.cos, jnp.sin, z)),
    ],
)  # fmt: skip
def test_different_programs_have_different_keys(one, other):
    deq.clear_caches()
    key_of(one)  # what _seen holds must not make them equal
    assert key_of(one) != key_of(other)


def test_other_types_have_other_keys():
    f = lambda z: z + 1
    keys = {key_of(f, z) for z in (Z0, jnp.zeros(3), jnp.zeros((2, 1)), jnp.zeros(2, jnp.float16), jnp.zeros(2, int))}
    assert len(keys) == 5


MARKS = [True, 1, 1.0, 0.0, -0.0, (1,), (True,), [1], [True], {"a": 1}]


def test_marks_on_the_result_are_not_confused():
    for mark in MARKS * 2:
        aux = deq.fixed_point(lambda z, mark=mark: (jnp.cos(z), Box(z, mark)), Z0, solver=PICARD, has_aux=True).aux
        assert repr(aux.mark) == repr(mark)


def test_options_are_not_confused():
    for f in (lambda z: jnp.cos(z), lambda z: (jnp.cos(z), z)):
        pair = isinstance(f(Z0), tuple)
        for batch_ndim in (0, 1):
            out = deq.fixed_point(f, Z0, solver=PICARD, batch_ndim=batch_ndim, has_aux=pair)
            assert out.stats.status.shape == (2,) * batch_ndim
            assert len(out) == 2 + pair


# ---- bounded -----------------------------------------------------------------------------------------------


def test_programs_are_bounded(monkeypatch):
    monkeypatch.setattr(_programs.programs, "size", 5)
    monkeypatch.setattr(_trace.numbers_seen, "size", 5)
    for n in range(1, 13):
        deq.fixed_point(lambda z: 0.5 * z, jnp.ones(n), solver=deq.Picard(max_steps=1))
        assert len(_programs.programs) == min(n, 5)
    for n in range(12):
        _trace.hoist(lambda z: 0.5 * z[: n + 1] + 1.5, jnp.ones(20))
        assert len(_trace.numbers_seen) <= 5
    deq.clear_caches()
    assert not len(_programs.programs) and not len(_trace.numbers_seen)


def test_three_hundred_programs_leave_no_more_than_the_bound():
    ran = []
    run = lambda k, x: x + 1
    for k in range(300):
        ran.append(float(_programs.run_compiled(run, (k,), np.float32(k))) if k < 3 else None)
        _programs.programs.get((run, k), lambda: jax.jit(run))  # the rest without compiling
    assert ran[:3] == [1.0, 2.0, 3.0]
    assert float(_programs.run_compiled(run, (-1,), np.float32(0))) == 1
    assert len(_programs.programs) == _programs.programs.size


FRESH = {
    "closure": lambda w: lambda z: add(z, w),
    "jit": lambda w: jax.jit(lambda z: add(z, w)),
    "jit in jit": lambda w: jax.jit(lambda z: jax.jit(lambda z: add(z, w))(z)),
    "remat": lambda w: jax.checkpoint(lambda z: add(z, w)),
    "scan": lambda w: lambda z: jax.lax.scan(lambda c, _: (add(c, w), None), z, length=2)[0],
}


@pytest.mark.parametrize("fresh", FRESH.values(), ids=FRESH.keys())
def test_no_array_outlives_its_call(fresh):
    def call(k):
        w = jnp.full(2, 0.001 * k)
        z = run(fresh(w), Z0).value
        return weakref.ref(w), z

    refs = [call(k)[0] for k in range(1, 25)]
    gc.collect()
    assert not [ref for ref in refs if ref() is not None]
    assert len(_programs.programs) == 1


def test_a_thousand_closures_leave_nothing():
    solver = deq.Picard(rtol=1e-2, max_steps=5)
    call = lambda k: deq.fixed_point(lambda z, w=jnp.full(2, 1e-4 * k): add(z, w), Z0, solver=solver).value
    call(1), call(2)
    gc.collect()
    before = len(jax.live_arrays())
    for k in range(1000):
        call(k)
    gc.collect()
    assert len(jax.live_arrays()) <= before
    assert len(_programs.programs) == 1


# ---- threads -----------------------------------------------------------------------------------------------


def test_four_threads_at_once():
    wrong = []

    def work(k):
        for i in range(6):
            c = 0.5 + 0.25 * ((k + i) % 4)
            z = deq.fixed_point(lambda z, x, c=c: cell(c, z, x), Z0, X, solver=PICARD).value
            grad = jax.grad(lambda x, c=c: run(functools.partial(cell, c), Z0, x).value.sum())(X)
            want = plain(c)
            if not (np.allclose(z, want[0], rtol=1e-4) and np.allclose(grad, want[1], rtol=1e-4)):
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong


# ---- hoist -------------------------------------------------------------------------------------------------


def test_hoist_gives_all_that_f_reads():
    key, ints, mask = jax.random.key(0), np.arange(2), jnp.array([True, False])

    def f(z, x, activation):
        return activation(z * x + (ints * mask.astype(int)).astype(z.dtype) + jax.random.uniform(key, (2,)))

    pure, inputs, other = _trace.hoist(f, Z0, args=(X, jnp.tanh))
    assert [leaf.shape for leaf in inputs] == [(2,)]
    assert len(other) == 3
    np.testing.assert_array_equal(pure(Z0, inputs, other), f(Z0, X, jnp.tanh))
    np.testing.assert_array_equal(pure(X, [2 * X], other), f(X, 2 * X, jnp.tanh))
    assert pure.out.shape == (2,)


def test_results_that_are_numbers():
    pure, inputs, other = _trace.hoist(lambda z: {"a": 1.5, "b": 2, "c": z, "d": True}, Z0)
    out = pure(X, inputs, other)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(out))
    assert (float(out["a"]), int(out["b"]), bool(out["d"])) == (1.5, 2, True)
    close(deq.fixed_point(lambda z: 1.5, 0.0).value, 1.5)


def noisy(x):
    """A fixed point whose f reads ints, a key and a mask, of which some are traced where x is."""
    key, order, mask = jax.random.key(3), jnp.array([1, 0]), x > 0

    def f(z):
        noise = jax.random.uniform(key, (2,))
        return 0.25 * jnp.sin(z[order]) * jnp.where(mask, 1, 0.5) + x + noise

    return deq.fixed_point(f, jnp.zeros_like(x), solver=PICARD, adjoint=BACK).value


def noisy_plain(x):
    z = jnp.zeros_like(x)
    for _ in range(60):
        z = 0.25 * jnp.sin(z[::-1]) * jnp.where(x > 0, 1, 0.5) + x + jax.random.uniform(jax.random.key(3), (2,))
    return z


IN = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, x[None])[1][0],
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "jit of vmap": lambda f: lambda x: jax.jit(jax.vmap(f))(x[None])[0],
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, f, x),
}


@pytest.mark.parametrize("within", IN.values(), ids=IN.keys())
def test_ints_keys_and_masks_in_every_transformation(within):
    total = lambda f: lambda x: jnp.sum(f(x) ** 2)
    with jax.checking_leaks():
        got = jax.value_and_grad(total(within(noisy)))(X)
    want = jax.value_and_grad(total(noisy_plain))(X)
    jax.tree.map(close, got, want)


def test_numbers_are_seen_without_jit():
    seen = []
    f = lambda z: (seen.append(z), 0.5 * z + 1)[1]
    with jax.disable_jit():
        close(deq.fixed_point(f, jnp.zeros(()), solver=deq.Picard(rtol=1e-6)).value, 2)
    assert [float(z) for z in seen if not isinstance(z, jax.core.Tracer)][:3] == [0.0, 1.0, 1.5]


# ---- named axes --------------------------------------------------------------------------------------------

N = 4
RING = [(k, (k + 1) % N) for k in range(N)]
# (what is added to each problem from all of them, the same as a matrix)
COUPLINGS = {
    "psum": (lambda z: jax.lax.psum(z, "i") / 8, np.full((N, N), 1 / 8)),
    "pmean": (lambda z: jax.lax.pmean(z, "i") / 2, np.full((N, N), 1 / 8)),
    "all_gather": (lambda z: jnp.sum(jax.lax.all_gather(z, "i"), axis=0) / 8, np.full((N, N), 1 / 8)),
    "ppermute": (lambda z: jax.lax.ppermute(z, "i", RING) / 4, np.roll(np.eye(N), 1, axis=0) / 4),
}
XS = np.array([0.1, -1.0, 3.0, 0.5], np.float32)
each_coupling = pytest.mark.parametrize("coupling", COUPLINGS)


def coupled(coupling, adjoint=BACK):
    def one(x):
        f = lambda z: 0.4 * jnp.cos(z) + COUPLINGS[coupling][0](z) + x
        z, stats = deq.fixed_point(f, jnp.zeros_like(x), solver=PICARD, adjoint=adjoint)
        return z, stats.status + 0 * x.astype(jnp.int32)

    return one


def dense(coupling):
    """Values by plain iteration on the whole, and the gradient of Σ z² by linear algebra."""
    M, z = COUPLINGS[coupling][1], np.zeros(N)
    for _ in range(200):
        z = 0.4 * np.cos(z) + M @ z + XS
    J = M - 0.4 * np.diag(np.sin(z))
    return z, np.linalg.solve(np.eye(N) - J.T, 2 * z)


def over(kind):
    """g ↦ the map of g over the axis "i"."""
    mesh = Mesh(np.array(jax.devices()[:N]), ("i",))
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    return {
        "vmap": lambda g: jax.vmap(g, axis_name="i"),
        "jit of vmap": lambda g: jax.jit(jax.vmap(g, axis_name="i")),
        "shard_map": lambda g: jax.jit(sharded(g)),
        "unchecked shard_map": lambda g: jax.jit(sharded(g, check_vma=False)),
        "pmap": lambda g: jax.pmap(g, axis_name="i"),
    }[kind]


@each_coupling
@pytest.mark.parametrize("kind", ["vmap", "jit of vmap", "shard_map", "unchecked shard_map"])
def test_coupled_problems_are_one(kind, coupling):
    z, status = over(kind)(coupled(coupling))(jnp.asarray(XS))
    close(z, dense(coupling)[0])
    assert status.tolist() == [Status.CONVERGED] * N


@each_coupling
@pytest.mark.parametrize("kind", ["shard_map", "unchecked shard_map"])
@pytest.mark.parametrize("adjoint", [BACK, deq.ImplicitJVP(PICARD)], ids=["Implicit", "ImplicitJVP"])
def test_the_gradient_of_coupled_problems(kind, coupling, adjoint):
    loss = lambda x: jnp.sum(over(kind)(coupled(coupling, adjoint))(x)[0] ** 2)
    close(jax.jit(jax.grad(loss))(jnp.asarray(XS)), dense(coupling)[1])


@each_coupling
def test_the_gradient_of_a_map_of_coupled_problems(coupling):
    loss = lambda x: jnp.sum(over("vmap")(coupled(coupling, deq.ImplicitJVP(PICARD)))(x)[0] ** 2)
    close(jax.grad(loss)(jnp.asarray(XS)), dense(coupling)[1])


def test_the_largest_of_all():
    f = lambda x: deq.fixed_point(lambda z: 0.5 * jax.lax.pmax(z, "i") + x, 0 * x, solver=PICARD)
    for kind in ("vmap", "shard_map"):
        z, _ = over(kind)(lambda x: (f(x).value, f(x).stats.status + 0 * x.astype(int)))(jnp.asarray(XS))
        close(z, XS + 3.0)  # the largest is 6 = 3 / (1 − 0.5)


def test_a_pmap_ends():
    """In a process of its own: a decision to stop that differs from device to device hangs for ever."""
    code = """
        import jax, jax.numpy as jnp, deq_jax as deq
        solver = deq.Picard(rtol=1e-6, max_steps=60)
        def one(x):
            f = lambda z: 0.4 * jnp.cos(z) + jax.lax.pmean(z, "i") / 2 + x
            return deq.fixed_point(f, jnp.zeros_like(x), solver=solver, adjoint=deq.Implicit(solver)).value
        loss = lambda x: jnp.sum(jax.pmap(one, axis_name="i")(x) ** 2)
        print([float(g) for g in jax.grad(loss)(jnp.array([0.1, -1.0, 3.0, 0.5]))])
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    close(np.array(eval(ran.stdout.splitlines()[-1])), dense("pmean")[1])


def axes_of(f, x=X):
    """The axes along which f communicates, seen inside a map over "i"."""
    found = []

    def one(x):
        found.append(_trace.hoist(f, x)[0].axes)
        return x

    jax.vmap(one, axis_name="i")(x)
    return found[0]


def inner_map(name):
    return lambda z: jnp.sum(jax.vmap(lambda y: jax.lax.psum(y, name), axis_name=name)(jnp.stack([z, z])))


def test_which_axes_are_counted():
    one = Mesh(np.array(jax.devices()[:1]), ("j",))
    own = lambda z: jax.shard_map(lambda y: jax.lax.psum(y, "j"), mesh=one, in_specs=P(), out_specs=P())(z)
    loop = lambda body: lambda z: jax.lax.fori_loop(0, 3, lambda _, z: body(z), z)
    psum = lambda z: jax.lax.psum(z, "i")
    assert axes_of(jnp.sin) == ()
    assert axes_of(lambda z: z + jax.lax.axis_index("i").astype(z.dtype)) == ()
    assert axes_of(lambda z: z + jax.lax.axis_size("i")) == ()
    assert axes_of(inner_map("j")) == axes_of(inner_map("i")) == ()
    assert axes_of(own) == ()
    ruled = jax.custom_jvp(psum)
    ruled.defjvps(lambda t, out, z: psum(t))
    for f in (psum, jax.jit(psum), loop(psum), jax.checkpoint(psum), ruled):
        assert axes_of(f) == ("i",)
        assert axes_of(lambda z, f=f: inner_map("j")(z) + f(z)) == ("i",)
    for f in (jax.lax.pmin, jax.lax.pmax, jax.lax.pmean, jax.lax.all_gather):
        assert axes_of(lambda z, f=f: f(z, "i")) == ("i",)
    assert axes_of(lambda z: jax.lax.cond(z > 0, psum, lambda z: z, z)) == ("i",)
    assert axes_of(lambda z: jax.lax.psum_scatter(jnp.stack([z, z]), "i")) == ("i",)


def test_an_axis_bound_around_is_counted_inside_a_shard_map_over_another():
    mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = []
    both = lambda z: jax.lax.psum(z, "i") + jax.lax.psum(z, "j")
    inner = jax.shard_map(both, in_specs=P(), out_specs=P(), axis_names={"j"}, check_vma=False)

    def outer(x):
        found.append(_trace.hoist(inner, x)[0].axes)
        return x

    around = jax.shard_map(outer, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"i"}, check_vma=False)
    jax.jit(around)(X)
    assert found[0] == ("i",)


def test_the_sharding_of_what_a_jit_reads_is_kept():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 2)), jax.sharding.NamedSharding(mesh, P("i")))
        z = deq.fixed_point(jax.jit(lambda z: 0.5 * z + x), jnp.zeros_like(x), solver=PICARD, batch_ndim=1).value
        assert jax.typeof(z).sharding.spec == P("i", None)
        close(z, np.full((8, 2), 2.0))
