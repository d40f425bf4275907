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
# # Transforms and devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/07_transforms_and_devices.ipynb)
#
# A *deep equilibrium model* (DEQ) applies one layer $f$ until its state no longer changes. Its output is the fixed
# point $z^\star = f(z^\star)$, found by a solver and differentiated without looking at the solver's steps. To JAX the
# whole solve is one more function. So it can be mapped, split over devices, and differentiated in any mode.
#
# After this notebook you can:
#
# - solve many problems with `vmap`, and read what became of each of them;
# - give each device its share of the problems, with `jit`, `shard_map` or `pmap`;
# - split *one* problem over devices, and count what they send to each other;
# - say when `axis_name` is needed, and what happens without it;
# - take forward derivatives and Hessians of an equilibrium, and use them.
#
# It takes about two minutes on two CPU cores. No accelerator is needed: the next cell makes eight devices of one CPU.

# %%
# JAX reads this when it first looks for devices. It concerns the CPU alone: a GPU or a TPU keeps its devices.
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

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
import collections
import re

import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.colors import ListedColormap, hsv_to_rgb
from PIL import ImageDraw, ImageFont

# %% [markdown]
# ## On a GPU or a TPU
#
# The calls are the same. Where there are four accelerators or eight, such as the cores of a TPU, the mesh consists of
# them. Else it is that of the eight simulated devices, and the parts without a mesh run on the accelerator, with more
# pixels. float32 matrix products are rounded there unless you ask for more, so we ask.

# %%
ACCELERATOR = jax.default_backend() != "cpu"
SIDE = 48 if FAST else 480 if ACCELERATOR else 240
jax.config.update("jax_default_matmul_precision", "highest")

devices = jax.devices()[:8] if jax.device_count() in (4, 8) else jax.devices("cpu")[:8]
mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
DEVICE_COLORS = plt.get_cmap("viridis")(np.linspace(0, 0.95, mesh.size))
print(f"a mesh of {mesh.size} devices: {devices[0].device_kind}")

# %% [markdown]
# ## 1. `vmap`: many problems, each with its own fate
#
# We solve $z = z^2 + c$ for a whole plane of complex numbers $c$, one problem a pixel. Both roots can be written
# down, so nothing is at stake but the solver. We write the solve of *one* problem and map it twice. `Picard` is plain
# iteration; `Anderson` combines its last iterates, and since the state is one number, a short history of them is
# enough.

# %%
re_c, im_c = np.linspace(-2.1, 0.9, SIDE), np.linspace(-1.5, 1.5, SIDE)
plane = jnp.complex64(re_c + 1j * im_c[:, None])


def solve_pixel(c, solver):
    return deq.fixed_point(lambda z: z**2 + c, jnp.complex64(0), solver=solver)


solve_plane = jax.jit(jax.vmap(jax.vmap(solve_pixel, (0, None)), (0, None)))
_, plain = solve_plane(plane, deq.Picard())
z, mixed = solve_plane(plane, deq.Anderson(history=3))
for name, stats in (("Picard", plain), ("Anderson", mixed)):
    print(f"{name:9}", ", ".join(f"{s.name} {(stats.status == s).mean():.2%}" for s in deq.Status))

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), sharey=True)
extent = (re_c[0], re_c[-1], im_c[0], im_c[-1])
left, middle, right = panels
share = {status: float((plain.status == status).mean()) for status in deq.Status}
left.imshow(plain.status == deq.Status.MAX_STEPS, origin="lower", extent=extent, cmap=ListedColormap(["white", "0.55"]))
for axes, stats in ((left, plain), (middle, mixed)):
    steps = np.where(stats.converged, stats.steps, np.nan)
    image = axes.imshow(steps, origin="lower", extent=extent, cmap="viridis_r", vmin=0, vmax=60)
    axes.set(xlabel="Re c")
left.set(
    ylabel="Im c",
    title=f"Picard: {share[deq.Status.CONVERGED]:.0%} converge, {share[deq.Status.MAX_STEPS]:.0%} circle",
)
middle.set(title=f"Anderson: {mixed.converged.mean():.2%} converge, median {np.nanmedian(steps):.0f}")
figure.colorbar(image, ax=[left, middle], label="evaluations of f", extend="max")
hue, size = np.angle(z) / (2 * np.pi) % 1, np.abs(z)
shade = hsv_to_rgb(np.stack([hue, 0.75 + 0 * hue, size / (0.35 + size)], axis=-1))
right.imshow(shade, origin="lower", extent=extent)
nearer = np.abs(z) <= np.abs(1 - z) + 1e-3  # the two roots add up to one
right.set(xlabel="Re c", title=f"z*: {nearer.mean():.0%} found the root nearer to zero")
plt.show()

