"""Where training should begin (reviewer 2): scale × ensemble × weight norm × layer norm, before and after training.

python -m experiments.initialization_study reduced
python -m experiments.initialization_study figure
python -m experiments.initialization_study paper
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

import deq_jax as deq
from deq_jax.models import DEQTransformer, TransformerConfig
from deq_jax.models.transformer_cell import attention, feed_forward, post_norm_step, pre_norm_step
from experiments import data, lm, plots, study
from experiments.training import init_state, make_train_step

# Of every kernel: the standard deviation of its entries times √fan_in. At a fan-in of 700, the paper's, the released
# code's N(0, 0.01) is 0.26, what it begins from with weight norm (±1/√fan_in, uniform) is 0.58, and the paper's text,
# N(0, 0.05), is 1.32.
GAINS = (0.26, 0.58, 1.32, 2.6)
ENSEMBLES = ("Gaussian", "orthogonal", "symmetric")


@dataclasses.dataclass(frozen=True)
class Config:
    """Spectral radius and evaluations before and after training, by initialisation, and whether training diverged.

    python -m experiments.initialization_study reduced

    You should see small scales end with the smaller loss and spectral radius, and no equilibrium without a layer norm.
    """

    run: Path = Path("runs/studies/initialization")
    out: Path | None = None
    data: str = "shakespeare"
    gains: tuple[float, ...] = GAINS
    ensembles: tuple[str, ...] = ENSEMBLES
    weight_norms: tuple[bool, ...] = (True, False)
    layer_norms: tuple[str, ...] = ("post", "pre", "none")
    dim: int = 32
    heads: int = 2
    inner_dim: int = 128
    batch: int = 8
    length: int = 32
    steps: int = 120
    lr: float = 3e-3
    clip: float = 1.0
    rtol: float = 1e-3
    max_steps: int = 40
    measure_steps: int = 100  # the budget of the solves that are measured, before and after
    seed: int = 0


PRESETS = {
    "reduced": ("5 minutes on one CPU core", Config()),
    "paper": (
        "a day on one accelerator: the paper's width, characters",
        Config(
            run=Path("runs/studies/initialization-paper"),
            dim=700,
            heads=10,
            inner_dim=2800,
            batch=32,
            length=150,
            steps=20_000,
            lr=2.5e-4,
            clip=0.25,
        ),
    ),
}


def no_norm_step(z: Float[Array, "batch time dim"], context: Any) -> Float[Array, "batch time dim"]:
    """The cell with neither layer norm."""
    h = attention(z, context) + z
    return feed_forward(h, context) + h


STEPS: dict[str, Callable] = {"post": post_norm_step, "pre": pre_norm_step, "none": no_norm_step}


# ---- initialisation ----------------------------------------------------------------------------------------


def initialise(params: PyTree, ensemble: str, gain: float, key: Key[Array, ""]) -> PyTree:
    """The same parameters with the cell's kernels drawn anew: entries of mean square gain²/fan_in, all ensembles."""
    cell = dict(params["cell"])
    dim, inner = cell["inner"]["kernel"].shape
    q, k, v, out, ff, positions = jax.random.split(key, 6)
    three = [matrix(ensemble, key, dim, dim) for key in (q, k, v)]
    W1 = matrix(ensemble, ff, dim, inner)
    # Symmetric is W₂W₁: W₂ = W₁ᵀ but for the scale of its own fan-in.
    W2 = W1.T if ensemble == "symmetric" else matrix(ensemble, jax.random.fold_in(ff, 1), inner, dim)
    drawn = {
        "qkv": jnp.stack(three, 1),
        "attended": matrix(ensemble, out, dim, dim),
        "positions": matrix("Gaussian", positions, dim, dim),
        "inner": W1,
        "outer": W2,
    }
    for name, kernel in drawn.items():
        old = cell[name]
        fan_in = inner if name == "outer" else dim
        kernel = gain * kernel / (jnp.sqrt(jnp.mean(kernel**2)) * fan_in**0.5)
        kernel = kernel.reshape(old["kernel"].shape)
        cell[name] = {"kernel": kernel}
        if "scale" in old:
            axes = tuple(range(kernel.ndim - old["scale"].ndim))
            cell[name]["scale"] = jnp.sqrt(jnp.sum(kernel**2, axes))
    return params | {"cell": cell}


