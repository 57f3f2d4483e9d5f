"""Damaged checkpoints are found, named and passed over; good ones are never lost."""

import gc
import json
import os
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite import checkpoint, checksums, integrity, parameters, stored, verify
from tests.damage import data_file, flip, lose_meta, lose_state, writer_of
from tests.tiny import tiny_config

MASK = 2**32 - 1


def by_definition(array) -> str:
    """The sum of checksums.py's docstring, with Python's own integers."""
    raw, size = np.asarray(array).tobytes(), min(4, np.asarray(array).dtype.itemsize)
    total = 0
    for i in range(len(raw) // size):
        x = int.from_bytes(raw[i * size : (i + 1) * size], "little")
        x ^= i * 0x9E3779B1 & MASK
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ x >> shift) * factor & MASK
        total += x
    return f"{total & MASK:08x}"


def arrays() -> dict:
    rng = np.random.default_rng(0)
    return {
        "f4": jnp.asarray(rng.normal(size=(8, 6, 10)), jnp.float32),
        "bf16": jnp.asarray(rng.normal(size=(4, 9)), jnp.bfloat16),
        "u4": jnp.asarray(rng.integers(0, 2**32, 17, np.uint32)),
        "i4": jnp.asarray(-7, jnp.int32),
        "i1": jnp.asarray(rng.integers(-128, 128, (3, 5)), jnp.int8),
        "bool": jnp.asarray(rng.integers(0, 2, (2, 33)), bool),
        "long": jnp.asarray(rng.normal(size=40_000), jnp.float32),
        "none": jnp.zeros((0, 3)),
    }


def test_sums_are_those_of_their_definition():
    made = arrays() | {"f8": np.arange(6.0).reshape(2, 3)}
    found = checksums.of_tree(made)
    assert found == {n: f"{a.dtype} {by_definition(a)}" for n, a in made.items()}
    key = jax.random.key(3)
    (of_key,) = checksums.of_tree({"key": key}).values()
    assert of_key.split()[-1] == by_definition(jax.random.key_data(key))


@pytest.mark.parametrize(
    "spec", [(), ("x",), (None, "y"), ("x", "y"), (("x", "y"),), (None, None, "y")]
)
def test_sums_are_the_same_on_every_mesh_and_by_every_way(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    array = arrays()["f4"]
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = by_definition(array)
    assert checksums.of_tree({"a": split}) == {"a": f"float32 {expected}"}
    # What GPUs and TPUs run.
    assert f"{int(checksums._by_device([split])[0]):08x}" == expected


def test_other_devices_sum_every_dtype_alike():
    made = arrays()
    del made["none"]
    found = [f"{int(x):08x}" for x in checksums._by_device([*made.values()])]
    assert found == [by_definition(a) for a in made.values()]


def test_any_changed_word_changes_the_sum():
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, 64, np.uint32)
    before = checksums.of_piece(words, [0], words.shape)
    for _ in range(500):
        damaged = words.copy()
        damaged[rng.integers(64)] ^= rng.integers(1, 2**32, dtype=np.uint32)
        assert checksums.of_piece(damaged, [0], words.shape) != before
    # What a plain weighted sum would not see: two signs, two neighbours.
    for flipped in (words ^ np.uint32(2**31), words[::-1]):
        damaged = np.concatenate([flipped[:2], words[2:]])
        assert checksums.of_piece(damaged, [0], words.shape) != before


# ---- damage on disk ---------------------------------------------------------------


@pytest.fixture
def run(tiny_workdir, tmp_path):
    """A copy of a workdir with checkpoints of steps 3 and 5."""
    shutil.copytree(tiny_workdir, tmp_path / "run")
    return tmp_path / "run"


def snapshot(run: pathlib.Path) -> dict:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def abstract(run: pathlib.Path) -> dict:
    cfg, _, _ = checkpoint.read_run(run, 3)
    from t5x_lite import model, optim, sharding, state

    net = model.build(cfg.model)
    mesh = sharding.make_mesh(cfg.sharding, jax.devices()[:1])
    return state.abstract(net, optim.make(cfg, net), mesh, cfg.sharding.rules)


def places(rng: random.Random, run: pathlib.Path, each: int):
    """(file, place, bit) in every file of checkpoint 5."""
    for path in sorted((run / "checkpoints/5").rglob("*")):
        size = path.stat().st_size
        if path.is_file() and size:
            spots = {0, size - 1, *(rng.randrange(size) for _ in range(each - 2))}
            yield from ((path, at, rng.randrange(8)) for at in sorted(spots))


def count_flips(run: pathlib.Path, each: int) -> dict[str, int]:
    """Flips bits one by one; -> how many were found, and how many changed nothing.

    Fails for a flip that Orbax would load with other values without a word.
    """
    wanted, reader = abstract(run), reader_of(run)
    good, meta = jax.tree.map(np.asarray, reader.restore(5, wanted)), reader.meta(5)
    counts = {"named": 0, "no effect": 0}
    for path, at, bit in places(random.Random(0), run, each):
        before = path.read_bytes()
        flip(path, at, bit)
        found = integrity.inspect(run / "checkpoints/5").problems
        if found:
            counts["named"] += 1
        else:
            now = jax.tree.map(np.asarray, reader.restore(5, wanted))
            assert reader.meta(5) == meta, (path, at, bit)
            jax.tree.map(np.testing.assert_array_equal, now, good)
            counts["no effect"] += 1
        path.write_bytes(before)
    gc.collect()  # Orbax leaves coroutines of a failed restore: warned of here
    return counts


