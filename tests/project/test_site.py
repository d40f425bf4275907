"""The site under docs/: every public name has one place, a failing example stops the build, and nothing is fetched.

What looks at the built pages is skipped where `make docs` has not built them.
"""

import html.parser
import importlib
import importlib.util
import inspect
import pathlib
import re
import runpy
import subprocess
import sys
import urllib.parse

import pytest

import deq_jax

ROOT = pathlib.Path(__file__).parents[2]
DOCS, BUILT = ROOT / "docs", ROOT / "docs" / "_build" / "html"
DOCUMENTED = re.compile(r"^\.\. auto\w+:: deq_jax\.(\S+)$", re.M)
OTHERS = ("nn", "models", "adapters", "diagnostics", "regularizers", "stability", "compat.jaxopt")
INTERNAL = {"diagnostics.with_error", "diagnostics.error_at"}  # for other files of the library


def public_names():
    """The names of `deq_jax.__all__` and of the modules that users import, as seen from `deq_jax`."""
    yield from (name for name in deq_jax.__all__ if not inspect.ismodule(getattr(deq_jax, name)))
    for module in OTHERS:
        owner = importlib.import_module(f"deq_jax.{module}")
        own = lambda name, value, owner=owner: not name.startswith("_") and value.__module__ == owner.__name__
        found = [n for n, v in vars(owner).items() if inspect.isfunction(v) or inspect.isclass(v) if own(n, v)]
        yield from {f"{module}.{name}" for name in getattr(owner, "__all__", found)} - INTERNAL


@pytest.mark.parametrize("name", sorted(public_names()))
def test_a_public_name_has_one_place_in_the_reference(name):
    pages = [
        page.name
        for page in (DOCS / "reference").glob("*.md")
        for n in DOCUMENTED.findall(page.read_text())
        if n == name
    ]
    assert len(pages) == 1, f"deq_jax.{name} is on {pages or 'no page'} of docs/reference"


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_the_reference_names_what_exists(page):
    for dotted in DOCUMENTED.findall(page.read_text()):
        owner = deq_jax
        for name in dotted.split("."):
            owner = getattr(owner, name) if hasattr(owner, name) else importlib.import_module(f"deq_jax.{name}")


PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
MODULE = re.compile(r"python3? -m ((?:experiments|deq_jax|tests)\b[\w.]*)")
FILE = re.compile(r"(?<![\w/.])(?:tests|experiments|colabs|deq_jax|docs)/[\w./]+\.(?:py|ipynb|md|csv)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_commands_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    for module in MODULE.findall(text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"python -m {module}"
    assert [file for file in FILE.findall(text) if not (ROOT / file).exists()] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def extension(name):
    pytest.importorskip("sphinx", reason="needs Sphinx (the docs extra)")
    pytest.importorskip("nbformat", reason="needs nbformat (the docs extra)")
    sys.path.insert(0, str(DOCS / "extensions"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_the_cells_of_a_page_are_its_blocks_in_order():
    text = "# Title\n\n```python\na = 1\n```\nprose\n```py\nnot run\n```\n\n```python\nb = a\n\nc = b\n```\n"
    cells = extension("programs").read(text).cells
    assert [(cell.cell_type, cell.source) for cell in cells if cell.cell_type == "code"] == [
        ("code", "a = 1"),
        ("code", "b = a\n\nc = b"),
    ]
    assert "not run" in cells[2].source and [cell.cell_type for cell in cells] == ["markdown", "code"] * 2


def test_every_figure_is_in_the_gallery_with_a_command_that_exists():
    figures = extension("gallery").figures()
    assert {path for path, _, _ in figures} == set((ROOT / "experiments").rglob("*.png")) and len(figures) > 5
    for path, caption, command in figures:
        module = command.split()[2].replace(".", "/")
        assert caption and ((ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()), path


@pytest.mark.parametrize(
    ("block", "message"),
    [("```python\nassert 1 + 1 == 3\n```", "assert 1 + 1 == 3"), ("[a link](nowhere.md)", "nowhere.md")],
    ids=["example", "link"],
)
def test_a_page_that_fails_stops_the_build_and_is_named(tmp_path, block, message):
    extension("programs")
    (tmp_path / "index.md").write_text(f"# A page\n\n{block}\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", str(DOCS), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "index.md" in done.stderr and message in done.stderr, done.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    extension("programs")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "haiku" else find_spec(name))
    with pytest.raises(Exception, match=r"missing here: haiku\. .*pip install -e '\.\[docs\]'"):
        runpy.run_path(str(DOCS / "conf.py"))


def test_without_a_browser_the_screenshots_are_left_out_with_a_line(tmp_path):
    command = [sys.executable, str(DOCS / "extensions" / "screenshots.py"), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, check=True)
    assert "no browser here" in done.stdout and not (tmp_path / "out").exists()


# ---- the built pages ---------------------------------------------------------------------------------------

built = pytest.mark.skipif(not (BUILT / "index.html").exists(), reason="the site is not built: make docs")


class Page(html.parser.HTMLParser):
    """What a page links to, what a browser fetches to show it, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        self.fetched += [attrs[name] for name in ("src", "srcset", "data", "poster") if attrs.get(name)]
        if tag == "link" and attrs.get("rel") not in ("canonical", "index", "search", "next", "prev", "author"):
            self.fetched.append(attrs.get("href", ""))


@pytest.fixture(scope="module")
def pages():
    return {path.resolve(): Page(path) for path in BUILT.rglob("*.html")}


@built
def test_a_page_is_read_without_a_request_to_another_host(pages):
    is_local = lambda url: not re.match(r"(?i)(\w+:)?//", url) or url.startswith("data:")
    assert [(path.name, url) for path, page in pages.items() for url in page.fetched if not is_local(url)] == []
    for path in BUILT.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path.name


@built
def test_every_local_link_has_a_target(pages):
    missing = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            anchor = urllib.parse.unquote(url.fragment)
            if not target.exists() or (target in pages and anchor not in pages[target].anchors):
                missing.append(f"{path.relative_to(BUILT.resolve())}: {link}")
    assert missing == []


@built
@pytest.mark.parametrize(
    "page",
    ["guides/which_solver", "guides/which_gradient", "guides/failures", "guides/sharding", "migration"],
)
def test_what_a_new_reader_asks_is_one_click_from_the_front_page(pages, page):
    assert f"{page}.html" in pages[(BUILT / "index.html").resolve()].links


@built
def test_the_search_knows_names_and_words():
    index = (BUILT / "searchindex.js").read_text()
    assert all(word in index for word in ("fixed_point", "NewtonKrylov", "precondition", "guides/failures"))


# ---- measured costs ----------------------------------------------------------------------------------------


def rows(path):
    """The cells of each row of the tables of a page, without marks."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def numbers(cells):
    return [
        float(match[0].replace(",", ""))
        for match in (re.search(r"\d[\d.,]*(e-?\d+)?", cell) for cell in cells)
        if match
    ]


SOLVERS = {
    "`Picard()`": "Picard",
    "`Anderson()`, the default": "Anderson",
    "`Broyden()`": "Broyden",
    "`Broyden(rank=10)`": "Broyden-10",
    "`Broyden(rank=40)`": "Broyden-40",
    "`Broyden(rank=100)`": "Broyden-full",
    "`Broyden(rank=100, line_search=4)`": "Broyden-search",
    "`NewtonKrylov()`": "NewtonKrylov",
    "`Robust()`": "Robust",
}


def test_the_costs_of_solvers_are_those_of_the_study():
    (path,) = (ROOT / "experiments").rglob("robustness/results.md")
    study = {cells[0].strip("`"): cells for cells in rows(path) if len(cells) == 11}
    guide = [cells for cells in rows(DOCS / "guides" / "which_solver.md") if cells[0].startswith("`")]
    assert [cells[0] for cells in guide] == list(SOLVERS)
    for cells in guide:
        _, solved, hard, _, mean, *_, classical, _, _ = study[SOLVERS[cells[0]]]
        assert numbers(cells[2:]) == numbers([solved, hard, classical, mean]), cells[0]


ADJOINTS = {
    "Implicit()": "Implicit",
    "Phantom(5, 0.8)": "Phantom(5, 0.8)",
    "Neumann(5)": "Neumann(5)",
    "JFB()": "JFB",
} | {
    "Unroll()": "Unroll",
    "Unroll(checkpoint=True)": "Unroll, √L",
    "Reversible()": "Reversible",
    "Shine(0)": "Shine(0)",
    "Shine(5)": "Shine(5)",
}


def test_the_costs_of_adjoints_are_those_of_the_study():
    (path,) = (ROOT / "experiments").rglob("gradient/table.md")
    study = {tuple(cells[:4]): cells[4:] for cells in rows(path) if len(cells) == 10}
    guide = [cells for cells in rows(DOCS / "guides" / "which_gradient.md") if "`" in cells[0]]
    assert len(guide) == 10
    for cells in guide:
        solver = "Broyden" if "Broyden" in cells[0] else "Anderson"
        name = ADJOINTS[[n for n in re.findall(r"`([^`]+)`", cells[0]) if n in ADJOINTS][0]]
        easy, hard = (study["float32", radius, solver, name] for radius in ("0.9", "1.2"))
        want = numbers([*easy[:2], *hard[:2], *easy[3:]])
        assert numbers(cells[1:]) == want, cells[0]
