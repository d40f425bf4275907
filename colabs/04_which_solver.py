# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which solver
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/04_which_solver.ipynb)
#
# A *deep equilibrium model* (DEQ) applies one layer $f$ until its state no longer changes. Its output is the fixed
# point $z^\star = f(z^\star)$. A *solver* decides how the model gets there, how long that takes, and whether it gets
# there at all.
#
# After this notebook you can:
#
# - choose between `Picard`, `Anderson`, `Broyden`, `NewtonKrylov`, `Newton` and `Robust`, and give a reason;
# - read the eigenvalues of the Jacobian: which ones stop a solver, and which ones do not;
# - tell a hard problem from one that has no solution, by what the statuses and residuals say;
# - say what a step of each solver costs, on a CPU and as compiled for a GPU.
#
# It takes about three minutes on two CPU cores. Most of that is XLA compiling.

# %%
import jax

if jax.__version_info__ < (0, 7, 2):
    raise RuntimeError(f"deq_jax needs jax 0.7.2 or newer, not {jax.__version__}: choose a newer runtime version")
try:
    import deq_jax as deq
except ImportError:  # a fresh Colab: the JAX that is there stays as it is
    # %pip install -q "deq-jax[flax] @ git+https://github.com/deq-jax/deq_jax"
    import deq_jax as deq

# %%
import base64
import io
import os

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

FAST = os.environ.get("DEQ_JAX_FAST") == "1"  # smaller sizes, for the tests
COLORS = {
    "Picard": "#E69F00", "Anderson": "#0072B2", "Broyden": "#009E73", "NewtonKrylov": "#CC79A7", "Robust": "#D55E00",
    "Implicit": "#0072B2", "Unroll": "#D55E00", "Neumann": "#CC79A7", "Phantom": "#56B4E9", "JFB": "#E69F00",
    "Shine": "#009E73", "Reversible": "#882255",
}  # fmt: skip
plt.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "figure.dpi": 80, "figure.constrained_layout.use": True, "legend.frameon": False,
})  # fmt: skip


def show_moving(figure, draw, frames, alt, seconds=0.4):
    """Show the figure after `draw(frame)` for each frame, as a GIF: it needs no server, and rests on its last frame."""
    pictures = []
    for frame in frames:
        draw(frame)
        figure.canvas.draw()
        pictures.append(np.array(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    try:
        from IPython.display import HTML, display
    except ImportError:  # run as a script, there is nowhere to show it
        return
    # One below the other, they share one palette, and no color flickers.
    sheet, height = Image.fromarray(np.concatenate(pictures)).quantize(128), len(pictures[0])
    first, *rest = (sheet.crop((0, top, sheet.width, top + height)) for top in range(0, sheet.height, height))
    file, pauses = io.BytesIO(), [int(1000 * seconds)] * len(rest) + [2500]
    first.save(file, "GIF", save_all=True, append_images=rest, duration=pauses, loop=0)
    data = base64.b64encode(file.getvalue()).decode()
    display(HTML(f'<img alt="{alt}" src="data:image/gif;base64,{data}">'))


print(f"deq_jax {deq.__version__}, jax {jax.__version__}, on {jax.device_count()} {jax.devices()[0].device_kind}")

# %%
import dataclasses
import time

import jax.numpy as jnp
from matplotlib.patches import Circle

COLORS["Newton"] = "#444444"


# %% [markdown]
# ## On a GPU or a TPU
#
# The calls are the same. Two things change here. Part 4 takes sizes that fill an accelerator. And float32 matrix
# products are rounded to TF32 or bfloat16 there unless you ask for more; the fixed point is then that of a rounded $f$.
# So we ask for float32.

# %%
ACCELERATOR = jax.default_backend() != "cpu"
BATCH, WIDTH = (4096, 1024) if ACCELERATOR else (64, 128 if FAST else 512)
jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## 1. What a solver does
#
# We begin where a solver can be watched: two numbers, and a cell that turns the plane by 50 degrees, stretches it by
# 2.5, and limits the length of the result, as a normalization layer does:
#
# $$f(z) = \frac{A z}{\sqrt{1 + \|z\|^2}} + b.$$
#
# Its fixed point is near zero, and there the Jacobian has a pair of eigenvalues of modulus 2.5 or so. Each application
# of $f$ carries a nearby point *away*. Still the fixed point is a perfectly good solution of $z = f(z)$.
#
# - **`Picard`** applies $f$ again and again.
# - **`Anderson`** mixes its last iterates so that the residual $f(z) - z$ would vanish if $f$ were linear.
# - **`Broyden`** keeps an estimate of the inverse Jacobian of $f(z) - z$ and takes Newton's step with it.
# - **`Newton`** computes that Jacobian.
#
# Every point of a grid is a start, and `batch_ndim=1` makes each start a problem of its own. The fold `Snapshots`, an
# object that is shown every evaluation of a solve, records the iterates.

# %%
SIDE, SPAN, AT = (24, 3.4, (0, 3, 6, 9)) if FAST else (120, 3.4, (*range(16), *range(16, 44, 2)))
turn, stretch, b = np.deg2rad(50), 2.5, jnp.array([0.7, 0.2])
A = jnp.float32(stretch * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]))


