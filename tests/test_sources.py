"""Sources: every kind gives the same documents; what is broken is decided and named."""

import functools
import gzip
import itertools
import json
import lzma
import os
import pathlib
import pickle
import random
import sys
import tempfile
import tracemalloc
from typing import Any

import fsspec
import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from t5x_lite import config_keys, vocab
from t5x_lite.data import catalogue, sources, streams, texts
from t5x_lite.data.texts import Counts, Options

TEXTS = [
    "One line.",
    "Two\nlines — ünïcode",
    "def f(x):\n\tif x:\n        return '\\n'  # code stays as it is",
    "日本語のテキスト、العربية, עברית, हिन्दी, ไทย, 😀👩‍👩‍👧, e\u0301",
    "a\u2028b\u2029c\x0bd\x0ce\x85f",  # line ends of Unicode, not of files
]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def as_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def read(spec, **options):
    """All documents of a source, and what was counted over its files."""
    counts = {}
    found = list(
        sources.documents(str(spec), options=Options(**options), counts=counts)
    )
    return found, functools.reduce(Counts.__add__, counts.values())


def write(path, content):
    path.write_bytes(content)
    return str(path)


def write_parquet(path, values, field="text", kind=None, **options):
    table = pyarrow.table(
        {"id": range(len(values)), field: pyarrow.array(values, kind)}
    )
    parquet.write_table(table, path, **options)
    return str(path)


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


# TFDS and Hugging Face


def make_tfds(folder, documents, file_format="array_record", shards=3):
    import numpy as np
    import tensorflow_datasets as tfds

    class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            number = tfds.features.Tensor(shape=(), dtype=np.int32)
            features = {"text": tfds.features.Text(), "number": number}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            some, every = range(5), range(len(documents))
            return {
                k: self._generate_examples(r)
                for k, r in [("train", every), ("few", some)]
            }

        def _generate_examples(self, rows):
            yield from ((i, {"text": documents[i], "number": i}) for i in rows)

    # The builder would draw a bar for each shard.
    tfds.disable_progress_bar()
    builder = LocalText(data_dir=str(folder), file_format=file_format)
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=config)
    return builder


TFDS_TEXTS = [f"{t} {i}" for i, t in enumerate(TEXTS * 40)]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return str(make_tfds(folder, [*TFDS_TEXTS, " ", b"caf\xe9"]).data_path)


def test_tfds_without_tensorflow(tfds_folder):
    import tensorflow_datasets as tfds

    spec = f"tfds:{tfds_folder}:train"
    files = sources.files(spec)
    assert len(files) == 3 and "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"shard .*, row \d+: not UTF-8"):
        read(spec)
    found, counts = read(spec, bad_utf8="replace")
    assert counts == Counts(documents=len(TFDS_TEXTS) + 1, empty=1, repaired=1)
    assert sorted(found) == sorted([*TFDS_TEXTS, "caf\ufffd"])
    # The order is that of the data set, and a slice is the slice.
    builder: Any = tfds.builder_from_directory(tfds_folder)
    rows = builder.as_data_source(split="train")
    order = [r["text"].decode(errors="replace") for r in rows]
    assert found == [t for t in order if t.strip()]
    for slice in ["[10%:20%]", "[50:120]", "[:-30]"]:
        start, stop = {"[10%:20%]": (20, 40), "[50:120]": (50, 120)}.get(
            slice, (0, -30)
        )
        part = [t for t in order[start:stop] if t.strip()]
        assert read(spec + slice, bad_utf8="replace")[0] == part
    assert len(sources.files(f"{spec}[10%:20%]")) == 1


def test_tfds_by_name(tmp_path):
    import tensorflow_datasets as tfds

    builder = make_tfds(tmp_path, TEXTS, shards=1)
    tfds.core.add_data_dir(str(tmp_path))
    found, _ = read(f"tfds:{builder.name}:train[:3]")
    assert len(found) == 3 and set(found) < set(TEXTS)
    assert set(read(f"tfds:{builder.name}:few")[0]) == set(TEXTS)


