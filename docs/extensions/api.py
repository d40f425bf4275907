"""What autodoc lacks for this library: fields with the comments beside them, and the derivation that opens a module."""

import ast
import enum
import importlib
import inspect
import re
import sys
import textwrap

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


def fields(cls: type) -> list[str]:
    """A reStructuredText list of the fields of a class, or of the members of an enum, with the comment beside each."""
    source = inspect.getsource(sys.modules[cls.__module__])  # a class that is made anew has no lines of its own
    (own,) = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    lines, items = source.splitlines(), []
    for node in own.body:
        is_field = isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Assign) and issubclass(cls, enum.Enum))
        text = ast.unparse(node) if is_field else "_"
        if not text.startswith("_"):
            comment = re.search(r"  # (?!pyright)(.*)$", lines[node.end_lineno - 1])
            if comment or not hasattr(cls, "__dataclass_fields__"):  # else the signature says it all
                items.append(f"* ``{text}``" + (f": {escaped(comment[1])}" if comment else ""))
    title = "Members" if issubclass(cls, enum.Enum) else "Fields"
    return ["", f".. rubric:: {title}", "", *items, ""] if items else []


def add_fields(app, what, name, obj, options, lines):
    if what == "class" and (issubclass(obj, tuple | enum.Enum) or hasattr(obj, "__dataclass_fields__")):
        end = next((i for i, line in enumerate(lines) if line.startswith(">>>")), len(lines))
        lines[end:end] = fields(obj)


PLAIN = {r"jaxlib\._jax\.": ""} | {
    r"Annotated\[float, '[^']*'\]": "float | PyTree",
    r"Annotated\[int, '[^']*'\]": "int | Array",
}


def plain_signature(app, what, name, obj, options, signature, returns):
    """Without the notes of annotations, and without a result of any type: the docstring says what it is."""
    if what == "class" and signature == "(*args: Any, **kwargs: Any)":  # that of Flax's metaclass
        init = ast.parse(textwrap.dedent(inspect.getsource(obj.__init__))).body[0]
        init.args.args.pop(0)  # self
        signature = f"({ast.unparse(init.args)})"
    for pattern, text in PLAIN.items():
        signature, returns = signature and re.sub(pattern, text, signature), returns and re.sub(pattern, text, returns)
    return signature, None if returns == "Any" else returns


def from_markdown(app, what, name, obj, options, lines):
    """Docstrings are Markdown: an indented block after a colon is code, and a star is a star."""
    if lines[:1] == ["Call self as a function."]:  # Python's own, of a method without a docstring
        lines.clear()
    if what in ("attribute", "property"):
        lines.insert(0, "")  # else napoleon takes the words before a colon for a type
    code = None  # the indentation above the block of code that we are in
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent <= code:
            code = None
        below = next((text for text in lines[i + 2 : i + 3] if lines[i + 1] == ""), "")
        if code is None and line.endswith(":") and len(below) - len(below.lstrip()) > indent:
            code, lines[i] = indent, escaped(line) + ":"
        elif code is None and not re.match(r"\s*(>>>|\.\.\. )", line):
            lines[i] = escaped(line)


def escaped(line: str) -> str:
    """A line in which a star or a bar outside of `code` is that character and no markup."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*|])(?=\S)", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def without_overloads(analyze):
    """One signature a function: that of its implementation, which names the options."""

    def analyze_once(self):
        analyze(self)
        self.overloads = {}

    return analyze_once


def mend(app, pagename, templatename, context, doctree):
    """Links from a module's source to names that are documented below their module, and JAX's name of its arrays."""
    if pagename.startswith("reference/"):
        context["body"] = context["body"].replace("jaxlib._jax.Array", "Array")
    if pagename.startswith("_modules/"):
        known = app.env.domains.python_domain.objects
        full = lambda name: (
            name if name in known else next((n for n in known if n.endswith(name[len("deq_jax") :])), name)
        )
        context["body"] = re.sub(r"(?<=\.html#)deq_jax\.[\w.]+", lambda match: full(match[0]), context["body"])


class Derivation(SphinxDirective):
    """`.. derivation:: module` shows the docstring of a module, with its equations as they stand there."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = inspect.cleandoc(importlib.import_module(self.arguments[0]).__doc__ or "")
        parts = []
        for part in text.split("\n\n"):
            is_equation = part.startswith(" ")
            parts.append("::\n\n" + textwrap.indent(textwrap.dedent(part), "   ") if is_equation else escaped(part))
        parts.append(f"Source: :py:mod:`!{self.arguments[0]}`")
        return self.parse_text_to_nodes("\n\n".join(parts))


def setup(app):
    app.add_directive("derivation", Derivation)
    ModuleAnalyzer.analyze = without_overloads(ModuleAnalyzer.analyze)
    app.connect("html-page-context", mend)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", add_fields, priority=600)  # and after it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
