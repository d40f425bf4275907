"""Newton's method with the whole Jacobian J of g = f(z) − z, for systems of few unknowns.

f is differentiated in all directions at each iterate, and its linear model solved by elimination, or by the step of
Levenberg and Marquardt where J is singular to working precision. Trials of a step p follow Powell's dogleg of the model
(see `_krylov`) as far as the trust radius, and are judged as in `trust_region`:

    (1)  n = −J⁻¹ g,  or  n = −(JᵀJ + μ² I)⁻¹ Jᵀ g,  μ = √eps ‖J‖

The radius has no bound at first. Where ‖g‖ ends in a minimum that is no root, another path may lead around it. So if
trials have not lowered ‖g‖ for long, or none can, the solve begins at z0 again, with the radius of the k-th new attempt

    (2)  radius = SHORTER^k ‖p₀‖,  where p₀ is the first step of all
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import aligned, einsum, zeros_from
from deq_jax._config import config
from deq_jax._krylov import Model, powell
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import norm
from deq_jax.solvers.protocol import LoopOptions, check_sees_all
from deq_jax.solvers.trust_region import NEW, START, STUCK, TRIAL, Trial, assess_trial

USEFUL = 0.5  # Newton's step by elimination leaves no more than this part of the linear model's ‖g‖, or J is singular
# Chosen on the systems of experiments/studies/root.py, all of which they solve in float64:
LONG = 30  # so many evaluations
LOWER = 0.9  # without ‖g‖ at this part of what it was end an attempt,
SHORTER = 0.1  # and the next one begins with a radius that is so much shorter


class NewtonState(NamedTuple):
    purpose: Int[Array, "*batch"]  # of the next evaluation: START of an attempt, or TRIAL
    z: Float[Array, "*batch dim"]  # the iterate
    g: Float[Array, "*batch dim"]  # and its residual
    g_norm: Float[Array, "*batch"]
    z_norm: Float[Array, "*batch"]
    next_z: Float[Array, "*batch dim"]  # where f is to be evaluated next
    model: Model
    radius: Float[Array, "*batch"]
    promised: Float[Array, "*batch"]  # as in `Trial`
    z0: Float[Array, "*batch dim"]
    first: Float[Array, "*batch"]  # ‖p₀‖
    attempt: Int[Array, "*batch"]
    mark: Float[Array, "*batch"]  # the ‖g‖ that has to be lowered
    since: Int[Array, "*batch"]  # evaluations since it was


@config
class Newton(LoopOptions):
    """Newton's method with a trust region and the whole Jacobian: for up to a few hundred unknowns a problem.

    Each evaluation of f also takes its Jacobian, by forward mode: as many products as there are unknowns. The linear
    system is solved by elimination, so its condition costs no evaluations. A step goes along Powell's dogleg (1970), no
    farther than the model has predicted well, and is cut where f is not finite. A solve that finds a minimum of the
    residual which is no root begins anew at z0 with shorter steps. Memory is that of the Jacobian and its factors. A
    bad choice for more unknowns, and for a state that is sharded: take `NewtonKrylov(products="jvp")`.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> stats = deq.fixed_point(lambda z: 3 * jnp.cos(z), jnp.ones(2), solver=deq.Newton(rtol=1e-6)).stats
    >>> bool(stats.converged), bool(stats.steps < 10)
    (True, True)
    """

    recovers = True  # a trial that is not finite is not the end: the step is cut

    scale_free = True

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "Newton")

    def init(self, z: Float[Array, "*batch dim"]) -> NewtonState:
        zero, none = zeros_like(z), zeros_from(z[..., 0])
        count, model = none.astype(jnp.int32), Model(zero, none, zero, zero)
        start, iterate = count + START, (zero, zero, none, none, z)
        return NewtonState(start, *iterate, model, none + jnp.inf, none, z, none + jnp.inf, count, none, count)

    def resume(self, state: NewtonState) -> NewtonState:
        """Nothing of an earlier solve is a start for this one."""
        return self.init(zeros_like(state.z))

    def can_backtrack(self, state: NewtonState) -> Bool[Array, "*batch"]:
        return state.purpose >= START

    def next_point(self, state: NewtonState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return state.next_z

    def direction(self, state: NewtonState) -> Float[Array, "*batch dim dim"]:
        """All directions."""
        columns = zeros_from(state.z)[..., None]
        return aligned(jnp.eye(state.z.shape[-1], dtype=state.z.dtype), columns) + columns

    def update(
        self,
        residual: Float[Array, "*batch dim"],
        state: NewtonState,
        z: Float[Array, "*batch dim"],
        rows: Float[Array, "*batch dim dim"] | None = None,
    ) -> tuple[Float[Array, "*batch dim"], NewtonState]:
        if rows is None:
            raise TypeError("Newton.update needs the products with all directions, and got none: see `direction`")
        eps = float(jnp.finfo(z.dtype).eps)
        g_norm = jnp.where(jnp.isfinite(norm(norm(rows))), norm(residual), jnp.inf)
        begins = state.purpose == START
        trial = Trial(state.purpose, state.g_norm, state.z_norm, state.radius, state.promised)
        trial = assess_trial(trial, g_norm, norm(z - state.z), eps)
        new, stuck = begins | (trial.event == NEW), ~begins & (trial.event == STUCK)

        anew = begins & (state.attempt == 0)
        z0 = choose(anew, z, state.z0)
        shorter = SHORTER ** state.attempt.astype(z.dtype) * state.first  # (2)
        radius = jnp.where(begins, shorter, trial.radius)
        base_z, g, base_norm, z_norm = choose(
            new, (z, residual, g_norm, norm(z)), (state.z, state.g, state.g_norm, state.z_norm)
        )
        model = choose(new, model_at(residual, rows, eps), state.model)
        step = powell(model, radius)
        first = jnp.where(anew, norm(step.y), state.first)

        lower = begins | (g_norm <= LOWER * state.mark)
        mark, since = jnp.where(lower, g_norm, state.mark), jnp.where(lower, 0, state.since + 1).astype(jnp.int32)
        ends = stuck | (since >= LONG)
        next_z = choose(ends, z0, base_z + step.y)
        purpose = jnp.where(ends, START, TRIAL).astype(jnp.int32)
        attempt = state.attempt + ends.astype(jnp.int32)
        promised = jnp.maximum(step.decrease, 0)
        return next_z - z, NewtonState(
            purpose, base_z, g, base_norm, z_norm, next_z, model, radius, promised, z0, first, attempt, mark, since
        )


def model_at(g: Float[Array, "*batch dim"], rows: Float[Array, "*batch dim dim"], eps: float) -> Model:
    """The linear model with the Jacobian J = rowsᵀ: a row is the product of J with a direction."""
    times = lambda p: einsum("...ji,...j->...i", rows, p)
    gradient = einsum("...ij,...j->...i", rows, g)  # Jᵀ g
    mu = eps**0.5 * norm(norm(rows))
    mu = jnp.where(mu > 0, mu, 1)[..., None, None]
    damped = einsum("...ik,...jk->...ij", rows, rows) + mu**2 * aligned(jnp.eye(g.shape[-1], dtype=g.dtype), rows)
    by_elimination = -jnp.linalg.solve(jnp.swapaxes(rows, -1, -2), g[..., None])[..., 0]
    by_damping = -jnp.linalg.solve(damped, gradient[..., None])[..., 0]  # (1)
    g_norm = norm(g)
    useful = norm(g + times(by_elimination)) <= USEFUL * g_norm
    minimizer = choose(useful, by_elimination, by_damping)
    left = norm(g + times(minimizer))
    return Model(minimizer, (g_norm - left) * (g_norm + left), -gradient, times(-gradient))
