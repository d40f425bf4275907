"""The norm that judges a solve, tolerances by entry and by dtype, the least number of steps, and what is returned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from deq_jax.adjoints.implicit import default_backward
from deq_jax.solvers.norms import default_rtol

pytestmark = [pytest.mark.usefixtures("x64", "quick_compile")]
NORMS = "leaf", "l2", "rms", "max", "token", "entry"
CONVERGED, MAX_STEPS, STALLED = (int(s) for s in (deq.Status.CONVERGED, deq.Status.MAX_STEPS, deq.Status.STALLED))


# ---- the definition, in NumPy ------------------------------------------------------------------------------


def pieces(norm, leaves):
    """The norm of each piece of one problem, a list of arrays."""
    moduli = [np.abs(leaf) for leaf in leaves]
    flat = np.concatenate([m.ravel() for m in moduli])
    return {
        "leaf": [np.linalg.norm(m) for m in moduli],
        "l2": [np.linalg.norm(flat)],
        "rms": [np.sqrt(np.mean(flat**2))],
        "max": [flat.max()],
        "token": [np.linalg.norm(m, axis=-1) if m.ndim else m for m in moduli],
        "entry": moduli,
    }[norm]


def judged(norm, z, fz, rtol, atol, weights=None):
    """(converged, residual, relative residual) of one problem; atol is a number, or one array for each piece."""
    z, fz = jax.tree.leaves(z), jax.tree.leaves(fz)
    weights = [1.0] * len(z) if weights is None else weights
    r = pieces(norm, [w * (np.asarray(b) - np.asarray(a)) for w, a, b in zip(weights, z, fz, strict=True)])
    s = pieces(norm, [w * np.asarray(b) for w, b in zip(weights, fz, strict=True)])
    atol = atol if isinstance(atol, list) else [atol] * len(r)
    met = all(np.all(x <= a + rtol * y) for x, y, a in zip(r, s, atol, strict=True))
    relative = [np.where(x > 0, x / np.where(y > 0, y, np.nan), 0.0) for x, y in zip(r, s, strict=True)]
    return met, max(np.max(x) for x in r), max(np.max(x) for x in relative)


def first(f, z, *given, limit=200):
    """The evaluation, counted from one, at which plain iteration meets the definition, and what it says there."""
    for steps in range(1, limit + 1):
        fz = f(z)
        found = judged(given[0], z, fz, *given[1:])
        if found[0]:
            return steps, *found[1:]
        z = fz
    raise AssertionError("not within the limit")


def affine(shape, key, radius=0.7, decades=(-4, 2)):
    """z ↦ b + radius · (a rotation of the entries), with entries of many sizes."""
    n = int(np.prod(shape))
    q = np.linalg.qr(np.random.default_rng(key).normal(size=(n, n)))[0]
    size = 10.0 ** np.random.default_rng(key + 1).uniform(*decades, n)
    matrix, b = radius * q, np.random.default_rng(key + 2).normal(size=n)
    return lambda z: (size * (b + matrix @ (z.ravel() / size))).reshape(shape)


def pair(key):
    one, two = affine((3, 4), key, 0.5), affine((5,), key + 10, 0.8)
    return lambda z: {"a": one(z["a"]), "b": two(z["b"])}


def rotation(key):
    """Complex."""
    w = np.exp(1j * np.random.default_rng(key).uniform(0, 6, 6)) * np.linspace(0.2, 0.9, 6)
    return lambda z: w * z + (1 + 2j) * np.logspace(-3, 1, 6)


CELLS = {
    "array": (affine((3, 4), 0), np.zeros((3, 4))),
    "leaves": (pair(1), {"a": np.zeros((3, 4)), "b": np.zeros(5)}),
    "complex": (rotation(2), np.zeros(6, complex)),
    "scalars": (lambda z: (0.5 * jnp.cos(z[0]), 0.9 * jnp.cos(z[1])), (np.zeros(()), np.zeros(()))),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_solve_ends_where_its_norm_says(norm, cell):
    f, z0 = CELLS[cell]
    for rtol, atol in ((1e-5, 0.0), (0.0, 1e-4), (1e-4, 1e-5)):
        stats = deq.solve(f, z0, solver=deq.Picard(rtol, atol, 200, norm=norm)).stats
        steps, residual, relative = first(f, z0, norm, rtol, atol)
        assert stats.status == CONVERGED and stats.steps == steps
        np.testing.assert_allclose([stats.residual, stats.relative_residual], [residual, relative], rtol=1e-7)


def test_the_norms_differ_and_entries_are_the_strictest():
    """The smaller an entry is beside its neighbors, the slower it converges."""
    size = {"a": np.array([[1e2, 1.0], [1e-1, 1e-3]]), "b": np.array([1.0])}
    rate = {"a": np.array([[0.1, 0.5], [0.8, 0.9]]), "b": np.array([0.7])}
    f = lambda z: jax.tree.map(lambda z, size, rate: size + rate * z, z, size, rate)
    solve = lambda norm: deq.solve(f, jax.tree.map(np.zeros_like, size), solver=deq.Picard(1e-4, norm=norm))
    steps = {norm: int(solve(norm).stats.steps) for norm in NORMS}
    assert steps["l2"] == steps["rms"] < steps["leaf"] < steps["token"] < steps["entry"]


@pytest.mark.parametrize("norm", NORMS)
def test_weights(norm):
    f, z0 = CELLS["leaves"]
    weights = {"a": np.geomspace(1e-2, 1e3, 4), "b": 3.0}
    stats = deq.solve(f, z0, solver=deq.Picard(1e-5, 1e-6, max_steps=200, norm=deq.Weighted(weights, norm))).stats
    steps, residual, relative = first(f, z0, norm, 1e-5, 1e-6, list(weights.values()))
    assert stats.status == CONVERGED and stats.steps == steps
    np.testing.assert_allclose([stats.residual, stats.relative_residual], [residual, relative], rtol=1e-7)


def test_an_entry_of_no_weight_does_not_count():
    f = lambda z: jnp.array([0.1, 0.999]) * z + 1  # the second one takes thousands of evaluations
    solve = lambda weights: deq.solve(f, np.zeros(2), solver=deq.Picard(norm=deq.Weighted(weights, "entry"))).stats
    assert solve(np.array([1.0, 0.0])).status == CONVERGED and solve(np.ones(2)).status == MAX_STEPS


# ---- absolute tolerances -----------------------------------------------------------------------------------


def test_an_absolute_tolerance_for_each_entry():
    f, z0 = CELLS["leaves"]
    atol = {"a": np.geomspace(1e-7, 1e-2, 4), "b": 1e-3}
    for norm, given in (("entry", atol), ("token", {"a": np.array([1e-6, 1e-3, 1e-4]), "b": 1e-5})):
        stats = deq.solve(f, z0, solver=deq.Picard(0.0, given, norm=norm)).stats
        steps, *_ = first(f, z0, norm, 0.0, list(given.values()))
        assert stats.status == CONVERGED and stats.steps == steps, norm
    by_leaf = {"a": 1e-2, "b": 1e-6}
    assert deq.solve(f, z0, solver=deq.Picard(0.0, by_leaf)).stats.steps == first(f, z0, "leaf", 0.0, [1e-2, 1e-6])[0]
    vector = CELLS["array"][0], np.zeros((3, 4))
    steps, *_ = first(*vector, "entry", 1e-6, [atol["a"]])
    assert deq.solve(*vector, solver=deq.Picard(1e-6, atol["a"], norm="entry")).stats.steps == steps


def test_tolerances_of_problems_and_of_entries_are_told_apart_by_their_shapes():
    f, scales = lambda z: 0.5 * z + 1, np.array([1e-2, 1e-4, 1e-6, 1e-8])
    steps = lambda atol, norm="entry": deq.solve(
        f, np.zeros((3, 4)), solver=deq.Picard(0.0, atol, norm=norm), batch_ndim=1
    ).stats.steps.tolist()
    one = first(f, np.zeros(4), "entry", 0.0, [scales])[0]
    assert steps(scales) == steps(scales[None]) == [one] * 3  # [dim] broadcasts over problems
    by_problem = [first(f, np.zeros(4), "entry", 0.0, float(a))[0] for a in scales[:3]]
    assert steps(scales[:3]) == steps(scales[:3, None]) == by_problem
    each = np.outer([1, 10, 100], scales)
    assert steps(each) == [first(f, np.zeros(4), "entry", 0.0, [a])[0] for a in each]


def robertson(h=1e-4):
    """One implicit step of Robertson's chemistry, whose species are 1, 4e-6 and 5e-8 after it."""
    start = jnp.array([1.0, 0.0, 0.0])

    def f(y):
        a, b, c = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
        return start + h * jnp.array([c - a, a - c - b, b])

    exact = start
    for _ in range(60):
        exact = exact - jnp.linalg.solve(jnp.eye(3) - jax.jacfwd(f)(exact), exact - f(exact))
    return f, start, exact


