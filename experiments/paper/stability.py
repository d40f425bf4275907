"""What happens where the fixed point is unstable, or where there is none (reviewers 1 and 3; paper Figure 2 right).

python -m experiments.stability_study reduced
python -m experiments.stability_study figure
python -m experiments.stability_study paper
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from experiments import char_lm, lm, plots, study, trained
from experiments.gradient_study import float64
from experiments.initialization_study import stretch
from experiments.tolerance_study import angle, flat, gradient_of, reference


@dataclasses.dataclass(frozen=True)
class Config:
    """Scalar maps with known answers, the trained model's residuals, failures put in, remedies, path independence.

    python -m experiments.stability_study reduced

    You should see a spectral radius above 1 after training: plain iteration stops falling, Anderson and Broyden go on.
    """

    model: char_lm.Config = trained.REDUCED
    run: Path = Path("runs/studies/stability")
    out: Path | None = None
    evaluations: int = 150  # of a trace, as in the paper's figure
    sequences: int = 8
    injected: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 40)  # budgets of both solves, for the gradient's error
    cap: int = 3  # in training
    train_steps: int = 100
    rtol: float = 1e-3
    jacobian_weight: float = 1.0


PRESETS = {
    "reduced": ("4 minutes on one CPU core, and 3 for the model if it is not trained yet", Config()),
    "paper": (
        "a day on 8 accelerators, after the model's own training",
        Config(model=trained.PAPER, run=Path("runs/studies/stability-paper"), sequences=3, train_steps=10_000),
    ),
}


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    scalars = [row for name in SCALAR_SOLVERS for row in cells(f"scalars {name}", lambda name=name: scalar_rows(name))]
    model = trained.load(config.model)
    steps = [step for step in model.states if step >= model.config.shallow_steps]
    return {
        "seed": config.model.seed,
        "dtype": config.model.dtype,
        "warm_up": model.config.shallow_steps,
        "scalars": scalars,
        "policies": cells("policies", policy_rows),
        "traces": traces(config, model, steps, cells),
        "injected": injected(config, model, cells),
        "training": training(config, model, steps[1], cells),
    }


# ---- scalar maps whose answers are known -------------------------------------------------------------------


class Scalar(NamedTuple):
    """f(z) = c₀ + c₁z + c₂z² + c₃z³ + tanh(az), where it starts, and its real fixed points."""

    name: str
    c: tuple[float, float, float, float]
    a: float
    z0: float
    roots: tuple[float, ...]


def scalar_maps() -> list[Scalar]:
    maps = [Scalar("1.2 z + 1", (1.0, 1.2, 0.0, 0.0), 0.0, 0.0, (-5.0,))]
    maps += [Scalar(f"{r:g} z (1 − z)", (0.0, r, -r, 0.0), 0.0, 0.4, (0.0, 1 - 1 / r)) for r in (2.8, 3.2, 3.5, 3.9)]
    for a in (0.5, 0.9, 1.1, 2.0, 4.0):
        # z = tanh(a z): one root up to a = 1, where two others leave it and 0 becomes unstable
        z = 1.0
        for _ in range(2000):
            z = float(np.tanh(a * z))
        roots = (0.0,) if a <= 1 else (-z, 0.0, z)
        maps += [Scalar(f"tanh({a:g} z)", (0.0, 0.0, 0.0, 0.0), a, 0.5, roots)]
    maps += [
        Scalar("z − z³ (f′ = 1 at 0)", (0.0, 1.0, 0.0, -1.0), 0.0, 0.5, (0.0,)),
        Scalar("z² + 1 (no root)", (1.0, 0.0, 1.0, 0.0), 0.0, 0.0, ()),
        Scalar("z + 0.01 (drifts)", (0.01, 1.0, 0.0, 0.0), 0.0, 0.0, ()),
    ]
    return maps


def scalar_cell(z, c, a):
    return c[:, 0] + c[:, 1] * z + c[:, 2] * z**2 + c[:, 3] * z**3 + jnp.tanh(a * z)


# The absolute one for roots at zero, where a relative tolerance is never met.
SCALAR_BUDGET: dict[str, Any] = dict(rtol=1e-10, atol=1e-10, max_steps=200)
SCALAR_SOLVERS: dict[str, Any] = {
    "Picard": deq.Picard(),
    "Picard, damping 0.5": deq.Picard(damping=0.5),
    "Anderson": deq.Anderson(),
    "Broyden": deq.Broyden(),
    "NewtonKrylov": deq.NewtonKrylov(),
    "Robust": deq.Robust(),
}


def solve_scalars(solver: Any, adjoint: Any) -> tuple[np.ndarray, Any, np.ndarray, Any]:
    """(z, forward statistics, dz/dc₀, backward statistics) of all maps, each a problem of its own."""
    maps = scalar_maps()
    c, a, z0 = (jnp.array([getattr(m, name) for m in maps]) for name in ("c", "a", "z0"))

    @jax.jit
    def run(c, probe):
        def total(c, probe):
            options: dict[str, Any] = dict(solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe)
            z, stats = deq.fixed_point(scalar_cell, z0, c, a, **options)
            return z.sum(), (z, stats)

        (c_bar, backward), (z, stats) = jax.grad(total, argnums=(0, 1), has_aux=True)(c, probe)
        return z, stats, c_bar[:, 0], backward

    return jax.tree.map(np.asarray, run(c, deq.Probe.zeros((len(maps),))))


def scalar_rows(name: str) -> list[dict[str, Any]]:
    solver = SCALAR_SOLVERS[name]
    with float64():
        solver = dataclasses.replace(solver, **SCALAR_BUDGET)
        z, stats, slope, backward = solve_scalars(solver, deq.Implicit())
    rows = []
    for i, m in enumerate(scalar_maps()):
        root = min(m.roots, key=lambda r: abs(r - z[i])) if m.roots else None
        # dz/dc₀ = 1 / (1 − f′(z))
        tangent = m.c[1] + 2 * m.c[2] * (root or 0) + 3 * m.c[3] * (root or 0) ** 2
        tangent += m.a * (1 - np.tanh(m.a * (root or 0)) ** 2)
        rows.append({
            "map": m.name,
            "solver": name,
            "status": deq.Status(int(stats.status[i])).name,
            "evaluations": int(stats.steps[i]),
            "z": z[i],
            "residual": stats.residual[i],
            "distance": None if root is None else abs(z[i] - root),
            "root": root,
            "tangent": None if root is None else tangent,
            "gradient": slope[i],
            "expected": None if root is None or tangent == 1 else 1 / (1 - tangent),
            # Here, for what is kept has six digits.
            "error": None if root is None or tangent == 1 else abs(slope[i] * (1 - tangent) - 1),
            "backward": deq.Status(int(backward.status[i])).name,
        })  # fmt: skip
    return rows


def policy_rows() -> list[dict[str, Any]]:
    """The gradient of the maps without a root, under each policy: finite, and with a flag."""
    rows = []
    for name in ("Picard", "Anderson", "Broyden"):
        for policy in deq.OnFailure:
            with float64():
                solver = dataclasses.replace(SCALAR_SOLVERS[name], **SCALAR_BUDGET)
                z, stats, slope, backward = solve_scalars(solver, deq.Implicit(on_failure=policy))
            for i, m in enumerate(scalar_maps()):
                if not m.roots:
                    rows.append({
                        "map": m.name,
                        "solver": name,
                        "policy": policy.name,
                        "status": deq.Status(int(stats.status[i])).name,
                        "z": z[i],
                        "residual": stats.residual[i],
                        "gradient": slope[i],
                        "finite": bool(np.isfinite(slope[i])),
                        "backward": deq.Status(int(backward.status[i])).name,
                    })  # fmt: skip
    return rows


# ---- the trained model -------------------------------------------------------------------------------------


def trace_solvers(config: Config) -> dict[str, Any]:
    options: dict[str, Any] = dict(rtol=0.0, max_steps=config.evaluations)
    return {
        "Picard": deq.Picard(**options),
        "Picard, damping 0.5": deq.Picard(**options, damping=0.5),
        "Anderson": deq.Anderson(**options, history=6),
        "Broyden": deq.Broyden(**options, rank=config.evaluations),
    }


def state_of_affairs(config: Config, model: trained.Trained) -> Callable:
    """A compiled look at parameters: spectral radius, norm of the Jacobian, path independence, at held-out text."""
    f, context_of, z0 = trained.held_out(model, config.sequences)
    tight = deq.Anderson(rtol=1e-4, max_steps=config.evaluations, history=12)

    @jax.jit
    def look(context):
        solve = lambda start, solver=tight: deq.solve(f, start, context, solver=solver, batch_ndim=1)
        found = solve(z0)
        other = solve(jnp.roll(found.value, 1, axis=0))
        noise = solve(jax.random.normal(jax.random.key(0), z0.shape, z0.dtype))
        usual = solve(z0, dataclasses.replace(tight, rtol=config.rtol))

        def cosine(a, b):
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            return jnp.mean(jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)))

        return {
            "radius": deq.stability.spectral_radius(f, found.value, context, batch_ndim=1, iterations=80),
            "stretch": stretch(f, found.value, context),
            "converged": found.stats.converged.mean(),
            "residual": found.stats.relative_residual,
            # Anil et al. (2022): the asymptotic alignment of what different starts lead to.
            "alignment_shuffled": cosine(found.value, other.value),
            "alignment_noise": cosine(found.value, noise.value),
            "shuffled_converged": other.stats.converged.mean(),
            "evaluations": usual.stats.steps.mean(),
        }

    return lambda params: look(context_of(params))


def traces(config: Config, model: trained.Trained, steps: Sequence[int], cells: study.Cells) -> list[dict[str, Any]]:
    """The residual of every solver by evaluations, at each milestone, and how stable the equilibrium is there."""
    f, context_of, z0 = trained.held_out(model, config.sequences)
    look = state_of_affairs(config, model)
    fold = deq.ResidualTrace(config.evaluations)
    compiled = {
        name: jax.jit(lambda context, solver=solver: deq.solve(f, z0, context, solver=solver, batch_ndim=1, fold=fold))
        for name, solver in trace_solvers(config).items()
    }
    rows = []
    for step in steps:
        params = model.states[step].params
        row: dict[str, Any] = {"step": step, **cells(f"equilibrium at step {step}", lambda: look(params))}
        for name, run in compiled.items():

            def curve():
                solved = run(context_of(params))
                return {
                    "residual": trained.median_trace(solved),
                    "lowest": solved.stats.relative_residual,
                    "converged": float(np.mean(np.asarray(solved.stats.relative_residual) <= config.rtol)),
                }

            row[name] = cells(f"trace at step {step}, {name}", curve)
        rows.append(row)
    return rows


def injected(config: Config, model: trained.Trained, cells: study.Cells) -> list[dict[str, Any]]:
    """The gradient where both solves are cut off, against the float64 one, under each policy."""
    state, gradient = model.last, gradient_of(model.graphdef)
    segment = model.batches[int(state.step)]
    exact: list[np.ndarray] = []

    def one(cap: int, policy: deq.OnFailure) -> dict[str, Any]:
        if not exact:
            exact.append(reference(model, state, segment)[0])
        budget: dict[str, Any] = dict(rtol=config.rtol, max_steps=trained.swept(cap))
        adjoint = deq.Implicit(deq.Anderson(**budget, history=12), on_failure=policy)
        grads, told = gradient(state.params, segment, state.carry, deq.Anderson(**budget, history=6), adjoint)
        return angle(grads, exact[0]) | told | {"finite": bool(np.isfinite(flat(grads)).all())}

    return [
        {"cap": cap, "policy": policy.name} | cells(f"gradient cap {cap}, {policy.name}", lambda: one(cap, policy))
        for policy in deq.OnFailure
        for cap in config.injected
    ]


def training(config: Config, model: trained.Trained, first: int, cells: study.Cells) -> list[dict[str, Any]]:
    """Training goes on from one state: sound, with solves cut off, with a penalty on the Jacobian."""
    segments = lm.evaluation_segments(model.corpus.valid, char_lm.EVALUATION_BATCH, model.config.length)
    evaluate = lm.make_evaluate(model.graphdef, segments, deq.Anderson())
    look = state_of_affairs(config, model)
    go, penalised = trained.continuing(model), trained.continuing(model, jacobian_weight=config.jacobian_weight)
    full = int(config.model.solver.max_steps)

    def one(forward: int, backward: int, policy: deq.OnFailure, go: Callable = go) -> dict[str, Any]:
        solver = deq.Anderson(rtol=config.rtol, max_steps=trained.swept(forward), history=6)
        inner = deq.Anderson(rtol=config.rtol, max_steps=trained.swept(backward), history=12)
        state, log = go(model.states[first], solver, deq.Implicit(inner, on_failure=policy), config.train_steps)
        tight = deq.Anderson(rtol=1e-4, max_steps=trained.swept(100), history=6)
        at_tight, as_trained = (evaluate(state.params, 3, s) for s in (tight, solver))
        return {
            "curve": log["loss"],
            "valid_tight": at_tight.loss,
            "valid_as_trained": as_trained.loss,
            "grad_norm": log["grad_norm"],
            "skipped": int(log["skipped"].sum()),
            **look(state.params),
        }

    keep, zero, one_step = deq.OnFailure.KEEP, deq.OnFailure.ZERO, deq.OnFailure.ONE_STEP
    cap = config.cap
    runs: dict[str, Callable] = {
        "sound": lambda: one(full, full, keep),
        f"forward cap {cap}": lambda: one(cap, full, keep),
        f"backward cap {cap}": lambda: one(full, cap, keep),
        f"both caps {cap}, KEEP": lambda: one(cap, cap, keep),
        f"both caps {cap}, ONE_STEP": lambda: one(cap, cap, one_step),
        f"both caps {cap}, ZERO": lambda: one(cap, cap, zero),
        f"Jacobian penalty {config.jacobian_weight:g}": lambda: one(full, full, keep, penalised),
    }
    return [{"run": name, "from": first} | cells(f"training, {name}", run) for name, run in runs.items()]


# ---- what is kept ------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    lines = ["# Stability", "", f"    {results['command']}", ""]
    lines += study.paragraph(
        study.conditions(results, dtype=f"{results['dtype']} (scalars: float64)", seed=results["seed"]) + ".",
        f"Gradient: Implicit. {results['cpu_seconds']:.0f} CPU seconds.",
    )
    lines += ["## Scalar maps", ""]
    lines += study.paragraph(
        "rtol = atol = 1e-10, 200 evaluations. Each entry: the status (evaluations), the root found or the best",
        "z, and the relative error of dz/dc, of f(z) + c, against 1/(1 − f′).",
    )
    names = list(dict.fromkeys(row["solver"] for row in results["scalars"]))
    found = {(row["map"], row["solver"]): row for row in results["scalars"]}
    maps = list(dict.fromkeys(row["map"] for row in results["scalars"]))
    lines += plots.markdown_table(["f(z)", *names], [[m, *(scalar_entry(found[m, n]) for n in names)] for m in maps])
    lines += ["## No fixed point: the gradient by policy", ""]
    numeric = "z", "residual", "gradient"
    lines += plots.markdown_table(["f(z)", "solver", "on_failure", "status", "z", "residual", "dz/dc", "backward"], [
        [r["map"], r["solver"], r["policy"], r["status"], *(short(r[k]) for k in numeric), r["backward"]]
        for r in results["policies"]
    ])  # fmt: skip
    lines += ["## The model as it is trained", ""]
    sequences, evaluations = config["sequences"], config["evaluations"]
    lines += study.paragraph(
        f"Held-out text, {sequences} sequences. By solver: the lowest relative residual of {evaluations} evaluations,",
        "median over sequences. Alignment: cosine of the equilibrium from zero to that from another's, or noise.",
    )
    solvers = [name for name in results["traces"][0] if isinstance(results["traces"][0][name], dict)]
    head = ["step", "ρ", "‖J‖", f"evaluations to {config['rtol']:g}", *solvers, "alignment, other's", "noise"]
    lines += plots.markdown_table(head, [
        [r["step"], middle(r["radius"]), middle(r["stretch"]), f"{r['evaluations']:.1f}",
         *(f"{np.median(study.numbers(r[s]['lowest'])):.0e}" for s in solvers),
         f"{r['alignment_shuffled']:.4f}", f"{r['alignment_noise']:.4f}"]
        for r in results["traces"]
    ])  # fmt: skip
    lines += ["## Failures put in: the gradient", ""]
    lines += study.paragraph(
        "Both solves cut off; relative error (cosine) to the float64 gradient, at the last step's parameters."
    )
    policies = list(dict.fromkeys(r["policy"] for r in results["injected"]))
    by = {(r["cap"], r["policy"]): r for r in results["injected"]}
    caps = list(dict.fromkeys(r["cap"] for r in results["injected"]))
    lines += plots.markdown_table(["cap", *policies], [
        [cap, *(f"{by[cap, p]['error']:.3f} ({by[cap, p]['cosine']:.3f})" for p in policies)] for cap in caps
    ])  # fmt: skip
    lines += ["## Failures put in, and a remedy: training", ""]
    lines += study.paragraph(
        f"{config['train_steps']} steps from step {results['training'][0]['from']}; validation at 1e-4, and with",
        "the solver as trained, in nats.",
    )
    head = [
        "",
        "training, last quarter",
        "validation",
        "as trained",
        "ρ",
        "‖J‖",
        f"evaluations to {config['rtol']:g}",
        "alignment",
        "skipped",
    ]
    lines += plots.markdown_table(head, [
        [r["run"], short(float(np.mean(last_quarter(r["curve"])))),
         f"{r['valid_tight']:.4f}", f"{r['valid_as_trained']:.4f}",
         middle(r["radius"]), middle(r["stretch"]), f"{r['evaluations']:.1f}",
         f"{r['alignment_shuffled']:.4f}", r["skipped"]]
        for r in results["training"]
    ])  # fmt: skip
    return "\n".join(lines)


def last_quarter(curve: Sequence[float | None]) -> np.ndarray:
    return study.numbers(curve[-max(1, len(curve) // 4) :])


def middle(values: Sequence[float | None]) -> str:
    return short(float(np.median(study.numbers(values))))


def short(x: float | None) -> str:
    return "not finite" if x is None or not np.isfinite(x) else f"{x:.4g}"


def scalar_entry(row: dict[str, Any]) -> str:
    near = row["distance"] is not None and row["distance"] <= 1e-6
    where = f"z = {row['root']:.4g}" if near else f"best z = {short(row['z'])}"
    told = f"{row['status']} ({row['evaluations']}), {where}"
    if near and row["error"] is not None:
        told += f", {row['error']:.0e}"
    return told


PAPER_NORM = 560  # of z in the paper's batch: the residual at z = 0
PAPER = {"weight_tied": "Picard", "deq": "Broyden"}


def draw(results: dict[str, Any], path: Path) -> None:
    """The paper's Figure 2 right beside ours; the gradient and the loss under failures."""
    plt = plots.plt
    colours = plots.COLOURS | {"Picard, damping 0.5": "#F0C97A"}
    rows = [row for row in results["traces"] if row["step"] > results["warm_up"]]
    early, late = rows[0], rows[-1]
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(14, 8.2), layout="constrained")
        for panel, epoch, row in (axes[0, 0], 1, early), (axes[0, 1], 12, late):
            for series, name in PAPER.items():
                x, y = study.published("residual_vs_nfe", f"{series}_ep{epoch}").T
                order = np.argsort(x)
                keep = x[order] <= len(row["Picard"]["residual"])
                panel.semilogy(
                    x[order][keep],
                    y[order][keep] / PAPER_NORM,
                    "--",
                    lw=1,
                    color=colours[name],
                    label=f"paper, {name}, epoch {epoch}",
                )
            for name, curve in row.items():
                if isinstance(curve, dict):
                    residual = study.numbers(curve["residual"])
                    panel.semilogy(np.arange(1, len(residual) + 1), residual, lw=1.5, color=colours[name], label=name)
            panel.set(xlabel="evaluations of f", ylabel="relative residual, median over sequences", ylim=(1e-10, 10))
            radius = np.median(study.numbers(row["radius"]))
            reached = [
                n for n, c in row.items() if isinstance(c, dict) and np.median(study.numbers(c["lowest"])) <= 1e-3
            ]
            panel.set_title(
                plots.fill(
                    f"step {row['step']}, spectral radius {radius:.2f}: "
                    f"1e-3 is reached by {', '.join(reached) or 'none'}"
                )
            )
            panel.legend(frameon=False, fontsize=7, ncols=2, loc="lower left")
        draw_scalars(axes[0, 2], results)
        draw_injected(axes[1, 0], results)
        draw_training(axes[1, 1], results)
        draw_radius(axes[1, 2], results)
        note = f"{results['command']}; " + study.conditions(results, dtype=results["dtype"], seed=results["seed"])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_scalars(axes: Any, results: dict[str, Any]) -> None:
    """A map a row, a solver a column: what the status said, and whether it was right."""
    names = list(dict.fromkeys(row["solver"] for row in results["scalars"]))
    maps = list(dict.fromkeys(row["map"] for row in results["scalars"]))
    false = 0
    for row in results["scalars"]:
        x, y = names.index(row["solver"]), maps.index(row["map"])
        claimed = row["status"] == "CONVERGED"
        # A root where f′ = 1 is met with a residual that is the cube of the distance: near enough counts there.
        near = row["distance"] is not None and row["distance"] <= (1e-2 if row["tangent"] == 1 else 1e-6)
        false += claimed and not near
        colour = "#009E73" if claimed and near else "#D55E00" if claimed else "0.75"
        axes.add_patch(plots.plt.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour, lw=0))
        axes.text(x, y, row["status"].replace("_", " ").lower(), fontsize=6, ha="center", va="center")
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(maps) - 0.4, -0.6))
    axes.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=7)
    axes.set_yticks(range(len(maps)), maps, fontsize=7)
    axes.set_title(plots.fill(f"scalar maps: {false} false claims of convergence (green: a true root; grey: a flag)"))


