"""The step without its data: that of a run, as far as shapes go."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from t5x_lite import aot, cli, config, dry, plan_search, run
from tests import tiny_run, toy_task
from tests.tiny import tiny_config


def load(name, **overrides):
    raw = cli.load_config(f"configs/{name}.py:smoke")
    cli.apply_overrides(raw, [f"--config.{k}={v}" for k, v in overrides.items()])
    return config.freeze(raw)


def alike(tree, other):
    """Are shapes and types the same?"""
    shapes, others = (
        jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), t) for t in (tree, other)
    )
    return shapes == others


@pytest.mark.parametrize(
    "name", ["t5_1_1_base", "bert", "electra", "gpt3", "xlnet", "unilm_v2", "ernie"]
)
def test_the_dry_step_is_that_of_a_run(name, tmp_path):
    """State, batch and model of `run.Setup`, which reads the corpus."""
    cfg = load(name)
    cfg = dataclasses.replace(
        cfg,
        compile_cache="",
        data=dataclasses.replace(cfg.data, cache_dir=str(tmp_path)),
    )
    setup = run.Setup.of(cfg)
    got = dry.Step.of(cfg, jax.devices())
    assert got.cfg == setup.cfg and got.notes == []
    assert got.state == setup.abstract_state
    assert got.shapes == setup.train_batches.shapes
    assert alike(got.batch, setup.train_batches.whole(0))


@pytest.mark.parametrize(
    "changes",
    [
        dict(data=dict(targets_length=0)),
        dict(
            data=dict(task_format="head"),
            model=dict(structure="encoder", head="class", classes=2),
        ),
        dict(optim=dict(name="adamw", l2_start=1.0), init_from=""),
        dict(distill={}),
    ],
    ids=["text", "head", "l2_start", "distill"],
)
def test_the_dry_step_of_a_task_is_that_of_a_run(changes, tmp_path):
    before = str(tmp_path / "before")
    tiny_run.save(tmp_path / "before")
    more: dict[str, Any] = dict(changes, compile_cache="")
    if "distill" in more:
        more["distill"] = dict(teacher=before)
    if "init_from" in more:
        more["init_from"] = before
    data = toy_task.custom(tmp_path) | more.pop("data", {})
    shape = dict(vocab_size=384) | more.pop("model", {})
    cfg = tiny_config(data=data, model=shape, **more)
    setup, got = run.Setup.of(cfg), dry.Step.of(cfg, jax.devices())
    assert got.cfg == setup.cfg
    assert got.state == setup.abstract_state
    assert alike(got.batch, setup.train_batches.whole(0))
    assert alike(got.beside, setup.beside())
    got.lower("cpu")


def test_a_search_chooses_the_targets_length_too(tmp_path):
    data = toy_task.custom(tmp_path) | dict(targets_length=0)
    cfg = tiny_config(data=data, model=dict(vocab_size=384))
    wanted = run.Setup.of(dataclasses.replace(cfg, compile_cache="")).cfg
    found = [c for _, c in plan_search.candidates(cfg, aot.Topology.parse("cpu:8"))]
    lengths = {c.data.targets_length for c in found}
    assert lengths == {wanted.data.targets_length}


def test_a_task_and_a_teacher_need_their_vocabulary(tmp_path):
    gone = dict(vocab="nowhere.model")
    cfg = tiny_config(data=toy_task.custom(tmp_path) | gone)
    with pytest.raises(ValueError, match="config.data.tasks='toy' .*nowhere.model"):
        dry.Step.of(cfg, jax.devices())
    tiny_run.save(tmp_path / "before")
    cfg = tiny_config(data=gone, distill=dict(teacher=str(tmp_path / "before")))
    with pytest.raises(ValueError, match="config.distill.teacher=.* needs the voc"):
        dry.Step.of(cfg, jax.devices())


def test_a_vocabulary_of_two_files_is_here(tmp_path):
    pieces, merges = tmp_path / "pieces.json", tmp_path / "pairs.txt"
    alphabet = [*tokenizers.pre_tokenizers.ByteLevel.alphabet(), "th"]
    pieces.write_text(json.dumps({piece: i for i, piece in enumerate(alphabet)}))
    merges.write_text("#version: 0.2\nt h\n")
    cfg = tiny_config(data=dict(vocab=f"{pieces},{merges}"))
    words, notes = dry.vocabulary(cfg)
    assert notes == [] and not isinstance(words, dry.StandInVocab)


@pytest.mark.parametrize("name", ["t5_1_1_xxl", "ernie", "macbert", "bert"])
def test_a_vocabulary_file_that_is_not_here_changes_no_shape(name):
    here = load(name)
    missing = dataclasses.replace(
        here, data=dataclasses.replace(here.data, vocab="nowhere.model")
    )
    one = dry.example(here, dry.vocabulary(here)[0])
    words, (note,) = dry.vocabulary(missing)
    other = dry.example(missing, words)
    assert "nowhere.model" in note
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, other)


def test_the_state_on_one_device():
    """Adam holds three float32 of each parameter; all matrices are split 8 ways."""
    cfg = tiny_config(
        optim=dict(name="adamw"),
        sharding=dict(data=1, fsdp=8),
        data=dict(vocab="nowhere.model"),
    )
    held, _ = dry.state_bytes(cfg, dry.StandInVocab(128, 100))
    step = dry.Step.of(cfg, jax.devices())
    assert held == dry.held(step.state)
    whole = (
        3 * 4 * sum(math.prod(p.shape) for p in jax.tree.leaves(step.state["params"]))
    )
    assert whole / 8 < held < whole / 8 * 1.3  # norms and position tables are whole
