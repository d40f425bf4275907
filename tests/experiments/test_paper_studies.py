"""The paper's own experiments: their tasks are as published, their cells say what they promise, in tiny sizes."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.paper import copy_memory, initialization, memory, memory_report, runtime, runtime_contenders
from experiments.shared import models, study
from experiments.training import lm, loop
from experiments.training.baselines import parameters

pytestmark = pytest.mark.usefixtures("promotes")  # optax and the experiments rely on it

RESULTS = Path(__file__).parents[2] / "experiments" / "paper" / "results"
STUDIES = {"copy_memory": copy_memory, "memory": memory, "runtime": runtime}


@pytest.mark.parametrize("name", STUDIES)
def test_committed_tables_are_those_of_the_committed_results(name, tmp_path):
    directory = shutil.copytree(RESULTS / name, tmp_path / name)
    (directory / "figure.png").unlink()
    STUDIES[name].main(["figure", "--out", str(directory)])
    assert (directory / "table.md").read_text() == (RESULTS / name / "table.md").read_text()
    assert (directory / "figure.png").read_bytes().startswith(b"\x89PNG")


# ---- copy memory -------------------------------------------------------------------------------------------


def test_the_task_is_the_papers():
    x, y = copy_memory.sequences(3, 400, np.random.default_rng(0))
    assert x.shape == y.shape == (3, 420)
    assert (x[:, :10] >= 1).all() and (x[:, :10] <= 8).all()
    assert (x[:, 10:-11] == 0).all() and (x[:, -11:] == 9).all()
    assert (y[:, :-10] == 0).all() and (y[:, -10:] == x[:, :10]).all()
    assert copy_memory.chance(400) == pytest.approx(0.0495, abs=5e-5)


def test_a_loss_is_chance_without_memory_and_nothing_with_it():
    test = copy_memory.sequences(6, 5, np.random.default_rng(0))

    def oracle(model, x):  # of the place alone, and of the symbols too
        last = jnp.arange(25) >= 15
        guess = jnp.where(jnp.isin(jnp.arange(10), jnp.arange(1, 9)), 0.0, -jnp.inf)
        known = jnp.log(jax.nn.one_hot(jnp.roll(x, 15, axis=1), 10))
        silence = jnp.log(jax.nn.one_hot(0, 10))
        return jnp.where(last[:, None], known if model else guess, silence) * jnp.ones((*x.shape, 1)), {}

    def loss(remembers):
        state = type("State", (), {"params": nnx.State({}), "rest": nnx.State({})})
        graphdef = nnx.split(nnx.Module())[0]
        return copy_memory.make_test(graphdef, lambda _, x: oracle(remembers, x), test)(state)

    assert loss(False)["loss"] == pytest.approx(copy_memory.chance(5), rel=1e-5)
    assert loss(True) == {"loss": 0.0, "right": 1.0}


def test_baselines_have_the_parameters_of_the_equilibrium():
    config = copy_memory.Config()
    size = {name: parameters(lambda: copy_memory.build(config, name)) for name in copy_memory.MODELS}
    assert 12_000 < size["DEQ-Transformer"] < 16_000
    for name, count in size.items():
        assert abs(count / size["DEQ-Transformer"] - 1) <= 0.15, name
    assert copy_memory.levels(400) == 8 and copy_memory.levels(4) == 2


def test_a_copy_memory_cell():
    config = copy_memory.Config(delay=3, train_sequences=8, test_sequences=4, baseline_steps=4, log_every=2)
    cell = copy_memory.train_and_test(config, "GRU")
    assert [point["step"] for point in cell["curve"]] == [2, 4]
    assert cell["sequences"] == 4 * 32
    assert 0 <= cell["test"]["right"] <= 1 and np.isfinite(cell["test"]["loss"])
    assert not any(name.startswith("bwd") for point in cell["curve"] for name in point), "a GRU solves nothing"
    (bar, size) = copy_memory.bars(config, {"GRU": cell, "DEQ-Transformer": cell | {"test": {"loss": 1e-5}}})[::2]
    assert bar["met"] == (abs(cell["test"]["loss"] / copy_memory.chance(3) - 1) <= 0.1) and size["met"]


# ---- memory ------------------------------------------------------------------------------------------------

TINY = models.Shape(dim=16, heads=2, inner_dim=64, batch=2, length=16, mem_len=0)


def test_checkpoints_need_a_fraction_of_the_bytes():
    config = memory.Config()
    size = lambda name: memory.compiled_bytes(config, "DEQTransformer", name, 64, TINY)["temp_bytes"]
    each, root = size("checkpointed"), size("√L-checkpointed")
    assert each != root and max(each, root) < 0.5 * size("plain")


def test_memory_of_the_committed_results_by_depth():
    """Linear in the depth where all is kept, and the same at any depth at an equilibrium that keeps no history."""
    results = json.loads((RESULTS / "memory" / "results.json").read_text())
    for part in results["families"].values():
        at = {name: {int(d): size for d, size in sizes.items()} for name, sizes in part["memory"].items()}
        for name in ("Implicit", "Phantom(5)", "Reversible"):
            assert max(at[name].values()) <= 1.001 * min(at[name].values()), name
        (a, b, *_, c) = sorted(at["plain"])
        slope = lambda low, high: (at["plain"][high] - at["plain"][low]) / (high - low)
        assert slope(a, b) == pytest.approx(slope(b, c), rel=0.1)


def test_break_even_is_between_two_depths():
    sizes = {"2": 10.0, "4": 20.0, "8": 60.0}
    assert memory_report.break_even(sizes, 30.0) == 5.0
    assert memory_report.break_even(sizes, 5.0) == 2.0
    assert memory_report.break_even(sizes, 100.0) is None


def test_equal_time_reads_every_curve_at_the_end_of_the_fastest():
    curve = lambda *points: {"curve": [{"cpu_seconds": t, "valid_loss": loss} for t, loss in points]}
    found = memory.equal_time({"fast": curve((0, 3.0), (2, 1.0)), "slow": curve((0, 3.0), (4, 2.0))})
    assert found == {"cpu_seconds": 2, "losses": {"fast": 1.0, "slow": 2.5}}


def test_the_checkpointed_curve_is_the_plain_ones_at_its_own_pace():
    run = {"curve": [{"step": 1, "seconds": 2.0, "cpu_seconds": 4.0, "valid_loss": 1.0}], "temp_bytes": 1}
    rows = {name: {"wall_min": t, "cpu_min": 2 * t} for name, t in (("plain", 1.0), ("√L-checkpointed", 1.5))}
    (point,) = memory.slowed(run, rows)["curve"]
    assert point == {"step": 1, "seconds": 3.0, "cpu_seconds": 6.0, "valid_loss": 1.0}


def test_a_wider_shape_is_one_that_can_be_built():
    for width in memory.Config().widths:
        shape = memory.widened(memory.Config().trained, width)
        assert shape.dim % shape.heads == 0 and (shape.dim // shape.heads) % 2 == 0
        assert shape.dim / 64 == pytest.approx(width, rel=0.15)


# ---- runtime -----------------------------------------------------------------------------------------------


def test_the_rival_has_the_parameters_of_the_equilibrium():
    config = runtime.Config()
    narrow = runtime_contenders.rival_shape(config, "DEQTransformer")
    rival = parameters(lambda: runtime_contenders.stack(narrow, config.layers))
    ours = parameters(lambda: models.FAMILIES["DEQTransformer"](config.shape))
    assert abs(rival / ours - 1) <= 0.15


def test_time_to_a_loss():
    curve = lambda *points: {"curve": [{"cpu_seconds": t, "valid_loss": loss} for t, loss in points]}
    found = runtime.to_loss({"a": curve((0, 4.0), (1, 3.0), (2, 1.0)), "b": curve((0, 4.0), (10, 2.0))})
    assert found == {"loss": 2.0, "cpu_seconds": {"a": 1.5, "b": 10}}
    with pytest.raises(ValueError, match="never reaches 0.5"):
        runtime.first_at(curve((0, 4.0), (1, 3.0))["curve"], 0.5)


# ---- what training logs ------------------------------------------------------------------------------------


class Traced:
    """A training step that is traced and never compiled: the state stays, every metric is 1."""

    def __init__(self, *args, **options):
        self.step = loop.make_train_step(*args, **options)

    def __call__(self, state, batch):
        metrics = jax.eval_shape(self.step, state, batch)[1]
        return state, {name: np.ones(metric.shape, metric.dtype) for name, metric in metrics.items()}

    def lower(self, *_):
        return self

    def compile(self):
        return self


BACKWARD = {"bwd_steps", "bwd_residual", "bwd_status", "bwd_converged"}
SMALL = dataclasses.replace(TINY, dim=8, inner_dim=8, length=8)


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """A text, and studies that compile nothing: what they measure of a trained model is 1 too."""
    for module in (copy_memory, initialization, memory, runtime):
        monkeypatch.setattr(module, "make_train_step", Traced)
    monkeypatch.setattr(copy_memory, "make_test", lambda *_: lambda *_: {"loss": 1.0})
    monkeypatch.setattr(lm, "make_evaluate", lambda *_: lambda *_: lm.Evaluation(1.0, 1, 1.0, 1.0, 1.0))
    monkeypatch.setattr(lm, "temp_bytes", lambda _: 1)
    monkeypatch.setattr(runtime.Task, "evaluate", lambda *_: lambda _: 1.0)
    programs = initialization.programs
    monkeypatch.setattr(initialization, "programs", lambda *args: (*programs(*args)[:3], lambda *_: {}))
    (tmp_path / "text.txt").write_text("to be or not " * 100)
    with jax.default_prng_impl("rbg"):  # what is drawn does not matter, and threefry takes seconds to compile
        yield tmp_path / "text.txt"


def test_copy_memory_logs_the_backward_solve(traced):
    config = copy_memory.Config(delay=3, train_sequences=8, test_sequences=4, steps=2, shallow_steps=1, log_every=1)
    shallow, deep = copy_memory.train_and_test(config, "DEQ-Transformer")["curve"]
    assert BACKWARD <= deep.keys() and not BACKWARD & shallow.keys()


def test_the_memory_study_logs_the_backward_solve(traced):
    config = memory.Config(
        data=str(traced), trained=SMALL, measured=SMALL, shallow_steps=1, steps=1, eval_every=1, repeats=1
    )
    times = memory.timed_steps(config, "DEQTransformer", 1)
    for name, logged in ("plain", set()), ("Implicit", BACKWARD):
        end = memory.trained(config, "DEQTransformer", name, SMALL)["curve"][-1]
        assert BACKWARD & end.keys() == BACKWARD & times[name].keys() == logged


def test_the_runtime_study_logs_the_backward_solve(traced, tmp_path):
    config = runtime.Config(
        run=tmp_path, data=str(traced), shape=SMALL, shallow_steps=1, steps=1, explicit_steps=1, eval_every=1
    )
    task = runtime.Task(config, "DEQTransformer")
    for name in ("tied layers", "Implicit"):
        row = runtime.train(task, name, runtime_contenders.contenders(config, "DEQTransformer")[name])
        assert all(
            BACKWARD & part.keys() == (BACKWARD if name == "Implicit" else set()) for part in (row, row["curve"][-1])
        )


def test_the_initialization_study_logs_the_backward_solve(traced, tmp_path):
    one: dict = dict(gains=(1.0,), ensembles=("Gaussian",), weight_norms=(True,), layer_norms=("post",))
    config = initialization.Config(data=str(traced), dim=8, inner_dim=8, batch=2, length=8, steps=1, **one)
    with study.Cells(tmp_path / "cells.jsonl", study.identity(config)) as cells:
        (row,) = initialization.measure(config, cells)["rows"]
    assert row["training_products"] == row["training_backward_converged"] == 1


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: copy_memory.Config(models=("RNN",)), "--models must be of DEQ-Transformer, TCN, LSTM, GRU, got RNN"),
    (lambda: copy_memory.Config(delay=0), "--delay must be at least 1, got 0"),
    (lambda: copy_memory.Config(shallow_steps=10**6), "--shallow-steps must be in"),
    (lambda: memory.Config(families=("MLP",)), "--families must be of DEQTransformer, DEQTrellisNet, got MLP"),
    (lambda: memory.Config(depths=(0, 4)), "--depths must be at least 1 each, got"),
    (lambda: memory.Config(eval_every=10**6), "--eval-every must be at most steps"),
    (lambda: dataclasses.replace(TINY, dim=0), "--dim must be at least 1, got 0"),
    (lambda: runtime.Config(families=("MLP",)), "--families must be of DEQTransformer, DEQTrellisNet, got MLP"),
    (lambda: runtime.Config(rtol=0.5), "--inference-rtols must be with rtol"),
])  # fmt: skip
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("module", STUDIES.values())
def test_an_unknown_preset_is_named(module):
    with pytest.raises(SystemExit, match="no preset 'huge'"):
        module.main(["huge"])


def test_results_name_no_machine():
    for name in STUDIES:
        results = json.loads((RESULTS / name / "results.json").read_text())
        assert results["command"].startswith("python -m experiments.")
        assert not {"run", "out"} & set(results["config"])
