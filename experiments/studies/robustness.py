"""Which solver finds the fixed point, at what cost, and does it tell the truth: random cells and classical systems.

Every claim is checked by a referee that shares nothing with the library: the residual at the returned z, in
float64. Reported evaluations are checked against a counter inside f.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import numpy as np
import tyro

import deq_jax as deq
from experiments.shared.cell_batch import CELL_BUDGET, CELL_SLACK, RTOL, Problems, draw
from experiments.shared.cells import CELLS, DIM, FAMILIES, HARD
from experiments.shared.systems import MGH_ATOL, MGH_BUDGET, MGH_FLOOR, MGH_SLACK, NO_ZERO, RUNS, classical, start
from experiments.studies.robustness_report import check_bars, draw_figure, markdown, progress
from experiments.training.environment import environment

QUICK = ("tanh 0.9", "tanh 3", "rotation .9", "expanding −5…−1", "ReLU 1.5")
QUICK_RUNS = tuple(run for run in RUNS if run[:2] in ((1, 2), (3, 2), (9, 10), (14, 10)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Success, evaluations, false claims and false refusals of every solver, defaults first.

        python -m experiments.studies.robustness                                 # 8 minutes on one core
        python -m experiments.studies.robustness --only Anderson --first-seed 0  # tuning, under a minute
        python -m experiments.studies.robustness --quick                         # a smoke test

    You should see no false claim and no false refusal, the composite above 99 % of the cells, and
    the bars at the end with what was measured.
    """

    seeds: int = 20  # problems of each family
    first_seed: int = 1000  # solvers are tuned on seeds from 0, and reported on these
    only: tuple[str, ...] = ()  # solvers, by their names in the table
    quick: bool = False  # few families and systems, 3 seeds
    cells: bool = True
    mgh: bool = True
    out: Path | None = (
        None  # by default experiments/studies/results/robustness, and runs/robustness with any option above
    )

    @property
    def directory(self) -> Path:
        whole = dataclasses.replace(self, out=None) == Config()
        return self.out or Path("experiments/studies/results/robustness" if whole else "runs/robustness")


def contestants() -> dict[str, Any]:
    """The defaults first, then what one would try next."""
    return {
        "Picard": deq.Picard(),
        "Anderson": deq.Anderson(),
        "Broyden": deq.Broyden(),
        "NewtonKrylov": deq.NewtonKrylov(),
        "Robust": deq.Robust(),
        "Picard-half": deq.Picard(damping=0.5),
        "Broyden-10": deq.Broyden(rank=10),
        "Broyden-40": deq.Broyden(rank=40),
        "Broyden-full": deq.Broyden(rank=CELL_BUDGET),
        "Broyden-plain": deq.Broyden(line_search=0),
        "Broyden-search": deq.Broyden(rank=CELL_BUDGET, line_search=4),
    }


class Verdicts(NamedTuple):
    """One entry a problem."""

    success: np.ndarray
    false_claim: np.ndarray
    false_refusal: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    residual: np.ndarray  # the referee's


def main(config: Config) -> dict[str, Any]:
    jax.config.update("jax_enable_x64", True)  # for the referee and the classical systems; the cells are float32
    table = contestants()
    if unknown := set(config.only) - set(table):
        raise SystemExit(f"no solver {', '.join(sorted(unknown))}; there are {', '.join(table)}")
    return study(config, {name: s for name, s in table.items() if name in config.only or not config.only})


