"""Shared fixtures. Eight CPU devices are set up here, before anything starts JAX's backend."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import contextlib
import functools
import gc
import pathlib
import types
from collections.abc import Callable

import jax
import pytest
from jax._src import compiler

# The library runs in programs that allow no implicit promotion, so its tests do not either.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes so many small objects that Python looks for cycles among them for a twentieth of the whole time.
gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser):
    text = "of a test's cases run only as many as have every value of each parameter; of these the K-th of N shares"
    parser.addoption("--each-value", metavar="K/N", help=text)


def pytest_collection_modifyitems(config, items):
    """A corner asks whether a version is different, and the reference environment runs all combinations.

    Several corners share the values: each runs every test, and every value is run on one of them at least.
    """
    if not (share := config.getoption("--each-value")):
        return
    mine, shares = map(int, share.split("/"))
    values = lambda item: set(enumerate(item.callspec.id.split("-"))) if hasattr(item, "callspec") else {()}
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept, turn = set(), mine
    for group in cases.values():
        missing, chosen = set().union(*map(values, group)), []
        while missing:
            chosen.append(max(group, key=lambda item: len(values(item) & missing)))
            missing -= values(chosen[-1])
        everywhere = len(chosen) < shares or group[0].get_closest_marker("every_corner")
        kept.update(chosen if everywhere else chosen[turn % shares :: shares])
        turn += len(chosen)  # so that the shares are of one size
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


LARGE = 2 * 1024**3  # bytes of a process above which its compiled programs are forgotten between two modules


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Two workers that keep every program take most of the memory of a small machine, and the compiler then dies."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGE:
        import deq_jax  # not above: what checks annotations has to be there before

        deq_jax.clear_caches()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """float64 for one test."""
    # Through jax.config, the one spelling that jax 0.7 to 0.12 share.
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def promotes():
    """Implicit promotion, for a module whose subject is code of experiments/ or of a dependency that relies on it.

    It lasts from the first test that asks for it to the end of its module, so a module asks in its `pytestmark`.
    """
    # Not JAX's context managers: they would not reach the threads that a test starts.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # The older code generator: the newer is most of the time to compile. Gone from jax 0.12.
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def known_options() -> dict:
    """Those of QUICKLY that this version of the compiler has."""

    def known(name):
        try:
            jax.jit(lambda: 0, compiler_options={name: QUICKLY[name]}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in QUICKLY.items() if known(name)}


@pytest.fixture
def quick_compile(request, monkeypatch):
    """Programs that take a third of the time to compile, for modules of many small programs that each run once.

    Such a module asks for it in its `pytestmark`. A test of memory, of compiled text, or of bits there is marked
    `full_compile`, and compiles as users do. Not for a module that keeps arrays from test to test and compares bits.
    """
    if request.node.get_closest_marker("full_compile"):
        jax.clear_caches()  # or it would run what another test compiled quickly
        yield
        jax.clear_caches()  # and the next one what this one did not
        return
    # jax.jit(compiler_options=...) does the same to one program; eager operations have no such option.
    known, options = known_options(), compiler.get_compile_options

    def quickly(*args, env_options_overrides=None, **kwargs):
        return options(*args, env_options_overrides=known | dict(env_options_overrides or {}), **kwargs)

    monkeypatch.setattr(compiler, "get_compile_options", quickly)
    yield


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


@pytest.fixture
def count_compilations():
    """`with count_compilations() as compiled: ...` afterwards `compiled.count` programs were handed to the compiler."""
    state = types.SimpleNamespace(count=0, active=False)

    def listen(event, duration, **_):
        state.count += state.active and event == "/jax/core/compile/backend_compile_duration"

    @contextlib.contextmanager
    def counting():
        state.count, state.active = 0, True
        yield state
        state.active = False

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counting
    unregister = getattr(jax.monitoring, "unregister_event_duration_listener", lambda listener: None)
    unregister(listen)


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
