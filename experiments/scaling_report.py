"""The tables and the figure of `scaling_study`."""

from pathlib import Path
from typing import Any

from experiments.shared import plots, study

Row = dict[str, Any]
GOALS = {8: 0.9, 64: 0.85}
SOLVER_GOAL = 0.02  # of a step, for the collectives of the solvers themselves
COLORS = ("Anderson", "Broyden", "Picard")  # a color for each preset


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    lines = ["# A training step over many devices, on paper", "", f"    {results['command']}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    timed, to = "seconds" in rows[0], "H100s" if "seconds" in rows[0] else "chips of a TPU v5p"
    lines += study.paragraph(
        f"Compiled for {to} that are not there, not run; {versions}.", *(goals(rows) if timed else ())
    )
    lines += (times(results) if timed else []) + memory(rows) + collectives(rows) + (figures(results) if timed else [])
    return "\n".join(lines)


def goals(rows: list[Row]) -> list[str]:
    """Whether the layouts of data × fsdp meet the goals."""
    found = []
    plain = [row for row in rows if "model" not in row["mesh"]]
    for devices, goal in GOALS.items():
        of_size = [(efficiency(row, rows, machine), row) for row in plain for machine in row["seconds"]]
        values = [value for value, row in of_size if row["devices"] == devices and value is not None]
        if values:
            found.append(f"Weak scaling on {devices} devices: {min(values):.3f} at least; the goal is {goal}.")
    most = max(solver_share(row, machine) for row in rows for machine in row["seconds"])
    return [*found, f"The solvers' own collectives: {most:.2%} of a step at most; the goal is {SOLVER_GOAL:.0%}."]


def efficiency(row: Row, rows: list[Row], machine: str) -> float | None:
    """The time of one device over that of as many as the row has; None where one was not compiled."""
    one = [each for each in rows if each["preset"] == row["preset"] and each["devices"] == 1]
    return one[0]["seconds"][machine]["total"] / row["seconds"][machine]["total"] if one else None


def solver_share(row: Row, machine: str) -> float:
    seconds = row["seconds"][machine]
    return seconds["collectives of solver"] / seconds["total"]


def times(results: dict[str, Any]) -> list[str]:
    lines = ["## Time", ""]
    lines += study.paragraph(
        "The sequences of a device are as many in every row of a preset. A step makes as many evaluations of f, and of",
        "its pullback, as the budgets of its solves allow. Kernels run at published peaks, collectives at published",
        "bandwidths, and nothing is hidden, so a real step takes longer and scales better. A conditional counts with",
        "its longest branch: every block of a loss computes every tail of an adaptive softmax. Efficiency is the time",
        "of one device over that of the row's. TFLOP are those of products in the program.",
    )
    head = ["preset", "mesh", "devices", "sequences", "evaluations", "TFLOP a step", "TFLOP an evaluation"]
    for machine in results["machines"]:
        head += [f"{machine}: ms", "kernels", "collectives of f, solver, step", "efficiency"]
    body = []
    for row in results["rows"]:
        flops, rounds = row["flops"], row["rounds"]
        cells = [
            row["preset"],
            row["mesh"],
            row["devices"],
            f"{row['batch']} × {row['length']}",
            f"{rounds['forward']} + {rounds['backward']}",
        ]
        each = (flops[way] for way in ("forward", "backward"))
        cells += [f"{flops['step'] / 1e12:.1f}", ", ".join(f"{x / 1e12:.2f}" for x in each)]
        for machine, seconds in row["seconds"].items():
            ms = {name: 1e3 * value for name, value in seconds.items()}
            kernels = sum(value for name, value in ms.items() if name.startswith("kernels"))
            sent = ", ".join(f"{ms[f'collectives of {place}']:.2f}" for place in ("f", "solver", "step"))
            value = efficiency(row, results["rows"], machine)
            cells += [f"{ms['total']:.1f}", f"{kernels:.1f}", sent, "–" if value is None else f"{value:.3f}"]
        body.append(cells)
    return lines + plots.markdown_table(head, body)


def memory(rows: list[Row]) -> list[str]:
    lines = ["## Memory of a device, GB", ""]
    lines += study.paragraph(
        "Parameters, optimizer, and the text's history are what a device holds between steps. Temporaries are the",
        "compiler's plan; among them are the gradient, the same again where fsdp gathers parameters, and the states",
        "that the forward and the backward solve remember, one after the other. On an H100 32 MiB are cuBLAS's.",
    )
    names = ("parameters", "optimizer", "text", "temporaries", "total", "gradient", "forward", "backward")
    head = ["preset", "mesh", *names[:4], "total", "gradient", "forward history", "backward history"]
    gigabytes = lambda row: [f"{row['memory'][name] / 1e9:.2f}" for name in names]
    return lines + plots.markdown_table(head, [[row["preset"], row["mesh"], *gigabytes(row)] for row in rows])


def collectives(rows: list[Row]) -> list[str]:
    lines = ["## Collectives of a device", ""]
    lines += study.paragraph(
        "How many of each kind, the devices that take part, and the bytes of their results: in an evaluation of f, in",
        "the rest of a solver's round, and outside of the solves. Those of f and of the solver happen in every round;",
        "a predicate whether any sequence goes on is one byte.",
    )
    places = ("f forward", "solver forward", "f backward", "solver backward", "step")
    body = []
    for row in rows:
        if row["devices"] > 1:
            told = ["; ".join(map(one_kind, row["collectives"].get(place, []))) or "–" for place in places]
            body.append([row["preset"], row["mesh"], *told])
    return lines + plots.markdown_table(["preset", "mesh", *places], body)


def one_kind(found: list[Any]) -> str:
    what, group, count, sent = found
    size = f"{sent / 1e6:.1f} MB" if sent >= 1e5 else f"{sent:.0f} B"
    return f"{count} {what} of {group}, {size}"


def figures(results: dict[str, Any]) -> list[str]:
    lines = ["## Figures of the devices", ""]
    for name, machine in results["machines"].items():
        lines += [f"- {name}: {machine['source']}. Assumed: {machine['latency'] * 1e6:.0f} µs a hop of log₂ n."]
    return [*lines, ""]


def draw(results: dict[str, Any], path: Path) -> None:
    """Efficiency by devices of the layouts of data × fsdp, a panel a machine; nothing without times."""
    plt, rows = plots.plt, results["rows"]
    if "seconds" not in rows[0]:
        return
    machines, presets = list(results["machines"]), list(dict.fromkeys(row["preset"] for row in rows))
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            1, len(machines), figsize=(9, 3.6), layout="constrained", sharey=True, squeeze=False
        )
        for axis, machine in zip(axes[0], machines, strict=True):
            for preset, color in zip(presets, COLORS, strict=False):
                fit = [row for row in rows if row["preset"] == preset and "model" not in row["mesh"]]
                best = {row["devices"]: efficiency(row, rows, machine) for row in fit}
                axis.plot(list(best), list(best.values()), "o-", color=plots.COLORS[color], label=preset)
            for devices, goal in GOALS.items():
                axis.plot([devices / 1.3, devices * 1.3], [goal, goal], color="0.6", linestyle=":")
            axis.set(xscale="log", xlabel="devices", xticks=[1, 8, 64, 256], xticklabels=[1, 8, 64, 256])
            axis.set(title=plots.fill(f"with the figures of the {machine}"), ylim=(0.8, 1.01))
            axis.minorticks_off()
        axes[0][0].set_ylabel("weak scaling efficiency")
        axes[0][0].legend(frameon=False, loc="lower left")
        figure.supxlabel(f"{results['command']}; on paper; dotted: the goals", fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)
