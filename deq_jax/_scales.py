"""Scales: a number for each entry of a state. Weights of a norm are scales, and an absolute tolerance may be.

They are a pytree like the floats of the state, of numbers, or of arrays that broadcast to the shapes of its leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from deq_jax._config import Role, Scales, config, with_options
from deq_jax._states import named_leaves, split
from deq_jax._values import check_value, describe, is_array

NORMS = {
    "leaf": "‖·‖₂ of each leaf",
    "l2": "‖·‖₂ of the whole state",
    "rms": "the root of the mean square of all entries",
    "max": "the largest entry",
    "token": "‖·‖₂ over the last axis",
    "entry": "each entry",
}
SEVERAL = "leaf", "token", "entry"  # norms that cut a state into several pieces


@config
class Weighted:
    """A norm of weighted entries, for `norm=` of a solver: weights · (f(z) − z) is compared with weights · f(z).

    `weights` is a pytree like the state (without its carried leaves), of numbers ≥ 0, or of arrays that broadcast to
    the leaves, batch axes included. An entry of weight zero does not count. (It still has to be finite, and must not
    run away.) `norm` is the name of one of the norms.

    >>> import jax.numpy as jnp, deq_jax as deq
    >>> norm = deq.Weighted({"flow": 1.0, "pressure": jnp.array([1e3, 0.0])}, "l2")
    >>> deq.Anderson(norm=norm).norm.norm
    'l2'
    """

    weights: Scales
    norm: str = "leaf"

    def __post_init__(self):
        check_norm_name("Weighted.norm", self.norm)
        check_scales("Weighted.weights", self.weights)


def check_norm(solver: Any) -> None:
    """Raise unless the option is the name of a norm, or `Weighted`."""
    if not isinstance(solver.norm, Weighted):
        check_norm_name(f"{type(solver).__name__}.norm", solver.norm, " or deq.Weighted(weights, norm)")


def check_norm_name(where: str, value: Any, other: str = "") -> None:
    if not isinstance(value, str):
        raise TypeError(f"{where} must be the name of a norm{other}, got {value!r}")
    if value not in NORMS:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NORMS))}{other}; got {value!r}")


def norm_of(solver: Any) -> tuple[str, Any]:
    """(the name of a solver's norm, its weights or None)."""
    norm = getattr(solver, "norm", "leaf")
    return (norm.norm, norm.weights) if isinstance(norm, Weighted) else (norm, None)


def is_per_problem(atol: Any, batch_shape: tuple) -> bool:
    """Whether an absolute tolerance is one number for all problems or one for each, rather than scales."""
    return bool(jax.tree_util.all_leaves([atol])) and np.shape(atol) in ((), tuple(batch_shape))


def piece_shape(norm: str, shape: tuple, batch_ndim: int) -> tuple:
    """The shape of the pieces into which a norm cuts a leaf of this shape: there is a tolerance for each of them."""
    own = {"entry": shape[batch_ndim:], "token": shape[batch_ndim:-1]}.get(norm, ())
    return (*shape[:batch_ndim], *own)


# ---- where a solve begins ----------------------------------------------------------------------------------


def with_aligned_scales(solver: Any, floats: PyTree, batch_ndim: int) -> Any:
    """The solver with its scales as a tuple, with an entry for each leaf: a number, or an array of the pieces' rank."""
    (norm, weights), shapes = norm_of(solver), [jnp.shape(leaf) for leaf in jax.tree.leaves(floats)]
    changes = {}
    if not is_per_problem(solver.atol, shapes[0][:batch_ndim]):
        pieces = [piece_shape(norm, shape, batch_ndim) for shape in shapes]
        changes["atol"] = tuple(map(_aligned, jax.tree.leaves(solver.atol), pieces))
    if weights is not None:
        changes["norm"] = with_options(solver.norm, weights=tuple(map(_aligned, jax.tree.leaves(weights), shapes)))
    return with_options(solver, **changes) if changes else solver


def _aligned(scale: Any, shape: tuple) -> Any:
    return scale.reshape((1,) * (len(shape) - scale.ndim) + scale.shape) if np.ndim(scale) else scale


# ---- checks ------------------------------------------------------------------------------------------------


def check_scales(where: str, value: PyTree) -> None:
    """Raise ValueError unless a number, an array or a pytree of them holds finite numbers >= 0 alone."""
    for name, leaf in named_leaves(where, value):
        check_value(name, leaf, at_least=0)


def check_judged(options: Any, z0: PyTree, batch_ndim: int, where: str) -> None:
    """Raise TypeError or ValueError if weights or tolerances of these options, or of options in them, do not fit z0."""
    if isinstance(options, tuple):
        for i, option in enumerate(options):
            check_judged(option, z0, batch_ndim, f"{where}[{i}]")
    if hasattr(options, "atol") and hasattr(options, "update"):
        _check_solver(options, split(z0)[0], batch_ndim, where)
    for name, role in getattr(type(options), "__option_roles__", {}).items():
        if role in (Role.OBJECT, Role.ANY):
            check_judged(getattr(options, name), z0, batch_ndim, f"{where}.{name}")


def _check_solver(solver: Any, floats: PyTree, batch_ndim: int, where: str) -> None:
    norm, weights = norm_of(solver)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(floats)]
    batch_shape = shapes[0][:batch_ndim]
    check_norm_name(f"{where}.norm", norm)
    if weights is not None:
        _check_scales(f"{where}.norm.weights", weights, floats, shapes)
    pieces = [piece_shape(norm, shape, batch_ndim) for shape in shapes]
    if is_per_problem(solver.atol, batch_shape):
        bare = jax.tree_util.all_leaves([floats]) and norm in ("token", "entry")
        if bare and batch_shape and np.shape(solver.atol) == batch_shape and _fits(batch_shape, pieces[0]):
            last, first = (*batch_shape, *[1] * (len(pieces[0]) - batch_ndim)), (1,) * batch_ndim + batch_shape
            raise ValueError(
                f"{where}.atol of shape {batch_shape} may be a number for each problem or for each {norm} of z0, whose "
                f"shape is {shapes[0]}: give it in shape {last} or {first}"
            )
        return
    is_array_alone = is_array(solver.atol) and not jax.tree_util.all_leaves([floats])
    if is_array_alone or norm not in SEVERAL or (norm == "leaf" and is_array(solver.atol)):
        expected = f"an array of shape {batch_shape}, an entry for each problem" if batch_shape else "shape ()"
        trees = " (With norm='entry' it may have a number for each entry of z0; see deq_jax.solvers.LoopOptions.)"
        got = f"shape {np.shape(solver.atol)}" if is_array(solver.atol) else describe(solver.atol)
        raise ValueError(f"{where}.atol must be a number or {expected}; got {got}.{trees}")
    _check_scales(f"{where}.atol", solver.atol, floats, pieces)


def _check_scales(where: str, scales: PyTree, floats: PyTree, shapes: list) -> None:
    expected, got = jax.tree.structure(floats), jax.tree.structure(scales)
    if got != expected:
        raise TypeError(f"{where} must have the structure of z0, {expected}; got {got}")
    for (name, scale), shape in zip(named_leaves(where, scales), shapes, strict=True):
        if not _fits(np.shape(scale), shape):
            raise ValueError(
                f"{name} must be a number, or broadcast to {shape} as z0 is cut; got shape {np.shape(scale)}"
            )


def _fits(shape: tuple, to: tuple) -> bool:
    """Whether an array of this shape broadcasts to the other one."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
