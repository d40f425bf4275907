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
# # Which gradient
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/05_which_gradient.ipynb)
#
# A *deep equilibrium model* applies one layer $f$ until its state does not change any more, $z^\star =
# f(z^\star)$, and trains through that fixed point. Its gradient can be exact, or cheaper and biased. When does
# that matter? The library calls a way to compute this gradient an *adjoint*.
#
# After this notebook you can:
#
# - say what each adjoint of the library computes, and see how far it is from the exact gradient;
# - weigh its memory and its time against that error;
# - recognize a task on which a biased gradient will do, and a task on which it fails;
# - measure the bias of a gradient during your own training;
# - choose an adjoint.
#
# A GPU is optional; a CPU takes about four minutes.

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
import functools
import time
from typing import NamedTuple

import jax.numpy as jnp
import optax

ACCELERATOR = jax.default_backend() != "cpu"
jax.config.update("jax_default_matmul_precision", "highest")  # of the cells; see the words on GPUs and TPUs

# %% [markdown]
# ## 1. One equation, many ways to answer it
#
# Let $z^\star = f(z^\star, a)$, and let $J = \partial f/\partial z$ and $f_a = \partial f/\partial a$ at
# $z^\star$. Differentiate both sides, and the chain rule in reverse needs one linear system:
#
# $$\bar a = f_a^\top u, \qquad u = \bar z + J^\top u .$$
#
# Here $\bar z$ is the derivative of the loss with respect to $z^\star$. Every gradient below is a way to find $u$,
# and its cost is counted in products with $J^\top$, each a call of the function that `jax.vjp` returns:
#
# | adjoint | what it takes for $u$ |
# |---|---|
# | `Implicit()` | the solution, found by a solver |
# | `Neumann(terms=k)` | the first $k$ terms of $\sum_i (J^\top)^i\,\bar z$ |
# | `Phantom(steps=k, damping=β)` | what $k$ damped steps of $f$ from $z^\star$ give |
# | `JFB()` | $\bar z$ itself |
# | `Shine(refine=k)` | the inverse that a forward `Broyden` has learned, and $k$ more steps |
# | `Unroll()`, `Reversible()` | no $u$: they differentiate the iterations, which they keep or walk back |
#
# To judge them we need problems whose gradient is known. Take $f(z) = \tanh(Wz + x)$, choose $z^\star$ first, and
# set $x = \operatorname{artanh} z^\star - Wz^\star$. Then $J = \operatorname{diag}(1 - z^{\star 2})\,W$, and NumPy
# solves the system densely in float64. We scale $W$ to a *spectral radius* $\rho$ of $J$, the largest modulus of
# its eigenvalues, of 0.9 and of 1.2. Above one, the terms $(J^\top)^i\,\bar z$ grow. A unique fixed point can
# still exist: we take a $W$ with a negative definite symmetric part.


# %%
class Problem(NamedTuple):
    w: jax.Array  # [problems, dim, dim]
    x: jax.Array  # [problems, dim]
    z_bar: jax.Array  # the loss is ⟨z̄, z*⟩
    exact: np.ndarray  # gradient in w, from a dense solve


def problem(radius, count=8, dim=32, seed=0):
    """`count` cells whose Jacobian at a planted fixed point has this spectral radius."""
    rng = np.random.default_rng(seed)
    z, z_bar = np.tanh(0.5 * rng.normal(size=(count, dim))), rng.normal(size=(count, dim))
    slope, w, s = 1 - z**2, *rng.normal(size=(2, count, dim, dim))
    if radius > 1:  # negative definite, plus an antisymmetric part: the fixed point is unique
        w = w - w.swapaxes(1, 2) - 0.5 * s @ s.swapaxes(1, 2) / dim**0.5
    w *= radius / np.abs(np.linalg.eigvals(slope[..., None] * w)).max(-1)[:, None, None]
    x = np.arctanh(z) - np.einsum("bij,bj->bi", w, z)
    system = np.eye(dim) - slope[..., None] * w  # I − J
    u = np.linalg.solve(system.swapaxes(1, 2), z_bar[..., None])[..., 0]
    return Problem(*map(jnp.float32, (w, x, z_bar)), exact=(slope * u)[..., None] * z[:, None])


def cell(z, w, x):
    return jnp.tanh(jnp.einsum("bij,bj->bi", w, z) + x)


