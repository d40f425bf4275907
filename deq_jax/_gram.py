"""The small systems of a history, one for each problem: kept up to date, and solved for all problems at once.

For m columns dᵢ and a vector g the system is

    (1)  A γ = b  with  Aᵢⱼ = ⟨dᵢ, dⱼ⟩,  bᵢ = ⟨dᵢ, g⟩      so γ = argmin ‖g − Σ γᵢ dᵢ‖

It is one array `[*batch, m + 1, m]`: A, and b as its last row. Aᵢᵢ is zero where column i is not in use. With a
relative ridge and D = diag(1 / ‖dᵢ‖), (1) is solved as

    (2)  (D A D + ridge I) y = D b,  γ = D y

from the newest column to the oldest. A column that depends on newer ones gets γᵢ = 0: its pivot, sin² of its angle to
them, is rounding. `written_out` does so on entries `[*batch]`, which makes one kernel. `in_a_loop` compiles faster, and
is as fast where no kernels are launched.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deq_jax._arrays import per_problem, ratio, reciprocal, safe_sqrt, settled, zeros_from
from deq_jax._rows import rolled, write_row

SMALL = 8  # the most columns that one kernel eliminates; the compiler takes 29 s and more for 16 of them
LARGE = 16  # the most that are written out


def stacked(entries: list[Float[Array, "*batch"]]) -> Float[Array, "*batch m"]:
    """`jnp.stack`, by selections: it then needs no kernel of its own."""
    place, (first, *others) = _index(len(entries), -1, 1 + entries[0].ndim), [x[..., None] for x in entries]
    return functools.reduce(lambda a, i: jnp.where(place == i + 1, others[i], a), range(len(others)), first)


def with_column(
    system: Float[Array, "*batch rows m"],
    products: Float[Array, "*batch m"],
    square: Float[Array, "*batch"],
    newest: Float[Array, "*batch"],
    slot: Int[Array, "*#batch"],
    new: Bool[Array, "*batch"],
    held: Bool[Array, "*batch"],
    ended: Bool[Array, "*batch"],
) -> Float[Array, "*batch rows m"]:
    """The system with one more column d at `slot`, where `new`, and with g + d in place of g, except where `held`.

    The products are ⟨dᵢ, d⟩, the square is ⟨d, d⟩, and newest is ⟨d, g + d⟩. Where `ended`, the columns before it are
    no longer in use.

    ⟨dᵢ, g + d⟩ is updated from the stored products; only that with d itself is computed from scratch. Rounding errors
    add up for as long as a column is held, and cost no evaluation (experiments/studies/gains.py, 6). All is kept
    finite, so that an overflow in a column out of use is no NaN in those in use.
    """
    given = system, products, square, newest, slot, new, held, ended
    return jax.lax.platform_dependent(*given, cpu=column_in_place, default=column_in_one_kernel)


def column_in_place(system, products, square, newest, slot, new, held, ended):
    """What changes is written where it stands: two rows, and a column in one pass."""
    m, finite = system.shape[-1], lambda x: jnp.where(jnp.isfinite(x), x, 0)
    row, column = _index(m + 1, -2, system.ndim), _index(m, -1, system.ndim)
    here = new[..., None] & (column[..., 0, :] == per_problem(slot))
    products = jnp.where(here, square[..., None], finite(products))
    b = system[..., m, :]
    b = jnp.where(here, newest[..., None], jnp.where(held[..., None], b, finite(b + products)))
    below = jnp.concatenate([products, newest[..., None]], axis=-1)
    system = jnp.where((row == column) & ended[..., None, None], 0, system)
    system = jnp.where(here[..., None, :], below[..., :, None], system)
    system = write_row(system, products, slot, new)
    return jax.lax.dynamic_update_slice_in_dim(system, b[..., None, :], m, axis=system.ndim - 2)


def column_in_one_kernel(system, products, square, newest, slot, new, held, ended):
    """The same by selections alone. Nothing may be used twice that is not cheap: hence `finite` at each use."""
    m, finite = system.shape[-1], lambda x: jnp.where(jnp.isfinite(x), x, 0)
    row, column = _index(m + 1, -2, system.ndim), _index(m, -1, system.ndim)
    square, newest, new, held, ended = (x[..., None, None] for x in (square, newest, new, held, ended))
    slot = per_problem(per_problem(slot))
    by_row = jax.lax.pad(products, jnp.zeros((), products.dtype), [(0, 0, 0)] * (products.ndim - 1) + [(0, 1, 0)])
    by_row, by_column = jnp.where(row == m, newest, by_row[..., :, None]), products[..., None, :]
    b = jnp.where(held | ~jnp.isfinite(system + by_column), system, system + by_column)
    system = jnp.where((row == column) & ended, 0, jnp.where(row == m, b, system))
    in_row = jnp.where((row == slot) & new, finite(by_column), system)
    in_column = jnp.where(row == slot, square, finite(by_row))
    return jnp.where((column == slot) & new, in_column, in_row)


def solve(
    system: Float[Array, "*batch rows m"], ridge: Array, newest: Int[Array, "*#batch"]
) -> list[Float[Array, "*batch"]]:
    """γ of (1) in the order of age, that of the column in slot `newest` first, which may be each problem's own."""
    if newest.ndim:
        system, newest = by_age(system, newest)
    if system.shape[-1] > LARGE:
        return in_a_loop(system, ridge, newest)
    return jax.lax.platform_dependent(system, ridge, newest, cpu=in_a_loop, tpu=in_a_loop, default=written_out)