def plane(z):
    return z @ A.T / jnp.sqrt(1 + jnp.sum(z**2, axis=-1, keepdims=True)) + b


@jax.jit
def walk(solver, starts):
    return deq.solve(plane, starts, solver=solver, batch_ndim=1, fold=deq.Snapshots(AT))


ticks = np.linspace(-SPAN, SPAN, SIDE)
starts = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
walkers = {"Picard": deq.Picard(), "Anderson": deq.Anderson(), "Broyden": deq.Broyden(), "Newton": deq.Newton()}
walks = {name: walk(dataclasses.replace(solver, max_steps=60), starts) for name, solver in walkers.items()}

# %%
figure, panels = plt.subplots(1, len(walks), figsize=(11, 3.2), sharey=True)
for axes, (name, found) in zip(panels, walks.items(), strict=True):
    steps = np.where(found.stats.converged, found.stats.steps, np.nan).reshape(SIDE, SIDE)
    extent = (-SPAN, SPAN, -SPAN, SPAN)
    image = axes.imshow(steps, origin="lower", extent=extent, cmap="viridis_r", vmin=0, vmax=30)
    solved = f"{found.stats.converged.mean():.1%} of the starts"
    median = f"\nmedian {np.nanmedian(steps):.0f} evaluations" if found.stats.converged.any() else ""
    axes.set(facecolor="0.85", xlabel="z₁ of the start", title=f"{name}: {solved}{median}")
panels[0].set_ylabel("z₂ of the start")
figure.colorbar(image, ax=panels, label="evaluations of f", extend="max")
plt.show()

# %% [markdown]
# Each pixel is one solve, colored by its evaluations; gray pixels did not converge within 60. Plain iteration finds
# the fixed point from nowhere. The methods that solve the *equation* find it from nearly everywhere, each with a
# pattern of its own. Near the fixed point each of the three is quick: a good start helps them all.
#
# Here are 240 of these solves as they run:

# %%
crowd = np.random.default_rng(0).choice(len(starts), min(240, len(starts)), replace=False)
residual_at = np.log10(np.linalg.norm(plane(starts) - starts, axis=-1)).reshape(SIDE, SIDE)
shown = ("Picard", "Anderson", "Broyden")
iterates = {name: np.stack([np.asarray(s.z)[crowd] for s in walks[name].folded]) for name in shown}
residuals = {name: np.stack([np.asarray(s.relative_residual)[crowd] for s in walks[name].folded]) for name in shown}

figure, (*panels, curves) = plt.subplots(1, 4, figsize=(11, 3), width_ratios=(1, 1, 1, 1.15))
dots = {}
for axes, name in zip(panels, shown, strict=True):
    axes.contourf(ticks, ticks, residual_at, levels=6, cmap="Greys_r", alpha=0.35)
    dots[name] = axes.plot(*iterates[name][0].T, ".", ms=4, color=COLORS[name])[0]
    axes.set(xlim=(-SPAN, SPAN), ylim=(-SPAN, SPAN), aspect="equal", xlabel="z₁")
