"""Solvers: frozen numbers with two pure functions, driven by the one loop in `loop`."""

from deq_jax._arrays import per_problem
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.loop import run_loop
from deq_jax.solvers.newton import Newton
from deq_jax.solvers.newton_krylov import NewtonKrylov
from deq_jax.solvers.picard import Picard
from deq_jax.solvers.protocol import Evaluation, Fold, LoopOptions, Solver, SolveResult, Stats, Status
from deq_jax.solvers.robust import Robust

__all__ = [
    "Anderson",
    "Broyden",
    "Evaluation",
    "Fold",
    "LoopOptions",
    "Newton",
    "NewtonKrylov",
    "Picard",
    "Robust",
    "SolveResult",
    "Solver",
    "Stats",
    "Status",
    "per_problem",
    "run_loop",
]
