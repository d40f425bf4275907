"""Who solves: ours, each peer at each of its settings, and backpropagation through the iterations.

A contender is `solve(cell, z, params, x, rtol, backward, scale) -> z`, for `cell(z, params, x)`. `rtol` is its
forward tolerance, `backward` that of its gradient, `scale` the norm of the whole solution, for a peer whose
tolerance is absolute. Peers are imported where they are used: each runs in a process of its own, in an
environment that may lack the others.
"""

# pyright: reportMissingImports=false

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

HALVES = (2048, 1024, 512, 256)  # where P4's batch of 4096 is gathered anew
STEPS = 200  # of any loop: more than any contender needs that converges at all


class Contender(NamedTuple):
    package: str
    solve: Callable
    problems: tuple[str, ...] = ("P1", "P2", "P3", "P4", "P5", "P6")


def ours(
    cell, z, params, x, rtol, backward, scale, *,
    name: str, history: int, back: int, test_every: int = 1, compact: tuple[int, ...] = (),
):  # fmt: skip
    import deq_jax as deq

    options: Any = dict(rtol=rtol, max_steps=STEPS)
    match name:
        case "Picard":
            solver = deq.Picard(test_every=test_every, **options)
        case "Anderson":
            solver = deq.Anderson(history=history, test_every=test_every, **options)
        case _:
            solver = deq.Broyden(rank=history, **options)
    options: Any = dict(rtol=backward, max_steps=STEPS)
    if back:  # as `Implicit()`
        linear = deq.Anderson(history=back, growth=10.0, test_every=test_every, **options)
    else:
        linear = deq.Picard(test_every=test_every, **options)
    if compact:  # the cell's parameters are shared, what is injected is each problem's own
        sizes = tuple(size for size in compact if size < z.shape[0])
        return deq.compact(cell, z, params, x, axes=(None, 0), solver=solver, backward=linear, sizes=sizes).value
    adjoint = deq.Implicit(linear)
    return deq.fixed_point(cell, z, params, x, solver=solver, adjoint=adjoint, batch_ndim=1).value


def jaxopt(cell, z, params, x, rtol, backward, scale, *, history: int, linear: str):
    from jaxopt import AndersonAcceleration, linear_solve

    solve = functools.partial(getattr(linear_solve, f"solve_{linear}"), tol=backward, maxiter=STEPS)
    solver = AndersonAcceleration(
        cell, history_size=history, tol=rtol * scale, maxiter=STEPS, ridge=1e-6, implicit_diff_solve=solve
    )
    return solver.run(z, params, x).params


def banax(cell, z, params, x, rtol, backward, scale, *, name: str, back: str, options: dict):
    import banax

    kwargs = dict(max_steps=STEPS, loop_kind="lax")
    forward = getattr(banax.solver, name)(rtol=rtol, **kwargs, **options)
    linear = getattr(banax.solver, back)(rtol=backward, **kwargs, **(options if back == name else {}))
    return banax.adjoint.Implicit(forward, linear)((cell, (params, x)), z).value


