"""Language modelling by characters with the DEQ-Transformer; `word_lm` is the same for words.

    python -m experiments.char_lm demo
    python -m experiments.char_lm train --run runs/mine --data my_text.txt
    python -m experiments.char_lm train --steps 200 solver:broyden --solver.rank 12 adjoint:phantom
    python -m experiments.char_lm sample --run runs/char_lm --prompt "ROMEO:" --length 400

Without a word before the options, `train` is meant.
"""

import dataclasses
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, PyTree

import deq_jax as deq
from deq_jax.models import DEQTransformer, DEQTrellisNet, TransformerConfig, TrellisNetConfig
from experiments import data, generation, lm, plots
from experiments.checkpoints import RunDirectory, config_to_json, write_atomically
from experiments.training import (
    MetricsLog,
    TrainState,
    count_params,
    graceful_signals,
    init_state,
    make_optimizer,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A DEQ-Transformer on Tiny Shakespeare: about 6 minutes on two CPU cores, validation loss 1.82 nats.

    python -m experiments.char_lm train

    The same command on the same run directory resumes bit for bit. `adjoint:unroll` with `solver:picard
    --solver.max-steps 12` is the weight-tied network of 12 layers on the same parameters.
    """

    run: Path = Path("runs/char_lm")  # where checkpoints, metrics and figures go; resumed if it is there
    data: str = "shakespeare"  # a corpus of experiments.data, or a text file or a directory of yours
    data_dir: Path | None = None  # where corpora lie; default $DEQ_JAX_DATA or ~/.cache/deq_jax
    level: Literal["char", "word"] = "char"
    model: Literal["transformer", "trellisnet"] = "transformer"
    steps: int = 1600
    shallow_share: float = 0.625  # of the steps, first, through an unrolled network: the paper's warm-up
    shallow_depth: int = 2  # of this many layers
    batch: int = 16
    length: int = 64  # of a segment, in tokens
    mem_len: int = 64  # columns of history; a TrellisNet has one
    dim: int = 128  # of a TrellisNet, its channels that are not decoded
    heads: int = 4
    inner_dim: int = 512
    output_dim: int = 0  # of a TrellisNet, its decoded channels, and the embedding's width; 0: as dim
    modern: bool = False  # a transformer with rotary positions, RMSNorm and a gated feed-forward part
    cutoffs: tuple[int, ...] = ()  # of an adaptive embedding and softmax, in ids; (): plain ones
    div_val: int = 1  # the rows of each cluster are this many times narrower
    dropout: float = 0.0  # of embedding and output, one mask for all times
    hidden_dropout: float | None = None  # inside the cell; None: as dropout
    embedding_dropout: float = 0.0  # of whole words; TrellisNet
    weight_dropout: float = 0.0  # of the convolutions' weights in time; TrellisNet
    pre_norm: bool = False
    embedding_std: float = 0.05  # of a TrellisNet, √3 times this is the bound of a uniform draw
    init_std: float | None = None  # of the cell's kernels; None: U(±1/√fan_in)
    lr: float = 2e-3
    warmup_share: float = 0.03125  # of the steps, first, with a rising learning rate
    clip: float = 1.0  # of the gradient's global norm
    weight_decay: float = 0.0
    aux_every: int = 0  # layers (or steps of the solver) whose output has a loss too; 0: none; TrellisNet
    aux_weight: float = 0.05  # of each of these losses
    jacobian_weight: float = 0.0  # of the penalty on the Jacobian's norm at the equilibrium, after the warm-up
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the state; parameters are float32
    seed: int = 0
    log_every: int = 20
    eval_every: int = 400  # on the first segments of the validation split; the whole of it at the end
    save_every: int = 200
    solver: lm.SolverOption = deq.Anderson(**lm.FORWARD, history=6)
    adjoint: lm.AdjointOption = deq.Implicit(deq.Anderson(**lm.BACKWARD, history=6))

    def __post_init__(self):
        for name in ("steps", "shallow_depth", "log_every", "eval_every", "save_every"):
            lm.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("shallow_share", "warmup_share"):
            lm.require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        for name in ("lr", "clip"):
            lm.require(0 < getattr(self, name) < math.inf, name, "positive and finite", getattr(self, name))
        for name in ("weight_decay", "jacobian_weight", "aux_weight"):
            lm.require(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite", getattr(self, name))
        # Clusters are of frequency, and the ids of characters are in the order of the alphabet.
        lm.require(not self.cutoffs or self.level == "word", "cutoffs", "left out with --level char", self.cutoffs)
        lm.require(self.aux_every >= 0, "aux_every", "at least 0", self.aux_every)
        # An option that the model does not have would otherwise be ignored in silence.
        foreign = {
            "transformer": ("output_dim", "embedding_dropout", "weight_dropout", "aux_every"),
            "trellisnet": ("modern", "pre_norm"),
        }[self.model]
        for name in foreign:
            lm.require(not getattr(self, name), name, f"left out with --model {self.model}", getattr(self, name))

    # Shares, so that a run of 20 steps or of 100,000 has all three phases: the last step is never a warm-up's.

    @property
    def shallow_steps(self) -> int:
        return min(round(self.shallow_share * self.steps), self.steps - 1)

    @property
    def warmup_steps(self) -> int:
        return min(round(self.warmup_share * self.steps), self.steps - 1)


HARMLESS = {"run", "data_dir", "log_every", "eval_every", "save_every"}  # may change in a resume
EVALUATION_BATCH = 32
EVALUATION_SEGMENTS = 10  # read while training


def build(config: Config, vocabulary: data.Vocabulary) -> DEQTransformer | DEQTrellisNet:
    hidden_dropout = config.dropout if config.hidden_dropout is None else config.hidden_dropout
    common: dict[str, Any] = dict(
        vocab_size=len(vocabulary),
        hidden_dropout=hidden_dropout,
        init_std=config.init_std,
        cutoffs=config.cutoffs,
        div_val=config.div_val,
    )
    options: dict[str, Any] = dict(
        solver=config.solver,
        adjoint=config.adjoint,
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(config.seed),
    )
    if config.model == "trellisnet":
        trellisnet = TrellisNetConfig(
            **common,
            hidden_dim=config.dim,
            output_dim=config.output_dim or config.dim,
            input_dropout=config.dropout,
            output_dropout=config.dropout,
            embedding_dropout=config.embedding_dropout,
            weight_dropout=config.weight_dropout,
            embedding_range=math.sqrt(3) * config.embedding_std,
        )
        return DEQTrellisNet(trellisnet, **options)
    transformer = TransformerConfig(
        **common,
        dim=config.dim,
        heads=config.heads,
        inner_dim=config.inner_dim,
        mem_len=config.mem_len,
        io_dropout=config.dropout,
        pre_norm=config.pre_norm,
        embedding_std=config.embedding_std,
        rotary=config.modern,
        rms_norm=config.modern,
        gated=config.modern,
    )
    return DEQTransformer(transformer, **options)


def loss_fn(
    graphdef: Any,
    solver: deq.Solver,
    adjoint: Any,
    params: PyTree,
    probe: deq.Probe | None,
    rest: PyTree,
    batch: Any,
    key: Array,
    carry: PyTree,
    *,
    jacobian_weight: float = 0.0,
    aux_every: int = 0,
    aux_weight: float = 0.0,
) -> tuple[Array, tuple]:
    """The mean cross entropy of a `data.Segment` in nats, with the detached history of the segment before.

    With a weight, that many times the Jacobian penalty is added, and the auxiliary losses of a TrellisNet; `loss` in
    the metrics is without them.
    """
    model = nnx.merge(graphdef, params)
    before = lm.forget_at_start(carry, batch.is_start)
    options = {"aux_every": aux_every} if aux_every else {}
    out = model.hidden(batch.inputs, before, key=key, solver=solver, adjoint=adjoint, probe=probe, **options)
    solution = out.solution
    loss = jnp.mean(model.nll(out.hidden, batch.targets))
    # What nobody reads XLA drops: an unrolled network is not charged for measuring its last residual.
    metrics = {} if isinstance(adjoint, deq.Unroll) else lm.solve_metrics(solution.stats)
    if jacobian_weight:
        context, noise = model.context(batch.inputs, before, key=key), jax.random.fold_in(key, 1)
        penalty = deq.regularizers.jacobian_penalty(model.cell.f, solution.value, context, key=noise)
        metrics |= {"loss": loss, "jacobian_penalty": penalty}
        loss = loss + jacobian_weight * penalty
    if aux_every and out.auxiliary:
        auxiliary = sum(jnp.mean(model.nll(hidden, batch.targets)) for hidden in out.auxiliary)
        metrics = {"loss": loss, "aux_loss": auxiliary / len(out.auxiliary)} | metrics
        loss = loss + aux_weight * auxiliary
    return loss, (rest, out.history, metrics)


def main(args: Sequence[str] | None = None) -> None:
    commands = {"train": train_command, "demo": demo, "sample": sample}
    lm.run_command(commands, args, prog="python -m experiments.char_lm", description=__doc__, default="train")


# The commands.


def train_command(config: Annotated[Config, tyro.conf.arg(name="")] = Config()) -> None:
    """Train, or resume, one model; then measure it on the whole validation split. The report stays in the run."""
    train_and_report(config, "char_lm")


def train_and_report(config: Config, module: str) -> None:
    """`train`, and what came of it as report.json in the run; `module` is the experiment that was called."""
    text = json.dumps(about(config, module) | train(config).report, indent=1)
    write_atomically(config.run / "report.json", (text + "\n").encode())
    print(text)


def about(config: Config, module: str = "char_lm") -> dict[str, Any]:
    """Command, seed, dtype, gradient, machine and versions: what stands beside every number."""
    return {
        "command": f"python -m experiments.{module} {shlex.join(sys.argv[1:])}",
        "seed": config.seed,
        "dtype": config.dtype,
        "gradient": config_to_json(config.adjoint),
        **lm.environment(),
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
    vocabulary.encode(prompt)  # before the checkpoint is read
    _, state = start_state(config, vocabulary)
    with RunDirectory(run, stored) as directory:
        if directory.step is None:
            raise ValueError(f"{run} has no checkpoint yet: the run was stopped before its first save")
        state, _ = directory.restore(state)
    print(sample_text(config, vocabulary, state.params, prompt, length, temperature, seed))


def demo(
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(run=Path("runs/char_lm_demo")),
    *,
    layers: int = 12,
    depths: tuple[int, ...] = (2, 4, 8, 16, 32, 64),
    max_evaluations: int = 30,
    sample_length: int = 400,
) -> None:
    """The whole comparison: an equilibrium against `layers` unrolled layers of the same cell, in figures.

    Both have the same parameters, data, steps and warm-up. Writes summary.json, figure.png and sample.txt.
    """
    print(
        "demo: an equilibrium and the same cell unrolled, then memory, residuals, a sample and a figure.\n"
        f"Budget with the default options: 15 minutes on two quiet CPU cores. Results go to {config.run}.\n"
        "Ctrl-C saves; the same command continues.",
        flush=True,
    )
    unrolled = dataclasses.replace(
        config,
        run=config.run / "unrolled",
        solver=deq.Picard(max_steps=layers),
        adjoint=deq.Unroll(),
    )
    deep = dataclasses.replace(config, run=config.run / "deq")
    equilibrium = train(deep, title="DEQ")
    baseline = train(unrolled, title=f"{layers} layers")

    corpus, graphdef, params = equilibrium.corpus, equilibrium.graphdef, equilibrium.state.params
    prompt = "\n" if "\n" in corpus.vocabulary.tokens else corpus.vocabulary.tokens[0]
    text = sample_text(deep, corpus.vocabulary, params, prompt, sample_length, 0.8, config.seed)
    summary = {
        **about(config),
        "config": {k: v for k, v in config_to_json(config).items() if k not in ("run", "data_dir")},
        "shallow_steps": config.shallow_steps,
        "deq": equilibrium.report,
        "unrolled": {"layers": layers, **baseline.report},
        "residuals": residual_curves(deep, graphdef, params, corpus, max_evaluations),
        "memory": memory_by_depth(deep, graphdef, equilibrium.state, corpus, depths),
        "sample": text,
    }
    write_atomically(config.run / "sample.txt", (text + "\n").encode())
    write_atomically(config.run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    plots.draw_demo(config.run)
    more = f"python -m experiments.char_lm sample --run {shlex.quote(str(deep.run))}"
    print(text, plots.table(summary), f"figure: {config.run / 'figure.png'}\nmore text: {more}", sep="\n\n", flush=True)


# The loop.


class Trained(NamedTuple):
    state: TrainState
    graphdef: Any
    corpus: data.Corpus
    report: dict[str, Any]  # numbers, for a summary


def train(config: Config, title: str = "step", *, keep: Callable[[int, TrainState], None] | None = None) -> Trained:
    """Train or resume `config.run`; a finished one is measured again.

    `keep(step, state)` is called before the first step and after each one, before the run's own save: a run that
    was cut in between comes by there again.
    """
    corpus = lm.load_corpus(config.data, level=config.level, data_dir=config.data_dir)
    batches = data.segments(corpus.train, config.batch, config.length, seed=config.seed)
    evaluation = lm.evaluation_segments(corpus.valid, EVALUATION_BATCH, config.length)
    graphdef, state = start_state(config, corpus.vocabulary)
    stored = lm.identity(config_to_json(config), corpus)

    with graceful_signals() as stop, RunDirectory(config.run, stored, harmless=HARMLESS) as run:
        lm.save_vocabulary(run.path, corpus.vocabulary)
        state, spent = run.restore(state)
        start = int(state.step)
        print(f"{title}: {count_params(state.params):,} parameters, from step {start}; compiling", flush=True)
        shallow_step, train_step = make_steps(config, graphdef)
        # Ahead of time, so that the clock counts training alone, and the program's memory is known.
        train_step = train_step.lower(state, batches[0]).compile()
        if start < config.shallow_steps:
            shallow_step = shallow_step.lower(state, batches[0]).compile()
        evaluate = lm.make_evaluate(graphdef, evaluation, config.solver)
        meter = lm.Meter(config.batch * config.length, *(spent or ()))
        with (
            MetricsLog(run.metrics_path, after=start) as log,
            lm.reporting(title, start, config.steps, config.level) as report,
        ):
            if keep:
                keep(start, state)
            meter.start()
            for step in range(start, config.steps):
                one_step = shallow_step if step < config.shallow_steps else train_step
                state, metrics = one_step(state, batches[step])
                meter.add(metrics)
                done, stopping = step + 1, stop.signum is not None
                if keep:
                    keep(done, state)
                save = stopping or done % config.save_every == 0 or done == config.steps
                if save or done % config.log_every == 0:
                    line = meter.line()  # waits for the device
                    if done % config.eval_every == 0 and done > config.shallow_steps:
                        line["valid_loss"] = np.float64(evaluate(state.params, EVALUATION_SEGMENTS).loss)
                    report(log.write(done, line))
                    if save:
                        run.save(done, state, meter.spent)
                    meter.start()
                if stopping:
                    stop.exit(run.wait())
        measured = evaluate(state.params)
        if stop.signum:
            stop.exit(run.wait())
    return Trained(state, graphdef, corpus, final_report(config, state, meter, train_step, measured))


def start_state(config: Config, vocabulary: data.Vocabulary) -> tuple[Any, TrainState]:
    """The model's graph and the state before the first step."""
    model = build(config, vocabulary)
    graphdef, params = nnx.split(model, nnx.Param)
    tx, key = optimizer(config), jax.random.key(config.seed)
    # A plain dict: nnx.State costs some milliseconds a call.
    return graphdef, init_state(nnx.to_pure_dict(params), tx, key, carry=model.empty_history(config.batch))


def optimizer(config: Config) -> Any:
    return make_optimizer(
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        total_steps=config.steps,
        clip=config.clip,
        weight_decay=config.weight_decay,
    )


def make_steps(config: Config, graphdef: Any) -> tuple[Any, Any]:
    """The compiled steps of the warm-up and of the rest; they share one state."""
    tx = optimizer(config)

    def step(solver, adjoint, weight):
        aux: dict[str, Any] = {"aux_every": config.aux_every, "aux_weight": config.aux_weight}
        loss = functools.partial(loss_fn, graphdef, solver, adjoint, jacobian_weight=weight, **aux)
        return make_train_step(loss, tx, probe=lm.backward_probe(adjoint, config.batch))

    shallow = step(deq.Picard(max_steps=config.shallow_depth), deq.Unroll(), 0.0)
    return shallow, step(config.solver, config.adjoint, config.jacobian_weight)


def final_report(config: Config, state: TrainState, meter: lm.Meter, program: Any, measured: lm.Evaluation) -> dict:
    name, value = lm.per_unit(measured.loss, config.level)
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
    vocabulary: data.Vocabulary,
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


def residual_curves(
    config: Config, graphdef: Any, params: PyTree, corpus: data.Corpus, evaluations: int
) -> dict[str, list[float]]:
    """The median relative residual after 1, 2, … evaluations of f, on validation text, by solver."""
    segments = lm.evaluation_segments(corpus.valid, EVALUATION_BATCH, config.length)
    budgets = jnp.arange(1, evaluations + 1)

    @jax.jit
    def curve(params, first, second, solver):
        model = nnx.merge(graphdef, params)
        history = model(first, solver=config.solver).history

        def residual(max_steps):
            stats = model(second, history, solver=dataclasses.replace(solver, max_steps=max_steps)).solution.stats
            return jnp.median(stats.relative_residual)

        return jax.lax.map(residual, budgets)

    solvers = [
        deq.Picard(rtol=0.0),
        deq.Anderson(rtol=0.0, history=5),
        deq.Broyden(rtol=0.0, rank=evaluations),
    ]
    first, second = segments[0].inputs[:8], segments[1 % len(segments)].inputs[:8]
    curves = {type(s).__name__: np.asarray(curve(params, first, second, s)) for s in solvers}
    return {name: [float(r) for r in values] for name, values in curves.items()}


def memory_by_depth(
    config: Config, graphdef: Any, state: TrainState, corpus: data.Corpus, depths: Sequence[int]
) -> dict[str, list]:
    """Temporaries of the compiled training step in bytes, by max_steps: unrolled, and at the equilibrium."""
    batch = data.segments(corpus.train, config.batch, config.length, seed=config.seed)[0]

    def measured(solver, adjoint):
        changed = dataclasses.replace(config, solver=solver, adjoint=adjoint)
        return lm.temp_bytes(make_steps(changed, graphdef)[1].lower(state, batch).compile())

    implicit = [dataclasses.replace(config.solver, max_steps=depth) for depth in depths]
    return {
        "depths": list(depths),
        "unrolled": [measured(deq.Picard(max_steps=depth), deq.Unroll()) for depth in depths],
        "implicit": [measured(solver, config.adjoint) for solver in implicit],
    }


if __name__ == "__main__":
    main()