def matrix(ensemble: str, key: Key[Array, ""], rows: int, columns: int) -> Float[Array, "rows columns"]:
    match ensemble:
        case "Gaussian":
            return jax.random.normal(key, (rows, columns))
        case "orthogonal":
            return nnx.initializers.orthogonal()(key, (rows, columns))
        case "symmetric":
            if rows != columns:
                return jax.random.normal(key, (rows, columns))
            drawn = jax.random.normal(key, (rows, columns))
            return (drawn + drawn.T) / 2**0.5
    raise ValueError(f"no ensemble {ensemble!r}; there are {', '.join(ENSEMBLES)}")


# ---- one program for each layer norm and weight norm ---------------------------------------------------------


def programs(config: Config, vocabulary: int, layer_norm: str, weight_norm: bool):
    """(params, step, look): fresh parameters, a compiled step of training, a compiled measurement."""
    transformer = TransformerConfig(
        vocabulary,
        dim=config.dim,
        heads=config.heads,
        inner_dim=config.inner_dim,
        mem_len=0,
        pre_norm=layer_norm == "pre",
        weight_norm=weight_norm,
    )
    graphdef, params = nnx.split(DEQTransformer(transformer, rngs=nnx.Rngs(config.seed)), nnx.Param)
    f = STEPS[layer_norm]
    solver = deq.Anderson(rtol=config.rtol, max_steps=config.max_steps)
    tx = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.lr))

    def loss(params, probe, rest, segment, key, carry):
        model = nnx.merge(graphdef, params)
        z0 = jnp.zeros((*segment.inputs.shape, config.dim))
        z, stats = deq.fixed_point(f, z0, model.context(segment.inputs), solver=solver, batch_ndim=1, probe=probe)
        metrics = {"converged": stats.converged.mean(), "evaluations": stats.steps.mean()}
        return jnp.mean(model.nll(z, segment.targets)), (rest, carry, metrics)

    @jax.jit
    def look(params, inputs, targets):
        model = nnx.merge(graphdef, params)
        context = model.context(inputs)
        z0 = jnp.zeros((*inputs.shape, config.dim))
        measured = deq.Anderson(rtol=config.rtol, max_steps=config.measure_steps)
        solved = deq.solve(f, z0, context, solver=measured, batch_ndim=1)
        broyden = deq.solve(
            f, z0, context, solver=deq.Broyden(rtol=config.rtol, max_steps=config.measure_steps), batch_ndim=1
        )
        picard = deq.solve(
            f, z0, context, solver=deq.Picard(rtol=config.rtol, max_steps=config.measure_steps), batch_ndim=1
        )
        radius = deq.stability.spectral_radius(f, solved.value, context, batch_ndim=1, iterations=60)
        return {
            "loss": jnp.mean(model.nll(solved.value, targets)),
            "radius": jnp.median(radius),
            "stretch": jnp.median(stretch(f, solved.value, context)),
            "evaluations": jnp.mean(solved.stats.steps),
            "converged": jnp.mean(solved.stats.converged),
            "broyden": jnp.mean(broyden.stats.steps),
            "broyden_converged": jnp.mean(broyden.stats.converged),
            "picard_converged": jnp.mean(picard.stats.converged),
        }

    step = make_train_step(loss, tx, probe=deq.Probe.zeros((config.batch,)))
    return nnx.to_pure_dict(params), tx, step, look


