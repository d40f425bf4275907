"""What a change of the library changes: the bits, the compiled programs and the times of two checkouts, side by side.

    python -m experiments.benchmarks.compare_versions ../other

Each version has a worker process of its own, with the same Python, that imports its own `deq_jax`; the problems come
from this checkout for both. The two never run at once. Bits are compared problem by problem; times are taken in turn,
call by call, on the processor's clock, so that what else runs on the machine enters them little.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import deq_jax as deq
from deq_jax.models import DEQTransformer, DEQTrellisNet, TransformerConfig, TrellisNetConfig
from experiments.shared import cell_batch, jax_ops, problems
from experiments.shared.cells import DIM, FAMILIES
from experiments.shared.plots import markdown_table
from experiments.training import lm
from experiments.training.environment import environment

ROOT = Path(__file__).parents[2]
RTOL, BUDGET = cell_batch.RTOL, cell_batch.CELL_BUDGET
NUMBERS = ("z", "steps", "status", "residual", "relative_residual")


@dataclasses.dataclass(frozen=True)
class Config:
    """Bits, steps and statuses; temporaries and loops; times and compile times: of OTHER (old) and of this (new).

        python -m experiments.benchmarks.compare_versions ../other              # twenty minutes on one core
        python -m experiments.benchmarks.compare_versions ../other --parts bits # five
        python -m experiments.benchmarks.compare_versions ../other --parts programs times --problems P1 P4

    Where no algorithm was changed you should see equal bits everywhere, no more bytes, and ratios within 3 %.
    """

    other: Annotated[Path, tyro.conf.Positional]  # the root of another checkout
    parts: tuple[str, ...] = ("bits", "gradients", "models", "programs", "times")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of each family of cells
    families: tuple[str, ...] = tuple(FAMILIES)
    rtol: float = RTOL  # of the cells; with 0 they run to the floor of the dtype
    dtype: str = "float32"  # of the cells, which are drawn in float32; float64 needs JAX_ENABLE_X64=1
    solvers: tuple[str, ...] = ()  # names in `solvers()`; all of them where none is given
    problems: tuple[str, ...] = ("P1", "P2", "P3", "P4", "P5", "P6")
    pairs: tuple[str, ...] = ("Anderson", "Picard")  # forward and backward solvers of programs and times
    repeats: int = 15  # timed calls of each program
    compiles: int = 1  # of each program: with more, the median is told
    tiny: bool = False  # problems that a test can afford; the times mean nothing
    out: Path | None = None  # write a JSON file


def solvers() -> dict[str, Any]:
    return {
        "Picard": deq.Picard(),
        "Anderson": deq.Anderson(),
        "Anderson-4": deq.Anderson(history=4),
        "Anderson-16": deq.Anderson(history=16),
        "Broyden": deq.Broyden(),
        "Broyden-10": deq.Broyden(rank=10),
        "NewtonKrylov": deq.NewtonKrylov(),
        "Robust": deq.Robust(),
    }


def pair(name: str) -> dict[str, Any]:
    picard = deq.Picard()
    return {"Anderson": {}, "Picard": {"solver": picard, "adjoint": deq.Implicit(picard)}}[name]


def main(config: Config) -> dict[str, Any]:
    results: dict[str, Any] = environment() | {"dtype": config.dtype, "rtol": config.rtol, "seeds": config.seeds}
    asked = {"bits": bits, "gradients": gradients, "models": models, "programs": programs, "times": times}
    with worker(config.other.resolve()) as old, worker(ROOT) as new:
        for part in config.parts:
            results[part] = asked[part](config, old, new)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


# ---- the two processes -------------------------------------------------------------------------------------

# The library of one checkout, and after that all the rest from this one.
SCRIPT = """
import sys
checkout, here = sys.argv[1:]
sys.path.insert(0, checkout)
import deq_jax
assert deq_jax.__file__.startswith(checkout + "/"), deq_jax.__file__
sys.path.insert(0, here)
from experiments.benchmarks.compare_versions import serve
serve()
"""


@contextlib.contextmanager
def worker(checkout: Path) -> Iterator[Callable[..., Any]]:
    """ask(command, **options) -> answer, of a process that imports the library of a checkout."""
    environ = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environ.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT, str(checkout), str(ROOT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip
    to, back = process.stdin, process.stdout
    assert to and back

    def ask(command: str, **options: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            to.write(json.dumps([command, options]) + "\n")
            to.flush()
        if not (line := back.readline()):
            raise RuntimeError(f"the process of {checkout} ended with code {process.wait()} at {command}")
        return json.loads(line)

    with process:  # closes the pipe at the end, which ends the process
        yield ask


def serve() -> None:
    """Answers commands, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")  # what a library prints must not reach the pipe
    os.dup2(2, 1)
    commands: dict[str, Callable] = {"solve": solve_cells, "differentiate": differentiate_cells, "infer": infer}
    commands |= program_commands()
    for line in sys.stdin:
        command, options = json.loads(line)
        print(json.dumps(commands[command](**options)), file=answers, flush=True)


