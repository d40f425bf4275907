"""Arnoldi's process, a problem at a time in one batch: J Q = Q⁺ H with orthonormal Q, and models solved in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax.solvers.base import aligned, choose, norm, one_hot, root, zeros_from


class Krylov(NamedTuple):
    used: Int[Array, "*batch"]  # products so far, k
    closed: Bool[Array, "*batch"]  # no further product can improve the model
    basis: Float[Array, "*batch size+1 dim"]  # q₀ … q_k, zeros after that
    hessenberg: Float[Array, "*batch size+1 size"]  # H, by columns, zeros after the k-th
    rotation: Float[Array, "*batch size+1 size+1"]  # Ω, orthogonal: Ω H = R is upper triangular
    triangle: Float[Array, "*batch size+1 size"]  # R
    beta: Float[Array, "*batch"]  # ‖g‖, so that g = β q₀
    left: Float[Array, "*batch"]  # min ‖g + J p‖ over p in the space


def empty(zero: Float[Array, "*batch dim"], size: int) -> Krylov:
    none = zero[..., 0]
    basis = jnp.stack([zero] * (size + 1), axis=-2)
    column = basis[..., 0]
    square = jnp.stack([column] * (size + 1), axis=-1)
    count = none.astype(jnp.int32)
    return Krylov(count, none > 0, basis, square[..., :-1], square, square[..., :-1], none, none)


def restart(
    krylov: Krylov, g: Float[Array, "*batch dim"], beta: Float[Array, "*batch"], where: Bool[Array, "*batch"]
) -> Krylov:
    """A space that begins with g, in the problems named by `where`."""
    size = krylov.basis.shape[-2]
    unit = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)[..., None] * g
    unit = jnp.where(where[..., None], unit, 0)  # g may not be finite in the other problems
    fresh = Krylov(
        zeros_from(krylov.used),
        where & False,
        one_hot(0, size, g)[..., :, None] * unit[..., None, :],
        zeros_from(krylov.hessenberg),
        zeros_from(krylov.rotation) + aligned(jnp.eye(size, dtype=g.dtype), krylov.rotation),
        zeros_from(krylov.triangle),
        beta,
        beta,
    )
    return choose(where, fresh, krylov)


def newest(krylov: Krylov) -> Float[Array, "*batch dim"]:
    """The direction whose product with J comes next."""
    here = one_hot(krylov.used, krylov.basis.shape[-2], krylov.basis[..., 0])
    return jnp.einsum("...k,...kd->...d", here, krylov.basis)


def extend(krylov: Krylov, product: Float[Array, "*batch dim"], where: Bool[Array, "*batch"]) -> Krylov:
    """The space with J q_k taken in, in the problems named by `where`; the others pass zeros as product."""
    k, basis, size = krylov.used, krylov.basis, krylov.hessenberg.shape[-1]
    eps = float(jnp.finfo(product.dtype).eps)
    here, after = one_hot(k, size + 1, product), one_hot(k + 1, size + 1, product)

    # J q_k = Σ h_i q_i + h⁺ q_{k+1}
    w, h = orthogonalize(product, basis)
    left_over, whole = norm(w), norm(product)
    independent = left_over > 100 * eps * whole
    left_over = jnp.where(independent, left_over, 0)
    unit = jnp.where(independent, 1 / jnp.where(independent, left_over, 1), 0)[..., None] * w
    column = h + left_over[..., None] * after

    # One more Givens rotation, of rows k and k + 1, makes the rotated column end at row k.
    rotated = jnp.einsum("...ij,...j->...i", krylov.rotation, column)
    a, b = jnp.sum(rotated * here, -1), jnp.sum(rotated * after, -1)
    hypotenuse = root(a * a + b * b)
    safe = jnp.where(hypotenuse > 0, hypotenuse, 1)
    cos, sin = jnp.where(hypotenuse > 0, a / safe, 1)[..., None], jnp.where(hypotenuse > 0, b / safe, 0)[..., None]
    row_k = jnp.einsum("...i,...ij->...j", here, krylov.rotation)
    row_after = jnp.einsum("...i,...ij->...j", after, krylov.rotation)
    put = lambda x, i, row: x + i[..., :, None] * row[..., None, :]
    rotation = put(krylov.rotation, here, cos * row_k + sin * row_after - row_k)
    rotation = put(rotation, after, cos * row_after - sin * row_k - row_after)
    rotated = rotated + (hypotenuse - a)[..., None] * here - b[..., None] * after

    put_column = lambda x, c: x + c[..., :, None] * here[..., None, :size]
    left = jnp.abs(krylov.beta * jnp.sum(rotation[..., 0] * after, -1))
    grown = Krylov(
        k + 1,
        ~independent | (k + 1 >= size),
        put(basis, after, unit),
        put_column(krylov.hessenberg, column),
        rotation,
        put_column(krylov.triangle, rotated),
        krylov.beta,
        left,
    )
    return choose(where, grown, krylov)


def solution(krylov: Krylov) -> Float[Array, "*batch size"]:
    """y that minimises ‖g + J Q y‖ = ‖β e₀ + H y‖, with zeros where R is singular."""
    size = krylov.triangle.shape[-1]
    r = krylov.triangle[..., :size, :]
    diagonal = jnp.einsum("...ii->...i", r)
    top = jnp.max(jnp.abs(diagonal), axis=-1, keepdims=True)
    regular = jnp.abs(diagonal) > 10 * size * float(jnp.finfo(r.dtype).eps) * top
    pivot = jnp.where(regular, 1 / jnp.where(regular, diagonal, 1), 0)
    target = -krylov.beta[..., None] * krylov.rotation[..., :size, 0]

    def back(i, y):
        i = size - 1 - i
        unit = one_hot(i, size, target)
        row = jax.lax.dynamic_index_in_dim(r, i, axis=-2, keepdims=False)
        value = jnp.sum(target * unit, -1) - jnp.einsum("...j,...j->...", row, y)
        return y + (value * jnp.sum(pivot * unit, -1))[..., None] * unit

    return jax.lax.fori_loop(0, size, back, zeros_from(target))


def dogleg(krylov: Krylov, radius: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    """The step of at most `radius` along Powell's dogleg, and the norm ‖g + J p‖ that the model predicts."""
    newton = solution(krylov)
    # Steepest descent of ‖β e₀ + H y‖² goes along −Hᵀ β e₀, to the minimum on that line.
    slope = -krylov.beta[..., None] * krylov.hessenberg[..., 0, :]
    slope_norm, image = norm(slope), norm(jnp.einsum("...ij,...j->...i", krylov.hessenberg, slope))
    far = jnp.where(image > 0, slope_norm / jnp.where(image > 0, image, 1), 0) ** 2
    cauchy, cauchy_norm = far[..., None] * slope, far * slope_norm

    # Between the two, the point at distance `radius`: ‖c + t (n − c)‖² = r².
    leg = newton - cauchy
    a, b = jnp.sum(leg * leg, -1), jnp.sum(cauchy * leg, -1)
    c = jnp.where(jnp.isfinite(radius), cauchy_norm**2 - radius**2, 0)
    discriminant = root(b * b - a * c)
    t = jnp.where(b > 0, ratio0(-c, b + discriminant), ratio0(discriminant - b, a))
    between = cauchy + jnp.clip(t, 0, 1)[..., None] * leg
    short = ratio0(jnp.minimum(radius, cauchy_norm), cauchy_norm)[..., None] * cauchy
    y = jnp.where((cauchy_norm >= radius)[..., None], short, between)
    y = jnp.where((norm(newton) <= radius)[..., None], newton, y)

    first = one_hot(0, krylov.basis.shape[-2], y)
    predicted = norm(krylov.beta[..., None] * first + jnp.einsum("...ij,...j->...i", krylov.hessenberg, y))
    return jnp.einsum("...k,...kd->...d", y, krylov.basis[..., :-1, :]), predicted


def ratio0(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """a / b, and 0 where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def orthogonalize(
    w: Float[Array, "*batch dim"], basis: Float[Array, "*batch rows dim"]
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch rows"]]:
    """(what is left of w, its coefficients) over orthonormal rows. Gram–Schmidt; twice is enough (Kahan)."""
    coefficients = zeros_from(basis[..., 0])
    for _ in range(2):
        along = jnp.einsum("...kd,...d->...k", basis, w)
        w, coefficients = w - jnp.einsum("...k,...kd->...d", along, basis), coefficients + along
    return w, coefficients
