"""How much the tolerances matter (reviewer 2; paper Figure 3): of inference, of training, and of both for the gradient.

python -m experiments.tolerance_study reduced
python -m experiments.tolerance_study figure       # table and figure again, from the results that are kept
python -m experiments.tolerance_study paper        # WikiText-103, on accelerators
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov
from experiments import char_lm, data, lm, plots, study, trained
from experiments.gradient_study import GMRES, float64


@dataclasses.dataclass(frozen=True)
class Config:
    """Loss against the solver's tolerance and budget, in inference and in training; the angle of the gradient.

    python -m experiments.tolerance_study reduced

    You should see a loss that is flat up to some tolerance and then rises steeply, as in the paper's Figure 3.
    """

    model: char_lm.Config = trained.REDUCED
    run: Path = Path("runs/studies/tolerance")  # where finished cells are kept; continued if it is there
    out: Path | None = None
    tolerances: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.15, 0.3)  # relative
    caps: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
    segments: int = 3  # of validation text, 32 streams each
    max_steps: int = 100  # of a solve to a tolerance
    gradient_tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    gradient_caps: tuple[int, ...] = (3, 5, 10, 20, 40)
    train_steps: int = 100  # from the first milestone of the equilibrium, at each of the settings below
    train_tolerances: tuple[tuple[float, float], ...] = (
        (1e-1, 1e-1), (1e-2, 1e-2), (1e-3, 1e-3), (1e-4, 1e-4), (1e-3, 1e-1), (1e-1, 1e-3),
    )  # forward, backward  # fmt: skip
    train_caps: tuple[tuple[int, int], ...] = ((5, 5), (10, 10), (15, 15), (20, 20), (30, 30), (50, 50), (30, 5))
    tight: float = 1e-4  # the tolerance that trained models are compared at


PRESETS = {
    "reduced": ("6 minutes on one CPU core, and 3 for the model if it is not trained yet", Config()),
    "paper": (
        "days on 8 accelerators: WikiText-103, 258M parameters of which 71M are the cell's",
        Config(
            model=trained.PAPER,
            run=Path("runs/studies/tolerance-paper"),
            segments=100,
            train_steps=20_000,
            train_tolerances=((1e-2, 1e-2), (1e-3, 1e-3), (1e-4, 1e-4)),
            train_caps=((10, 10), (15, 15), (20, 20), (30, 35), (50, 55)),
        ),
    ),
}
SOLVERS: dict[str, Any] = {"Anderson": deq.Anderson(history=6), "Broyden": deq.Broyden(rank=30)}


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    model = trained.load(config.model)
    first = min(step for step in model.states if step > model.config.shallow_steps)
    return {
        "seed": config.model.seed,
        "dtype": config.model.dtype,
        "trained_steps": int(model.last.step),
        "train_from": first,
        **inference(config, model, cells),
        "gradient": gradients(config, model, cells),
        "training": training(config, model, model.states[first], cells),
    }


# ---- inference ---------------------------------------------------------------------------------------------


def inference(config: Config, model: trained.Trained, cells: study.Cells) -> dict[str, Any]:
    """The validation loss by tolerance, and by budget alone; each segment's history is solved for likewise."""
    segments = lm.evaluation_segments(model.corpus.valid, char_lm.EVALUATION_BATCH, model.config.length)
    found: dict[str, Any] = {"by_tolerance": [], "by_cap": []}
    for name, solver in SOLVERS.items():
        evaluate = lm.make_evaluate(model.graphdef, segments, solver)
        value = lambda **options: evaluate(
            model.last.params, config.segments, dataclasses.replace(solver, **options)
        )._asdict()
        for rtol in config.tolerances:
            told = cells(
                f"inference {name} rtol {rtol:g}", lambda: value(rtol=rtol, max_steps=trained.swept(config.max_steps))
            )
            found["by_tolerance"].append({"solver": name, "rtol": rtol, **told})
        for cap in config.caps:
            told = cells(f"inference {name} cap {cap}", lambda: value(rtol=0.0, max_steps=trained.swept(cap)))
            found["by_cap"].append({"solver": name, "cap": cap, **told})
    return found


# ---- the gradient ------------------------------------------------------------------------------------------


def gradient_of(graphdef: Any):
    """A compiled (params, segment, carry, solver, adjoint) -> (gradient, forward and backward statistics)."""

    @jax.jit
    def gradient(params, segment, carry, solver, adjoint):
        def loss(params, probe):
            key = jax.random.key(0)
            value, (_, _, metrics) = char_lm.loss_fn(graphdef, solver, adjoint, params, probe, (), segment, key, carry)
            return value, metrics

        probe = deq.Probe.zeros(segment.inputs.shape[:1])
        (grads, backward), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probe)
        return grads, {
            "evaluations": metrics["fwd_steps"],
            "residual": metrics["fwd_residual"],
            "products": backward.steps.mean(),
            "backward_residual": backward.residual.max(),
        }

    return gradient


def flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def angle(got: PyTree, want: np.ndarray) -> dict[str, float]:
    got = flat(got)
    sizes = np.linalg.norm(got), np.linalg.norm(want)
    return {
        "cosine": float(got @ want / (sizes[0] * sizes[1])),
        "error": float(np.linalg.norm(got - want) / sizes[1]),
        "size": float(sizes[0] / sizes[1]),
    }


def reference(model: trained.Trained, state: Any, segment: data.Segment) -> tuple[np.ndarray, dict[str, Any]]:
    """The gradient in float64, both equilibria to 1e-10: by GMRES behind Anderson with a long memory."""
    with float64():
        wide = dataclasses.replace(model.config, dtype="float64")
        graphdef, _ = nnx.split(char_lm.build(wide, model.corpus.vocabulary), nnx.Param)
        to_wide = functools.partial(
            jax.tree.map, lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        )
        solver = deq.Anderson(rtol=1e-10, max_steps=400, history=20)
        backward = NewtonKrylov(rtol=1e-10, max_steps=400, krylov=60, forcing=1e-11, **GMRES)
        grads, told = gradient_of(graphdef)(
            to_wide(state.params), segment, to_wide(state.carry), solver, deq.Implicit(backward)
        )
        return flat(grads), study.plain(told)


def gradients(config: Config, model: trained.Trained, cells: study.Cells) -> dict[str, Any]:
    """The angle to the float64 gradient by forward and backward tolerance, and by budget, at the trained model."""
    state = model.last
    segment = model.batches[int(state.step)]
    gradient = gradient_of(model.graphdef)

    @functools.cache
    def exact():
        return reference(model, state, segment)

    def one(forward: dict[str, Any], backward: dict[str, Any]) -> dict[str, Any]:
        solver = deq.Anderson(**forward, history=6)
        adjoint = deq.Implicit(deq.Anderson(**backward, history=12))
        grads, told = gradient(state.params, segment, state.carry, solver, adjoint)
        return angle(grads, exact()[0]) | told

    rows = []
    for f in config.gradient_tolerances:
        for b in config.gradient_tolerances:
            options = [dict(rtol=rtol, max_steps=trained.swept(config.max_steps)) for rtol in (f, b)]
            rows.append({"forward": f, "backward": b} | cells(f"gradient rtol {f:g} {b:g}", lambda: one(*options)))
    caps = []
    for f in config.gradient_caps:
        for b in config.gradient_caps:
            options = [dict(rtol=0.0, max_steps=trained.swept(cap)) for cap in (f, b)]
            caps.append({"forward": f, "backward": b} | cells(f"gradient cap {f} {b}", lambda: one(*options)))
    return {"reference": cells("gradient reference", lambda: exact()[1]), "by_tolerance": rows, "by_cap": caps}


# ---- training ----------------------------------------------------------------------------------------------


