"""What a run needs is checked before anything takes long; all of it, in one table."""

import contextlib
import pathlib
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest

from t5x_lite import (
    checkpoint,
    distributed,
    dry,
    preflight,
    retention,
    train,
    workdir,
)
from tests.tiny import tiny_config

SOURCE = pathlib.Path(__file__).parent.parent / "data" / "heldout.jsonl"


def flags(tmp_path, *more) -> list[str]:
    return [
        *("--config=configs/base.py:smoke", f"--workdir={tmp_path}/run"),
        *(f"--config.data.train={SOURCE}", f"--config.data.heldout={SOURCE}"),
        *(f"--config.data.cache_dir={tmp_path}/stores", "--config.compile_cache="),
        *("--config.sharding.data=8", "--preflight", *more),
    ]


def rows(out: str) -> dict[str, str]:
    """Name -> "ok", "FAIL" or "-" of a printed table."""
    words = [line.split() for line in out.splitlines()]
    return {w[0]: w[1] for w in words if len(w) > 1 and w[1] in ("ok", "FAIL", "-")}


def test_a_run_that_can_start(tmp_path, capsys):
    assert train.main(flags(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "\nready" in out and "FAIL" not in out
    expected = dict.fromkeys(
        ("processes", "workdir", "vocabulary", "model", "checkpoint", "disk", "memory"),
        "ok",
    )
    assert rows(out) == expected | {"text": "-"}  # which is tokenised by the run
    assert "0.4 MiB of files will be tokenised first" in out
    assert "over the mesh (data 8)" in out and "checkpoints of 0.6 MiB" in out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]
    assert not list((tmp_path / "stores").glob("*/store.json"))


def test_all_that_is_wrong_is_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "memory", lambda compiled: "")
    monkeypatch.setattr(dry.Step, "lower", mock.Mock())  # to compile takes long
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir.only_process(tmp_path / "run"))
        stack.enter_context(mock.patch("shutil.disk_usage", return_value=free))
        code = train.main(flags(tmp_path, f"--config.data.vocab={tmp_path}/no.model"))
    assert code == 1
    out = capsys.readouterr().out
    found = rows(out)
    assert found["workdir"] == found["vocabulary"] == "FAIL"
    assert found["processes"] == found["checkpoint"] == "ok"
    assert "in use by another running process (pid" in out and "not ready" in out

    assert train.main(flags(tmp_path, "--config.sharding.fsdp=3")) == 1
    found = rows(capsys.readouterr().out)
    assert found["model"] == "FAIL" and found["vocabulary"] == "ok"
    assert found["disk"] == found["memory"] == "-"

    missing = "--config.data.train=nowhere.jsonl"
    assert train.main(flags(tmp_path, missing)) == 1
    assert rows(capsys.readouterr().out)["text"] == "FAIL"


def test_a_damaged_checkpoint_is_named(tiny_workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_workdir, copy)
    peers = distributed.Peers()
    with contextlib.ExitStack() as stack:
        checks = preflight._Checks(tiny_config(), copy, peers, stack)
        with pytest.raises(preflight._NotYet, match="^5 is whole"):
            checks._checkpoint()
        (copy / "checkpoints/5/meta/metadata").write_text("{}")
        with pytest.raises(ValueError, match="^5: .*metadata"):
            checks._checkpoint()


def test_a_long_tokenisation_is_not_begun_for_a_disk_that_is_full(tmp_path):
    cfg = tiny_config(
        model=dict(vocab_size=0),
        data=dict(
            train=str(SOURCE), heldout=str(SOURCE), cache_dir=str(tmp_path / "stores")
        ),
    )
    (tmp_path / "run").mkdir()
    preflight.before_stores(cfg, tmp_path / "run")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=free):
        preflight.before_stores(cfg, tmp_path / "run")  # not long
        with mock.patch.object(preflight, "LONG", 0):
            with pytest.raises(OSError, match="more checkpoints need"):
                preflight.before_stores(cfg, tmp_path / "run")


def test_the_disk_must_hold_all_checkpoints_that_are_kept(tmp_path):
    """The stated number is reached by a real run, and never passed."""
    keep = dict(every=1, keep_last=2, keep_best=1, keep_every=4)
    cfg = tiny_config(steps=9, checkpoint=keep)
    made = checkpoint.Checkpoints(tmp_path, cfg.checkpoint)
    most, losses = 0, [5.0, 1.0, 4.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    for step, loss in enumerate(losses, 1):
        state = {"x": np.zeros(8, np.float32)}
        made.save(step, state, {"step": step}, {"heldout_loss": loss})
        # Being written: those kept before are still there.
        most = max(most, len({*retention.steps(made.directory), step}))
    made.close()
    # 2 is the best, 4 and 8 are kept for ever; 7 and 8 while 9 is written.
    assert retention.steps(made.directory) == [2, 4, 8, 9]
    assert most <= retention.at_most(cfg) == 6
    state = {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}
    with mock.patch("shutil.disk_usage") as usage:
        usage.return_value = types.SimpleNamespace(free=2 * 4 * 2**20)
        assert "at most 6 checkpoints of 4.0 MiB" in preflight.space(
            cfg, tmp_path, state
        )
        usage.return_value = types.SimpleNamespace(free=2 * 4 * 2**20 - 1)
        with pytest.raises(OSError, match="2 more checkpoints need 8 MiB"):
            preflight.space(cfg, tmp_path, state)


def test_a_step_that_needs_more_memory_than_there_is():
    def compiled(size: int):
        sizes = dict.fromkeys(
            ("generated_code", "argument", "output", "alias", "temp"), 0
        ) | {"temp": size}
        named = {f"{k}_size_in_bytes": v for k, v in sizes.items()}
        analysis = types.SimpleNamespace(**named)
        return types.SimpleNamespace(memory_analysis=lambda: analysis)

    assert "MiB of this machine" in preflight.memory(compiled(2**20))
    with pytest.raises(ValueError, match="config.optim.microbatches"):
        preflight.memory(compiled(2**50))
    said = []
    preflight.warn_of_memory(compiled(2**50), said.append)
    assert said[0].startswith("warning: the step takes")
    preflight.warn_of_memory(compiled(1), said.append)
    assert len(said) == 1
