"""Memory, time and quality of every way to train a deep weight-tied network: an answer to the paper's first reviewer.

    python -m experiments.memory_study
    python -m experiments.memory_study paper --families DEQTransformer
    python -m experiments.memory_study figure

Gradient checkpointing saves memory too, with explicit layers. What does it cost in time, what does the equilibrium
cost, and what of the larger model that the time saved would train? The paper answered with memory alone.
"""

import ctypes
import dataclasses
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import deq_jax as deq
from deq_jax.models import DEQTransformer, DEQTrellisNet, TransformerConfig, TrellisNetConfig
from experiments import char_lm, data, gradient_study, lm, plots, study
from experiments.baselines import TIED, parameters
from experiments.training import init_state, make_optimizer, make_train_step

# Gigabytes at T = 150, batch 15 without embeddings: the paper's Table 3. No time was published for the second.
# 70-layer TrellisNet, and DEQ-TrellisNet. The paper does not say where its checkpoints stand.
PUBLISHED = {"plain": 24.7, "checkpointed": 5.2, "√L-checkpointed": 5.2, "Implicit": 3.3}
PUBLISHED_DEPTH = 70


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it reads."""

    dim: int
    heads: int
    inner_dim: int
    batch: int
    length: int
    mem_len: int
    vocab_size: int = 64  # so small that the embedding does not count

    def __post_init__(self):
        for name in ("dim", "heads", "inner_dim", "batch", "length", "vocab_size"):
            lm.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


def transformer_config(shape: Shape) -> TransformerConfig:
    sizes = {name: getattr(shape, name) for name in ("dim", "heads", "inner_dim", "mem_len")}
    return TransformerConfig(shape.vocab_size, **sizes)


def transformer(shape: Shape) -> DEQTransformer:
    return DEQTransformer(transformer_config(shape), rngs=nnx.Rngs(0))


def trellisnet(shape: Shape) -> DEQTrellisNet:
    """Of `dim` channels that are not decoded and `inner_dim` that are; heads and memory mean nothing here."""
    config = TrellisNetConfig(shape.vocab_size, hidden_dim=shape.dim, output_dim=shape.inner_dim)
    return DEQTrellisNet(config, rngs=nnx.Rngs(0))


# A model family is one entry: its constructor, from a Shape. The model is called and read as a DEQTransformer is.
FAMILIES: dict[str, Callable[[Shape], Any]] = {"DEQTransformer": transformer, "DEQTrellisNet": trellisnet}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fifteen minutes on one CPU core: flat memory for the equilibrium, and its time and loss beside it.

    python -m experiments.memory_study

    The paper's shape is compiled, never run. Times are of the shape `measured`, losses of the shape `trained`.
    """

    run: Path = Path("runs/memory")
    out: Path | None = None
    families: tuple[str, ...] = ("DEQTransformer",)
    depths: tuple[int, ...] = (2, 16, 70, 128)  # of the unrolled layers: compiled
    solved_depths: tuple[int, ...] = (2, 128)  # likewise, max_steps of the equilibrium
    # What the published bytes are of: compiled at their depth alone.
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
    shallow_steps: int = 300  # once, through two layers: where all of them start
    steps: int = 240  # of each
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
        lm.require(bool(self.depths), "depths", "at least one depth", self.depths)
        for name in ("depths", "solved_depths", "measured_depths"):
            lm.require(all(d >= 1 for d in getattr(self, name)), name, "at least 1 each", getattr(self, name))
        for name in ("repeats", "layers", "shallow_steps", "steps", "eval_every", "eval_segments"):
            lm.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        lm.require(self.eval_every <= self.steps, "eval_every", f"at most steps ({self.steps})", self.eval_every)


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

EXPLICIT = tuple(TIED)
EQUILIBRIUM = ("Implicit", "Implicit, Broyden", "Phantom(5)", "Reversible")
MODES = (*EXPLICIT, *EQUILIBRIUM)
LARGER = "larger"


