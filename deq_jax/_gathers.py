"""What f gathers over devices and does not depend on z, gathered once, before the loop.

Weights that are sharded for storage (FSDP) are brought together inside f, by `all_gather` under `shard_map`, or by a
sharding constraint. In a loop XLA's compilers for GPUs leave that where it stands: they move nothing out of a loop that
grows. So it would be done at each evaluation.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal
from jaxtyping import PyTree

from deq_jax._jaxprs import COLLECTIVES, communicating_axes, sub_jaxprs, without_constants
from deq_jax._trace import Bound, Traced, inlined, is_array_like


def gathered_once(f: Callable, z: PyTree) -> Callable:
    """f(z) with the gathers of what does not depend on z done now. An f that is not `Bound` is left as it is."""
    if not isinstance(f, Bound) or (isinstance(f.f, Traced) and not _has_gathers(f.f.jaxpr)):
        return f
    closed, out = jax.make_jaxpr(f, return_shape=True)(z)
    closed = inlined(closed, lambda inner: _has_gathers(inner.jaxpr))
    constants, jaxpr = closed.consts, without_constants(closed)
    known, of_z = jaxpr.invars[: len(constants)], jaxpr.invars[len(constants) :]
    before, after, gathered = _split(jaxpr, of_z)
    if not gathered:
        return f
    values = eval_jaxpr(jaxpr.replace(invars=known, outvars=gathered, eqns=before), (), *constants)
    rest = jaxpr.replace(invars=[*known, *gathered, *of_z], eqns=after)

    def evaluate(z: PyTree) -> PyTree:
        leaves = eval_jaxpr(rest, (), *constants, *values, *jax.tree.leaves(z))
        return jax.tree.unflatten(jax.tree.structure(out), leaves)

    return Bound(evaluate, axes=tuple(sorted(communicating_axes(rest), key=str)))


def gathered_each(f: Callable) -> Callable:
    """f(z, *args), which gathers what it needs of the args at each evaluation, and again where it is pulled back."""

    def evaluate(z: PyTree, *args: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(args)
        arrays = [leaf if is_array_like(leaf) else None for leaf in leaves]

        def tied(z, arrays):
            arrays, z = jax.lax.optimization_barrier((arrays, z))  # as if they depended on z
            merged = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
            return f(z, *jax.tree.unflatten(treedef, merged))

        return jax.checkpoint(tied, policy=lambda primitive, *_, **__: not _gathers(primitive))(z, arrays)

    return evaluate


def _has_gathers(jaxpr: Jaxpr) -> bool:
    return any(_is_gather(eqn) or any(map(_has_gathers, sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


def _is_gather(eqn: Any) -> bool:
    return _gathers(eqn.primitive)


def _gathers(primitive: Any) -> bool:
    return any(name in primitive.name for name in (*COLLECTIVES, "sharding_constraint", "reshard"))


def _split(jaxpr: Jaxpr, z: list) -> tuple[list, list, list]:
    """(equations up to the gathers that do not depend on z, equations for each z, what the former gather)."""
    of_z, makers = set(z), {}
    gathered, lifted = [], set()

    def lift(v: Any) -> None:
        if v in makers and id(makers[v]) not in lifted:
            lifted.add(id(makers[v]))
            for operand in makers[v].invars:
                if not isinstance(operand, Literal):
                    lift(operand)

    for eqn in jaxpr.eqns:
        acts = any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)
        if acts or any(not isinstance(v, Literal) and v in of_z for v in eqn.invars):
            of_z.update(eqn.outvars)
            continue
        makers.update({v: eqn for v in eqn.outvars})
        if _is_gather(eqn):
            for v in eqn.outvars:
                lift(v)
                gathered.append(v)
    before = [eqn for eqn in jaxpr.eqns if id(eqn) in lifted]
    # What leads to a gather is evaluated for each z again: XLA drops it where nothing else uses it.
    after = [eqn for eqn in jaxpr.eqns if not (_is_gather(eqn) and id(eqn) in lifted)]
    return before, after, gathered
