"""The robustness study: its problems are what they claim to be, and its referee can tell."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import deq_jax as deq
from experiments.shared.cell_batch import draw
from experiments.shared.cells import AFFINE, BOUNDED, DIM, FAMILIES, MONOTONE, PLANTED, normal
from experiments.shared.systems import NO_ZERO, RUNS, classical, start
from experiments.studies import history
from experiments.studies.robustness import Config, judge, main

pytestmark = pytest.mark.usefixtures("promotes")  # the problems of the study are written with it

SYSTEMS = [(number, n) for number, n, _ in RUNS]
K = np.arange(1, 11)

# F at the standard start, by hand from Moré, Garbow & Hillstrom (1981); number: (n, F).
AT_START = {
    1: (2, [2.2, -4.4]),
    2: (4, [-7, -(5**0.5), 1, 4 * 10**0.5]),
    3: (2, [-1, np.exp(-1) - 1e-4]),
    4: (4, [-6004, -2080, -5404, -1880]),
    5: (3, [-50, 0, 0]),
    8: (10, [-5.5] * 9 + [0.5**10 - 1]),
    11: (10, 10 - 10 * np.cos(0.1) + K * (1 - np.cos(0.1)) - np.sin(0.1)),
    12: (10, -K / 10 + K * -38.5 * (1 + 2 * 38.5**2)),
    13: (10, [-2] + [-1] * 8 + [-3]),
    14: (10, [-6] * 10),
}
ZEROS = {
    1: [1, 1],
    2: [0, 0, 0, 0],
    3: [1.0981593e-5, 9.1061467],
    4: [1, 1, 1, 1],
    5: [1, 0, 0],
    7: [0.0837513, 0.3127293, 0.5, 0.6872707, 0.9162487],  # the nodes of Chebyshev's quadrature
    8: [1] * 40,
    11: [0] * 10,
    12: [1] * 10,
}


@pytest.mark.parametrize("number", AT_START)
def test_a_system_has_its_published_value_at_the_start(number):
    n, expected = AT_START[number]
    np.testing.assert_allclose(classical(number, start(number, n, 1.0)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", ZEROS)
def test_a_system_vanishes_at_its_known_zero(number):
    z = np.asarray(ZEROS[number], float)
    nearby = np.linalg.norm(classical(number, z + 0.1))
    assert np.linalg.norm(classical(number, z)) <= 1e-5 * nearby


def test_the_two_discretizations_of_one_boundary_value_problem_agree():
    found = [optimize.root(lambda z: classical(number, z), start(number, 10, 1.0)).x for number in (9, 10)]
    assert 0.1 < np.abs(found[0]).max() < 0.2
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_every_run_but_one_has_a_zero():
    # MINPACK's hybrid method from some start, or the zero written above.
    known = {(number, len(z)) for number, z in ZEROS.items()}
    for number, n in sorted(set(SYSTEMS) - known):
        starts = [start(number, n, factor) for factor in (1.0, 10.0)]
        found = [optimize.root(lambda z: classical(number, z), z, tol=1e-13) for z in starts]
        best = min(np.linalg.norm(root.fun) for root in found)
        assert (best <= 1e-8) == ((number, n) != NO_ZERO), (number, n, best)
    assert sum(count for _, _, count in RUNS) == 55


@pytest.mark.parametrize(("number", "n"), SYSTEMS)
def test_numpy_and_jax_pose_the_same_system(number, n, x64):
    z = np.stack([start(number, n, factor) for factor in (1.0, 10.0)]) + 0.01
    ours = classical(number, z)
    assert ours.shape == z.shape and np.isfinite(ours).all()
    np.testing.assert_allclose(classical(number, jnp.asarray(z), jnp), ours, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_fixed_point_it_claims(name):
    family, key = FAMILIES[name], jax.random.key(5)
    params = family.make(key)
    z = jax.random.uniform(jax.random.key(6), (DIM,), jnp.float32, -1, 1)
    f = lambda z: family.cell(z, params)
    assert f(z).shape == (DIM,) and f(z).dtype == jnp.float32
    jacobian = lambda: np.asarray(jax.jacfwd(f)(jnp.zeros(DIM)), np.float64)
    if family.exists == BOUNDED:  # a box is mapped into itself; layer norm ends on a sphere of radius √48 < 7
        box = params.get("d", 7.0)
        assert (jnp.abs(f(box * z)) <= box).all() and (jnp.abs(f(box * jnp.sign(z))) <= box).all()
    elif family.exists == AFFINE:
        assert np.linalg.svd(np.eye(DIM) - jacobian(), compute_uv=False).min() > 1e-3
        np.testing.assert_allclose(f(z) - f(0 * z), jacobian() @ z, rtol=1e-3, atol=1e-4)
    elif family.exists == MONOTONE:
        assert np.linalg.eigvalsh(2 * np.eye(DIM) - params["w"] - params["w"].T).min() > 0.3
    else:
        assert family.exists == PLANTED
        z_star = normal(jax.random.split(key)[1], DIM)
        np.testing.assert_allclose(f(z_star), z_star, atol=1e-5)


def test_the_referee_sees_through_claims_and_refusals():
    status = np.array([0, 0, 0, 1, 2, 4])
    stats = deq.Stats(np.full(6, 7), np.zeros(6), np.zeros(6), status)  # pyright: ignore
    residual = np.array([1e-5, 1e-3, np.nan, 1e-5, 1e-3, np.inf])
    verdicts = judge(stats, residual, 1e-4, 1e-4)
    assert verdicts.success.tolist() == [True, False, False, False, False, False]
    assert verdicts.false_claim.tolist() == [False, True, True, False, True, False]
    assert not judge(stats, residual, 1e-4, 1e-4, floor=1e-2).false_claim[4]
    assert verdicts.false_refusal.tolist() == [False, False, False, True, False, False]


def test_the_quick_study_finds_no_false_word(tmp_path, x64, capsys):
    main(Config(quick=True, only=("Picard", "Anderson", "Broyden"), out=tmp_path))
    record = json.loads((tmp_path / "results.json").read_text())
    for result in record["solvers"].values():
        assert result["all"]["of"] == 15 and result["mgh"]["of"] == 11
        assert result["all"]["false_claims"] == result["all"]["false_refusals"] == 0
        assert result["mgh"]["false_claim"] == result["mgh"]["false_refusal"] == 0
        assert result["counted"] == {"checked": 2, "differ": 0}
    anderson, picard = record["solvers"]["Anderson"], record["solvers"]["Picard"]
    assert anderson["all"]["success"] > picard["all"]["success"] > 0
    assert "| bar |" in (tmp_path / "results.md").read_text() and "bar" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_an_unknown_solver_is_refused_with_the_names(x64):
    with pytest.raises(SystemExit, match="no solver Andersen; there are Picard, Anderson"):
        main(Config(only=("Andersen",)))


def test_a_history_in_bfloat16_costs_few_evaluations():
    problems = draw(tuple(FAMILIES)[::2], range(3))
    *_, ratio = history.compare(problems, 8, "float32", 1e-4)
    assert float(ratio) <= 1.1
