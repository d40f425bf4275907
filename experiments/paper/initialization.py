"""How the scale, ensemble and norms of the initialization matter, before and after training (reviewer 2).

python -m experiments.paper.initialization reduced
python -m experiments.paper.initialization figure
python -m experiments.paper.initialization paper
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
from experiments.paper.initialization_report import draw, table
from experiments.shared import study
from experiments.shared.numerics import stretch
from experiments.training import data, lm
from experiments.training.loop import init_state, make_train_step

# The gain of every kernel: the standard deviation of its entries times √fan_in. At the paper's fan-in of 700,
# N(0, 0.01) of the released code is 0.26, uniform ±1/√fan_in, from which the code starts with weight norm, is 0.58, and
# N(0, 0.05) of the paper's text is 1.32.
GAINS = (0.26, 0.58, 1.32, 2.6)
ENSEMBLES = ("Gaussian", "orthogonal", "symmetric")


@dataclasses.dataclass(frozen=True)
class Config:
    """Spectral radius and evaluations before and after training, by initialization, and whether training diverged.

    python -m experiments.paper.initialization reduced

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
    measure_steps: int = 100  # the budget of the measured solves, before and after training
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


# ---- initialization ----------------------------------------------------------------------------------------


def initialize(params: PyTree, ensemble: str, gain: float, key: Key[Array, ""]) -> PyTree:
    """The same parameters with the cell's kernels redrawn: entries of mean square gain²/fan_in in every ensemble."""
    cell = dict(params["cell"])
    dim, inner = cell["inner"]["kernel"].shape
    q, k, v, out, ff, positions = jax.random.split(key, 6)
    three = [matrix(ensemble, key, dim, dim) for key in (q, k, v)]
    W1 = matrix(ensemble, ff, dim, inner)
    # Symmetric means that W₂W₁ is: W₂ = W₁ᵀ up to the scale of its own fan-in.
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


# ---- one program per layer norm and weight norm --------------------------------------------------------------


def programs(config: Config, vocabulary: int, layer_norm: str, weight_norm: bool):
    """(params, step, look): fresh parameters, a compiled training step, a compiled measurement."""
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


def measure(config: Config, cells: study.Cells) -> dict[str, Any]:
    corpus = lm.load_corpus(config.data, level="char")
    batches = data.segments(corpus.train, config.batch, config.length, seed=config.seed)
    held_out = lm.evaluation_segments(corpus.valid, config.batch, config.length)[0]
    rows = []
    for layer_norm, weight_norm in itertools.product(config.layer_norms, config.weight_norms):
        compiled: list[Any] = []  # filled when a cell is missing

        def one(ensemble: str, gain: float) -> dict[str, Any]:
            if not compiled:
                compiled.append(programs(config, len(corpus.vocabulary), layer_norm, weight_norm))
            fresh, tx, step, look = compiled[0]
            params = initialize(fresh, ensemble, gain, jax.random.key(config.seed + 1))
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
    """The first step whose gradient was not finite, or after which the loss stayed above its initial value."""
    wrong = bad.astype(bool) | ~np.isfinite(loss)
    if wrong.any():
        return int(np.argmax(wrong))
    above = loss > loss[0] + 0.5
    if not above[-10:].all():
        return None
    return int(len(loss) - np.argmin(above[::-1])) if not above.all() else 0


def main(args: Sequence[str] | None = None) -> None:
    study.run("paper.initialization", PRESETS, measure, table, draw, args, description=__doc__)


if __name__ == "__main__":
    main()
