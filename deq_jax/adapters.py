"""Other libraries' solvers with our derivatives, and our solvers in other libraries' loops."""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from deq_jax._as_optimizer import GradientTransformation, as_optimizer
from deq_jax._checks import check_stopping
from deq_jax._config import STATIC, Budget, Number, config
from deq_jax._states import Layout, check_no_carried, frozen
from deq_jax._trace import hoist
from deq_jax.adjoints import Adjoint, Implicit, Probe
from deq_jax.fixed_point import Solution
from deq_jax.halves import attach
from deq_jax.solvers import Anderson, Picard, Solver
from deq_jax.solvers.loop import stats_at

__all__ = ["GradientTransformation", "Optax", "as_optimizer", "implicit", "scipy_root"]


def implicit(
    f: Callable,
    *,
    adjoint: Adjoint = Implicit(),  # noqa: B008  frozen
    solver: Solver = Anderson(),  # noqa: B008
    batch_ndim: int = 0,
    has_aux: bool = False,
) -> Callable[[Callable], Callable]:
    """A decorator that gives `run(z0, *args, **options) -> z` the derivative that a fixed point of f has in args.

    `run` may find z in any way: by a loop that cannot be differentiated, a callback, a table. No gradient flows to z0.
    For the root of F(z, *args) = 0 (jaxopt's `custom_root`) take f = z − F(z, *args): its derivative is the same, and
    so is its linear system, (I − J_f) = J_F. docs/migration.md says which adjoint solves that system.

    All keyword arguments of a call go to `run`. Those that f accepts by name also go to f, and are differentiable like
    args. So do the defaults of `run` for names that f has. An option of `run` alone, such as a tolerance, has no
    derivative. A keyword that f accepts and `run` does not is an error, because `run` would solve another problem.

    The decorated function takes one keyword of its own, `probe=`: zeros in the shape of the problems, whose cotangent
    reports how the backward solve ended (see `Probe`).

    Args:
      f: called as f(z, *args, **options), and returns the structure of z.
      adjoint, batch_ndim: as for `attach`.
      solver: the solver that the adjoint derives its backward solver from.
      has_aux: whether run returns (z, aux). No gradient flows through aux.

    Raises:
      TypeError: if f is not a function; if `run` or f has a parameter called probe; at a call, for a keyword that `run`
        does not accept.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> @deq.adapters.implicit(lambda z, a: 0.5 * (z + a / z))
    ... def square_root(z0, a):
    ...     return jax.lax.while_loop(lambda z: abs(z * z - a) > 1e-5, lambda z: 0.5 * (z + a / z), z0)
    >>> loss = lambda a, probe: square_root(1.0, a, probe=probe)
    >>> slope, backward = jax.grad(loss, argnums=(0, 1))(4.0, deq.Probe.zeros())
    >>> bool(abs(slope - 0.25) < 1e-4), deq.Status(int(backward.status)).name
    (True, 'CONVERGED')
    """
    if not callable(f):
        raise TypeError(f"implicit(f) takes the function whose fixed point is found, as f(z, *args); got {f!r}")

    def decorate(run: Callable) -> Callable:
        split = _split_options(f, run)

        @functools.wraps(run)
        def differentiable(z0, *args, probe: Probe | None = None, **options):
            of_f = split(args, options)
            found = run(frozen(z0), *frozen(args), **frozen(options))
            z, aux = found if has_aux else (found, None)
            # f captures its options: arrays among them are still differentiable, and other objects pass unchanged.
            cell = lambda z, *args: f(z, *args, **of_f)
            z = attach(cell, z, *args, adjoint=adjoint, solver=solver, batch_ndim=batch_ndim, probe=probe)
            return (z, jax.lax.stop_gradient(aux)) if has_aux else z

        return differentiable

    return decorate


