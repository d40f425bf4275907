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
# # A DEQ language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deq-jax/deq_jax/blob/main/colabs/03_language_model.ipynb)
#
# A Transformer applies layer after layer to a text. A *deep equilibrium model* (DEQ) applies one layer until its
# output does not change any more, $z^\star = f(z^\star, x)$, and reads its predictions from that fixed point. Here
# we train one on characters, from the corpus to a sample.
#
# After this notebook you can:
#
# - train `deq_jax.models.DEQTransformer` with Optax under `jax.jit`, and sample from it;
# - warm it up as a shallow network first, as Bai, Kolter & Koltun (2019) do, and say why;
# - log what the solver did beside the loss, and read that log;
# - look inside one solve: which positions settle when, and how a prediction forms;
# - choose how many evaluations to spend at test time.
#
# On a CPU it takes about three minutes.

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
import functools
import hashlib
import http.client
import lzma
import pathlib
import urllib.request

import jax.numpy as jnp
import optax
from flax import nnx

from deq_jax.models import DEQTransformer, TransformerConfig

# %% [markdown]
# ## On a GPU or a TPU
#
# An accelerator gets a wider model, longer texts and more steps; nothing else changes. The products of the cell
# then dominate, and a bfloat16 state, `DEQTransformer(config, dtype=jnp.bfloat16, ...)`, makes them faster:
# tolerances of 1e-2 suit it. On a CPU the sizes below are what two cores train in two minutes.

# %%
ACCELERATOR = jax.default_backend() != "cpu"
if ACCELERATOR and not FAST:
    DIM, HEADS, TIME, BATCH, WARMUP, STEPS, RATE = 256, 8, 128, 64, 1500, 2500, 1e-3
else:
    DIM, HEADS, TIME, BATCH, WARMUP, STEPS, RATE = 64, 4, 64, 16, 600, 1400, 3e-3
if FAST:
    DIM, TIME, BATCH, WARMUP, STEPS = 32, 32, 8, 20, 30

# %% [markdown]
# ## 1. A corpus, and what is easy to know about it
#
# The text is Shakespeare's, one megabyte. It comes from the folder that `DEQ_JAX_DATA` names, else from the
# network. Without either we read the help texts that Python itself ships.

# %%
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_text():
    """(the text, a prompt that suits it)."""
    local = pathlib.Path(os.environ.get("DEQ_JAX_DATA", ".")) / "tinyshakespeare" / "input.txt.xz"
    try:
        if local.exists():
            raw = lzma.open(local).read()
        elif FAST:
            raise OSError("nothing is downloaded in the fast mode")
        else:
            with urllib.request.urlopen(SHAKESPEARE, timeout=5) as response:
                raw = response.read()
        if hashlib.sha256(raw).hexdigest() != SHA256:
            raise OSError("the text is not the one that was published (its SHA-256 differs)")
        return raw.decode(), "ROMEO:\n"
    except (OSError, EOFError, lzma.LZMAError, http.client.HTTPException) as error:
        from pydoc_data.topics import topics

        why = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
        print(f"No Shakespeare here ({why}). We train on the help texts of Python instead.")
        return "\n\n".join(topics[name] for name in sorted(topics)), "The value of "


text, prompt = load_text()
counts_of = {c: text.count(c) for c in sorted(set(text))}
characters = [c for c, count in counts_of.items() if count >= 10]  # rarer ones are left out
ids = {c: i for i, c in enumerate(characters)}
tokens = np.array([ids[c] for c in text if c in ids], np.int32)
cut = int(0.95 * len(tokens))
train_tokens, valid_tokens = jnp.asarray(tokens[:cut]), jnp.asarray(tokens[cut:])
decode = lambda tokens: "".join(characters[i] for i in tokens)
print(f"{len(tokens):,} characters, {len(characters)} of them different")

# %% [markdown]
# A loss says little without something to hold it against. Two counts from the training text give two: how often
# each character occurs (*unigram*), and how often each follows each other one (*bigram*).

# %%
VOCAB = len(characters)
pairs = np.ones((VOCAB, VOCAB))  # one of each, so that no pair is impossible
np.add.at(pairs, (tokens[: cut - 1], tokens[1:cut]), 1)
bigrams = pairs / pairs.sum(1, keepdims=True)
unigrams = pairs.sum(0) / pairs.sum()
before, after = tokens[cut:-1], tokens[cut + 1 :]
unigram, bigram = -np.log(unigrams[after]).mean(), -np.log(bigrams[before, after]).mean()
print(f"validation loss, nats a character: uniform {np.log(VOCAB):.2f}, unigram {unigram:.2f}, bigram {bigram:.2f}")

