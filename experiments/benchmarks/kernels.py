"""What every solver launches on an H100 and sends over its links or a TPU's, read from programs compiled without them.

    make kernels  # python -m experiments.benchmarks.kernels, in an environment of its own

Fewer kernels, inner loops and copies are less time where a state is small, fewer bytes where it is large. `BARS` says
how few are wanted. What is measured is the solver alone: f is one multiply-add.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from jax.sharding import PartitionSpec

import deq_jax as deq
from experiments.benchmarks import programs
from experiments.shared import study
from experiments.shared.plots import markdown_table
from experiments.training import cli
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

SOLVERS: dict[str, deq.Solver] = {
    "Picard": deq.Picard(),
    "Anderson(3)": deq.Anderson(history=3),
    "Anderson(5)": deq.Anderson(history=5),
    "Anderson(8)": deq.Anderson(history=8),
    "Anderson(16)": deq.Anderson(history=16),
    "Broyden(20)": deq.Broyden(rank=20),
    "NewtonKrylov": deq.NewtonKrylov(),
    "Robust": deq.Robust(),
}
# Compiled for a TPU besides `Implicit` with each of the solvers, after the solver that goes with them.
ADJOINTS: dict[str, tuple[deq.Solver, deq.Adjoint]] = {
    "Implicit()": (deq.Anderson(), deq.Implicit()),
    "ImplicitJVP()": (deq.Anderson(), deq.ImplicitJVP()),
    "Shine()": (deq.Broyden(), deq.Shine()),
    "Phantom()": (deq.Anderson(), deq.Phantom()),
    "Neumann()": (deq.Anderson(), deq.Neumann()),
    "JFB()": (deq.Anderson(), deq.JFB()),
    "Unroll()": (deq.Picard(), deq.Unroll()),
    "Unroll(checkpoint=True)": (deq.Picard(), deq.Unroll(checkpoint=True)),
    "Reversible()": (deq.Picard(max_steps=20), deq.Reversible()),
}


class Bar(NamedTuple):
    """At most `at_most` of a row's `what`, for those solvers, at one shape or at all, both ways or forward alone."""

    what: Literal["kernels", "inner_loops", "copies", "moved", "temporaries"]
    at_most: int
    solvers: tuple[str, ...]
    shape: tuple[int, int] | None = None
    forward_alone: bool = False  # a backward program holds the temporaries of both


