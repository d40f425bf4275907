"""The shape of the library: short functions, short files, nothing twice, and imports that point downward."""

import ast
import collections
import graphlib
import pathlib
import re

import pytest

import deq_jax

ROOT = pathlib.Path(deq_jax.__file__).parent
FILES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

# Rooms, the highest first. A file may import from its own room and from those below.
ROOMS = (
    ("compat/", "models/", "nn.py"),
    ("__init__.py", "__main__.py", "_doctor.py"),
    (
        "_as_optimizer.py",
        "adapters.py",
        "check.py",
        "compact.py",
        "diagnostics.py",
        "fixed_point.py",
        "halves.py",
        "regularizers.py",
    )
    + ("root.py", "stability.py", "stepwise.py", "trajectory.py", "warm_start.py", "_hoisting.py"),
    ("adjoints/",),
    ("solvers/",),
    ("_checks.py", "_gathers.py", "_krylov.py", "_low_rank.py", "_programs.py", "_returned.py"),
    ("_config.py", "_gram.py", "_rows.py", "_scales.py", "_states.py", "_trace.py"),
    ("_arrays.py", "_export.py", "_jaxprs.py", "_reverse_only.py", "_values.py", "_vectors.py"),
)


def code_lines(name):
    """Numbers of the lines that are neither blank, nor a comment, nor part of a docstring."""
    words = set()
    for node in ast.walk(TREES[name]):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str):
                words |= set(range(statement.lineno, statement.end_lineno + 1))
    lines = enumerate(FILES[name].splitlines(), start=1)
    return [i for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in words]


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_45_lines_of_code(name):
    code = code_lines(name)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            length = sum(node.lineno <= i <= node.end_lineno for i in code)
            assert length <= 45, f"{name}: {node.name} has {length} lines of code"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("models/")])
def test_no_file_is_longer_than_300_lines(name):
    assert len(FILES[name].splitlines()) <= 300


def test_no_six_lines_stand_twice():
    places = collections.defaultdict(list)
    for name, text in FILES.items():
        lines, code = text.splitlines(), code_lines(name)
        for start in range(len(code) - 5):
            six = code[start : start + 6]
            places[tuple(lines[i - 1].strip() for i in six)].append(f"{name}:{six[0]}")
    # The overloads of a function repeat its signature: Python has no other way to write them.
    overloads = [range(node.lineno, node.end_lineno + 1) for node in functions("fixed_point.py") if is_overload(node)]
    is_signature = lambda place: any(int(place.split(":")[1]) in lines for lines in overloads)
    twice = [found for found in places.values() if len(found) > 1]
    assert [f for f in twice if sum(not (p.startswith("fixed_point.py") and is_signature(p)) for p in f) > 1] == []


def functions(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def is_overload(node):
    return any(getattr(decorator, "id", None) == "overload" for decorator in node.decorator_list)


def imported(name):
    """(file, names) of each import from within the library."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deq_jax":
            names = [alias.name for alias in node.names]
            base = "/".join(node.module.split(".")[1:])
            modules = [n for n in names if f"{base}/{n}.py".lstrip("/") in FILES or f"{n}/__init__.py" in FILES]
            for module in modules:
                file = f"{base}/{module}.py".lstrip("/")
                yield (file if file in FILES else f"{module}/__init__.py"), []
            rest = [n for n in names if n not in modules]
            if rest:
                yield (f"{base}.py" if f"{base}.py" in FILES else f"{base}/__init__.py".lstrip("/")), rest


def room(name):
    (found,) = [i for i, files in enumerate(ROOMS) if name.startswith(files)]
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name):
    for file, names in imported(name):
        assert room(file) >= room(name), f"{name} imports {file}, which is above it"
        private = [n for n in names if n.startswith("_")]
        assert not private, f"{name} imports {private} from {file}"


EXPERIMENTS = ROOT.parent / "experiments"
PAGES = {str(path.relative_to(EXPERIMENTS)): path.read_text() for path in sorted(EXPERIMENTS.rglob("*.py"))}

# The rooms of the experiments, the highest first. A page stands alone in the rooms of pages.
EXPERIMENT_ROOMS = (
    ("suite.py", "gpu/", "memory_report.py", "scaling_"),
    ("benchmarks/", "paper/", "studies/"),
    ("shared/",),
    ("training/",),
)
OF_PAGES = ("paper", "studies")


def experiments_imported(page):
    """Modules of the experiments that a page imports, wherever in its text, as paths."""
    for node in ast.walk(ast.parse(PAGES[page])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "experiments":
            base = "/".join(node.module.split(".")[1:])
            names = {f"{base}/{alias.name}.py".lstrip("/") for alias in node.names} | {f"{base}.py"}
            yield from names & PAGES.keys()


def floor(page):
    (found,) = [i for i, names in enumerate(EXPERIMENT_ROOMS) if page.startswith(names)]
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page != "__init__.py"])
def test_experiments_import_from_their_room_and_below(page):
    room, _, name = page.rpartition("/")
    for other in experiments_imported(page):
        above = floor(other) < floor(page) or floor(other) == floor(page) and other.rpartition("/")[0] != room
        assert not above, f"{page} imports {other}, which is not below it"
        # A page may have several files: `memory_report.py` is a part of `memory.py`, and of no other page.
        part = other.rpartition("/")[2].startswith(name.removesuffix(".py") + "_")
        assert room not in OF_PAGES or not other.startswith(room) or part, f"{page} imports another page, {other}"


def test_modules_of_the_experiments_are_short():
    lengths = {page: len(text.splitlines()) for page, text in PAGES.items()}
    assert {page: length for page, length in lengths.items() if length > 400} == {}
    assert len([page for page, length in lengths.items() if length > 300]) <= 5


def test_experiments_use_public_modules_and_import_in_no_circle():
    for page, text in PAGES.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        private = [node.module for node in nodes if (node.module or "").startswith("deq_jax._")]
        private += [
            a.name for node in nodes if "experiments" in (node.module or "") for a in node.names if a.name[0] == "_"
        ]
        assert not private, page
    graph = {page: set(experiments_imported(page)) - {page} for page in PAGES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph) > 60


def test_no_imports_go_in_a_circle():
    graph = {name: {file for file, _ in imported(name)} - {name} for name in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_the_makefile_names_tests_that_exist():
    text = (ROOT.parent / "Makefile").read_text().replace("\\\n", " ")
    lists = re.findall(r"addprefix tests/\*/test_,\$\(addsuffix \.py,([\w\s]+)\)", text)
    assert len(lists) == 2
    for name in " ".join(lists).split():
        assert len(list(ROOT.parent.glob(f"tests/*/test_{name}.py"))) == 1, name
    assert not list(ROOT.parent.glob("tests/test_*.py")), "a test belongs into a folder of tests/"
