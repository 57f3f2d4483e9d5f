"""Checkpoints: retention, clocks, full disks, locks, several processes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import checkpoint, integrity, metrics, retention, verify, workdir
from tests.damage import data_file, flip, lose_meta, writer_of
from tests.tiny import tiny_config

# ---- retention --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Info:
    """What Orbax tells a policy, without a time: it is not asked for."""

    step: int
    metrics: float | None = None


def test_retention_keeps_what_it_says_whatever_is_damaged():
    """Against a plain simulation, over random runs of 40 saves."""
    for seed in range(12):
        rng = random.Random(seed)
        keep = dict(
            keep_last=rng.randint(1, 3),
            keep_best=rng.randint(0, 2),
            keep_every=rng.choice([0, 7]),
        )
        cfg = tiny_config(steps=40, checkpoint=dict(every=1, **keep))
        policy = retention.Retention(cfg.checkpoint, pathlib.Path("nowhere"))
        there, losses, good = [], {}, []
        for step in range(1, 41):
            there.append(step)
            if rng.random() < 0.5:
                losses[step] = rng.random()
                policy.scored(step, {"heldout_loss": losses[step]})
            infos: Any = [Info(s) for s in there]
            kept = policy.should_preserve(infos, context=mock.Mock())
            before = there
            there = [s for s, k in zip(before, kept, strict=True) if k]
            assert set(before[-keep["keep_last"] :]) <= set(there)
            alive = sorted((losses[s], s) for s in before if s in losses)
            assert {s for _, s in alive[: keep["keep_best"]]} <= set(there)
            every = keep["keep_every"]
            assert all(s in there for s in before if every and s % every == 0)
            if good:  # the newest that was known to be whole
                assert good[-1] in there
            if rng.random() < 0.7:  # it was written, and read back
                policy.good.add(step)
                good.append(step)
        every = sum(
            1 for s in there if keep["keep_every"] and s % keep["keep_every"] == 0
        )
        assert len(there) <= keep["keep_last"] + keep["keep_best"] + 1 + every


def tiny_state(step: int) -> dict:
    return {"x": jnp.full(8, step, jnp.float32)}


def test_the_only_good_checkpoint_outlives_damaged_ones(tmp_path, capsys):
    """keep_last=1, and everything after step 2 is damaged while it is written."""
    keep = dict(keep_last=1, keep_best=0)
    inspect = integrity.inspect

    def damaging(directory, *more):
        if int(directory.name) > 2:
            flip(directory / "meta/metadata", 5)
        return inspect(directory, *more)

    with writer_of(tmp_path, **keep) as made:
        with mock.patch.object(integrity, "inspect", damaging):
            for step in (1, 2, 3, 4, 5):
                made.save(step, tiny_state(step), {"step": step})
            made.wait()
        assert made.steps() == [2, 5]
    assert capsys.readouterr().out.count("does not read back") == 3
    with writer_of(tmp_path, **keep) as again:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny_state(0)
        )
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda s: s.update(sharding=place), like)
        step, _, state = again.resume(-1, bool, like)
        assert step == 2 and float(state["x"][0]) == 2
        again.set_aside_after(step)
        again.save(3, tiny_state(3), {"step": 3})
        again.save(4, tiny_state(4), {"step": 4})
        again.wait()
        assert again.steps() == [3, 4]


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path):
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    keep = dict(keep_last=2, keep_best=1)
    with mock.patch("time.time", backwards):
        for first, losses in ((1, [3.0, 1.0, 5.0]), (4, [4.0, 6.0])):
            with writer_of(tmp_path, **keep) as made:
                assert made.choose(-1) == (first - 1 or None)
                for step, loss in enumerate(losses, first):
                    made.save(
                        step, tiny_state(step), {"step": step}, {"heldout_loss": loss}
                    )
                    made.wait()
                    # Files get older and older, too.
                    for path in (made.directory / str(step)).rglob("*"):
                        os.utime(path, (now[0], now[0]))
        assert verify.main([f"--workdir={tmp_path}"]) == 0
    assert retention.steps(tmp_path / "checkpoints") == [2, 4, 5]


# ---- disks ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def noise(step: int) -> dict:
    """Does not get smaller by compression: 400 kB."""
    rng = np.random.default_rng(step)
    return {"x": jnp.asarray(rng.integers(0, 2**32, 100_000, np.uint32))}


def test_a_disk_that_is_full_during_a_save_loses_nothing(small_disk):
    keep = dict(keep_last=9)
    made = checkpoint.Checkpoints(small_disk, tiny_config(checkpoint=keep).checkpoint)
    with pytest.raises(OSError, match="writing a checkpoint below .* failed") as e:
        for step in range(1, 9):
            made.save(step, noise(step), {"step": step})
        made.wait()
    with contextlib.suppress(OSError):
        made.close()
    assert "Free some space" in str(e.value)
    have = retention.steps(small_disk / "checkpoints")
    assert have and have == list(range(1, len(have) + 1)) and str(have) in str(e.value)
    assert verify.main([f"--workdir={small_disk}"]) == 0
    # With room again, the same run goes on.
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    with writer_of(small_disk, **keep) as again:
        again.save(have[-1] + 1, noise(9), {"step": 9})
        again.wait()
        assert again.steps() == [*have, have[-1] + 1]
        assert not list((small_disk / "checkpoints").glob("*tmp*"))


def test_a_workdir_that_turns_read_only_is_one_clear_error(small_disk):
    made = checkpoint.Checkpoints(small_disk, tiny_config().checkpoint)
    made.save(1, tiny_state(1), {"step": 1})
    made.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"failed: .*Read-only(.|\n)*there: \[1\]"):
        made.save(2, tiny_state(2), {"step": 2})
        made.wait()
    with contextlib.suppress(OSError):
        made.close()
    with pytest.raises(OSError, match="cannot be written .Read-only"):
        with workdir.only_process(small_disk):
            pass
    assert verify.main([f"--workdir={small_disk}"]) == 0


# ---- the lock ---------------------------------------------------------------------


def test_a_live_lock_is_refused_with_its_pid_and_host(tmp_path):
    with workdir.only_process(tmp_path) as word:
        assert word == ""
        who = rf"process .pid {os.getpid()} on host {os.uname().nodename}\)"
        with pytest.raises(ValueError, match=f"in use by another running {who}"):
            with workdir.only_process(tmp_path):
                pass
    with workdir.only_process(tmp_path) as word:
        assert word == ""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    left = {"pid": 4_000_000, "host": "elsewhere", "began": time.time()}
    (tmp_path / "lock").write_text(json.dumps(left))
    with workdir.only_process(tmp_path) as word:
        assert "pid 4000000 on host elsewhere" in word and "died" in word
    for torn in ("", "{", "[1]", '{"pid": 3'):
        (tmp_path / "lock").write_text(torn)
        with workdir.only_process(tmp_path) as word:
            assert word == ""


def test_without_flock_a_live_process_of_this_machine_is_refused(tmp_path):
    with mock.patch("fcntl.flock", side_effect=OSError(37, "No locks available")):
        with workdir.only_process(tmp_path):
            with pytest.raises(ValueError, match=f"pid {os.getpid()}"):
                with workdir.only_process(tmp_path):
                    pass
        left = {"pid": 4_000_000, "host": os.uname().nodename, "began": 0.0}
        (tmp_path / "lock").write_text(json.dumps(left))
        with workdir.only_process(tmp_path) as word:
            assert "4000000" in word


# ---- several processes ------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_agree_on_the_checkpoint_to_go_on_from(tmp_path):
    from tests import test_distributed as processes

    place, shared = tmp_path / "run", tmp_path / "shared"
    often = ("--config.checkpoint.every=2", "--config.steps=4")
    processes.run(2, place, shared, *often)
    # With the same checksums that one process finds.
    assert verify.main([f"--workdir={place}"]) == 0
    before = [r for r in metrics.read(place / "metrics.jsonl") if r["step"] > 2]
    for damage in (
        lambda: flip(data_file(place, 4), data_file(place, 4).stat().st_size // 2),
        lambda: lose_meta(place / "checkpoints/4"),
    ):
        damage()
        out = processes.run(2, place, shared, *often)
        assert "checkpoints/4 cannot be read" in out
        assert "resuming after step 2 of 4" in out
        again = [r for r in metrics.read(place / "metrics.jsonl") if r["step"] > 2]
        assert [r.get("loss") for r in again] == [r.get("loss") for r in before]
        assert retention.steps(place / "checkpoints") == [2, 4]
    assert {p.name for p in (place / "abandoned").iterdir()} >= {"4-0", "4-1"}
