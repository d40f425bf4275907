"""The referee's process: it solves a problem for itself, and judges what a contender has left in a file."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.problems import Problem
from experiments.shared.referee import cell_of, dense, double, iterated, norms


def commands(table: dict[str, Callable[[], Problem]]) -> dict[str, Callable]:
    jax.config.update("jax_enable_x64", True)
    known: dict[str, Any] = {}

    def solve(problem: str) -> dict:
        drawn = table[problem]()
        params, data = jax.tree.map(double, (drawn.params, drawn.data))
        solution = (dense if drawn.dense else iterated)(drawn, params, data)
        known.update(drawn=drawn, params=params, data=data, grads=solution[1])
        return {"scale": float(jnp.linalg.norm(solution[0]))}

    def judge(path: str) -> dict:
        """The largest relative residual of a problem, and the error of the whole gradient."""
        with np.load(path) as found:
            z = jnp.asarray(found["z"], jnp.float64)
            grads = {name: found[f"grad_{name}"].astype(np.float64) for name in known["grads"]}
        fz = cell_of(known["drawn"], known["params"], known["data"])(z)
        residual = jnp.max(norms(fz - z) / norms(fz))
        wrong = sum(np.sum((grads[name] - known["grads"][name]) ** 2) for name in grads)
        whole = sum(np.sum(np.asarray(grad) ** 2) for grad in known["grads"].values())
        return {"residual": float(residual), "gradient_error": float(np.sqrt(wrong / whole))}

    return {"solve": solve, "judge": judge}
