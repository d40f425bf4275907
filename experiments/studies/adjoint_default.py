"""Should `ImplicitJVP` be the default adjoint? What each of the two costs to trace, to compile, to hold and to run.

python -m experiments.studies.adjoint_default
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jaxtyping import PyTree

import deq_jax as deq
from deq_jax.models import DEQTransformer, TransformerConfig
from experiments.training.sealed import write_atomically

ADJOINTS = {"Implicit": deq.Implicit(), "ImplicitJVP": deq.ImplicitJVP()}


@dataclasses.dataclass(frozen=True)
class Config:
    """About five minutes on one CPU core. `table.md` says what each adjoint costs, cell by cell.

    python -m experiments.studies.adjoint_default
    """

    out: Path = Path("experiments/studies/results/adjoint_default")
    runs: int = 11  # of each program, the two adjoints by turns
    compiles: int = 2
    tiny: bool = False  # the same at a test's size


def build(config: Config) -> dict[str, tuple[Callable, PyTree]]:
    """For each cell (loss, params), with loss(params, adjoint)."""
    keys = jax.random.split(jax.random.key(0), 4)
    small, (batch, dim) = 16, (4, 8) if config.tiny else (64, 256)
    dense = lambda z, w: jnp.tanh(w["w"] @ z + w["x"])
    rows = lambda z, w: jnp.tanh(z @ w["w"] + w["x"])
    matrix = lambda key, n: 0.8 * jax.random.normal(key, (n, n)) / n**0.5

    def of(f: Callable, shape: tuple, batch_ndim: int) -> Callable:
        options: Any = dict(batch_ndim=batch_ndim)
        return lambda w, adjoint: jnp.sum(
            deq.fixed_point(f, jnp.zeros(shape), w, adjoint=adjoint, **options).value ** 2
        )

    sizes: dict[str, Any] = dict(dim=16, heads=2, inner_dim=32) if config.tiny else dict(dim=64, heads=4, inner_dim=256)
    transformer = TransformerConfig(vocab_size=64, mem_len=0, **sizes)
    tokens = jax.random.randint(keys[3], (2, 8) if config.tiny else (4, 32), 0, 64)
    graphdef, params = nnx.split(DEQTransformer(transformer, rngs=nnx.Rngs(0)), nnx.Param)

    def language(params: PyTree, adjoint: deq.Adjoint) -> jax.Array:
        logits, *_ = nnx.merge(graphdef, params)(tokens, adjoint=adjoint)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    x = jax.random.normal(keys[2], (batch, dim))
    return {
        f"dense, {small}": (of(dense, (small,), 0), {"w": matrix(keys[0], small), "x": jnp.ones(small)}),
        f"batch, {batch} x {dim}": (of(rows, (batch, dim), 1), {"w": matrix(keys[1], dim), "x": x}),
        f"transformer, {tokens.shape[0]} x {tokens.shape[1]} x {sizes['dim']}": (language, nnx.to_pure_dict(params)),
    }


def measure(config: Config, loss: Callable, params: PyTree) -> dict[str, dict[str, dict[str, float]]]:
    """For value and gradient, and for each adjoint: medians in seconds, and the bytes of temporaries."""
    results: dict[str, Any] = {}
    for kind, transform in {"value": lambda f: f, "gradient": jax.grad}.items():
        programs: dict[str, Any] = {}
        seconds = {name: {"trace": [], "compile": [], "run": []} for name in ADJOINTS}
        for _ in range(config.compiles):
            for name, adjoint in ADJOINTS.items():
                jax.clear_caches()
                deq.clear_caches()
                function = transform(lambda params, adjoint=adjoint: loss(params, adjoint))
                lowered, spent = timed(lambda function=function: jax.jit(function).lower(params))
                seconds[name]["trace"].append(spent)
                programs[name], spent = timed(lowered.compile)
                seconds[name]["compile"].append(spent)
        for program in programs.values():
            jax.block_until_ready(program(params))
        for _ in range(config.runs):  # by turns, so that what else the machine does falls on both
            for name, program in programs.items():
                _, spent = timed(lambda program=program: jax.block_until_ready(program(params)))
                seconds[name]["run"].append(spent)
        results[kind] = {
            name: {way: statistics.median(times) for way, times in seconds[name].items()}
            | {"bytes": programs[name].memory_analysis().temp_size_in_bytes}
            for name in ADJOINTS
        }
    return results


def timed(call: Callable) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def table(results: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = [
        "| cell | program | adjoint | trace, s | compile, s | run, ms | temporaries, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, kinds in results["cells"].items():
        for kind, adjoints in kinds.items():
            for name, x in adjoints.items():
                times = f"{x['trace']:.2f} | {x['compile']:.2f} | {1e3 * x['run']:.2f}"
                lines.append(f"| {cell} | {kind} | {name} | {times} | {x['bytes'] / 1024:.1f} |")
    told = (
        f"`python -m experiments.studies.adjoint_default`, jax {results['jax']}, {results['device']}, float32, medians."
    )
    return "\n".join([told, "", *lines, ""])


def main(config: Config) -> None:
    cells = {}
    for cell, (loss, params) in build(config).items():
        cells[cell] = measure(config, loss, params)
        print(cell, cells[cell], flush=True)
    results = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cells": cells}
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(config.out / "table.md", table(results).encode())
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Config))
