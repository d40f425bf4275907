"""A language model as an experiment configures it: its options, the model, its loss."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

import deq_jax as deq
from deq_jax.models import DEQTransformer, DEQTrellisNet, TransformerConfig, TrellisNetConfig
from experiments.training import cli, lm_step, mesh, tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """A DEQ-Transformer on Tiny Shakespeare: about 6 minutes on two CPU cores, validation loss 1.82 nats.

    python -m experiments.paper.char_lm train

    The same command on the same run directory resumes bit for bit. `adjoint:unroll` with `solver:picard
    --solver.max-steps 12` is the weight-tied network of 12 layers on the same parameters.
    """

    run: Path = Path("runs/char_lm")  # where checkpoints, metrics and figures go; resumed if it is there
    data: str = "shakespeare"  # a corpus of experiments.training.data, or a text file or a directory of yours
    data_dir: Path | None = None  # where corpora lie; default $DEQ_JAX_DATA or ~/.cache/deq_jax
    level: Literal["char", "word"] = "char"
    model: Literal["transformer", "trellisnet"] = "transformer"
    steps: int = 1600
    shallow_share: float = 0.625  # of the steps, first, through an unrolled network: the paper's warm-up
    shallow_depth: int = 2  # of this many layers
    batch: int = 16
    length: int = 64  # of a segment, in tokens
    mem_len: int = 64  # columns of history; a TrellisNet has one
    dim: int = 128  # of a TrellisNet, its channels that are not decoded
    heads: int = 4
    inner_dim: int = 512
    output_dim: int = 0  # of a TrellisNet, its decoded channels, and the embedding's width; 0: as dim
    modern: bool = False  # a transformer with rotary positions, RMSNorm and a gated feed-forward part
    cutoffs: tuple[int, ...] = ()  # of an adaptive embedding and softmax, in ids; (): plain ones
    div_val: int = 1  # the rows of each cluster are this many times narrower
    dropout: float = 0.0  # of embedding and output, one mask for all times
    hidden_dropout: float | None = None  # inside the cell; None: as dropout
    embedding_dropout: float = 0.0  # of whole words; TrellisNet
    weight_dropout: float = 0.0  # of the convolutions' weights in time; TrellisNet
    pre_norm: bool = False
    embedding_std: float = 0.05  # of a TrellisNet, √3 times this is the bound of a uniform draw
    init_std: float | None = None  # of the cell's kernels; None: U(±1/√fan_in)
    lr: float = 2e-3
    warmup_share: float = 0.03125  # of the steps, first, with a rising learning rate
    clip: float = 1.0  # of the gradient's global norm
    weight_decay: float = 0.0
    aux_every: int = 0  # layers (or steps of the solver) whose output has a loss too; 0: none; TrellisNet
    aux_weight: float = 0.05  # of each of these losses
    jacobian_weight: float = 0.0  # of the penalty on the Jacobian's norm at the equilibrium, after the warm-up
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the state; parameters are float32
    mesh: str = ""  # of devices, as data=2,fsdp=2,model=2,seq=1 or some of these; see experiments.training.mesh
    seed: int = 0
    log_every: int = 20
    eval_every: int = 400  # on the first segments of the validation split; the whole of it at the end
    save_every: int = 200
    solver: cli.SolverOption = deq.Anderson(**cli.FORWARD, history=6)
    adjoint: cli.AdjointOption = deq.Implicit(deq.Anderson(**cli.BACKWARD, history=6))

    def __post_init__(self):
        for name in ("steps", "shallow_depth", "log_every", "eval_every", "save_every"):
            cli.require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("shallow_share", "warmup_share"):
            cli.require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        for name in ("lr", "clip"):
            cli.require(0 < getattr(self, name) < math.inf, name, "positive and finite", getattr(self, name))
        for name in ("weight_decay", "jacobian_weight", "aux_weight"):
            cli.require(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite", getattr(self, name))
        # Clusters are of frequency, and the ids of characters are in the order of the alphabet.
        cli.require(not self.cutoffs or self.level == "word", "cutoffs", "left out with --level char", self.cutoffs)
        cli.require(self.aux_every >= 0, "aux_every", "at least 0", self.aux_every)
        if self.mesh:
            model = ("model",)
            widths = (
                {"dim": (self.dim, ("fsdp",)), "heads": (self.heads, model), "inner_dim": (self.inner_dim, model)}
                if self.model == "transformer"
                else {"dim": (self.dim, ("fsdp", "model")), "output_dim": (self.output_dim or self.dim, model)}
            )
            mesh.check(self.mesh, batch=(self.batch, mesh.BATCH), length=(self.length, ("seq",)), **widths)
        # An option that the model does not have would otherwise be ignored in silence.
        foreign = {
            "transformer": ("output_dim", "embedding_dropout", "weight_dropout", "aux_every"),
            "trellisnet": ("modern", "pre_norm"),
        }[self.model]
        for name in foreign:
            cli.require(not getattr(self, name), name, f"left out with --model {self.model}", getattr(self, name))

    # Shares, so that a run of 20 steps or of 100,000 has all three phases: the last step is never a warm-up's.

    @property
    def shallow_steps(self) -> int:
        return min(round(self.shallow_share * self.steps), self.steps - 1)

    @property
    def warmup_steps(self) -> int:
        return min(round(self.warmup_share * self.steps), self.steps - 1)


def build(config: Config, vocabulary: tokenizer.Vocabulary) -> DEQTransformer | DEQTrellisNet:
    hidden_dropout = config.dropout if config.hidden_dropout is None else config.hidden_dropout
    common: dict[str, Any] = dict(
        vocab_size=len(vocabulary),
        hidden_dropout=hidden_dropout,
        init_std=config.init_std,
        cutoffs=config.cutoffs,
        div_val=config.div_val,
    )
    options: dict[str, Any] = dict(
        solver=config.solver,
        adjoint=config.adjoint,
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(config.seed),
    )
    if config.model == "trellisnet":
        trellisnet = TrellisNetConfig(
            **common,
            hidden_dim=config.dim,
            output_dim=config.output_dim or config.dim,
            input_dropout=config.dropout,
            output_dropout=config.dropout,
            embedding_dropout=config.embedding_dropout,
            weight_dropout=config.weight_dropout,
            embedding_range=math.sqrt(3) * config.embedding_std,
        )
        return DEQTrellisNet(trellisnet, **options)
    transformer = TransformerConfig(
        **common,
        dim=config.dim,
        heads=config.heads,
        inner_dim=config.inner_dim,
        mem_len=config.mem_len,
        io_dropout=config.dropout,
        pre_norm=config.pre_norm,
        embedding_std=config.embedding_std,
        rotary=config.modern,
        rms_norm=config.modern,
        gated=config.modern,
    )
    return DEQTransformer(transformer, **options)


def loss_fn(
    graphdef: Any,
    solver: deq.Solver,
    adjoint: Any,
    params: PyTree,
    probe: deq.Probe | None,
    rest: PyTree,
    batch: Any,
    key: Array,
    carry: PyTree,
    *,
    jacobian_weight: float = 0.0,
    aux_every: int = 0,
    aux_weight: float = 0.0,
    by_tokens: Callable[[Callable], Callable] = lambda nll: nll,
) -> tuple[Array, tuple]:
    """The mean cross entropy of a `data.Segment` in nats, with the detached history of the segment before.

    With a weight, that many times the Jacobian penalty is added, and the auxiliary losses of a TrellisNet; `loss` in
    the metrics is without them. `by_tokens` says how the losses of tokens are computed, see `mesh.Placement`.
    """
    model = nnx.merge(graphdef, params)
    nll = by_tokens(lambda params, hidden, targets: nnx.merge(graphdef, params).nll(hidden, targets))
    mean = lambda hidden: jnp.mean(nll(params, hidden, batch.targets))
    before = lm_step.forget_at_start(carry, batch.is_start)
    options = {"aux_every": aux_every} if aux_every else {}
    out = model.hidden(batch.inputs, before, key=key, solver=solver, adjoint=adjoint, probe=probe, **options)
    solution = out.solution
    loss = mean(out.hidden)
    # What nobody reads XLA drops: an unrolled network is not charged for measuring its last residual.
    metrics = {} if isinstance(adjoint, deq.Unroll) else lm_step.solve_metrics(solution.stats)
    if jacobian_weight:
        context, noise = model.context(batch.inputs, before, key=key), jax.random.fold_in(key, 1)
        penalty = deq.regularizers.jacobian_penalty(model.cell.f, solution.value, context, key=noise)
        metrics |= {"loss": loss, "jacobian_penalty": penalty}
        loss = loss + jacobian_weight * penalty
    if aux_every and out.auxiliary:
        auxiliary = sum(mean(hidden) for hidden in out.auxiliary)
        metrics = {"loss": loss, "aux_loss": auxiliary / len(out.auxiliary)} | metrics
        loss = loss + aux_weight * auxiliary
    return loss, (rest, out.history, metrics)
