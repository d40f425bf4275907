"""The package as it is installed: its imports, metadata and wheel, and what the repository may not hold."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import mutants
import pytest

import deq_jax
from deq_jax._doctor import known_bad

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_import_needs_jax_alone():
    blocker = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "optax", "orbax", "chex", "tyro", "matplotlib", "equinox"}:
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
import deq_jax
for name in deq_jax.__dict__.get("__all__", ()):
    getattr(deq_jax, name)
"""
    done = run(sys.executable, "-c", blocker)
    assert done.returncode == 0, done.stderr


def test_import_leaves_flax_alone():
    done = run(sys.executable, "-c", "import sys, deq_jax; sys.exit('flax' in sys.modules)")
    assert done.returncode == 0, done.stderr or "import deq_jax imported flax"


def test_doctor_reports_this_environment():
    done = run(sys.executable, "-m", "deq_jax")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("python", "jaxlib", "flax", "orbax-checkpoint", "devices", "x64"):
        assert re.search(rf"^{word} +\S", done.stdout, re.M), done.stdout
    assert re.search(rf"^deq-jax +{re.escape(deq_jax.__version__)}$", done.stdout, re.M), done.stdout


@pytest.mark.parametrize(
    "jax, flax",
    [
        ("0.7.2", "0.11.2"),
        ("0.8.1", "0.12.0"),
        ("0.10.2", "0.12.4"),
        ("0.10.2", "0.12.8"),
        ("0.11.0", "0.12.8"),
        ("0.11.1", "0.12.9"),
        ("0.11.2", "0.12.12"),
        ("0.12.0.1", "0.12.10"),
    ],
)
def test_pairs_that_work(jax, flax):
    assert known_bad({"jax": jax, "jaxlib": jax, "flax": flax}) == []


@pytest.mark.parametrize(
    "jax, flax, instead",
    [
        ("0.12.0.1", "0.12.8", "flax>=0.12.10"),
        ("0.11.1", "0.12.8", "flax>=0.12.10"),
        ("0.12.0.1", "0.12.9", "flax>=0.12.10"),
        ("0.11.2", "0.12.9", "flax>=0.12.10"),
        ("0.10.2", "0.11.2", "flax>=0.12.7,<0.12.9"),
        ("0.11.0", "0.12.6", "flax>=0.12.7,<0.12.9"),
        ("0.10.2", "0.12.10", "flax>=0.12.7,<0.12.9"),
        ("0.7.2", "0.12.8", "flax>=0.11.2,<0.12.1"),
    ],
)
def test_pairs_that_fail(jax, flax, instead):
    (problem,) = known_bad({"jax": jax, "jaxlib": jax, "flax": flax})
    assert f"flax {flax} " in problem and f"jax {jax};" in problem and f'pip install "{instead}"' in problem


@pytest.mark.parametrize(
    "versions, words",
    [
        ({"jax": "0.6.2", "jaxlib": "0.6.2"}, ["jax 0.6.2 is older", "jax>=0.7.2"]),
        ({"jax": "0.10.2", "jaxlib": "0.11.0"}, ["jaxlib 0.11.0 is newer", "jaxlib==0.10.2"]),
        (
            {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.7.2"},
            ["runs on the CPU", "jax-cuda12-plugin==0.10.2"],
        ),
    ],
)
def test_other_known_failures(versions, words):
    (problem,) = known_bad(versions)
    assert all(word in problem for word in words), problem


def test_absent_packages_are_no_problem():
    assert known_bad({}) == []
    assert known_bad({"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}) == []


def test_declared_floors():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = set(project["dependencies"]) | {r for extra in extras.values() for r in extra}
    assert project["requires-python"] == ">=3.11"
    # What Colab preinstalls: a higher floor would make an install there replace its jax, a cap would too.
    assert declared >= {
        "jax>=0.7.2",
        "jaxlib>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.6",
        "chex>=0.1.90",
        "orbax-checkpoint>=0.11.36",
    }
    assert not [requirement for requirement in declared if re.search(r"[<~]|==", requirement)]


def test_declared_floors_are_the_tested_ones():
    project = PYPROJECT["project"]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in [r for r in project["dependencies"] + extras["flax"] + extras["experiments"] + extras["test"]]:
        name, _, floor = requirement.partition(">=")
        if floor:
            assert tested[name] == floor or tested[name].startswith(floor + ".0"), requirement


def test_one_version():
    changelog = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert changelog and citation
    assert changelog[1] == citation[1] == deq_jax.__version__


def test_no_machine_path_or_registry_in_the_repository():
    listing = run("git", "ls-files", "-z") if shutil.which("git") else None
    if listing is None or listing.returncode:
        pytest.skip("not a git checkout")
    # Brackets keep these patterns from finding themselves.
    forbidden = re.compile(
        r"/(w[o]rk|f[a]rm|r[o]ot)/|/t[m]p/[a-zA-Z]|pythonh[o]sted|py[p]i[.]org|n[p]mjs[.]org|deb[.]deb[i]an"
    )
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""  # deleted but not yet committed
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if forbidden.search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_make_test_is_well_formed():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = run("make", "-n", "test")
    assert done.returncode == 0, done.stderr
    assert "-m pytest" in done.stdout


def test_wheel_has_the_package_and_its_types(tmp_path):
    pytest.importorskip("hatchling")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "deq_jax/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert all(name.startswith(("deq_jax/", "deq_jax-")) for name in names), names
    assert f"deq_jax-{deq_jax.__version__}" in wheel.name


def test_every_mutant_still_finds_its_text():
    for mutant in mutants.MUTANTS:
        text = (mutants.ROOT / "deq_jax" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text must occur once in {mutant.file}"
