"""Notebooks: in step with their .py twins, safe to install from, and running from the first cell to the last."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import pytest
from conftest import known_options

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
CELL_TIMEOUT = 600  # seconds; generous, since tests share their machine

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: pathlib.Path) -> list[tuple[str, str]]:
    """(type, source) of each cell of an .ipynb, without Jupyter's help."""
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]]


def test_pair_is_in_sync(path):
    jupytext = pytest.importorskip("jupytext", reason="needs jupytext (the docs extra)")
    twin = [(c.cell_type, c.source) for c in jupytext.read(path.with_suffix(".py")).cells]
    assert cells(path) == twin, f"run `jupytext --sync` on {path.with_suffix('.py').name}"


def test_badge_and_install_cell(path):
    sources = cells(path)
    badge = f"https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/{path.name}"
    assert badge in sources[0][1]

    installs = [source for kind, source in sources if kind == "code" and re.search(r"\bpip3? install\b", source)]
    assert len(installs) == 1
    # Colab's own jax must stay where it is, and an installed deq_jax must not be replaced.
    assert re.search(r"try:\s+import deq_jax", installs[0])
    assert not re.search(r"\s(-U|--upgrade|--force-reinstall)\b", installs[0])
    assert not re.search(r"install[^\n]*\bjax(lib)?\b *([\[=<>~\"']|$)", re.sub(r"deq[-_]jax", "", installs[0]))


def test_the_head_is_that_of_all_notebooks(path):
    """The cell that installs, and the one with sizes and style: one look, and one line where jax is too old."""
    head = lambda path: [s for kind, s in cells(path) if kind == "code" and ("%pip" in s or "COLORS = {" in s)]
    assert len(head(path)) == 2 and head(path) == head(NOTEBOOKS[0])


def test_it_has_figures_and_a_word_on_accelerators(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [output["data"] for cell in code for output in cell["outputs"] if "data" in output]
    moving = [
        data for data in shown if "image/gif" in data or "data:image/gif;base64" in "".join(data.get("text/html", ""))
    ]
    assert sum("image/png" in data for data in shown) >= 3 and moving
    words = [source for kind, source in cells(path) if kind == "markdown"]
    assert "After this notebook you can" in words[0] and "Try next" in words[-1]
    assert any("On a GPU or a TPU" in text for text in words)


def test_a_jax_that_is_too_old_is_named_before_anything_is_installed(path, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 6, 2))
    monkeypatch.setattr(jax, "__version__", "0.6.2")
    (install,) = (source for kind, source in cells(path) if kind == "code" and "%pip" in source)
    with pytest.raises(RuntimeError, match="needs jax 0.7.2 or newer, not 0.6.2"):
        exec(install.replace("%pip", "# %pip"), {})


def test_committed_outputs(path):
    text = path.read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "commit it executed, so that GitHub shows its figures"
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    outputs = json.dumps([cell["outputs"] for cell in code])
    machine = re.search(r"/(?:home|root|tmp|work|Users)/|site-packages", outputs)
    assert not machine, f"a path of some machine: {outputs[max(machine.start() - 60, 0) : machine.end() + 60]}"
    assert len(text) < 1_000_000


def test_runs(path, tmp_path, monkeypatch):
    """All cells, in a fresh kernel of this interpreter and in an empty folder, with DEQ_JAX_FAST=1."""
    for name in ("nbclient", "nbformat", "ipykernel", "matplotlib", "optax", "flax"):
        pytest.importorskip(name, reason=f"needs {name} (the docs and experiments extras)")
    with warnings.catch_warnings():
        # Jupyter's own: its clients warn of platform directories and of event loops, each release of others.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
        error = run(path, tmp_path)
    assert error is None, error


@pytest.mark.every_corner
def test_runs_as_a_script(path, tmp_path):
    """The .py twin in an empty folder, with DEQ_JAX_FAST=1: for environments without Jupyter, as the corners are."""
    if importlib.util.find_spec("nbclient"):
        pytest.skip("test_runs executes the cells where nbclient is installed")
    for name in ("matplotlib", "PIL", "optax", "flax"):
        pytest.importorskip(name, reason=f"needs {name} (the experiments extra)")
    ended = subprocess.run(
        [sys.executable, path.with_suffix(".py")],
        env=fast_environment() | {"MPLBACKEND": "Agg"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=CELL_TIMEOUT,
    )
    assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr


def fast_environment() -> dict[str, str]:
    """This process's environment with DEQ_JAX_FAST=1, for an interpreter that imports this copy of the library."""
    # Without the tests' eight devices; and compiled quickly, since what is asked is whether the cells run.
    quickly = " ".join(f"--{name}={str(value).lower()}" for name, value in known_options().items())
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"DEQ_JAX_FAST": "1", "XLA_FLAGS": quickly, "PYTHONPATH": python_path}


def run(path: pathlib.Path, folder: pathlib.Path) -> str | None:
    """The failing cell's number, source and traceback; None if all is well."""
    import nbclient
    import nbformat

    # The kernel that is named python3 may be any on this machine, or none; ours is this interpreter.
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    kernel = folder / "kernels" / "this-interpreter"  # where JUPYTER_PATH points
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec))

    # Inline figures, as on Colab; and Jupyter's history and settings are not the user's.
    environment = fast_environment() | {"IPYTHONDIR": str(folder / "ipython")}
    environment.pop("MPLBACKEND", None)
    (folder / "empty").mkdir()

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name=kernel.name,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(folder / "empty")}},
    )
    try:
        client.execute(env=environment)
    except nbclient.exceptions.CellExecutionError:
        pass  # found below, with its cell
    except (nbclient.exceptions.DeadKernelError, nbclient.exceptions.CellTimeoutError) as error:
        done = lambda cell: "shell.execute_reply" in cell.metadata.get("execution", {})
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not done(cell)]
        return f"{path.name}: {error}\n\nin\n\n{code[0] if code else ''}"
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output["traceback"]))
                return f"{path.name}, cell {number}:\n\n{cell.source}\n\n{traceback}"
            if output["output_type"] == "stream" and "Warning" in output["text"]:
                return f"{path.name}, cell {number} warns:\n\n{cell.source}\n\n{output['text']}"
    return None
