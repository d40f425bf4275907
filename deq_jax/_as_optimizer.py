"""Our solvers in optax's loops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from deq_jax._checks import check_count, check_solver, check_state
from deq_jax._states import Layout, check_no_carried
from deq_jax._vectors import scaled
from deq_jax.solvers import Solver
from deq_jax.solvers.protocol import check_differentiates_nothing, member


class GradientTransformation(NamedTuple):
    """Optax's tuple of this name."""

    init: Callable
    update: Callable


class Mixed(NamedTuple):
    """The state of an optimizer whose solver sees few of the iterates."""

    count: Int[Array, ""]  # of updates
    state: Any  # the solver's


def as_optimizer(solver: Solver, batch_ndim: int = 0) -> GradientTransformation:
    """One of our solvers as an optax optimizer, for `optax.chain` and `apply_updates`.

    Anderson on gradient descent is `optax.chain(optax.scale(lr), as_optimizer(Anderson()))`: the residual is the
    negative scaled gradient. Use full-batch gradients, because differences of noisy ones are no secants. With
    `test_every=k` the solver sees the first of every k gradients, and the steps between are plain, as in a solve.

    Args:
      solver: any solver that asks for no derivatives. Its tolerances and its budget are not read.
      batch_ndim: how many leading axes of every leaf of params index independent problems, each with its own history,
        as for `fixed_point`: the copies of an ensemble, whose losses are summed.

    Raises:
      TypeError: for params that are not of floats.
      ValueError: for a solver that asks for derivatives; for params whose batch axes do not agree; if `update` is
        called without params.

    >>> import jax, jax.numpy as jnp, optax, deq_jax as deq
    >>> loss = lambda p: 0.5 * jnp.sum(jnp.arange(1.0, 6) * (p - 1) ** 2)
    >>> tx, p = optax.chain(optax.scale(0.2), deq.adapters.as_optimizer(deq.Anderson())), jnp.zeros(5)
    >>> state = tx.init(p)
    >>> for _ in range(7):
    ...     step, state = tx.update(jax.grad(loss)(p), state, p)
    ...     p = optax.apply_updates(p, step)
    >>> bool(loss(p) < 1e-8)
    True
    """
    check_solver(solver, "as_optimizer(solver)")
    check_differentiates_nothing(solver, "as_optimizer")
    check_count("batch_ndim", batch_ndim, 0)
    every = member(solver, "test_every")

    def init(params: PyTree) -> Any:
        check_no_carried(params, "params", "as_optimizer needs parameters of floats: see optax.masked")
        check_state(params, batch_ndim, "params")
        state = solver.init(Layout(params, batch_ndim, flat=True).pack(params))
        return state if every == 1 else Mixed(jnp.zeros((), jnp.int32), state)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("as_optimizer needs params: tx.update(grads, state, params)")
        layout = Layout(params, batch_ndim, flat=True)
        residual, z = -layout.pack(updates), layout.pack(params)
        if every == 1:
            step, state = solver.update(residual, state, z)
            return layout.unpack(step), state
        mix = lambda inner: solver.update(residual, inner, z)
        plain = lambda inner: (scaled(member(solver, "damping"), residual), inner)
        step, inner = jax.lax.cond(state.count % every == 0, mix, plain, state.state)
        return layout.unpack(step), Mixed(state.count + 1, inner)

    return GradientTransformation(init, update)
