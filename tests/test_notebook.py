"""`from t5x_lite import load`: what a notebook asks a trained model."""

import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from t5x_lite import cli, config, load, train
from t5x_lite.model import trained_stream
from t5x_lite.run import Setup, alone

RUNS = {
    "encoder_decoder": "configs/demo.py:smoke",
    "decoder": "configs/gpt2.py:smoke",
    "encoder": "configs/roberta.py:smoke",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """structure -> a model after two steps."""
    folder, made = tmp_path_factory.mktemp("notebook"), {}
    for name, path in RUNS.items():
        raw: Any = cli.load_config(path)
        raw.data.cache_dir = str(folder / "stores")
        raw.compile_cache = ""
        train.train(config.freeze(raw), folder / name)
        made[name] = load(folder / name)
    return made


def test_fill(models):
    m = models["encoder_decoder"]
    text = "the house of ___ and the ___"
    one = m.fill(text, max_length=8)
    assert one.startswith("the house of") and one.count("[") == 2
    assert m.fill([text, text], max_length=8) == [one, one]
    assert models["encoder"].fill("the house ___ the Lord").count("[") == 1
    with pytest.raises(ValueError, match=r"generate\(text\)"):
        models["decoder"].fill(text)
    with pytest.raises(ValueError, match="no gap"):
        m.fill("nothing to do")


def test_generate(models):
    m = models["decoder"]
    one = m.generate("In the beginning", max_length=8)
    assert one.startswith("In the beginning")
    assert m.generate(["In the beginning"], max_length=8) == [one]
    drawn = [
        m.generate("And", max_length=8, temperature=1.0, seed=s) for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("structure", RUNS)
def test_encode(models, structure):
    """Means over a text's tokens: padding and the texts beside it play no part."""
    m = models[structure]
    texts = ["a short text", "a text that is a good deal longer than the first", "x"]
    together = m.encode(texts)
    assert together.shape == (3, m.config.model.d_model)
    assert together.dtype == np.float32
    for text, row_D in zip(texts, together, strict=True):
        np.testing.assert_allclose(m.encode(text), row_D, atol=1e-5)
    assert m.encode([]).shape == (0, m.config.model.d_model)


def test_score_is_that_of_the_training_loss(models, tmp_path):
    """The decoder's score of a text is -nll of the evaluation step on that text."""
    from t5x_lite import step

    m = models["decoder"]
    setup = Setup.of(alone(m.config), jax.devices()[:1])
    batch = {k: v for k, v in setup.heldout_batches[0].items() if k != "fingerprint"}
    stream = batch[trained_stream(m.config.model)]
    # The first row's text without a border of documents inside.
    tokens_T = stream["targets"][0]
    text = m.vocab.decode(tokens_T[:40])
    ids = m.vocab.encode(text)
    assert list(ids) == list(tokens_T[:40])
    T = stream["tokens"].shape[1]
    row = {k: v[:1].copy() for k, v in stream.items()}
    row["tokens"][0, 0], row["tokens"][0, 1 : len(ids) + 1] = m.vocab.eos_id, ids
    row["targets"][0, : len(ids)] = ids
    row["weights"][0] = np.arange(T) < len(ids)
    evaluate = step.make_eval_step(m._net, m.config, m.vocab.size)
    nll = float(evaluate(m.params, {"main": row})["tokens"].nll)
    assert m.score(text) == pytest.approx(-nll, rel=1e-4)
    assert m.score([text, text[:10]]) == pytest.approx(
        [m.score(text), m.score(text[:10])], rel=1e-4
    )


def test_encoders_score_too(models):
    plain, odd = models["encoder"].score(["the Lord", "the Lord said unto him"])
    assert odd < plain < 0


def test_the_example_of_the_readme(models):
    """It runs as it stands, on a run of the demo's config."""
    readme = pathlib.Path("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (block,) = (b for b in blocks if "from t5x_lite import load" in b)
    m = models["encoder_decoder"]
    source = block.replace('load("runs/demo")', "given")
    assert source != block
    exec(compile(source, "README.md", "exec"), {"given": m})


def test_repr_and_errors(models, tmp_path):
    assert "decoder" in repr(models["decoder"]) and "step 2" in repr(models["decoder"])
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)
