"""Random matrices of a known spectrum, for the tests of solvers."""

import jax
import jax.numpy as jnp


def symmetric(key, n, dim, radius):
    """n symmetric matrices whose spectral radius is `radius`."""
    a = jax.random.normal(key, (n, dim, dim))
    a = a + a.mT
    return a * (radius / jnp.max(jnp.abs(jnp.linalg.eigvalsh(a)), -1))[:, None, None]


def gaussian(key, n, dim, radius):
    """n Gaussian matrices scaled to a spectral radius of `radius` on average: non-normal, complex spectra."""
    return jax.random.normal(key, (n, dim, dim)) * (radius / dim**0.5)
