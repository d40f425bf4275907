"""What the language-model experiments share: corpora by name or path, evaluation, the log and its report."""

import dataclasses
import enum
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

import deq_jax as deq
from experiments.training import corpora, data, tokenizer
from experiments.training.checkpoints import without_retired
from experiments.training.cli import SOLVERS_AND_ADJOINTS
from experiments.training.lm_step import forget_at_start, solve_metrics
from experiments.training.sealed import write_atomically

# Corpora and run directories.


def load_corpus(
    name_or_path: str, *, level: corpora.Level, data_dir: Path | None = None, cache_dir: Path | None = None
) -> data.Corpus:
    """The corpus of that name at this level, or else the text that the path leads to; `cache_dir` as for `data.load`.

    >>> load_corpus("shakespeare", level="char").name
    'shakespeare'
    """
    if name_or_path in corpora.CORPORA:
        return data.load(name_or_path, level=level, data_dir=data_dir, cache_dir=cache_dir)
    if not Path(name_or_path).exists():
        raise ValueError(
            f"--data must be one of {', '.join(corpora.CORPORA)}, or the path of a text file or of a directory "
            f"of *.txt; got {name_or_path!r}, which is neither"
        )
    return data.load(path=name_or_path, level=level, cache_dir=cache_dir)


# Options that the configuration of a language model has got since runs were written, and what a run without them did.
# At these values they are not stored, so that the same command continues an older run.
ADDED: dict[str, Any] = {
    "model": "transformer",
    "modern": False,
    "output_dim": 0,
    "cutoffs": [],
    "div_val": 1,
    "init_std": None,
    "hidden_dropout": None,
    "embedding_dropout": 0.0,
    "weight_dropout": 0.0,
    "aux_every": 0,
    "aux_weight": 0.05,
    "mesh": "",
}
ADDED_TO_SOLVERS: dict[str, Any] = {
    "test_every": 1,
    "history_dtype": None,
    "norm": "leaf",
    "min_steps": 0,
    "returns": "best",
    "products": "differences",
    "linear": None,
    "preconditioner": None,
}
ADDED_TO_JVP: dict[str, Any] = {"on_failure": "KEEP"}  # `Implicit` had it before


def without_added(config: dict[str, Any], added: dict[str, Any] = ADDED) -> dict[str, Any]:
    """A configuration in JSON as it was before the options of `added`, where they have their old values."""
    of_jvp = lambda value: ADDED_TO_JVP if value.get("__type__") == "ImplicitJVP" else {}
    old = lambda value: without_added(value, ADDED_TO_SOLVERS | of_jvp(value)) if isinstance(value, dict) else value
    return {name: old(value) for name, value in config.items() if name not in added or value != added[name]}


def identity(config: dict[str, Any], corpus: data.Corpus) -> dict[str, Any]:
    """What a resume must agree with: the configuration in JSON, and what the data are."""
    sizes = [len(corpus.train), len(corpus.valid), len(corpus.test)]
    config = without_added(config)
    text = hashlib.sha256()
    for stream in (corpus.train, corpus.valid, corpus.test):
        text.update(np.ascontiguousarray(stream).data)
    return {**config, "vocabulary": corpus.vocabulary.fingerprint, "tokens": sizes, "text": text.hexdigest()}


def save_vocabulary(run: Path, vocabulary: tokenizer.Vocabulary) -> None:
    """Write `vocabulary.json` beside the checkpoints, so that to sample needs no corpus."""
    content = json.dumps({"level": vocabulary.level, "tokens": vocabulary.tokens}, ensure_ascii=False)
    write_atomically(run / "vocabulary.json", content.encode())


def read_run(run: Path, config_class: type) -> tuple[Any, dict[str, Any], tokenizer.Vocabulary]:
    """The configuration, the stored JSON and the vocabulary of a run; ValueError if `run` holds none."""
    if not (run / "config.json").is_file() or not (run / "vocabulary.json").is_file():
        inside = sorted(path.parent.name for path in run.glob("*/vocabulary.json"))
        remedy = f"the runs inside are {', '.join(inside)}" if inside else f"train one with --run {run}"
        raise ValueError(f"{run} holds no run (no config.json and vocabulary.json): {remedy}")
    stored = json.loads((run / "config.json").read_bytes())
    values = json.loads((run / "vocabulary.json").read_bytes())
    vocabulary = tokenizer.Vocabulary(tuple(values["tokens"]), values["level"])
    if vocabulary.fingerprint != stored["vocabulary"]:
        raise ValueError(
            f"{run / 'vocabulary.json'} is not the vocabulary that this run was trained with: expected the "
            f"fingerprint {stored['vocabulary'][:12]}, got {vocabulary.fingerprint[:12]}"
        )
    names = {field.name for field in dataclasses.fields(config_class)}
    given = ADDED | stored
    if unknown := (given.keys() - {"__type__", "vocabulary", "tokens", "text"}) ^ names:
        raise ValueError(f"{run} was trained by another version: it differs in {', '.join(sorted(unknown))}")
    return config_class(**{name: _from_json(given[name]) for name in names}), stored, vocabulary


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if not isinstance(value, dict):
        return value
    classes = {cls.__name__: cls for cls in SOLVERS_AND_ADJOINTS}
    cls = classes[value["__type__"]]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    options = {name: _from_json(given) for name, given in without_retired(value).items() if name != "__type__"}
    for name, default in defaults.items():
        if isinstance(default, enum.Enum) and name in options:
            options[name] = type(default)[options[name]]
    return cls(**options)