def mode(config: Config, name: str, depth: int) -> dict[str, Any]:
    """Solver and adjoint of one way to train: `depth` layers, or an equilibrium with that many evaluations."""
    if name in EXPLICIT:
        return dict(solver=deq.Picard(max_steps=depth), adjoint=TIED[name](depth))
    anderson = deq.Anderson(rtol=config.rtol, max_steps=depth, history=6)
    implicit = deq.Implicit(deq.Anderson(rtol=config.rtol, max_steps=depth, history=6))
    return {
        "Implicit": dict(solver=anderson, adjoint=implicit),
        # The paper's solver, which remembers up to 30 steps.
        "Implicit, Broyden": dict(
            solver=deq.Broyden(rtol=config.rtol, max_steps=depth, rank=min(depth, 30)), adjoint=implicit
        ),
        "Phantom(5)": dict(solver=anderson, adjoint=deq.Phantom(steps=5, damping=0.8)),
        # Two evaluations a step. Anderson's accelerations cannot be walked back, so this one iterates plainly.
        "Reversible": dict(solver=deq.Picard(rtol=config.rtol, max_steps=depth), adjoint=deq.Reversible(0.5)),
    }[name]


# ---- one training step, as a program -----------------------------------------------------------------------


class Step(NamedTuple):
    """A training step of one mode, and the arguments or the shapes that it is compiled for."""

    step: Any
    state: Any
    batch: data.Segment


def training_step(config: Config, graphdef: Any, how: dict[str, Any], shape: Shape) -> Any:
    loss = functools.partial(char_lm.loss_fn, graphdef, how["solver"], how["adjoint"])
    return make_train_step(loss, optimizer(config), probe=lm.backward_probe(how["adjoint"], shape.batch))


def optimizer(config: Any) -> Any:
    """Constant after its warm-up: every point of a curve is then a fair end of training, at equal steps and time."""
    return make_optimizer(lr=config.lr, warmup_steps=20, total_steps=10**9, clip=1.0)


def abstract_step(config: Config, family: str, shape: Shape, how: dict[str, Any]) -> Step:
    """Shapes alone: nothing of the model is computed, so it may be larger than this machine."""
    model = nnx.eval_shape(lambda: FAMILIES[family](shape))
    graphdef, params = nnx.split(model, nnx.Param)
    history = jax.eval_shape(lambda: FAMILIES[family](shape).empty_history(shape.batch))
    tx = optimizer(config)
    start = lambda params, history: init_state(params, tx, jax.random.key(0), carry=history)
    state = jax.eval_shape(start, nnx.to_pure_dict(params), history)
    tokens: Any = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
    return Step(training_step(config, graphdef, how, shape), state, data.Segment(tokens, tokens, False))


def compiled_bytes(config: Config, family: str, name: str, depth: int, shape: Shape) -> dict[str, float]:
    """Temporaries of the compiled training step at that shape."""
    with warnings.catch_warnings():
        # Reversible warns of depths that float32 cannot walk back; their memory is the question here.
        warnings.filterwarnings("ignore", message="Reversible")
        built = abstract_step(config, family, shape, mode(config, name, depth))
        program = built.step.lower(built.state, built.batch).compile()
    return {"temp_bytes": lm.temp_bytes(program)}


# ---- times, and bytes that were really used ----------------------------------------------------------------


def corpus_of(config: Config) -> data.Corpus:
    return lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir)


def start(config: Config, family: str, shape: Shape, corpus: data.Corpus) -> tuple[Any, Any, data.Segments]:
    """The graph, the state before the first step, and the segments; the vocabulary is the corpus's."""
    model = FAMILIES[family](dataclasses.replace(shape, vocab_size=len(corpus.vocabulary)))
    graphdef, params = nnx.split(model, nnx.Param)
    history = model.empty_history(shape.batch)
    state = init_state(nnx.to_pure_dict(params), optimizer(config), jax.random.key(config.seed), carry=history)
    return graphdef, state, data.segments(corpus.train, shape.batch, shape.length, seed=config.seed)


def timed_steps(config: Config, family: str, depth: int) -> dict[str, Any]:
    """Time of a training step by mode: all of them in turn, `repeats` times, so that load is shared by all."""
    graphdef, state, batches = start(config, family, config.measured, corpus_of(config))
    programs, rows = {}, {}
    for name in MODES if depth == config.layers else (*EXPLICIT, "Implicit"):
        how = mode(config, name, min(depth, 21) if name == "Reversible" else depth)
        programs[name] = training_step(config, graphdef, how, config.measured).lower(state, batches[0]).compile()
        rows[name] = {"temp_bytes": lm.temp_bytes(programs[name])}
    timed = interleaved(programs, dict.fromkeys(programs, state), batches[0], config.repeats)
    return {name: rows[name] | row for name, row in timed.items()}


