"""Memory, time and quality of every way to train a deep weight-tied network, as the paper's first reviewer asked.

    python -m experiments.paper.memory
    python -m experiments.paper.memory paper --families DEQTransformer
    python -m experiments.paper.memory figure

Gradient checkpointing saves memory too, with explicit layers. How much time does it cost, how much does the equilibrium
cost, and how good is a larger model trained in the time saved? The paper answered with memory alone.
"""

import ctypes
import dataclasses
import functools
import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deq_jax as deq
from experiments.paper.memory_report import EXPLICIT, LARGER, MODES, PUBLISHED_DEPTH, draw, table
from experiments.shared import study
from experiments.shared.models import FAMILIES, Shape, optimizer
from experiments.shared.timing import interleaved
from experiments.training import cli, data, lm, lm_model, lm_step
from experiments.training.baselines import TIED, parameters
from experiments.training.loop import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Fifteen minutes on one CPU core. You should see memory that does not grow with depth for the equilibrium.

    python -m experiments.paper.memory

    The paper's shape is compiled, never run. Times are for the shape `measured`, losses for the shape `trained`.
    """

    run: Path = Path("runs/memory")
    out: Path | None = None
    families: tuple[str, ...] = ("DEQTransformer",)
    depths: tuple[int, ...] = (2, 16, 70, 128)  # of the unrolled layers: compiled
    solved_depths: tuple[int, ...] = (2, 128)  # likewise, max_steps of the equilibrium
    # The network whose bytes were published, compiled at its own depth alone.
    published: Shape = Shape(dim=1600, heads=1, inner_dim=512, batch=15, length=150, mem_len=1)
    compiled: Shape = Shape(dim=700, heads=10, inner_dim=48_000, batch=15, length=150, mem_len=150)
    measured: Shape = Shape(dim=64, heads=4, inner_dim=256, batch=8, length=64, mem_len=64)
    measured_depths: tuple[int, ...] = (4, 12, 64)  # all modes at `layers`, else the explicit ones and Implicit
    repeats: int = 5  # timings of each program, taken in turn
    trained: Shape = Shape(dim=64, heads=4, inner_dim=256, batch=16, length=64, mem_len=64)
    data: str = "shakespeare"
    level: Literal["char", "word"] = "char"
    data_dir: Path | None = None
    layers: int = 12  # of the explicit networks that are trained
    shallow_steps: int = 300  # once, through two layers; all modes start there
    steps: int = 240  # of each mode
    eval_every: int = 40
    eval_segments: int = 6
    lr: float = 1e-3
    rtol: float = 1e-2  # of the equilibrium, forward and backward
    max_steps: int = 16
    widths: tuple[float, ...] = (0.67, 0.83, 1.17, 1.33, 1.5, 1.75, 2.0)  # of the larger model, to choose from
    seed: int = 0

    def __post_init__(self):
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise ValueError(f"--families must be of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
        cli.require(bool(self.depths), "depths", "at least one depth", self.depths)
        for name in ("depths", "solved_depths", "measured_depths"):
            cli.require(all(d >= 1 for d in getattr(self, name)), name, "at least 1 each", getattr(self, name))
        for name in ("repeats", "layers", "shallow_steps", "steps", "eval_every", "eval_segments"):
            cli.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        cli.require(self.eval_every <= self.steps, "eval_every", f"at most steps ({self.steps})", self.eval_every)


PRESETS = {
    "reduced": ("fifteen minutes on one CPU core", Config()),
    "paper": (
        "some hours on one GPU with 80 GB (an estimate: nothing of this size was run)",
        Config(
            run=Path("runs/memory_paper"),
            depths=(2, 4, 8, 16, 32, 70, 128),
            solved_depths=(2, 16, 128),
            measured_depths=(2, 12, 30, 70),
            measured=Shape(dim=700, heads=10, inner_dim=4_800, batch=15, length=150, mem_len=150),
            trained=Shape(dim=700, heads=10, inner_dim=4_800, batch=15, length=150, mem_len=150),
            data="wikitext-103",
            level="word",
            shallow_steps=16_000,
            steps=100_000,
            eval_every=5_000,
            eval_segments=100,
            lr=2.5e-4,
            rtol=1e-3,
            max_steps=30,
        ),
    ),
}


def mode(config: Config, name: str, depth: int) -> dict[str, Any]:
    """The solver and adjoint of one training mode: `depth` layers, or an equilibrium with that many evaluations."""
    if name in EXPLICIT:
        return dict(solver=deq.Picard(max_steps=depth), adjoint=TIED[name](depth))
    anderson = deq.Anderson(rtol=config.rtol, max_steps=depth, history=6)
    implicit = deq.Implicit(deq.Anderson(rtol=config.rtol, max_steps=depth, history=6))
    return {
        "Implicit": dict(solver=anderson, adjoint=implicit),
        # The paper's solver, which stores up to 30 steps.
        "Implicit, Broyden": dict(
            solver=deq.Broyden(rtol=config.rtol, max_steps=depth, rank=min(depth, 30)), adjoint=implicit
        ),
        "Phantom(5)": dict(solver=anderson, adjoint=deq.Phantom(steps=5, damping=0.8)),
        # Two evaluations a step. Anderson's steps cannot be reversed, so this mode iterates plainly.
        "Reversible": dict(solver=deq.Picard(rtol=config.rtol, max_steps=depth), adjoint=deq.Reversible(0.5)),
    }[name]


# ---- one training step, as a program -----------------------------------------------------------------------


class Step(NamedTuple):
    """A training step of one mode, and the arguments or shapes to compile it for."""

    step: Any
    state: Any
    batch: data.Segment


def training_step(config: Config, graphdef: Any, how: dict[str, Any], shape: Shape) -> Any:
    loss = functools.partial(lm_model.loss_fn, graphdef, how["solver"], how["adjoint"])
    return make_train_step(loss, optimizer(config), probe=lm_step.backward_probe(how["adjoint"], shape.batch))


def abstract_step(config: Config, family: str, shape: Shape, how: dict[str, Any]) -> Step:
    """Shapes alone: nothing is computed, so the model may be larger than this machine's memory."""
    model = nnx.eval_shape(lambda: FAMILIES[family](shape))
    graphdef, params = nnx.split(model, nnx.Param)
    history = jax.eval_shape(lambda: FAMILIES[family](shape).empty_history(shape.batch))
    tx = optimizer(config)
    start = lambda params, history: init_state(params, tx, jax.random.key(0), carry=history)
    state = jax.eval_shape(start, nnx.to_pure_dict(params), history)
    tokens: Any = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
    return Step(training_step(config, graphdef, how, shape), state, data.Segment(tokens, tokens, False))


