"""Tables and figure of the runtime page, with the published ratios for comparison."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plots, study
from experiments.shared.timing import over

# Training and inference time over the explicit network's of 18 and of 70 layers: the paper, section 5.3.
PUBLISHED = {"DEQTransformer": (2.82, 1.76), "DEQTrellisNet": (2.40, 1.64)}
TRAINED = ("own layers", "tied layers", "Implicit", "Phantom(5)")


def weights_of(name: str) -> str:
    """The run whose weights are timed: JFB uses the weights that Implicit trained."""
    return name if name in TRAINED else "Implicit"


def base_of(rows: dict[str, Any]) -> str:
    return "own layers" if "own layers" in rows else "tied layers"


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    shape, told = config["shape"], study.conditions(results, dtype="float32", seed=config["seed"])
    lines = ["# Time of training and of inference", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += [f"{config['data']} by {config['level']}s, batch {shape['batch']}, T {shape['length']}, width"]
    lines += [
        f"{shape['dim']}, inner {shape['inner_dim']}; {config['layers']} explicit layers. Processor time, programs"
    ]
    lines += [
        f"in turn {config['repeats']} times at trained weights: ratios of minima (of medians). The equilibrium is"
    ]
    lines += [f"solved to a relative residual of {config['rtol']:g} in at most {config['max_steps']} evaluations.", ""]
    for family, part in results["families"].items():
        lines += family_table(family, part)
    return "\n".join(lines)


def family_table(family: str, part: dict[str, Any]) -> list[str]:
    runs, training, inference, to = part["runs"], part["training"], part["inference"], part["to_loss"]
    base, told = base_of(training), PUBLISHED[family]
    lines = [f"## {family}", "", f"Over {base}; the paper has {told[0]} for training and {told[1]} for inference.", ""]
    blank = lambda row, key: f"{row[key]:.1f}" if key in row else ""
    head = ["training", "parameters", f"time / {base}", "time / tied layers", "evaluations forward", "backward"]
    lines += plots.markdown_table(head, [
        [name, f"{runs[weights_of(name)]['parameters']:,}", over(training, name, base),
         over(training, name, "tied layers"), blank(row, "fwd_steps"), blank(row, "bwd_steps")]
        for name, row in training.items()
    ])  # fmt: skip
    head = ["inference", f"time / {base}", "time / tied layers", "evaluations"]
    lines += plots.markdown_table(head, [
        [name, over(inference, name, base), over(inference, name, "tied layers"), blank(row, "fwd_steps")]
        for name, row in inference.items()
    ])  # fmt: skip
    lines += ["Where a tolerance is named, four times as many evaluations are allowed as in training.", ""]
    lines += [
        f"Processor time to a validation loss of {to['loss']:.3f}, which all of them reach, the warm-up through two"
    ]
    lines += ["layers included; and the loss at the end of each run.", ""]
    lines += plots.markdown_table(["", f"time to {to['loss']:.3f} / {base}", "steps of the run", "loss at its end"], [
        [name, f"{seconds / to['cpu_seconds'][base]:.2f}", runs[name]["curve"][-1]["step"],
         f"{runs[name]['curve'][-1]['valid_loss']:.3f}"]
        for name, seconds in to["cpu_seconds"].items()
    ])  # fmt: skip
    return lines


COLORS = {
    "own layers": "0.35",
    "tied layers": plots.COLORS["unrolled"],
    "Implicit": plots.ADJOINT_COLORS["Implicit"],
    "Phantom(5)": plots.ADJOINT_COLORS["Phantom(5, 0.8)"],
    "JFB": plots.ADJOINT_COLORS["JFB"],
}


def draw(results: dict[str, Any], path: Path) -> None:
    """One row per family: bars of training and inference, and the validation loss by processor time."""
    plt = plots.plt
    config, families = results["config"], results["families"]
    with plt.rc_context(plots.STYLE):
        size = (12.5, 0.6 + 4.2 * len(families))
        figure, rows = plt.subplots(len(families), 2, figsize=size, layout="constrained", squeeze=False)
        for (bars, curves), (family, part) in zip(rows, families.items(), strict=True):
            draw_ratios(bars, family, part, config["layers"])
            draw_curves(curves, part)
        note = f"{results['command']}; float32, seed {config['seed']}; {study.shared_cores(results['machine'])}"
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_ratios(axes: Any, family: str, part: dict[str, Any], layers: int) -> None:
    base, labels, ratios, colors = base_of(part["training"]), [], [], []
    for kind in ("training", "inference"):
        for name, row in part[kind].items():
            labels.append(f"{kind}: {name}")
            ratios.append(row["cpu_min"] / part[kind][base]["cpu_min"])
            colors.append(COLORS.get(name, COLORS["Implicit"]))
    places = np.arange(len(labels))[::-1]
    axes.barh(places, ratios, color=colors, height=0.7)
    for place, ratio in zip(places, ratios, strict=True):
        axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(places, labels)
    axes.axvline(1, color="0.6", lw=0.8, ls=":")
    for published, kind in zip(PUBLISHED[family], ("training", "inference"), strict=True):
        axes.axvline(published, color="0.2", lw=0.8, ls="--")
        axes.text(published, len(labels) - 0.4, f"paper,\n{kind}", fontsize=7, ha="center")
    axes.set_xlabel(f"processor time relative to {base}")
    train = part["training"]["Implicit"]["cpu_min"] / part["training"][base]["cpu_min"]
    axes.set_title(
        plots.fill(f"{family}: a training step at the equilibrium takes {train:.2f}× one of {layers} {base}"), pad=24
    )


def draw_curves(axes: Any, part: dict[str, Any]) -> None:
    to, base = part["to_loss"], base_of(part["training"])
    unit = to["cpu_seconds"][base]
    for name, run in part["runs"].items():
        x = [point["cpu_seconds"] / unit for point in run["curve"]]
        y = [point["valid_loss"] for point in run["curve"]]
        axes.plot(x[1:], y[1:], "o-", ms=3, lw=1.3, color=COLORS[name], label=name)
    axes.axhline(to["loss"], color="0.6", lw=0.8, ls=":")
    ratio = to["cpu_seconds"]["Implicit"] / unit
    axes.set_title(
        plots.fill(f"the equilibrium reaches {to['loss']:.3f} nats in {ratio:.2f}× the time of {base}"), pad=24
    )
    axes.set(
        xlabel=f"processor time relative to {base} at loss {to['loss']:.3f}", ylabel="validation loss (nats/token)"
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