@pytest.mark.parametrize("Solver", [deq.Picard, deq.Anderson, deq.Broyden, deq.NewtonKrylov, deq.Robust])
def test_no_species_hides_behind_the_others(Solver):
    f, start, exact = robertson()
    error = lambda z: float(jnp.max(jnp.abs(z - exact) / exact))
    by_leaf = deq.fixed_point(f, start, solver=Solver(rtol=1e-4))
    assert by_leaf.stats.converged and error(by_leaf.value) > 0.99
    for atol in (jnp.array([1e-8, 1e-14, 1e-12]), 0.0):
        z, stats = deq.fixed_point(f, start, solver=Solver(rtol=1e-4, atol=atol, norm="entry"))
        assert stats.converged and error(z) < 2e-4


def test_no_token_hides_behind_the_others():
    """Eight tokens, one of which is small and slow."""
    size, rate = np.array([1.0] * 7 + [0.05])[:, None], np.array([0.1] * 7 + [0.8])[:, None]
    f = lambda z: size + rate * (z - size * 0.3)
    off = lambda z: float(np.max(np.linalg.norm(f(z) - z, axis=-1) / np.linalg.norm(f(z), axis=-1)))
    hidden, shown = (deq.fixed_point(f, np.zeros((8, 4)), solver=deq.Picard(1e-3, norm=n)) for n in ("leaf", "token"))
    assert hidden.stats.converged and off(hidden.value) > 1e-2
    assert shown.stats.converged and off(shown.value) <= 1e-3
    np.testing.assert_allclose(shown.stats.relative_residual, off(shown.value), rtol=1e-9)


