"""All random cells as one batch, and how exactly they are to be solved."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.cells import DIM, FAMILIES

RTOL = 1e-4
CELL_BUDGET = 100
# A residual in float32 carries the rounding of f: a claim may miss rtol by this much, and whoever declines to
# claim must have missed it by no more.
CELL_SLACK = 8 * float(np.finfo(np.float32).eps)


class Problems(NamedTuple):
    """All cells as one batch, so that a solver is compiled once; those that differ in numbers alone share a program."""

    families: list[list[str]]  # by program
    cells: list[Callable]
    params: list[Any]  # leaves [families · seeds, ...]

    def f(self, z, params):
        parts = jnp.split(z, np.cumsum([len(jax.tree.leaves(p)[0]) for p in params])[:-1])
        return jnp.concatenate([jax.vmap(c)(part, p) for c, part, p in zip(self.cells, parts, params, strict=True)])


def draw(names: tuple[str, ...], seeds: range) -> Problems:
    programs: dict[str, list[tuple[str, Any]]] = {}
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    for name in names:
        family = FAMILIES[name]
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, zlib.crc32(name.encode()))
        params = jax.vmap(family.make)(own)  # not compiled as one: the families share most of their operations
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)), name
        one = jax.tree.map(lambda leaf: leaf[0], params)
        program = str(jax.make_jaxpr(family.cell)(jnp.zeros(DIM, jnp.float32), one))
        programs.setdefault(program, []).append((name, params))
    families = [[name for name, _ in group] for group in programs.values()]
    stack = lambda *leaves: jnp.concatenate(leaves)
    params = [jax.tree.map(stack, *[p for _, p in group]) for group in programs.values()]
    return Problems(families, [FAMILIES[group[0]].cell for group in families], params)
