"""What an equilibrium costs in time: training and inference over the explicit network's, and time to a fixed loss.

    python -m experiments.runtime_study
    python -m experiments.runtime_study paper
    python -m experiments.runtime_study figure

The explicit network has as many parameters, in layers with weights of their own; beside it stands the weight-tied one
of the equilibrium's own cell. Times are of the processor, all programs in turn, and only their ratios are told.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deq_jax as deq
from experiments import data, gradient_study, lm, plots, study
from experiments.baselines import TransformerStack, fitted, parameters
from experiments.memory_study import FAMILIES, Shape, interleaved, optimizer, transformer_config
from experiments.training import TrainState, count_params, init_state, make_train_step

# Training and inference over the explicit network's: the paper, section 5.3. Both of 18 and of 70 explicit layers.
PUBLISHED = {"DEQTransformer": (2.82, 1.76), "DEQTrellisNet": (2.40, 1.64)}


def stack(shape: Shape, layers: int) -> TransformerStack:
    return TransformerStack(transformer_config(shape), layers=layers, rngs=nnx.Rngs(0))


# Of a family: the explicit network with weights of its own in each layer. Without an entry the weight-tied one alone is
# compared with, as the paper does for TrellisNet.
RIVALS: dict[str, Callable[[Shape, int], Any]] = {"DEQTransformer": stack}


@dataclasses.dataclass(frozen=True)
class Config:
    """Eight minutes on one CPU core: how many times an explicit step is a step at the equilibrium?

    python -m experiments.runtime_study

    The paper's answers are 2.82 for training and 1.76 for inference; they depend on the depth one compares with.
    """

    run: Path = Path("runs/runtime")
    out: Path | None = None
    families: tuple[str, ...] = ("DEQTransformer",)
    # Wide inside, as the paper's: one layer has all the parameters.
    shape: Shape = Shape(dim=64, heads=4, inner_dim=512, batch=16, length=64, mem_len=64)
    layers: int = 6  # of the explicit networks
    data: str = "shakespeare"
    level: Literal["char", "word"] = "char"
    data_dir: Path | None = None
    shallow_steps: int = 100  # of the equilibrium, first, through two layers; its time counts
    steps: int = 200  # at the equilibrium, after them
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
            lm.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        lm.require(self.shallow_steps >= 0, "shallow_steps", "at least 0", self.shallow_steps)
        lm.require(self.rtol in self.inference_rtols, "inference_rtols", f"with rtol ({self.rtol:g}) among them",
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


# ---- contenders --------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """How a model is called in training; in inference without the adjoint."""

    own: bool  # weights of its own in each layer: the rival, not the equilibrium's cell
    how: dict[str, Any]

    def call(self, model, tokens, history, probe=None, **options):
        if self.own:
            logits, history = model(tokens, history)
            return logits, history, {}
        logits, history, solution = model(tokens, history, probe=probe, **{**self.how, **options})
        # What nobody reads XLA drops: layers are not charged for measuring their last residual.
        unrolled = isinstance(self.how["adjoint"], deq.Unroll)
        return logits, history, {} if unrolled else lm.solve_metrics(solution.stats)


def contenders(config: Config, family: str) -> dict[str, Contender]:
    anderson = deq.Anderson(rtol=config.rtol, max_steps=config.max_steps, history=6)
    layers = dict(solver=deq.Picard(max_steps=config.layers), adjoint=deq.Unroll())
    table = {
        "tied layers": Contender(False, layers),
        "Implicit": Contender(False, dict(solver=anderson, adjoint=deq.Implicit(anderson))),
        "Phantom(5)": Contender(False, dict(solver=anderson, adjoint=deq.Phantom(steps=5, damping=0.8))),
        "JFB": Contender(False, dict(solver=anderson, adjoint=deq.JFB())),
    }
    return {"own layers": Contender(True, {})} | table if family in RIVALS else table


SHALLOW = Contender(False, dict(solver=deq.Picard(max_steps=2), adjoint=deq.Unroll()))
TRAINED = ("own layers", "tied layers", "Implicit", "Phantom(5)")


def rival_shape(config: Config, family: str) -> Shape:
    """The width at which `layers` layers have as many parameters as the equilibrium, each four times as wide inside."""
    shape, heads = config.shape, config.shape.heads
    at = lambda dim: dataclasses.replace(shape, dim=dim, inner_dim=4 * dim)
    build = lambda dim: RIVALS[family](at(dim), config.layers)
    step = heads if heads % 2 == 0 else 2 * heads
    return at(fitted(build, parameters(lambda: FAMILIES[family](shape)), range(step, 16 * shape.dim, step)))


def loss_fn(graphdef, contender, params, probe, rest, batch, key, carry):
    """The mean cross entropy of a segment in nats, with the detached history of the segment before."""
    model, before = nnx.merge(graphdef, params), lm.forget_at_start(carry, batch.is_start)
    logits, history, metrics = contender.call(model, batch.inputs, before, probe)
    return lm.cross_entropy(logits, batch.targets), (rest, history, metrics)


def training_step(config: Config, graphdef: Any, contender: Contender) -> Any:
    """Probed where there is a backward solve, for its evaluations."""
    probe = None if contender.own else lm.backward_probe(contender.how["adjoint"], config.shape.batch)
    return make_train_step(functools.partial(loss_fn, graphdef, contender), optimizer(config), probe=probe)


# ---- one corpus, its models --------------------------------------------------------------------------------


class Task:
    """A corpus and the models of one family for it: what several cells share."""

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
            history = lm.forget_at_start(history, segment.is_start)
            logits, history, _ = contender.call(nnx.merge(graphdef, params), segment.inputs, history)
            return history, (
                lm.cross_entropy(logits, segment.targets, segment.weights),
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
        """What `train` has kept."""
        graphdef, state = self.start(contender)
        with np.load(self.path(name)) as kept:
            leaves = [jnp.asarray(kept[key]) for key in kept.files]
        return graphdef, state._replace(params=jax.tree.unflatten(jax.tree.structure(state.params), leaves))


def train(task: Task, name: str, contender: Contender) -> dict[str, Any]:
    """The validation loss by time of training, from the first step on; the parameters are kept for the timing."""
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
            curve.append(point | {"valid_loss": evaluate(state.params)} | lm.backward(line))
            print(f"    {name} {step + 1}/{steps}: {curve[-1]['valid_loss']:.3f}, {seconds:.0f} s", flush=True)
            meter.start()
    np.savez(task.path(name), *jax.device_get(jax.tree.leaves(state.params)))
    counts = {key: float(line[key]) for key in ("fwd_steps", "fwd_residual") if key in line} | lm.backward(line)
    size = count_params(state.params)
    return {"parameters": size, "shallow_steps": shallow, "curve": curve, **counts}


def time_training(task: Task, table: dict[str, Contender]) -> dict[str, Any]:
    """A training step of each, all in turn: at trained parameters, for an equilibrium grows harder in training."""
    states, programs = {}, {}
    for name, contender in table.items():
        graphdef, states[name] = task.trained(weights_of(name), contender)
        programs[name] = training_step(task.config, graphdef, contender).lower(states[name], task.batches[0]).compile()
    return interleaved(programs, states, task.batches[0], task.config.repeats)


def time_inference(task: Task, table: dict[str, Contender]) -> dict[str, Any]:
    """Logits of one batch; the equilibrium as it was trained, and at each tolerance with four times the budget."""
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


def weights_of(name: str) -> str:
    """JFB is timed at the weights that Implicit has trained."""
    return name if name in TRAINED else "Implicit"


# ---- what is kept ------------------------------------------------------------------------------------------


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
    """The loss that all have reached, and when each first did, on the line between two measurements."""
    wanted = max(min(point["valid_loss"] for point in run["curve"]) for run in runs.values())
    when = {name: first_at(run["curve"], wanted) for name, run in runs.items()}
    return {"loss": wanted, "cpu_seconds": when}


def first_at(curve: list[dict[str, float]], wanted: float) -> float:
    """The processor time at which the curve first is at `wanted` or below."""
    before = curve[0]
    for point in curve:
        if point["valid_loss"] <= wanted:
            fallen, span = before["valid_loss"] - wanted, before["valid_loss"] - point["valid_loss"]
            part = fallen / span if span else 1.0
            return before["cpu_seconds"] + part * (point["cpu_seconds"] - before["cpu_seconds"])
        before = point
    raise ValueError(f"the curve never reaches {wanted}")


def base_of(rows: dict[str, Any]) -> str:
    return "own layers" if "own layers" in rows else "tied layers"


def over(rows: dict[str, Any], name: str, base: str) -> str:
    least, middle = (rows[name][key] / rows[base][key] for key in ("cpu_min", "cpu_median"))
    return f"{least:.2f} ({middle:.2f})"


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    shape, told = config["shape"], study.conditions(results, dtype="float32", seed=config["seed"])
    lines = ["# Time of training and of inference", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += [f"{config['data']} by {config['level']}s, batch {shape['batch']}, T {shape['length']}, width"]
    lines += [
        f"{shape['dim']}, inner {shape['inner_dim']}; {config['layers']} explicit layers. Processor time, programs"
    ]
    lines += [
        f"in turn {config['repeats']} times at trained weights: ratios of minima (of medians). The equilibrium is"
    ]
    lines += [f"solved to a relative residual of {config['rtol']:g} in at most {config['max_steps']} evaluations.", ""]
    for family, part in results["families"].items():
        lines += family_table(family, part)
    return "\n".join(lines)


def family_table(family: str, part: dict[str, Any]) -> list[str]:
    runs, training, inference, to = part["runs"], part["training"], part["inference"], part["to_loss"]
    base, told = base_of(training), PUBLISHED[family]
    lines = [f"## {family}", "", f"Over {base}; the paper has {told[0]} for training and {told[1]} for inference.", ""]
    blank = lambda row, key: f"{row[key]:.1f}" if key in row else ""
    head = ["training", "parameters", f"time / {base}", "time / tied layers", "evaluations forward", "backward"]
    lines += plots.markdown_table(head, [
        [name, f"{runs[weights_of(name)]['parameters']:,}", over(training, name, base),
         over(training, name, "tied layers"), blank(row, "fwd_steps"), blank(row, "bwd_steps")]
        for name, row in training.items()
    ])  # fmt: skip
    head = ["inference", f"time / {base}", "time / tied layers", "evaluations"]
    lines += plots.markdown_table(head, [
        [name, over(inference, name, base), over(inference, name, "tied layers"), blank(row, "fwd_steps")]
        for name, row in inference.items()
    ])  # fmt: skip
    lines += ["Where a tolerance is named, four times as many evaluations are allowed as in training.", ""]
    lines += [
        f"Processor time to a validation loss of {to['loss']:.3f}, which all of them reach, the warm-up through two"
    ]
    lines += ["layers included; and the loss at the end of each run.", ""]
    lines += plots.markdown_table(["", f"time to {to['loss']:.3f} / {base}", "steps of the run", "loss at its end"], [
        [name, f"{seconds / to['cpu_seconds'][base]:.2f}", runs[name]["curve"][-1]["step"],
         f"{runs[name]['curve'][-1]['valid_loss']:.3f}"]
        for name, seconds in to["cpu_seconds"].items()
    ])  # fmt: skip
    return lines


COLOURS = {
    "own layers": "0.35",
    "tied layers": plots.COLOURS["unrolled"],
    "Implicit": gradient_study.COLOURS["Implicit"],
    "Phantom(5)": gradient_study.COLOURS["Phantom(5, 0.8)"],
    "JFB": gradient_study.COLOURS["JFB"],
}


def draw(results: dict[str, Any], path: Path) -> None:
    """A row for each family: bars of training and inference, and the validation loss by processor time."""
    plt = plots.plt
    config, families = results["config"], results["families"]
    with plt.rc_context(plots.STYLE):
        size = (12.5, 0.6 + 4.2 * len(families))
        figure, rows = plt.subplots(len(families), 2, figsize=size, layout="constrained", squeeze=False)
        for (bars, curves), (family, part) in zip(rows, families.items(), strict=True):
            draw_ratios(bars, family, part, config["layers"])
            draw_curves(curves, part)
        note = f"{results['command']}; float32, seed {config['seed']}; {study.shared_cores(results['machine'])}"
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_ratios(axes: Any, family: str, part: dict[str, Any], layers: int) -> None:
    base, labels, ratios, colours = base_of(part["training"]), [], [], []
    for kind in ("training", "inference"):
        for name, row in part[kind].items():
            labels.append(f"{kind}: {name}")
            ratios.append(row["cpu_min"] / part[kind][base]["cpu_min"])
            colours.append(COLOURS.get(name, COLOURS["Implicit"]))
    places = np.arange(len(labels))[::-1]
    axes.barh(places, ratios, color=colours, height=0.7)
    for place, ratio in zip(places, ratios, strict=True):
        axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(places, labels)
    axes.axvline(1, color="0.6", lw=0.8, ls=":")
    for published, kind in zip(PUBLISHED[family], ("training", "inference"), strict=True):
        axes.axvline(published, color="0.2", lw=0.8, ls="--")
        axes.text(published, len(labels) - 0.4, f"paper,\n{kind}", fontsize=7, ha="center")
    axes.set_xlabel(f"processor time / that of {base}")
    train = part["training"]["Implicit"]["cpu_min"] / part["training"][base]["cpu_min"]
    axes.set_title(
        plots.fill(f"{family}: a training step at the equilibrium takes {train:.2f}× one of {layers} {base}"), pad=24
    )


def draw_curves(axes: Any, part: dict[str, Any]) -> None:
    to, base = part["to_loss"], base_of(part["training"])
    unit = to["cpu_seconds"][base]
    for name, run in part["runs"].items():
        x = [point["cpu_seconds"] / unit for point in run["curve"]]
        y = [point["valid_loss"] for point in run["curve"]]
        axes.plot(x[1:], y[1:], "o-", ms=3, lw=1.3, color=COLOURS[name], label=name)
    axes.axhline(to["loss"], color="0.6", lw=0.8, ls=":")
    ratio = to["cpu_seconds"]["Implicit"] / unit
    axes.set_title(
        plots.fill(f"the equilibrium reaches {to['loss']:.3f} nats in {ratio:.2f}× the time of {base}"), pad=24
    )
    axes.set(
        xlabel=f"processor time / that in which {base} reach {to['loss']:.3f}", ylabel="validation loss (nats/token)"
    )
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)


def main(args: Sequence[str] | None = None) -> None:
    study.run("runtime", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
