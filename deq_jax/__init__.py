"""Deep equilibrium models and differentiable fixed points in JAX.

`fixed_point` is the primitive; `deq_jax.nn` and `deq_jax.models` need Flax and are imported by name.
"""

from deq_jax.adjoints import JFB, Adjoint, Implicit, Neumann, Phantom, Probe, Unroll
from deq_jax.fixed_point import Solution, SolutionWithAux, fixed_point
from deq_jax.solvers import Anderson, Broyden, Picard, Solver, Stats, Status

__version__ = "0.1.0"

__all__ = [
    "JFB",
    "Adjoint",
    "Anderson",
    "Broyden",
    "Implicit",
    "Neumann",
    "Phantom",
    "Picard",
    "Probe",
    "Solution",
    "SolutionWithAux",
    "Solver",
    "Stats",
    "Status",
    "Unroll",
    "fixed_point",
]
