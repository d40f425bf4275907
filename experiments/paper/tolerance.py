"""How much the tolerances matter for inference, for training and for the gradient (reviewer 2; paper Figure 3).

python -m experiments.paper.tolerance reduced
python -m experiments.paper.tolerance figure       # table and figure again, from the stored results
python -m experiments.paper.tolerance paper        # WikiText-103, on accelerators
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deq_jax as deq
from experiments.paper.tolerance_report import SOLVERS, draw, table
from experiments.shared import study, trained
from experiments.shared.gradients import angle, flat, gradient_of, reference
from experiments.training import lm, lm_model, lm_train


@dataclasses.dataclass(frozen=True)
class Config:
    """Loss against the solver's tolerance and budget, in inference and in training; the angle of the gradient.

    python -m experiments.paper.tolerance reduced

    You should see a loss that is flat up to some tolerance and then rises steeply, as in the paper's Figure 3.
    """

    model: lm_model.Config = trained.REDUCED
    run: Path = Path("runs/studies/tolerance")  # finished cells are stored here; an existing run is continued
    out: Path | None = None
    tolerances: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.15, 0.3)  # relative
    caps: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50)
    segments: int = 3  # of validation text, 32 streams each
    max_steps: int = 100  # of a solve to a tolerance
    gradient_tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    gradient_caps: tuple[int, ...] = (3, 5, 10, 20, 40)
    train_steps: int = 100  # from the first milestone of the equilibrium, for each setting below
    train_tolerances: tuple[tuple[float, float], ...] = (
        (1e-1, 1e-1), (1e-2, 1e-2), (1e-3, 1e-3), (1e-4, 1e-4), (1e-3, 1e-1), (1e-1, 1e-3),
    )  # forward, backward  # fmt: skip
    train_caps: tuple[tuple[int, int], ...] = ((5, 5), (10, 10), (15, 15), (20, 20), (30, 30), (50, 50), (30, 5))
    tight: float = 1e-4  # the tolerance at which trained models are compared


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
    """The validation loss by tolerance, and by budget alone. Each segment's history is solved in the same way."""
    segments = lm.evaluation_segments(model.corpus.valid, lm_train.EVALUATION_BATCH, model.config.length)
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


def gradients(config: Config, model: trained.Trained, cells: study.Cells) -> dict[str, Any]:
    """The angle to the float64 gradient at the trained model, by forward and backward tolerance and by budget."""
    state = model.last
    segment = model.batches[int(state.step)]
    gradient = gradient_of(model.graphdef)

    @functools.cache
    def exact():
        return reference(model.config, model.corpus.vocabulary, state, segment)

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
    segments = lm.evaluation_segments(model.corpus.valid, lm_train.EVALUATION_BATCH, model.config.length)
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


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.tolerance", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
