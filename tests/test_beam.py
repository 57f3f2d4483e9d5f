"""Beam search against every possible text, greedy decoding and its own promises."""

import itertools
from typing import Any

import numpy as np
import pytest

from t5x_lite import beam, decoding
from tests import tiny
from tests.test_decoding import EOS, forced_logits, make, ragged

USED, LENGTH = 4, 3
SETTINGS: dict[str, Any] = dict(max_length=LENGTH, eos_id=EOS, used_ids=USED)


def all_texts() -> list[tuple[int, ...]]:
    """Every text of ids below USED that ends with EOS or is LENGTH long."""
    texts = []
    for length in range(1, LENGTH + 1):
        for text in itertools.product(range(USED), repeat=length):
            ended = text[-1] == EOS
            if EOS not in text[:-1] and (ended or length == LENGTH):
                texts.append(text)
    return texts


def scores_of(net, params, row: dict, alpha: float, min_length: int) -> dict:
    """Text -> score by Wu et al. 2016, section 7, from the uncached forward pass.

    Texts that are too short are left out; what the model thinks of the others stays.
    """
    texts = [t for t in all_texts() if EOS not in t[:min_length]]
    padded = np.zeros((len(texts), LENGTH), np.int32)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
    rows = {name: np.repeat(a, len(texts), axis=0) for name, a in row.items()}
    logits = np.array(forced_logits(net, params, rows, padded), np.float64)
    logits[..., USED:] = -np.inf
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for i, text in enumerate(texts):
        total = sum(logp[i, t, token] for t, token in enumerate(text))
        found[text] = total / ((5 + len(text)) / 6) ** alpha
    return found


@pytest.mark.parametrize(
    "name, alpha, min_length",
    [("t5_1_1", 0.6, 1), ("gpt2", 1.5, 0)],
)
def test_enough_beams_find_every_text_in_order(name, alpha, min_length, strict_dtypes):
    net, params = make(name)
    rng = np.random.default_rng(0)
    stream = ragged(rng, lengths=(10, 4)) if name == "t5_1_1" else None
    stream = stream or tiny.stream(rng, 2, 6, causal=True)
    count = len(scores_of(net, params, {k: v[:1] for k, v in stream.items()}, 0.0, 0))
    tokens, scores = beam.search(
        net,
        params,
        stream,
        beams=count,
        length_penalty=alpha,
        min_length=min_length,
        **SETTINGS,
    )
    for b in range(2):
        row = {k: v[b : b + 1] for k, v in stream.items()}
        wanted = scores_of(net, params, row, alpha, min_length)
        best = sorted(wanted, key=lambda text: -wanted[text])
        found = np.asarray(scores[b])
        np.testing.assert_allclose(
            found[: len(best)], [wanted[text] for text in best], rtol=1e-4, atol=1e-5
        )
        assert np.all(found[len(best) :] == -np.inf)
        for text, got, score in zip(best, np.asarray(tokens[b]), found, strict=False):
            got = tuple(got[: len(text)].tolist())
            assert got == text or abs(wanted[got] - score) < 1e-4  # a tie


def test_one_beam_without_a_penalty_is_greedy():
    net, params = make("t5_prefix")
    stream = tiny.stream(np.random.default_rng(1), 3, 8, causal=True)
    settings: dict[str, Any] = dict(max_length=9, eos_id=EOS, used_ids=100)
    greedy, logp = decoding.generate(net, params, stream, **settings)
    tokens, scores = beam.search(
        net, params, stream, beams=1, length_penalty=0.0, **settings
    )
    np.testing.assert_array_equal(tokens[:, 0], greedy)
    np.testing.assert_allclose(scores[:, 0], logp, rtol=1e-5)


def test_rows_do_not_depend_on_their_neighbours_and_empty_ones_end():
    net, params = make("t5_1_1")
    stream = ragged(np.random.default_rng(2), lengths=(10, 0, 7))
    settings: dict[str, Any] = dict(max_length=6, eos_id=EOS, used_ids=100, beams=3)
    tokens, scores = beam.search(net, params, stream, **settings)
    assert np.all(np.asarray(scores[1]) == -np.inf)
    assert np.all(np.asarray(tokens[1]) == 0)
    alone = {name: a[[2, 2, 2]] for name, a in stream.items()}
    one, score = beam.search(net, params, alone, **settings)
    np.testing.assert_array_equal(one[1], tokens[2])
    np.testing.assert_allclose(score[1], scores[2], rtol=1e-5)
    assert np.all(np.diff(np.asarray(scores[2])) <= 0)


def test_settings_out_of_range_are_refused():
    net, params = make("t5_1_1")
    stream = tiny.stream(np.random.default_rng(0), 1, 4, causal=False)
    for changes, message in (
        (dict(beams=0), "beams=0"),
        (dict(length_penalty=-1.0), "length_penalty=-1.0"),
        (dict(min_length=4), "min_length=4"),
        (dict(max_length=0), "max_length=0"),
    ):
        with pytest.raises(ValueError, match=message):
            settings: dict[str, Any] = SETTINGS | changes
            beam.search(net, params, stream, **settings)


def test_best_leaves_out_the_end():
    tokens = np.array([[[5, 6, EOS, 0]], [[7, 8, 9, 10]]])
    assert beam.best(tokens, EOS) == [[5, 6], [7, 8, 9, 10]]