POLICY_COLOURS = {"KEEP": "#0072B2", "ZERO": "0.4", "ONE_STEP": "#D55E00"}


def draw_injected(axes: Any, results: dict[str, Any]) -> None:
    for policy, colour in POLICY_COLOURS.items():
        rows = [row for row in results["injected"] if row["policy"] == policy]
        axes.loglog(
            [r["cap"] for r in rows],
            [max(1 - r["cosine"], 1e-9) for r in rows],
            "o-",
            color=colour,
            label=f"on_failure {policy}",
        )
    caps = sorted({row["cap"] for row in results["injected"]})
    axes.set_xticks(caps, [str(c) for c in caps])
    axes.minorticks_off()
    finite = all(row["finite"] for row in results["injected"])
    at = next(row for row in results["injected"] if (row["cap"], row["policy"]) == (3, "KEEP"))
    rest = "every gradient is finite" if finite else "not every gradient is finite"
    axes.set_title(plots.fill(f"both solves cut off at 3: cosine {at['cosine']:.2f}; {rest}"))
    axes.set(xlabel="evaluations allowed, forward and backward", ylabel="1 − cosine to the float64 gradient")
    axes.legend(frameon=False, fontsize=8)


RUN_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#D55E00", "0.2", "0.6", "#009E73")