# %% [markdown]
# Left: under plain iteration the Mandelbrot set appears. It converges in the big heart alone, where
# $|\partial f/\partial z| = |2 z^\star| < 1$. In the other bulbs (gray) it circles until its budget is spent. Elsewhere
# (white) it is `DIVERGED`. Middle: Anderson solves the same equations. Right: which root it found; the hue is the angle
# of $z^\star$, the brightness its size. The few pixels that it loses are white, and their statuses say so.
#
# Under `vmap` every problem keeps its own tolerance test, history, step count and status. One that is done stands still
# while the loop runs on for the others. `batch_ndim=2` says the same without `vmap`:

# %%
solve_batch = jax.jit(lambda c: deq.fixed_point(lambda z: z**2 + c, 0 * c, solver=deq.Picard(), batch_ndim=2))
_, batch = solve_batch(plane)
print("statuses agree:", bool((batch.status == plain.status).all()))
print("steps agree:   ", bool((batch.steps == plain.steps).all()))

# %% [markdown]
# ## 2. Problems over devices
#
# Now each device gets a strip of the plane. Under `jit` it is enough to *place* the input; the program follows.

# %%
strips = jax.device_put(plane, NamedSharding(mesh, P("rows")))
z_strips, over_jit = solve_batch(strips)
print("sharding of z:  ", z_strips.sharding.spec)
print("statuses agree: ", bool((np.asarray(over_jit.status) == batch.status).all()))

# %% [markdown]
# The problems are independent, and yet a `jit` over the mesh is one program with one loop: it ends when the slowest
# problem of *all* devices is done. `shard_map` gives each device a loop of its own, which ends with the device's own
# problems. `pmap`, its ancestor, does the same with a leading axis in place of a mesh.
#
# What the devices say to each other can be read in the compiled program: a *collective* in its loop is sent once an
# evaluation.

# %%
COLLECTIVES = "all-reduce|all-gather|collective-permute|reduce-scatter|all-to-all"


def collectives_of(run, *args):
    """{collective: how many} in the loops of the compiled program."""
    text = run.lower(*args).compile().as_text()
    computations = re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    of_loops = re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)
    found = collections.Counter()
    for name, instructions in computations:
        if name in of_loops:
            found.update(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", instructions))
    return dict(found)


def solve_rows(c):
    return deq.fixed_point(lambda z: z**2 + c, 0 * c, solver=deq.Picard(), batch_ndim=2)


sharded = jax.jit(jax.shard_map(solve_rows, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))
over_shards = sharded(plane).stats
over_pmap = jax.pmap(solve_rows, devices=devices)(plane.reshape(mesh.size, -1, SIDE)).stats
for name, stats in (("shard_map", over_shards), ("pmap", over_pmap)):
    same = np.array_equal(np.reshape(stats.status, plane.shape), batch.status)
    print(f"{name:9} statuses agree: {same}")
print("sent in each evaluation: jit", collectives_of(solve_batch, strips), "shard_map", collectives_of(sharded, plane))

# %%
rounds = np.asarray(over_shards.steps).reshape(mesh.size, -1).max(axis=1)
together = int(np.asarray(over_jit.steps).max())
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(1, 1.3))
left.imshow(np.minimum(plain.steps, 60), origin="lower", extent=extent, cmap="viridis_r", aspect="auto")
edges = np.linspace(im_c[0], im_c[-1], mesh.size + 1)
left.hlines(edges[1:-1], *extent[:2], color="white", lw=1)
left.set(xlabel="Re c", ylabel="Im c", title=f"{mesh.size} strips, {mesh.size} devices")
middles = (edges[1:] + edges[:-1]) / 2
height = edges[1] - edges[0]
right.barh(middles, together, height=0.9 * height, color="0.85", label="jit: all wait for the slowest")
right.barh(middles, rounds, height=0.6 * height, color=COLORS["Picard"], label="shard_map, pmap: each its own")
right.set(
    yticks=middles,
    yticklabels=[f"device {i}" for i in range(mesh.size)],
    ylim=extent[2:],
    xlabel="evaluations that the device runs",
    title=f"{mesh.size} × {together} evaluations in one loop, {rounds.sum()} in loops of their own",
)
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
plt.show()

