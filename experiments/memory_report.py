"""What a training step needs on each device, before anything runs, and the largest batch that fits.

    python -m experiments.memory_report --preset wikitext-103 --mesh data=2,fsdp=4 --hbm 80GB
    python -m experiments.memory_report --preset ptb --batch 64

The step is compiled from shapes for as many simulated devices as the mesh has; none is needed and nothing is allocated.
By default these are CPUs, whose compiler plans other temporaries than an accelerator's; with `--compiler h100` they are
H100s, in an environment with NVIDIA's compilers (`make kernels` makes one). A run needs some memory besides, for its
libraries and their workspaces.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import tyro

from experiments.benchmarks import programs
from experiments.training import abstract, cli, mesh
from experiments.training.lm_model import Config as Model
from experiments.training.lm_presets import PRESETS

MODELS = {"char": Model()} | {name: config for name, (_, config) in PRESETS.items()}
QUICKLY = {"xla_backend_optimization_level": 0}  # the plan of the memory is made before
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Config:
    """A minute for a preset of Penn Treebank, a few for one of WikiText-103; --hbm takes three to five times as long.

    python -m experiments.memory_report --preset ptb --mesh data=8
    """

    preset: str = "char"  # of word_lm; char: char_lm's
    mesh: str = ""  # as for training; "": one device
    hbm: str = ""  # the memory of a device, as 80GB or 74.5GiB; then the largest batch that fits is looked for
    batch: int | None = None  # of all devices; None: the preset's
    vocab_size: int | None = None  # None: that of the preset's corpus
    compiler: Literal["cpu", "h100"] = "cpu"

    def __post_init__(self):
        if self.preset not in MODELS:
            close = difflib.get_close_matches(self.preset, MODELS, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(MODELS)}"
            raise ValueError(f"--preset has no {self.preset!r}{hint}")
        cli.require(self.batch is None or self.batch >= 1, "batch", "at least 1", self.batch)
        cli.require(self.vocab_size is None or self.vocab_size >= 1, "vocab_size", "at least 1", self.vocab_size)
        if self.hbm:
            size(self.hbm)
        self.model  # noqa: B018  a mesh that does not fit is refused

    @property
    def model(self) -> Model:
        model = MODELS[self.preset]
        return dataclasses.replace(model, mesh=self.mesh, batch=self.batch or model.batch)

    @property
    def sizes(self) -> dict[str, int]:
        return mesh.parse(self.mesh or "data=1")


def main(args: Sequence[str] | None = None) -> None:
    def report(config: Annotated[Config, tyro.conf.arg(name="")] = Config()) -> None:  # noqa: B008
        simulate(math.prod(config.sizes.values()))
        print("\n".join(told(config)))

    report.__doc__ = Config.__doc__
    prog = "python -m experiments.memory_report"
    cli.run_command({"report": report}, args, prog=prog, description=__doc__, default="report")


def simulate(devices: int) -> None:
    """So many CPU devices, whatever the machine has; before JAX has looked for any."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def size(text: str) -> float:
    """The bytes that an option means; ValueError if it means none.

    >>> size("80GB"), size("1.5 GiB")
    (80000000000.0, 1610612736.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"--hbm must be a size such as 80GB or 74.5GiB, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def memory(config: Config, batch: int) -> dict[str, int]:
    """Bytes of one device by what they are for, see `abstract.memory`."""
    model = dataclasses.replace(config.model, batch=batch)
    words = config.vocab_size or abstract.vocabulary_size(model)
    step = abstract.lower(model, words, mesh.Placement(devices(config)))
    return abstract.memory(
        model, step, step.lowered.compile(programs.UNTUNED if config.compiler == "h100" else QUICKLY)
    )


def devices(config: Config) -> jax.sharding.Mesh:
    shape, count = tuple(config.sizes.values()), math.prod(config.sizes.values())
    if config.compiler == "h100":
        if absent := programs.missing("jax_cuda13_plugin"):
            raise ValueError(f"--compiler h100 needs {absent[0]}, which is not installed here; see `make kernels`")
        return programs.h100_mesh(shape, mesh.AXES, hosts=max(1, count // 8))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), mesh.AXES)


class Fit(NamedTuple):
    batch: int  # 0: not even the smallest fits
    total: int  # bytes of a device


def largest_batch(needed: Callable[[int], int], unit: int, start: int, budget: float) -> Fit:
    """The largest multiple of `unit` whose step is within the budget, and the bytes that it needs.

    What is returned was compiled, and so was the next multiple where a straight line through the two batches nearest to
    the budget leaves it in doubt.

    >>> largest_batch(lambda batch: 100 + 7 * batch, 4, 8, 1000)
    Fit(batch=128, total=996)
    """
    known = {batch: needed(batch) for batch in {unit, max(start, 2 * unit)}}
    while True:
        a, b = sorted(sorted(known, key=lambda batch: abs(known[batch] - budget))[:2])
        slope = max((known[b] - known[a]) / (b - a), 1e-9)
        guess = unit * int((a + (budget - known[a]) / slope) // unit)
        fits = max((batch for batch in known if known[batch] <= budget), default=0)
        over = min((batch for batch in known if known[batch] > budget), default=None)
        guess = min(max(guess, fits), fits + 64 * max(start, unit))
        if over is not None:
            guess = min(guess, over - unit)
        if guess in known or guess <= 0:
            return Fit(fits, known.get(fits, 0))
        known[guess] = needed(guess)


def told(config: Config) -> list[str]:
    """The lines of the report."""
    model, count = config.model, math.prod(config.sizes.values())
    found = memory(config, model.batch)
    unit = "GB" if found["total"] >= 1e9 else "MB"
    line = lambda name, key, indent=2: f"{' ' * indent}{name:<{34 - indent}}{found[key] / UNITS[unit]:8.2f}"
    where = f"{count} devices ({config.mesh})" if count > 1 else "one device"
    compiler = {"cpu": "a CPU", "h100": "an H100"}[config.compiler]
    lines = [
        f"{config.preset} on {where}, a batch of {model.batch}: {unit} of each device, by the compiler for {compiler}",
        line("parameters", "parameters"),
        line("optimizer", "optimizer"),
        line("history of the text, and batch", "text"),
        line("temporaries, not all at once:", "temporaries"),
        line("gradient", "gradient", 4),
        *([line("parameters, gathered over fsdp", "gradient", 4)] * (config.sizes["fsdp"] > 1)),
        line("history of the forward solve", "forward", 4),
        line("history of the backward solve", "backward", 4),
        line("in all", "total"),
    ]
    if not config.hbm:
        return lines
    rows = config.sizes["data"] * config.sizes["fsdp"]
    needed = lambda batch: found["total"] if batch == model.batch else memory(config, batch)["total"]
    fit = largest_batch(needed, rows, model.batch, size(config.hbm))
    if not fit.batch:
        return [*lines, f"  not even a batch of {rows} fits in {config.hbm}: more fsdp or model divides the parameters"]
    return [*lines, f"  largest batch in {config.hbm}: {fit.batch}, which needs {fit.total / 1e9:.2f} GB"]


if __name__ == "__main__":
    main()
