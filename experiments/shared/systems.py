"""The classical systems of Moré, Garbow & Hillstrom (1981), as in MINPACK's test of hybrd."""

from typing import Any

import numpy as np

# (number of the function, n, starts): the standard start and 10 and 100 times it.
RUNS = (
    (1, 2, 3), (2, 4, 3), (3, 2, 2), (4, 4, 3), (5, 3, 3), (6, 6, 2), (6, 9, 2), (7, 5, 3), (7, 6, 3), (7, 7, 3),
    (7, 8, 1), (7, 9, 1), (8, 10, 3), (8, 30, 1), (8, 40, 1), (9, 10, 3), (10, 1, 3), (10, 10, 3), (11, 10, 3),
    (12, 10, 3), (13, 10, 3), (14, 10, 3),
)  # fmt: skip
NO_ZERO = (7, 8)  # Chebyquad has no zero for n = 8
NAMES = {
    1: "Rosenbrock", 2: "Powell singular", 3: "Powell badly scaled", 4: "Wood", 5: "helical valley", 6: "Watson",
    7: "Chebyquad", 8: "Brown almost linear", 9: "discrete boundary value", 10: "discrete integral equation",
    11: "trigonometric", 12: "variably dimensioned", 13: "Broyden tridiagonal", 14: "Broyden banded",
}  # fmt: skip


def classical(number: int, z: Any, xp: Any = np) -> Any:
    """F(z) of the last axis; `xp` is numpy or jax.numpy."""
    n = z.shape[-1]
    k = np.arange(1, n + 1)
    x = [z[..., i] for i in range(n)]
    join = lambda *columns: xp.stack(columns, axis=-1)
    left = xp.concatenate([0 * z[..., :1], z[..., :-1]], axis=-1)
    right = xp.concatenate([z[..., 1:], 0 * z[..., :1]], axis=-1)
    total = lambda y: xp.sum(y, axis=-1, keepdims=True)
    if number == 1:
        return join(1 - x[0], 10 * (x[1] - x[0] ** 2))
    if number == 2:
        return join(x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2)
    if number == 3:
        return join(1e4 * x[0] * x[1] - 1, xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001)
    if number == 4:
        a, b = x[1] - x[0] ** 2, x[3] - x[2] ** 2
        return join(
            -200 * x[0] * a - (1 - x[0]),
            200 * a + 20.2 * (x[1] - 1) + 19.8 * (x[3] - 1),
            -180 * x[2] * b - (1 - x[2]),
            180 * b + 20.2 * (x[3] - 1) + 19.8 * (x[1] - 1),
        )
    if number == 5:
        safe = xp.where(x[0] == 0, 1.0, x[0])
        turn = xp.arctan(x[1] / safe) / (2 * np.pi) + xp.where(x[0] < 0, 0.5, 0.0)
        turn = xp.where(x[0] == 0, 0.25 * xp.sign(x[1]), turn)
        return join(10 * (x[2] - 10 * turn), 10 * (xp.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2])
    if number == 6:
        t = np.arange(1, 30)[:, None] / 29  # Watson: the gradient of a sum of squares
        a = xp.einsum("...j,tj->...t", z[..., 1:], k[:-1] * t ** (k[1:] - 2))
        b = xp.einsum("...j,tj->...t", z, t ** (k - 1))
        weight = (k - 1) * t ** (k - 2.0) - 2 * b[..., None] * t ** (k - 1)
        fit = xp.sum(weight * (a - b**2 - 1)[..., None], axis=-2)
        last = x[1] - x[0] ** 2 - 1
        zero = 0 * x[0]
        return fit + join(x[0] * (1 - 2 * last), last, *[zero] * (n - 2))
    if number == 7:
        y, before, out = 2 * z - 1, xp.ones_like(z), []
        now = y
        for degree in range(1, n + 1):
            out.append(xp.mean(now, axis=-1) + (1 / (degree**2 - 1) if degree % 2 == 0 else 0.0))
            before, now = now, 2 * y * now - before
        return join(*out)
    if number == 8:
        first = z + total(z) - (n + 1)
        return xp.concatenate([first[..., :-1], xp.prod(z, axis=-1, keepdims=True) - 1], axis=-1)
    h = 1 / (n + 1)
    t = k * h
    cube = (z + t + 1) ** 3
    if number == 9:
        return 2 * z - left - right + cube * (h**2 / 2)
    if number == 10:
        kernel = np.where(k[:, None] >= k, (1 - t[:, None]) * t, t[:, None] * (1 - t))
        return z + h / 2 * xp.einsum("kj,...j->...k", kernel, cube)
    if number == 11:
        return (n + k) - total(xp.cos(z)) - xp.sin(z) - k * xp.cos(z)
    if number == 12:
        s = total(k * (z - 1))
        return z - 1 + k * s * (1 + 2 * s**2)
    if number == 13:
        return (3 - 2 * z) * z - left - 2 * right + 1
    assert number == 14
    band = np.array([[1.0 if i - 5 <= j <= i + 1 and j != i else 0.0 for j in range(n)] for i in range(n)])
    return z * (2 + 5 * z**2) + 1 - xp.einsum("kj,...j->...k", band, z * (1 + z))


def start(number: int, n: int, factor: float) -> np.ndarray:
    k = np.arange(1, n + 1)
    t = k / (n + 1)
    z = {
        1: [-1.2, 1.0], 2: [3.0, -1, 0, 1], 3: [0.0, 1], 4: [-3.0, -1, -3, -1], 5: [-1.0, 0, 0], 6: 0.0 * k, 7: t,
        8: 0.5 + 0 * k, 9: t * (t - 1), 10: t * (t - 1), 11: 1 / n + 0 * k, 12: 1 - k / n, 13: -1.0 + 0 * k,
        14: -1.0 + 0 * k,
    }[number]  # fmt: skip
    return factor + 0.0 * k if number == 6 and factor != 1 else factor * np.asarray(z)


MGH_ATOL = 1e-8  # ‖F(z)‖₂ of a solved system, whatever it was at the start; rtol is 0
MGH_BUDGET = 2000  # evaluations of F: 50 Jacobians by differences at n = 40
MGH_SLACK = 4 * float(np.finfo(np.float64).eps)  # times ‖z‖: f(z) − z = −F(z) loses what z rounds away
MGH_FLOOR = 64 * float(np.finfo(np.float64).eps)  # times ‖(z, z0)‖: below it F may be rounding