@jax.jit
def gradient(w, x, z_bar, solver, adjoint):
    def loss(w):
        z = deq.fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, adjoint=adjoint, batch_ndim=1).value
        return jnp.sum(z_bar * z)

    return jax.grad(loss)(w)


# %% [markdown]
# Each adjoint may spend $k$ products with $J^\top$ (the two that go through the iterations: $k$ steps). We draw
# the result as an arrow's tip: how far it goes *along* the exact gradient, and how far *off* it. The exact
# gradient ends at the star; the distance from the star is the relative error.

# %%
anderson, broyden = deq.Anderson(rtol=1e-5, max_steps=80), deq.Broyden(rtol=1e-5, max_steps=80)
counts = (4,) if FAST else (2, 8, 32)
budget = lambda k: jnp.asarray(k, jnp.int32)  # an array is traced: one program for all budgets
families = {
    "Implicit": lambda k: (anderson, deq.Implicit(deq.Anderson(rtol=1e-6, history=16, max_steps=budget(k)))),
    "Shine": lambda k: (broyden, deq.Shine(refine=k - 2)),
    "Phantom": lambda k: (anderson, deq.Phantom(steps=k, damping=0.8)),
    "Neumann": lambda k: (anderson, deq.Neumann(terms=k + 1)),
    "JFB": lambda k: (anderson, deq.JFB()),
    "Unroll": lambda k: (deq.Anderson(rtol=1e-5, max_steps=budget(k)), deq.Unroll(depth=max(counts))),
    "Reversible": lambda k: (deq.Picard(rtol=1e-5, max_steps=budget(2 * min(k, 16) + 1)), deq.Reversible(0.5)),
}
if FAST:
    families = {name: families[name] for name in ("Implicit", "Neumann", "JFB")}


def tip(g, exact):
    """(along, off): the components of g parallel and orthogonal to the exact gradient, in units of its length."""
    g, exact = np.float64(g).ravel(), exact.ravel()
    along = g @ exact / (exact @ exact)
    return along, np.linalg.norm(g - along * exact) / np.linalg.norm(exact)


radii = (0.9, 1.2)
trails = {}
for radius in radii:
    p = problem(radius)
    for name, make in families.items():
        trails[radius, name] = np.array([tip(gradient(p.w, p.x, p.z_bar, *make(k)), p.exact) for k in counts])

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.7), sharey=True)
for axes, radius in zip(panels, radii, strict=True):
    for level in (0.25, 0.5, 1.0):  # circles of equal relative error
        axes.add_patch(plt.Circle((1, 0), level, fill=False, color="0.85", lw=0.8))
        axes.annotate(f"{level:.0%}", (1 + 0.8 * level, 0.6 * level), color="0.5", fontsize=8)
    axes.plot([0, 1], [0, 0], color="0.3", lw=1.2, zorder=1)
    for name in families:
        along, off = trails[radius, name].T
        axes.plot(along, off, "-", color=COLORS[name], lw=1, alpha=0.7)
        sizes = np.linspace(8, 60, len(counts))
        axes.scatter(along, off, sizes, color=COLORS[name], label=name, zorder=3)
    axes.plot(1, 0, "*", color="k", ms=13, zorder=4, clip_on=False)
    cosine = {name: trail[-1, 0] / np.hypot(*trail[-1]) for (r, name), trail in trails.items() if r == radius}
    axes.set(
        xlabel="along the exact gradient",
        title=f"ρ = {radius}, cosine at k = {counts[-1]}: "
        f"Implicit {cosine['Implicit']:.2f}, Neumann {cosine['Neumann']:.2f}, JFB {cosine['JFB']:.2f}",
        xlim=(-0.1, 1.9),
        ylim=(-0.03, 1.15),
        aspect="equal",
    )
panels[0].set_ylabel("off the exact gradient")
panels[1].legend(loc="upper right")
figure.suptitle(f"The tip of each gradient for k = {', '.join(map(str, counts))} (small to large dots)", fontsize=10)
plt.show()

# %% [markdown]
# `Implicit` and `Shine` arrive in either panel. At $\rho = 0.9$ the series of `Neumann` and the steps of `Phantom`
# come near too, if they may be long. `Shine` is quickest, because it starts with what the forward solve has learned.
# At $\rho = 1.2$ the series of `Neumann` diverges and leaves the picture; the damping of `Phantom` tames it. `JFB` is
# one point: it makes no products. `Unroll` and `Reversible` are exact for the steps they took, and arrive when those
# steps do: at $\rho = 1.2$ in the picture, and at $\rho = 0.9$ not yet. (The derivative of an iteration may converge
# later than its value. And float32 can walk back about 16 steps of `Reversible` at a damping of 0.5, where it stops
# here.)
#
# ## 2. What each one costs
#
# XLA tells how much temporary memory a compiled gradient asks for. Times are ratios within one run, each the
# median of several in turn, so that what else the machine does falls on all alike. `Implicit` stands beside a
# forward `Anderson` and beside a forward `Broyden`, which `Shine` needs.

