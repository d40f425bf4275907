"""The core's tests on the GPU, a row a file: solvers, adjoints and transformations in float32, bfloat16 and float64.

What needs several devices fails on one, and the row names it.
"""

import collections
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu import kept

ROOT = Path(__file__).parents[2]
# Those of the Makefile's core tests that compute something, the most telling first.
FILES = (
    "solvers", "adjoints", "convergence", "fixed_point", "adjoint_family", "transforms", "compact", "trajectory",
    "warm_start", "trace", "nn", "transformer", "check", "own",
)  # fmt: skip
TINY = ("check",)
PROCESSES = 8
NAMED = 30  # failures of a file, at most


def measure(rows: kept.Rows, job: kept.Job) -> None:
    rows.about(seed="each test's own", dtype="float32, bfloat16, float64", gradient="by test", precision="highest")
    wanted = [f"test_{name}.py" for name in (TINY if job.tiny else FILES)]
    files = [str(path) for name in wanted if name not in rows for path in ROOT.glob(f"tests/*/{name}")]
    if not files:
        return
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # some tests count compilations
    options = ["-p", "no:cacheprovider", "--tb=line"]
    if importlib.util.find_spec("pytest_benchmark"):
        options += ["-p", "no:benchmark"]  # it warns where xdist is at work, and a warning is an error here
    if importlib.util.find_spec("xdist") and not job.tiny:
        options += ["-n", str(PROCESSES)]
    os.chdir(ROOT)
    code = pytest.main([*options, *files], plugins=[Recorder(rows)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


class Recorder:
    """Puts the row of a file when its last test is done."""

    def __init__(self, rows: kept.Rows):
        self.rows, self.total = rows, collections.Counter()
        self.found: dict[str, dict[str, Any]] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        self.total.update(file_of(item.nodeid) for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.total = collections.Counter(map(file_of, ids))  # every process collects all tests

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.rows.put(file_of(report.nodeid), {"error": "cannot be collected"})

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = file_of(report.nodeid)
        empty = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": []}
        row = self.found.setdefault(file, empty)
        row["seconds"] += report.duration
        if report.when == "call" or not report.passed:
            row[report.outcome] += 1
            if report.failed and len(row["failures"]) < NAMED:
                row["failures"].append(report.nodeid.partition("::")[2])
        if report.when == "teardown":
            self.total[file] -= 1
            if not self.total[file]:
                self.rows.put(file, row)


def file_of(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).name


if __name__ == "__main__":
    kept.main(measure)
