"""Does the input keep up? Tokens a second with the corpus over those with one batch that is already on the devices.

    python -m experiments.studies.input_speed                # two minutes on two cores; nothing is written
    python -m experiments.studies.input_speed --mesh data=8  # on so many devices

Rounds of both alternate in one process, each ends when the devices have; printed are the medians, and that of the
ratios. The loop does not wait for a step, so on an accelerator a batch is made while the step before it runs: what the
host needs for one is printed beside a step's time.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import tyro

from experiments.training import data, lm, lm_train
from experiments.training.lm_model import Config as Training
from experiments.training.mesh import Placement


@dataclasses.dataclass(frozen=True)
class Config:
    corpus: str = "shakespeare"
    batch: int = 32
    length: int = 64
    dim: int = 64
    inner_dim: int = 256
    mesh: str = ""
    rounds: int = 15
    steps: int = 8  # a round


def main(config: Config = Config()) -> None:  # noqa: B008
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            run=Path(folder), data=config.corpus, mesh=config.mesh, batch=config.batch, length=config.length,
            mem_len=config.length, dim=config.dim, inner_dim=config.inner_dim,
        )  # fmt: skip
    corpus, placement = lm.load_corpus(training.data, level=training.level), Placement.over(training.mesh)
    batches = data.segments(corpus.train, training.batch, training.length, seed=training.seed)
    graphdef, state = lm_train.start_state(training, corpus.vocabulary, placement)
    constant = placement.batch(batches[0])
    step = lm_train.make_steps(training, graphdef, state, placement)[1].lower(state, constant).compile()
    seconds: dict[str, list[float]] = {"corpus": [], "constant": []}
    for k in range(config.rounds + 1):
        for name, times in seconds.items():
            state = jax.block_until_ready(state)
            began = time.perf_counter()
            for i in range(k * config.steps, (k + 1) * config.steps):
                state, _ = step(state, placement.batch(batches[i]) if name == "corpus" else constant)
            jax.block_until_ready(state)
            if k:  # the first round warms up
                times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for i in range(100):
        jax.block_until_ready(placement.batch(batches[i]))
    host = 10 * (time.perf_counter() - began)
    tokens = config.steps * training.batch * training.length
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(c / r for r, c in zip(seconds["corpus"], seconds["constant"], strict=True))
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}, {config.rounds} rounds")
    print(", ".join(f"{name} {value:,.0f} tokens/s" for name, value in speed.items()), f"ratio {ratio:.3f}", sep="; ")
    print(f"a batch takes the host {host:.2f} ms, a step {1e3 * tokens / config.steps / speed['constant']:.0f} ms")


if __name__ == "__main__":
    main(tyro.cli(Config))
