"""What training a language model prints: a line of the log in words, a live bar on a terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.training import corpora


def per_unit(loss: float, level: corpora.Level) -> tuple[str, float]:
    """A loss in nats as its field reports it: bits per character, or the perplexity of words."""
    return ("bits/char", loss / math.log(2)) if level == "char" else ("perplexity", math.exp(min(loss, 50.0)))


def describe(line: dict[str, Any], level: corpora.Level) -> str:
    """One line of the log in words; what was not measured is left out."""
    name, value = per_unit(line["loss"], level)
    words = [f"loss {line['loss']:.3f}", f"{value:.3g} {name}" if value < 1000 else f"{value:,.0f} {name}"]
    if "fwd_steps" in line:
        words.append(f"fwd {line['fwd_steps']:.1f} steps to {line['fwd_residual']:.0e}")
        words.append(f"{100 * line['converged']:.0f}% converged")
    else:
        words.append("unrolled")  # the warm-up, or a network of layers: there is no solver to report
    if line.get("bwd_steps"):
        reached = f" to {line['bwd_residual']:.0e}" if math.isfinite(line["bwd_residual"]) else ""
        words.append(f"bwd {line['bwd_steps']:.1f} steps{reached}")
    words.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if "valid_loss" in line:
        words.append(f"validation {line['valid_loss']:.3f}")
    if line["skipped"]:
        words.append(f"{line['skipped']} steps skipped")
    return ", ".join(words)


@contextlib.contextmanager
def reporting(title: str, start: int, total: int, level: corpora.Level) -> Iterator[Callable[[dict], None]]:
    """`report(line)` for each line of the log: a live bar on a terminal, otherwise a line of text each."""
    if sys.stdout.isatty():
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
        )
        task = bar.add_task(title, total=total, completed=start, eta="?")
        with Live(bar, refresh_per_second=4) as live:
            eta = _remaining(start, total)

            def report(line):
                bar.update(task, completed=line["step"], eta=eta(line["step"]))
                live.update(Group(bar, Text(describe(line, level))))

            yield report
    else:
        eta = _remaining(start, total)

        def report(line):
            step = line["step"]
            print(f"{title} {step}/{total}: {describe(line, level)}, ETA {eta(step)}", flush=True)

        yield report


def _remaining(start: int, total: int) -> Callable[[int], str]:
    then, before = time.monotonic(), start

    def eta(step: int) -> str:
        # From the last line's pace alone: a step at the equilibrium costs several of the warm-up's.
        nonlocal then, before
        now = time.monotonic()
        seconds = (now - then) / max(step - before, 1) * (total - step)
        then, before = now, step
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    return eta