lines = {name: curves.semilogy([], [], color=COLORS[name], label=name)[0] for name in shown}
tails = {name: curves.semilogy([], [], ":", color=COLORS[name])[0] for name in shown}
curves.plot([], [], ":", color="0.4", label="worst tenth")
curves.set(xlim=(0, AT[-1]), ylim=(1e-6, 10), xlabel="step", title="relative residual, median")
curves.legend(loc=(0.5, 0.4))
panels[0].set_ylabel("z₂")


def draw(k):
    for axes, name in zip(panels, shown, strict=True):
        dots[name].set_data(*iterates[name][k].T)
        near = np.mean(residuals[name][k] <= 1e-4)
        axes.set_title(f"{name}, step {AT[k]}: {near:.0%} there")
        lines[name].set_data(AT[: k + 1], np.median(residuals[name][: k + 1], axis=1))
        tails[name].set_data(AT[: k + 1], np.quantile(residuals[name][: k + 1], 0.9, axis=1))


alt = "240 points under three solvers: those of Picard circle, the others gather at the fixed point"
show_moving(figure, draw, range(len(AT)), alt, seconds=0.25)

# %% [markdown]
# Dark shades are small residuals. Under Picard the crowd settles on a circle around the fixed point and turns on it
# forever: its residual stays at one level. That is how an unstable fixed point looks from inside a failing solve.
# Anderson's stragglers, the dotted blue line, come from the dark regions of the first figure.
#
# ## 2. Four problems and their spectra
#
# Now 32 unknowns, and four kinds of problem. For the first three we choose the answer $z^\star$ and build $f$ around
# it, so that we know that there is one. The *spectral radius* $\rho$ is the largest modulus of an eigenvalue.
#
# | problem | cell | its Jacobian $J$ at the solution |
# |---|---|---|
# | easy | $\tanh(Wz + x)$, small $W$ | all eigenvalues well inside the unit circle |
# | stiff | $z - (Az + 0.1\,z^3) + x$ | eigenvalues from −31 to 0.99: fast and slow parts |
# | expanding | $\tanh(Wz + x)$, large $W$, as after much training | eigenvalues all around the unit circle |
# | rootless | $\mathrm{relu}(Wz + x)$, positive $W$ with $\rho > 1$ | has no fixed point to take it at |
#
# The four functions differ, and still they are one batch: row $i$ of the state belongs to problem $i$. The fold
# `ResidualTrace` records the relative residual at every evaluation.

# %%
DIM, BUDGET = 32, 100
z_star = np.random.default_rng(0).uniform(-0.5, 0.5, DIM)


def with_radius(w, radius, slope=1.0):
    """w, scaled so that diag(slope) w has this spectral radius."""
    return w * radius / np.abs(np.linalg.eigvals(np.broadcast_to(slope, DIM)[:, None] * w)).max()


def planted(radius, seed):
    """(w, x) of a tanh cell with the fixed point z_star, where its Jacobian has this spectral radius."""
    w = with_radius(np.random.default_rng(seed).normal(size=(DIM, DIM)), radius, 1 - z_star**2)
    return jnp.float32(w), jnp.float32(np.arctanh(z_star) - w @ z_star)


def positive(radius):
    """(w, x) of a relu cell with positive weights of this spectral radius."""
    w = np.random.default_rng(4).uniform(size=(DIM, DIM))
    return jnp.float32(with_radius(w, radius)), 0.1 * jnp.ones(DIM)


def tanh_cell(z, w, x):
    return jnp.tanh(w @ z + x)


def stiff_cell(z, a, x):
    return z - (a @ z + 0.1 * z**3) + x


def relu_cell(z, w, x):
    return jax.nn.relu(w @ z + x)