def interleaved(
    programs: dict[str, Any], states: dict[str, Any], batch: Any, repeats: int
) -> dict[str, dict[str, Any]]:
    """Least and median seconds, on the clock and of the processor, and what the solver did. Steps are not kept."""
    clocks: dict[str, list] = {name: [] for name in programs}
    metrics: dict[str, Any] = {}
    for _ in range(repeats):
        for name, program in programs.items():
            own = jax.block_until_ready(jax.tree.map(jnp.copy, states[name]))  # a step donates its state
            before = time.perf_counter(), time.process_time()
            _, metrics[name] = jax.block_until_ready(program(own, batch))
            clocks[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    rows = {}
    for name, pairs in clocks.items():
        wall, cpu = zip(*pairs, strict=True)
        rows[name] = {"wall_min": min(wall), "wall_median": statistics.median(wall)}
        rows[name] |= {"cpu_min": min(cpu), "cpu_median": statistics.median(cpu)}
        # The solver runs until its slowest problem has stopped: that is what a step costs.
        if "fwd_steps_max" in metrics[name]:
            rows[name]["fwd_steps"] = float(metrics[name]["fwd_steps_max"])
        rows[name] |= lm.backward(metrics[name])
    return rows


def used_bytes(config: Config, family: str, depth: int) -> dict[str, dict[str, Any]]:
    """What was planned, and by how much the process's resident memory grew in a step; None where none tells."""
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
        ctypes.CDLL(None).malloc_trim(0)  # what the step before has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
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
    """The state after the steps through two layers, from which every mode goes on; to be copied before a step."""
    graphdef, state, batches = start(config, family, shape, corpus_of(config))
    shallow = training_step(config, graphdef, mode(config, "plain", 2), shape)
    for step in range(config.shallow_steps):
        state, _ = shallow(state, batches[step])
    return graphdef, jax.block_until_ready(state), batches


def trained(config: Config, family: str, name: str, shape: Shape) -> dict[str, Any]:
    """The validation loss by step and by time; the time of the warm-up, the same for all, is not in it."""
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
            curve.append(point | logged | lm.backward(line))
            print(f"    {name} {step + 1}/{config.steps}: {last.loss:.3f}, {spent[0]:.0f} s", flush=True)
            meter.start()
    end = {"valid_steps": last.steps, "valid_residual": last.residual}
    size = parameters(lambda: FAMILIES[family](dataclasses.replace(shape, vocab_size=len(corpus.vocabulary))))
    return {"parameters": size, "dim": shape.dim, "temp_bytes": lm.temp_bytes(program), "curve": curve, **end}


def trained_mode(config: Config, name: str) -> dict[str, Any]:
    """The explicit ones at their depth, the equilibrium at its budget; ten reversible steps, as float32 can bear."""
    if name.startswith(LARGER):
        name = name.removeprefix(LARGER).strip()
    budgets = dict.fromkeys(EXPLICIT, config.layers) | {"Reversible": 21}
    return mode(config, name, budgets.get(name, config.max_steps))


def choose_larger(config: Config, family: str) -> dict[str, Any]:
    """Which of the checkpointed network and the equilibrium is the faster, and the width that uses what it saves.

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
    """The same, with heads of a width that is even and `width` times as much in all."""
    head = max(2, 2 * round(width * shape.dim / shape.heads / 2))
    return dataclasses.replace(shape, dim=head * shape.heads, inner_dim=round(width * shape.inner_dim))


# ---- what is kept ------------------------------------------------------------------------------------------

TRAINED = ("plain", "Implicit", "Phantom(5)", "Reversible")


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    families = {family: measure_family(config, family, cells) for family in config.families}
    return {"families": families, "published": published_bytes(config, cells)}


def published_bytes(config: Config, cells: study.Cells) -> dict[str, float]:
    """The bytes of the network whose bytes are published, by mode."""
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
        # The layers as wide too: what does the width do, and what the gradient?
        for name in dict.fromkeys((larger["fast"], "plain")):
            label = f"{LARGER} {name}"
            runs[label] = cells(f"{family}: training, {label}", lambda: trained(config, family, label, shape))
    part = {"memory": memory, "times": times, "used": used, "larger": larger, "runs": runs}
    return part | {"equal_time": equal_time(runs)}


def slowed(run: dict[str, Any], times: dict[str, Any]) -> dict[str, Any]:
    """The curve of the checkpointed network: that of the plain one, of the same arithmetic, at its own pace."""
    ratio = {
        clock: times["√L-checkpointed"][f"{short}_min"] / times["plain"][f"{short}_min"]
        for clock, short in (("seconds", "wall"), ("cpu_seconds", "cpu"))
    }
    curve = [point | {clock: point[clock] * ratio[clock] for clock in ratio} for point in run["curve"]]
    return run | {"curve": curve, "temp_bytes": None, "derived": "the plain network's losses, its times by the ratio"}


def equal_time(runs: dict[str, Any]) -> dict[str, Any]:
    """Every loss when the fastest mode has ended, on the line between the two nearest measurements."""
    at = min(run["curve"][-1]["cpu_seconds"] for run in runs.values())
    curves = {name: [[p["cpu_seconds"], p["valid_loss"]] for p in run["curve"]] for name, run in runs.items()}
    losses = {name: float(np.interp(at, *np.array(curve).T)) for name, curve in curves.items()}
    return {"cpu_seconds": at, "losses": losses}


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    told = study.conditions(results, dtype="float32", seed=config["seed"])
    lines = ["# Memory, time and quality by gradient and depth", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += published_table(config["published"], results["published"])
    for family, part in results["families"].items():
        lines += family_table(config, family, part)
    return "\n".join(lines)


def published_table(shape: dict[str, Any], sizes: dict[str, float]) -> list[str]:
    lines = [f"## DEQTrellisNet of {PUBLISHED_DEPTH} layers: temporaries of the compiled training step, GB", ""]
    lines += [f"The paper's Table 3: {shape['dim']} channels and {shape['inner_dim']} that are decoded, batch"]
    lines += [f"{shape['batch']}, T {shape['length']}, without embeddings; planned by XLA for the CPU, not run. The"]
    lines += [
        "published figures are of whole processes on a GPU, whose checkpoints stand where the paper does not say.",
        "",
    ]
    ratio = lambda sizes, name: f"{sizes[name] / sizes['plain']:.3f}" if name in sizes else ""
    published = lambda name: f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else ""
    lines += plots.markdown_table(["", "published", "/ plain", "here", "/ plain"], [
        [name, published(name), ratio(PUBLISHED, name), f"{size / 1e9:.2f}", ratio(sizes, name)]
        for name, size in sizes.items()
    ])  # fmt: skip
    return lines


def family_table(config: dict[str, Any], family: str, part: dict[str, Any]) -> list[str]:
    shape, memory = config["compiled"], part["memory"]
    lines = [f"## {family}: temporaries of the compiled training step, GB", ""]
    lines += [
        f"Width {shape['dim']}, inner {shape['inner_dim']:,}, batch {shape['batch']}, T {shape['length']}, memory"
    ]
    lines += [f"{shape['mem_len']}, without embeddings; planned by XLA for the CPU, not run. Reversible at 128 is"]
    lines += ["compiled only: float32 can walk back about ten steps.", ""]
    depths = sorted({int(d) for sizes in memory.values() for d in sizes})
    lines += plots.markdown_table(["", *(f"L = {d}" for d in depths)], [
        [name, *(f"{sizes[str(d)] / 1e9:.2f}" if str(d) in sizes else "" for d in depths)]
        for name, sizes in memory.items()
    ])  # fmt: skip
    if rows := against_published(memory):
        lines += [
            f"At {PUBLISHED_DEPTH} layers, over the plain network's; the published ones are of 70-layer TrellisNet"
        ]
        lines += ["and DEQ-TrellisNet (24.7, 5.2 and 3.3 GB), of another cell on another machine, with checkpoints at"]
        lines += ["places that the paper does not tell.", ""]
        lines += plots.markdown_table(["", "published", "here"], rows)
    crossing = {name: break_even(memory[name], max(memory["Implicit"].values())) for name in EXPLICIT}
    words = [f"{name} from {depth:.0f}" for name, depth in crossing.items() if depth is not None]
    lines += [f"Layers from which an explicit network needs more than Implicit does: {', '.join(words) or 'none'}.", ""]
    shape, depth = config["measured"], max(config["measured_depths"])
    lines += [f"Planned and used, MB: L = {depth}, width {shape['dim']}, inner {shape['inner_dim']}, batch"]
    lines += [
        f"{shape['batch']}, T {shape['length']}. Used is the growth of the process's resident memory in one step.",
        "",
    ]
    lines += plots.markdown_table(["", "planned", "used"], [
        [name, f"{row['temp_bytes'] / 1e6:.1f}", megabytes(row["used_bytes"])] for name, row in part["used"].items()
    ])  # fmt: skip
    lines += ["## Time of a training step", ""]
    lines += ["The same shape: processor time over the plain network's of the same depth, all in turn"]
    lines += [f"{config['repeats']} times, by minima (by medians). The equilibrium of the untrained network stops at a"]
    lines += [f"relative residual of {config['rtol']:g} or at L evaluations; Reversible at 21 at most.", ""]
    depths = list(part["times"])
    head = ["", *(f"L = {depth}" for depth in depths), f"evaluations at {depths[-1]}"]
    cell = lambda depth, name: over(part["times"][depth], name, "plain") if name in part["times"][depth] else ""
    spent = lambda name: f"{part['times'][depths[-1]][name]['fwd_steps']:.0f}" if cell(depths[-1], name) else ""
    lines += plots.markdown_table(head, [
        [name, *(cell(depth, name) for depth in depths), depths[-1] if name in EXPLICIT else spent(name)]
        for name in MODES
    ])  # fmt: skip
    return lines + quality_table(config, part)


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def break_even(sizes: dict[str, float], size: float) -> float | None:
    """The depth at which `sizes` pass `size`, on the line between two depths; None if it is not within them."""
    depths, known = np.array([int(d) for d in sizes]), np.array(list(sizes.values()))
    above = int(np.searchsorted(known, size))
    if above in (0, len(known)):
        return float(depths[0]) if above == 0 else None
    return float(np.interp(size, known[above - 1 : above + 1], depths[above - 1 : above + 1]))


def over(rows: dict[str, Any], name: str, base: str) -> str:
    least, middle = (rows[name][key] / rows[base][key] for key in ("cpu_min", "cpu_median"))
    return f"{least:.2f} ({middle:.2f})"


def against_published(memory: dict[str, Any]) -> list[list[Any]]:
    """Rows of published ratio and ours, where both have that depth; an equilibrium's memory has no depth."""
    plain = memory["plain"].get(str(PUBLISHED_DEPTH))
    if plain is None:
        return []
    ours = {name: memory[name].get(str(PUBLISHED_DEPTH)) for name in EXPLICIT}
    ours |= {name: max(memory[name].values()) for name in EQUILIBRIUM}
    return [
        [name, f"{PUBLISHED[name] / PUBLISHED['plain']:.3f}" if name in PUBLISHED else "", f"{size / plain:.3f}"]
        for name, size in ours.items()
        if size is not None
    ]


def quality_table(config: dict[str, Any], part: dict[str, Any]) -> list[str]:
    runs, at, larger = part["runs"], part["equal_time"], part["larger"]
    lines = [f"## Quality: {config['data']}, by {config['level']}s, {config['layers']} layers or an equilibrium", ""]
    lines += [
        f"All start after {config['shallow_steps']} steps through two layers; then {config['steps']} steps each at"
    ]
    lines += ["a constant learning rate. Validation loss in nats at equal steps, and when the fastest had ended (the"]
    lines += ["line between measurements). The √L-checkpointed network is the plain one's arithmetic: its losses are"]
    lines += ["that run's, its time that of its own step, measured in turn with the plain one's.", ""]
    base = runs["plain"]["curve"][-1]["cpu_seconds"]
    lines += plots.markdown_table(["", "width", "parameters", "time / plain", "at equal steps", "at equal time"], [
        [name, run["dim"], f"{run['parameters']:,}", f"{run['curve'][-1]['cpu_seconds'] / base:.2f}",
         f"{run['curve'][-1]['valid_loss']:.3f}", f"{at['losses'][name]:.3f}"]
        for name, run in runs.items()
    ])  # fmt: skip
    fast, slow = larger["fast"], larger["slow"]
    ratio = larger["times"][slow]["cpu_min"] / larger["times"][fast]["cpu_min"]
    tried = ", ".join(f"× {width}: {t:.2f}" for width, t in larger["time_over_slow"].items())
    lines += [
        f"The larger model: a step of {slow} took {ratio:.2f} times one of {fast}, so {fast} was widened; time of"
    ]
    lines += [f"its step over {slow}'s by width, {tried}. × {larger['width']:g} is the nearest.", ""]
    return lines


COLOURS = {
    "plain": plots.COLOURS["unrolled"],
    "checkpointed": plots.COLOURS["unrolled"],
    "√L-checkpointed": plots.COLOURS["unrolled"],
    "Implicit": gradient_study.COLOURS["Implicit"],
    "Implicit, Broyden": plots.COLOURS["Broyden"],
    "Phantom(5)": gradient_study.COLOURS["Phantom(5, 0.8)"],
    "Reversible": gradient_study.COLOURS["Reversible"],
}
DASHES = {"plain": "-", "checkpointed": ":", "√L-checkpointed": "--"}


def draw(results: dict[str, Any], path: Path) -> None:
    """A row for each family: bytes by depth, time by depth, validation loss by processor time."""
    plt = plots.plt
    config, families = results["config"], results["families"]
    with plt.rc_context(plots.STYLE):
        size = (14.5, 0.6 + 4.4 * len(families))
        figure, rows = plt.subplots(len(families), 3, figsize=size, layout="constrained", squeeze=False)
        for (memory, times, quality), part in zip(rows, families.values(), strict=True):
            draw_memory(memory, part["memory"])
            draw_times(times, part["times"])
            draw_quality(quality, part, config["layers"])
        rows[0][0].legend(frameon=False, fontsize=8)
        rows[0][2].legend(frameon=False, fontsize=8)
        note = f"{results['command']}; float32, seed {config['seed']}; {study.shared_cores(results['machine'])}"
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def style(name: str) -> dict[str, Any]:
    kind = name.removeprefix(LARGER).strip()
    wide = dict(marker="D", lw=2) if name.startswith(LARGER) else dict(marker="o", lw=1.3)
    # Implicit lies over what has the same memory.
    return dict(
        color=COLOURS[kind], ls=DASHES.get(kind, "-"), ms=4, label=name, zorder=3 + (kind == "Implicit"), **wide
    )


def draw_memory(axes: Any, memory: dict[str, Any]) -> None:
    for name, sizes in memory.items():
        axes.loglog([int(d) for d in sizes], [size / 1e9 for size in sizes.values()], base=2, **style(name))
    depths = sorted({int(d) for sizes in memory.values() for d in sizes})
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    deepest = max(int(d) for d in memory["plain"])
    ours = max(memory["Implicit"].values())
    more = {name: memory[name][str(deepest)] / ours for name in EXPLICIT}
    crossing = break_even(memory["checkpointed"], ours)
    least = f"{'over ' * (crossing is None)}{crossing or deepest:.0f}"
    axes.set_title(
        plots.fill(
            f"with a checkpoint at every layer, {least} layers take Implicit's memory; {deepest} take "
            f"{more['checkpointed']:.2f} times it, {more['√L-checkpointed']:.1f} at √L, {more['plain']:.1f} plain"
        )
    )
    axes.set(xlabel="layers, or evaluations allowed", ylabel="temporaries of the compiled step (GB), paper's shape")


def draw_times(axes: Any, times: dict[str, Any]) -> None:
    base = times[min(times, key=lambda depth: abs(int(depth) - 12))]["plain"]["cpu_min"]
    depths = [int(d) for d in times]
    for name in MODES:
        known = [d for d in depths if name in times[str(d)]]
        relative = [times[str(d)][name]["cpu_min"] / base for d in known]
        axes.loglog(known, relative, base=2, **style(name))
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    deepest = times[str(max(depths))]
    ratios = {name: deepest[name]["cpu_min"] / deepest["plain"]["cpu_min"] for name in ("checkpointed", "Implicit")}
    axes.set_title(
        plots.fill(
            f"at {max(depths)} layers a checkpoint each takes {ratios['checkpointed']:.2f}× the plain network's time, "
            f"Implicit {ratios['Implicit']:.2f}×"
        )
    )
    nearest = min(depths, key=lambda depth: abs(depth - 12))
    axes.set(xlabel="layers, or evaluations allowed", ylabel=f"processor time of a step / plain, {nearest} layers")


def draw_quality(axes: Any, part: dict[str, Any], layers: int) -> None:
    runs, at = part["runs"], part["equal_time"]
    base = runs["plain"]["curve"][-1]["cpu_seconds"]
    for name, run in runs.items():
        points = run["curve"][1:]  # they begin alike, and far above
        axes.plot([p["cpu_seconds"] / base for p in points], [p["valid_loss"] for p in points], **style(name))
    axes.axvline(at["cpu_seconds"] / base, color="0.6", lw=0.8, ls=":")
    told = [name for name in runs if name in ("plain", "√L-checkpointed", "Implicit") or name.startswith(LARGER)]
    axes.set_title(
        plots.fill("at equal time (dotted): " + ", ".join(f"{name} {at['losses'][name]:.3f}" for name in told))
    )
    axes.grid(alpha=0.2)
    axes.set(xlabel=f"processor time / that of the plain {layers} layers", ylabel="validation loss (nats/token)")


def main(args: Sequence[str] | None = None) -> None:
    study.run("memory", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
