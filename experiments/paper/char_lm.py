"""Character-level language modeling with the DEQ-Transformer; `word_lm` is the same for words.

    python -m experiments.paper.char_lm demo
    python -m experiments.paper.char_lm train --run runs/mine --data my_text.txt
    python -m experiments.paper.char_lm train --steps 200 solver:broyden --solver.rank 12 adjoint:phantom
    python -m experiments.paper.char_lm sample --run runs/char_lm --prompt "ROMEO:" --length 400

Without a command before the options, `train` runs.
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import PyTree

import deq_jax as deq
from experiments.paper import char_lm_report
from experiments.training import cli, data, lm
from experiments.training.checkpoints import config_to_json
from experiments.training.lm_model import Config
from experiments.training.lm_train import (
    EVALUATION_BATCH,
    about,
    make_steps,
    sample,
    sample_text,
    train,
    train_and_report,
)
from experiments.training.loop import TrainState
from experiments.training.runtime import Runtime
from experiments.training.sealed import write_atomically


def main(args: Sequence[str] | None = None) -> None:
    commands = {"train": train_command, "demo": demo, "sample": sample}
    cli.run_command(commands, args, prog="python -m experiments.paper.char_lm", description=__doc__, default="train")


# The commands.


def train_command(
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(),
    runtime: Annotated[Runtime, tyro.conf.arg(name="")] = Runtime(),
) -> None:
    """Train or resume one model, then measure it on the whole validation split. The report is kept in the run."""
    train_and_report(config, "paper.char_lm", runtime)


def demo(
    config: Annotated[Config, tyro.conf.arg(name="")] = Config(run=Path("runs/char_lm_demo")),
    *,
    layers: int = 12,
    depths: tuple[int, ...] = (2, 4, 8, 16, 32, 64),
    max_evaluations: int = 30,
    sample_length: int = 400,
) -> None:
    """Compare an equilibrium with `layers` unrolled layers of the same cell, and draw the figures.

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
    char_lm_report.draw_demo(config.run)
    more = f"python -m experiments.paper.char_lm sample --run {shlex.quote(str(deep.run))}"
    print(
        text,
        char_lm_report.table(summary),
        f"figure: {config.run / 'figure.png'}\nmore text: {more}",
        sep="\n\n",
        flush=True,
    )


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
    """Bytes of temporaries of the compiled training step by max_steps, unrolled and at the equilibrium."""
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
