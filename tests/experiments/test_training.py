"""The compiled step, optimizer, metrics file and signals; the whole loop runs in test_checkpoints.py."""

import json
import os
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.loop import (
    count_params,
    graceful_signals,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)
from experiments.training.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("promotes")  # optax relies on it


def quadratic(params, probe, rest, batch, key, carry):
    """½‖w‖²·batch, whose gradient is w·batch; the carry counts segments, rest remembers the key."""
    loss = 0.5 * batch * jnp.sum(params["w"] ** 2)
    return loss, (rest | {"seen": key}, carry + batch, {"norm": jnp.linalg.norm(params["w"])})


def start(tx, w=(3.0, 4.0)):
    key = jax.random.key(5)
    return init_state({"w": jnp.asarray(w)}, tx, key, rest={"seen": key}, carry=jnp.zeros(()))


def test_a_step_follows_the_gradient_and_reports_it():
    tx = optax.sgd(0.1)
    state, metrics = make_train_step(quadratic, tx)(start(tx), 2.0)
    np.testing.assert_allclose(state.params["w"], [2.4, 3.2], rtol=1e-6)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 25.0,
        "norm": 5.0,
        "grad_norm": 10.0,
        "skipped": 0.0,
    }
    assert state.step == 1 and state.step.dtype == jnp.int32 and state.carry == 2.0
    expected = jax.random.fold_in(jax.random.key(5), 0)
    assert jnp.array_equal(jax.random.key_data(state.rest["seen"]), jax.random.key_data(expected))


def test_steps_are_compiled_once_without_transfers_and_donate():
    tx = make_optimizer(lr=0.1, warmup_steps=1, total_steps=9, clip=1.0)
    traces = []

    def counted(*args):
        traces.append(1)
        return quadratic(*args)

    train_step = make_train_step(counted, tx)
    state, batch = start(tx), jnp.asarray(1.0)
    state, metrics = train_step(state, batch)
    first = state
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, metrics = train_step(state, batch)
    assert len(traces) == 1
    assert first.params["w"].is_deleted()
    assert all(isinstance(value, jax.Array) and value.shape == () for value in metrics.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_without_a_finite_gradient_is_skipped(bad):
    tx = make_optimizer(lr=0.1, warmup_steps=0, total_steps=10, clip=1.0)
    train_step = make_train_step(quadratic, tx)
    before, _ = train_step(start(tx), 1.0)
    kept = jax.tree.map(lambda leaf: np.asarray(leaf), (before.params, before.opt_state, before.carry))
    after, metrics = train_step(before, bad)
    assert metrics["skipped"] == 1 and after.step == 2
    jax.tree.map(np.testing.assert_array_equal, kept, (after.params, after.opt_state, after.carry))
    after, metrics = train_step(after, 1.0)
    assert metrics["skipped"] == 0 and np.all(np.isfinite(after.params["w"]))

    unguarded, metrics = make_train_step(quadratic, optax.sgd(0.1), guard=False)(start(optax.sgd(0.1)), np.nan)
    assert metrics["skipped"] == 0 and np.all(np.isnan(unguarded.params["w"]))


class Probe(NamedTuple):
    steps: jax.Array
    residual: jax.Array
    status: jax.Array


@jax.custom_vjp
def solve(w, probe):
    return w


solve.defvjp(
    lambda w, probe: (w, None),
    lambda _, g: (g, Probe(jnp.array([4.0, 6.0]), jnp.array([0.1, 0.3]), jnp.array([0.0, 2.0]))),
)


def test_the_probes_cotangent_becomes_metrics():
    def loss_fn(params, probe, rest, batch, key, carry):
        return quadratic({"w": solve(params["w"], probe)}, None, rest, batch, key, carry)

    tx = optax.sgd(0.1)
    probe = Probe(*[jnp.zeros(2)] * 3)
    state, metrics = make_train_step(loss_fn, tx, probe=probe)(start(tx), 2.0)
    np.testing.assert_allclose(state.params["w"], [2.4, 3.2], rtol=1e-6)
    assert metrics["bwd_steps"] == 5 and metrics["bwd_status"] == 2 and metrics["bwd_converged"] == 0.5
    np.testing.assert_allclose(metrics["bwd_residual"], 0.2, rtol=1e-6)
    _, metrics = make_eval_step(loss_fn, probe=probe)(start(tx), 2.0)
    assert metrics.keys() == {"loss", "norm"}


def test_evaluation_changes_the_carry_alone():
    tx = optax.sgd(0.1)
    state = start(tx)
    after, metrics = make_eval_step(quadratic)(state, 2.0)
    assert metrics["loss"] == 25.0 and after.carry == 2.0 and state.carry == 0.0
    assert after._replace(carry=state.carry) == state  # the very same arrays


def test_the_initial_state_shares_no_buffer_with_the_caller():
    tx = optax.sgd(0.1)
    params, key = {"w": jnp.ones(3)}, jax.random.key(0)
    state = init_state(params, tx, key, rest={"seen": key}, carry=jnp.zeros(()))
    make_train_step(quadratic, tx)(state, 1.0)
    assert not params["w"].is_deleted() and not key.is_deleted()


def test_the_learning_rate_warms_up_from_the_first_step_and_decays_to_zero():
    tx = make_optimizer(lr=0.5, warmup_steps=4, total_steps=12, clip=1.0)
    train_step = make_train_step(quadratic, tx)
    state, rates = start(tx), []
    for _ in range(13):
        state, metrics = train_step(state, 1.0)
        rates.append(float(metrics["lr"]))
    np.testing.assert_allclose(rates[:5], [0.125, 0.25, 0.375, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates[8], 0.25, rtol=1e-6)  # half of the decay
    assert rates[11] > rates[12] == 0
    with pytest.raises(ValueError, match="expected 0 <= warmup_steps < total_steps, got 5 and 5"):
        make_optimizer(lr=0.5, warmup_steps=5, total_steps=5, clip=1.0)


def test_the_optimizer_is_adam_with_clipping_and_decay_of_matrices():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = {"w": 30.0 * jnp.ones((2, 2)), "b": jnp.zeros(2)}
    tx = make_optimizer(lr=0.1, warmup_steps=0, total_steps=100, clip=1.0, weight_decay=0.01)
    oracle = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.01))
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = oracle.update(grads, oracle.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], jnp.zeros(2))


