"""What happens where the fixed point is unstable or does not exist (reviewers 1 and 3; paper Figure 2 right).

python -m experiments.paper.stability reduced
python -m experiments.paper.stability figure
python -m experiments.paper.stability paper
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from experiments.paper.stability_report import draw, table
from experiments.paper.stability_scalars import SCALAR_SOLVERS, policy_rows, scalar_rows
from experiments.shared import study, trained
from experiments.shared.gradients import angle, flat, gradient_of, reference
from experiments.shared.numerics import stretch
from experiments.training import lm, lm_model, lm_train


@dataclasses.dataclass(frozen=True)
class Config:
    """Scalar maps with known answers, the trained model's residuals, injected failures, remedies, path independence.

    python -m experiments.paper.stability reduced

    You should see a spectral radius above 1 after training. The residual of plain iteration then stops falling; the
    residuals of Anderson and Broyden keep falling.
    """

    model: lm_model.Config = trained.REDUCED
    run: Path = Path("runs/studies/stability")
    out: Path | None = None
    evaluations: int = 150  # of a trace, as in the paper's figure
    sequences: int = 8
    injected: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 40)  # budgets of both solves, for the gradient's error
    cap: int = 3  # of the cut-off solves in training
    train_steps: int = 100
    rtol: float = 1e-3
    jacobian_weight: float = 1.0


PRESETS = {
    "reduced": ("4 minutes on one CPU core, and 3 for the model if it is not trained yet", Config()),
    "paper": (
        "a day on 8 accelerators, after the model's own training",
        Config(model=trained.PAPER, run=Path("runs/studies/stability-paper"), sequences=3, train_steps=10_000),
    ),
}


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    scalars = [row for name in SCALAR_SOLVERS for row in cells(f"scalars {name}", lambda name=name: scalar_rows(name))]
    model = trained.load(config.model)
    steps = [step for step in model.states if step >= model.config.shallow_steps]
    return {
        "seed": config.model.seed,
        "dtype": config.model.dtype,
        "warm_up": model.config.shallow_steps,
        "scalars": scalars,
        "policies": cells("policies", policy_rows),
        "traces": traces(config, model, steps, cells),
        "injected": injected(config, model, cells),
        "training": training(config, model, steps[1], cells),
    }


# ---- the trained model -------------------------------------------------------------------------------------


def trace_solvers(config: Config) -> dict[str, Any]:
    options: dict[str, Any] = dict(rtol=0.0, max_steps=config.evaluations)
    return {
        "Picard": deq.Picard(**options),
        "Picard, damping 0.5": deq.Picard(**options, damping=0.5),
        "Anderson": deq.Anderson(**options, history=6),
        "Broyden": deq.Broyden(**options, rank=config.evaluations),
    }


def state_of_affairs(config: Config, model: trained.Trained) -> Callable:
    """A compiled measurement on held-out text: spectral radius, norm of the Jacobian, path independence."""
    f, context_of, z0 = trained.held_out(model, config.sequences)
    tight = deq.Anderson(rtol=1e-4, max_steps=config.evaluations, history=12)

    @jax.jit
    def look(context):
        solve = lambda start, solver=tight: deq.solve(f, start, context, solver=solver, batch_ndim=1)
        found = solve(z0)
        other = solve(jnp.roll(found.value, 1, axis=0))
        noise = solve(jax.random.normal(jax.random.key(0), z0.shape, z0.dtype))
        usual = solve(z0, dataclasses.replace(tight, rtol=config.rtol))

        def cosine(a, b):
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            return jnp.mean(jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)))

        return {
            "radius": deq.stability.spectral_radius(f, found.value, context, batch_ndim=1, iterations=80),
            "stretch": stretch(f, found.value, context),
            "converged": found.stats.converged.mean(),
            "residual": found.stats.relative_residual,
            # Anil et al. (2022): the asymptotic alignment of the equilibria found from different starts.
            "alignment_shuffled": cosine(found.value, other.value),
            "alignment_noise": cosine(found.value, noise.value),
            "shuffled_converged": other.stats.converged.mean(),
            "evaluations": usual.stats.steps.mean(),
        }

    return lambda params: look(context_of(params))


def traces(config: Config, model: trained.Trained, steps: Sequence[int], cells: study.Cells) -> list[dict[str, Any]]:
    """The residual of every solver by evaluations at each milestone, and the stability of the equilibrium there."""
    f, context_of, z0 = trained.held_out(model, config.sequences)
    look = state_of_affairs(config, model)
    fold = deq.ResidualTrace(config.evaluations)
    compiled = {
        name: jax.jit(lambda context, solver=solver: deq.solve(f, z0, context, solver=solver, batch_ndim=1, fold=fold))
        for name, solver in trace_solvers(config).items()
    }
    rows = []
    for step in steps:
        params = model.states[step].params
        row: dict[str, Any] = {"step": step, **cells(f"equilibrium at step {step}", lambda: look(params))}
        for name, run in compiled.items():

            def curve():
                solved = run(context_of(params))
                return {
                    "residual": trained.median_trace(solved),
                    "lowest": solved.stats.relative_residual,
                    "converged": float(np.mean(np.asarray(solved.stats.relative_residual) <= config.rtol)),
                }

            row[name] = cells(f"trace at step {step}, {name}", curve)
        rows.append(row)
    return rows


def injected(config: Config, model: trained.Trained, cells: study.Cells) -> list[dict[str, Any]]:
    """The gradient with both solves cut off, compared with the float64 gradient, under each policy."""
    state, gradient = model.last, gradient_of(model.graphdef)
    segment = model.batches[int(state.step)]
    exact: list[np.ndarray] = []

    def one(cap: int, policy: deq.OnFailure) -> dict[str, Any]:
        if not exact:
            exact.append(reference(model.config, model.corpus.vocabulary, state, segment)[0])
        budget: dict[str, Any] = dict(rtol=config.rtol, max_steps=trained.swept(cap))
        adjoint = deq.Implicit(deq.Anderson(**budget, history=12), on_failure=policy)
        grads, told = gradient(state.params, segment, state.carry, deq.Anderson(**budget, history=6), adjoint)
        return angle(grads, exact[0]) | told | {"finite": bool(np.isfinite(flat(grads)).all())}

    return [
        {"cap": cap, "policy": policy.name} | cells(f"gradient cap {cap}, {policy.name}", lambda: one(cap, policy))
        for policy in deq.OnFailure
        for cap in config.injected
    ]


def training(config: Config, model: trained.Trained, first: int, cells: study.Cells) -> list[dict[str, Any]]:
    """Continue training from one state: with sound solves, with solves cut off, with a penalty on the Jacobian."""
    segments = lm.evaluation_segments(model.corpus.valid, lm_train.EVALUATION_BATCH, model.config.length)
    evaluate = lm.make_evaluate(model.graphdef, segments, deq.Anderson())
    look = state_of_affairs(config, model)
    go, penalized = trained.continuing(model), trained.continuing(model, jacobian_weight=config.jacobian_weight)
    full = int(config.model.solver.max_steps)

    def one(forward: int, backward: int, policy: deq.OnFailure, go: Callable = go) -> dict[str, Any]:
        solver = deq.Anderson(rtol=config.rtol, max_steps=trained.swept(forward), history=6)
        inner = deq.Anderson(rtol=config.rtol, max_steps=trained.swept(backward), history=12)
        state, log = go(model.states[first], solver, deq.Implicit(inner, on_failure=policy), config.train_steps)
        tight = deq.Anderson(rtol=1e-4, max_steps=trained.swept(100), history=6)
        at_tight, as_trained = (evaluate(state.params, 3, s) for s in (tight, solver))
        return {
            "curve": log["loss"],
            "valid_tight": at_tight.loss,
            "valid_as_trained": as_trained.loss,
            "grad_norm": log["grad_norm"],
            "skipped": int(log["skipped"].sum()),
            **look(state.params),
        }

    keep, zero, one_step = deq.OnFailure.KEEP, deq.OnFailure.ZERO, deq.OnFailure.ONE_STEP
    cap = config.cap
    runs: dict[str, Callable] = {
        "sound": lambda: one(full, full, keep),
        f"forward cap {cap}": lambda: one(cap, full, keep),
        f"backward cap {cap}": lambda: one(full, cap, keep),
        f"both caps {cap}, KEEP": lambda: one(cap, cap, keep),
        f"both caps {cap}, ONE_STEP": lambda: one(cap, cap, one_step),
        f"both caps {cap}, ZERO": lambda: one(cap, cap, zero),
        f"Jacobian penalty {config.jacobian_weight:g}": lambda: one(full, full, keep, penalized),
    }
    return [{"run": name, "from": first} | cells(f"training, {name}", run) for name, run in runs.items()]


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.stability", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
