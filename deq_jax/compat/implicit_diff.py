"""jaxopt's `implicit_diff`: the derivative of a root or a fixed point, however it was found."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import PyTree

from deq_jax._states import frozen, subtract
from deq_jax.adjoints import Implicit
from deq_jax.halves import attach


def normal_cg(matvec: Callable, rmatvec: Callable, b: PyTree) -> tuple[PyTree, None]:
    """Conjugate gradients for Aᵀ A u = Aᵀ b: jaxopt's default, for any invertible A."""
    return jax.scipy.sparse.linalg.cg(lambda v: rmatvec(matvec(v)), rmatvec(b), tol=1e-6)[0], None


@functools.lru_cache(64)  # programs are compared by it: a new one at each call would be compiled again
def linear_adjoint(solve: Callable | None) -> Implicit:
    """The adjoint whose system jaxopt's `solve(matvec, b)` solves; normal_cg without one."""
    given: Any = solve
    return Implicit(linear=normal_cg if solve is None else lambda matvec, rmatvec, b: (given(matvec, b), None))


def root_vjp(
    optimality_fun: Callable, sol: PyTree, args: tuple, cotangent: PyTree, solve: Callable | None = None
) -> tuple:
    """The cotangents of args, for the cotangent of a sol with optimality_fun(sol, *args) = 0.

    >>> root_vjp(lambda x, a: x**2 - a, jnp.array(2.0), (jnp.array(4.0),), jnp.array(1.0))[0].round(4).tolist()
    0.25
    """
    at_root = lambda *args: _attached(optimality_fun, sol, args, solve)
    return jax.vjp(at_root, *jax.tree.map(jnp.asarray, args))[1](cotangent)


def root_jvp(
    optimality_fun: Callable, sol: PyTree, args: tuple, tangents: tuple, solve: Callable | None = None
) -> PyTree:
    """The tangent of a sol with optimality_fun(sol, *args) = 0, for the tangents of args.

    >>> root_jvp(lambda x, a: x**2 - a, jnp.array(2.0), (4.0,), (1.0,)).round(4).tolist()
    0.25
    """
    if len(args) != len(tangents):
        raise ValueError(f"args and tangents must have one length, got {len(args)} and {len(tangents)}")
    args = jax.tree.map(jnp.asarray, args)
    tangents = jax.tree.map(lambda x, dot: jnp.asarray(dot, x.dtype), args, tangents)
    _, b = jax.jvp(lambda *args: optimality_fun(sol, *args), args, tangents)
    _, product = jax.linearize(lambda sol: optimality_fun(sol, *args), sol)
    transposed = lambda v: jax.linear_transpose(product, v)(v)[0]
    linear: Any = linear_adjoint(solve).linear
    return jax.tree.map(jnp.negative, linear(product, transposed, b)[0])


def _attached(optimality_fun: Callable, sol: PyTree, args: tuple, solve: Callable | None) -> PyTree:
    # z = z − F(z) has the roots of F as fixed points, and I − J is the Jacobian of F.
    cell = lambda z, *args: subtract(z, optimality_fun(z, *args))
    return attach(cell, sol, *args, adjoint=linear_adjoint(solve))


def custom_root(
    optimality_fun: Callable,
    has_aux: bool = False,
    solve: Callable | None = None,
    reference_signature: Callable | inspect.Signature | None = None,
) -> Callable[[Callable], Callable]:
    """A decorator for `solver_fun(init_params, *args, **kwargs)`: the derivative of a root of optimality_fun.

    Args:
      optimality_fun: called as optimality_fun(sol, *args), zero at the solution.
      has_aux: whether solver_fun returns (sol, aux). No gradient flows through aux.
      solve: `solve(matvec, b) -> x` for the linear system of the gradient; `normal_cg` without one.
      reference_signature: what arguments that were passed by name are bound to, if not optimality_fun's own.

    Raises:
      TypeError: at a call, where an argument cannot be bound to a position of the reference signature.

    >>> half = custom_root(lambda x, a: 2 * x - a)(lambda init, a: a / 2)
    >>> jax.grad(half, argnums=1)(None, 3.0).tolist()
    0.5
    """
    reference: Any = optimality_fun if reference_signature is None else reference_signature
    if not isinstance(reference, inspect.Signature):
        reference = inspect.signature(getattr(reference, "subfun", reference))

    def decorate(solver_fun: Callable) -> Callable:
        own = inspect.signature(solver_fun)

        @functools.wraps(solver_fun)
        def differentiable(*args: Any, **kwargs: Any) -> Any:
            bound = own.bind(*args, **kwargs)
            bound.apply_defaults()
            found = solver_fun(*frozen(bound.args), **frozen(bound.kwargs))
            sol, aux = found if has_aux else (found, None)
            if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
                known = reference.bind(*bound.args, **bound.kwargs)
                if known.kwargs:
                    raise TypeError(f"arguments {list(known.kwargs)} have no position in the signature {reference}")
                sol = _attached(optimality_fun, sol, known.args[1:], solve)
            return (sol, aux) if has_aux else sol

        return differentiable

    return decorate


def custom_fixed_point(
    fixed_point_fun: Callable,
    has_aux: bool = False,
    solve: Callable | None = None,
    reference_signature: Callable | inspect.Signature | None = None,
) -> Callable[[Callable], Callable]:
    """`custom_root` for a solver of fixed_point_fun(sol, *args) = sol.

    >>> half = custom_fixed_point(lambda x, a: (x + a) / 3)(lambda init, a: a / 2)
    >>> jax.grad(half, argnums=1)(None, 3.0).round(4).tolist()
    0.5
    """
    optimality_fun = lambda params, *args: subtract(params, fixed_point_fun(params, *args))
    reference: Any = fixed_point_fun if reference_signature is None else reference_signature
    return custom_root(optimality_fun, has_aux, solve, reference)
