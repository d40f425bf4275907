"""The core's own figures: memory of the compiled training step, cost of an eager call, of a dispatch, of a compile.

    python -m experiments.benchmarks.core
    python -m experiments.benchmarks.core --leaves 8 64 1000  # a state of 1000 leaves takes minutes to compile

Two minutes on two CPU cores. Bytes come from the compiled program and do not depend on the machine's load;
times are medians in this process, so compare them with each other only.
"""

import dataclasses
import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import deq_jax as deq
from deq_jax.models import DEQTransformer, TransformerConfig
from experiments.training import lm

CONFIG = TransformerConfig(vocab_size=65, dim=128, heads=4, inner_dim=512, mem_len=64)


@dataclasses.dataclass(frozen=True)
class Config:
    """Bytes, milliseconds and compile times of the core; nothing is written."""

    leaves: tuple[int, ...] = (8, 64)  # sizes of a state, of which the compile time is told
    closures: int = 1000  # fresh ones, called eagerly one after the other, while the process's memory is watched


def tanh_cell(z, w, x):
    return jnp.tanh(z @ w + x)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "x"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cell:
    """A pytree that is a function, as a module of Equinox is."""

    w: jax.Array
    x: jax.Array

    def __call__(self, z):
        return tanh_cell(z, self.w, self.x)


def main(config: Config = Config()) -> None:  # noqa: B008
    device = jax.devices()[0]
    print(f"deq_jax {deq.__version__}, jax {jax.__version__}, {device.platform}: {device.device_kind}, float32, seed 0")

    print("\ntemporary bytes of a compiled DEQ-Transformer gradient (batch 8, 64 tokens, dim 128)")
    for name, solver in (("Anderson", deq.Anderson), ("Broyden", deq.Broyden)):
        for steps in (10, 1000):
            size = gradient_bytes(solver(max_steps=steps), deq.Implicit(solver(max_steps=steps)))
            print(f"  Implicit, {name:8} max_steps {steps:5}: {size / 1e6:8.2f} MB")
    for depth in (10, 20, 40):
        picard = deq.Picard(max_steps=depth)
        plain = gradient_bytes(picard, deq.Unroll())
        per_step = gradient_bytes(picard, deq.Unroll(checkpoint=1))
        print(
            f"  Unroll,   depth {depth:3}: {plain / 1e6:8.2f} MB; checkpointed at every step {per_step / 1e6:8.2f} MB"
        )

    print("\nan eager call of fixed_point on a module-level function (64 × 64, Anderson)")
    w, x = 0.5 * jax.random.normal(jax.random.key(0), (64, 64)) / 8, jnp.ones((64, 64))
    call = lambda rtol=1e-4: deq.fixed_point(tanh_cell, x, w, x, batch_ndim=1, solver=deq.Anderson(rtol=rtol))
    print(f"  first {milliseconds(call, repeats=1):9.2f} ms")
    print(f"  again {milliseconds(call):9.3f} ms; with another tolerance {milliseconds(lambda: call(1e-3)):.3f} ms")

    report_fresh_calls(config)

    print("\ncompile time of value and gradient of the same cell, side by side")
    loss = lambda w, **options: deq.fixed_point(tanh_cell, x, w, x, batch_ndim=1, **options).value.sum()
    once = lambda w: tanh_cell(x, w, x).sum()
    implicit = lambda solver: lambda w: loss(w, solver=solver, adjoint=deq.Implicit(solver))
    cells = {"cell once": once, "Implicit, Picard": implicit(deq.Picard()), "Implicit, Anderson": loss}
    for name, f in cells.items():
        lowered = jax.jit(jax.value_and_grad(f)).lower(w)
        print(f"  {name:20} {milliseconds(lowered.compile, repeats=1):8.0f} ms")  # a second one would be cached
    print("  and of the DEQ-Transformer above, weight-tied layers against the equilibrium")
    picard = deq.Picard(max_steps=1)
    for name, solver, adjoint in (
        ("one layer", picard, deq.Unroll()),
        ("Implicit, Picard", deq.Picard(), deq.Implicit(deq.Picard())),
        ("Implicit, Anderson", deq.Anderson(), deq.Implicit()),
    ):
        lowered = lower_gradient(solver, adjoint)
        print(f"  {name:20} {milliseconds(lowered.compile, repeats=1):8.0f} ms")

    report_compile_times(config)

    print("\none step of a solver in a compiled loop, with an f of one multiplication (µs, the least of 15 runs)")
    for solver, batch, dim in (
        (deq.Anderson(history=5), 64, 512),
        (deq.Anderson(history=8), 64, 512),
        (deq.Anderson(history=16), 64, 512),
        (deq.Anderson(history=5), 8, 16384),
        (deq.Anderson(history=16), 8, 16384),
        (deq.Anderson(history=5), 4096, 32),
        (deq.Anderson(history=16), 4096, 32),
        (deq.Broyden(rank=20), 64, 512),
        (deq.Broyden(rank=20), 8, 16384),
        (deq.Broyden(rank=20), 4096, 32),
        (deq.Picard(), 64, 512),
    ):
        name = f"{type(solver).__name__}({getattr(solver, 'history', getattr(solver, 'rank', ''))})"
        print(f"  {name:13} {batch:5} × {dim:5}: {microseconds_of_a_step(solver, batch, dim):7.0f}")

    print("\nPython time to dispatch one step over explicit state, jax.jit against nnx.jit")
    model = DEQTransformer(CONFIG, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = jax.jit(lambda params: params["decoder_bias"] + 1)
    module = nnx.jit(lambda model: model.decoder_bias[...] + 1)
    print(
        f"  {len(jax.tree.leaves(params))} leaves: jax.jit over a dict {milliseconds(lambda: plain(params)):.3f} ms, ",
        end="",
    )
    print(f"nnx.jit over the module {milliseconds(lambda: module(model)):.3f} ms")
    many = {f"leaf {i}": jnp.ones(8) for i in range(200)}
    step = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf - 1))
    print(f"  200 leaves: jax.jit over a dict, the update itself included, {milliseconds(lambda: step(many)):.3f} ms")

    print("\nimport deq_jax, after jax and jax.numpy, in processes of their own")
    script = "import time, jax, jax.numpy; t = time.perf_counter(); import deq_jax; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(5)]
    print(f"  {1e3 * statistics.median(float(run.stdout) for run in runs):.0f} ms")


