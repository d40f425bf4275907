"""A run is killed, interrupted and damaged; it goes on bit for bit, and says what it did.

Run as a script, this file is the run that dies: `test_checkpoints.py DIRECTORY HOW STEP`.
"""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from experiments.training import checkpoints, loop
from experiments.training.checkpoints import (
    DamagedCheckpointWarning,
    RunDirectory,
    config_changes,
    config_to_json,
    find_damage,
)
from experiments.training.loop import (  # noqa: F401 - the loop of its docstring is run here
    graceful_signals,
    init_state,
    make_optimizer,
    make_train_step,
)
from experiments.training.metrics import MetricsLog  # noqa: F401

pytestmark = pytest.mark.usefixtures("promotes")  # optax relies on it

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    lr: float = 0.01
    steps: int = 12
    save_every: int = 4


def init_params(config):
    w, u = jax.random.split(jax.random.key(config.seed))
    return {"w": jax.random.normal(w, (4, 16)), "u": jax.random.normal(u, (16, 1)), "b": jnp.zeros(16)}


def batch_at(config, step):
    rng = np.random.default_rng((config.seed, step))
    x = rng.normal(size=(8, 4)).astype(np.float32)
    return x, np.sin(x.sum(1, keepdims=True))


def loss_fn(params, probe, rest, batch, key, carry):
    x, y = batch
    h = jnp.tanh(x @ params["w"] + params["b"])
    h = h * jax.random.bernoulli(key, 0.9, h.shape)  # a forgotten key would show
    return jnp.mean((h @ params["u"] - y) ** 2), (rest, carry, {})


exec(re.search(r"```python\n(.*?)```", loop.__doc__, re.S).group(1))  # defines main(config, path)


def make_die(how, at):
    """Put this process's end into the run: at a step, inside a save, or between a save and its manifest."""
    global batch_at
    healthy_batch_at, orbax_save, seal = batch_at, checkpoints.ocp.CheckpointManager.save, checkpoints.seal

    def dying_batch_at(config, step):
        if step == at:
            for signum in {"kill": [9], "SIGINT": [2], "SIGTERM": [15], "SIGINT twice": [2, 2]}.get(how, []):
                os.kill(os.getpid(), signum)
        return healthy_batch_at(config, step)

    def dying_save(manager, step, **kwargs):
        orbax_save(manager, step, **kwargs)
        if how == "kill in save" and step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_seal(directory, meta):
        if how == "kill before manifest" and directory.name == str(at):
            os.kill(os.getpid(), signal.SIGKILL)
        seal(directory, meta)

    batch_at, checkpoints.ocp.CheckpointManager.save, checkpoints.seal = (
        dying_batch_at,
        dying_save,
        dying_seal,
    )


def run_child(path, how, at):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, str(path), how, str(at)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def resume(path):
    """Run `main` to its end in this process; also the step that it began with."""
    asked = []
    healthy_batch_at = batch_at

    def asking_batch_at(config, step):
        asked.append(step)
        return healthy_batch_at(config, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "batch_at", asking_batch_at)
        return main(Config(), path), asked[0]


