"""A checkout compared with itself differs in nothing."""

import json
from pathlib import Path

import numpy as np

from experiments.benchmarks import compare_versions

ROOT = Path(__file__).parents[2]


def test_a_checkout_is_equal_to_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    config = compare_versions.Config(
        ROOT, seeds=(0,), families=("tanh 0.9", "expanding 1.5…3"), solvers=("Picard",), problems=("P1",),
        pairs=("Picard",), repeats=2, tiny=True, out=tmp_path / "results.json",
    )  # fmt: skip
    compare_versions.main(config)
    results, printed = json.loads(config.out.read_text()), capsys.readouterr().out
    solves = results["bits"]["Picard"]
    assert solves["problems"] == solves["all bits"] == solves["steps"] == solves["status"] == 2
    assert solves["changes"] == {} and results["gradients"]["all bits"] == 2
    for program in results["programs"]:
        assert all(program[key][0] == program[key][1] for key in ("bytes", "loops"))
    assert len(results["models"]) == 6 and all(m["evaluations"][0] == m["evaluations"][1] for m in results["models"])
    forward, step = results["programs"]
    assert (forward["what"], forward["loops"][0]) == ("forward", 1) and (step["what"], step["loops"][0]) == ("step", 2)
    assert len(results["times"]) == 2 and all(t["cpu_ms"][1] > 0 for t in results["times"])
    assert "| P1 | Picard | step |" in printed


def test_what_differs_is_told():
    old = {"z": np.ones((2, 3), np.float32), "steps": np.array([15, 7]), "status": np.array([3, 0])}
    old |= {name: np.array([0.5, 1e-5]) for name in ("residual", "relative_residual")}
    new = old | {"steps": np.array([34, 7]), "z": old["z"] * np.array([[1], [1.25]], np.float32)}
    result = compare_versions.compare_solves(["a family"], (0, 1), old, new)
    assert result["changes"] == {"a family": {"DIVERGED 15 → DIVERGED 34": 1}}
    counts = {key: result[key] for key in ("problems", "all bits", "z", "residual", "steps", "status")}
    assert counts == {"problems": 2, "all bits": 0, "z": 1, "residual": 2, "steps": 1, "status": 2}
    assert result["largest change of z, of those with equal steps"] == 0.25
