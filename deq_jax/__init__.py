"""Deep equilibrium models and differentiable fixed points in JAX.

`fixed_point` is the primitive; `deq_jax.nn` and `deq_jax.models` need Flax and are imported by name.
"""

from deq_jax import _export, adapters, diagnostics, regularizers, stability
from deq_jax._config import config
from deq_jax._krylov import Krylov, Model
from deq_jax._programs import clear_caches
from deq_jax._scales import Weighted
from deq_jax.adjoints import (
    JFB,
    Adjoint,
    EquilibriumAdjoint,
    ForwardResult,
    Implicit,
    ImplicitJVP,
    IterationAdjoint,
    Neumann,
    OnFailure,
    Phantom,
    Probe,
    Problem,
    Reversible,
    Shine,
    Unroll,
)
from deq_jax.adjoints.linear import Dense, Lineax
from deq_jax.check import SolveError, check
from deq_jax.compact import compact
from deq_jax.fixed_point import Solution, SolutionWithAux, fixed_point
from deq_jax.halves import attach, solve
from deq_jax.root import root
from deq_jax.solvers import (
    Anderson,
    Broyden,
    Evaluation,
    Fold,
    Newton,
    NewtonKrylov,
    Picard,
    Robust,
    Solver,
    SolveResult,
    Stats,
    Status,
)
from deq_jax.solvers.anderson import AndersonState
from deq_jax.solvers.broyden import BroydenState
from deq_jax.solvers.newton import NewtonState
from deq_jax.solvers.newton_krylov import NewtonKrylovState
from deq_jax.solvers.robust import RobustState
from deq_jax.stepwise import SolveState, advance, finished, refill, result, start
from deq_jax.trajectory import ResidualTrace, Snapshot, Snapshots, Trajectory, fixed_point_correction, trajectory
from deq_jax.warm_start import FixedPointCache, first_guess_loss

_export.register_results(Solution, SolutionWithAux, SolveResult, Trajectory, Stats, Probe, FixedPointCache, Snapshot)
_export.register_results(AndersonState, BroydenState, NewtonState, Model, NewtonKrylovState, Krylov, RobustState)

__version__ = "0.1.0"

__all__ = [
    "JFB",
    "Adjoint",
    "Anderson",
    "Broyden",
    "Dense",
    "EquilibriumAdjoint",
    "Evaluation",
    "FixedPointCache",
    "Fold",
    "ForwardResult",
    "Implicit",
    "ImplicitJVP",
    "IterationAdjoint",
    "Lineax",
    "Neumann",
    "Newton",
    "NewtonKrylov",
    "OnFailure",
    "Phantom",
    "Picard",
    "Probe",
    "Problem",
    "ResidualTrace",
    "Reversible",
    "Robust",
    "Shine",
    "Snapshots",
    "Solution",
    "SolutionWithAux",
    "SolveError",
    "SolveResult",
    "SolveState",
    "Solver",
    "Stats",
    "Status",
    "Trajectory",
    "Unroll",
    "Weighted",
    "adapters",
    "advance",
    "attach",
    "check",
    "clear_caches",
    "compact",
    "config",
    "diagnostics",
    "finished",
    "first_guess_loss",
    "fixed_point",
    "fixed_point_correction",
    "refill",
    "regularizers",
    "result",
    "root",
    "solve",
    "stability",
    "start",
    "trajectory",
]
