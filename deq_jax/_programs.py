"""Compiled programs, looked up by what they compute.

JAX's own caches compare functions by identity, so they compile a fresh closure again at each eager call, and they
miss a global that has changed. Here an eager call traces f, which takes milliseconds, and the trace is the key of the
compiled program: its equations, their parameters, shapes and dtypes. All arrays that f reads are arguments.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import PyTree

from deq_jax._jaxprs import derivative_key, has_rules
from deq_jax._trace import Cache, Traced, flag, is_array_like, is_staged, numbers_seen

programs = Cache(256)


def run_compiled(run: Callable, static: tuple, *arrays: PyTree, differentiates: bool = False) -> PyTree:
    """run(*static, *arrays), compiled if the call is eager. Calls with equal `static` share one program.

    `static` holds `Traced` functions and hashable options, `arrays` all values. Under the user's own trace (jit, scan)
    the call becomes part of that trace. `differentiates`: whether `run` takes derivatives of the `Traced` functions.
    """
    values = jax.tree.leaves(arrays)
    # A user's solver or adjoint that is no pytree cannot be compared: its methods may read anything.
    if flag("jax_disable_jit") or is_staged() or not all(map(is_array_like, values)):
        return run(*static, *arrays)
    order = max(map(_derivatives, values), default=0) + differentiates
    # Folds read these flags while they are traced, and JAX's own caches do not depend on the flags.
    flags = flag("jax_debug_nans"), flag("jax_debug_infs")
    key = run, flags, tuple(_key(item, order) for item in static)
    program = programs.get(key, lambda: jax.jit(lambda *arrays: run(*static, *arrays)))
    return program(*arrays)


def clear_caches() -> None:
    """Forget all programs that eager calls have compiled; `jax.clear_caches` forgets JAX's own."""
    programs.clear()
    numbers_seen.clear()


def _derivatives(x: Any) -> int:
    """How many derivatives are being taken with respect to x: two inside grad(grad(...)), none under vmap."""
    if not isinstance(x, Tracer):
        return 0
    if hasattr(x, "primal"):  # a tracer of JVP or of linearize
        return 1 + _derivatives(x.primal)
    return _derivatives(x.val) if hasattr(x, "val") else 1  # a tracer of vmap, or an unknown one


def _key(static: Any, order: int) -> Hashable:
    """The key of one static argument. A call that is differentiated also compares what custom derivatives compute."""
    if not isinstance(static, Traced):
        return static
    rules = order and has_rules(static.jaxpr)
    return static.key, derivative_key(static.jaxpr, order) if rules else None