def reader_of(run: pathlib.Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(run, tiny_config().checkpoint, reader=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_anywhere_is_named_or_changes_nothing(run):
    counts = count_flips(run, 2)
    print(counts)
    assert min(counts.values()) > 0, "flips of both kinds, or nothing was tried"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_five_hundred_flipped_bits(run):
    counts = count_flips(run, 36)
    print(counts)
    assert sum(counts.values()) >= 500


def test_every_file_that_is_cut_or_missing_is_named_or_not_needed(run):
    wanted, reader = abstract(run), reader_of(run)
    unnamed = set()
    for path in sorted((run / "checkpoints/5").rglob("*")):
        if not path.is_file():
            continue
        before = path.read_bytes()
        for damage in (lambda p: os.truncate(p, p.stat().st_size // 2), os.unlink):
            damage(path)
            if not integrity.inspect(run / "checkpoints/5").problems:
                unnamed.add(path)
            path.write_bytes(before)
    for path in unnamed:  # copies of an index, mostly
        path.unlink()
    reader.restore(5, wanted)
    assert data_file(run, 5) not in unnamed


def test_every_reader_names_the_damaged_array(run, monkeypatch):
    flip(data_file(run, 5), 100_000)
    (problem,) = integrity.inspect(run / "checkpoints/5").problems
    name = re.match(r"state: params/(\S+) is not what was saved", problem)
    assert name, problem
    words = f"params/{name[1]} is not what was saved"
    with pytest.raises(integrity.Damaged, match=words) as e:
        checkpoint.load_run(run)
    assert "checkpoints/5 cannot be read" in str(e.value) and "--step=3" in str(e.value)
    with pytest.raises(integrity.Damaged, match=words):
        reader_of(run).restore(5, abstract(run))
    lazy = stored.open_params(run)
    with pytest.raises(integrity.Damaged, match=words):
        lazy[name[1]]
    assert checkpoint.load_run(run, 3)[3] == 3
    # An array that is not read is not in the way.
    cfg, net, _, _, _ = checkpoint.load_run(run, 3)
    assert name[1] in parameters.declared(net)
    whole = abstract(run)
    found = checkpoint.load_part(run, 5, {"step": whole["step"]})
    assert int(found["step"]) == 0


def test_verify_names_what_is_damaged_and_exits_with_1(run, capsys):
    assert verify.main([f"--workdir={run}"]) == 0
    assert capsys.readouterr().out.count("good") == 2
    flip(data_file(run, 3), 100_000)
    assert verify.main([f"--workdir={run}"]) == 1
    out = capsys.readouterr().out
    assert out.count("good") == 1 and "is not what was saved" in out
    assert verify.main([f"--workdir={run}", "--step=5"]) == 0
    with pytest.raises(ValueError, match=r"--step=4 is not in .* it has \[3, 5\]"):
        verify.main([f"--workdir={run}", "--step=4"])


def test_checkpoints_from_before_the_checksums_are_read(run, capsys):
    path = run / "checkpoints/5/meta/metadata"
    meta = json.loads(path.read_text())
    for key in ("checksums", "metrics", "sha256"):
        del meta[key]
    path.write_text(json.dumps(meta))
    (run / "checkpoints/5/meta/files.sha256").unlink()
    assert checkpoint.load_run(run)[3] == 5
    assert verify.main([f"--workdir={run}", "--step=5"]) == 0
    assert "saved without checksums" in capsys.readouterr().out


# ---- falling back -----------------------------------------------------------------


def empty_array(directory: pathlib.Path):
    os.truncate(data_file(directory.parent.parent, 5), 1000)


def change_a_byte(directory: pathlib.Path):
    flip(data_file(directory.parent.parent, 5), 50_000)


# Orbax leaves its other reads alone when one has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [lose_state, lose_meta, empty_array, change_a_byte])
def test_a_run_goes_on_from_the_one_before_a_damaged_one(run, damage, capsys):
    damage(run / "checkpoints/5")
    before, wanted, seen = snapshot(run), abstract(run), []
    with writer_of(run) as made:
        with pytest.raises(integrity.Damaged, match="restore_step=3"):
            made.resume(5, seen.append, wanted)
        step, meta, state = made.resume(-1, seen.append, wanted)
        assert step == meta["step"] == 3 and state["step"].dtype == np.int32
        assert seen[-1] == meta
        assert "warning: checkpoint" in capsys.readouterr().out
        assert snapshot(run) == before
        assert made.set_aside_after(3) == [5] and made.steps() == [3]
    assert {p.name for p in (run / "abandoned").iterdir()} == {"5-0"}
    assert sorted(before.values()) == sorted(snapshot(run).values())


def test_without_any_good_one_nothing_is_changed(run):
    wanted = abstract(run)
    for step in (3, 5):
        lose_meta(run / f"checkpoints/{step}")
    before = snapshot(run)
    with writer_of(run) as made:
        with pytest.raises(integrity.Damaged, match=r"no checkpoint of \[5, 3\]"):
            made.resume(-1, bool, wanted)
    assert snapshot(run) == before


def test_a_checkpoint_of_another_config_is_not_passed_over(run):
    def refuse(meta):
        raise ValueError("another config")

    with writer_of(run) as made:
        with pytest.raises(ValueError, match="another config"):
            made.resume(-1, refuse, abstract(run))
