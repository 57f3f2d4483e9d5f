"""Config: one readable list of errors; every experiment file is sound."""

import importlib
import json
import pathlib

import pytest

from t5x_lite import config, run, vocab
from tests.tiny import tiny_config

EXPERIMENTS = sorted(
    p.stem
    for p in pathlib.Path("configs").glob("*.py")
    if p.stem not in ("__init__", "models")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("arg", ["", "smoke"])
def test_every_experiment_is_a_valid_config(name, arg):
    config.freeze(importlib.import_module(f"configs.{name}").get_config(arg))


def test_the_nearest_name_ends_the_sentence():
    assert config.nearest("lerning", ["learning"]) == "; did you mean 'learning'?"
    assert config.nearest("zz", ["learning"]) == "."


def test_all_problems_are_listed_at_once_with_the_nearest_key():
    raw = config.to_json(config.Config())
    raw["steps"] = 0
    raw["model"]["dropuot"] = 0.1
    raw["optim"]["name"] = "adafactr"
    raw["loss"]["z_loss"] = "much"
    with pytest.raises(config.ConfigError) as error:
        config.freeze(raw)
    text = str(error.value)
    assert "config.steps=0 must be at least 1" in text
    assert "config.model.dropuot is no config key; did you mean 'dropout'?" in text
    assert "config.optim.name='adafactr' is not one of" in text
    assert "did you mean 'adafactor'?" in text
    assert "config.loss.z_loss='much' must be of type float" in text
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    "section, values, words",
    [
        ("optim", dict(microbatches=3), "must be a multiple of"),
        ("optim", dict(schedule="linear", warmup_steps=5000), "warmup_steps"),
        ("sharding", dict(data=-1, fsdp=-1), "at most one -1"),
        ("model", dict(relative_buckets=64), "relative_max_distance"),
    ],
)
def test_fields_that_do_not_fit_together(section, values, words):
    with pytest.raises(config.ConfigError, match=words):
        tiny_config(**{section: values})


def test_json_round_trip_gives_the_same_config():
    cfg = tiny_config(optim=dict(lr_rules=(("embedding", 0.0), (".*", 1.0))))
    again = config.freeze(json.loads(json.dumps(config.to_json(cfg))))
    assert again == cfg


def test_the_help_lists_every_key():
    text = config.describe()
    assert "--config.optim.learning_rate=1.0" in text
    assert "--config.sharding.fsdp=1" in text


@pytest.mark.parametrize("size, fits", [(0, True), (359, True), (384, True),
                                        (358, False), (32_128, False)])  # fmt: skip
def test_a_vocabulary_that_does_not_match_the_model_is_refused(size, fits):
    words = vocab.load("bytes", 100)
    cfg = tiny_config(model=dict(vocab_size=size))
    if fits:
        assert run.resolve_vocab_size(cfg, words).model.vocab_size == (size or 384)
    else:
        with pytest.raises(ValueError, match="does not match the vocabulary"):
            run.resolve_vocab_size(cfg, words)
