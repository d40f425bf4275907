"""Tables and figure of the copy memory page, with the published losses for comparison."""

from pathlib import Path
from typing import Any

from experiments.shared import plots, study

PUBLISHED = {"DEQ-Transformer": 3.5e-6, "TCN": 2.7e-5, "LSTM": 0.0501, "GRU": 0.0491}  # the paper's Table 1
BAR = 1e-4


def table(results: dict[str, Any]) -> str:
    config, models = results["config"], results["models"]
    told = study.conditions(
        results, dtype="float32", seed=config["seed"], gradient=f"Implicit, rtol {config['backward_rtol']:g}"
    )
    lines = [f"# Copy memory, T = {config['delay']}", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += [f"Mean cross entropy over all T + 20 places of {config['test_sequences']} test sequences;"]
    lines += [f"chance is {results['chance']:.4f}. Published: Table 1 of the paper, about 14,000 parameters.", ""]
    head = ["", "parameters", "steps", "sequences", "CPU s", "test loss", "symbols right", "published"]
    lines += plots.markdown_table(head, [
        [name, f"{m['parameters']:,}", m["steps"], f"{m['sequences']:,}", f"{m['cpu_seconds']:.0f}",
         f"**{show(m['test']['loss'])}**", f"{m['test']['right']:.1%}", f"{PUBLISHED[name]:g}"]
        for name, m in models.items()
    ])  # fmt: skip
    if deep := models.get("DEQ-Transformer"):
        lines += ["## The same weights, solved otherwise", ""]
        ways = {f"as trained, rtol {config['rtol']:g}": deep["test"], **deep["test_otherwise"]}
        head = ["", "test loss", "symbols right", "evaluations", "relative residual"]
        lines += plots.markdown_table(head, [
            [name, show(t['loss']), f"{t['right']:.1%}", f"{t['fwd_steps']:.1f}", f"{t['fwd_residual']:.1e}"]
            for name, t in ways.items()
        ])  # fmt: skip
    lines += ["## Bars", ""]
    lines += plots.markdown_table(["", "bar", "measured", "met"], [
        [b["model"], b["bar"], show(b["got"]), "yes" if b["met"] else "**no**"] for b in results["bars"]
    ])  # fmt: skip
    return "\n".join(lines)


def show(loss: float) -> str:
    return f"{loss:.4f}" if loss >= 1e-3 else f"{loss:.2g}"


COLORS = {"DEQ-Transformer": plots.COLORS["implicit"], "TCN": "#CC79A7", "LSTM": "#E69F00", "GRU": "0.45"}


def draw(results: dict[str, Any], path: Path) -> None:
    """The training loss by step and by processor time, and the loss on the test sequences at its end."""
    plt = plots.plt
    config, models = results["config"], results["models"]
    with plt.rc_context(plots.STYLE):
        figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
        for name, model in models.items():
            loss = study.numbers([line["loss"] for line in model["curve"]])
            for axes, clock in (by_step, "step"), (by_time, "cpu_seconds"):
                x = [line[clock] for line in model["curve"]]
                label = f"{name}, test {show(model['test']['loss'])}"
                axes.plot(x, loss, color=COLORS[name], lw=1.3, label=label)
                axes.plot(x[-1], model["test"]["loss"], "o", color=COLORS[name], ms=6, clip_on=False)
        for axes in (by_step, by_time):
            axes.set_yscale("log")
            axes.axhline(results["chance"], color="0.6", lw=0.8, ls=":")
            axes.axhline(BAR, color="0.6", lw=0.8, ls=":")
            axes.grid(alpha=0.2)
        for level, text in (results["chance"], "chance "), (BAR, f"{BAR:g} "):
            where = dict(transform=by_time.get_yaxis_transform(), ha="right", va="bottom")
            by_time.text(1, level, text, fontsize=8, color="0.4", **where)
        by_step.set_xscale("log")
        if "DEQ-Transformer" in models:
            by_step.axvline(config["shallow_steps"], color="0.6", lw=0.8, ls=":")
            text, above = " from two layers\n to the equilibrium", by_step.get_xaxis_transform()
            by_step.text(config["shallow_steps"], 0.98, text, transform=above, fontsize=8, color="0.4", va="top")
        by_step.set(xlabel="optimizer step (log)", ylabel="loss (nats per position, mean over T + 20)")
        by_time.set(xlabel="processor time of training (s)")
        by_time.legend(frameon=False, fontsize=8)
        figure.suptitle(finding(results))
        note = f"{results['command']}; float32, seed {config['seed']}; lines: training, dots: test"
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def finding(results: dict[str, Any]) -> str:
    ends = {name: model["test"]["loss"] for name, model in results["models"].items()}
    words = [f"{name} {show(loss)}" for name, loss in sorted(ends.items(), key=lambda item: item[1])]
    return f"Copy memory, T = {results['config']['delay']}, {results['chance']:.4f} is chance: {', '.join(words)}"
