"""Which solver and tolerance the backward equation should have by default: trained with each, against cheap gradients.

python -m experiments.studies.backward
python -m experiments.studies.backward --quick --out runs/backward
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, PyTree

import deq_jax as deq
from deq_jax.solvers import NewtonKrylov
from deq_jax.stability import spectral_radius
from experiments.shared import plots
from experiments.shared.numerics import GMRES
from experiments.studies.backward_tasks import Task, build, load
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

INEXACT = {"JFB": deq.JFB(), "Phantom(5, 0.8)": deq.Phantom(5, 0.8), "Neumann(5)": deq.Neumann(5)}
RADII = {"contractive": 0.9, "not contractive": 1.2}  # of the Jacobian at z* before training
LAST = 50  # steps whose mean loss is the final one


@dataclasses.dataclass(frozen=True)
class Config:
    """About fifteen minutes on one free CPU core.

    python -m experiments.studies.backward

    Digits come from $DEQ_JAX_DATA/digits; without it, noisy images of ten random patterns stand in for them.
    """

    out: Path = Path("experiments/studies/results/backward")
    quick: bool = False  # seconds: the tanh cell alone, a few steps
    steps: int = 200
    seeds: int = 10
    seed: int = 1  # of starts and batches; the default backward solver was chosen on 0
    rtol: float = 1e-3  # of the forward solve
    max_steps: int = 100
    lrs: tuple[float, ...] = (3e-3, 1e-2)  # each mode counts at its better one: exact gradients bear a larger one
    cells: tuple[str, ...] = ("tanh", "convolution", "transformer")


QUICK = dict(quick=True, steps=60, seeds=2, lrs=(1e-2,), cells=("tanh",))


def modes(config: Config) -> dict[str, Any]:
    """Backward solvers by their tolerance over the forward one, and what has no backward solve."""
    common: Any = dict(max_steps=2 * config.max_steps)

    def anderson(history, ratio, growth=10.0):
        return deq.Implicit(deq.Anderson(rtol=ratio * config.rtol, history=history, growth=growth, **common))

    def gmres(size, ratio):
        rtol = ratio * config.rtol
        return deq.Implicit(NewtonKrylov(rtol=rtol, krylov=size, forcing=rtol / 2, **GMRES, **common))

    exact = {f"Anderson(16) × {ratio:g}": anderson(16, ratio) for ratio in (1.0, 0.1, 0.01)}
    if not config.quick:
        exact |= {"Anderson(16), growth 1.5, × 0.1": anderson(16, 0.1, 1.5)}
        exact |= {f"GMRES(32) × {ratio:g}": gmres(32, ratio) for ratio in (0.1, 0.01)}
    return exact | INEXACT if not config.quick else exact | {"JFB": INEXACT["JFB"]}


# ---- training ----------------------------------------------------------------------------------------------


def loss_fn(task: Task, params: PyTree, probe: deq.Probe, x: Array, y: Array, solver: Any, adjoint: Any) -> Any:
    context = task.context(params, x)
    z, stats = deq.fixed_point(
        task.cell, task.zeros(x), context, solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(task.logits(params, z), y)
    return losses.mean(), stats


@functools.partial(jax.jit, static_argnums=0)
def train(
    task: Task, lr: float | Array, params: PyTree, batches: tuple[Array, Array], solver: Any, adjoint: Any
) -> Any:
    """(params, a dict of [seeds, steps]) after all the batches, one seed after the other."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))

    def step(carry, batch):
        params, opt_state = carry
        probe = deq.Probe.zeros(batch[0].shape[:1])
        value_and_grad = jax.value_and_grad(functools.partial(loss_fn, task), argnums=(0, 1), has_aux=True)
        (loss, stats), (grads, backward) = value_and_grad(params, probe, *batch, solver, adjoint)
        updates, opt_state = tx.update(grads, opt_state, params)
        line = {
            "loss": loss,
            "evaluations": stats.steps.mean(),
            "products": backward.steps.mean(),
            "forward": stats.converged.sum(),
            "both": (stats.converged & (backward.status == deq.Status.CONVERGED)).sum(),
            "residual": backward.residual.max(),
        }
        return (optax.apply_updates(params, updates), opt_state), line

    def one_seed(start):
        params, batches = start
        (params, _), lines = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params, lines

    return jax.lax.map(one_seed, (params, batches))


