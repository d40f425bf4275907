"""Tables and figure of the gradient study."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plots

RTOL = {"bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-14}  # of the forward solve; the last is the tight one
BACKWARD_RTOL = 1e-6  # of the forward solve behind which backward solvers are compared


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
                if row["adjoint"] in plots.ADJOINT_COLORS and row["solver"] not in lost and np.isfinite(row["error"]):
                    x = row["products"] + 1  # the last product, with the parameters
                    axes.loglog(
                        x,
                        row["error"],
                        marks[row["solver"]],
                        color=plots.ADJOINT_COLORS[row["adjoint"]],
                        ms=6,
                        alpha=0.8,
                    )
            kind = "contractive" if radius < 1 else "monotone"
            more = f"\n{', '.join(lost)} diverges" if lost else "\n"
            axes.set_title(f"spectral radius {radius:g}: {kind}{more}")
            axes.set_xlabel("Jᵀ-vector products a problem,\nthe one with the parameters included")
            axes.grid(alpha=0.2)
        np.atleast_1d(panels)[0].set_ylabel("relative error of the gradient (median over problems)")
        seen = {row["adjoint"] for row in results["adjoints"]}
        dots = [
            plt.Line2D([], [], color=c, marker="o", ls="", label=n)
            for n, c in plots.ADJOINT_COLORS.items()
            if n in seen
        ]
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


EXACT_BAR, REVERSIBLE_BAR, SHINE_BAR, SHINE_PRODUCTS = 1e-10, 1e-8, 1 / 3, 7


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
