"""Sources and the token store: content, reuse, damage of every kind."""

import gzip
import json
import logging
import lzma
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from t5x_lite import vocab as vocabularies
from t5x_lite.data import building, records, sources, store
from tests.token_stores import (
    BYTES,
    all_tokens,
    expected_tokens,
    files_of,
    open_quietly,
)

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [f"Document {i} says {'word ' * (i % 7)}" for i in range(300)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return str(path)


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
    "a.parquet": (b"PAR1", "broken .parquet"),
    "a.csv": (b"a,b", "unknown kind of file. Allowed: .txt or .jsonl"),
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

    assert (
        store.open_store(corpus, BYTES, cache, build=no_build).fingerprint
        == first.fingerprint
    )
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

    digests = records.Digests(memory)
    assert [digests.of(path, digest) for _ in range(2)] == [1, 2]  # too recent to keep
    later = time.time_ns() + 10 * 10**9
    monkeypatch.setattr(records.time, "time_ns", lambda: later)
    assert [digests.of(path, digest) for _ in range(2)] == [3, 3]
    digests.save()
    digests = records.Digests(memory)
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


def other_type(path):
    (path / "zarr.json").write_text((path / "zarr.json").read_text().replace("16", "8"))


def other_counts(path):
    (path / "statistics.json").write_text("{}")


DAMAGES = {
    truncate: "c/0 has 1000 bytes of tokens instead of",
    flip: "c/0, tokens 128 to 255: crc32",
    garble: "store.json is not as it was written",
    lose: "No such file",
    other_type: "zarr.json is not as it was written",
    other_counts: "statistics.json is not as it was written",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_reported_and_rebuilt(
    damage, corpus, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(building, "BLOCK_BYTES", 256)
    opened = open_quietly(corpus, tmp_path / "cache")
    whole = files_of(opened.path)
    damage(opened.path)
    with caplog.at_level(logging.WARNING):
        again = open_quietly(corpus, tmp_path / "cache")
    assert f"{opened.path} is damaged: " in caplog.text
    assert DAMAGES[damage] in caplog.text
    np.testing.assert_array_equal(all_tokens(again), expected_tokens(TEXTS))
    assert files_of(opened.path) == whole
    if damage is not truncate:  # whoever had opened it keeps what they had
        assert opened.n_tokens == len(all_tokens(opened))


def test_blocks_that_come_out_even(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "BLOCK_BYTES", 64)
    for size in (31, 32, 33, 63, 64, 65):
        (tmp_path / "a.txt").write_text("x" * (size - 1))
        opened = open_quietly(str(tmp_path / "a.txt"), tmp_path / "cache")
        assert opened.n_tokens == size
        meta = records.read(opened.path / "store.json")
        content = (opened.path / "c/0").read_bytes()
        starts = range(0, len(content) + 1, 64)
        assert meta["blocks"] == [zlib.crc32(content[s : s + 64]) for s in starts]


def test_all_is_read_again_when_asked(corpus, tmp_path, monkeypatch, caplog):
    later = time.time_ns() + 10 * 10**9
    monkeypatch.setattr(records.time, "time_ns", lambda: later)
    opened = open_quietly(corpus, tmp_path / "cache")
    reads = []
    crc32_of_blocks = store.crc32_of_blocks

    def count(file):
        reads.append(file.name)
        return crc32_of_blocks(file)

    count.__name__ = "crc32_of_blocks"
    monkeypatch.setattr(store, "crc32_of_blocks", count)
    open_quietly(corpus, tmp_path / "cache")
    assert not reads
    flip(opened.path)
    # As a disk that returns something else: nothing tells that the file has changed.
    content = records.read(tmp_path / "cache/digests.json")
    stat = (opened.path / "c/0").stat()
    key = f"crc32_of_blocks {(opened.path / 'c/0').resolve()}"
    changed = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    content[key][:4] = changed
    records.write(tmp_path / "cache/digests.json", content)
    open_quietly(corpus, tmp_path / "cache")
    assert not reads and "damaged" not in caplog.text
    store.open_store(corpus, BYTES, tmp_path / "cache", progress=False, verify=True)
    assert reads and "damaged" in caplog.text


def test_names_in_a_store_lead_nowhere(corpus, tmp_path):
    opened = open_quietly(corpus, tmp_path / "cache")
    outside = tmp_path / "outside.json"
    outside.write_text("secret")
    meta = records.read(opened.path / "store.json")
    digest = records.sha256_of(outside)
    for name in ("../../outside.json", str(outside)):
        meta["files"][name] = digest
        meta["c/0"] = meta["path"] = meta["source"] = name
    records.write(opened.path / "store.json", meta)
    again = open_quietly(corpus, tmp_path / "cache")
    np.testing.assert_array_equal(all_tokens(again), expected_tokens(TEXTS))
    assert outside.read_text() == "secret"
