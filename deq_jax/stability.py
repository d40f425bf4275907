"""How far an equilibrium is from instability: the spectral radius of its Jacobian, the norm of a weight."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._trace import hoist, run_compiled
from deq_jax.solvers import arnoldi
from deq_jax.solvers.base import at_most, norm, ratio, raveler, wide_dtype, zeros_from

KRYLOV = 16  # dimension of the space that the leading eigenvalues are looked for in
INVARIANT = 0.01  # a Krylov space is called invariant when f's Jacobian leads out of it by less, relatively
SQUARINGS = 30


def spectral_radius(
    f: Callable, z: PyTree, *args: PyTree, batch_ndim: int = 0, iterations: int = 100, key: Array | None = None
) -> Float[Array, "*batch"]:
    """max |λ| over the eigenvalues of ∂f/∂z at this z, real or in complex pairs, one for each problem.

    Below 1 plain iteration converges near z. Costs `iterations` Jacobian-vector products; not differentiable.
    The Rayleigh quotient of a power method, which is what one finds elsewhere, is the real part of a complex
    pair at best. Here the power method only brings its vector near to the leading eigenspace, and there the
    eigenvalues are those of a small matrix.

    Where more than 16 leading eigenvalues have nearly one modulus (0.9 times an orthogonal matrix) the growth of
    the power method answers instead; it is exact for such a matrix if it is normal.

    >>> import jax.numpy as jnp
    >>> rotation = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> round(float(spectral_radius(lambda z: rotation @ z, jnp.ones(2))), 4)
    0.9
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 2:
        raise ValueError(f"iterations must be an int >= 2, got {iterations!r}")
    z = jax.tree.map(jnp.asarray, z)
    key = jax.random.key(0) if key is None else key
    cell, inputs, other = hoist(f, z, args=args)
    return run_compiled(_spectral_radius, (cell, batch_ndim, iterations), z, inputs, other, key)