# %% [markdown]
# ### On a GPU or a TPU
#
# The sizes of part 2 grow with the device, since small problems would measure the launch of kernels. All else
# stays. A GPU or a TPU may round the factors of float32 products. To judge gradients to many digits, this notebook
# asks for full precision (`jax_default_matmul_precision`, in the cell with the imports); in training you may not
# need it.

# %%
COUNT, DIM = (256, 256) if ACCELERATOR else (16, 32) if FAST else (64, 64)
REPEATS = 3 if FAST else 9
rows = {
    "Implicit": (anderson, deq.Implicit()),
    "Implicit, Broyden": (broyden, deq.Implicit()),
    "Shine(5), Broyden": (broyden, deq.Shine(5)),
    "Phantom(5, 0.8)": (anderson, deq.Phantom(5, 0.8)),
    "Neumann(5)": (anderson, deq.Neumann(5)),
    "JFB": (anderson, deq.JFB()),
    "Reversible": (deq.Picard(rtol=1e-5, max_steps=33), deq.Reversible(0.5)),
    "Unroll, checkpoints": (anderson, deq.Unroll(checkpoint=True, stop=True)),
    "Unroll": (anderson, deq.Unroll(stop=True)),
}
if FAST:
    rows = {name: rows[name] for name in ("Implicit", "JFB")}

p = problem(0.9, COUNT, DIM)
programs = {name: gradient.lower(p.w, p.x, p.z_bar, *row).compile() for name, row in rows.items()}
mebibytes = {name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in programs.items()}
error, seconds = {}, {name: [] for name in rows}
for _ in range(REPEATS):
    for name, row in rows.items():
        start = time.perf_counter()
        g = jax.block_until_ready(programs[name](p.w, p.x, p.z_bar, *row))
        seconds[name].append(time.perf_counter() - start)
        error[name] = np.linalg.norm(np.float64(g) - p.exact) / np.linalg.norm(p.exact)
