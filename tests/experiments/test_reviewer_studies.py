"""The studies of the reviewers' questions: what they share, their mathematics, and that the kept tables are theirs."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from experiments import suite
from experiments.paper import initialization, iterations, stability, stability_scalars, tolerance, tolerance_report
from experiments.shared import gradients, numerics, study, trained
from experiments.training.checkpoints import config_changes

pytestmark = pytest.mark.usefixtures("promotes")  # optax and the experiments rely on it

RESULTS = Path(__file__).parents[2] / "experiments" / "paper" / "results"
STUDIES = {
    "tolerance": tolerance,
    "initialization": initialization,
    "stability": stability,
    "iterations": iterations,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of nothing."""

    size: int = 2
    run: Path = Path("runs/toy")
    out: Path | None = None


def run_toy(args, measured):
    def measure(config, cells):
        return {"cells": [cells(f"cell {i}", lambda i=i: measured.append(i) or {"i": i}) for i in range(config.size)]}

    presets = {"reduced": ("a second", Config()), "paper": ("a year", Config(size=3, run=Path("runs/toy-paper")))}
    draw = lambda results, path: path.write_bytes(b"drawn")
    study.run(
        "paper.toy", presets, measure, lambda results: f"{len(results['cells'])} cells", draw, args, description=None
    )


# ---- what they share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", STUDIES.values(), ids=STUDIES)
def test_an_unknown_preset_is_an_error_that_names_those_there_are(module):
    with pytest.raises(SystemExit, match="no preset 'full'; there are reduced, paper"):
        module.main(["full"])


def test_a_study_prints_its_budget_first_and_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_toy(["reduced"], [])
    assert capsys.readouterr().out.splitlines()[0] == "toy study, reduced. Budget: a second."
    out = tmp_path / "experiments/paper/results/toy"
    assert (out / "table.md").read_text() == "2 cells\n" and (out / "figure.png").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["cells"] == [{"i": 0}, {"i": 1}] and results["command"] == "python -m experiments.paper.toy reduced"


