"""The report of `python -m deq_jax`: the relevant versions, and pairs of them that are known not to work."""

import importlib.metadata
import platform
import re
from collections.abc import Mapping

import deq_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "jaxtyping", "numpy")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")

# flax uses internals of jax, so each release works only with some releases of jax. flax declares the lower end. The
# upper end, which pip does not know, was measured for flax 0.11.2 to 0.12.12 and jax 0.7.2 to 0.12.0.1 by one
# nnx.jit(nnx.grad(...)) each.
#   flax from, jax from, jax below
_FLAX_NEEDS_JAX = (
    ("0.11.2", "0.7.1", "0.8.2"),
    ("0.12.1", "0.8.1", "0.8.2"),
    ("0.12.2", "0.8.1", "0.11.0"),
    ("0.12.7", "0.10.0", "0.11.1"),
    ("0.12.9", "0.11.1", "0.11.2"),
    ("0.12.10", "0.11.1", None),
)


def installed_versions() -> dict[str, str]:
    """Version by package name, without importing the packages. An absent package has no entry."""
    found = {}
    for name in PACKAGES + PLUGINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def known_bad(versions: Mapping[str, str]) -> list[str]:
    """One sentence for each pair in `versions` that is known to fail, which says what to install instead."""
    return _bad_floors(versions) + _bad_jaxlib(versions) + _bad_flax(versions) + _bad_plugins(versions)


def report() -> tuple[str, list[str]]:
    """The text for a bug report, and the result of `known_bad` for this installation."""
    versions = installed_versions()
    problems = known_bad(versions)
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    rows = [("deq-jax", deq_jax.__version__), ("python", python), ("platform", platform.platform())]
    rows += [(name, versions.get(name, "not installed")) for name in PACKAGES]
    rows += [(name, versions[name]) for name in PLUGINS if name in versions]
    rows += _jax_rows()
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    return "\n".join(lines + [f"warning: {problem}" for problem in problems]), problems


def _bad_floors(versions):
    for name, floor in ("jax", "0.7.2"), ("flax", "0.11.2"):
        if name in versions and _release(versions[name]) < _release(floor):
            return [f'{name} {versions[name]} is older than deq_jax supports; pip install "{name}>={floor}".']
    return []


def _bad_jaxlib(versions):
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax and jaxlib and _release(jaxlib) > _release(jax):  # jax checks this too, but only after its import
        return [f'jaxlib {jaxlib} is newer than jax {jax}, which refuses it; pip install "jaxlib=={jax}".']
    return []


def _bad_flax(versions):
    if not {"jax", "flax"} <= versions.keys():
        return []
    jax, flax = versions["jax"], versions["flax"]
    rows = [row for row in _FLAX_NEEDS_JAX if _release(row[0]) <= _release(flax)]
    if not rows or _in_window(jax, rows[-1]):
        return []
    _, low, high = rows[-1]
    window = f"jax>={low}" + (f",<{high}" if high else "")
    # Change flax rather than jax, which a CUDA plugin or Colab may have pinned.
    fits = max((i for i, row in enumerate(_FLAX_NEEDS_JAX) if _in_window(jax, row)), default=None)
    if fits is None:
        return [f'flax {flax} is for {window}, here is jax {jax}; pip install "{window}".']
    below = _FLAX_NEEDS_JAX[fits + 1][0] if fits + 1 < len(_FLAX_NEEDS_JAX) else None
    instead = f"flax>={_FLAX_NEEDS_JAX[fits][0]}" + (f",<{below}" if below else "")
    return [f'flax {flax} is for {window}, here is jax {jax}; pip install "{instead}".']


def _bad_plugins(versions):
    jaxlib = versions.get("jaxlib")
    return [
        f"{name} {versions[name]} is not used by jaxlib {jaxlib}: their versions have to be equal, and until "
        f'then JAX runs on the CPU; pip install "{name}=={jaxlib}".'
        for name in PLUGINS
        if jaxlib and name in versions and _release(versions[name]) != _release(jaxlib)
    ]


def _jax_rows():
    import jax

    try:
        devices = ", ".join(str(d) for d in jax.devices())
    except RuntimeError as error:  # a GPU that exists but cannot be started
        devices = f"none: {error}"
    return [("devices", devices), ("x64", "on" if jax.config.read("jax_enable_x64") else "off")]


def _in_window(jax, row):
    _, low, high = row
    return _release(low) <= _release(jax) and (high is None or _release(jax) < _release(high))


def _release(version: str) -> tuple[int, ...]:
    """(0, 12, 0, 1) for "0.12.0.1.dev3+abc", which suffices for the plain versions compared here."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