def compiled_bytes(config: Config, family: str, name: str, depth: int, shape: Shape) -> dict[str, float]:
    """Bytes of temporaries of the compiled training step at that shape."""
    with warnings.catch_warnings():
        # Reversible warns of depths that float32 cannot reverse; here only their memory matters.
        warnings.filterwarnings("ignore", message="Reversible")
        built = abstract_step(config, family, shape, mode(config, name, depth))
        program = built.step.lower(built.state, built.batch).compile()
    return {"temp_bytes": lm.temp_bytes(program)}


# ---- times, and bytes that were really used ----------------------------------------------------------------


def corpus_of(config: Config) -> data.Corpus:
    return lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir)


def start(config: Config, family: str, shape: Shape, corpus: data.Corpus) -> tuple[Any, Any, data.Segments]:
    """The graph, the state before the first step, and the segments. The vocabulary is that of the corpus."""
    model = FAMILIES[family](dataclasses.replace(shape, vocab_size=len(corpus.vocabulary)))
    graphdef, params = nnx.split(model, nnx.Param)
    history = model.empty_history(shape.batch)
    state = init_state(nnx.to_pure_dict(params), optimizer(config), jax.random.key(config.seed), carry=history)
    return graphdef, state, data.segments(corpus.train, shape.batch, shape.length, seed=config.seed)


def timed_steps(config: Config, family: str, depth: int) -> dict[str, Any]:
    """Time of a training step by mode. All modes run in turn, `repeats` times, so that other load affects all alike."""
    graphdef, state, batches = start(config, family, config.measured, corpus_of(config))
    programs, rows = {}, {}
    for name in MODES if depth == config.layers else (*EXPLICIT, "Implicit"):
        how = mode(config, name, min(depth, 21) if name == "Reversible" else depth)
        programs[name] = training_step(config, graphdef, how, config.measured).lower(state, batches[0]).compile()
        rows[name] = {"temp_bytes": lm.temp_bytes(programs[name])}
    timed = interleaved(programs, dict.fromkeys(programs, state), batches[0], config.repeats)
    return {name: rows[name] | row for name, row in timed.items()}


