"""`word_lm ptb` from the first step to the last, then its perplexity on the test split.

The training loop saves when it is stopped, and the next run goes on from there.
"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from experiments.gpu import kept
from experiments.training import lm, lm_presets, lm_train

EVERY = 500  # steps between two rows of progress


def measure(rows: kept.Rows, job: kept.Job) -> None:
    config = dataclasses.replace(
        lm_presets.PRESETS["ptb"][1], run=Path(job.work, "ptb"), save_every=2000, log_every=100
    )
    if job.tiny:
        sizes: dict[str, Any] = dict(steps=4, batch=2, length=8, mem_len=8, dim=16, heads=2, inner_dim=32)
        config = dataclasses.replace(config, data="shakespeare", level="char", **sizes)
    rows.about(
        seed=config.seed, dtype=config.dtype, gradient=str(config.adjoint), solver=str(config.solver),
        precision="JAX's default: TF32 on recent cards", steps=config.steps, corpus=config.data,
    )  # fmt: skip

    def keep(step: int, state: Any) -> None:
        if step % EVERY == 0:
            rows.put("progress", {"step": step})

    trained = lm_train.train(config, "ptb", keep=keep)
    segments = lm.evaluation_segments(trained.corpus.test, lm_train.EVALUATION_BATCH, config.length)
    test = lm.make_evaluate(trained.graphdef, segments, config.solver)(trained.state.params)
    report = trained.report
    row = {
        "test_perplexity": math.exp(test.loss),
        "valid_perplexity": math.exp(report["valid_loss"]),
        "training_minutes": report["train_seconds"] / 60,
        "test_loss": test.loss,
        "test_solver_steps": test.steps,
        "test_converged": test.converged,
    }
    rows.put("ptb", row | {name: report[name] for name in ("parameters", "steps", "tokens")})
    shutil.rmtree(config.run)  # or it would fill the archive


if __name__ == "__main__":
    kept.main(measure)