def stretch(
    f: Callable, z: Float[Array, "batch time dim"], context: Any, iterations: int = 30
) -> Float[Array, " batch"]:
    """‖J‖₂ at z, by the power method for JᵀJ: at most 1 where f is non-expansive."""
    push = lambda v: jax.jvp(lambda z: f(z, context), (z,), (v,))[1]
    _, pull = jax.vjp(lambda z: f(z, context), z)
    size = lambda v: jnp.linalg.norm(v.reshape(len(v), -1), axis=-1)[:, None, None]

    def body(_, v):
        w = pull(push(v))[0]
        return w / jnp.where(size(w) > 0, size(w), 1)

    v = jax.lax.fori_loop(0, iterations, body, jax.random.normal(jax.random.key(0), z.shape, z.dtype))
    return (size(push(v)) / size(v))[:, 0, 0]


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    corpus = lm.load_corpus(config.data, level="char")
    batches = data.segments(corpus.train, config.batch, config.length, seed=config.seed)
    held_out = lm.evaluation_segments(corpus.valid, config.batch, config.length)[0]
    rows = []
    for layer_norm, weight_norm in itertools.product(config.layer_norms, config.weight_norms):
        compiled: list[Any] = []  # made where a cell is missing

        def one(ensemble: str, gain: float) -> dict[str, Any]:
            if not compiled:
                compiled.append(programs(config, len(corpus.vocabulary), layer_norm, weight_norm))
            fresh, tx, step, look = compiled[0]
            params = initialise(fresh, ensemble, gain, jax.random.key(config.seed + 1))
            state = init_state(params, tx, jax.random.key(config.seed))
            before = look(params, held_out.inputs, held_out.targets)
            lines = []
            for i in range(config.steps):
                state, line = step(state, batches[i])
                lines.append(line)
            lines = jax.device_get(lines)
            mean = lambda name: np.mean([line[name] for line in lines])
            loss, bad = (np.array([line[name] for line in lines], float) for name in ("loss", "skipped"))
            after = look(state.params, held_out.inputs, held_out.targets)
            return {
                "before": before,
                "after": after,
                "training_loss": loss[-20:].mean(),
                "training_evaluations": mean("evaluations"),
                "training_converged": mean("converged"),
                "training_products": mean("bwd_steps"),
                "training_backward_converged": mean("bwd_converged"),
                "diverged_at": divergence(loss, bad),
            }

        for ensemble, gain in itertools.product(config.ensembles, config.gains):
            name = f"{layer_norm}, weight norm {'on' if weight_norm else 'off'}, {ensemble}, {gain:g}"
            key = dict(layer_norm=layer_norm, weight_norm=weight_norm, ensemble=ensemble, gain=gain)
            rows.append(key | cells(name, lambda: one(ensemble, gain)))
    uniform = float(np.log(len(corpus.vocabulary)))
    return {"seed": config.seed, "dtype": "float32", "uniform_loss": uniform, "rows": rows}


def divergence(loss: np.ndarray, bad: np.ndarray) -> int | None:
    """The first step with a gradient that was not finite, or from which on the loss stayed above its start."""
    wrong = bad.astype(bool) | ~np.isfinite(loss)
    if wrong.any():
        return int(np.argmax(wrong))
    above = loss > loss[0] + 0.5
    if not above[-10:].all():
        return None
    return int(len(loss) - np.argmin(above[::-1])) if not above.all() else 0


# ---- what is kept ------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    lines = ["# Initialisation", "", f"    {results['command']}", ""]
    lines += study.paragraph(
        study.conditions(results, dtype=results["dtype"], seed=results["seed"], gradient="Implicit()") + ".",
        f"dim {config['dim']}, inner {config['inner_dim']}, T = {config['length']}, {config['steps']} steps of Adam,",
        f"Anderson to {config['rtol']:g}, {config['max_steps']} evaluations; {results['cpu_seconds']:.0f} CPU seconds.",
    )
    lines += study.paragraph(
        "Gain: the entries' standard deviation times √fan_in. ρ is the spectral radius of ∂f/∂z at z*, ‖J‖ its norm",
        "(f is non-expansive there if it is at most 1), both medians over sequences. Anderson and Broyden: evaluations",
        "from z = 0; Picard: solves that converge; converged: the share of the solves in training that did. *Italic*:",
        f"less than half of the solves of {config['measure_steps']} evaluations converged, so that z* is only the best",
        "iterate. Each pair is before → after training.",
    )
    head = [
        "LN",
        "weight norm",
        "ensemble",
        "gain",
        "ρ",
        "‖J‖",
        "Anderson",
        "Broyden",
        "Picard",
        "loss",
        "converged",
        "diverged at",
    ]
    lines += plots.markdown_table(head, [row_of(row) for row in results["rows"]])
    return "\n".join(lines)


def row_of(row: dict[str, Any]) -> list[Any]:
    before, after = row["before"], row["after"]

    def arrow(key: str, form: str, sure: str = "converged") -> str:
        told = ["–" if r[key] is None else form.format(r[key]) for r in (before, after)]
        told = [f"*{t}*" if not (r[sure] or 0) >= 0.5 else t for t, r in zip(told, (before, after), strict=True)]
        return " → ".join(told)

    return [
        row["layer_norm"],
        "on" if row["weight_norm"] else "off",
        row["ensemble"],
        f"{row['gain']:g}",
        arrow("radius", "{:.2f}"),
        arrow("stretch", "{:.1f}"),
        arrow("evaluations", "{:.0f}"),
        arrow("broyden", "{:.0f}", "broyden_converged"),
        " → ".join(f"{100 * (r['picard_converged'] or 0):.0f} %" for r in (before, after)),
        arrow("loss", "{:.2f}"),
        f"{100 * (row['training_converged'] or 0):.0f} %",
        "" if row["diverged_at"] is None else row["diverged_at"],
    ]


