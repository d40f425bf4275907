"""Errors before tracing: what was expected, what came, and where. An unhelpful message is a bug."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov

SOLVERS = [deq.Picard, deq.Anderson, deq.Broyden]
ADJOINTS = [
    deq.Implicit(),
    deq.ImplicitJVP(),
    deq.Phantom(),
    deq.Neumann(),
    deq.JFB(),
    deq.Unroll(),
    deq.Reversible(0.1),
]
cos = jnp.cos


def both(z):
    return {"a": jnp.cos(z["a"]), "b": jnp.cos(z["b"])}


def z0():
    return jnp.zeros(3)


def pair():
    return {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2,))}


@jax.custom_vjp
def reverse_only(z):
    return z


reverse_only.defvjp(lambda z: (z, None), lambda _, ct: (ct,))


@deq.config
class Counting:
    """Plain iteration with a count that all problems share."""

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 100

    def init(self, z):
        return jnp.zeros((), jnp.int32)

    def update(self, residual, state, z):
        return residual, state + 1


def begun(**options):
    """Two problems, of which the first is finished and the second still runs."""
    gain = jnp.array([0.01, 0.99])
    state = deq.start(lambda z, gain: gain * cos(z), jnp.zeros(2), gain, batch_ndim=1, axes=(0,), **options)
    return deq.advance(state, 4)


def refill(which=(True, False), new_z0=(0.0, 0.0), new_args=((0.5, 0.5),), **options):
    arrays = [arg if arg is None else jnp.array(arg) for arg in new_args]
    return deq.refill(begun(**options), jnp.array(which), jnp.array(new_z0), tuple(arrays))


# name: (call, exception, words that the message must have)
def generator(z):
    yield 0.5 * z


CALLS = {
    "structure of f(z)": (
        lambda: deq.fixed_point(lambda z: (z["a"], z["b"]), pair()),
        TypeError,
        ["f must return the structure of z0", "'a'", "'b'", "got", "(*, *)"],
    ),
    "f(z) without a leaf": (
        lambda: deq.fixed_point(lambda z: {"a": z["a"]}, pair()),
        TypeError,
        ["structure of z0", "got"],
    ),
    "root of a pair": (
        lambda: deq.root(lambda z: (z, z), z0()),
        TypeError,
        ["F must return the structure of z0", "got"],
    ),
    "root of another shape": (
        lambda: deq.root(lambda z: {"a": z["a"], "b": z["b"][:1]}, pair()),
        ValueError,
        ["F(z)['b'] must have the shape of z0, (2,); got (1,)"],
    ),
    "root of another dtype": (
        lambda: deq.root(lambda z: z.astype(jnp.bfloat16), z0()),
        TypeError,
        ["F(z) must have the dtype of z0, float32; got bfloat16", "what F returns"],
    ),
    "root of nothing callable": (lambda: deq.root(3.0, z0()), TypeError, ["F must be callable", "float"]),
    "root of no arrays": (lambda: deq.root(lambda z: "z", z0()), TypeError, ["F must return arrays", "F(z) is 'z'"]),
    "root without a pair": (lambda: deq.root(cos, z0(), has_aux=True), TypeError, ["F must return a pair"]),
    "root without forward mode": (
        lambda: deq.root(reverse_only, z0()),
        TypeError,
        ["Newton differentiates F in forward mode", "solver=NewtonKrylov() or Broyden()"],
    ),
    "products": (
        lambda: deq.NewtonKrylov(products="vjp"),
        ValueError,
        ["NewtonKrylov.products must be one of differences, jvp; got 'vjp'"],
    ),
    "Robust with derivatives": (
        lambda: deq.Robust(stages=(deq.Newton(),)),
        ValueError,
        ["Robust has no derivatives of f to show", "Newton("],
    ),
    "as_optimizer with derivatives": (
        lambda: deq.adapters.as_optimizer(deq.Newton()),
        ValueError,
        ["as_optimizer has no derivatives of f to show"],
    ),
    "f(z) is None": (lambda: deq.fixed_point(lambda z: None, z0()), TypeError, ["structure of z0", "None"]),
    "shape of f(z)": (
        lambda: deq.fixed_point(lambda z: {"a": z["a"], "b": z["b"][:1]}, pair()),
        ValueError,
        ["f(z)['b']", "shape of z0, (2,)", "got (1,)"],
    ),
    "broadcasting f(z)": (
        lambda: deq.fixed_point(lambda z: z[:, None] + z[None], z0()),
        ValueError,
        ["f(z)", "(3,)", "got (3, 3)"],
    ),
    "dtype of f(z)": (
        lambda: deq.fixed_point(lambda z: z.astype(jnp.bfloat16), z0()),
        TypeError,
        ["f(z)", "dtype of z0, float32", "got bfloat16", "Cast"],
    ),
    "integer f(z)": (
        lambda: deq.fixed_point(lambda z: jnp.zeros(3, jnp.int32), z0()),
        TypeError,
        ["f(z)", "float32", "got int32"],
    ),
    "integer z0": (lambda: deq.fixed_point(cos, jnp.arange(3)), TypeError, ["z0", "floats", "int32"]),
    "floats from f for an integer leaf of z0": (
        lambda: deq.fixed_point(both, {"a": jnp.zeros(3), "b": jnp.arange(3)}),
        TypeError,
        ["f(z)['b']", "dtype of z0, int32", "got float32"],
    ),
    "boolean z0": (lambda: deq.fixed_point(cos, jnp.ones(3, bool)), TypeError, ["z0", "floats", "bool"]),
    "key z0": (lambda: deq.fixed_point(cos, jax.random.key(0)), TypeError, ["z0", "floats", "key"]),
    "string z0": (lambda: deq.fixed_point(cos, "zeros"), TypeError, ["z0", "array of floats", "'zeros'"]),
    "z0 is None": (lambda: deq.fixed_point(cos, None), ValueError, ["z0 has no arrays", "None"]),
    "z0 is {}": (lambda: deq.fixed_point(cos, {}), ValueError, ["z0 has no arrays", "{}"]),
    "zero-size z0": (lambda: deq.fixed_point(cos, jnp.zeros((0, 3))), ValueError, ["z0", "empty", "(0, 3)"]),
    "zero-size leaf": (
        lambda: deq.fixed_point(both, {"a": jnp.zeros(3), "b": jnp.zeros(0)}),
        ValueError,
        ["z0['b']", "empty", "(0,)"],
    ),
    "f is an array": (lambda: deq.fixed_point(z0(), z0()), TypeError, ["f must be callable", "f(z, *args)"]),
    "f is None": (lambda: deq.fixed_point(None, z0()), TypeError, ["f must be callable", "NoneType"]),
    "batch_ndim beyond a leaf": (
        lambda: deq.fixed_point(both, pair(), batch_ndim=2),
        ValueError,
        ["batch_ndim=2", "z0['b']", "(2,)"],
    ),
    "leaves disagree": (
        lambda: deq.fixed_point(both, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4, 3))}, batch_ndim=1),
        ValueError,
        ["agree", "z0['b']", "(4, 3)", "(2,)"],
    ),
    "negative batch_ndim": (
        lambda: deq.fixed_point(cos, z0(), batch_ndim=-1),
        ValueError,
        ["batch_ndim", ">= 0", "-1"],
    ),
    "batch_ndim is a float": (
        lambda: deq.fixed_point(cos, z0(), batch_ndim=1.0),
        (TypeError, ValueError),
        ["batch_ndim", "int", "1.0"],
    ),
    "batch_ndim is True": (
        lambda: deq.fixed_point(cos, z0(), batch_ndim=True),
        (TypeError, ValueError),
        ["batch_ndim", "int", "True"],
    ),
    "solver is a class": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Anderson),
        TypeError,
        ["solver must be", "Anderson()", "class"],
    ),
    "solver is a string": (
        lambda: deq.fixed_point(cos, z0(), solver="anderson"),
        TypeError,
        ["solver must be", "Anderson()", "'anderson'"],
    ),
    "solver is an adjoint": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Implicit()),
        TypeError,
        ["solver must be", "Implicit("],
    ),
    "adjoint is a class": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Phantom),
        TypeError,
        ["adjoint must be", "Implicit()", "class"],
    ),
    "adjoint is a string": (
        lambda: deq.fixed_point(cos, z0(), adjoint="implicit"),
        TypeError,
        ["adjoint must be", "Implicit()", "'implicit'"],
    ),
    "adjoint is a solver": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Anderson()),
        TypeError,
        ["adjoint must be", "Anderson("],
    ),
    "backward solver is a class": (
        lambda: deq.Implicit(deq.Anderson),
        TypeError,
        ["Implicit.solver", "Anderson()"],
    ),
    "backward solver is a string": (
        lambda: deq.Implicit("anderson"),
        TypeError,
        ["Implicit.solver", "'anderson'"],
    ),
    "probe of another batch": (
        lambda: deq.fixed_point(cos, jnp.zeros((2, 3)), batch_ndim=1, probe=deq.Probe.zeros((3,))),
        ValueError,
        ["probe", "Probe.zeros((2,))", "(3,)"],
    ),
    "probe without a batch": (
        lambda: deq.fixed_point(cos, jnp.zeros((2, 3)), batch_ndim=1, probe=deq.Probe.zeros()),
        ValueError,
        ["probe", "Probe.zeros((2,))"],
    ),
    "has_aux without a pair": (
        lambda: deq.fixed_point(cos, z0(), has_aux=True),
        TypeError,
        ["has_aux", "pair (z, aux)", "float32[3]"],
    ),
    "has_aux with three": (
        lambda: deq.fixed_point(lambda z: (z, z, z), z0(), has_aux=True),
        TypeError,
        ["has_aux", "pair (z, aux)"],
    ),
    "a pair without has_aux": (
        lambda: deq.fixed_point(lambda z: (jnp.cos(z), z), z0()),
        TypeError,
        ["structure of z0", "got"],
    ),
    "a type among args": (
        lambda: deq.fixed_point(lambda z, p: z, z0(), {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}),
        TypeError,
        ["args[0]['w']", "array", "ShapeDtypeStruct"],
    ),
    "a type as z0": (
        lambda: deq.fixed_point(lambda z: z, {"h": jax.ShapeDtypeStruct((3,), jnp.float32)}),
        TypeError,
        ["z0['h']", "array", "ShapeDtypeStruct"],
    ),
    "a state of 8 bits": (
        lambda: deq.fixed_point(lambda z: z, jnp.zeros(2, jnp.float8_e5m2)),
        TypeError,
        ["z0", "float8_e5m2"],
    ),
    "text from f": (
        lambda: deq.fixed_point(lambda z: {"a": "z"}, {"a": z0()}),
        TypeError,
        ["f must", "f(z)['a']", "'z'"],
    ),
    "a generator as f": (lambda: deq.fixed_point(generator, z0()), TypeError, ["f must", "generator", "yield"]),
    "Unroll with a traced budget": (
        lambda: jax.jit(lambda n: deq.fixed_point(cos, z0(), solver=deq.Picard(max_steps=n), adjoint=deq.Unroll()))(5),
        TypeError,
        ["Unroll", "max_steps", "Python int"],
    ),
    "Unroll that is not as deep as its budget": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Picard(max_steps=jnp.asarray(5)), adjoint=deq.Unroll(depth=4)),
        ValueError,
        ["Unroll.depth must be at least max_steps=5, got 4"],
    ),
    "a traced budget names what takes one": (
        lambda: jax.jit(lambda n: deq.fixed_point(cos, z0(), solver=deq.Picard(max_steps=n), adjoint=deq.Unroll()))(5),
        TypeError,
        ["Unroll needs max_steps as a Python int", "Use Implicit, Phantom, Neumann or JFB"],
    ),
    "a norm of another name": (
        lambda: deq.Anderson(norm="linf"),
        ValueError,
        ["Anderson.norm must be one of 'leaf', 'l2', 'rms', 'max', 'token', 'entry'", "Weighted", "got 'linf'"],
    ),
    "a norm that is no name": (lambda: deq.Picard(norm=2), TypeError, ["Picard.norm must be the name", "got 2"]),
    "weights of a norm of another name": (
        lambda: deq.Weighted(1.0, "linf"),
        ValueError,
        ["Weighted.norm must be one of 'leaf'", "got 'linf'"],
    ),
    "a negative weight": (
        lambda: deq.Weighted({"a": np.array([1.0, -1.0])}),
        ValueError,
        ["Weighted.weights['a'] must be finite and >= 0", "got -1.0 at index (1,)"],
    ),
    "weights of another structure": (
        lambda: deq.fixed_point(both, pair(), solver=deq.Picard(norm=deq.Weighted({"a": 1.0}))),
        TypeError,
        ["solver.norm.weights must have the structure of z0", "'b'", "got", "{'a': *}"],
    ),
    "weights of another shape": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Picard(norm=deq.Weighted(np.ones(4)))),
        ValueError,
        ["solver.norm.weights must be a number, or broadcast to (3,)", "got shape (4,)"],
    ),
    "tolerances of another shape": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Picard(atol=np.ones(4), norm="entry")),
        ValueError,
        ["solver.atol must be a number, or broadcast to (3,)", "got shape (4,)"],
    ),
    "tolerances of another structure": (
        lambda: deq.fixed_point(both, pair(), solver=deq.Picard(atol={"b": 1.0})),
        TypeError,
        ["solver.atol must have the structure of z0", "'a'", "got", "{'b': *}"],
    ),
    "tolerances of entries in a norm that has none": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Picard(atol=np.ones(3))),
        ValueError,
        ["solver.atol must be a number or shape ()", "got shape (3,)", "norm='entry'"],
    ),
    "tolerances of leaves in a norm of the whole": (
        lambda: deq.fixed_point(both, pair(), solver=deq.Picard(atol={"a": 1.0, "b": 2.0}, norm="l2")),
        ValueError,
        ["solver.atol must be a number or shape ()", "got {'a': 1.0, 'b': 2.0}", "norm='entry'"],
    ),
    "tolerances of problems or of entries": (
        lambda: deq.fixed_point(cos, jnp.zeros((3, 3)), solver=deq.Picard(atol=np.ones(3), norm="entry"), batch_ndim=1),
        ValueError,
        ["solver.atol of shape (3,) may be a number for each problem or for each entry", "(3, 1) or (1, 3)"],
    ),
    "tolerances of a backward solver": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Implicit(deq.Picard(atol=np.ones(4), norm="entry"))),
        ValueError,
        ["adjoint.solver.atol must be a number, or broadcast to (3,)", "got shape (4,)"],
    ),
    "more steps than the budget has": (
        lambda: deq.Anderson(max_steps=np.array([20, 5]), min_steps=6),
        ValueError,
        ["Anderson.min_steps must be at most max_steps=5, got 6"],
    ),
    "a number of least steps below zero": (
        lambda: deq.Anderson(min_steps=-1),
        ValueError,
        ["Anderson.min_steps must be >= 0, got -1"],
    ),
    "an iterate of another name": (
        lambda: deq.Picard(returns="first"),
        ValueError,
        ["Picard.returns must be 'best' or 'last', got 'first'"],
    ),
    "the last iterate of a solver whose steps are trials": (
        lambda: deq.NewtonKrylov(returns="last"),
        ValueError,
        ["NewtonKrylov.returns must be 'best', got 'last'", "trials"],
    ),
    "Unroll with a solver that sees few iterates": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Anderson(test_every=3), adjoint=deq.Unroll()),
        ValueError,
        ["Unroll looks at each iterate", "test_every=3", "take test_every=1"],
    ),
    "an optimizer made of an optimizer": (
        lambda: deq.adapters.as_optimizer(optax.sgd(0.1)),
        TypeError,
        ["as_optimizer(solver) must be a solver", "has no rtol"],
    ),
    "a root with a tolerance for each entry": (
        lambda: deq.root(lambda z: z - 1, jnp.zeros(3), solver=deq.Newton(atol=jnp.ones(3))),
        ValueError,
        ["root: atol must be one number, or one a problem", "separate leaves of z"],
    ),
    "a root judged by entry": (
        lambda: deq.root(lambda z: z - 1, jnp.zeros(3), solver=deq.Newton(norm="entry", atol=1.0)),
        ValueError,
        ["norm must be 'leaf'", "separate leaves of z"],
    ),
    "new args that are no tuple": (
        lambda: deq.refill(
            deq.advance(deq.start(lambda z, g: g * jnp.cos(z), jnp.zeros(2), jnp.ones(2), batch_ndim=1, axes=(0,)), 99),
            jnp.array([True, False]),
            jnp.zeros(2),
            jnp.ones(2),
        ),
        ValueError,
        ["new_args must be a tuple with an entry for each of 1 args"],
    ),
    "an optimizer of a batch whose leaves do not agree": (
        lambda: deq.adapters.as_optimizer(deq.Anderson(), 1).init({"a": jnp.zeros((2, 3)), "b": jnp.zeros(3)}),
        ValueError,
        ["all leaves of params must agree in their 1 batch axes", "params['b'] has shape (3,)", "(2,)"],
    ),
    "a stage that sees few iterates": (
        lambda: deq.Robust(stages=(deq.Anderson(test_every=3), deq.NewtonKrylov())),
        ValueError,
        ["Robust looks at each iterate", "test_every=3"],
    ),
    "Shine with Picard": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.Picard(), adjoint=deq.Shine()),
        TypeError,
        ["Shine reuses", "forward Broyden", "got solver=Picard", "Use solver=Broyden(), or adjoint=Implicit()"],
    ),
    "Shine with the default solver": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Shine()),
        TypeError,
        ["got solver=Anderson", "solver=Broyden()"],
    ),
    "Shine with NewtonKrylov under jit and grad": (
        lambda: jax.jit(
            jax.grad(lambda a: deq.fixed_point(cos, a, solver=NewtonKrylov(), adjoint=deq.Shine()).value.sum())
        )(z0()),
        TypeError,
        ["got solver=NewtonKrylov", "solver=Broyden()"],
    ),
    "Shine at a z found without memory": (
        lambda: deq.attach(cos, z0(), solver=deq.Broyden(), adjoint=deq.Shine()),
        TypeError,
        ["Shine needs the memory of a Broyden solve", "Implicit()"],
    ),
    "attach through the iterations": (
        lambda: deq.attach(cos, z0(), adjoint=deq.Unroll()),
        TypeError,
        ["Unroll differentiates the iterations", "use Implicit, ImplicitJVP, Phantom, Neumann or JFB"],
    ),
    "attach of Reversible": (
        lambda: deq.attach(cos, z0(), adjoint=deq.Reversible()),
        TypeError,
        ["Reversible differentiates the iterations", "use Implicit"],
    ),
    "Reversible with damping 1": (
        lambda: deq.Reversible(damping=1),
        ValueError,
        ["Reversible.damping", "both excluded", "got 1", "at 1 a step forgets", "use Unroll(checkpoint=True)"],
    ),
    "Reversible with damping 0": (
        lambda: deq.Reversible(0.0),
        ValueError,
        ["Reversible.damping", "got 0.0", "at 0 nothing moves"],
    ),
    "Reversible with damping beyond 1": (
        lambda: deq.Reversible(1.5),
        ValueError,
        ["Reversible.damping", "1.5"],
    ),
    "negative refinement": (lambda: deq.Shine(refine=-1), ValueError, ["Shine.refine", ">= 0", "-1"]),
    "half a refinement": (lambda: deq.Shine(refine=0.5), TypeError, ["Shine.refine", "int", "0.5"]),
    "stop is a number": (lambda: deq.Unroll(stop=1), TypeError, ["Unroll.stop", "True or False", "1"]),
    "a policy by name": (
        lambda: deq.Implicit(on_failure="zero"),
        TypeError,
        ["Implicit.on_failure", "OnFailure.KEEP, OnFailure.ZERO, OnFailure.ONE_STEP", "'zero'"],
    ),
    "a policy by number": (lambda: deq.Implicit(on_failure=1), TypeError, ["OnFailure.ZERO", "got 1"]),
    "a policy by name, of ImplicitJVP": (
        lambda: deq.ImplicitJVP(on_failure="zero"),
        TypeError,
        ["ImplicitJVP.on_failure", "OnFailure.ZERO", "'zero'"],
    ),
    "linear is one of our solvers": (
        lambda: deq.Implicit(linear=deq.Anderson()),
        TypeError,
        ["Implicit.linear", "Dense()", "(matvec, rmatvec, b) -> (u, info)", "got Anderson(", "go to Implicit.solver"],
    ),
    "linear is a class": (
        lambda: deq.ImplicitJVP(linear=deq.Dense),
        TypeError,
        ["ImplicitJVP.linear", "Dense()", "got <class"],
    ),
    "linear is a name": (lambda: deq.Implicit(linear="lu"), TypeError, ["Implicit.linear", "Dense()", "got 'lu'"]),
    "linear returns u alone": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Implicit(linear=lambda matvec, rmatvec, b: b)),
        TypeError,
        ["Implicit.linear must return a pair (u, info)", "got"],
    ),
    "linear returns another shape": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Implicit(linear=lambda matvec, rmatvec, b: (b[:2], None))),
        ValueError,
        ["Implicit.linear must return u", "float32[3]", "got float32[2]"],
    ),
    "linear returns another structure": (
        lambda: deq.fixed_point(both, pair(), adjoint=deq.ImplicitJVP(linear=lambda matvec, rmatvec, b: (b["a"], 0))),
        TypeError,
        ["ImplicitJVP.linear must return u in the structure", "'a'", "got"],
    ),
    "linear captures a traced array": (
        lambda: jax.grad(
            lambda a: deq.fixed_point(
                cos, z0(), adjoint=deq.Implicit(linear=lambda matvec, rmatvec, b: (a * b, 0))
            ).value.sum()
        )(1.0),
        TypeError,
        ["Implicit.linear captures a traced array", "jax.tree_util.Partial(solve, array)"],
    ),
    "too many unknowns for Dense": (
        lambda: deq.fixed_point(cos, jnp.zeros((2, 5000)), adjoint=deq.Implicit(linear=deq.Dense()), batch_ndim=1),
        ValueError,
        ["Implicit.linear", "5000 x 5000", "Dense.max_unknowns is 4096", "take solver="],
    ),
    "no unknowns for Dense": (lambda: deq.Dense(0), ValueError, ["Dense.max_unknowns", ">= 1", "0"]),
    "Dense where problems are coupled": (
        lambda: jax.vmap(
            lambda x: (
                deq.fixed_point(
                    lambda z: jnp.cos(jax.lax.pmean(z, "i")) + x, x, adjoint=deq.ImplicitJVP(linear=deq.Dense())
                ).value
            ),
            axis_name="i",
        )(z0()),
        ValueError,
        ["ImplicitJVP.linear: f communicates along ('i',)", "take solver=", "a callable that sums over these axes"],
    ),
    "Lineax of another solver": (
        lambda: deq.Lineax(deq.Anderson()),
        TypeError,
        ["Lineax.solver must be a solver of lineax", "got Anderson("],
    ),
    "a preconditioner that is an array": (
        lambda: deq.Implicit(preconditioner=jnp.eye(3)),
        TypeError,
        ["Implicit.preconditioner must be a linear function", "got"],
    ),
    "a preconditioner of a solver that is an array": (
        lambda: deq.NewtonKrylov(products="jvp", preconditioner=jnp.eye(3)),
        TypeError,
        ["NewtonKrylov.preconditioner must be a linear function", "got"],
    ),
    "a preconditioner of differences": (
        lambda: deq.NewtonKrylov(preconditioner=lambda v: v),
        ValueError,
        ["NewtonKrylov.preconditioner needs products='jvp'", "got 'differences'"],
    ),
    "a preconditioner of a solver that is not linear": (
        lambda: deq.root(cos, z0(), solver=deq.NewtonKrylov(products="jvp", preconditioner=lambda v: v + 1)),
        ValueError,
        ["NewtonKrylov.preconditioner must be linear", "P(x - 2 y) differs from P(x) - 2 P(y) by"],
    ),
    "a preconditioner of a solver of another shape": (
        lambda: deq.fixed_point(cos, z0(), solver=deq.NewtonKrylov(products="jvp", preconditioner=lambda v: v[:2])),
        ValueError,
        ["NewtonKrylov.preconditioner must return P(v) as float32[3]", "got float32[2]"],
    ),
    "a preconditioner that is not linear": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.Implicit(preconditioner=lambda v: v + 1)),
        ValueError,
        ["Implicit.preconditioner must be linear", "P(x - 2 y) differs from P(x) - 2 P(y) by"],
    ),
    "a preconditioner of another shape": (
        lambda: deq.fixed_point(cos, z0(), adjoint=deq.ImplicitJVP(preconditioner=lambda v: v[:2])),
        ValueError,
        ["ImplicitJVP.preconditioner must return P(v) as float32[3]", "got float32[2]"],
    ),
    "a preconditioner of another dtype, under jit": (
        lambda: jax.jit(
            lambda a: deq.fixed_point(cos, a, adjoint=deq.Implicit(preconditioner=lambda v: v.astype("bfloat16")))
        )(z0()),
        TypeError,
        ["Implicit.preconditioner must return P(v) as float32[3]", "got bfloat16[3]"],
    ),
    "a class as solver of ImplicitJVP": (
        lambda: deq.ImplicitJVP(deq.Anderson),
        TypeError,
        ["ImplicitJVP.solver", "Anderson()"],
    ),
    "forward mode through Implicit": (
        lambda: jax.jvp(lambda a: deq.fixed_point(lambda z: cos(a * z), z0()).value, (1.0,), (1.0,)),
        TypeError,
        ["reverse mode (grad, vjp, jacrev) alone", "for jvp, jacfwd, linearize or hessian", "adjoint=ImplicitJVP()"],
    ),
    "a Hessian through a compiled Implicit": (
        lambda: jax.hessian(jax.jit(lambda a: deq.fixed_point(lambda z: cos(a * z), z0()).value.sum()))(1.0),
        TypeError,
        ["reverse mode (grad, vjp, jacrev) alone", "adjoint=ImplicitJVP()"],
    ),
    "a refill of a running problem": (
        lambda: refill(which=(True, True)),
        ValueError,
        ["refill", "`which`", "these still run: [1]", "advance them first"],
    ),
    "a refill by indices": (lambda: refill(which=(0,)), TypeError, ["which must be booleans", "got int32[1]"]),
    "a refill of another batch": (
        lambda: refill(which=(True, False, True)),
        ValueError,
        ["which must have the batch shape of the state, (2,)", "got (3,)"],
    ),
    "new_z0 of another shape": (
        lambda: refill(new_z0=(0.0,)),
        ValueError,
        ["new_z0 must have the shape of z0, (2,)", "got (1,)"],
    ),
    "new_z0 of another dtype": (
        lambda: deq.refill(begun(), np.array([True, False]), np.zeros(2, np.float16), (np.ones(2, np.float32),)),
        TypeError,
        ["new_z0 must have the dtype of z0, float32", "got float16"],
    ),
    "new_z0 of another structure": (
        lambda: deq.refill(begun(), np.array([True, False]), {"z": jnp.zeros(2)}, (jnp.ones(2),)),
        TypeError,
        ["new_z0 must have the structure of z0", "*", "'z'"],
    ),
    "new_args of another shape": (
        lambda: refill(new_args=((0.5,),)),
        ValueError,
        ["new_args[0] must have the shape of args[0], (2,)", "got (1,)"],
    ),
    "new_args of another structure": (
        lambda: refill(new_args=(None,)),
        TypeError,
        ["new_args[0] must have the structure of args[0]", "None"],
    ),
    "too many new_args": (
        lambda: refill(new_args=((0.5, 0.5), (0.5, 0.5))),
        ValueError,
        ["new_args must be a tuple with an entry for each of 1 args"],
    ),
    "a new value of a shared argument": (
        lambda: deq.refill(deq.advance(deq.start(cos, z0()), 50), True, z0(), (1.0,)),
        ValueError,
        ["new_args must be a tuple with an entry for each of 0 args"],
    ),
    "a new value of an argument that is shared": (
        lambda: deq.refill(deq.advance(deq.start(lambda z, a: cos(a * z), z0(), 0.5), 50), True, z0(), (1.0,)),
        ValueError,
        ["new_args[0] must be None", "by `axes`, the problems share args[0]", "1.0"],
    ),
    "a refill of a solver with a count that problems share": (
        lambda: refill(solver=Counting()),
        TypeError,
        ["refill: the state of Counting has a leaf of shape ()", "all problems share"],
    ),
    "advance by a float": (lambda: deq.advance(deq.start(cos, z0()), 2.5), TypeError, ["n must be an int", "got 2.5"]),
    "advance by True": (lambda: deq.advance(deq.start(cos, z0()), True), TypeError, ["n must be an int", "got True"]),
    "advance by an array": (
        lambda: deq.advance(deq.start(cos, z0()), jnp.arange(2)),
        TypeError,
        ["n must be an int, or an integer array of shape ()", "got int32[2]"],
    ),
    "advance backward": (lambda: deq.advance(deq.start(cos, z0()), -1), ValueError, ["n must be an int >= 0", "-1"]),
    "axes of start": (
        lambda: deq.start(lambda z, a: cos(a * z), jnp.zeros((2, 3)), jnp.ones(3), batch_ndim=1, axes=(0,)),
        ValueError,
        ["axes[0] is 0, so args[0] must begin with the batch of 2", "got shape (3,)"],
    ),
    "start at few iterates": (
        lambda: deq.start(cos, z0(), solver=deq.Picard(test_every=3)),
        ValueError,
        ["start looks at each iterate", "test_every=1"],
    ),
    "zero terms": (lambda: deq.Neumann(0), ValueError, ["Neumann.terms", ">= 1", "0"]),
    "half a term": (lambda: deq.Neumann(1.5), TypeError, ["Neumann.terms", "int", "1.5"]),
    "zero phantom steps": (lambda: deq.Phantom(steps=0), ValueError, ["Phantom.steps", ">= 1"]),
    "phantom damping": (lambda: deq.Phantom(damping=1.5), ValueError, ["Phantom.damping", "1.5"]),
    "checkpoint 0": (lambda: deq.Unroll(checkpoint=0), ValueError, ["Unroll.checkpoint", ">= 1"]),
    "checkpoint string": (lambda: deq.Unroll("sqrt"), TypeError, ["Unroll.checkpoint", "'sqrt'"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_message(name):
    call, exception, words = CALLS[name]
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is missing from {message!r}"


@pytest.mark.parametrize("Solver", SOLVERS)
@pytest.mark.parametrize(
    "field, value, exception",
    [
        ("rtol", -1e-3, ValueError),
        ("rtol", float("nan"), ValueError),
        ("rtol", "1e-3", TypeError),
        ("rtol", True, TypeError),
        ("atol", -1e-9, ValueError),
        ("atol", float("nan"), ValueError),
        ("atol", None, TypeError),
        ("atol", {}, TypeError),
        ("max_steps", -1, ValueError),
        ("max_steps", 10.0, TypeError),
        ("max_steps", "10", TypeError),
        ("max_steps", None, TypeError),
        ("damping", -0.5, ValueError),
        ("damping", 3.0, ValueError),
        ("damping", float("nan"), ValueError),
    ],
)
def test_solver_fields(Solver, field, value, exception):
    with pytest.raises(exception, match=rf"{Solver.__name__}\.{field} must be .*got {value!r}"):
        Solver(**{field: value})
    with pytest.raises(exception, match=rf"{Solver.__name__}\.{field}"):
        dataclasses.replace(Solver(), **{field: value})


@pytest.mark.parametrize(
    "Solver, field, value, exception",
    [
        (deq.Anderson, "history", 0, ValueError),
        (deq.Anderson, "history", -3, ValueError),
        (deq.Anderson, "history", 2.5, TypeError),
        (deq.Anderson, "ridge", -1e-9, ValueError),
        (deq.Anderson, "ridge", float("nan"), ValueError),
        (deq.Broyden, "rank", 0, ValueError),
        (deq.Broyden, "rank", 2.5, TypeError),
    ],
)
def test_memory_fields(Solver, field, value, exception):
    with pytest.raises(exception, match=rf"{Solver.__name__}\.{field} must be .*got {value!r}"):
        Solver(**{field: value})


@pytest.mark.parametrize("Solver, field", [(deq.Anderson, "history"), (deq.Broyden, "rank")])
def test_a_memory_of_an_array_is_refused(Solver, field):
    # It fixes a shape, so it cannot be traced: say so, instead of failing inside a solve.
    with pytest.raises(TypeError, match=f"{Solver.__name__}.{field} must be an int"):
        Solver(**{field: jnp.asarray(3)})


@pytest.mark.parametrize(
    "make, suggestion",
    [
        (lambda: deq.Picard(max_step=3), "max_steps"),
        (lambda: deq.Anderson(max_iter=3), None),
        (lambda: deq.Anderson(histry=3), "history"),
        (lambda: deq.Anderson(tol=3), "rtol"),
        (lambda: deq.Broyden(ranks=3), "rank"),
        (lambda: deq.Phantom(step=3), "steps"),
        (lambda: deq.Neumann(term=3), "terms"),
        (lambda: deq.Unroll(checkpoints=3), "checkpoint"),
        (lambda: deq.Implicit(solvers=None), "solver"),
        (lambda: deq.ResidualTrace(siez=3), "size"),
    ],
)
def test_a_misspelled_option_is_an_error_with_a_suggestion(make, suggestion):
    with pytest.raises(TypeError) as caught:
        make()
    expected = f"did you mean {suggestion!r}?" if suggestion else "has no option 'max_iter'"
    assert expected in str(caught.value)


def test_an_option_of_a_solver_given_to_fixed_point_is_an_error():
    with pytest.raises(TypeError, match="max_steps"):
        deq.fixed_point(cos, z0(), max_steps=3)


def test_a_failing_f_keeps_its_own_message():
    def broken(z):
        raise RuntimeError("the cell is broken")

    with pytest.raises(RuntimeError, match="the cell is broken"):
        deq.fixed_point(broken, z0())


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_output_is_checked_for_every_adjoint(adjoint):
    with pytest.raises(ValueError, match="shape of z0"):
        deq.fixed_point(lambda z: z[:1], z0(), adjoint=adjoint)


def test_errors_come_before_any_evaluation_also_under_jit_and_grad():
    with pytest.raises(ValueError, match="shape of z0"):
        jax.jit(lambda z: deq.fixed_point(lambda y: y[:1], z).value)(z0())
    with pytest.raises(TypeError, match="structure of z0"):
        jax.grad(lambda w: deq.fixed_point(lambda y: (w * y,), z0()).value.sum())(1.0)


def test_a_weak_or_numpy_z0_is_taken():
    for start in (0.0, np.zeros(()), np.float32(0), jnp.zeros(())):
        z, stats = deq.fixed_point(cos, start, solver=deq.Picard())
        assert stats.converged and z.dtype == jnp.float32


def test_the_look_for_infinite_entries_passes_the_flag_that_looks_for_them_too():
    z0 = jnp.zeros((3, 1, 2))  # a shape that no other test has traced the check for
    with jax.debug_infs(True):
        assert deq.solve(lambda z: 0.5 * jnp.cos(z), z0).stats.converged


@pytest.mark.parametrize("solver", [deq.Broyden, deq.NewtonKrylov, deq.Robust])
def test_rarer_tests_are_refused_by_solvers_that_learn_from_each_step(solver):
    assert solver(test_every=1).test_every == 1
    words = rf"^{solver.__name__} looks at each iterate, and {solver.__name__}\(.*test_every=2.*take test_every=1$"
    with pytest.raises(ValueError, match=words):
        solver(test_every=2)


def test_every_solver_has_the_options_of_the_loop_first():
    for solver in (deq.Picard, deq.Anderson, deq.Broyden, deq.NewtonKrylov, deq.Robust):
        names = [field.name for field in dataclasses.fields(solver)]
        assert names[:4] == ["rtol", "atol", "max_steps", "test_every"] and names[4:7] == [
            "norm",
            "min_steps",
            "returns",
        ]


def test_another_way_to_gather_is_refused():
    with pytest.raises(ValueError, match="gather must be 'once' or 'each', got 'never'"):
        deq.fixed_point(jnp.cos, jnp.zeros(3), gather="never")


# ---- a problem that is split over a named axis -------------------------------------------------------------


def on_four_devices(axis, axis_name, **options):
    """Solves 4 problems, or one in 4 pieces, of which each device of the axis "model" has one."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec(axis)
    solve = lambda x: deq.solve(cos, x, batch_ndim=1, axis_name=axis_name, **options).value
    return jax.shard_map(solve, mesh=mesh, in_specs=over, out_specs=over)(jnp.ones((4, 4)))