def test_a_token_of_padding_holds_nothing_up():
    mask = np.array([1.0, 1.0, 0.0])[:, None]
    noise = 1e-20 * np.array([[1.0, -1.0, 1.0, -1.0]])  # what rounding leaves in a sum that should be zero
    f = lambda z: mask * (0.5 * z + 1) + (1 - mask) * (noise - z)
    assert deq.solve(f, np.zeros((3, 4)), solver=deq.Picard(norm="token")).stats.converged
    assert not deq.solve(f, np.zeros((3, 4)), solver=deq.Picard(norm="entry")).stats.converged
    assert deq.solve(f, np.zeros((3, 4)), solver=deq.Picard(atol=1e-12, norm="entry")).stats.converged


# ---- truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_converge_does_not(norm):
    solve = lambda f, z0=np.ones((2, 3)): deq.solve(f, z0, solver=deq.Picard(norm=norm, max_steps=400)).stats
    assert solve(lambda z: z + 1).status != CONVERGED
    assert solve(lambda z: 1.5 * z).status == deq.Status.DIVERGED
    assert solve(lambda z: jnp.nan * z).status == deq.Status.NONFINITE
    assert solve(lambda z: jnp.where(z > 0, jnp.inf, z)).status == deq.Status.NONFINITE


def test_stalled_is_claimed_of_each_entry():
    """The first entry is at the floor of the dtype, and the second jumps between two values."""
    f = lambda z: jnp.array([1.0, jnp.where(z[1] < 2e-15, 4e-15, 1e-15)])
    leaf, entry = (deq.solve(f, np.zeros(2), solver=deq.Picard(0.0, norm=norm)).stats for norm in ("leaf", "entry"))
    assert leaf.status == STALLED and entry.status == MAX_STEPS and not entry.sound
    at_floor = lambda z: jnp.array([jnp.cos(z[0]), 1e-12 * jnp.cos(z[1] / 1e-12)]) * (1 + 1e-16)
    solver = deq.Picard(0.0, norm="entry", max_steps=1000)
    stats = deq.solve(at_floor, np.zeros(2), solver=solver).stats
    assert stats.status in (STALLED, CONVERGED) and stats.relative_residual < 1e-13


