"""A linear map with its own transpose, for every mode of differentiation.

`jax.custom_vjp` has no forward mode, and a `jax.custom_jvp` is transposed equation by equation. Here forward mode
applies one program, and reverse mode another one, which may rescale a cotangent, report statistics, or not exist: it is
traced only if it is needed. Both may depend on residuals, and are differentiated through them as they are written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from deq_jax._jaxprs import RULES, without_constants


def linear_map(forward: Callable, transpose: Callable, residuals: PyTree, linear: PyTree) -> PyTree:
    """forward(residuals, linear), linear in `linear`; reverse mode applies transpose(residuals, cotangent) instead.

    `transpose` returns cotangents in the structure of `linear`. Both functions read arrays only from their arguments.

    >>> import jax, jax.numpy as jnp
    >>> double = lambda x: linear_map(lambda _, x: 2 * x, lambda _, ct: 2 * ct + 100, (), x)
    >>> float(double(1.0)), float(jax.jvp(double, (1.0,), (1.0,))[1]), float(jax.grad(double)(1.0))
    (2.0, 2.0, 102.0)
    """
    reads, reads_tree = jax.tree.flatten(residuals)
    dots, dots_tree = jax.tree.flatten(linear)
    # A fresh lambda: JAX caches traces by function identity.
    closed, shapes = jax.make_jaxpr(lambda *args: forward(*args), return_shape=True)(residuals, linear)
    out_tree = jax.tree.structure(shapes)

    def flat_transpose(reads, cotangents):
        return dots_tree.flatten_up_to(transpose(reads_tree.unflatten(reads), out_tree.unflatten(cotangents)))

    return out_tree.unflatten(_bind(closed, flat_transpose, reads, dots))


def _bind(closed: Any, transpose: Callable, reads: Sequence[Any], dots: Sequence[Any]) -> list[Array]:
    first = len(closed.consts)
    after_consts = lambda reads, cotangents: transpose(reads[first:], cotangents)
    reads = [*closed.consts, *reads]
    jaxpr = without_constants(closed)
    return _linear_map_p.bind(*reads, *dots, jaxpr=jaxpr, transpose=after_consts, count=len(reads))


def _evaluate(*args: Any, jaxpr: Any, **_: Any) -> list[Array]:
    return eval_jaxpr(jaxpr, (), *args)


def _differentiate(primals, tangents, **params):
    # L(r) a  ⇒  L(r) ȧ + (∂L/∂r ṙ) a. The first term is this map again, with its own transpose.
    count, is_zero = params["count"], lambda tangent: type(tangent) is ad.Zero
    out, parts = _linear_map_p.bind(*primals, **params), []
    if not all(map(is_zero, tangents[count:])):
        parts.append(_linear_map_p.bind(*primals[:count], *map(ad.instantiate_zeros, tangents[count:]), **params))
    moving = [i for i, tangent in enumerate(tangents[:count]) if not is_zero(tangent)]
    if moving:

        def of_residuals(*moved):
            args = list(primals)
            for i, value in zip(moving, moved, strict=True):
                args[i] = value
            return _evaluate(*args, **params)

        _, part = jax.jvp(of_residuals, [primals[i] for i in moving], [tangents[i] for i in moving])
        parts.append(part)
    return out, parts[0] if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


def _transpose(cotangents, *args, transpose, count, **_):
    found = transpose(list(args[:count]), list(map(ad.instantiate_zeros, cotangents)))
    # A tangent that is known to be zero needs no cotangent.
    wanted = map(ad.is_undefined_primal, args[count:])
    return [None] * count + [ct if wanted else None for ct, wanted in zip(found, wanted, strict=True)]


def _batch(axis, args, dims, *, jaxpr, transpose, count):
    dims = list(dims)
    if all(dim is None for dim in dims):  # JAX calls this rule even if nothing is batched
        if not any(getattr(effect, "name", None) == axis.name for effect in jaxpr.effects):
            out = _linear_map_p.bind(*args, jaxpr=jaxpr, transpose=transpose, count=count)
            return out, [None] * len(out)
        args = [*args[:count], *(jnp.broadcast_to(x, (axis.size, *x.shape)) for x in args[count:])]
        dims[count:] = [0] * (len(args) - count)
    # With the name of the axis, for collectives over it in f.
    vmap = functools.partial(jax.vmap, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name)
    read_axes, dot_axes = dims[:count], dims[count:]
    forward = vmap(lambda reads, dots: eval_jaxpr(jaxpr, (), *reads, *dots), in_axes=(read_axes, dot_axes))

    def batched_transpose(reads, cotangents):
        # A value that the whole batch shares gets the sum of the cotangents of the batch.
        axes = [0 if dim is None else dim for dim in dot_axes]
        found = vmap(transpose, in_axes=(read_axes, 0), out_axes=axes)(reads, cotangents)
        return [ct.sum(0) if dim is None else ct for ct, dim in zip(found, dot_axes, strict=True)]

    reads, dots = list(args[:count]), list(args[count:])
    out = _bind(jax.make_jaxpr(forward)(reads, dots), batched_transpose, reads, dots)
    return out, [0] * len(out)


_linear_map_p = Primitive("linear_map")
RULES.add(_linear_map_p.name)
_linear_map_p.multiple_results = True
_linear_map_p.def_impl(_evaluate)
_linear_map_p.def_abstract_eval(lambda *_, jaxpr, **__: [var.aval for var in jaxpr.outvars])
ad.primitive_jvps[_linear_map_p] = _differentiate
ad.primitive_transposes[_linear_map_p] = _transpose
batching.fancy_primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
