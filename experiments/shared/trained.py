"""One trained DEQ-Transformer for all studies, kept at milestones on the way: `python -m experiments.shared.trained`.

The studies load it, and train it where it is not there yet. A run that was cut continues.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

import deq_jax as deq
from experiments.shared.plots import read_log
from experiments.training import cli, data, lm, lm_model, lm_presets, lm_train
from experiments.training.checkpoints import RunDirectory, config_to_json
from experiments.training.loop import TrainState, make_train_step

# The paper's own order of tolerances: tight in training, so that what is measured later is the model's doing.
REDUCED = lm_model.Config(
    run=Path("runs/studies/model"),
    steps=1000,
    shallow_share=1 / 5,
    warmup_share=1 / 24,
    batch=8,
    length=64,
    mem_len=64,
    dim=64,
    heads=4,
    inner_dim=256,
    lr=2e-3,
    save_every=100,
    solver=deq.Anderson(rtol=1e-3, max_steps=30, history=6),
    adjoint=deq.Implicit(deq.Anderson(rtol=1e-3, max_steps=30, history=12)),
)
PAPER = dataclasses.replace(lm_presets.PRESETS["wikitext-103"][1], run=Path("runs/studies/wikitext-103"))
# Of the steps, where parameters are kept; the end of the shallow warm-up is always among them.
MILESTONES = (0.3, 0.5, 1.0)


class Trained(NamedTuple):
    config: lm_model.Config
    corpus: data.Corpus
    graphdef: Any
    states: dict[int, TrainState]  # by step: the start, the end of the warm-up, the milestones
    log: list[dict[str, Any]]  # of the training

    @property
    def batches(self) -> data.Segments:
        """The segments of the training text, by step."""
        config = self.config
        return data.segments(self.corpus.train, config.batch, config.length, seed=config.seed)

    @property
    def last(self) -> TrainState:
        return self.states[max(self.states)]

    @property
    def warm(self) -> TrainState:
        """Where the unrolled warm-up ends and the equilibrium begins."""
        return self.states[self.config.shallow_steps]


def milestones(config: lm_model.Config) -> list[int]:
    shares = (round(share * config.steps) for share in MILESTONES)
    return sorted({0, config.shallow_steps, *(step for step in shares if step >= config.shallow_steps)})


def load(config: lm_model.Config) -> Trained:
    """The model at its milestones; what is not there yet is trained first."""
    corpus = lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir)
    graphdef, start = lm_train.start_state(config, corpus.vocabulary)
    stored = lm.identity(config_to_json(config), corpus)
    with RunDirectory(config.run, stored, harmless=lm_train.HARMLESS) as run:
        finished = run.step == config.steps
    if not finished:
        train(config, stored)
    states = {}
    for step in milestones(config):
        with milestone(config, stored, step) as kept:
            states[step], _ = kept.restore(start)
    return Trained(config, corpus, graphdef, states, read_log(run.metrics_path))


def milestone(config: lm_model.Config, stored: dict[str, Any], step: int) -> RunDirectory:
    return RunDirectory(config.run / "milestones" / str(step), stored, harmless=lm_train.HARMLESS)


def train(config: lm_model.Config, stored: dict[str, Any]) -> None:
    print(f"the studies' model: {config.steps} steps, kept in {config.run}; 3 minutes on one core", flush=True)
    kept = set(milestones(config))

    def keep(step: int, state: TrainState) -> None:
        if step in kept:
            with milestone(config, stored, step) as directory:
                directory.save(step, state)

    lm_train.train(config, "model", keep=keep)


# ---- to go on from a milestone, with other solvers -----------------------------------------------------------


def continuing(trained: Trained, *, jacobian_weight: float = 0.0) -> Callable:
    """`go(state, solver, adjoint, steps) -> (state, log)`: training goes on from there with this solver and adjoint.

    One program for all tolerances and budgets of one structure. `log` has an array [steps] for each metric.
    """
    config, graphdef, batches = trained.config, trained.graphdef, trained.batches

    def loss(params, probe, rest, batch, key, carry):
        segment, solver, adjoint = batch
        options: dict[str, Any] = {"jacobian_weight": jacobian_weight}
        return lm_model.loss_fn(graphdef, solver, adjoint, params, probe, rest, segment, key, carry, **options)

    step = make_train_step(loss, lm_train.optimizer(config), probe=deq.Probe.zeros((config.batch,)))

    def go(state, solver, adjoint, steps):
        state = jax.tree.map(jnp.copy, state)  # the step donates what it is given
        first, lines = int(state.step), []
        for i in range(first, first + steps):
            state, metrics = step(state, (batches[i], solver, adjoint))
            lines.append(metrics)
        lines = jax.device_get(lines)
        return state, {name: np.array([line[name] for line in lines]) for name in lines[0]}

    return go


def swept(max_steps: Any) -> Any:
    """A budget that can be swept: as a Python int it is part of the program, and each one would compile anew."""
    return jnp.asarray(max_steps)


def held_out(trained: Trained, count: int, length: int | None = None) -> tuple[Callable, Callable, Array]:
    """(f, context, z0): `deq.solve(f, z0, context(params), batch_ndim=1)` is the equilibrium of held-out text.

    There are `count` sequences, each with the history of the segment before it.
    """
    length = length or trained.config.length
    segments = lm.evaluation_segments(trained.corpus.valid[: 2 * count * length + 1], count, length)
    first, second = (segments[i].inputs for i in range(2))

    @jax.jit
    def context(params):
        model = nnx.merge(trained.graphdef, params)
        history = model.hidden(first, solver=deq.Anderson(rtol=1e-4, max_steps=100)).history
        return model.context(second, history)

    f = nnx.merge(trained.graphdef, trained.last.params).cell.f
    return f, context, jnp.zeros((count, length, trained.config.dim), trained.config.dtype)


def median_trace(solved: deq.SolveResult) -> np.ndarray:
    """The median over problems of a `ResidualTrace`; one that had ended stays at the residual it returned."""
    trace = np.asarray(solved.folded)
    return np.median(np.where(np.isnan(trace), np.asarray(solved.stats.relative_residual)[:, None], trace), 0)


def main(args: Sequence[str] | None = None) -> None:
    def train_model(preset: str = "reduced") -> None:
        """Train what the studies share: `reduced` (3 minutes), or `paper`, the full size on WikiText-103."""
        presets = {"reduced": REDUCED, "paper": PAPER}
        if preset not in presets:
            raise ValueError(f"no preset {preset!r}; there are {', '.join(presets)}")
        trained = load(presets[preset])
        print(f"{trained.config.run}: steps {', '.join(map(str, trained.states))}")

    cli.run_command(
        {"train": train_model}, args, prog="python -m experiments.shared.trained", description=__doc__, default="train"
    )


if __name__ == "__main__":
    main()
