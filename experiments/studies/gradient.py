"""Every adjoint against a dense float64 solve: its error, what it costs, and how the backward solve decides both.

python -m experiments.studies.gradient
python -m experiments.studies.gradient --quick --out runs/gradients
"""

import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov
from experiments.shared.numerics import GMRES, float64
from experiments.studies.gradient_problems import (
    Problems,
    arrays,
    build,
    cell,
    flat,
    gradient,
    measure,
    program,
    run,
)
from experiments.studies.gradient_report import BACKWARD_RTOL, RTOL, draw, judge, markdown
from experiments.training import lm
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

REVERSIBLE = 61  # evaluations, 30 steps: at damping 0.5 float64 loses nine digits in walking them back


@dataclasses.dataclass(frozen=True)
class Config:
    """Eight minutes of one CPU core; all bars are met, JFB is 89 % off at spectral radius 0.9 and Shine(5) 3.1 %.

    python -m experiments.studies.gradient
    """

    out: Path = Path("experiments/studies/results/gradient")
    quick: bool = False  # seconds: fewer cases, the same bars
    problems: int = 8  # in one batch, each with weights of its own
    dim: int = 32
    radii: tuple[float, ...] = (0.5, 0.9, 0.99, 1.2)  # of the Jacobian at z*; above 1 the cell is monotone
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float64")
    depths: tuple[int, ...] = (16, 64, 256, 1024, 4096)  # at which memory is compiled
    repeats: int = 5  # timings, of which the median counts
    seed: int = 0


QUICK = dict(quick=True, radii=(0.9, 1.2), dtypes=("float64",), depths=(16, 256, 4096), repeats=1)
QUICK_ADJOINTS = "Implicit", "Shine(0)", "Shine(5)", "JFB", "Reversible"


# ---- adjoint × solver × dtype × spectral radius ------------------------------------------------------------


def solvers(dtype: str) -> dict[str, Any]:
    rtol = RTOL[dtype]
    picard = {"bfloat16": 500, "float32": 1500, "float64": 5000}[dtype]  # what plain iteration needs at 0.99
    return {
        "Picard": deq.Picard(rtol=rtol, max_steps=picard),
        "Anderson": deq.Anderson(rtol=rtol, max_steps=150),
        "Broyden": deq.Broyden(rtol=rtol, max_steps=150),
    }


def adjoints(solver: Any) -> dict[str, Any]:
    shine = {"Shine(0)": deq.Shine(refine=0), "Shine(5)": deq.Shine(refine=5)}
    return {
        "Implicit": deq.Implicit(),
        "ImplicitJVP": deq.ImplicitJVP(),
        **(shine if isinstance(solver, deq.Broyden) else {}),
        "Phantom(5, 0.8)": deq.Phantom(5, 0.8),
        "Neumann(5)": deq.Neumann(5),
        "JFB": deq.JFB(),
        "Unroll": deq.Unroll(stop=True),
        "Unroll, √L": deq.Unroll(checkpoint=True, stop=True),
        "Reversible": deq.Reversible(0.5),
    }


def compare_adjoints(config: Config) -> list[dict[str, Any]]:
    rows = []
    for dtype in config.dtypes:
        for radius in config.radii:
            p = build(config, radius, dtype)
            for solver_name, solver in solvers(dtype).items():
                if config.quick and solver_name != "Broyden":
                    continue
                tries = {name: (forward_for(solver, adj), adj) for name, adj in adjoints(solver).items()}
                tries = {name: tries[name] for name in QUICK_ADJOINTS} if config.quick else tries
                timed = seconds(p, dtype, tries, config.repeats)
                for name, (forward, adjoint) in tries.items():
                    row = {"dtype": dtype, "radius": radius, "solver": solver_name, "adjoint": name}
                    row |= measure(p, dtype, forward, adjoint)
                    row["temp_bytes"] = lm.temp_bytes(program((config.problems, config.dim), dtype, forward, adjoint))
                    row["time"] = timed[name] / timed["Implicit"]
                    rows.append(row)
            print(f"  {dtype}, spectral radius {radius}", flush=True)
    return rows


