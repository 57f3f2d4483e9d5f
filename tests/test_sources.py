"""Sources: the same documents from every kind of file, place and data set."""

import itertools
import os
import pathlib
import pickle
import random
import sys
import tracemalloc
from typing import Any

import fsspec
import pyarrow
import pytest

from t5x_lite import config_keys, vocab
from t5x_lite.data import sources, streams
from t5x_lite.data.texts import Counts, Options
from tests.source_files import COMPRESS, TEXTS, as_lines, read, write, write_parquet

# The same documents from every kind of file, place and data set


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_jsonl_compressed_or_not(suffix, tmp_path):
    compress = COMPRESS[suffix]
    blocks = write(tmp_path / f"a.txt{suffix}", compress("\n\n".join(TEXTS).encode()))
    records = as_lines({"text": t, "n": 1} for t in TEXTS)
    for content in [records, compress(records) + compress(records)]:  # of two parts
        path = tmp_path / f"a.jsonl{suffix}"
        write(path, content if suffix and content is not records else compress(records))
        times = 2 if suffix and content is not records else 1
        assert read(path)[0] == TEXTS * times
    assert read(blocks)[0] == TEXTS
    assert list(sources.documents(blocks, start=3)) == TEXTS[3:]
    assert read(tmp_path / "*")[0] == TEXTS * (3 if suffix else 2)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4"])
def test_parquet(compression, tmp_path):
    documents = [f"{t} {i}" for i, t in enumerate(TEXTS * 50)]
    path = write_parquet(
        tmp_path / "a.parquet", documents, compression=compression, row_group_size=70
    )
    assert read(path)[0] == documents
    assert list(sources.documents(path, start=99)) == documents[99:]


@pytest.mark.parametrize(
    "kind",
    [
        *(pyarrow.string(), pyarrow.large_string(), pyarrow.binary()),
        *(pyarrow.string_view(), pyarrow.large_binary()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_every_string_type_of_parquet(kind, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS, None, TEXTS[0]], kind=kind)
    found, counts = read(path)
    assert found == [*TEXTS, TEXTS[0]] and counts.empty == 1


def test_parquet_is_read_page_by_page(tmp_path):
    values = [random.Random(i).randbytes(2**13).hex() for i in range(2**11)]
    path = write_parquet(
        tmp_path / "a.parquet", values, use_dictionary=False, write_batch_size=16
    )
    assert os.path.getsize(path) > 16 * 2**20
    tracemalloc.start()  # what Arrow holds of a file object, beside its own pool
    try:
        before, most = pyarrow.total_allocated_bytes(), 0
        for document, value in zip(sources.documents(path), values, strict=True):
            most = max(most, pyarrow.total_allocated_bytes() - before)
            assert document == value
        most += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < most < 8 * 2**20


def test_documents_are_blocks_or_lines_or_files(tmp_path):
    one, two = "\nfirst\r\n line\n \t\n\u3000\nsecond\n\n", "third"
    write(tmp_path / "a.txt", one.encode())
    write(tmp_path / "b.txt", two.encode())
    write(tmp_path / "c.txt", b"")
    write(tmp_path / "d.py", b"x = 1\n\ny = 2\n")
    ab = tmp_path / "[ab].txt"
    assert read(ab)[0] == ["first\n line", "second", "third"]
    found, counts = read(ab, documents="lines")
    assert found == ["first", " line", "second", "third"]
    assert counts == Counts(documents=4, empty=4)
    found, counts = read(tmp_path / "*", documents="files")
    whole = "\nfirst\n line\n \t\n\u3000\nsecond"
    assert found == [whole, "third", "x = 1\n\ny = 2"]
    assert counts == Counts(documents=3, empty=1)
    with pytest.raises(ValueError, match="c.txt.*holds no text"):
        read(tmp_path / "*.txt", documents="lines")
    with pytest.raises(ValueError, match="holds no text at all .0 documents, 1 empty."):
        read(tmp_path / "c.txt", documents="files")


def test_another_field(tmp_path):
    records = [{"text": 1, "body": t} for t in TEXTS]
    path = write(tmp_path / "a.jsonl", as_lines(records))
    assert read(path, field="body")[0] == TEXTS
    path = write_parquet(tmp_path / "a.parquet", TEXTS, field="body")
    assert read(path, field="body")[0] == TEXTS


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_remote_files(memory, tmp_path):
    for i, suffix in enumerate(COMPRESS):
        content = COMPRESS[suffix](as_lines([{"text": t} for t in TEXTS]))
        memory.pipe(f"/bucket/{i}.jsonl{suffix}", content)
    local = write_parquet(tmp_path / "a.parquet", TEXTS)
    memory.put(local, "/bucket/4.parquet")
    assert read("memory://bucket/*")[0] == TEXTS * 5
    assert read("memory://bucket/3.jsonl.zst")[0] == TEXTS
    assert read(f"file://{local}")[0] == TEXTS
    before = sources.files("memory://bucket/*")
    assert before == sources.files("memory://bucket/*")
    assert [f.path for f in before] == [None] * 5 and all(f.size for f in before)
    memory.pipe("/bucket/0.jsonl", b'{"text": "x"}\n')
    changed = [
        a != b for a, b in zip(before, sources.files("memory://bucket/*"), strict=True)
    ]
    assert changed == [True, False, False, False, False]


def test_a_remote_file_with_a_checksum_is_not_read_twice(memory, monkeypatch):
    memory.pipe("/a.txt", b"one")
    listing = dict(size=3, type="file", name="/a.txt", mtime=7, ETag="e1")
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: listing)
    forgotten = []
    monkeypatch.setattr(
        type(memory), "invalidate_cache", lambda *a: forgotten.append(a)
    )
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "open", None)
        (file,) = sources.files("memory://a.txt")
        assert file.identity == "3 ETag=e1" and forgotten  # the listing is fresh
        del listing["ETag"]
        (file,) = sources.files("memory://a.txt")
        assert file.identity == "3 mtime=7"