# %% [markdown]
# ## 2. The model
#
# `DEQTransformer` embeds the characters, solves for $z^\star$ of shape `[batch, time, dim]`, and decodes it. Its
# cell $f$ is one causal Transformer layer that reads the embedded text $x$ at every evaluation. **Each sequence is
# one problem**: it has its own residual and stops on its own.
#
# The module holds parameters only, so we split it once and work with pure functions. `solver` and `adjoint` can be
# replaced in each call; that is how the warm-up below uses the same parameters. `Anderson` finds $z^\star$ from a few
# of its last iterates, and `Implicit` differentiates it by the implicit function theorem (notebook 01).

# %%
config = TransformerConfig(VOCAB, dim=DIM, heads=HEADS, inner_dim=4 * DIM, mem_len=0)
solver = deq.Anderson(rtol=1e-2, max_steps=24, history=5)
model = DEQTransformer(config, solver=solver, adjoint=deq.Implicit(), rngs=nnx.Rngs(0))
graphdef, params = nnx.split(model)
parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"{parameters:,} parameters, of one layer; a state of {TIME} × {DIM} numbers for each sequence")

# The history is that of the last TIME columns; it has no parameters, so the same ones serve.
writer, _ = nnx.split(DEQTransformer(dataclasses.replace(config, mem_len=TIME), solver=solver, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnames="length")
def write(params, given, key, solver, length=240):
    """`given` and what the model writes after it: one column of text, one equilibrium, at a time."""
    model = nnx.merge(writer, params)

    def step(carry, given_and_key):
        (token, history), (given, key) = carry, given_and_key
        logits, history, _ = model(token[None, None], history, solver=solver)
        drawn = jax.random.categorical(key, logits[0, -1] / 0.8)  # temperature 0.8
        token = jnp.where(given >= 0, given, drawn).astype(jnp.int32)
        return (token, history), token

    given = jnp.concatenate([given[1:], jnp.full(length, -1)])
    start = jnp.int32(ids[prompt[0]]), model.empty_history(1)
    return jax.lax.scan(step, start, (given, jax.random.split(key, len(given))))[1]


def sample(params, seed=0):
    given = jnp.array([ids[c] for c in prompt])
    written = write(params, given, jax.random.key(seed), solver, length=60 if FAST else 240)
    return prompt[0] + decode(np.asarray(written))


print("Before training:\n\n" + sample(params))

# %% [markdown]
# ## 3. Warm-up, then the equilibrium
#
# A layer with random weights has no good fixed point to find, so solving to a tolerance wastes most of the early
# steps. Bai, Kolter and Koltun (2019) start with a *shallow network*: the same cell, applied twice, with
# backpropagation through both. In the library that is another solver and another adjoint: `Picard(max_steps=2)`
# with `Unroll()`. Then the equilibrium takes over, with the same parameters and the same optimizer state.
#
# The step below logs the forward solve from its `Stats`, and the backward solve through a `Probe`: its statistics
# come out as the derivative with respect to the probe.

# %%
schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 20, STEPS, 0.05 * RATE)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
shallow = {"solver": deq.Picard(rtol=1e-2, max_steps=2), "adjoint": deq.Unroll()}
equilibrium = {"solver": solver, "adjoint": deq.Implicit()}


def batch_of(tokens, key):
    """Sequences from random places: inputs and the characters after them."""
    starts = jax.random.randint(key, (BATCH, 1), 0, len(tokens) - TIME)
    window = tokens[starts + jnp.arange(TIME + 1)]
    return window[:, :-1], window[:, 1:]


def loss_fn(params, probe, inputs, targets, options):
    out = nnx.merge(graphdef, params)(inputs, probe=probe, **options)
    losses = optax.softmax_cross_entropy_with_integer_labels(out.logits, targets)
    return losses.mean(), out.solution.stats


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, key, options):
    inputs, targets = batch_of(train_tokens, key)
    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (loss, stats), (grads, backward) = value_and_grad(params, deq.Probe.zeros((BATCH,)), inputs, targets, options)
    updates, opt_state = tx.update(grads, opt_state, params)
    log = {
        "loss": loss,
        "evaluations": stats.steps.mean(),
        "residual": stats.relative_residual.mean(),
        "converged": stats.converged.mean(),
        "products": backward.steps.mean(),
        "backward converged": (backward.status == deq.Status.CONVERGED).mean(),
    }
    return optax.apply_updates(params, updates), opt_state, log


