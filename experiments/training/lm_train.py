"""Training a language model: the loop, which resumes bit for bit, its report, and text from what was trained."""

import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

import deq_jax as deq
from experiments.training import data, generation, lm, lm_report, lm_step, processes, tokenizer, utilization
from experiments.training.checkpoints import RunDirectory, config_to_json
from experiments.training.environment import environment
from experiments.training.lm_model import Config, build, loss_fn
from experiments.training.loop import (
    TrainState,
    count_params,
    graceful_signals,
    init_state,
    make_optimizer,
    make_train_step,
)
from experiments.training.mesh import ONE_DEVICE, Placement
from experiments.training.metrics import MetricsLog
from experiments.training.runtime import Runtime, started, tracing
from experiments.training.sealed import write_atomically

HARMLESS = {"run", "mesh", "data_dir", "log_every", "eval_every", "save_every"}  # may change in a resume
EVALUATION_BATCH = 32
EVALUATION_SEGMENTS = 10  # read while training


def train_and_report(config: Config, module: str, runtime: Runtime = Runtime()) -> None:  # noqa: B008
    """`train`, and what came of it as report.json in the run; `module` is the experiment that was called."""
    with started(runtime):
        text = json.dumps(about(config, module) | train(config, runtime=runtime).report, indent=1)
        if processes.is_first():
            write_atomically(config.run / "report.json", (text + "\n").encode())
        print(text)


def about(config: Config, module: str = "paper.char_lm") -> dict[str, Any]:
    """Command, seed, dtype, gradient, machine and versions: what stands beside every number."""
    return {
        "command": f"python -m experiments.{module} {shlex.join(sys.argv[1:])}",
        "seed": config.seed,
        "dtype": config.dtype,
        "gradient": config_to_json(config.adjoint),
        **environment(),
    }


def sample(
    run: Path,
    prompt: str = "\n",
    *,
    length: int = 400,
    temperature: float = 0.8,
    seed: int = 0,
) -> None:
    """Print text that a trained model continues; the same seed prints the same text."""
    config, stored, vocabulary = lm.read_run(run, Config)
    config = dataclasses.replace(config, mesh="")  # one device is enough for one text
    vocabulary.encode(prompt)  # before the checkpoint is read
    _, state = start_state(config, vocabulary)
    with RunDirectory(run, stored) as directory:
        if directory.step is None:
            raise ValueError(f"{run} has no checkpoint yet: the run was stopped before its first save")
        state, _ = directory.restore(state)
    print(sample_text(config, vocabulary, state.params, prompt, length, temperature, seed))


# The loop.


class Trained(NamedTuple):
    state: TrainState
    graphdef: Any
    corpus: data.Corpus
    report: dict[str, Any]  # numbers, for a summary


def train(
    config: Config,
    title: str = "step",
    *,
    keep: Callable[[int, TrainState], None] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
) -> Trained:
    """Train or resume `config.run`; a finished one is measured again.

    `keep(step, state)` is called before the first step and after each one, before the run's own save: a run that
    was cut in between comes by there again.
    """
    corpus = load_corpus(config, runtime.token_cache)
    batches = data.segments(corpus.train, config.batch, config.length, seed=config.seed)
    evaluation = lm.evaluation_segments(corpus.valid, EVALUATION_BATCH, config.length)
    placement = Placement.over(config.mesh)
    stored = lm.identity(config_to_json(config), corpus)
    processes.check_same({name: value for name, value in stored.items() if name != "data_dir"})
    graphdef, state = start_state(config, corpus.vocabulary, placement)

    with graceful_signals() as stop, RunDirectory(config.run, stored, harmless=HARMLESS) as run:
        if processes.is_first():
            lm.save_vocabulary(run.path, corpus.vocabulary)
        state, spent = run.restore(state)
        start = int(state.step)
        print(f"{title}: {count_params(state.params):,} parameters, from step {start}; compiling", flush=True)
        shallow_step, train_step = make_steps(config, graphdef, state, placement)
        # Ahead of time, so that the clock counts training alone, and the program's memory is known.
        first = placement.batch(batches[0])
        train_step = train_step.lower(state, first).compile()
        if start < config.shallow_steps:
            shallow_step = shallow_step.lower(state, first).compile()
        evaluate = lm.make_evaluate(graphdef, evaluation, config.solver, placement.batch)
        meter = lm.Meter(config.batch * config.length, *(spent or ()))
        if peak := utilization.peak(config.dtype):
            meter.utilized = (utilization.evaluation_flops(graphdef, state, first) or 0.0) / peak
        with (
            MetricsLog(run.metrics_path, after=start) as log,
            lm_report.reporting(title, start, config.steps, config.level) as report,
            tracing(run.path / "profile", max(start, config.shallow_steps), runtime.profile) as trace,
        ):
            if keep:
                keep(start, state)
            saving = 0.0
            meter.start()
            for step in range(start, config.steps):
                trace(step, state)
                one_step = shallow_step if step < config.shallow_steps else train_step
                state, metrics = one_step(state, placement.batch(batches[step]))
                meter.add(metrics)
                done = step + 1
                stopping = processes.stops(stop, done % config.log_every == 0)
                if keep:
                    keep(done, state)
                save = stopping or done % config.save_every == 0 or done == config.steps
                if save or done % config.log_every == 0:
                    run.check()
                    line = meter.line()  # waits for the device
                    if done % config.eval_every == 0 and done > config.shallow_steps:
                        line["valid_loss"] = np.float64(evaluate(state.params, EVALUATION_SEGMENTS).loss)
                    if saving:  # what the last save held up the loop for
                        line["save_seconds"], saving = np.float64(round(saving, 3)), 0.0
                    report(log.write(done, line))
                    if save:
                        saving = timed(lambda: run.save(done, state, meter.spent))
                    meter.start()
                if stopping:
                    stop.exit(run.wait())
        measured = evaluate(state.params)
        if stop.signum:
            stop.exit(run.wait())
    return Trained(state, graphdef, corpus, final_report(config, state, meter, train_step, measured))


