"""The linear system of the derivative, given to another solver than ours, or preconditioned.

    (1)  (I − A) u = b  with  A = Jᵀ, b = z̄ in reverse mode,  A = J, b = fₐ ȧ in forward mode

A preconditioner P ≈ (I − J)⁻¹ is used as it is where A = J, and as Pᵀ where A = Jᵀ. With M for either of them

    (2)  (I − A) M w = b,  u = M w

is what another solver than ours is given: its residual is that of (1). Whoever solved, b + A u is computed once more,
and that alone decides the status.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from deq_jax._arrays import zeros_from
from deq_jax._checks import check_flat, check_like, check_number
from deq_jax._config import STATIC, config
from deq_jax._states import Layout, choose, frozen, subtract
from deq_jax._trace import hoist
from deq_jax.adjoints.preconditioner import measured, solve_preconditioned, transposed
from deq_jax.adjoints.protocol import Problem
from deq_jax.solvers import Solver, Stats, Status


@config
class Dense:
    """The LU factors of I − A, for each problem of a batch: `Implicit(linear=Dense())`.

    The matrix takes a product with A for each unknown, all at once, and n² numbers a problem (a complex unknown counts
    twice), in float32 or wider. So it is for small problems, where it is exact at any spectrum. It is refused above
    `max_unknowns`, and where f communicates along named axes.

    >>> import jax, jax.numpy as jnp, deq_jax as deq
    >>> root = lambda a: deq.fixed_point(lambda z: jnp.cos(a * z), 0.0, adjoint=deq.Implicit(linear=deq.Dense())).value
    >>> bool(abs(jax.grad(root)(1.0) + 0.29747) < 1e-3)
    True
    """

    max_unknowns: int = 4096

    def __post_init__(self):
        check_number(self, "max_unknowns", at_least=1)

    def solve(self, matvec: Callable, b: PyTree, batch_ndim: int) -> tuple[PyTree, int]:
        """(u, the number of products)."""
        layout = Layout(b, batch_ndim, flat=True)
        rhs = layout.pack(b)
        units = jnp.eye(rhs.shape[-1], dtype=rhs.dtype)
        # No problem reads another one's state: a product gives the same column of all their matrices.
        column = lambda unit: layout.pack(matvec(layout.unpack(jnp.broadcast_to(unit, rhs.shape) + zeros_from(rhs))))
        factors = jax.scipy.linalg.lu_factor(jax.vmap(column, out_axes=-1)(units))
        solve = lambda rhs: jax.scipy.linalg.lu_solve(factors, rhs[..., None])[..., 0]
        u = solve(rhs)
        # One step of refinement, for systems whose condition is near the inverse of the machine epsilon.
        u = u + solve(rhs - layout.pack(matvec(layout.unpack(u))))
        return layout.unpack(u), len(units) + 1


@config
class Lineax:
    """A solver of lineax, with the tags that lineax is to believe: `Implicit(linear=Lineax(lineax.CG(...), tags=...))`.

    `tags` are lineax's, such as `lineax.positive_semidefinite_tag`, and describe I − A. A batch is one block-diagonal
    system. `Implicit(linear=solver)` is the same without tags.
    """

    solver: Any = dataclasses.field(metadata=STATIC)
    tags: Any = dataclasses.field(default=(), metadata=STATIC)

    def __post_init__(self):
        if not _is_of_lineax(self.solver):
            raise TypeError(f"Lineax.solver must be a solver of lineax, such as lineax.GMRES(...), got {self.solver!r}")

    def __call__(self, matvec: Callable, rmatvec: Callable, b: PyTree) -> tuple[PyTree, Any]:
        import lineax  # pyright: ignore[reportMissingImports]

        operator = lineax.FunctionLinearOperator(matvec, jax.eval_shape(lambda: b), self.tags)
        solution = lineax.linear_solve(operator, b, self.solver, throw=False)
        return solution.value, solution.stats


def _is_of_lineax(solver: Any) -> bool:
    lineax = sys.modules.get("lineax")  # who has a solver of lineax has imported it
    return lineax is not None and isinstance(solver, lineax.AbstractLinearSolver)


# ---- a solve -----------------------------------------------------------------------------------------------


def is_plain(adjoint: Any) -> bool:
    """Whether an adjoint's own equations are solved by our solvers alone."""
    return adjoint.linear is None and adjoint.preconditioner is None


def solve_system(
    adjoint: Any, product: Callable, unit: PyTree, problem: Problem, solver: Solver
) -> tuple[PyTree, Stats]:
    """(u, stats) of u = unit + A u with A u = `product(u)`, which `problem` states too. It has no derivative.

    The statistics are measured: `steps` counts the products that are known of, and the tolerance is `solver`'s.
    """
    adjoint = frozen(adjoint)
    solve = solve_preconditioned if adjoint.linear is None else _solve_elsewhere
    u, products = solve(adjoint, product, unit, problem, solver)
    stats = measured(problem, u, solver, products)
    return choose(stats.status != Status.NONFINITE, u, unit), stats


