"""Tables and verdicts of the study of gains."""

from typing import Any

from experiments.shared import plots
from experiments.shared.study import conditions, paragraph

RATIOS = (1.0, 0.1, 0.01)  # backward over forward tolerance
EVERY = (2, 4, 8)
PAYS = 0.1  # of what an idea is to save, on every problem
PASSES = 7  # over a state: ‖f(z)‖ reads one, keeping the best z and freezing what stopped three each


def markdown(results: dict[str, Any]) -> str:
    problems = results["problems"]
    some = next(iter(problems.values()))
    mark = lambda row, field="evaluations", of="": f"{row[field]}" + "*" * (not row[of + "converged"])
    mixed = lambda row: f" ({row['mixed']})" if "mixed" in row else ""
    gradient = lambda row: (mark(row, "products"), f"{row['gradient_error']:.2e}")
    each = lambda row: [(name, *row(found)) for name, found in problems.items()]
    tables = {
        "1. The backward solve started from forward Broyden's memory": (
            ["problem", "backward", "f", "Jᵀv", "gradient error", "temporaries, MB"],
            [
                (name, mode, row["evaluations"], *gradient(row), f"{row['temporaries'] / 1e6:.2f}")
                for name, found in problems.items()
                for mode, row in found["start"].items()
            ],
        ),
        "2. Backward tolerance over forward tolerance: products, gradient error": (
            ["problem", *(f"× {ratio:g}" for ratio in RATIOS)],
            each(lambda found: (", ".join(gradient(row)) for row in found["ratio"].values())),
        ),
        "3. Mixing where Picard is slower than a threshold: evaluations (those that paid for a mix)": (
            ["problem", *some["adaptive"], "bytes of an update over f's"],
            each(lambda found: (
                *(mark(row) + mixed(row) for row in found["adaptive"].values()),
                f"{found['bytes']['update'] / found['bytes']['f']:.2f}",
            )),
        ),
        "4. bfloat16 to a residual, then float32 from its z (and memory): evaluations of each": (
            ["problem", "float32 alone", *some["bfloat16"]],
            each(lambda found: (
                mark(found["adaptive"]["Anderson(8)"]),
                *(mark(row, "low", "low_") + " + " + mark(row) for row in found["bfloat16"].values()),
            )),
        ),
        "5. A test every k evaluations: what is wasted; the share of an evaluation at which a test breaks even": (
            ["problem", "f + Jᵀv", *(f"k = {k}" for k in EVERY), "share of a test, at most"],
            each(lambda found: (
                "{} + {}".format(*evaluations(found)),
                *("{}; {:.1%}".format(*waste(evaluations(found), k)) for k in EVERY),
                f"{test_share(found):.1%}",
            )),
        ),
        "6. Anderson(m) in float32 and in float64 around the same f: evaluations; tight is a tenth of the tolerance": (
            ["problem", *(f"m = {m}" for m in some["projection"])],
            each(lambda found: (f"{mark(row)}, {row['float64']}" for row in found["projection"].values())),
        ),
    }  # fmt: skip
    lines = ["# Solver-level ideas, measured", "", f"    {results['command']}", ""]
    lines += paragraph(
        conditions(results, forward_rtol=results["rtol"]) + ". float32; errors are against a float64 solution.",
        "Counts are those of the slowest problem in the batch, which is how long the loop runs; * marks a solve that",
        "did not converge. Nothing is timed. Bytes are those that XLA counts as accessed in the program for the CPU;",
        f"a test of convergence touches the state at most {PASSES} times.",
    )
    for title, (head, rows) in tables.items():
        lines += [f"## {title}", "", *plots.markdown_table(head, rows)]
    return "\n".join(lines + ["## Verdicts", "", *verdicts(problems)]) + "\n"


def evaluations(found: dict[str, Any]) -> tuple[int, int]:
    return found["ratio"]["0.01"]["evaluations"], found["ratio"]["0.01"]["products"]


