"""Six ideas for cheaper solves, measured in evaluations, bytes and errors: what this machine's clock does not decide.

python -m experiments.studies.gains
python -m experiments.studies.gains --tiny --out runs/gains
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

import deq_jax as deq
from deq_jax.solvers import carry, loop
from deq_jax.solvers.anderson import PLAIN
from experiments.shared import jax_ops, referee
from experiments.shared.numerics import float64
from experiments.shared.problems import PROBLEMS, TINY, Problem
from experiments.shared.study import plain, read
from experiments.studies.gains_report import RATIOS, markdown
from experiments.training.environment import environment
from experiments.training.sealed import write_atomically

REFINE = (0, 5, 20)  # of Shine, which takes two products more
HISTORIES = (1, 3, 5, 8)
THRESHOLDS = (0.3, 0.5, 0.7)  # contraction above which the prototype begins to mix
SWITCHES = (0.1, 0.03, 0.01)  # residual at which bfloat16 gives way to float32
PROJECTED = (5, 8, 16)  # histories whose projection is also done in float64


@dataclasses.dataclass(frozen=True)
class Config:
    """About fifteen minutes on half a CPU core. A backward tolerance of a tenth spares 12 to 23 % of the products.

    python -m experiments.studies.gains
    """

    out: Path = Path("experiments/studies/results/gains")
    table: bool = False  # only table.md, from the results that are kept
    tiny: bool = False  # the same mathematics at a test's size
    problems: tuple[str, ...] = ("P1", "P2", "P3", "P6")
    rtol: float = 1e-4  # of the forward solve


# ---- prototypes --------------------------------------------------------------------------------------------


@deq.config
class Warm:
    """`Implicit`, its backward solve started from the transpose of forward Broyden's inverse Jacobian."""

    solver: Any
    step: bool = False  # whether from u = z̄ − Bᵀ Jᵀz̄, Shine's first step, which costs a product; or from −Bᵀ z̄

    def keep(self, problem, forward):
        return forward

    def pullback(self, problem, forward, z_bar):
        _, vjp = jax.vjp(problem, forward.z, problem.inputs)
        memory = forward.memory
        # The equation is linear: it is solved in a unit, a power of two, of each problem's own cotangent.
        top = jnp.max(jnp.abs(z_bar), axis=tuple(range(problem.batch_ndim, z_bar.ndim)), keepdims=True)
        scale = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(top > 0, top, 1))))
        unit = z_bar / scale
        cell = lambda u: unit + vjp(u * scale)[0] / scale

        def inverse(x):  # −Bᵀ = I − Σ coreⱼᵢ sᵢ sⱼᵀ ≈ (I − Jᵀ)⁻¹
            flat = x.reshape(*memory.z.shape)
            along = jnp.einsum("...jd,...d->...j", memory.steps, flat)
            weights = jnp.einsum("...ji,...j->...i", memory.core, along)
            return (flat - jnp.einsum("...i,...id->...d", weights, memory.steps)).reshape(x.shape)

        start = unit + inverse(cell(unit) - unit) if self.step else inverse(unit)
        u, stats, *_ = deq.solve(cell, start, solver=self.solver, batch_ndim=problem.batch_ndim)
        probe = deq.Probe.of(stats)
        return vjp(u * scale)[1], probe._replace(steps=probe.steps + self.step)


class AdaptiveState(NamedTuple):
    mixing: Bool[Array, "*batch"]
    mixed: Int[Array, ""]  # evaluations after which Anderson's update was paid for
    anderson: Any


@deq.config
class Adaptive:
    """Picard, until a residual falls by less than the factor `threshold`; from there on `anderson`, of damping 1."""

    anderson: deq.Anderson
    threshold: float = 0.5

    rtol = property(lambda self: self.anderson.rtol)
    atol = property(lambda self: self.anderson.atol)
    max_steps = property(lambda self: self.anderson.max_steps)

    def init(self, z: Float[Array, "*batch dim"]) -> AdaptiveState:
        anderson = self.anderson.init(z)
        return AdaptiveState(anderson.last < 0, anderson.count, anderson)

    def update(self, residual, state, z):
        memory, now, last = state.anderson, *(jnp.linalg.norm(g, axis=-1) for g in (residual, state.anderson.g))
        # A problem that has stopped shows the same residual again.
        mixing = state.mixing | ((memory.last > 0) & (now > self.threshold * last) & (now != last))
        # The last pair is all that mixing needs to begin; two states that the loop carries anyway.
        picard = memory._replace(w=z + residual, g=residual, last=jnp.full_like(memory.last, PLAIN))
        some = jnp.any(mixing)
        step, memory = jax.lax.cond(some, lambda: self.anderson.update(residual, memory, z), lambda: (residual, picard))
        step = jnp.where(mixing[..., None], step, residual)
        return step, AdaptiveState(mixing, state.mixed + some, memory)


