"""The norm that judges a solve: how a residual is cut into pieces, each compared with its own part of f(z).

A problem has converged when for each piece p of its state

    (1)  ‖r‖ₚ ≤ atolₚ + rtol ‖f(z)‖ₚ,  r = f(z) − z

The default cuts a state into its leaves. It is computed in `stopping`, which needs the norms of leaves for its guards
in any case. All other norms are computed here, as a `Score`: a few numbers a problem, so that no solve carries pieces.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from deq_jax._arrays import per_entry, ratio
from deq_jax._config import cast_options, with_options
from deq_jax._scales import norm_of, with_aligned_scales
from deq_jax._states import Layout, eps_of, split, wide_dtype
from deq_jax._vectors import Vec, Vector, largest, norm, reduced
from deq_jax.solvers.protocol import member

RTOL, RTOL_FLOAT64 = 1e-4, 1e-6  # the default of rtol; see experiments/studies/tolerance_by_dtype.py


def default_rtol(eps: float) -> float:
    """The relative tolerance of a solver that was given none, for a state whose coarsest leaf has this epsilon."""
    return RTOL_FLOAT64 if eps < 1e-12 else RTOL


def for_state(solver: Any, z0: PyTree, batch_ndim: int, over: tuple = ()) -> Any:
    """The solver as a loop on states like z0 reads it: in the state's precision, with `rtol` and all scales decided.

    Call it once where a solve begins.
    """
    floats = split(z0)[0]
    solver = with_aligned_scales(cast_options(with_rtol(solver, z0), wide_dtype(floats)), floats, batch_ndim)
    in_layout = member(solver, "in_layout")
    return solver if in_layout is None else in_layout(Layout(floats, batch_ndim, member(solver, "flat"), over))


def with_rtol(solver: Any, z0: PyTree) -> Any:
    """The solver with the default of its relative tolerance decided, if it has none."""
    return solver if solver.rtol is not None else with_options(solver, rtol=default_rtol(eps_of(split(z0)[0])))


# ---- pieces ------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The pieces of one leaf, or of the whole state: `*pieces` is `*batch`, or has further axes."""

    residual: Float[Array, "*pieces"]
    size: Float[Array, "*pieces"]  # what the residual is compared with
    tolerance: Float[Array, "*pieces"]  # atol + rtol · size


class Score(NamedTuple):
    """What a norm says of one evaluation."""

    residual: Float[Array, "*batch"]  # the largest of a piece
    relative: Float[Array, "*batch"]  # the largest residual over size
    excess: Float[Array, "*batch"]  # the largest residual over tolerance, or over rounding if that is more
    converged: Bool[Array, "*batch"]  # whether (1) holds; all is finite then
    resolved: Bool[Array, "*batch"]  # whether (1) holds up to what rounding in f may hide


def is_default(solver: Any, layout: Layout) -> bool:
    """Whether the pieces are the leaves, with one absolute tolerance for all of them."""
    kind, weights = norm_of(solver)
    return weights is None and not isinstance(solver.atol, tuple) and (kind == "leaf" or is_whole(kind, layout))


def is_whole(kind: str, layout: Layout) -> bool:
    """Whether this is the norm of a single leaf."""
    return kind == "l2" and not layout.several


def without_tolerances(solver: Any, layout: Layout) -> Any:
    """The solver as its own `update` reads it: without tolerances where another norm than a 2-norm judges."""
    kind, weights = norm_of(solver)
    known = weights is None and not isinstance(solver.atol, tuple) and kind in ("leaf", "l2")
    return solver if known else with_options(solver, rtol=0.0, atol=0.0)


def score_at(residual: Vec, fz: Vec, leaves: tuple, solver: Any, layout: Layout) -> Score | None:
    """The score of a residual, or None for the default norm. `leaves` has the norms of the leaves of both vectors."""
    if is_default(solver, layout):
        return None
    pieces = pieces_of(residual, fz, leaves, solver, layout)
    floor = min(64 * layout.eps, 0.05)
    excess = [relative_to(r, jnp.maximum(allowed, layout.eps * size)) for r, size, allowed in pieces]
    met = [jnp.isfinite(r) & jnp.isfinite(size) & (r <= allowed) for r, size, allowed in pieces]
    return Score(
        residual=most([p.residual for p in pieces], solver, layout),
        relative=most([relative_to(p.residual, p.size) for p in pieces], solver, layout),
        excess=most(excess, solver, layout),
        converged=holds(met, solver, layout),
        resolved=holds([r <= jnp.maximum(allowed, floor * s) for r, s, allowed in pieces], solver, layout),
    )


