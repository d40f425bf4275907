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

from experiments import lm, plots
from experiments.checkpoints import write_atomically

RESULTS = Path("experiments/results")


class Part(NamedTuple):
    module: str
    args: tuple[str, ...]
    minutes: float  # on one CPU core of a shared machine, rounded up

    @property
    def name(self) -> str:
        return " ".join((self.module, *(arg for arg in self.args if arg != "reduced")))


PAPER = (
    Part("trained", (), 3),
    Part("tolerance_study", ("reduced",), 6),
    Part("initialization_study", ("reduced",), 5),
    Part("stability_study", ("reduced",), 4),
    Part("iterations_study", ("reduced",), 2),
    Part("copy_memory", ("reduced",), 12),
    Part("memory_study", ("reduced",), 15),
    Part("runtime_study", ("reduced",), 8),
    Part("word_lm", ("ptb-small",), 10),
    Part("word_lm", ("ptb-trellisnet-small",), 13),
    Part("word_lm", ("wikitext-2-small",), 9),
)
LIBRARY = (
    Part("gradient_study", (), 8),
    Part("robustness_study", (), 7),
    Part("backward_study", (), 15),
)
# What `python -m experiments.MODULE figure` redraws.
REDRAWN = tuple(part.module for part in PAPER if part.args == ("reduced",))


def run(kept: Path = Path("runs/suite"), *, library: bool = False, only: tuple[str, ...] = ()) -> None:
    """Every reduced experiment of the paper, one after the other; what is finished is not run again.

    With `library` the studies of solvers and gradients instead; `only` names modules of either kind.
    """
    parts = [part for part in PAPER + LIBRARY if part.module in only] if only else LIBRARY if library else PAPER
    if unknown := set(only) - {part.module for part in PAPER + LIBRARY}:
        known = ", ".join(part.module for part in PAPER + LIBRARY)
        raise ValueError(f"no experiment {', '.join(sorted(unknown))}; there are {known}")
    kept.mkdir(parents=True, exist_ok=True)
    print(f"{len(parts)} experiments, {sum(part.minutes for part in parts):g} minutes on one CPU core:")
    for part in parts:
        done = (kept / f"{part.name}.json").exists()
        print(f"  {part.name:28} {part.minutes:4g} min{'  finished before' if done else ''}")
    for number, part in enumerate(parts, 1):
        marker = kept / f"{part.name}.json"
        if marker.exists():
            continue
        print(f"\n[{number}/{len(parts)}] python -m experiments.{' '.join((part.module, *part.args))}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", f"experiments.{part.module}", *part.args]).returncode
        if code:
            raise SystemExit(code if code > 0 else 128 - code)  # it has said why
        minutes = round((time.perf_counter() - began) / 60, 1)
        write_atomically(marker, json.dumps({"minutes": minutes}).encode())
        print(f"[{number}/{len(parts)}] {part.name}: {minutes} minutes", flush=True)


def figures() -> None:
    """Every figure and table again, from the results that are committed."""
    for module in REDRAWN:
        importlib.import_module(f"experiments.{module}").main(["figure"])
    from experiments import gradient_study, robustness_study
    from experiments.benchmarks import report

    drawn = (
        ("gradients", gradient_study.draw),
        ("robustness", robustness_study.draw_figure),
        ("benchmarks", report.draw),
    )
    for folder, draw in drawn:
        draw(json.loads((RESULTS / folder / "results.json").read_text()), RESULTS / folder / "figure.png")
        print(f"{RESULTS / folder}/: figure.png")
    print(f"{plots.draw_demo(RESULTS / 'char_lm').parent}/: figure.png")


def main(args: Sequence[str] | None = None) -> None:
    commands = {"run": run, "figures": figures}
    lm.run_command(commands, args, prog="python -m experiments.suite", description=__doc__)


if __name__ == "__main__":
    main()
