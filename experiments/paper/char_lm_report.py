"""Figure and table of the demo, from the files of a run: `python -m experiments.paper.char_lm_report RUN`."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.shared import study
from experiments.shared.plots import COLORS, STYLE, fill, read_log


def draw_demo(run: Path) -> Path:
    """`figure.png` of a demo's directory, from its summary.json and the two metrics.jsonl."""
    summary = study.read(run / "summary.json")
    logs = {name: read_log(run / name / "metrics.jsonl") for name in ("deq", "unrolled")}
    layout: Any = [["steps", "residual", "memory"], ["seconds", "residual", "memory"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(layout, figsize=(14, 5.4), layout="constrained")
        draw_losses(axes["steps"], axes["seconds"], summary, logs)
        draw_residuals(axes["residual"], summary)
        draw_memory(axes["memory"], summary)
        note = "\n".join([*textwrap.wrap(summary["command"], 150), conditions(summary)])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(run / "figure.png", dpi=120)
        plt.close(figure)
    return run / "figure.png"


def draw_losses(by_step: Axes, by_time: Axes, summary: dict, logs: dict[str, list[dict]]) -> None:
    deq, unrolled = summary["deq"], summary["unrolled"]
    layers = f"{unrolled['layers']} unrolled layers"
    # On a CPU, processor time is the fair measure: it does not count other processes.
    on_cpu = summary["machine"]["devices"][0] == "cpu"
    clock, name = ("train_cpu_seconds", "CPU time") if on_cpu else ("train_seconds", "time")
    # The layers are drawn first, with a larger mark, so that both marks are visible where they coincide.
    curves = (
        (unrolled, logs["unrolled"], layers, COLORS["unrolled"], "s", 9),
        (deq, logs["deq"], "equilibrium", COLORS[summary["config"]["solver"]["__type__"]], "o", 5),
    )
    for result, log, label, color, mark, size in curves:
        loss = [line["loss"] for line in log]
        for axes, x, end in (by_step, "step", "steps"), (by_time, clock, clock):
            axes.plot([line[x] for line in log], loss, color=color, lw=1.2, label=f"{label}, training")
            label_valid = f"{label}, validation {result['valid_loss']:.3f}"
            axes.plot(result[end], result["valid_loss"], mark, ms=size, color=color, label=label_valid, clip_on=False)
    warm_up = summary["shallow_steps"]
    if warm_up > 0:
        by_step.axvline(warm_up, color="0.6", lw=0.8, ls=":")
        label = f" warm-up ends ({summary['config']['shallow_depth']} layers)"
        by_step.text(warm_up, 0.97, label, transform=by_step.get_xaxis_transform(), va="top", fontsize=8, color="0.4")
    losses = [line["loss"] for log in logs.values() for line in log]
    ends = [deq["valid_loss"], unrolled["valid_loss"]]
    low, high = min(losses + ends), max(np.quantile(losses, 0.9), *ends)
    for axes in (by_step, by_time):  # the first steps, from log(vocabulary) down, would flatten the rest of the curve
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    gap = unrolled["valid_loss"] - deq["valid_loss"]
    better = f"{abs(gap):.3f} nats {'below' if gap > 0 else 'above'}" if abs(gap) >= 0.0005 else "level with"
    by_step.set_title(fill(f"the equilibrium ends {better} {layers}"))
    by_time.set_title(fill(f"training took {deq[clock] / max(unrolled[clock], 1e-9):.2f}× the {name} of the layers"))
    by_time.legend(frameon=False, fontsize=8, loc="upper right")  # where both curves are low and there is room
    by_step.set(xlabel="optimizer step", ylabel="loss (nats/token)")
    by_time.set(xlabel=f"{name} of training (s)", ylabel="loss (nats/token)")


def draw_residuals(axes: Axes, summary: dict) -> None:
    rtol = summary["config"]["solver"]["rtol"]
    needed = {}
    for name, residuals in summary["residuals"].items():
        evaluations = np.arange(1, len(residuals) + 1)
        axes.semilogy(evaluations, np.maximum(residuals, 1e-12), color=COLORS[name], marker=".", label=name)
        needed[name] = next((int(k) for k, r in zip(evaluations, residuals, strict=True) if r <= rtol), None)
    axes.axhline(rtol, color="0.6", lw=0.8, ls=":")
    axes.annotate(f"training tolerance {rtol:g}", (1, rtol), fontsize=8, color="0.4", va="bottom")
    reached = sorted((k, name) for name, k in needed.items() if k is not None)
    words = [f"{name} in {k}" for k, name in reached]
    missed = [name for name, k in needed.items() if k is None]
    title = f"residual {rtol:g} after: {', '.join(words)} evaluations" if words else f"none reaches {rtol:g}"
    axes.set_title(fill(title + (f"; not {' or '.join(missed)}" if words and missed else "")))
    axes.set(xlabel="evaluations of f", ylabel="relative residual ‖f(z) − z‖ / ‖f(z)‖, median over sequences")
    axes.legend(frameon=False, fontsize=8)


def draw_memory(axes: Axes, summary: dict) -> None:
    memory = summary["memory"]
    depths = memory["depths"]
    labels = {"unrolled": "unrolled layers", "implicit": f"{summary['gradient']['__type__']}, max_steps"}
    for name, label in labels.items():
        megabytes = np.asarray(memory[name]) / 1e6
        axes.loglog(depths, megabytes, "o-", base=2, color=COLORS[name], label=label)
    growth = {name: memory[name][-1] / memory[name][0] for name in labels}
    ratio = memory["unrolled"][-1] / memory["implicit"][-1]
    less = f"{ratio:.1f}× less" if ratio >= 1 else f"{1 / ratio:.1f}× more"
    axes.set_title(
        fill(
            f"{depths[0]} to {depths[-1]} iterations: memory grows {growth['unrolled']:.1f}× unrolled, "
            f"{growth['implicit']:.2f}× at the equilibrium ({less} at {depths[-1]})"
        )
    )
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set(xlabel="iterations", ylabel="temporaries of the compiled training step (MB)")
    axes.legend(frameon=False, fontsize=8)


def conditions(summary: dict) -> str:
    machine, versions = summary["machine"], summary["versions"]
    return (
        f"{machine['processor']}, {machine['cores']} cores; jax {versions['jax']}; {summary['dtype']}; "
        f"seed {summary['seed']}; {summary['deq']['parameters']:,} parameters"
    )


def table(summary: dict) -> str:
    """The comparison as text."""
    rows = [("", "equilibrium", f"{summary['unrolled']['layers']} layers")]
    both = summary["deq"], summary["unrolled"]

    def row(name: str, form) -> None:
        rows.append((name, *(form(result) for result in both)))

    row("validation loss, nats/token", lambda r: f"{r['valid_loss']:.4f}")
    if "valid_bits_per_char" in both[0]:
        row("bits/char", lambda r: f"{r['valid_bits_per_char']:.4f}")
    row("training time, s", lambda r: f"{r['train_seconds']:.0f}")
    row("CPU time, s", lambda r: f"{r['train_cpu_seconds']:.0f}")
    row("parameters", lambda r: f"{r['parameters']:,}")
    row("temporaries of a step, MB", lambda r: f"{r['temp_bytes'] / 1e6:.1f}")
    row("evaluations a solve", lambda r: f"{r['valid_solver_steps']:.1f}")
    row("relative residual", lambda r: f"{r['valid_relative_residual']:.1e}")
    return "\n".join(f"{name:28} {a:>14} {b:>14}" for name, a, b in rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m experiments.paper.char_lm_report RUN")
    print(draw_demo(Path(sys.argv[1])))
