"""The language-model experiments, end to end on a tiny model: train, die, resume, sample, demo.

Run as a script, this file is the run that dies: `test_char_lm.py DIRECTORY TEXT SIGNAL STEP`.
"""

import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import deq_jax as deq
from experiments.paper import char_lm, word_lm
from experiments.training import cli, data, generation, lm, lm_model, lm_presets, lm_train, tokenizer
from experiments.training.checkpoints import config_to_json
from experiments.training.lm_model import Config

pytestmark = pytest.mark.usefixtures("promotes")  # optax and the loop rely on it

ROOT = Path(__file__).resolve().parents[2]
TINY = Config(
    steps=60,
    shallow_share=0.25,
    batch=4,
    length=16,
    mem_len=8,
    dim=16,
    heads=2,
    inner_dim=32,
    lr=2e-2,
    warmup_share=1 / 30,
    log_every=15,
    eval_every=30,
    save_every=15,
)


def options(config: Config) -> list[str]:
    """The command line that gives `config`, but for its solver and adjoint."""
    changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    names = [name for name in changed if changed[name] != defaults[name] and name not in ("solver", "adjoint")]
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(changed[name]))]


OPTIONS = options(TINY)


def tiny(run, text, **changes) -> Config:
    return dataclasses.replace(TINY, run=run, data=str(text), **changes)


def die(run, text, name, at):
    """Train, and send this process a signal when it asks for the batch of step `at`."""
    healthy = data.Segments.__getitem__

    def dying(segments, step):
        if step == at:
            while not (Path(run) / "checkpoints/30/manifest.json").exists():
                time.sleep(0.01)  # a save goes on behind the steps
            os.kill(os.getpid(), signal.Signals[name])
        return healthy(segments, step)

    data.Segments.__getitem__ = dying
    lm_train.train(tiny(Path(run), text))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Each program is compiled once for this file; to compile takes most of its time."""
    directory = tmp_path_factory.mktemp("cache")
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """About 4,000 characters in which much can be predicted."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["to be", "or not", "that is", "the question\n"]
    file.write_text(" ".join(words[i] for i in rng.integers(4, size=500)))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "whole"


@pytest.fixture(scope="module")
def trained(run, text) -> lm_train.Trained:
    return lm_train.train(tiny(run, text))


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_and_its_log_says_how(trained, run):
    log = read_log(run)
    assert [line["step"] for line in log] == [15, 30, 45, 60]
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert not [name for name in log[0] if name.startswith(("fwd", "bwd"))], "the warm-up has no solver"
    for line in log[1:]:
        assert 1 < line["fwd_steps"] <= line["fwd_steps_max"] <= TINY.solver.max_steps
        assert 1 < line["bwd_steps"] <= TINY.adjoint.solver.max_steps
        assert 0 < line["fwd_residual"] < 0.1 and 0 <= line["converged"] <= 1 and line["skipped"] == 0
        assert 0 < line["bwd_residual"] < 0.1 and 0 <= line["bwd_converged"] <= 1
    assert "valid_loss" in log[1] and "valid_loss" not in log[2]
    assert log[0]["train_seconds"] < log[-1]["train_seconds"] <= log[-1]["seconds"]

    report = trained.report
    assert report["valid_tokens"] == len(trained.corpus.valid) - 1
    assert report["valid_bits_per_char"] == pytest.approx(report["valid_loss"] / np.log(2))
    assert report["steps"] == 60 and report["tokens"] == 60 * 4 * 16 and report["temp_bytes"] > 0


def test_a_finished_run_is_measured_again_with_the_same_result(trained, run, text):
    before = (run / "metrics.jsonl").read_bytes()
    again = lm_train.train(tiny(run, text))
    assert again.report["valid_loss"] == trained.report["valid_loss"]
    assert again.report["train_seconds"] == trained.report["train_seconds"]
    assert (run / "metrics.jsonl").read_bytes() == before