def study(config: Config, table: dict[str, Any]) -> dict[str, Any]:
    """Run, print and write; `table` names the solvers. Needs x64."""
    where = environment()
    machine, versions = where["machine"], where["versions"]
    print(f"{machine['processor']}, {machine['cores']} cores; jax {versions['jax']}; {machine['devices'][0]}")
    names = QUICK if config.quick else tuple(FAMILIES)
    count = 3 if config.quick else config.seeds
    problems = draw(names, range(config.first_seed, config.first_seed + count)) if config.cells else None
    systems = QUICK_RUNS if config.quick else RUNS
    results = {}
    for name, solver in table.items():
        began = time.perf_counter()
        result: dict[str, Any] = {"solver": repr(solver)}
        if problems:
            verdicts = cell_verdicts(problems, dataclasses.replace(solver, rtol=RTOL, atol=0.0, max_steps=CELL_BUDGET))
            result["cells"] = {family: summary(v) for family, v in verdicts.items()}
            for part, members in (("all", FAMILIES), ("plain", CELLS), ("hard", HARD)):
                kept = [v for family, v in verdicts.items() if family in members]
                result[part] = summary(Verdicts(*map(np.concatenate, zip(*kept, strict=True)))) if kept else None
            result["counted"] = counted(problems, dataclasses.replace(solver, rtol=RTOL, max_steps=CELL_BUDGET))
        if config.mgh:
            posed = dataclasses.replace(solver, rtol=0.0, atol=MGH_ATOL, max_steps=MGH_BUDGET)
            result["systems"] = system_results(posed, systems)
            result["mgh"] = {
                key: sum(r[key] for r in result["systems"]) for key in ("success", "false_claim", "false_refusal")
            }
            result["mgh"]["of"] = sum((r["number"], r["n"]) != NO_ZERO for r in result["systems"])
        results[name] = result
        print(progress(name, result), f"({time.perf_counter() - began:.0f} s)", flush=True)

    bars = check_bars(results)
    record = {
        "command": command(config),
        **where,
        "seeds": [config.first_seed, config.first_seed + count - 1],
        "bars": [{"bar": text, "measured": value, "met": met} for text, value, met in bars],
        "solvers": results,
    }
    config.directory.mkdir(parents=True, exist_ok=True)
    (config.directory / "results.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    text = markdown(record)
    (config.directory / "results.md").write_text(text + "\n")
    if config.cells:
        draw_figure(record, config.directory / "figure.png")
    print("\n" + text.split("\n\n#")[0])
    print(f"\n{config.directory}/")
    return record


def cell_verdicts(problems: Problems, solver: Any) -> dict[str, Verdicts]:
    """Each problem from zero, in float32."""
    names = [name for group in problems.families for name in group]
    z0 = jnp.zeros((sum(len(jax.tree.leaves(p)[0]) for p in problems.params), DIM), jnp.float32)
    solve = jax.jit(lambda params: deq.solve(problems.f, z0, params, solver=solver, batch_ndim=1)[:2])
    z, stats = solve(problems.params)
    assert z.dtype == jnp.float32
    judged = judge(stats, relative_residual(problems, z), RTOL + CELL_SLACK, RTOL - CELL_SLACK)
    parts = zip(*(np.split(x, len(names)) for x in judged), strict=True)
    verdicts = {name: Verdicts(*part) for name, part in zip(names, parts, strict=True)}
    return {name: verdicts[name] for name in FAMILIES if name in verdicts}


def relative_residual(problems: Problems, z: Any) -> np.ndarray:
    """‖f(z) − z‖ / ‖f(z)‖ in float64, by numpy; inf where it is not finite."""
    z, params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (z, problems.params))
    fz, z = np.asarray(jax.jit(problems.f)(z, params)), np.asarray(z)
    assert fz.dtype == np.float64
    with np.errstate(all="ignore"):
        ratio = np.linalg.norm(fz - z, axis=-1) / np.linalg.norm(fz, axis=-1)
    return np.where(np.isfinite(ratio), ratio, np.inf)


def judge(stats: deq.Stats, residual: np.ndarray, claimed: Any, refused: Any, floor: Any = 0.0) -> Verdicts:
    """A claim is false above `claimed`; a refusal is, at or below `refused`.

    STALLED claims that rounding is all that is left: that is false above `claimed` and above `floor`.
    """
    status = np.asarray(stats.status)
    converged, stalled = status == deq.Status.CONVERGED, status == deq.Status.STALLED
    rounding = np.maximum(claimed, floor)
    return Verdicts(
        success=converged & (residual <= claimed),
        false_claim=converged & ~(residual <= claimed) | stalled & ~(residual <= rounding),
        false_refusal=~converged & (residual <= refused),
        steps=np.asarray(stats.steps),
        status=status,
        residual=residual,
    )


