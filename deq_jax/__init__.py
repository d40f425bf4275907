"""Deep equilibrium models and differentiable fixed points in JAX.

`fixed_point` is the primitive; `deq_jax.nn` and `deq_jax.models` need Flax and are imported by name.
"""

from deq_jax.adjoints import (
    JFB,
    Adjoint,
    Implicit,
    ImplicitJVP,
    Neumann,
    OnFailure,
    Phantom,
    Probe,
    Reversible,
    Shine,
    Unroll,
)
from deq_jax.fixed_point import Solution, SolutionWithAux, attach, fixed_point, solve
from deq_jax.solvers import Anderson, Broyden, Fold, Picard, Seen, Solved, Solver, Stats, Status

__version__ = "0.1.0"

__all__ = [
    "JFB",
    "Adjoint",
    "Anderson",
    "Broyden",
    "Fold",
    "Implicit",
    "ImplicitJVP",
    "Neumann",
    "OnFailure",
    "Phantom",
    "Picard",
    "Probe",
    "Reversible",
    "Seen",
    "Shine",
    "Solution",
    "SolutionWithAux",
    "Solved",
    "Solver",
    "Stats",
    "Status",
    "Unroll",
    "attach",
    "fixed_point",
    "solve",
]