basis = np.linalg.qr(np.random.default_rng(3).normal(size=(DIM, DIM)))[0]
a = basis * np.logspace(-3, 1.5, DIM) @ basis.T
problems = {
    "easy": (tanh_cell, planted(0.7, seed=1)),
    "stiff": (stiff_cell, (jnp.float32(a), jnp.float32(a @ z_star + 0.1 * z_star**3))),
    "expanding": (tanh_cell, planted(2.5, seed=3)),
    "rootless": (relu_cell, positive(1.05)),
}
cells, params = zip(*problems.values(), strict=True)


def four_cells(z, params):
    return jnp.stack([cell(row, *p) for cell, row, p in zip(cells, z, params, strict=True)])


# %%
solvers = {
    "Picard": deq.Picard(),
    "Anderson": deq.Anderson(),
    "Broyden": deq.Broyden(rank=40),
    "NewtonKrylov": deq.NewtonKrylov(products="jvp"),
    "Robust": deq.Robust(),
    "Newton": deq.Newton(),
}
if FAST:
    solvers = {name: solvers[name] for name in ("Picard", "Broyden", "Newton")}


@jax.jit
def solve_four(solver, params):
    z0, trace = jnp.zeros((len(problems), DIM)), deq.ResidualTrace(BUDGET)
    return deq.solve(four_cells, z0, params, solver=solver, batch_ndim=1, fold=trace)


solved = {name: solve_four(solver, params) for name, solver in solvers.items()}
print(f"{'':13}" + "".join(f"{name:>17}" for name in problems))
for name, found in solved.items():
    pairs = zip(found.stats.status, found.stats.steps, strict=True)
    print(f"{name:13}" + "".join(f"{deq.Status(int(status)).name:>13} {steps:3d}" for status, steps in pairs))

# %%
closest = [min(solved.values(), key=lambda found: found.stats.relative_residual[i]) for i in range(len(problems))]
z = jnp.stack([found.value[i] for i, found in enumerate(closest)])
radius = deq.stability.spectral_radius(four_cells, z, params, batch_ndim=1)
figure, panels = plt.subplots(2, 4, figsize=(12, 5.6), height_ratios=(1, 1.15))
for i, (problem, (cell, p)) in enumerate(problems.items()):
    eigenvalues = np.linalg.eigvals(np.float64(jax.jacfwd(cell)(z[i], *p)))
    top, bottom = panels[:, i]
    top.add_patch(Circle((0, 0), 1, color="0.88", zorder=0))
    top.plot(eigenvalues.real, eigenvalues.imag, ".", color="0.25", ms=5)
    top.plot(1, 0, "+", color="crimson", ms=9, mew=1.5)
    top.set(aspect="equal", adjustable="datalim", xlabel="Re λ", title=f"{problem}: spectral radius {radius[i]:.3g}")
    top.margins(0.15)
    for name, found in solved.items():
        trace = np.asarray(found.folded[i])[: int(found.stats.steps[i])]
        best = np.minimum.accumulate(np.where(np.isfinite(trace), trace, np.inf))
        ended = "o" if found.stats.converged[i] else "x"
        line = "--" if name == "Robust" else "-"
        color = COLORS.get(name, "0.45")
        bottom.semilogy(best, line, color=color, label=name, lw=1.3)
        bottom.plot(len(best) - 1, best[-1], ended, color=color, ms=5)
    steps = {name: int(found.stats.steps[i]) for name, found in solved.items() if found.stats.converged[i]}
    won = f"{len(steps)} solve it, {min(steps, key=steps.get)} in {min(steps.values())}" if steps else "none solves it"
    bottom.axhline(1e-4, color="0.6", lw=0.8, ls=":")
    bottom.set(ylim=(1e-6, 3), xlim=(0, BUDGET), xlabel="evaluations of f", title=won)
panels[0, 0].set_ylabel("Im λ")
panels[1, 0].set_ylabel("best relative residual so far")
panels[1, -1].legend(loc="lower left")
plt.show()