def forward_for(solver: Any, adjoint: Any) -> Any:
    return dataclasses.replace(solver, max_steps=REVERSIBLE) if isinstance(adjoint, deq.Reversible) else solver


def seconds(p: Problems, dtype: str, tries: dict[str, tuple], repeats: int) -> dict[str, float]:
    """The median time of each, in turns, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in tries}
    for turn in range(repeats + 1):
        for name, (solver, adjoint) in tries.items():
            start = time.perf_counter()
            jax.block_until_ready(run(p, dtype, solver, adjoint))
            if turn:  # the first may compile
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- the solver of the backward equation, and its tolerance ------------------------------------------------


def backward_solvers(rtol: float, config: Config) -> dict[str, Any]:
    common: Any = dict(rtol=rtol, max_steps=150)
    gmres = lambda m: NewtonKrylov(krylov=m, forcing=rtol / 2, **GMRES, **common)
    if config.quick:
        return {"GMRES(32)": gmres(32)}
    return {
        **{f"Anderson({m})": deq.Anderson(history=m, **common) for m in (5, 8, 16, 32)},
        "Broyden(20)": deq.Broyden(rank=20, **common),
        "NewtonKrylov": NewtonKrylov(**common),
        **{f"GMRES({m})": gmres(m) for m in (16, 32)},
    }


def compare_backward(config: Config) -> list[dict[str, Any]]:
    """The backward solvers behind one forward Anderson."""
    rows = []
    forward = deq.Anderson(rtol=BACKWARD_RTOL, max_steps=150)
    backward = {"default": None, **backward_solvers(0.01 * BACKWARD_RTOL, config)}
    tries = {name: (forward, deq.Implicit(solver)) for name, solver in backward.items()}
    for radius in config.radii:
        p = build(config, radius, "float64")
        timed = seconds(p, "float64", tries, config.repeats)
        for name, (_, adjoint) in tries.items():
            row = {"radius": radius, "backward": name} | measure(p, "float64", forward, adjoint)
            row["temp_bytes"] = lm.temp_bytes(program(p.b.shape, "float64", forward, adjoint))
            rows.append(row | {"time": timed[name] / timed["default"]})
    return rows


def compare_tolerances(config: Config) -> list[dict[str, Any]]:
    """The gradient's error by the tolerances of both solves, in float64."""
    rows = []
    for radius in config.radii:
        p = build(config, radius, "float64")
        for rtol in (1e-2, 1e-4, 1e-6):
            forward = deq.Anderson(rtol=rtol, max_steps=150)
            for ratio in (1.0, 0.1, 0.01, 0.001):
                adjoint = deq.Implicit(deq.Anderson(rtol=ratio * rtol, max_steps=150, history=16))
                row = {"radius": radius, "rtol": rtol, "ratio": ratio}
                rows.append(row | measure(p, "float64", forward, adjoint))
    return rows


# ---- bars --------------------------------------------------------------------------------------------------


def exact_pairs(config: Config) -> list[dict[str, Any]]:
    """The exact modes at tight tolerance, for each forward solver with each backward solver."""
    rows, tight = [], solvers("float64")
    for forward_name, forward in tight.items():
        if config.quick and forward_name != "Anderson":
            continue
        backward: dict[str, Any] = {"default": None, **tight, "GMRES(32)": backward_solvers(1e-15, config)["GMRES(32)"]}
        modes = {name: deq.Implicit(solver) for name, solver in backward.items()} | {"JVP": deq.ImplicitJVP()}
        if config.quick:
            modes = {"default": modes["default"], "GMRES(32)": modes["GMRES(32)"]}
        for radius in config.radii:
            p = build(config, radius, "float64")
            for name, mode in modes.items():
                # Where plain iteration diverges it does so in both directions, and a default cannot repair a wrong z*.
                if radius < 1 or "Picard" not in (forward_name, name):
                    row = {"radius": radius, "forward": forward_name, "backward": name}
                    rows.append(row | measure(p, "float64", forward, mode))
    return rows