def optimistix(cell, z, params, x, rtol, backward, scale, *, name: str, each: bool = False):
    import jax
    import lineax
    import optimistix

    linear = lineax.AutoLinearSolver(well_posed=True) if each else lineax.GMRES(rtol=backward, atol=backward)
    whole = lambda tree: jax.numpy.sqrt(sum(jax.numpy.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    if name == "Picard":
        # Its tolerance is on an absolute difference over atol + rtol |z| in a norm that is ours to choose.
        size = scale / (z.shape[0] ** 0.5 if each else 1)
        solver = optimistix.FixedPointIteration(rtol=0.0, atol=rtol * size, norm=whole)
    else:
        solver = optimistix.Newton(
            rtol=0.0, atol=rtol * scale, norm=whole, linear_solver=linear, cauchy_termination=False
        )
    adjoint = optimistix.ImplicitAdjoint(linear_solver=linear)
    options: dict[str, Any] = dict(max_steps=STEPS, adjoint=adjoint, throw=False)

    def one(z, x):
        return optimistix.fixed_point(lambda z, args: cell(z, *args), solver, z, (params, x), **options).value

    return jax.vmap(one)(z, x) if each else one(z, x)


def unrolled(cell, z, params, x, rtol, backward, scale, *, depth: int, checkpoint: int | bool | None = None):
    import deq_jax as deq

    solver, adjoint = deq.Picard(rtol=rtol, max_steps=depth), deq.Unroll(checkpoint=checkpoint)
    return deq.fixed_point(cell, z, params, x, solver=solver, adjoint=adjoint, batch_ndim=1).value


def equinox(cell, z, params, x, rtol, backward, scale, *, depth: int):
    """Binomial checkpointing of a while loop of fixed depth."""
    import equinox.internal as eqxi

    body = lambda carry: (cell(carry[0], params, x), carry[1] + 1)
    carry = eqxi.while_loop(lambda carry: carry[1] < depth, body, (z, 0), kind="checkpointed", max_steps=depth)
    return carry[0]


def torchdeq(cell, z, params, x, rtol, backward, scale, *, name: str, options: dict):
    """PyTorch: z and params are tensors. Its whole-batch relative residual is its own stopping test."""
    from torchdeq import get_deq

    solve = get_deq(
        ift=True, f_solver=name, b_solver=name, f_max_iter=STEPS, b_max_iter=STEPS,
        f_tol=rtol, b_tol=backward, f_stop_mode="rel", b_stop_mode="rel", kwargs=options,
    )  # fmt: skip
    solve.train()
    return solve(lambda z: cell(z, params, x), z)[0][-1]


def _table() -> dict[str, Contender]:
    part = functools.partial
    table = {
        "ours Picard": Contender("deq_jax", part(ours, name="Picard", history=0, back=3)),
        "ours Anderson 3": Contender("deq_jax", part(ours, name="Anderson", history=3, back=3)),
        "ours Anderson 5": Contender("deq_jax", part(ours, name="Anderson", history=5, back=5)),
        "ours Anderson 8": Contender("deq_jax", part(ours, name="Anderson", history=8, back=8)),
        "ours Broyden": Contender("deq_jax", part(ours, name="Broyden", history=20, back=8)),
        "ours Anderson 5, compact": Contender(
            "deq_jax", part(ours, name="Anderson", history=5, back=8, compact=HALVES), ("P4",)
        ),
        "ours Anderson 5, Picard": Contender("deq_jax", part(ours, name="Anderson", history=5, back=0)),
        "ours Picard, Picard": Contender("deq_jax", part(ours, name="Picard", history=0, back=0)),
        "ours Anderson 5, test 3": Contender(
            "deq_jax", part(ours, name="Anderson", history=5, back=5, test_every=3), ("P1", "P3", "P4")
        ),
        "ours Anderson 2, test 8": Contender(
            "deq_jax", part(ours, name="Anderson", history=2, back=2, test_every=8), ("P4",)
        ),
        "ours Anderson 2, test 8, compact": Contender(
            "deq_jax", part(ours, name="Anderson", history=2, back=2, test_every=8, compact=HALVES), ("P4",)
        ),
        "ours Picard, test 6": Contender(
            "deq_jax", part(ours, name="Picard", history=0, back=0, test_every=6), ("P4",)
        ),
        "ours Picard, compact": Contender(
            "deq_jax", part(ours, name="Picard", history=0, back=0, test_every=6, compact=HALVES), ("P4",)
        ),
        "jaxopt Anderson": Contender("jaxopt", part(jaxopt, history=5, linear="bicgstab")),
        "banax Picard": Contender("banax", part(banax, name="Picard", back="Picard", options={})),
        "banax Anderson": Contender("banax", part(banax, name="Anderson", back="Anderson", options={})),
        "banax Anderson, Picard": Contender("banax", part(banax, name="Anderson", back="Picard", options={})),
        "banax Broyden": Contender("banax", part(banax, name="Broyden", back="Broyden", options={"history_size": 20})),
        "optimistix Picard": Contender("optimistix", part(optimistix, name="Picard")),
        "optimistix Newton": Contender("optimistix", part(optimistix, name="Newton")),
        "optimistix Picard, vmap": Contender("optimistix", part(optimistix, name="Picard", each=True), ("P4",)),
        "torchdeq Picard": Contender("torchdeq", part(torchdeq, name="fixed_point_iter", options={})),
        "torchdeq Anderson": Contender("torchdeq", part(torchdeq, name="anderson", options={})),
        "torchdeq Broyden": Contender("torchdeq", part(torchdeq, name="broyden", options={})),
    }  # fmt: skip
    return table


def _alternatives() -> dict[str, Contender]:
    part, table = functools.partial, {}
    for depth in DEPTHS:
        table[f"unrolled {depth}"] = Contender("deq_jax", part(unrolled, depth=depth), ("P6",))
        table[f"each step {depth}"] = Contender("deq_jax", part(unrolled, depth=depth, checkpoint=1), ("P6",))
        table[f"√L {depth}"] = Contender("deq_jax", part(unrolled, depth=depth, checkpoint=True), ("P6",))
        table[f"equinox {depth}"] = Contender("equinox", part(equinox, depth=depth), ("P6",))
    return table


DEPTHS = (8, 12, 30, 64, 128)
ALTERNATIVES = _alternatives()
CONTENDERS = _table() | ALTERNATIVES
