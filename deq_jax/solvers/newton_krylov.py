"""Newton–Krylov for hard roots: derivative-free, a trust region inside the Krylov space, one evaluation a step.

An evaluation of g = f(z) − z serves one of two purposes. Most are made at z + h q, near the iterate z, for a product
with the Jacobian J of g. The Krylov space of `_krylov` grows by it until it holds a p with ‖g + J p‖ ≤ forcing · ‖g‖:

    (1)  J q = (g(z + h q) − g(z)) / h,  h = difference · ‖z‖

The others are trials of a step p of at most the trust radius. What a trial brings is compared with the model:

    (2)  ρ = (‖g(z)‖² − ‖g(z + p)‖²) / (‖g(z)‖² − ‖g + J p‖²)
    (3)  accepted  ρ > ACCEPTED:  z ← z + p; the radius grows if ρ > GOOD and shrinks if ρ < POOR
         rejected  the radius shrinks, and the next trial goes less far in the same space

An accepted step begins a new space, whose forcing term is that of Eisenstat & Walker (1996), choice 2:

    (4)  forcing = min(0.9 (‖g‖ / ‖g_prev‖)², forcing_max), and no less than half the tolerance over ‖g‖
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deq_jax import _krylov
from deq_jax._arrays import one_hot, ratio
from deq_jax._checks import check_number
from deq_jax._config import Number, config
from deq_jax._rows import combine
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, divided, norm, scaled, zero_of
from deq_jax.solvers.protocol import LoopOptions, check_sees_all

ACCEPTED = 1e-4  # part of the predicted decrease of ‖g‖² that a step must bring
NOISE = 30  # units in the last place of g: a difference that changes it by less is lost in rounding
SLOW = 0.99  # a step that leaves more of ‖g‖ than this is slow
POOR, GOOD = 0.25, 0.75  # below, the radius shrinks; above, it may grow


class NewtonKrylovState(NamedTuple):
    known: Bool[Array, "*batch"]  # whether z and g belong to this f
    trial: Bool[Array, "*batch"]  # whether the next evaluation is a trial; otherwise it is for a product J q
    z: Vec  # the iterate
    g: Vec  # and its residual
    z_norm: Float[Array, "*batch"]
    next_z: Vec  # where f is to be evaluated next
    radius: Float[Array, "*batch"]  # of the trust region
    forcing: Float[Array, "*batch"]
    predicted: Float[Array, "*batch"]  # ‖g + J p‖ of the trial step p; below zero for one taken whatever it brings
    widening: Float[Array, "*batch"]  # factor of the difference h, for an h that was lost in rounding
    krylov: _krylov.Krylov
    basis: Rows  # of the Krylov space


@config
class NewtonKrylov(LoopOptions):
    """Newton's method whose linear systems are solved in a Krylov space of f's own differences.

    For roots where the secant solvers fail: Brown & Saad (1990), with Powell's dogleg in the Krylov space. The step
    never leaves a region where the linear model has predicted well, and a step to where f is not finite is cut. Between
    two steps it evaluates f up to `krylov` times at z + h q, each one a product of the Jacobian with q, until the model
    is solved to `forcing` times ‖g‖, or as far as Eisenstat & Walker (1996) ask near the root. Memory is `krylov` + 4
    states. `difference` is h relative to ‖z‖, by default the square root of the machine epsilon.

    For an affine f, `NewtonKrylov(krylov=…, forcing=0.0, difference=1.0)` is restarted GMRES: differences are
    exact then, and the space grows until the tolerance is met.

    A bad choice where Anderson converges: it spends several evaluations for one step. In 16 bits a difference
    is lost in rounding; pass a larger one, or keep z in float32.

    >>> NewtonKrylov(krylov=10).krylov
    10
    """

    krylov: int = 20
    forcing: Number = 0.01
    difference: Number | None = None

    recovers = True  # a trial that is not finite is not the end: the step is cut

    scale_free = True
    flat = False

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "NewtonKrylov")
        check_number(self, "krylov", at_least=1)
        check_number(self, "forcing", at_least=0, at_most=1)
        if self.difference is not None:
            check_number(self, "difference", above=0)

    @property
    def patience(self) -> int:
        """Evaluations that may pass without a better residual."""
        return 2 * self.krylov + 10

    def init(self, z: Vec) -> NewtonKrylovState:
        zero, none = zeros_like(z), zero_of(z)
        krylov, basis = _krylov.empty(zero, self.krylov)
        no, radius, forcing = none > 0, none + jnp.inf, none + self.forcing
        return NewtonKrylovState(
            no, no, zero, zero, none, z, radius, forcing, none, widening=none + 1, krylov=krylov, basis=basis
        )

    def resume(self, state: NewtonKrylovState) -> NewtonKrylovState:
        """Nothing of an earlier solve is a start for this one."""
        return self.init(zeros_like(state.z))

    def can_backtrack(self, state: NewtonKrylovState) -> Bool[Array, "*batch"]:
        return state.known | True

    def next_point(self, state: NewtonKrylovState, z: Vec) -> Vec:
        return state.next_z

    def update(self, residual: Vec, state: NewtonKrylovState, z: Vec) -> tuple[Vec, NewtonKrylovState]:
        g_norm, last_norm, distance = norm(residual), state.krylov.beta, norm(z - state.z)
        z_norm, f_norm = norm(z), norm(z + residual)
        product = jacobian_product(state, residual, distance, g_norm, last_norm)
        trial = assess_trial(state, distance, g_norm, last_norm)
        column = _krylov.new_column(state.krylov, state.basis, product.value)
        krylov = _krylov.extend(state.krylov, column, product.usable)
        solved = krylov.closed | (krylov.residual <= state.forcing * last_norm)
        ready = state.known & ~state.trial & (solved | ~(product.usable | product.lost))
        stepping = ready | trial.rejected
        y, predicted = trial_step(krylov, trial.radius)

        # A new iterate begins a new space.
        new = trial.new
        base_z, base_g = choose(new, (z, residual), (state.z, state.g))
        base_norm, base_z_norm = jnp.where(new, g_norm, last_norm), jnp.where(new, z_norm, state.z_norm)
        krylov = _krylov.restart(krylov, base_norm, new)
        unit = choose(new, scaled(ratio(1, base_norm, where=base_norm > 0), residual), column.unit)
        basis = _krylov.with_newest(krylov, state.basis, unit, new | product.usable)

        eps = float(jnp.finfo(z.dtype).eps)
        widening = jnp.where(new, 1, jnp.where(product.lost, state.widening * eps**-0.25, state.widening))
        h = self._difference(base_z_norm, base_norm, eps) * widening  # (1)
        newest = one_hot(krylov.count, y.shape[-1], y)
        next_z = base_z + combine(jnp.where(stepping[..., None], y, h[..., None] * newest), basis)
        return next_z - z, NewtonKrylovState(
            known=state.known | True,
            trial=stepping,
            z=base_z,
            g=base_g,
            z_norm=base_z_norm,
            next_z=next_z,
            radius=trial.radius,
            forcing=jnp.where(new, self._forcing(state, f_norm, g_norm, last_norm), state.forcing),
            predicted=jnp.where(stepping, jnp.where(trial.forced, -1, predicted), 0),
            widening=widening,
            krylov=krylov,
            basis=basis,
        )

    def _forcing(self, state: NewtonKrylovState, f_norm: Array, g_norm: Array, last_norm: Array) -> Array:
        """The forcing term (4) of a new iterate."""
        tolerance: Any = self.atol + self.rtol * f_norm
        target = 0.5 * ratio(tolerance, g_norm)
        fallen = jnp.where(state.known, ratio(g_norm, last_norm), jnp.inf)
        # Where the last step brought little, small components of the step are what is missing.
        most = jnp.where((fallen > SLOW) & (fallen < 1), self.forcing**2, self.forcing)
        return jnp.maximum(jnp.minimum(0.9 * fallen**2, most), jnp.minimum(target, 0.5))

    def _difference(
        self, size: Float[Array, "*batch"], base_norm: Float[Array, "*batch"], eps: float
    ) -> Float[Array, "*batch"]:
        """h of (1) before it is widened; relative to ‖g‖ at z = 0."""
        difference: Any = eps**0.5 if self.difference is None else self.difference
        return difference * jnp.where(size > 0, size, base_norm)


class ProductResult(NamedTuple):
    value: Vec  # J q where usable
    usable: Bool[Array, "*batch"]
    lost: Bool[Array, "*batch"]  # whether the difference was lost in rounding: h is widened, and q tried again


def jacobian_product(
    state: NewtonKrylovState, residual: Vec, distance: Array, g_norm: Array, last_norm: Array
) -> ProductResult:
    """The product (1), in the problems where the last evaluation was for one; `distance` is h."""
    eps = float(jnp.finfo(residual.dtype).eps)
    asked = state.known & ~state.trial & jnp.isfinite(g_norm) & (distance > 0) & jnp.isfinite(distance)
    change = residual - state.g
    change = choose(asked, change, zeros_like(change))
    lost = asked & (norm(change) <= NOISE * eps * last_norm) & (distance < eps**0.25 * last_norm)
    usable = asked & ~lost
    return ProductResult(divided(change, jnp.where(usable, distance, 1)), usable, lost)


class TrialResult(NamedTuple):
    new: Bool[Array, "*batch"]  # whether z is a new iterate
    rejected: Bool[Array, "*batch"]  # whether a shorter step is to be tried
    forced: Bool[Array, "*batch"]  # whether the next step is taken whatever it brings
    radius: Float[Array, "*batch"]


def assess_trial(state: NewtonKrylovState, distance: Array, g_norm: Array, last_norm: Array) -> TrialResult:
    """(2) and (3), in the problems where the last evaluation was a trial; `distance` is ‖p‖."""
    eps, finite, tried = float(jnp.finfo(state.z.dtype).eps), jnp.isfinite(g_norm), state.known & state.trial
    gain = (last_norm - g_norm) * (last_norm + g_norm)
    promise = (last_norm - state.predicted) * (last_norm + state.predicted)
    rho = jnp.where(finite & (promise > 0), ratio(gain, promise), -1)
    accepted = tried & finite & (rho > ACCEPTED)
    shrunk = jnp.where(finite, 0.25, 0.1) * jnp.minimum(state.radius, distance)
    adapted = jnp.where(rho < POOR, jnp.maximum(0.5 * distance, 0.25 * state.radius), state.radius)
    adapted = jnp.where(rho > GOOD, jnp.maximum(adapted, 2 * distance), adapted)
    radius = jnp.where(tried, jnp.where(accepted, adapted, shrunk), state.radius)
    # No step that the arithmetic can tell from zero has helped: a local minimum of ‖g‖. Newton's own step leaves it,
    # whatever it brings.
    stuck = tried & ~accepted & (radius <= 4 * eps * state.z_norm)
    # How far a step may go is a decision, not a function of the inputs, and may be infinite: constant in `Unroll`.
    radius = jax.lax.stop_gradient(jnp.where(stuck, jnp.inf, radius))
    new = ~state.known | accepted | (tried & finite & (state.predicted < 0))
    return TrialResult(new, tried & ~new, stuck | (state.known & (state.predicted < 0) & ~tried), radius)


def trial_step(
    krylov: _krylov.Krylov, radius: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch rows"], Float[Array, "*batch"]]:
    """The coordinates of the step p of at most `radius`, and the norm ‖g + J p‖ that the model predicts."""
    y, predicted = _krylov.dogleg(krylov, radius)
    # Without a single product there is no model: the plain iteration, within the radius.
    plain, length = krylov.count == 0, jnp.minimum(radius, krylov.beta)
    first = length[..., None] * one_hot(0, y.shape[-1], y)
    return jnp.where(plain[..., None], first, y), jnp.where(plain, krylov.beta - 0.5 * length, predicted)