# ---- bits --------------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def drawn(families: tuple[str, ...], seeds: Any) -> cell_batch.Problems:
    return cell_batch.draw(families, seeds)


def names_of(cells: cell_batch.Problems) -> list[str]:
    return [name for group in cells.families for name in group]


def solve_cells(solver: str, rtol: float, dtype: str, families: list[str], seeds: list[int], path: str) -> list[str]:
    """Leaves `NUMBERS` in a file, an entry per problem; returns the families in their order."""
    cells = drawn(tuple(families), tuple(seeds))
    posed = dataclasses.replace(solvers()[solver], rtol=rtol, atol=0.0, max_steps=BUDGET)
    z0 = jnp.zeros((len(names_of(cells)) * len(seeds), DIM), dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cells.params)
    solve = jax.jit(lambda params: deq.solve(cells.f, z0, params, solver=posed, batch_ndim=1)[:2])
    z, stats = solve(params)
    np.savez(path, z=z.astype(stats.residual.dtype), **{name: getattr(stats, name) for name in NUMBERS[1:]})
    return names_of(cells)


def differentiate_cells(families: list[str], seeds: list[int], path: str) -> list[str]:
    """The gradient of ⟨direction, z⟩ in the parameters by all defaults, as a row of numbers for each problem."""
    cells = drawn(tuple(families), tuple(seeds))
    size = len(names_of(cells)) * len(seeds)
    z0, direction = jnp.zeros((size, DIM), jnp.float32), jax.random.normal(jax.random.key(1), (size, DIM), jnp.float32)
    loss = lambda params: jnp.vdot(direction, deq.fixed_point(cells.f, z0, params, batch_ndim=1).value)
    grads = jax.jit(jax.grad(loss))(cells.params)
    rows = [np.concatenate([np.asarray(g).reshape(len(g), -1) for g in jax.tree.leaves(tree)], 1) for tree in grads]
    np.savez(path, *[row for group in rows for row in group])
    return names_of(cells)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def bits(config: Config, old: Callable, new: Callable) -> dict[str, Any]:
    """By solver: how many problems have the same bits, steps and statuses, and which do not."""
    results = {}
    for solver in config.solvers or solvers():
        options = {"solver": solver, "rtol": config.rtol, "dtype": config.dtype}
        options |= {"families": config.families, "seeds": config.seeds}
        names, before, after = both("solve", options, old, new)
        results[solver] = compare_solves(names, config.seeds, before, after)
    keys = list(next(iter(results.values())))[:-1]
    rows = [[f"`{name}`", *(r[key] for key in keys)] for name, r in results.items()]
    show("Cells: problems, by what is equal in the two versions", ["solver", *keys], rows)
    for name, result in results.items():
        for family, changes in result["changes"].items():
            print(f"  {name}, {family}: " + ", ".join(f"{change} ({n})" for change, n in changes.items()))
    return results


def both(command: str, options: dict, old: Callable, new: Callable) -> tuple[list[str], dict, dict]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for ask in (old, new):
            path = str(Path(folder) / "found.npz")
            names = ask(command, **options, path=path)
            with np.load(path) as file:
                found.append(dict(file))
    return names, *found