def losses(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def assert_bitwise_equal(a, b):
    a, b = (jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, t) for t in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _is_key(leaf):
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its last state and its directory, with checkpoints 8 and 12."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    return main(Config(), path), path


# How it dies, at which step: the exit code, where the resume may begin, what was said. At step 10 the save of
# step 8 may be under way; that of step 4 is complete, since one save waits for the other.
DEATHS = {
    ("kill", 10): (-9, {4, 8}, ""),
    ("kill in save", 8): (-9, {4}, ""),
    ("kill before manifest", 8): (-9, {4}, ""),
    ("SIGINT", 6): (130, {7}, r"SIGINT: saved .*checkpoints/7; the same command continues"),
    ("SIGTERM", 6): (143, {7}, r"SIGTERM: saved .*checkpoints/7; the same command continues"),
    ("SIGINT twice", 10): (-2, {4, 8}, "Ctrl-C again ends at once"),
}


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """The runs that die, two at a time: most of their time is start-up."""
    path = tmp_path_factory.mktemp("dying")
    with ThreadPoolExecutor(2) as pool:
        yield {(how, at): (path / how, pool.submit(run_child, path / how, how, at)) for how, at in DEATHS}


@pytest.mark.parametrize("how, at", DEATHS)
def test_a_run_that_dies_goes_on_bit_for_bit(children, finished, how, at):
    returncode, starts, said = DEATHS[how, at]
    path, future = children[how, at]
    child = future.result()
    assert child.returncode == returncode, child.stderr
    assert re.search(said, child.stderr), child.stderr
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedCheckpointWarning)
        state, start = resume(path)
    assert start in starts
    expected = "checkpoint 8 is damaged (manifest.json: missing"
    assert all(str(warning.message).startswith(expected) for warning in caught)
    assert caught or how != "kill before manifest"
    assert_bitwise_equal(state, finished[0])
    assert losses(path) == losses(finished[1])


def test_a_second_process_is_refused_and_names_the_first(tmp_path):
    with RunDirectory(tmp_path, Config()):
        child = run_child(tmp_path, "no way", -1)
        assert child.returncode == 1
        assert f"{tmp_path} is in use by pid {os.getpid()} on " in child.stderr
        with pytest.raises(RuntimeError, match="one process at a time"), RunDirectory(tmp_path, Config()):
            pass
    with RunDirectory(tmp_path, Config()):
        pass