def test_a_damaged_tfds_shard(tmp_path):
    builder = make_tfds(tmp_path, TFDS_TEXTS, shards=1)
    spec = f"tfds:{builder.data_path}:train"
    whole, _ = read(spec)
    (path,) = pathlib.Path(builder.data_path).glob("*-train*")
    content = path.read_bytes()
    for cut in [0, 1000, len(content) - 70_000, len(content) - 1]:
        write(path, content[:cut])
        with pytest.raises(ValueError, match="or after: the data set is broken"):
            read(spec)
    damaged = 0
    for at in range(0, len(content), 9973):  # riegeli hashes its chunks
        write(path, content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        try:
            assert read(spec)[0] == whole
        except ValueError as error:
            assert "the data set is broken" in str(error)
            damaged += 1
    assert damaged


def test_tfds_errors(tfds_folder, tmp_path, monkeypatch):
    def fails(spec, message, **options):
        with pytest.raises(ValueError, match=message):
            read(spec, **options)

    fails(f"tfds:{tfds_folder}:dev", r"Unknown split 'dev'.*\['few', 'train'\]")
    fails(f"tfds:{tfds_folder}:train[x]", "Splits: ")
    fails(f"tfds:{tfds_folder}", "is not of the form tfds:NAME")
    fails("tfds:no_such_set:train", "finds no data set 'no_such_set'.*TFDS_DATA_DIR")
    fails(f"tfds:{tfds_folder}:few", "Did you mean data.field='text'", field="texts")
    fails(f"tfds:{tfds_folder}:few", "holds int, not text", field="number")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails("tfds:wikipedia/20230601.en:train", r"t5x-lite\[tfds\]")
    monkeypatch.undo()
    # Parquet of TFDS counts its rows wrong, TFRecords need TensorFlow.
    info = pathlib.Path(tfds_folder, "dataset_info.json")
    for format, message in [
        ("parquet", "'parquet' are not read"),
        ("tfrecord", "TFRecords, which only TensorFlow reads.*file_format='array_reco"),
    ]:
        described = json.loads(info.read_text()) | {"fileFormat": format}
        write(tmp_path / "dataset_info.json", json.dumps(described).encode())
        write(tmp_path / "features.json", info.with_name("features.json").read_bytes())
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "tensorflow", None)
            fails(f"tfds:{tmp_path}:few", message)


def test_tfds_through_tensorflow(tmp_path):
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    for format in ["array_record", "tfrecord"]:
        builder = make_tfds(tmp_path / format, TFDS_TEXTS, format)
        spec = f"tfds:{builder.data_path}:train"
        assert sorted(read(spec)[0]) == sorted(TFDS_TEXTS)
        whole, _ = read(spec)
        assert read(f"{spec}[30:170]")[0] == whole[30:170]


def test_a_hugging_face_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(catalogue, "ROWS", 32)
    values = [*TFDS_TEXTS, " ", None]
    table = datasets.Dataset.from_dict({"text": values, "n": range(len(values))})
    table.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    for spec in [f"hf:{tmp_path}/one", f"hf:{tmp_path}/splits:train"]:
        files = sources.files(spec)
        assert [f.rows for f in files] == list(
            itertools.pairwise([*range(0, 202, 32), 202])
        )
        found, counts = read(spec)
        assert found == TFDS_TEXTS and counts.empty == 2
        assert files == sources.files(spec)
        with pytest.raises(ValueError, match="no field .txt.*Did you mean .*'text'"):
            read(spec, field="txt")
        with pytest.raises(ValueError, match="holds int64, not text"):
            read(spec, field="n")
    for spec in [f"hf:{tmp_path}/splits:dev", f"hf:{tmp_path}/splits"]:
        with pytest.raises(ValueError, match=r"no split .*\['train'\]"):
            sources.files(spec)


def test_hugging_face_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"t5x-lite\[datasets\]"):
        sources.files("hf:allenai/c4/en:train")
    with pytest.raises(ValueError, match="is not of the form hf:ORG"):
        sources.files("hf:allenai/c4")


# Broken, empty and odd text


