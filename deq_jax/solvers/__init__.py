"""Solvers: frozen numbers with two pure functions, driven by the one loop in `base`."""

from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.base import Fold, Seen, Solved, Solver, Stats, Status, solve
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.newton_krylov import NewtonKrylov
from deq_jax.solvers.picard import Picard
from deq_jax.solvers.robust import Robust

__all__ = [
    "Anderson",
    "Broyden",
    "Fold",
    "NewtonKrylov",
    "Picard",
    "Robust",
    "Seen",
    "Solved",
    "Solver",
    "Stats",
    "Status",
    "solve",
]
