"""A directory that holds one training run and survives what happens to it.

```
run/config.json      the configuration; a resume with another one is refused
run/metrics.jsonl    written by experiments.training.metrics.MetricsLog
run/lock             held (flock) while a process trains here; its text says which
run/checkpoints/20/  a step as Orbax wrote it, then meta.json and manifest.json by experiments.training.sealed
```
"""

import contextlib
import dataclasses
import enum
import fcntl
import importlib.metadata
import json
import logging
import os
import re
import shutil
import socket
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from experiments.training.metrics import fingerprint, last_step, what_is_lost
from experiments.training.processes import from_first, is_first
from experiments.training.sealed import (
    META,
    DamagedCheckpointWarning,
    find_damage,
    json_bytes,
    newest_whole,
    seal,
    write_atomically,
)

__all__ = ["DamagedCheckpointWarning", "LostMetricsWarning", "RunDirectory", "SaveError", "find_damage"]


class SaveError(OSError):
    """A checkpoint could not be written. The message names the path, the reason and what to do."""


class LostMetricsWarning(UserWarning):
    """`metrics.jsonl` does not hold what it held when the checkpoint was saved; the message says what is missing."""


class RunDirectory:
    """One run's directory: its lock, its configuration and its checkpoints, for one run at a time.

    Use it as a context manager; leaving it waits for the last save. Entering raises, before anything is
    written, `ValueError` for a directory that is not a run (non-empty, without `config.json`) and for a
    `config` (a dataclass) that differs from the stored one in a field outside `harmless` (dotted names,
    `solver.rtol`), and `RuntimeError` while another process holds the lock. Damaged steps newer than the
    newest whole one are renamed to `<step>.damaged`, since Orbax would refuse to save below them, with a
    `DamagedCheckpointWarning` each; nothing is deleted but whole steps older than the last `keep`, by Orbax.
    A save that fails is a `SaveError` at the next call of `check`, `save` or `wait`, or when the context is left.
    For a file system with `flock` (not Windows), which all processes of the run share; each of them uses it, and the
    first one alone locks, checks and seals. `metrics_path` of the others is a file that forgets.

    ```python
    with RunDirectory("runs/example", config) as run:
        state, position = run.restore(state)
        run.save(int(state.step) + 1, state, position)
    ```
    """

    def __init__(self, path: str | Path, config: Any, *, harmless: Collection[str] = frozenset(), keep: int = 2):
        if keep < 2:
            # Orbax removes the old step before the new one has its manifest: with one, there would be none.
            raise ValueError(f"expected keep >= 2, got {keep}")
        self.path = Path(path).absolute()
        self.metrics_path = self.path / "metrics.jsonl" if is_first() else Path(os.devnull)
        self.step: int | None = None  # the newest whole step
        self._config, self._harmless, self._keep = config_to_json(config), frozenset(harmless), keep
        self._sealing: Future | None = None
        self._failed = False

    def __enter__(self) -> "RunDirectory":
        with contextlib.ExitStack() as stack:
            self.step = from_first(lambda: self._open(stack))
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
            stack.enter_context(_without_orbax_errors())
            self._manager = ocp.CheckpointManager(self.path / "checkpoints", options=options)
            stack.callback(self._close)
            self._sealer = stack.enter_context(ThreadPoolExecutor(1, "seal"))
            stack.callback(self._wait)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._exit.__exit__(*exception)

    def _open(self, stack: contextlib.ExitStack) -> int | None:
        """Take the directory for this run; the newest whole step."""
        _check_directory(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = stack.enter_context(_take_lock(self.path / "lock"))
        self._check_config()
        _sign(self._lock)
        write_atomically(self.path / "config.json", json_bytes(self._config))
        checkpoints = self.path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        self._warn_if_empty(checkpoints)
        return newest_whole(checkpoints)

    def restore(self, like: PyTree) -> tuple[PyTree, Any]:
        """The newest whole step's state and the `data` saved with it; `(like, None)` in a new run.

        `like` is the state that the same program starts from: it gives structure, dtypes, shardings and the
        kind of random keys. A checkpoint of another shape is a `ValueError` that names the leaf.
        """
        if self.step is None:
            return like, None
        directory = self.path / "checkpoints" / str(self.step)
        meta = json.loads((directory / META).read_text())
        _check_leaves(directory, meta["leaves"], _leaves(like))
        arrays = _to_arrays(like)
        target = {name: _abstract(leaf) for name, leaf in arrays.items() if leaf.size}
        arrays |= dict(self._manager.restore(self.step, args=ocp.args.StandardRestore(target)))
        if is_first() and (lost := what_is_lost(self.metrics_path, meta.get("metrics"))):
            warnings.warn(f"{self.metrics_path}: {lost}", LostMetricsWarning, stacklevel=2)
        return _from_arrays(arrays, like), meta["data"]

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Start saving `state` and `data`, and return at once.

        `data` is any JSON value that the host has to remember: the data position, where the step does not
        give it, or the seconds spent.

        Orbax returns when it has the arrays on the host, so that the next step may donate them. Saving the
        newest step again does nothing. What the metrics file holds by now is synced, and `restore` looks whether
        it is still there.
        """
        self._wait()
        if step == self.step:
            return
        if self.step is not None and step < self.step:
            raise ValueError(f"step {step} is older than the newest checkpoint, {self.step}")
        # Orbax cannot store an empty array, and a save that raises can hold up the exit for ten minutes.
        arrays = {name: leaf for name, leaf in _to_arrays(state).items() if leaf.size}
        from_first(lambda: self._check_place(step, sum(leaf.nbytes for leaf in arrays.values())))
        meta = {"step": step, "config": self._config, "data": data, "leaves": _leaves(state), "versions": _versions()}
        if is_first():
            meta["metrics"] = fingerprint(self.metrics_path)
        self._manager.save(step, args=ocp.args.StandardSave(arrays))
        self._sealing = self._sealer.submit(self._seal, step, json_bytes(meta))

    def check(self) -> None:
        """Raise if the save that is under way has failed; never waits."""
        if self._sealing is not None and self._sealing.done():
            self._wait()

    def wait(self) -> Path:
        """Wait until what was saved is on disk with its manifest; returns the newest checkpoint's path."""
        self._wait()
        return self.path / "checkpoints" / str(self.step)

    def _wait(self) -> None:
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            self.step = sealing.result()

    def _seal(self, step: int, meta: bytes) -> int:
        try:
            self._manager.wait_until_finished()
            if is_first():
                seal(self.path / "checkpoints" / str(step), meta)
        except Exception as error:  # of Orbax and of TensorStore, of many kinds
            self._failed = True
            raise self._save_error(step, _reason(error)) from None
        return step

    def _check_place(self, step: int, size: int) -> None:
        """Raise where a step cannot be made: once Orbax has begun with it, it waits for minutes before it gives up."""
        lock, checkpoints = self.path / "lock", self.path / "checkpoints"
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(self._lock.fileno())):
            raise self._save_error(step, f"{self.path} was moved or removed while the run was under way")
        if not checkpoints.exists():
            warnings.warn(f"{checkpoints} was removed; made again", DamagedCheckpointWarning, stacklevel=3)
        try:
            checkpoints.mkdir(exist_ok=True)
            probe = checkpoints / f"{step}.probe"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise self._save_error(step, _reason(error)) from None
        free = shutil.disk_usage(checkpoints).free
        if free < size:
            raise self._save_error(step, f"it has {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free on the disk")

    def _save_error(self, step: int, reason: str) -> SaveError:
        last = "there is none before it" if self.step is None else f"the newest one is {self.step}"
        path = self.path / "checkpoints" / str(step)
        return SaveError(
            f"checkpoint {path} could not be written: {reason}; {last}. Mend this and give the same command"
        )

    def _close(self) -> None:
        try:
            self._manager.close()
        except Exception:
            if not self._failed:  # else it is what has been raised
                raise

    def _warn_if_empty(self, checkpoints: Path) -> None:
        last = last_step(self.metrics_path)
        if last and not any(checkpoints.iterdir()):
            text = f"{checkpoints} is empty, though metrics.jsonl goes to step {last}: starting from the beginning"
            warnings.warn(text, DamagedCheckpointWarning, stacklevel=3)

    def _check_config(self) -> None:
        stored = self.path / "config.json"
        if not stored.exists():
            return
        try:
            changes = config_changes(json.loads(stored.read_bytes()), self._config)
        except ValueError as error:
            raise ValueError(f"{stored} is unreadable ({error})") from None
        harmful = {name: change for name, change in changes.items() if not _covers(self._harmless, name)}
        if harmful:
            lines = "\n".join(f"  {name}: {change}" for name, change in harmful.items())
            raise ValueError(
                f"the configuration has changed since {self.path} was started:\n{lines}\n"
                "resume with the old values, or start a run in another directory"
            )