def test_the_gradient_norm_of_low_precision_parameters_does_not_overflow():
    tx = optax.sgd(1e-3)
    state = start(tx, jnp.full(4, 300.0, jnp.float16))
    _, metrics = make_train_step(lambda p, *rest: quadratic({"w": p["w"] * 1e-1}, *rest), tx)(state, 1.0)
    assert metrics["grad_norm"].dtype == jnp.float32 and metrics["skipped"] == 0


def test_count_params():
    assert count_params({"w": jnp.ones((3, 4)), "b": (jnp.ones(5), None)}) == 17


def write_lines(path, steps, tokens_per_step=None, after=0):
    with MetricsLog(path, after=after, tokens_per_step=tokens_per_step) as log:
        return [log.write(step, {"loss": jnp.float32(step)}) for step in steps]


def test_the_metrics_file_has_one_flushed_dict_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, after=0, tokens_per_step=100) as log:
        line = log.write(10, {"loss": jnp.float32(0.5), "skipped": jnp.int32(0), "text": np.float64("inf")})
        assert [json.loads(text) for text in path.read_text().splitlines()] == [line]
    assert line["step"] == 10 and line["loss"] == 0.5 and line["skipped"] == 0 and line["text"] == np.inf
    assert line["seconds"] >= 0 and line["tokens_per_second"] > 0


def test_a_resume_drops_the_lines_it_will_write_again_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2, 3, 4])
    whole = path.read_bytes().splitlines(keepends=True)
    foreign = b"not \xff json\n"
    path.write_bytes(whole[0] + foreign + b"".join(whole[1:]) + b'{"step": 1, "lo')
    seconds = write_lines(path, [3], after=2)[0]["seconds"]
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[:3] == [whole[0], foreign, whole[1]] and json.loads(lines[3])["step"] == 3 and len(lines) == 4
    assert seconds >= json.loads(whole[1])["seconds"]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_the_metrics_file_is_not_rewritten_without_need(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2])
    before = path.stat().st_ino, path.read_bytes()
    write_lines(path, [], after=2)
    assert (path.stat().st_ino, path.read_bytes()) == before


def test_a_signal_becomes_a_flag_and_the_handlers_come_back(capfd, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with graceful_signals() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(SystemExit) as left:
            stop.exit(tmp_path / "7")
    assert left.value.code == 143
    assert f"SIGTERM: saved {tmp_path / '7'}; the same command continues from there" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
