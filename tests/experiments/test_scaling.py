"""What a step needs, computes and sends, on paper: against programs that are compiled for simulated devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deq_jax as deq
from deq_jax.models import adaptive
from experiments import memory_report, scaling_report, scaling_study
from experiments.benchmarks import programs, step_cost
from experiments.benchmarks.step_cost import H100
from experiments.training import abstract, data, lm_train, mesh
from experiments.training.lm_model import Config, build

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")

WORDS = 64
SOLVER = deq.Anderson(history=2, max_steps=6)  # of a small program
SMALL = Config(
    batch=8, length=16, mem_len=16, dim=32, inner_dim=64, dropout=0.1, steps=4, shallow_share=0.25,
    solver=SOLVER, adjoint=deq.Implicit(SOLVER),
)  # fmt: skip
TRELLISNET = dataclasses.replace(SMALL, model="trellisnet", output_dim=16)
ADAPTIVE = dataclasses.replace(SMALL, level="word", cutoffs=(16, 32), div_val=2)
ROUNDS = {"forward": SMALL.solver.max_steps, "backward": SMALL.adjoint.solver.max_steps}  # type: ignore[union-attr]


def over(text: str) -> mesh.Placement:
    """The placement of a mesh of the first of the simulated devices."""
    return mesh.Placement(memory_report.devices(memory_report.Config(mesh=text)))


@functools.cache
def compiled(config: Config, text: str):
    return abstract.lower(config, WORDS, over(text)).lowered.compile()


@functools.cache
def items(text: str, batch: int) -> tuple:
    program = compiled(dataclasses.replace(SMALL, batch=batch, mesh=text), text)
    return tuple(step_cost.cost(program.as_text(), H100, **ROUNDS, devices=8))


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "text"),
    [(ADAPTIVE, "data=2,fsdp=2,model=2"), (TRELLISNET, "data=2,fsdp=4")],
    ids=["transformer", "trellisnet"],
)
def test_the_report_is_what_the_program_of_a_run_needs(monkeypatch, config, text):
    monkeypatch.setitem(memory_report.MODELS, "small", config)
    found = memory_report.memory(memory_report.Config("small", mesh=text, vocab_size=WORDS), config.batch)
    placement = over(text)
    graphdef, state = lm_train.start_state(config, range(WORDS), placement)  # type: ignore[arg-type]
    tokens = np.zeros((config.batch, config.length), np.int32)
    batch = placement.batch(data.Segment(tokens, tokens, True))
    plan = lm_train.make_steps(config, graphdef, state, placement)[1].lower(state, batch).compile().memory_analysis()
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    assert found["total"] == pytest.approx(total, rel=0.1)
    held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert (found["parameters"], found["optimizer"]) == (held(state.params), held(state.opt_state))
    kept = found["parameters"] + found["optimizer"] + found["text"]
    assert kept == pytest.approx(plan.argument_size_in_bytes, rel=0.01)
    # The two histories are there one after the other, and a part of the temporaries.
    assert 0 < max(found["forward"], found["backward"]) < found["temporaries"]


@pytest.mark.parametrize("budget", [99, 100, 107, 1000, 1007.9, 50_000])
def test_the_largest_batch_fits_and_the_next_does_not(budget):
    # With a bend, as where a loss begins to work in blocks.
    needed = lambda batch: 80 + (7 * batch if batch < 64 else 320 + 2 * batch)
    fit = memory_report.largest_batch(needed, 4, 16, budget)
    assert fit.batch % 4 == 0 and needed(fit.batch + 4) > budget
    assert fit.total == (needed(fit.batch) if fit.batch else 0) <= budget


def test_the_report_of_a_command(monkeypatch, capsys):
    names = ("parameters", "optimizer", "text", "temporaries", "gradient", "forward", "backward", "total")
    monkeypatch.setattr(memory_report, "memory", lambda config, batch: dict.fromkeys(names, 10**6 * batch))
    monkeypatch.setattr(memory_report, "simulate", lambda devices: None)  # the tests have theirs
    memory_report.main(["--mesh", "data=2,fsdp=4", "--hbm", "0.1GB"])
    told = capsys.readouterr().out
    about = "a batch of 16: MB of each device, by the compiler for a CPU"
    assert told.startswith(f"char on 8 devices (data=2,fsdp=4), {about}")
    assert "gathered over fsdp" in told and re.search(r"in all +16\.00\n", told)
    assert "largest batch in 0.1GB: 96, which needs 0.10 GB" in told
    memory_report.main(["--mesh", "data=2,fsdp=4", "--hbm", "5MB"])
    assert "not even a batch of 8 fits in 5MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "wikitext-13"}, "--preset has no 'wikitext-13'; did you mean wikitext-103?"),
        ({"preset": "?"}, "--preset has no '?'; there are char, ptb"),
        ({"hbm": "80"}, "--hbm must be a size such as 80GB or 74.5GiB, got '80'"),
        ({"hbm": "0GB"}, "--hbm must be a size such as 80GB"),
        ({"mesh": "data=3"}, "--mesh data=3: --batch 16 cannot be divided by 3"),
        ({"mesh": "dat=2"}, "--mesh has the axes data, fsdp, model, seq, got 'dat'; did you mean data?"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"vocab_size": 0}, "--vocab-size must be at least 1, got 0"),
    ],
)
def test_a_report_that_cannot_be_made_says_why(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_report.Config(**options)


def test_a_text_of_the_users_has_no_known_vocabulary():
    with pytest.raises(ValueError, match="--vocab-size is known of shakespeare"):
        abstract.vocabulary_size(dataclasses.replace(SMALL, data="mine.txt"))


# ---- cost --------------------------------------------------------------------------------------------------


def test_the_products_of_an_evaluation_are_those_of_the_cell():
    b, t, d, n = 8, SMALL.length, SMALL.dim, SMALL.inner_dim
    of_weights = 2 * b * t * (4 * d * d + 2 * d * n)  # q, k, v and the output; the two of the feed-forward part
    of_attention = 3 * 2 * b * t * (SMALL.mem_len + t) * d  # with contents and positions, and the weighted sum
    counted = scaling_study.flops(items("data=1", 8))
    assert counted["forward"] == of_weights + of_attention
    # Pulled back to z, a product with weights is one product, and one between columns is two. The scores of positions
    # are one too, since positions do not depend on z.
    assert counted["backward"] == of_weights + of_attention * 5 / 3
    rounds = counted["forward"] * ROUNDS["forward"] + counted["backward"] * ROUNDS["backward"]
    assert rounds < counted["step"] < 1.5 * rounds


def test_weak_scaling_leaves_the_products_and_the_collectives_of_a_device_as_they_are():
    two, eight = (items(f"data={n}", n) for n in (2, 8))
    assert scaling_study.flops(two) == scaling_study.flops(eight)
    sent = lambda items: [(i.place, i.what, i.sent) for i in items if i.what]
    assert sent(two) == sent(eight)
    in_rounds = [item for item in eight if item.what and item.times > 1]
    assert {item.place for item in in_rounds} == {"solver"}  # f sends nothing where only the batch is divided
    assert {(item.what, item.sent) for item in in_rounds} == {("all-reduce", 1)}  # whether any problem goes on


@pytest.mark.parametrize(
    ("group", "bandwidth", "hops"),
    [(range(8), 450e9, 3), (range(4), 450e9, 2), (range(0, 64, 8), 50e9, 3), (range(64), 400e9, 6)],
    ids=["a host", "half of one", "one a host", "eight hosts"],
)
def test_a_collective_goes_over_the_slowest_link(group, bandwidth, hops):
    n, latency = len(group), hops * H100.latency
    seconds = step_cost.collective_seconds(H100, "all-reduce", 1e9, list(group))
    assert seconds == pytest.approx(2 * (n - 1) / n * 1e9 / bandwidth + latency)
    gathered = step_cost.collective_seconds(H100, "all-gather", 1e9, list(group))
    assert gathered - latency == pytest.approx((seconds - latency) / 2)


def test_devices_along_a_part_of_an_axis():
    mesh = "replica_groups=mesh['data'=8,'model'=2] "
    assert step_cost.members(mesh + "{'data':(1)2}", 16) == [0, 8]
    assert step_cost.members(mesh + "{'data':(2)4}", 16) == [0, 2, 4, 6]
    assert step_cost.members(mesh + "{'data', 'model'}", 16) == list(range(16))
    assert step_cost.members("channel_id=1", 4) == [0, 1, 2, 3]


# ---- losses ------------------------------------------------------------------------------------------------


def test_each_device_computes_the_losses_of_its_own_tokens(monkeypatch):
    monkeypatch.setattr(adaptive, "LOGITS_AT_ONCE", 512)
    graphdef, params = nnx.split(build(ADAPTIVE, range(WORDS)), nnx.Param)  # type: ignore[arg-type]
    placement, rng = over("data=2,fsdp=2,model=2"), np.random.default_rng(0)
    shardings, params = placement.params(params), nnx.to_pure_dict(params)
    hidden = rng.normal(size=(8, SMALL.length, SMALL.dim)).astype(np.float32)
    targets = rng.integers(0, WORDS, (8, SMALL.length)).astype(np.int32)
    nll = lambda params, hidden, targets: nnx.merge(graphdef, params).nll(hidden, targets)
    weights = rng.uniform(size=targets.shape).astype(np.float32)

    def program(nll, *args):
        loss = lambda *args: jnp.sum(weights * nll(*args))
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()

    here, there = (params, hidden, targets), (jax.device_put(params, shardings), hidden, targets)
    one, eight = program(nll, *here), program(placement.by_tokens(nll), *there)
    for got, want in zip(*(jax.tree.leaves(p(*args)) for p, args in ((eight, there), (one, here))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # A CPU's scatter is a loop too, of more rounds.
    blocks = lambda program: min(loop.trips for loop in programs.loops(programs.read(program.as_text())) if loop.trips)
    assert blocks(one) == 4 * blocks(eight) == 8


# ---- the tables --------------------------------------------------------------------------------------------


def test_the_tables_say_what_was_found(tmp_path):
    seconds = {f"{what} of {place}": 0.1 for what in ("kernels", "collectives") for place in ("f", "solver", "step")}
    memory = dict.fromkeys(("parameters", "optimizer", "text", "temporaries", "total", "gradient"), 10**9)
    row = {
        "preset": "small",
        "batch": 8,
        "length": 16,
        "rounds": ROUNDS,
        "memory": memory | {"forward": 1, "backward": 1},
        "flops": {"forward": 1e12, "backward": 2e12, "step": 3e13},
        "collectives": {"solver forward": [["all-reduce", 8, 1, 1]], "step": [["all-gather", 8, 2, 2e8]]},
    }
    rows = [
        row | {"mesh": f"data={n}", "devices": n, "seconds": {"H100": seconds | {"total": total}}}
        for n, total in ((1, 1.0), (8, 1.25))
    ]
    results = {"command": "", "versions": {}, "machines": {"H100": H100._asdict()}, "rows": rows}
    text = scaling_report.table(results)
    assert "Weak scaling on 8 devices: 0.800 at least; the goal is 0.9." in " ".join(text.split())
    assert "1 all-reduce of 8, 1 B" in text and "2 all-gather of 8, 200.0 MB" in text
    scaling_report.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