def spawn(*args, cache) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name, code, resumed_from", [("SIGKILL", -9, 30), ("SIGTERM", 143, 33)])
def test_a_stopped_run_resumes_bit_for_bit(trained, run, text, name, code, resumed_from, tmp_path, cache, capsys):
    process = spawn(tmp_path / "run", text, name, 32, cache=cache)
    assert process.returncode == code, process.stderr
    if name == "SIGTERM":
        assert f"saved {tmp_path / 'run' / 'checkpoints' / '33'}; the same command continues" in process.stderr
    resumed = lm_train.train(tiny(tmp_path / "run", text))
    assert f"from step {resumed_from};" in capsys.readouterr().out
    assert resumed.state.step == 60
    whole = (trained.state.params, trained.state.opt_state, trained.state.carry)
    parts = (resumed.state.params, resumed.state.opt_state, resumed.state.carry)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert resumed.report["valid_loss"] == trained.report["valid_loss"]
    assert read_log(tmp_path / "run")[-1]["step"] == 60


def error(capsys, *args, main=char_lm.main) -> str:
    """What a command that is wrong says, before anything is compiled."""
    with pytest.raises(SystemExit) as left:
        main([str(arg) for arg in args])
    assert left.value.code not in (0, None)
    return f"{left.value.code} {capsys.readouterr().err}"


def test_what_is_wrong_is_said_before_compilation(run, trained, text, tmp_path, capsys, monkeypatch):
    def compiling(*args):
        raise AssertionError("compiled first")

    monkeypatch.setattr(lm_train, "make_steps", compiling)
    here = ["--run", run, "--data", text, *OPTIONS]
    assert "lr: 0.02 -> 0.5" in error(capsys, *here, "--lr", 0.5)
    assert "solver: Anderson" in error(capsys, *here, "solver:broyden").replace("\n", " ")

    other = tmp_path / "other.txt"
    other.write_text("Quite different letters: XYZ!\n" * 200)
    # The name is a field too; what matters is that the vocabulary is compared by content.
    (tmp_path / "text.txt").write_text(other.read_text())
    said = error(capsys, "--run", run, "--data", tmp_path / "text.txt", *OPTIONS)
    assert "vocabulary:" in said and "tokens:" in said

    edited = tmp_path / "edited" / "text.txt"
    edited.parent.mkdir()
    edited.write_text(text.read_text()[::-1])
    said = error(capsys, "--run", run, "--data", edited, *OPTIONS)
    assert " text:" in said and "vocabulary:" not in said and "tokens:" not in said

    short = tmp_path / "short.txt"
    short.write_text("too short " * 3)
    assert "less than one segment" in error(capsys, "--run", tmp_path / "new", "--data", short, *OPTIONS)
    assert "neither" in error(capsys, "--run", tmp_path / "new", "--data", "shakespear")
    assert "--steps" in error(capsys, "--stesp", 3)
    assert "--solver.rank" in error(capsys, "train", "solver:broyden", "--solver.rnak", 3)
    assert "--steps" in error(capsys, "ptb", "--stesp", 3, main=word_lm.main)
    new = ["--run", tmp_path / "new"]
    for option, value, expected in (
        ("--steps", 0, "--steps must be at least 1, got 0"),
        ("--log-every", 0, "--log-every must be at least 1, got 0"),
        ("--shallow-share", 1, "--shallow-share must be in [0, 1), got 1.0"),
        ("--lr", "nan", "--lr must be positive and finite, got nan"),
        ("--batch", 0, "batch must be at least 1, got 0"),
        ("--heads", 3, "dim must be divisible by heads"),
        ("--dropout", 1, "dropout must be in [0, 1), got 1.0"),
        ("--seed", -1, "seed must be at least 0, got -1"),
    ):
        assert expected in error(capsys, *new, option, value)
    assert "ptb-small" in error(capsys, "ptbb", main=word_lm.main)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("cls", cli.SOLVERS_AND_ADJOINTS, ids=lambda cls: cls.__name__)