BROKEN = {
    "latin-1": (b"caf\xe9 au lait", "caf\ufffd au lait"),
    # The Unicode Standard 15, table 3-8: maximal subparts.
    "table 3-8": (
        b"a\xf1\x80\x80\xe1\x80\xc2b\x80c\x80\xbfd",
        "a\ufffd\ufffd\ufffdb\ufffdc\ufffd\ufffdd",
    ),
    "surrogate in UTF-8": (b"x\xed\xa0\x80y", "x\ufffd\ufffd\ufffdy"),
    "overlong": (b"x\xc0\xafy", "x\ufffd\ufffdy"),
    "NUL": (b"x\0y", "x\ufffdy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_text_in_every_kind_of_file(name, tmp_path):
    raw, mended = BROKEN[name]
    line = b'{"text": "' + raw + b'"}'
    sound = {"txt": b"sound", "jsonl": b'{"text": "sound"}'}
    paths = {
        "txt": write(tmp_path / "a.txt", b"sound\n\nmore\n" + raw + b"\nend\n\nsound"),
        "jsonl": write(tmp_path / "a.jsonl", sound["jsonl"] + b"\n\n" + line + b"\n"),
        "parquet": write_parquet(
            tmp_path / "a.parquet", [b"sound", raw], kind=pyarrow.binary()
        ),
    }
    places = {"txt": "line 4", "jsonl": "line 3", "parquet": "row 1"}
    for kind, path in paths.items():
        with pytest.raises(ValueError, match=f"{path}', {places[kind]}: .*bad_utf8"):
            read(path)
        whole = f"more\n{mended}\nend" if kind == "txt" else mended
        rest = ["sound"] if kind == "txt" else []
        found, counts = read(path, bad_utf8="replace")
        assert found == ["sound", whole, *rest]
        assert counts == Counts(documents=2 + len(rest), repaired=1)
        found, counts = read(path, bad_utf8="skip")
        assert found == ["sound", *rest]
        assert counts == Counts(documents=1 + len(rest), skipped=1)
    found, counts = read(paths["txt"], bad_utf8="skip", documents="lines")
    assert found == ["sound", "more", "end", "sound"] and counts.skipped == 1


def test_escapes_of_json(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        rb'{"text": "pair \ud83d\ude00"}' + b"\n" + rb'{"text": "lone \ud83d."}' + b"\n"
        rb'{"text": "nul \u0000"}' + b"\n" + rb'{"text": "sep \u2028\r\n"}',
    )
    with pytest.raises(ValueError, match="line 2: text that is not valid Unicode"):
        read(path)
    found, counts = read(path, bad_utf8="replace")
    assert found == ["pair 😀", "lone \ufffd.", "nul \ufffd", "sep \u2028\r\n"]
    assert counts == Counts(documents=4, repaired=2)
    assert read(path, bad_utf8="skip")[1] == Counts(documents=2, skipped=2)


def test_byte_order_marks_are_counted_and_only_taken_from_the_start(tmp_path):
    bom = b"\xef\xbb\xbf"
    write(tmp_path / "a.txt", bom + b"one\r\n\r\n" + bom + b"two\r\nthree\r\n")
    write(tmp_path / "a.jsonl", bom + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    found, counts = read(tmp_path / "a.*")
    assert found == ["one", "two", "one", "\ufefftwo\nthree"]
    assert counts == Counts(documents=4, byte_order_marks=2)


def test_empty_and_missing_text_is_left_out_and_counted(tmp_path):
    records = [{"text": t} for t in ["", " \n", "\u3000", None, "a"]]
    path = write(tmp_path / "a.jsonl", as_lines(records))
    assert read(path) == (["a"], Counts(documents=1, empty=4))
    path = write_parquet(tmp_path / "a.parquet", [r["text"] for r in records])
    assert read(path) == (["a"], Counts(documents=1, empty=4))


def test_a_document_of_50_mb_stays_whole(tmp_path, monkeypatch):
    long = "word ünd " * (50 * 2**20 // 10)
    paths = [
        write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines([{"text": long}]), 1)),
        write(tmp_path / "a.txt", long.encode()),
        write_parquet(tmp_path / "a.parquet", [long]),
    ]
    for path in paths:
        (found,) = sources.documents(path)
        assert found == long
    monkeypatch.setattr(texts, "LONGEST", 2**20)
    for path, place in zip(paths[:2], ["line 1", "line 1"], strict=True):
        with pytest.raises(ValueError, match=rf"more than 1,048,576 bytes.*{place}"):
            read(path)
    write(tmp_path / "lines.txt", b"many lines\n" * 10**5)
    with pytest.raises(ValueError, match="Set data.documents"):
        read(tmp_path / "lines.txt")
    assert len(read(tmp_path / "lines.txt", documents="lines")[0]) == 10**5


# Errors


NOISE = os.urandom(9999).hex().encode()
MISNAMED = {
    "gz.txt": (gzip.compress(b"text"), "call it .gz"),
    "xz.jsonl": (lzma.compress(b"text"), "call it .xz"),
    "zst.txt": (COMPRESS[".zst"](b"text"), "call it .zst"),
    "utf16.txt": ("text".encode("utf-16"), "iconv -f utf-16"),
    "parquet.txt": (b"PAR1....", "call it .parquet"),
    "zip.jsonl": (b"PK\x03\x04", "a zip archive"),
    "deep.jsonl": (b"[" * 10**5, "line 1: not JSON"),
    "number.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
    "typo.jsonl": (b'{"test": "a"}', "no field .text.*'test'.*mean data.field='test'"),
    "array.jsonl": (b'[{"text": "a"}]', "line 1: no field .text.; the line holds list"),
    "short.txt.zst": (COMPRESS[".zst"](NOISE)[:5000], "ends within a frame"),
    "junk.txt.zst": (COMPRESS[".zst"](b"text") + b"junk!", "broken .zst"),
    "plain.txt.zst": (b"plain text", "broken .zst"),
    "short.txt.xz": (lzma.compress(NOISE)[:5000], "broken .xz"),
    "tail.txt.gz": (gzip.compress(b"text")[:-3], "broken .gz"),
    "none.parquet": (b"", "broken .parquet"),
    "text.parquet": (b"some text that is none", "broken .parquet"),
}


@pytest.mark.parametrize("name", MISNAMED)
@pytest.mark.parametrize("bad_utf8", texts.BAD_UTF8)
def test_a_file_of_another_kind_is_an_error_whatever_bad_utf8_says(
    name, bad_utf8, tmp_path
):
    content, message = MISNAMED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read(path, bad_utf8=bad_utf8)
    assert path in str(error.value)


def test_errors_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(
        ValueError, match="no field .txt.; there are .'id', 'text'.*mean"
    ):
        read(path, field="txt")
    with pytest.raises(ValueError, match="holds int64, not text"):
        read(path, field="id")
    nothing = write_parquet(tmp_path / "b.parquet", [" ", None])
    with pytest.raises(ValueError, match=r"holds no text \(0 documents, 2 empty\)"):
        read(nothing)
    content = bytearray(pathlib.Path(path).read_bytes())
    for cut in range(0, len(content), 50):
        with pytest.raises(ValueError, match="broken .parquet"):
            read(write(tmp_path / "cut.parquet", content[:cut]))


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
    keys = dict(field="body", documents="lines", bad_utf8="skip")
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
        if next(taken) > 1:
            raise Fails("connection lost")
        return real(self, buffer)

    monkeypatch.setattr(stream, "readinto", readinto, raising=False)
    with pytest.raises(
        OSError, match=r"memory:///a.txt', after line \d+.*connection lost"
    ):
        read("memory://a.txt")


# Fuzzing: whatever the bytes, documents of valid text or an error with its place


def same_documents_by_another_way(raw, documents):
    """Plain text with bad_utf8="replace": decoded as a whole, split by another rule."""
    text = raw.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    text = text.replace("\0", "\ufffd").replace("\r\n", "\n")
    if documents == "files":
        found = [text]
    elif documents == "lines":
        found = text.split("\n")
    else:
        grouped = itertools.groupby(text.split("\n"), key=lambda t: not t.strip())
        found = ["\n".join(lines) for blank, lines in grouped if not blank]
    return [t.rstrip("\r\n") for t in found if t.strip()]


def fuzz(examples):
    """A test that hypothesis calls so many times, the same way each run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


PIECES = st.sampled_from(
    [b"a", b"\n", b"\r\n", b"\r", b" ", b"\0", b"\xe9", b"\xef\xbb\xbf", b"\xc3\xa9"]
    + [b"\xe3\x80\x80", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xff\xfe", b"\x1f\x8b"]
    + [b'{"text": "', b'"}', b'{"text": null}\n', b'{"text": "b"}\n', b"[", b"\\ud800"]
    + [b"\\", b"1e999", b'{"body": "b"}\n', b"9" * 5000, b"\x85", b"\x1c", b"\x0c"]
)
RAW = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=30).map(b"".join))
PLACE = r"^source '{}'(, (after )?line \d+|: not text| \(| holds no text at all)"


@functools.cache
def scratch():
    return pathlib.Path(tempfile.mkdtemp())


def check_text(raw, documents, bad_utf8):
    path = scratch() / "fuzz.txt"
    write(path, raw)
    try:
        found, counts = read(path, documents=documents, bad_utf8=bad_utf8)
    except ValueError as error:
        assert str(error).startswith(f"source {str(path)!r}"), error
        empty = not same_documents_by_another_way(raw, documents)
        other_kind = raw.removeprefix(b"\xef\xbb\xbf").startswith(tuple(streams._MAGIC))
        assert bad_utf8 != "replace" or empty or other_kind, error
        return
    assert counts.documents == len(found)
    assert all(t.strip() and "\0" not in t and t.encode() for t in found)
    if bad_utf8 != "skip":
        assert found == same_documents_by_another_way(raw, documents)


def check_json(raw, bad_utf8):
    path = scratch() / "fuzz.jsonl"
    write(path, raw)
    try:
        found, counts = read(path, bad_utf8=bad_utf8)
    except ValueError as error:
        assert str(error).startswith(f"source {str(path)!r}"), error
        assert (
            "line" in str(error) or "no text" in str(error) or "not text" in str(error)
        )
        return
    assert counts.documents == len(found)
    assert all(t.strip() and "\0" not in t and t.encode() for t in found)


@functools.cache
def sound_files():
    """Of each kind: name, content, documents."""
    rng = random.Random(0)
    documents = [f"{rng.choice(TEXTS)} {rng.random()}" for _ in range(60)]
    plain = as_lines([{"text": t} for t in documents])
    found = {f"z.jsonl{s}": c(plain) for s, c in COMPRESS.items() if s}
    for options in [{}, {"compression": "none", "write_page_checksum": True}]:
        path = scratch() / "sound.parquet"
        write_parquet(path, documents, row_group_size=25, **options)
        found[f"{len(found)}.parquet"] = path.read_bytes()
    return documents, found


def check_damage(name, edits):
    documents, files = sound_files()
    content = bytearray(files[name])
    for place, value, action in edits:
        at = int(place * len(content))
        if action == "cut":
            del content[at:]
        elif action == "insert":
            content[at:at] = bytes([value])
        elif at < len(content):
            content[at] ^= value
    path = scratch() / name
    write(path, content)
    try:
        found, _ = read(path, bad_utf8="replace")
    except ValueError as error:
        assert str(error).startswith(f"source {str(path)!r}"), error
        return
    if "parquet" not in name:  # checksums: damage is never silent
        assert found == documents


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
        st.sampled_from(["flip", "insert", "cut"]),
    ),
    min_size=1,
    max_size=4,
)
NAMES = st.sampled_from(
    ["z.jsonl.gz", "z.jsonl.xz", "z.jsonl.zst", "3.parquet", "4.parquet"]
)
FUZZ = [200, pytest.param(20_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_text(examples):
    modes = st.sampled_from(texts.DOCUMENTS), st.sampled_from(texts.BAD_UTF8)
    fuzz(examples)(given(RAW, *modes)(check_text))()


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_json_lines(examples):
    fuzz(examples)(given(RAW, st.sampled_from(texts.BAD_UTF8))(check_json))()


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_damaged_files(examples):
    fuzz(examples)(given(NAMES, EDITS)(check_damage))()