def report_fresh_calls(config: Config) -> None:
    """Eager calls of functions that are new objects each time, and compute what was compiled before."""
    w, x = 0.5 * jax.random.normal(jax.random.key(0), (512, 512)) / 512**0.5, jnp.ones((8, 512))
    solve = lambda f, *args: deq.fixed_point(f, x, *args, batch_ndim=1).value
    closure = lambda w: solve(lambda z: tanh_cell(z, w, x))
    trace = lambda: jax.make_jaxpr(lambda z, w, x: tanh_cell(z, w, x))(x, w, x).jaxpr and ()
    inside = jax.jit(lambda w: solve(tanh_cell, w, x))
    forms: dict[str, Callable[[], Any]] = {
        "a function of the module, with arguments": lambda: solve(tanh_cell, w, x),
        "a fresh closure over 1 MB": lambda: closure(w),
        "a callable dataclass": lambda: solve(Cell(w, x)),
        "its bound method": lambda: solve(Cell(w, x).__call__),
        "a functools.partial": lambda: solve(functools.partial(tanh_cell, w=w, x=x)),
        "the gradient of a fresh closure": lambda: jax.grad(lambda w: closure(w).sum())(w),
    }
    print("\nlater eager calls of fixed_point (8 × 512, all defaults)")
    for name, call in {"(a trace of f alone)": trace, "(the compiled solve alone)": lambda: inside(w)}.items():
        call()
        print(f"  {name:42} {milliseconds(call):8.2f} ms")
    for name, call in forms.items():
        first = milliseconds(call, repeats=1)
        print(f"  {name:42} {milliseconds(call):8.2f} ms; the first {first:.0f} ms")

    jax.block_until_ready(closure(w))
    before = resident()
    for i in range(config.closures):
        jax.block_until_ready(closure(w + 1e-6 * i))
    grown = (resident() - before) / 1e6
    print(f"  {config.closures} fresh closures over 1 MB each: from {before / 1e6:.0f} MB, {grown:+.1f} MB")


def resident() -> int:
    """Bytes that this process holds now."""
    held = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(held.group(1)) if held else 0


def report_compile_times(config: Config) -> None:
    """Of value and gradient: where the cotangent of z is a constant, and where z has many leaves."""
    print("  and where the cotangent is a constant, or not (8 × 262,144)")
    x = jnp.ones((8, 262_144))
    solve = lambda a: deq.fixed_point(lambda z: jnp.tanh(0.5 * z + a * x), x, batch_ndim=1).value
    for name, loss in {"(z * z).sum()": lambda z: (z * z).sum(), "z.sum()": lambda z: z.sum()}.items():
        lowered = jax.jit(jax.value_and_grad(lambda a, loss=loss: loss(solve(a)))).lower(jnp.ones(()))
        print(f"  {name:20} {milliseconds(lowered.compile, repeats=1):8.0f} ms")

    print("  and of a state of many leaves (8 × 16 each): traced, compiled")
    for count in config.leaves:
        z0 = {f"leaf {i}": jnp.ones((8, 16)) for i in range(count)}
        cell = lambda a, z: jax.tree.map(lambda z: jnp.tanh(0.5 * z + a), z)
        value = lambda a, z0=z0: deq.fixed_point(lambda z: cell(a, z), z0, batch_ndim=1).value
        loss = lambda a, value=value: sum((leaf**2).sum() for leaf in jax.tree.leaves(value(a)))
        began = time.perf_counter()
        lowered = jax.jit(jax.value_and_grad(loss)).lower(jnp.ones(()))
        traced = 1e3 * (time.perf_counter() - began)
        print(f"  {count:4} leaves          {traced:8.0f} ms {milliseconds(lowered.compile, repeats=1):8.0f} ms")


def gradient_bytes(solver: Any, adjoint: Any) -> int:
    """Temporary bytes of one compiled gradient; nothing is run."""
    return lm.temp_bytes(lower_gradient(solver, adjoint).compile())


def lower_gradient(solver: Any, adjoint: Any) -> Any:
    model = DEQTransformer(CONFIG, solver=solver, adjoint=adjoint, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = jnp.zeros((8, 64), jnp.int32)
    loss = lambda params: nnx.merge(graphdef, params)(tokens).logits.astype(jnp.float32).var()
    return jax.jit(jax.grad(loss)).lower(params)


def microseconds_of_a_step(solver: Any, batch: int, dim: int, steps: int = 40) -> float:
    key, other = jax.random.split(jax.random.key(0))
    z0 = jax.random.normal(key, (batch, dim))
    slope = jax.random.uniform(other, (batch, dim), minval=-2.0, maxval=0.99)
    solver = dataclasses.replace(solver, rtol=0.0, max_steps=steps)
    run = jax.jit(lambda z: deq.solve(lambda z: slope * z + 1, z, solver=solver, batch_ndim=1)[:2])
    most = int(run(z0)[1].steps.max())
    return 1e3 * min(milliseconds(lambda: run(z0), repeats=1) for _ in range(15)) / most


def milliseconds(f: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of f, its result awaited."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main(tyro.cli(Config))