def test_a_fixed_point_at_zero_is_approached_in_every_norm():
    for norm in NORMS:
        z, stats, *_ = deq.solve(lambda z: 0.5 * z, np.ones(3), solver=deq.Picard(norm=norm, max_steps=40))
        assert stats.status == MAX_STEPS and float(z.max()) == 2.0**-39, norm
        z, stats, *_ = deq.solve(lambda z: 0.3 * z, np.ones(3), solver=deq.Picard(norm=norm, atol=1e-6))
        assert stats.converged and float(z.max()) < 1e-5, norm


# ---- batches, dtypes, transformations ----------------------------------------------------------------------


def batch():
    cells = [affine((3, 4), key, radius, (-1, 1)) for key, radius in ((0, 0.3), (20, 0.7), (40, 0.9))]
    return lambda z: jnp.stack([cell(part) for cell, part in zip(cells, z, strict=True)]), cells


@pytest.mark.parametrize("norm, Solver", [
    *((norm, deq.Anderson) for norm in NORMS[1:]),
    *(("entry", Solver) for Solver in (deq.Broyden, deq.NewtonKrylov, deq.Robust)),
])  # fmt: skip
def test_each_problem_of_a_batch_gets_what_it_gets_alone(norm, Solver):
    f, cells = batch()
    rtol, atol = np.array([1e-3, 1e-6, 1e-8]), np.array([0.0, 1e-9, 1e-10])
    scales = np.geomspace(1e-9, 1e-5, 4)
    weights = np.geomspace(0.1, 10, 4)
    for given in (atol[:, None, None], scales) if norm == "entry" else (atol[:, None],) if norm == "token" else (atol,):
        solver = Solver(rtol, given, norm=deq.Weighted(weights, norm))
        z, stats, *_ = deq.solve(f, np.zeros((3, 3, 4)), solver=solver, batch_ndim=1)
        assert stats.converged.all()
        for i, cell in enumerate(cells):
            own = dataclasses.replace(solver, rtol=rtol[i], atol=scales if given is scales else atol[i])
            alone = deq.solve(cell, np.zeros((3, 4)), solver=own)
            assert alone.stats.converged
            if Solver in (deq.Anderson, deq.Broyden):  # the others take differences, which round
                assert int(alone.stats.steps) == int(stats.steps[i])
                np.testing.assert_allclose(alone.value, z[i], rtol=1e-6)
                np.testing.assert_allclose(alone.stats.relative_residual, stats.relative_residual[i], rtol=1e-3)
            slack = [scales] if given is scales else float(atol[i])
            assert judged(norm, z[i], cell(z[i]), 1.001 * rtol[i], slack, [weights])[0]