def training(config: Config, model: trained.Trained, start: Any, cells: study.Cells) -> list[dict[str, Any]]:
    """`train_steps` more steps from one state, with each pair of tolerances and of budgets."""
    go = trained.continuing(model)
    segments = lm.evaluation_segments(model.corpus.valid, char_lm.EVALUATION_BATCH, model.config.length)
    evaluate = lm.make_evaluate(model.graphdef, segments, SOLVERS["Anderson"])
    gradient = gradient_of(model.graphdef)

    def one(forward: dict[str, Any], backward: dict[str, Any]) -> dict[str, Any]:
        solver = deq.Anderson(**forward, history=6)
        adjoint = deq.Implicit(deq.Anderson(**backward, history=12))
        state, log = go(start, solver, adjoint, config.train_steps)
        tight = deq.Anderson(rtol=config.tight, max_steps=trained.swept(config.max_steps), history=6)
        at_tight = evaluate(state.params, config.segments, tight)
        as_trained = evaluate(state.params, config.segments, solver)
        batch = model.batches[0]
        exact = deq.Implicit(deq.Anderson(rtol=1e-5, max_steps=trained.swept(config.max_steps), history=12))
        want, _ = gradient(state.params, batch, state.carry, dataclasses.replace(tight, rtol=1e-5), exact)
        got, _ = gradient(state.params, batch, state.carry, solver, adjoint)
        last = max(1, config.train_steps // 4)
        return {
            "loss": log["loss"][-last:].mean(),
            "valid_tight": at_tight.loss,
            "valid_as_trained": as_trained.loss,
            "tight_evaluations": at_tight.steps,
            "tight_converged": at_tight.converged,
            "evaluations": log["fwd_steps"].mean(),
            "products": log["bwd_steps"].mean(),
            "skipped": int(log["skipped"].sum()),
            "cosine": angle(got, flat(want))["cosine"],
            "curve": log["loss"],
        }

    rows = []
    for f, b in config.train_tolerances:
        options = [dict(rtol=rtol, max_steps=trained.swept(config.model.solver.max_steps)) for rtol in (f, b)]
        rows.append(
            {"kind": "rtol", "forward": f, "backward": b} | cells(f"training rtol {f:g} {b:g}", lambda: one(*options))
        )
    for f, b in config.train_caps:
        options = [dict(rtol=config.tight, max_steps=trained.swept(cap)) for cap in (f, b)]
        rows.append(
            {"kind": "cap", "forward": f, "backward": b} | cells(f"training cap {f} {b}", lambda: one(*options))
        )
    return rows


# ---- what is kept ------------------------------------------------------------------------------------------

PAPER_DIM = 700


def paper_curve() -> tuple[np.ndarray, np.ndarray]:
    """Figure 3 left as (relative tolerance, excess loss in nats).

    The paper's ε is √T times the printed one, of a sequence whose ‖f(z)‖ is √(T·700): the residual relative to
    that is ε/√700. Its text leaves that reading open; another one shifts the curve sideways.
    """
    eps, perplexity = study.published("valppl_vs_eps_stepavg", "deq_transformer").T
    return eps / PAPER_DIM**0.5, np.log(perplexity / perplexity[0])


def cliff(rtol: Iterable[float], excess: Iterable[float], limit: float = 0.01) -> float:
    """The largest tolerance up to which the loss stays within `limit` nats of the best."""
    flat_until = 0.0
    for tolerance, more in sorted(zip(rtol, excess, strict=True)):
        if not more <= limit:
            break
        flat_until = tolerance
    return flat_until


def excess(results: dict[str, Any], part: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in results[part] if row["solver"] == name]
    x = np.array([row["rtol" if part == "by_tolerance" else "cap"] for row in rows], float)
    loss = study.numbers([row["loss"] for row in rows])
    return x, loss - best_loss(results)


def best_loss(results: dict[str, Any]) -> float:
    """At the tightest tolerance, by the first solver: not the smallest, which would make noise look like a gain."""
    return min(results["by_tolerance"], key=lambda row: row["rtol"])["loss"]


def table(results: dict[str, Any]) -> str:
    lines = ["# Tolerances", "", f"    {results['command']}", ""]
    lines += [
        study.conditions(results, dtype=results["dtype"], seed=results["seed"], gradient="Implicit(Anderson(12))")
    ]
    lines += [f"{results['trained_steps']} steps of training; {results['cpu_seconds']:.0f} CPU seconds.", ""]
    lines += [
        "## Inference, by relative tolerance",
        "",
        f"Nats above {best_loss(results):.4f} (evaluations a solve).",
        "",
    ]
    for part, key, form in ("by_tolerance", "rtol", "{:g}"), ("by_cap", "cap", "{}"):
        names = list(SOLVERS)
        found = {(row["solver"], row[key]): row for row in results[part]}
        entry = lambda row: f"{row['loss'] - best_loss(results):+.4f} ({row['steps']:.1f})"
        keys = sorted({row[key] for row in results[part]})
        if part == "by_cap":
            lines += ["## Inference, by budget of evaluations", ""]
        lines += plots.markdown_table([key, *names], [
            [form.format(k), *(entry(found[n, k]) for n in names)] for k in keys
        ])  # fmt: skip
    gradient = results["gradient"]
    lines += ["## The gradient at the trained model", ""]
    told = gradient["reference"]
    lines += study.paragraph(
        "1 − cosine to the float64 gradient; rows are the forward solve's, columns the backward's. The reference's own",
        f"residuals: {told['residual']:.0e} and {told['backward_residual']:.0e}.",
    )
    for part, title in ("by_tolerance", "tolerance"), ("by_cap", "budget"):
        found = {(row["forward"], row["backward"]): row for row in gradient[part]}
        keys = sorted({f for f, _ in found}, reverse=part == "by_tolerance")
        lines += plots.markdown_table([title, *(f"{k:g}" for k in keys)], [
            [f"{f:g}", *(f"{1 - found[f, b]['cosine']:.1e}" for b in keys)] for f in keys
        ])  # fmt: skip
    lines += ["## Training", ""]
    count, tight = len(results["training"][0]["curve"]), results["config"]["tight"]
    lines += study.paragraph(
        f"{count} steps from step {results['train_from']}, the same batches for all; validation at {tight:g} and",
        "with the solver as trained; cosine: of the training's own gradient to a tight one, at the end.",
    )
    losses = "loss", "valid_tight", "valid_as_trained"
    head = [
        "forward",
        "backward",
        "training",
        "validation",
        "as trained",
        "evaluations",
        "products",
        "cosine",
        "skipped",
    ]
    lines += plots.markdown_table(head, [
        [f"{r['kind']} {r['forward']:g}", f"{r['backward']:g}", *(number(r[k]) for k in losses),
         f"{r['evaluations']:.1f}", f"{r['products']:.1f}", number(r["cosine"]), r["skipped"]]
        for r in results["training"]
    ])  # fmt: skip
    return "\n".join(lines)


def number(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.4f}"


def draw(results: dict[str, Any], path: Path) -> None:
    plt = plots.plt
    with plt.rc_context(plots.STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
        x, y = paper_curve()
        left.plot(x, y, "k--", marker="x", label="paper, DEQ-Transformer on WikiText-103")
        for name in SOLVERS:
            x, y = excess(results, "by_tolerance", name)
            left.plot(x, y, "o-", color=plots.COLOURS[name], ms=4, label=name)
            x, y = excess(results, "by_cap", name)
            middle.plot(x, y, "o-", color=plots.COLOURS[name], ms=4, label=name)
        left.set(xscale="log", xlabel="relative tolerance of the solve (the paper's ε over √700)")
        left.set_yscale("symlog", linthresh=0.01)
        left.set_ylabel("validation loss above the tightest solve's (nats/token)")
        ours = ", ".join(f"{name} {cliff(*excess(results, 'by_tolerance', name)):g}" for name in SOLVERS)
        left.set_title(plots.fill(f"flat within 0.01 nats up to: {ours}, the paper's {cliff(*paper_curve()):.1g}"))
        middle.set_yscale("symlog", linthresh=0.01)
        middle.set_xscale("log")
        ticks = [2, 5, 10, 20, 50]
        middle.set_xticks(ticks, [str(t) for t in ticks])
        middle.minorticks_off()
        middle.axvline(30, color="0.6", lw=0.8, ls=":")
        middle.text(
            30,
            0.97,
            " paper: 30 suffice at T = 75",
            transform=middle.get_xaxis_transform(),
            va="top",
            fontsize=8,
            color="0.4",
        )
        middle.set(xlabel="evaluations of f allowed", ylabel="validation loss above the tightest solve's (nats/token)")
        enough = {
            name: min((c for c, e in zip(*excess(results, "by_cap", name), strict=True) if e <= 0.01), default=None)
            for name in SOLVERS
        }
        words = ", ".join(f"{name} {n:.0f}" if n else f"{name} none" for name, n in enough.items())
        middle.set_title(plots.fill(f"within 0.01 nats after: {words} evaluations"))
        for axes in left, middle:
            axes.set_ylim(bottom=-0.004)
            axes.axhline(0, color="0.8", lw=0.8, zorder=0)
            axes.legend(frameon=False, fontsize=8)
        draw_training(right, results)
        note = f"{results['command']}; " + study.conditions(results, dtype=results["dtype"], seed=results["seed"])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_training(axes: Any, results: dict[str, Any]) -> None:
    rows = [row for row in results["training"] if row["valid_tight"] is not None]
    names = [f"{row['kind']} {row['forward']:g} / {row['backward']:g}" for row in rows]
    y = np.arange(len(rows))
    axes.plot([row["valid_as_trained"] for row in rows], y, "o", mfc="none", color="0.5", label="solver as trained")
    tight = f"solves to {results['config']['tight']:g}"
    axes.plot([row["valid_tight"] for row in rows], y, "o", ms=4, color=plots.COLOURS["Anderson"], label=tight)
    right = max(row["valid_tight"] for row in rows)
    for row, at in zip(rows, y, strict=True):
        axes.annotate(f"{row['cosine']:.3f}", (1.02, at), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.annotate("cosine", (1.02, -1), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.set_yticks(y, names, fontsize=7)
    axes.invert_yaxis()
    spread = right - min(row["valid_tight"] for row in rows)
    worst = names[int(np.argmax([row["valid_tight"] for row in rows]))]
    axes.set_title(plots.fill(f"{len(rows[0]['curve'])} steps at each setting: {spread:.3f} nats apart, worst {worst}"))
    axes.set(xlabel="validation loss after training (nats/token)", ylabel="forward / backward")
    axes.legend(frameon=False, fontsize=8)


def main(args: Sequence[str] | None = None) -> None:
    study.run("tolerance", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
