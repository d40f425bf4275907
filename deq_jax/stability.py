"""How close an equilibrium is to instability: the spectral radius of its Jacobian, and the norm of a weight."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax import _krylov
from deq_jax._arrays import at_most, ratio, zeros_from
from deq_jax._checks import check_count
from deq_jax._programs import run_compiled
from deq_jax._states import Layout, holding, split, wide_dtype
from deq_jax._trace import hoist
from deq_jax._vectors import norm

KRYLOV_DIM = 16  # dimension of the Krylov space in which we look for the leading eigenvalues
INVARIANT = 0.01  # a Krylov space counts as invariant if the Jacobian leads out of it by less than this, relatively
SQUARINGS = 30


def spectral_radius(
    f: Callable, z: PyTree, *args: PyTree, batch_ndim: int = 0, iterations: int = 100, key: Array | None = None
) -> Float[Array, "*batch"]:
    """max |λ| over the eigenvalues of ∂f/∂z at this z, real or in complex pairs, one for each problem.

    Below 1, plain iteration converges near z. It costs `iterations` Jacobian-vector products and is not differentiable.

    Other libraries take the Rayleigh quotient of a power method, which for a complex pair gives the real part at best.
    Here the power method only brings a vector close to the leading eigenspace. A small matrix then has the eigenvalues.
    If more than 16 leading eigenvalues have nearly the same modulus (0.9 times an orthogonal matrix), the growth of the
    power method is returned instead. For such a matrix it is exact if the matrix is normal.

    Args:
      f, z, *args, batch_ndim: as for `fixed_point`, with z in place of z0.
      key: for the random vector at the start; `jax.random.key(0)` by default.

    Raises:
      ValueError: if `iterations` is not an int >= 2.

    >>> import jax.numpy as jnp
    >>> rotation = 0.9 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> round(float(spectral_radius(lambda z: rotation @ z, jnp.ones(2))), 4)
    0.9
    """
    check_count("iterations", iterations, 2)
    z, carried = split(jax.tree.map(jnp.asarray, z))
    key = jax.random.key(0) if key is None else key
    cell, inputs, other = hoist(holding(f, carried), z, args=args)
    return run_compiled(_spectral_radius, (cell, batch_ndim, iterations), z, inputs, other, key, differentiates=True)


def _spectral_radius(cell, batch_ndim, iterations, z, inputs, other, key):
    layout = Layout(z, batch_ndim, flat=True)
    flat = layout.pack(z)
    _, push = jax.linearize(lambda flat: layout.pack(cell(layout.unpack(flat), inputs, other)), flat)

    m = at_most(min(KRYLOV_DIM, iterations // 2), flat.shape[-1])
    v = zeros_from(flat) + jax.random.normal(key, flat.shape, flat.dtype)
    v, growth = _power(push, _unit(v)[0], iterations - m)
    _, H, out = _arnoldi(push, v, m)
    radius = _gelfand(H)
    # The space may miss part of a cluster. Both numbers are lower bounds for a normal J, so take the larger.
    invariant = jnp.min(out, axis=-1) <= INVARIANT * radius
    return jax.lax.stop_gradient(jnp.where(invariant, radius, jnp.maximum(radius, growth)))


@functools.partial(jax.jit, static_argnames="only_shrink")
def spectral_normalize(
    weight: Float[Array, "*rows columns"], target: float = 1.0, *, only_shrink: bool = False
) -> Float[Array, "*rows columns"]:
    """The weight, scaled so that its spectral norm is `target`, to well within 1 %, at the first call.

    There is no state to carry, copy or warm up: each call computes the norm by 40 products with WᵀW. All axes but the
    last count as rows, as in Flax's kernels, so a convolution's kernel is taken as a matrix. `only_shrink` leaves a
    weight of a smaller norm unchanged. The result is differentiable, also through the norm. Zero stays zero.

    >>> import jax, jax.numpy as jnp
    >>> w = spectral_normalize(jax.random.normal(jax.random.key(0), (50, 30)), target=0.9)
    >>> round(float(jnp.linalg.norm(w, 2)), 2)
    0.9
    """
    wide, times = wide_dtype(weight), functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    W = weight.reshape(-1, weight.shape[-1]).astype(wide)
    W = W if W.shape[0] >= W.shape[1] else W.T  # so that WᵀW acts on the shorter side
    frozen = jax.lax.stop_gradient(W)
    top = jnp.max(jnp.abs(frozen))
    frozen = ratio(frozen, top[None, None])
    # Lanczos for WᵀW: after k products from a random start, σ is known to about (log n / 2k)² of itself.
    v = _unit(zeros_from(frozen[0]) + jax.random.normal(jax.random.key(0), frozen[0].shape, wide))[0]
    basis, H, _ = _arnoldi(lambda v: times(times(frozen, v), frozen), v, min(40, *W.shape))
    y = jnp.linalg.eigh((H + H.mT) / 2)[1][:, -1]
    v = _unit(times(y, basis))[0]
    # At the leading right singular vector, σ = ‖W v‖ and dσ = uᵀ dW v, so v has no part in the derivative.
    scaled = times(ratio(W, top[None, None]), v)
    square = jnp.sum(scaled**2)
    sigma = top * jnp.sqrt(jnp.where(square > 0, square, 1))
    factor = target / jnp.where(sigma > 0, sigma, 1)  # not 0 for a zero weight: its gradient must not vanish
    factor = jnp.minimum(factor, 1) if only_shrink else factor
    return (weight.astype(wide) * factor).astype(weight.dtype)


def _power(
    push: Callable, v: Float[Array, "*batch dim"], steps: int
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    """v after these steps of the power method, and the geometric mean of its growth over the second half of them."""

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
    """(Q, H, out) with A Qᵀ = Qᵀ H + a part outside of the space. Q has orthonormal rows, and the first is v.

    out[j] is the length of the part that A maps from the first j + 1 rows to the outside of their span. Where it is
    rounding, the rest of Q and H is zero.
    """
    everywhere = jnp.isfinite(norm(v)) | True
    space, basis = _krylov.empty(zeros_from(v), m)
    space = _krylov.restart(space, norm(v), everywhere)
    basis = _krylov.with_newest(space, basis, _unit(v)[0], everywhere)

    def extend(j, carry):
        space, basis, H = carry
        more = ~space.closed
        product = push(basis[..., j, :])
        new = _krylov.new_column(space, basis, product, norm(product))
        space = _krylov.extend(space, new, more)
        H = H.at[..., j].set(jnp.where(more[..., None], new.h, 0))
        return space, _krylov.with_newest(space, basis, new.unit, more), H

    H = jnp.swapaxes(zeros_from(space.directions), -1, -2)
    _, basis, H = jax.lax.fori_loop(0, m, extend, (space, basis, H))
    return basis[..., :m, :], H[..., :m, :], jnp.einsum("...jj->...j", H[..., 1:, :])


def _gelfand(H: Float[Array, "*batch m m"]) -> Float[Array, "*batch"]:
    """ρ(H) = lim ‖Hᵏ‖^(1/k), by squaring: k = 2³⁰.

    Not by `jnp.linalg.eigvals`: it runs on GPUs only since jax 0.10 (we support 0.7), and not on TPUs. It also takes
    the matrices of a batch one after the other, while these products are batched.
    """

    def body(k, carry):
        H, log_radius = carry
        length = norm(H.reshape(*H.shape[:-2], -1))
        H = ratio(H, length[..., None, None])
        # `length` is the norm of the 2ᵏ-th power of H, divided by what earlier steps have divided out.
        log_radius = log_radius + jnp.log(length) * 0.5**k
        return jnp.einsum("...ij,...jk->...ik", H, H, precision="highest"), log_radius

    _, log_radius = jax.lax.fori_loop(0, SQUARINGS, body, (H, zeros_from(H[..., 0, 0])))
    return jnp.exp(log_radius)


def _unit(v: Float[Array, "*batch dim"]) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
    """v / ‖v‖, and ‖v‖."""
    length = norm(v)
    return ratio(v, length[..., None]), length
