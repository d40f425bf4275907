"""What the runtime page times: the explicit networks, and the ways to train an equilibrium."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

import deq_jax as deq
from experiments.shared.models import FAMILIES, Shape, transformer_config
from experiments.training import lm_step
from experiments.training.baselines import TransformerStack, fitted, parameters


def stack(shape: Shape, layers: int) -> TransformerStack:
    return TransformerStack(transformer_config(shape), layers=layers, rngs=nnx.Rngs(0))


# By family: the explicit network whose layers have their own weights. A family without an entry is compared only with
# the weight-tied network, as the paper does for TrellisNet.
RIVALS: dict[str, Callable[[Shape, int], Any]] = {"DEQTransformer": stack}


# ---- contenders --------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """How a model is called in training. Inference uses the same without the adjoint."""

    own: bool  # each layer has its own weights: the explicit network, not the equilibrium's cell
    how: dict[str, Any]

    def call(self, model, tokens, history, probe=None, **options):
        if self.own:
            logits, history = model(tokens, history)
            return logits, history, {}
        logits, history, solution = model(tokens, history, probe=probe, **{**self.how, **options})
        # XLA drops unused outputs, so layers do not pay for measuring their last residual.
        unrolled = isinstance(self.how["adjoint"], deq.Unroll)
        return logits, history, {} if unrolled else lm_step.solve_metrics(solution.stats)


def contenders(config: Any, family: str) -> dict[str, Contender]:
    anderson = deq.Anderson(rtol=config.rtol, max_steps=config.max_steps, history=6)
    layers = dict(solver=deq.Picard(max_steps=config.layers), adjoint=deq.Unroll())
    table = {
        "tied layers": Contender(False, layers),
        "Implicit": Contender(False, dict(solver=anderson, adjoint=deq.Implicit(anderson))),
        "Phantom(5)": Contender(False, dict(solver=anderson, adjoint=deq.Phantom(steps=5, damping=0.8))),
        "JFB": Contender(False, dict(solver=anderson, adjoint=deq.JFB())),
    }
    return {"own layers": Contender(True, {})} | table if family in RIVALS else table


SHALLOW = Contender(False, dict(solver=deq.Picard(max_steps=2), adjoint=deq.Unroll()))


def rival_shape(config: Any, family: str) -> Shape:
    """The width at which `layers` layers, each four times as wide inside, have the equilibrium's parameter count."""
    shape, heads = config.shape, config.shape.heads
    at = lambda dim: dataclasses.replace(shape, dim=dim, inner_dim=4 * dim)
    build = lambda dim: RIVALS[family](at(dim), config.layers)
    step = heads if heads % 2 == 0 else 2 * heads
    return at(fitted(build, parameters(lambda: FAMILIES[family](shape)), range(step, 16 * shape.dim, step)))
