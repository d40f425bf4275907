"""How a fixed point is differentiated: exactly or not, at the equilibrium or through the iterations."""

from deq_jax.adjoints.implicit import Implicit, OnFailure
from deq_jax.adjoints.implicit_jvp import ImplicitJVP
from deq_jax.adjoints.inexact import JFB, Neumann, Phantom
from deq_jax.adjoints.protocol import Adjoint, EquilibriumAdjoint, ForwardResult, IterationAdjoint, Probe, Problem
from deq_jax.adjoints.reversible import Reversible
from deq_jax.adjoints.shine import Shine
from deq_jax.adjoints.unroll import Unroll

__all__ = [
    "JFB",
    "Adjoint",
    "EquilibriumAdjoint",
    "ForwardResult",
    "Implicit",
    "ImplicitJVP",
    "IterationAdjoint",
    "Neumann",
    "OnFailure",
    "Phantom",
    "Probe",
    "Problem",
    "Reversible",
    "Shine",
    "Unroll",
]