def reversible_error(config: Config) -> float:
    """Reversible against backpropagation through the same 10 steps with all of them kept; the worst of all."""
    damping, steps, worst = 0.5, 10, 0.0

    def loss(w, b, z_bar):
        def step(carry, _):
            y, z = carry
            y = (1 - damping) * y + damping * cell(z, w, b)
            return (y, (1 - damping) * z + damping * cell(y, w, b)), None

        (_, z), _ = jax.lax.scan(step, (jnp.zeros_like(b), jnp.zeros_like(b)), length=steps)
        return jnp.sum(z_bar * z)

    kept = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for radius in config.radii:
        values = arrays(build(config, radius, "float64"), "float64")
        # Without a tolerance, so that all steps are taken: two evaluations a step, and one at the end.
        solver = deq.Picard(rtol=0.0, max_steps=2 * steps + 1)
        (w_bar, b_bar, _), _ = gradient(*values, solver, deq.Reversible(damping))
        got, want = flat(w_bar, b_bar), flat(*kept(*values))
        worst = max(worst, float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1))))
    return worst


def memory_by_depth(config: Config) -> dict[str, Any]:
    """Temporary bytes of the compiled gradient by max_steps, float32; nothing is run."""
    modes = {
        "Implicit": deq.Implicit(),
        "Phantom(5, 0.8)": deq.Phantom(5, 0.8),
        "Reversible": deq.Reversible(0.5),
        "Unroll": deq.Unroll(),
        "Unroll, √L": deq.Unroll(checkpoint=True),
    }
    if config.quick:
        del modes["Unroll"]
    shape = config.problems, config.dim
    size = lambda depth, adjoint: lm.temp_bytes(program(shape, "float32", deq.Picard(max_steps=depth), adjoint))
    table = {name: [size(depth, adjoint) for depth in config.depths] for name, adjoint in modes.items()}
    # bytes = a + c Lᵖ: the exponent whose straight line fits best
    fits = {name: fit_power(config.depths, table[name]) for name in modes if name.startswith("Unroll")}
    return {"depths": list(config.depths), "bytes": table, "fits": fits}


def fit_power(depths: Sequence[int], sizes: Sequence[int]) -> dict[str, float]:
    def fit(power):
        x = np.stack([np.ones(len(depths)), np.asarray(depths, float) ** power], axis=-1)
        relative = x / np.asarray(sizes, float)[:, None]
        (a, c), *_ = np.linalg.lstsq(relative, np.ones(len(depths)), rcond=None)
        return float(np.max(np.abs(relative @ np.array([a, c]) - 1))), float(a), float(c)

    power = min(np.arange(0.2, 1.41, 0.01), key=lambda power: fit(power)[0])
    deviation, constant, slope = fit(power)
    return {"power": round(float(power), 2), "constant": constant, "slope": slope, "deviation": deviation}


def main(config: Config) -> dict[str, Any]:
    config = dataclasses.replace(config, **QUICK) if config.quick else config
    with float64(), warnings.catch_warnings():
        # Reversible warns of budgets that rounding spoils; its error is what is measured here.
        warnings.filterwarnings("ignore", message="Reversible")
        parts: dict[str, Callable[[Config], Any]] = {
            "adjoints": compare_adjoints,
            "backward": compare_backward,
            "tolerances": compare_tolerances,
            "exact_pairs": exact_pairs,
            "reversible": reversible_error,
            "memory": memory_by_depth,
        }
        results: dict[str, Any] = {"command": "python -m experiments.studies.gradient" + " --quick" * config.quick}
        results |= {"config": dataclasses.asdict(config) | {"out": None}, **environment()}
        for name, part in parts.items():
            start = time.perf_counter()
            results[name] = part(config)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    results["bars"] = judge(results)
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(config.out / "table.md", markdown(results).encode())
    draw(results, config.out / "figure.png")
    for name, b in results["bars"].items():
        print(f"{'met   ' if b['met'] else 'NOT MET'} {name}: {b['got']} ({b['bar']})")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