def waste(counts: tuple[int, int], every: int) -> tuple[int, float]:
    """Evaluations that a test every so many wastes; the share of an evaluation that a test must cost to break even."""
    extra = sum(-(-n // every) * every - n for n in counts)
    spared = sum(n - -(-n // every) for n in counts)
    return extra, extra / spared if spared else 0.0


def test_share(found: dict[str, Any]) -> float:
    return PASSES * found["bytes"]["state"] / found["bytes"]["evaluation"]


def verdicts(problems: dict[str, Any]) -> list[str]:
    """A sentence an idea: kept if it saves at least `PAYS` on every problem and costs nothing that counts."""
    over = lambda values, form=".0%": f"{min(values):{form}} to {max(values):{form}}"
    kept = lambda yes: "**kept**" if yes else "**not kept**"
    every = lambda value: [value(found) for found in problems.values()]
    ratios = lambda part, a, b, field: every(lambda found: found[part][a][field] / found[part][b][field])
    saved = lambda part, a, b, field="products": [1 - r for r in ratios(part, a, b, field)]

    warm = saved("start", "from −Bᵀz̄", "from z̄")
    shine = ratios("start", "Shine(5)", "from z̄, 7 products", "gradient_error")
    tenth, same = saved("ratio", "0.1", "0.01"), saved("ratio", "1", "0.01")
    worse = [max(ratios("ratio", r, "0.01", "gradient_error")) for r in ("0.1", "1")]
    solves = every(lambda found: found["adaptive"] | {"bfloat16": found["bfloat16"]["0.03, z"]})
    alone = [row["Anderson(8)"]["evaluations"] for row in solves]
    unmixed = [1 - row["adaptive, 0.5"]["mixed"] / row["adaptive, 0.5"]["evaluations"] for row in solves]
    more = max(row["adaptive, 0.5"]["evaluations"] - n for row, n in zip(solves, alone, strict=True))
    fewer = [n - row["bfloat16"]["evaluations"] for row, n in zip(solves, alone, strict=True)]
    price = min(k / row["bfloat16"]["low"] for row, k in zip(solves, fewer, strict=True))
    # Two solves, of n evaluations together, waste (k − 1) / 2 each on average and spare all but n / k of their tests.
    net = lambda found, k: (1 - 1 / k) * test_share(found) - (k - 1) / sum(evaluations(found))
    best = every(lambda found: max(net(found, k) for k in EVERY))
    projected = [row for found in problems.values() for row in found["projection"].values()]
    digits = [1 - row["float64"] / row["evaluations"] for row in projected]
    said = [
        f"The backward solve started from the forward's memory: {kept(min(warm) >= PAYS)}. It saves {over(warm)} of "
        "the products, and keeps Broyden's history alive. Shine(5)'s gradient error is "
        f"{over(shine, '.2f')} times that of Anderson from z̄ after the same seven products.",
        f"A backward tolerance of a tenth of the forward one: {kept(min(tenth) >= PAYS and worse[0] <= 1.1)} as a "
        f"setting. It saves {over(tenth)} of the products of a hundredth, for at most {worse[0]:.2f} times the "
        f"gradient error (the forward tolerance itself: {over(same)}, {worse[1]:.2f}). Training decides the default.",
        f"Mixing only where Picard is slower than 0.5: {kept(min(unmixed) >= PAYS and more <= 0)}. {over(unmixed)} of "
        f"the evaluations need no mix and at most {more} are added; where many need none, `Picard()` is the solver.",
        "bfloat16 to a residual of 0.03: **not kept**; docs/performance.md says what it came to on a CPU. It spares "
        f"{over([k / n for k, n in zip(fewer, alone, strict=True)])} of the float32 evaluations, and would pay "
        f"wherever f in bfloat16 costs less than {price:.2f} of f in float32.",
        f"A test every k evaluations: {kept(min(best) >= PAYS)}. At the best k it gains {over(best, '+.1%')} of a "
        "step's traffic; launches and waits, which it would spare on an accelerator, are not measured here.",
        "Anderson by QR: **not kept**. With the whole projection in float64, which no orthogonalization in float32 can "
        f"better, a solve takes {over(digits)} fewer evaluations, and QR reads and writes the history more "
        "often than the Gram matrix does.",
    ]
    return [f"{i}. {sentence}" for i, sentence in enumerate(said, 1)]
