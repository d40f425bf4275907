"""The copy memory task (the paper's Table 1): ten symbols, a long silence, and then the ten symbols again.

    python -m experiments.paper.copy_memory
    python -m experiments.paper.copy_memory paper --delay 1000
    python -m experiments.paper.copy_memory figure

One run trains a DEQ-Transformer, a TCN, an LSTM and a GRU with the same number of parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

import deq_jax as deq
from deq_jax.models import DEQTransformer, TransformerConfig
from experiments.paper.copy_memory_report import BAR, PUBLISHED, draw, table
from experiments.shared import study
from experiments.training import cli, lm, lm_step
from experiments.training.baselines import TCN, Recurrent, fitted, parameters
from experiments.training.loop import count_params, init_state, make_optimizer, make_train_step

SYMBOLS, COPIED, DELIMITER = 10, 10, 9  # 0 is silence, 1 … 8 are to be remembered
MODELS = tuple(PUBLISHED)


@dataclasses.dataclass(frozen=True)
class Config:
    """Twelve minutes on one CPU core: equilibrium and TCN below 1e-4, LSTM and GRU at chance (0.0495).

    python -m experiments.paper.copy_memory

    The equilibrium trains on few sequences because its steps are expensive. The others train on 20 times as many, in
    less time.
    """

    run: Path = Path("runs/copy_memory")
    out: Path | None = None
    models: tuple[str, ...] = MODELS
    delay: int = 400  # T; a sequence has T + 20 tokens
    train_sequences: int = 20_000
    test_sequences: int = 256
    steps: int = 800  # of the equilibrium
    shallow_steps: int = 200  # the first of these train two unrolled layers: the paper's warm-up
    batch: int = 4
    lr: float = 1.2e-2
    baseline_steps: int = 2000
    baseline_batch: int = 32
    baseline_lr: float = 2e-3
    dim: int = 32
    heads: int = 4
    inner_dim: int = 64
    embedding_std: float = 0.3
    rtol: float = 1e-3  # of the forward solve
    max_steps: int = 20
    backward_rtol: float = 1e-2
    backward_max_steps: int = 16
    log_every: int = 25
    seed: int = 0

    def __post_init__(self):
        if unknown := sorted(set(self.models) - set(MODELS)):
            raise ValueError(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
        for name in ("delay", "train_sequences", "test_sequences", "batch", "baseline_batch", "log_every"):
            cli.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        cli.require(0 <= self.shallow_steps < self.steps, "shallow_steps", f"in [0, {self.steps})", self.shallow_steps)
        cli.require(self.baseline_steps >= 2, "baseline_steps", "at least 2", self.baseline_steps)


PRESETS = {
    "reduced": ("twelve minutes on one CPU core, four models one after the other", Config()),
    "paper": (
        "about half an hour on one GPU (an estimate: nothing of this size was run)",
        Config(
            run=Path("runs/copy_memory_paper"),
            test_sequences=2000,
            steps=6000,
            shallow_steps=1200,
            batch=32,
            lr=3e-3,
            baseline_steps=20_000,
        ),
    ),
}


# ---- the task ----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    inputs: Int[np.ndarray, "batch time"]
    targets: Int[np.ndarray, "batch time"]


def sequences(count: int, delay: int, rng: np.random.Generator) -> Batch:
    """x = ten symbols of 1 … 8, then silence, then 9 at the last eleven places; y = silence, then the ten symbols of x.

    The delimiter 9 is at the last eleven places, as in the code of the TCN paper; its text has it at T + 10 alone.
    """
    inputs = np.zeros((count, delay + 2 * COPIED), np.int32)
    targets = np.zeros_like(inputs)
    inputs[:, :COPIED] = targets[:, -COPIED:] = rng.integers(1, DELIMITER, (count, COPIED))
    inputs[:, -COPIED - 1 :] = DELIMITER
    return Batch(inputs, targets)


def chance(delay: int) -> float:
    """The loss of a model that knows all but the symbols: ln 8 at ten of T + 20 places."""
    return COPIED * float(np.log(DELIMITER - 1)) / (delay + 2 * COPIED)


# ---- the models --------------------------------------------------------------------------------------------


def equilibrium(config: Config) -> DEQTransformer:
    length = config.delay + 2 * COPIED
    transformer = TransformerConfig(
        SYMBOLS,
        dim=config.dim,
        heads=config.heads,
        inner_dim=config.inner_dim,
        mem_len=0,
        window=length,
        embedding_std=config.embedding_std,
    )
    solver = deq.Anderson(rtol=config.rtol, max_steps=config.max_steps)
    adjoint = deq.Implicit(deq.Anderson(rtol=config.backward_rtol, max_steps=config.backward_max_steps))
    return DEQTransformer(transformer, solver=solver, adjoint=adjoint, rngs=nnx.Rngs(config.seed))


def build(config: Config, name: str) -> nnx.Module:
    """Build the named model; a baseline has as many parameters as the equilibrium, as nearly as its width allows."""
    rngs = lambda: nnx.Rngs(config.seed)
    makers: dict[str, Callable[[int], nnx.Module]] = {
        "LSTM": lambda dim: Recurrent(nnx.OptimizedLSTMCell, vocab_size=SYMBOLS, dim=dim, rngs=rngs()),
        "GRU": lambda dim: Recurrent(nnx.GRUCell, vocab_size=SYMBOLS, dim=dim, rngs=rngs()),
        "TCN": lambda dim: TCN(vocab_size=SYMBOLS, dim=dim, levels=levels(config.delay), width=8, rngs=rngs()),
    }
    if name == "DEQ-Transformer":
        return equilibrium(config)
    wanted = parameters(lambda: equilibrium(config))
    return makers[name](fitted(makers[name], wanted, range(2, 513)))


def levels(delay: int) -> int:
    """The fewest levels of width 8 with which the last token sees the first; from T = 400 on, the paper's 8."""
    fewest = next(n for n in range(1, 32) if 1 + 14 * (2**n - 1) >= delay + 2 * COPIED)
    return max(8, fewest) if delay >= 400 else fewest


