"""The small systems of a history: two ways to solve them, and how they are kept up to date."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import _gram

M = (1, 2, 3, 5, 8, 12, 16, 17)


def system_of(columns, g, in_use=None):
    """[batch, m + 1, m] of columns [batch, m, dim] and g [batch, dim]."""
    a, b = jnp.einsum("nid,njd->nij", columns, columns), jnp.einsum("nid,nd->ni", columns, g)
    if in_use is not None:
        a = jnp.where((jnp.eye(len(in_use), dtype=bool) & ~jnp.asarray(in_use)[:, None])[None], 0, a)
    return jnp.concatenate([a, b[:, None]], axis=1)


def in_slots(gamma, newest):
    """The solution in the order of slots, from one in the order of age."""
    ages = (newest - np.arange(len(gamma))) % len(gamma)
    return jnp.stack([gamma[age] for age in ages], axis=-1)


WAYS = pytest.mark.parametrize("way", [_gram.in_a_loop, _gram.written_out])


@WAYS
@pytest.mark.parametrize("m", M)
def test_it_is_the_least_squares_solution(x64, rng, m, way):
    columns, g = jax.random.normal(rng, (4, m, 40)), jax.random.normal(jax.random.key(1), (4, 40))
    columns = columns * 10.0 ** jnp.linspace(-6, 6, m)[None, :, None]
    newest = jnp.asarray(m // 2)
    gamma = in_slots(jax.jit(way)(system_of(columns, g), jnp.asarray(0.0), newest), newest)
    for a, b, y in zip(*map(np.asarray, (columns, g, gamma)), strict=True):
        lengths = np.linalg.norm(a, axis=-1)
        np.testing.assert_allclose(y * lengths, np.linalg.lstsq(a.T / lengths, b, rcond=None)[0], rtol=1e-10)


@WAYS
@pytest.mark.parametrize("m", [1, 5, 12])
def test_the_ridge_is_relative_and_one_a_problem(x64, rng, m, way):
    columns, g = jax.random.normal(rng, (2, m, 40)), jax.random.normal(jax.random.key(1), (2, 40))
    ridge, newest = jnp.array([1e-3, 0.5]), jnp.asarray(0)
    system = system_of(columns, g)
    gamma = in_slots(jax.jit(way)(system, ridge, newest), newest)
    for i in range(2):
        a, b = system[i, :m], system[i, m]
        np.testing.assert_allclose(gamma[i], np.linalg.solve(a + ridge[i] * np.diag(np.diag(a)), b), rtol=1e-9)


@WAYS
@pytest.mark.parametrize("m", M)
def test_a_column_is_left_out_if_it_depends_on_newer_ones_or_is_not_in_use(x64, rng, m, way):
    columns, g = jax.random.normal(rng, (3, m, 40)), jax.random.normal(jax.random.key(1), (3, 40))
    newest, in_use = jnp.asarray(m - 1), np.arange(m) % 4 != 1  # in the order of age: m − 1, …, 0
    if m > 2:
        columns = columns.at[:, 0].set(2 * columns[:, m - 1] - columns[:, 2])
    gamma = in_slots(jax.jit(way)(system_of(columns, g, in_use), jnp.asarray(0.0), newest), newest)
    kept = in_use & ((np.arange(m) > 0) | (m <= 2))
    assert jnp.all(gamma[:, ~kept] == 0)
    for i in range(3):
        expected = np.linalg.lstsq(columns[i, kept].T, g[i], rcond=None)[0]
        np.testing.assert_allclose(gamma[i, kept], expected, rtol=1e-9)


@pytest.mark.parametrize("m", [3, 12])
def test_both_ways_have_the_same_derivative(x64, rng, m):
    columns, g = jax.random.normal(rng, (2, m, 40)), jax.random.normal(jax.random.key(1), (2, 40))
    args = system_of(columns, g), jnp.asarray(1e-4), jnp.asarray(0)
    tangents = system_of(columns[:, ::-1], g), jnp.asarray(1e-3)
    slopes = [
        jax.jvp(lambda a, r, way=way: jnp.stack(way(a, r, args[2])), args[:2], tangents)[1]
        for way in (_gram.in_a_loop, _gram.written_out)
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-8)


@pytest.mark.parametrize("with_column", [_gram.column_in_place, _gram.column_in_one_kernel])
def test_a_new_column_replaces_one_and_brings_the_products_up_to_date(x64, rng, with_column):
    columns, g = jax.random.normal(rng, (3, 4, 9)), jax.random.normal(jax.random.key(1), (3, 9))
    d, slot = jax.random.normal(jax.random.key(2), (3, 9)), jnp.asarray(2)
    yes, no, before = jnp.ones(3, bool), jnp.zeros(3, bool), system_of(columns, g)
    given = jnp.einsum("nid,nd->ni", columns, d), jnp.sum(d * d, -1), jnp.sum(d * (g + d), -1), slot
    with_column = jax.jit(with_column)
    expected = system_of(columns.at[:, 2].set(d), g + d)
    np.testing.assert_allclose(with_column(before, *given, yes, no, no), expected, rtol=1e-12, atol=1e-12)
    # Where d is not new b alone changes, unless it is held; where the history has ended, no other column is in use.
    expected = system_of(columns, g + d)
    np.testing.assert_allclose(with_column(before, *given, no, no, no), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(with_column(before, *given, no, yes, no), before)
    ended = with_column(before, *given, yes, no, yes)
    np.testing.assert_allclose(jnp.diagonal(ended, axis1=1, axis2=2), given[1][:, None] * jnp.eye(4)[None, 2])


def test_what_overflows_leaves_the_system_finite(x64, rng):
    before = system_of(jax.random.normal(rng, (2, 3, 5)), jax.random.normal(rng, (2, 5)))
    products, one = jnp.array([[jnp.inf, 1.0, jnp.nan]] * 2), jnp.ones(2)
    for with_column in (_gram.column_in_place, _gram.column_in_one_kernel):
        after = with_column(before, products, one, one, jnp.asarray(1), one > 0, one < 0, one < 0)
        np.testing.assert_array_equal(after[:, :, 1], jnp.array([[0.0, 1.0, 0.0, 1.0]] * 2))
        np.testing.assert_array_equal(after[:, 3, jnp.array([0, 2])], before[:, 3, jnp.array([0, 2])])
