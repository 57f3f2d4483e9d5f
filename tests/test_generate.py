"""Many texts at once: prefixes, seeds, meshes, and files that survive a kill."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from t5x_lite import answers, config, generate, parameters, prompts, sharding, vocab
from t5x_lite.settings import Settings
from tests.test_decoding import make

TEXTS = [f"{'long ' * (i % 3)}text {i} ___ and ___" for i in range(5)]


class Words:
    """As much of a vocabulary as decoding reads."""

    eos_id, pad_id, size = 1, 0, 100


def draw_rows(seed: int, lengths=(5, 9, 3, 12, 7)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 100, length).astype(np.int32) for length in lengths]


def written(name: str, rows, settings=None, **how):
    net, params = make(name)
    return generate.continue_all(net, params, Words(), rows, settings, **how)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["t5_1_1", "t5_prefix"])
def test_an_answer_goes_on_behind_its_own_beginning(name):
    """Greedy from a prefix of what greedy writes is the rest, whatever its length."""
    rows = draw_rows(0)
    whole = written(name, rows, Settings(max_length=12))
    cuts = [4, 1, 0, 3, 2]
    prefixes = [w.ids[:cut] for (w,), cut in zip(whole, cuts, strict=True)]
    rest = written(name, rows, Settings(max_length=8), prefixes=prefixes)
    for (one,), (behind,), cut in zip(whole, rest, cuts, strict=True):
        np.testing.assert_array_equal(behind.ids[: 12 - cut], one.ids[cut : cut + 8])


def test_a_prompt_that_has_the_prefix_is_the_same_to_a_decoder():
    rows, settings = draw_rows(1), Settings(max_length=5, beams=2, num_return=2)
    prefix = np.array([5, 6, 7], np.int32)
    forced = written("gpt2", rows, settings, prefixes=[prefix] * len(rows))
    joined = [np.append(row, prefix) for row in rows]
    for one, same in zip(forced, written("gpt2", joined, settings), strict=True):
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_allclose(a.score, b.score, rtol=1e-4)


def test_a_sample_depends_on_the_seed_and_the_number_of_its_text():
    settings = Settings(max_length=6, temperature=1.0, num_return=3)
    rows = draw_rows(2)

    def ids(rows, **how):
        found = written("gpt2", rows, settings, **how)
        return [[one.ids.tolist() for one in each] for each in found]

    whole = ids(rows, seed=3)
    assert ids(rows, seed=3, batch_size=2) == whole
    assert ids(rows[2:], seed=3, batch_size=2, first=2) == whole[2:]
    assert ids(rows, seed=4) != whole
    assert all(len({tuple(one) for one in each}) > 1 for each in whole)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("t5_1_1", Settings(max_length=6, beams=2)),
        pytest.param(
            *("gpt2", Settings(max_length=6, temperature=0.7, num_return=2)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mesh_writes_what_one_device_writes(name, settings):
    net, params = make(name)
    rows = draw_rows(3)
    alone = generate.continue_all(net, params, Words(), rows, settings)  # pyright: ignore[reportArgumentType]
    sizes = config.ShardingConfig(data=4, fsdp=1, tensor=2, sequence=1)
    mesh = sharding.make_mesh(sizes)
    with sharding.use(mesh, sizes.rules):
        spread = parameters.spread(net, params, mesh, sizes.rules)
        split = {len(leaf.addressable_shards) for leaf in jax.tree.leaves(spread)}
        assert split == {8}
        found = generate.continue_all(net, spread, Words(), rows, settings)  # pyright: ignore[reportArgumentType]
    for one, same in zip(alone, found, strict=True):
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_allclose(a.score, b.score, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(beams=0), "beams=0"),
        (dict(length_penalty=float("inf")), "length_penalty=inf"),
        (dict(length_norm="none"), "length_norm='none': allowed are wu, length"),
        (dict(early_stopping="maybe"), "early_stopping='maybe'"),
        (dict(min_length=65), "min_length=65 .*max_length=64"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram=-1"),
        (dict(beams=2, temperature=1.0), "temperature=1.0 samples, beams=2"),
        (dict(num_return=2), "num_return=2 of beams=1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


# ---- files


@pytest.fixture
def folder(tmp_path):
    rows = [dict(text=text, id=f"n{i}") for i, text in enumerate(TEXTS)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "in.jsonl").write_text(lines)
    return tmp_path


@pytest.fixture
def command(folder, tiny_workdir):
    def call(output: str, *flags: str):
        generate.main(
            [
                f"--workdir={tiny_workdir}",
                f"--input={folder / 'in.jsonl'}",
                f"--output={folder / output}",
                *("--max_length=8", "--temperature=1", "--batch_size=2"),
                *("--num_return=2", "--seed=5", *flags),
            ]
        )
        return (folder / output).read_bytes()

    return call


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"id": "n3", "te', b"\xc3"])
def test_an_interrupted_file_ends_as_an_uninterrupted_one(
    command, folder, torn, monkeypatch
):
    want = command("whole.jsonl")
    append, calls = answers.Answers.append, []

    def dies(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:  # in the middle of a batch
            append(self, rows[:1])
            raise Killed
        append(self, rows)

    monkeypatch.setattr(answers.Answers, "append", dies)
    with pytest.raises(Killed):
        command("out.jsonl")
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 3
    with (folder / "out.jsonl").open("ab") as file:
        file.write(torn)
    assert command("out.jsonl") == want
    assert calls == [2, 2, 1, 1]  # nothing is written twice
    assert command("out.jsonl") == want
    rows = [json.loads(line) for line in want.decode().splitlines()]
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(5)]
    assert [row["text"] for row in rows] == TEXTS
    for row in rows:
        assert len(row["fills"]) == 2 and row["score"] < 0
        assert [set(other) for other in row["others"]] == [{"filled", "fills", "score"}]


def test_what_would_mix_answers_is_refused(command, folder):
    want = command("out.jsonl")
    for flags, message in (
        (["--seed=6"], r"seed=5 \(now 6\)"),
        (["--temperature=0.5"], r"temperature=1.0 \(now 0.5\)"),
        (["--step=3"], r"step=5 \(now 3\).*begin anew, remove"),
        (["--prefix=x"], r"prefix='' \(now 'x'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            command("out.jsonl", *flags)
    with (folder / "in.jsonl").open("a") as file:
        file.write('\n{"text": "more ___"}')
    with pytest.raises(ValueError, match="other settings: input="):
        command("out.jsonl")
    assert (folder / "out.jsonl").read_bytes() == want
    (folder / "mine.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="mine.jsonl exists, but not"):
        command("mine.jsonl")
    assert (folder / "mine.jsonl").read_text() == "{}\n"


def test_two_processes_do_not_write_one_file(folder):
    path = str(folder / "out.jsonl")
    with (
        answers.Answers(path, dict(seed=1), 3),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        answers.Answers(path, dict(seed=1), 3)


def test_texts_of_a_file_keep_their_ids_and_say_where_they_stand(folder):
    path = folder / "some.jsonl"
    path.write_text('{"body": "a\u2028b", "id": 7}\n\n{"body": "c"}\n', "utf-8")
    found = answers.read(str(path), "body")
    assert [(t.text, t.id) for t in found] == [("a\u2028b", 7), ("c", None)]
    assert found[1].where.endswith("line 3")
    with pytest.raises(ValueError, match=r"line 1 has no string 'text'.*--field"):
        answers.read(str(path), "text")
    path.write_text("plain\n")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        answers.read(str(path), "text")


def test_a_prefix_is_text_of_the_first_gap_or_of_what_goes_on():
    words = vocab.load("data/vocab_4k.model", 100)
    ids = prompts.prefix(" so it", words, prompts.Task("continue"))
    assert words.decode(ids, inside=True) == " so it"
    gap = prompts.prefix(" so it", words, prompts.Task())
    np.testing.assert_array_equal(gap, [words.sentinel(0), *ids])
    assert not len(prompts.prefix("", words, prompts.Task()))


@pytest.mark.slow
def test_a_killed_process_goes_on(folder, tiny_workdir):
    """kill -9 at several moments; the file is the same in the end."""

    def start(output: str):
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "t5x_lite.generate"),
                f"--workdir={tiny_workdir}",
                f"--input={folder / 'many.jsonl'}",
                f"--output={folder / output}",
                *("--max_length=8", "--temperature=1", "--batch_size=2"),
            ],
            env=os.environ | dict(JAX_PLATFORMS="cpu"),
            stderr=subprocess.DEVNULL,
        )

    many = [json.dumps(dict(text=text)) for text in TEXTS * 60]
    (folder / "many.jsonl").write_text("\n".join(many))
    assert start("whole.jsonl").wait() == 0
    out = pathlib.Path(folder / "out.jsonl")
    for lines in (1, 60, 150):
        process = start("out.jsonl")
        while not out.exists() or out.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("out.jsonl").wait() == 0
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()