@jax.jit
def validate(params, options):
    """The loss on fixed validation sequences."""
    inputs, targets = batch_of(valid_tokens, jax.random.key(0))
    more, their = batch_of(valid_tokens, jax.random.key(1))
    inputs, targets = jnp.concatenate([inputs, more]), jnp.concatenate([targets, their])
    return loss_fn(params, None, inputs, targets, options)[0]


# %%
opt_state, logs, checks = tx.init(params), [], []
keys = jax.random.split(jax.random.key(1), STEPS)
for step in range(STEPS):
    options = shallow if step < WARMUP else equilibrium
    params, opt_state, log = train_step(params, opt_state, keys[step], options)
    logs.append(log)
    if step % (STEPS // 15) == 0 or step in (WARMUP - 1, STEPS - 1):
        checks.append((step, float(validate(params, options))))
    if step == WARMUP - 1:
        after_warmup = jax.tree.map(jnp.copy, params)
logs = {name: np.array([float(log[name]) for log in logs]) for name in logs[0]}
print(f"validation loss {dict(checks)[WARMUP - 1]:.2f} nats after the warm-up, {checks[-1][1]:.2f} at the end")

# %%
window = max(STEPS // 60, 1)
smooth = lambda values: np.convolve(values, np.ones(window) / window, "valid")  # a running mean
figure, axes = plt.subplots(figsize=(8, 3.8))
axes.axvspan(0, WARMUP, color="0.94", lw=0)
for name, level in (("unigram", unigram), ("bigram", bigram)):
    axes.axhline(level, color="0.55", lw=1, ls="--")
    axes.annotate(name, (STEPS, level), (0, 3), textcoords="offset points", ha="right", color="0.4")
x = np.arange(window - 1, STEPS)
warm, loss = x <= WARMUP, smooth(logs["loss"])
axes.plot(x[warm], loss[warm], color=COLORS["Unroll"], label="training, two layers unrolled")
axes.plot(x[~warm], loss[~warm], color=COLORS["Implicit"], label="training, equilibrium")
axes.plot(*zip(*checks, strict=True), "o", color="k", ms=4, label="validation")
axes.annotate("warm-up", (WARMUP / 2, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", color="0.4")
axes.set(
    xlabel="training step",
    ylabel="loss (nats a character)",
    title=f"{checks[-1][1]:.2f} nats on validation text: {bigram - checks[-1][1]:.2f} below the bigram",
    ylim=(None, unigram + 0.4),
)
axes.legend(loc="center right", bbox_to_anchor=(1, 0.66))
plt.show()

# %% [markdown]
# ## 4. What the solver did
#
# The loss is half of the log of an equilibrium model. The other half says whether there *was* an equilibrium.
# At the switch the training loss above jumps, too: the parameters were fitted to the state after two layers, and the
# equilibrium is another state. It recovers after some steps.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4))
residual, work, share = panels
for axes in panels:
    axes.axvspan(0, WARMUP, color="0.94", lw=0)
    axes.set_xlabel("training step")
residual.semilogy(x, smooth(logs["residual"]), color=COLORS["Anderson"])
residual.axhline(1e-2, color="0.4", lw=0.8, ls=":")
residual.set(
    ylabel="relative residual",
    title=f"Residual: {logs['residual'][WARMUP - 1]:.2g} after two layers,\nthen {logs['residual'][-1]:.2g}",
)
later = x >= WARMUP + window
work.plot(x, smooth(logs["evaluations"]), color=COLORS["Anderson"], label="evaluations of f, forward")
work.plot(x[later], smooth(logs["products"])[later], color="0.4", label="products with Jᵀ, backward")
mean = smooth(logs["evaluations"])[later]
work.set_title(f"Evaluations: {mean[0]:.0f} at the switch,\nthen from {mean.min():.0f} to {mean[-1]:.0f}")
work.set_ylim(0, 1.4 * max(smooth(logs["products"])[later].max(), smooth(logs["evaluations"]).max()))
work.legend(loc="upper left")
share.plot(x[later], smooth(logs["converged"])[later], color=COLORS["Anderson"], label="forward")
share.plot(x[later], smooth(logs["backward converged"])[later], color="0.4", label="backward")
share.set(
    title=f"Converged: {logs['converged'][WARMUP:].mean():.0%} of the solves forward,\n"
    f"{logs['backward converged'][WARMUP:].mean():.0%} backward",
    ylim=(-0.03, 1.05),
)
share.legend(loc="lower right")
plt.show()

# %% [markdown]
# In the warm-up (gray) the state after two layers is no fixed point, nor is it meant to be: `Unroll` differentiates
# the two layers as they are. (The count is three, because one more evaluation measures the residual.) At the switch a
# solve takes more evaluations, and a few do not converge, because nothing has asked for a fixed point before. After
# some steps it takes fewer. From there on training slowly makes the cell harder to solve, as in Figure 2 of the
# paper. If the share of converged solves falls in a run of yours, see the guide
# [When a solve fails](https://github.com/deq-jax/deq_jax/blob/main/docs/guides/failures.md).
#
# ## 5. Inside one solve
#
# Take one line of validation text and keep every iterate: `deq.solve` runs the forward half, and the fold
# `Snapshots`, an object that is shown every evaluation, records the states. We solve more tightly than in training,
# with `Anderson` and with `Picard`, the plain iteration, and measure the residual of each *position*.

# %%
DEPTH = 12 if FAST else 30
model = nnx.merge(graphdef, params)
line = valid_tokens[1000 : 1000 + TIME][None]
context = model.context(line)


@jax.jit
def watch(context, solver):
    """[iteration, position] residuals, and [iteration, position, character] probabilities."""
    zeros = jnp.zeros((1, TIME, DIM))
    fold = deq.Snapshots(at=tuple(range(DEPTH)))
    solved = deq.solve(model.cell.f, zeros, context, solver=solver, batch_ndim=1, fold=fold)

    def look(z):
        fz = model.cell.f(z, context)
        residual = jnp.linalg.norm(fz - z, axis=-1) / jnp.linalg.norm(fz, axis=-1)
        return residual[0], jax.nn.softmax(model.decode(z))[0]

    return jax.lax.map(look, jnp.stack([snapshot.z for snapshot in solved.folded]))


closely = {
    "Picard": deq.Picard(rtol=1e-5, max_steps=DEPTH + 1),
    "Anderson": deq.Anderson(rtol=1e-5, max_steps=DEPTH + 1, history=5),
}
if FAST:
    del closely["Picard"]
watched = {name: watch(context, solver) for name, solver in closely.items()}
figure, panels = plt.subplots(1, len(watched), figsize=(10, 3.8), sharey=True, squeeze=False)
panels = panels[0]
for axes, (name, (residuals, _)) in zip(panels, watched.items(), strict=True):
    mesh = axes.pcolormesh(np.log10(np.maximum(residuals, 1e-6)), cmap="magma", vmin=-5, vmax=0)
    below = np.asarray(residuals) <= 1e-2  # [iteration, position]
    settled = below.any(0)
    first = np.where(settled, below.argmax(0), DEPTH)
    axes.plot(np.flatnonzero(settled) + 0.5, first[settled] + 0.5, ".", color="w", ms=4)
    axes.set(
        xlabel="position in the text",
        title=f"{name}: half of the positions are below 1e-2\n"
        f"after {np.median(first):.0f} steps, {(~settled).sum()} of {TIME} not within {DEPTH}",
        ylim=(DEPTH, 0),
    )
panels[0].set_ylabel("step of the solver")
figure.colorbar(mesh, ax=panels, label="log₁₀ of the residual of the position")
plt.show()

# %% [markdown]
# Dark positions have settled; a white dot marks where one first falls below 1e-2. A position attends to those before
# it, so what moves there moves it too, and neighbors settle together. The titles count the positions that do not
# settle in the steps shown. Where the plain iteration does not, `Anderson` still may: it solves the equation instead
# of following the iteration (notebook 01 shows why).
#
# What does that mean for the prediction? Below, each column is a position, and each row a possible *next*
# character. The boxes are the characters that do follow. Step by step the solver moves the probabilities to where
# they stay.

# %%
SHOWN = min(TIME, 40)
residuals, chances = (np.asarray(a) for a in watched["Anderson"])
following = np.asarray(valid_tokens[1001 : 1001 + SHOWN])
common = list(np.argsort(-np.maximum(unigrams, chances[-1, :SHOWN].max(0)))[:24])
common = sorted(set(common) | set(following.tolist()), key=lambda i: characters[i].lower())
label = lambda i: {" ": "␣", "\n": "¶"}.get(characters[i], characters[i])

figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.6, 5.4), sharex=True, height_ratios=(1, 3.2))
bars = top.bar(range(SHOWN), np.ones(SHOWN), bottom=1e-6, color=COLORS["Anderson"])
top.axhline(1e-2, color="0.4", lw=0.8, ls=":")
top.set(yscale="log", ylim=(1e-5, 2), ylabel="residual")
shown = bottom.imshow(chances[0, :SHOWN, common], aspect="auto", cmap="Blues", vmin=0, vmax=1)
for position, token in enumerate(following):
    box = plt.Rectangle((position - 0.5, common.index(token) - 0.5), 1, 1, fill=False, ec=COLORS["Robust"], lw=1.2)
    bottom.add_patch(box)
bottom.set_yticks(range(len(common)), [label(i) for i in common], fontsize=7)
bottom.set_xticks(range(SHOWN), [label(int(i)) for i in line[0, :SHOWN]], fontsize=8)
bottom.set(xlabel="the text", ylabel="the next character")


def draw(step):
    for bar, residual in zip(bars, residuals[step], strict=False):
        bar.set_height(max(float(residual), 1.1e-5))
    shown.set_data(chances[step, :SHOWN, common])
    right = chances[step, np.arange(SHOWN), following]
    top.set_title(f"Step {step:2}: {right.mean():.0%} of the probability is on the character that follows")


alt = "Residuals of the positions fall, and the predicted next characters form, as the solver iterates."
show_moving(figure, draw, [*range(10), *range(10, DEPTH, 3)], alt)

# %% [markdown]
# Most of the picture stands after a few steps; the later ones add digits and hardly change a prediction. So how many
# steps does the *loss* need? The budget `max_steps` may be an array, so one compiled function answers for all of
# them. (`returns="last"` asks for the state after so many steps, even where an earlier one had a smaller residual.)

# %%
budgets = (1, 2, 4, 8) if FAST else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
figure, axes = plt.subplots(figsize=(7, 3.6))
ends = {}
makers = {"Picard": deq.Picard, "Anderson": functools.partial(deq.Anderson, history=5)}
if FAST:
    del makers["Anderson"]
for name, make in makers.items():
    attempts = [make(rtol=1e-4, max_steps=jnp.asarray(k + 1), returns="last") for k in budgets]
    losses = [float(validate(params, equilibrium | {"solver": attempt})) for attempt in attempts]
    axes.plot(budgets, losses, "o-", color=COLORS[name], label=name)
    ends[name] = min(k for k, loss in zip(budgets, losses, strict=True) if loss <= min(losses) + 0.01)
axes.axhline(bigram, color="0.55", lw=1, ls="--")
axes.annotate("bigram", (budgets[-1], bigram), (0, 3), textcoords="offset points", ha="right", color="0.4")
axes.set(
    xscale="log",
    xlabel="steps of the solver at test time",
    ylabel="validation loss (nats)",
    title="Steps to within 0.01 nats of its best: " + ", ".join(f"{name} {k}" for name, k in ends.items()),
)
axes.set_xticks(budgets, budgets)
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# In our run both solvers need the same few steps. The positions that plain iteration never settles are few, and they
# hardly show in a mean over all characters.
#
# ## 6. Text
#
# A step of the writer solves for *one* column of the text: the state of one position. The columns before it are an
# input of the model, its `history` (not to be confused with the history of a solver). The model is causal, so they do
# not change. Each sample begins with the same words and uses the same random numbers.

# %%
print("After the warm-up, solved to an equilibrium it was not trained for:\n\n" + sample(after_warmup))
print("\n" + "-" * 60 + "\n\nAfter training:\n\n" + sample(params))

# %% [markdown]
# After this short training there are lines, names and many words; sense needs a larger model and more hours.
#
# **Try next**
#
# - No warm-up: `WARMUP = 1`. What do the loss and the solver's log look like?
# - `equilibrium = {"solver": solver, "adjoint": deq.Phantom(5, 0.8)}`: a cheaper, biased gradient (notebook 05).
# - `deq.Broyden(rtol=1e-2, max_steps=24)` as the solver, or a tolerance of 1e-3.
# - `TransformerConfig.modern(VOCAB, ...)`: rotary positions, RMSNorm and a gated layer.
# - A text of your own in place of `text`.