def load_corpus(config: Config, cache: Path | None) -> data.Corpus:
    """The text of a run; of several processes the first one fills the cache for all."""
    load = lambda: lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir, cache_dir=cache)

    def fill() -> None:
        load()

    if cache:
        processes.from_first(fill)
    return load()


def timed(do: Callable[[], None]) -> float:
    """Its seconds."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def start_state(
    config: Config, vocabulary: tokenizer.Vocabulary, placement: Placement = ONE_DEVICE
) -> tuple[Any, TrainState]:
    """The model's graph and the state before the first step, each leaf where it belongs."""
    tx = optimizer(config)

    def start():
        model = build(config, vocabulary)
        graphdef, params = nnx.split(model, nnx.Param)
        # A plain dict: nnx.State costs some milliseconds a call.
        key, history = jax.random.key(config.seed), model.empty_history(config.batch)
        return graphdef, init_state(nnx.to_pure_dict(params), tx, key, carry=history)

    if placement.mesh is None:
        return start()
    # No device ever holds all of it.
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(config, vocabulary)), nnx.Param)
    shapes = jax.eval_shape(lambda: start()[1])
    return graphdef, jax.jit(lambda: start()[1], out_shardings=placement.state(params, shapes, tx))()


def optimizer(config: Config) -> Any:
    return make_optimizer(
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        total_steps=config.steps,
        clip=config.clip,
        weight_decay=config.weight_decay,
    )


def make_steps(
    config: Config, graphdef: Any, state: TrainState | None = None, placement: Placement = ONE_DEVICE
) -> tuple[Any, Any]:
    """The compiled steps of the warm-up and of the rest; they share one state, which lies as `placement` has put it."""
    tx = optimizer(config)
    gathered, place = placement.of_step(graphdef, state, tx)

    def step(solver, adjoint, weight):
        aux: dict[str, Any] = {"aux_every": config.aux_every, "aux_weight": config.aux_weight}
        aux["by_tokens"] = placement.by_tokens
        of_weights = functools.partial(loss_fn, graphdef, solver, adjoint, jacobian_weight=weight, **aux)
        loss = lambda params, *others: of_weights(gathered(params), *others)
        return make_train_step(loss, tx, probe=lm_step.backward_probe(adjoint, config.batch), place=place)

    shallow = step(deq.Picard(max_steps=config.shallow_depth), deq.Unroll(), 0.0)
    return shallow, step(config.solver, config.adjoint, config.jacobian_weight)


def final_report(config: Config, state: TrainState, meter: lm.Meter, program: Any, measured: lm.Evaluation) -> dict:
    name, value = lm_report.per_unit(measured.loss, config.level)
    return {
        "valid_loss": measured.loss,
        f"valid_{name.replace('/', '_per_')}": value,
        "valid_tokens": measured.tokens,
        "valid_solver_steps": measured.steps,
        "valid_relative_residual": measured.residual,
        "valid_converged": measured.converged,
        "parameters": count_params(state.params),
        "steps": int(state.step),
        "tokens": int(state.step) * config.batch * config.length,
        "train_seconds": round(meter.spent[0], 1),
        "train_cpu_seconds": round(meter.spent[1], 1),
        "temp_bytes": lm.temp_bytes(program),
        "solver": config_to_json(config.solver),
        "adjoint": config_to_json(config.adjoint),
    }


# What the demo measures of a trained model.


def sample_text(
    config: Config,
    vocabulary: tokenizer.Vocabulary,
    params: PyTree,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> str:
    # In training the last token of a segment saw mem_len + length − 1 columns: so many are kept here.
    wide = dataclasses.replace(config, mem_len=config.mem_len + config.length - 1)
    graphdef, _ = nnx.split(build(wide, vocabulary), nnx.Param)
    return generation.generate(graphdef, params, vocabulary, prompt, length=length, temperature=temperature, seed=seed)
