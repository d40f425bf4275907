"""Every adjoint against a dense float64 solve: its error, what it costs, and how the backward solve decides both.

python -m experiments.gradient_study
python -m experiments.gradient_study --quick --out runs/gradients
"""

import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov
from experiments import lm, plots
from experiments.checkpoints import write_atomically

RTOL = {"bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-14}  # of the forward solve; the last is the tight one
EXACT_BAR, REVERSIBLE_BAR, SHINE_BAR, SHINE_PRODUCTS = 1e-10, 1e-8, 1 / 3, 7
REVERSIBLE = 61  # evaluations, 30 steps: at damping 0.5 float64 loses nine digits in walking them back
BACKWARD_RTOL = 1e-6  # of the forward solve behind which backward solvers are compared
GMRES: Any = dict(difference=1.0)  # on a linear map a difference of any size is exact: Newton–Krylov is GMRES


@dataclasses.dataclass(frozen=True)
class Config:
    """Eight minutes of one CPU core; all bars are met, JFB is 89 % off at spectral radius 0.9 and Shine(5) 3.1 %.

    python -m experiments.gradient_study
    """

    out: Path = Path("experiments/results/gradients")
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


# ---- problems with a known Jacobian, and their exact gradient ----------------------------------------------


class Problems(NamedTuple):
    w: Float[np.ndarray, "batch dim dim"]
    b: Float[np.ndarray, "batch dim"]
    z: Float[np.ndarray, "batch dim"]  # a fixed point, to float64
    z_bar: Float[np.ndarray, "batch dim"]  # the loss is ⟨z̄, z*⟩


def cell(z, w, b):
    return jnp.tanh(jnp.einsum("...ij,...j->...i", w, z) + b)


def build(config: Config, radius: float, dtype: str) -> Problems:
    """Cells whose Jacobian has spectral radius `radius` at a planted fixed point; weights are rounded to dtype."""
    rng = np.random.default_rng([config.seed, round(100 * radius)])
    draw = lambda *shape: rng.normal(size=(config.problems, *shape))
    n = config.dim
    a, z_bar = 0.5 * draw(n), draw(n)
    z, slope = np.tanh(a), 1 - np.tanh(a) ** 2
    if radius < 1:
        w = draw(n, n)
    else:
        # I − W ⪰ I, so that the fixed point is unique (Winston & Kolter 2020), while Picard runs away from it.
        s, k = draw(n, n), draw(n, n)
        w = (k - k.swapaxes(-1, -2)) - 0.5 * s @ s.swapaxes(-1, -2) / n**0.5
    w *= radius / np.abs(np.linalg.eigvals(slope[..., None] * w)).max(-1)[:, None, None]
    b = a - np.einsum("bij,bj->bi", w, z)
    w, b, z_bar = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (w, b, z_bar))
    for _ in range(20):  # Newton: the rounded weights have a fixed point a little beside the planted one
        fz = np.tanh(np.einsum("bij,bj->bi", w, z) + b)
        z = z + np.linalg.solve(np.eye(n) - (1 - fz**2)[..., None] * w, (fz - z)[..., None])[..., 0]
    return Problems(w, b, z, z_bar)


def dense_gradient(p: Problems) -> Float[np.ndarray, "batch params"]:
    # z = f(z, a)  ⇒  ā = fₐᵀ (I − J)⁻ᵀ z̄, with J = D W, D = diag(1 − z²), and fₐ for a = (W, b)
    slope = 1 - p.z**2
    i_minus_j = np.eye(p.z.shape[-1]) - slope[..., None] * p.w
    b_bar = slope * np.linalg.solve(i_minus_j.swapaxes(-1, -2), p.z_bar[..., None])[..., 0]
    return flat(b_bar[..., None] * p.z[:, None, :], b_bar)


def flat(w_bar: Any, b_bar: Any) -> Float[np.ndarray, "batch params"]:
    both = [np.asarray(x, np.float64) for x in (w_bar, b_bar)]
    return np.concatenate([x.reshape(len(x), -1) for x in both], axis=-1)


