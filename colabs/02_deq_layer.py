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
# # A DEQ layer in Flax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/02_deq_layer.ipynb)
#
# An ordinary network applies a fixed number of layers. A deep equilibrium (DEQ) layer applies *one* cell until its
# output no longer changes, $z^\star = f(z^\star, x)$, and returns that fixed point. This notebook trains such a layer
# on small pictures of clothes, beside two networks without an equilibrium.
#
# After this notebook you can:
#
# - write a convolutional cell in Flax NNX, wrap it in `deq_jax.nn.DEQ`, and train it with Optax under `jax.jit`;
# - read what the solver did: evaluations, status, and the same for the backward pass;
# - predict how memory grows with depth, with and without an equilibrium;
# - see which inputs a DEQ finds hard, and what happens when a network runs past the depth it was trained with.

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
import gzip
import hashlib
import http.client
import pathlib
import tempfile
import urllib.request

import jax.numpy as jnp
import optax
from flax import nnx

from deq_jax.nn import DEQ

# %% [markdown]
# ## On a GPU or a TPU
#
# The code is the same; this cell picks a wider cell, larger batches and more steps there. An accelerator rounds the
# products of a convolution to TF32 or bfloat16 unless it is told otherwise. Then no residual gets far below that
# rounding, so we ask for float32. On a CPU this changes nothing.

# %%
ACCELERATOR = jax.default_backend() != "cpu"
CHANNELS, NARROW = (64, 44) if ACCELERATOR else (16, 12)  # of the cell, and of an ordinary network of the same size
BATCH, STEPS, TEST = (256, 2000, 10_000) if ACCELERATOR else (64, 240, 1000)
if FAST:
    BATCH, STEPS, TEST = 8, 6, 64
jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# ## 1. The pictures
#
# Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) has 70,000 gray pictures of 28 × 28 pixels, in ten classes. We look for
# them in the folder that the environment variable `DEQ_JAX_DATA` names, then on the network. If there is neither, we
# draw ten kinds of shapes instead. All that follows works the same with those.