def used_bytes(config: Config, family: str, depth: int) -> dict[str, dict[str, Any]]:
    """Planned bytes, and by how much the process's resident memory grew in a step. None where it cannot be read."""
    graphdef, state, batches = start(config, family, config.measured, corpus_of(config))
    rows = {}
    for name in (*EXPLICIT, "Implicit"):
        step = training_step(config, graphdef, mode(config, name, depth), config.measured)
        program = step.lower(state, batches[0]).compile()
        rows[name] = {"temp_bytes": lm.temp_bytes(program), "used_bytes": growth(program, state, batches[0])}
    return rows


def growth(program: Any, state: Any, batch: Any) -> int | None:
    own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return what the previous step freed to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the high-water mark
        before = resident("VmRSS")
        jax.block_until_ready(program(own, batch))
        return resident("VmHWM") - before
    except (OSError, AttributeError):  # not Linux, or not its usual C library
        return None


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


# ---- quality at equal steps and at equal time --------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def warmed(config: Config, family: str, shape: Shape) -> tuple[Any, Any, data.Segments]:
    """The state after the warm-up through two layers, where every mode starts. Copy it before a step donates it."""
    graphdef, state, batches = start(config, family, shape, corpus_of(config))
    shallow = training_step(config, graphdef, mode(config, "plain", 2), shape)
    for step in range(config.shallow_steps):
        state, _ = shallow(state, batches[step])
    return graphdef, jax.block_until_ready(state), batches


