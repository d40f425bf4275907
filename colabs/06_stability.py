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
# # Stability
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/06_stability.ipynb)
#
# A deep equilibrium (DEQ) layer returns a state that its cell no longer changes, $z^\star = f(z^\star, x)$. A solver
# has to find that state. Training changes the cell, and nothing in an ordinary loss asks for a cell that can still be
# solved. This notebook breaks a DEQ on purpose, and then keeps it from breaking.
#
# After this notebook you can:
#
# - tell from the eigenvalues of $J = \partial f/\partial z$ whether plain iteration, damping or Anderson will converge;
# - tell a failing layer from a bad learning rate by its `Status`, and stop with `deq.check` where you want to;
# - keep a layer solvable with a Jacobian penalty or a spectral penalty;
# - guard a training loop, and leave failed problems out of the gradient with `OnFailure.ZERO`;
# - test whether the answer depends on where the solver starts.

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
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx

from deq_jax.nn import DEQ

# %% [markdown]
# ## On a GPU or a TPU
#
# The code is the same; this cell picks a larger model and more steps there. Eigenvalues are computed on the host, since
# TPUs have no general eigensolver; `deq.stability.spectral_radius` needs none and runs on every device. An accelerator
# rounds matrix products to TF32 or bfloat16 unless it is told otherwise. Then no residual gets far below that rounding,
# so we ask for float32. On a CPU this changes nothing.

# %%
ACCELERATOR = jax.default_backend() != "cpu"
WIDTH, POINTS, STEPS = (128, 1024, 1000) if ACCELERATOR else (32, 128, 240)  # POINTS of each of two classes
if FAST:
    POINTS, STEPS = 32, 24
TEST, FRAMES = (50, 4) if FAST else (500, 20)
jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## 1. Eigenvalues decide
#
# Near $z^\star$ every cell is nearly linear, so we begin with linear ones, $f(z) = Jz + b$. Plain iteration
# multiplies the error by $J$ each time. It converges if all eigenvalues lie within the unit circle, that is, if the
# *spectral radius* $\rho(J)$ is below one.
#
# Damping replaces $f(z)$ by $(1 - \beta)\,z + \beta f(z)$. Its Jacobian is $(1 - \beta) I + \beta J$, so it converges
# where the eigenvalues of $J$ lie in a larger disc, with center $1 - 1/\beta$ and radius $1/\beta$. All these discs end
# at 1. So damping cures eigenvalues far to the left or far from the real axis, and none with a real part above 1.
# `Anderson`, which combines its last iterates to solve the equation, is not bound by these discs.

# %%
DIM, TRACE = 24, 40


