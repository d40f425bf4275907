"""The pages under docs/ are programs: their python blocks run, in order, as one."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks, f"{page.name} has no block of python"
    namespace = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


def test_the_first_block_of_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```$", text, re.M | re.S).group(1)
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert "deq.check(" in block and jnp.all(jnp.isfinite(namespace["grads"]["w"]))


@pytest.mark.parametrize("name", ["own_solver.md", "own_adjoint.md"])
def test_a_page_on_writing_your_own_has_at_most_40_lines(name):
    assert len((PAGES[0].parent / name).read_text().splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_prose_and_tables_exist(page):
    import deq_jax.compat.jaxopt
    import deq_jax.nn  # noqa: F401

    for dotted in set(re.findall(r"`(?:deq|deq_jax)\.([A-Za-z_.]+)", page.read_text())):
        owner = deq
        for name in dotted.rstrip(".").split("."):
            owner = getattr(owner, name)


def the_recipe():
    """The backward solver that the page on migration gives in place of jaxopt's `custom_root`."""
    line = re.search(r"^gmres = (.*)$", (PAGES[0].parent / "migration.md").read_text(), re.M)
    return eval(line.group(1), {"deq": deq})


def matrix(cond, general, n=20):
    """With singular values from 1 to 1/cond, symmetric, or with eigenvalues all around zero."""
    rng = np.random.default_rng(0)
    q, r = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return q @ np.diag(np.logspace(0, -np.log10(cond), n)) @ (r if general else q.T)


@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("general", [False, True], ids=["symmetric", "general"])
@pytest.mark.parametrize(("cond", "error"), [(50, 2e-5), (500, 6e-5), (1e4, 1e-3)])
def test_the_recipe_for_roots_is_as_accurate_as_the_page_says(cond, error, general, nonlinear):
    A = matrix(cond, general)
    cubic = 1 / cond if nonlinear else 0.0
    z, z_bar = np.linspace(-1, 1, len(A)), np.cos(np.arange(len(A)))
    F = lambda z, theta: jnp.asarray(A, jnp.float32) @ z + cubic * z**3 - theta

    # The root is known, as from a solver of one's own.
    @deq.adapters.implicit(lambda z, theta: z - F(z, theta), adjoint=deq.Implicit(the_recipe()))
    def solve(z0, theta):
        return jnp.asarray(z, jnp.float32)

    loss = lambda theta, probe: jnp.vdot(jnp.asarray(z_bar, jnp.float32), solve(None, theta, probe=probe))
    theta = jnp.asarray(A @ z + cubic * z**3, jnp.float32)
    got, backward = jax.jit(jax.grad(loss, argnums=(0, 1)))(theta, deq.Probe.zeros())
    want = np.linalg.solve((A + np.diag(3 * cubic * z**2)).T, z_bar)
    assert np.linalg.norm(got - want) <= error * np.linalg.norm(want)
    assert backward.status == deq.Status.CONVERGED


def test_a_recipe_with_too_few_directions_says_that_it_failed():
    A = jnp.asarray(matrix(50, general=True, n=100), jnp.float32)
    f = lambda z, theta: z - (A @ z - theta)
    z = jnp.ones(100)
    loss = lambda probe: deq.attach(f, z, A @ z, adjoint=deq.Implicit(the_recipe()), probe=probe).sum()
    backward = jax.jit(jax.grad(loss))(deq.Probe.zeros())
    assert backward.status == deq.Status.MAX_STEPS and backward.residual > 1e-3


def test_the_kernels_of_notebook_04_are_those_of_the_table():
    rows = (ROOT / "experiments/benchmarks/results/kernels/results.md").read_text().splitlines()
    table = {tuple(cells[:3]): cells for row in rows if len(cells := row.strip("| ").split(" | ")) > 8}
    quoted = re.search(r"^kernels = (\{.*?^\})", (ROOT / "colabs/04_which_solver.py").read_text(), re.M | re.S)
    for call, (launched, moved) in eval(quoted[1]).items():
        solver = eval(call, vars(deq))
        size = {"Anderson": "history", "Broyden": "rank"}.get(name := type(solver).__name__)
        name += f"({getattr(solver, size)})" if size else ""
        assert launched == eval(table[name, "64 × 512", "forward"][3].partition(";")[0])
        assert moved == float(table[name, "4096 × 1024", "forward"][7].partition(";")[0])
