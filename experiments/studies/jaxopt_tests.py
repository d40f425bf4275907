"""jaxopt's own tests of its fixed-point and root solvers, run against `deq_jax.compat.jaxopt`.

git clone https://github.com/google/jaxopt && pip install absl-py scikit-learn
python -m experiments.studies.jaxopt_tests jaxopt  # two minutes on one core

The path is that of the checkout: its tests are in no package. The imports of the names that are tested are changed in
copies, which are removed afterwards; all else, solvers that are wrapped among it, remains jaxopt's. With --theirs the
tests run unchanged, against jaxopt itself.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Annotated

import tyro

FILES = "fixed_point_iteration", "anderson", "anderson_wrapper", "broyden", "implicit_diff"
NAMES = "FixedPointIteration|AndersonAcceleration|AndersonWrapper|Broyden"
CHANGES = (
    (rf"^from jaxopt import ({NAMES})$", r"from deq_jax.compat.jaxopt import \1"),
    (r"^from jaxopt import implicit_diff as idf$", "from deq_jax.compat import jaxopt as idf"),
    (rf"\bjaxopt\.({NAMES})\b", r"deq_jax.compat.jaxopt.\1"),
    (r"^import jaxopt$", "import jaxopt\nimport deq_jax.compat.jaxopt"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Run jaxopt's tests."""

    checkout: Annotated[pathlib.Path, tyro.conf.Positional]
    theirs: bool = False


def main(config: Config) -> int:
    tests = config.checkout.resolve() / "tests"
    missing = [name for name in FILES if not (tests / f"{name}_test.py").is_file()]
    if missing:
        raise SystemExit(f"{config.checkout} is no checkout of jaxopt: {tests} has no {missing[0]}_test.py")
    here = pathlib.Path(__file__).resolve().parents[2]
    paths = [str(tests.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            text = (tests / f"{name}_test.py").read_text()
            pathlib.Path(folder, f"test_{name}.py").write_text(text if config.theirs else changed(text))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", folder]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, cwd=folder).returncode


def changed(text: str) -> str:
    """A test with the names that are tested imported from this library."""
    for pattern, replacement in CHANGES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