def _split_options(f: Callable, run: Callable) -> Callable[[tuple, dict], dict]:
    """A function from the args and options of a call to the keyword arguments of f; TypeError if f and run disagree."""
    f_names, f_any = _keywords(f)
    run_names, run_any = _keywords(run)
    for name, names in (("run", run_names), ("f", f_names)):
        if "probe" in names:
            raise TypeError(f"implicit: {name} has a parameter called probe, which is the decorated function's own")

    def split(args: tuple, options: dict) -> dict:
        for name in options:
            if not (run_any or name in run_names):
                whose = "f takes it, and then z is the fixed point of another f" if name in f_names else "nor does f"
                who = getattr(run, "__name__", repr(run))
                raise TypeError(f"{who} takes no keyword {name!r} ({whose}); it takes {sorted(run_names)}")
        # `run` also solved with its defaults, except those of the parameters that args fill.
        defaults = {name: value for name, (value, place) in run_names.items() if place > len(args)}
        used = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty} | options
        return {name: value for name, value in used.items() if name in f_names or (f_any and name in options)}

    return split


def _keywords(function: Callable) -> tuple[dict[str, tuple[Any, float]], bool]:
    """{name: (default, place)} of the parameters, after the first, that a keyword can name; and whether there is a **.

    The place of a keyword-only parameter is inf.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return {}, True
    named = {}
    for place, parameter in enumerate(parameters):
        if parameter.kind == parameter.KEYWORD_ONLY:
            named[parameter.name] = parameter.default, math.inf
        elif parameter.kind == parameter.POSITIONAL_OR_KEYWORD and place > 0:
            named[parameter.name] = parameter.default, place
    return named, any(p.kind == p.VAR_KEYWORD for p in parameters)


SCIPY_METHODS = (
    "hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov",
    "df-sane",
)  # fmt: skip


def scipy_root(
    f: Callable,
    z0: PyTree,
    *args: PyTree,
    method: str = "hybr",
    rtol: float = 1e-6,
    options: dict[str, Any] | None = None,
    adjoint: Adjoint = Implicit(),  # noqa: B008
    probe: Probe | None = None,
) -> Solution:
    """The fixed point of f found by `scipy.optimize.root`, differentiable; works under jit, grad and vmap.

    It is for hard small systems, and as a reference: each of our solvers is faster. It solves one problem. 'hybr' and
    'lm' get the dense Jacobian, so they take at most some hundreds of unknowns; 'krylov' and 'df-sane' take more.
    SciPy runs on the host in float64 (under jit in a callback), and calls f on the CPU from there. Under jit on a
    machine with one core, such a callback can wait forever for JAX's only thread if it reads megabytes: make the call
    eager there.

    Args:
      method, options: as for `scipy.optimize.root`. If SciPy gives up with an exception, the value is z0.
      rtol: SciPy's `tol`. It also decides, as everywhere in this library, whether Stats says CONVERGED:
        ‖f(z) − z‖ ≤ rtol ‖f(z)‖ at the z that SciPy returns, whatever SciPy says about it.
      adjoint, probe: as for `attach`, with batch_ndim=0.

    Returns:
      Solution(value, stats). `stats.steps` includes one evaluation of ours, after SciPy's.

    Raises:
      ValueError: if SciPy has no such method.
      TypeError: for carried leaves in z0.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> cell = lambda z, a: jnp.cos(a * z)
    >>> root = lambda a: deq.adapters.scipy_root(cell, jnp.zeros(()), a)
    >>> bool(root(1.0).stats.converged), round(float(jax.grad(lambda a: root(a).value)(1.0)), 3)
    (True, -0.297)
    """
    if method not in SCIPY_METHODS:
        close = difflib.get_close_matches(str(method), SCIPY_METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(SCIPY_METHODS)}"
        raise ValueError(f"scipy.optimize.root has no method {method!r}; {hint}")
    z0 = jax.tree.map(jnp.asarray, jax.lax.stop_gradient(z0))
    check_no_carried(z0, "z0", "SciPy has no place for what f returns for it: use fixed_point, or let f capture it")
    # A callback cannot capture traced values, so all that f reads is passed through it.
    pure, inputs, other = hoist(lambda z: f(z, *args), z0)
    layout = Layout(z0, 0, flat=True)
    residual = lambda flat, *reads: layout.pack(pure(layout.unpack(flat), *reads)) - flat
    start, reads = layout.pack(z0), jax.lax.stop_gradient((inputs, other))
    on_host = functools.partial(_scipy, jax.jit(residual), jax.jit(jax.jacfwd(residual)), method, rtol, options)
    shapes = jax.ShapeDtypeStruct(start.shape, start.dtype), jax.ShapeDtypeStruct((), jnp.int32)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((start, reads))):
        flat, steps = jax.pure_callback(on_host, shapes, start, *reads, vmap_method="sequential")
    else:
        flat, steps = map(jnp.asarray, on_host(start, *reads))

    z = layout.unpack(flat)
    stats = stats_at(lambda z: pure(z, *reads), z, Picard(rtol=rtol), steps, 0)
    value = attach(f, z, *args, adjoint=adjoint, solver=Anderson(rtol=rtol), probe=probe)
    return Solution(value, jax.lax.stop_gradient(stats))


def _scipy(residual, jacobian, method, rtol, options, start, *reads):
    """(z, evaluations) of one solve on the host; z has the dtype of `start`."""
    from scipy import optimize  # slow to import

    start, *reads = jax.tree.map(np.asarray, (start, *reads))
    at = lambda flat: flat.astype(start.dtype)
    in_float64 = lambda f: lambda flat: np.asarray(f(at(flat), *reads), np.float64)
    keywords: dict[str, Any] = {"options": options}
    if method in ("hybr", "lm"):
        keywords["jac"] = in_float64(jacobian)
    elif method == "krylov":
        # SciPy chooses the step of its difference quotients as if f were exact in float64.
        rdiff = {"rdiff": float(np.finfo(start.dtype).eps) ** 0.5}
        keywords["options"] = {**(options or {}), "jac_options": rdiff | (options or {}).get("jac_options", {})}
    try:
        found = optimize.root(in_float64(residual), start.astype(np.float64), method=method, tol=rtol, **keywords)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):  # an exception must not leave a compiled program
        return start, np.int32(0)
    return at(found.x), np.int32(found.get("nfev", found.get("nit", 0)))


@config
class Optax:
    """An optax optimizer as a solver, with the residual f(z) − z in place of the negative gradient.

    For f(z) = z − ∇L(z), whose fixed points are stationary points of L, this is that optimizer on L; `optax.sgd(1.0)`
    is `Picard`. Momentum and Adam also work on maps that are no gradients, with less justification. A learning rate
    that decays must leave enough steps. What an optimizer shares between entries, such as a clip by global norm, is
    shared between the problems of a batch too.

    Make `tx` once: its functions are compared by identity, so a new `tx` is a new program. Optax is not imported here,
    and any object with `init` and `update` of arrays will do.

    Raises:
      TypeError: if `tx` is not such an object.

    >>> import jax.numpy as jnp, optax, deq_jax as deq
    >>> solver = deq.adapters.Optax(optax.sgd(0.3, momentum=0.5), rtol=1e-4)
    >>> bool(deq.fixed_point(jnp.cos, jnp.zeros(3), solver=solver).stats.converged)
    True
    """

    tx: Any = dataclasses.field(metadata=STATIC)
    rtol: Number | None = None  # as for the solvers of this library
    atol: Number = 0.0
    max_steps: Budget = 1000

    def __post_init__(self):
        if isinstance(self.tx, type) or not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise TypeError(f"Optax.tx must be an optimizer such as optax.adam(1e-2), got {self.tx!r}")
        check_stopping(self)

    def init(self, z: Float[Array, "*batch dim"]) -> Any:
        return self.tx.init(z)

    def update(
        self, residual: Float[Array, "*batch dim"], state: Any, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], Any]:
        return self.tx.update(-residual, state, z)
