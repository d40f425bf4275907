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
# # Fixed points, and how to differentiate them
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/01_fixed_points.ipynb)
#
# A deep network applies layer after layer. A *deep equilibrium model* applies one layer until nothing changes
# any more, and calls that unchanging state its output:
#
# $$z^\star = f(z^\star, \theta, x).$$
#
# Here $z$ is the state, $x$ the input of the layer, and $\theta$ its parameters. The model is a DEQ for short. How
# one gets there is the solver's business; the derivative does not need to know. After this notebook you can
#
# 1. solve $z = f(z)$, and read what a solve reports about itself;
# 2. tell from the spectral radius which solver will find $z^\star$;
# 3. differentiate $z^\star$: exactly, in constant memory, or approximately for less;
# 4. solve for any pytree and for a batch of problems, and look into the backward pass;
# 5. train a small equilibrium model with Flax and Optax.
#
# Everything runs on a CPU in about two minutes, most of them XLA compiling.
#
# **On a GPU or a TPU** the same cells run unchanged. These problems are too small to run faster there: one step of a
# solver is a few small kernels, and their launches cost more than their arithmetic.

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
from functools import partial

import jax.numpy as jnp
import optax
from flax import nnx

from deq_jax.nn import DEQ

# %% [markdown]
# ## 1. One number
#
# Type any number into a calculator and press *cos* until the display stands still. It shows 0.739085, the only
# solution of $\cos z = z$.

# %%
z, stats = deq.fixed_point(jnp.cos, 0.0)
print(f"z = {z:.6f}, cos z = {jnp.cos(z):.6f}")
print(stats)

# %% [markdown]
# `Stats` belongs to the *returned* `z`: how many evaluations of $f$ it cost, the residual $\|f(z) - z\|$ in absolute
# and relative terms, and a `Status`. (With `estimate_error=True`, `error` estimates the distance to $z^\star$.)
# Nothing is raised when a solve fails: under `jit` nothing can be, and in a batch one failure must not stop the other
# problems. So **look at the status**. Here are the ways to end. `Picard` is plain iteration, $z \leftarrow f(z)$;
# `Anderson` and `Broyden` also use what earlier evaluations have shown.


# %%
def logistic(z):
    return 4 * z * (1 - z)


secant = deq.Anderson(history=1)  # in one dimension, one difference is all there is to know
attempts = [
    ("cos z", jnp.cos, 0.0, deq.Picard()),
    ("cos z", jnp.cos, 0.0, secant),
    ("cos z, rtol = 0", jnp.cos, 0.0, deq.Picard(rtol=0.0)),
    ("z + 1: has none", lambda z: z + 1, 0.0, deq.Picard()),
    ("z + 1: has none", lambda z: z + 1, 0.0, deq.Broyden()),
    ("z² + 1: none is real", lambda z: z**2 + 1, 0.0, deq.Picard()),
    ("√(z − 1): leaves its domain", lambda z: jnp.sqrt(z - 1), 3.0, deq.Picard()),
    ("4z(1 − z): unstable", logistic, 0.3, deq.Picard()),
    ("4z(1 − z): unstable", logistic, 0.3, secant),
    ("4z(1 − z): unstable", logistic, 0.3, deq.Broyden()),
]
print(f"{'f(z)':29}{'solver':10}{'status':10}{'evaluations':>12}{'z':>10}{'residual':>11}")
for name, f, z0, solver in attempts:
    z, stats = deq.fixed_point(f, z0, solver=solver)
    status = deq.Status(int(stats.status)).name
    row = f"{name:29}{type(solver).__name__:10}{status:10}{int(stats.steps):12}"
    print(f"{row}{float(z):10.4f}{float(stats.residual):11.1e}")

