"""The notebooks of colabs/ as pages: copied, with the outputs that they are committed with, into docs/notebooks.

Nothing runs here: tests/project/test_notebooks.py runs them. The badge, an image of another host, becomes a link.
"""

import pathlib
import re

from sphinx.application import Sphinx

COLABS = pathlib.Path(__file__).parents[2] / "colabs"
BADGE = re.compile(r"\[!\[([^\]]*)\]\([^)]*badge\.svg\)\]")


def copy(app: Sphinx) -> None:
    """Write the pages, and remove those whose notebook is gone."""
    pages = pathlib.Path(app.srcdir) / "notebooks"
    if not (pages / "index.md").exists():  # another site, with our configuration
        return
    for page in pages.glob("*.ipynb"):
        page.unlink()
    for path in sorted(COLABS.glob("*.ipynb")):
        (pages / path.name).write_text(BADGE.sub(r"[\1]", path.read_text()))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