def test_remote_files_that_are_not_there(memory):
    memory.pipe("/bucket/a.jsonl", b"{}")
    for spec in ["memory://bucket/b.jsonl", "memory://bucket/*.txt", "memory://no/*"]:
        with pytest.raises(
            FileNotFoundError, match=r"source 'memory://.*no file there"
        ):
            sources.files(spec)
    with pytest.raises(ValueError, match="is a folder. Name its files"):
        sources.files("memory://bucket")
    with pytest.raises(ValueError, match="line 1: no field"):
        read("memory://bucket/a.jsonl")
    with pytest.raises(ValueError, match="nope:// is not known"):
        sources.files("nope://bucket/a.jsonl")


@pytest.mark.parametrize(
    "url, driver, extra",
    [("gs://b/a.jsonl", "gcsfs", "gcs"), ("s3://b/a.jsonl", "s3fs", "s3")],
)
def test_a_missing_driver_names_the_extra(url, driver, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ValueError, match=rf"driver of .*t5x-lite\[{extra}\]"):
        sources.files(url)


def test_a_server_without_checksum_or_time_is_read(memory, monkeypatch):
    memory.pipe("/a.txt", b"one")
    monkeypatch.setattr(
        type(memory), "info", lambda *a, **k: dict(size=3, type="file", name="/a.txt")
    )
    (file,) = sources.files("memory://a.txt")
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert file.identity == f"3 sha256={digest}"  # of sha256sum


def test_a_file_is_picklable():
    file = streams.File("a", "tfds", 3, pathlib.Path("a"), rows=(1, 2))
    assert pickle.loads(pickle.dumps(file)) == file


# Options, packages, servers


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"t5x-lite\[parquet\]"):
        read(path)


@pytest.mark.parametrize("key", ["documents", "bad_utf8"])
def test_options_are_checked(key):
    with pytest.raises(ValueError, match=f"data.{key}='no': allowed are"):
        Options(**{key: "no"})


def test_options_come_from_the_config_and_from_flags(tmp_path):
    keys: Any = dict(field="body", documents="lines", bad_utf8="skip")
    assert Options.of(config_keys.DataConfig(**keys)) == Options(**keys)
    assert Options.of(config_keys.DataConfig()) == Options()
    path = write(tmp_path / "a.jsonl", as_lines({"body": f"abc {t}"} for t in TEXTS))
    flags = [f"--input={path}", "--size=300", "--kind=bytebpe"]
    flags += [f"--output={tmp_path / 'vocab.json'}"]
    with pytest.raises(ValueError, match="Did you mean data.field='body'"):
        vocab.main(["train", *flags, "--field=bodi"])
    vocab.main(["train", *flags, "--field=body"])
    assert len(vocab.load(str(tmp_path / "vocab.json")).encode("abc")) == 1


def test_a_failing_server_is_an_error_with_the_place(memory, monkeypatch):
    memory.pipe("/a.txt", b"one\n\ntwo\n\n" * 3 * 10**5)

    class Fails(Exception):
        pass

    stream = type(memory.open("/a.txt"))
    taken = itertools.count()

    def readinto(self, buffer, real=stream.readinto):
        if next(taken):
            raise Fails("connection lost")
        return real(self, buffer)

    monkeypatch.setattr(stream, "readinto", readinto, raising=False)
    with pytest.raises(
        OSError, match=r"memory:///a.txt', after line \d+.*connection lost"
    ):
        read("memory://a.txt")
