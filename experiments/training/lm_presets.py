"""The word-level language models by name: what each is, and its configuration."""

import dataclasses
from pathlib import Path

import deq_jax as deq
from experiments.training.lm_model import Config

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
    # For one CPU core: sizes at which a preset's warm-up and equilibrium both fit into some minutes.
    "ptb-small": (
        "Penn Treebank, 1.6M parameters: about 10 minutes on one CPU core",
        Config(
            run=Path("runs/word_lm/ptb-small"),
            data="ptb",
            level="word",
            steps=1600,
            batch=16,
            length=64,
            mem_len=64,
            dim=128,
            heads=4,
            inner_dim=512,
            dropout=0.1,
            lr=2e-3,
        ),
    ),
    "ptb-trellisnet-small": (
        "Penn Treebank, a DEQ-TrellisNet of 2.0M parameters: about 13 minutes on one CPU core",
        Config(
            run=Path("runs/word_lm/ptb-trellisnet-small"),
            data="ptb",
            level="word",
            model="trellisnet",
            steps=1600,
            batch=16,
            length=40,
            dim=200,
            output_dim=100,
            dropout=0.1,
            hidden_dropout=0.05,
            weight_dropout=0.1,
            # At the default of 0.05, h begins at 0.01: rows of the tied table run together along the cell's bias, and
            # its memory adds up a constant.
            embedding_std=0.3,
            lr=1e-2,
            # An evaluation carries the memory on by one column, so the length sets the budget (the paper's: a half).
            solver=deq.Anderson(rtol=1e-2, max_steps=30, history=6),
            adjoint=deq.Implicit(deq.Anderson(rtol=1e-2, max_steps=30, history=6)),
        ),
    ),
    # The sizes, rates of dropout, segments, caps and warm-up of the paper's Table 2, from its script. Theirs is SGD
    # from 20 on, cut to a tenth when the validation loss stalls; here it is Adam, as their WikiText-103 has.
    "ptb-trellisnet": (
        "Penn Treebank as in the paper's Table 2, a DEQ-TrellisNet of 24M parameters; for an accelerator",
        Config(
            run=Path("runs/word_lm/ptb-trellisnet"),
            data="ptb",
            level="word",
            model="trellisnet",
            steps=252_000,
            shallow_share=30 / 252,
            batch=16,
            length=110,
            dim=1000,
            output_dim=400,
            dropout=0.45,
            hidden_dropout=0.28,
            embedding_dropout=0.1,
            weight_dropout=0.5,
            embedding_std=0.1 / 3**0.5,
            init_std=0.01,
            lr=1e-3,
            warmup_share=1 / 252,
            clip=0.225,
            weight_decay=1.2e-6,
            save_every=2_000,
            eval_every=5_000,
            solver=deq.Broyden(rtol=1e-3, max_steps=55, rank=55),
            adjoint=deq.Implicit(deq.Broyden(rtol=1e-3, max_steps=80, rank=80)),
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
    # Bai et al.'s sizes, solver, schedule and tolerance: 71.2M parameters, 25.7M of the adaptive embedding, and 0.8M
    # of the softmax that are its own.
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
            cutoffs=(20_000, 40_000, 200_000),
            div_val=4,
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
    # The sizes of Table 3; the rest is its script's, whose learning rate falls to a tenth twice instead of by a cosine.
    "wikitext-103-trellisnet": (
        "WikiText-103 as in the paper's Table 3, a DEQ-TrellisNet; for several large accelerators",
        Config(
            run=Path("runs/word_lm/wikitext-103-trellisnet"),
            data="wikitext-103",
            level="word",
            model="trellisnet",
            steps=526_000,
            shallow_share=30 / 526,
            batch=49,
            length=100,
            dim=1600,
            output_dim=512,
            cutoffs=(2_800, 20_000, 76_000),
            dropout=0.1,
            hidden_dropout=0.1,
            embedding_dropout=0.1,
            weight_dropout=0.1,
            embedding_std=0.1 / 3**0.5,
            init_std=0.01,
            lr=1e-3,
            warmup_share=1 / 526,
            clip=0.07,
            save_every=2_000,
            eval_every=10_000,
            solver=deq.Broyden(rtol=1e-3, max_steps=45, rank=45),
            adjoint=deq.Implicit(deq.Broyden(rtol=1e-3, max_steps=45, rank=45)),
        ),
    ),
}
PRESETS["wikitext-2-small"] = (
    "WikiText-2, 1.0M parameters with an adaptive embedding and softmax: about 9 minutes on one CPU core",
    dataclasses.replace(
        PRESETS["ptb-small"][1],
        run=Path("runs/word_lm/wikitext-2-small"),
        data="wikitext-2",
        steps=800,
        # 77 % of the text are words of the head, 16 % of the first tail.
        cutoffs=(2_000, 10_000),
        div_val=4,
    ),
)
# The authors' code of 2021: the same sizes, Anderson forward, Broyden backward, both to 1e-3 relative.
PRESETS["wikitext-103-2021"] = (
    "WikiText-103, solved as the authors' code of 2021 does; for several large accelerators",
    dataclasses.replace(
        PRESETS["wikitext-103"][1],
        run=Path("runs/word_lm/wikitext-103-2021"),
        solver=deq.Anderson(rtol=1e-3, max_steps=30),
        adjoint=deq.Implicit(deq.Broyden(rtol=1e-3, max_steps=35, rank=35)),
    ),
)
