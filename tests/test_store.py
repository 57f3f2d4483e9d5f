"""Sources and the token store: content, damage, kill -9, many processes, bad input."""

import errno
import gzip
import itertools
import json
import logging
import lzma
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from t5x_lite import vocab as vocabularies
from t5x_lite.data import sources, store

ROOT = Path(__file__).resolve().parents[1]
BYTES = vocabularies.load("bytes")
TEXTS = [f"Document {i} says {'word ' * (i % 7)}" for i in range(300)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return str(path)


def expected_tokens(texts, vocab=BYTES):
    return np.concatenate([[*vocab.encode(t), vocab.eos_id] for t in texts])


def all_tokens(opened):
    return opened.windows(np.array([0]), opened.n_tokens)[0]


def open_quietly(source, cache, vocab=BYTES):
    return store.open_store(source, vocab, cache, progress=False)


# Sources


def test_text_and_jsonl_give_the_same_documents_compressed_or_not(tmp_path):
    documents = ["One line.", "Two\nlines — ünïcode", "three"]
    txt = ("\n\n \n".join(documents) + "\n").encode()
    lines = [json.dumps({"text": t, "title": "x"}) + "\n" for t in documents]
    jsonl = "\n".join([*lines, '{"text": "  "}']).encode()
    for name, content in [("a.txt", txt), ("a.jsonl", jsonl)]:
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(content))
    for path in tmp_path.iterdir():
        assert list(sources.documents(str(path))) == documents
        assert list(sources.documents(str(path), start=2)) == documents[2:]
    assert list(sources.documents(str(tmp_path / "*.txt*"))) == documents * 3


def test_a_byte_order_mark_and_dos_lines_are_not_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert list(sources.documents(str(tmp_path / "dos.txt"))) == ["one", "two"]


