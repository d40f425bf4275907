"""The paper's cell on one GPU: a training step and inference beside explicit layers, and their temporaries.

700 wide, 48,000 inside, batch 28 of 150 words of the Penn Treebank, rtol 1e-3; matrix products at JAX's default
precision, TF32 on an H100. The equilibrium is trained lightly first, for it grows harder in training. What layers cost
does not depend on their weights.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import deq_jax as deq
from experiments.gpu import kept, timing
from experiments.paper import runtime, runtime_contenders
from experiments.shared.models import Shape
from experiments.shared.timing import interleaved
from experiments.training import lm
from experiments.training.loop import TrainState, count_params

FAMILY = "DEQTransformer"
TRAINED = "Implicit"


def measure(rows: kept.Rows, job: kept.Job) -> None:
    config = tiny_config(job) if job.tiny else paper_config(job)
    shape = config.shape
    rows.about(
        seed=config.seed, dtype="float32", gradient="by row", precision="JAX's default: TF32 on recent cards",
        rtol=config.rtol, max_steps=config.max_steps, layers=config.layers, dim=shape.dim, inner_dim=shape.inner_dim,
        batch=shape.batch, length=shape.length, corpus=config.data,
        trained=f"{config.shallow_steps} steps of two layers, {config.steps} at the equilibrium",
    )  # fmt: skip
    table = runtime_contenders.contenders(config, FAMILY)
    models = Models(rows, runtime.Task(config, FAMILY), table)
    for name, contender in table.items():
        rows.measure(f"training, {name}", lambda contender=contender: train_row(models, contender))
    for name, (label, options) in inference(config, table).items():
        rows.measure(name, lambda label=label, options=options: infer_row(models, table[label], options))


def paper_config(job: kept.Job) -> runtime.Config:
    """The study's own configuration of the paper, on words of PTB, with half the batch and little training."""
    _, config = runtime.PRESETS["paper"]
    shape = dataclasses.replace(config.shape, batch=28)
    light = dict(shallow_steps=200, steps=50, explicit_steps=500, eval_every=50, eval_segments=6)
    run, calls = Path(job.work, "paper"), timing.CALLS
    return dataclasses.replace(config, run=run, shape=shape, data="ptb", repeats=calls, **light)


def tiny_config(job: kept.Job) -> runtime.Config:
    shape = Shape(dim=16, heads=2, inner_dim=32, batch=2, length=8, mem_len=8)
    return runtime.Config(run=Path(job.work, "paper"), shape=shape, layers=3, shallow_steps=2, steps=2, repeats=2)


def inference(config: runtime.Config, table: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        f"inference, {name}": (name, {}) for name in ("own layers", "tied layers") if name in table
    }
    for rtol in config.inference_rtols:
        solver = deq.Anderson(rtol=rtol, max_steps=4 * config.max_steps, history=6)
        rows[f"inference, rtol {rtol:g}"] = (TRAINED, {"solver": solver})
    return rows


class Models:
    """The two networks, each built when it is first asked for: (graph, state)."""

    def __init__(self, rows: kept.Rows, task: runtime.Task, table: dict[str, runtime_contenders.Contender]):
        self.rows, self.task, self.table = rows, task, table

    def of(self, contender: runtime_contenders.Contender) -> tuple[Any, TrainState]:
        return self.explicit if contender.own else self.equilibrium

    @functools.cached_property
    def explicit(self) -> tuple[Any, TrainState]:
        return self.task.start(self.table["own layers"])

    @functools.cached_property
    def equilibrium(self) -> tuple[Any, TrainState]:
        """After its light training."""
        config, contender = self.task.config, self.table[TRAINED]
        graphdef, state = self.task.start(contender)
        done, metrics = 0, {}
        for how, count in ((runtime_contenders.SHALLOW, config.shallow_steps), (contender, config.steps)):
            step = runtime.training_step(config, graphdef, how)
            for _ in range(count):
                state, metrics = step(state, self.task.batches[done])
                done += 1
        found = jax.device_get(metrics)
        self.rows.put(
            "light training", {"steps": done} | {n: float(found[n]) for n in ("loss", "fwd_steps", "fwd_residual")}
        )
        return graphdef, state


def train_row(models: Models, contender: runtime_contenders.Contender) -> dict[str, Any]:
    task, (graphdef, state) = models.task, models.of(contender)
    program = runtime.training_step(task.config, graphdef, contender).lower(state, task.batches[0]).compile()
    return clocked(task, program, state) | {"parameters": count_params(state.params)}


def infer_row(models: Models, contender: runtime_contenders.Contender, options: dict[str, Any]) -> dict[str, Any]:
    graphdef, state = models.of(contender)

    @jax.jit
    def infer(state, batch):
        model = nnx.merge(graphdef, state.params)
        logits, _, metrics = contender.call(model, batch.inputs, state.carry, **options)
        return logits, metrics

    return clocked(models.task, infer.lower(state, models.task.batches[0]).compile(), state)


def clocked(task: runtime.Task, program: Any, state: Any) -> dict[str, Any]:
    interleaved({"": program}, {"": state}, task.batches[0], 1)  # a first call loads what the program needs
    row = interleaved({"": program}, {"": state}, task.batches[0], task.config.repeats)[""]
    solved = {name: row[name] for name in ("fwd_steps", "bwd_steps") if name in row}
    times = {"ms": 1e3 * row["wall_min"], "ms_median": 1e3 * row["wall_median"], "calls": task.config.repeats}
    return times | {"temp_bytes": lm.temp_bytes(program)} | solved


if __name__ == "__main__":
    kept.main(measure)
