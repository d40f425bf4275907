"""Deep equilibrium models and differentiable fixed points in JAX."""

__version__ = "0.1.0"
