"""The pages under docs/ are programs: their python blocks run, in order, as one."""

import pathlib
import re

import pytest

PAGES = sorted((pathlib.Path(__file__).parent.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks, f"{page.name} has no block of python"
    namespace = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_prose_and_tables_exist(page):
    import deq_jax as deq
    import deq_jax.nn  # noqa: F401

    for dotted in set(re.findall(r"`(?:deq|deq_jax)\.([A-Za-z_.]+)", page.read_text())):
        owner = deq
        for name in dotted.rstrip(".").split("."):
            owner = getattr(owner, name)
