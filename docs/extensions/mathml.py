"""Mathematics as MathML, which browsers draw without a script or a font from elsewhere."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def inline(translator, node):
    draw(translator, node, False)


def display(translator, node):
    draw(translator, node, True)


def draw(translator, node, as_block):
    try:
        text = tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("%s in %r", error, node.astext(), location=node)
        text = ""
    translator.body.append(f'<div class="math">{text}</div>' if as_block else text)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
