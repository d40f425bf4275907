"""Newton's method with the whole Jacobian J of g = f(z) − z, for systems of few unknowns.

f is differentiated in all directions at each iterate, and its linear model solved by elimination. A step p leads along
Powell's dogleg of that model (see `_krylov`), in the unknowns over the largest column of J that has been seen:

    (1)  p = D⁻¹ y,  Dⱼ = max ‖J eⱼ‖,  ‖y‖ ≤ radius

where the norm of y is the same in all units of the unknowns (Moré, 1978). Where J is singular to working precision,
Newton's step is replaced by that of Levenberg and Marquardt:

    (2)  n = −J⁻¹ g,  or  n = −(JᵀJ + μ² I)⁻¹ Jᵀ g,  μ = √eps ‖J‖
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import einsum, zeros_from
from deq_jax._config import config
from deq_jax._krylov import Model, powell
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import norm
from deq_jax.solvers.protocol import LoopOptions, check_sees_all
from deq_jax.solvers.trust_region import NEW, START, STUCK, TRIAL, Trial, assess_trial

USEFUL = 0.5  # Newton's step by elimination leaves no more than this part of the linear model's ‖g‖, or J is singular


class NewtonState(NamedTuple):
    purpose: Int[Array, "*batch"]  # of the next evaluation: START or TRIAL
    z: Float[Array, "*batch dim"]  # the iterate
    g: Float[Array, "*batch dim"]  # and its residual
    g_norm: Float[Array, "*batch"]
    z_norm: Float[Array, "*batch"]  # ‖D z‖
    next_z: Float[Array, "*batch dim"]  # where f is to be evaluated next
    units: Float[Array, "*batch dim"]  # D
    model: Model
    radius: Float[Array, "*batch"]
    promised: Float[Array, "*batch"]  # as in `Trial`


@config
class Newton(LoopOptions):
    """Newton's method with a trust region and the whole Jacobian: for up to a few hundred unknowns a problem.

    Each evaluation of f also takes its Jacobian, by forward mode: as many products as there are unknowns. The linear
    system is solved by elimination, so a stiff or badly scaled problem is no harder than another. A step goes along
    Powell's dogleg (1970), no farther than the model has predicted well, and is cut where f is not finite. Memory is
    that of the Jacobian and its factors. A bad choice for more unknowns, and for a state that is sharded: take
    `NewtonKrylov(products="jvp")`.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> stats = deq.fixed_point(lambda z: 3 * jnp.cos(z), jnp.ones(2), solver=deq.Newton(rtol=1e-6)).stats
    >>> bool(stats.converged), bool(stats.steps < 10)
    (True, True)
    """

    recovers = True  # a trial that is not finite is not the end: the step is cut

    scale_free = True
    patience = 30

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "Newton")

    def init(self, z: Float[Array, "*batch dim"]) -> NewtonState:
        zero, none = zeros_like(z), zeros_from(z[..., 0])
        start, model = none.astype(jnp.int32) + START, Model(zero, none, zero, zero)
        return NewtonState(start, zero, zero, none, none, z, zero, model, none + jnp.inf, none)

    def resume(self, state: NewtonState) -> NewtonState:
        """Nothing of an earlier solve is a start for this one."""
        return self.init(zeros_like(state.z))

    def can_backtrack(self, state: NewtonState) -> Bool[Array, "*batch"]:
        return state.purpose >= START

    def next_point(self, state: NewtonState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return state.next_z

    def direction(self, state: NewtonState) -> Float[Array, "*batch dim dim"]:
        """All directions."""
        return jnp.eye(state.z.shape[-1], dtype=state.z.dtype) + zeros_from(state.z)[..., None]

    def update(
        self,
        residual: Float[Array, "*batch dim"],
        state: NewtonState,
        z: Float[Array, "*batch dim"],
        rows: Float[Array, "*batch dim dim"],
    ) -> tuple[Float[Array, "*batch dim"], NewtonState]:
        eps = float(jnp.finfo(z.dtype).eps)
        columns = norm(rows)  # of J: a row is the product with a direction
        g_norm = jnp.where(jnp.isfinite(norm(columns)), norm(residual), jnp.inf)
        trial = Trial(state.purpose, state.g_norm, state.z_norm, state.radius, state.promised)
        trial = assess_trial(trial, g_norm, norm(state.units * (z - state.z)), eps)
        event = jnp.where(state.purpose == START, NEW, trial.event)

        new, grown = event == NEW, jnp.maximum(state.units, columns)
        units = choose(new, jnp.where(grown > 0, grown, 1), state.units)
        model = choose(new, model_at(residual, rows / units[..., None], eps), state.model)
        z, g, g_norm = choose(new, (z, residual, g_norm), (state.z, state.g, state.g_norm))
        step = powell(model, trial.radius)
        next_z = z + step.y / units
        promised = jnp.where(event == STUCK, -1, step.decrease)
        purpose = zeros_from(state.purpose) + TRIAL
        z_norm = norm(units * z)
        return next_z - z, NewtonState(purpose, z, g, g_norm, z_norm, next_z, units, model, trial.radius, promised)


def model_at(g: Float[Array, "*batch dim"], rows: Float[Array, "*batch dim dim"], eps: float) -> Model:
    """The linear model with the Jacobian J = rowsᵀ."""
    times = lambda p: einsum("...ji,...j->...i", rows, p)
    gradient = einsum("...ij,...j->...i", rows, g)  # Jᵀ g
    mu = eps**0.5 * norm(norm(rows))
    damped = einsum("...ik,...jk->...ij", rows, rows) + mu[..., None, None] ** 2 * jnp.eye(g.shape[-1], dtype=g.dtype)
    by_elimination = -jnp.linalg.solve(jnp.swapaxes(rows, -1, -2), g[..., None])[..., 0]
    by_damping = -jnp.linalg.solve(damped, gradient[..., None])[..., 0]  # (2)
    g_norm = norm(g)
    left = norm(g + times(by_elimination))
    minimizer = choose(left <= USEFUL * g_norm, by_elimination, by_damping)
    left = norm(g + times(minimizer))
    return Model(minimizer, (g_norm - left) * (g_norm + left), -gradient, times(gradient))
