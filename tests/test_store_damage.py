"""Stores of tokens under arbitrary damage."""

import functools
import json
import os
import random
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from t5x_lite.data import building, records, store
from tests.token_stores import BYTES, all_tokens, files_of


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A complete store and one whose build was killed, and what is to be in it."""
    home = tmp_path_factory.mktemp("samples")
    texts = [f"{i % 40} {'word ' * (i % 5)}" for i in range(80)]
    for part in (0, 1):
        rows = [json.dumps({"text": t}) + "\n" for t in texts[part::2]]
        (home / f"{part}.jsonl").write_text("".join(rows))
    source = str(home / "*.jsonl")
    make = functools.partial(
        store.open_store, source, BYTES, deduplicate=True, progress=False
    )

    def die(path, *args, **kwargs):
        writer = building.build(path, *args, **kwargs)
        assert 0 < kept[0]["n_tokens"] < kept[-1]["n_tokens"] == writer.state.n_tokens
        raise KeyboardInterrupt

    kept = []
    commit = building.Writer.commit

    def copy_then_commit(writer):
        commit(writer)
        kept.append(records.read(writer.path / "progress.json"))
        if len(kept) == 5:
            shutil.copytree(writer.path, home / "killed" / writer.path.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "BATCH_CHARS", 100)
        patch.setattr(building, "COMMIT_SECONDS", 0)
        patch.setattr(building, "BLOCK_BYTES", 256)
        whole = make(cache_dir=home / "complete")
        patch.setattr(building.Writer, "commit", copy_then_commit)
        with pytest.raises(KeyboardInterrupt):
            make(cache_dir=home / "unfinished", build=die)
    (name,) = [p.name for p in (home / "complete").iterdir() if p.is_dir()]
    assert {p.name for p in (home / "killed" / name).rglob("*") if p.is_file()} == {
        *("0", "files.jsonl", "progress.json", "seen.sqlite")
    }
    return home, name, make, all_tokens(whole).copy(), files_of(whole.path)


def change(content, rng, value, whole):
    """A leaf of a JSON file is another value; with `whole`, its checksum fits again."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return content
    node = found
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return content
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or rng.random() < 0.2:
            node[key] = value
            break
        node = node[key]
    if whole:
        found.pop("checksum", None)
        found["checksum"] = records._checksum(found)
    return json.dumps(found).encode()


JSON_VALUES = strategies.one_of(
    strategies.none(),
    strategies.booleans(),
    strategies.integers(-(2**70), 2**70),
    strategies.integers(0, 300),
    strategies.floats(),
    strategies.text(max_size=5),
    strategies.sampled_from(["<f2", "<i2", ">u2", "|u1", "object", "../../x", "/etc"]),
    strategies.lists(strategies.integers(), max_size=3),
)


def check_damage(samples, data):
    home, name, make, tokens, content = samples
    state = data.draw(strategies.sampled_from(["complete", "killed"]))
    cache = home / "damaged"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(home / state / name, cache / name)
    names = sorted(files_of(cache / name))
    for _ in range(data.draw(strategies.integers(1, 2))):
        path = cache / name / data.draw(strategies.sampled_from(names))
        before = path.read_bytes() if path.exists() else b""
        how = data.draw(strategies.sampled_from(["flip", "cut", "put", "json", "lose"]))
        at = data.draw(strategies.integers(0, max(len(before) - 1, 0)))
        after = before
        if how == "flip" and before:
            bit = 1 << data.draw(strategies.integers(0, 7))
            after = before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :]
        elif how == "cut":
            after = before[:at]
        elif how == "put":
            new = data.draw(strategies.binary(min_size=1, max_size=20))
            behind = data.draw(strategies.sampled_from([0, len(new)]))
            after = before[:at] + new + before[at + behind :]
        elif how == "json":
            seed = data.draw(strategies.integers(0, 2**32))
            value = data.draw(JSON_VALUES)
            # Who forges the progress of a build forges the store.
            whole = state == "complete" and data.draw(strategies.booleans())
            after = change(before, random.Random(seed), value, whole)
        if how == "lose":
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "BLOCK_BYTES", 256)
        patch.setattr(os, "fsync", lambda _: None)  # no crash here: only time
        opened = make(cache_dir=cache)
    np.testing.assert_array_equal(all_tokens(opened), tokens)
    left = files_of(opened.path)
    assert {n: left[n] for n in ("c/0", "zarr.json", "statistics.json")} == {
        n: content[n] for n in ("c/0", "zarr.json", "statistics.json")
    }
    assert not {"progress.json", "files.jsonl", "seen.sqlite"} & {*left}
    assert sorted(p.name for p in home.iterdir()) == sorted(HOME)


HOME = (*("0.jsonl", "1.jsonl", "complete", "damaged", "killed", "unfinished"),)


@hypothesis.settings(deadline=None, max_examples=40, database=None)
@hypothesis.given(data=strategies.data())
def test_whatever_is_damaged_the_tokens_are_right(samples, data):
    check_damage(samples, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hypothesis.settings(deadline=None, max_examples=6000, database=None)
@hypothesis.given(data=strategies.data())
def test_whatever_is_damaged_the_tokens_are_right_6000_times(samples, data):
    check_damage(samples, data)
