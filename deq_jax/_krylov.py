"""Arnoldi's process and the models that are solved in its space, for each problem of a batch.

From g = β q₀, k products with J give orthonormal q₀ … q_k and a Hessenberg matrix H of k columns,

    (1)  J qⱼ = Σᵢ Hᵢⱼ qᵢ,  i = 0 … j + 1

so that ‖g + J p‖ = ‖β e₀ + H y‖ for p = Σ yⱼ qⱼ. No system has to be solved for the minimizer n of that, if each column
of H makes a pair of xⱼ and zⱼ = H xⱼ, with orthonormal zⱼ:

    (2)  n = −Σ ⟨zⱼ, β e₀⟩ xⱼ

z₀ … z_{k−1} lie in the span of e₀ … e_k. One unit vector ν of that span is orthogonal to all of them, at first e₀, so
β e₀ + H n = ⟨ν, β e₀⟩ ν. What the next column h of H adds to the images is a ν + b e_{k+1}, where a = ⟨ν, h⟩ and b is
the last entry of h. With ρ² = a² + b²

    (3)  z_k = (a ν + b e_{k+1}) / ρ,  x_k = (e_k − Σ ⟨zⱼ, h⟩ xⱼ) / ρ,  ν ← (a e_{k+1} − b ν) / ρ

Powell's dogleg leads from 0 along the steepest descent to the Cauchy point c, and from there to the minimizer n of (2):

    (4)  c = (‖s‖ / ‖H s‖)² s  with  s = −Hᵀ β e₀
    (5)  ‖c + t (n − c)‖ = r  where it leaves the trust region of radius r

H (n − c) is orthogonal to β e₀ + H n. With d and D for the decrease of ‖g + J p‖² at c and at n, that at a point of the
first leg and at one of the second is

    (6)  d u (2 − u)  at u c,  D − (D − d) (1 − t)²  at c + t (n − c)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import aligned, at_most, one_hot, per_entry, ratio, reciprocal, safe_sqrt, settled, zeros_from
from deq_jax._rows import combine, products, repeated, write_row_of_each
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, each, norm, scaled, size, zero_of


class Krylov(NamedTuple):
    """All of a space except its basis. Coordinates are those in the basis, with zeros where it has not grown yet."""

    count: Int[Array, "*batch"]  # products so far, k
    closed: Bool[Array, "*batch"]  # no further product can improve the model
    beta: Float[Array, "*batch"]  # ‖g‖
    directions: Float[Array, "*batch size size+1"]  # xⱼ, zeros from the k-th on
    images: Float[Array, "*batch size size+1"]  # zⱼ
    normal: Float[Array, "*batch size+1"]  # ν
    rest: Float[Array, "*batch"]  # ⟨ν, β e₀⟩
    largest: Float[Array, "*batch"]  # of all ρ
    minimizer: Float[Array, "*batch size+1"]  # n
    gain: Float[Array, "*batch"]  # D of (6): ‖g‖² less the minimum of ‖g + J p‖²
    slope: Float[Array, "*batch size+1"]  # s of (4)
    slope_image: Float[Array, "*batch size+1"]  # H s

    @property
    def residual(self) -> Float[Array, "*batch"]:
        """min ‖g + J p‖ over p in the space."""
        return jnp.abs(self.rest)


def empty(zero: Vec, most: int) -> tuple[Krylov, Rows]:
    """A space of no vectors that can grow by `most` products, and room for its basis q₀ … q_k."""
    none, length = zero_of(zero), at_most(most, size(zero))
    y = jnp.stack([none] * (length + 1), axis=-1)
    pairs, count = jnp.stack([y] * length, axis=-2), none.astype(jnp.int32)
    return Krylov(count, none > 0, none, pairs, pairs, y, none, none, y, none, y, y), repeated(zero, length + 1)


def restart(krylov: Krylov, beta: Float[Array, "*batch"], where: Bool[Array, "*batch"]) -> Krylov:
    """A space that begins with a g of norm β, in the problems named by `where`."""
    first = one_hot(0, krylov.normal.shape[-1], krylov.normal)
    normal = first + zeros_from(krylov.normal)
    return choose(where, zeros_like(krylov)._replace(beta=beta, normal=normal, rest=beta), krylov)


def with_newest(krylov: Krylov, basis: Rows, unit: Vec, where: Bool[Array, "*batch"]) -> Rows:
    """The basis with its newest vector q_k, in the problems named by `where`. Later rows are not used."""
    return write_row_of_each(basis, unit, krylov.count, where)


# ---- one more product --------------------------------------------------------------------------------------


class Column(NamedTuple):
    h: Float[Array, "*batch size+1"]  # the next one of H
    b: Float[Array, "*batch"]  # its last entry; 0 where the product does not lead out of the space
    unit: Vec  # q_{k+1}, zero where b is


def new_column(krylov: Krylov, basis: Rows, product: Vec, whole: Float[Array, "*batch"]) -> Column:
    """J q_k = Σ hᵢ qᵢ + b q_{k+1} as in (1), for a product of norm `whole`."""
    rows = aligned(jnp.arange(krylov.normal.shape[-1], dtype=jnp.int32), krylov.normal)
    k = krylov.count[..., None]
    w, h = orthogonalize(product, basis, rows <= k)
    b = norm(w)
    independent = b > 100 * float(jnp.finfo(product.dtype).eps) * whole
    b = settled(jnp.where(independent, b, 0))
    unit = choose(b > 0, scaled(reciprocal(b), w), zeros_like(w))
    return Column(jnp.where(rows == k + 1, b[..., None], h), b, unit)


def orthogonalize(w: Vec, basis: Rows, used: Bool[Array, "*batch rows"]) -> tuple[Vec, Float[Array, "*batch rows"]]:
    """(what is left of w, its coefficients) over orthonormal rows. Gram–Schmidt; twice is enough (Kahan)."""
    coefficients: Any = 0
    for _ in range(2):
        along = _products(basis, w, used)
        w, coefficients = w - combine(along, basis), coefficients + along
    return w, coefficients


def _products(basis: Rows, w: Vec, used: Bool[Array, "*batch rows"]) -> Float[Array, "*batch rows"]:
    """⟨qᵢ, w⟩, and 0 for the rows that are not used."""
    # A GPU leaves rows out while it reads them. A CPU would write the basis again.
    only = lambda part: jnp.where(per_entry(used, part), part, 0)
    return jax.lax.platform_dependent(
        basis,
        w,
        cpu=lambda basis, w: jnp.where(used, products(basis, w), 0),
        default=lambda basis, w: products(each(only, basis), w),
    )


def extend(krylov: Krylov, new: Column, where: Bool[Array, "*batch"]) -> Krylov:
    """The space with a product J q_k added, in the problems named by `where`."""
    k, (h, b, _), size = krylov.count, new, krylov.images.shape[-2]
    at_k, after = (one_hot(i, size + 1, h) for i in (k, k + 1))
    a = jnp.sum(krylov.normal * h, -1)
    rho = safe_sqrt(a * a + b * b)
    cos, sin = jnp.where(rho > 0, ratio(a, rho), 1), ratio(b, rho)
    z = cos[..., None] * krylov.normal + sin[..., None] * after  # (3)
    largest = jnp.maximum(krylov.largest, rho)
    # A column that adds nothing but rounding to the images has no part in n.
    regular = rho > 10 * size * float(jnp.finfo(h.dtype).eps) * largest
    x = ratio(1, rho, where=regular)[..., None] * (at_k - combine(products(krylov.images, h), krylov.directions))
    along = jnp.where(regular, cos * krylov.rest, 0)  # ⟨z_k, β e₀⟩
    descent = -(krylov.beta * h[..., 0])[..., None]
    put = lambda rows, row: jnp.where(at_k[..., :size, None] > 0, row[..., None, :], rows)
    extended = Krylov(
        count=k + 1,
        closed=(b == 0) | (k + 1 >= size),
        beta=krylov.beta,
        directions=put(krylov.directions, x),
        images=put(krylov.images, z),
        normal=cos[..., None] * after - sin[..., None] * krylov.normal,
        rest=-sin * krylov.rest,
        largest=largest,
        minimizer=krylov.minimizer - along[..., None] * x,
        gain=krylov.gain + along**2,
        slope=krylov.slope + descent * at_k,
        slope_image=krylov.slope_image + descent * h,
    )
    return choose(where, extended, krylov)


# ---- models ------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    y: Float[Array, "*batch size+1"]  # p = Σ yⱼ qⱼ
    decrease: Float[Array, "*batch"]  # ‖g‖² − ‖g + J p‖²


class Model(NamedTuple):
    """g + J p, in coordinates in which the norm of p is that of its coordinates."""

    minimizer: Float[Array, "*batch size"]  # n
    gain: Float[Array, "*batch"]  # D of (6): ‖g‖² less the minimum of ‖g + J p‖²
    slope: Float[Array, "*batch size"]  # s of (4)
    slope_image: Float[Array, "*batch image"]  # H s, or another vector of its length


def powell(model: Model, radius: Float[Array, "*batch"]) -> Step:
    """The step of at most `radius` along Powell's dogleg."""
    slope, image, length = norm(model.slope), norm(model.slope_image), norm(model.minimizer)
    bend = ratio(slope, image, where=image > 0)
    far, cauchy, d, D = bend**2, bend**2 * slope, (bend * slope) ** 2, model.gain  # c = far · s of (4), ‖c‖

    # (5) is the quadratic a t² + 2 b t + c = 0. In it ⟨s, n⟩ = −⟨β e₀, H n⟩ = D.
    b = far * D - cauchy**2
    a = jnp.maximum(length**2 - far * D - b, 0)
    c = jnp.where(jnp.isfinite(radius), cauchy**2 - radius**2, 0)
    root = safe_sqrt(b * b - a * c)
    t = jnp.where(b > 0, ratio(-c, b + root, where=b + root > 0), ratio(root - b, a, where=a > 0))
    whole, short = length <= radius, (cauchy >= radius) & (length > radius)
    t = jnp.where(whole, 1, jnp.where(short, 0, jnp.clip(t, 0, 1)))
    u = jnp.where(short, ratio(jnp.minimum(radius, cauchy), cauchy), 1 - t)  # p = u c + t n
    decrease = jnp.where(short, d * u * (2 - u), D - (D - d) * u**2)  # (6)
    y = (u * far)[..., None] * model.slope + t[..., None] * model.minimizer
    return Step(y, decrease)


def dogleg(krylov: Krylov, radius: Float[Array, "*batch"]) -> Step:
    """The step of the space's model; the plain iteration as long as there is no product."""
    y, decrease = powell(Model(krylov.minimizer, krylov.gain, krylov.slope, krylov.slope_image), radius)
    none, plain = krylov.count == 0, jnp.minimum(radius, krylov.beta)
    first = plain[..., None] * one_hot(0, y.shape[-1], y)
    return Step(jnp.where(none[..., None], first, y), jnp.where(none, plain * (krylov.beta - 0.25 * plain), decrease))
