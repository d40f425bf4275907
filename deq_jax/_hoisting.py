"""f and a fold as traced functions: everything they read becomes an argument, so that nothing can go stale."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from deq_jax._arrays import varying_axes, zeros_from
from deq_jax._checks import check_output, describe
from deq_jax._gathers import gathered_each
from deq_jax._states import corner, split, wide_dtype
from deq_jax._trace import Traced, check_arrays, hoist, vary
from deq_jax.solvers import Evaluation, Fold


def hoist_cell(
    f: Callable, z0: PyTree, args: tuple, has_aux: bool = False, gather: str = "once", name: str = "f"
) -> tuple[Traced, PyTree, list, list]:
    """(cell, z0, inputs, other) with f(z, *args) = cell(z, inputs, other), and z0 in the type that cell returns.

    The user knows f as `name`.
    """
    if gather not in ("once", "each"):
        raise ValueError(f"gather must be 'once' or 'each', got {gather!r}")
    evaluate = f if gather == "once" else gathered_each(f)

    def typed(z, *args):
        out = check_arrays(evaluate(z, *args), name)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"with has_aux=True, {name} must return a pair (z, aux), got {describe(out)}")
        value = out[0] if has_aux else out
        value = in_types_of(z, value)
        return (value, out[1]) if has_aux else value

    cell, inputs, other = hoist(typed, z0, args=args)
    out = cell.out[0] if has_aux else cell.out
    check_output(out, z0, name)
    start = _typed_like(z0, out)
    if any(jax.typeof(a) != jax.typeof(b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(z0), strict=True)):
        cell, inputs, other = hoist(typed, start, args=args)
    return cell, start, inputs, other


def in_types_of(z: PyTree, value: PyTree) -> PyTree:
    """f(z) with its numbers in the dtypes of z; arrays, and another structure, unchanged."""

    def typed(leaf, like):
        array = jnp.asarray(leaf)
        kinds = jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
        kind = lambda dtype: [jnp.issubdtype(dtype, kind) for kind in kinds].index(True)
        # 1 may stand for 1.0, but not 1.0 for a count, nor 1j for a real number.
        is_number = jax.typeof(array).weak_type and jnp.issubdtype(like.dtype, jnp.number)
        return array.astype(like.dtype) if is_number and kind(array.dtype) <= kind(like.dtype) else array

    return jax.tree.map(typed, value, z) if jax.tree.structure(value) == jax.tree.structure(z) else value


def _typed_like(z: PyTree, out: PyTree) -> PyTree:
    """z with the explicit sharding of f(z), and varying over the axes of `shard_map` that f(z) varies over."""
    # A problem keeps or moves all of its leaves at once, so where some of them are carried, all vary alike.
    alike = len(jax.tree.leaves(split(z)[1])) > 0
    along_any = frozenset().union(*map(varying_axes, jax.tree.leaves(out))) if alike else frozenset()

    def typed(z, out):
        sharding = getattr(out, "sharding", None)
        if sharding is not None and sharding != jax.typeof(z).sharding:
            z = jax.sharding.reshard(z, sharding)  # jnp.zeros_like drops it on jax 0.12
        missing = (varying_axes(out) | along_any) - varying_axes(jax.typeof(z))
        return vary(z, tuple(missing)) if missing else z

    return jax.tree.map(typed, z, out)


# ---- folds -------------------------------------------------------------------------------------------------


class HoistedFold(NamedTuple):
    """A fold made of the traced methods of another one."""

    traced_init: Traced
    traced_update: Traced
    reads: tuple

    def init(self, z0: PyTree, batch_ndim: int) -> Any:
        return self.traced_init(z0, *self.reads[0])

    def update(self, folded: Any, seen: Evaluation) -> Any:
        return self.traced_update(folded, seen, *self.reads[1])


def hoist_fold(fold: Fold | None, z0: PyTree, batch_ndim: int, over: tuple = ()) -> tuple[tuple, tuple]:
    """((init, update), reads): the traced methods of a fold, and the arrays that they read.

    Each problem is split over the named axes `over`, and has one residual on all of them.
    """
    if fold is None:
        return (None, None), ()
    init, *init_reads = hoist(lambda z0: fold.init(z0, batch_ndim), z0)
    residual = zero_residuals(z0, batch_ndim)
    residual = jax.lax.pmax(residual, over) if over else residual
    evaluation = Evaluation(jnp.zeros((), jnp.int32), z0, z0, residual, residual, residual == 0)
    update, *update_reads = hoist(fold.update, init(z0, *init_reads), evaluation)
    return (init, update), (init_reads, update_reads)


def with_fold(init: Traced | None, update: Traced | None, reads: tuple) -> Fold | None:
    """The fold that `hoist_fold` took apart."""
    return None if init is None or update is None else HoistedFold(init, update, reads)


def zero_residuals(z0: PyTree, batch_ndim: int) -> Float[Array, "*batch"]:
    """A zero for each problem, in the dtype of its residual and with the sharding of z0."""
    return zeros_from(corner(z0, batch_ndim).real.astype(wide_dtype(z0)))