def test_every_solver_and_adjoint_is_an_option_and_comes_back_from_a_file(cls):
    kind = "solver" if hasattr(cls, "update") else "adjoint"
    of_two_words = {deq.ImplicitJVP: "implicit-jvp", deq.NewtonKrylov: "newton-krylov"}
    with cli.OPTIONS:
        config = tyro.cli(Config, args=[f"{kind}:{of_two_words.get(cls, cls.__name__.lower())}"])
    value = getattr(config, kind)
    assert type(value) is cls
    assert lm._from_json(json.loads(json.dumps(config_to_json(value)))) == value


def test_what_happens_to_a_failed_problem_is_an_option():
    with cli.OPTIONS:
        config = tyro.cli(Config, args=["adjoint:implicit", "--adjoint.on-failure", "ZERO"])
    assert config.adjoint == dataclasses.replace(Config().adjoint, on_failure=deq.OnFailure.ZERO)
    stored = config_to_json(config.adjoint)
    assert stored["on_failure"] == "ZERO" and lm._from_json(stored) == config.adjoint


def test_a_run_of_any_length_ends_with_the_equilibrium():
    """`--steps 20` is a run too: its warm-ups are shares, and the solver that was asked for is used."""
    default = Config()
    assert (default.shallow_steps, default.warmup_steps) == (1000, 50)
    paper = lm_presets.PRESETS["wikitext-103"][1]
    assert (paper.shallow_steps, paper.warmup_steps) == (32_000, 16_000)
    for config in (default, paper):
        for steps in (1, 2, 20, 1000):
            short = dataclasses.replace(config, steps=steps)
            assert 0 <= short.shallow_steps < steps and 0 <= short.warmup_steps < steps


def test_the_commands_solvers_and_adjoints_are_objects(monkeypatch, capsys, tmp_path):
    seen = []

    def train(config, runtime):
        seen.append(config)
        config.run.mkdir(parents=True, exist_ok=True)
        return lm_train.Trained(None, None, None, {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_train, "train", train)
    char_lm.main("--steps 200 solver:broyden --solver.rank 12 adjoint:phantom --adjoint.steps 3".split())
    char_lm.main("train adjoint:implicit adjoint.solver:picard --adjoint.solver.damping 0.5".split())
    char_lm.main([])
    word_lm.main(["wikitext-103", "--batch", "7"])
    word_lm.main("wikitext-2 --steps 2000 solver:broyden adjoint:implicit adjoint.solver:broyden".split())
    broyden, picard, default, words, changed = seen
    assert broyden.steps == 200 and broyden.solver == deq.Broyden(**cli.FORWARD, rank=12)
    assert broyden.adjoint == deq.Phantom(steps=3)
    assert picard.adjoint == deq.Implicit(deq.Picard(**cli.BACKWARD, damping=0.5))
    assert default == Config()
    assert words == dataclasses.replace(lm_presets.PRESETS["wikitext-103"][1], batch=7)
    both = dict(solver=deq.Broyden(**cli.FORWARD), adjoint=deq.Implicit(deq.Broyden(**cli.BACKWARD)))
    assert changed == dataclasses.replace(lm_presets.PRESETS["wikitext-2"][1], steps=2000, **both)


def test_an_interrupt_outside_the_training_loop_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(config, runtime):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_train, "train", interrupted)
    assert error(capsys, "train") == "130 interrupted; the same command continues\n"


def documented_commands() -> list[str]:
    pages = [char_lm.__doc__, Config.__doc__, word_lm.__doc__, (ROOT / "docs/start/demo.md").read_text()]
    found = [
        re.findall(r"^ *python -m experiments\.paper\.((?:char|word)_lm\b.*?)(?:  +#.*)?$", page, re.M)
        for page in pages
    ]
    assert all(found), "a page without a command"
    return sorted({line for lines in found for line in lines})


@pytest.mark.parametrize("line", documented_commands())
def test_the_documented_commands_are_understood(line, monkeypatch):
    called = []
    for module in char_lm, word_lm:
        for name in {"train_command", "train_and_report", "demo", "sample"} & vars(module).keys():
            command = functools.wraps(getattr(module, name))(lambda *args, **options: called.append(1))
            monkeypatch.setattr(module, name, command)
    module, *words = shlex.split(line)
    {"char_lm": char_lm, "word_lm": word_lm}[module].main(words)
    assert called == [1]


