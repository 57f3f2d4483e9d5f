"""Building a store: processes, kill -9, duplicates, statistics, other ways to fail."""

import functools
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from t5x_lite import tokenize
from t5x_lite import vocab as vocabularies
from t5x_lite.data import building, dedup, encoding, statistics
from tests import vocab_kinds
from tests.built_stores import (
    BYTES,
    FIRST,
    ROOT,
    TEXTS,
    all_tokens,
    children,
    expected_tokens,
    files_of,
    open_quietly,
    take_small_steps,
    write_corpus,
)

MODEL = str(ROOT / "data/vocab_4k.model")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


@pytest.fixture
def small_steps(monkeypatch):
    take_small_steps(monkeypatch)


# Duplicates and statistics


def test_duplicates_are_left_out_wherever_they_come(corpus, tmp_path, small_steps):
    assert 200 < len(FIRST) < 240
    plain = open_quietly(corpus, tmp_path / "cache")
    opened = open_quietly(corpus, tmp_path / "cache", deduplicate=True)
    assert plain.fingerprint != opened.fingerprint
    np.testing.assert_array_equal(all_tokens(plain), expected_tokens(TEXTS))
    np.testing.assert_array_equal(all_tokens(opened), expected_tokens(FIRST))
    assert plain.statistics.duplicates == 0
    assert opened.statistics.duplicates == len(TEXTS) - len(FIRST)
    names = {"c", "store.json", "zarr.json", "statistics.json"}
    assert {path.name for path in opened.path.iterdir()} == names


def test_statistics_against_the_documents(corpus, tmp_path, small_steps):
    model = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    more = [t for t in vocab_kinds.TEXTS if "\0" not in t]
    rows = "".join(json.dumps({"text": t}) + "\n" for t in more)
    (tmp_path / "d.jsonl").write_text(rows)
    opened = open_quietly(corpus, tmp_path / "cache", vocabularies.load(MODEL))
    found = json.loads((opened.path / "statistics.json").read_text())
    parts = [TEXTS[:170], TEXTS[170:180], TEXTS[180:], more]
    for texts, got in zip(parts, found["files"], strict=True):
        texts = [t for t in texts if t.strip()]
        ids = [model.encode(t) for t in texts]
        every = [i for row in ids for i in row]
        fallback = sum(model.is_byte(i) for i in every)
        tokens = len(every) + len(texts)
        assert got["documents"] == len(texts) and got["tokens"] == tokens
        assert got["characters"] == sum(len(t) for t in texts)
        assert got["bytes"] == sum(len(t.encode()) for t in texts)
        assert got["longest"] == max(map(len, ids)) + 1
        assert got["byte_fallback"] == fallback
        assert got["byte_fallback_rate"] == fallback / tokens
        assert got["tokens_per_character"] == tokens / got["characters"]
        assert got["unknown"] == sum(model.is_unknown(i) for i in every) == 0
    names = ["a.jsonl", "b.jsonl.gz", "c.txt", "d.jsonl"]
    assert [Path(row["file"]).name for row in found["files"]] == names
    blank = sum(not t.strip() for t in more)
    assert [row["empty"] for row in found["files"]] == [1, 0, 0, blank]
    assert found["files"][3]["byte_fallback"] > 10
    total = opened.statistics
    assert total.to_json() == found["total"]
    assert (total.documents, total.tokens) == (opened.n_documents, opened.n_tokens)
    assert total.longest == max(row["longest"] for row in found["files"])


