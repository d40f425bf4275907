"""`{gallery}`: every figure under experiments/, with the command that makes it. `{commands}`: every command there.

Nothing is listed by hand. The caption is the text that a Markdown page of the repository gives the figure, else the
title of the table beside it; the command is the first one that a file beside it names.
"""

import ast
import os
import pathlib
import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from experiments import renamed

ROOT = pathlib.Path(__file__).parents[2]
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)#?:]+\.png)\)")
COMMAND = re.compile(r"python -m experiments[\w.]*(?: (?:--[\w-]+ )?[\w.]+)*")


def captions() -> dict[pathlib.Path, str]:
    """The text of each figure that a page of the repository shows."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
    found = {}
    for page in pages:
        for text, target in IMAGE.findall(page.read_text()):
            found[(page.parent / target).resolve()] = text
    return found


def figures() -> list[tuple[pathlib.Path, str, str]]:
    """(path, caption, command) of each figure."""
    known, found = captions(), []
    for path in sorted((ROOT / "experiments").rglob("*.png")):
        beside = [file.read_text() for ext in ("*.md", "*.json") for file in sorted(path.parent.glob(ext))]
        commands = [match[0] for match in map(COMMAND.search, beside) if match]
        titles = re.findall(r"^# (.*)$", "\n".join(beside), re.M) or [path.parent.name]
        caption = known.get(path.resolve(), titles[-1])
        if not commands:
            raise ValueError(f"{path.relative_to(ROOT)}: no file beside it names the command that makes it")
        found.append((path, caption[0].upper() + caption[1:], renamed(commands[0])))
    return found


class Gallery(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        here = pathlib.Path(self.env.doc2path(self.env.docname)).parent
        text = []
        for path, caption, command in figures():
            text += [f"## {caption}", f"![{caption}]({os.path.relpath(path, here)})", f"```sh\n{command}\n```"]
        return self.parse_text_to_nodes("\n\n".join(text), allow_section_headings=True)


def commands() -> list[tuple[str, str]]:
    """(command, what it does) of each program under experiments/."""
    found = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        text, parts = path.read_text(), path.relative_to(ROOT).with_suffix("").parts
        if path.name == "__main__.py" or '__name__ == "__main__"' in text:
            name = ".".join(part for part in parts if part != "__main__")
            told = (
                path
                if path.name != "__main__.py" or ast.get_docstring(ast.parse(text))
                else path.parent / "__init__.py"
            )
            summary = (ast.get_docstring(ast.parse(told.read_text())) or "").split("\n\n")[0].replace("\n", " ")
            found.append((f"python -m {name}", summary))
    return found


class Commands(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        lines = [f"| `{command}` | {summary.replace('|', chr(92) + '|')} |" for command, summary in commands()]
        return self.parse_text_to_nodes("\n".join(["| command | what it does |", "|---|---|", *lines]))


def setup(app):
    app.add_directive("commands", Commands)
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
