"""Builds stores of tokens and reads them whole."""

import numpy as np

from t5x_lite import vocab as vocabularies
from t5x_lite.data import store

BYTES = vocabularies.load("bytes")


def expected_tokens(texts, vocab=BYTES):
    return np.concatenate([[*vocab.encode(t), vocab.eos_id] for t in texts])


def all_tokens(opened):
    return opened.windows(np.array([0]), opened.n_tokens)[0]


def open_quietly(source, cache, vocab=BYTES):
    return store.open_store(source, vocab, cache, progress=False)


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }
