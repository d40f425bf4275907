"""The modules of the experiments before they had rooms: their names and their commands still work."""

import ast
import importlib
import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import experiments
from experiments.shared import study
from experiments.suite import LIBRARY, PAPER

HERE = pathlib.Path(experiments.__file__).parent
ROOT = HERE.parent
RUN = "if __name__ =="
NEW = ["suite", "gpu", "memory_report", "scaling_study", "benchmarks", "benchmarks.report"]
NEW += [*(places[0] for places in experiments.MOVED.values())]
OLD = [*experiments.MOVED]


def file_of(name):
    path = HERE / (name.replace(".", "/") + ".py")
    return path if path.exists() else HERE / name / "__main__.py"


def commands(names):
    """Modules that `python -m` runs with options; a few have their arguments by place alone."""
    main = [name for name in names if RUN in file_of(experiments.MOVED.get(name, (name,))[0]).read_text()]
    by_place = {"plots", "paper.char_lm_report", "benchmarks.report"}
    return sorted({name for name in main if name not in by_place})


def test_no_former_name_is_a_module_again():
    for old, places in experiments.MOVED.items():
        assert not (HERE / (old.replace(".", "/") + ".py")).exists(), old
        assert all(file_of(place).exists() for place in places), old


@pytest.mark.parametrize("old", OLD)
def test_a_former_module_has_what_its_successors_have(old):
    module = importlib.import_module(f"experiments.{old}")
    for place in experiments.MOVED[old]:
        now = importlib.import_module(f"experiments.{place}")
        tree = ast.parse(file_of(place).read_text())
        for name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}:
            assert hasattr(module, name) and hasattr(now, name), (old, name)
    with pytest.raises(AttributeError, match=f"experiments.{old} is now experiments.*; no 'nothing'"):
        module.nothing  # noqa: B018


def test_the_former_module_of_the_loop_is_a_room_with_its_names():
    from experiments import training
    from experiments.training import loop

    assert all(getattr(training, name) is getattr(loop, name) for name in training.OF_THE_LOOP)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        training.nothing  # noqa: B018


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", commands(OLD) + commands(NEW))
def test_every_command_says_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    assert left.value.code in (0, None) and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["char_lm", "paper.char_lm"])
def test_python_runs_a_former_and_a_present_name(name):
    command = [sys.executable, "-m", f"experiments.{name}", "demo", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage: python -m experiments.paper.char_lm demo" in done.stdout, done.stderr


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "experiments/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_modules_that_exist(page):
    for name in re.findall(r"python -m\s+experiments\.([a-z_.]*[a-z_])\b", (ROOT / page).read_text()):
        assert file_of(name).exists(), f"{page}: experiments.{name}"
    for path in re.findall(r"(?<![\w/])experiments/[\w/]+\.(?:py|md|json|png|csv)", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_results_are_read_with_the_present_name_of_their_command(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"command": "python -m experiments.memory_study paper", "a": 1}))
    assert study.read(tmp_path / "results.json") == {"command": "python -m experiments.paper.memory paper", "a": 1}


def test_the_suite_knows_what_it_finished_under_former_names(tmp_path):
    (tmp_path / "gradient_study.json").write_text("{}")
    (tmp_path / "word_lm ptb-small.json").write_text("{}")
    assert [part.name for part in PAPER + LIBRARY if part.finished(tmp_path)] == ["word_lm ptb-small", "gradient"]