def _solve_elsewhere(
    adjoint: Any, product: Callable, b: PyTree, problem: Problem, solver: Solver
) -> tuple[PyTree, int]:
    same = lambda v: v
    M = adjoint.preconditioner
    apply, apply_transposed = (same, same) if M is None else (M, transposed(M))
    product_transposed = lambda v: jax.linear_transpose(product, v)(v)[0]

    def matvec(w):  # (2)
        v = apply(w)
        return subtract(v, product(v))

    rmatvec = lambda v: apply_transposed(subtract(v, product_transposed(v)))
    if isinstance(adjoint.linear, Dense):
        w, products = adjoint.linear.solve(matvec, b, problem.batch_ndim)
    else:
        in_wide = lambda f: lambda v: wide(f(like(v, b)))
        w = like(_solution(adjoint, adjoint.linear(in_wide(matvec), in_wide(rmatvec), wide(b)), wide(b)), b)
        products = 0
    return apply(w), products


def wide(tree: PyTree) -> PyTree:
    """The state with leaves of 16 bits in float32: no library of linear algebra factors or orthogonalizes 16 bits."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x, tree)


def like(tree: PyTree, b: PyTree) -> PyTree:
    """The state in the dtypes of b."""
    return jax.tree.map(lambda x, b: x.astype(b.dtype), tree, b)


def _solution(adjoint: Any, out: Any, b: PyTree) -> PyTree:
    """u of what the callable returned, or TypeError or ValueError unless that is (u, info) with u like b."""
    who = f"{type(adjoint).__name__}.linear"
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{who} must return a pair (u, info), got {out!r}")
    check_like(out[0], b, who, "u")
    return out[0]


# ---- checks ------------------------------------------------------------------------------------------------


def check_linear(adjoint: Any) -> None:
    """Raise TypeError unless `linear` is None or can solve; a bare solver of lineax becomes a `Lineax`."""
    linear, name = adjoint.linear, type(adjoint).__name__
    if _is_of_lineax(linear):
        object.__setattr__(adjoint, "linear", Lineax(linear))
    elif linear is not None and not isinstance(linear, Dense) and (isinstance(linear, type) or not callable(linear)):
        hint = f": solvers of this library go to {name}.solver" if hasattr(linear, "update") else ""
        raise TypeError(
            f"{name}.linear must be Dense(), a solver of lineax, or a callable (matvec, rmatvec, b) -> (u, info); "
            f"got {linear!r}{hint}"
        )


def check_call(adjoint: Any, z: PyTree) -> None:
    """Raise unless a callable, given the identity, returns (u, info), and reads no traced array of its surroundings."""
    linear, same = adjoint.linear, lambda v: v
    if linear is None or isinstance(linear, Dense | Lineax):
        return
    reads = hoist(lambda b, linear: _solution(adjoint, linear(same, same, b), b), frozen(wide(z)), args=(linear,))[1:]
    given = list(map(id, jax.tree.leaves(linear)))
    # The backward pass calls it when the trace that these arrays belong to may have ended.
    if any(isinstance(read, Tracer) and id(read) not in given for read in jax.tree.leaves(reads)):
        raise TypeError(
            f"{type(adjoint).__name__}.linear captures a traced array, which has no derivative and may not outlive its "
            "trace: pass the array as in jax.tree_util.Partial(solve, array), for solve(array, matvec, rmatvec, b)"
        )


def check_fits(adjoint: Any, problem: Problem, z: PyTree) -> None:
    """Raise ValueError or TypeError where `Dense` or `Lineax` cannot solve for a state like z."""
    linear = adjoint.linear
    if not isinstance(linear, Dense | Lineax):
        return
    who = f"{type(adjoint).__name__}.linear"
    if problem.axes:
        raise ValueError(
            f"{who}: f communicates along {problem.axes}, so the system lies on several devices, and "
            f"{type(linear).__name__} solves on one: take solver=, or a callable that sums over these axes"
        )
    if isinstance(linear, Dense):
        unknowns = Layout(z, problem.batch_ndim, flat=True).size
        if unknowns > linear.max_unknowns:
            raise ValueError(
                f"{who}: Dense would factor a matrix of {unknowns} x {unknowns} for each problem, and "
                f"Dense.max_unknowns is {linear.max_unknowns}: take solver=, or a matrix-free callable"
            )
        check_flat(linear, z, problem.batch_ndim)
