"""How Sphinx builds the site: `make docs`."""

import importlib.util
import logging
import os
import pathlib
import sys

from sphinx.errors import ConfigError

NEEDED = "myst_nb", "nbclient", "furo", "sphinx_copybutton", "latex2mathml", "flax", "optax", "equinox", "haiku"
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    raise ConfigError(f"missing here: {', '.join(missing)}. In the checkout: pip install -e '.[docs]', or make docs")

from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]  # the checkout, and the extensions beside this file

import deq_jax

project = "deq_jax"
author = "the authors of deq_jax"
copyright = "the authors of deq_jax, Apache-2.0"
version = release = deq_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api",
    "gallery",
    "mathml",
    "notebooks",
]
exclude_patterns = ["_build", "extensions"]
default_role = "py:obj"  # docstrings are Markdown in this: `name` is code, and a link where the name is documented

# Pages are Markdown. Their ```python blocks are the cells of a notebook: see extensions/programs.py.
nb_custom_formats = {".md": "programs.read"}
nb_execution_mode = "auto"  # every page with code, whose outputs are nowhere kept
nb_execution_excludepatterns = ["notebooks/*.ipynb"]  # these keep theirs
nb_execution_show_tb = True  # in the warning, with the cell
nb_execution_timeout = 300
nb_output_stderr = "warn"  # and a warning is an error
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "image/gif", 25)]  # before PNG and text, as an animation has both
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A kernel warns that it listens on a socket of this machine, once a page.
NotebookClient.extra_arguments.default_args = (["--IPKernelApp.log_level=ERROR"],)
logging.getLogger("traitlets").setLevel(logging.WARNING)

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "deq_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_last_updated_fmt = None
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