# %% [markdown]
# `STALLED` is usually good news: the tolerance asked for more digits than float32 has. `z + 1` shows why a *relative*
# residual alone is no proof: $1/\|z\|$ falls below any tolerance as $z$ runs away, so the library asks for more than
# that, and no row of `z + 1` says `CONVERGED`.
#
# The last rows are the interesting ones. The logistic map has a fixed point at $z = 3/4$ with slope
# $f' = -2$: every plain iteration doubles the distance to it, and the orbit is chaotic. But a fixed
# point that repels the *iteration* is a perfectly good solution of the *equation*; Anderson and Broyden solve
# the equation. (In one dimension both are the secant method: follow the chord through the last two points.)
#
# A solver is two pure functions, `init` and `update`, so its path is one `scan` away:


# %%
def path(f, z0, solver, steps):
    """The iterates of a solver, with no stopping test."""

    def step(carry, _):
        z, state = carry
        dz, state = solver.update(f(z) - z, state, z)
        return (z + dz, state), z[0]

    z = jnp.atleast_1d(z0)
    return jax.lax.scan(step, (z, solver.init(z)), length=steps)[1]


def draw_cobweb(axes, f, z0, solver, steps):
    z, span, color = path(f, z0, solver, steps), (0.0, 1.0), COLORS[type(solver).__name__]
    grid = jnp.linspace(*span, 200)
    axes.plot(span, span, color="0.7", lw=0.8)
    axes.plot(grid, f(grid), color="0.3", lw=1.2)
    # From the curve to the diagonal at the next iterate, and from there to the curve again.
    axes.plot(jnp.repeat(z, 2)[1:], jnp.stack([f(z), jnp.roll(z, -1)], 1).reshape(-1)[:-1], color=color, lw=0.9)
    axes.plot(z, f(z), ".", ms=5, color=color)
    axes.set(xlabel="z", ylabel="f(z)", xlim=span, ylim=(0.0, 1.02), aspect="equal")


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6))
draw_cobweb(left, jnp.cos, 0.1, deq.Picard(), 20)
left.set_title("Picard, cos z: |f′| < 1, spirals in")
draw_cobweb(middle, logistic, 0.3, deq.Picard(), 40)
middle.set_title("Picard, 4z(1 − z): |f′| = 2, no rest")
draw_cobweb(right, logistic, 0.3, secant, 12)
right.set_title("Anderson, 4z(1 − z): chords lead to 3/4")
plt.show()

# %% [markdown]
# The same two solvers on the logistic map, one evaluation per frame: Picard from two starts that differ by 1e-3, and
# Anderson from both of them. Picard's two orbits separate within ten evaluations. Where they come close again later,
# as in the last frame, that is chance.

# %%
FRAMES = 4 if FAST else 20
orbits = {
    (type(solver).__name__, z0): path(logistic, z0, solver, FRAMES)
    for solver in (deq.Picard(), secant)
    for z0 in (0.3, 0.301)
}
figure, axes = plt.subplots(figsize=(7, 3), dpi=70)
axes.axhline(0.75, color="0.6", lw=0.8, ls=":")
lines = {
    (name, z0): axes.plot(
        [], [], "o-" if z0 == 0.3 else "o--", ms=3, lw=1, color=COLORS[name], label=f"{name} from {z0}"
    )[0]
    for name, z0 in orbits
}
axes.set(
    xlim=(0, FRAMES + 0.2), ylim=(-0.02, 1.4), xticks=range(0, FRAMES + 1, 5), xlabel="evaluations of f", ylabel="z"
)
axes.legend(loc="upper right", ncols=2)


def draw_frame(n):
    for key, line in lines.items():
        line.set_data(range(1, n + 2), orbits[key][: n + 1])
    apart = {name: float(abs(orbits[name, 0.3][n] - orbits[name, 0.301][n])) for name in ("Picard", "Anderson")}
    axes.set_title(
        f"From 1e-3 apart: Picard's orbits are {apart['Picard']:.0e} apart, Anderson's {apart['Anderson']:.0e}"
    )


alt = "Orbits of the logistic map: Picard's two part ways, Anderson's two meet at 3/4"
show_moving(figure, draw_frame, range(FRAMES), alt)

