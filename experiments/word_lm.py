"""Language modelling by words with the DEQ-Transformer; everything but the presets is `char_lm`'s.

    python -m experiments.word_lm ptb                    # Penn Treebank, below $DEQ_JAX_DATA or --data-dir
    python -m experiments.word_lm wikitext-2 --steps 2000 solver:broyden adjoint:phantom
    python -m experiments.word_lm sample --run runs/word_lm/ptb --prompt "the company said"

A newline is `<eos>`, and the loss is reported as perplexity: exp of nats a word, `<eos>` counted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

import deq_jax as deq
from experiments import lm
from experiments.char_lm import Config, sample, train_command

PRESETS = {
    "ptb": (
        "Penn Treebank, 2.6M parameters, most of them the embedding",
        Config(
            run=Path("runs/word_lm/ptb"),
            data="ptb",
            level="word",
            steps=12_000,
            shallow_share=1 / 6,
            batch=16,
            length=70,
            mem_len=70,
            dim=200,
            heads=4,
            inner_dim=800,
            dropout=0.2,
            lr=1e-3,
            warmup_share=1 / 24,
            clip=0.25,
        ),
    ),
    "wikitext-2": (
        "WikiText-2, 9M parameters, most of them the embedding; for an accelerator",
        Config(
            run=Path("runs/word_lm/wikitext-2"),
            data="wikitext-2",
            level="word",
            steps=30_000,
            shallow_share=1 / 6,
            batch=32,
            length=100,
            mem_len=100,
            dim=256,
            heads=8,
            inner_dim=2048,
            dropout=0.2,
            lr=5e-4,
            warmup_share=1 / 30,
            clip=0.25,
        ),
    ),
    # Bai et al.'s sizes, solver, schedule and tolerance. Their adaptive embedding (25.7M) is a full table here, of
    # 187M parameters; the rest is their 71.2M.
    "wikitext-103": (
        "WikiText-103 as in the paper's Table 3; for several large accelerators",
        Config(
            run=Path("runs/word_lm/wikitext-103"),
            data="wikitext-103",
            level="word",
            steps=300_000,
            shallow_share=32 / 300,
            batch=56,
            length=150,
            mem_len=150,
            dim=700,
            heads=10,
            inner_dim=48_000,
            dropout=0.05,
            embedding_std=0.01,
            lr=2.5e-4,
            warmup_share=16 / 300,
            clip=0.25,
            save_every=2_000,
            eval_every=10_000,
            solver=deq.Broyden(rtol=1e-3, max_steps=30, rank=30),
            adjoint=deq.Implicit(deq.Broyden(rtol=1e-3, max_steps=35, rank=35)),
        ),
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    commands = {name: _train(*preset) for name, preset in PRESETS.items()} | {"sample": sample}
    lm.run_command(commands, args, prog="python -m experiments.word_lm", description=__doc__)


def _train(about: str, preset: Config) -> Callable:
    def command(config: Annotated[Config, tyro.conf.arg(name="")] = preset) -> None:
        train_command(config)

    command.__doc__ = about + "."
    return command


if __name__ == "__main__":
    main()
