"""A contender written in JAX, and the parts that the limit is made of."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.process import clock, leave
from experiments.shared import jax_ops
from experiments.shared.problems import Problem

COUNTS = {"f": 0, "vjp": 0, "jvp": 0}


def commands(table: dict[str, Callable[[], Problem]]) -> dict[str, Callable]:
    built: dict[tuple[str, str], Any] = {}

    def build(problem: str, contender: str, rtol: float, backward: float, scale: float, count: bool) -> dict[str, Any]:
        solve = CONTENDERS[contender].solve
        run = lambda cell, z, params, x: solve(cell, z, params, x, rtol, backward, scale)
        drawn = table[problem]()
        params = jax.tree.map(jnp.asarray, drawn.params)
        forward, step = functions(drawn, run, lambda z: z)
        report: dict[str, Any] = {"device": jax.devices()[0].device_kind}
        for name, f in (("forward", forward), ("step", step)):
            began = time.perf_counter()
            program: Any = jax.jit(f).lower(params).compile()
            compiled = time.perf_counter()
            jax.block_until_ready(program(params))
            report[name] = {
                "compile_s": compiled - began,
                "first_call_s": time.perf_counter() - began,
                "temp_bytes": program.memory_analysis().temp_size_in_bytes,
            }
            built[contender, name] = lambda program=program: jax.block_until_ready(program(params))
        if count:
            for name, f in zip(("forward", "step"), functions(drawn, run, ticking), strict=True):
                COUNTS.update(f=0, vjp=0, jvp=0)
                lowered: Any = jax.jit(f).lower(params)
                jax.block_until_ready(lowered.compile({"xla_backend_optimization_level": 0})(params))
                jax.effects_barrier()
                report[name] |= COUNTS
        return report

    def save(contender: str, path: str) -> dict:
        _, grads = built[contender, "step"]()
        leave(path, built[contender, "forward"](), grads)
        return {}

    def limit(problem: str) -> dict:
        drawn = table[problem]()
        built.update({("limit", name): program for name, program in parts(drawn).items()})
        return {"linearization_bytes": linearization_bytes(drawn), "z_bytes": 4 * math.prod(drawn.z_shape)}

    return {
        "build": build,
        "limit": limit,
        "save": save,
        "time": lambda contender, what, repeats: {"ms": clock(built[contender, what], repeats)},
    }


def functions(drawn: Problem, solve: Callable, seen: Callable) -> tuple[Callable, Callable]:
    """(params → z, params → loss and gradients); `seen` is applied to the z of each evaluation."""
    data = jax.tree.map(jnp.asarray, drawn.data)
    cell = lambda z, params, x: drawn.cell(jax_ops, seen(z), params, x)

    def forward(params):
        z = jnp.zeros(drawn.z_shape, jnp.float32)
        return solve(cell, z, params, drawn.inject(jax_ops, params, data))

    return forward, jax.value_and_grad(lambda params: drawn.readout(jax_ops, forward(params), params, data))


# ---- evaluations counted in the running program --------------------------------------------------------------


def _tick(kind: str, z: jax.Array) -> jax.Array:
    """1, once the count of `kind` has risen. Its result is used, so that it is not elided; it reads z, for what is
    the same in each round is moved out of a loop."""

    def raise_count(_):
        COUNTS[kind] += 1
        return np.float32(1)

    out = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(raise_count, out, z.ravel()[0], vmap_method="sequential")


@jax.custom_jvp
def ticking(z: jax.Array) -> jax.Array:
    """z, counting: f's evaluations, Jacobian-vector products, and their transposes."""
    return z * _tick("f", z)


@ticking.defjvp
def _ticking_jvp(primals, tangents):
    (z,), (z_dot,) = primals, tangents
    along, back = (lambda _, t: t * _tick("jvp", t)), (lambda _, t: t * _tick("vjp", t))
    return ticking(z), jax.custom_derivatives.linear_call(along, back, (), z_dot)


# ---- what no contender can do without ------------------------------------------------------------------------


def linearization_bytes(drawn: Problem) -> int:
    """Temporaries of the loss at a given z, and of one pullback through the cell to z and to the parameters."""
    data = jax.tree.map(jnp.asarray, drawn.data)

    def step(z, params):
        _, vjp = jax.vjp(
            lambda z, params: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data)), z, params
        )
        loss, grads = jax.value_and_grad(lambda z, params: drawn.readout(jax_ops, z, params, data), (0, 1))(z, params)
        z_bar, params_bar = vjp(grads[0])
        return loss, z_bar, jax.tree.map(jnp.add, params_bar, grads[1])

    program: Any = jax.jit(step).lower(jnp.zeros(drawn.z_shape), jax.tree.map(jnp.asarray, drawn.params)).compile()
    return program.memory_analysis().temp_size_in_bytes


def parts(drawn: Problem, loops: int = 20) -> dict[str, Callable]:
    """Programs that run f, Jᵀv and the parameters' pullback `loops` times each, inside a compiled loop."""
    data = jax.tree.map(jnp.asarray, drawn.data)
    params = jax.tree.map(jnp.asarray, drawn.params)
    z = 0.1 * jax.random.normal(jax.random.key(0), drawn.z_shape)
    cell = lambda z, params: drawn.cell(jax_ops, z, params, drawn.inject(jax_ops, params, data))

    def evaluations(z, params):
        return jax.lax.fori_loop(0, loops, lambda _, z: cell(z, params), z)

    def products(z, params):
        _, vjp = jax.vjp(lambda z: cell(z, params), z)
        return jax.lax.fori_loop(0, loops, lambda _, u: vjp(u)[0], z)

    def pullbacks(z, params):
        _, vjp = jax.vjp(lambda params: cell(z, params), params)

        def body(_, carry):
            u, total = carry
            grads = vjp(u)[0]
            # The next cotangent depends on this result, so that no pullback is moved out of the loop.
            nudge = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(grads))
            return u + 1e-30 * nudge, jax.tree.map(jnp.add, total, grads)

        return jax.lax.fori_loop(0, loops, body, (z, jax.tree.map(jnp.zeros_like, params)))

    programs = {}
    for name, f in (("t_f", evaluations), ("t_vjp", products), ("t_params", pullbacks)):
        program = jax.jit(f).lower(z, params).compile()
        programs[name] = lambda program=program: jax.block_until_ready(program(z, params))
    return programs
