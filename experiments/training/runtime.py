"""How a run is executed: its processes, the cache of compiled programs, a trace. Nothing of it changes a number."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.training import cli, processes


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Options that are not stored with a run."""

    coordinator: str = ""  # auto, or HOST:PORT,COUNT,INDEX of several processes; see experiments.training.processes
    compilation_cache: Path | None = None  # a folder that keeps compiled programs for the next start
    token_cache: Path | None = None  # a folder for the tokens of corpora, which are then mapped and not read
    profile: int = 0  # so many steps after the warm-up are traced to RUN/profile, for TensorBoard or Perfetto

    def __post_init__(self):
        cli.require(self.profile >= 0, "profile", "at least 0", self.profile)
        for name in ("compilation_cache", "token_cache"):
            path = getattr(self, name)
            cli.require(not (path and path.is_file()), name, "a folder", path)


@contextlib.contextmanager
def started(runtime: Runtime) -> Iterator[None]:
    """With its processes joined and its cache in use, before anything is computed."""
    if runtime.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(runtime.compilation_cache.absolute()))
    with processes.joined(runtime.coordinator):
        yield


@contextlib.contextmanager
def tracing(folder: Path, first: int, steps: int) -> Iterator[Callable[[int, Any], None]]:
    """`at(step, state)` before each step: so many of them, from the first on, are traced."""
    with contextlib.ExitStack() as trace:

        def at(step: int, state: Any) -> None:
            if steps and step == first:
                jax.block_until_ready(state)
                trace.enter_context(jax.profiler.trace(str(folder), create_perfetto_trace=True))
            elif step == first + steps:
                jax.block_until_ready(state)
                trace.close()

        yield at
