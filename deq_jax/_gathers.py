"""What f gathers over devices and does not depend on z, gathered once, before the loop.

Weights that are sharded for storage (FSDP) are brought together inside f, by `all_gather` under `shard_map`, or by a
sharding constraint. In a loop XLA's compilers for GPUs leave that where it stands: they move nothing out of a loop that
grows. So it would be done at each evaluation.
"""

from collections.abc import Callable

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal
from jaxtyping import PyTree

from deq_jax._jaxprs import gathers, is_gather, without_constants
from deq_jax._trace import Bound, Traced, gathers_of, inlined, is_array_like


def gathered_once(f: Callable, z: PyTree) -> Callable:
    """f(z) with the gathers of what does not depend on z done now. An f that is not known to gather stays as it is."""
    if not gathers_of(f):
        return f
    closed, out = jax.make_jaxpr(f, return_shape=True)(z)
    closed = inlined(closed, lambda inner: gathers(inner.jaxpr))
    constants, jaxpr = closed.consts, without_constants(closed)
    known, of_z = jaxpr.invars[: len(constants)], jaxpr.invars[len(constants) :]
    before, after, gathered = _split(jaxpr, of_z)
    if not gathered:
        return f
    values = eval_jaxpr(jaxpr.replace(invars=known, outvars=gathered, eqns=before), (), *constants)
    rest = jaxpr.replace(invars=[*known, *gathered, *of_z], eqns=after)
    reads = [*constants, *values]
    return Bound(Traced(rest, jax.tree.structure(out), tuple((True, i) for i in range(len(reads)))), reads, [])


def gathered_each(f: Callable) -> Callable:
    """f(z, *args), which gathers what it needs of the args at each evaluation, and again where it is pulled back."""

    def evaluate(z: PyTree, *args: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(args)
        arrays = [leaf if is_array_like(leaf) else None for leaf in leaves]

        def tied(z, arrays):
            arrays, z = jax.lax.optimization_barrier((arrays, z))  # as if they depended on z
            merged = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
            return f(z, *jax.tree.unflatten(treedef, merged))

        return jax.checkpoint(tied, policy=lambda primitive, *_, **__: not is_gather(primitive))(z, arrays)

    return evaluate


def _split(jaxpr: Jaxpr, z: list) -> tuple[list, list, list]:
    """(equations up to the gathers that do not depend on z, equations for each z, what the former gather)."""
    variables = lambda eqn: [v for v in eqn.invars if not isinstance(v, Literal)]
    of_z, free = set(z), []
    for eqn in jaxpr.eqns:
        acts = any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)
        if acts or not of_z.isdisjoint(variables(eqn)):
            of_z.update(eqn.outvars)
        else:
            free.append(eqn)
    lifted = [eqn for eqn in free if is_gather(eqn.primitive)]
    gathered = [v for eqn in lifted for v in eqn.outvars]
    needed, before = set(gathered), []
    for eqn in reversed(free):
        if not needed.isdisjoint(eqn.outvars):
            before.append(eqn)
            needed.update(variables(eqn))
    # What leads to a gather is evaluated for each z again: XLA drops it where nothing else uses it.
    places = set(map(id, lifted))
    return before[::-1], [eqn for eqn in jaxpr.eqns if id(eqn) not in places], gathered
