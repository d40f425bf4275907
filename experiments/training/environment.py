"""Where a number was measured."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import optax

import deq_jax as deq


def environment() -> dict[str, Any]:
    """Where a number was measured: machine, devices and versions, with nothing that names the host."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.system(),
            "devices": [device.device_kind for device in jax.devices()],
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "deq_jax": deq.__version__,
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
