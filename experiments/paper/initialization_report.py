"""Table and figure of the initialization page."""

from pathlib import Path
from typing import Any

from experiments.shared import plots, study


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    lines = ["# Initialization", "", f"    {results['command']}", ""]
    lines += study.paragraph(
        study.conditions(results, dtype=results["dtype"], seed=results["seed"], gradient="Implicit()") + ".",
        f"dim {config['dim']}, inner {config['inner_dim']}, T = {config['length']}, {config['steps']} steps of Adam,",
        f"Anderson to {config['rtol']:g}, {config['max_steps']} evaluations; {results['cpu_seconds']:.0f} CPU seconds.",
    )
    lines += study.paragraph(
        "Gain: the entries' standard deviation times √fan_in. ρ is the spectral radius of ∂f/∂z at z*, ‖J‖ its norm",
        "(f is non-expansive there if it is at most 1), both medians over sequences. Anderson and Broyden: evaluations",
        "from z = 0; Picard: solves that converge; converged: the share of the solves in training that did. *Italic*:",
        f"less than half of the solves of {config['measure_steps']} evaluations converged, so that z* is only the best",
        "iterate. Each pair is before → after training.",
    )
    head = [
        "LN",
        "weight norm",
        "ensemble",
        "gain",
        "ρ",
        "‖J‖",
        "Anderson",
        "Broyden",
        "Picard",
        "loss",
        "converged",
        "diverged at",
    ]
    lines += plots.markdown_table(head, [row_of(row) for row in results["rows"]])
    return "\n".join(lines)


def row_of(row: dict[str, Any]) -> list[Any]:
    before, after = row["before"], row["after"]

    def arrow(key: str, form: str, sure: str = "converged") -> str:
        told = ["–" if r[key] is None else form.format(r[key]) for r in (before, after)]
        told = [f"*{t}*" if not (r[sure] or 0) >= 0.5 else t for t, r in zip(told, (before, after), strict=True)]
        return " → ".join(told)

    return [
        row["layer_norm"],
        "on" if row["weight_norm"] else "off",
        row["ensemble"],
        f"{row['gain']:g}",
        arrow("radius", "{:.2f}"),
        arrow("stretch", "{:.1f}"),
        arrow("evaluations", "{:.0f}"),
        arrow("broyden", "{:.0f}", "broyden_converged"),
        " → ".join(f"{100 * (r['picard_converged'] or 0):.0f} %" for r in (before, after)),
        arrow("loss", "{:.2f}"),
        f"{100 * (row['training_converged'] or 0):.0f} %",
        "" if row["diverged_at"] is None else row["diverged_at"],
    ]


EDGE = 12.0  # the panels of spectral radii end here; larger values are drawn at the edge
MARKS = {"Gaussian": "o", "orthogonal": "s", "symmetric": "^"}
NORM_COLORS = {"post": "#0072B2", "pre": "#D55E00", "none": "0.4"}


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel each for the spectral radius before and after training, and for the loss, by gain."""
    plt = plots.plt
    panels = [
        ("before", "radius", "spectral radius at z*, before training"),
        ("after", "radius", "spectral radius at z*, after"),
        ("after", "loss", "validation loss after (nats/char)"),
    ]
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
        for panel, (when, key, label) in zip(axes, panels, strict=True):
            for row in results["rows"]:
                value = row[when][key]
                if value is None:
                    continue
                sure = (row[when]["converged"] or 0) >= 0.5
                color = NORM_COLORS[row["layer_norm"]]
                # Points with the same gain would hide each other, so they stand side by side.
                shift = 1 + 0.12 * (list(MARKS).index(row["ensemble"]) - 1) + (0.06 if row["weight_norm"] else 0)
                panel.plot(
                    row["gain"] * shift,
                    min(value, EDGE) if key == "radius" else value,
                    MARKS[row["ensemble"]],
                    ms=6,
                    color=color,
                    mfc=color if row["weight_norm"] and sure else "none",
                    alpha=1 if sure else 0.35,
                )
            panel.set(xscale="log", xlabel="gain: standard deviation × √fan_in", ylabel=label)
            gains = sorted({row["gain"] for row in results["rows"]})
            panel.set_xticks(gains, [f"{g:g}" for g in gains])
            panel.minorticks_off()
            if key == "radius":
                panel.axhline(1, color="0.6", lw=0.8, ls=":")
                panel.set_yscale("log")
                panel.set_ylim(0.6, EDGE * 1.15)
                panel.set_yticks([0.7, 1, 2, 5, EDGE], ["0.7", "1", "2", "5", f"≥ {EDGE:g}"])
                panel.minorticks_off()
        losses = [row["after"]["loss"] for row in results["rows"] if row["after"]["loss"] is not None]
        axes[2].set_ylim(min(losses) - 0.1, results["uniform_loss"] + 0.3)
        axes[2].axhline(results["uniform_loss"], color="0.6", lw=0.8, ls=":")
        for panel, title in zip(axes, findings(results), strict=True):
            panel.set_title(plots.fill(title))
        handles = [plt.Line2D([], [], color=c, marker="o", ls="", label=f"LN {n}") for n, c in NORM_COLORS.items()]
        handles += [plt.Line2D([], [], color="0.2", marker=m, ls="", mfc="none", label=n) for n, m in MARKS.items()]
        handles += [
            plt.Line2D([], [], color="0.2", marker="o", ls="", label="filled: weight norm"),
            plt.Line2D([], [], color="0.2", marker="o", ls="", mfc="none", alpha=0.35, label="pale: no z* found"),
        ]
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
        note = f"{results['command']}; " + study.conditions(results, dtype=results["dtype"], seed=results["seed"])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def findings(results: dict[str, Any]) -> tuple[str, str, str]:
    rows = results["rows"]
    post = [row for row in rows if row["layer_norm"] == "post"]
    sure = lambda row, when: row[when]["radius"] is not None and (row[when]["converged"] or 0) >= 0.5
    contractive = [row for row in post if sure(row, "before") and row["before"]["radius"] < 1]
    largest = max((row["gain"] for row in contractive), default=None)
    one = f"post-LN: spectral radius below 1 in {len(contractive)} of {len(post)} starts" + (
        f", up to gain {largest:g}" if largest else ""
    )
    grown = [row for row in post if sure(row, "before") and sure(row, "after")]
    more = sum(row["after"]["radius"] > row["before"]["radius"] for row in grown)
    two = f"training raised it in {more} of the {len(grown)} post-LN runs that have a z* before and after"
    failed = {
        name: sum(
            (r["after"]["converged"] or 0) < 0.5 or r["diverged_at"] is not None
            for r in rows
            if r["layer_norm"] == name
        )
        for name in NORM_COLORS
    }
    of = {name: sum(r["layer_norm"] == name for r in rows) for name in NORM_COLORS}
    three = "diverged, or no z* after training: " + ", ".join(
        f"LN {n} {failed[n]} of {of[n]}" for n in NORM_COLORS if of[n]
    )
    return one, two, three