@pytest.fixture
def run(tmp_path, finished):
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def like():
    tx = make_optimizer(lr=1.0, warmup_steps=2, total_steps=12, clip=1.0)
    return init_state(init_params(Config()), tx, jax.random.key(7))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found(run):
    step = run / "checkpoints" / "12"
    files = [path for path in step.rglob("*") if path.is_file()]
    assert len(files) > 5 and find_damage(step) is None
    for path in files:
        size = path.stat().st_size
        for at in range(0, size, max(size // 25, 1)):
            flip(path, at)
            damage = find_damage(step)
            assert damage is not None, f"{path} at {at}"
            if path.name != "manifest.json":
                assert damage == f"{path.relative_to(step)}: its sha256 is not the one in the manifest"
            flip(path, at)
    assert find_damage(step) is None


def truncate(step):
    path = max(step.rglob("d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "bit": (lambda step: flip(step / "meta.json", 30), "12", "meta.json: its sha256"),
    "truncated": (truncate, "12", r"/d/\w+: \d+ bytes instead of \d+"),
    "lost file": (
        lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
        "12",
        "_CHECKPOINT_METADATA: missing",
    ),
    "new file": (lambda step: (step / "x").touch(), "12", "x: not in the manifest"),
    "no marker": (
        lambda step: [p.unlink() for p in step.rglob("commit_success.txt")],
        "12",
        "success.txt: missing",
    ),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "12", "manifest.json: missing"),
    "garbled manifest": (
        lambda step: (step / "manifest.json").write_text("[1]"),
        "12",
        "manifest.json: unreadable",
    ),
    "altered manifest": (lambda step: flip(step / "manifest.json", -1), "12", "manifest.json: unreadable"),
    "emptied": (empty, "12", "manifest.json: missing"),
    "copied": (
        lambda step: shutil.copytree(step, step.parent / "999999"),
        "999999",
        "meta.json: it is a copy of step 12",
    ),
    "link": (lambda step: (step.parent / "999999").symlink_to(step), "999999", "a symbolic link to .*/12"),
    "stray": (lambda step: (step.parent / "999999").mkdir(), "999999", "manifest.json: missing"),
    "stray file": (lambda step: (step.parent / "999999").touch(), "999999", "manifest.json: missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_passed_over_by_name_and_kept(run, finished, damage):
    inflict, named, what = DAMAGES[damage]
    checkpoint = run / "checkpoints"
    if damage == "no marker" and not (checkpoint / "12" / "commit_success.txt").exists():
        pytest.skip("this Orbax writes no marker")
    inflict(checkpoint / "12")
    whole = "12" if named == "999999" else "8"
    message = rf"^checkpoint {named} is damaged \(.*{what}.*\): using checkpoint {whole} instead; kept as {named}\."
    with pytest.warns(DamagedCheckpointWarning, match=message), RunDirectory(run, Config()) as directory:
        state, _ = directory.restore(like())
        assert int(state.step) == int(whole)
        for step in (13, 14):
            directory.save(step, state._replace(step=jnp.asarray(step)))
    assert {p.name for p in checkpoint.iterdir()} == {"13", "14", f"{named}.damaged"}
    with RunDirectory(run, Config()) as directory:  # and now without a word
        assert int(directory.restore(like())[0].step) == 14


def test_the_same_step_can_be_damaged_twice(run):
    for kept in ("12.damaged", "12.damaged2"):
        empty(run / "checkpoints" / "12")
        with (
            pytest.warns(DamagedCheckpointWarning, match=f"kept as {kept}$"),
            RunDirectory(run, Config()) as r,
        ):
            r.save(12, r.restore(like())[0])
    assert find_damage(run / "checkpoints" / "12") is None


def test_with_nothing_whole_the_run_begins_anew_and_says_so(run, finished):
    for step in ("8", "12"):
        (run / "checkpoints" / step / "manifest.json").unlink()
    with pytest.warns(DamagedCheckpointWarning, match="starting from the beginning instead"):
        state, start = resume(run)
    assert start == 0
    assert_bitwise_equal(state, finished[0])


def test_what_orbax_leaves_behind_does_not_matter(run):
    shutil.copytree(run / "checkpoints" / "12", run / "checkpoints" / "13.orbax-checkpoint-tmp")
    empty(run / "checkpoints" / "8")  # an older step is not looked at
    with RunDirectory(run, Config()) as directory:
        state, _ = directory.restore(like())
        directory.save(13, state)
        directory.save(14, state)
        assert directory.wait() == run / "checkpoints" / "14"
    assert find_damage(run / "checkpoints" / "13") is None


def test_a_state_comes_back_as_it_was_while_its_buffers_are_reused(tmp_path):
    state = {
        "key": jax.random.key(3, impl="rbg"),
        "keys": jax.random.split(jax.random.key(4), 2),
        "low": jnp.arange(5, dtype=jnp.bfloat16),
        "count": 7,
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "pair": (jnp.ones((3, 2)), jnp.asarray(True)),
        "large": jnp.arange(300_000.0),
    }
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    with RunDirectory(tmp_path, Config()) as run:
        for step in (1, 2):
            run.save(step, state, data={"epoch": step, "position": [3, 4]})
            state["large"] = double(state["large"])
    with RunDirectory(tmp_path, Config()) as run:
        restored, data = run.restore(jax.tree.map(lambda leaf: leaf if _is_key(leaf) else jnp.zeros_like(leaf), state))
    assert data == {"epoch": 2, "position": [3, 4]}
    assert_bitwise_equal(restored, jax.tree.map(jnp.asarray, state) | {"large": 2 * jnp.arange(300_000.0)})
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])


def test_a_checkpoint_of_another_model_is_refused_by_leaf(run):
    other = like()._replace(carry=jnp.zeros(3))
    with RunDirectory(run, Config()) as directory:
        with pytest.raises(ValueError, match=r"expected float32\[3\] at carry, found nothing"):
            directory.restore(other)
        with pytest.raises(ValueError, match=r"expected float32\[2\] at params/b, found float32\[16\]"):
            directory.restore(like()._replace(params=like().params | {"b": jnp.zeros(2)}))
        with pytest.raises(ValueError, match="step 3 is older than the newest checkpoint, 12"):
            directory.save(3, like())


def test_a_failed_save_raises_and_frees_the_directory(run, monkeypatch):
    def full(directory, meta):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(OSError, match="No space left"), RunDirectory(run, Config()) as directory:
        directory.save(13, like())
    with (
        pytest.warns(DamagedCheckpointWarning, match="checkpoint 13"),
        RunDirectory(run, Config()) as directory,
    ):
        assert directory.step == 12


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()


def fill_the_disk(run):
    shutil.disk_usage = lambda path: types.SimpleNamespace(free=300)


def limit_files(run):
    """Found out while files are written, as a disk that fills up then."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit))


def take_away(run):
    run.rename(run.with_name("elsewhere"))


HINDRANCES = {
    "not a folder": (remove_checkpoints, r"checkpoints/13 could not be written: File exists \(.*checkpoints\); "),
    "full": (fill_the_disk, "checkpoints/13 could not be written: it has 0.0 MB, and 0.0 MB are free on the disk; "),
    "filling up": (limit_files, "checkpoints/13 could not be written: File too large; "),
    "moved": (take_away, r"could not be written: .*/run was moved or removed while the run was under way; "),
}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_a_save_that_cannot_be_made_is_one_line_and_does_not_hold_up_the_exit(run, hindrance):
    """In a process of its own, whose exit Orbax's threads can hold up, and whose files may be limited."""
    hinder, message = HINDRANCES[hindrance]
    child = run_child(run, f"hinder {hindrance}", 13)
    assert child.returncode == 1 and "orbax" not in child.stderr, child.stderr  # TensorStore may print lines of its own
    (line,) = (line for line in child.stderr.splitlines() if line.startswith("error"))
    assert re.search(message + "the newest one is 12. Mend this and give the same command$", line)


def save_hindered(path, how, step):
    """A save into a run in which something is wrong, in a process of its own."""
    try:
        with RunDirectory(path, Config()) as run:
            state, _ = run.restore(like())
            HINDRANCES[how][0](path)
            run.save(step, state)
            for _ in range(200):
                run.check()
                time.sleep(0.1)
    except checkpoints.SaveError as error:
        raise SystemExit(f"error: {error}") from None


def test_checkpoints_that_vanish_are_made_again_with_a_warning(run):
    with RunDirectory(run, Config()) as directory:
        state, _ = directory.restore(like())
        shutil.rmtree(run / "checkpoints")
        with pytest.warns(DamagedCheckpointWarning, match="checkpoints was removed; made again"):
            directory.save(13, state)
        assert directory.wait() == run / "checkpoints" / "13"
    shutil.rmtree(run / "checkpoints")
    expected = "checkpoints is empty, though metrics.jsonl goes to step 12: starting from the beginning"
    with pytest.warns(DamagedCheckpointWarning, match=expected), RunDirectory(run, Config()) as directory:
        assert directory.step is None


def test_an_old_step_that_is_a_link_is_moved_aside(run):
    (run / "checkpoints" / "8").rename(run / "8")
    (run / "checkpoints" / "8").symlink_to(run / "8")
    with pytest.warns(
        DamagedCheckpointWarning, match="checkpoint 8 is damaged .a symbolic link.*: using checkpoint 12"
    ):
        with RunDirectory(run, Config()) as directory:
            state, _ = directory.restore(like())
            for step in (13, 14):
                directory.save(step, state)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"13", "14", "8.damaged"}


LOSSES = {
    "a hole": (lambda lines: lines[:3] + lines[5:], "the lines of 2 steps before the checkpoint are lost: 4, 5$"),
    "the end": (lambda lines: lines[:4], "the lines of 8 steps .* are lost: 5, 6, 7, 8, 9, …$"),
    "all": (lambda lines: [], "the lines of 12 steps"),
    "a changed number": (
        lambda lines: [lines[0].replace("loss", "lass"), *lines[1:]],
        "some of its lines have changed",
    ),
    "nothing": (lambda lines: [*lines, '{"step": "13"}\n', "[]\n"], None),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_that_are_lost_are_reported(run, loss):
    change, message = LOSSES[loss]
    path = run / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with warnings.catch_warnings(record=True) as caught, RunDirectory(run, Config()) as directory:
        warnings.simplefilter("always")
        directory.restore(like())
    assert [w.category for w in caught] == ([checkpoints.LostMetricsWarning] if message else [])
    assert not message or re.search(f"metrics.jsonl: {message}", str(caught[0].message))
    before = path.read_text()
    with MetricsLog(path, after=12):
        assert path.read_text() == before  # a line whose step is no number is not ours to judge


@dataclasses.dataclass(frozen=True)
class Anderson:
    rtol: float = 1e-3
    history: int = 5


@dataclasses.dataclass(frozen=True)
class Broyden:
    rtol: float = 1e-3


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    solver: Anderson | Broyden = Anderson()
    steps: int = 10
    sizes: tuple[int, ...] = (3, 4)
    note: str | None = None


def contents(path):
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in path.rglob("*")}


def test_a_changed_configuration_is_refused_before_any_write(tmp_path):
    with RunDirectory(tmp_path, SolverConfig()):
        pass
    before = contents(tmp_path)
    for changed, message in {
        SolverConfig(Anderson(rtol=0.01), steps=20): "  solver.rtol: 0.001 -> 0.01\n  steps: 10 -> 20\n",
        SolverConfig(Broyden(), sizes=(3,)): "  sizes: [3, 4] -> [3]\n  solver: Anderson -> Broyden\n",
        SolverConfig(note="x"): '  note: null -> "x"\n',
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)), RunDirectory(tmp_path, changed):
            pass
    with (
        pytest.raises(ValueError, match="steps"),
        RunDirectory(tmp_path, SolverConfig(steps=9), harmless={"note"}),
    ):
        pass
    assert contents(tmp_path) == before
    changed = SolverConfig(Anderson(rtol=0.01), steps=20)
    with RunDirectory(tmp_path, changed, harmless={"steps", "solver"}):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["solver"] == {
        "__type__": "Anderson",
        "rtol": 0.01,
        "history": 5,
    }


