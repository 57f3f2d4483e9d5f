"""A corpus with duplicates, and the stores that are built of it."""

import gzip
import json
from pathlib import Path

import numpy as np

from t5x_lite import vocab as vocabularies
from t5x_lite.data import building, store

ROOT = Path(__file__).resolve().parents[1]
BYTES = vocabularies.load("bytes")
# Many of every third came before, in the same file or in another.
NUMBERS = [i if i % 3 else i * 7 % 100 for i in range(300)]
TEXTS = [f"Document {n} says {'word ' * (n % 7)}" for n in NUMBERS]
FIRST = list(dict.fromkeys(TEXTS))


def write_corpus(tmp_path):
    """Three files; the second one is compressed, the third plain text."""
    lines = [json.dumps({"text": t}) + "\n" for t in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join([*lines[:170], '{"text": " "}\n']))
    packed = gzip.compress("".join(lines[170:180]).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    (tmp_path / "c.txt").write_text("\n\n".join(TEXTS[180:]))
    return str(tmp_path / "*.*")


def take_small_steps(monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARS", 500)
    monkeypatch.setattr(building, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(building, "BLOCK_BYTES", 1000)


def expected_tokens(texts, vocab=BYTES):
    return np.concatenate([[*vocab.encode(t), vocab.eos_id] for t in texts])


def all_tokens(opened):
    return opened.windows(np.array([0]), opened.n_tokens)[0]


def open_quietly(source, cache, vocab=BYTES, **more):
    return store.open_store(source, vocab, cache, progress=False, **more)


def files_of(cache):
    folder = next(p for p in Path(cache).iterdir() if p.is_dir())
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            content = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = content.rpartition(")")[2].split()[:2]
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found
