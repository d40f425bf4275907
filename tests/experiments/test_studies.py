"""The studies of gradients: their quick presets write what they promise, and the bars that no clock decides are met."""

import json

import pytest

import deq_jax as deq
from experiments.studies import backward, gradient, squarem

pytestmark = pytest.mark.usefixtures("promotes")  # optax relies on it


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    return out, gradient.main(gradient.Config(out=out, quick=True))


def test_gradient_study_writes_its_files(gradients):
    out, results = gradients
    kept = json.loads((out / "results.json").read_text())
    assert kept["bars"] == json.loads(json.dumps(results["bars"]))
    assert "## Bars" in (out / "table.md").read_text()
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) not in (out / "results.json").read_text()  # nothing of the machine that ran it


def test_exact_modes_agree_with_the_dense_solve(gradients):
    assert all(row["worst"] <= 1e-10 for row in gradients[1]["exact_pairs"])


def test_reversible_is_exact_for_its_own_steps(gradients):
    assert gradients[1]["reversible"] <= 1e-8


def test_shine_has_a_third_of_jfbs_error_in_seven_products(gradients):
    rows = {row["adjoint"]: row for row in gradients[1]["adjoints"] if row["radius"] == 0.9}
    assert rows["Shine(5)"]["error"] <= rows["JFB"]["error"] / 3
    assert rows["Shine(5)"]["products"] <= 7


def test_memory_does_not_grow_with_max_steps(gradients):
    memory = gradients[1]["memory"]["bytes"]
    for name in ("Implicit", "Phantom(5, 0.8)", "Reversible"):
        assert len(set(memory[name])) == 1, name


def test_two_level_checkpoints_grow_as_the_root_of_the_depth(gradients):
    assert abs(gradients[1]["memory"]["fits"]["Unroll, √L"]["power"] - 0.5) <= 0.1


def test_a_tenth_of_the_forward_tolerance_is_tight_enough(gradients):
    """The error is the forward tolerance's once the backward one is a tenth of it."""
    rows = {(r["radius"], r["rtol"], r["ratio"]): r["error"] for r in gradients[1]["tolerances"]}
    for (radius, rtol, ratio), error in rows.items():
        if ratio == 0.1:
            assert error <= 1.1 * rows[radius, rtol, 0.001]


def test_backward_study_converges_wherever_the_forward_solve_did(tmp_path):
    results = backward.main(backward.Config(out=tmp_path, quick=True))
    assert (tmp_path / "table.md").exists() and json.loads((tmp_path / "results.json").read_text())["rows"]
    assert all(verdict["least_converged"] == 1 for verdict in results["verdicts"].values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["EM, Poissons", "EM, Gaussians at 2.5", "logit shares, spread 1.0"])
def test_squarem_as_it_is_compared_is_a_good_one(name):
    f, z0 = squarem.maps()[name]
    plain = deq.solve(f, z0, solver=deq.Picard(max_steps=20_000))
    ours = deq.solve(f, z0, solver=squarem.Squarem(max_steps=2000))
    assert ours.stats.converged and 2 * ours.stats.steps < plain.stats.steps