def test_config_to_json_takes_what_a_configuration_holds_and_names_what_it_does_not():
    values = config_to_json(
        {"d": jnp.float32, "p": Path("a"), "x": np.float32(2), "n": float("nan"), "f": (True, None)}
    )
    assert values | {"n": 0} == {"d": "float32", "p": "a", "x": 2.0, "n": 0, "f": [True, None]}
    assert config_changes(values, json.loads(json.dumps(values))) == {}
    anderson = config_to_json(deq.Anderson())
    assert config_changes(anderson | {"type": 2}, anderson) == {}  # an option that is gone
    assert config_changes(anderson | {"type": 1}, anderson) == {"type": "1 -> absent"}
    assert config_changes({"a": 1}, {"b": None}) == {"a": "1 -> absent", "b": "absent -> null"}
    with pytest.raises(TypeError, match=r"config.solver.rtol is <function"):
        config_to_json(SolverConfig(Anderson(rtol=lambda: 0)))


def test_a_foreign_directory_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("hours of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is not a run directory: it holds thesis.tex and no config.json"):
        with RunDirectory(tmp_path, Config()):
            pass
    with (
        pytest.raises(ValueError, match="thesis.tex is a file"),
        RunDirectory(tmp_path / "thesis.tex", Config()),
    ):
        pass
    assert contents(tmp_path) == before
    for made in ("new", "new/lock"):  # killed while it was being made
        path = tmp_path / made
        path.mkdir() if made == "new" else path.touch()
        with RunDirectory(tmp_path / "new", Config()) as run:
            assert run.step is None
        shutil.rmtree(tmp_path / "new" / "checkpoints")
        (tmp_path / "new" / "config.json").unlink()
    (tmp_path / "new" / "config.json").write_text("{")
    with (
        pytest.raises(ValueError, match="config.json is unreadable"),
        RunDirectory(tmp_path / "new", Config()),
    ):
        pass


def test_one_kept_checkpoint_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="keep >= 2"):
        RunDirectory(tmp_path, Config(), keep=1)


if __name__ == "__main__":
    if sys.argv[2].startswith("hinder "):
        save_hindered(Path(sys.argv[1]), sys.argv[2].removeprefix("hinder "), int(sys.argv[3]))
    make_die(sys.argv[2], int(sys.argv[3]))
    main(Config(), sys.argv[1])