class Evaluation(NamedTuple):
    loss: float  # nats a token
    tokens: int
    steps: float  # evaluations of f, mean over problems
    residual: float  # relative, likewise
    converged: float  # share of problems


def evaluation_segments(tokens: np.ndarray, batch: int, length: int) -> data.EvaluationSegments:
    """All of `tokens` in order, in `batch` streams side by side, or in fewer where the text is short."""
    return data.evaluation_segments(tokens, max(1, min(batch, len(tokens) // length)), length)


def make_evaluate(
    graphdef: Any, segments: data.EvaluationSegments, solver: deq.Solver, place: Callable = lambda segment: segment
) -> Callable:
    """`evaluate(params, limit=None, solver=solver) -> Evaluation` of the segments, each with the history before it.

    With a `limit` only so many are read, from the first on. Another tolerance or budget does not compile anew. `place`
    puts a segment on its devices.
    """

    @jax.jit
    def step(params, history, segment, solver):
        model = nnx.merge(graphdef, params)
        history = forget_at_start(history, segment.is_start)
        out = model.hidden(segment.inputs, history, solver=solver)
        total = jnp.sum(segment.weights * model.nll(out.hidden, segment.targets))
        return out.history, (total, jnp.sum(segment.weights), solve_metrics(out.solution.stats))

    def evaluate(params, limit: int | None = None, solver: deq.Solver = solver) -> Evaluation:
        history = nnx.merge(graphdef, params).empty_history(segments.batch)
        sums = []
        for i in range(min(limit or len(segments), len(segments))):
            history, part = step(params, history, place(segments[i]), solver)
            sums.append(part)
        totals, weights, metrics = zip(*jax.device_get(sums), strict=True)
        mean = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        loss = float(np.sum(totals, dtype=np.float64) / np.sum(weights))
        return Evaluation(loss, int(np.sum(weights)), mean["fwd_steps"], mean["fwd_residual"], mean["converged"])

    return evaluate


class Meter:
    """The averages of the steps since the last line, and the time spent in steps alone.

    `start` before a step and after whatever is not training: evaluation, saving, compilation. `utilized` is the share
    of the devices' peak that one evaluation a second uses, where it is known.
    """

    def __init__(self, tokens_per_step: int, seconds: float = 0.0, cpu_seconds: float = 0.0):
        self.spent = [seconds, cpu_seconds]  # over all resumes; of the processor, over all its cores
        self.utilized: float | None = None
        self._tokens = tokens_per_step
        self._window: list[dict[str, Array]] = []

    def start(self) -> None:
        self._clocks = time.perf_counter(), time.process_time()

    def add(self, metrics: dict[str, Array]) -> None:
        """Remember a step's metrics without waiting for them."""
        self._window.append(metrics)

    def line(self) -> dict[str, Any]:
        """One line of the log; waits for the device."""
        values = jax.device_get(self._window)
        now = time.perf_counter(), time.process_time()
        elapsed = [after - before for after, before in zip(now, self._clocks, strict=True)]
        self.spent = [total + more for total, more in zip(self.spent, elapsed, strict=True)]
        self._window, line = [], _average(values)
        timing = {
            "train_seconds": self.spent[0],
            "train_cpu_seconds": self.spent[1],
            "tokens_per_second": len(values) * self._tokens / elapsed[0],
        }
        if solves := [line[name] for name in ("fwd_steps", "bwd_steps") if name in line]:
            timing["evaluations_per_second"] = len(values) * sum(solves) / elapsed[0]  # of f and its pullback
            if self.utilized:
                line["mfu"] = np.round(self.utilized * timing["evaluations_per_second"], 4)
        return line | {name: np.round(value, 2) for name, value in timing.items()}


def _average(window: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # Means, but the worst of a status or a maximum, and the sum of skipped steps. Steps of the warm-up may
    # share a window with later ones, and measure less: what some lack is averaged over the others.
    line = {}
    for name in dict.fromkeys(name for metrics in window for name in metrics):
        values = [metrics[name] for metrics in window if name in metrics]
        reduce = np.max if name.endswith(("_status", "_max")) else np.sum if name == "skipped" else np.mean
        line[name] = reduce(values)
    return line


def temp_bytes(program: Any) -> int:
    """The temporary memory of a compiled program, as XLA plans it."""
    return int(program.memory_analysis().temp_size_in_bytes)
