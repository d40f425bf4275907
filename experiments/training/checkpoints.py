"""A directory that holds one training run and survives what happens to it.

```
run/config.json      the configuration; a resume with another one is refused
run/metrics.jsonl    written by experiments.training.loop.MetricsLog
run/lock             held (flock) while a process trains here; its text says which
run/checkpoints/20/  a step as Orbax wrote it, then meta.json and manifest.json by us
```

Orbax restores a flipped bit as a wrong weight, and one stray directory ends every resume. So each step
carries a manifest, written last: the size and sha256 of every file. A step is whole when its manifest is
exactly the one that its files give. Opening a run takes the newest whole step, and says so when that is not
the newest.
"""

import contextlib
import dataclasses
import enum
import fcntl
import hashlib
import importlib.metadata
import json
import os
import socket
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

MANIFEST = "manifest.json"
META = "meta.json"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint was passed over; the message names it, what is wrong with it and what is used instead."""


class RunDirectory:
    """One run's directory: its lock, its configuration and its checkpoints, for one process at a time.

    Use it as a context manager; leaving it waits for the last save. Entering raises, before anything is
    written, `ValueError` for a directory that is not a run (non-empty, without `config.json`) and for a
    `config` (a dataclass) that differs from the stored one in a field outside `harmless` (dotted names,
    `solver.rtol`), and `RuntimeError` while another process holds the lock. Damaged steps newer than the
    newest whole one are renamed to `<step>.damaged`, since Orbax would refuse to save below them, with a
    `DamagedCheckpointWarning` each; nothing is deleted but whole steps older than the last `keep`, by Orbax.
    For one host, on a file system with `flock` (not Windows).

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
        self.metrics_path = self.path / "metrics.jsonl"
        self.step: int | None = None  # the newest whole step
        self._config, self._harmless, self._keep = config_to_json(config), frozenset(harmless), keep
        self._sealing: Future | None = None

    def __enter__(self) -> "RunDirectory":
        _check_directory(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(_take_lock(self.path / "lock"))
            self._check_config()
            _sign(lock)
            write_atomically(self.path / "config.json", _json_bytes(self._config))
            checkpoints = self.path / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            self.step = _newest_whole(checkpoints)
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
            self._manager = stack.enter_context(ocp.CheckpointManager(checkpoints, options=options))
            self._sealer = stack.enter_context(ThreadPoolExecutor(1, "seal"))
            stack.callback(self._wait)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._exit.__exit__(*exception)

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
        return _from_arrays(arrays, like), meta["data"]

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Start saving `state` and `data`, and return at once.

        `data` is any JSON value that the host has to remember: the data position, where the step does not
        give it, or the seconds spent.

        Orbax returns when it has the arrays on the host, so that the next step may donate them. Saving the
        newest step again does nothing.
        """
        self._wait()
        if step == self.step:
            return
        if self.step is not None and step < self.step:
            raise ValueError(f"step {step} is older than the newest checkpoint, {self.step}")
        meta = {"config": self._config, "data": data, "leaves": _leaves(state), "versions": _versions()}
        # Orbax cannot store an empty array, and a save that raises can hold up the exit for ten minutes.
        arrays = {name: leaf for name, leaf in _to_arrays(state).items() if leaf.size}
        self._manager.save(step, args=ocp.args.StandardSave(arrays))
        self._sealing = self._sealer.submit(self._seal, step, _json_bytes(meta))

    def wait(self) -> Path:
        """Wait until what was saved is on disk with its manifest; returns the newest checkpoint's path."""
        self._wait()
        return self.path / "checkpoints" / str(self.step)

    def _wait(self) -> None:
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            self.step = sealing.result()

    def _seal(self, step: int, meta: bytes) -> int:
        self._manager.wait_until_finished()
        seal(self.path / "checkpoints" / str(step), meta)
        return step

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


def seal(directory: Path, meta: bytes) -> None:
    """Complete the step that Orbax has finished: `meta` goes in, then the manifest of all files, last."""
    write_atomically(directory / META, meta)
    write_atomically(directory / MANIFEST, _json_bytes(_manifest(directory)))


def find_damage(directory: Path) -> str | None:
    """What is wrong with a step's directory, beginning with the file's name; None when it is whole."""
    if not (directory / MANIFEST).is_file():
        return f"{MANIFEST}: missing, the process ended before the step was complete"
    try:
        text, found = (directory / MANIFEST).read_bytes(), _manifest(directory)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if text == _json_bytes(found):
        return None
    try:
        promised = {name: [size, sha256] for name, (size, sha256) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST}: unreadable"
    for name in sorted(promised.keys() | found.keys()):
        if name not in found:
            return f"{name}: missing"
        if name not in promised:
            return f"{name}: not in the manifest"
        if promised[name][0] != found[name][0]:
            return f"{name}: {found[name][0]} bytes instead of {promised[name][0]}"
        if promised[name] != found[name]:
            return f"{name}: its sha256 is not the one in the manifest"
    return f"{MANIFEST}: altered"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content so that a kill or a power cut leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


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


def _newest_whole(checkpoints: Path) -> int | None:
    # Orbax's own unfinished steps (`*.orbax-checkpoint-tmp`) are not numbers; it removes them when it saves
    # again.
    damaged = {}
    newest = None
    for step in sorted((int(p.name) for p in checkpoints.iterdir() if _is_step(p.name)), reverse=True):
        damage = find_damage(checkpoints / str(step))
        if damage is None:
            newest = step
            break
        damaged[step] = damage
    used = "starting from the beginning" if newest is None else f"using checkpoint {newest}"
    for step, damage in damaged.items():
        aside = _move_aside(checkpoints / str(step))
        text = f"checkpoint {step} is damaged ({damage}): {used} instead; kept as {aside.name}"
        warnings.warn(text, DamagedCheckpointWarning, stacklevel=3)
    return newest


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name


def _move_aside(directory: Path) -> Path:
    aside = directory.with_name(f"{directory.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.with_name(f"{directory.name}.damaged{number}")
    directory.rename(aside)
    return aside


def _manifest(directory: Path) -> dict[str, list]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST)
    return {path.relative_to(directory).as_posix(): _size_and_sha256(path) for path in files}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _size_and_sha256(path: Path) -> list:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