def compare_solves(names: list[str], seeds: tuple[int, ...], old: dict, new: dict) -> dict[str, Any]:
    count, changes, rounding = Counter(), {}, 0.0
    told = lambda of, i: f"{deq.Status(int(of['status'][i])).name} {int(of['steps'][i])}"
    for i, family in enumerate(np.repeat(names, len(seeds))):
        equal = {name: same(old[name][i], new[name][i]) for name in NUMBERS}
        count.update(
            {
                "problems": 1,
                "all bits": all(equal.values()),
                "z": equal["z"],
                "residual": equal["residual"] and equal["relative_residual"],
                "steps": equal["steps"],
                "status": equal["status"],
            }
        )
        if not (equal["steps"] and equal["status"]):
            changes.setdefault(str(family), Counter())[f"{told(old, i)} → {told(new, i)}"] += 1
        elif old["status"][i] == deq.Status.CONVERGED:
            rounding = max(rounding, distance(old["z"][i], new["z"][i]))
    changes = {family: dict(sorted(c.items())) for family, c in changes.items()}
    return dict(count) | {"largest change of z, of those with equal steps": rounding, "changes": changes}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖a‖."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(f"{np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300):.2g}")


def gradients(config: Config, old: Callable, new: Callable) -> dict[str, Any]:
    names, before, after = both("differentiate", {"families": config.families, "seeds": config.seeds}, old, new)
    pairs = list(zip(np.repeat(names, len(config.seeds)), before.values(), after.values(), strict=True))
    result: dict[str, Any] = {"problems": len(pairs), "all bits": sum(same(a, b) for _, a, b in pairs), "changes": {}}
    for family, a, b in pairs:
        if not same(a, b):
            result["changes"][str(family)] = max(result["changes"].get(str(family), 0.0), distance(a, b))
    show("Gradients by all defaults", ["problems", "all bits"], [[result["problems"], result["all bits"]]])
    for family, change in result["changes"].items():
        print(f"  {family}: {change:g}")
    return result


# ---- language models ---------------------------------------------------------------------------------------


def infer(model: str, solver: str, rtol: float) -> float:
    """Evaluations a sequence of an untrained language model; TrellisNet's state has two leaves, h and c."""
    options: Any = dict(solver={"Anderson": deq.Anderson, "Broyden": deq.Broyden}[solver](rtol=rtol), rngs=nnx.Rngs(0))
    if model == "trellisnet":
        network = DEQTrellisNet(TrellisNetConfig(50, 64, 32, init_std=None, embedding_range=1.0), **options)
    else:
        network = DEQTransformer(TransformerConfig(50, dim=32, heads=2, inner_dim=64, window=64), **options)
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, 50)
    return float(jnp.mean(nnx.jit(lambda network: network(tokens).solution.stats.steps)(network)))


def models(config: Config, old: Callable, new: Callable) -> list[dict[str, Any]]:
    """Evaluations of the language models, whose states have one leaf or two."""
    results = [
        {"model": model, "solver": solver, "rtol": rtol}
        for model in ("trellisnet", "transformer")
        for solver, rtol in (("Anderson", 1e-2), ("Anderson", 1e-3), ("Broyden", 1e-3))
    ]
    results = [case | {"evaluations": [ask("infer", **case) for ask in (old, new)]} for case in results]
    rows = [[r["model"], r["solver"], r["rtol"], *r["evaluations"]] for r in results]
    show("Evaluations a sequence of untrained language models", ["model", "solver", "rtol", "old", "new"], rows)
    return results


# ---- compiled programs -------------------------------------------------------------------------------------


def program_commands() -> dict[str, Callable]:
    """`build` a program, and `call` one that was built."""
    built: dict[str, Callable] = {}

    def build(problem: str, pair_of: str, what: str, tiny: bool) -> dict[str, Any]:
        table = problems.TINY if tiny else problems.PROBLEMS
        f, params = function(table[problem](), pair(pair_of), what)
        jax.clear_caches()
        began = time.process_time()
        lowered: Any = jax.jit(f).lower(params)
        traced = time.process_time()
        program = lowered.compile()
        compiled = time.process_time()
        jax.block_until_ready(program(params))
        built[f"{problem} {pair_of} {what}"] = lambda: jax.block_until_ready(program(params))
        return {
            "trace_s": traced - began,
            "compile_s": compiled - traced,
            "bytes": lm.temp_bytes(program),
            "loops": program.as_text().count(" while("),
        }

    def call(problem: str, pair_of: str, what: str) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        built[f"{problem} {pair_of} {what}"]()
        return {"cpu_ms": 1e3 * (time.process_time() - cpu), "wall_ms": 1e3 * (time.perf_counter() - wall)}

    return {"build": build, "call": call}