def by_age(
    system: Float[Array, "*batch rows m"], newest: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch rows m"], Int[Array, ""]]:
    """The system with its columns in the order of age, the oldest first, and the slot that is now the newest."""
    m = system.shape[-1]
    shift, system = m - 1 - newest, rolled(system, m - 1 - newest, -1)
    rows = rolled(system[..., :m, :], shift, -2)
    return jnp.concatenate([rows, system[..., m:, :]], axis=-2), jnp.asarray(m - 1, newest.dtype)


# ---- in a loop ---------------------------------------------------------------------------------------------


def in_a_loop(
    system: Float[Array, "*batch rows m"], ridge: Array, newest: Int[Array, ""]
) -> list[Float[Array, "*batch"]]:
    """γ of (1), by Gauss-Jordan elimination of (2)."""
    m = system.shape[-1]
    # The problems come last, side by side in the vector registers.
    a = jnp.moveaxis(system, (-2, -1), (0, 1))
    d = reciprocal(safe_sqrt(jnp.stack([a[i, i] for i in range(m)])))
    is_diagonal = _index(m, 0, a.ndim) == _index(m, 1, a.ndim)
    ridge = jnp.where(is_diagonal, ridge[None, None] if ridge.ndim else ridge, 0)
    y = eliminate(a[:m] * d[:, None] * d[None] + ridge, a[m] * d, newest) * d
    return [jax.lax.dynamic_index_in_dim(y, newest - age, 0, keepdims=False) for age in range(m)]


def eliminate(
    a: Float[Array, "m m *batch"], b: Float[Array, "m *batch"], newest: Int[Array, ""]
) -> Float[Array, "m *batch"]:
    """y with a y = b over the columns that are independent, from `newest` back; 0 at the others."""
    m, eps = a.shape[0], float(jnp.finfo(a.dtype).eps)
    entry = lambda x, j, axis, keepdims=False: jax.lax.dynamic_index_in_dim(x, j, axis=axis, keepdims=keepdims)

    def body(age, carry):
        a, b, kept = carry
        j = (newest - age) % m
        here = jax.lax.expand_dims((jnp.arange(m, dtype=jnp.int32) == j).astype(a.dtype), range(1, b.ndim))
        column, row = entry(a, j, 1), entry(a, j, 0)
        pivot = entry(row, j, 0)  # sin² of the angle to newer columns
        keep = jnp.abs(pivot) > 10 * m * eps
        column = (column - here) * ratio(1, pivot, where=keep)[None]
        a = a - column[:, None] * row[None]
        b = b - column * entry(b, j, 0, keepdims=True)
        return a, b, kept + jnp.where(keep, here, 0)

    # Unrolled, the loop ran slower (4096 problems: 3.6 ms a step against 2.4) and took half again as long to compile.
    _, b, kept = jax.lax.fori_loop(0, m, body, (a, b, zeros_from(b)))
    return jnp.where(kept > 0, b, 0)


# ---- written out -------------------------------------------------------------------------------------------


def written_out(
    system: Float[Array, "*batch rows m"], ridge: Array, newest: Int[Array, ""]
) -> list[Float[Array, "*batch"]]:
    """γ of (1), by a factorization L D Lᵀ of A.

    It is that of (2) up to the scaling, if pivots are compared with the diagonal of A, and the ridge is relative to it.
    """
    system, m = jnp.moveaxis(system, (-2, -1), (0, 1)), system.shape[-1]
    # One kernel brings all in the order of age, so that the next one has no index to compute.
    system = jnp.roll(system[:, ::-1], newest + 1, 1)
    system = jnp.concatenate([jnp.roll(system[:m][::-1], newest + 1, 0), system[m:]])
    system = settled(system)
    a = _lower_triangle(system, m + 1)
    squares, b = [a[i, i] for i in range(m)], [a[m, i] for i in range(m)]
    more = jax.lax.full_like(squares[0], 1) + ridge
    a = {(i, j): jax.lax.mul(x, more) if i == j else x for (i, j), x in a.items() if i < m}
    if m <= SMALL:
        return _substitute(_factor(a, squares, m), b)
    return _in_two_blocks(system, a, squares, b, more)


def _in_two_blocks(system: Array, a: dict, squares: list, b: list, more: Array) -> list:
    """The same by blocks, A₁₁ of the newer half: S = A₂₂ − A₂₁ A₁₁⁻¹ A₁₂, S γ₂ = b₂ − A₂₁ A₁₁⁻¹ b₁, and γ₁ by γ₂.

    Three kernels: the factor of A₁₁; S and its right-hand side, each entry by itself; the solution.
    """
    m = system.shape[1]
    n = (m + 1) // 2
    rest = m - n
    leading = {place: x for place, x in a.items() if place[0] < n}
    first = settled(_factor(leading, squares[:n], m))
    columns = [jax.lax.index_in_dim(system, j, 1, keepdims=False) for j in range(n)]  # each [m + 1, *batch]
    everywhere = lambda x: jnp.broadcast_to(x, (rest, rest + 1, *x.shape))
    sides = [jnp.broadcast_to(column[None, n:], (rest, rest + 1, *column.shape[1:])) for column in columns]
    x = _substitute(jax.tree.map(everywhere, first), sides)  # A₁₁⁻¹ of the columns of A₁₂, and of b₁
    schur = jnp.swapaxes(system[n:, n:], 0, 1)
    is_diagonal = _index(rest, 0, schur.ndim) == _index(rest + 1, 1, schur.ndim)
    schur = schur * jnp.where(is_diagonal, more[None, None], 1)
    schur = schur - sum(jnp.broadcast_to(columns[j][n:m, None], schur.shape) * x[j] for j in range(n))
    schur = settled(schur)
    right = [jax.lax.index_in_dim(schur[:, rest], i, 0, keepdims=False) for i in range(rest)]
    last = _substitute(_factor(_lower_triangle(schur, rest), squares[n:], m), right)
    left = [_minus(b[i], *((a[n + j, i], last[j]) for j in range(rest))) for i in range(n)]
    return _substitute(first, left) + last


def _lower_triangle(a: Float[Array, "rows m *batch"], rows: int) -> dict[tuple[int, int], Float[Array, "*batch"]]:
    """The entries (i, j), j ≤ i, of so many rows."""
    at = lambda x, i: jax.lax.index_in_dim(x, i, 0, keepdims=False)
    by_row = [at(a, i) for i in range(rows)]
    return {(i, j): at(row, j) for i, row in enumerate(by_row) for j in range(min(i + 1, a.shape[1]))}


def _factor(a: dict, squares: list, size: int) -> tuple[dict, list, list]:
    """(L, 1 / D, which columns are used) of A = L D Lᵀ, by the squares ‖dᵢ‖² and the size of the whole system."""
    # In primitives of lax: operators of jnp take five times as long to trace, on platforms that never run this too.
    n, eps = len(squares), float(jnp.finfo(squares[0].dtype).eps)
    zero, one, least = (jax.lax.full_like(squares[0], x) for x in (0, 1, 10 * size * eps))
    a, factor, inverses, used = dict(a), {}, [], []
    for j in range(n):
        apart = jax.lax.gt(jax.lax.abs(a[j, j]), jax.lax.mul(least, squares[j]))  # from newer columns
        keep = jax.lax.bitwise_and(jax.lax.gt(squares[j], zero), apart)
        inverses.append(jax.lax.select(keep, jax.lax.div(one, jax.lax.select(keep, a[j, j], one)), zero))
        used.append(keep)
        for i in range(j + 1, n):
            factor[i, j] = jax.lax.mul(a[i, j], inverses[j])
        for i in range(j + 1, n):
            for k in range(j + 1, i + 1):
                a[i, k] = _minus(a[i, k], (factor[i, j], a[k, j]))
    return factor, inverses, used


def _substitute(factored: tuple[dict, list, list], b: list) -> list:
    """y with L D Lᵀ y = b; 0 at the columns that are not used."""
    (factor, inverses, used), n, b = factored, len(b), list(b)
    for i in range(n):
        b[i] = _minus(b[i], *((factor[i, j], b[j]) for j in range(i)))
    for j in reversed(range(n)):
        y = _minus(jax.lax.mul(b[j], inverses[j]), *((factor[i, j], b[i]) for i in range(j + 1, n)))
        b[j] = jax.lax.select(used[j], y, jax.lax.full_like(y, 0))
    return b


def _minus(x: Array, *pairs: tuple[Array, Array]) -> Array:
    """x − Σ y z."""
    for y, z in pairs:
        x = jax.lax.sub(x, jax.lax.mul(y, z))
    return x


def _index(size: int, axis: int, ndim: int) -> Int[Array, "..."]:
    """The index along one axis, in the rank of what it goes with."""
    return jax.lax.expand_dims(jnp.arange(size, dtype=jnp.int32), [i for i in range(ndim) if i != axis % ndim])
