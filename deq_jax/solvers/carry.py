"""What the loop carries from evaluation to evaluation: how it begins, and what is made of it in the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from deq_jax._checks import check_flat
from deq_jax._states import Layout, choose, join, split
from deq_jax._vectors import Vec, zero_of
from deq_jax.solvers.equation import FIXED_POINT, Equation
from deq_jax.solvers.norms import Score, is_default
from deq_jax.solvers.protocol import Fold, Solver, SolveResult, Stats, Status, member
from deq_jax.solvers.stopping import RUNNING, Growth, Norms, relative_residual, residual_of


class Carry(NamedTuple):
    """What the loop carries from evaluation to evaluation."""

    z: Vec  # where f is evaluated next
    best: Vec  # what is returned: with `returns="last"`, the last z
    best_norms: Norms  # of the residual and of f(z) at the best z
    last_norms: Norms | None  # at the last z, where that is what is returned
    first_scale: Float[Array, "*batch"]  # max(‖f(z0)‖, ‖f(z0) − z0‖)
    growth: Growth
    stale: Int[Array, "*batch"]  # evaluations since the best residual last fell
    steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    solver: Any
    folded: Any
    evaluation: Int[Array, ""]
    # The leaves of z that are carried (see `split`), of which there may be none:
    carried: PyTree  # what f is given next, beside z
    best_carried: PyTree  # what f was given beside the best z
    returned: PyTree  # what f returned last, before the problem stopped
    seen: Any  # what the equation has seen of the evaluations, if it needs to


class Verdict(NamedTuple):
    """What an evaluation says of each problem."""

    best_norms: Norms  # and the others, as in the carry
    last_norms: Norms | None
    first_scale: Float[Array, "*batch"]
    growth: Growth
    stale: Int[Array, "*batch"]
    steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    better: Bool[Array, "*batch"]  # whether this z is the one to return so far
    unit: Float[Array, "*batch"]  # by which the vectors are divided that a `scale_free` solver is shown
    per_unit: Float[Array, "*batch"]


def init_carry(
    z0: PyTree,
    solver: Solver,
    layout: Layout,
    memory: Any = None,
    fold: Fold | None = None,
    equation: Equation = FIXED_POINT,
) -> Carry:
    """The carry before the first evaluation."""
    z = layout.pack(z0)
    # Carries are made from the data, never from a bare constant: under sharding they inherit its type.
    zero = zero_of(z)
    norms = jnp.stack([zero] * len(layout.leaves), axis=-1) if layout.several else zero
    count = zero.astype(jnp.int32)
    start = equation.start(z, layout)
    status = jnp.where(jnp.asarray(solver.max_steps) > 0, RUNNING, Status.MAX_STEPS).astype(jnp.int32) + count
    carried = split(z0)[1]
    best_norms = Norms(norms + jnp.inf, norms)
    if not is_default(solver, layout):
        unknown, no = zero + jnp.inf, zero != 0
        best_norms = best_norms._replace(score=Score(unknown, unknown, unknown, no, no))
    return Carry(
        z=z,
        best=z,
        best_norms=best_norms,
        last_norms=best_norms if member(solver, "returns") == "last" else None,
        first_scale=zero,
        growth=Growth(scale=norms, worst=norms, before=norms + jnp.inf, start=start),
        stale=count,
        steps=count,
        status=status,
        solver=solver.init(z) if memory is None else member(solver, "resume")(memory),
        folded=None if fold is None else fold.init(z0, layout.batch_ndim),
        evaluation=jnp.zeros((), jnp.int32),
        carried=carried,
        best_carried=carried,
        returned=carried,
        seen=equation.init(z, layout),
    )


def layout_for(solver: Solver, z0: PyTree, batch_ndim: int, over: tuple = ()) -> Layout:
    """How this solver is shown states such as z0, each problem of which is split over these named axes."""
    flat = member(solver, "flat")
    if flat:
        check_flat(solver, z0, batch_ndim, over)
    return Layout(z0, batch_ndim, flat, over)


def vector_type(solver: Solver, z0: PyTree, batch_ndim: int, over: tuple = ()) -> Any:
    """The type of z0 as this solver sees it."""
    return jax.eval_shape(lambda z0: layout_for(solver, z0, batch_ndim, over).pack(z0), z0)


def noted(carry: Carry, verdict: Verdict, running: Bool[Array, "*batch"], returned: PyTree) -> Carry:
    """The carry, up to date with the evaluation of f at its z, except what f is given next."""
    better = verdict.better
    return carry._replace(
        best=choose(better, carry.z, carry.best),
        best_carried=choose(better, carry.carried, carry.best_carried),
        returned=choose(running, returned, carry.returned),
        best_norms=verdict.best_norms,
        last_norms=verdict.last_norms,
        first_scale=verdict.first_scale,
        growth=verdict.growth,
        stale=verdict.stale,
        steps=verdict.steps,
        status=verdict.status,
    )


def finalize(end: Carry, layout: Layout) -> SolveResult:
    """The result of a loop, with values in the structure of z0."""
    norms = end.best_norms if end.last_norms is None else end.last_norms
    relative = relative_residual(norms, layout)
    stats = Stats(end.steps, residual_of(norms, layout), relative, end.status)
    value = join(layout.unpack(end.best), end.returned)
    return SolveResult(value, stats, end.solver, end.folded, end.best_carried)