@pytest.mark.parametrize("norm, dtype", [*((norm, "bfloat16") for norm in NORMS), ("entry", "float16")])
def test_narrow_states(norm, dtype):
    c = {"a": jnp.geomspace(1e-2, 1, 6).reshape(2, 3), "b": jnp.geomspace(1e-3, 1e2, 20).reshape(2, 5, 2)}
    c = {name: leaf.astype(dtype) for name, leaf in c.items()}
    f = lambda z, c: {name: 0.5 * z[name] + c[name] for name in z}  # rounded once, whatever the compiler does
    z0 = jax.tree.map(jnp.zeros_like, c)
    solver = deq.Anderson(rtol=2 * float(jnp.finfo(dtype).eps), norm=norm)
    z, stats = deq.fixed_point(f, z0, c, solver=solver, batch_ndim=1)
    assert stats.converged.all() and stats.residual.dtype == jnp.float32
    for i in range(2):
        one, own = jax.tree.map(lambda leaf: leaf[i], (z, c))
        wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        met, residual, _ = judged(norm, wide(one), wide(f(one, own)), solver.rtol, 0.0)
        assert met and residual == pytest.approx(float(stats.residual[i]), rel=1e-3)


@pytest.mark.parametrize("norm", ["max", "entry", deq.Weighted(np.geomspace(1.0, 4.0, 4), "token")])
def test_under_jit_vmap_and_grad(norm):
    solver = deq.Anderson(1e-8, np.full(4, 1e-9) if norm == "entry" else 1e-9, norm=norm)
    cell = lambda z, x: jnp.cos(0.5 * z) + x

    def loss(x):
        z, stats = deq.fixed_point(cell, jnp.zeros((3, 4)), x, solver=solver)
        return jnp.sum(z**2), stats.converged

    xs = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)
    grads, converged = jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(xs)
    want = jax.vmap(jax.grad(lambda x: loss(x)[0]))(xs)
    exact = jax.vmap(lambda x: deq.fixed_point(cell, jnp.zeros((3, 4)), x, solver=deq.Anderson(1e-13)).value)(xs)
    assert converged.all()
    np.testing.assert_allclose(grads, want, rtol=1e-10)
    np.testing.assert_allclose(grads, 2 * exact / (1 + 0.5 * jnp.sin(0.5 * exact)), rtol=1e-5)


SPLIT = [*NORMS, deq.Weighted({"a": 2.0, "b": np.array(3.0)}, "max"), deq.Weighted({"a": 1.0, "b": 0.5}, "l2")]


def spread_out():
    """(f, z0, x): a state whose entries are of many sizes, in two leaves."""
    sizes = np.random.default_rng(0).uniform(-3, 2, (3, 48))
    x = {
        "a": jnp.asarray(10.0 ** sizes[:, :40].reshape(3, 8, 5)),
        "b": jnp.asarray(10.0 ** sizes[:, 40:].reshape(3, 4, 2)),
    }
    f = lambda z, x: jax.tree.map(lambda z, x: 0.5 * jnp.cos(z / x) * x + x, z, x)
    return f, jax.tree.map(jnp.zeros_like, x), x


@pytest.mark.parametrize("norm", SPLIT)
def test_problems_that_are_split_over_devices(norm):
    f, z0, x = spread_out()
    options = dict(solver=deq.Anderson(1e-7, norm=norm), batch_ndim=1)
    z, stats = deq.fixed_point(f, z0, x, **options)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    solve = lambda z0, x: deq.fixed_point(f, z0, x, axis_name="x", **options)
    specs = dict(in_specs=P(None, "x"), out_specs=deq.Solution(P(None, "x"), P()))
    for split in (solve, jax.jit(solve)):
        got, own = jax.shard_map(split, mesh=mesh, **specs)(z0, x)
        assert own.converged.all() and (own.steps == stats.steps).all()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, z)
        np.testing.assert_allclose(own.residual, stats.residual, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("norm", SPLIT)
def test_sharded_states(norm, kind):
    f, z0, x = spread_out()
    options = dict(solver=deq.Anderson(1e-7, norm=norm), batch_ndim=1)
    z, stats = deq.fixed_point(f, z0, x, **options)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    sharding = jax.sharding.NamedSharding(mesh, P(None, "x"))
    got, own = deq.fixed_point(f, *jax.device_put((z0, x), sharding), **options)
    assert own.converged.all() and (own.steps == stats.steps).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, z)


