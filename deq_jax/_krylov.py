"""Arnoldi's process and the models that are solved in its space, for each problem of a batch.

From g = β q₀, k products with J give orthonormal q₀ … q_k and a Hessenberg matrix H of k columns,

    (1)  J qⱼ = Σᵢ Hᵢⱼ qᵢ,  i = 0 … j + 1

so that ‖g + J p‖ = ‖β e₀ + H y‖ for p = Σ yⱼ qⱼ. Givens rotations, one for each column, make H upper triangular:

    (2)  Ω H = R,  min ‖g + J p‖ = |β Ωₖ₀|  at  R y = −β Ω e₀, less the last row

Powell's dogleg leads from 0 along the steepest descent to the Cauchy point c, and from there to the minimizer n of (2):

    (3)  c = (‖s‖ / ‖H s‖)² s  with  s = −Hᵀ β e₀
    (4)  ‖c + t (n − c)‖ = r  where it leaves the trust region of radius r
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import aligned, einsum, one_hot, ratio, safe_sqrt, zeros_from
from deq_jax._rows import combine, first_rows, outer, products, repeated
from deq_jax._states import choose, zeros_like
from deq_jax._vectors import Rows, Vec, norm, scaled, zero_of


class Krylov(NamedTuple):
    count: Int[Array, "*batch"]  # products so far, k
    closed: Bool[Array, "*batch"]  # no further product can improve the model
    basis: Rows  # q₀ … q_k, zeros after that
    hessenberg: Float[Array, "*batch size+1 size"]  # H, by columns, zeros after the k-th
    rotation: Float[Array, "*batch size+1 size+1"]  # Ω, orthogonal
    triangle: Float[Array, "*batch size+1 size"]  # R
    beta: Float[Array, "*batch"]  # ‖g‖
    residual: Float[Array, "*batch"]  # min ‖g + J p‖ over p in the space


def empty(zero: Vec, size: int) -> Krylov:
    none = zero_of(zero)
    column = jnp.stack([none] * (size + 1), axis=-1)
    square, count = jnp.stack([column] * (size + 1), axis=-1), none.astype(jnp.int32)
    basis = repeated(zero, size + 1)
    return Krylov(count, none > 0, basis, square[..., :-1], square, square[..., :-1], none, none)


def restart(krylov: Krylov, g: Vec, beta: Float[Array, "*batch"], where: Bool[Array, "*batch"]) -> Krylov:
    """A space that begins with g, in the problems named by `where`."""
    unit = scaled(ratio(1, beta, where=beta > 0), g)
    unit = choose(where, unit, zeros_like(unit))  # g may not be finite in the other problems
    column = krylov.rotation[..., 0]
    fresh = Krylov(
        count=zeros_from(krylov.count),
        closed=where & False,
        basis=outer(one_hot(0, column.shape[-1], column), unit),
        hessenberg=zeros_from(krylov.hessenberg),
        rotation=zeros_from(krylov.rotation) + aligned(jnp.eye(column.shape[-1], dtype=column.dtype), krylov.rotation),
        triangle=zeros_from(krylov.triangle),
        beta=beta,
        residual=beta,
    )
    return choose(where, fresh, krylov)


def newest(krylov: Krylov) -> Vec:
    """The direction whose product with J comes next."""
    column = krylov.rotation[..., 0]
    return combine(one_hot(krylov.count, column.shape[-1], column), krylov.basis)


# ---- one more product --------------------------------------------------------------------------------------


def extend(krylov: Krylov, product: Vec, where: Bool[Array, "*batch"]) -> Krylov:
    """The space with the product J q_k added, in the problems named by `where`; the others pass zeros as product."""
    k, size = krylov.count, krylov.hessenberg.shape[-1]
    at_k, after = (one_hot(i, size + 1, krylov.rotation[..., 0]) for i in (k, k + 1))
    new = new_column(product, krylov.basis, after)
    rotation, rotated = rotate(krylov.rotation, new.column, at_k, after)
    put = lambda x, column: x + column[..., :, None] * at_k[..., None, :size]
    extended = Krylov(
        count=k + 1,
        closed=~new.independent | (k + 1 >= size),
        basis=krylov.basis + outer(after, new.unit),
        hessenberg=put(krylov.hessenberg, new.column),
        rotation=rotation,
        triangle=put(krylov.triangle, rotated),
        beta=krylov.beta,
        residual=jnp.abs(krylov.beta * jnp.sum(rotation[..., 0] * after, -1)),
    )
    return choose(where, extended, krylov)


class Column(NamedTuple):
    column: Float[Array, "*batch size+1"]  # the next one of H
    unit: Vec  # q_{k+1}
    independent: Bool[Array, "*batch"]  # whether the product leads out of the space; otherwise q_{k+1} is zero


def new_column(product: Vec, basis: Rows, after: Array) -> Column:
    """J q_k = Σ hᵢ qᵢ + ‖w‖ q_{k+1} as in (1), with `after` the unit vector e_{k+1}."""
    w, h = orthogonalize(product, basis)
    length, whole = norm(w), norm(product)
    independent = length > 100 * float(jnp.finfo(product.dtype).eps) * whole
    length = jnp.where(independent, length, 0)
    unit = scaled(ratio(1, length, where=independent), w)
    return Column(h + length[..., None] * after, unit, independent)


def orthogonalize(w: Vec, basis: Rows) -> tuple[Vec, Float[Array, "*batch rows"]]:
    """(what is left of w, its coefficients) over orthonormal rows. Gram–Schmidt; twice is enough (Kahan)."""
    coefficients: Any = 0
    for _ in range(2):
        along = products(basis, w)
        w, coefficients = w - combine(along, basis), coefficients + along
    return w, coefficients


def rotate(rotation: Array, column: Array, at_k: Array, after: Array) -> tuple[Array, Array]:
    """(Ω, the new column of R): one more Givens rotation of (2), of rows k and k + 1, ends the column at row k."""
    rotated = einsum("...ij,...j->...i", rotation, column)
    a, b = jnp.sum(rotated * at_k, -1), jnp.sum(rotated * after, -1)
    hypotenuse = safe_sqrt(a * a + b * b)
    positive = hypotenuse > 0
    safe = jnp.where(positive, hypotenuse, 1)
    cos, sin = jnp.where(positive, a / safe, 1)[..., None], jnp.where(positive, b / safe, 0)[..., None]
    row_k, row_after = (einsum("...i,...ij->...j", i, rotation) for i in (at_k, after))
    rotation = add_row(rotation, at_k, cos * row_k + sin * row_after - row_k)
    rotation = add_row(rotation, after, cos * row_after - sin * row_k - row_after)
    return rotation, rotated + (hypotenuse - a)[..., None] * at_k - b[..., None] * after


def add_row(x: Array, unit: Float[Array, "*batch rows"], row: Float[Array, "*batch dim"]) -> Array:
    """x with `row` added to one row, that of the unit vector."""
    return x + unit[..., :, None] * row[..., None, :]


# ---- models ------------------------------------------------------------------------------------------------


def solution(krylov: Krylov) -> Float[Array, "*batch size"]:
    """y that minimizes ‖g + J Q y‖ = ‖β e₀ + H y‖, by (2), with zeros where R is singular."""
    size = krylov.triangle.shape[-1]
    r = krylov.triangle[..., :size, :]
    diagonal = einsum("...ii->...i", r)
    top = jnp.max(jnp.abs(diagonal), axis=-1, keepdims=True)
    regular = jnp.abs(diagonal) > 10 * size * float(jnp.finfo(r.dtype).eps) * top
    pivot = ratio(1, diagonal, where=regular)
    target = -krylov.beta[..., None] * krylov.rotation[..., :size, 0]

    def back(i, y):
        i = size - 1 - i
        unit = one_hot(i, size, target)
        row = jax.lax.dynamic_index_in_dim(r, i, axis=-2, keepdims=False)
        value = jnp.sum(target * unit, -1) - einsum("...j,...j->...", row, y)
        return y + (value * jnp.sum(pivot * unit, -1))[..., None] * unit

    return jax.lax.fori_loop(0, size, back, zeros_from(target))


def dogleg(krylov: Krylov, radius: Float[Array, "*batch"]) -> tuple[Vec, Float[Array, "*batch"]]:
    """The step of at most `radius` along Powell's dogleg, and the norm ‖g + J p‖ that the model predicts."""
    newton = solution(krylov)
    slope = -krylov.beta[..., None] * krylov.hessenberg[..., 0, :]
    slope_norm, image = norm(slope), norm(einsum("...ij,...j->...i", krylov.hessenberg, slope))
    far = ratio(slope_norm, image, where=image > 0) ** 2
    cauchy, cauchy_norm = far[..., None] * slope, far * slope_norm  # (3)

    # (4) is the quadratic a t² + 2 b t + c = 0.
    leg = newton - cauchy
    a, b = jnp.sum(leg * leg, -1), jnp.sum(cauchy * leg, -1)
    c = jnp.where(jnp.isfinite(radius), cauchy_norm**2 - radius**2, 0)
    root = safe_sqrt(b * b - a * c)
    t = jnp.where(b > 0, ratio(-c, b + root, where=b + root > 0), ratio(root - b, a, where=a > 0))
    between = cauchy + jnp.clip(t, 0, 1)[..., None] * leg
    inside = ratio(jnp.minimum(radius, cauchy_norm), cauchy_norm, where=cauchy_norm > 0)[..., None] * cauchy
    y = jnp.where((cauchy_norm >= radius)[..., None], inside, between)
    y = jnp.where((norm(newton) <= radius)[..., None], newton, y)

    first = one_hot(0, krylov.hessenberg.shape[-2], y)
    predicted = norm(krylov.beta[..., None] * first + einsum("...ij,...j->...i", krylov.hessenberg, y))
    return combine(y, first_rows(krylov.basis, y.shape[-1])), predicted
