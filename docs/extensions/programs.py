"""Read a page of Markdown as a notebook: its ```python blocks are the cells, in order, of one program.

The same blocks read well on a page of a code host, and tests/project/test_docs.py runs them without Sphinx. MyST-NB
runs them here and shows what they print. A cell that fails is a warning with its page and its text, and so an error of
`make docs`.
"""

import re

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

BLOCK = re.compile(r"^```python\n(.*?)^```$\n?", re.M | re.S)


def read(text: str) -> nbformat.NotebookNode:
    """The notebook of a page."""
    cells = []
    for i, part in enumerate(BLOCK.split(text)):  # prose and code in turn
        if part.strip():
            cells.append(new_code_cell(part.rstrip()) if i % 2 else new_markdown_cell(part))
    for i, cell in enumerate(cells):
        cell["id"] = str(i)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=kernel | {"language_info": {"name": "python"}})
