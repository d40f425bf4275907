"""The study of solver-level ideas: its counts are true, its prototypes do what they are said to do."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from experiments.shared.problems import TINY
from experiments.shared.study import read
from experiments.studies import gains, gains_report

pytestmark = pytest.mark.usefixtures("promotes")  # the referee of the study relies on it


@pytest.fixture(scope="module")
def programs():
    return gains.Programs(TINY["P1"]())


def test_counts_are_the_calls_that_the_program_makes():
    ticks = []
    drawn = TINY["P1"]()

    def ticking(ops, z, params, x):
        jax.debug.callback(functools.partial(ticks.append, 1))
        return drawn.cell(ops, z, params, x)

    counted = gains.Programs(dataclasses.replace(drawn, cell=ticking))
    jax.effects_barrier()
    ticks.clear()  # the referee's
    row, _ = counted.find(deq.Picard(rtol=1e-4))
    jax.effects_barrier()
    assert row["evaluations"] == len(ticks) and row["converged"] and row["z_error"] < 1e-3


def test_adaptive_is_picard_above_every_rate_and_mixes_below(programs):
    anderson = deq.Anderson(rtol=1e-4)
    picard, plain = programs.find(deq.Picard(rtol=1e-4))
    never, solved = programs.find(gains.Adaptive(anderson, 2.0))
    assert never == picard and solved.memory.mixed == 0
    np.testing.assert_array_equal(solved.value, plain.value)
    always, solved = programs.find(gains.Adaptive(anderson, 0.0))
    assert always["converged"] and solved.memory.mixed == always["evaluations"] - 1


def test_warm_start_ends_at_the_exact_gradient_and_begins_where_shine_does(programs):
    solver, backward = deq.Broyden(rtol=1e-6), deq.Anderson(rtol=1e-6, history=16, growth=10.0)
    warm = lambda most: gains.Warm(dataclasses.replace(backward, max_steps=jnp.asarray(most)), step=True)
    row = programs.gradient(solver, warm(100))
    assert row["converged"] and row["gradient_error"] < 1e-5
    row, shine = programs.gradient(solver, warm(1)), programs.gradient(solver, deq.Shine(0))
    assert row["products"] == shine["products"] == 2
    assert row["gradient_error"] == pytest.approx(shine["gradient_error"], rel=1e-4)


def test_waste_is_what_rounding_up_adds():
    assert gains_report.waste((12, 16), 4) == (0, 0)
    assert gains_report.waste((13, 16), 4) == (3, 3 / (9 + 12))


def test_the_committed_table_is_that_of_the_committed_numbers():
    kept = Path(gains.__file__).parent / "results" / "gains"
    assert gains_report.markdown(read(kept / "results.json")) == (kept / "table.md").read_text()
