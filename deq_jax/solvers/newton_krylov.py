"""Newton–Krylov for hard roots: a trust region inside the Krylov space, one evaluation of f a step.

An evaluation of g = f(z) − z serves one of two purposes. Most are made at z + h q, near the iterate z, for a product
with the Jacobian J of g. The Krylov space of `_krylov` grows by it until it holds a p with ‖g + J p‖ ≤ forcing · ‖g‖:

    (1)  J q = (g(z + h q) − g(z)) / h,  h = difference · ‖z‖

or f is differentiated in the direction q as it is evaluated at z once more, which gives the product exactly. With a
preconditioner P the space is that of J P, and its step is P p.

The others are trials of a step p of at most the trust radius, judged as in `trust_region`. After a rejected one the
next goes less far in the same space. An accepted step begins a new space, whose forcing term is that of Eisenstat &
Walker (1996), choice 2:

    (2)  forcing = min(0.9 (‖g‖ / ‖g_prev‖)², forcing_max), and no less than half the tolerance over ‖g‖
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax import _krylov
from deq_jax._arrays import one_hot, ratio, reciprocal, settled, zeros_from
from deq_jax._checks import check_number, check_preconditioner
from deq_jax._config import Number, config, with_options
from deq_jax._rows import combine
from deq_jax._states import Layout, choose, zeros_like
from deq_jax._vectors import Rows, Vec, divided, norm, norms, scaled, zero_of
from deq_jax.solvers.norms import default_rtol
from deq_jax.solvers.protocol import LoopOptions, check_sees_all
from deq_jax.solvers.trust_region import FAILED, LOST, NEW, PRODUCT, START, STUCK, TRIAL, USED, Trial, assess_trial

NOISE = 30  # units in the last place of g: a difference that changes it by less is lost in rounding
SLOW = 0.99  # a step that leaves more of ‖g‖ than this is slow

PRODUCTS = "differences", "jvp"  # where products with J come from


class NewtonKrylovState(NamedTuple):
    purpose: Int[Array, "*batch"]  # of the next evaluation: START, PRODUCT or TRIAL
    z: Vec  # the iterate
    g: Vec  # and its residual
    z_norm: Float[Array, "*batch"]
    next_z: Vec  # where f is to be evaluated next
    radius: Float[Array, "*batch"]  # of the trust region
    forcing: Float[Array, "*batch"]
    promised: Float[Array, "*batch"]  # decrease of ‖g‖² by the trial step; below zero for one taken whatever it brings
    widening: Float[Array, "*batch"]  # factor of the difference h, for an h that was lost in rounding
    krylov: _krylov.Krylov
    basis: Rows  # of the Krylov space


@config
class NewtonKrylov(LoopOptions):
    """Newton's method whose linear systems are solved in a Krylov space, from differences or derivatives of f.

    For roots where the secant solvers fail: Brown & Saad (1990), with Powell's dogleg in the Krylov space. The step
    never leaves a region where the linear model has predicted well, and a step to where f is not finite is cut. Between
    two steps it evaluates f up to `krylov` times at z + h q, each one a product of the Jacobian with q, until the model
    is solved to `forcing` times ‖g‖, or as far as Eisenstat & Walker (1996) ask near the root. Memory is `krylov` + 4
    states. `difference` is h relative to ‖z‖, by default the square root of the machine epsilon.

    With `products="jvp"` the products are exact: instead of an evaluation at z + h q, f is differentiated in the
    direction q at z, by forward mode, which costs about as much as three evaluations and counts as one. It loses no
    digits, in 16 bits too. The default needs no derivative of f, which may be a black box.

    `preconditioner` is a linear function P ≈ (I − J)⁻¹ of a state like z, with all its batch axes (in `root`,
    P ≈ (∂F)⁻¹). It goes with products="jvp", and is used on the right: residuals and tolerances stay those of f, and
    the trust region is one of P⁻¹ times the step. It may capture any array. The backward solve has one of its own.

    For an affine f, `NewtonKrylov(krylov=…, forcing=0.0, difference=1.0)` is restarted GMRES: differences are
    exact then, and the space grows until the tolerance is met.

    A bad choice where Anderson converges: it spends several evaluations for one step. In 16 bits a difference
    is lost in rounding; pass a larger one, take products="jvp", or keep z in float32.

    >>> NewtonKrylov(krylov=10).krylov
    10
    >>> NewtonKrylov(products="jvp").products
    'jvp'
    """

    krylov: int = 20
    forcing: Number = 0.01
    difference: Number | None = None
    products: str = "differences"
    preconditioner: Any = None

    recovers = True  # a trial that is not finite is not the end: the step is cut

    scale_free = True
    flat = False
    may_begin_apart = True

    def __post_init__(self):
        super().__post_init__()
        check_sees_all(self, "NewtonKrylov")
        check_number(self, "krylov", at_least=1)
        check_number(self, "forcing", at_least=0, at_most=1)
        if self.difference is not None:
            check_number(self, "difference", above=0)
        if self.products not in PRODUCTS:
            raise ValueError(f"NewtonKrylov.products must be one of {', '.join(PRODUCTS)}; got {self.products!r}")
        check_preconditioner(self)
        if self.preconditioner is not None and self.products != "jvp":
            raise ValueError(f"NewtonKrylov.preconditioner needs products='jvp', got {self.products!r}")

    @property
    def patience(self) -> int:
        """Evaluations that may pass without a better residual."""
        return 2 * self.krylov + 10

    def in_layout(self, layout: Layout) -> "NewtonKrylov":
        """With the preconditioner as a function of vectors."""
        P = self.preconditioner
        return self if P is None else with_options(self, preconditioner=lambda v: layout.pack(P(layout.unpack(v))))

    def init(self, z: Vec) -> NewtonKrylovState:
        zero, none = zeros_like(z), zero_of(z)
        krylov, basis = _krylov.empty(zero, self.krylov)
        start, radius, forcing = zeros_from(krylov.count) + START, none + jnp.inf, none + self.forcing
        return NewtonKrylovState(
            start, zero, zero, none, z, radius, forcing, none, widening=none + 1, krylov=krylov, basis=basis
        )

    def resume(self, state: NewtonKrylovState) -> NewtonKrylovState:
        """Nothing of an earlier solve is a start for this one."""
        return self.init(zeros_like(state.z))

    def can_backtrack(self, state: NewtonKrylovState) -> Bool[Array, "*batch"]:
        return state.purpose >= START

    def next_point(self, state: NewtonKrylovState, z: Vec) -> Vec:
        return state.next_z

    @property
    def direction(self) -> Callable[[NewtonKrylovState], Vec] | None:
        """The newest vector of the basis, where f is to be differentiated."""
        return (lambda state: self.from_space(newest_of_basis(state))) if self.products == "jvp" else None

    def from_space(self, p: Vec) -> Vec:
        """A vector of the Krylov space as a step of z."""
        return p if self.preconditioner is None else self.preconditioner(p)

    def update(
        self, residual: Vec, state: NewtonKrylovState, z: Vec, product: Vec | None = None
    ) -> tuple[Vec, NewtonKrylovState]:
        # On a GPU a barrier keeps XLA from computing small things again, piece by piece, in the kernels that need them.
        sizes = sizes_at(residual, state, z, product)
        if self.preconditioner is not None:  # as far as the trial went in the space, whose norm the radius bounds
            length = norm(_krylov.dogleg(state.krylov, state.radius).y)
            sizes = sizes._replace(distance=jnp.where(state.purpose == TRIAL, length, 1))
        verdict = self._assess(sizes, state)
        verdict, last_g = settled((verdict, state.g))
        used, new = verdict.used, verdict.new

        change = residual - last_g if product is None else product
        product = divided(choose(used, change, zeros_like(change)), verdict.h)  # (1)
        krylov = state.krylov._replace(beta=verdict.g_norm)
        column = _krylov.new_column(krylov, state.basis, product, verdict.product_norm)
        krylov = _krylov.restart(_krylov.extend(krylov, column, used), verdict.g_norm, new)
        krylov = settled(krylov)
        # Each problem has at most one new vector: the first of a new space, or the one that the product has led to.
        unit = choose(new, scaled(reciprocal(verdict.g_norm), residual), column.unit)
        basis = _krylov.with_newest(krylov, state.basis, unit, new | used)

        solved = krylov.closed | (krylov.residual <= verdict.forcing * krylov.beta)
        stepping = (verdict.event >= FAILED) | (solved & ~new)
        step = _krylov.dogleg(krylov, verdict.radius)
        newest = one_hot(krylov.count, step.y.shape[-1], step.y)
        weights = jnp.where(stepping[..., None], step.y, verdict.next_h[..., None] * newest)
        base_z, base_g = choose(new, (z, residual), (state.z, state.g))
        next_z = base_z + self.from_space(combine(weights, basis))
        return next_z - z, NewtonKrylovState(
            purpose=jnp.where(stepping, TRIAL, PRODUCT).astype(jnp.int32),
            z=base_z,
            g=base_g,
            z_norm=verdict.z_norm,
            next_z=next_z,
            radius=verdict.radius,
            forcing=verdict.forcing,
            promised=jnp.where(verdict.event == STUCK, -1, step.decrease),
            widening=verdict.widening,
            krylov=krylov,
            basis=basis,
        )

    def _assess(self, sizes: "Sizes", state: NewtonKrylovState) -> "Verdict":
        """What the evaluation was good for, and the numbers that follow from it."""
        last, eps = state.krylov.beta, float(jnp.finfo(sizes.g.dtype).eps)
        trial = Trial(state.purpose, last, state.z_norm, state.radius, state.promised)
        trial = assess_trial(trial, sizes.g, sizes.distance, eps)
        of_product = lambda: assess_product(sizes, last, eps) if self.direction is None else assess_exact(sizes)
        event = jnp.where(state.purpose == TRIAL, trial.event, of_product())
        event = jnp.where(state.purpose == START, NEW, event).astype(jnp.int32)
        new, used = event == NEW, event == USED
        z_norm, g_norm = jnp.where(new, sizes.z, state.z_norm), jnp.where(new, sizes.g, last)
        widening = jnp.where(event == LOST, state.widening * eps**-0.25, state.widening)
        widening = jnp.where(new, 1, widening)
        difference: Any = eps**0.5 if self.difference is None else self.difference
        difference = difference if self.direction is None else 0.0
        return Verdict(
            event=event,
            new=new,
            used=used,
            h=jnp.where(used, sizes.distance, 1),
            product_norm=ratio(sizes.change, sizes.distance),
            z_norm=z_norm,
            g_norm=g_norm,
            radius=trial.radius,
            forcing=jnp.where(new, self._forcing(sizes, state), state.forcing),
            widening=widening,
            next_h=difference * jnp.where(z_norm > 0, z_norm, g_norm) * widening,
        )

    def _forcing(self, sizes: "Sizes", state: NewtonKrylovState) -> Float[Array, "*batch"]:
        """The forcing term (2) of a new iterate."""
        rtol = default_rtol(float(jnp.finfo(sizes.f.dtype).eps)) if self.rtol is None else self.rtol
        tolerance: Any = self.atol + rtol * sizes.f
        target = 0.5 * ratio(tolerance, sizes.g)
        fallen = jnp.where(state.purpose == START, jnp.inf, ratio(sizes.g, state.krylov.beta))
        # Where the last step brought little, small components of the step are what is missing.
        most = jnp.where((fallen > SLOW) & (fallen < 1), self.forcing**2, self.forcing)
        return jnp.maximum(jnp.minimum(0.9 * fallen**2, most), jnp.minimum(target, 0.5))


class Sizes(NamedTuple):
    """Norms of what an evaluation at z has brought."""

    g: Float[Array, "*batch"]  # ‖g(z)‖
    distance: Float[Array, "*batch"]  # of z from the iterate: h of a product, or ‖p‖
    change: Float[Array, "*batch"]  # of g from that at the iterate
    z: Float[Array, "*batch"]
    f: Float[Array, "*batch"]  # ‖f(z)‖


def newest_of_basis(state: NewtonKrylovState) -> Vec:
    return combine(one_hot(state.krylov.count, state.krylov.normal.shape[-1], state.krylov.normal), state.basis)


def sizes_at(residual: Vec, state: NewtonKrylovState, z: Vec, product: Vec | None = None) -> Sizes:
    """The sizes; an exact product is one of h = 1."""
    vectors = Sizes(residual, z - state.z, residual - state.g if product is None else product, z, z + residual)
    # Stacked, they are made by one kernel.
    sizes = settled(jnp.stack(norms(*vectors), axis=-1))
    sizes = Sizes(*(sizes[..., i] for i in range(len(vectors))))
    if product is None:
        return sizes
    return sizes._replace(distance=jnp.where(state.purpose == TRIAL, sizes.distance, 1))


class Verdict(NamedTuple):
    event: Int[Array, "*batch"]  # NEW, USED, LOST, FAILED, REJECTED or STUCK
    new: Bool[Array, "*batch"]
    used: Bool[Array, "*batch"]
    h: Float[Array, "*batch"]  # of the product; 1 where there is none
    product_norm: Float[Array, "*batch"]  # ‖J q‖
    z_norm: Float[Array, "*batch"]  # of the iterate
    g_norm: Float[Array, "*batch"]  # and of its residual
    radius: Float[Array, "*batch"]
    forcing: Float[Array, "*batch"]
    widening: Float[Array, "*batch"]
    next_h: Float[Array, "*batch"]  # of the next product, if there is one: relative to ‖g‖ at z = 0


def assess_product(sizes: Sizes, last_norm: Float[Array, "*batch"], eps: float) -> Int[Array, "*batch"]:
    """USED, LOST or FAILED, in the problems where the last evaluation was for a product (1)."""
    finite = jnp.isfinite(sizes.g) & (sizes.distance > 0) & jnp.isfinite(sizes.distance)
    lost = (sizes.change <= NOISE * eps * last_norm) & (sizes.distance < eps**0.25 * last_norm)
    return jnp.where(finite, jnp.where(lost, LOST, USED), FAILED)


def assess_exact(sizes: Sizes) -> Int[Array, "*batch"]:
    """USED or FAILED, where the last evaluation was for an exact product."""
    return jnp.where(jnp.isfinite(sizes.g) & jnp.isfinite(sizes.change), USED, FAILED)
