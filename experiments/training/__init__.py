"""What trains: the parts of a loop, checkpoints, data, the language models and the networks beside them."""

import importlib
from typing import Any

# This was a module before it was a room: these names are imported from it in programs of before.
OF_THE_LOOP = (
    "StopRequest",
    "TrainState",
    "count_params",
    "graceful_signals",
    "init_state",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
)


def __getattr__(name: str) -> Any:
    if name in OF_THE_LOOP:
        return getattr(importlib.import_module("experiments.training.loop"), name)
    if name == "MetricsLog":
        return importlib.import_module("experiments.training.metrics").MetricsLog
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
