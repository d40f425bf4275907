"""Tables and figure of the stability page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plots, study


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
    lines += ["## The model during training", ""]
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
    colors = plots.COLORS | {"Picard, damping 0.5": "#F0C97A"}
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
                    color=colors[name],
                    label=f"paper, {name}, epoch {epoch}",
                )
            for name, curve in row.items():
                if isinstance(curve, dict):
                    residual = study.numbers(curve["residual"])
                    panel.semilogy(np.arange(1, len(residual) + 1), residual, lw=1.5, color=colors[name], label=name)
            panel.set(xlabel="evaluations of f", ylabel="relative residual, median over sequences", ylim=(1e-10, 10))
            radius = np.median(study.numbers(row["radius"]))
            reached = [
                n for n, c in row.items() if isinstance(c, dict) and np.median(study.numbers(c["lowest"])) <= 1e-3
            ]
            panel.set_title(
                plots.fill(
                    f"step {row['step']}, spectral radius {radius:.2f}: {', '.join(reached) or 'none'} reach 1e-3"
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
    """One row per map, one column per solver: the status, and whether it was right."""
    names = list(dict.fromkeys(row["solver"] for row in results["scalars"]))
    maps = list(dict.fromkeys(row["map"] for row in results["scalars"]))
    false = 0
    for row in results["scalars"]:
        x, y = names.index(row["solver"]), maps.index(row["map"])
        claimed = row["status"] == "CONVERGED"
        # At a root where f′ = 1 the residual is the cube of the distance, so an approximate root counts there.
        near = row["distance"] is not None and row["distance"] <= (1e-2 if row["tangent"] == 1 else 1e-6)
        false += claimed and not near
        color = "#009E73" if claimed and near else "#D55E00" if claimed else "0.75"
        axes.add_patch(plots.plt.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=color, lw=0))
        axes.text(x, y, row["status"].replace("_", " ").lower(), fontsize=6, ha="center", va="center")
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(maps) - 0.4, -0.6))
    axes.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=7)
    axes.set_yticks(range(len(maps)), maps, fontsize=7)
    axes.set_title(
        plots.fill(
            f"scalar maps: {false} false claims of convergence (green: a true root; gray: a failure that is flagged)"
        )
    )


POLICY_COLORS = {"KEEP": "#0072B2", "ZERO": "0.4", "ONE_STEP": "#D55E00"}


def draw_injected(axes: Any, results: dict[str, Any]) -> None:
    for policy, color in POLICY_COLORS.items():
        rows = [row for row in results["injected"] if row["policy"] == policy]
        axes.loglog(
            [r["cap"] for r in rows],
            [max(1 - r["cosine"], 1e-9) for r in rows],
            "o-",
            color=color,
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


RUN_COLORS = ("#0072B2", "#E69F00", "#CC79A7", "#D55E00", "0.2", "0.6", "#009E73")


def draw_training(axes: Any, results: dict[str, Any]) -> None:
    window = max(1, len(results["training"][0]["curve"]) // 10)
    for row, color in zip(results["training"], RUN_COLORS, strict=True):
        smooth = np.convolve(study.numbers(row["curve"]), np.ones(window) / window, "valid")
        x = row["from"] + window + np.arange(len(smooth))
        axes.plot(x, smooth, color=color, lw=1.2, label=f"{row['run']}: validation {row['valid_tight']:.3f}")
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
    axes.plot(steps, radius, "o-", color="#0072B2", label="trained without penalty")
    penalized = results["training"][-1]
    end = penalized["from"] + len(penalized["curve"])
    after = np.median(study.numbers(penalized["radius"]))
    sound = np.median(study.numbers(results["training"][0]["radius"]))
    axes.plot(
        [penalized["from"], end],
        [radius[steps.index(penalized["from"])], after],
        "s--",
        color="#009E73",
        label=penalized["run"],
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
