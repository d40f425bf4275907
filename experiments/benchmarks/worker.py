"""One contender's process: commands as JSON lines on standard input, an answer a line on standard output.

It builds one contender on one problem at a time, counts its evaluations truly, times it when asked, and leaves what
it computed in a file, for the referee to judge.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from experiments.shared import problems


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what a library prints must not reach the pipe
    os.dup2(2, 1)
    commands: dict[str, Callable] = {}
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name == "start":
                commands = start(**command)
                answer: Any = {}
            else:
                answer = commands[name](**command)
        except Exception as error:  # whatever a peer raises is a result, and the pipe goes on
            message = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {message[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


def start(kind: str, sizes: str) -> dict[str, Callable]:
    """The commands of this process; imports no more than its kind needs."""
    table = problems.TABLES[sizes]
    if kind == "torch":
        from experiments.benchmarks.torch_side import commands
    elif kind == "referee":
        from experiments.benchmarks.judge import commands
    else:
        from experiments.benchmarks.jax_side import commands
    return commands(table)


if __name__ == "__main__":
    main()
