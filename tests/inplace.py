"""Text and helpers for the tests of in-place objectives."""

import functools
import json
from typing import Any

import numpy as np
import pytest

from t5x_lite import vocab as vocabularies
from t5x_lite.example import Passages
from t5x_lite.objectives.draws import Draws

VOCABS = ("bytes", "data/vocab_4k.model")


MODEL = VOCABS[1]


every_vocab = pytest.mark.parametrize("spec", VOCABS)


@functools.cache
def load(spec):
    return vocabularies.load(spec)


@functools.cache
def documents(spec):
    with open("data/heldout.jsonl", encoding="utf-8") as file:
        return load(spec).encode_batch([json.loads(line)["text"] for line in file])


@functools.cache
def stream(spec):
    eos = np.array([load(spec).eos_id], np.int32)
    return np.concatenate([x for doc in documents(spec) for x in (doc, eos)])


def raw_text(spec, first, batch, raw, pairs=False) -> Any:
    """Example i reads the same text in any batch; every fifth passage is short."""
    text, vocab = stream(spec), load(spec)

    def window(i):
        start = (i * 7919 * 13) % (len(text) - raw)
        return text[start : start + raw].astype(np.int32)

    rows = np.stack([window(i) for i in range(first, first + batch)])
    if not pairs:
        return rows
    others = np.stack([window(i + 10**6) for i in range(first, first + batch)])
    is_short = np.arange(first, first + batch) % 5 == 0
    rows[is_short, raw - raw // 3 :] = vocab.pad_id
    others[is_short, raw // 4 :] = vocab.pad_id
    return Passages(rows, others)


def built(function, tokens, vocab, seed=0, **knobs) -> Any:
    batch = len(getattr(tokens, "tokens_BT", tokens))
    return function(tokens, Draws(seed, 0, batch), vocab, **knobs)


def rate_is(count, total, share):
    """Within four standard deviations of a binomial."""
    return abs(count - total * share) <= 4 * np.sqrt(total * share * (1 - share))