def function(problem: problems.Problem, options: dict[str, Any], what: str) -> tuple[Callable, Any]:
    """(params → z, or params → loss and gradients), and the parameters."""
    params, data = jax.tree.map(jnp.asarray, (problem.params, problem.data))
    cell = lambda z, params, x: problem.cell(jax_ops, z, params, x)
    z0 = jnp.zeros(problem.z_shape, jnp.float32)

    def forward(params):
        x = problem.inject(jax_ops, params, data)
        return deq.fixed_point(cell, z0, params, x, batch_ndim=1, **options).value

    step = jax.value_and_grad(lambda params: problem.readout(jax_ops, forward(params), params, data))
    return {"forward": forward, "step": step}[what], params


def cases(config: Config) -> list[dict[str, str]]:
    return [
        {"problem": problem, "pair_of": name, "what": what}
        for problem in config.problems for name in config.pairs for what in ("forward", "step")
    ]  # fmt: skip


def programs(config: Config, old: Callable, new: Callable) -> list[dict[str, Any]]:
    """Temporaries, while loops, and the processor's seconds to trace and to compile."""
    results = []
    for case in cases(config):
        rounds = [[ask("build", **case, tiny=config.tiny) for ask in (old, new)] for _ in range(config.compiles)]
        middle = lambda side, key: round(statistics.median(r[side][key] for r in rounds), 3)
        keys = ("bytes", "loops", "trace_s", "compile_s")
        results.append(case | {key: [middle(0, key), middle(1, key)] for key in keys})
    arrow = lambda pair, form: f"{pair[0]:{form}} → {pair[1]:{form}}"
    rows = [
        [
            *(r[key] for key in case),
            arrow([b / 1e6 for b in r["bytes"]], ".3f"),
            f"{r['bytes'][1] / max(r['bytes'][0], 1):.3f}",
            arrow(r["loops"], "g"),
            arrow(r["trace_s"], ".2f"),
            arrow(r["compile_s"], ".2f"),
        ]
        for r in results
    ]
    head = ["problem", "pair", "program", "temporaries, MB", "ratio", "loops", "trace, s", "compile, s"]
    show("Compiled programs, old → new", head, rows)
    return results


def times(config: Config, old: Callable, new: Callable) -> list[dict[str, Any]]:
    """Milliseconds of a call of each program, the two in turn; the order is reversed from round to round."""
    results = []
    for case in cases(config):
        for ask in (old, new):
            if "programs" not in config.parts:
                ask("build", **case, tiny=config.tiny)
        taken = {old: [], new: []}
        for i in range(config.repeats):
            for ask in (old, new) if i % 2 else (new, old):
                taken[ask].append(ask("call", **case))
        middle = {key: [statistics.median(t[key] for t in taken[ask]) for ask in (old, new)] for key in taken[old][0]}
        least = [min(t["cpu_ms"] for t in taken[ask]) for ask in (old, new)]
        results.append(case | middle | {"least_cpu_ms": least})
    over = lambda pair: f"{pair[1] / pair[0]:.3f}"
    rows = [
        [
            *(r[key] for key in case),
            *(f"{t:.2f}" for t in r["cpu_ms"]),
            *(over(r[key]) for key in ("cpu_ms", "least_cpu_ms", "wall_ms")),
        ]
        for r in results
    ]
    head = ["problem", "pair", "program", "old", "new", "new / old", "of the least", "of wall times"]
    show(f"Processor's milliseconds, medians of {config.repeats} calls in turn", head, rows)
    return results


def show(title: str, head: list[str], rows: list[list[Any]]) -> None:
    print(f"\n{title}\n\n" + "\n".join(markdown_table(head, rows)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
