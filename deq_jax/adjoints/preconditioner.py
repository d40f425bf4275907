"""Preconditioners: linear functions P ≈ (I − J)⁻¹ of a state, and their transposes."""

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from deq_jax._arrays import zeros_from
from deq_jax._checks import check_like
from deq_jax._config import STATIC, config, with_options
from deq_jax._states import Layout, eps_of, frozen, split
from deq_jax._trace import Traced, hoist, is_staged
from deq_jax._values import concrete
from deq_jax._vectors import norm


@config
class Transposed:
    """v ↦ Pᵀ v."""

    of: Any

    def __call__(self, v: PyTree) -> PyTree:
        return jax.linear_transpose(self.of, v)(v)[0]


def transposed(linear: Any) -> Any:
    """The transpose of a linear function; that of a transpose is the function itself."""
    return linear.of if isinstance(linear, Transposed) else Transposed(linear)


def with_transposed(adjoint: Any) -> Any:
    """The adjoint for the equation whose Jacobian is the transpose."""
    P = adjoint.preconditioner
    return adjoint if P is None else with_options(adjoint, preconditioner=transposed(P))


class _Program:
    """A traced function that is compared by what it computes, for a function that is not differentiated."""

    def __init__(self, traced: Traced):
        self.traced = traced

    def __eq__(self, other):
        return isinstance(other, _Program) and self.traced.key == other.traced.key

    def __hash__(self):
        return hash(self.traced.key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hoisted:
    """A function of v with all arrays that it reads as leaves."""

    reads: Any
    program: Any = dataclasses.field(metadata=STATIC)

    def __call__(self, v: PyTree) -> PyTree:
        return self.program.traced(v, *self.reads)


def bound(adjoint: Any, z: PyTree) -> Any:
    """The adjoint with the arrays that its preconditioner reads as leaves: they may be traced, by `grad` for one."""
    if adjoint.preconditioner is None:
        return adjoint
    traced, *reads = hoist(adjoint.preconditioner, frozen(split(z)[0]))
    return with_options(adjoint, preconditioner=Hoisted(frozen(reads), _Program(traced)))


# ---- checks ------------------------------------------------------------------------------------------------


def check_preconditioner(adjoint: Any) -> None:
    """Raise TypeError unless the preconditioner is None or a callable."""
    P = adjoint.preconditioner
    if P is not None and (isinstance(P, type) or not callable(P)):
        raise TypeError(
            f"{type(adjoint).__name__}.preconditioner must be a linear function of a state like z, got {P!r}"
        )


def check_is_linear(adjoint: Any, z: PyTree) -> None:
    """Raise unless the preconditioner returns a state like z, and P(x − 2 y) = P x − 2 P y for one random pair.

    Under a trace nothing is computed, and only types are compared.
    """
    P, who = adjoint.preconditioner, f"{type(adjoint).__name__}.preconditioner"
    if P is None:
        return
    check_like(jax.eval_shape(lambda z: P(z), z), z, who, "P(v)")
    if is_staged():
        return
    layout, keys = Layout(z, 0), iter(jax.random.split(jax.random.key(0), 2 * len(jax.tree.leaves(z))))
    noise = lambda leaf: zeros_from(leaf) + jax.random.normal(next(keys), leaf.shape, leaf.dtype)
    x, y = jax.tree.map(noise, z), jax.tree.map(noise, z)
    Px, Py, both = (layout.pack(P(v)) for v in (x, y, jax.tree.map(lambda x, y: x - 2 * y, x, y)))
    gap = concrete(norm(both - Px + Py + Py))
    size = concrete(norm(Px) + norm(Py))
    if gap is None or size is None:  # z or what P reads is traced
        return
    # The rounding of an inverse grows with its condition: to a fourth root of eps, 2 % in float32, we ask nothing.
    if not gap <= eps_of(z) ** 0.25 * size:
        raise ValueError(
            f"{who} must be linear: for random x and y, P(x - 2 y) differs from P(x) - 2 P(y) by {gap:.2g}, where "
            f"P(x) and P(y) have the norm {size:.2g}"
        )