def config_to_json(config: Any, name: str = "config") -> Any:
    """A configuration as JSON values: a dataclass becomes its fields, with its class under `__type__`."""
    match config:
        case enum.Enum():  # first: an IntEnum is an int as well
            return config.name
        case None | bool() | int() | float() | str():
            return config
        case type():
            return config.__name__
        case Path() | np.dtype():
            return str(config)
        case np.generic() | np.ndarray() | jax.Array():
            return config.tolist()
        case list() | tuple():
            return [config_to_json(item, f"{name}[{i}]") for i, item in enumerate(config)]
        case dict():
            return {str(key): config_to_json(value, f"{name}.{key}") for key, value in config.items()}
        case _ if dataclasses.is_dataclass(config):
            values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
            return {"__type__": type(config).__name__, **config_to_json(values, name)}
    raise TypeError(f"expected numbers, strings, sequences or dataclasses in a configuration, {name} is {config!r}")


def config_changes(old: Any, new: Any, name: str = "") -> dict[str, str]:
    """What differs between two configurations in JSON, as `{"solver.rtol": "0.001 -> 0.01"}`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        # As text, in which NaN equals itself.
        return {} if json.dumps(old) == json.dumps(new) else {name: f"{_show(old)} -> {_show(new)}"}
    if old.get("__type__") != new.get("__type__"):
        return {name or "config": f"{_show(old)} -> {_show(new)}"}
    changes, old = {}, without_retired(old)
    for field in sorted(old.keys() | new.keys()):
        path = f"{name}.{field}" if name else field
        changes |= config_changes(old.get(field, _ABSENT), new.get(field, _ABSENT), path)
    return changes


def without_retired(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without the options that are gone, where they had the value of what is left."""
    retired = RETIRED.get(config.get("__type__", ""), {})
    return {name: value for name, value in config.items() if name not in retired or retired[name] != value}