@functools.partial(jax.jit, static_argnums=0)
def radius(task: Task, params: PyTree, x: Array) -> Float[Array, ""]:
    """The spectral radius at z*, the mean over a batch; inf where there is no z*."""
    context = task.context(params, x)
    solved = deq.solve(task.cell, task.zeros(x), context, solver=deq.Anderson(max_steps=200), batch_ndim=1)
    found = spectral_radius(task.cell, solved.value, context, batch_ndim=1, iterations=60).mean()
    return jnp.where(solved.stats.converged.mean() > 0.9, found, jnp.inf)


def start(task: Task, key: Array, x: Array, target: float) -> PyTree:
    """Parameters whose spectral radius at z* is as near to `target` as a scale of the cell brings it."""
    params = task.init(key)
    scales = np.geomspace(0.5, 32, 37)
    found = [abs(float(radius(task, task.scaled(params, scale), x)) - target) for scale in scales]
    return task.scaled(params, float(scales[np.argmin(found)]))


def compare(config: Config) -> Iterator[dict[str, Any]]:
    solver = deq.Anderson(rtol=config.rtol, max_steps=config.max_steps)
    for cell in config.cells:
        task, (x, y) = build(cell), load(cell)
        size = {"tanh": 16, "convolution": 8, "transformer": 4}[cell]
        order = np.random.default_rng(config.seed).integers(len(x), size=(config.seeds, config.steps, size))
        batches = jnp.asarray(x[order]), jnp.asarray(y[order])
        programs: dict[Any, Any] = {}  # by the structure of the adjoint: a tolerance does not compile anew
        for kind, target in RADII.items():
            keys = jax.random.split(jax.random.key(config.seed + 1), config.seeds)
            starts = [start(task, key, batches[0][i, 0], target) for i, key in enumerate(keys)]
            params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
            before = mean_radius(task, params, batches[0][:, 0])
            for mode, adjoint in modes(config).items():
                structure = jax.tree.structure(adjoint)
                if structure not in programs:
                    programs[structure] = train.lower(task, 0.0, params, batches, solver, adjoint).compile()
                tries = []
                for lr in config.lrs:
                    began = time.process_time()
                    trained, lines = jax.block_until_ready(programs[structure](lr, params, batches, solver, adjoint))
                    tries.append({"lr": lr} | summary({k: np.asarray(v) for k, v in lines.items()}, mode))
                    tries[-1]["cpu_seconds"] = time.process_time() - began
                    tries[-1]["radius_after"] = mean_radius(task, trained, batches[0][:, 0])
                row = {"cell": cell, "kind": kind, "mode": mode, "radius_before": before}
                row |= min(tries, key=lambda one: one["loss"]) | {"tries": tries}
                print(f"  {cell}, {kind}, {mode}: loss {row['loss']:.4f} at {row['lr']:g}", flush=True)
                yield row


def mean_radius(task: Task, params: PyTree, x: Array) -> float:
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], params)
    return float(np.mean([radius(task, pick(i), x[i]) for i in range(len(x))]))


