"""The time of an equilibrium's training and inference relative to an explicit network, and the time to a fixed loss.

    python -m experiments.paper.runtime
    python -m experiments.paper.runtime paper
    python -m experiments.paper.runtime figure

The explicit network has as many parameters, in layers that each have their own weights. A weight-tied network of the
equilibrium's own cell is timed too. Times are processor time, all programs run in turn, and only ratios are reported.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deq_jax as deq
from experiments.paper.runtime_contenders import RIVALS, SHALLOW, Contender, contenders, rival_shape
from experiments.paper.runtime_report import TRAINED, draw, table, weights_of
from experiments.shared import study
from experiments.shared.models import FAMILIES, Shape, optimizer
from experiments.shared.timing import interleaved
from experiments.training import cli, data, lm, lm_step
from experiments.training.loop import TrainState, count_params, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Eight minutes on one CPU core: how many times as long as an explicit step is a step at the equilibrium?

    python -m experiments.paper.runtime

    The paper's answers are 2.82 for training and 1.76 for inference; they depend on the depth one compares with.
    """

    run: Path = Path("runs/runtime")
    out: Path | None = None
    families: tuple[str, ...] = ("DEQTransformer",)
    # A wide feed-forward layer, as in the paper: one layer holds all the parameters.
    shape: Shape = Shape(dim=64, heads=4, inner_dim=512, batch=16, length=64, mem_len=64)
    layers: int = 6  # of the explicit networks
    data: str = "shakespeare"
    level: Literal["char", "word"] = "char"
    data_dir: Path | None = None
    shallow_steps: int = 100  # warm-up of the equilibrium through two layers; its time counts
    steps: int = 200  # at the equilibrium, after the warm-up
    explicit_steps: int = 500
    eval_every: int = 50
    eval_segments: int = 6
    lr: float = 1e-3
    rtol: float = 1e-2  # of the equilibrium, forward and backward
    max_steps: int = 16
    inference_rtols: tuple[float, ...] = (1e-1, 1e-2)
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise ValueError(f"--families must be of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
        for name in ("layers", "steps", "explicit_steps", "eval_every", "eval_segments", "max_steps", "repeats"):
            cli.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        cli.require(self.shallow_steps >= 0, "shallow_steps", "at least 0", self.shallow_steps)
        cli.require(self.rtol in self.inference_rtols, "inference_rtols", f"with rtol ({self.rtol:g}) among them",
                   self.inference_rtols)  # fmt: skip


PRESETS = {
    "reduced": ("eight minutes on one CPU core", Config()),
    "paper": (
        "a day on one GPU with 80 GB (an estimate: nothing of this size was run)",
        Config(
            run=Path("runs/runtime_paper"),
            shape=Shape(dim=700, heads=10, inner_dim=48_000, batch=56, length=150, mem_len=150),
            layers=18,
            data="wikitext-103",
            level="word",
            shallow_steps=16_000,
            steps=100_000,
            explicit_steps=200_000,
            eval_every=5_000,
            eval_segments=100,
            lr=2.5e-4,
            rtol=1e-3,
            max_steps=30,
            inference_rtols=(1e-1, 1e-2, 1e-3),
        ),
    ),
}


def loss_fn(graphdef, contender, params, probe, rest, batch, key, carry):
    """The mean cross-entropy of a segment in nats, with the detached history of the previous segment."""
    model, before = nnx.merge(graphdef, params), lm_step.forget_at_start(carry, batch.is_start)
    logits, history, metrics = contender.call(model, batch.inputs, before, probe)
    return lm_step.cross_entropy(logits, batch.targets), (rest, history, metrics)


def training_step(config: Config, graphdef: Any, contender: Contender) -> Any:
    """A training step. Where there is a backward solve, a probe counts its products."""
    probe = None if contender.own else lm_step.backward_probe(contender.how["adjoint"], config.shape.batch)
    return make_train_step(functools.partial(loss_fn, graphdef, contender), optimizer(config), probe=probe)


# ---- one corpus, its models --------------------------------------------------------------------------------


class Task:
    """A corpus and one family's models for it, shared by several cells."""

    def __init__(self, config: Config, family: str):
        self.config, self.family = config, family
        self.corpus = lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir)
        self.batches = data.segments(self.corpus.train, config.shape.batch, config.shape.length, seed=config.seed)
        self.valid = lm.evaluation_segments(self.corpus.valid, 32, config.shape.length)

    def start(self, contender: Contender) -> tuple[Any, TrainState]:
        """The graph and the state before the first step."""
        config, words = self.config, len(self.corpus.vocabulary)
        shape = dataclasses.replace(config.shape, vocab_size=words)
        if contender.own:
            narrow = rival_shape(dataclasses.replace(config, shape=shape), self.family)
            model = RIVALS[self.family](narrow, config.layers)
        else:
            model = FAMILIES[self.family](shape)
        graphdef, params = nnx.split(model, nnx.Param)
        history = model.empty_history(config.shape.batch)
        key = jax.random.key(config.seed)
        return graphdef, init_state(nnx.to_pure_dict(params), optimizer(config), key, carry=history)

    def evaluate(self, graphdef: Any, contender: Contender) -> Callable:
        """`evaluate(params) -> loss` on the first segments of the validation split."""

        @jax.jit
        def step(params, history, segment):
            history = lm_step.forget_at_start(history, segment.is_start)
            logits, history, _ = contender.call(nnx.merge(graphdef, params), segment.inputs, history)
            return history, (
                lm_step.cross_entropy(logits, segment.targets, segment.weights),
                jnp.sum(segment.weights),
            )

        def evaluate(params) -> float:
            history, parts = nnx.merge(graphdef, params).empty_history(self.valid.batch), []
            for i in range(min(self.config.eval_segments, len(self.valid))):
                history, part = step(params, history, self.valid[i])
                parts.append(part)
            total, weight = np.sum(jax.device_get(parts), axis=0)
            return float(total / weight)

        return evaluate

    def path(self, name: str) -> Path:
        return self.config.run / f"{self.family} {name.replace('(', '').replace(')', '')}.npz"

    def trained(self, name: str, contender: Contender) -> tuple[Any, TrainState]:
        """What `train` stored."""
        graphdef, state = self.start(contender)
        with np.load(self.path(name)) as kept:
            leaves = [jnp.asarray(kept[key]) for key in kept.files]
        return graphdef, state._replace(params=jax.tree.unflatten(jax.tree.structure(state.params), leaves))