def test_text_is_sampled_from_a_run(trained, run, text, tmp_path, capsys):
    def sampled(*args):
        char_lm.main(["sample", "--run", str(run), "--prompt", "to be", "--length", "30", *map(str, args)])
        return capsys.readouterr().out

    first = sampled()
    assert first.startswith("to be") and len(first) == len("to be") + 30 + 1
    assert sampled() == first and sampled("--seed", 1) != first
    assert sampled("--temperature", 0) == sampled("--temperature", 0, "--seed", 1)

    assert "character 'é' at position 1 is not in this vocabulary" in error(
        capsys, "sample", "--run", run, "--prompt", "hé"
    )
    assert "prompt is empty" in error(capsys, "sample", "--run", run, "--prompt", "")
    assert "temperature must be at least 0" in error(capsys, "sample", "--run", run, "--temperature", -1)
    assert "holds no run" in error(capsys, "sample", "--run", tmp_path)
    assert "the runs inside are whole" in error(capsys, "sample", "--run", run.parent)
    assert not list(tmp_path.iterdir())


def test_generation_is_the_argmax_of_the_whole_text():
    vocabulary = tokenizer.Vocabulary(tuple("abcdefgh"))
    config = dataclasses.replace(TINY, mem_len=32, embedding_std=0.5, solver=deq.Anderson(rtol=1e-6))
    model = lm_model.build(config, vocabulary)
    graphdef, params = nnx.split(model, nnx.Param)
    made = generation.generate(
        graphdef, nnx.to_pure_dict(params), vocabulary, "abcab", length=12, temperature=0.0, seed=0
    )
    # One column at a time with the history, against all columns at once.
    logits = model(jnp.asarray(vocabulary.encode(made))[None]).logits[0]
    expected = vocabulary.decode(np.argmax(logits, axis=-1))
    assert made[:5] == "abcab" and made[5:] == expected[4:-1]


def test_the_history_is_used_detached_and_forgotten_at_the_start_of_an_epoch(rng):
    vocabulary = tokenizer.Vocabulary(tuple("abcdefgh"))
    graphdef, state = lm_train.start_state(TINY, vocabulary)
    segments = data.segments(np.asarray(jax.random.randint(rng, (4 * 50,), 0, 8)), TINY.batch, TINY.length)
    assert [segments[step].is_start for step in range(5)] == [True, False, False, True, False]

    @jax.jit
    def loss(params, carry, batch):
        probe = deq.Probe.zeros((TINY.batch,))
        value, (_, carry, _) = lm_model.loss_fn(
            graphdef, TINY.solver, TINY.adjoint, params, probe, (), batch, rng, carry
        )
        return value, carry

    _, carry = loss(state.params, state.carry, segments[0])
    assert carry.length.tolist() == [8] * 4
    with_history, _ = loss(state.params, carry, segments[1])
    without, _ = loss(state.params, state.carry, segments[1])
    assert with_history != without
    at_start, after = loss(state.params, carry, segments[3])
    assert at_start == loss(state.params, state.carry, segments[3])[0]
    assert after.length.tolist() == [8] * 4

    upstream = jax.grad(lambda carry: loss(state.params, carry, segments[1])[0], allow_int=True)(carry)
    assert not np.any(upstream.z) and not np.any(upstream.injection)