def loss_fn(graphdef, call, params, probe, rest, batch, key, carry):
    """The mean cross-entropy over all T + 20 places, in nats."""
    logits, metrics = call(nnx.merge(graphdef, params, rest, copy=True), batch.inputs, probe=probe)
    return lm_step.cross_entropy(logits, batch.targets), (rest, carry, metrics)


def explicit(model, tokens, probe=None):
    return model(tokens), {}


def solved(model, tokens, **options):
    logits, _, solution = model(tokens, **options)
    return logits, lm_step.solve_metrics(solution.stats)


SHALLOW: dict[str, Any] = dict(solver=deq.Picard(max_steps=2), adjoint=deq.Unroll())


# ---- one cell: a model trained and tested ------------------------------------------------------------------


def train_and_test(config: Config, name: str) -> dict[str, Any]:
    """The training loss curve, the loss on the test sequences, and the cost of training and testing."""
    deep = name == "DEQ-Transformer"
    steps, batch, lr = (
        (config.steps, config.batch, config.lr)
        if deep
        else (config.baseline_steps, config.baseline_batch, config.baseline_lr)
    )
    graphdef, params, rest = nnx.split(build(config, name), nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    tx = make_optimizer(lr=lr, warmup_steps=min(100, steps - 1), total_steps=steps, clip=1.0)
    state = init_state(params, tx, jax.random.key(config.seed), rest=rest)
    compile_step = lambda call, probe=None: make_train_step(functools.partial(loss_fn, graphdef, call), tx, probe=probe)
    last_step = compile_step(solved, deq.Probe.zeros((batch,))) if deep else compile_step(explicit)
    first_step = compile_step(functools.partial(solved, **SHALLOW)) if deep else last_step
    switch = config.shallow_steps if deep else 0

    rng = np.random.default_rng(config.seed)
    pool, test = (sequences(n, config.delay, rng) for n in (config.train_sequences, config.test_sequences))
    curve, meter = [], lm.Meter(batch * (config.delay + 2 * COPIED))
    meter.start()
    for step in range(steps):
        rows = rng.integers(0, config.train_sequences, batch)
        state, metrics = (first_step if step < switch else last_step)(state, Batch(*(x[rows] for x in pool)))
        meter.add(metrics)
        if (step + 1) % config.log_every == 0 or step + 1 == steps:
            line = meter.line()
            point = {"step": step + 1, "cpu_seconds": meter.spent[1], "loss": float(line["loss"])}
            curve.append(point | lm_step.backward(line))
            if len(curve) % 8 == 0:
                print(f"    {name} {step + 1}/{steps}: loss {point['loss']:.2e}, {meter.spent[0]:.0f} s", flush=True)
            meter.start()
    test_call = make_test(graphdef, solved if deep else explicit, test)
    measured = test_call(state, *([deq.Anderson(rtol=config.rtol, max_steps=config.max_steps)] if deep else []))
    otherwise = {}
    if deep:
        # Solve for the same equilibrium more exactly: the model should have learned z*, not where the solver stops.
        for rtol in (config.rtol / 10, config.rtol / 100):
            otherwise[f"rtol {rtol:g}"] = test_call(state, deq.Anderson(rtol=rtol, max_steps=100))
        otherwise["two layers"] = make_test(graphdef, functools.partial(solved, **SHALLOW), test)(state)
    return {
        "parameters": count_params(params),
        "steps": steps,
        "sequences": steps * batch,
        "seconds": meter.spent[0],
        "cpu_seconds": meter.spent[1],
        "curve": curve,
        "test": measured,
        "test_otherwise": otherwise,
    }


def make_test(graphdef: Any, call: Callable, test: Batch, batch: int = 32) -> Callable:
    """`test(state, *solver)`: means over the sequences of the loss, of the share of the ten symbols that is right, and
    of the solver statistics. Another tolerance or budget does not recompile."""

    @jax.jit
    def measure(params, rest, batch, *solver):
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits, metrics = call(model, batch.inputs, **({"solver": solver[0]} if solver else {}))
        right = jnp.argmax(logits, -1)[:, -COPIED:] == batch.targets[:, -COPIED:]
        return {"loss": lm_step.cross_entropy(logits, batch.targets), "right": right.mean(), **metrics}

    count = len(test.inputs)
    batch = max(n for n in range(1, min(batch, count) + 1) if count % n == 0)  # equal parts: one program, a plain mean
    parts = [Batch(*(x[i : i + batch] for x in test)) for i in range(0, count, batch)]

    def run(state: Any, *solver: deq.Solver) -> dict[str, float]:
        values = jax.device_get([measure(state.params, state.rest, part, *solver) for part in parts])
        return {name: float(np.mean([v[name] for v in values])) for name in values[0]}

    return run


# ---- what is stored ----------------------------------------------------------------------------------------


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    models = {name: cells(name, functools.partial(train_and_test, config, name)) for name in config.models}
    return {"chance": chance(config.delay), "models": models, "bars": bars(config, models)}


def bars(config: Config, models: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar beside the measured value, for the models that were run."""
    rows = []
    for name, model in models.items():
        loss, level = model["test"]["loss"], chance(config.delay)
        met, bar = (
            (loss <= BAR, f"≤ {BAR:g}")
            if name in ("DEQ-Transformer", "TCN")
            else (abs(loss / level - 1) <= 0.1, f"within 10 % of chance, {level:.4f}")
        )
        rows.append({"model": name, "bar": bar, "got": loss, "met": bool(met)})
    size = {name: model["parameters"] for name, model in models.items()}
    if "DEQ-Transformer" in size:
        off = max(abs(n / size["DEQ-Transformer"] - 1) for n in size.values())
        rows.append({"model": "parameters", "bar": "within 15 % of the equilibrium's", "got": off, "met": off <= 0.15})
    return rows


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.copy_memory", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
