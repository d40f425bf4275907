"""The rules that give a fixed point its derivative at the equilibrium, in reverse mode or in every mode."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from deq_jax._checks import check_like
from deq_jax._reverse_only import FORWARD_MODE, reverse_mode_only
from deq_jax._states import frozen, join, split
from deq_jax._trace import is_array_like
from deq_jax.adjoints.linear_map import linear_map
from deq_jax.adjoints.protocol import (
    Adjoint,
    EquilibriumAdjoint,
    ForwardResult,
    IterationAdjoint,
    Probe,
    Problem,
    member,
)
from deq_jax.solvers import Solver, Stats, run_loop


def solve_differentiably(
    adjoint: Adjoint, problem: Problem, z0: PyTree, solver: Solver, probe: Probe, find: Callable | None = None
) -> tuple[PyTree, Stats, PyTree]:
    """(z, stats, given): the fixed point, with the derivative of this adjoint; `given` are its carried leaves for f.

    `find(z0, solver)` returns (adjoint, problem, result) where the result is not that of the loop on the problem.
    """
    if isinstance(adjoint, IterationAdjoint):
        z, stats = adjoint.run(problem, z0, solver)
        check_like(z, z0, f"{type(adjoint).__name__}.run", "z")
        return z, stats, split(z)[1]
    # The derivative is that of the rule at the equilibrium alone, so the loop must not be differentiated.
    z0, solver = frozen((z0, solver))
    rule: Any = adjoint
    if find is None:
        result = run_loop(problem.frozen, z0, solver, problem.batch_ndim, over=problem.over)
    else:
        rule, problem, result = find(z0, solver)
    floats, carried = split(result.value)
    forward = ForwardResult(floats, result.stats, result.memory, solver)
    z = at_equilibrium(rule, problem.with_carried(result.given), forward, probe)
    return join(z, carried), result.stats, result.given


def at_equilibrium(adjoint: EquilibriumAdjoint, problem: Problem, forward: ForwardResult, probe: Probe) -> PyTree:
    """z* = forward.z, differentiable in `problem.inputs`; the cotangent of `probe` is the backward pass's report."""
    has_forward_mode = member(adjoint, "pushforward") is not None
    adjoint, forward = _boxed((adjoint, member(adjoint, "keep")(problem, forward)))
    if has_forward_mode:
        return _value_in_every_mode(adjoint, forward, problem, probe)
    try:
        return _value(adjoint, forward, _reverse_only(problem), probe)
    except TypeError as error:  # under jit(jacfwd(...)) JAX's own refusal comes first
        if "forward-mode" not in str(error):
            raise
        raise TypeError(FORWARD_MODE) from error


# ---- reverse mode ------------------------------------------------------------------------------------------


def _take_z(adjoint, forward, problem, probe):
    return forward.z


_value: Any = jax.custom_vjp(_take_z)


def _value_fwd(adjoint, forward, problem, probe):
    # Through the rule itself: z* depends on the inputs, so a second derivative takes the implicit path again.
    z_star = _value(adjoint, forward, _reverse_only(problem), probe)
    return z_star, (adjoint, forward._replace(z=z_star), problem)


def _value_bwd(saved, z_bar):
    adjoint, forward, problem = saved
    inputs_bar, probe_bar = _pull(adjoint, forward, problem, z_bar)
    return None, None, dataclasses.replace(problem, inputs=inputs_bar, other=None), probe_bar


_value.defvjp(_value_fwd, _value_bwd)


def _pull(adjoint, forward, problem, z_bar):
    adjoint, forward = _unboxed((adjoint, forward))
    who, result = f"{type(adjoint).__name__}.pullback", adjoint.pullback(problem, forward, z_bar)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Probe | None)):
        raise TypeError(f"{who} must return the cotangents of problem.inputs and a Probe or None; got {result!r}")
    inputs_bar, probe_bar = result
    check_like(inputs_bar, problem.inputs, who, "inputs_bar")
    return inputs_bar, Probe.unmeasured(0, z_bar, problem.batch_ndim, problem.over) if probe_bar is None else probe_bar


def _reverse_only(problem: Problem) -> Problem:
    return dataclasses.replace(problem, inputs=reverse_mode_only(problem.inputs))


# ---- every mode --------------------------------------------------------------------------------------------


_value_in_every_mode: Any = jax.custom_jvp(_take_z)


@_value_in_every_mode.defjvp
def _value_jvp(primals, tangents):
    adjoint, forward, problem, probe = primals
    *_, problem_dot, probe_dot = tangents
    # Through the rule itself: z* depends on the inputs, so derivatives of the rule are right as well.
    z_star = _value_in_every_mode(adjoint, forward, problem, probe)

    def push(saved, dots):
        (adjoint, forward, problem), (inputs_dot, _) = saved, dots
        adjoint, forward = _unboxed((adjoint, forward))
        return adjoint.pushforward(problem, forward, inputs_dot)

    def pull(saved, z_bar):
        adjoint, forward, problem = saved
        return _pull(adjoint, forward, problem, z_bar)

    saved = adjoint, forward._replace(z=z_star), problem
    return z_star, linear_map(push, pull, saved, (problem_dot.inputs, probe_dot))


# ---- solvers and adjoints that are no pytrees --------------------------------------------------------------


@jax.tree_util.register_static
class _Box:
    """An object as a node without leaves. JAX does not see what it holds: no traced array may be in it."""

    def __init__(self, content: Any):
        self.content = content


def _boxed(tree: PyTree) -> PyTree:
    """The tree as JAX takes it: a leaf that is no array, such as a solver of a plain class, goes into a box."""
    return jax.tree.map(lambda leaf: leaf if is_array_like(leaf) else _Box(leaf), tree)


def _unboxed(tree: PyTree) -> PyTree:
    is_box = lambda x: isinstance(x, _Box)
    return jax.tree.map(lambda x: x.content if is_box(x) else x, tree, is_leaf=is_box)