def counted(problems: Problems, solver: Any) -> dict[str, int]:
    """Reported against true calls of f, in batches of one: a problem of each family that has the commonest program."""
    families, cell, stacked = max(zip(*problems, strict=True), key=lambda group: len(group[0]))
    calls = 0

    def tick():
        nonlocal calls
        calls += 1

    def f(z, params):
        jax.debug.callback(tick)
        return cell(z[0], params)[None]

    z0 = jnp.zeros((1, DIM), jnp.float32)
    solve = jax.jit(lambda params: deq.solve(f, z0, params, solver=solver, batch_ndim=1).stats.steps)
    seeds = len(jax.tree.leaves(stacked)[0]) // len(families)
    differ = 0
    for i in range(len(families)):
        calls = 0
        steps = solve(jax.tree.map(lambda leaf: leaf[i * seeds], stacked))
        jax.effects_barrier()  # callbacks arrive late otherwise
        differ += int(steps[0]) != calls
    return {"checked": len(families), "differ": differ}


# ---- Moré, Garbow & Hillstrom ------------------------------------------------------------------------------


def system_results(solver: Any, runs: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """f(z) = z − F(z) from each start, in float64: one program a dimension, one batch a system."""
    results = []
    for n in sorted({n for _, n, _ in runs}):
        numbers = [number for number, size, _ in runs if size == n]
        branches = [lambda z, number=number: classical(number, z, jnp) for number in numbers]
        f = lambda z, index: z - jax.lax.switch(index, branches, z)
        solve = jax.jit(lambda z0, index: deq.solve(f, z0, index, solver=solver, batch_ndim=1)[:2])
        for index, number in enumerate(numbers):
            starts = next(count for other, size, count in runs if (other, size) == (number, n))
            z0 = np.stack([start(number, n, factor) for factor in (1.0, 10.0, 100.0)])
            z, stats = jax.tree.map(lambda x: np.asarray(x)[:starts], solve(z0, index))
            assert z.dtype == np.float64
            with np.errstate(all="ignore"):
                residual = np.linalg.norm(classical(number, z), axis=-1)
                slack = MGH_SLACK * np.linalg.norm(z, axis=-1)
                floor = MGH_FLOOR * np.linalg.norm([z, z0[:starts]], axis=(0, -1))
            residual = np.where(np.isfinite(residual), residual, np.inf)
            judged = judge(stats, residual, MGH_ATOL + slack, MGH_ATOL - slack, floor)
            results += [
                {
                    "number": number,
                    "n": n,
                    "start": (1, 10, 100)[i],
                    "success": bool(judged.success[i]),
                    "false_claim": bool(judged.false_claim[i]),
                    "false_refusal": bool(judged.false_refusal[i]),
                    "evaluations": int(judged.steps[i]),
                    "status": deq.Status(int(judged.status[i])).name,
                    "residual": rounded(judged.residual[i]),
                }
                for i in range(starts)
            ]
    return sorted(results, key=lambda r: (r["number"], r["n"], r["start"]))


# ---- what is written ---------------------------------------------------------------------------------------


def rounded(x: Any) -> float | None:
    """Three digits; None for what JSON cannot hold."""
    return float(f"{x:.3g}") if np.isfinite(x) else None


def summary(v: Verdicts) -> dict[str, Any]:
    solved = v.steps[v.success]
    status, counts = np.unique(v.status, return_counts=True)
    return {
        "success": int(v.success.sum()),
        "of": len(v.success),
        "evaluations_median": rounded(np.median(solved)) if solved.size else None,  # of those solved
        "evaluations_mean": rounded(v.steps.mean()),  # of all: a failure costs what it cost
        "false_claims": int(v.false_claim.sum()),
        "false_refusals": int(v.false_refusal.sum()),
        "largest_claimed_residual": rounded(v.residual[v.status == 0].max(initial=0)),
        "status": {deq.Status(int(s)).name: int(c) for s, c in zip(status, counts, strict=True)},
    }


def command(config: Config) -> str:
    words = ["python -m experiments.studies.robustness", f"--seeds {config.seeds}", f"--first-seed {config.first_seed}"]
    words += [f"--only {' '.join(config.only)}"] if config.only else []
    flags = {"--quick": config.quick, "--no-cells": not config.cells, "--no-mgh": not config.mgh}
    return " ".join(words + [flag for flag, given in flags.items() if given])


if __name__ == "__main__":
    main(tyro.cli(Config))
