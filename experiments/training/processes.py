"""One run in several processes, each with devices of its own: how they join, and what they agree on.

Every process is started by the same command. `--coordinator HOST:PORT,COUNT,INDEX` names the address of the first one,
their number and this one's place, from 0; `--coordinator auto` takes these from Slurm, Open MPI, Kubernetes or a TPU
pod. The first process prints, and writes all files but the arrays of checkpoints, of which each writes its part: they
need one file system. JAX watches over them: when one is lost it ends the others, and says which one it was.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.training.loop import StopRequest

T = TypeVar("T")
JOINING, HEARTBEAT, LEAVING = 120, 20, 20  # seconds to wait for all; until one is lost; for the others at the end


@contextlib.contextmanager
def joined(coordinator: str) -> Iterator[None]:
    """One of the processes of a run, before anything else is computed; nothing where `coordinator` is empty."""
    if not coordinator:
        yield
        return
    _join(coordinator)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"process {jax.process_index()} lost another one, which JAX will name: {reason}", file=sys.stderr)
        time.sleep(2 * HEARTBEAT)  # JAX ends the process before
        raise


def _join(coordinator: str) -> None:
    place = {} if coordinator == "auto" else _place(coordinator)
    joining = int(os.environ.get("DEQ_JAX_JOINING", JOINING))
    # Said before, since JAX ends a process that finds no coordinator without coming back to Python.
    print(f"--coordinator {coordinator}: joining, for at most {joining} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=joining,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
    except (RuntimeError, ValueError) as error:
        nobody = coordinator == "auto" and isinstance(error, ValueError)
        reason = "JAX finds no cluster here" if nobody else str(error).splitlines()[0]
        raise RuntimeError(f"--coordinator {coordinator}: the processes could not be joined: {reason}") from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # until the end


def _place(coordinator: str) -> dict[str, Any]:
    match coordinator.split(","):
        case [address, count, index] if ":" in address and count.isdecimal() and index.isdecimal():
            if int(index) < int(count):
                return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    raise ValueError(f"--coordinator must be auto or HOST:PORT,COUNT,INDEX with INDEX < COUNT, got {coordinator!r}")


def is_first() -> bool:
    """Whether this is the process that prints and writes; the only one is."""
    return jax.process_index() == 0


def from_first(of: Callable[[], T]) -> T:
    """What `of` returns in the first process, a JSON value, in every process; what it raises there, all raise."""
    if jax.process_count() == 1:
        return of()
    said, failure = None, None
    if is_first():
        try:
            said = {"value": of()}
        except (OSError, ValueError, RuntimeError) as error:
            said, failure = {"error": str(error)}, error
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    said = json.loads(multihost_utils.broadcast_one_to_all(np.resize(text, size)).astype(np.uint8).tobytes())
    if "error" in said:
        raise failure or RuntimeError(said["error"])
    return said["value"]


def check_same(values: dict[str, Any]) -> None:
    """ValueError in every process, with the names, unless these JSON values are the same in all of them."""
    digest = lambda value: np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest()[:8], np.int32)
    names = sorted(values)
    seen = multihost_utils.process_allgather(np.stack([digest(values[name]) for name in names]))
    seen = seen.reshape(jax.process_count(), len(names), 2)
    if differ := np.argwhere((seen != seen[0]).any(2)).tolist():
        words = ", ".join(f"{names[i]} in process {process}" for process, i in differ[:5])
        raise ValueError(f"the processes disagree: what differs from process 0 is {words}")


def stops(stop: StopRequest, now: bool) -> bool:
    """Whether the run is to end after this step: several processes ask each other, in the steps with `now`."""
    if jax.process_count() == 1:
        return stop.signum is not None
    if now:
        stop.signum = int(multihost_utils.process_allgather(np.int32(stop.signum or 0)).max()) or None
    return now and stop.signum is not None
