"""How many evaluations a solve takes, by training step, length and depth (paper Figures 2 left and 4, appendix D).

python -m experiments.paper.iterations reduced
python -m experiments.paper.iterations figure
python -m experiments.paper.iterations paper
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from experiments.shared import plots, study, trained
from experiments.training import lm_model


@dataclasses.dataclass(frozen=True)
class Config:
    """Forward evaluations and backward products by milestone and by length, and the residual by depth.

    python -m experiments.paper.iterations reduced

    You should see both counts rise with training, and a weight-tied stack of layers that stops converging.
    """

    model: lm_model.Config = trained.REDUCED
    run: Path = Path("runs/studies/iterations")
    out: Path | None = None
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3)  # relative
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256)
    tokens: int = 512  # at each length, split into sequences of that length
    depth: int = 70  # layers of the weight-tied stack, as in the paper's Figure 4
    max_steps: int = 100


PRESETS = {
    "reduced": ("2 minutes on one CPU core, and 3 for the model if it is not trained yet", Config()),
    "paper": (
        "hours on 8 accelerators, after the model's own training",
        Config(
            model=trained.PAPER,
            run=Path("runs/studies/iterations-paper"),
            lengths=(50, 100, 150, 200, 400, 800),
            tokens=2400,
        ),
    ),
}
NAMES = ("Picard", "Anderson", "Broyden")


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    model = trained.load(config.model)
    steps = [step for step in model.states if step >= model.config.shallow_steps]
    logged = [line for line in model.log if "fwd_steps" in line]
    lengths = {length: counter(config, model, length) for length in {config.model.length, *config.lengths}}

    def rows(step: int, length: int) -> list[dict[str, Any]]:
        def one(solver: Any, rtol: float) -> dict[str, Any]:
            return lengths[length](model.states[step].params, dataclasses.replace(solver, rtol=rtol))

        return [
            {"step": step, "length": length, "solver": name, "rtol": rtol}
            | cells(f"step {step}, length {length}, {name} to {rtol:g}", lambda: one(solver, rtol))
            for name, solver in solvers(config).items()
            for rtol in config.tolerances
        ]

    return {
        "seed": config.model.seed,
        "dtype": config.model.dtype,
        "warm_up": model.config.shallow_steps,
        "in_training": study.plain({
            "step": [line["step"] for line in logged],
            "evaluations": [line["fwd_steps"] for line in logged],
            "products": [line["bwd_steps"] for line in logged],
            "rtol": config.model.solver.rtol,
            "cap": config.model.solver.max_steps,
        }),
        "by_step": [row for step in steps for row in rows(step, config.model.length)],
        "by_length": [row for length in config.lengths for row in rows(steps[-1], length)],
        "by_depth": by_depth(config, model, steps, cells),
    }  # fmt: skip


def solvers(config: Config) -> dict[str, Any]:
    most = config.max_steps
    return {
        "Picard": deq.Picard(max_steps=most),
        "Anderson": deq.Anderson(max_steps=most, history=6),
        "Broyden": deq.Broyden(max_steps=most, rank=50),
    }


def counter(config: Config, model: trained.Trained, length: int) -> Callable:
    """A compiled (params, solver) -> evaluations and products to the solver's tolerance, on held-out text."""
    f, context_of, z0 = trained.held_out(model, max(1, config.tokens // length), length)
    z_bar = jax.random.normal(jax.random.key(0), z0.shape, z0.dtype)

    @jax.jit
    def run(context, solver):
        # The gradient in the injection suffices: all gradients share one backward equation.
        def loss(injection, probe):
            there = context._replace(injection=injection)
            options: dict[str, Any] = dict(solver=solver, adjoint=deq.Implicit(solver), batch_ndim=1, probe=probe)
            z, stats = deq.fixed_point(f, z0, there, **options)
            return jnp.sum(z_bar * z), stats

        probe = deq.Probe.zeros(z0.shape[:1])
        (_, told), stats = jax.grad(loss, argnums=(0, 1), has_aux=True)(context.injection, probe)
        return {
            "evaluations": stats.steps.mean(),
            "converged": stats.converged.mean(),
            "products": told.steps.mean(),
            "backward_converged": (told.status == deq.Status.CONVERGED).mean(),
        }

    return lambda params, solver: run(context_of(params), solver)


def by_depth(config: Config, model: trained.Trained, steps: Sequence[int], cells: study.Cells) -> list[dict[str, Any]]:
    """‖f(z) − z‖ / ‖f(z)‖ after each of `depth` layers of the same cell: how much one more layer still changes."""
    rows = []
    for length in config.lengths:
        f, context_of, z0 = trained.held_out(model, max(1, config.tokens // length), length)
        solver, fold = deq.Picard(rtol=0.0, max_steps=config.depth), deq.ResidualTrace(config.depth)
        run = jax.jit(lambda context: deq.solve(f, z0, context, solver=solver, batch_ndim=1, fold=fold))
        for step in (steps[0], steps[-1]):

            def one():
                return {"change": trained.median_trace(run(context_of(model.states[step].params)))}

            rows.append({"step": step, "length": length} | cells(f"depth, step {step}, length {length}", one))
    return rows


# ---- what is stored ----------------------------------------------------------------------------------------


def count(row: dict[str, Any], key: str, converged: str) -> str:
    told = f"{row[key]:.1f}"
    return told if row[converged] >= 0.999 else f"*{told}* ({row[converged]:.0%})"


def both(row: dict[str, Any]) -> str:
    return f"{count(row, 'evaluations', 'converged')} / {count(row, 'products', 'backward_converged')}"


def table(results: dict[str, Any]) -> str:
    lines = ["# Evaluations", "", f"    {results['command']}", ""]
    most = results["config"]["max_steps"]
    gradient = "Implicit, the forward's solver"
    lines += study.paragraph(
        study.conditions(results, dtype=results["dtype"], seed=results["seed"], gradient=gradient) + ".",
        f"Mean over sequences of held-out text, from z = 0; *italic*: {most} evaluations were not enough for all, and",
        f"the share for which they were. {results['cpu_seconds']:.0f} CPU seconds.",
    )
    for part, key, title in ("by_step", "step", "training step"), ("by_length", "length", "length"):
        rows = results[part]
        keys = sorted({row[key] for row in rows})
        lines += [f"## By {title}", "", "Evaluations forward / Jᵀ-vector products backward.", ""]
        head = ["solver", "rtol", *(f"{title} {k}" for k in keys)]
        body = []
        for name in NAMES:
            for rtol in sorted({row["rtol"] for row in rows}, reverse=True):
                here = {row[key]: row for row in rows if (row["solver"], row["rtol"]) == (name, rtol)}
                body.append([name, f"{rtol:g}", *(
                    both(here[k]) for k in keys
                )])  # fmt: skip
        lines += plots.markdown_table(head, body)
    lines += [
        "## By depth",
        "",
        "The relative change that one more layer of the same cell makes, the median over sequences.",
        "",
    ]
    depths = [d for d in (1, 5, 10, 20, 40, 70) if d <= results["config"]["depth"]]
    lines += plots.markdown_table(["step", "length", *(f"layer {d}" for d in depths)], [
        [r["step"], r["length"], *(f"{study.numbers(r['change'])[d - 1]:.2g}" for d in depths)]
        for r in results["by_depth"]
    ])  # fmt: skip
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    plt = plots.plt
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
        draw_training(axes[0], results)
        draw_lengths(axes[1], results)
        draw_depth(axes[2], results)
        note = f"{results['command']}; " + study.conditions(results, dtype=results["dtype"], seed=results["seed"])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_counts(axes: Any, rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Draw evaluations and products to the tightest tolerance. No count where most sequences did not reach it.

    Returns, by solver, the rows where all sequences reached it.
    """
    rtol, kept = min(row["rtol"] for row in rows), {}
    kinds = ("evaluations", "converged", "o-", "forward"), ("products", "backward_converged", "s:", "backward")
    for name in NAMES:
        here = [row for row in rows if (row["solver"], row["rtol"]) == (name, rtol)]
        for count, converged, style, label in kinds:
            y = [row[count] if row[converged] >= 0.5 else np.nan for row in here]
            options: dict[str, Any] = dict(color=plots.COLORS[name], label=f"{name}, {label}")
            axes.plot([row[key] for row in here], y, style, mfc=None if label == "forward" else "none", **options)
        kept[name] = [row for row in here if row["converged"] == 1]
    axes.set_ylabel(f"evaluations or products to a residual of {rtol:g}")
    return kept


def draw_training(axes: Any, results: dict[str, Any]) -> None:
    """Figure 2 left. Gray: counts during training, up to its cap. Marks: counts without a cap."""
    log = results["in_training"]
    axes.plot(log["step"], log["evaluations"], color="0.6", lw=1, label=f"in training, forward (cap {log['cap']})")
    axes.plot(log["step"], log["products"], color="0.6", lw=1, ls=":", label="in training, backward")
    kept = draw_counts(axes, results["by_step"], "step")
    # Start at the first milestone of the equilibrium: at the end of the warm-up the model was two layers.
    ends = {name: [row for row in rows if row["step"] > results["warm_up"]] for name, rows in kept.items()}
    words = [f"{n} {r[0]['evaluations']:.0f} to {r[-1]['evaluations']:.0f}" for n, r in ends.items() if len(r) > 1]
    lost = [name for name, rows in ends.items() if not rows]
    missing = f"; {', '.join(lost)} does not reach it" if lost else ""
    axes.set_title(plots.fill(f"evaluations at the equilibrium: {', '.join(words)}{missing}"))
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False, fontsize=7)


def draw_lengths(axes: Any, results: dict[str, Any]) -> None:
    kept = draw_counts(axes, results["by_length"], "length")
    lengths = sorted({row["length"] for row in results["by_length"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.axvline(results["config"]["model"]["length"], color="0.6", lw=0.8, ls=":")
    whole = {name: rows for name, rows in kept.items() if len(rows) == len(lengths)}
    growth = {name: rows[-1]["evaluations"] / rows[0]["evaluations"] for name, rows in whole.items()}
    words = ", ".join(f"{name} ×{g:.1f}" for name, g in growth.items())
    axes.set_title(plots.fill(f"{lengths[-1] // lengths[0]}× the length: evaluations {words}"))
    axes.set_xlabel("sequence length (tokens; dotted: training length)")
    axes.legend(frameon=False, fontsize=7)


def draw_depth(axes: Any, results: dict[str, Any]) -> None:
    """Figure 4: the change from layer to layer of the stack, after the warm-up and at the end."""
    lengths = sorted({row["length"] for row in results["by_depth"]})
    first, last = min(r["step"] for r in results["by_depth"]), max(r["step"] for r in results["by_depth"])
    shades = plots.plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(lengths)))
    for row in results["by_depth"]:
        change = study.numbers(row["change"])
        style = "-" if row["step"] == last else ":"
        label = f"T = {row['length']}" if row["step"] == last else None
        axes.semilogy(
            np.arange(1, len(change) + 1),
            change,
            style,
            lw=1.2,
            color=shades[lengths.index(row["length"])],
            label=label,
        )
    end = {
        step: np.nanmedian([study.numbers(r["change"])[-1] for r in results["by_depth"] if r["step"] == step])
        for step in (first, last)
    }
    axes.set_title(
        plots.fill(
            f"layer {results['config']['depth']} still changes {end[last]:.1g} of the state after training, "
            f"{end[first]:.1g} before (dotted)"
        )
    )
    axes.set(xlabel="layer of the weight-tied stack", ylabel="relative change per layer, median")
    axes.legend(frameon=False, fontsize=8)


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.iterations", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
