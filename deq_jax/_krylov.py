"""Arnoldi's process and the models that are solved in its space, for each problem of a batch.

From g = β q₀, k products with J give orthonormal q₀ … q_k and a Hessenberg matrix H of k columns,

    (1)  J qⱼ = Σᵢ Hᵢⱼ qᵢ,  i = 0 … j + 1

so that ‖g + J p‖ = ‖β e₀ + H y‖ for p = Σ yⱼ qⱼ. Each column of H makes a pair xⱼ, zⱼ = H xⱼ with orthonormal zⱼ. They
span the image of H, so the minimizer n needs no system to be solved:

    (2)  min ‖g + J p‖ at n = −Σ ⟨zⱼ, β e₀⟩ xⱼ,  β e₀ + H n = β e₀ − Σ ⟨zⱼ, β e₀⟩ zⱼ

z₀ … z_{k−1} lie among e₀ … e_k, where one unit vector ν is orthogonal to them: ν₀ = e₀. Of the next column h of H, the
part that is orthogonal to them is therefore a ν + b e_{k+1}, with a = ⟨ν, h⟩ and b the last entry of h. With ρ² = a² + b²

    (3)  z_k = (a ν + b e_{k+1}) / ρ,  ν ← (a e_{k+1} − b ν) / ρ,  x_k = (e_k − Σ ⟨zⱼ, h⟩ xⱼ) / ρ

Powell's dogleg leads from 0 along the steepest descent to the Cauchy point c, and from there to the minimizer n of (2):

    (4)  c = (‖s‖ / ‖H s‖)² s  with  s = −Hᵀ β e₀
    (5)  ‖c + t (n − c)‖ = r  where it leaves the trust region of radius r
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import at_most, one_hot, per_entry, ratio, reciprocal, safe_sqrt, zeros_from
from deq_jax._rows import combine, products, repeated, write_row_of_each
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, each, norm, scaled, size, zero_of


class Krylov(NamedTuple):
    """All of a space but its basis. Vectors of coordinates have `size + 1` entries, zeros after the k-th."""

    count: Int[Array, "*batch"]  # products so far, k
    closed: Bool[Array, "*batch"]  # no further product can improve the model
    beta: Float[Array, "*batch"]  # ‖g‖
    directions: Float[Array, "*batch size size+1"]  # xⱼ, zeros after the k-th
    images: Float[Array, "*batch size size+1"]  # zⱼ = H xⱼ
    normal: Float[Array, "*batch size+1"]  # ν
    largest: Float[Array, "*batch"]  # ρ so far
    minimizer: Float[Array, "*batch size+1"]  # n of (2)
    gain: Float[Array, "*batch"]  # ‖g‖² less the minimum of ‖g + J p‖²
    slope: Float[Array, "*batch size+1"]  # s of (4)
    slope_image: Float[Array, "*batch size+1"]  # H s

    @property
    def residual(self) -> Float[Array, "*batch"]:
        """min ‖g + J p‖ over p in the space."""
        return jnp.abs(self.beta * self.normal[..., 0])


def empty(zero: Vec, most: int) -> tuple[Krylov, Rows]:
    """A space of no vectors that can grow by `most` products, and room for its basis q₀ … q_k."""
    none, length = zero_of(zero), at_most(most, size(zero))
    column = jnp.stack([none] * (length + 1), axis=-1)
    pairs, count = jnp.stack([column] * length, axis=-2), none.astype(jnp.int32)
    krylov = Krylov(count, none > 0, none, pairs, pairs, column, none, column, none, column, column)
    return krylov, repeated(zero, length + 1)


def restart(krylov: Krylov, beta: Float[Array, "*batch"], where: Bool[Array, "*batch"]) -> Krylov:
    """A space that begins with a g of norm β, in the problems named by `where`."""
    first = one_hot(0, krylov.normal.shape[-1], krylov.normal)
    fresh = zeros_like(krylov)._replace(beta=beta, normal=first + zeros_from(krylov.normal))
    return choose(where, fresh, krylov)


def with_newest(krylov: Krylov, basis: Rows, unit: Vec, where: Bool[Array, "*batch"]) -> Rows:
    """The basis with its newest vector q_k, in the problems named by `where`. Later rows are those of earlier spaces."""
    return write_row_of_each(basis, unit, krylov.count, where)


# ---- one more product --------------------------------------------------------------------------------------


class Column(NamedTuple):
    column: Float[Array, "*batch size+1"]  # the next one of H, h
    length: Float[
        Array, "*batch"
    ]  # its last entry, b; 0 where the product does not lead out of the space, and then q_{k+1} is 0
    unit: Vec  # q_{k+1}


def new_column(krylov: Krylov, basis: Rows, product: Vec, whole: Float[Array, "*batch"]) -> Column:
    """J q_k = Σ hᵢ qᵢ + ‖w‖ q_{k+1} as in (1), for a product of norm `whole`."""
    rows, k = jnp.arange(krylov.normal.shape[-1]), krylov.count[..., None]
    w, h = orthogonalize(product, basis, rows <= k)
    length = norm(w)
    independent = length > 100 * float(jnp.finfo(product.dtype).eps) * whole
    length = jax.lax.optimization_barrier(jnp.where(independent, length, 0))
    unit = choose(length > 0, scaled(reciprocal(length), w), zeros_like(w))
    return Column(jnp.where(rows == k + 1, length[..., None], h), length, unit)


def orthogonalize(w: Vec, basis: Rows, used: Bool[Array, "*batch rows"]) -> tuple[Vec, Float[Array, "*batch rows"]]:
    """(what is left of w, its coefficients) over orthonormal rows. Gram–Schmidt; twice is enough (Kahan)."""
    coefficients: Any = 0
    for _ in range(2):
        along = products(each(lambda part: jnp.where(per_entry(used, part), part, 0), basis), w)
        w, coefficients = w - combine(along, basis), coefficients + along
    return w, coefficients


def extend(krylov: Krylov, new: Column, where: Bool[Array, "*batch"]) -> Krylov:
    """The space with a product J q_k added, in the problems named by `where`."""
    k, h, length = krylov.count, new.column, krylov.normal.shape[-1]
    at_k, after = (one_hot(i, length, h) for i in (k, k + 1))
    a, b = jnp.sum(krylov.normal * h, -1), new.length
    rho = safe_sqrt(a * a + b * b)
    cos, sin = (jnp.where(rho > 0, ratio(part, rho), other)[..., None] for part, other in ((a, 1), (b, 0)))  # (3)
    z, normal = cos * krylov.normal + sin * after, cos * after - sin * krylov.normal
    largest = jnp.maximum(krylov.largest, rho)
    # A column that adds nothing to the image of H has no part in n.
    regular = rho > 10 * length * float(jnp.finfo(h.dtype).eps) * largest
    x = at_k - combine(products(krylov.images, h), krylov.directions)
    x = ratio(1, rho, where=regular)[..., None] * x
    along = jnp.where(regular, krylov.beta * z[..., 0], 0)
    descent = -(krylov.beta * h[..., 0])[..., None]
    put = lambda rows, row: jnp.where(at_k[..., :-1, None] > 0, row[..., None, :], rows)
    extended = Krylov(
        count=k + 1,
        closed=(b == 0) | (k + 2 >= length),
        beta=krylov.beta,
        directions=put(krylov.directions, x),
        images=put(krylov.images, z),
        normal=normal,
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


def dogleg(krylov: Krylov, radius: Float[Array, "*batch"]) -> Step:
    """The step of at most `radius` along Powell's dogleg."""
    slope, image, length = norm(krylov.slope), norm(krylov.slope_image), norm(krylov.minimizer)
    slope_over = ratio(slope, image, where=image > 0)
    far, cauchy, least = slope_over**2, slope_over**2 * slope, (slope_over * slope) ** 2  # (4), ‖c‖, its decrease

    # (5) is the quadratic a t² + 2 b t + c = 0, where ⟨s, n⟩ = −⟨β e₀, H n⟩ is the gain.
    b = far * krylov.gain - cauchy**2
    a = jnp.maximum(length**2 - far * krylov.gain - b, 0)
    c = jnp.where(jnp.isfinite(radius), cauchy**2 - radius**2, 0)
    root = safe_sqrt(b * b - a * c)
    t = jnp.where(b > 0, ratio(-c, b + root, where=b + root > 0), ratio(root - b, a, where=a > 0))
    whole, short = length <= radius, cauchy >= radius
    t = jnp.where(whole, 1, jnp.where(short, 0, jnp.clip(t, 0, 1)))
    first = jnp.where(short & ~whole, ratio(radius, cauchy), 1 - t)  # p = first · c + t n
    # H (n − c) is orthogonal to β e₀ + H n.
    decrease = jnp.where(t > 0, krylov.gain - (krylov.gain - least) * first**2, least * first * (2 - first))

    # Without a single product there is no model: the plain iteration, within the radius.
    none, plain = krylov.count == 0, jnp.minimum(radius, krylov.beta)
    decrease = jnp.where(none, plain * (krylov.beta - 0.25 * plain), decrease)
    y = (first * far)[..., None] * krylov.slope + t[..., None] * krylov.minimizer
    e_0 = one_hot(0, y.shape[-1], y)
    return Step(jnp.where(none[..., None], plain[..., None] * e_0, y), decrease)
