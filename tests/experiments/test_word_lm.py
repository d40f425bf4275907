"""The presets of the word models, both models on the command line, and runs of before their options existed."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deq_jax as deq
from experiments.training import data, generation, lm, lm_model, lm_presets, lm_step, lm_train, tokenizer
from experiments.training.checkpoints import config_to_json
from experiments.training.lm_model import Config

pytestmark = pytest.mark.usefixtures("promotes", "quick_compile")  # optax and the stacks rely on the former

TINY = Config(model="trellisnet", level="word", steps=4, batch=2, length=8, dim=6, output_dim=8, init_std=0.3, lr=1e-2)
TINY = dataclasses.replace(TINY, cutoffs=(3,), div_val=2, aux_every=2, shallow_depth=5, shallow_share=0.5)
WORDS = tokenizer.Vocabulary(tuple("abcdefgh"), "word")


@pytest.mark.parametrize("name, vocabulary, millions", [
    ("ptb", 10_000, 2.65),
    ("ptb-small", 10_000, 1.55),
    ("ptb-trellisnet-small", 10_000, 1.97),
    ("ptb-trellisnet", 10_000, 24.19),
    ("wikitext-2-small", 33_278, 1.03),
    ("wikitext-103", 267_735, 97.69),
    ("wikitext-103-2021", 267_735, 97.69),
    ("wikitext-103-trellisnet", 267_735, 181.71),
])  # fmt: skip
def test_presets_have_the_sizes_that_they_say(name, vocabulary, millions):
    about, config = lm_presets.PRESETS[name]
    words = tokenizer.Vocabulary(tuple(map(str, range(vocabulary))), "word")
    params = nnx.eval_shape(lambda: nnx.split(lm_model.build(config, words))[1])
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    assert round(count / 1e6, 2) == millions
    assert f"runs/word_lm/{name}" == str(config.run) and config.level == "word"


def test_a_run_of_before_these_options_is_continued_and_read(tmp_path):
    """`--model` and its like stand in a run's file only where they are used."""
    tokens = np.arange(40, dtype=np.int32) % 8
    corpus = data.Corpus("text", WORDS, tokens, tokens, tokens)
    old = lm.identity({k: v for k, v in config_to_json(Config()).items() if k not in lm.ADDED}, corpus)
    assert lm.identity(config_to_json(Config()), corpus) == old
    picard = dataclasses.replace(Config(), solver=deq.Picard(), adjoint=deq.Implicit(deq.Picard()))
    of_picard = lm.identity(config_to_json(picard), corpus)
    assert "test_every" not in of_picard["solver"] and "test_every" not in of_picard["adjoint"]["solver"]
    rarely = dataclasses.replace(picard, solver=deq.Picard(test_every=2))
    assert lm.identity(config_to_json(rarely), corpus)["solver"]["test_every"] == 2
    assert lm.identity(config_to_json(TINY), corpus).keys() - old.keys() == {
        "model", "output_dim", "cutoffs", "div_val", "aux_every", "init_std",
    }  # fmt: skip
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert {name: config_to_json(defaults[name]) for name in lm.ADDED} == lm.ADDED
    for config in Config(), TINY:
        (tmp_path / "config.json").write_text(json.dumps(lm.identity(config_to_json(config), corpus)))
        lm.save_vocabulary(tmp_path, WORDS)
        assert config_to_json(lm.read_run(tmp_path, Config)[0]) == config_to_json(config)


def test_a_trellisnet_trains_through_layers_and_at_equilibrium():
    graphdef, state = lm_train.start_state(TINY, WORDS)
    before = jax.tree.map(jnp.copy, state.params)
    steps, batches = lm_train.make_steps(TINY, graphdef), data.segments(np.arange(200) % 8, 2, 8, seed=0)
    lines = []
    for step in (*steps, steps[1]):
        state, metrics = step(state, batches[len(lines)])
        lines.append(metrics)
    assert not any(line["skipped"] for line in lines) and all(jnp.isfinite(line["loss"]) for line in lines)
    assert lines[0]["aux_loss"] != lines[0]["loss"] and "fwd_steps" not in lines[0] and lines[1]["fwd_steps"] > 1
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(changed))
    assert state.carry.h.shape == (2, 1, 14) and jnp.any(state.carry.c != 0)
    assert not any(leaf.any() for leaf in lm_step.forget_at_start(state.carry, True))


@pytest.mark.parametrize("model", ["transformer", "trellisnet"])
def test_generation_is_the_argmax_of_the_whole_text(model):
    changes: dict = dict(
        model="transformer",
        output_dim=0,
        aux_every=0,
        init_std=None,
        dim=16,
        heads=2,
        inner_dim=16,
        mem_len=32,
        modern=True,
    )
    config = dataclasses.replace(TINY, **(changes if model == "transformer" else {}), solver=deq.Anderson(rtol=1e-6))
    config = dataclasses.replace(config, embedding_std=0.5)
    graphdef, params = nnx.split(lm_model.build(config, WORDS), nnx.Param)
    options = dict(length=10, temperature=0.0, seed=0)
    made = generation.generate(graphdef, nnx.to_pure_dict(params), WORDS, "a b c", **options)
    ids = jnp.asarray(WORDS.encode(made))
    logits = nnx.merge(graphdef, params)(ids[None]).logits[0]
    assert len(ids) == 13 and ids[3:].tolist() == jnp.argmax(logits, axis=-1)[2:-1].tolist()


@pytest.mark.parametrize("changes, message", [
    ({"pre_norm": True}, "--pre-norm must be left out with --model trellisnet, got True"),
    ({"model": "transformer"}, "--output-dim must be left out with --model transformer, got 8"),
    ({"level": "char"}, r"--cutoffs must be left out with --level char, got \(3,\)"),
    ({"aux_every": -1}, "--aux-every must be at least 0, got -1"),
])  # fmt: skip
def test_an_option_that_the_model_lacks_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, run=Path("runs/x"), **changes)
