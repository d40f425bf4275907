"""`make gpu` resumes, skips what is done, keeps the rows of a part that was killed, and refuses without a GPU."""

import json

import pytest

from experiments.benchmarks.contenders import CONTENDERS
from experiments.gpu import __main__ as script
from experiments.gpu import core_tests, kept, notebooks, peers, report

# Counts its measurements in the file `measured`; does what the file `fate` says in the middle of them.
PART = """
import os, pathlib, signal, time
from experiments.gpu import kept

here = pathlib.Path(__file__).parent

def value(name):
    with open(here / "measured", "a") as file:
        file.write(name + "\\n")
    return {"value": 1.0}

def second():
    fate = (here / "fate").read_text()
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "slow":
        time.sleep(600)
    if fate == "wrong":
        raise ValueError("no such size")
    return value("second")

def measure(rows, job):
    rows.about(seed=0, args=job.args)
    rows.measure("first", lambda: value("first"))
    rows.measure("second", second)

kept.main(measure)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "fake_part.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return tmp_path


def run(folder, fate, *options, limit=120.0, reads=("tests/experiments/test_gpu_script.py",), seconds=300):
    (folder / "fate").write_text(fate)
    part = script.Part("fake", "fake_part", 1, limit, reads, ("one",))
    paths = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--start", str(folder / "start")]
    code = script.main(["--allow-cpu", "--seconds", str(seconds), *paths, *options], parts=(part,))
    return code, kept.read(folder / "out" / "cpu.json")["parts"].get("fake")


def measured(folder):
    return (folder / "measured").read_text().split()


def test_it_refuses_without_a_gpu(folder):
    with pytest.raises(SystemExit, match="sees no GPU here, only cpu"):
        script.main(["--work", str(folder / "work"), "--out", str(folder / "out")])
    assert not (folder / "out").exists()


def test_a_killed_part_keeps_its_rows_and_goes_on_and_is_then_skipped(folder, capsys):
    code, part = run(folder, "killed")
    assert code == 1 and not part["done"] and part["rows"] == {"first": {"value": 1.0}}
    code, part = run(folder, "well")
    assert code == 0 and part["done"] and list(part["rows"]) == ["first", "second"]
    assert part["about"] == {"seed": 0, "args": ["one"]} and part["stamp"]["jax"]
    assert measured(folder) == ["first", "second"]
    run(folder, "well")
    assert "fake: done before" in capsys.readouterr().out and measured(folder) == ["first", "second"]


def test_other_code_is_measured_anew_and_so_is_what_is_asked_for_again(folder):
    run(folder, "well")
    run(folder, "well", reads=("tests/conftest.py",))
    assert measured(folder) == ["first", "second"] * 2
    run(folder, "well", "--again", "fake", reads=("tests/conftest.py",))
    assert measured(folder) == ["first", "second"] * 3


def test_a_part_stops_at_its_limit_and_does_not_begin_without_time(folder, capsys):
    code, part = run(folder, "slow", limit=1.0)
    assert code == 0 and (part is None or not part["done"])
    assert "stopped at its limit" in capsys.readouterr().out
    run(folder, "well", seconds=script.SPARE + 0.5)
    assert "left for the next run" in capsys.readouterr().out


def test_what_a_row_raises_is_a_result(folder):
    code, part = run(folder, "wrong")
    assert code == 0 and part["done"] and part["rows"]["second"] == {"error": "ValueError: no such size"}
    assert "- second: ValueError: no such size" in (folder / "out" / "cpu.md").read_text()


def test_an_empty_folder_of_results_begins_with_those_of_earlier_runs(folder):
    run(folder, "well")
    (folder / "out").rename(folder / "start")
    _, part = run(folder, "well")
    assert part["done"] and measured(folder) == ["first", "second"]


def test_the_archive_holds_the_newest_checkpoint_and_no_more_than_its_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PIECE", 4000)
    work, out = tmp_path / "work", tmp_path / "out"
    sizes = {"ptb/checkpoints/2/state": 3000, "ptb/checkpoints/10/state": 3001, "ptb/log": 10, "cache/a": 5000}
    for name, size in (sizes | {"cache/b": 90_000}).items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(bytes(size))
    out.mkdir()
    assert kept.pack(work, out, cap=10_000) == 3
    pieces = list(out.iterdir())
    assert len(pieces) > 1 and max(piece.stat().st_size for piece in pieces) <= 4000
    assert kept.unpack(out, tmp_path / "new") == 3
    found = {
        str(p.relative_to(tmp_path / "new")): p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file()
    }
    del sizes["ptb/checkpoints/2/state"]
    assert found == sizes
    assert kept.unpack(out, tmp_path / "new") == 0  # what is there is not overwritten


def test_steps_of_solvers_at_a_tiny_size(folder):
    paths = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--start", str(folder)]
    assert script.main(["--allow-cpu", "--only", "steps", *paths]) == 0
    part = json.loads((folder / "out" / "cpu.json").read_text())["parts"]["steps"]
    assert part["done"] and part["rows"]["copy"]["gb_per_s"] > 0
    solvers = ("bare loop", "Picard", "Anderson 5, test 3")
    names = [f"4×16 {solver}, {way}" for way in ("plain", "command buffers") for solver in solvers]
    assert list(part["rows"]) == ["copy", *names]
    for name in names:
        row = part["rows"][name]
        assert row["evaluations"] == [10, 20] and row["calls"] == 20 and row["temp_bytes"] > 0, row
    page = (folder / "out" / "cpu.md").read_text()
    assert "| Anderson 5, test 3 | " in page and "mean nothing" in page


def test_a_page_of_peers_compares_the_accurate_alone():
    row = {"residual": 5e-5, "gradient_error": 5e-5, "forward": {"ms": 1.0}, "step": {"ms": 3.0, "temp_bytes": 1e6}}
    limit = {what: {"ms": 0.5} for what in peers.PARTS}
    rows = {"P1 limit": limit, "P1 ours": row, "P1 theirs": row | {"residual": 1.0}, "P1 none": {"error": "too large"}}
    lines = list(report.peers(rows))
    assert lines[2].startswith("| P1 ours | 1 | 3 |") and lines[3].startswith("| P1 theirs ✗ |")
    assert lines[-1] == "- P1 none: too large" and "| P1 | 0.5 | 0.5 | 0.5 |" in lines


def test_a_notebook_runs_and_leaves_what_it_prints(tmp_path, monkeypatch):
    (tmp_path / "colabs").mkdir()
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    (tmp_path / "colabs" / "02_a.py").write_text(
        "import os\nprint(os.environ['MPLBACKEND'], os.environ['DEQ_JAX_FAST'])"
    )
    assert notebooks.run("02", tiny=True)["printed"] == ["Agg 1"]
    with pytest.raises(RuntimeError, match="KeyError: 'DEQ_JAX_FAST'"):
        notebooks.run("02", tiny=False)


def test_every_part_fits_its_budget_and_names_what_exists():
    for part in script.PARTS:
        assert part.seconds <= part.limit <= 540 - script.SPARE
        assert all(list(script.ROOT.glob(pattern)) for pattern in part.reads), part.name
        assert (script.ROOT / (part.module.replace(".", "/") + ".py")).exists()
    for problem, names in peers.CHOSEN.items():
        assert all(problem in CONTENDERS[name].problems for name in names), problem
    assert all(len(list(script.ROOT.glob(f"tests/*/test_{name}.py"))) == 1 for name in core_tests.FILES)