def trained(config: Config, family: str, name: str, shape: Shape) -> dict[str, Any]:
    """The validation loss by step and by time. Time excludes the warm-up, which all modes share."""
    corpus = corpus_of(config)
    how = trained_mode(config, name)
    graphdef, state, batches = warmed(config, family, shape)
    state = jax.tree.map(jnp.copy, state)  # a step donates its state, and the next mode starts from here too
    program = training_step(config, graphdef, how, shape).lower(state, batches[0]).compile()
    evaluation = lm.evaluation_segments(corpus.valid, 32, shape.length)
    evaluate = lm.make_evaluate(graphdef, evaluation, how["solver"])
    measured = lambda: evaluate(state.params, config.eval_segments)
    curve = [{"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "valid_loss": measured().loss}]
    meter, spent = lm.Meter(shape.batch * shape.length), [0.0, 0.0]
    meter.start()
    for step in range(config.steps):
        state, metrics = program(state, batches[config.shallow_steps + step])
        meter.add(metrics)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            line = meter.line()
            spent, last = meter.spent, measured()
            point = {"step": step + 1, "seconds": spent[0], "cpu_seconds": spent[1], "valid_loss": last.loss}
            logged = {key: float(line[key]) for key in ("loss", "fwd_steps_max") if key in line}
            curve.append(point | logged | lm_step.backward(line))
            print(f"    {name} {step + 1}/{config.steps}: {last.loss:.3f}, {spent[0]:.0f} s", flush=True)
            meter.start()
    end = {"valid_steps": last.steps, "valid_residual": last.residual}
    size = parameters(lambda: FAMILIES[family](dataclasses.replace(shape, vocab_size=len(corpus.vocabulary))))
    return {"parameters": size, "dim": shape.dim, "temp_bytes": lm.temp_bytes(program), "curve": curve, **end}


def trained_mode(config: Config, name: str) -> dict[str, Any]:
    """Explicit modes at their depth, the equilibrium at its budget. Reversible takes ten steps, float32's limit."""
    if name.startswith(LARGER):
        name = name.removeprefix(LARGER).strip()
    budgets = dict.fromkeys(EXPLICIT, config.layers) | {"Reversible": 21}
    return mode(config, name, budgets.get(name, config.max_steps))


def choose_larger(config: Config, family: str) -> dict[str, Any]:
    """Whether the checkpointed network or the equilibrium is faster, and the width that uses the time it saves.

    Processor time of a step, all programs in turn, at the state where training begins.
    """
    graphdef, state, batches = warmed(config, family, config.trained)
    names = ("plain", "checkpointed", "√L-checkpointed", "Implicit")
    step = functools.partial(training_step, config, graphdef)
    programs = {
        name: step(trained_mode(config, name), config.trained).lower(state, batches[0]).compile() for name in names
    }
    times = interleaved(programs, dict.fromkeys(programs, state), batches[0], config.repeats)
    ratio = times["Implicit"]["cpu_min"] / times["√L-checkpointed"]["cpu_min"]
    fast, slow = ("√L-checkpointed", "Implicit") if ratio > 1 else ("Implicit", "√L-checkpointed")
    wanted, tried = times[slow]["cpu_min"], {1.0: times[fast]["cpu_min"]}
    for width in sorted(w for w in config.widths if w > 1):
        shape = widened(config.trained, width)
        graphdef, state, batches = start(config, family, shape, corpus_of(config))
        step = training_step(config, graphdef, trained_mode(config, fast), shape)
        program = step.lower(state, batches[0]).compile()
        tried[width] = interleaved({fast: program}, {fast: state}, batches[0], config.repeats)[fast]["cpu_min"]
        if tried[width] > wanted:
            break
    best = min(tried, key=lambda width: abs(tried[width] / wanted - 1))
    relative = {str(width): seconds / wanted for width, seconds in tried.items()}
    return {"times": times, "fast": fast, "slow": slow, "width": best, "time_over_slow": relative}


def widened(shape: Shape, width: float) -> Shape:
    """The same shape, `width` times as wide, with an even width of each head."""
    head = max(2, 2 * round(width * shape.dim / shape.heads / 2))
    return dataclasses.replace(shape, dim=head * shape.heads, inner_dim=round(width * shape.inner_dim))


# ---- what is stored ----------------------------------------------------------------------------------------

TRAINED = ("plain", "Implicit", "Phantom(5)", "Reversible")


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    families = {family: measure_family(config, family, cells) for family in config.families}
    return {"families": families, "published": published_bytes(config, cells)}


def published_bytes(config: Config, cells: study.Cells) -> dict[str, float]:
    """Bytes by mode of the network whose bytes were published."""
    found = {}
    for name in (*EXPLICIT, "Implicit", "Implicit, Broyden"):
        measured = lambda: compiled_bytes(config, "DEQTrellisNet", name, PUBLISHED_DEPTH, config.published)
        found[name] = cells(f"DEQTrellisNet: bytes, {name}, {PUBLISHED_DEPTH}", measured)["temp_bytes"]
    return found


def measure_family(config: Config, family: str, cells: study.Cells) -> dict[str, Any]:
    memory: dict[str, Any] = {name: {} for name in MODES}
    for name in MODES:
        for depth in config.depths if name in EXPLICIT else config.solved_depths:
            measured = lambda: compiled_bytes(config, family, name, depth, config.compiled)
            value = cells(f"{family}: bytes, {name}, {depth}", measured)
            memory[name][str(depth)] = value["temp_bytes"]
    times = {
        str(depth): cells(f"{family}: times, {depth}", lambda: timed_steps(config, family, depth))
        for depth in config.measured_depths
    }
    deepest = max(config.measured_depths)
    used = cells(f"{family}: bytes used, {deepest}", lambda: used_bytes(config, family, deepest))
    runs = {
        name: cells(f"{family}: training, {name}", lambda: trained(config, family, name, config.trained))
        for name in TRAINED
    }
    larger = cells(f"{family}: the larger model", lambda: choose_larger(config, family))
    runs["√L-checkpointed"] = slowed(runs["plain"], larger["times"])
    if larger["width"] > 1:
        shape = widened(config.trained, larger["width"])
        # Plain layers of that width too, to separate the effect of the width from that of the gradient.
        for name in dict.fromkeys((larger["fast"], "plain")):
            label = f"{LARGER} {name}"
            runs[label] = cells(f"{family}: training, {label}", lambda: trained(config, family, label, shape))
    part = {"memory": memory, "times": times, "used": used, "larger": larger, "runs": runs}
    return part | {"equal_time": equal_time(runs)}


def slowed(run: dict[str, Any], times: dict[str, Any]) -> dict[str, Any]:
    """The curve of the checkpointed network: the losses of the plain one (same arithmetic), at its own step time."""
    ratio = {
        clock: times["√L-checkpointed"][f"{short}_min"] / times["plain"][f"{short}_min"]
        for clock, short in (("seconds", "wall"), ("cpu_seconds", "cpu"))
    }
    curve = [point | {clock: point[clock] * ratio[clock] for clock in ratio} for point in run["curve"]]
    return run | {"curve": curve, "temp_bytes": None, "derived": "the plain network's losses, its times by the ratio"}


def equal_time(runs: dict[str, Any]) -> dict[str, Any]:
    """Every loss when the fastest mode ends, interpolated between the two nearest measurements."""
    at = min(run["curve"][-1]["cpu_seconds"] for run in runs.values())
    curves = {name: [[p["cpu_seconds"], p["valid_loss"]] for p in run["curve"]] for name, run in runs.items()}
    losses = {name: float(np.interp(at, *np.array(curve).T)) for name, curve in curves.items()}
    return {"cpu_seconds": at, "losses": losses}


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.memory", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
