"""Which solver finds the fixed point, at what cost, and does it tell the truth: random cells and classical systems.

Every claim is checked by a referee that shares nothing with the library: the residual at the returned z, in
float64. Reported evaluations are checked against a counter inside f.
"""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

import deq_jax as deq
from experiments.lm import environment
from experiments.plots import STYLE, markdown_table
from experiments.robustness_cells import CELLS, DIM, FAMILIES, HARD, NAMES, NO_ZERO, RUNS, classical, start

RTOL = 1e-4
CELL_BUDGET = 100
# A residual in float32 carries the rounding of f: a claim may miss rtol by this much, and whoever declines to
# claim must have missed it by no more.
CELL_SLACK = 8 * float(np.finfo(np.float32).eps)
MGH_ATOL = 1e-8  # ‖F(z)‖₂ of a solved system, whatever it was at the start; rtol is 0
MGH_BUDGET = 2000  # evaluations of F: 50 Jacobians by differences at n = 40
MGH_SLACK = 4 * float(np.finfo(np.float64).eps)  # times ‖z‖: f(z) − z = −F(z) loses what z rounds away
MGH_FLOOR = 64 * float(np.finfo(np.float64).eps)  # times ‖(z, z0)‖: below it F may be rounding
QUICK = ("tanh 0.9", "tanh 3", "rotation .9", "expanding −5…−1", "ReLU 1.5")
QUICK_RUNS = tuple(run for run in RUNS if run[:2] in ((1, 2), (3, 2), (9, 10), (14, 10)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Success, evaluations, false claims and false refusals of every solver, defaults first.

        python -m experiments.robustness_study                                 # 8 minutes on one core
        python -m experiments.robustness_study --only Anderson --first-seed 0  # tuning, under a minute
        python -m experiments.robustness_study --quick                         # a smoke test

    You should see no false claim and no false refusal, the composite above 99 % of the cells, and
    the bars at the end with what was measured.
    """

    seeds: int = 20  # problems of each family
    first_seed: int = 1000  # solvers are tuned on seeds from 0, and reported on these
    only: tuple[str, ...] = ()  # solvers, by their names in the table
    quick: bool = False  # few families and systems, 3 seeds
    cells: bool = True
    mgh: bool = True
    out: Path | None = None  # by default experiments/results/robustness, and runs/robustness with any option above

    @property
    def directory(self) -> Path:
        whole = dataclasses.replace(self, out=None) == Config()
        return self.out or Path("experiments/results/robustness" if whole else "runs/robustness")


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


# ---- random cells ------------------------------------------------------------------------------------------


class Problems(NamedTuple):
    """All cells as one batch, so that a solver is compiled once; those that differ in numbers alone share a program."""

    families: list[list[str]]  # by program
    cells: list[Callable]
    params: list[Any]  # leaves [families · seeds, ...]

    def f(self, z, params):
        parts = jnp.split(z, np.cumsum([len(jax.tree.leaves(p)[0]) for p in params])[:-1])
        return jnp.concatenate([jax.vmap(c)(part, p) for c, part, p in zip(self.cells, parts, params, strict=True)])


def draw(names: tuple[str, ...], seeds: range) -> Problems:
    programs: dict[str, list[tuple[str, Any]]] = {}
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    for name in names:
        family = FAMILIES[name]
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode()))
        params = jax.vmap(family.make)(own)  # not compiled as one: the families share most of their operations
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)), name
        one = jax.tree.map(lambda leaf: leaf[0], params)
        program = str(jax.make_jaxpr(family.cell)(jnp.zeros(DIM, jnp.float32), one))
        programs.setdefault(program, []).append((name, params))
    families = [[name for name, _ in group] for group in programs.values()]
    stack = lambda *leaves: jnp.concatenate(leaves)
    params = [jax.tree.map(stack, *[p for _, p in group]) for group in programs.values()]
    return Problems(families, [FAMILIES[group[0]].cell for group in families], params)


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


def percent(part: dict[str, Any] | None) -> float:
    return 100 * part["success"] / part["of"] if part else float("nan")


def progress(name: str, result: dict[str, Any]) -> str:
    line = f"{name:15}"
    if "cells" in result:
        everything = result["all"]
        lost = {family: v["of"] - v["success"] for family, v in result["cells"].items()}
        worst = sorted((family for family in lost if lost[family]), key=lambda family: -lost[family])
        line += (
            f" cells {percent(result['plain']):5.1f} %, hard {percent(result['hard']):5.1f} %, evaluations median "
            f"{everything['evaluations_median']} mean {everything['evaluations_mean']}, false claims "
            f"{everything['false_claims']}, refusals {everything['false_refusals']}, miscounted "
            f"{result['counted']['differ']} of {result['counted']['checked']}"
        )
        line += "\n    lost: " + ", ".join(f"{family} {lost[family]}" for family in worst) if worst else ""
    if "mgh" in result:
        m = result["mgh"]
        line += f"\n    MGH {m['success']} of {m['of']}, false claims {m['false_claim']}, "
        line += f"refusals {m['false_refusal']}"
    return line


def check_bars(results: dict[str, Any]) -> list[tuple[str, str, bool]]:
    bars = []
    # The bars stand on cells as hard as those on which others were measured; the hard ones are shown beside.
    for name, least in (("Broyden-full", 99), ("Broyden-10", 95), ("Anderson", 93), ("Robust", 99)):
        if results.get(name, {}).get("plain"):
            value = percent(results[name]["plain"])
            bars.append((f"{name}: at least {least} % of the cells", f"{value:.1f} %", value >= least))
    secant = {name: r["mgh"] for name, r in results.items() if "mgh" in r and name not in ("Robust", "NewtonKrylov")}
    if secant:
        best = max(secant, key=lambda name: secant[name]["success"])
        text = f"best single solver without Newton–Krylov ({best}): at least 30 of the 54 systems"
        bars.append((text, f"{secant[best]['success']} of {secant[best]['of']}", secant[best]["success"] >= 30))
    if "mgh" in results.get("Robust", {}):
        m = results["Robust"]["mgh"]
        bars.append(("Robust: at least 49 of the 54 systems", f"{m['success']} of {m['of']}", m["success"] >= 49))
    for text, key in (("false CONVERGED", "false_claim"), ("false refusals", "false_refusal")):
        total = sum(r["mgh"][key] for r in results.values() if "mgh" in r)
        total += sum(r["all"][f"{key}s"] for r in results.values() if "all" in r)
        bars.append((f"no {text}, all solvers", str(total), total == 0))
    checks = [r["counted"] for r in results.values() if "counted" in r]
    if checks:
        differ, checked = (sum(c[key] for c in checks) for key in ("differ", "checked"))
        bars.append(("reported evaluations are the true calls", f"{differ} of {checked} differ", differ == 0))
    return bars


def command(config: Config) -> str:
    words = ["python -m experiments.robustness_study", f"--seeds {config.seeds}", f"--first-seed {config.first_seed}"]
    words += [f"--only {' '.join(config.only)}"] if config.only else []
    flags = {"--quick": config.quick, "--no-cells": not config.cells, "--no-mgh": not config.mgh}
    return " ".join(words + [flag for flag, given in flags.items() if given])


def markdown(record: dict[str, Any]) -> str:
    results = record["solvers"]
    some = next(iter(results.values()))
    header = ["solver"]
    if "cells" in some:
        header += ["cells %", "hard %", "median eval.", "mean eval.", "false claims", "false refusals", "miscounted"]
    if "mgh" in some:
        header += ["MGH", "MGH false claims", "MGH false refusals"]
    rows = []
    for name, r in results.items():
        row = [f"`{name}`"]
        if "cells" in r:
            a = r["all"]
            row += [f"{percent(r['plain']):.1f}", f"{percent(r['hard']):.1f}"]
            row += [a["evaluations_median"], a["evaluations_mean"], a["false_claims"], a["false_refusals"]]
            row += [r["counted"]["differ"]]
        if "mgh" in r:
            m = r["mgh"]
            row += [f"{m['success']} of {m['of']}", m["false_claim"], m["false_refusal"]]
        rows.append(row)
    first, last = record["seeds"]
    parts = [
        f"`{record['command']}`, {record['machine']['processor']}, jax {record['versions']['jax']}",
        f"Cells: seeds {first} to {last} of each family, float32, rtol {RTOL:g}, at most {CELL_BUDGET} evaluations. "
        "Median evaluations over the problems solved, mean over all. A claim is false where the relative residual in "
        f"float64 is above {RTOL:g} + {CELL_SLACK:.1e}, a refusal where it is at most {RTOL:g} − {CELL_SLACK:.1e}. "
        "STALLED is a claim too, of a residual at the dtype's floor. "
        f"MGH: f(z) = z − F(z) in float64, ‖F(z)‖₂ ≤ {MGH_ATOL:g} within {MGH_BUDGET} evaluations of F.",
        table(header, rows),
        table(
            list(record["bars"][0]), [[b["bar"], b["measured"], "yes" if b["met"] else "NO"] for b in record["bars"]]
        ),
    ]
    if "cells" in some:
        rows = [[family, *(f"{percent(r['cells'][family]):.0f}" for r in results.values())] for family in some["cells"]]
        parts += ["## Success by family, %", table(["family", *results], rows)]
    if "mgh" in some:
        titles = [f"{NAMES[s['number']]}, n = {s['n']}, start × {s['start']}" for s in some["systems"]]
        rows = [[title, *(outcome(r["systems"][i]) for r in results.values())] for i, title in enumerate(titles)]
        parts += ["## Evaluations by system, – where not solved", table(["system", *results], rows)]
    return "\n\n".join(parts)


def table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(markdown_table(head, rows)).strip()


def outcome(system: dict[str, Any]) -> str:
    return str(system["evaluations"]) if system["success"] else "–"


def draw_figure(record: dict[str, Any], path: Path) -> None:
    """Families against solvers, the overall success on top."""
    results = record["solvers"]
    families = list(next(iter(results.values()))["cells"])
    table = np.array([[percent(r["cells"][family]) for r in results.values()] for family in families])
    whole = {name: percent(r["plain"]) for name, r in results.items()}
    best = max(whole, key=lambda name: whole[name])
    with plt.rc_context(STYLE):
        size = (2.6 + 0.95 * len(results), 1.6 + 0.24 * len(families))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        image = axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for i, j in np.ndindex(table.shape):
            colour = "black" if table[i, j] > 55 else "white"
            axes.text(j, i, f"{table[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(results)), [f"{n}\n{whole[n]:.1f} %" for n in results], fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_yticks(range(len(families)), families, fontsize=8)
        for i, family in enumerate(families):
            if family in HARD:
                axes.axhline(i - 0.5, color="white", lw=3)
                break
        axes.set_title(f"{best} finds {whole[best]:.1f} % of the fixed points above the line")
        figure.colorbar(image, label="problems solved (%)", shrink=0.6)
        figure.savefig(path, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