@pytest.mark.parametrize("norm", NORMS)
def test_compact_and_the_adjoints_through_the_iterations(norm):
    rate, x = jnp.linspace(0.1, 0.8, 9)[:, None], jnp.geomspace(1e-4, 1.0, 3)[None]
    cell = lambda z, rate: rate * z + x
    atol = np.geomspace(1e-8, 1e-6, 3) if norm == "entry" else 1e-7
    solver = deq.Picard(1e-6, atol, norm=norm)
    options = dict(solver=solver, batch_ndim=1)
    want = deq.fixed_point(cell, jnp.zeros((9, 3)), rate, **options)
    shrunk = deq.compact(cell, jnp.zeros((9, 3)), rate, axes=(0,), solver=solver)
    np.testing.assert_array_equal(shrunk.stats.steps, want.stats.steps)
    np.testing.assert_allclose(shrunk.value, want.value, rtol=1e-12)
    stopped = deq.fixed_point(cell, jnp.zeros((9, 3)), rate, adjoint=deq.Unroll(stop=True), **options)
    np.testing.assert_array_equal(stopped.stats.steps, want.stats.steps + 1)  # a start at zero changes nothing
    walked = deq.fixed_point(cell, jnp.zeros((9, 3)), 0.3 * rate, adjoint=deq.Reversible(0.4), **options)
    assert stopped.stats.converged.all() and walked.stats.converged.all()
    for z, fz, residual in zip(walked.value, cell(walked.value, 0.3 * rate), walked.stats.residual, strict=True):
        met, own, _ = judged(norm, z, fz, 1e-6, [atol] if norm == "entry" else atol)
        assert met and own == pytest.approx(float(residual), rel=1e-6)


def test_a_norm_of_the_only_leaf_is_the_default_program():
    text = lambda **options: str(
        jax.make_jaxpr(lambda z: deq.solve(jnp.cos, z, solver=deq.Anderson(1e-4, **options))[:2])(jnp.zeros(3))
    )
    assert text() == text(norm="l2") and text() != text(norm="entry")


# ---- tolerances by dtype -----------------------------------------------------------------------------------


def test_the_default_tolerance_knows_the_dtype():
    cell = lambda z: jnp.cos(z).astype(z.dtype)
    for Solver in (deq.Picard, deq.Anderson, deq.Broyden, deq.NewtonKrylov, deq.Robust):
        for dtype, rtol in (("float32", 1e-4), ("complex64", 1e-4), ("float64", default_rtol(2.0**-52))):
            z0 = jnp.full(3, 0.1, dtype)
            stats, want = (deq.solve(cell, z0, solver=Solver(rtol=r)).stats for r in (None, rtol))
            assert stats.converged and stats.steps == want.steps and stats.residual == want.residual
    assert default_rtol(2.0**-52) < default_rtol(2.0**-23) == default_rtol(2.0**-7) == 1e-4
    mixed = {"wide": jnp.zeros(2), "narrow": jnp.zeros(2, jnp.float32)}
    both = lambda z: jax.tree.map(cell, z)
    steps = [int(deq.solve(both, mixed, solver=deq.Picard(r)).stats.steps) for r in (None, 1e-4)]
    assert steps[0] == steps[1]  # the narrow leaf cannot reach the tolerance of the wide one


