"""What the studies of the reviewers' questions share: presets by name, a budget, cells that are kept, files, errors.

A study is a frozen `Config`, presets of it, and three functions: `measure(config, cells) -> results`,
`table(results) -> Markdown` and `draw(results, path)`. Here is everything around them.
"""

import dataclasses
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments import renamed
from experiments.training import cli, lm
from experiments.training.checkpoints import config_changes, config_to_json
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

PATHS = {"run", "out"}  # fields of a Config that say where, not what


def run(
    module: str,
    presets: dict[str, tuple[str, Any]],
    measure: Callable[[Any, "Cells"], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None],
    args: Sequence[str] | None,
    *,
    description: str | None,
) -> None:
    """The command line `python -m experiments.MODULE PRESET [options]`; `figure` redraws what is committed.

    `module` is a room and a page in it, as in "paper.memory". A preset is its budget, which is printed first, and its
    `Config`.
    """
    room, _, name = module.rpartition(".")
    module, kept = f"experiments.{module}", Path("experiments", room, "results", name)
    args = list(sys.argv[1:] if args is None else args)
    words = [*presets, "figure"]
    if args and not args[0].startswith("-") and args[0] not in words:
        raise SystemExit(f"error: no preset {args[0]!r}; there are {', '.join(presets)}, and figure, which redraws")

    def figure(out: Path = kept) -> None:
        """Table and figure again, from the results that are kept."""
        present(read(out / "results.json"), out, table, draw)
        print(f"{out}/: table.md, figure.png", flush=True)

    def preset(label: str) -> Callable:
        budget, default = presets[label]

        def command(config: Any = default) -> None:
            print(f"{name} study, {label}. Budget: {budget}.", flush=True)
            told = command_line(module, args or [label])
            # Only the preset as it stands writes to the committed results; an option, or the full size, does not.
            whole = label == "reduced" and identity(config) == identity(default)
            out = config.out or (kept if whole else config.run / "results")
            with Cells(config.run / "cells.jsonl", identity(config)) as cells:
                results = {"command": told, "preset": label, "config": identity(config), **environment()}
                results |= measure(config, cells)
                results["seconds"] = cells.seconds
                results["cpu_seconds"] = cells.cpu_seconds
            write(results, out, table, draw)

        command.__annotations__["config"] = Annotated[type(default), tyro.conf.arg(name="")]
        command.__doc__ = type(default).__doc__
        return command

    commands = {label: preset(label) for label in presets} | {"figure": figure}
    cli.run_command(commands, args, prog=f"python -m {module}", description=description, default="reduced")


def identity(config: Any) -> dict[str, Any]:
    """A configuration in JSON, without its paths and without language-model options at `lm.ADDED`'s values."""

    def stripped(value):
        if not isinstance(value, dict):
            return value
        return {name: stripped(v) for name, v in lm.without_added(value).items() if name not in PATHS}

    return stripped(config_to_json(config))


def command_line(module: str, args: Sequence[str]) -> str:
    return f"python -m {module} {shlex.join(args)}".strip()


def read(path: Path) -> dict[str, Any]:
    """Results, or a run's summary, with the present name of the command that made them."""
    results = json.loads(path.read_text())
    return results | {"command": renamed(results["command"])} if "command" in results else results


def write(results: dict[str, Any], out: Path, table: Callable, draw: Callable) -> None:
    """results.json, table.md and figure.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.json", (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    present(results, out, table, draw)
    print(f"{out}/: results.json, table.md, figure.png", flush=True)


def present(results: dict[str, Any], out: Path, table: Callable, draw: Callable) -> None:
    """table.md and figure.png."""
    write_atomically(out / "table.md", (table(results).strip() + "\n").encode())
    draw(results, out / "figure.png")


class Cells:
    """What a study has measured, a line of JSON a cell, so that a study that was cut continues.

    `cells(name, measure)` is the kept value of that cell, or else that of `measure()`, kept from now on. A file
    of another configuration is refused, naming what differs. Numbers that JSON cannot hold become None.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self._path, self._config = path, config
        self._kept: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Cells":
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may have cut the last one short
        first, *rest = [json.loads(line) for line in whole] or [{"config": self._config}]
        if changes := config_changes(first["config"], json.loads(json.dumps(self._config))):
            told = ", ".join(f"{name}: {change}" for name, change in changes.items())
            raise ValueError(f"{self._path} holds cells of another configuration ({told}): give another --run")
        self._kept = {line["cell"]: line for line in rest}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not whole or len(whole) < len(lines):
            head = json.dumps({"config": self._config}).encode() + b"\n"
            write_atomically(self._path, b"".join(whole) or head)
        self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self._kept:
            clocks = time.perf_counter(), time.process_time()
            value = plain(measure())
            spent = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
            line = {"cell": name, "seconds": round(spent[0], 2), "cpu_seconds": round(spent[1], 2), "value": value}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._kept[name] = line
            print(f"  {name} ({spent[0]:.1f} s)", flush=True)
        return self._kept[name]["value"]

    @property
    def seconds(self) -> float:
        return round(sum(line["seconds"] for line in self._kept.values()), 1)

    @property
    def cpu_seconds(self) -> float:
        return round(sum(line["cpu_seconds"] for line in self._kept.values()), 1)


def plain(value: Any) -> Any:
    """JSON values of a tree of arrays: six digits, and None for what is not finite."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.generic() | np.ndarray() | jax.Array():
            return plain(np.asarray(value).tolist())
    raise TypeError(f"cannot keep a {type(value).__name__} in JSON")


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """As an array of floats; what was not finite is NaN again."""
    return np.array([math.nan if v is None else v for v in values], float)


def published(panel: str, series: str) -> np.ndarray:
    """A curve of the paper's figures as [points, 2], from the digitized ones that are committed."""
    lines = Path(__file__).with_name("published.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if line and not line.startswith("#")]
    found = [(float(x), float(y)) for p, s, x, y in rows[1:] if (p, s) == (panel, series)]
    if not found:
        raise ValueError(f"no curve {panel}, {series}: there are {sorted({(p, s) for p, s, *_ in rows[1:]})}")
    return np.array(found)


def paragraph(*sentences: str) -> list[str]:
    """Lines of text for a table.md, and the empty one that ends them."""
    return [*textwrap.wrap(" ".join(sentences), 118, break_on_hyphens=False), ""]


def conditions(results: dict[str, Any], **more: Any) -> str:
    """One line: machine, versions and what else decides a number."""
    machine, versions = results["machine"], results["versions"]
    told = [shared_cores(machine) if machine["devices"][0] == "cpu" else machine["devices"][0]]
    told += [f"jax {versions['jax']}", *(f"{name.replace('_', ' ')} {value}" for name, value in more.items())]
    return "; ".join(told)


def shared_cores(machine: dict[str, Any]) -> str:
    """What the CPU is called in a table or under a figure.

    >>> shared_cores({"cores": 1}), shared_cores({"cores": 2})
    ('1 shared CPU core', '2 shared CPU cores')
    """
    return f"{machine['cores']} shared CPU core{'s' * (machine['cores'] != 1)}"


def replace_model(config: Any, **changes: Any) -> Any:
    """The configuration with other fields in its language model's."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
