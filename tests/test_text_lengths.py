"""A targets_length of 0: filled in by the data, the same wherever and whenever."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import checkpoint, config, run, vocab
from t5x_lite.data import packing, task_batches, text_lengths
from t5x_lite.studies import costs
from tests.tiny import tiny_config
from tests.toy_task import custom, opened

WORDS = vocab.load("bytes")


def open_length(folder, structure="encoder_decoder", **data) -> config.Config:
    tables = custom(folder) | dict(targets_length=0, vocab="bytes") | data
    model = dict(structure=structure, vocab_size=384)
    return tiny_config(data=tables, model=model, compile_cache="")


def rows(folder, targets_length: int) -> task_batches.TextExamples:
    made = opened(folder, data=dict(targets_length=targets_length))[2].made
    assert isinstance(made, task_batches.TextExamples)
    return made


def test_an_encoder_decoder_gets_what_packs_best(tmp_path):
    """Lengths that are far from it fill the rows less."""
    cfg = text_lengths.resolve(open_length(tmp_path), WORDS)
    made = rows(tmp_path, 500)
    lengths_X2 = np.array(
        [(len(i), len(t)) for i, t in zip(made.inputs, made.targets, strict=True)]
    )
    T = packing.targets_length(lengths_X2, cfg.data.inputs_length, seed=cfg.seed)
    assert cfg.data.targets_length == T >= lengths_X2[:, 1].max()
    chosen = rows(tmp_path, T)
    for other in (T // 2 + 2, 3 * T):
        assert rows(tmp_path, other).packs.fill < chosen.packs.fill


@pytest.mark.parametrize("structure", ["decoder", "prefix_lm"])
def test_one_stream_gets_the_longest_targets(structure, tmp_path):
    cfg = text_lengths.resolve(open_length(tmp_path, structure), WORDS)
    assert cfg.data.targets_length == len("good") + 1  # EOS


def test_what_was_set_stays(tmp_path):
    given = open_length(tmp_path, targets_length=77)
    assert text_lengths.resolve(given, WORDS) is given
    head = open_length(tmp_path, task_format="head")
    assert text_lengths.resolve(head, WORDS) is head


def test_the_run_keeps_it_and_resumes_with_it(tmp_path):
    """Held-out rows have it too; a restart and another process find the same."""
    cfg = open_length(tmp_path)
    setups = [run.Setup.of(cfg, jax.devices()[:1]) for _ in range(2)]
    T = setups[0].cfg.data.targets_length
    assert T > 0
    for setup in setups:
        assert setup.cfg.data.targets_length == T
        assert setup.train_batches.shapes["decoder"][0] == T
        assert setup.heldouts["toy"].shapes["decoder"][0] == T
    assert setups[0].data_identity() == setups[1].data_identity()
    meta = checkpoint.make_meta(setups[0].cfg, 1, setups[0].data_identity())
    again = config.freeze(json.loads(json.dumps(meta["config"])))
    assert again.data.targets_length == T
    assert run.Setup.of(again, jax.devices()[:1]).data_identity() == meta["data"]
    # Its cost is that of the length it gets.
    fixed = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, targets_length=T)
    )
    assert costs.of(cfg) == costs.of(fixed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(targets_length=1), "targets_length=1 holds EOS alone"),
        (dict(mixture=dict(a=dict(train="x"))), "cannot be chosen in a config.data.mi"),
        (dict(tasks=("toi",)), "no task 'toi'"),
    ],
)
def test_lengths_that_cannot_be(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        text_lengths.resolve(open_length(tmp_path, **data), WORDS)
