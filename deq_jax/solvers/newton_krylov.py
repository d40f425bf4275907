"""Newton–Krylov for hard roots: derivative-free, a trust region inside the Krylov space, one evaluation a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deq_jax._config import Budget, check_number, check_stopping, config
from deq_jax.solvers import arnoldi
from deq_jax.solvers.base import at_most, norm, ratio, zeros_from

ACCEPTED = 1e-4  # part of the predicted decrease of ‖g‖² that a step must bring
NOISE = 30  # units in the last place of g: a difference that changes it by less is lost in rounding
SLOW = 0.99  # a step that leaves more of ‖g‖ than this
POOR, GOOD = 0.25, 0.75  # below, the radius shrinks; above, it may grow


class NewtonKrylovState(NamedTuple):
    known: Bool[Array, "*batch"]  # whether base and base_g belong to this f
    trial: Bool[Array, "*batch"]  # the last request was a step; otherwise a difference for a product J q
    base: Float[Array, "*batch dim"]  # the iterate
    base_g: Float[Array, "*batch dim"]  # and its residual
    ask: Float[Array, "*batch dim"]  # where f is to be evaluated next
    radius: Float[Array, "*batch"]  # of the trust region
    forcing: Float[Array, "*batch"]
    predicted: Float[Array, "*batch"]  # ‖g + J p‖ of the trial step p; below zero for one taken whatever it brings
    widened: Float[Array, "*batch"]  # factor of the difference h, for an h that was lost in rounding
    krylov: arnoldi.Krylov


@config
class NewtonKrylov:
    """Newton's method whose linear systems are solved in a Krylov space of f's own differences.

    For roots where the secant solvers fail: Brown & Saad (1990), with Powell's dogleg in the Krylov space
    (the step never leaves a region where the linear model has predicted well, and a step to where f is not
    finite is cut). Between two steps it evaluates f up to `krylov` times at z + h q, each one a product of the
    Jacobian with q, until the model is solved to `forcing` times ‖g‖, or as far as Eisenstat & Walker (1996) ask
    near the root. Memory is `krylov` + 4 states. `difference` is h relative to ‖z‖, by default the square root of
    the machine epsilon.

    For an affine f, `NewtonKrylov(krylov=…, forcing=0.0, difference=1.0)` is restarted GMRES: differences are
    exact then, and the space grows until the tolerance is met.

    A bad choice where Anderson converges: it spends several evaluations for one step. In 16 bits a difference
    is lost in rounding; pass a larger one, or keep z in float32.

    >>> NewtonKrylov(krylov=10).krylov
    10
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: Budget = 100
    krylov: int = 20
    forcing: float = 0.01
    difference: float | None = None

    recovers = True  # a trial that is not finite is not the end: the step is cut

    scale_free = True

    def __post_init__(self):
        check_stopping(self)
        check_number(self, "krylov", at_least=1)
        check_number(self, "forcing", at_least=0, at_most=1)
        if self.difference is not None:
            check_number(self, "difference", above=0)

    @property
    def patience(self) -> int:
        """Evaluations that may pass without a better residual."""
        return 2 * self.krylov + 10

    def init(self, z: Float[Array, "*batch dim"]) -> NewtonKrylovState:
        zero = zeros_from(z)
        none = zero[..., 0]
        krylov = arnoldi.empty(zero, at_most(self.krylov, z.shape[-1]))
        return NewtonKrylovState(
            none > 0, none > 0, zero, zero, z, none + jnp.inf, none + self.forcing, none, none + 1, krylov
        )

    def resume(self, state: NewtonKrylovState) -> NewtonKrylovState:
        """Nothing of an earlier solve is a start for this one."""
        return self.init(zeros_from(state.base))

    def can_backtrack(self, state: NewtonKrylovState) -> Bool[Array, "*batch"]:
        return state.known | True

    def next_point(self, state: NewtonKrylovState, z: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return state.ask

    def update(
        self, residual: Float[Array, "*batch dim"], state: NewtonKrylovState, z: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], NewtonKrylovState]:
        eps = float(jnp.finfo(z.dtype).eps)
        g_norm, base_norm = norm(residual), norm(state.base_g)
        finite = jnp.isfinite(g_norm)

        # A product: J q = (g(z + h q) − g(z)) / h.
        length = norm(z - state.base)
        usable = state.known & ~state.trial & finite & (length > 0) & jnp.isfinite(length)
        change = jnp.where(usable[..., None], residual - state.base_g, 0)
        lost = usable & (norm(change) <= NOISE * eps * base_norm) & (length < eps**0.25 * base_norm)
        usable = usable & ~lost
        product = change / jnp.where(usable, length, 1)[..., None]
        krylov = arnoldi.extend(state.krylov, product, usable)
        enough = krylov.closed | (krylov.left <= state.forcing * base_norm)
        ready = state.known & ~state.trial & (enough | ~(usable | lost))

        # A trial: ρ compares what the step brought with what the model ‖g + J p‖ had promised.
        cut = state.known & state.trial
        gain = (base_norm - g_norm) * (base_norm + g_norm)
        promise = (base_norm - state.predicted) * (base_norm + state.predicted)
        rho = jnp.where(finite & (promise > 0), gain / jnp.where(promise > 0, promise, 1), -1)
        accepted = cut & finite & (rho > ACCEPTED)
        shrunk = jnp.where(finite, 0.25, 0.1) * jnp.minimum(state.radius, length)
        moved = jnp.where(rho < POOR, jnp.maximum(0.5 * length, 0.25 * state.radius), state.radius)
        moved = jnp.where(rho > GOOD, jnp.maximum(moved, 2 * length), moved)
        radius = jnp.where(cut, jnp.where(accepted, moved, shrunk), state.radius)
        # No step that the arithmetic can tell from none has helped: a local minimum of ‖g‖. Newton's own step
        # leaves it, whatever it brings.
        stuck = cut & ~accepted & (radius <= 4 * eps * norm(state.base))
        # How far a step may go is a decision, not a function of the inputs, and may be infinite: constant in `Unroll`.
        radius = jax.lax.stop_gradient(jnp.where(stuck, jnp.inf, radius))
        forced = stuck | (state.known & (state.predicted < 0) & ~cut)

        # A new iterate begins a new space.
        new = ~state.known | accepted | (cut & finite & (state.predicted < 0))
        base = jnp.where(new[..., None], z, state.base)
        base_g = jnp.where(new[..., None], residual, state.base_g)
        last, base_norm = base_norm, norm(base_g)
        krylov = arnoldi.restart(krylov, base_g, base_norm, new)
        target = 0.5 * ratio(self.atol + self.rtol * norm(base + base_g), base_norm)
        fallen = jnp.where(state.known, ratio(base_norm, jnp.where(last > 0, last, 1)), jnp.inf)
        # Where the last step brought little, small components of the step are what is missing.
        most = jnp.where((fallen > SLOW) & (fallen < 1), self.forcing**2, self.forcing)
        forcing = jnp.maximum(jnp.minimum(0.9 * fallen**2, most), jnp.minimum(target, 0.5))
        forcing = jnp.where(new, forcing, state.forcing)

        stepping = ready | (cut & ~new)
        step, predicted = jax.lax.cond(
            jnp.any(stepping),
            lambda: arnoldi.dogleg(krylov, radius),
            lambda: (zeros_from(z), zeros_from(base_norm)),
        )
        # Without a single product there is no model: the plain iteration, within the radius.
        plain = krylov.used == 0
        short = ratio(jnp.minimum(radius, base_norm), base_norm)
        step = jnp.where(plain[..., None], short[..., None] * base_g, step)
        predicted = jnp.where(plain, (1 - 0.5 * short) * base_norm, predicted)
        predicted = jnp.where(forced, -1, predicted)

        difference = eps**0.5 if self.difference is None else self.difference
        widened = jnp.where(new, 1, jnp.where(lost, state.widened * eps**-0.25, state.widened))
        size = norm(base)
        size = jnp.where(size > 0, size, base_norm)
        probe = (difference * size * widened)[..., None] * arnoldi.newest(krylov)
        ask = base + jnp.where(stepping[..., None], step, probe)
        state = NewtonKrylovState(
            state.known | True,
            stepping,
            base,
            base_g,
            ask,
            radius,
            forcing,
            jnp.where(stepping, predicted, 0),
            widened,
            krylov,
        )
        return ask - z, state
