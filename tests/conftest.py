"""Shared fixtures. Four CPU devices are set up here, before anything starts JAX's backend."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import pathlib
from collections.abc import Callable

import jax
import pytest


@pytest.fixture
def x64():
    """float64 for one test."""
    # Through jax.config, the one spelling that jax 0.7 to 0.12 share.
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def rng() -> jax.Array:
    """A PRNG key, the same for every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets that DEQ_JAX_DATA names; without it the test is skipped."""
    folder = os.environ.get("DEQ_JAX_DATA")
    if not folder:
        pytest.skip("needs real data: set DEQ_JAX_DATA to its folder")
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"DEQ_JAX_DATA is {folder!r}, which is not a folder")
    return pathlib.Path(folder)


class Counted:
    """f, with the number of times it ran (in compiled loops too) and was traced.

    `calls` is None unless asked for: counting needs a host callback in the program, which some transforms
    refuse, and which runs once for each entry of a batch under vmap.
    """

    def __init__(self, f: Callable, runs: bool):
        self.f, self.runs, self.traces, self._calls = f, runs, 0, 0

    def __call__(self, *args, **kwargs):
        self.traces += 1
        if self.runs:
            jax.debug.callback(self._tick)
        return self.f(*args, **kwargs)

    def _tick(self):
        self._calls += 1

    @property
    def calls(self) -> int | None:
        jax.effects_barrier()  # callbacks arrive late otherwise
        return self._calls if self.runs else None


@pytest.fixture
def count_calls() -> Callable[[Callable], Counted]:
    """`f = count_calls(f)`: afterwards `f.calls` says how often f was evaluated."""
    return lambda f: Counted(f, runs=True)


@pytest.fixture
def count_traces() -> Callable[[Callable], Counted]:
    """`f = count_traces(f)`: `f.traces` says how often f's Python ran; its program is untouched."""
    return lambda f: Counted(f, runs=False)