# ---- one problem -------------------------------------------------------------------------------------------


class Programs:
    """A problem's compiled solves, by the structure of their options: a tolerance does not compile anew."""

    def __init__(self, drawn: Problem):
        self.drawn, self.known = drawn, {}
        self.params, self.data = jax.tree.map(jnp.asarray, (drawn.params, drawn.data))
        wide = lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else x.dtype)
        with float64():
            find = referee.dense if drawn.dense else referee.iterated
            z, grads = find(drawn, *jax.tree.map(wide, (drawn.params, drawn.data)))
            self.z, self.grads = np.asarray(z), jax.tree.map(np.asarray, grads)

    def cell(self, z, params, x):
        return self.drawn.cell(jax_ops, z, params, x)

    def inject(self, params):
        return self.drawn.inject(jax_ops, params, self.data)

    def program(self, f: Callable, *args: Any) -> Any:
        key = f, jax.tree.structure(args)
        if key not in self.known:
            self.known[key] = jax.jit(f).lower(*args).compile()
        return self.known[key]

    def step(self, params, solver, adjoint):
        def loss(params, probe):
            z0, x = jnp.zeros(self.drawn.z_shape), self.inject(params)
            options: Any = dict(solver=solver, adjoint=adjoint, batch_ndim=1, probe=probe)
            z, stats = deq.fixed_point(self.cell, z0, params, x, **options)
            return self.drawn.readout(jax_ops, z, params, self.data), (z, stats)

        probe = deq.Probe.zeros(self.drawn.z_shape[:1])
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, probe)

    def gradient(self, solver: Any, adjoint: Any) -> dict[str, Any]:
        """Counts of the slowest problem, the error of the whole gradient, temporaries of the compiled step."""
        program = self.program(self.step, self.params, solver, adjoint)
        (grads, probe), (z, stats) = program(self.params, solver, adjoint)
        wrong = sum(np.sum((np.asarray(grads[k], np.float64) - self.grads[k]) ** 2) for k in grads)
        return {
            "evaluations": int(stats.steps.max()),
            "products": int(probe.steps.max()),
            "converged": bool(stats.converged.all() & (probe.status == deq.Status.CONVERGED).all()),
            "gradient_error": math.sqrt(wrong / sum(np.sum(g**2) for g in self.grads.values())),
            "z_error": self.error(z),
            "temporaries": program.memory_analysis().temp_size_in_bytes,
        }

    def error(self, z: Array) -> float:
        flat = lambda z: np.asarray(z, np.float64).reshape(len(z), -1)
        return float(np.max(np.linalg.norm(flat(z) - flat(self.z), axis=1) / np.linalg.norm(flat(self.z), axis=1)))

    def forward(self, z, params, solver, memory):
        return deq.solve(self.cell, z, params, self.inject(params), solver=solver, memory=memory, batch_ndim=1)

    def low(self, z, params, solver, memory):
        """The same with f in bfloat16, parameters and all; z and the solver's memory stay in float32."""
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        f = lambda z, *args: self.cell(z.astype(jnp.bfloat16), *args).astype(jnp.float32)
        return deq.solve(f, z, params, self.inject(params), solver=solver, memory=memory, batch_ndim=1)

    def wide(self, z, params, solver, memory):
        """The same f, in float32, with z and all that the solver computes in float64."""
        f = lambda z, *args: self.cell(z.astype(jnp.float32), *args).astype(jnp.float64)
        return deq.solve(f, z, params, self.inject(params), solver=solver, memory=memory, batch_ndim=1)

    def find(self, solver: Any, f: Callable | None = None, z: Any = None, memory: Any = None) -> tuple[dict, Any]:
        z = jnp.zeros(self.drawn.z_shape) if z is None else z
        args = z, self.params, solver, memory
        solved = self.program(f or self.forward, *args)(*args)
        row = {"evaluations": int(solved.stats.steps.max()), "converged": bool(solved.stats.converged.all())}
        return row | {"z_error": self.error(solved.value)}, solved