def _reason(error: Exception) -> str:
    """One line; of what TensorStore says, the operating system's own words."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    code = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
    return os.strerror(int(code[1] or code[2])) if code else f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextlib.contextmanager
def _without_orbax_errors() -> Iterator[None]:
    """Orbax logs the traceback of each thread that a failed save ends, 300 lines, before it raises the error."""
    logger, is_other = logging.getLogger("absl"), lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _check_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a run directory, {path} is a file")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    # These two alone: a run that was killed while it was being made.
    foreign = sorted(entries - {"lock", "config.json.tmp"})
    if foreign and "config.json" not in entries:
        raise ValueError(f"{path} is not a run directory: it holds {', '.join(foreign[:3])} and no config.json")


def _take_lock(path: Path) -> IO[str]:
    # flock, not the file's existence: the kernel lets go when the process dies, however it dies.
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RuntimeError(f"{path.parent} is in use by {holder}; it takes one process at a time") from None
    return file


def _sign(lock: IO[str]) -> None:
    lock.truncate(0)  # opened for appending: the text lands at the start
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _leaves(state: PyTree) -> dict[str, list]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_leaf_name(path): [list(jnp.shape(leaf)), str(jnp.asarray(leaf).dtype)] for path, leaf in leaves}


def _leaf_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_leaves(directory: Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            old, new = (f"{d[name][1]}{d[name][0]}" if name in d else "nothing" for d in (saved, wanted))
            raise ValueError(f"{directory} does not fit this model: expected {new} at {name}, found {old}")


def _to_arrays(state: PyTree) -> dict[str, jax.Array]:
    # A flat dict of plain arrays: NamedTuples, optax states and typed keys never reach Orbax.
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {_leaf_name(path): _untyped(jnp.asarray(leaf)) for path, leaf in leaves}
    if len(arrays) < len(leaves):
        raise ValueError("two leaves of the state have one name: a dict key contains a '/'")
    return arrays


def _from_arrays(arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
    def typed(path, leaf):
        array = arrays[_leaf_name(path)]
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(typed, like)


def _untyped(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")}


_ABSENT = {"__type__": "absent"}
# Options that older runs have stored and that are gone, with the value that what is left stands for.
RETIRED = {"Anderson": {"type": 2}}


def _show(value: Any) -> str:
    return value["__type__"] if isinstance(value, dict) and "__type__" in value else json.dumps(value)


def _covers(harmless: frozenset[str], name: str) -> bool:
    return any(name == field or name.startswith(field + ".") for field in harmless)