def linear_cell(center, radius, first, seed=0):
    """(J, b) with eigenvalues a ± ib: one pair given, and the others spread over a disc around a real center."""
    rng = np.random.default_rng(seed)
    spread = radius * np.sqrt(rng.uniform(0.1, 1, DIM // 2)) * np.exp(1j * rng.uniform(0, np.pi, DIM // 2))
    spread[0] = first - center
    blocks = np.zeros((DIM, DIM))
    for k, value in enumerate(center + spread):
        blocks[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[value.real, -value.imag], [value.imag, value.real]]
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    return jnp.float32(basis @ blocks @ basis.T), jnp.float32(rng.normal(size=DIM))


@jax.jit
def residual_trace(solver, jacobian, b):
    f = lambda z: jacobian @ z + b
    found = deq.solve(f, jnp.zeros(DIM), solver=solver, fold=deq.ResidualTrace(TRACE))
    return found.folded, found.stats.status


DAMPINGS = (1.0, 0.5)
solvers = {f"Picard, damping {d}": (deq.Picard(rtol=1e-5, max_steps=TRACE, damping=d), d) for d in DAMPINGS}
solvers["Anderson"] = deq.Anderson(rtol=1e-5, max_steps=TRACE, history=12), None
cells = {"to the left": linear_cell(-0.8, 0.5, -1.4 + 0.1j), "to the right": linear_cell(0.2, 0.5, 1.3 + 0.2j)}

figure, panels = plt.subplots(2, 2, figsize=(10, 6.6), width_ratios=(1, 1.4))
for (side, (jacobian, b)), (plane, curve) in zip(cells.items(), panels, strict=True):
    ways = []
    for name, (solver, damping) in solvers.items():
        trace, status = residual_trace(solver, jacobian, b)
        status = deq.Status(int(status))
        ways += [name] if status == deq.Status.CONVERGED else []
        color, line = COLORS[name.split(",")[0]], "--" if damping == 0.5 else "-"
        curve.semilogy(trace, line, color=color, label=f"{name}: {status.name}")
        if damping:
            plane.add_patch(plt.Circle((1 - 1 / damping, 0), 1 / damping, fc="none", ec=color, ls=line))
    values = np.linalg.eigvals(np.asarray(jacobian))
    plane.plot(values.real, values.imag, ".", color="0.2")
    radius = deq.stability.spectral_radius(lambda z, jacobian=jacobian: jacobian @ z, jnp.zeros(DIM))
    plane.set(xlim=(-3.2, 1.8), ylim=(-2.1, 2.1), aspect="equal", xlabel="Re λ", ylabel="Im λ")
    plane.set_title(f"Eigenvalues {side}: ρ = {radius:.2f}")
    curve.set(
        xlabel="evaluations of f",
        ylabel="relative residual",
        ylim=(1e-6, 10),
        title="Solved by " + (" and ".join(ways) or "none"),
    )
    curve.legend(loc="center right")
plt.show()

# %% [markdown]
# The circles are the discs of plain (solid) and damped (dashed) iteration. Where an iteration grows, its *relative*
# residual stays at a level, because $f(z) - z$ and $f(z)$ grow alike. Anderson, the default, looks for a solution of
# the equation rather than for an attractor. Where a cell expands in many directions the guide [Which
# solver](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/which_solver.md) advises `Broyden(rank=40)`.
#
# ## 2. A training run that breaks its own layer
#
# Two spirals, and a cell without any normalization, $f(z, x) = \operatorname{relu}(Wz + x)$. It is a contraction at
# the start, and the learning rate is too high. The step below has what the rest of this notebook needs: the weights
# of two penalties, the threshold of a guard, and a log of what both solves report. With zeros for all of them it is
# an ordinary training step.


# %%
def two_spirals(count, seed):
    """`count` noisy points of each of two spirals, and the labels 0 and 1."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * np.sqrt(rng.uniform(0.03, 1, (2, count)))
    phase = np.pi * np.arange(2)[:, None]
    x = np.stack([np.cos(angle + phase), np.sin(angle + phase)], axis=-1) * angle[..., None] / (2 * np.pi)
    x += 0.02 * rng.normal(size=x.shape)
    return jnp.float32(3 * x.reshape(-1, 2)), jnp.repeat(jnp.arange(2), count)


class Cell(nnx.Module):
    def __init__(self, dim, rngs):
        small = nnx.initializers.normal(0.5 / dim**0.5)  # spectral radius about one half at the start
        self.linear = nnx.Linear(dim, dim, kernel_init=small, rngs=rngs)

    def __call__(self, z, x):
        return nnx.relu(self.linear(z) + x)


class Classifier(nnx.Module):
    def __init__(self, dim, solver, adjoint, rngs):
        self.embed = nnx.Linear(2, dim, rngs=rngs)
        self.layer = DEQ(Cell(dim, rngs), solver=solver, adjoint=adjoint)
        self.head = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, x, probe=None):
        z, stats = self.layer(self.embed(x), probe=probe)
        return self.head(z)[:, 0], z, stats


def spectral_penalty(f, z, *args, key, limit=0.9, iterations=6):
    """Mean of max(0, ‖J‖₂ − limit)² over a batch; a norm below 1 makes f a contraction near z."""
    z = jax.lax.stop_gradient(z)
    push = lambda v: jax.jvp(lambda z: f(z, *args), (z,), (v,))[1]
    pull = jax.vjp(lambda z: f(z, *args), z)[1]
    norm = lambda v: jnp.sqrt(jnp.sum(v**2, axis=-1, keepdims=True) + 1e-12)
    v = jax.random.normal(key, z.shape)
    for _ in range(iterations):  # the power method for JᵀJ
        (v,) = pull(push(v / norm(v)))
    v = jax.lax.stop_gradient(v / norm(v))
    return jnp.mean(jnp.maximum(norm(push(v)) - limit, 0) ** 2)


class Remedies(NamedTuple):
    jacobian: float = 0.0  # weight of deq.regularizers.jacobian_penalty
    spectral: float = 0.0  # weight of spectral_penalty
    guard: float = 0.0  # the share of sound solves below which a step is taken back


class Train(NamedTuple):
    params: Any
    opt_state: Any
    rate: Any  # a factor of the learning rate


tx = optax.adam(3e-2)  # too high
x, y = two_spirals(POINTS, seed=0)


@functools.partial(jax.jit, static_argnums=0)
def train_step(graphdef, now, good, key, remedies):
    """(the next state, the last good one, a log)"""

    def loss_fn(params, probe):
        model = nnx.merge(graphdef, params)
        logits, z, stats = model(x, probe)
        loss = optax.sigmoid_binary_cross_entropy(logits, y).mean()
        at = model.layer.cell, z, model.embed(x)
        penalty = remedies.jacobian * deq.regularizers.jacobian_penalty(*at, key=key)
        penalty += remedies.spectral * spectral_penalty(*at, key=key)
        radius = deq.stability.spectral_radius(*at, batch_ndim=1, iterations=40)
        return loss + penalty, {"loss": loss, "forward": stats, "radius": radius}

    gradient = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
    (grads, backward), log = gradient(now.params, deq.Probe.zeros((len(x),)))
    updates, opt_state = tx.update(grads, now.opt_state, now.params)
    updates = jax.tree.map(lambda update: now.rate * update, updates)
    ahead = Train(optax.apply_updates(now.params, updates), opt_state, jnp.minimum(1.02 * now.rate, 1.0))

    # The guard: where too few solves are sound, go back to the last good state, and halve the rate.
    backward_sound = (backward.status == deq.Status.CONVERGED) | (backward.status == deq.Status.STALLED)
    sound = jnp.mean(log["forward"].sound & backward_sound)
    healthy = sound >= remedies.guard
    choose = functools.partial(jax.tree.map, functools.partial(jnp.where, healthy))
    log |= {"backward": backward, "healthy": healthy, "rate": now.rate}
    return choose(ahead, good._replace(rate=now.rate / 2)), choose(now, good), log


def train(graphdef, params, remedies):
    """(parameters at FRAMES moments, the log of all steps)"""
    now = good = Train(params, tx.init(params), jnp.float32(1))
    moments, kept, log = set(np.linspace(0, STEPS - 1, FRAMES).astype(int)), [], []
    for step, key in enumerate(jax.random.split(jax.random.key(0), STEPS)):
        kept += [now.params] if step in moments else []
        now, good, entry = train_step(graphdef, now, good, key, remedies)
        log.append(entry)
    return kept, jax.tree.map(lambda *entries: np.stack(entries), *log)


def split(solver, adjoint=deq.Implicit()):
    return nnx.split(Classifier(WIDTH, solver, adjoint, nnx.Rngs(0)))


anderson = deq.Anderson(rtol=1e-3, max_steps=30, history=5)
plain = deq.Picard(rtol=1e-3, max_steps=30)
graphdef, params = split(anderson)
kept, logs = {}, {}
kept["no remedy"], logs["no remedy"] = train(graphdef, params, Remedies())
_, picard_log = train(*split(plain), Remedies())

# %% [markdown]
# Every problem of every step has a `Status`. A solve is *sound*, `stats.sound`, if it is `CONVERGED` or `STALLED`.
# Here are all of them, one column a step, and below them the spectral radius and the loss.

# %%
STATUS = {"CONVERGED": "0.88", "STALLED": "0.7", "MAX_STEPS": "#F4A582", "DIVERGED": "#B2182B", "NONFINITE": "k"}


def draw_statuses(axes, status):
    shares = [np.mean(status == deq.Status[name], axis=1) for name in STATUS]
    axes.stackplot(np.arange(len(status)), shares, colors=STATUS.values(), labels=STATUS, step="mid")
    axes.set(xlim=(0, len(status) - 1), ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0", "50 %", "100 %"))


def first(condition):
    """The first step where it holds, as text."""
    return str(int(np.argmax(condition))) if np.any(condition) else "no step"


broken = logs["no remedy"]
figure, panels = plt.subplots(3, 2, figsize=(10, 6.4), sharex=True, sharey="row", height_ratios=(1.2, 1, 1))
for (statuses, radii, losses), (name, log) in zip(
    panels.T, {"Anderson": broken, "Picard": picard_log}.items(), strict=True
):
    draw_statuses(statuses, log["forward"].status)
    statuses.set_title(f"{name}: a tenth of the solves has failed at step {first(log['forward'].sound.mean(1) <= 0.9)}")
    low, middle, high = np.quantile(log["radius"], (0.1, 0.5, 0.9), axis=1)
    radii.fill_between(np.arange(STEPS), low, high, color=COLORS[name], alpha=0.25, lw=0)
    radii.plot(middle, color=COLORS[name])
    radii.axhline(1, color="0.6", lw=0.8, ls=":")
    radii.set_title(f"ρ(J) of a tenth of the points has passed 1 at step {first(high > 1)}")
    losses.semilogy(log["loss"], color=COLORS[name])
    best = int(np.argmin(log["loss"]))
    losses.set(title=f"Loss: least at step {best}, {log['loss'][-1] / log['loss'][best]:.1f} times that at the end")
    losses.set_xlabel("training step")
    losses.set_yticks((0.2, 0.5, 1, 2, 5))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("")
for axes, label in zip(panels[:, 0], ("share of the solves", "ρ(J): median, 10–90 %", "loss (nats)"), strict=True):
    axes.set_ylabel(label)
figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STATUS))
plt.show()

# %% [markdown]
# The loss of these runs looks like a bad learning rate and no more. The statuses say what happened: $J$ expands, the
# solves fail, and from then on the gradient is that of something that is no fixed point.
#
# A `Status` is data, because in a batch one failure must not stop the other problems. Where you would rather stop,
# `deq.check` raises an error that names the problems. It does so inside `jit` too, by a callback.

# %%
model = nnx.merge(graphdef, kept["no remedy"][-1])
try:
    deq.check(model(x)[2], anderson)
except deq.SolveError as error:
    print(error)
counts = {name: int((broken["backward"].status == deq.Status[name]).sum()) for name in STATUS}
print("backward solves, from the Probe:", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))

# %% [markdown]
# The backward solves of this run converged even where the forward ones had failed. Their equation is linear, and it can
# be solved at any $z$; but at a $z$ that is no fixed point its answer is not the gradient. So look at both statuses.
#
# ## 3. Penalties: pay for an expanding cell
#
# - The **Jacobian penalty** of Bai, Koltun & Kolter (2021), `deq.regularizers.jacobian_penalty`, estimates
#   $\|J\|_F^2/\dim$, the mean square of the singular values, from one vector-Jacobian product.
# - A **spectral penalty** looks at the largest singular value alone. Ours is `spectral_penalty`: a few steps of the
#   power method for $J^\top J$, and a charge where $\|J\|_2$ exceeds 0.9. It costs more products and constrains less.
#
# Both act on an upper bound of $\rho(J)$, since $\rho(J) \le \|J\|_2 \le \|J\|_F$, and both are taken at $z^\star$,
# where it matters.

# %%
REMEDIES = {
    "no remedy": (Remedies(), "0.45"),
    "Jacobian penalty": (Remedies(jacobian=3.0), "#332288"),
    "spectral penalty": (Remedies(spectral=3.0), "#117733"),
    "weak penalty": (Remedies(jacobian=1.0), "#44AA99"),
    "guard": (Remedies(guard=0.9), "#CC6677"),
    "weak penalty and guard": (Remedies(jacobian=1.0, guard=0.9), "#AA4499"),
}
PENALTIES, GUARDS = list(REMEDIES)[:3], list(REMEDIES)[3:]
for name, (remedies, _) in REMEDIES.items():
    if name not in logs:
        kept[name], logs[name] = train(graphdef, params, remedies)


@jax.jit
def equilibria(params):
    """The Jacobians at the equilibria of some of the points, and whether these were found."""
    model = nnx.merge(graphdef, params)
    some = x[:: max(len(x) // 16, 1)]
    _, z, stats = model(some)
    return jax.vmap(jax.jacfwd(model.layer.cell))(z, model.embed(some)), stats.sound


spectra = {}
for name in PENALTIES:
    spectra[name] = [np.linalg.eigvals(np.asarray(equilibria(params)[0])).ravel() for params in kept[name]]

# %% [markdown]
# Watch the eigenvalues of $J$ at sixteen equilibria as training goes on. (A relu that is off gives an eigenvalue of 0.
# The largest may leave the frame.)

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), dpi=72, sharey=True)
dots = {}
for axes, name in zip(panels, spectra, strict=True):
    axes.add_patch(plt.Circle((0, 0), 1, fc="0.95", ec="0.6", lw=0.8))
    dots[name] = axes.plot([], [], ".", ms=3, color=REMEDIES[name][1])[0]
    axes.set(xlim=(-2.7, 2.7), ylim=(-2.2, 2.2), aspect="equal", xlabel="Re λ")
panels[0].set_ylabel("Im λ")


def draw(k):
    step = int(np.linspace(0, STEPS - 1, FRAMES)[k])
    for axes, (name, values) in zip(panels, spectra.items(), strict=True):
        dots[name].set_data(values[k].real, values[k].imag)
        sound = logs[name]["forward"].sound[step].mean()
        axes.set_title(f"{name}: {sound:.0%} solved", color=REMEDIES[name][1])
    figure.suptitle(f"Eigenvalues of J, training step {step}", fontsize=10)


outside = {name: np.mean(np.abs(values[-1]) > 1) for name, values in spectra.items()}
text = ", ".join(f"{name} {share:.1%}" for name, share in outside.items())
alt = f"Eigenvalues move during training. At the end outside the unit circle: {text}"
show_moving(figure, draw, range(FRAMES), alt)
print("eigenvalues outside the unit circle at the end:", text)

# %%
x_test, y_test = two_spirals(TEST, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def test(graphdef, params):
    logits, *_ = nnx.merge(graphdef, params)(x_test)
    return jnp.mean((logits > 0) == y_test)


def smooth(values, window=10):
    return np.convolve(values, np.ones(window) / window, "valid")


figure, (shares, losses) = plt.subplots(1, 2, figsize=(10, 3.5))
for name in PENALTIES:
    color, accuracy = REMEDIES[name][1], test(graphdef, kept[name][-1])
    shares.plot(smooth(logs[name]["forward"].sound.mean(1)), color=color, label=f"{name}: test accuracy {accuracy:.1%}")
    losses.semilogy(smooth(logs[name]["loss"]), color=color)
quarter = slice(-STEPS // 4, None)  # the last one
solved = {name: logs[name]["forward"].sound[quarter].mean() for name in REMEDIES}
final = {name: logs[name]["loss"][quarter].mean() for name in REMEDIES}
shares.set(
    xlabel="training step",
    ylabel="share of sound solves, mean of 10 steps",
    title="Solved in the last quarter: " + ", ".join(f"{solved[name]:.0%}" for name in PENALTIES),
    ylim=(0, 1.03),
)
losses.set(
    xlabel="training step",
    ylabel="loss without penalty (nats)",
    title="Mean loss of the last quarter: " + ", ".join(f"{final[name]:.2g}" for name in PENALTIES),
)
shares.legend(loc="lower left")
plt.show()

# %% [markdown]
# The numbers in the titles are in the order of the legend. At this rate training amplifies rounding, so your curves
# will differ from these. A penalty need not cost accuracy: what the layer loses in freedom, it gains in gradients
# that are those of an equilibrium.
#
# ## 4. A guard, and the gradient of a solve that failed
#
# A penalty has to be large enough, and one does not know beforehand. A *guard* in the loop acts when it was not: if
# fewer than 90 % of the solves are sound, forward and backward, `train_step` goes back to the last good state and
# halves the learning rate, which then recovers by 2 % a step. We have run it alone, and with a weak Jacobian penalty.
#
# One can also go on and leave the failed problems out of the gradient, with `Implicit(on_failure=deq.OnFailure.ZERO)`.

# %%
zero = split(anderson, deq.Implicit(on_failure=deq.OnFailure.ZERO))
_, zero_log = train(*zero, Remedies())

figure, (shares, rates) = plt.subplots(1, 2, figsize=(10, 3.6))
runs = {name: (logs[name], REMEDIES[name][1]) for name in GUARDS} | {"OnFailure.ZERO": (zero_log, "#999933")}
for name, (log, color) in runs.items():
    label = f"{name}: loss {log['loss'][quarter].mean():.2g}"
    shares.plot(smooth(log["forward"].sound.mean(1)), color=color, label=label)
    undone = ~log["healthy"]
    if undone.any():
        rates.semilogy(0.03 * log["rate"], color=color, label=f"{name}: {undone.sum()} steps taken back")
        rates.plot(np.nonzero(undone)[0], 0.03 * log["rate"][undone], "v", ms=4, color=color)
shares.set(
    xlabel="training step",
    ylabel="share of sound solves, mean of 10 steps",
    title="Solved in the last quarter: "
    + ", ".join(f"{log['forward'].sound[quarter].mean():.0%}" for log, _ in runs.values()),
    ylim=(0, 1.03),
)
shares.legend()
least = 0.03 * min(log["rate"].min() for log, _ in runs.values())
rates.set(
    xlabel="training step",
    ylabel="learning rate",
    title=f"The guard lowers the rate from 0.03 to {least:.0e} at the least",
)
rates.legend(*rates.get_legend_handles_labels(), loc="center right")
plt.show()

# %% [markdown]
# A guard alone protects what is there. It gives the gradient no reason to turn around, so training comes to the
# border and may stay there, at an ever smaller rate. With a penalty, the guard helps over the moments in which the
# penalty is too weak. It keeps the layer solvable, but its loss stays far above those of the strong penalties in part
# 3, with the weak penalty as without. `ZERO` keeps wrong gradients out. That is enough where solves fail because they
# are cut off; the guide [When a solve fails](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/failures.md)
# measures it. Here they fail because the cell expands, and leaving problems out makes no cell contract.
#
# ## 5. Path independence: is it *the* equilibrium?
#
# A contraction has one fixed point, and every start leads to it. A cell that expands may have several. Then the
# answer depends on the start and on the solver, and a model that was trained from zeros need not work from a warm
# start. Anil et al. (2022) call a model *path-independent* if its answer does not depend on the start.
#
# In two dimensions we can look at all starts at once. For $f(z) = \tanh(s A z)$ each pixel below is a start, and its
# color says to which fixed point the solver came from there.

# %%
SIDE, REACH = (40, 2.0) if FAST else (160, 2.0)
A = jnp.array([[1.0, 0.3], [0.3, 1.0]])
ticks = jnp.linspace(-REACH, REACH, SIDE)
starts = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


@jax.jit
def from_everywhere(solver, scale):
    return deq.fixed_point(lambda z: jnp.tanh(scale * z @ A), starts, solver=solver, batch_ndim=1)


kinds = {"Picard": deq.Picard(rtol=1e-5, max_steps=200), "Anderson": deq.Anderson(rtol=1e-5, max_steps=200)}
cases = [(0.7, "Anderson"), (2.0, "Picard"), (2.0, "Anderson")]
solutions = [jax.device_get(from_everywhere(kinds[name], scale)) for scale, name in cases]
rounded = np.concatenate([np.round(z, 2) + 0.0 for z, _ in solutions])
points, which = np.unique(rounded, axis=0, return_inverse=True)  # one color for a fixed point in all panels
palette = plt.get_cmap("Set3")(np.arange(len(points)) % 12)

figure, panels = plt.subplots(1, 3, figsize=(10, 3.7), sharey=True)
for axes, (scale, name), (_, stats), kind in zip(panels, cases, solutions, which.reshape(3, -1), strict=True):
    picture = np.where(stats.sound[:, None], palette[kind], 1.0).reshape(SIDE, SIDE, 4)
    axes.imshow(picture, origin="lower", extent=2 * (-REACH, REACH), interpolation="nearest")
    found = points[np.unique(kind[stats.sound])]
    axes.plot(*found.T, "o", ms=5, color="w", mec="k", mew=0.8)
    axes.set(xlabel="z₁ at the start", title=f"s = {scale}, {name}: fixed points found: {len(found)}")
panels[0].set_ylabel("z₂ at the start")
plt.show()

# %% [markdown]
# Plain iteration can only end at a fixed point that attracts it. Anderson may also end at the others, and the border
# between its basins is not simple. Neither is wrong: each solution meets the tolerance, and the problem has several.
#
# Now the trained models. We solve each test point from zeros and from noise, with a generous budget, and measure how
# far apart the two answers are. The labels give two shares. A point where a solve failed has no answer and
# counts as not solved: the first share. The second is of the points that were solved from both starts.


# %%
@jax.jit
def two_starts(params):
    """The relative distance of the answers from two starts, for each test point; NaN where a solve failed."""
    model = nnx.merge(graphdef, params)
    solver, inputs = deq.Anderson(rtol=1e-4, max_steps=200), model.embed(x_test)
    noise = 3 * jax.random.normal(jax.random.key(1), inputs.shape)
    solve = lambda z0: deq.fixed_point(model.layer.cell, z0, inputs, solver=solver, batch_ndim=1)
    one, other = solve(jnp.zeros_like(inputs)), solve(noise)
    distance = jnp.linalg.norm(one.value - other.value, axis=-1) / jnp.linalg.norm(one.value, axis=-1)
    return jnp.where(one.stats.sound & other.stats.sound, distance, jnp.nan)


figure, axes = plt.subplots(figsize=(8, 3.4))
rng = np.random.default_rng(0)
solved, same = {}, {}
shown = [*PENALTIES, GUARDS[-1]]
for row, name in enumerate(shown):
    distance = np.asarray(two_starts(kept[name][-1]))
    solved[name] = np.mean(np.isfinite(distance))
    same[name] = np.sum(distance < 1e-2) / max(np.isfinite(distance).sum(), 1)
    axes.semilogx(
        np.maximum(distance, 1e-7), row + rng.uniform(-0.3, 0.3, len(distance)), ".", ms=3, color=REMEDIES[name][1]
    )
axes.axvline(1e-2, color="0.6", lw=0.8, ls=":")
axes.set_yticks(range(len(shown)), [f"{n}: {solved[n]:.0%} solved, {same[n]:.0%} of them agree" for n in shown])
axes.invert_yaxis()
axes.set(
    xlabel="relative distance of the answers from two starts; points with a failed solve are left out",
    title=f"Two starts reach one answer in {same['no remedy']:.0%} of what is solved with no remedy, "
    f"and in {same['Jacobian penalty']:.0%} with the Jacobian penalty",
)
plt.show()

# %% [markdown]
# An equilibrium model is the pair of a cell and a solver that finds its equilibria. Three habits keep the pair
# together: log the statuses of both solves; charge for an expanding Jacobian, or normalize the cell; and when solves
# fail, do not take the step.
#
# **Try next**
#
# - `tx = optax.adam(3e-3)`: how far does a lower rate get without any remedy?
# - `nnx.tanh` in place of `nnx.relu`, or a `nnx.LayerNorm` in the cell. Which statuses disappear?
# - Scale the kernel inside the cell with `deq.stability.spectral_normalize(kernel, 0.9)`: a bound rather than a
#   penalty.
# - `anderson = deq.Broyden(rank=40, rtol=1e-3)`: a stronger solver moves the moment at which training breaks. Does it
#   prevent it?
# - In part 5, `deq.Newton()` in place of `deq.Anderson` in `kinds`: yet other basins.