# %% [markdown]
# Above are the eigenvalues of $J$. Plain iteration converges where all are in the gray disk; at the red cross,
# $\lambda = 1$, $I - J$ is singular. Below are the residuals: a dot ends a solve that converged, a cross one that did
# not. Read the columns.
#
# - **Easy.** Everything lies in the disk. Picard multiplies the error by $\rho$ at each step. The others need fewer
#   evaluations, but for a cheap $f$ that may not pay (part 4).
# - **Stiff.** $1 - \lambda$ spreads over a factor of almost 3,000. The large eigenvalues throw Picard and Anderson
#   out. Broyden learns the Jacobian from its steps and needs about a hundred of them, so that rounding decides
#   whether it stays within this budget. `Newton` has the whole Jacobian and needs a few evaluations, each with 32
#   products. `NewtonKrylov` counts each of its products as an evaluation.
# - **Expanding.** Eigenvalues outside of the disk do not stop a solver of the equation. How many directions expand,
#   and how curved $f$ is, decides who gets there. The cell has fixed points besides the planted one, and a solver may
#   end at any of them: hence a spectral radius that is not exactly 2.5. This is one random cell; the next figure has
#   many.
# - **Rootless.** The residuals level off, and no solver says that it converged. (The spectrum is that at the best
#   iterate.)
#
# ### Not one cell, but many
#
# The same planted cells, for a range of spectral radii and several seeds of each: one batch, one compilation a solver.

# %%
radii, seeds = (np.linspace(0.5, 5, 4), 4) if FAST else (np.linspace(0.5, 5, 13), 24)
w, x = (jnp.stack(leaf) for leaf in zip(*(planted(r, seed) for r in radii for seed in range(seeds)), strict=True))


@jax.jit
def solve_many(solver, w, x):
    cell = jax.vmap(tanh_cell)
    return deq.fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, batch_ndim=1).stats