EDGE = 12.0  # of the panels of spectral radii: what is larger stands there
MARKS = {"Gaussian": "o", "orthogonal": "s", "symmetric": "^"}
NORM_COLOURS = {"post": "#0072B2", "pre": "#D55E00", "none": "0.4"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Spectral radius before and after training, and the loss, by gain; a panel for each."""
    plt = plots.plt
    panels = [
        ("before", "radius", "spectral radius at z*, before training"),
        ("after", "radius", "spectral radius at z*, after"),
        ("after", "loss", "validation loss after (nats/char)"),
    ]
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
        for panel, (when, key, label) in zip(axes, panels, strict=True):
            for row in results["rows"]:
                value = row[when][key]
                if value is None:
                    continue
                sure = (row[when]["converged"] or 0) >= 0.5
                colour = NORM_COLOURS[row["layer_norm"]]
                # Side by side: what shares a gain would hide each other.
                shift = 1 + 0.12 * (list(MARKS).index(row["ensemble"]) - 1) + (0.06 if row["weight_norm"] else 0)
                panel.plot(
                    row["gain"] * shift,
                    min(value, EDGE) if key == "radius" else value,
                    MARKS[row["ensemble"]],
                    ms=6,
                    color=colour,
                    mfc=colour if row["weight_norm"] and sure else "none",
                    alpha=1 if sure else 0.35,
                )
            panel.set(xscale="log", xlabel="gain: standard deviation × √fan_in", ylabel=label)
            gains = sorted({row["gain"] for row in results["rows"]})
            panel.set_xticks(gains, [f"{g:g}" for g in gains])
            panel.minorticks_off()
            if key == "radius":
                panel.axhline(1, color="0.6", lw=0.8, ls=":")
                panel.set_yscale("log")
                panel.set_ylim(0.6, EDGE * 1.15)
                panel.set_yticks([0.7, 1, 2, 5, EDGE], ["0.7", "1", "2", "5", f"≥ {EDGE:g}"])
                panel.minorticks_off()
        losses = [row["after"]["loss"] for row in results["rows"] if row["after"]["loss"] is not None]
        axes[2].set_ylim(min(losses) - 0.1, results["uniform_loss"] + 0.3)
        axes[2].axhline(results["uniform_loss"], color="0.6", lw=0.8, ls=":")
        for panel, title in zip(axes, findings(results), strict=True):
            panel.set_title(plots.fill(title))
        handles = [plt.Line2D([], [], color=c, marker="o", ls="", label=f"LN {n}") for n, c in NORM_COLOURS.items()]
        handles += [plt.Line2D([], [], color="0.2", marker=m, ls="", mfc="none", label=n) for n, m in MARKS.items()]
        handles += [
            plt.Line2D([], [], color="0.2", marker="o", ls="", label="filled: weight norm"),
            plt.Line2D([], [], color="0.2", marker="o", ls="", mfc="none", alpha=0.35, label="pale: no z* found"),
        ]
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
        note = f"{results['command']}; " + study.conditions(results, dtype=results["dtype"], seed=results["seed"])
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def findings(results: dict[str, Any]) -> tuple[str, str, str]:
    rows = results["rows"]
    post = [row for row in rows if row["layer_norm"] == "post"]
    sure = lambda row, when: row[when]["radius"] is not None and (row[when]["converged"] or 0) >= 0.5
    contractive = [row for row in post if sure(row, "before") and row["before"]["radius"] < 1]
    largest = max((row["gain"] for row in contractive), default=None)
    one = f"post-LN: spectral radius below 1 in {len(contractive)} of {len(post)} starts" + (
        f", up to gain {largest:g}" if largest else ""
    )
    grown = [row for row in post if sure(row, "before") and sure(row, "after")]
    more = sum(row["after"]["radius"] > row["before"]["radius"] for row in grown)
    two = f"training raised it in {more} of the {len(grown)} post-LN runs with a z* at both ends"
    failed = {
        name: sum(
            (r["after"]["converged"] or 0) < 0.5 or r["diverged_at"] is not None
            for r in rows
            if r["layer_norm"] == name
        )
        for name in NORM_COLOURS
    }
    of = {name: sum(r["layer_norm"] == name for r in rows) for name in NORM_COLOURS}
    three = "diverged or without z* after: " + ", ".join(
        f"LN {n} {failed[n]} of {of[n]}" for n in NORM_COLOURS if of[n]
    )
    return one, two, three


def main(args: Sequence[str] | None = None) -> None:
    study.run("initialization", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
