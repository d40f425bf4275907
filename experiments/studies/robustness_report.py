"""Tables, bars and figure of the robustness study."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.shared.cell_batch import CELL_BUDGET, CELL_SLACK, RTOL
from experiments.shared.cells import HARD
from experiments.shared.plots import STYLE, markdown_table
from experiments.shared.systems import MGH_ATOL, MGH_BUDGET, NAMES


def percent(part: dict[str, Any] | None) -> float:
    return 100 * part["success"] / part["of"] if part else float("nan")


def progress(name: str, result: dict[str, Any]) -> str:
    line = f"{name:15}"
    if "cells" in result:
        everything = result["all"]
        lost = {family: v["of"] - v["success"] for family, v in result["cells"].items()}
        worst = sorted((family for family in lost if lost[family]), key=lambda family: -lost[family])
        line += (
            f" cells {percent(result['plain']):5.1f} %, hard {percent(result['hard']):5.1f} %, evaluations median "
            f"{everything['evaluations_median']} mean {everything['evaluations_mean']}, false claims "
            f"{everything['false_claims']}, refusals {everything['false_refusals']}, miscounted "
            f"{result['counted']['differ']} of {result['counted']['checked']}"
        )
        line += "\n    lost: " + ", ".join(f"{family} {lost[family]}" for family in worst) if worst else ""
    if "mgh" in result:
        m = result["mgh"]
        line += f"\n    MGH {m['success']} of {m['of']}, false claims {m['false_claim']}, "
        line += f"refusals {m['false_refusal']}"
    return line


def check_bars(results: dict[str, Any]) -> list[tuple[str, str, bool]]:
    bars = []
    # The bars stand on cells as hard as those on which others were measured; the hard ones are shown beside.
    for name, least in (("Broyden-full", 99), ("Broyden-10", 95), ("Anderson", 93), ("Robust", 99)):
        if results.get(name, {}).get("plain"):
            value = percent(results[name]["plain"])
            bars.append((f"{name}: at least {least} % of the cells", f"{value:.1f} %", value >= least))
    secant = {name: r["mgh"] for name, r in results.items() if "mgh" in r and name not in ("Robust", "NewtonKrylov")}
    if secant:
        best = max(secant, key=lambda name: secant[name]["success"])
        text = f"best single solver without Newton–Krylov ({best}): at least 30 of the 54 systems"
        bars.append((text, f"{secant[best]['success']} of {secant[best]['of']}", secant[best]["success"] >= 30))
    if "mgh" in results.get("Robust", {}):
        m = results["Robust"]["mgh"]
        bars.append(("Robust: at least 49 of the 54 systems", f"{m['success']} of {m['of']}", m["success"] >= 49))
    for text, key in (("false CONVERGED", "false_claim"), ("false refusals", "false_refusal")):
        total = sum(r["mgh"][key] for r in results.values() if "mgh" in r)
        total += sum(r["all"][f"{key}s"] for r in results.values() if "all" in r)
        bars.append((f"no {text}, all solvers", str(total), total == 0))
    checks = [r["counted"] for r in results.values() if "counted" in r]
    if checks:
        differ, checked = (sum(c[key] for c in checks) for key in ("differ", "checked"))
        bars.append(("reported evaluations are the true calls", f"{differ} of {checked} differ", differ == 0))
    return bars


def markdown(record: dict[str, Any]) -> str:
    results = record["solvers"]
    some = next(iter(results.values()))
    header = ["solver"]
    if "cells" in some:
        header += ["cells %", "hard %", "median eval.", "mean eval.", "false claims", "false refusals", "miscounted"]
    if "mgh" in some:
        header += ["MGH", "MGH false claims", "MGH false refusals"]
    rows = []
    for name, r in results.items():
        row = [f"`{name}`"]
        if "cells" in r:
            a = r["all"]
            row += [f"{percent(r['plain']):.1f}", f"{percent(r['hard']):.1f}"]
            row += [a["evaluations_median"], a["evaluations_mean"], a["false_claims"], a["false_refusals"]]
            row += [r["counted"]["differ"]]
        if "mgh" in r:
            m = r["mgh"]
            row += [f"{m['success']} of {m['of']}", m["false_claim"], m["false_refusal"]]
        rows.append(row)
    first, last = record["seeds"]
    parts = [
        f"`{record['command']}`, {record['machine']['processor']}, jax {record['versions']['jax']}",
        f"Cells: seeds {first} to {last} of each family, float32, rtol {RTOL:g}, at most {CELL_BUDGET} evaluations. "
        "Median evaluations over the problems solved, mean over all. A claim is false where the relative residual in "
        f"float64 is above {RTOL:g} + {CELL_SLACK:.1e}, a refusal where it is at most {RTOL:g} − {CELL_SLACK:.1e}. "
        "STALLED is a claim too, of a residual at the dtype's floor. "
        f"MGH: f(z) = z − F(z) in float64, ‖F(z)‖₂ ≤ {MGH_ATOL:g} within {MGH_BUDGET} evaluations of F.",
        table(header, rows),
        table(
            list(record["bars"][0]), [[b["bar"], b["measured"], "yes" if b["met"] else "NO"] for b in record["bars"]]
        ),
    ]
    if "cells" in some:
        rows = [[family, *(f"{percent(r['cells'][family]):.0f}" for r in results.values())] for family in some["cells"]]
        parts += ["## Success by family, %", table(["family", *results], rows)]
    if "mgh" in some:
        titles = [f"{NAMES[s['number']]}, n = {s['n']}, start × {s['start']}" for s in some["systems"]]
        rows = [[title, *(outcome(r["systems"][i]) for r in results.values())] for i, title in enumerate(titles)]
        parts += ["## Evaluations by system, – where not solved", table(["system", *results], rows)]
    return "\n\n".join(parts)


def table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(markdown_table(head, rows)).strip()


def outcome(system: dict[str, Any]) -> str:
    return str(system["evaluations"]) if system["success"] else "–"


def draw_figure(record: dict[str, Any], path: Path) -> None:
    """Families against solvers, the overall success on top."""
    results = record["solvers"]
    families = list(next(iter(results.values()))["cells"])
    table = np.array([[percent(r["cells"][family]) for r in results.values()] for family in families])
    whole = {name: percent(r["plain"]) for name, r in results.items()}
    best = max(whole, key=lambda name: whole[name])
    with plt.rc_context(STYLE):
        size = (2.6 + 0.95 * len(results), 1.6 + 0.24 * len(families))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for i, j in np.ndindex(table.shape):
            color = "black" if table[i, j] > 55 else "white"
            axes.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(results)), [f"{n}\n{whole[n]:.1f} %" for n in results], fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_yticks(range(len(families)), families, fontsize=8)
        for i, family in enumerate(families):
            if family in HARD:
                axes.axhline(i - 0.5, color="white", lw=3)
                break
        axes.set_title(f"{best} finds {whole[best]:.1f} % of the fixed points above the line")
        figure.colorbar(image, label="problems solved (%)", shrink=0.6)
        figure.savefig(path, dpi=120)
        plt.close(figure)