def summary(lines: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
    final = lines["loss"][:, -LAST:].mean(-1)
    return {
        "loss": float(final.mean()),
        "spread": float(final.std(ddof=1)),
        "final": [float(x) for x in final],
        "evaluations": float(lines["evaluations"].mean()),
        "products": float(lines["products"].mean()),
        "forward_converged": float(lines["forward"].mean() / lines["forward"].max()) if lines["forward"].any() else 0.0,
        # of the problems whose forward solve converged
        "backward_converged": None if mode in INEXACT else float(lines["both"].sum() / max(lines["forward"].sum(), 1)),
    }


# ---- what is kept ------------------------------------------------------------------------------------------


def judge(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each exact mode: the worst of its settings, against the best inexact mode there."""
    verdicts: dict[str, dict[str, Any]] = {}
    settings = sorted({(row["cell"], row["kind"]) for row in rows})
    for mode in dict.fromkeys(row["mode"] for row in rows if row["mode"] not in INEXACT):
        worst, errors, shares = -np.inf, [], []
        for setting in settings:
            here = {row["mode"]: row for row in rows if (row["cell"], row["kind"]) == setting}
            best = min((here[name] for name in INEXACT if name in here), key=lambda row: row["loss"])
            # The seeds share starts and batches, so that differences are of pairs.
            difference = np.array(here[mode]["final"]) - np.array(best["final"])
            error = difference.std(ddof=1) / len(difference) ** 0.5
            worst = max(worst, float(difference.mean()))
            errors.append(bool(difference.mean() <= 2 * error))
            shares.append(here[mode]["backward_converged"])
        verdicts[mode] = {"no_worse": all(errors), "worst_difference": worst, "least_converged": min(shares)}
    return verdicts


def markdown(results: dict[str, Any]) -> str:
    config, rows = results["config"], results["rows"]
    lines = ["# Training with each backward solve", "", f"    {results['command']}", ""]
    lines += [
        f"{config['steps']} steps of Adam, {config['seeds']} starts of seed {config['seed']}; forward Anderson to"
    ]
    lines += [f"{config['rtol']:g}, at most {config['max_steps']} evaluations, and twice as many backward. The"]
    lines += [f"loss (nats) is the mean of the last {LAST} steps ± its spread over seeds; × is the backward tolerance"]
    lines += ["over the forward; converged is the share of backward solves that did where the forward solve had; CPU"]
    lines += ["time of a training run over that of Anderson(16) × 0.1. All modes share starts and batches.", ""]
    lines += ["## Against the best of JFB, Phantom and Neumann", ""]
    lines += plots.markdown_table(["mode", "no worse in every setting", "largest excess of loss", "least converged"], [
        [mode, "yes" if v["no_worse"] else "**no**", f"{v['worst_difference']:+.4f}", f"{v['least_converged']:.2%}"]
        for mode, v in results["verdicts"].items()
    ])  # fmt: skip
    for cell, kind in dict.fromkeys((row["cell"], row["kind"]) for row in rows):
        here = [row for row in rows if (row["cell"], row["kind"]) == (cell, kind)]
        base = next(row["cpu_seconds"] for row in here if row["mode"] == "Anderson(16) × 0.1")
        lines += [f"## {cell}, {kind}: spectral radius {here[0]['radius_before']:.2f} at the start", ""]
        head = [
            "mode",
            "loss",
            "rate",
            "evaluations",
            "forward converged",
            "products",
            "converged",
            "radius at the end",
            "time",
        ]
        lines += plots.markdown_table(head, [
            [r["mode"], f"{r['loss']:.4f} ± {r['spread']:.4f}", f"{r['lr']:g}", f"{r['evaluations']:.1f}",
             f"{r['forward_converged']:.1%}", f"{r['products']:.1f}",
             "" if r["backward_converged"] is None else f"{r['backward_converged']:.2%}",
             f"{r['radius_after']:.2f}", f"{r['cpu_seconds'] / base:.2f}"]
            for r in here
        ])  # fmt: skip
    return "\n".join(lines)


def main(config: Config) -> dict[str, Any]:
    config = dataclasses.replace(config, **QUICK) if config.quick else config
    results: dict[str, Any] = {"command": "python -m experiments.studies.backward" + " --quick" * config.quick}
    results |= {"config": dataclasses.asdict(config) | {"out": None}, **environment()}
    config.out.mkdir(parents=True, exist_ok=True)
    results["rows"] = list(compare(config))
    results["verdicts"] = judge(results["rows"])
    write_atomically(config.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(config.out / "table.md", markdown(results).encode())
    for mode, verdict in results["verdicts"].items():
        print(mode, verdict)
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