class Flat(deq.Picard):
    flat = True


def test_a_name_of_no_axis_is_refused():
    with pytest.raises(ValueError, match="axis_name='expert' is no axis of a `shard_map` around this call"):
        on_four_devices("model", "expert")
    with pytest.raises(ValueError, match="axis_name='model' is no axis"):
        deq.fixed_point(cos, z0(), axis_name="model")


def test_an_axis_over_which_nothing_is_split_is_refused():
    with pytest.raises(
        ValueError, match="axis_name='model' names an axis .* but z0, and what f returns for it, is the"
    ):
        on_four_devices(None, "model")


def test_a_flat_solver_refuses_a_problem_that_is_split():
    with pytest.raises(TypeError, match=r"Flat works on flat vectors.*is split over axis_name=\('model',\)"):
        on_four_devices("model", "model", solver=Flat())


def test_newton_refuses_a_root_that_is_split():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    solve = lambda x: deq.root(lambda z: z**3 - x, x, solver=deq.Newton(), axis_name="model").value
    over = jax.sharding.PartitionSpec("model")
    with pytest.raises(TypeError, match=r"Newton works on flat vectors.*over axis_name=\('model',\).*NewtonKrylov\(\)"):
        jax.shard_map(solve, mesh=mesh, in_specs=over, out_specs=over)(jnp.ones(4))