def pieces_of(residual: Vec, fz: Vec, leaves: tuple, solver: Any, layout: Layout) -> list[Piece]:
    """The pieces of a residual, with their tolerances."""
    residuals, sizes = (sizes_of(*pair, solver, layout) for pair in zip((residual, fz), leaves, strict=True))
    atols = solver.atol if isinstance(solver.atol, tuple) else (solver.atol,) * len(sizes)
    found, reference = [], _reference(sizes, solver, layout)
    for r, size, atol in zip(residuals, sizes, atols, strict=True):
        if reference is not None:
            # As in `stopping.comparable`: a piece that is zero up to rounding is compared with more than itself.
            total = per_entry(reference, size)
            size = jnp.where((size <= layout.eps * total) & (r <= layout.eps * total), total, size)
        found.append(Piece(r, size, per_entry(atol, size) + per_entry(solver.rtol, size) * size))
    return found


def _reference(sizes: list, solver: Any, layout: Layout) -> Float[Array, "*batch"] | None:
    """What a piece must be negligible beside to be exempt. None is by entries, or where there is one piece alone."""
    kind, _ = norm_of(solver)
    if kind == "token":  # not the norm of them all, beside which in 16 bits one of many is always small
        return most(sizes, solver, layout)
    return norm(jnp.stack(sizes, axis=-1)) if kind == "leaf" and layout.several else None


def sizes_of(x: Vec, leaves: Float[Array, "*norms"], solver: Any, layout: Layout) -> list[Array]:
    """The norm of each piece of a vector, whose norms by leaf are known: an array for each leaf, or one for all."""
    kind, weights = norm_of(solver)
    if weights is None and kind in ("leaf", "l2", "rms"):
        found = [leaves[..., layout.order.index(i)] for i in range(len(layout.leaves))] if layout.several else [leaves]
    else:
        entries = layout.moduli(x)
        if weights is not None:
            entries = [weight * entry for weight, entry in zip(weights, entries, strict=True)]
        if kind == "entry":
            return entries
        if kind == "token":
            return [_norm(entry, max(layout.batch_ndim, entry.ndim - 1)) for entry in entries]
        if kind == "max":
            return [largest(Vector(tuple(entries), layout.batch_ndim, layout.over))]
        found = [_norm(entry, layout.batch_ndim, layout.over) for entry in entries]
    if kind == "leaf":
        return found
    total = norm(jnp.stack(found, axis=-1)) if layout.several else found[0]
    return [total / jnp.sqrt(jnp.asarray(layout.entries, total.dtype))] if kind == "rms" else [total]


def _norm(entries: Array, batch_ndim: int, over: tuple = ()) -> Array:
    """‖·‖₂ over all axes but the first ones, and over named axes."""
    has_axes = entries.ndim > batch_ndim
    return norm(Vector((entries if has_axes else entries[..., None],), batch_ndim, over))


def relative_atol(z: Vec, leaves: Float[Array, "*norms"], solver: Any, layout: Layout) -> Float[Array, "*batch"]:
    """The strictest absolute tolerance, relative to its own piece of z; inf where all of z is zero."""
    sizes = sizes_of(z, leaves, solver, layout)
    atols = solver.atol if isinstance(solver.atol, tuple) else (solver.atol,) * len(sizes)
    cast = lambda atol, size: per_entry(jnp.asarray(atol).astype(size.dtype), size)
    asked = [jnp.where(s > 0, ratio(cast(atol, s), s), jnp.inf) for atol, s in zip(atols, sizes, strict=True)]
    return -most([-part for part in asked], solver, layout)


def relative_to(x: Float[Array, "*norms"], sizes: Float[Array, "*norms"]) -> Float[Array, "*norms"]:
    """x over sizes: 0 where both are zero, and inf where the size alone is."""
    return jnp.where((sizes == 0) & (x != 0), jnp.inf, ratio(x, sizes))


# ---- over all pieces of a problem --------------------------------------------------------------------------


def most(pieces: list[Array], solver: Any, layout: Layout) -> Float[Array, "*batch"]:
    return _over_pieces(jnp.maximum, jnp.max, pieces, solver, layout)


def holds(pieces: list[Array], solver: Any, layout: Layout) -> Bool[Array, "*batch"]:
    return _over_pieces(jnp.logical_and, jnp.all, pieces, solver, layout)


def _over_pieces(merge: Any, reduce: Any, pieces: list[Array], solver: Any, layout: Layout) -> Array:
    # A device has tokens and entries of its own; sums over the devices have been taken of all other norms.
    over = layout.over if norm_of(solver)[0] in ("token", "entry") else ()
    own = lambda part: reduce(part, axis=tuple(range(layout.batch_ndim, part.ndim)))
    return reduced(merge, own, Vector(tuple(pieces), layout.batch_ndim, over))
