"""The referee: the same problems in float64, solved by nothing that a contender uses, and the errors against that."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import jax_ops
from experiments.shared.problems import Problem

ENOUGH = 1e-10  # of the referee's own solutions
MOST = 2000  # iterations


def double(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float64) if x.dtype == np.float32 else jnp.asarray(x)


def norms(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=-1)


def cell_of(drawn: Problem, params: Any, data: Any) -> Callable:
    return jax.jit(lambda z: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data)))


def dense(drawn: Problem, params: Any, data: Any) -> tuple[jax.Array, Any]:
    """Newton with the whole Jacobian of each problem, and its transpose solved directly."""

    @jax.jit
    def jacobians(z, params):
        """J[b, i, j] = ∂f_i/∂z_j of problem b."""
        cell = lambda z: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data))
        column = lambda e: jax.jvp(cell, (z,), (jnp.broadcast_to(e, z.shape),))[1]
        return jnp.moveaxis(jax.lax.map(column, jnp.eye(z.shape[-1])), 0, -1), cell(z)

    z = jnp.zeros(drawn.z_shape)
    one = jnp.eye(z.shape[-1])
    for _ in range(30):
        jacobian, fz = jacobians(z, params)
        if float(jnp.max(norms(fz - z))) < ENOUGH:
            break
        z = z + jnp.linalg.solve(one - jacobian, (fz - z)[..., None])[..., 0]
    else:
        raise RuntimeError("the referee's Newton iteration did not converge")
    transposed = lambda z_bar: jnp.linalg.solve(jnp.swapaxes(one - jacobian, -1, -2), z_bar[..., None])[..., 0]
    return z, gradients(drawn, params, data, z, transposed)


def iterated(drawn: Problem, params: Any, data: Any) -> tuple[jax.Array, Any]:
    """Picard's iteration to the end, and the Neumann series of the transpose, for contractions."""

    @jax.jit
    def find(params):
        cell = lambda z: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data))
        return until_still(cell, jnp.zeros(drawn.z_shape))

    z, change = find(params)

    @jax.jit
    def transposed(z_bar, z, params):
        cell = lambda z: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data))
        _, vjp = jax.vjp(cell, z)
        return until_still(lambda u: z_bar + vjp(u)[0], z_bar)

    changes = [float(change)]

    def solve(z_bar):
        u, change = transposed(z_bar, z, params)
        changes.append(float(change))
        return u

    grads = gradients(drawn, params, data, z, solve)
    if not max(changes) < ENOUGH:
        raise RuntimeError(f"the referee's iteration did not converge: it still moves by {max(changes):.0e}")
    return z, grads


def until_still(g: Callable, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    def body(carry):
        z, _, n = carry
        new = g(z)
        return new, jnp.linalg.norm(new - z) / jnp.linalg.norm(new), n + 1

    going = lambda carry: (carry[1] > 0.1 * ENOUGH) & (carry[2] < MOST)
    z, change, _ = jax.lax.while_loop(going, body, (z, jnp.asarray(jnp.inf, z.dtype), 0))
    return z, change


def gradients(drawn: Problem, params: Any, data: Any, z: jax.Array, transposed: Callable) -> Any:
    # dL = ∂readout + uᵀ ∂f with (I − Jᵀ) u = ∂readout/∂z
    z_bar, direct = jax.jit(jax.grad(lambda z, params: drawn.readout(jax_ops, z, params, data), (0, 1)))(z, params)
    u = transposed(z_bar)
    cell = lambda params: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data))
    through = jax.jit(lambda params, u: jax.vjp(cell, params)[1](u)[0])(params, u)
    return jax.tree.map(lambda a, b: np.asarray(a + b), direct, through)
