"""Broken, empty and odd text, files of another kind, damage: decided and named."""

import gzip
import itertools
import lzma
import pathlib
import random

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_lite.data import sources, streams, texts
from t5x_lite.data.texts import Counts
from tests.source_files import COMPRESS, TEXTS, as_lines, read, write, write_parquet

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
        write(tmp_path / "a.jsonl", as_lines([{"text": long}])),
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


NOISE = random.Random(0).randbytes(9999).hex().encode()
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


def check_text(folder, raw, documents, bad_utf8):
    path = folder / "fuzz.txt"
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


def check_json(folder, raw, bad_utf8):
    path = folder / "fuzz.jsonl"
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


def sound_files(folder):
    """Documents, and the content of a file with them of each kind, by name."""
    rng = random.Random(0)
    documents = [f"{rng.choice(TEXTS)} {rng.random()}" for _ in range(60)]
    plain = as_lines([{"text": t} for t in documents])
    found = {f"z.jsonl{s}": c(plain) for s, c in COMPRESS.items() if s}
    for options in [{}, {"compression": "none", "write_page_checksum": True}]:
        path = folder / "sound.parquet"
        write_parquet(path, documents, row_group_size=25, **options)
        found[f"{len(found)}.parquet"] = path.read_bytes()
    return documents, found


def check_damage(folder, documents, files, name, edits):
    content = bytearray(files[name])
    for place, value, action in edits:
        at = int(place * len(content))
        if action == "cut":
            del content[at:]
        elif action == "insert":
            content[at:at] = bytes([value])
        elif at < len(content):
            content[at] ^= value
    path = folder / name
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
FUZZ = [
    200,
    pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_text(examples, tmp_path):
    @fuzz(examples)
    @given(RAW, st.sampled_from(texts.DOCUMENTS), st.sampled_from(texts.BAD_UTF8))
    def check(raw, documents, bad_utf8):
        check_text(tmp_path, raw, documents, bad_utf8)

    check()


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_json_lines(examples, tmp_path):
    @fuzz(examples)
    @given(RAW, st.sampled_from(texts.BAD_UTF8))
    def check(raw, bad_utf8):
        check_json(tmp_path, raw, bad_utf8)

    check()


@pytest.mark.parametrize("examples", FUZZ)
def test_fuzz_damaged_files(examples, tmp_path):
    documents, files = sound_files(tmp_path)

    @fuzz(examples)
    @given(NAMES, EDITS)
    def check(name, edits):
        check_damage(tmp_path, documents, files, name, edits)

    check()