@jax.jit
def gradient(w, b, z_bar, solver, adjoint):
    """(gradients in w and b, the backward statistics) and the forward ones. A tolerance does not compile anew."""

    def loss(w, b, probe):
        z, stats = deq.fixed_point(
            cell, jnp.zeros_like(b), w, b, solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe
        )
        return jnp.sum(z_bar * z), stats

    probe = deq.Probe.zeros(b.shape[:1])
    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(w, b, probe)


def measure(p: Problems, dtype: str, solver: Any, adjoint: Any) -> dict[str, Any]:
    """Error, cosine and counts of one gradient against the dense one: medians, and the worst problem's."""
    (w_bar, b_bar, probe), stats = run(p, dtype, solver, adjoint)
    got, exact = flat(w_bar, b_bar), dense_gradient(p)
    with np.errstate(all="ignore"):
        error = np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        cosine = np.sum(got * exact, -1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(exact, axis=-1)
    forward, backward = np.asarray(stats.converged), np.asarray(probe.status) == deq.Status.CONVERGED
    return {
        "error": float(np.median(error)),
        "worst": float(np.max(error)),
        "cosine": float(np.min(cosine)),
        "evaluations": float(np.mean(stats.steps)),
        "converged": float(np.mean(forward)),
        "products": products(adjoint, probe, stats),
        "backward_converged": float(np.mean(backward[forward])) if forward.any() else None,
    }


def run(p: Problems, dtype: str, solver: Any, adjoint: Any) -> Any:
    return program(p.b.shape, dtype, solver, adjoint)(*arrays(p, dtype), solver, adjoint)


PROGRAMS: dict[Any, Any] = {}


def program(shape: tuple[int, ...], dtype: str, solver: Any, adjoint: Any) -> Any:
    """The compiled gradient: one for all tolerances, whose memory can be asked for too."""
    batch, dim = shape
    key = shape, dtype, jax.tree.structure((solver, adjoint))
    if key not in PROGRAMS:
        shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((batch, dim, dim), shape, shape)]
        PROGRAMS[key] = gradient.lower(*shapes, solver, adjoint).compile()
    return PROGRAMS[key]


def arrays(p: Problems, dtype: str) -> list[Array]:
    return [jnp.asarray(x, dtype) for x in (p.w, p.b, p.z_bar)]


def products(adjoint: Any, probe: deq.Probe, stats: deq.Stats) -> float | None:
    """Jᵀ-vector products a problem: the probe's, or one for each iteration that is walked back."""
    if isinstance(adjoint, deq.ImplicitJVP):
        return None  # it has no probe
    walked = isinstance(adjoint, deq.Unroll | deq.Reversible)
    return float(np.mean(stats.steps) - 1) if walked else float(np.mean(probe.steps))


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


