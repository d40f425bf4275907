"""Identities that refuse the modes of differentiation that a rule does not have, with a message that says what to do.

A `jax.custom_vjp` refuses forward mode with a message of JAX's own, and reverse mode through a backward rule that
iterates is refused with a message about loops. An identity that stands in front of the rule, or behind it, is asked
first.
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

FORWARD_MODE = (
    "this adjoint is for reverse mode (grad, vjp, jacrev) alone; for jvp, jacfwd, linearize or hessian use "
    "adjoint=ImplicitJVP(), or Unroll(), in the same call"
)


def reverse_mode_only(tree: PyTree, message: str = FORWARD_MODE) -> PyTree:
    """The tree itself. Forward-mode differentiation through it is a TypeError with this message."""
    return jax.tree.map(functools.partial(_identity_p.bind, message=message), tree)


def first_order_only(tree: PyTree, who: str, remedy: str = "use adjoint=Implicit()") -> PyTree:
    """The tree itself, which a backward rule returns. Reverse mode through it is a TypeError that names the remedy."""
    message = f"{who} has first derivatives only; for grad of grad {remedy}, for any mix of modes adjoint=ImplicitJVP()"
    return jax.tree.map(functools.partial(_first_order_p.bind, message=message), tree)


# ---- forward mode ------------------------------------------------------------------------------------------


# The derivative of this identity can be transposed, but neither evaluated nor batched: reverse mode passes, and forward
# mode meets our message. (It is a primitive, because grad(vmap(f)), which is right, would batch the rule of a
# custom_jvp.)
def _refuse(*_, message):
    raise TypeError(message)


_tangent_p = Primitive("reverse_mode_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_tangent_p, lambda cotangent, _, **__: [cotangent])
batching.primitive_batchers[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)

_identity_p = Primitive("reverse_mode_only")
_identity_p.def_impl(lambda x, **_: x)
_identity_p.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[_identity_p] = lambda primals, tangents, message: (
    primals[0],
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent_p.bind(tangents[0], message=message),
)
batching.defvectorized(_identity_p)
mlir.register_lowering(_identity_p, lambda _, x, **__: [x])


# ---- reverse mode, twice -----------------------------------------------------------------------------------


_first_order_p = Primitive("first_order_in_reverse_mode")
_first_order_p.def_impl(lambda x, **_: x)
_first_order_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_first_order_p, _refuse)
batching.defvectorized(_first_order_p)
mlir.register_lowering(_first_order_p, lambda _, x, **__: [x])