def train(task: Task, name: str, contender: Contender) -> dict[str, Any]:
    """The validation loss by training time, from the first step on. The parameters are stored for the timing."""
    config = task.config
    graphdef, state = task.start(contender)
    shallow = 0 if contender.own or name == "tied layers" else config.shallow_steps
    steps = shallow + config.steps if shallow else config.explicit_steps
    last = training_step(config, graphdef, contender).lower(state, task.batches[0]).compile()
    first = training_step(config, graphdef, SHALLOW).lower(state, task.batches[0]).compile() if shallow else last
    evaluate = task.evaluate(graphdef, contender)
    curve = [{"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "valid_loss": evaluate(state.params)}]
    meter, line = lm.Meter(config.shape.batch * config.shape.length), {}
    meter.start()
    for step in range(steps):
        state, metrics = (first if step < shallow else last)(state, task.batches[step])
        meter.add(metrics)
        if (step + 1) % config.eval_every == 0 or step + 1 in (shallow, steps):
            line = meter.line()
            seconds, cpu_seconds = meter.spent
            point = {"step": step + 1, "seconds": seconds, "cpu_seconds": cpu_seconds}
            curve.append(point | {"valid_loss": evaluate(state.params)} | lm_step.backward(line))
            print(f"    {name} {step + 1}/{steps}: {curve[-1]['valid_loss']:.3f}, {seconds:.0f} s", flush=True)
            meter.start()
    np.savez(task.path(name), *jax.device_get(jax.tree.leaves(state.params)))
    counts = {key: float(line[key]) for key in ("fwd_steps", "fwd_residual") if key in line} | lm_step.backward(line)
    size = count_params(state.params)
    return {"parameters": size, "shallow_steps": shallow, "curve": curve, **counts}


def time_training(task: Task, table: dict[str, Contender]) -> dict[str, Any]:
    """Time a training step of each, in turn, at trained parameters: training makes an equilibrium harder to solve."""
    states, programs = {}, {}
    for name, contender in table.items():
        graphdef, states[name] = task.trained(weights_of(name), contender)
        programs[name] = training_step(task.config, graphdef, contender).lower(states[name], task.batches[0]).compile()
    return interleaved(programs, states, task.batches[0], task.config.repeats)


def time_inference(task: Task, table: dict[str, Contender]) -> dict[str, Any]:
    """Time the logits of one batch: the equilibrium as trained, and at each tolerance with four times the budget."""
    programs: dict[str, Any] = {}
    states: dict[str, Any] = {}

    def add(label, name, contender, **options):
        graphdef, state = task.trained(weights_of(name), contender)

        @jax.jit
        def infer(state, batch):
            logits, _, metrics = contender.call(nnx.merge(graphdef, state.params), batch.inputs, state.carry, **options)
            return logits, metrics

        states[label], programs[label] = state, infer.lower(state, task.batches[0]).compile()

    for name in ("own layers", "tied layers"):
        if name in table:
            add(name, name, table[name])
    add("equilibrium, as trained", "Implicit", table["Implicit"])
    for rtol in task.config.inference_rtols:
        solver = deq.Anderson(rtol=rtol, max_steps=4 * task.config.max_steps, history=6)
        add(f"equilibrium, rtol {rtol:g}", "Implicit", table["Implicit"], solver=solver)
    return interleaved(programs, states, task.batches[0], task.config.repeats)


# ---- what is stored ----------------------------------------------------------------------------------------


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    return {"families": {family: measure_family(config, family, cells) for family in config.families}}


def measure_family(config: Config, family: str, cells: study.Cells) -> dict[str, Any]:
    task, table = Task(config, family), contenders(config, family)
    runs = {
        name: cells(f"{family}: training, {name}", lambda: train(task, name, table[name]))
        for name in table
        if name in TRAINED
    }
    times = cells(f"{family}: times of training", lambda: time_training(task, table))
    inference = cells(f"{family}: times of inference", lambda: time_inference(task, table))
    return {"runs": runs, "training": times, "inference": inference, "to_loss": to_loss(runs)}


def to_loss(runs: dict[str, Any]) -> dict[str, Any]:
    """The loss that all have reached, and when each first did, interpolated between two measurements."""
    wanted = max(min(point["valid_loss"] for point in run["curve"]) for run in runs.values())
    when = {name: first_at(run["curve"], wanted) for name, run in runs.items()}
    return {"loss": wanted, "cpu_seconds": when}


def first_at(curve: list[dict[str, float]], wanted: float) -> float:
    """The processor time at which the curve first reaches `wanted`."""
    before = curve[0]
    for point in curve:
        if point["valid_loss"] <= wanted:
            fallen, span = before["valid_loss"] - wanted, before["valid_loss"] - point["valid_loss"]
            part = fallen / span if span else 1.0
            return before["cpu_seconds"] + part * (point["cpu_seconds"] - before["cpu_seconds"])
        before = point
    raise ValueError(f"the curve never reaches {wanted}")


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.runtime", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
