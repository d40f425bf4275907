"""What every figure and table shares: colors, style, titles that wrap, tables in Markdown, logs of training."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: F401 - pages draw with plots.plt, which has no window

# One color a solver, and one a gradient, in every figure (Okabe and Ito's, which color-blind readers tell apart).
COLORS: dict[str, str] = {
    "Picard": "#E69F00",
    "Anderson": "#0072B2",
    "Broyden": "#009E73",
    "NewtonKrylov": "#CC79A7",
    "Robust": "#56B4E9",
    "implicit": "#0072B2",
    "unrolled": "#D55E00",
}
ADJOINT_COLORS = {
    "Implicit": COLORS["implicit"],
    "Shine(0)": "#56B4E9",
    "Shine(5)": "#009E73",
    "Phantom(5, 0.8)": "#CC79A7",
    "Neumann(5)": "#E69F00",
    "JFB": "0.4",
    "Unroll": COLORS["unrolled"],
    "Reversible": "#B8A800",
}
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(title: str) -> str:
    return "\n".join(textwrap.wrap(title[0].upper() + title[1:], 52))


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table in Markdown, and the empty one that ends it."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]
