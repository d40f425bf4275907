"""Wrong versions of the library, each of which some test must catch: `python -m tests.mutants [name ...]`.

A mutant is one replacement in a copy of the library, whose text must occur exactly once. The tests that are named
beside it are run against the copy, after all of them have passed on an unchanged one. Prints which test caught each
mutant and exits with 1 if one survived.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds for one mutant; one that makes a loop endless counts as caught
WORKERS = 2


class Mutant(NamedTuple):
    name: str
    file: str  # under deq_jax/
    old: str
    new: str
    tests: str  # arguments of pytest: a file, in whatever folder of tests/ it is, and options


CARRY, LOOP, STOPPING, IMPLICIT = "solvers/carry.py", "solvers/loop.py", "solvers/stopping.py", "adjoints/implicit.py"
MUTANTS = [
    Mutant(
        "a compressed memory whose next point is the old one",
        "solvers/renewal.py",
        "z=jax.tree.map(put, carry.z, part.z), solver",
        "solver",
        "test_stepwise.py -k 'are_the_solve and broyden'",
    ),
    Mutant(
        "a new problem with the counts of the one before",
        "solvers/pieces.py",
        "return choose(where, init_pieces(z0, solver, layout), carry)",
        "return choose(where, init_pieces(z0, solver, layout), carry)._replace(solver=carry.solver)",
        "test_stepwise.py -k stream_has_the_bits",
    ),
    Mutant(
        "an optimizer that mixes at each step",
        "_as_optimizer.py",
        "state.count % every == 0",
        "state.count >= 0",
        "test_adapters.py -k optimizer_of_a_batch",
    ),
    Mutant(
        "an optimizer whose problems share a history",
        "_as_optimizer.py",
        "layout = Layout(params, batch_ndim, flat=True)",
        "layout = Layout(params, 0, flat=True)",
        "test_adapters.py -k optimizer_of_a_batch",
    ),
    Mutant(
        "a preconditioner of F taken for one of F over its scale",
        "adjoints/preconditioner.py",
        "preconditioner=Scaled(P, scale)",
        "preconditioner=P",
        "test_root.py -k precondition",
    ),
    Mutant(
        "a scale of F measured in a direction that repeats on all devices",
        "solvers/equation.py",
        "* math.prod(shape) if over else count",
        "* 0 if over else count",
        "test_axis_name.py -k root",
    ),
    Mutant(
        "a problem of Robust that goes on while it waits",
        "solvers/robust.py",
        "self.whole.watch(residual, state, z, self.takes(state))",
        "self.whole.watch(residual, state, z)",
        "test_solvers.py -k robust_gives_each_problem",
    ),
    Mutant(
        "a stage of Robust that begins where the last one ended",
        "solvers/robust.py",
        "updated(self.solver, self.solver.update, state.g0, fresh, state.z0)",
        "updated(self.solver, self.solver.update, state.g0, fresh, state.next_z)",
        "test_solvers.py -k robust_gives_each_problem",
    ),
    Mutant(
        "inner products of each device's piece alone",
        "_vectors.py",
        "return jax.lax.psum(found, xs[0].over) if xs[0].over else found",
        "return found",
        "test_axis_name.py -k solved_as_on_one_device",
    ),
    Mutant(
        "weights gathered at each evaluation",
        LOOP,
        "f, solver = gathered_once(f, z0), for_state(solver, z0, batch_ndim, over)",
        "solver = for_state(solver, z0, batch_ndim, over)",
        "test_gathers.py -k gathered_once",
    ),
    Mutant(
        "rounding of a history that adds up",
        "solvers/anderson.py",
        "old + rounded(new - old, state.dg.dtype)",
        "new",
        "test_history_dtype.py -k add_up",
    ),
    Mutant(
        "carried leaves of a problem that has stopped",
        CARRY,
        "returned=choose(running, returned, carry.returned)",
        "returned=returned",
        "test_carried.py -k stopped_after_its_best",
    ),
    Mutant(
        "the last carried leaves as those of the best iterate",
        CARRY,
        "best_carried=choose(better, carry.carried, carry.best_carried)",
        "best_carried=choose(running, carry.carried, carry.best_carried)",
        "test_carried.py -k under_the_noise",
    ),
    Mutant(
        "compact's carried leaves not scattered",
        "solvers/staged.py",
        '"status", "best_carried", "returned"',
        '"status"',
        "test_carried.py -k compact",
    ),
    Mutant(
        "an attached z that forgets what f was given",
        "halves.py",
        "given = carried if found is None else found.given",
        "given = carried",
        "test_carried.py -k attach_holds",
    ),
    Mutant(
        "Unroll measures under the next noise",
        "adjoints/unroll.py",
        "carried=choose(running, returned, given)",
        "carried=returned",
        "test_carried.py -k unroll_measures",
    ),
    Mutant(
        "a rarer test that overdraws the budget",
        LOOP,
        "jnp.clip(left, 1, every) - 1",
        "every - 1",
        "test_solvers.py -k a_rarer_test",
    ),
    Mutant(
        "plain steps that forget the damping",
        LOOP,
        "scaled(damping, equation.residual(z, layout.pack(fz)))",
        "equation.residual(z, layout.pack(fz))",
        "test_solvers.py -k steps_plainly_between",
    ),
    Mutant(
        "Broyden without its minus sign",
        "solvers/broyden.py",
        "step = scaled(self.damping, direction)",
        "step = -scaled(self.damping, direction)",
        "test_solvers.py -k broyden_meets_the_secant_condition",
    ),
    Mutant(
        "J in place of its transpose",
        "adjoints/backward.py",
        "return lambda u: along_z(u)[0]",
        "return lambda u: jax.jvp(problem, (z,), (u,))[1]",
        "test_adjoints.py -k implicit_equals_a_dense_solve",
    ),
    Mutant(
        "an absolute ridge",
        "_gram.py",
        "eliminate(a[:m] * d[:, None] * d[None] + ridge, ",
        "eliminate((a[:m] + ridge) * d[:, None] * d[None], ",
        "test_solvers.py -k ridge_is_relative",
    ),
    Mutant(
        "damping in the stopping test",
        LOOP,
        "verdict = judged(carry, norms, seen)",
        'verdict = judged(carry, norms._replace(residuals=norms.residuals * member(solver, "damping")), seen)',
        "test_solvers.py -k residual_is_undamped",
    ),
    Mutant(
        "one norm over all leaves",
        LOOP,
        "coupled.everywhere(has_converged(norms, solver, layout))",
        "coupled.everywhere(has_converged(Norms(residual, scale), solver, Layout(scale, 0)))",
        "test_peers.py -k judged_one_by_one",
    ),
    Mutant(
        "evaluations counted off by one",
        CARRY,
        "stats = Stats(end.steps, residual_of(",
        "stats = Stats(end.steps + 1, residual_of(",
        "test_solvers.py -k steps_are_the_evaluations",
    ),
    Mutant(
        "products of the residual that leave out the newest difference",
        "_gram.py",
        "b = jnp.where(here, newest[..., None], ",
        "b = jnp.where(here & False, newest[..., None], ",
        "test_solvers.py -k knows_the_products",
    ),
    Mutant(
        "Anderson without acceleration",
        "solvers/anderson.py",
        "step = plain_step - weighted_sum(gamma, dws, slot)",
        "step = plain_step",
        "test_solvers.py -k acceleration_is_really_happening",
    ),
    Mutant(
        "Anderson that ends where f is not finite",
        "solvers/anderson.py",
        "        return state.last == MIXED\n",
        "        return state.last > BACK\n",
        "test_solvers.py -k takes_back_a_step",
    ),
    Mutant(
        "what is not finite in Anderson's history",
        "solvers/anderson.py",
        "w, g = choose(back, (state.w, state.g), (w, g))",
        "w, g = w, g",
        "test_solvers.py -k leaves_no_trace",
    ),
    Mutant(
        "Anderson that stands still",
        "solvers/anderson.py",
        "back | stays | (state.since < 0)",
        "back | (state.since < 0)",
        "test_solvers.py -k stand_still",
    ),
    Mutant(
        "Anderson that cycles",
        "solvers/anderson.py",
        "since >= WINDOW * self.history",
        "since >= 1000 * self.history",
        "test_solvers.py -k leaves_a_cycle",
    ),
    Mutant(
        "the last iterate instead of the best",
        LOOP,
        "better = running & finite & ~lost & (converged | made.improved)",
        "better = running & finite",
        "test_solvers.py -k best_iterate",
    ),
    Mutant(
        "a problem that stopped moves on",
        LOOP,
        "z, carried = choose(is_on(after, solver), then, stay)",
        "z, carried = then",
        "test_solvers.py -k memory_of_a_problem_that_stopped",
    ),
    Mutant(
        "a problem that stopped runs again",
        LOOP,
        "status = jnp.where(running, status, carry.status).astype",
        "status = jnp.where(running, status, status).astype",
        "test_solvers.py -k stays_failed",
    ),
    Mutant(
        "Broyden's memory as a ring",
        "solvers/broyden.py",
        "return state.count == state.core.shape[-1]",
        "return state.count < 0",
        "test_solvers.py -k broyden_restarts_when_full",
    ),
    Mutant(
        "Broyden's step not that of its compressed memory",
        "solvers/broyden.py",
        "state.z + step\n",
        "state.next_z\n",
        "test_solvers.py -k whose_memory_was_compressed",
    ),
    Mutant(
        "Broyden learns from where it did not ask to go",
        "solvers/broyden.py",
        "(dz_s > 0) & (dz_s * scaling > 0.9 * dz_dz)",
        "(dz_dz > 0)",
        "test_solvers.py -k another_point_is_not",
    ),
    Mutant(
        "Broyden overwrites what is in use",
        "solvers/broyden.py",
        "core = jnp.where(move.reset[..., None, None], 0, state.core)",
        "core = state.core",
        "test_solvers.py -k slot_is_in_use",
    ),
    Mutant(
        "a relative test alone",
        LOOP,
        "has_converged(norms, solver, layout)) & finite & ~lost & reduced",
        "has_converged(norms, solver, layout)) & finite",
        "test_solvers.py -k map_without_a_fixed_point",
    ),
    Mutant(
        "NaN is converged",
        LOOP,
        "coupled.everywhere(has_converged(norms, solver, layout)) & finite & ~lost & reduced",
        "~(residual > solver.atol + solver.rtol * scale) & ~lost",
        "test_solvers.py -k each_status",
    ),
    Mutant(
        "no statistics for the probe",
        IMPLICIT,
        "return inputs_bar, Probe.of(stats)",
        "return inputs_bar, Probe.like(z_bar, problem.batch_ndim)",
        "test_adjoints.py -k probe_reports",
    ),
    Mutant(
        "the policies changed over",
        IMPLICIT,
        "unit if adjoint.on_failure == OnFailure.ONE_STEP",
        "unit if adjoint.on_failure == OnFailure.ZERO",
        "test_adjoint_family.py -k policies_act",
    ),
    Mutant(
        "a policy blind to the forward solve",
        IMPLICIT,
        "stats.sound & forward.stats.sound",
        "stats.sound",
        "test_adjoint_family.py -k policies_act",
    ),
    Mutant(
        "cotangents as they come",
        "adjoints/backward.py",
        "scale = power_of_two(z_bar, problem.batch_ndim, (*problem.axes, *problem.over))\n    with",
        "scale = power_of_two(z_bar, problem.batch_ndim, problem.axes) * 0 + 1\n    with",
        "test_adjoint_family.py -k float16",
    ),
    Mutant(
        "Unroll moves past the first iterate within tolerance",
        "adjoints/unroll.py",
        "held = rounding if budgets is None and not self.stop else rounding | ~running",
        "held = rounding",
        "test_adjoint_family.py -k unroll_stops_at",
    ),
    Mutant(
        "Unroll returns a trial of the solver's",
        "adjoints/unroll.py",
        '(end.best, end.best_carried) if member(solver, "recovers") else (end.z, end.carried)',
        "(end.z, end.carried)",
        "test_adjoint_family.py -k unroll_returns_the_best",
    ),
    Mutant(
        "a backward history begun anew where the Jacobian expands",
        IMPLICIT,
        "history=16, growth=10.0)",
        "history=16)",
        "test_adjoints.py -k converges_where_the_jacobian_expands",
    ),
    Mutant(
        "Reversible walks back the wrong way",
        "adjoints/reversible.py",
        "divided(new - scaled(damping, f_old), 1 - damping)",
        "divided(new + scaled(damping, f_old), 1 - damping)",
        "test_adjoint_family.py -k reversible_is_the_exact",
    ),
    Mutant(
        "Shine without the transpose",
        "adjoints/shine.py",
        "jnp.swapaxes(state.core, -2, -1)",
        "state.core",
        "test_adjoint_family.py -k shine_beats_jfb",
    ),
    Mutant(
        "ImplicitJVP of first order",
        "adjoints/equilibrium.py",
        "saved = adjoint, forward._replace(z=z_star), problem\n    return z_star, linear_map",
        "saved = adjoint, jax.lax.stop_gradient(forward._replace(z=z_star)), problem\n    return z_star, linear_map",
        "test_adjoint_family.py -k hessians_in_every_mode",
    ),
    Mutant(
        "Phantom with the other damping",
        "adjoints/inexact.py",
        "lerp(h, problem(h, inputs), self.damping)",
        "lerp(h, problem(h, inputs), 1 - self.damping)",
        "test_adjoints.py -k phantom_is_the_damped_series",
    ),
    Mutant(
        "Neumann with a term too many",
        "adjoints/inexact.py",
        "jax.lax.fori_loop(1, self.terms, lambda k, u:",
        "jax.lax.fori_loop(0, self.terms, lambda k, u:",
        "test_adjoints.py -k neumann_is_the_truncated",
    ),
    Mutant(
        "compact's norms not scattered",
        "solvers/staged.py",
        '"best", "best_norms", "last_norms", "steps"',
        '"best", "last_norms", "steps"',
        "test_compact.py -k residuals_are_those_of_the_values",
    ),
    Mutant(
        "compact takes the first options, not those of the problems left",
        "solvers/subset.py",
        "jnp.asarray(leaf)[who] if",
        "jnp.asarray(leaf)[: who.size] if",
        "test_compact.py -k an_option_may_be_an_array",
    ),
    Mutant(
        "`_stats_at` one late",
        "trajectory.py",
        "ended = end.steps <= k + 1",
        "ended = end.steps <= k",
        "test_trajectory.py -k a_state_has_ended_with_its_solve",
    ),
    Mutant(
        "options that never reach f",
        "adapters.py",
        "of_f = split(args, options)",
        "of_f = split(args, options) and {}",
        "test_adapters.py -k options_of_f_reach_f",
    ),
    Mutant(
        "a probe that is not handed on",
        "adapters.py",
        "batch_ndim=batch_ndim, probe=probe)",
        "batch_ndim=batch_ndim)",
        "test_adapters.py -k a_probe_says",
    ),
    Mutant(
        "the default backward tolerance that of the forward solve",
        IMPLICIT,
        "rtol: Any = 0.1 * _relative_tolerance",
        "rtol: Any = 1.0 * _relative_tolerance",
        "test_adjoints.py -k tenth_of_the_forward",
    ),
    Mutant(
        "an absolute tolerance that the backward solve never hears of",
        IMPLICIT,
        "cast(solver.rtol) + jnp.minimum(",
        "cast(solver.rtol) + 0 * jnp.minimum(",
        "test_adjoints.py -k absolute_tolerance",
    ),
    Mutant(
        "float16 cotangents as they come",
        "adjoints/backward.py",
        "common = power_of_two(top, 0) / HEADROOM",
        "common = power_of_two(top, 0) * 0 + 1",
        "test_adjoint_family.py -k float16",
    ),
    Mutant(
        "Unroll stops where the value alone has converged",
        "adjoints/unroll.py",
        "has_converged(norms, solver, layout) & contracted",
        "has_converged(norms, solver, layout)",
        "test_adjoint_family.py -k warm_start",
    ),
    Mutant(
        "NewtonKrylov never widens a lost difference",
        "solvers/newton_krylov.py",
        "jnp.where(event == LOST, state.widening * eps**-0.25, state.widening)",
        "state.widening",
        "test_convergence.py -k widens_a_difference",
    ),
    Mutant(
        "a start that grows is called lost by where it began",
        LOOP,
        "guards(growth, norms, layout, coupled)",
        "guards(growth._replace(worst=jnp.where(growth.before < jnp.inf, first_scale, jnp.inf), before=0 * first_scale)"
        ", norms, layout, coupled)",
        "test_convergence.py -k small_start",
    ),
    Mutant(
        "a leaf of zeros that holds a solve up",
        STOPPING,
        "negligible = (scales <= layout.eps * total) & (residuals <= layout.eps * total)",
        "negligible = (scales <= 0) & (residuals <= layout.eps * total)",
        "test_convergence.py -k holds_nothing_up",
    ),
    Mutant(
        "programs looked up without what their literals say",
        "_jaxprs.py",
        "return value_key(np.asarray(v.val)), v.aval",
        "return v.aval",
        "test_trace.py -k different_programs",
    ),
    Mutant(
        "a refusal of forward mode that says nothing",
        "_reverse_only.py",
        "jax.tree.map(functools.partial(_identity_p.bind, message=message), tree)",
        "tree",
        "test_adjoint_family.py -k 'forward_mode_names and Implicit'",
    ),
]


def copy_of_the_library(folder: pathlib.Path) -> None:
    for part in ("deq_jax", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply(mutant: Mutant, folder: pathlib.Path) -> None:
    path = folder / "deq_jax" / mutant.file
    text = path.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: its text occurs {found} times in {mutant.file}, expected 1: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))


def run(tests: str, folder: pathlib.Path) -> tuple[bool, str]:
    """Whether the tests pass on this copy, and the first that does not."""
    file, *options = shlex.split(tests)
    (path,) = folder.glob(f"tests/*/{file}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        str(path.relative_to(folder)),
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT} s"
    if done.returncode not in (0, 1):  # nothing was collected, or an error of pytest's own
        raise SystemExit(f"pytest {' '.join(command[3:])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, flags=re.MULTILINE)
    return done.returncode == 0, failed.group(1) if failed else ""


def attempt(mutant: Mutant) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        copy_of_the_library(folder)
        apply(mutant, folder)
        return run(mutant.tests, folder)


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or m.name in names]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        folder = pathlib.Path(folder)
        copy_of_the_library(folder)
        for mutant in chosen:  # before the minutes that follow
            path = folder / "deq_jax" / mutant.file
            kept = path.read_text()
            apply(mutant, folder)
            path.write_text(kept)
        tests = list(dict.fromkeys(m.tests for m in chosen))
        for name, (passed, which) in zip(tests, pool.map(lambda t: run(t, folder), tests), strict=True):
            if not passed:
                raise SystemExit(f"the library itself fails {which or name}: no mutant can be judged")
        survived = 0
        for mutant, (passed, which) in zip(chosen, pool.map(attempt, chosen), strict=True):
            print(f"{mutant.name:54} {'SURVIVED' if passed else which}", flush=True)
            survived += passed
    print(f"{len(chosen) - survived} of {len(chosen)} mutants caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
