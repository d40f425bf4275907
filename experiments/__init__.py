"""Experiments, in rooms: `training` below, `shared` on it, the pages of `paper`, `studies` and `benchmarks` above.

Modules had no rooms before. Their old names still work, in imports and after `python -m`: see `MOVED`.
"""

import importlib
import importlib.abc
import importlib.util
import re
import sys

# Where the contents of a former module are now. `python -m` runs the first.
MOVED: dict[str, tuple[str, ...]] = {
    "adjoint_default_study": ("studies.adjoint_default",),
    "backward_study": ("studies.backward", "studies.backward_tasks"),
    "baselines": ("training.baselines",),
    "bench_core": ("benchmarks.core",),
    "benchmarks.jax_ops": ("shared.jax_ops",),
    "benchmarks.problems": ("shared.problems",),
    "benchmarks.referee": ("benchmarks.judge", "shared.referee"),
    "char_lm": ("paper.char_lm", "training.lm_model", "training.lm_train"),
    "checkpoints": ("training.checkpoints",),
    "compare_versions": ("benchmarks.compare_versions",),
    "copy_memory": ("paper.copy_memory", "paper.copy_memory_report"),
    "data": ("training.data", "training.corpora", "training.tokenizer"),
    "error_study": ("studies.error",),
    "gains_study": ("studies.gains", "studies.gains_report"),
    "generation": ("training.generation",),
    "gradient_study": (
        "studies.gradient",
        "studies.gradient_problems",
        "studies.gradient_report",
        "shared.numerics",
    ),
    "history_study": ("studies.history",),
    "initialization_study": ("paper.initialization", "paper.initialization_report", "shared.numerics"),
    "iterations_study": ("paper.iterations",),
    "jaxopt_tests": ("studies.jaxopt_tests",),
    "kernels": ("benchmarks.kernels",),
    "lm": ("training.lm", "training.cli", "training.environment", "training.lm_report", "training.lm_step"),
    "memory_study": ("paper.memory", "paper.memory_report", "shared.models", "shared.timing"),
    "plots": ("paper.char_lm_report", "shared.plots"),
    "programs": ("benchmarks.programs",),
    "robustness_cells": ("shared.cells", "shared.systems"),
    "robustness_study": ("studies.robustness", "studies.robustness_report", "shared.cell_batch", "shared.systems"),
    "root_study": ("studies.root",),
    "runtime_study": ("paper.runtime", "paper.runtime_report", "paper.runtime_contenders", "shared.timing"),
    "squarem_study": ("studies.squarem",),
    "stability_study": ("paper.stability", "paper.stability_scalars", "paper.stability_report"),
    "streaming_study": ("studies.streaming",),
    "study": ("shared.study",),
    "tolerance_by_dtype": ("studies.tolerance_by_dtype",),
    "tolerance_study": ("paper.tolerance", "paper.tolerance_report", "shared.gradients"),
    "trained": ("shared.trained",),
    "word_lm": ("paper.word_lm", "training.lm_presets", "training.lm_train"),
}


def renamed(command: str) -> str:
    """A command with the present names of its modules.

    >>> renamed("python -m experiments.tolerance_study reduced")
    'python -m experiments.paper.tolerance reduced'
    """
    return re.sub(r"\bexperiments\.[\w.]+", lambda found: (places(found[0]) or [found[0]])[0], command)


class Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a former module as one that looks its attributes up where they are now."""

    def find_spec(self, fullname, path=None, target=None):
        if not (found := places(fullname)):
            return None
        origin = importlib.util.find_spec(found[0])
        return importlib.util.spec_from_loader(fullname, self, origin=origin and origin.origin, is_package=False)

    def get_source(self, fullname):
        return None

    def get_code(self, fullname):  # what `python -m` runs
        spec = importlib.util.find_spec(places(fullname)[0])
        assert spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader)
        return spec.loader.get_code(spec.name)

    def exec_module(self, module):
        modules = [importlib.import_module(name) for name in places(module.__name__)]

        def look_up(name):
            for each in modules:
                if hasattr(each, name):
                    return getattr(each, name)
            raise AttributeError(f"{module.__name__} is now {' and '.join(m.__name__ for m in modules)}; no {name!r}")

        module.__getattr__ = look_up


def places(fullname: str) -> list[str]:
    """The full names of the modules that hold what a former module held; none for any other name."""
    return [f"{__name__}.{name}" for name in MOVED.get(fullname.removeprefix(f"{__name__}."), ())]


sys.meta_path.append(Moved())
