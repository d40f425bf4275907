"""The directories of single checkpoints: sealed by a manifest, and verified when a run is opened.

Orbax restores a flipped bit as a wrong weight, and one stray directory ends every resume. So each step carries a
manifest, written last: the size and sha256 of every file. One of these files holds the step's own number. A step is
whole when its manifest is exactly the one that its files give. Opening a run takes the newest whole step, and says so
when that is not the newest.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
META = "meta.json"


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint was passed over; the message names it, what is wrong with it and what is used instead."""


def seal(directory: Path, meta: bytes) -> None:
    """Complete the step that Orbax has finished: `meta` goes in, then the manifest of all files, last."""
    write_atomically(directory / META, meta)
    write_atomically(directory / MANIFEST, json_bytes(_manifest(directory)))


def find_damage(directory: Path) -> str | None:
    """What is wrong with a step's directory, beginning with the file's name; None when it is whole."""
    if directory.is_symlink():
        return f"a symbolic link to {os.readlink(directory)}"
    if not (directory / MANIFEST).is_file():
        return f"{MANIFEST}: missing, the process ended before the step was complete"
    try:
        text, found = (directory / MANIFEST).read_bytes(), _manifest(directory)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if text == json_bytes(found):
        step = json.loads((directory / META).read_bytes()).get("step")  # older runs have none
        return None if step in (None, int(directory.name)) else f"{META}: it is a copy of step {step}"
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


def newest_whole(checkpoints: Path) -> int | None:
    """The newest whole step. Damaged ones that are newer are moved aside, with a warning each."""
    # Orbax's own unfinished steps (`*.orbax-checkpoint-tmp`) are not numbers; it removes them when it saves
    # again.
    steps = sorted((int(path.name) for path in checkpoints.iterdir() if _is_step(path.name)), reverse=True)
    newest, damaged = None, {}
    for step in steps:
        directory = checkpoints / str(step)
        # An older step is looked at only if it is a link, which Orbax cannot delete.
        if newest is None or directory.is_symlink():
            damage = find_damage(directory)
            if damage is None:
                newest = step
            else:
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


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content so that a kill or a power cut leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


def _manifest(directory: Path) -> dict[str, list]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST)
    return {path.relative_to(directory).as_posix(): _size_and_sha256(path) for path in files}


def json_bytes(value: Any) -> bytes:
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