SHORT = ("Anderson(3)", "Anderson(5)", "Anderson(8)")
BARS = (
    Bar("kernels", 6, ("Picard",)),
    Bar("kernels", 12, SHORT),
    Bar("inner_loops", 0, SHORT),
    Bar("copies", 0, SHORT),
    Bar("kernels", 14, ("Anderson(16)",)),
    Bar("kernels", 20, ("Broyden(20)",)),
    Bar("kernels", 30, ("NewtonKrylov",)),
    Bar("moved", 24, ("Anderson(5)",), shape=(4096, 1024)),
    Bar("temporaries", 14, ("Anderson(5)",), shape=(4096, 1024), forward_alone=True),
    Bar("temporaries", 90, ("Broyden(20)",), shape=(4096, 32), forward_alone=True),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Seven minutes on two shared CPU cores; no GPU, no TPU.

    python -m experiments.benchmarks.kernels
    python -m experiments.benchmarks.kernels --parts rounds --solvers Picard "Anderson(5)"

    You should see which bars are met and which are not: the command ends well in both cases.
    """

    out: Path | None = None  # experiments/benchmarks/results/kernels, or runs/kernels where another option is given
    parts: tuple[Literal["rounds", "collectives", "tpu"], ...] = ("rounds", "collectives", "tpu")
    solvers: tuple[str, ...] = tuple(SOLVERS)
    shapes: tuple[tuple[int, int], ...] = ((64, 512), (4096, 1024))
    lanes: tuple[int, int] = (4096, 32)  # many small problems: of Broyden(20) alone
    sharded: tuple[int, int, int] = (8, 16, 64)  # batch over data, features over model

    def __post_init__(self):
        unknown = sorted(set(self.solvers) - set(SOLVERS))
        cli.require(not unknown, "solvers", f"of {', '.join(SOLVERS)}", ", ".join(unknown))


def main(config: Config = Config(), args: Sequence[str] = ()) -> dict[str, Any]:  # noqa: B008
    jax.config.update("jax_platforms", "cpu")  # the accelerators here, if there are any, stay untouched
    if absent := programs.missing("jax_cuda13_plugin"):
        raise SystemExit(f"error: {absent[0]} is not installed here; `make kernels` has an environment with it")
    command, identity = study.command_line("experiments.benchmarks.kernels", args), study.identity(config)
    results = {"command": command, "config": identity, **environment()}
    results["versions"] |= programs.versions("jax-cuda13-pjrt", "nvidia-cuda-nvcc", "libtpu")
    began = time.perf_counter()
    if "rounds" in config.parts:
        results["rounds"] = rounds(config)
    if "collectives" in config.parts:
        results["collectives"] = {"8 H100s": collectives(config, programs.h100_mesh((2, 4), ("data", "model")))}
    if "tpu" in config.parts:
        results |= merged(results, in_tpu_process(config))
    results["seconds"] = round(time.perf_counter() - began, 1)
    whole = identity == study.identity(Config())
    write(results, config.out or Path("experiments/benchmarks/results" if whole else "runs") / "kernels")
    return results


# ---- programs ----------------------------------------------------------------------------------------------


def cell(z, a, b):
    return a * z + b


def forward(solver: deq.Solver) -> Callable:
    """(z0, a, b) → (z*, stats)."""
    return lambda z0, a, b: deq.solve(cell, z0, a, b, solver=solver, batch_ndim=1)[:2]


def backward(solver: deq.Solver, adjoint: deq.Adjoint) -> Callable:
    """(z0, a, b, z̄) → (ā, b̄), the forward solve included."""

    def pullback(z0, a, b, z_bar):
        z = lambda a, b: deq.fixed_point(cell, z0, a, b, solver=solver, adjoint=adjoint, batch_ndim=1).value
        return jax.vjp(z, a, b)[1](z_bar)

    return pullback


def both_ways(name: str, x: jax.ShapeDtypeStruct) -> dict[str, Callable[[], Any]]:
    """What compiles the programs of a solver for a state and parameters like x. z0 is an argument of theirs.

    Where it is a constant, XLA folds what is computed of it: seconds for a state of 4096 × 1024.
    """
    solver = SOLVERS[name]
    return {
        "forward": lambda: programs.compile_for(forward(solver), x, x, x),
        "backward": lambda: programs.compile_for(backward(solver, deq.Implicit(solver)), x, x, x, x),
    }


def loop_of(module: programs.Module) -> programs.Loop:
    """The loop of the solver's rounds: in the only outermost loop of a forward program, or the last of a backward one.

    Where that loop compresses a memory now and then, the rounds are a loop inside it, the first one: f is called there.
    """
    loop = programs.loops(module)[-1]
    return next((inner for inner in loop.inner if calls_f(inner) and not calls_f(loop)), loop)


def calls_f(loop: programs.Loop) -> bool:
    """Whether a kernel of its body computes f, by the name of its scope (see `solvers.loop`)."""
    return any("/f/" in text for kernel in loop.body for text in programs.op_names(kernel))


# ---- rounds ------------------------------------------------------------------------------------------------


def rounds(config: Config) -> list[dict[str, Any]]:
    """A row for each solver, shape and way: what a round of its outermost loop runs on one H100."""
    mesh = programs.h100_mesh()
    cases = [(name, shape) for name in config.solvers for shape in config.shapes]
    cases += [("Broyden(20)", config.lanes)] * ("Broyden(20)" in config.solvers)
    rows = []
    for name, shape in cases:
        for way, compiled in both_ways(name, programs.abstract(mesh, shape)).items():
            began = time.perf_counter()
            program = compiled()
            seconds = round(time.perf_counter() - began, 2)
            figures = figures_of(program, 4 * shape[0] * shape[1])
            row = {"solver": name, "shape": list(shape), "way": way, **figures, "compile_s": seconds}
            rows.append(row | {"bars": bars(row)})
            print(f"  {name} {shape[0]}x{shape[1]} {way}: {figures['kernels']} kernels, {seconds} s", flush=True)
    return rows


def figures_of(program: Any, state: int) -> dict[str, Any]:
    """A round's figures for a state of so many bytes; `moved` and temporaries are counted in states."""
    module = programs.read(program.as_text())
    loop = loop_of(module)
    inner = [{"depth": i.depth, "kernels": len(i.body), "rounds": i.trips} for i in programs.nested(loop)]
    return {
        "kernels": len(loop.body),
        "test_kernels": len(loop.test),
        "inner": inner,
        "inner_loops": len(inner),
        "conditionals": programs.conditionals(loop),
        "copies": programs.copies(loop, state),
        "moved": round(programs.moved_bytes(loop) / state, 2),
        "temporaries": round(program.memory_analysis().temp_size_in_bytes / state, 2),
        "workspace": round(programs.workspace_bytes(module) / state, 2),
        "kinds": programs.kinds(loop),
    }


def bars(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{what: {"at_most": number, "met": whether}} of those that the row is held to."""
    held = [
        bar
        for bar in BARS
        if row["solver"] in bar.solvers
        and bar.shape in (None, tuple(row["shape"]))
        and not (bar.forward_alone and row["way"] == "backward")
    ]
    return {bar.what: {"at_most": bar.at_most, "met": row[bar.what] <= bar.at_most} for bar in held}


# ---- collectives -------------------------------------------------------------------------------------------


def collectives(config: Config, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """A row for each solver and way: [what, bytes] of each collective of a round on 2 × 4 devices."""
    x = programs.abstract(mesh, config.sharded, PartitionSpec("data", None, "model"))
    rows = []
    for name in config.solvers:
        for way, compiled in both_ways(name, x).items():
            found = programs.collectives(loop_of(programs.read(compiled().as_text())))
            rows.append({"solver": name, "way": way, "found": found})
            print(f"  {name} {way} on {mesh.size} devices: {told_collectives(found)}", flush=True)
    return rows


# ---- TPU ---------------------------------------------------------------------------------------------------


def in_tpu_process(config: Config) -> dict[str, Any]:
    """`tpu` in a process of its own, which libtpu may end, or why there is nothing of it."""
    if programs.missing("libtpu"):
        return {"tpu_missing": "libtpu is not installed here"}
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(tpu, config).result()
        except (concurrent.futures.BrokenExecutor, RuntimeError) as error:
            return {"tpu_missing": f"libtpu did not start: {first_line(error)}"}


def tpu(config: Config) -> dict[str, Any]:
    """Collectives on a TPU v5e 2×4, and what compiles for a chip of it."""
    os.environ.update(programs.TPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    mesh = programs.v5e_mesh((2, 4), ("data", "model"))
    return {"collectives": {"TPU v5e 2×4": collectives(config, mesh)}, "tpu": list(tpu_compiles(config))}


def tpu_compiles(config: Config) -> Iterator[dict[str, Any]]:
    """Whether each solver, and each adjoint after a solver, compiles for one chip."""
    x = programs.abstract(programs.v5e_mesh(), config.shapes[0])
    programs_of: dict[str, Callable[[], Any]] = {}
    for name in config.solvers:
        compiled = both_ways(name, x)
        programs_of |= {name: compiled["forward"], f"Implicit({name})": compiled["backward"]}
    for name, pair in ADJOINTS.items():
        programs_of[name] = lambda pair=pair: programs.compile_for(backward(*pair), x, x, x, x)
    for name, compiled in programs_of.items():
        began, failure = time.perf_counter(), None
        try:
            compiled()
        except Exception as error:  # whatever the compiler raises is what is asked for
            failure = first_line(error)
        yield {"program": name, "compile_s": round(time.perf_counter() - began, 2), "failure": failure}
        print(f"  {name} for a TPU: {failure or 'compiles'}", flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def merged(results: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What the TPU's process found, its collectives beside those of the H100s."""
    return found | {"collectives": results.get("collectives", {}) | found.get("collectives", {})}


# ---- the report --------------------------------------------------------------------------------------------


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and results.md, which is printed too."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(report(results)).strip() + "\n"
    write_atomically(out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(out / "results.md", text.encode())
    print(f"\n{text}\n{out}/: results.json, results.md")


def report(results: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = ["# What a solver launches, moves and sends", "", f"    {results['command']}", ""]
    lines += study.paragraph(f"Compiled without the devices, not run; float32; {versions}.")
    if "rounds" in results:
        lines += rounds_section(results["rounds"])
    if results.get("collectives") or "tpu_missing" in results:
        lines += collectives_section(results)
    if "tpu" in results or "tpu_missing" in results:
        lines += tpu_section(results)
    return lines


def rounds_section(rows: list[dict[str, Any]]) -> list[str]:
    judged = [bar["met"] for row in rows for bar in row["bars"].values()]
    lines = ["## A round of the outermost loop on one H100", ""]
    lines += study.paragraph(
        f"{sum(judged)} of {len(judged)} bars are met.",
        "f is one multiply-add. Backward is `Implicit` with the same solver: the backward loop, but the temporaries of",
        "both. Kernels are those of the body, both branches of each conditional included, and after the + those of the",
        "test; inner loops are depth, kernels of a round, rounds. Copies are those of a whole state or more. Moved is",
        "what all of them read and write at most, in states: a slice counts as a slice, an inner loop as often as it",
        "may run. Temporaries are in states too, with cuBLAS's workspace where it is named.",
    )
    head = ["solver", "state", "way", "kernels", "inner loops", "conditionals", "copies", "moved", "temporaries"]
    return lines + markdown_table([*head, "compile, s"], [round_cells(row) for row in rows])


def round_cells(row: dict[str, Any]) -> list[str]:
    inner = ", ".join(f"{i['depth']}: {i['kernels']} × {i['rounds'] or '?'}" for i in row["inner"])
    workspace = f" ({row['workspace']:.1f} of cuBLAS)" if row["workspace"] else ""
    return [
        row["solver"],
        " × ".join(map(str, row["shape"])),
        row["way"],
        f"{row['kernels']} + {row['test_kernels']}{verdict(row, 'kernels')}",
        f"{inner or 0}{verdict(row, 'inner_loops')}",
        f"{row['conditionals']}",
        f"{row['copies']}{verdict(row, 'copies')}",
        f"{row['moved']:.1f}{verdict(row, 'moved')}",
        f"{row['temporaries']:.1f}{workspace}{verdict(row, 'temporaries')}",
        f"{row['compile_s']:.1f}",
    ]


def verdict(row: dict[str, Any], what: str) -> str:
    bar = row["bars"].get(what)
    return "" if bar is None else f"; ≤ {bar['at_most']} {'met' if bar['met'] else '**not met**'}"


def collectives_section(results: dict[str, Any]) -> list[str]:
    shape = " × ".join(map(str, results["config"]["sharded"]))
    lines = ["## Collectives of a round", ""]
    lines += study.paragraph(
        f"A state of {shape} on a mesh of data 2 × model 4, Auto axes, batch over data and features over model. Each",
        "with the bytes of its result on one device; the test of the loop included, inner loops once. One of 1 or 4",
        "bytes is a predicate or a count.",
    )
    rows = results.get("collectives", {})
    for devices, found in rows.items():
        cells = [[row["solver"], row["way"], told_collectives(row["found"])] for row in found]
        lines += [f"### {devices}", "", *markdown_table(["solver", "way", "what, bytes"], cells)]
    return lines + (["### TPU v5e 2×4", "", f"{results['tpu_missing']}.", ""] if "tpu_missing" in results else [])


def told_collectives(found: list[Any]) -> str:
    """Each kind with its sizes, and how often each.

    >>> told_collectives([("all-reduce", 4), ("all-gather", 16384), ("all-gather", 16384)])
    'all-reduce 4; all-gather 2 × 16384'
    """
    sizes: dict[str, collections.Counter] = {}
    for what, size in found:
        sizes.setdefault(what, collections.Counter())[size] += 1
    told = lambda counts: ", ".join(f"{n} × {size}" if n > 1 else f"{size}" for size, n in counts.items())
    return "; ".join(f"{what} {told(counts)}" for what, counts in sizes.items()) or "none"


def tpu_section(results: dict[str, Any]) -> list[str]:
    lines = ["## What compiles for a TPU v5e", ""]
    if "tpu_missing" in results:
        return [*lines, f"{results['tpu_missing']}.", ""]
    rows = results["tpu"]
    cells = [[f"`{row['program']}`", row["failure"] or "yes", f"{row['compile_s']:.1f}"] for row in rows]
    count = sum(row["failure"] is None for row in rows)
    shape = " × ".join(map(str, results["config"]["shapes"][0]))
    lines += study.paragraph(f"{count} of {len(rows)}, for one chip, at {shape}; `Implicit` and the rest backward.")
    return lines + markdown_table(["program", "compiles", "compile, s"], cells)


if __name__ == "__main__":
    main(tyro.cli(Config), sys.argv[1:])