many = {name: solve_many(solver, w, x) for name, solver in solvers.items()}
share = {name: np.reshape(stats.converged, (len(radii), seeds)).mean(axis=1) for name, stats in many.items()}
spent = {name: np.reshape(stats.steps, (len(radii), seeds)).mean(axis=1) for name, stats in many.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for name in solvers:
    line = "--" if name == "Robust" else "-"
    color = COLORS.get(name, "0.45")
    left.plot(radii, 100 * share[name], "o" + line, ms=3, color=color, label=name)
    right.plot(radii, spent[name], "o" + line, ms=3, color=color, label=name)
beyond = {name: values[radii > 1].mean() for name, values in share.items()}
best = max(beyond, key=beyond.get)
left.set(
    xlabel="spectral radius ρ at the solution",
    ylabel="solved within 100 evaluations (%)",
    title=f"Above ρ = 1, {best} solves {beyond[best]:.0%}, Picard {beyond['Picard']:.0%}",
)
right.set(
    xlabel="spectral radius ρ at the solution",
    ylabel="mean evaluations (100 where unsolved)",
    title=f"At ρ = {radii[0]}, {spent['Picard'][0]:.0f} evaluations of Picard are {spent['Broyden'][0]:.0f} of Broyden",
    ylim=(0, None),
)
right.legend(loc="lower right", ncols=2)
for axes in (left, right):
    axes.axvline(1, color="0.6", lw=0.8, ls=":")
plt.show()

# %% [markdown]
# Plain iteration ends at $\rho = 1$. (Where it still converges, it has found another fixed point, a stable one.) For
# the others one is no border: what grows is the curvature of $f$ between the start and the solution. `NewtonKrylov` is
# made for stiff systems. It spends up to 20 evaluations on a step, so here it takes few of them. `Robust` begins with
# Broyden and falls back on Newton–Krylov.
#
# ## 3. A problem without a solution
#
# The relu cell with positive weights has a fixed point only while the spectral radius of $W$ is below one: with the
# positive left eigenvector $v$ of $W$, $v^\top z = \rho\,v^\top z + v^\top x$, which cannot hold for $\rho \ge 1$. On
# the way there the fixed point runs away to infinity. What do the solvers say before and beyond that point?

# %%
scales = np.linspace(0.7, 1.3, 10 if FAST else 60)  # not one itself
relu_w, relu_x = (jnp.stack(leaf) for leaf in zip(*map(positive, scales), strict=True))


@jax.jit
def solve_relu(solver):
    cell = jax.vmap(relu_cell)
    return deq.fixed_point(cell, jnp.zeros_like(relu_x), relu_w, relu_x, solver=solver, batch_ndim=1)


reports = {name: solve_relu(solver) for name, solver in solvers.items()}
shades = dict(zip(deq.Status, ("#009E73", "#E69F00", "#56B4E9", "#D55E00", "#000000"), strict=True))

figure, (size, map_) = plt.subplots(2, 1, figsize=(8.5, 4.4), sharex=True, height_ratios=(1, 1.3))
inside = scales[scales < 0.999]
exact = [np.linalg.norm(np.linalg.solve(np.eye(DIM) - np.float64(positive(r)[0]), relu_x[0])) for r in inside]
size.semilogy(inside, exact, color="0.3")
size.set(ylabel="‖z*‖", yticks=[2, 5, 10, 20, 50, 100], yticklabels=[2, 5, 10, 20, 50, 100])
size.minorticks_off()
size.text(1.15, np.median(exact), "no fixed point", ha="center")
for row, (_, stats) in enumerate(reports.values()):
    for status in deq.Status:
        here = scales[np.asarray(stats.status) == status]
        map_.plot(here, np.full_like(here, row), "s", ms=5, color=shades[status])
for status in deq.Status:
    if any((stats.status == status).any() for _, stats in reports.values()):
        map_.plot([], [], "s", color=shades[status], label=status.name)
claims = sum(int(stats.sound[scales >= 1].sum()) for _, stats in reports.values())
tries = int((scales >= 1).sum()) * len(reports)
size.set_title(f"Of {tries} solves without a solution, {claims} are reported as solved")
map_.set(
    yticks=range(len(reports)), yticklabels=reports, xlabel="spectral radius of W", ylim=(len(reports) - 0.5, -0.5)
)
map_.legend(loc="upper left", bbox_to_anchor=(1, 1))
for axes in (size, map_):
    axes.axvline(1, color="crimson", lw=0.8)
plt.show()

# %% [markdown]
# Left of the red line, every orange square is a solution that exists and was not found within 100 evaluations; right of
# it there is nothing to find. `MAX_STEPS` cannot tell the two apart, but no status claims a convergence that was not
# measured. A measured residual is not a distance, though: within `rtol` of one a solver may return a huge $z$ whose
# residual does meet the tolerance. `estimate_error=True` then reports an error larger than $z$. The statuses:
#
# | status | what it says | what to do |
# |---|---|---|
# | `CONVERGED` | the tolerance is met, measured at the $z$ that is returned | nothing |
# | `MAX_STEPS` | the budget is spent | a falling residual: raise `max_steps` or loosen `rtol`; else another solver |
# | `STALLED` | no better $z$ can be found in this dtype | usually fine; a wider dtype for more digits |
# | `DIVERGED` | the residual, or $z$, grew without bound | $f$ expands: another solver, or damping |
# | `NONFINITE` | $f$ returned NaN or Inf, or a norm overflowed | check the start and the inputs |
#
# If no solver converges, look at the residuals on the way (they level off where there is no solution), measure the
# spectral radius at the best $z$, and make the cell contract more. `deq.check(solution)` raises where a solve failed.

# %%
try:
    deq.check(solved["Newton"])
except deq.SolveError as error:
    print(error)

# %% [markdown]
# ## 4. What a step costs
#
# Evaluations are one part of the cost. Between two of them a solver reads and writes its history, which matters where
# $f$ is cheap. We time solves of one multiply-add, with a budget that is traced, so that one compiled program gives
# both ends of a slope; the start of the loop cancels. The unit is one dense layer of the same width.

# %%
contenders = {
    "Picard()": deq.Picard(),
    "Anderson(history=5)": deq.Anderson(history=5),
    "Anderson()": deq.Anderson(),
    "Anderson(history=16)": deq.Anderson(history=16),
    "Broyden()": deq.Broyden(),
    "NewtonKrylov()": deq.NewtonKrylov(),
    "Robust()": deq.Robust(),
}
measured = list(contenders)[:3] if FAST else list(contenders)[:-1]  # Robust's steps are those of its stages
keys = jax.random.split(jax.random.key(0), 3)
state = jax.random.normal(keys[0], (BATCH, WIDTH))
slope = jax.random.uniform(keys[1], (BATCH, WIDTH), minval=-0.9, maxval=0.99)
weights = jax.random.normal(keys[2], (WIDTH, WIDTH)) / WIDTH**0.5


@jax.jit
def run_steps(solver, count):
    solver = dataclasses.replace(solver, rtol=0.0, max_steps=count)
    z, stats, *_ = deq.solve(lambda z: slope * z + 1, state, solver=solver, batch_ndim=1)
    return z, stats.steps.max()


@jax.jit
def run_layers(_, count):
    return jax.lax.fori_loop(0, count, lambda _, z: jnp.tanh(z @ weights + slope), state), count


def step_times(runs, repeats=2 if FAST else 30):
    """Seconds of one more step of each: the least times of 10 and of 40 steps, subtracted. Visits are interleaved."""
    counts, taken, least = (10, 40), {}, {}
    for visit in range(repeats + 1):  # the first one compiles
        for name, (run, solver) in runs.items():
            for count in counts:
                began = time.perf_counter()
                _, steps = jax.block_until_ready(run(solver, jnp.asarray(count)))
                seconds = time.perf_counter() - began if visit else np.inf
                taken[name, count], least[name, count] = int(steps), min(seconds, least.get((name, count), np.inf))
    slope = lambda name, few, many: (least[name, many] - least[name, few]) / (taken[name, many] - taken[name, few])
    return {name: slope(name, *counts) for name in runs}


seconds = step_times({"layer": (run_layers, None)} | {name: (run_steps, contenders[name]) for name in measured})
cost = {name: seconds[name] / seconds["layer"] for name in measured}

# %% [markdown]
# On a GPU a small state costs kernel launches and a large one bytes. `make kernels` in the repository, which is
# `python -m experiments.benchmarks.kernels`, compiles each solver for an H100 and reads the program; nothing is run, so
# these are **counts, not times**. They are quoted from its table,
# [`experiments/benchmarks/results/kernels/results.md`](https://github.com/deq-jax/deq_jax/blob/main/experiments/benchmarks/results/kernels/results.md):
# float32, forward, $f$ one multiply-add. Kernels are those of one round with its test of convergence, for a state of
# 64 × 512. Moved is what they read and write at most, in states, for one of 4096 × 1024.

# %%
kernels = {  # kernels of a round and its test, states moved: the rows of experiments/benchmarks/results/kernels
    "Picard()": (6 + 1, 11.0),
    "Anderson(history=5)": (12 + 1, 37.2),
    "Anderson()": (12 + 1, 44.4),  # Anderson(8) in the table
    "Anderson(history=16)": (14 + 1, 61.7),
    "Broyden()": (19 + 2, 84.6),  # Broyden(20)
    "NewtonKrylov()": (28 + 1, 182.3),
    "Robust()": (29 + 1, 182.3),
}
figure, (here, launches, moved) = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
rows = {name: row for row, name in enumerate(contenders)}
shade = [COLORS[name.split("(")[0]] for name in rows]
here.barh([rows[name] for name in measured], list(cost.values()), color=shade)
launches.barh(list(rows.values()), [kernels[name][0] for name in rows], color=shade)
moved.barh(list(rows.values()), [kernels[name][1] for name in rows], color=shade)
here.set(
    yticks=list(rows.values()),
    yticklabels=rows,
    xlabel=f"time of a step / of a dense layer, {BATCH} × {WIDTH}",
    title=f"Here: {cost['Anderson()']:.2g} dense layers, {cost['Anderson()'] / cost['Picard()']:.1f} × Picard",
)
ratios = [a / p for a, p in zip(kernels["Anderson()"], kernels["Picard()"], strict=True)]
launches.set(xlabel="kernels of a round, 64 × 512", title=f"H100, small state: {ratios[0]:.1f} × Picard")
moved.set(xlabel="states moved at most, 4096 × 1024", title=f"H100, large state: {ratios[1]:.1f} × Picard")
here.invert_yaxis()
figure.suptitle("A step of Anderson() besides f: measured here, counted for an H100 (make kernels)", fontsize=10)
plt.show()

# %% [markdown]
# If your $f$ costs ten dense layers, what the solver does between two evaluations hardly matters, and you should save
# evaluations. If it costs a multiply-add, take `Picard(test_every=6)`, or a short history. `NewtonKrylov` reads a
# basis of up to 20 vectors. `Newton` is left out: each of its evaluations holds as many products as there are
# unknowns. `Robust` is not timed, since its steps are those of its stages. Times of one run are rough: rows as close
# as the two shortest histories can change places.
#
# ## 5. The decision tree
#
# This is the tree of the guide *Which solver*, with our four problems where they end.

# %%
tree = [  # depth, question or answer, what to use, its color
    (0, "Do you solve F(z) = 0 rather than z = f(z)?", "deq.root", None),
    (0, "Start with the default. Does it converge?", "Anderson()", "Anderson"),
    (1, "Yes, and f is cheap or contracts strongly (ρ below about 0.5)", "Picard()", "Picard"),
    (1, "Yes, and memory is short", "Anderson(history=3)", "Anderson"),
    (1, "Yes, and problems of the batch differ much in difficulty", "deq.compact, or a stream", None),
    (1, "Yes: keep it", "Anderson()", "Anderson"),
    (0, "It does not converge within 100 evaluations", None, None),
    (1, "The residual is still falling", "raise max_steps, or loosen rtol", None),
    (1, "f expands, as trained cells do", "Broyden(rank=40)", "Broyden"),
    (1, "Solves of one batch need different methods", "Robust()", "Robust"),
    (1, "Stiff or badly conditioned, up to a few hundred unknowns", "Newton()", "Newton"),
    (1, "Stiff or badly conditioned, more unknowns", 'NewtonKrylov(products="jvp")', "NewtonKrylov"),
    (0, "No solver converges", "there may be no fixed point", None),
]
ours = {5: "easy", 8: "expanding", 10: "stiff", 12: "rootless"}
figure, axes = plt.subplots(figsize=(10, 4.6))
for row, (depth, words, use, name) in enumerate(tree):
    axes.text(0.02 + 0.04 * depth, row, words, va="center", weight="normal" if depth else "bold")
    if depth:
        parent = max(r for r in range(row) if tree[r][0] == 0)
        axes.plot([0.03, 0.03, 0.053], [parent + 0.35, row, row], color="0.6", lw=1)
    if use:
        color = COLORS.get(name, "0.45")
        axes.text(0.6, row, use, va="center", family="monospace", color="white", bbox=dict(fc=color, ec="none", pad=3))
    if row in ours:
        axes.text(0.93, row, f"◀ {ours[row]}", va="center", style="italic")
axes.set(xlim=(0, 1.05), ylim=(len(tree) - 0.4, -0.6), title="Anderson() first; leave it for a reason")
axes.axis("off")
plt.show()

# %% [markdown]
# **Try next**
#
# - Change `A` in part 1 to a rotation by 60 degrees, or let it stretch fivefold. Who still finds the fixed point?
# - Give `Broyden` a `rank` of 10 or 100 in part 2. Memory is `rank` + 1 states.
# - Add `deq.Anderson(history=16)` and `deq.Picard(damping=0.5)` to `solvers`, each under a name of its own.
# - Set `planted(2.5, seed=…)` to other seeds. Does the order of the solvers stay?
# - Notebook 05 asks the same questions of the *backward* solve: which gradient.