# %% [markdown]
# The one `all-reduce` under `jit` asks whether any problem goes on. The outer strips diverge early and, by themselves,
# are done. Whether that matters depends on what follows: if the next layer needs all results anyway, the others wait
# there.
#
# ## 3. One problem over devices
#
# Now a single problem, as if it were larger than a device: an image of black and white pixels under heavy noise $x$. In
# the mean field of an Ising model each pixel looks at its four neighbors and at the noisy image,
#
# $$z = \tanh\Bigl(\theta_1 \sum_{\text{neighbors}} z + \theta_2\, x\Bigr),$$
#
# which is a DEQ with one convolution and an input injection. Every pixel depends on every other at the fixed point.

# %%
ROWS, COLUMNS = 64, 160
picture = Image.new("L", (COLUMNS, ROWS))
font = ImageFont.load_default(size=38)
ImageDraw.Draw(picture).text((COLUMNS // 2, ROWS // 2), "z = f(z)", fill=255, font=font, anchor="mm")
clean = np.where(np.asarray(picture) > 100, 1, -1)
noisy = jnp.float32(clean + 1.2 * np.random.default_rng(0).normal(size=clean.shape))
theta = jnp.array([0.38, 0.4])


def neighbors(z):
    padded = jnp.pad(z, 1, mode="edge")
    return padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]


def ising(z, theta, x):
    return jnp.tanh(theta[0] * neighbors(z) + theta[1] * x)


AT = (0, 5, 10, 15) if FAST else (*range(12), *range(12, 28, 2), 30, 35, 40, 45)


@jax.jit
def denoise(solver, x):
    return deq.solve(ising, jnp.zeros_like(x), theta, x, solver=solver, fold=deq.Snapshots(AT))


image = jax.device_put(noisy, NamedSharding(mesh, P("rows")))  # this line is all that the mesh needs
denoised = {"Picard": denoise(deq.Picard(), image), "Anderson": denoise(deq.Anderson(), image)}
alone = denoise(deq.Anderson(), noisy)
print("sharding of z:", denoised["Anderson"].value.sharding.spec, "on", mesh.size, "devices")
print("steps:", int(denoised["Anderson"].stats.steps), "on the mesh,", int(alone.stats.steps), "on one device")
print(f"largest difference of a pixel: {np.abs(np.asarray(denoised['Anderson'].value) - alone.value).max():.0e}")

# %%
figure, axes = plt.subplot_mosaic(
    [["Picard", "curves"], ["Anderson", "curves"]], figsize=(8.5, 3.8), width_ratios=(1.5, 1)
)
strip, pictures, lines = ROWS / mesh.size, {}, {}
look = {"cmap": plt.get_cmap("gray", 16), "vmin": -1, "vmax": 1, "interpolation": "nearest"}  # makes a small file
for name in denoised:
    pictures[name] = axes[name].imshow(noisy, **look)
    axes[name].hlines(np.arange(1, mesh.size) * strip - 0.5, -0.5, COLUMNS - 0.5, color="#56B4E9", lw=0.5)
    axes[name].set(xticks=[], yticks=np.arange(mesh.size) * strip + strip / 2 - 0.5, yticklabels=range(mesh.size))
    lines[name] = axes["curves"].semilogy([], [], "o-", ms=3, color=COLORS[name], label=name)[0]
    axes[name].set_ylabel("device")
axes["curves"].set(xlim=(0, AT[-1]), ylim=(3e-5, 2), xlabel="step", title="relative residual, whole picture")
axes["curves"].axhline(1e-4, color="0.6", lw=0.8, ls=":")
axes["curves"].legend()


def draw(k):
    step = AT[k]
    for name, found in denoised.items():
        z_k = np.asarray(found.folded[k].z) if step else noisy  # z0 = 0 is no picture: show the input
        pictures[name].set_data(z_k)
        wrong = np.mean(np.sign(z_k) != clean)
        done = ", done" if step >= int(found.stats.steps) - 1 else ""
        axes[name].set_title(f"{name}, step {step}: {wrong:.1%} of the pixels are wrong{done}")
        residuals = [float(s.relative_residual) for s in found.folded[: k + 1]]
        lines[name].set_data(AT[: k + 1], residuals)


alt = "A noisy picture on eight strips becomes readable, under Picard and sooner under Anderson"
show_moving(figure, draw, range(len(AT)), alt, seconds=0.35)

# %% [markdown]
# Each strip lies on a device of its own, and no device ever sees the whole. The letters cross the borders unharmed. The
# solver takes the same steps as on one device, since its norms and inner products are sums over all strips.
#
# What do the devices send now? Under `jit` XLA decides, and we read its decision.

# %%
print("an evaluation under jit:", collectives_of(denoise, deq.Anderson(), image))

# %% [markdown]
# No `all-gather`: the picture is assembled nowhere. The `all-reduce` are the solver's, three for Anderson, of a few
# numbers each. A `collective-permute` carries border rows of $f$ to the next device. XLA sends more of them than the
# two that suffice, as part 4 shows.
#
# ## 4. `shard_map`, and when to name an axis
#
# Inside `shard_map` *we* write what is sent. Each device gets its strip and asks its neighbors for a row:


# %%
def strip_cell(z, theta, x):
    last, me = mesh.size - 1, jax.lax.axis_index("rows")
    above = jax.lax.ppermute(z[-1:], "rows", [(i, i + 1) for i in range(last)])
    below = jax.lax.ppermute(z[:1], "rows", [(i + 1, i) for i in range(last)])
    above, below = jnp.where(me == 0, z[:1], above), jnp.where(me == last, z[-1:], below)
    return jnp.tanh(theta[0] * neighbors(jnp.concatenate([above, z, below]))[1:-1] + theta[1] * x)


def on_strips(axis_name):
    """(x) -> (z, the stats and the residuals on the way, as each device knows them)."""

    def solve(x):
        fold = deq.Snapshots(LOOKS)
        found = deq.solve(strip_cell, jnp.zeros_like(x), theta, x, axis_name=axis_name, fold=fold)
        trace = jnp.stack([snapshot.relative_residual for snapshot in found.folded])
        return found.value, jax.tree.map(lambda leaf: leaf[None], (found.stats, trace))

    return jax.jit(jax.shard_map(solve, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))


LOOKS = (0, 10, 20) if FAST else tuple(range(0, 100, 3))  # after so many steps we look at the residual
runs = {name: on_strips(name) for name in ("rows", None)}
reports = {name: run(noisy)[1] for name, run in runs.items()}
for name, (stats, _) in reports.items():
    statuses = "/".join(sorted({deq.Status(int(s)).name for s in stats.status}))
    print(f"axis_name={name!r}: {stats.steps.max()} evaluations, {statuses}")
    print("    sent in each:", collectives_of(runs[name], noisy))

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
named, nameless = (int(reports[name][0].steps.max()) for name in ("rows", None))
for i, trace in enumerate(np.asarray(reports[None][1])):
    label = f"without: device {i}, its strip" if i in (0, mesh.size - 1) else None
    seen = np.asarray(LOOKS) < nameless
    axes.semilogy(np.asarray(LOOKS)[seen], trace[seen], color=DEVICE_COLORS[i], lw=1, label=label)
seen = np.asarray(LOOKS) < named
trace = np.asarray(reports["rows"][1])[0]
axes.semilogy(np.asarray(LOOKS)[seen], trace[seen], "o-", ms=5, color="crimson", label='axis_name="rows": all strips')
axes.axhline(1e-4, color="0.6", lw=0.8, ls=":")
axes.set(
    xlabel="step",
    ylabel="relative residual",
    xlim=(0, nameless),
    title=f'With axis_name="rows" {named} evaluations, as on one device; without it {nameless}',
)
axes.legend(loc="lower left")
plt.show()

# %% [markdown]
# With the name, norms and inner products are summed over the devices: one problem, one status, the steps of part 3.
# Without it each device takes its strip for a problem of its own, and Anderson mixes on each with other weights. (The
# three `all-reduce` of that program are no norms. They are maxima, by which the devices agree when to stop; the next
# paragraph says why.) The statuses are still those of measured residuals, but of strips, and it takes several times
# the evaluations.
#
# **Name the axes over which a problem is split.** Do not name axes over which problems are distributed, as in part 2:
# they would be summed into one. There is a case between the two: *different* problems, coupled by a collective inside
# $f$, such as batch statistics. Then pass no name. The library sees the collective, and lets the coupled problems stop
# together, because none of them is at rest while another still moves. Here with `vmap`, whose axes have names too:


# %%
def steps_of_crowd(coupling):
    def solve(gain):
        f = lambda z: jnp.cos(gain * z) + (coupling * jax.lax.pmean(z, "crowd") if coupling else 0)
        return deq.fixed_point(f, 0.0, solver=deq.Picard()).stats.steps

    return jax.vmap(solve, axis_name="crowd")(jnp.linspace(0.1, 0.9, 8))


print("steps of 8 problems, apart:  ", steps_of_crowd(0.0))
print("coupled by their mean:       ", steps_of_crowd(0.2))

# %% [markdown]
# ## 5. Forward mode and Hessians
#
# Reverse mode is the right one for many parameters and one loss. Our picture is the opposite case: two numbers in,
# 10,240 pixels out. The `adjoint` of a solve decides how it is differentiated: `deq.ImplicitJVP()` has the exact
# derivative in every mode. Its `jacfwd` solves one tangent equation for each parameter, where reverse mode would
# solve one equation for each pixel. This $f$ is cheap, so plain iteration will do, for the state and for its
# tangents.

# %%
tight = deq.Picard(rtol=1e-5, max_steps=1000)
exact = deq.ImplicitJVP(tight)


def denoised_by(theta):
    return deq.fixed_point(ising, jnp.zeros_like(noisy), theta, noisy, solver=tight, adjoint=exact).value


z, slopes = jax.jit(lambda theta: (denoised_by(theta), jax.jacfwd(denoised_by)(theta)))(theta)
h = jnp.array([0.0, 2e-3])
run = jax.jit(denoised_by)
difference = (run(theta + h) - run(theta - h)) / (2 * h[1])
off = float(jnp.linalg.norm(difference - slopes[..., 1]) / jnp.linalg.norm(difference))

figure, panels = plt.subplots(1, 3, figsize=(10.5, 2))
panels[0].imshow(z, cmap="gray", vmin=-1, vmax=1)
panels[0].set_title(f"z*: {np.mean(np.sign(z) != clean):.1%} of the pixels are wrong")
for axes, slope, name in zip(panels[1:], (slopes[..., 0], slopes[..., 1]), ("coupling θ₁", "field θ₂"), strict=True):
    bound = float(np.quantile(np.abs(slope), 0.995))
    image = axes.imshow(slope, cmap="PuOr", vmin=-bound, vmax=bound)
    axes.set_title(f"dz*/d {name}, up to {np.abs(slope).max():.0f}")
    figure.colorbar(image, ax=axes, shrink=0.8)
for axes in panels:
    axes.set(xticks=[], yticks=[])
figure.suptitle(f"Two slopes of every pixel by jacfwd; a central difference in θ₂ agrees to {off:.0e}", fontsize=10)
plt.show()

# %% [markdown]
# A stronger coupling makes the background darker and the letters brighter: neighbors agree more. It acts most on pixels
# in doubt. A stronger field brings back thin strokes that the neighbors had outvoted, and some of the noise with them.
#
# ### Newton's method on a loss
#
# An inverse problem: somebody denoised the picture with a $\theta$ that they do not tell. We have their result and look
# for the $\theta$ that gives it. `jax.hessian` is forward over reverse mode, through the equilibrium.

# %%
secret = jnp.array([0.33, 0.55])
target = run(secret)


def loss_fn(theta):
    return jnp.mean((denoised_by(theta) - target) ** 2)


@jax.jit
def loss_to_second_order(theta):
    loss, gradient = jax.value_and_grad(loss_fn)(theta)
    return loss, gradient, jax.hessian(loss_fn)(theta)


def newton_step(theta):
    """The loss and its derivatives at theta, and a step: downhill where the Hessian is indefinite too, and bounded."""
    loss, gradient, hessian = loss_to_second_order(theta)
    values, vectors = np.linalg.eigh(np.float64(hessian))
    step = -vectors @ ((vectors.T @ gradient) / np.maximum(np.abs(values), 1e-3))
    return float(loss), gradient, hessian, jnp.float32(step * min(1, 0.15 / np.linalg.norm(step)))


start = jnp.array([0.2, 0.85])
newton, losses, hessians = [start], [], []
for _ in range(2 if FAST else 7):
    loss, gradient, hessian, step = newton_step(newton[-1])
    losses.append(loss)
    hessians.append(np.float64(hessian))
    newton.append(newton[-1] + step)
RATE = 0.2  # 0.5 is too much
descent, descent_losses = [start], []
for _ in range(2 if FAST else 40):
    loss, gradient, _ = loss_to_second_order(descent[-1])
    descent_losses.append(float(loss))
    descent.append(descent[-1] - RATE * gradient)
for k, (point, loss) in enumerate(zip(newton, losses, strict=False)):
    print(f"Newton {k}: θ = ({point[0]:.5f}, {point[1]:.5f}), loss {loss:.1e}")

# %%
grid_1, grid_2 = np.linspace(0.12, 0.42, 3 if FAST else 30), np.linspace(0.15, 1.0, 3 if FAST else 30)
row_of = jax.vmap(lambda first, second: loss_fn(jnp.stack([first, second])), (None, 0))
landscape = jax.jit(lambda firsts: jax.lax.map(lambda first: row_of(first, jnp.float32(grid_2)), firsts))(
    jnp.float32(grid_1)
)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1.3, 1))
levels = np.linspace(-5, 0, 16)
left.contourf(grid_1, grid_2, np.log10(np.maximum(landscape, 1e-5)).T, levels=levels, cmap="Greys_r", extend="both")
angle = np.linspace(0, 2 * np.pi, 60)
for point, hessian in zip(newton[:4], hessians, strict=False):
    values, vectors = np.linalg.eigh(hessian)
    ring = (
        0.03 * vectors @ (np.stack([np.cos(angle), np.sin(angle)]) / np.sqrt(np.maximum(np.abs(values), 0.3))[:, None])
    )
    left.plot(point[0] + ring[0], point[1] + ring[1], color=COLORS["Implicit"], lw=0.8, alpha=0.8)