def test_unknown_tokens_are_counted(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    vocab = vocabularies.load(str(tmp_path / "vocab.txt"))
    (tmp_path / "a.txt").write_text("a word\n\na strange word, \u4e2d\n")
    made = open_quietly(str(tmp_path / "a.txt"), tmp_path / "cache", vocab).statistics
    # strange "," and the character are not in the list of pieces.
    assert (made.tokens, made.unknown, made.byte_fallback) == (9, 3, 0)
    assert made.rates()["unknown_rate"] == 3 / 9


def test_the_bytes_of_a_store_on_any_python(tmp_path, monkeypatch):
    # Of SentencePiece's own ids of the documents, an id 1 after each, as <u2.
    tokens = "a6c0f5e33291e5a0e2bb093bebba8d79366428f8c9da1116170de5a863c2b9a6"
    monkeypatch.chdir(ROOT)
    opened = open_quietly("data/heldout.jsonl", tmp_path, vocabularies.load(MODEL))
    content = (opened.path / "c/0").read_bytes()
    assert hashlib.sha256(content).hexdigest() == tokens


# Processes


def test_any_number_of_processes_makes_the_same_store(corpus, tmp_path, small_steps):
    made = {}
    for n in (1, 3):
        cache = tmp_path / str(n)
        open_quietly(corpus, cache, processes=n, deduplicate=True)
        made[n] = files_of(cache)
    assert made[1] == made[3]


def test_small_sources_start_no_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    mib = 2**20
    found = [building.processes_for(0, n * mib) for n in (1, 31, 32, 64, 10_000)]
    assert found == [1, 1, 2, 4, 8]
    assert building.processes_for(3, 1) == 3


JOBS = [([f"text {i}", "x"], [1, 1]) for i in range(20)]


def test_few_batches_are_read_ahead_and_no_process_is_left():
    before, taken = set(children(os.getpid())), []

    def jobs():
        for i, job in enumerate(JOBS):
            taken.append(i)
            yield i, job

    encode = encoding.Encoder(BYTES)
    with encoding.encoders(BYTES, 2) as encode_there:
        for i, result in encode_there(jobs()):
            assert len(taken) <= i + 2 + 2 * encoding.AHEAD
            assert result == encode(JOBS[i])
            if i == 7:
                assert len(set(children(os.getpid())) - before) == 2
                break
    assert len(taken) < 15
    assert set(children(os.getpid())) <= before


def test_a_process_that_dies_is_replaced_once(monkeypatch):
    process = encoding._Process(BYTES)
    wanted = encoding.Encoder(BYTES)(JOBS[0])
    assert process.encode(JOBS[0]) == wanted
    os.kill(process._popen.pid, signal.SIGKILL)
    assert process.encode(JOBS[0]) == wanted

    def start_and_die(process, start=encoding._Process._start):
        start(process)
        os.kill(process._popen.pid, signal.SIGKILL)

    monkeypatch.setattr(encoding._Process, "_start", start_and_die)
    os.kill(process._popen.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"died twice on the same 7.*code -9"):
        process.encode(JOBS[0])
    process.close()


def test_an_error_in_another_process_is_told(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    vocab = vocabularies.load(str(path))
    path.write_text(path.read_text() + "\nb")
    process = encoding._Process(vocab)
    with pytest.raises(RuntimeError, match="changed while it was in use"):
        process.encode(JOBS[0])
    process.close()


def test_the_other_processes_load_no_jax():
    code = (
        "import sys, t5x_lite.data.encoding as e; e.vocabularies.load(sys.argv[1]);"
        "print([m for m in ('jax', 'tensorstore', 'grain') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, MODEL], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


# Apache Beam


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", [False, True])
def test_beam_makes_the_same_store(deduplicate, corpus, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra beam: apache-beam")
    from t5x_lite.data import beam

    monkeypatch.setattr(beam, "BLOCK_CHARS", 500)
    monkeypatch.setattr(building, "BLOCK_BYTES", 1000)
    vocab = vocabularies.load(MODEL)
    here = open_quietly(corpus, tmp_path / "here", vocab, deduplicate=deduplicate)
    build = functools.partial(
        beam.build, parts=str(tmp_path / "parts"), flags=["--runner=DirectRunner"]
    )
    more = {"deduplicate": deduplicate, "build": build}
    there = open_quietly(corpus, tmp_path / "there", vocab, **more)
    assert there.fingerprint == here.fingerprint
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    assert not list((tmp_path / "parts").rglob("*.part"))


def test_flags_that_beam_would_drop_are_refused():
    pytest.importorskip("apache_beam", reason="needs the extra beam: apache-beam")
    from t5x_lite.data import beam

    beam.check(["--runner=DirectRunner", "--direct_num_workers=3"])
    beam.check(["--runner=FlinkRunner", "--parallelism=3"])  # its server's
    for wrong, named in (
        ("--direct_num_worker=3", "direct_num_worker .*mean 'direct_num_workers'"),
        ("--projekt=x", "--projekt behind --"),
    ):
        with pytest.raises(ValueError, match=named):
            beam.check(["--runner=DirectRunner", wrong])


# The table of digests


def test_a_table_of_other_documents_is_refused(tmp_path):
    path = tmp_path / "seen.sqlite"

    def seen(*numbers):
        return dedup.Seen(path, *numbers)

    table = seen(0, 0, 0)
    added = [table.add(text) for text in ("a", "b", "a", "c")]
    assert [bool(n) for n in added] == [True, True, False, True]
    table.commit()
    table.add("not committed")
    table.close()
    # As of after two documents, and three: what came later is forgotten.
    for n_read, n_kept in ((4, 3), (3, 2), (2, 2)):
        again = seen(n_read, n_kept, sum(added[:n_read]) % dedup.MODULUS)
        again.commit()
        again.close()
    again = seen(2, 2, sum(added[:2]) % dedup.MODULUS)
    assert again.add("a") == 0 and again.add("c") == added[3]
    again.close()
    for numbers in ((2, 1, added[0]), (2, 2, 5), (1, 2, sum(added[:2]))):
        with pytest.raises(ValueError, match="not as it was written"):
            seen(*numbers)
    table = sqlite3.connect(path)
    table.execute("UPDATE seen SET digest = ? WHERE document = 1", (b"x" * 16,))
    table.commit()
    table.close()
    with pytest.raises(ValueError, match="not as it was written"):
        seen(2, 2, sum(added[:2]) % dedup.MODULUS)
    path.write_bytes(b"no table" * 100)
    with pytest.raises(ValueError, match="not a database; the next start makes it"):
        seen(2, 2, 0)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        seen(2, 2, 0)


# The command


def test_the_command_builds_and_shows(corpus, tmp_path, capsys):
    argv = [
        f"--config={ROOT / 'configs/demo.py'}",
        f"--config.data.train={corpus}",
        f"--config.data.heldout={tmp_path / 'c.txt'}",
        "--config.data.vocab=bytes",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.deduplicate=True",
        "--files=2",
    ]
    tokenize.main(argv)
    tokenize.main([*argv, "--verify"])
    _, first, again = capsys.readouterr().out.split("config.data.train=")
    assert first == again
    rows = {line.split()[0]: line.split()[1:] for line in first.splitlines() if line}
    left_out = f"{len(TEXTS) - len(FIRST)}"
    assert rows["train"][:3] == [f"{len(FIRST)}", "1", left_out]
    own = len(dict.fromkeys(TEXTS[180:]))
    assert rows["heldout"][0] == f"{own}"
    per_file = [line.split() for line in first.splitlines() if line[:2] == "  "]
    assert Path(per_file[1][0]).name == "a.jsonl" and len(per_file) == 1 + 2 + 1
    for wrong in ("--files=x", "--beam="):
        with pytest.raises(ValueError, match=wrong.removesuffix("=")):
            tokenize.main([*argv, wrong, "--", "--runner=DirectRunner"])


def test_the_table_lines_up():
    shown = statistics.table([("a", statistics.Statistics(3, tokens=7, characters=10))])
    head, row = shown.splitlines()
    assert head.index("documents") + len("documents") == row.index("3") + 1
    assert "0.7000" in row