# %%
URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FILES = {  # and their SHA-256
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SHAPES = ("disk", "ring", "square", "frame", "cross", "diamond", "bar", "stripes", "checks", "wedge")


def fetch(name):
    """The bytes of a file: from `DEQ_JAX_DATA`, from an earlier download, or from the network."""
    folder = pathlib.Path(os.environ.get("DEQ_JAX_DATA", tempfile.gettempdir())) / "fashion-mnist"
    if (folder / name).exists():
        data = (folder / name).read_bytes()
    elif FAST:
        raise OSError("nothing is downloaded in the fast mode")
    else:
        with urllib.request.urlopen(URL + name, timeout=10) as response:
            data = response.read()
    if hashlib.sha256(data).hexdigest() != FILES[name]:
        raise OSError(f"{name} is not the file that was published (its SHA-256 differs)")
    if "DEQ_JAX_DATA" not in os.environ:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return data


def fashion():
    """(images, labels) to train with, and the same to test with."""
    pixels, labels, *test = (np.frombuffer(gzip.decompress(fetch(name)), np.uint8) for name in FILES)
    return tuple((x[16:].reshape(-1, 28, 28), y[8:]) for x, y in ((pixels, labels), test))


def shapes(count, seed):
    """(images, labels) of shapes of any size, place and angle, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    scale, turn = rng.uniform(0.45, 0.8, (count, 1, 1)), rng.uniform(-0.4, 0.4, (count, 1, 1))
    v, u = np.mgrid[-1:1:28j, -1:1:28j]
    u, v = (axis - rng.uniform(-0.2, 0.2, (count, 1, 1)) for axis in (u, v))
    u, v = (u * np.cos(turn) + v * np.sin(turn)) / scale, (v * np.cos(turn) - u * np.sin(turn)) / scale
    box, disk = np.maximum(abs(u), abs(v)) < 0.9, np.hypot(u, v) < 1
    kinds = [disk, disk & (np.hypot(u, v) > 0.6), box, box & (np.maximum(abs(u), abs(v)) > 0.55)]
    kinds += [box & (np.minimum(abs(u), abs(v)) < 0.3), abs(u) + abs(v) < 1, box & (abs(v) < 0.35)]
    kinds += [box & (np.sin(7 * v) > 0), box & (np.sin(6 * u) * np.sin(6 * v) > 0), box & (u > v)]
    image = 255 * (0.7 * np.select([labels[:, None, None] == k for k in range(10)], kinds) + 0.15)
    return np.clip(image + rng.normal(0, 40, image.shape), 0, 255).astype(np.uint8), labels


try:
    (train, test), NAMES = fashion(), CLOTHES
    print(f"Fashion-MNIST: {len(train[1]):,} pictures to train with, {TEST:,} of {len(test[1]):,} to test with")
except (OSError, http.client.HTTPException) as error:
    train, test, NAMES = shapes(6000, seed=0), shapes(TEST, seed=1), SHAPES
    why = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
    print(f"No Fashion-MNIST here ({why}). We go on with {len(train[1]):,} drawn shapes.")
(images, labels), (x_test, y_test) = [
    (jnp.asarray(x), jnp.int32(y)) for x, y in (train, (test[0][:TEST], test[1][:TEST]))
]

# %%
figure, panels = plt.subplots(3, 10, figsize=(10, 3.3))
for k, column in enumerate(panels.T):
    column[0].set_title(NAMES[k], fontsize=9)
    for axes, picture in zip(column, train[0][train[1] == k], strict=False):
        axes.imshow(picture, cmap="gray_r")
        axes.axis("off")
figure.suptitle(f"{len(train[1]):,} pictures of ten classes", fontsize=10)
plt.show()

# %% [markdown]
# ## 2. A cell, and the layer around it
#
# The cell is one convolution. It takes the unknown `z` first, then the input `x` of the layer. Two choices keep its
# fixed point easy to find, as the guide [A first DEQ
# layer](https://github.com/deq-jax/deq_jax/blob/main/docs/start/first_layer.md) advises: a group norm and `tanh`
# bound the state, and a small kernel at the start keeps the cell near a contraction, a map that
# brings any two states closer together.
#
# `DEQ(cell)` is a Flax module. Each picture of a batch is a problem of its own, with its own stopping time. Of the
# solvers, `Picard` is plain iteration, $z \leftarrow f(z)$, and `Anderson` combines its last iterates to get there in
# fewer evaluations (notebooks 01 and 04).


# %%
class Cell(nnx.Module):
    def __init__(self, channels, rngs):
        small = nnx.initializers.normal(0.5 / (9 * channels) ** 0.5)
        self.conv = nnx.Conv(channels, channels, (3, 3), kernel_init=small, rngs=rngs)
        self.norm = nnx.GroupNorm(channels, num_groups=4, rngs=rngs)

    def __call__(self, z, x=0.0):
        return jnp.tanh(self.norm(self.conv(z) + x))


solver = deq.Anderson(rtol=1e-2, max_steps=30, history=5)
layer = DEQ(Cell(CHANNELS, nnx.Rngs(0)), solver=solver, adjoint=deq.Implicit(solver))
x = jax.random.normal(jax.random.key(0), (4, 14, 14, CHANNELS))
z, stats = layer(x)
moved = jnp.linalg.norm(layer.cell(z, x) - z) / jnp.linalg.norm(z)
print(f"z has the shape of x, {z.shape}; one more evaluation of the cell moves it by {moved:.1%}")
print(f"evaluations {stats.steps}, status {[deq.Status(int(s)).name for s in stats.status]}")

# %% [markdown]
# ## 3. Three networks of one size
#
# All have the same stem (a strided convolution, to 14 × 14) and the same head (average, then linear). Between them:
#
# - **equilibrium**: `DEQ` with the cell, solved by Anderson and differentiated by the implicit function theorem;
# - **weight-tied**: the same cell, applied eight times. It is `DEQ` too, with `Picard(max_steps=8)` and `Unroll()`,
#   which differentiates the iterations;
# - **ordinary**: three cells with weights of their own, and fewer channels, so that the number of parameters is about
#   the same.


# %%
class Ordinary(nnx.Module):
    """Layers that share nothing, with the call of `DEQ`."""

    def __init__(self, channels, depth, rngs):
        self.layers = nnx.Sequential(*(Cell(channels, rngs) for _ in range(depth)))

    def __call__(self, x, *, probe=None):
        return self.layers(x), None


class Classifier(nnx.Module):
    def __init__(self, channels, layer, rngs):
        self.stem = nnx.Conv(1, channels, (5, 5), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(channels, num_groups=4, rngs=rngs)
        self.layer = layer
        self.head = nnx.Linear(49 * channels, 10, rngs=rngs)

    def encode(self, images):
        return self.norm(self.stem(images[..., None] / 255.0))

    def decode(self, z):
        return self.head(nnx.avg_pool(z, (2, 2), strides=(2, 2)).reshape(len(z), -1))

    def __call__(self, images, probe=None):
        z, stats = self.layer(self.encode(images), probe=probe)
        return self.decode(z), stats


def equilibrium(solver=solver):
    rngs = nnx.Rngs(0)
    return Classifier(CHANNELS, DEQ(Cell(CHANNELS, rngs), solver=solver, adjoint=deq.Implicit(solver)), rngs)


def weight_tied(depth=8):
    rngs = nnx.Rngs(0)
    cell = Cell(CHANNELS, rngs)
    return Classifier(CHANNELS, DEQ(cell, solver=deq.Picard(max_steps=depth), adjoint=deq.Unroll()), rngs)


def ordinary(depth=3, channels=NARROW):
    rngs = nnx.Rngs(0)
    return Classifier(channels, Ordinary(channels, depth, rngs), rngs)


networks = {"equilibrium": equilibrium(), "weight-tied": weight_tied(), "ordinary": ordinary()}
STYLE = {"equilibrium": COLORS["Implicit"], "weight-tied": COLORS["Unroll"], "ordinary": "0.45"}
for name, network in networks.items():
    print(f"{name:12} {sum(p.size for p in jax.tree.leaves(nnx.state(network, nnx.Param))):,} parameters")

# %% [markdown]
# ## 4. Memory against depth
#
# Backpropagation through layers keeps something of each layer. The implicit function theorem needs only $z^\star$:
# its derivative is the solution of a second equilibrium, $u = \bar z + J^\top u$ with $J = \partial f / \partial z$.
# XLA tells how much temporary memory a compiled gradient needs, so nothing has to run.


# %%
def gradient_memory(network):
    """Temporary memory of the compiled gradient for one batch, in MiB."""
    graphdef, params = nnx.split(network)

    def loss(params, images, labels):
        logits, _ = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    program = jax.jit(jax.grad(loss)).lower(params, images[:BATCH], labels[:BATCH])
    return program.compile().memory_analysis().temp_size_in_bytes / 2**20


depths = (8,) if FAST else (2, 4, 8, 16, 32)
make = {
    "equilibrium": lambda depth: equilibrium(deq.Anderson(rtol=1e-2, max_steps=depth, history=5)),
    "weight-tied": weight_tied,
    "ordinary": lambda depth: ordinary(depth, CHANNELS),
}
memory = {
    name: [gradient_memory(make[name](depth)) for depth in depths if depth <= 16 or name != "ordinary"] for name in make
}
figure, axes = plt.subplots(figsize=(6.5, 3.5))
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
for name, mebibytes in memory.items():
    axes.plot(depths[: len(mebibytes)], mebibytes, "o-", color=STYLE[name], label=name)
factor = memory["weight-tied"][-1] / memory["equilibrium"][-1]
axes.set(
    xlabel="depth: layers, or the most evaluations that the solver may make",
    ylabel="temporary memory of the gradient (MiB)",
    title=f"At depth {depths[-1]} the weight-tied network needs {factor:.1f} times the memory of the equilibrium",
)
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter("{x:g}")
axes.legend()
plt.show()

# %% [markdown]
# The equilibrium's line is flat. It is not the lowest for a few layers, because the solver keeps a history of its
# iterates: ten states for `Anderson(history=5)`, in each direction. More in the guide
# [Memory](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/memory.md).
#
# ## 5. Training
#
# One step for all three networks. The statistics of the *forward* solve are an output of the layer. Those of the
# *backward* solve come out as the gradient of a `Probe`: pass zeros, differentiate, and read.

# %%
tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@functools.partial(jax.jit, static_argnums=0)
def train_step(graphdef, params, opt_state, key, images, labels):
    picked = jax.random.randint(key, (BATCH,), 0, len(images))
    x, y = images[picked], labels[picked]

    def loss_fn(params, probe):
        logits, stats = nnx.merge(graphdef, params)(x, probe)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == y), "forward": stats}

    (grads, backward), log = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, deq.Probe.zeros((BATCH,)))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, log | {"backward": backward}


@functools.partial(jax.jit, static_argnums=0)
def predict(graphdef, params, images):
    return nnx.merge(graphdef, params)(images)


trained, logs, answers = {}, {}, {}
for name, network in networks.items():
    graphdef, params = nnx.split(network)
    opt_state, log = tx.init(params), []
    for key in jax.random.split(jax.random.key(0), STEPS):
        params, opt_state, entry = train_step(graphdef, params, opt_state, key, images, labels)
        log.append(entry)
    trained[name], logs[name] = (graphdef, params), jax.tree.map(lambda *entries: np.stack(entries), *log)
    answers[name] = predict(graphdef, params, x_test)
    right = float(jnp.mean(answers[name][0].argmax(-1) == y_test))
    print(f"{name:12} test accuracy {right:.1%} ± {(right * (1 - right) / TEST) ** 0.5:.1%}")


# %%
def smooth(values, window=20):
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, "valid")


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
accuracy = {name: float(jnp.mean(logits.argmax(-1) == y_test)) for name, (logits, _) in answers.items()}
for name, log in logs.items():
    left.plot(smooth(log["accuracy"]), color=STYLE[name], label=f"{name}, test {accuracy[name]:.1%}")
left.set(
    xlabel="training step",
    ylabel="training accuracy, mean of 20 batches",
    title=f"After {STEPS} steps the test accuracies lie within {100 * np.ptp(list(accuracy.values())):.1f} points",
)
forward, backward = logs["equilibrium"]["forward"], logs["equilibrium"]["backward"]
evaluations, products = smooth(forward.steps.mean(-1), 10), smooth(backward.steps.mean(-1), 10)
converged = np.mean(forward.converged), np.mean(backward.status == deq.Status.CONVERGED)
right.plot(evaluations, color=COLORS["Implicit"], label=f"forward, evaluations of f: {converged[0]:.1%} converged")
right.plot(products, "--", color=COLORS["Implicit"], label=f"backward, products with Jᵀ: {converged[1]:.1%} converged")
right.set(
    xlabel="training step",
    ylabel="mean of 10 batches",
    title=f"The forward solve grows from {evaluations[0]:.1f} evaluations to {evaluations[-1]:.1f}",
    ylim=(0, None),
)
left.legend()
right.legend()
plt.show()

# %% [markdown]
# Two readings of these panels:
#
# - An equilibrium is not a better classifier by itself. What it offers is memory that does not depend on depth, and a
#   depth that the input decides.
# - Nothing in the loss asks for an equilibrium that is easy to find, and training uses this freedom: the solves grow
#   longer. So **log the evaluations and the share that converged**. If that share falls, see notebook 06 and the guide
#   [When a solve fails](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/failures.md).
#
# ## 6. A solve, step by step
#
# We take the 100 test pictures that needed the most evaluations and solve them again to a tighter tolerance. A *fold*
# is an object that is shown every evaluation of a solve. The fold `Snapshots` keeps every iterate. Of the pictures
# that are classified correctly in the end, we look at the one whose answer settles last. From left to right: the
# picture; nine channels of $z$; what the head would answer now; and the residual, $\|f(z) - z\| / \|f(z)\|$.

# %%
model = nnx.merge(*trained["equilibrium"])
logits, stats = answers["equilibrium"]
order = np.argsort(np.asarray(stats.steps), kind="stable")  # from the quickest picture to the slowest
slowest = order[-100:]
frames = 6 if FAST else 18


@jax.jit
def iterates(images):
    """States, relative residuals and class probabilities, [step, picture, …], of one solve for each picture."""
    x = model.encode(images)
    tight = deq.Anderson(rtol=1e-5, max_steps=frames, history=5)
    every = deq.Snapshots(range(frames))
    found = deq.solve(model.layer.cell, jnp.zeros_like(x), x, solver=tight, batch_ndim=1, fold=every)
    states, _, residuals = (jnp.stack(leaves) for leaves in zip(*found.folded, strict=True))
    return states, residuals, jax.nn.softmax(jax.vmap(model.decode)(states))


def mosaic(z):
    """Nine channels of a state, in three rows with a gap between them."""
    tiles = np.pad(z[..., :9], ((0, 1), (0, 1), (0, 0)), constant_values=np.nan)
    h, w, _ = tiles.shape
    return tiles.reshape(h, w, 3, 3).transpose(2, 0, 3, 1).reshape(3 * h, 3 * w)[:-1, :-1]


states, residuals, chances = jax.device_get(iterates(x_test[slowest]))
answer = chances.argmax(-1)
settled = np.max(
    np.arange(1, frames + 1)[:, None] * (answer != answer[-1]), axis=0
)  # the first step with the last answer
pick = int(np.argmax(np.where(answer[-1] == y_test[slowest], settled, -1)))
figure, (left, middle, right, curve) = plt.subplots(1, 4, figsize=(9, 2.7), dpi=72, width_ratios=(0.8, 1, 0.8, 1.2))
left.imshow(x_test[slowest[pick]], cmap="gray_r")
left.set_title("x, the picture")
maps = middle.imshow(mosaic(states[0, pick]), cmap="PuOr", vmin=-1, vmax=1)
bars = right.barh(NAMES, chances[0, pick], color=COLORS["Implicit"])
right.set(xlim=(0, 1), title="the answer", xlabel="probability")
right.invert_yaxis()
right.tick_params(axis="y", labelsize=8, length=0)
curve.semilogy(residuals[:, pick], color="0.8")
(line,) = curve.semilogy([], [], "o-", ms=4, color=COLORS["Anderson"])
curve.axhline(1e-2, color="0.6", lw=0.8, ls=":")
curve.set(xlabel="step", title="relative residual")
for axes in (left, middle):
    axes.axis("off")


def draw(k):
    maps.set_data(mosaic(states[k, pick]))
    middle.set_title(f"z at step {k}")
    for bar, chance in zip(bars, chances[k, pick], strict=True):
        bar.set_width(chance)
    line.set_data(range(k + 1), residuals[: k + 1, pick])


alt = (
    f"The residual of one picture falls to {residuals[-1, pick]:.0e} while feature maps and class probabilities settle"
)
show_moving(figure, draw, range(frames), alt)
print(
    f"{NAMES[answer[-1, pick]]}: from step {settled[pick]} on the answer stays. The residual at that step is", end=" "
)
print(f"{residuals[settled[pick], pick]:.0e}; the layer was trained with a tolerance of 1e-2 (dotted).")
print(f"median of {len(slowest)} slow pictures: the answer stays from step {np.median(settled):.0f} on")

# %% [markdown]
# ## 7. Which pictures are hard?
#
# Each picture of a batch stops on its own. So `stats.steps` sorts the test set by how much work the solver had with it.

# %%
rows = {"fewest": order[:10], "most": order[::-1][:10]}
figure, panels = plt.subplots(2, 10, figsize=(10, 2.8))
for axes, index in zip(panels.ravel(), np.concatenate(list(rows.values())), strict=True):
    axes.imshow(x_test[index], cmap="gray_r")
    axes.set_title(f"{int(stats.steps[index])}", fontsize=9)
    axes.axis("off")
wrong = np.asarray(logits.argmax(-1) != y_test)
fewest, most = (wrong[order[part]].mean() for part in (slice(TEST // 4), slice(-(TEST // 4), None)))
figure.suptitle(
    f"Evaluations of the ten quickest and the ten slowest of {TEST:,} pictures. "
    f"Wrong answers: {fewest:.0%} in the quickest quarter, {most:.0%} in the slowest",
    fontsize=10,
)
plt.show()

# %% [markdown]
# The count says how hard the *equilibrium* is to find. It need not say how hard the picture is to classify: the title
# compares the two. In our run the slowest quarter has *fewer* wrong answers than the quickest.
#
# ## 8. Past the last layer
#
# The weight-tied network has the same cell and was trained to answer after eight applications. What if we go on? We
# iterate both cells plainly and ask each head after every step. A network that ends at an equilibrium does not mind.


# %%
@functools.partial(jax.jit, static_argnums=0)
def past_the_end(graphdef, params, images, labels):
    """Accuracy and mean relative residual after each number of plain iterations."""
    model = nnx.merge(graphdef, params)
    x = model.encode(images)

    def step(z, _):
        fz = model.layer.cell(z, x)
        norm = lambda v: jnp.linalg.norm(v.reshape(len(v), -1), axis=-1)
        right = jnp.mean(model.decode(fz).argmax(-1) == labels)
        return fz, (right, jnp.mean(norm(fz - z) / norm(fz)))

    return jax.lax.scan(step, jnp.zeros_like(x), length=8 if FAST else 40)[1]


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
curves = {}
for name in ("equilibrium", "weight-tied"):
    curves[name] = np.asarray(past_the_end(*trained[name], x_test[: TEST // 2], y_test[: TEST // 2]))
    steps = 1 + np.arange(curves[name].shape[1])
    left.plot(steps, curves[name][0], ".-", color=STYLE[name], label=name)
    right.semilogy(steps, curves[name][1], ".-", color=STYLE[name], label=name)
for axes in (left, right):
    axes.axvline(8, color="0.6", lw=0.8, ls=":")
    axes.set_xlabel("applications of the cell")
    axes.legend()
change = {name: curve[0][-1] - curve[0][7] for name, curve in curves.items()}
left.set(
    ylabel=f"accuracy on {TEST // 2:,} test pictures",
    title=f"From 8 to {steps[-1]}: " + ", ".join(f"{name} {100 * gain:+.1f} points" for name, gain in change.items()),
)
right.set(
    ylabel="mean relative residual",
    title=f"At 8 and at {steps[-1]}: "
    + "; ".join(f"{name} {c[1][7]:.0e}, {c[1][-1]:.0e}" for name, c in curves.items()),
)
plt.show()

# %% [markdown]
# The dotted line is the depth that the weight-tied network was trained with. So few pictures cannot tell accuracies
# apart that differ by a point or two; the residuals differ more clearly. Plain iteration is not the solver that the
# equilibrium was trained with: it needs more steps than Anderson and, for a cell that expands, may not arrive.
#
# **Try next**
#
# - `deq.Implicit(solver)` → `deq.Phantom()` or `deq.JFB()` in `equilibrium`: less work in the backward pass, a biased
#   gradient (notebook 05).
# - Take the `small` kernel out of `Cell`, or the norm out of `encode`, and look at the share that converges.
# - `rtol=1e-1` or `1e-4` in `solver`: how do accuracy, evaluations and time change?
# - Add `deq.regularizers.jacobian_penalty` to the loss, so that the evaluations stop growing (notebook 06).
# - `CHANNELS = 64` and 2,000 steps on a GPU.