@pytest.mark.parametrize("args", [["paper"], ["reduced", "--size", "1"]])
def test_only_the_reduced_preset_as_it_stands_writes_to_the_committed_results(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    run_toy(args, [])
    assert not (tmp_path / "experiments").exists()
    assert len(list((tmp_path / "runs").glob("*/results/results.json"))) == 1


def test_a_study_that_was_cut_measures_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again = [], []
    run_toy([], first)
    cells = tmp_path / "runs/toy/cells.jsonl"
    cells.write_text(cells.read_text()[:-5])  # killed within the last line
    run_toy([], again)
    assert (first, again) == ([0, 1], [1])


def test_cells_of_another_configuration_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_toy([], [])
    with pytest.raises(SystemExit, match="size: 2 -> 3"):
        run_toy(["reduced", "--size", "3"], [])


def test_figure_redraws_from_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_toy([], [])
    (tmp_path / "experiments/paper/results/toy/figure.png").unlink()
    measured = []
    run_toy(["figure"], measured)
    assert (tmp_path / "experiments/paper/results/toy/figure.png").exists() and not measured


def test_what_json_cannot_hold_is_kept_as_none():
    kept = study.plain({"a": jnp.array([1.0, jnp.nan]), "b": (np.float32(jnp.inf), True, np.int64(3)), "c": 1 / 3})
    assert kept == {"a": [1.0, None], "b": [None, True, 3], "c": 0.333333}
    assert np.isnan(study.numbers(kept["a"])).tolist() == [False, True]


def test_a_part_of_the_suite_that_does_not_exist_is_named():
    with pytest.raises(SystemExit, match="no experiment nothing; there are trained"):
        suite.main(["run", "--only", "nothing"])


# ---- what is committed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_table_and_figure_come_from_the_committed_results(name, tmp_path):
    results = (RESULTS / name / "results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(results)
    STUDIES[name].main(["figure", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (RESULTS / name / "table.md").read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    preset = STUDIES[name].PRESETS["reduced"][1]
    assert config_changes(json.loads(results)["config"], json.loads(json.dumps(study.identity(preset)))) == {}


def test_the_papers_curves_are_read():
    eps, excess = tolerance_report.paper_curve()
    # 4 over √700, and log(195.57 / 23.64)
    assert eps[-1] == pytest.approx(0.1512, rel=1e-3) and excess[-1] == pytest.approx(2.113, rel=1e-3)
    with pytest.raises(ValueError, match="no curve residual_vs_nfe, deq_ep99"):
        study.published("residual_vs_nfe", "deq_ep99")


# ---- mathematics -------------------------------------------------------------------------------------------


def test_the_cliff_is_the_last_tolerance_before_the_loss_rises():
    assert tolerance_report.cliff([1e-3, 1e-2, 1e-1, 1.0], [0.0, 0.005, 0.5, 0.001]) == 1e-2
    assert tolerance_report.cliff([1e-3], [math.nan]) == 0


def test_the_angle_of_a_gradient():
    told = gradients.angle({"a": jnp.array([0.0, 2.0])}, np.array([1.0, 1.0]))
    assert told["cosine"] == pytest.approx(0.5**0.5) and told["size"] == pytest.approx(2**0.5)


def test_divergence_is_a_gradient_that_is_not_finite_or_a_loss_that_stays_up():
    falling, none = np.linspace(4, 2, 40), np.zeros(40)
    assert initialization.divergence(falling, none) is None
    assert initialization.divergence(falling, np.eye(40)[7]) == 7
    assert initialization.divergence(np.where(np.arange(40) < 20, falling, 9.0), none) == 20


@pytest.mark.parametrize("ensemble", initialization.ENSEMBLES)
def test_ensembles_have_one_scale(ensemble):
    dim, inner, gain = 8, 12, 1.3
    fresh = {
        name: {"kernel": jnp.zeros(shape), "scale": jnp.zeros(shape[fan_in_axes:])}
        for name, shape, fan_in_axes in (
            ("qkv", (dim, 3, 2, 4), 1), ("attended", (2, 4, dim), 2), ("positions", (dim, 2, 4), 1),
            ("inner", (dim, inner), 1), ("outer", (inner, dim), 1),
        )
    }  # fmt: skip
    cell = initialization.initialize({"cell": fresh}, ensemble, gain, jax.random.key(0))["cell"]
    for name, fan_in in ("qkv", dim), ("attended", dim), ("inner", dim), ("outer", inner):
        assert float(jnp.mean(cell[name]["kernel"] ** 2)) == pytest.approx(gain**2 / fan_in, rel=1e-5)
    out = np.asarray(cell["attended"]["kernel"]).reshape(dim, dim)
    if ensemble == "symmetric":
        np.testing.assert_allclose(out, out.T, atol=1e-6)
        W = np.asarray(cell["inner"]["kernel"] @ cell["outer"]["kernel"])
        np.testing.assert_allclose(W, W.T, atol=1e-5)
    if ensemble == "orthogonal":
        np.testing.assert_allclose(out @ out.T, gain**2 * np.eye(dim), atol=1e-5)
    # Weight norm begins where the effective kernel is the one that was drawn.
    norms = jnp.linalg.norm(cell["attended"]["kernel"].reshape(dim, dim), axis=0)
    np.testing.assert_allclose(cell["attended"]["scale"], norms, rtol=1e-5)


def test_stretch_is_the_largest_singular_value():
    J = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    f = lambda z, _: (z.reshape(1, 6) @ J).reshape(z.shape)
    got = numerics.stretch(f, jnp.zeros((1, 2, 3)), None, iterations=200)
    np.testing.assert_allclose(got, [np.linalg.norm(J, 2)], rtol=1e-4)


def test_scalar_maps_whose_root_is_unstable():
    rows = {row["map"]: row for row in stability_scalars.scalar_rows("Anderson")}
    for name in ("1.2 z + 1", "3.2 z (1 − z)", "3.9 z (1 − z)", "tanh(4 z)"):
        row = rows[name]
        assert row["status"] == "CONVERGED" and row["distance"] <= 1e-8, name
        assert row["gradient"] == pytest.approx(row["expected"], rel=1e-6), name
    assert rows["1.2 z + 1"]["z"] == pytest.approx(-5) and rows["1.2 z + 1"]["expected"] == pytest.approx(-5)
    for name in ("z² + 1 (no root)", "z + 0.01 (drifts)"):
        assert rows[name]["status"] != "CONVERGED" and np.isfinite(rows[name]["gradient"]), name


def test_plain_iteration_says_that_it_failed_on_an_unstable_root():
    rows = {row["map"]: row for row in stability_scalars.scalar_rows("Picard")}
    for name in ("1.2 z + 1", "3.2 z (1 − z)", "3.9 z (1 − z)", "z² + 1 (no root)"):
        assert rows[name]["status"] != "CONVERGED", name
    assert rows["2.8 z (1 − z)"]["status"] == "CONVERGED"


# ---- the shared model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    # Without a warm-up: its program would be one more to compile.
    small: dict = dict(steps=2, shallow_share=0.0, batch=2, length=8, mem_len=8, dim=8, heads=2, inner_dim=8)
    solver = deq.Picard(rtol=1e-2, max_steps=4)
    run = tmp_path_factory.mktemp("runs") / "model"
    config = dataclasses.replace(trained.REDUCED, run=run, solver=solver, adjoint=deq.Implicit(solver), **small)
    return trained.load(config)


def test_the_model_is_kept_at_its_milestones_and_not_trained_twice(tiny, monkeypatch):
    assert list(tiny.states) == [0, 1, 2] and [int(state.step) for state in tiny.states.values()] == [0, 1, 2]
    monkeypatch.setattr(trained, "train", lambda *_: pytest.fail("trained again"))
    again = trained.load(tiny.config)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, again.last.params, tiny.last.params)
    params = jax.tree.leaves(tiny.warm.params), jax.tree.leaves(tiny.last.params)
    assert any(np.any(a != b) for a, b in zip(*params, strict=True))


def test_the_layers_changes_are_the_residuals_of_plain_iteration(tiny, tmp_path):
    config = iterations.Config(model=tiny.config, lengths=(8,), tokens=8, depth=3)
    with study.Cells(tmp_path / "cells.jsonl", study.identity(config)) as cells:
        row = iterations.by_depth(config, tiny, [0, 2], cells)[1]
    f, context_of, z = trained.held_out(tiny, 1, 8)
    context = context_of(tiny.last.params)
    for change in row["change"]:
        fz = f(z, context)
        assert change == pytest.approx(float(jnp.linalg.norm(fz - z) / jnp.linalg.norm(fz)), rel=1e-4)
        z = fz
