"""The parts of a training loop: state, optimizer, compiled step, metrics file and signals.

There is no trainer: an experiment writes its own `for` and calls these functions. A whole loop, which can be
killed at any moment and continues bit for bit (on CPU) when the same command is given again:

```python
def main(config, path):
    tx = make_optimizer(lr=config.lr, warmup_steps=2, total_steps=config.steps, clip=1.0)
    train_step = make_train_step(loss_fn, tx)
    with graceful_signals() as stop, RunDirectory(path, config, harmless={"save_every"}) as run:
        state, _ = run.restore(init_state(init_params(config), tx, jax.random.key(config.seed)))
        start = int(state.step)
        with MetricsLog(run.metrics_path, after=start) as log:
            for step in range(start, config.steps):
                state, metrics = train_step(state, batch_at(config, step))
                log.write(step + 1, metrics)  # waits for the device: every 10th step or so in earnest
                if stop.signum or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                    run.save(step + 1, state)
                if stop.signum:
                    stop.exit(run.wait())
    return state
```

The signals go outermost, so that a Ctrl-C cannot interrupt the last save; a batch is a function of the step,
so that the step is all there is to remember of the data.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree


class TrainState(NamedTuple):
    """Everything that the next step depends on: what is not in here is forgotten by a resume."""

    step: Int[Array, ""]  # steps taken
    params: PyTree  # what is differentiated
    rest: PyTree  # the model's other state: batch statistics, dropout counters
    opt_state: PyTree
    key: Key[Array, ""]  # constant: a step's own key is fold_in(key, step)
    carry: PyTree  # from segment to segment: the detached history of a language model


def init_state(params: PyTree, tx, key: Key[Array, ""], *, rest: PyTree = (), carry: PyTree = ()) -> TrainState:
    """The state before the first step, in buffers of its own: a train step donates them."""
    state = TrainState(jnp.zeros((), jnp.int32), params, rest, tx.init(params), key, carry)
    return jax.tree.map(jnp.copy, state)


def make_optimizer(
    *, lr: float, warmup_steps: int, total_steps: int, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam with global-norm clipping, linear warm-up and cosine decay to 0 at `total_steps`.

    `weight_decay` is decoupled (AdamW) and acts on matrices and larger only, not on biases and gains. The
    learning rate of the last update stands in the state under `learning_rate`.

    ```python
    tx = make_optimizer(lr=3e-4, warmup_steps=100, total_steps=10_000, clip=0.25)
    opt_state = tx.init({"w": jnp.zeros((3, 2))})
    ```
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}")

    def schedule(count):
        # The first update already moves (count is 0 there): a warm-up from 0 would waste it.
        warmup = jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))
        progress = jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        return lr * warmup * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, mask=functools.partial(jax.tree.map, lambda p: p.ndim > 1)),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule),
    )


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    probe: PyTree = None,
    guard: bool = True,
    place: Callable[[TrainState], TrainState] = lambda state: state,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One compiled optimizer step `(state, batch) -> (state, metrics)`; it donates its state and never waits.

    `loss_fn(params, probe, rest, batch, key, carry) -> (loss, (rest, carry, metrics))`, where `metrics` is a
    dict of scalars. To these come `loss`, `grad_norm` (before clipping), `skipped`, `lr` if `tx` has one,
    and, when a `probe` is given, its cotangent: the backward solver's statistics as `bwd_steps`,
    `bwd_residual` (means over problems), `bwd_status` (the worst code) and `bwd_converged` (the share of code 0).

    With `guard`, a step whose gradient is not finite (or too large for its norm to be) sets `skipped` to 1
    and changes nothing but the step counter. The carry is kept too: one NaN in it would spoil every later
    step. `place` holds the new state to the shardings of the old one.

    ```python
    train_step = make_train_step(loss_fn, tx, probe=deq.Probe.zeros((batch_size,)))
    state, metrics = train_step(state, batch)  # the old state's buffers are gone
    ```
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (rest, carry, metrics)), (grads, backward) = value_and_grad(
            state.params, probe, state.rest, batch, key, state.carry
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step, params, rest, opt_state, state.key, carry)

        grad_norm = _global_norm(grads)
        skipped = ~jnp.isfinite(grad_norm) if guard else jnp.asarray(False)
        if guard:
            new = jax.tree.map(functools.partial(jnp.where, skipped), state, new)
        metrics = {"loss": loss, **metrics, "grad_norm": grad_norm, "skipped": skipped.astype(jnp.int32)}
        metrics |= _learning_rate(opt_state) | _backward_metrics(backward)
        return place(new._replace(step=state.step + 1)), metrics

    return train_step


def make_eval_step(
    loss_fn: Callable, *, probe: PyTree = None
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """The compiled loss alone, `(state, batch) -> (state, metrics)`, where only `carry` is new.

    Nothing is donated. `loss_fn` as for `make_train_step`; give it the model in evaluation mode. The key
    depends on the step alone, so two evaluations of one state agree.

    ```python
    held_out = state._replace(carry=empty_history)
    held_out, metrics = make_eval_step(loss_fn)(held_out, batch)
    ```
    """

    @jax.jit
    def evaluate(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        loss, (_, carry, metrics) = loss_fn(state.params, probe, state.rest, batch, key, state.carry)
        return carry, {"loss": loss, **metrics}

    def eval_step(state: TrainState, batch):
        carry, metrics = evaluate(state, batch)
        return state._replace(carry=carry), metrics

    return eval_step


def count_params(params: PyTree) -> int:
    """The number of scalars in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class StopRequest:
    """Which signal has asked the loop to stop (`signum`, None until one comes)."""

    signum: int | None = None

    def exit(self, saved: Path) -> NoReturn:
        """Leave with the signal's exit code (130 or 143), and a line that says where the checkpoint is."""
        assert self.signum is not None
        name = signal.Signals(self.signum).name
        print(f"{name}: saved {saved}; the same command continues from there", file=sys.stderr, flush=True)
        raise SystemExit(128 + self.signum)


@contextlib.contextmanager
def graceful_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM as a flag that the loop reads at a step boundary; a second Ctrl-C ends at once.

    ```python
    with graceful_signals() as stop:
        while not stop.signum: ...
    ```
    """
    stop = StopRequest()

    def request(signum, frame):
        stop.signum = signum
        # The default action needs no interpreter: it also ends a process that is inside a compiled step.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: a handler may come in the middle of one.
        os.write(2, b"\nstopping after this step; Ctrl-C again ends at once, without saving\n")

    previous = {signum: signal.signal(signum, request) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _global_norm(grads: PyTree) -> Float[Array, ""]:
    # float32: the squares of a float16 or bfloat16 gradient overflow or vanish.
    squares = [jnp.sum(jnp.square(jnp.abs(g).astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _learning_rate(opt_state: PyTree) -> dict[str, Array]:
    # The name occurs twice in the state: once as the number, once as the schedule's own counter.
    lr = optax.tree_utils.tree_get(
        opt_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return {} if lr is None else {"lr": lr}


def _backward_metrics(cotangent: PyTree) -> dict[str, Array]:
    metrics = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cotangent):
        field = jax.tree_util.keystr(path, simple=True, separator="_")
        if not field.endswith("status"):
            metrics[f"bwd_{field}"] = jnp.mean(leaf)
            continue
        metrics[f"bwd_{field}"] = jnp.max(leaf)
        metrics[f"bwd_{field.removesuffix('status')}converged"] = jnp.mean(leaf == 0)  # Status.CONVERGED is 0
    return metrics
