"""What a training step needs and how it scales over 8, 64 and 256 devices, read from programs compiled without them.

    python -m experiments.scaling_study   # in the environment of `make kernels`
    python -m experiments.scaling_study tpu   # what the compiler for a TPU makes of one of them, 15 minutes

Each device has the same batch whatever the number of devices. The programs are those of H100s, compiled ahead of time
from shapes; nothing is allocated and nothing runs. `benchmarks.step_cost` turns their text into seconds: kernels at
published peaks, collectives at published bandwidths, none hidden behind a kernel. The seconds are therefore the least
that the kernels can take and the most that these collectives can: a scaling efficiency errs on the low side. Those of a
TPU v5p are what the same programs would take with its figures; its own compiler gives memory and collectives, because
its text does not show products plainly, and takes many times as long. A solve is counted with its whole budget.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import scaling_report
from experiments.benchmarks import programs, step_cost
from experiments.benchmarks.step_cost import Item
from experiments.shared import study
from experiments.training import abstract, cli, mesh
from experiments.training.environment import environment
from experiments.training.lm_presets import PRESETS

# Preset → sequences a device, and meshes. fsdp is inside a host; it divides the width of a state: 700 by 4, not by 8.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "wikitext-103": (
        56,
        ("data=1", "data=8", "data=2,fsdp=4", "data=16,fsdp=4", "data=8,fsdp=4,model=2", "data=64,fsdp=4"),
    ),
    "wikitext-103-trellisnet": (49, ("data=1", "fsdp=8", "data=8,fsdp=8", "data=32,fsdp=8")),
    "wikitext-103-1.3b": (4, ("data=1", "fsdp=8", "data=8,fsdp=8", "data=8,fsdp=4,model=2", "data=32,fsdp=8")),
}
# Whose figures are applied to the programs of each.
MACHINES = {"h100": (step_cost.H100, step_cost.V5P), "v5p": (step_cost.V5P,)}


@dataclasses.dataclass(frozen=True)
class Config:
    """About 20 minutes on two shared CPU cores; no GPU.

    python -m experiments.scaling_study

    You should see efficiencies above 0.9 on 8 devices and above 0.85 on 64.
    """

    run: Path = Path("runs/scaling_study")  # what is compiled is kept here: a study that was cut continues
    out: Path | None = None  # experiments/results/scaling_study, or below `run` where another option is given
    presets: tuple[str, ...] = tuple(LAYOUTS)
    meshes: tuple[str, ...] = ()  # of these presets; (): all
    target: Literal["h100", "v5p"] = "h100"
    whole_losses: bool = False  # of the whole batch on every device, as XLA places them: see `mesh.Placement.by_tokens`

    def __post_init__(self):
        unknown = sorted(set(self.presets) - set(LAYOUTS))
        cli.require(not unknown, "presets", f"of {', '.join(LAYOUTS)}", ", ".join(unknown))


def main(args: Sequence[str] | None = None) -> None:
    jax.config.update("jax_platforms", "cpu")  # the accelerators here, if there are any, stay untouched
    one = dataclasses.replace(Config(), target="v5p", presets=("wikitext-103-1.3b",), meshes=("fsdp=8",))
    options = {
        "reduced": ("20 minutes on two CPU cores", Config()),
        "tpu": ("15 minutes on two CPU cores", dataclasses.replace(one, run=Path("runs/scaling_study_tpu"))),
    }
    parts = measure, scaling_report.table, scaling_report.draw
    study.run("scaling_study", options, *parts, args, description=__doc__)


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    os.environ.update(programs.TPU_ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": "v5p-8"})
    if absent := programs.missing("jax_cuda13_plugin" if config.target == "h100" else "libtpu"):
        raise ValueError(f"{absent[0]} is not installed here; `make kernels` makes an environment with it")
    rows = []
    for preset in config.presets:
        batch, layouts = LAYOUTS[preset]
        for text in layouts:
            if text in (config.meshes or layouts):
                case = config, preset, text, batch
                rows.append(cells(f"{preset} {text}", lambda case=case: measured(*case)))
    versions = environment()["versions"] | programs.versions("jax-cuda13-pjrt", "nvidia-cuda-nvcc", "libtpu")
    machines = {machine.name: machine._asdict() for machine in MACHINES[config.target]}
    return {"versions": versions, "machines": machines, "rows": rows}


class WholeLosses(mesh.Placement):
    def by_tokens(self, nll: Callable) -> Callable:
        return nll


def measured(asked: Config, preset: str, text: str, batch: int) -> dict[str, Any]:
    """What a device holds, computes and sends in a step of a preset over a mesh, with so many sequences each."""
    sizes = mesh.parse(text)
    devices = math.prod(sizes.values())
    config = dataclasses.replace(PRESETS[preset][1], batch=batch * devices)
    config = dataclasses.replace(config, mesh=text)  # refused where it does not divide them
    shape, is_tpu = tuple(sizes.values()), asked.target == "v5p"
    hosts = max(1, devices // 8)
    over = programs.v5p_mesh(shape, mesh.AXES) if is_tpu else programs.h100_mesh(shape, mesh.AXES, hosts)
    began = time.perf_counter()
    placement = (WholeLosses if asked.whole_losses else mesh.Placement)(over)
    step = abstract.lower(config, abstract.vocabulary_size(config), placement)
    program = step.lowered.compile({} if is_tpu else programs.UNTUNED)
    seconds = time.perf_counter() - began
    rounds = {"forward": config.solver.max_steps, "backward": config.adjoint.solver.max_steps}  # type: ignore[union-attr]
    about = {"preset": preset, "mesh": text, "devices": devices, "batch": batch, "length": config.length}
    row = about | {"rounds": rounds, "memory": abstract.memory(config, step, program), "compile_s": round(seconds, 1)}
    for machine in MACHINES[asked.target]:
        items = step_cost.cost(program.as_text(), machine, **rounds, devices=devices)
        row["collectives"] = collectives(items)
        if not is_tpu:  # the text of a TPU's program does not show its products plainly
            row["flops"] = flops(items)
            row.setdefault("seconds", {})[machine.name] = seconds_of(items)
    return row


def flops(items: Iterable[Item]) -> dict[str, float]:
    """Of products alone: of an evaluation of f each way, of its pullback that is, and of a step."""
    of = lambda way: sum(i.flops for i in items if (i.place, i.way) == ("f", way))
    return {"forward": of("forward"), "backward": of("backward"), "step": sum(i.flops * i.times for i in items)}


def collectives(items: Iterable[Item]) -> dict[str, list[list[Any]]]:
    """[what, devices of a group, how many, their bytes] of a round, by place; under "step" those that run once."""
    found: dict[str, dict[tuple, list[float]]] = {}
    for item in items:
        if item.what:
            of_place = found.setdefault(f"{item.place} {item.way}" if item.times > 1 else "step", {})
            total = of_place.setdefault((item.what, item.group), [0, 0])
            total[0] += 1
            total[1] += item.sent
    return {place: [[*key, *total] for key, total in rows.items()] for place, rows in found.items()}


def seconds_of(items: Iterable[Item]) -> dict[str, float]:
    """By what is run: kernels and collectives of f, of the solver, and outside of the solves."""
    found = {f"{what} of {place}": 0.0 for what in ("kernels", "collectives") for place in ("f", "solver", "step")}
    for item in items:
        found[f"{'collectives' if item.what else 'kernels'} of {item.place}"] += item.seconds * item.times
    return found | {"total": sum(found.values())}


if __name__ == "__main__":
    main()
