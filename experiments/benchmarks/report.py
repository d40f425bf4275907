"""The table, the bars and the figure of a benchmark: `python -m experiments.benchmarks.report DIRECTORY [PARTS …]`."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.workers import good
from experiments.shared import study
from experiments.shared.plots import STYLE, markdown_table

# One color a library; ours is that of Anderson in the other figures.
PACKAGES = {
    "deq_jax": "#0072B2",
    "jaxopt": "#E69F00",
    "banax": "#009E73",
    "optimistix": "#CC79A7",
    "torchdeq": "#D55E00",
}
# Forward and backward: at least this many times faster than the best peer, and at most this many times the limit.
FASTER = {"P1": 1 / 1.05, "P2": 1.3, "P3": 1.5, "P4": 2.0, "P5": 1.3, "P6": 1.3}
COMPACTED = 4.0  # with `deq.compact`, where problems are many and small
LIMIT = {"P1": 1.25, "P2": 1.15, "P5": 1.15, "P6": 1.15}


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, table.md and figure.png."""
    results["bars"] = bars(results)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table(results))
    if any(timed(p) for p in results["problems"].values()):
        draw(results, out / "figure.png")


def timed(problem: dict[str, Any]) -> dict[str, Any]:
    """The contenders that are accurate enough and were timed, fastest training step first."""
    rows = {n: r for n, r in problem["contenders"].items() if "error" not in r and good(r) and "ms" in r["step"]}
    return dict(sorted(rows.items(), key=lambda item: item[1]["step"]["ms"]))


