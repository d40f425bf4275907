"""`--mesh`: the same numbers on every mesh, checkpoints that go from one to another, and meshes that are refused."""

import dataclasses
import json
import pathlib

import jax
import pytest
from jax.sharding import PartitionSpec as P

import deq_jax as deq
from experiments.training import data, lm_train, mesh
from experiments.training.lm_model import Config

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")

# Plain iteration, and closely: what Anderson combines it with depends on the last digits.
CLOSELY = deq.Picard(rtol=1e-4, max_steps=60)
TRANSFORMER = Config(
    steps=4, shallow_share=0.25, batch=8, length=16, mem_len=16, dim=32, inner_dim=64, dropout=0.1,
    solver=CLOSELY, adjoint=deq.Implicit(CLOSELY), log_every=1, eval_every=100, save_every=2,
)  # fmt: skip
TRELLISNET = dataclasses.replace(TRANSFORMER, model="trellisnet", output_dim=16)
MODELS = {"transformer": TRANSFORMER, "trellisnet": TRELLISNET}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    corpus = data.load("shakespeare")
    path.write_text(corpus.vocabulary.decode(corpus.train[:6_000]))
    return str(path)


def train(config: Config, run: pathlib.Path, text: str, **changes):
    return lm_train.train(dataclasses.replace(config, run=run, data=text, **changes))


def lines(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, text):
    """The metrics of each model's run without a mesh."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def of(name):
        if name not in known:
            train(MODELS[name], folder / name, text)
            known[name] = lines(folder / name)
        return known[name]

    return of


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("transformer", "data=2,fsdp=2,model=2"),
        ("transformer", "fsdp=2,model=2,seq=2"),
        ("trellisnet", "fsdp=2,model=2,seq=2"),
    ],
)
def test_a_run_has_the_same_numbers_on_every_mesh(on_one_device, tmp_path, text, name, axes):
    trained = train(MODELS[name], tmp_path / "run", text, mesh=axes)
    got, want = lines(tmp_path / "run"), on_one_device(name)
    assert [line["step"] for line in got] == [line["step"] for line in want] == [1, 2, 3, 4]
    for ours, theirs in zip(got, want, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert [ours.get(steps) for steps in ("fwd_steps", "bwd_steps")] == [
            theirs.get(steps) for steps in ("fwd_steps", "bwd_steps")
        ]
    parts = mesh.parse(axes)
    part = 1 / (parts["fsdp"] * parts["model"])
    assert held(trained.state.params) == held(trained.state.opt_state) == {part}


def held(tree) -> set[float]:
    """The share of the largest kernel that each device holds."""
    kernels = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "kernel" in jax.tree_util.keystr(path)
    ]
    largest = max(kernels, key=lambda leaf: leaf.size)
    return {shard.data.nbytes / largest.nbytes for shard in largest.addressable_shards}


@pytest.mark.parametrize(("before", "after"), [("", "data=2,fsdp=2,model=2"), ("fsdp=4,model=2", "data=4,seq=2")])
def test_a_run_goes_on_on_another_mesh(on_one_device, tmp_path, text, monkeypatch, before, after):
    class Cut(Exception):
        pass

    def cut(step, state):
        if step == 3:
            raise Cut

    run = tmp_path / "run"
    with pytest.raises(Cut):
        lm_train.train(dataclasses.replace(TRANSFORMER, run=run, data=text, mesh=before), keep=cut)
    train(TRANSFORMER, run, text, mesh=after)
    want = on_one_device("transformer")
    assert [line["loss"] for line in lines(run)] == pytest.approx([line["loss"] for line in want], rel=1e-5)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ("dat=8", {}, "--mesh has the axes data, fsdp, model, seq, got 'dat'; did you mean data"),
        ("data:8", {}, "--mesh has the axes"),
        ("data=2,data=4", {}, "each axis once, got 'data=2,data=4'"),
        ("data=0", {}, "--mesh must be like data=2,fsdp=4"),
        ("data=2,fsdp=4", {"batch": 12}, r"--mesh data=2,fsdp=4: --batch 12 cannot be divided by 8 \(data × fsdp\)"),
        ("fsdp=8", {"dim": 36, "heads": 4}, r"--dim 36 cannot be divided by 8 \(fsdp\)"),
        ("seq=8", {"length": 12}, "--length 12 cannot be divided by 8"),
        ("model=8", {}, "--heads 4 cannot be divided by 8"),
        ("model=8", {"heads": 8, "inner_dim": 12}, "--inner-dim 12 cannot be divided by 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(tmp_path, axes, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRANSFORMER, run=tmp_path / "run", data="no such file", mesh=axes, **changes)


def test_a_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(ValueError, match=r"--mesh data=2 has 2 devices, and there are 8"):
        mesh.Placement.over("data=2")


def test_an_axis_that_cannot_be_divided_is_kept_whole():
    placement = mesh.Placement.over("fsdp=2,model=4")
    assert placement.fits(P("vocab", "dim"), (65, 16), list(mesh.RULES)) == P(None, "fsdp")
    assert placement.fits(P("vocab", "dim"), (64, 16), list(mesh.RULES)) == P("model", "fsdp")