def _spectral_radius(cell, batch_ndim, iterations, z, inputs, other, key):
    ravel, unravel = raveler(z, batch_ndim)
    flat = ravel(z)
    _, push = jax.linearize(lambda flat: ravel(cell(unravel(flat), inputs, other)), flat)

    m = at_most(min(KRYLOV, iterations // 2), flat.shape[-1])
    v = zeros_from(flat) + jax.random.normal(key, flat.shape, flat.dtype)
    v, growth = _power(push, _unit(v)[0], iterations - m)
    _, H, out = _arnoldi(push, v, m)
    radius = _gelfand(H)
    # The space need not hold all of a cluster: for a normal J both are lower bounds.
    invariant = jnp.min(out, axis=-1) <= INVARIANT * radius
    return jax.lax.stop_gradient(jnp.where(invariant, radius, jnp.maximum(radius, growth)))


@functools.partial(jax.jit, static_argnames="only_shrink")
def spectral_normalize(
    weight: Float[Array, "*rows columns"], target: float = 1.0, *, only_shrink: bool = False
) -> Float[Array, "*rows columns"]:
    """The weight times the number that makes its spectral norm `target`, to well within 1 %, at the first call.

    There is no state to carry, copy or warm up: the norm is found anew by 40 products with WᵀW. All axes but the
    last are one, as in Flax's kernels (for a convolution this is the norm of the kernel as a matrix). With
    `only_shrink` a weight of a smaller norm is left alone. Differentiable, through the norm as well. Zero stays
    zero.

    >>> import jax, jax.numpy as jnp
    >>> w = spectral_normalize(jax.random.normal(jax.random.key(0), (50, 30)), target=0.9)
    >>> round(float(jnp.linalg.norm(w, 2)), 2)
    0.9
    """
    wide = wide_dtype(weight)
    W = weight.reshape(-1, weight.shape[-1]).astype(wide)
    W = W if W.shape[0] >= W.shape[1] else W.T  # the space is that of the shorter side
    frozen = jax.lax.stop_gradient(W)
    top = jnp.max(jnp.abs(frozen))
    frozen = frozen / jnp.where(top > 0, top, 1)
    # Lanczos for WᵀW: after k products from a random start, σ is known to about (log n / 2k)² of itself.
    v = _unit(zeros_from(frozen[0]) + jax.random.normal(jax.random.key(0), frozen[0].shape, wide))[0]
    basis, H, _ = _arnoldi(lambda v: (frozen @ v) @ frozen, v, min(40, *W.shape))
    y = jnp.linalg.eigh((H + H.mT) / 2)[1][:, -1]
    v = _unit(y @ basis)[0]
    # σ = ‖W v‖ at the leading right singular vector, and dσ = uᵀ dW v: v is held fixed.
    scaled = (W / jnp.where(top > 0, top, 1)) @ v
    square = jnp.sum(scaled**2)
    sigma = top * jnp.sqrt(jnp.where(square > 0, square, 1))
    factor = target / jnp.where(sigma > 0, sigma, 1)
    factor = jnp.minimum(factor, 1) if only_shrink else factor
    return (weight.astype(wide) * factor).astype(weight.dtype)


def _power(
    push: Callable, v: Float[Array, "*batch dim"], steps: int
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    """v after so many steps of the power method, and the geometric mean of its growth over the later half."""

    def body(k, carry):
        v, log_growth = carry
        w, length = _unit(push(v))
        log_growth = log_growth + jnp.where(k >= steps // 2, jnp.log(length), 0)
        return jnp.where(length[..., None] > 0, w, v), log_growth

    v, log_growth = jax.lax.fori_loop(0, steps, body, (v, zeros_from(v[..., 0])))
    return v, jnp.exp(log_growth / max(steps - steps // 2, 1))


def _arnoldi(
    push: Callable, v: Float[Array, "*batch dim"], m: int
) -> tuple[Float[Array, "*batch m dim"], Float[Array, "*batch m m"], Float[Array, "*batch m"]]:
    """(Q, H, out): A Qᵀ = Qᵀ H + what leads out of the space, with orthonormal rows in Q from v on.

    out[j] is the length by which A leads from the first j + 1 vectors out of their span; where that is
    rounding, the rest of Q and H is zero.
    """
    everywhere = jnp.isfinite(norm(v)) | True
    space = arnoldi.restart(arnoldi.empty(zeros_from(v), m), v, norm(v), everywhere)
    extend = lambda _, space: arnoldi.extend(space, push(arnoldi.newest(space)), ~space.closed)
    space = jax.lax.fori_loop(0, m, extend, space)
    out = jnp.einsum("...jj->...j", space.hessenberg[..., 1:, :])
    return space.basis[..., :m, :], space.hessenberg[..., :m, :], out


def _gelfand(H: Float[Array, "*batch m m"]) -> Float[Array, "*batch"]:
    """ρ(H) = lim ‖Hᵏ‖^(1/k), by squaring: k = 2³⁰.

    Not `jnp.linalg.eigvals`: GPUs have it since jax 0.10 only (we support 0.7) and TPUs not at all, and it takes the
    matrices of a batch one after the other, while these products are batched.
    """
    size = lambda H: norm(H.reshape(*H.shape[:-2], -1))

    def body(k, carry):
        H, log_radius = carry
        length = size(H)
        H = H / jnp.where(length > 0, length, 1)[..., None, None]
        # ‖H‖ here is that of the 2ᵏ-th power, over what was divided out before.
        log_radius = log_radius + jnp.log(length) * 0.5**k
        return jnp.einsum("...ij,...jk->...ik", H, H, precision="highest"), log_radius

    _, log_radius = jax.lax.fori_loop(0, SQUARINGS, body, (H, zeros_from(H[..., 0, 0])))
    return jnp.exp(log_radius)


def _unit(v: Float[Array, "*batch dim"]) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    length = norm(v)
    return ratio(v, jnp.where(length > 0, length, 1)[..., None]), length
