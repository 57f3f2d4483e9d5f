"""Entities of the user's file: phrases, embeddings, what does not fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import cli, config, model, parameters, run, step
from t5x_lite.objectives import entities as objective
from tests.inplace import MODEL, load
from tests.test_entities import FILE

# ---- the user's file -----------------------------------------------------------------


def saved(path, **more) -> str:
    with np.load(FILE) as file:
        np.savez(path, phrases=file["phrases"][:50], vocab=file["vocab"], **more)
    return str(path)


def test_several_phrases_may_mention_one_entity(tmp_path):
    ids = np.arange(50) // 2
    known = objective.load_entities(
        saved(tmp_path / "e.npz", entities=ids), load(MODEL)
    )
    assert known.count == 25 and known.of_phrase_P.tolist() == ids.tolist()


def test_lines_of_text_may_be_single_words(tmp_path):
    vocab, path = load(MODEL), tmp_path / "e.txt"
    path.write_text("the\n\nof the\n")
    known = objective.load_entities(str(path), vocab)
    (ids_T,) = vocab.encode_batch([" end of the day and the night"])
    _, found_BM = objective.mentions(ids_T[None].astype(np.int32), vocab, known)
    assert found_BM[found_BM > 0].tolist() == [2, 1]


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(entities=np.arange(3)), "one for each"),
        (dict(entities=np.zeros(50, int)), "two or more"),
        (dict(embeddings=np.zeros((4, 5))), "d_entity"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        objective.load_entities(saved(tmp_path / "e.npz", **more), load(MODEL))


def setup(tmp_path, **model_changes) -> run.Setup:
    rng = np.random.default_rng(0)
    raw: Any = cli.load_config("configs/ernie_thu.py:smoke")
    raw.data.cache_dir, raw.compile_cache = str(tmp_path), ""
    table = rng.normal(size=(60, 100)).astype(np.float32)
    raw.objective.entities = saved(tmp_path / "given.npz", embeddings=table)
    raw.model.update(model_changes)
    return run.Setup.of(config.freeze(raw), jax.devices()[:1])


def test_embeddings_of_the_file_are_the_models(tmp_path):
    made = setup(tmp_path)
    assert made.cfg.model.entities == 128
    table = made.create_state()["params"]["entity_embedding"]
    given = objective.load_entities(made.cfg.objective["entities"], made.vocab)
    np.testing.assert_array_equal(table[:60], given.embeddings_EC)
    assert 0 < float(jnp.abs(table[60:]).max()) < 0.2


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(d_entity=0), "aligns entities"),
        (dict(entities=59), "Set 60 or more"),
        (dict(d_entity=98), "must be a multiple"),
        (dict(norm_order="pre"), "allowed is 'post'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        setup(tmp_path, **changes)


def test_embeddings_of_another_width_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Set it to 100"):
        setup(tmp_path, d_entity=40).create_state()


def test_all_losses_add_up(tmp_path):
    made = setup(tmp_path)
    cfg = dataclasses.replace(
        made.cfg, model=dataclasses.replace(made.cfg.model, dropout=0.0)
    )
    net = model.build(cfg.model)
    params = parameters.init_params(net, jax.random.key(0))
    batch = {"main": made.train_batches[0]["main"]}
    total, sums = step.batch_sums(net, params, batch, cfg, made.vocab.size)
    assert set(sums) == {"tokens", "classes", "entities"}
    means = sum(float(s.objective / s.weight) for s in sums.values())
    np.testing.assert_allclose(float(total), means, rtol=1e-5)
