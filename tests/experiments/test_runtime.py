"""Options that change nothing but how a run is executed: caches, traces, and what the log says of the devices."""

import json
import types

import jax
import numpy as np
import pytest

from experiments.paper.char_lm import main
from experiments.training import data, lm, lm_train, utilization
from experiments.training.lm_model import Config

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")

OPTIONS = (
    "--steps 4 --shallow-share 0.25 --batch 4 --length 16 --mem-len 16 --dim 32 --inner-dim 64 --log-every 1 "
    "--eval-every 100 --save-every 2"
).split()


def test_caches_and_a_trace_change_no_number(tmp_path, monkeypatch):
    corpus, text = data.load("shakespeare"), tmp_path / "text.txt"
    text.write_text(corpus.vocabulary.decode(corpus.train[:6000]))
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_options.update({name: value}))
    set_options = {}
    folders = ["--token-cache", str(tmp_path / "tokens"), "--compilation-cache", str(tmp_path / "programs")]
    main(["train", "--run", str(tmp_path / "plain"), "--data", str(text), *OPTIONS])
    for name in ("first", "second"):  # the second maps what the first has kept
        main(["train", "--run", str(tmp_path / name), "--data", str(text), *OPTIONS, *folders, "--profile", "1"])
    lines = lambda name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in lines(name)] for name in ("plain", "first", "second")]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 4
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 1
    assert set_options == {"jax_compilation_cache_dir": str(tmp_path / "programs")}
    assert list((tmp_path / "first/profile").rglob("perfetto_trace.json.gz"))
    # A save is in the line after it.
    assert [line["step"] for line in lines("plain") if "save_seconds" in line] == [3]
    assert all("evaluations_per_second" in line and "mfu" not in line for line in lines("plain")[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "-1"], "--profile must be at least 0, got -1"),
        (["--token-cache", __file__], "--token-cache must be a folder, got "),
        (["--compilation-cache", __file__], "--compilation-cache must be a folder, got "),
    ],
)
def test_bad_options_are_named(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["train", "--run", str(tmp_path / "run"), *options])
    assert message in f"{refused.value}{capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_the_operations_of_an_evaluation_are_those_of_its_products(tmp_path):
    config = Config(run=tmp_path, batch=4, length=32, mem_len=32, dim=64, inner_dim=256)
    corpus = lm.load_corpus(config.data, level=config.level)
    graphdef, state = lm_train.start_state(config, corpus.vocabulary)
    batch = data.segments(corpus.train, config.batch, config.length)[0]
    columns, seen, dim = config.batch * config.length, config.length + config.mem_len, config.dim
    # Queries, keys, values and output; the two layers inside; two kinds of scores, and the sum of values.
    products = 2 * columns * (4 * dim**2 + 2 * dim * config.inner_dim + 3 * seen * dim)
    counted = utilization.evaluation_flops(graphdef, state, batch)
    assert products < counted < 1.05 * products


def test_the_peak_of_a_device_is_known_by_its_kind(monkeypatch):
    def on(kind, dtype="float32"):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        return utilization.peak(dtype)

    assert on("NVIDIA H100 80GB HBM3") == 8 * 494.7e12 and on("NVIDIA H100 80GB HBM3", "bfloat16") == 8 * 989.4e12
    assert on("TPU v5 lite") == 8 * 197e12 and on("TPU v5") == 8 * 459e12 and on("cpu") is None


def test_the_log_has_the_share_of_the_peak():
    meter = lm.Meter(64)
    meter.utilized = 1e-3
    meter.start()
    meter.add({"loss": np.float32(1), "fwd_steps": np.float32(9), "bwd_steps": np.float32(6)})
    line = meter.line()
    assert line["mfu"] == pytest.approx(1e-3 * line["evaluations_per_second"], abs=1e-4)