def test_evaluation_is_the_mean_over_all_tokens(monkeypatch):
    vocabulary = tokenizer.Vocabulary(tuple("abcdefgh"))
    config = dataclasses.replace(TINY, mem_len=64, embedding_std=0.5, solver=deq.Anderson(rtol=1e-5))
    model = lm_model.build(config, vocabulary)
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = np.random.default_rng(0).integers(8, size=50).astype(np.int32)
    segments = lm.evaluation_segments(tokens, 1, 16)
    hidden, traces = type(model).hidden, []
    monkeypatch.setattr(type(model), "hidden", lambda *args, **kwargs: (traces.append(1), hidden(*args, **kwargs))[1])
    evaluate = lm.make_evaluate(graphdef, segments, config.solver)
    result = evaluate(nnx.to_pure_dict(params))
    looser = evaluate(nnx.to_pure_dict(params), solver=dataclasses.replace(config.solver, rtol=1e-2))
    assert segments[3].weights.sum() == 1 and looser.steps < result.steps
    assert len(traces) == 1  # neither the first segment, nor the partial last one, nor a tolerance compiles anew
    logits = model(tokens[None, :-1]).logits[0]
    expected = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[1:, None], 1))
    assert result.tokens == 49 and result.converged == 1
    assert result.loss == pytest.approx(expected, rel=1e-4)


def test_the_demo_writes_its_figure_log_and_summary(text, tmp_path, capsys):
    small = ["--layers", "3", "--depths", "2", "6", "--max-evaluations", "6", "--sample-length", "20"]
    char_lm.main(["demo", "--run", str(tmp_path / "demo"), "--data", str(text), *OPTIONS, *small])
    said, run = capsys.readouterr().out, tmp_path / "demo"
    assert said.index("Budget") < said.index("compiling")
    assert "3 layers 60/60: loss" in said and "validation loss" in said and "temporaries" in said

    summary = json.loads((run / "summary.json").read_text())
    assert summary["machine"]["cores"] >= 1 and summary["versions"]["jax"] == jax.__version__
    assert summary["seed"] == 0 and summary["dtype"] == "float32"
    assert summary["gradient"]["__type__"] == "Implicit" and "experiments.paper.char_lm" in summary["command"]
    assert summary["deq"]["parameters"] == summary["unrolled"]["parameters"]
    assert summary["deq"]["steps"] == summary["unrolled"]["steps"] == 60
    assert summary["unrolled"]["solver"]["max_steps"] == 3
    assert summary["residuals"].keys() == {"Picard", "Anderson", "Broyden"}
    for residuals in summary["residuals"].values():
        assert len(residuals) == 6 and residuals[-1] < residuals[0]
    memory = summary["memory"]
    assert memory["unrolled"][1] > 1.5 * memory["unrolled"][0]
    assert memory["implicit"][1] < 1.05 * memory["implicit"][0]
    assert (run / "sample.txt").read_text().strip("\n") == summary["sample"].strip("\n")

    picture = (run / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and picture.endswith(b"IEND\xaeB`\x82") and len(picture) > 20_000
    for name in ("deq", "unrolled"):
        assert [line["step"] for line in read_log(run / name)] == [15, 30, 45, 60]


def test_words_are_counted_in_perplexity(data_dir, tmp_path, capsys):
    few = options(dataclasses.replace(TINY, steps=6))
    word_lm.main(["ptb", "--run", str(tmp_path / "ptb"), "--data-dir", str(data_dir), *few])
    report = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    assert report["valid_tokens"] == 73_760 - 1
    assert report["valid_perplexity"] == pytest.approx(np.exp(report["valid_loss"]))
    assert report["valid_perplexity"] < 10_000
    word_lm.main(["sample", "--run", str(tmp_path / "ptb"), "--prompt", "the company said", "--length", "5"])
    assert capsys.readouterr().out.startswith("the company said ")


if __name__ == "__main__":
    die(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))


def test_the_jacobian_penalty_is_an_option():
    vocabulary = tokenizer.Vocabulary(tuple("abcdefgh"), "char")
    tokens = np.arange(400) % 8
    stepped = []
    for weight in (0.0, 5.0):
        config = dataclasses.replace(TINY, jacobian_weight=weight)
        graphdef, state = lm_train.start_state(config, vocabulary)
        _, step = lm_train.make_steps(config, graphdef)
        batches = data.segments(tokens, config.batch, config.length, seed=0)
        for i in range(8):
            state, metrics = step(state, batches[i])
        stepped.append(metrics)
    plain, penalized = stepped
    assert "jacobian_penalty" not in plain and 0 < penalized["jacobian_penalty"] < 1
    assert penalized["fwd_steps"] < plain["fwd_steps"]