left.plot(*np.transpose(descent), "o-", ms=2.5, lw=1, color=COLORS["JFB"], label="gradient descent")
left.plot(*np.transpose(newton), "o-", ms=4, color=COLORS["Implicit"], label="Newton, and its Hessians")
left.plot(*secret, "*", ms=12, color="crimson", label="the secret θ")
left.set(
    xlim=(grid_1[0], grid_1[-1]),
    ylim=(grid_2[0], grid_2[-1]),
    xlabel="coupling θ₁",
    ylabel="field θ₂",
    title=f"Newton, {len(losses) - 1} steps: {np.abs(newton[len(losses) - 1] - secret).max():.0e} from the secret",
)
left.legend(loc="lower left")
right.semilogy(descent_losses, "o-", ms=2.5, lw=1, color=COLORS["JFB"])
right.semilogy(losses, "o-", ms=4, color=COLORS["Implicit"])
right.set(
    xlabel="step",
    ylabel="loss",
    title=f"Loss {losses[-1]:.0e} in {len(losses) - 1} steps; descent, {descent_losses[-1]:.0e} in {len(descent) - 2}",
)
plt.show()

# %% [markdown]
# The ellipses show the Hessian at Newton's points: long where the loss is flat. Gradient descent falls into the valley
# and crawls along it; Newton knows how long the valley is, and at the end each step doubles the correct digits. The
# gray landscape itself is part 1 again: `vmap` over a row of pairs $\theta$, `lax.map` over the rows to save memory.
#
# **Try next**
#
# - Solve the plane of part 1 with `deq.Newton()`, or for $z = z^3 + c$. Which roots are found?
# - Place the picture of part 3 on a second, two-dimensional mesh, `jax.make_mesh((2, 4), ("rows", "columns"), …)`,
#   with `P("rows", "columns")`. Which collectives appear?
# - In part 4 pass `solver=deq.Broyden()` or `deq.Picard()` to `deq.solve`. How many `all-reduce` are theirs?
# - Replace `deq.ImplicitJVP` by `deq.Implicit` in part 5, and read the error message.