def test_what_is_derived_from_the_default_tolerance():
    tight = default_rtol(2.0**-52)
    assert default_backward(deq.Picard(), jnp.zeros((2, 3)), 1).rtol == 0.1 * tight
    assert default_backward(deq.Picard(), jnp.zeros((2, 3), jnp.float32), 1).rtol == 0.1 * 1e-4
    options = dict(solver=deq.Broyden(), adjoint=deq.Shine())
    assert jnp.isfinite(jax.grad(lambda a: deq.fixed_point(lambda z: jnp.cos(a * z), 0.0, **options).value)(1.0))
    z, stats = deq.fixed_point(lambda z: 0.5 * jnp.cos(z), np.zeros(3), adjoint=deq.Reversible(0.4))
    assert stats.converged and stats.relative_residual <= tight
    for dtype, word in ((jnp.float32, "rtol is 0.0001"), (jnp.float64, f"rtol is {tight}")):
        solver = deq.Picard(max_steps=2)
        with pytest.raises(deq.SolveError, match=word):
            deq.check(deq.fixed_point(jnp.cos, jnp.zeros((), dtype), solver=solver), solver)


@pytest.mark.parametrize("norm", NORMS)
def test_the_backward_tolerance_of_an_absolute_one(norm):
    z = jnp.array([[3.0, 4.0], [0.0, 1e-3]])
    size = {"rms": np.sqrt(12.5), "max": 4.0, "entry": 4.0}.get(norm, 5.0)
    rtol = default_backward(deq.Picard(1e-3, 1e-2, norm=norm), z, 1).rtol
    np.testing.assert_allclose(rtol, [0.1 * (1e-3 + 1e-2 / size), 0.1 * (1e-3 + 0.1)], rtol=1e-6)
    if norm == "entry":
        scales = np.array([3e-3, 1e-2])  # a thousandth of an entry, and more
        rtol = default_backward(deq.Picard(1e-3, scales, norm=norm), jnp.array([[3.0, 4.0]]), 1).rtol
        np.testing.assert_allclose(rtol, [0.1 * (1e-3 + 1e-3)], rtol=1e-6)


# ---- the least number of steps, and the last iterate -------------------------------------------------------


@pytest.mark.parametrize("Solver", [deq.Picard, deq.Anderson, deq.Broyden, deq.NewtonKrylov, deq.Robust])
def test_the_least_number_of_steps(Solver):
    f, z0 = lambda z: 0.5 * jnp.cos(z), jnp.zeros((2, 3))
    plain, longer = (deq.solve(f, z0, solver=Solver(1e-3, min_steps=n), batch_ndim=1).stats for n in (0, 12))
    assert (plain.steps < 12).all() and (longer.steps >= 12).all() and longer.converged.all()
    assert (longer.relative_residual <= plain.relative_residual).all()
    at_once = deq.solve(lambda z: z, jnp.ones(3), solver=Solver(min_steps=40)).stats
    assert at_once.converged and at_once.steps == 40


def test_the_least_number_of_steps_under_the_adjoints_through_the_iterations():
    f, solver = lambda z: 0.1 * jnp.cos(z), deq.Picard(1e-2, min_steps=20, max_steps=25)
    for adjoint, steps in ((deq.Unroll(stop=True), 21), (deq.Reversible(0.6), 21)):
        assert deq.fixed_point(f, jnp.zeros(3), solver=solver, adjoint=adjoint).stats.steps == steps


def test_the_last_iterate_of_a_loop_of_n():
    f = lambda z: jnp.array([[0.0, -1.0], [1.3, 0.0]]) @ z + 1  # whose residual grows
    n, z = 7, jnp.zeros(2)
    for _ in range(n):
        z = f(z)
    solver = deq.Picard(0.0, max_steps=n + 1, returns="last")
    best, last = (deq.solve(f, jnp.zeros(2), solver=dataclasses.replace(solver, returns=r)) for r in ("best", "last"))
    unrolled = deq.fixed_point(f, jnp.zeros(2), solver=deq.Picard(0.0, max_steps=n), adjoint=deq.Unroll())
    np.testing.assert_array_equal(last.value, z)
    np.testing.assert_array_equal(unrolled.value, z)
    assert (best.value != z).any() and last.stats.status == MAX_STEPS
    assert last.stats.steps == unrolled.stats.steps == n + 1
    np.testing.assert_allclose(last.stats.residual, jnp.linalg.norm(f(z) - z), rtol=1e-12)
    np.testing.assert_allclose(last.stats.relative_residual, unrolled.stats.relative_residual, rtol=1e-12)
    for adjoint in (deq.JFB(), deq.Implicit(), deq.Neumann()):
        np.testing.assert_array_equal(deq.fixed_point(f, jnp.zeros(2), solver=solver, adjoint=adjoint).value, z)


