"""All reduced experiments, and all figures from the results that are kept: `make experiments`, `make figures`.

python -m experiments.suite run            # the paper's; continues where it was cut
python -m experiments.suite run --library  # the studies of solvers and gradients: `make studies`
python -m experiments.suite figures

`rm -r runs/suite runs/studies` starts anew.
"""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import MOVED
from experiments.benchmarks import report
from experiments.paper import char_lm_report
from experiments.shared import study
from experiments.studies import gradient_report, robustness_report
from experiments.training import cli
from experiments.training.sealed import write_atomically

HERE = Path("experiments")


class Part(NamedTuple):
    module: str  # below experiments
    args: tuple[str, ...]
    minutes: float  # on one CPU core of a shared machine, rounded up

    @property
    def short(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def name(self) -> str:
        return self.named(self.short)

    def named(self, module: str) -> str:
        return " ".join((module, *(arg for arg in self.args if arg != "reduced")))

    @property
    def known_as(self) -> set[str]:
        """Its short name, and those that the module had before."""
        return {self.short, self.module, *(old for old, places in MOVED.items() if places[0] == self.module)}

    def finished(self, kept: Path) -> bool:
        return any((kept / f"{self.named(module)}.json").exists() for module in self.known_as)


PAPER = (
    Part("shared.trained", (), 3),
    Part("paper.tolerance", ("reduced",), 6),
    Part("paper.initialization", ("reduced",), 5),
    Part("paper.stability", ("reduced",), 4),
    Part("paper.iterations", ("reduced",), 2),
    Part("paper.copy_memory", ("reduced",), 12),
    Part("paper.memory", ("reduced",), 15),
    Part("paper.runtime", ("reduced",), 8),
    Part("paper.word_lm", ("ptb-small",), 10),
    Part("paper.word_lm", ("ptb-trellisnet-small",), 13),
    Part("paper.word_lm", ("wikitext-2-small",), 9),
)
LIBRARY = (
    Part("studies.gradient", (), 8),
    Part("studies.robustness", (), 7),
    Part("studies.backward", (), 15),
)
# What `python -m experiments.MODULE figure` redraws.
REDRAWN = tuple(part.module for part in PAPER if part.args == ("reduced",))


def run(kept: Path = Path("runs/suite"), *, library: bool = False, only: tuple[str, ...] = ()) -> None:
    """Every reduced experiment of the paper, one after the other; what is finished is not run again.

    With `library` the studies of solvers and gradients instead; `only` names modules of either kind.
    """
    every = PAPER + LIBRARY
    parts = [part for part in every if part.known_as & set(only)] if only else LIBRARY if library else PAPER
    if unknown := set(only).difference(*(part.known_as for part in every)):
        known = ", ".join(dict.fromkeys(part.short for part in every))
        raise ValueError(f"no experiment {', '.join(sorted(unknown))}; there are {known}")
    kept.mkdir(parents=True, exist_ok=True)
    print(f"{len(parts)} experiments, {sum(part.minutes for part in parts):g} minutes on one CPU core:")
    for part in parts:
        done = "  finished before" if part.finished(kept) else ""
        print(f"  {part.name:28} {part.minutes:4g} min{done}")
    for number, part in enumerate(parts, 1):
        if part.finished(kept):
            continue
        print(f"\n[{number}/{len(parts)}] python -m experiments.{' '.join((part.module, *part.args))}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", f"experiments.{part.module}", *part.args]).returncode
        if code:
            raise SystemExit(code if code > 0 else 128 - code)  # it has said why
        minutes = round((time.perf_counter() - began) / 60, 1)
        write_atomically(kept / f"{part.name}.json", json.dumps({"minutes": minutes}).encode())
        print(f"[{number}/{len(parts)}] {part.name}: {minutes} minutes", flush=True)


def figures() -> None:
    """Every figure and table again, from the results that are committed."""
    for module in REDRAWN:
        importlib.import_module(f"experiments.{module}").main(["figure"])
    drawn = (
        ("studies/results/gradient", gradient_report.draw),
        ("studies/results/robustness", robustness_report.draw_figure),
        ("benchmarks/results/peers", report.draw),
    )
    for folder, draw in drawn:
        draw(study.read(HERE / folder / "results.json"), HERE / folder / "figure.png")
        print(f"{HERE / folder}/: figure.png")
    print(f"{char_lm_report.draw_demo(HERE / 'paper/results/char_lm').parent}/: figure.png")


def main(args: Sequence[str] | None = None) -> None:
    commands = {"run": run, "figures": figures}
    cli.run_command(commands, args, prog="python -m experiments.suite", description=__doc__)


if __name__ == "__main__":
    main()
