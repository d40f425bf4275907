"""The benchmark counts truly, its referee shares nothing with the library, and its report hides nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from experiments.benchmarks import jax_side, judge, report, workers
from experiments.shared import jax_ops, problems

pytestmark = pytest.mark.usefixtures("promotes")  # the referee relies on it


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(what was built, where its z and gradients are) of ours on a tiny P1."""
    path = str(tmp_path_factory.mktemp("benchmark") / "found.npz")
    commands = jax_side.commands(problems.TINY)
    options = dict(problem="P1", contender="ours Anderson 3", rtol=3e-5, backward=3e-5, scale=1.0)
    answer = commands["build"](count=True, **options)
    commands["save"](contender=options["contender"], path=path)
    return answer, path


def test_evaluations_are_counted_in_the_running_program(built):
    answer, _ = built
    drawn = problems.TINY["P1"]()
    params = jax.tree.map(jnp.asarray, drawn.params)
    cell = lambda z: drawn.cell(jax_ops, z, params, params["x"])
    solver = deq.Anderson(rtol=3e-5, history=3)
    stats = deq.solve(cell, jnp.zeros(drawn.z_shape), solver=solver, batch_ndim=1).stats
    assert answer["forward"]["f"] == stats.steps.max()
    assert answer["step"]["f"] == stats.steps.max() + 2  # the linearizations in z and in the parameters
    assert answer["step"]["vjp"] > 3 and answer["step"]["jvp"] == 0


def test_convolution_and_its_derivatives_are_those_of_lax(x64, rng):
    x, kernel = jax.random.normal(rng, (2, 6, 5, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    plain = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for f in (
        lambda conv: jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))(x, kernel),
        lambda conv: jax.grad(lambda x: jnp.sin(conv(x, kernel)).sum())(x),
        lambda conv: jax.jvp(conv, (x, kernel), (jnp.cos(x), jnp.cos(kernel))),
    ):
        ours, theirs = f(jax_ops.conv3), f(plain)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, theirs)


def test_referee_is_content_with_ours_and_not_with_noise(built, tmp_path, x64):
    commands = judge.commands(problems.TINY)
    commands["solve"](problem="P1")
    verdict = commands["judge"](built[1])
    assert workers.good(verdict)
    found = dict(np.load(built[1]))
    np.savez(tmp_path / "noise.npz", **(found | {"grad_w": found["grad_w"] * 1.001}))
    worse = commands["judge"](str(tmp_path / "noise.npz"))
    assert worse["gradient_error"] > 2e-4 and not workers.good(worse)
    assert not workers.good({"residual": np.nan, "gradient_error": 0.0})


def row(package: str, ms: float, **options) -> dict:
    step = {"ms": ms, "f": 10, "vjp": 10, "jvp": 0, "temp_bytes": int(1e6), "compile_s": 1.0, "first_call_s": 1.0}
    return {"package": package, "residual": 5e-5, "gradient_error": 5e-5, "step": step, "forward": step} | options


def test_report_compares_the_accurate_alone_and_says_what_is_missed(tmp_path):
    contenders = {
        "ours Anderson 3": row("deq_jax", 3.0),
        "jaxopt Anderson": row("jaxopt", 2.0),
        "banax Anderson": row("banax", 0.1, gradient_error=1e-3),
        "torchdeq Broyden": {"package": "torchdeq", "error": "RuntimeError: singular"},
    }
    limit = {"t_f": 0.1, "t_vjp": 0.1, "t_params": 0.2}
    results = {"machine": {"processor": "a", "cores": 2, "devices": ["cpu"]}, "dtype": "float32", "seed": 0}
    results |= {"versions": {"deq_jax": "1", "jax": "1"}, "peers": {"jaxopt": "1"}, "rounds": 1}
    results["problems"] = {"P3": {"what": "hard", "limit": limit, "contenders": contenders}}
    report.write(results, tmp_path)
    bars = json.loads((tmp_path / "results.json").read_text())["bars"]
    assert bars[0] == {"bar": "P3: times faster than the best peer", "measured": 2 / 3, "wanted": 1.5, "met": False}
    table = (tmp_path / "table.md").read_text()
    assert "**missed**" in table and "banax Anderson ✗" in table and "RuntimeError: singular" in table
    assert report.limit_ms(contenders["jaxopt Anderson"], limit) == pytest.approx(2.2)
    assert (tmp_path / "figure.png").exists()