def judge(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bar with what was measured. Only numbers that the machine's load cannot change."""
    exact = max(row["worst"] for row in results["exact_pairs"])
    at = {
        row["adjoint"]: row
        for row in results["adjoints"]
        if (row["dtype"], row["radius"], row["solver"]) == ("float64", 0.9, "Broyden")
    }
    shine, jfb = at["Shine(5)"], at["JFB"]
    memory = results["memory"]["bytes"]
    growth = max(max(memory[name]) / min(memory[name]) for name in ("Implicit", "Phantom(5, 0.8)", "Reversible"))
    fit = results["memory"]["fits"]["Unroll, √L"]
    bar = lambda met, bar, got: {"met": bool(met), "bar": bar, "got": got}
    return {
        "exact modes, float64, every pair of solvers": bar(
            exact <= EXACT_BAR, f"error ≤ {EXACT_BAR:g}", f"{exact:.1e}"
        ),
        "Reversible against its own steps, float64": bar(
            results["reversible"] <= REVERSIBLE_BAR, f"error ≤ {REVERSIBLE_BAR:g}", f"{results['reversible']:.1e}"
        ),
        "Shine(5) at spectral radius 0.9": bar(
            shine["error"] <= SHINE_BAR * jfb["error"] and shine["products"] <= SHINE_PRODUCTS,
            f"≤ a third of JFB's error in ≤ {SHINE_PRODUCTS} products",
            f"{shine['error'] / jfb['error']:.3f} of it in {shine['products']:g}",
        ),
        "bytes of Implicit, Phantom and Reversible, by max_steps": bar(growth == 1, "constant", f"× {growth:.4f}"),
        "bytes of two-level checkpoints": bar(
            abs(fit["power"] - 0.5) <= 0.1, "∝ √L", f"∝ L^{fit['power']:.2f}, fitted within {fit['deviation']:.1%}"
        ),
    }


# ---- what is kept ------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Gradients against a dense float64 solve", "", f"    {results['command']}", "", conditions(results), ""]
    lines += ["## Bars", "", *plots.markdown_table(["", "bar", "measured", "met"], [
        [name, b["bar"], b["got"], "yes" if b["met"] else "**no**"] for name, b in results["bars"].items()
    ])]  # fmt: skip
    lines += ["## Adjoint × solver × dtype × spectral radius", ""]
    lines += [f"Median of the relative gradient error over {results['config']['problems']} problems, the least cosine,"]
    lines += ["evaluations of f and Jᵀ-vector products a problem, temporaries, time over `Implicit`'s. *Italic*: the"]
    lines += ["forward solve did not converge everywhere (Picard at 1.2 diverges).", ""]
    head = ["dtype", "ρ", "solver", "adjoint", "error", "cosine", "evaluations", "products", "kB", "time"]
    lines += plots.markdown_table(head, [adjoint_row(row) for row in results["adjoints"]])
    lines += [
        "## The solver of the backward equation",
        "",
        f"float64, behind a forward Anderson to {BACKWARD_RTOL:g}, to a hundredth of that.",
        "",
    ]
    head = ["ρ", "backward", "error", "products", "converged", "kB", "time / default"]
    lines += plots.markdown_table(head, [
        [r["radius"], r["backward"], f"{r['error']:.1e}", f"{r['products']:.1f}",
         share(r["backward_converged"]), f"{r['temp_bytes'] / 1e3:.0f}", f"{r['time']:.2f}"]
        for r in results["backward"]
    ])  # fmt: skip
    lines += [
        "## Its tolerance",
        "",
        "float64; gradient error (products) by the backward tolerance over the forward.",
        "",
    ]
    ratios = sorted({row["ratio"] for row in results["tolerances"]}, reverse=True)
    found = {(r["radius"], r["rtol"], r["ratio"]): r for r in results["tolerances"]}
    keys = sorted({key[:2] for key in found}, key=lambda key: (key[0], -key[1]))
    lines += plots.markdown_table(["ρ", "forward rtol", *(f"× {ratio:g}" for ratio in ratios)], [
        [rho, f"{rtol:g}", *(pair(found[rho, rtol, ratio]) for ratio in ratios)] for rho, rtol in keys
    ])  # fmt: skip
    memory = results["memory"]
    lines += ["## Memory by max_steps", "", "Temporaries in kB, float32, Picard.", ""]
    lines += plots.markdown_table(["adjoint", *(f"L = {d}" for d in memory["depths"]), "fit"], [
        [name, *(f"{size / 1e3:.1f}" for size in sizes),
         f"∝ L^{memory['fits'][name]['power']:.2f}" if name in memory["fits"] else "constant"]
        for name, sizes in memory["bytes"].items()
    ])  # fmt: skip
    return "\n".join(lines)


def pair(row: dict[str, Any]) -> str:
    return f"{row['error']:.1e} ({row['products']:.1f})"


def adjoint_row(row: dict[str, Any]) -> list[Any]:
    adjoint = row["adjoint"] if row["converged"] == 1 else f"*{row['adjoint']}*"
    count = "" if row["products"] is None else f"{row['products']:.0f}"
    return [
        row["dtype"], row["radius"], row["solver"], adjoint, f"{row['error']:.1e}", f"{row['cosine']:.3f}",
        f"{row['evaluations']:.0f}", count, f"{row['temp_bytes'] / 1e3:.0f}", f"{row['time']:.2f}",
    ]  # fmt: skip


def share(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %"


def conditions(results: dict[str, Any]) -> str:
    config, versions = results["config"], results["versions"]
    return (
        f"{config['problems']} problems of {config['dim']} numbers, seed {config['seed']}; jax {versions['jax']}, "
        f"{results['machine']['devices'][0]}; rtol {', '.join(f'{v:g} in {k}' for k, v in RTOL.items())}."
    )


COLOURS = {
    "Implicit": plots.COLOURS["implicit"],
    "Shine(0)": "#56B4E9",
    "Shine(5)": "#009E73",
    "Phantom(5, 0.8)": "#CC79A7",
    "Neumann(5)": "#E69F00",
    "JFB": "0.4",
    "Unroll": plots.COLOURS["unrolled"],
    "Reversible": "#B8A800",
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Gradient error against Jᵀ-vector products by adjoint, a panel for each spectral radius."""
    plt = plots.plt
    dtype = "float32" if "float32" in results["config"]["dtypes"] else results["config"]["dtypes"][-1]
    marks = {"Picard": "s", "Anderson": "o", "Broyden": "^"}
    radii = results["config"]["radii"]
    with plt.rc_context(plots.STYLE):
        figure, panels = plt.subplots(1, len(radii), figsize=(3.4 * len(radii), 4.4), sharey=True, layout="constrained")
        for axes, radius in zip(np.atleast_1d(panels), radii, strict=True):
            rows = [row for row in results["adjoints"] if (row["dtype"], row["radius"]) == (dtype, radius)]
            lost = sorted({row["solver"] for row in rows if row["converged"] < 1 and row["adjoint"] == "Implicit"})
            for row in rows:
                if row["adjoint"] in COLOURS and row["solver"] not in lost and np.isfinite(row["error"]):
                    x = row["products"] + 1  # the last product, with the parameters
                    axes.loglog(x, row["error"], marks[row["solver"]], color=COLOURS[row["adjoint"]], ms=6, alpha=0.8)
            kind = "contractive" if radius < 1 else "monotone"
            more = f"\n{', '.join(lost)} diverges" if lost else "\n"
            axes.set_title(f"spectral radius {radius:g}: {kind}{more}")
            axes.set_xlabel("Jᵀ-vector products a problem,\nthe one with the parameters included")
            axes.grid(alpha=0.2)
        np.atleast_1d(panels)[0].set_ylabel("relative error of the gradient (median over problems)")
        seen = {row["adjoint"] for row in results["adjoints"]}
        dots = [plt.Line2D([], [], color=c, marker="o", ls="", label=n) for n, c in COLOURS.items() if n in seen]
        dots += [plt.Line2D([], [], color="0.2", marker=m, ls="", mfc="none", label=n) for n, m in marks.items()]
        figure.legend(handles=dots, loc="outside right center", frameon=False)
        figure.suptitle(finding(results, dtype))
        figure.supxlabel(
            f"{results['command']}; {dtype}, seed {results['config']['seed']}", fontsize=8, family="monospace"
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def finding(results: dict[str, Any], dtype: str) -> str:
    at = {
        row["adjoint"]: row
        for row in results["adjoints"]
        if (row["dtype"], row["radius"], row["solver"]) == (dtype, 0.9, "Broyden")
    }
    jfb, shine, implicit = at["JFB"], at["Shine(5)"], at["Implicit"]
    return (
        f"At spectral radius 0.9, {shine['products']:.0f} products with the forward solve's memory leave "
        f"{shine['error'] / jfb['error']:.0%} of JFB's error; {implicit['products']:.0f} leave {implicit['error']:.0e}"
    )


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
        results: dict[str, Any] = {"command": "python -m experiments.gradient_study" + " --quick" * config.quick}
        results |= {"config": dataclasses.asdict(config) | {"out": None}, **lm.environment()}
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


class float64:
    """float64 within; what the caller had is restored."""

    def __enter__(self):
        self.before = jax.config.read("jax_enable_x64")
        jax.config.update("jax_enable_x64", True)

    def __exit__(self, *_):
        jax.config.update("jax_enable_x64", self.before)


if __name__ == "__main__":
    main(tyro.cli(Config))
