"""Word-level language modeling with both models of the paper; everything but the presets is from `char_lm`.

    python -m experiments.paper.word_lm ptb                    # Penn Treebank, below $DEQ_JAX_DATA or --data-dir
    python -m experiments.paper.word_lm ptb-small              # the same for one CPU core, about 10 minutes
    python -m experiments.paper.word_lm ptb-trellisnet-small   # likewise, a DEQ-TrellisNet, 13 minutes
    python -m experiments.paper.word_lm wikitext-2-small       # 33K words, adaptive embedding and softmax, 9 minutes
    python -m experiments.paper.word_lm wikitext-2 --steps 2000 solver:broyden adjoint:phantom
    python -m experiments.paper.word_lm sample --run runs/word_lm/ptb --prompt "the company said"

A newline is `<eos>`. The loss is reported as perplexity: exp of nats per word, with `<eos>` counted as a word.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from experiments.training import cli
from experiments.training.lm_model import Config
from experiments.training.lm_presets import PRESETS
from experiments.training.lm_train import sample, train_and_report
from experiments.training.runtime import Runtime


def main(args: Sequence[str] | None = None) -> None:
    commands = {name: _train(*preset) for name, preset in PRESETS.items()} | {"sample": sample}
    cli.run_command(commands, args, prog="python -m experiments.paper.word_lm", description=__doc__)


def _train(about: str, preset: Config) -> Callable:
    def command(
        config: Annotated[Config, tyro.conf.arg(name="")] = preset,
        runtime: Annotated[Runtime, tyro.conf.arg(name="")] = Runtime(),
    ) -> None:
        train_and_report(config, "paper.word_lm", runtime)

    command.__doc__ = about + "."
    return command


if __name__ == "__main__":
    main()