BAD_SOURCES = {
    "empty.txt": (b"", r"empty.txt' \(0 bytes\) holds no text"),
    "blank.jsonl": (b'\n{"text": " "}\n', "holds no text"),
    "binary.txt": (b"a\nb\0\x01", "line 2: a NUL byte: this is a binary file"),
    "latin.txt": ("a\n\né".encode("latin1"), "line 3: not UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n{text', "line 2: not JSON"),
    "field.jsonl": (b'{"body": "a"}', r"line 1: no field \"text\".*\['body'\]"),
    "number.jsonl": (b'{"text": 3}', 'line 1: no field "text"'),
    "list.jsonl": (b"[1]", "the line holds list"),
    "cut.txt.gz": (gzip.compress(os.urandom(9999).hex().encode())[:5000], "broken .gz"),
    "no.txt.gz": (b"plain text", "broken .gz"),
    "no.txt.xz": (b"plain text", "broken .xz"),
    "a.parquet": (b"PAR1", "unknown kind of file. Allowed: .txt or .jsonl"),
    "plain": (b"text", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_bad_source_is_one_clear_error_and_no_store(name, tmp_path):
    content, message = BAD_SOURCES[name]
    (tmp_path / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            open_quietly(str(tmp_path / name), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/store.json"))


def test_a_missing_source_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="matches none"):
        sources.documents(str(tmp_path / "none*.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        sources.documents(str(tmp_path))


# The store


@pytest.mark.parametrize("spec", ["bytes", str(ROOT / "data/vocab_4k.model")])
def test_the_store_is_the_documents_each_with_eos(spec, corpus, tmp_path):
    vocab = vocabularies.load(spec)
    opened = open_quietly(corpus, tmp_path / "cache", vocab)
    expected = expected_tokens(TEXTS, vocab)
    assert (opened.n_tokens, opened.n_documents) == (len(expected), len(TEXTS))
    np.testing.assert_array_equal(all_tokens(opened), expected)


def test_windows_wrap_around(corpus, tmp_path):
    opened = open_quietly(corpus, tmp_path / "cache")
    twice = np.tile(expected_tokens(TEXTS), 2)
    n = opened.n_tokens
    for starts in ([0, 5, n - 10], [n - 9, 3, n - 1], [n - 10]):
        windows = opened.windows(np.array(starts), 10)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows, [twice[s : s + 10] for s in starts])
    with pytest.raises(ValueError, match=f"the store has {n}"):
        opened.windows(np.array([0]), n + 1)


def test_the_store_is_a_zarr_array_of_the_smallest_type(corpus, tmp_path):
    for sentinels, dtype in [(100, "uint16"), (70_000, "uint32")]:
        vocab = vocabularies.load("bytes", sentinels=sentinels)
        opened = open_quietly(corpus, tmp_path / "cache", vocab)
        folder = str(tmp_path / "cache" / opened.fingerprint)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}}
        array = tensorstore.open(spec, open=True).result()
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array.read().result(), expected_tokens(TEXTS))


def test_one_token_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\n\nc\n")
    opened = open_quietly(str(tmp_path / "a.txt"), tmp_path / "cache")
    assert all_tokens(opened).tolist() == [100, 1, 101, 1, 102, 1]


def test_a_ready_store_is_reused_and_a_stale_one_is_not(corpus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = open_quietly(corpus, cache)

    def no_build(*_):
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_build", no_build)
        assert open_quietly(corpus, cache).fingerprint == first.fingerprint
    fingerprints = {first.fingerprint}
    # The same size and modification time: only the content tells.
    stat = os.stat(corpus)
    Path(corpus).write_text(
        Path(corpus).read_text().replace("Document 7", "Document 8")
    )
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = open_quietly(corpus, cache)
    assert not np.array_equal(all_tokens(changed), expected_tokens(TEXTS))
    fingerprints.add(changed.fingerprint)
    fewer = vocabularies.load("bytes", sentinels=9)
    fingerprints.add(open_quietly(corpus, cache, fewer).fingerprint)
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    fingerprints.add(open_quietly(corpus, cache).fingerprint)
    assert len(fingerprints) == 4


def test_digests_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    path, memory, reads = tmp_path / "a", tmp_path / "digests.json", []
    path.write_text("one")

    def digest(file):
        reads.append(file.read())
        return len(reads)

    digests = store._Digests(memory)
    assert [digests.of(path, digest) for _ in range(2)] == [1, 2]  # too recent to keep
    later = time.time_ns() + 10 * 10**9
    monkeypatch.setattr(store.time, "time_ns", lambda: later)
    assert [digests.of(path, digest) for _ in range(2)] == [3, 3]
    digests.save()
    digests = store._Digests(memory)
    assert digests.of(path, digest) == 3
    stat = path.stat()
    time.sleep(0.02)  # a further tick of the file system's clock
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digests.of(path, digest) == 4 and reads[-1] == b"two"


def truncate(path):
    os.truncate(path / "c/0", 1000)


def flip(path):
    content = bytearray((path / "c/0").read_bytes())
    content[500] ^= 1
    (path / "c/0").write_bytes(content)


def garble(path):
    (path / "store.json").write_text('{"n_tokens": 3}')


def lose(path):
    (path / "c/0").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, garble, lose])
def test_a_damaged_store_is_reported_and_rebuilt(damage, corpus, tmp_path, caplog):
    opened = open_quietly(corpus, tmp_path / "cache")
    damage(tmp_path / "cache" / opened.fingerprint)
    with caplog.at_level(logging.WARNING):
        again = open_quietly(corpus, tmp_path / "cache")
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(all_tokens(again), expected_tokens(TEXTS))


# Killed, interrupted, full


def files_of(cache):
    folder = next(p for p in Path(cache).iterdir() if p.is_dir())
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_at_every_write_leaves_the_same_result(
    call, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "BATCH_CHARS", 500)
    monkeypatch.setattr(store, "COMMIT_SECONDS", 0)
    open_quietly(corpus, tmp_path / "whole")
    real, crashes = getattr(os, call), 0
    finished = False
    while not finished:
        calls = itertools.count()

        def crash(*args, calls=calls, dies_at=2 + crashes % 3, after=crashes % 2):
            # A few calls get through each time, then the process "dies".
            if next(calls) == dies_at:
                if after:
                    real(*args)
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(store.os, call, crash)
            try:
                open_quietly(corpus, tmp_path / "cache")
                finished = True
            except KeyboardInterrupt:
                crashes += 1
    assert crashes > 3
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


SLOW_BUILD = """
import sys, time
from t5x_lite import vocab
from t5x_lite.data import store
store.BATCH_CHARS, store.COMMIT_SECONDS = 500, 0
commit = store._commit
def slow_commit(*args):
    commit(*args)
    print("commit", flush=True)
    time.sleep(0.02)
store._commit = slow_commit
opened = store.open_store(sys.argv[1], vocab.load("bytes"), sys.argv[2], progress=False)
print("ready", opened.fingerprint, flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_9_and_resume_gives_identical_bytes(corpus, tmp_path):
    open_quietly(corpus, tmp_path / "whole")
    rng, reached = random.Random(0), []
    for _ in range(4):
        process = start(SLOW_BUILD, corpus, tmp_path / "cache")
        assert process.stdout and process.stdout.readline() == "commit\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        progress = next((tmp_path / "cache").glob("*/progress.json"))
        reached.append(json.loads(progress.read_text())["n_documents"])
    assert 0 < reached[0] < reached[-1] < len(TEXTS)
    open_quietly(corpus, tmp_path / "cache")
    left = files_of(tmp_path / "cache")
    parts = [name for name in left if name.endswith(".part")]
    assert {n: c for n, c in left.items() if n not in parts} == files_of(
        tmp_path / "whole"
    )


def test_processes_that_start_at_once_share_one_build(corpus, tmp_path):
    processes = [start(SLOW_BUILD, corpus, tmp_path / "cache") for _ in range(3)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert sum("commit" in out for out, _ in outputs) == 1
    assert sum("waiting for it" in err for _, err in outputs) == 2


FULL_DISK = """
import resource, signal, sys
from t5x_lite import vocab
from t5x_lite.data import store
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    store.open_store(sys.argv[1], vocab.load("bytes"), sys.argv[2], progress=False)
except OSError as error:
    print(error.errno, error)
"""


def test_a_full_disk_is_a_clear_error_and_the_build_goes_on_later(corpus, tmp_path):
    out, err = start(FULL_DISK, corpus, tmp_path / "cache").communicate(timeout=60)
    assert out.startswith(f"{errno.EFBIG} "), err
    assert "cannot be written" in out and "Free some space" in out
    opened = open_quietly(corpus, tmp_path / "cache")
    np.testing.assert_array_equal(all_tokens(opened), expected_tokens(TEXTS))


def test_a_cache_dir_that_cannot_be_made(corpus):
    with pytest.raises(OSError, match="cannot be written.*another cache_dir"):
        open_quietly(corpus, corpus)


def test_a_source_changed_while_it_is_tokenised(corpus, tmp_path, monkeypatch):
    def build_then_change(*args, build=store._build):
        done = build(*args)
        with open(corpus, "a") as file:
            file.write('{"text": "more"}\n')
        return done

    with monkeypatch.context() as patch:
        patch.setattr(store, "_build", build_then_change)
        with pytest.raises(ValueError, match="was changed while it was tokenised"):
            open_quietly(corpus, tmp_path / "cache")
    opened = open_quietly(corpus, tmp_path / "cache")
    np.testing.assert_array_equal(all_tokens(opened), expected_tokens([*TEXTS, "more"]))