ratio = {name: np.median(seconds[name]) / np.median(seconds["Implicit"]) for name in rows}

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True)
columns = {"relative error": error, "temporaries (MiB)": mebibytes, "time / time of Implicit": ratio}
for axes, (label, values) in zip(panels, columns.items(), strict=True):
    for y, name in enumerate(rows):
        color = COLORS[name.split("(")[0].split(",")[0]]
        axes.plot([min(values.values()) / 2, values[name]], [y, y], color=color, lw=2, alpha=0.35)
        axes.plot(values[name], y, "o", color=color, ms=7)
        number = f"{float(f'{values[name]:.2g}'):g}"  # two digits
        axes.annotate(number, (values[name], y), (6, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", xlabel=label, xlim=(min(values.values()) / 2, 6 * max(values.values())))
panels[0].set_yticks(range(len(rows)), rows)
panels[0].invert_yaxis()
panels[0].set_title(f"Error: JFB is {error['JFB']:.0%} off")
largest, slowest = max(mebibytes, key=mebibytes.get), max(ratio, key=ratio.get)
panels[1].set_title(f"Memory: {largest} has {mebibytes[largest] / mebibytes['Implicit']:.0f} times Implicit")
panels[2].set_title(f"Time: {slowest} takes {ratio[slowest]:.1f} times Implicit")
figure.suptitle(f"ρ = 0.9, {COUNT} problems of {DIM} numbers, float32", fontsize=10)
plt.show()

# %% [markdown]
# All that a cheap gradient can save is the backward solve. How much that is depends on the model: the default
# solves to a tenth of the forward tolerance, but the head of a model and its loss cost the same with every
# gradient. It depends on the sizes and on the machine as well: for 8 problems of 32 numbers the guide [Which
# gradient](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/which_gradient.md) has 0.49 for `JFB`. So time it
# where you train. The memory of `Unroll` is that of every iteration; checkpoints keep about the square root of it. The
# error of `Reversible` is not that of a wrong derivative: it is the exact derivative of 16 steps that had not
# arrived yet.
#
# ## 3. Two knobs, and which way is down
#
# Does a wrong direction matter? Here is a problem that people solve with such gradients: a rod in a cold room,
# heated at some points, its temperature read at three. The steady temperature is a fixed point: each piece takes
# the mean of its neighbors, weighted by the conductivities $k_i$ on its left and on its right, plus its heat,
# minus what the room takes:
#
# $$z_i = \frac{k_i z_{i-1} + k_{i+1} z_{i+1} + s_i}{k_i + k_{i+1} + c}.$$
#
# Given the readings, find the $k_i$. At first there are two unknowns only: $\log k$ in the left and in the right
# half. The map below is the misfit from a dense solve, with 10 % of noise in the readings, so that no rod explains
# them fully. Each path follows one gradient downhill, in steps of equal length that shrink toward the end.

# %%
PIECES, COOLING = 48, 0.05
sensors, heaters = jnp.array([8, 24, 39]), np.arange(3, PIECES, 6)
heat = jnp.float32(np.eye(PIECES)[heaters])  # one experiment for each heater


def rod(z, log_k, heat):
    k = jnp.exp(log_k)
    left, right = jnp.pad(z[:, :-1], ((0, 0), (1, 0))), jnp.pad(z[:, 1:], ((0, 0), (0, 1)))
    return (k[:-1] * left + k[1:] * right + heat) / (k[:-1] + k[1:] + COOLING)


def misfit(log_k, target, *, solver=deq.Anderson(rtol=1e-4, history=10, max_steps=150), adjoint):
    z, stats = deq.fixed_point(rod, jnp.zeros_like(heat), log_k, heat, solver=solver, adjoint=adjoint, batch_ndim=1)
    return jnp.mean((z[:, sensors] - target) ** 2) / jnp.mean(target**2), stats


def dense_readings(log_k):
    """The same temperatures from a linear system, in float64. Any leading axes."""
    k, index = np.exp(np.float64(log_k)), np.arange(PIECES)
    system = np.zeros((*k.shape[:-1], PIECES, PIECES))
    system[..., index, index] = k[..., :-1] + k[..., 1:] + COOLING
    system[..., index[1:], index[:-1]] = system[..., index[:-1], index[1:]] = -k[..., 1:-1]
    return np.linalg.solve(system, np.float64(heat.T)).swapaxes(-1, -2)[..., np.asarray(sensors)]


# %%
halves = np.float32([np.arange(PIECES + 1) <= PIECES // 2, np.arange(PIECES + 1) > PIECES // 2])
truth = np.array([0.8, -0.8])
target = dense_readings(truth @ halves)
target = np.float32(target * np.exp(0.1 * np.random.default_rng(0).normal(size=target.shape)))
starts = jnp.array([[-1.5, 1.5], [1.8, 1.8], [-1.8, -1.5]])
DESCENT = 20 if FAST else 120


@jax.jit
def descend(start, adjoint):
    """The path of normalized steps downhill, with the same lengths for every adjoint."""

    def step(theta, length):
        g = jax.grad(lambda theta: misfit(theta @ halves, target, adjoint=adjoint)[0])(theta)
        return theta - length * g / (jnp.linalg.norm(g) + 1e-12), theta

    return jax.lax.scan(step, start, 0.07 * jnp.linspace(1, 0, DESCENT) ** 0.5)[1]


guides = {"Implicit": deq.Implicit(), "Phantom": deq.Phantom(5, 0.8), "Neumann": deq.Neumann(5), "JFB": deq.JFB()}
if FAST:
    guides = {"JFB": deq.JFB()}
paths = {name: np.asarray(jax.vmap(descend, (0, None))(starts, adjoint)) for name, adjoint in guides.items()}
x_ticks, y_ticks = np.linspace(-6, 2.4, 61), np.linspace(-2.2, 2.2, 41)
misfit_at = lambda theta: np.mean((dense_readings(theta @ halves) - target) ** 2, axis=(-1, -2)) / np.mean(target**2)
surface = misfit_at(np.stack(np.meshgrid(x_ticks, y_ticks), axis=-1))
along = {name: misfit_at(path) for name, path in paths.items()}  # [start, step]
at_end = {name: values[:, -1].max() for name, values in along.items()}
for name, values in along.items():
    print(f"{name:9} misfit on the way, over that at the start: at most {(values.max(1) / values[:, 0]).max():.2f}")


# %%
figure, axes = plt.subplots(figsize=(7.6, 4.4))
axes.contourf(x_ticks, y_ticks, np.log10(surface), 14, cmap="Greys_r", alpha=0.85)
axes.plot(*truth, "*", color="w", mec="k", ms=14, zorder=5)
axes.set(
    xlabel="log conductivity of the left half",
    ylabel="log conductivity of the right half",
    title="Misfit at the end, worst start: " + ", ".join(f"{name} {at_end[name]:.2g}" for name in paths),
)
lines = {
    (name, i): axes.plot([], [], color=COLORS[name], lw=2.2, label=None if i else name)[0]
    for name in paths
    for i in range(len(starts))
}
heads = {key: axes.plot([], [], "o", color=line.get_color(), mec="k", ms=7)[0] for key, line in lines.items()}
axes.legend(loc="upper left", frameon=True)


def draw(n):
    for (name, i), line in lines.items():
        line.set_data(*paths[name][i, : n + 1].T)
        heads[name, i].set_data(*paths[name][i, n : n + 1].T)


alt = f"Paths of descent on the misfit of two conductivities, one color for each of {', '.join(paths)}."
show_moving(figure, draw, range(0, DESCENT, 10 if FAST else 3), alt, seconds=0.1)

# %% [markdown]
# Dark is low, the star is the rod that made the readings. `Implicit` goes down to it from every start. `JFB` asks
# only what the conductivities that touch a sensor do to it, with the temperatures beside it held fixed. From two
# of the three starts that sends it *uphill*, over a ridge and into another valley that is not nearly as deep. The
# few products of `Phantom` and `Neumann` are enough for two unknowns.
#
# ## 4. What training makes of them
#
# Three tasks, each from several seeds.
#
# **The rod** again, now with all 49 conductivities unknown and no noise. A seed is another rod.
#
# **Two spirals**, which a small cell $z = \tanh(zW + x)$ classifies. A seed is another start. Once $W$ is scaled
# to a norm of at most 0.9, so that the cell is a *contraction*, and once it is *free*, with a bound that it never
# reaches.
#
# All seeds of an adjoint are one compiled program: `scan` over the steps, `vmap` over the seeds. Both bounds run in the
# same one.


# %%
class Task(NamedTuple):
    init: callable  # key -> params
    data: dict  # title -> arrays with a leading axis of seeds
    loss: callable  # (params, *data, solver, adjoint) -> (loss, stats)
    lr: float
    solvers: dict


SEEDS, STEPS = (2, 20) if FAST else (3, 200)


def true_rod(seed):
    rng, x = np.random.default_rng(seed), np.linspace(0, 1, PIECES + 1)
    return 0.7 * np.sin(2 * np.pi * (1.5 * x + rng.uniform())) + 0.5 * np.sin(2 * np.pi * (3 * x + rng.uniform()))


def rod_loss(log_k, target, *, solver, adjoint):
    error, stats = misfit(log_k, target, solver=solver, adjoint=adjoint)
    return error + 1e-3 * jnp.mean(jnp.diff(log_k) ** 2), stats  # of many rods that fit, a smooth one


rods = np.stack([true_rod(seed) for seed in range(SEEDS)])
rod_task = Task(
    init=lambda key: jnp.zeros(PIECES + 1),
    data={"rod": (jnp.float32(dense_readings(rods)),)},
    loss=rod_loss,
    lr=3e-2,
    solvers={
        "forward": deq.Anderson(rtol=1e-4, history=10, max_steps=150),
        "Shine": deq.Broyden(rtol=1e-4, rank=60, max_steps=150),
        "Unroll": deq.Picard(max_steps=60),
        "Reversible": deq.Picard(rtol=1e-4, max_steps=33),
    },
)


def two_spirals(count, seed):
    rng = np.random.default_rng(seed)
    t, label = rng.uniform(0.5, 3.0, count), rng.integers(2, size=count)
    angle = 2.5 * t + np.pi * label
    return np.float32(np.stack([t * np.cos(angle), t * np.sin(angle)], axis=-1)), np.int32(label)


def spiral_cell(z, x, w):
    return jnp.tanh(z @ w + x)


def spiral_init(key, dim=32):
    keys, normal = jax.random.split(key, 3), jax.random.normal
    return {
        "encode": 0.7 * normal(keys[0], (2, dim)),
        "bias": jnp.zeros(dim),
        "w": 0.2 * normal(keys[1], (dim, dim)),
        "decode": 0.2 * normal(keys[2], (dim, 2)),
    }


def spiral_loss(params, bound, *, solver, adjoint):
    inject = spiral_x @ params["encode"] + params["bias"]
    # The derivative of tanh is at most 1, so ‖J‖ is at most the bound.
    w = deq.stability.spectral_normalize(params["w"], bound, only_shrink=True)
    z, stats = deq.fixed_point(
        spiral_cell, jnp.zeros_like(inject), inject, w, solver=solver, adjoint=adjoint, batch_ndim=1
    )
    return optax.softmax_cross_entropy_with_integer_labels(z @ params["decode"], spiral_label).mean(), stats


spiral_x, spiral_label = map(jnp.asarray, two_spirals(128, seed=0))
spirals = Task(
    init=spiral_init,
    data={"spirals, contraction": (jnp.full(SEEDS, 0.9),), "spirals, free": (jnp.full(SEEDS, 1e6),)},
    loss=spiral_loss,
    lr=1e-2,
    solvers={
        "forward": deq.Anderson(rtol=1e-3, max_steps=40),
        "Shine": deq.Broyden(rtol=1e-3, rank=40, max_steps=40),
        "Unroll": deq.Picard(max_steps=12),
        "Reversible": deq.Picard(rtol=1e-3, max_steps=25),
    },
)

# %%
MODES = {
    "Implicit": deq.Implicit(),
    "Shine": deq.Shine(5),
    "Phantom": deq.Phantom(5, 0.8),
    "Neumann": deq.Neumann(5),
    "JFB": deq.JFB(),
    "Unroll": deq.Unroll(),
    "Reversible": deq.Reversible(0.5),
}
if FAST:
    MODES = {name: MODES[name] for name in ("Implicit", "JFB")}


def trainer(task, solver, adjoint):
    """data -> of every seed, at every step: the parameters before it, the loss, and the share of converged solves."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(task.lr))
    value_and_grad = jax.value_and_grad(functools.partial(task.loss, solver=solver, adjoint=adjoint), has_aux=True)

    def one_seed(key, data):
        def step(carry, _):
            params, opt_state = carry
            (loss, stats), grads = value_and_grad(params, *data)
            updates, opt_state = tx.update(grads, opt_state, params)
            carry = optax.apply_updates(params, updates), opt_state
            return carry, (params, loss, stats.converged.mean())

        params = task.init(key)
        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]

    all_seeds = jax.jit(jax.vmap(one_seed))
    return lambda data: jax.tree.map(np.asarray, all_seeds(jax.random.split(jax.random.key(1), SEEDS), data))


tasks = [rod_task] if FAST else [rod_task, spirals]
titles = [title for task in tasks for title in task.data]
history = {}
for task in tasks:
    for name, adjoint in MODES.items():
        train = trainer(task, task.solvers.get(name, task.solvers["forward"]), adjoint)
        history |= {(title, name): train(data) for title, data in task.data.items()}
for title in titles:
    sound = {name: history[title, name][2].mean() for name in MODES if name not in ("Unroll", "Reversible")}
    print(f"{title}: converged solves", ", ".join(f"{name} {share:.1%}" for name, share in sound.items()))


# %% [markdown]
# First the rods that each gradient finds. `Unroll` and `Reversible` train networks of some layers, and these fit
# their readings with a rod that is right for *them*; so we judge every rod in the same way, by the dense solve.
# The panels show the first rod, each with its own distance; the title is a mean over all rods.

# %%
found = {name: history["rod", name][0][:, -1] for name in MODES}
readings = np.float64(rod_task.data["rod"][0])
scale = np.mean(readings**2, axis=(-1, -2))
rod_end = {n: np.mean((dense_readings(found[n]) - readings) ** 2, axis=(-1, -2)) / scale for n in MODES}
distance = {name: np.sqrt(np.mean((found[name] - rods) ** 2, axis=-1)) for name in MODES}

figure, panels = plt.subplots(2, (len(MODES) + 1) // 2, figsize=(10, 4.6), sharex=True, sharey=True)
for axes, name in zip(panels.flat, MODES, strict=False):
    axes.plot(rods[0], color="0.2", lw=1.2)
    axes.plot(found[name][0], color=COLORS[name], lw=2)
    axes.plot(np.asarray(sensors), [-3.2] * len(sensors), "^", color="0.3", ms=6, clip_on=False)
    axes.set(title=f"{name}: {distance[name][0]:.2f} off", ylim=(-3.2, 3.2))
for axes in panels.flat[len(MODES) :]:
    axes.axis("off")
    key = ("black: the true rod", "color: the one found", "triangles: sensors", "", "“off” is the root mean")
    axes.text(0, 0, "\n".join((*key, "square of the difference")))
figure.supxlabel("place along the rod", fontsize=9)
figure.supylabel("log conductivity", fontsize=9)
best = min(distance, key=lambda name: distance[name].mean())
figure.suptitle(f"{best} comes nearest to the true rod: {distance[best].mean():.2f} off over {SEEDS} rods", fontsize=10)
plt.show()

# %% [markdown]
# `Phantom` and `Neumann`, with five steps or terms, see conductivities within five pieces of a sensor, `JFB` only
# those that touch one. All other conductivities follow the term that asks for a smooth rod. `Shine` and `Implicit`
# see all of them. The losses:

# %%
own = {title: {name: history[title, name][1][:, -1] for name in MODES} for title in titles} | {"rod": rod_end}
figure, panels = plt.subplots(1, len(titles), figsize=(10.5, 3.6), sharey=True, squeeze=False)
for axes, (title, ends) in zip(panels[0], own.items(), strict=True):
    median = {name: np.median(losses) for name, losses in ends.items()}
    low, high = min(median, key=median.get), max(median, key=median.get)
    for y, (name, losses) in enumerate(ends.items()):
        axes.plot(losses, [y] * len(losses), "o", color=COLORS[name], ms=6, alpha=0.6)
        axes.plot([median[name]] * 2, [y - 0.3, y + 0.3], color=COLORS[name], lw=2.5)
    axes.set(
        xscale="log",
        xlim=(min(map(min, ends.values())) / 10, 10 * max(map(max, ends.values()))),  # at least two decades
        xlabel="misfit at the equilibrium" if title == "rod" else "training loss (nats)",
        title=f"{title}: Implicit {median['Implicit']:.1g}\n"
        f"from {median[low]:.1g} ({low}) to {median[high]:.1g} ({high})",
    )
panels[0, 0].set_yticks(range(len(MODES)), MODES)
panels[0, 0].invert_yaxis()
figure.suptitle(f"Losses after {STEPS} steps, {SEEDS} seeds each; bars are medians", fontsize=10)
plt.show()
for title, ends in own.items():
    times = {name: np.median(losses) / np.median(ends["Implicit"]) for name, losses in ends.items()}
    print(f"{title}, median over that of Implicit:", ", ".join(f"{n} {t:.2g}" for n, t in times.items() if t != 1))

# %% [markdown]
# ### Measure the bias as you train
#
# `deq.diagnostics.gradient_bias` compares a cheap gradient with the exact one, at the parameters and on the data
# of now. It costs two gradients, so jit it once and call it every few hundred steps. We call it along the paths
# that each cheap gradient took itself.

# %%
at = np.linspace(0, STEPS - 1, 4 if FAST else 11).astype(int)
measured = ("JFB",) if FAST else ("Neumann", "JFB")
cosines = {}
for task in tasks:
    loss = lambda params, *data, adjoint: task.loss(params, *data, solver=task.solvers["forward"], adjoint=adjoint)[0]
    for name in measured:
        meter = lambda params, data: deq.diagnostics.gradient_bias(loss, params, *data, inexact=MODES[name]).cosine
        meters = jax.jit(jax.vmap(jax.vmap(meter, (0, None))))  # over the seeds, and over the steps of each
        for title, data in task.data.items():
            visited = jax.tree.map(lambda leaf: leaf[:, at], history[title, name][0])
            cosines[title, name] = np.asarray(meters(visited, data))

figure, panels = plt.subplots(1, len(titles), figsize=(10.5, 3.4), sharey=True, squeeze=False)
for axes, title in zip(panels[0], titles, strict=True):
    for name in measured:
        cosine = cosines[title, name]
        axes.fill_between(at, cosine.min(0), cosine.max(0), color=COLORS[name], alpha=0.15, lw=0)
        axes.plot(at, np.median(cosine, axis=0), color=COLORS[name], label=name)
    axes.axhline(0, color="0.4", lw=0.8, ls=":")
    jfb = cosines[title, "JFB"]
    axes.set(
        xlabel="training step",
        title=f"{title}: median of JFB {np.median(jfb):.2f},\nuphill in {np.mean(jfb < 0):.0%} of the measurements",
        ylim=(-1.05, 1.05),
    )
panels[0, 0].set_ylabel("cosine with the exact gradient")
panels[0, 0].legend(loc="lower right")
figure.suptitle("Along the path that each gradient took; bands are the range over seeds", fontsize=10)
plt.show()

# %% [markdown]
# **The contraction** is where to save the backward solve. Its solves converge, and `Neumann` stays close to the exact
# gradient. The ratios under the losses say what a bias costs there: little, even that of `JFB`, beside its cost on
# the rod.
#
# **On the rod** the title says how often `JFB` points uphill. Seldom or never, and still it gets nowhere. The cosine
# tells what a small plain step does. Adam rescales each coordinate, so many small wrong components can outweigh the
# few right ones.
#
# **The free cell** can decide against the exact gradient. Where its ratio is below one, a biased gradient has ended
# with a lower median loss than `Implicit` (`Unroll` and `Reversible` with that of their own few steps). Near a point
# where $I - J$ is singular the true gradient is huge, and where a solve has not converged there is no fixed point to
# differentiate (the shares are printed above). Gradients that do not look that far may pass over such places. So a
# smaller error of the gradient is not always a smaller loss, as the documentation says too; its study gives each
# gradient the better of two learning rates, and there `Implicit` ends no worse than the best of the cheap ones.
# Before you change the gradient, keep the cell tame: a bound that makes it a contraction, a smaller learning rate, or
# `deq.regularizers.jacobian_penalty`.
#
# ## 5. Which one, then?
#
# The tree of the documentation, page *Which gradient*. Start at the top; without a reason, stay there.

# %%
tree = [  # (depth, question, answer, the adjoint whose color it takes)
    (0, "Start here: exact, memory that does not grow", "Implicit()", "Implicit"),
    (0, "Do you need forward mode or a Hessian?", "ImplicitJVP()", "Implicit"),
    (0, "Is the backward solve the problem?", "", ""),
    (1, "It does not converge (Probe.status)", "Implicit(deq.Broyden(rank=40)), linear=, preconditioner=", "Implicit"),
    (1, "Few unknowns a problem", "Implicit(linear=deq.Dense())", "Implicit"),
    (1, "It takes too long, and the forward solver is Broyden", "Shine(refine=5)", "Shine"),
    (1, "It takes too long, and a biased gradient will do", "Phantom(steps=5) or Neumann(terms=5)", "Phantom"),
    (2, "Measure the bias now and then", "deq.diagnostics.gradient_bias", ""),
    (2, "The cheapest, and the most biased", "JFB()", "JFB"),
    (0, "A network of L layers rather than an equilibrium?", "Unroll() with Picard(max_steps=L)", "Unroll"),
    (1, "Memory of order √L", "Unroll(checkpoint=True)", "Unroll"),
    (1, "Memory that does not grow", "Reversible()", "Reversible"),
    (0, "Do forward solves fail during training?", "Implicit(on_failure=deq.OnFailure.ZERO)", "Implicit"),
]
figure, axes = plt.subplots(figsize=(10, 4.6))
for row, (depth, question, answer, name) in enumerate(tree):
    left = 0.03 * depth
    axes.plot([left, left], [row - 0.32, row + 0.32], color="0.6", lw=1.5)
    axes.text(left + 0.012, row, question, va="center", weight="bold" if depth == 0 else "normal")
    if answer:
        box = {"boxstyle": "round,pad=0.3", "fc": COLORS.get(name, "0.5"), "ec": "none", "alpha": 0.22}
        axes.text(0.52, row, answer, va="center", family="monospace", fontsize=9, bbox=box)
axes.set(xlim=(-0.01, 1), ylim=(len(tree) - 0.4, -0.7))
axes.set_title("Stay with Implicit() unless one of these asks for another")
axes.axis("off")
plt.show()

# %% [markdown]
# **Try next**
#
# - More sensors: `sensors = jnp.arange(2, 48, 4)`. From how many on is `Neumann(5)` as good as `Implicit`?
# - `deq.Neumann(terms=k)` and `deq.Phantom(steps=k)` with a $k$ of your own in part 4. How many does the rod need?
# - The free spirals with `lr=1e-3`, or with `deq.Robust()` as the solver. Does `Implicit` still end last?
# - `deq.Implicit(linear=deq.Dense())` in part 2, for these few unknowns.
# - Your own model: pass `adjoint=` through to `fixed_point` and call `gradient_bias` on a batch.