def study(programs: Programs, rtol: float) -> dict[str, Any]:
    """All that is measured on one problem."""
    anderson, found = deq.Anderson(rtol=rtol), {}
    budget: Any = jnp.asarray  # an array, so that another budget does not compile anew
    backward = lambda ratio, most=100: deq.Anderson(rtol=ratio * rtol, history=16, growth=10.0, max_steps=budget(most))
    # 1. The backward solve started from the forward's memory.
    broyden = deq.Broyden(rtol=rtol)
    found["start"] = {
        "from z̄": programs.gradient(broyden, deq.Implicit(backward(0.01))),
        "from −Bᵀz̄": programs.gradient(broyden, Warm(backward(0.01))),
        "from z̄ − BᵀJᵀz̄": programs.gradient(broyden, Warm(backward(0.01), step=True)),
    } | {f"Shine({refine})": programs.gradient(broyden, deq.Shine(refine)) for refine in REFINE}
    for most in (2, 7):  # what Shine(0) and Shine(5) spend
        found["start"][f"from z̄, {most} products"] = programs.gradient(broyden, deq.Implicit(backward(0.01, most)))
        found["start"][f"from −Bᵀz̄, {most} products"] = programs.gradient(broyden, Warm(backward(0.01, most)))
    # 2. A looser backward tolerance.
    found["ratio"] = {f"{ratio:g}": programs.gradient(anderson, deq.Implicit(backward(ratio))) for ratio in RATIOS}
    # 3. No mixing where Picard is as good.
    solvers = {"Picard": deq.Picard(rtol=rtol)}
    solvers |= {f"Anderson({m})": deq.Anderson(rtol=rtol, history=m) for m in HISTORIES}
    found["adaptive"] = {name: programs.find(solver)[0] for name, solver in solvers.items()}
    for threshold in THRESHOLDS:
        row, solved = programs.find(Adaptive(anderson, threshold))
        found["adaptive"][f"adaptive, {threshold:g}"] = row | {"mixed": int(solved.memory.mixed)}
    # 4. bfloat16 first.
    found["bfloat16"] = {}
    for switch in SWITCHES:
        low, solved = programs.find(deq.Anderson(rtol=switch, max_steps=budget(30)), programs.low)
        for label, memory in (("z", None), ("z and memory", solved.memory)):
            row, _ = programs.find(anderson, z=solved.value, memory=memory)
            row |= {"low": low["evaluations"], "low_converged": low["converged"], "low_z_error": low["z_error"]}
            found["bfloat16"][f"{switch:g}, {label}"] = row
    # 5. Tests every k evaluations: what is wasted follows from the counts, what is saved from these.
    found["bytes"] = traffic(programs, anderson)
    # 6. Anderson by QR: it spares no more than a projection without rounding does.
    found["projection"] = {}
    for m in PROJECTED:
        for name, tolerance in (("", rtol), (", tight", 0.1 * rtol)):
            solver = deq.Anderson(rtol=tolerance, history=m, max_steps=budget(200))
            row, _ = programs.find(solver)
            with float64():
                exact, _ = programs.find(solver, programs.wide, jnp.zeros(programs.drawn.z_shape))
            found["projection"][f"{m}{name}"] = row | {"float64": exact["evaluations"]}
    return found


def traffic(programs: Programs, solver: Any) -> dict[str, float]:
    """Bytes that XLA counts as accessed: by f, by one update of `solver`, by one pass of the loop; of one state."""
    z = jnp.zeros(programs.drawn.z_shape)
    flat = z.reshape(len(z), -1)
    memory, layout = solver.init(flat), carry.layout_for(solver, z, 1)
    x = programs.inject(programs.params)
    f = lambda z: programs.cell(z, programs.params, x)
    costs: Callable[..., Any] = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()
    accessed = lambda f, *args: float(costs(f, *args)["bytes accessed"])
    return {
        "f": accessed(f, z),
        "update": accessed(solver.update, flat, memory, flat),
        "evaluation": accessed(loop.make_body(f, solver, layout), carry.init_carry(z, solver, layout)),
        "state": float(flat.nbytes),
    }


def main(config: Config) -> dict[str, Any]:
    path = config.out / "results.json"
    if config.table:
        results = read(path)
    else:
        results: dict[str, Any] = {"command": "python -m experiments.studies.gains" + " --tiny" * config.tiny}
        results |= {"rtol": config.rtol, **environment(), "problems": {}}
        for name in config.problems:
            drawn = (TINY if config.tiny else PROBLEMS)[name]()
            results["problems"][name] = {"what": drawn.what} | study(Programs(drawn), config.rtol)
            config.out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(plain(results), indent=1, ensure_ascii=False) + "\n").encode())
            print(f"  {name}: {drawn.what}", flush=True)
        results = plain(results)
    write_atomically(config.out / "table.md", markdown(results).encode())
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