def limit_ms(row: dict[str, Any], parts: dict[str, float]) -> float:
    """What this contender's own evaluations cost in a bare compiled loop, and one pullback to the parameters.

    NaN for backpropagation through the iterations, whose evaluations are not counted: its depth is in its name.
    """
    step = row["step"]
    if "f" not in step:
        return math.nan
    # A Jacobian-vector product costs no less than f, and is counted as one: in the contender's favor.
    return step["f"] * parts["t_f"] + step["vjp"] * parts["t_vjp"] + step["jvp"] * parts["t_f"] + parts["t_params"]


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar, what was measured, and whether it is met."""
    found = []

    def bar(what: str, measured: float, wanted: float, at_least: bool = False) -> None:
        met = measured >= wanted if at_least else measured <= wanted
        found.append({"bar": what, "measured": measured, "wanted": wanted, "met": met})

    for name, problem in results["problems"].items():
        rows, limit = timed(problem), problem["limit"]
        best = next((n for n in rows if n.startswith("ours") and "compact" not in n), None)
        compacted = next((n for n in rows if n.startswith("ours") and "compact" in n), None)
        peers = {n: r["step"] for n, r in rows.items() if r["package"] in PACKAGES and r["package"] != "deq_jax"}
        if not best or not peers:
            continue
        ours = rows[best]["step"]
        fastest = min(step["ms"] for step in peers.values())
        bar(f"{name}: times faster than the best peer", fastest / ours["ms"], FASTER[name], at_least=True)
        if compacted:
            ratio = fastest / rows[compacted]["step"]["ms"]
            bar(f"{name}, with compaction: times faster than the best peer", ratio, COMPACTED, at_least=True)
        if name in LIMIT:
            bar(f"{name}: time over the limit", ours["ms"] / limit_ms(rows[best], limit), LIMIT[name])
        if "linearization_bytes" in limit:
            states = 6 + 2 * max(CONTENDERS[best].solve.keywords[which] for which in ("history", "back"))
            allowed = limit["linearization_bytes"] + states * limit["z_bytes"]
            bar(f"{name}: temporaries over linearization + {states} z", ours["temp_bytes"] / allowed, 1.0)
        quick = [step["temp_bytes"] for n, step in peers.items() if accelerated(n)]
        if name != "P1" and quick:
            mine = [n for n in rows if n == best or (n.startswith("ours") and accelerated(n))]
            leanest = min(rows[n]["step"]["temp_bytes"] for n in mine)
            for which, temporaries in (("fastest", ours["temp_bytes"]), ("leanest", leanest)):
                over = temporaries / min(quick)
                bar(f"{name}: temporaries of our {which} over the least of an accelerated peer", over, 1.0)
        unrolled = {n: r["step"] for n, r in problem["contenders"].items() if "step" in r}
        if "√L 12" in unrolled:
            over = ours["temp_bytes"] / unrolled["√L 12"]["temp_bytes"]
            bar(f"{name}: temporaries over 12 steps with √L checkpoints", over, 1.0)
        if "ms" in unrolled.get("unrolled 30", {}):
            bar(f"{name}: time over 30 plain unrolled steps", ours["ms"] / unrolled["unrolled 30"]["ms"], 1.6)
    return found


def accelerated(name: str) -> bool:
    return ("Anderson" in name or "Broyden" in name) and "torchdeq" not in name


def table(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    peers = ", ".join(f"{name} {version}" for name, version in results["peers"].items())
    lines = [
        "# Ours and the peers on the same work",
        "",
        f"{machine['processor']}, {study.shared_cores(machine)}, {machine['devices'][0]}; "
        f"deq_jax {versions['deq_jax']}, jax {versions['jax']}; peers: {peers}; {results['dtype']}; "
        f"seed {results['seed']}.",
        f"Times are minima of interleaved runs, {results['rounds']} rounds; accuracy is the referee's, in float64. "
        "The limit is the cost of a contender's own evaluations in a bare loop. Only rows without a mark are "
        "compared: the others miss the accuracy. Where there is a NOTES.md beside this file, read it first.",
        "",
    ]
    if results["bars"]:
        rows = [
            (b["bar"], f"{b['measured']:.2f}", f"{b['wanted']:.2f}", "met" if b["met"] else "**missed**")
            for b in results["bars"]
        ]
        lines += ["## Bars", "", *markdown_table(("bar", "measured", "wanted", ""), rows)]
    for name, problem in results["problems"].items():
        parts = problem["limit"]
        lines += [
            f"## {name}: {problem['what']}",
            "",
            f"In a compiled loop: f {parts['t_f']:.3g} ms, Jᵀv {parts['t_vjp']:.3g} ms, the parameters' pullback "
            f"{parts['t_params']:.3g} ms.",
            "",
            *markdown_table(HEAD, [cells(n, r, parts) for n, r in ordered(problem)]),
        ]
    return "\n".join(lines)


HEAD = (
    "contender", "forward ms", "forward + backward ms", "over the limit", "f / vjp (+ jvp)", "memory MB", "compile s",
    "first call s", "residual", "gradient error",
)  # fmt: skip


def ordered(problem: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    best = timed(problem)
    return [*best.items(), *((n, r) for n, r in problem["contenders"].items() if n not in best)]


def cells(name: str, row: dict[str, Any], parts: dict[str, float]) -> tuple[str, ...]:
    if "error" in row:
        return (name, row["error"], *[""] * (len(HEAD) - 2))
    step, forward, over, evaluations = row["step"], row["forward"], "", ""
    if "f" in step:
        over = f"{step['ms'] / limit_ms(row, parts):.2f}"
        evaluations = f"{step['f']} / {step['vjp']}" + (f" + {step['jvp']}" if step["jvp"] else "")
    memory = (
        f"{step['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in step else f"{step['resident_bytes'] / 1e6:.0f} resident"
    )
    return (
        name + ("" if good(row) else " ✗"),
        f"{forward['ms']:.3g}",
        f"{step['ms']:.3g}",
        over,
        evaluations,
        memory,
        f"{step['compile_s']:.1f}",
        f"{step['first_call_s']:.1f}",
        f"{row['residual']:.0e}",
        f"{row['gradient_error']:.0e}",
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Time of a training step of every contender that is accurate enough, with its limit."""
    problems = {name: p for name, p in results["problems"].items() if timed(p)}
    with plt.rc_context(STYLE):
        columns = min(3, len(problems))
        lines = math.ceil(len(problems) / columns)
        size = (5.2 * columns, 4.4 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for ax in axes.flat[len(problems) :]:
            ax.remove()
        for ax, (name, problem) in zip(axes.flat, problems.items(), strict=False):
            rows = timed(problem)
            labels, times = list(rows), [row["step"]["ms"] for row in rows.values()]
            limits = [limit_ms(row, problem["limit"]) for row in rows.values()]
            colors = [PACKAGES.get(row["package"], "0.5") for row in rows.values()]
            ax.scatter(times, labels, color=colors, s=60)  # no bars: on a logarithmic axis their length means nothing
            ax.plot(limits, labels, "k|", ms=11, mew=1.5, label="limit: its evaluations alone")
            ax.set(xscale="log", xlabel="forward + backward, ms (the least)")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.minorticks_off()
            ax.invert_yaxis()
            ours = [row["step"]["ms"] for name, row in rows.items() if name.startswith("ours")]
            peers = [row["step"]["ms"] for row in rows.values() if row["package"] not in ("deq_jax", "equinox")]
            ratio = f"ours {peers[0] / ours[0]:.2f} times as fast as the best peer" if ours and peers else ""
            ax.set_title(f"{name}, {problem['what']}\n{ratio}")
            ax.legend(frameon=False, fontsize=7)
        machine = results["machine"]
        figure.supxlabel(
            f"{machine['processor']}, {study.shared_cores(machine)}; jax {results['versions']['jax']}; "
            f"{results['dtype']}; residual and gradient error at most 1e-4",
            fontsize=8,
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def main() -> None:
    """Write the report of a directory anew; results.json of further directories are added to it first."""
    out, *parts = map(Path, sys.argv[1:])
    kept = [json.loads((part / "results.json").read_text()) for part in parts or [out]]
    results = kept[0]
    for other in kept[1:]:
        results["problems"] |= other["problems"]
    results["problems"] = dict(sorted(results["problems"].items()))
    out.mkdir(parents=True, exist_ok=True)
    write(results, out)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