def draw_training(axes: Any, results: dict[str, Any]) -> None:
    window = max(1, len(results["training"][0]["curve"]) // 10)
    for row, colour in zip(results["training"], RUN_COLOURS, strict=True):
        smooth = np.convolve(study.numbers(row["curve"]), np.ones(window) / window, "valid")
        x = row["from"] + window + np.arange(len(smooth))
        axes.plot(x, smooth, color=colour, lw=1.2, label=f"{row['run']}: validation {row['valid_tight']:.3f}")
    sound = results["training"][0]["valid_tight"]
    worst = max(results["training"], key=lambda row: row["valid_tight"] - sound)
    axes.set_title(
        plots.fill(f"training with failures: at worst {worst['valid_tight'] - sound:+.3f} nats ({worst['run']})")
    )
    axes.set(xlabel="optimizer step", ylabel=f"training loss (nats/token, mean of {window} steps)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.6 * (high - low))  # room for the legend
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def draw_radius(axes: Any, results: dict[str, Any]) -> None:
    steps = [row["step"] for row in results["traces"]]
    radius = [np.median(study.numbers(row["radius"])) for row in results["traces"]]
    axes.plot(steps, radius, "o-", color="#0072B2", label="trained as it is")
    penalised = results["training"][-1]
    end = penalised["from"] + len(penalised["curve"])
    after = np.median(study.numbers(penalised["radius"]))
    sound = np.median(study.numbers(results["training"][0]["radius"]))
    axes.plot(
        [penalised["from"], end],
        [radius[steps.index(penalised["from"])], after],
        "s--",
        color="#009E73",
        label=penalised["run"],
    )
    axes.axhline(1, color="0.6", lw=0.8, ls=":")
    axes.set_title(
        plots.fill(
            f"spectral radius {radius[0]:.2f} to {radius[-1]:.2f} in training; "
            f"with the penalty {after:.2f} at step {end}, without {sound:.2f}"
        )
    )
    axes.set(xlabel="optimizer step", ylabel="spectral radius at z*, median over sequences")
    axes.legend(frameon=False, fontsize=8)


def main(args: Sequence[str] | None = None) -> None:
    study.run("stability", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
