"""`DEQ`: a Flax NNX layer whose output is the fixed point of a cell."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from deq_jax.adjoints import Adjoint, Implicit, Probe
from deq_jax.fixed_point import Solution, fixed_point
from deq_jax.solvers import Anderson, Solver

_static = getattr(nnx, "static", lambda value: value)  # flax 0.11.2 has no nnx.static; all attributes are static


def zeros(x: PyTree) -> PyTree:
    """z0 = 0, with the shapes of x."""
    return jax.tree.map(jnp.zeros_like, x)


class DEQ(nnx.Module):
    """z* = cell(z*, x), differentiable in the cell's parameters and in x.

    `cell(z, x)` is any NNX module, or a function. x is any pytree with one leading batch axis. Any state of the cell
    other than its parameters is fixed during a solve and its backward pass: a dropout mask is drawn once (the paper's
    variational dropout), and batch statistics keep their earlier values. Afterwards, one call of the cell at the
    solution advances this state, as a layer does. `init(x)` gives z0 if a call passes none. Pass your own `init` if z
    has other shapes than x. For a warm start, pass the last solution as `z0`.

    Call it inside `jax.jit` (over `nnx.split` state) or `nnx.jit`, because an eager call traces the cell each time.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Cell(nnx.Module):
    ...     def __init__(self, dim, rngs):
    ...         self.linear = nnx.Linear(dim, dim, kernel_init=nnx.initializers.normal(0.1), rngs=rngs)
    ...         self.norm = nnx.LayerNorm(dim, rngs=rngs)
    ...     def __call__(self, z, x):
    ...         return jnp.tanh(self.norm(self.linear(z) + x))
    >>> layer = DEQ(Cell(4, nnx.Rngs(0)))
    >>> z, stats = layer(jnp.ones((2, 4)))
    >>> z.shape, stats.converged.tolist()
    ((2, 4), [True, True])

    Linen and Equinox need no such layer. Linen's `apply` and the call of an Equinox module are pure, so `fixed_point`
    accepts them:

        z, stats = deq.fixed_point(lambda z: linen_cell.apply(variables, z, x), z0, batch_ndim=1)
        z, stats = deq.fixed_point(lambda z: jax.vmap(equinox_cell)(z, x), z0, batch_ndim=1)
    """

    def __init__(
        self,
        cell: Callable[[Any, Any], Any],
        *,
        solver: Solver = Anderson(),  # noqa: B008  frozen
        adjoint: Adjoint = Implicit(),  # noqa: B008
        init: Callable[[Any], Any] = zeros,
    ):
        self.cell = cell
        self.solver = _static(solver)
        self.adjoint = _static(adjoint)
        self.init = init

    def __call__(self, x: PyTree, z0: PyTree | None = None, *, probe: Probe | None = None) -> Solution:
        z0 = self.init(x) if z0 is None else z0
        options = {"solver": self.solver, "adjoint": self.adjoint, "batch_ndim": 1, "probe": probe}
        if not isinstance(self.cell, nnx.Module):
            return fixed_point(lambda z: self.cell(z, x), z0, **options)

        graphdef, params, rest = nnx.split(self.cell, nnx.Param, ...)
        # Without copy=True, merge reuses Variables of the outer trace, and a dropout counter must not change those.
        pure_cell = lambda z: nnx.merge(graphdef, params, rest, copy=True)(z, x)
        solution = fixed_point(pure_cell, z0, **options)
        if jax.tree.leaves(rest):
            self.cell(jax.lax.stop_gradient(solution.value), x)  # advances its state; XLA removes unused work
        return solution