# %% [markdown]
# ## 2. The spectral radius decides
#
# In many dimensions the slope becomes the Jacobian $J = \partial f/\partial z$ at $z^\star$, and $|f'|$ its
# *spectral radius* $\rho$, the largest modulus of an eigenvalue. Near $z^\star$ a plain iteration multiplies the
# error by about $\rho$ each time: slow at 0.95, hopeless above 1.
#
# To be sure what we measure, we choose the answer first. For the cell $f(z) = \tanh(Wz + x)$ pick any $z^\star$
# and set $x = \operatorname{artanh} z^\star - W z^\star$. Then $J = \operatorname{diag}(1 - z^{\star 2})\,W$ is
# known exactly, and $W$ can be scaled to any radius we like.

# %%
DIM = 32


def cell(z, w, x):
    return jnp.tanh(w @ z + x)


def problem(radius, seed=2):
    """(w, x, z_star) of a cell whose Jacobian at z_star has this spectral radius."""
    rng = np.random.default_rng(seed)
    z_star = rng.uniform(-0.5, 0.5, DIM)
    w = rng.normal(size=(DIM, DIM))
    jacobian = (1 - z_star**2)[:, None] * w
    w *= radius / np.abs(np.linalg.eigvals(jacobian)).max()
    x = np.arctanh(z_star) - w @ z_star
    return jnp.float32(w), jnp.float32(x), jnp.float32(z_star)


# %% [markdown]
# Numbers of a solver are leaves of a pytree when they are floats or arrays. So a *traced* `max_steps` sweeps the
# budget inside one compiled function, here with `vmap`; nothing is compiled twice, and we count to prove it.

# %%
budgets = jnp.arange(1, 41 if FAST else 101)
solvers = {"Picard": deq.Picard(), "Anderson": deq.Anderson(), "Broyden": deq.Broyden(rank=40)}
traces = 0


def curve(solver, w, x):
    """Relative residual for each budget of evaluations."""
    global traces
    traces += 1

    def residual(max_steps):
        options = dataclasses.replace(solver, rtol=0.0, max_steps=max_steps)
        return deq.fixed_point(cell, jnp.zeros(DIM), w, x, solver=options).stats.relative_residual

    return jax.vmap(residual)(budgets)


curve = jax.jit(curve)
radii = (0.95, 1.2)
curves = {(name, r): curve(solver, *problem(r)[:2]) for r in radii for name, solver in solvers.items()}
print(f"{traces} traces for {len(radii)} problems, {len(solvers)} solvers, {len(budgets)} budgets")


# %%
def first_below(curve, level=1e-4):
    return str(int(budgets[jnp.argmax(curve <= level)])) if curve.min() <= level else f"> {budgets[-1]}"


figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axes, radius in zip(panels, radii, strict=True):
    for name in solvers:
        axes.semilogy(budgets, curves[name, radius], color=COLORS[name], label=name)
    reached = ", ".join(f"{name} {first_below(curves[name, radius])}" for name in solvers)
    axes.set(xlabel="evaluations of f", title=f"ρ = {radius}: {reached}")
panels[0].set_ylabel("best relative residual, ‖f(z) − z‖ / ‖f(z)‖")
panels[0].legend()
figure.suptitle("Evaluations to a relative residual of 1e-4", fontsize=10)
plt.show()

# %% [markdown]
# A number with “>” in a title is where the axis ends. At $\rho = 0.95$ Picard does get there, but only after more than
# 150 evaluations. Below one, acceleration saves a factor; above one, it is the difference between an
# answer and none. The leading eigenvalues of this $J$ are a complex pair, so plain iteration circles $z^\star$ and
# would do so forever.
#
# Try other values of `seed` and `DIM`. Where the leading eigenvalue is real, Picard sometimes leaves $z^\star$ for a
# *different*, stable fixed point (a nonlinear equation may have several). With `DIM = 100`, 25 eigenvalues lie
# outside the unit circle at $\rho = 1.2$, and a hundred evaluations are too few for all three.
#
# ## 3. The derivative does not care how you got there
#
# Let $z = f(z, a)$ hold for all $a$ nearby, and differentiate both sides. With $f_a = \partial f/\partial a$, and a
# bar for the derivative of the loss with respect to a quantity (its *cotangent*):
#
# $$\mathrm{d}z = J\,\mathrm{d}z + f_a\,\mathrm{d}a$$
# $$\mathrm{d}z = (I - J)^{-1} f_a\,\mathrm{d}a$$
# $$\bar a = f_a^\top u, \qquad u = \bar z + J^\top u.$$
#
# The last line is what reverse mode needs, and its equation for $u$ is *a fixed point again*: linear, of the same
# spectral radius, given to the same solvers. No iterate of the forward solve appears in it, so none is stored.
#
# For $z = \cos(a z)$ the second line can be written down, which makes it a test:

# %%
precise = deq.Anderson(rtol=1e-7, history=1)


@jax.jit
def z_of(a):
    f = lambda z: jnp.cos(a * z)
    return deq.fixed_point(f, 0.5, solver=precise, adjoint=deq.Implicit(precise)).value


a, h = 1.0, 1e-2
z = z_of(a)
slope = -jnp.sin(a * z)
by_hand = z * slope / (1 - a * slope)
print(f"Implicit            {jax.grad(z_of)(a):.6f}")
print(f"by hand             {by_hand:.6f}")
print(f"central difference  {(z_of(a + h) - z_of(a - h)) / (2 * h):.6f}   (h = {h}, float32)")
print(f"second derivative   {jax.grad(jax.grad(z_of))(a):.6f}")

# %% [markdown]
# ### What it costs in memory
#
# Backpropagation *through* the iterations (`Unroll`) must keep them. We need not run anything to see it: XLA says
# how much temporary memory a compiled gradient asks for. The plain iteration of depth $L$ is the weight-tied
# network of $L$ layers; `checkpoint=k` keeps every $k$-th state and recomputes the rest.

# %%
BATCH, WIDTH = 64, 128


def gradient_memory(depth, adjoint):
    """Temporary memory of the compiled gradient, in MiB."""

    def loss(w, x):
        f = lambda z: jnp.tanh(z @ w + x)
        return deq.fixed_point(f, x, solver=deq.Picard(max_steps=depth), adjoint=adjoint, batch_ndim=1).value.sum()

    w, x = (jax.ShapeDtypeStruct((n, WIDTH), jnp.float32) for n in (WIDTH, BATCH))
    analysis = jax.jit(jax.grad(loss)).lower(w, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


depths = (16, 64) if FAST else (16, 36, 64, 100)
memory = {
    "Unroll": [gradient_memory(n, deq.Unroll()) for n in depths],
    "Unroll, checkpoint = √depth": [gradient_memory(n, deq.Unroll(checkpoint=round(n**0.5))) for n in depths],
    "Implicit": [gradient_memory(n, deq.Implicit(deq.Picard(max_steps=n))) for n in depths],
}
figure, axes = plt.subplots(figsize=(5.5, 3.4))
for name, mebibytes in memory.items():
    style = ":" if "checkpoint" in name else "-"
    axes.plot(depths, mebibytes, "o" + style, color=COLORS[name.split(",")[0]], label=name)
factor = memory["Unroll"][-1] / memory["Implicit"][-1]
axes.set(
    xlabel="depth (iterations)",
    ylabel="temporary memory of the gradient (MiB)",
    title=f"Implicit is flat: {factor:.0f} times less than Unroll at depth {depths[-1]}",
    ylim=(0, None),
)
axes.legend()
plt.show()

# %% [markdown]
# Anderson and Broyden hold a few states more (2·`history`, `rank` + 1), whatever the depth.
#
# ### Gradients that are wrong on purpose
#
# The backward equilibrium costs about as much as the forward one, and one may stop early. `JFB` takes $u = \bar z$;
# `Neumann(k)` sums $k$ terms of $\sum_i (J^\top)^i \bar z$; `Phantom(k)` differentiates $k$ damped steps that start
# at $z^\star$; `Implicit` with a small budget does what Anderson can with it. We judge by a dense solve with the $J$
# we know, on the two problems of part 2. The axis counts loosely: `JFB` needs no product with $J^\top$ and stands at
# 1, and `Neumann(k)` needs $k - 1$.

# %%
counts = (1, 8) if FAST else (1, 2, 4, 8, 16, 32)
target = jnp.float32(np.random.default_rng(1).normal(size=DIM))


def gradient(w, x, z_star, adjoint):
    """d/dw of ½‖z − target‖² at z_star; the forward solve has nothing left to do."""

    def loss(w):
        z = deq.fixed_point(cell, z_star, w, x, solver=deq.Picard(rtol=1e-5), adjoint=adjoint).value
        return 0.5 * jnp.sum((z - target) ** 2)

    return jax.grad(loss)(w)


gradient = jax.jit(gradient)


def exact_gradient(w, z_star):
    slope = 1 - np.float64(z_star) ** 2
    u = np.linalg.solve((np.eye(DIM) - slope[:, None] * np.float64(w)).T, z_star - target)
    return np.outer(slope * u, z_star)


def misalignment(g, exact):
    """1 − cosine of the angle between two gradients."""
    g, exact = np.float64(g).ravel(), exact.ravel()
    return max(1 - g @ exact / np.linalg.norm(g) / np.linalg.norm(exact), 1e-16)


families = {
    "Neumann": deq.Neumann,
    "Phantom": lambda k: deq.Phantom(steps=k, damping=0.5),
    "Implicit": lambda k: deq.Implicit(deq.Anderson(rtol=1e-6, max_steps=jnp.asarray(k), history=12)),
}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axes, radius in zip(panels, radii, strict=True):
    w, x, z_star = problem(radius)
    exact = exact_gradient(w, z_star)
    for name, make in families.items():
        more = () if FAST or name != "Implicit" else (48, 64, 96)
        off = [misalignment(gradient(w, x, z_star, make(k)), exact) for k in counts + more]
        axes.loglog(counts + more, off, "o-", color=COLORS[name], label=name)
    jfb = misalignment(gradient(w, x, z_star, deq.JFB()), exact)
    axes.plot(1, jfb, "k*", ms=10, label="JFB")
    axes.set(
        xlabel="k, the Jᵀ-vector products allowed",
        title=f"ρ = {radius}: cosine {1 - jfb:.2f} for JFB, 1 − {off[-1]:.0e} for Implicit",
    )
panels[0].set_ylabel("1 − cosine with the exact gradient")
panels[0].legend()
plt.show()

# %% [markdown]
# At $\rho = 1.2$ the terms of the `Neumann` series grow in the end, and more of them make the gradient worse. The
# damping of `Phantom` helps there, slowly. `Implicit` solves the equation for $u$ rather than summing a series, so
# $\rho > 1$ costs it more products and no accuracy.
#
# ## 4. Any pytree, any number of problems
#
# The state may be any pytree of floats, and with `batch_ndim=1` the leading axis of every leaf counts independent
# problems: each has its own history, its own tolerance test, and stops on its own.
#
# Here is one with two leaves, a game. Two players answer each other, $a = \tanh(c\,M b + p)$ and
# $b = \tanh(-c\,M^\top a + q)$; a fixed point is an equilibrium where neither would move. The stronger the
# coupling $c$, the more they chase each other in circles: $J$ is nearly antisymmetric, with eigenvalues
# near $\pm i c$. We solve for a whole range of couplings at once.
#
# What about the *backward* solve? Its statistics cannot be an output of the forward pass, which ran before it. So
# they come out as a cotangent: pass zeros as a `Probe`, differentiate with respect to them, and read.

# %%
PLAYERS, couplings = 20, jnp.linspace(0.1, 2.5, 25)
rng = np.random.default_rng(0)
m = rng.normal(size=(PLAYERS, PLAYERS))
m = jnp.float32(m / np.linalg.norm(m, 2))
p, q = jnp.float32(0.5 * rng.normal(size=(2, PLAYERS)))


def answers(state, m, c):
    a = jnp.tanh(c[:, None] * (state["b"] @ m.T) + p)
    b = jnp.tanh(-c[:, None] * (state["a"] @ m) + q)
    return {"a": a, "b": b}


z0 = {"a": jnp.zeros((couplings.size, PLAYERS)), "b": jnp.zeros((couplings.size, PLAYERS))}
adjoint = deq.Implicit(deq.Anderson(rtol=1e-4))


def play(m, probe, solver):
    z, stats = deq.fixed_point(answers, z0, m, couplings, batch_ndim=1, solver=solver, adjoint=adjoint, probe=probe)
    return jnp.mean(z["a"] * z["b"]), stats


probe = deq.Probe.zeros(couplings.shape)
_, plain = jax.jit(play)(m, probe, deq.Picard())
gradients = jax.jit(jax.grad(play, argnums=(0, 1), has_aux=True))
(m_bar, backward), forward = gradients(m, probe, deq.Anderson())

# %%
figure, axes = plt.subplots(figsize=(6, 3.4))
lost = ~plain.converged
axes.plot(couplings[~lost], plain.steps[~lost], "o", ms=4, color=COLORS["Picard"], label="Picard, forward")
axes.plot(couplings[lost], plain.steps[lost], "x", color=COLORS["Picard"], label="Picard, not converged")
axes.plot(couplings, forward.steps, "o", ms=4, color=COLORS["Anderson"], label="Anderson, forward")
axes.plot(couplings, backward.steps, "o", ms=4, mfc="none", color=COLORS["Anderson"], label="Anderson, backward")
axes.set(
    xlabel="coupling c",
    ylabel="evaluations of f, or Jᵀ-vector products",
    title=f"Of {couplings.size} games Picard solves {int((~lost).sum())}, Anderson {int(forward.converged.sum())}",
    ylim=(0, None),
)
axes.legend()
plt.show()

# %% [markdown]
# ## 5. A model whose depth is decided by its data
#
# Two spirals, a state of 64 numbers, and a cell of one matrix. `DEQ` is the Flax NNX layer around
# `fixed_point`: it solves `cell(z, x) = z` for every example of a batch. The training loop is the usual one
# of Optax under a plain `jax.jit`, over the split state of the module.
#
# One thing is particular to equilibrium models: nothing in the loss asks the equilibrium to be easy to find, so
# training drifts toward cells that are hard to solve. A remedy is to charge for it: Bai, Koltun & Kolter (2021)
# add $\gamma\,\|J\|_F^2 / \mathrm{dim}$ at $z^\star$, estimated with one random vector
# ($\mathbb{E}\,\|J^\top\epsilon\|^2 = \|J\|_F^2$ for $\epsilon \sim N(0, I)$). We train with and without it, and
# next to both an ordinary network: the same cell, unrolled eight times.


# %%
def two_spirals(count, seed):
    """`count` noisy points of each of two spirals, and the labels 0 and 1."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * np.sqrt(rng.uniform(0.03, 1, (2, count)))
    radius = angle / (2 * np.pi)
    phase = np.pi * np.arange(2)[:, None]
    x = np.stack([radius * np.cos(angle + phase), radius * np.sin(angle + phase)], axis=-1)
    x += 0.02 * rng.normal(size=x.shape)
    return jnp.float32(3 * x.reshape(-1, 2)), jnp.repeat(jnp.arange(2), count)


class Cell(nnx.Module):
    def __init__(self, dim, rngs):
        small = nnx.initializers.normal(0.5 / dim**0.5)  # spectral radius about one half at the start
        self.linear = nnx.Linear(dim, dim, kernel_init=small, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z) + x)


class Classifier(nnx.Module):
    def __init__(self, dim, rngs, **options):
        self.embed = nnx.Linear(2, dim, rngs=rngs)
        self.layer = DEQ(Cell(dim, rngs), **options)
        self.head = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, x):
        z, stats = self.layer(self.embed(x))
        return self.head(z)[:, 0], z, stats


tx = optax.adam(3e-3)


@partial(jax.jit, static_argnums=0)
def train_step(graphdef, params, opt_state, key, penalty):
    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        logits, z, stats = model(x)
        loss = optax.sigmoid_binary_cross_entropy(logits, y).mean()
        _, vjp = jax.vjp(lambda z: model.layer.cell(z, model.embed(x)), z)
        jacobian = jnp.mean(vjp(jax.random.normal(key, z.shape))[0] ** 2)
        log = {"loss": loss, "steps": stats.steps.mean(), "converged": stats.converged.mean()}
        return loss + penalty * jacobian, log

    grads, log = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, log


@partial(jax.jit, static_argnums=0)
def predict(graphdef, params, x):
    return nnx.merge(graphdef, params)(x)


# %%
WIDTH, LAYERS, STEPS = 64, 8, 10 if FAST else 300
x, y = two_spirals(200, seed=0)
x_test, y_test = two_spirals(1250, seed=1)
solver = deq.Anderson(rtol=1e-3, max_steps=40, history=5)
equilibrium = {"solver": solver, "adjoint": deq.Implicit(solver)}
unrolled = {"solver": deq.Picard(max_steps=LAYERS), "adjoint": deq.Unroll()}
runs = {  # the layer's options, the weight of the penalty, color, line
    "equilibrium": (equilibrium, 0.0, COLORS["Implicit"], ":"),
    "penalized equilibrium": (equilibrium, 0.3, COLORS["Implicit"], "-"),
    f"{LAYERS} layers": (unrolled, 0.0, COLORS["Unroll"], "-"),
}
models, logs, accuracy = {}, {}, {}
for name, (options, penalty, *_) in runs.items():
    graphdef, params = nnx.split(Classifier(WIDTH, nnx.Rngs(0), **options))
    opt_state, history = tx.init(params), []
    for key in jax.random.split(jax.random.key(0), STEPS):
        params, opt_state, log = train_step(graphdef, params, opt_state, key, penalty)
        history.append(log)
    models[name], logs[name] = (graphdef, params), {k: np.array([log[k] for log in history]) for k in log}
    logits, _, stats = predict(graphdef, params, x_test)
    accuracy[name] = float(jnp.mean((logits > 0) == y_test))
    print(f"{name}: loss {logs[name]['loss'][-1]:.4f}, test accuracy {accuracy[name]:.3f}")
    if options is equilibrium:
        share = logs[name]["converged"]
        print(f"    converged: {share.min():.1%} of the batch at worst, {share[-1]:.1%} at the end;", end=" ")
        print(f"{stats.converged.mean():.1%} of the test set")

# %% [markdown]
# Read the second line of each equilibrium before its accuracy: an example whose solve did *not* converge gets a
# gradient that the implicit function theorem says nothing about. A status belongs in every training log.
#
# The models start from the same numbers and differ only in how the state is found and differentiated. What *is*
# the state of the unrolled one after its eight layers, and would more layers change it? We give the plain
# iteration any number of evaluations with each model's weights (traced again: one compilation serves all) and
# watch the test loss.


# %%
@jax.jit
def loss_at(params, depth):
    """Test loss of the state after `depth` plain iterations from zero."""
    model = nnx.merge(graphdef, params)  # which graphdef does not matter: the layer's solver is not asked
    injected = model.embed(x_test)
    z = jax.lax.fori_loop(0, depth, lambda _, z: model.layer.cell(z, injected), jnp.zeros_like(injected))
    return optax.sigmoid_binary_cross_entropy(model.head(z)[:, 0], y_test).mean()


def draw_boundary(axes, graphdef, params):
    ticks = jnp.linspace(-3.6, 3.6, 50)  # as many points as x_test has, so nothing is compiled anew
    points = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    logits, *_ = predict(graphdef, params, points)
    chance = jax.nn.sigmoid(logits).reshape(ticks.size, -1)
    square = {"extent": 2 * (ticks[0], ticks[-1]), "origin": "lower", "interpolation": "bilinear"}
    axes.imshow(chance, **square, cmap="PuOr", alpha=0.6, vmin=0, vmax=1)
    axes.scatter(*x.T, c=y, cmap="PuOr", s=8, edgecolors="0.3", linewidths=0.3)
    axes.set(xlabel="x₁", ylabel="x₂", aspect="equal")


figure, ((losses, steps), (boundary, depth)) = plt.subplots(2, 2, figsize=(10, 7.2))
factors, tried = {}, np.unique(np.geomspace(1, 200, 6 if FAST else 24).astype(int))
for name, (options, _, color, line) in runs.items():
    losses.semilogy(logs[name]["loss"], line, color=color, lw=1, label=name)
    if options is equilibrium:
        steps.plot(logs[name]["steps"], line, color=color, label=name)
    found = np.array([loss_at(models[name][1], n) for n in tried])
    beyond = found[tried > LAYERS]
    factors[name] = beyond.max() / beyond.min()
    depth.loglog(tried, found, line, marker=".", color=color, label=f"trained as {name}")

plain, penalized, layers = (log["loss"][-10:].mean() for log in logs.values())
losses.set(
    xlabel="training step",
    ylabel="training loss (nats)",
    title=f"Final loss: {plain:.1g} plain, {penalized:.1g} penalized, {layers:.1g} unrolled",
)
first = logs["equilibrium"]["steps"][0]
plain, penalized, _ = (log["steps"][-10:].mean() for log in logs.values())
steps.set(
    xlabel="training step",
    ylabel="evaluations of f (Anderson), mean of the batch",
    title=f"The solve grows from {first:.0f} evaluations to {plain:.0f}; penalized, to {penalized:.0f}",
    ylim=(0, None),
)
draw_boundary(boundary, *models["penalized equilibrium"])
boundary.set_title(f"Penalized equilibrium: {accuracy['penalized equilibrium']:.1%} of test points right")
depth.axvline(LAYERS, color="0.6", lw=0.8, ls=":")
depth.set(
    xlabel="plain iterations at test time",
    ylabel="test loss (nats)",
    title=f"Beyond {LAYERS} iterations the loss moves {factors['penalized equilibrium']:.1f}-fold penalized, "
    f"{factors[f'{LAYERS} layers']:.1f}-fold unrolled",
)
for axes in (losses, steps, depth):
    axes.legend()
plt.show()

# %% [markdown]
# Your curves will differ from these: where a solve is hard, training amplifies rounding, and no two machines round
# alike. What stays is that the equilibria come to need more evaluations than at the start. In our run both had one
# bad moment, near step 35: the evaluations peak, and the loss jumps back up. The unrolled network has the lowest
# loss: an equilibrium is not a better classifier by itself.
#
# The last panel asks whether a model is at rest under *plain* iteration. Where a curve is flat to the right of the
# dotted line, iterating on changes nothing, and eight layers have made themselves an equilibrium without being asked.
# Where a curve rises, Anderson finds equilibria that repel the plain iteration. That is part 2 again: ask for the
# spectral radius at the solutions.

# %%
sample = slice(None, None, 10)
for name in ("equilibrium", "penalized equilibrium"):
    model = nnx.merge(*models[name])
    _, z, _ = predict(*models[name], x_test)
    jacobians = jax.vmap(jax.jacfwd(model.layer.cell))(z[sample], model.embed(x_test)[sample])
    rho = np.abs(np.linalg.eigvals(np.asarray(jacobians))).max(axis=-1)
    print(f"{name:22} spectral radius: median {np.median(rho):.2f}, above one for {np.mean(rho > 1):.1%} of the points")

# %% [markdown]
# A point with a radius above one repels the plain iteration, and cross-entropy charges dearly for a confident
# mistake. An equilibrium model is the pair of a cell *and* a solver that finds its equilibria; ask `stats` whether it
# did.
#
# **Try next:** `adjoint=deq.Phantom()` or `deq.JFB()` in `equilibrium` above; a `Broyden` solver; one and a half
# turns of the spirals (`3 * np.pi` for `2 * np.pi` in both `angle` and `radius`), which is much harder.
