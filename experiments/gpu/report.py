"""The page of a card, from its rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.benchmarks.workers import good
from experiments.gpu import kept


def write(results: Path) -> None:
    """`CARD.md` beside `CARD.json`."""
    kept_rows = kept.read(results)
    results.with_suffix(".md").write_text("\n".join(page(kept_rows)) + "\n")


def page(results: dict[str, Any]) -> Iterable[str]:
    parts = results["parts"]
    yield f"# {results['card']}"
    yield ""
    yield "Made by `make gpu`; every row is the least of its calls, and the file of the same name has the medians too."
    if any(part["stamp"]["tiny"] for part in parts.values()):
        yield "**Tiny sizes: a trial of the script, whose numbers mean nothing.**"
    for name, part in parts.items():
        machine = part["machine"]
        state = "done" if part["done"] else part.get("error", "not finished")
        about = "; ".join(f"{fact.replace('_', ' ')}: {value}" for fact, value in part["about"].items())
        yield f"\n## {name}\n"
        yield f"{state}; {part['seconds']:.0f} s; jax {machine['jax']}, commit {machine['commit']}. {about}.\n"
        yield from TABLES.get(name, plain_rows)(part["rows"])


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterable[str]:
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def number(row: dict[str, Any], key: str, scale: float = 1.0) -> str:
    value = row.get(key)
    return "" if value is None else f"{value * scale:.3g}" if abs(value * scale) < 1000 else f"{value * scale:.0f}"


def split_errors(rows: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    sound = {name: row for name, row in rows.items() if "error" not in row}
    return sound, {name: row["error"] for name, row in rows.items() if "error" in row}


def errors(found: dict[str, str]) -> Iterable[str]:
    if found:
        yield ""
        yield from (f"- {name}: {error}" for name, error in found.items())


def steps(rows: dict[str, Any]) -> Iterable[str]:
    """Microseconds, a line a solver and a column a size, as it is compiled and with command buffers."""
    sound, wrong = split_errors(rows)
    if copy := sound.pop("copy", None):
        yield f"Copy: {copy['gb_per_s']:.0f} GB/s, read and written. Microseconds a step, plain / command buffers:\n"
    split = {name: (name.partition(" ")[0], *name.partition(" ")[2].rsplit(", ", 1)) for name in sound}
    sizes = list(dict.fromkeys(size for size, *_ in split.values()))
    at = {key: number(sound[name], "us") for name, key in split.items()}
    cell = lambda size, solver: " / ".join(at.get((size, solver, way), "–") for way in ("plain", "command buffers"))
    solvers = list(dict.fromkeys(solver for _, solver, _ in split.values()))
    yield from markdown(["", *sizes], ([solver, *(cell(size, solver) for size in sizes)] for solver in solvers))
    yield from errors(wrong)


def peers(rows: dict[str, Any]) -> Iterable[str]:
    """Milliseconds of the contenders that are accurate enough, the fastest training step of each problem first."""
    sound, wrong = split_errors(rows)
    limits = {name: row for name, row in sound.items() if name.endswith(" limit")}
    sound = {name: row for name, row in sound.items() if name not in limits}
    ms = lambda row, what: number(row[what], "ms")
    order = sorted(sound, key=lambda name: (name[:2], not good(sound[name]), sound[name]["step"]["ms"]))
    yield from markdown(
        ["", "forward ms", "forward + backward ms", "temporaries MB", "residual", "gradient error"],
        (
            [
                name + ("" if good(row) else " ✗"), ms(row, "forward"), ms(row, "step"),
                number(row["step"], "temp_bytes", 1e-6), f"{row['residual']:.0e}", f"{row['gradient_error']:.0e}",
            ]
            for name, row in ((name, sound[name]) for name in order)
        ),
    )  # fmt: skip
    yield "\nOnly rows without a mark are compared: the others miss the accuracy. Milliseconds of one evaluation in a"
    yield "bare loop, of one product with the Jacobian, and of the parameters' pullback:\n"
    parts = ("t_f", "t_vjp", "t_params")
    yield from markdown(["", "f", "Jᵀv", "pullback"], ([n[:2], *(ms(r, p) for p in parts)] for n, r in limits.items()))
    yield from errors(wrong)


def paper(rows: dict[str, Any]) -> Iterable[str]:
    sound, wrong = split_errors(rows)
    kinds = [name for name in sound if ", " in name]
    base = {name.partition(",")[0]: sound[name]["ms"] for name in kinds if name.endswith("own layers")}

    def line(name: str) -> list[str]:
        row, kind = sound[name], name.partition(",")[0]
        ratio = f"{row['ms'] / base[kind]:.2f}" if kind in base else ""
        solver = [number(row, which) for which in ("fwd_steps", "bwd_steps")]
        return [name, number(row, "ms"), ratio, number(row, "temp_bytes", 1e-9), *solver]

    head = ["", "ms", "over own layers", "temporaries GB", "evaluations", "products"]
    yield from markdown(head, map(line, kinds))
    yield from errors(wrong)


def core_tests(rows: dict[str, Any]) -> Iterable[str]:
    sound, wrong = split_errors(rows)
    counts = ("passed", "failed", "skipped")
    yield from markdown(["", *counts], ([name, *(str(row[c]) for c in counts)] for name, row in sound.items()))
    yield from errors(wrong | {n: "failed: " + ", ".join(r["failures"]) for n, r in sound.items() if r["failures"]})


def plain_rows(rows: dict[str, Any]) -> Iterable[str]:
    yield from (f"- {name}: {kept.describe(row)}" for name, row in rows.items())


TABLES = {"steps": steps, "peers_large": peers, "peers": peers, "paper": paper, "core_tests": core_tests}