def test_the_last_iterate_is_never_stalled_and_never_nonfinite():
    f = lambda z: jnp.where(z > 100, jnp.nan, 3 * z + 1)
    z, stats, *_ = deq.solve(f, jnp.zeros(()), solver=deq.Picard(returns="last"))
    assert stats.status == deq.Status.NONFINITE and z == 40  # 0, 1, 4, 13, 40, 121
    z, stats, *_ = deq.solve(jnp.cos, jnp.zeros(()), solver=deq.Picard(0.0, max_steps=300, returns="last"))
    assert stats.status in (CONVERGED, MAX_STEPS)
    each = deq.solve(lambda z: 0.5 * jnp.cos(z), jnp.zeros((2, 3)), solver=deq.Anderson(returns="last"), batch_ndim=1)
    assert each.stats.converged.all()


# ---- budgets of problems -----------------------------------------------------------------------------------

BUDGETS = np.array([0, 3, 9])


@pytest.mark.parametrize("Solver, adjoint", [
    (deq.Picard, deq.Unroll()), (deq.Picard, deq.Unroll(checkpoint=2)), (deq.Anderson, deq.Unroll(stop=True)),
    (deq.Broyden, deq.Unroll()), (deq.Picard, deq.Reversible(0.2)), (deq.Anderson, deq.Implicit()),
])  # fmt: skip
def test_each_problem_has_its_own_budget(Solver, adjoint):
    w, z0 = jnp.array([0.3, 0.9, 1.1])[:, None], jnp.full((3, 2), 0.1)

    def solve(w, z0, budget, batch_ndim=1):
        solver = Solver(1e-12, max_steps=budget)
        options = dict(solver=solver, adjoint=adjoint, batch_ndim=batch_ndim)
        z, stats = deq.fixed_point(lambda z, w: jnp.cos(w * z), z0, w, **options)
        return jnp.sum(jnp.sin(z)), (z, stats)

    grad = jax.grad(solve, argnums=(0, 1), has_aux=True)
    together, (z, stats) = grad(w, z0, BUDGETS)
    under_jit, _ = jax.jit(lambda w, z0: grad(w, z0, BUDGETS))(w, z0)
    for i, budget in enumerate(BUDGETS.tolist()):
        alone, (own_z, own) = grad(w[i], z0[i], budget, 0)
        np.testing.assert_allclose(z[i], own_z, rtol=1e-12)
        assert stats.steps[i] == own.steps and stats.status[i] == own.status
        for got, traced, want in zip(together, under_jit, alone, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(traced[i], want, rtol=1e-9, atol=1e-14)


def test_a_traced_budget_within_a_depth():
    solve = lambda budget: deq.fixed_point(
        jnp.cos, jnp.zeros(2), solver=deq.Picard(0.0, max_steps=budget), adjoint=deq.Unroll(depth=9)
    )
    z, stats = jax.jit(jax.vmap(solve))(jnp.arange(12))
    want = [0.0]
    for _ in range(9):
        want.append(float(np.cos(want[-1])))
    np.testing.assert_allclose(z[:10, 0], want, rtol=1e-12)
    np.testing.assert_allclose(z[10:, 0], want[9], rtol=1e-12)
    assert stats.steps.tolist() == [*range(1, 11), 10, 10] and not stats.converged.any()
