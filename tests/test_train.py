"""The train command: files, resuming, kills, signals, and bad input."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest

from t5x_lite import checkpoint, evaluate, metrics, progress
from t5x_lite.workdir import check_space
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "data" / "heldout.jsonl"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Token stores and compiled programs, shared by the runs of this file."""
    return tmp_path_factory.mktemp("shared")


def command(workdir, shared, *more):
    return [
        *(sys.executable, "-m", "t5x_lite.train", f"--workdir={workdir}"),
        "--config=configs/base.py:smoke",
        f"--config.data.train={SOURCE}",
        f"--config.data.heldout={SOURCE}",
        f"--config.data.cache_dir={shared}/stores",
        f"--config.compile_cache={shared}/compiled",
        "--config.eval_batches=2",
        "--config.model.dropout=0.1",
        *more,
    ]


def start(*args):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        command(*args),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*args, code=0):
    process = start(*args)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def sequence(workdir):
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in progress.CLOCKED} for row in rows]


def steps(workdir):
    return sorted(
        int(p.name)
        for p in (pathlib.Path(workdir) / "checkpoints").glob("*")
        if p.name.isdigit()
    )


LONG = (
    "--config.steps=120",
    "--config.checkpoint.every=8",
    "--config.eval_every=40",
    "--config.data.batch_size=16",
)


@pytest.fixture(scope="module")
def uninterrupted(shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    out = run(workdir, shared, *LONG)
    return workdir, out


def test_a_run_leaves_its_files_and_says_where(uninterrupted):
    workdir, out = uninterrupted
    for name in ("config.json", "summary.txt", "loss.png", "metrics.jsonl"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "tensorboard").iterdir())
    about = json.loads((workdir / "config.json").read_text())
    assert about["config"]["steps"] == 120 and about["versions"]["jax"]
    summary = (workdir / "summary.txt").read_text()
    for words in ("encoder/blocks/attention/query", "FLOPs per step", "packages"):
        assert words in summary
    for words in ("start-up: import", "held-out loss", "unigram loss", "loss.png"):
        assert words in out
    rows = sequence(workdir)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 121))
    assert [r["step"] for r in rows if "heldout_loss" in r] == [40, 80, 120]


def test_again_it_says_that_it_is_finished(uninterrupted, shared):
    workdir, _ = uninterrupted
    before = sequence(workdir)
    out = run(workdir, shared, *LONG)
    assert "finished: step 120 of 120" in out and "unigram loss" in out
    assert sequence(workdir) == before


def test_old_checkpoints_go_the_best_and_the_last_stay(uninterrupted):
    workdir, _ = uninterrupted
    losses = {
        r["step"]: r["heldout_loss"] for r in sequence(workdir) if "heldout_loss" in r
    }
    best = min(losses, key=lambda s: losses[s])
    assert steps(workdir) == sorted({best, 112, 120})


def test_kills_at_random_instants_change_nothing(uninterrupted, shared, tmp_path):
    """SIGKILL in start-up, between steps, and while a checkpoint is being written."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed {seed}")
    workdir, landed = tmp_path / "run", []
    for kill in range(6):
        process = start(workdir, shared, *LONG)
        moment = ("start-up", "step", "save")[kill % 3]
        before = steps(workdir) if workdir.exists() else []
        wait_for(moment, workdir, len(sequence(workdir)) if before else 0, rng)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        landed.append((moment, process.returncode, steps(workdir)[-1:]))
        assert max(steps(workdir), default=0) >= max(before, default=0), landed
    run(workdir, shared, *LONG)
    assert sequence(workdir) == sequence(uninterrupted[0]), landed
    assert [code for _, code, _ in landed].count(-signal.SIGKILL) >= 4, landed
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def wait_for(moment, workdir, lines, rng):
    """Sleeps until a kill would land in the wanted phase, at a random instant of it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if moment == "start-up":
            time.sleep(rng.uniform(0.0, 6.0))
            return
        saving = list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        written = workdir / "metrics.jsonl"
        new = len(sequence(workdir)) - lines if written.exists() else 0
        if moment == "save" and saving:
            time.sleep(rng.uniform(0.0, 0.05))
            return
        if moment == "step" and new >= 4:
            time.sleep(rng.uniform(0.0, 0.3))
            return
        time.sleep(0.002)


def test_sigterm_saves_and_exits_cleanly(uninterrupted, shared, tmp_path):
    process = start(tmp_path, shared, *LONG)
    while not (tmp_path / "metrics.jsonl").exists() or len(sequence(tmp_path)) < 11:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "SIGTERM: saved step" in out
    saved = steps(tmp_path)[-1]
    assert f"saved step {saved}" in out and sequence(tmp_path)[-1]["step"] == saved
    assert "resuming after step" in run(tmp_path, shared, *LONG)
    assert sequence(tmp_path) == sequence(uninterrupted[0])


def test_a_second_process_on_the_workdir_is_refused(shared, tmp_path):
    first = start(tmp_path, shared, *LONG)
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    out = run(tmp_path, shared, *LONG, code=2)
    assert "in use by another running process" in out and "Traceback" not in out
    first.kill()
    first.communicate()


@pytest.fixture(scope="module")
def short(shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("short")
    run(workdir, shared, "--config.checkpoint.every=1")
    return workdir


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.model.d_model=64"], "config.model.d_model: 32 in the checkpoint"),
        (["--config.optim.name=adamw"], "config.optim.name: 'adafactor' in"),
        (["--config.seed=5"], "config.seed: 0 in the checkpoint, 5 now"),
        (["--config.checkpoint.restore_step=7"], "it has [1, 2]"),
        (["--config.sharding.data=3"], "does not fit 1 device"),
        (["--config.data.vocab=no.model"], "no.model"),
        (["--config.data.train=no.jsonl"], "no.jsonl"),
        (["--config.data.sentinels=2"], "sentinel"),
        (["--config.optim.microbatches=3"], "must be a multiple of"),
        (["--config.optim.learnin_rate=1"], "learning_rate"),
        (["--config.objective.densty=0.2"], "density"),
    ],
)
def test_bad_input_gives_one_clear_error_and_loses_nothing(short, shared, flags, words):
    before = {p: p.stat().st_mtime_ns for p in short.rglob("*") if p.name != "lock"}
    out = run(short, shared, "--config.steps=4", *flags, code=2)
    last = out[out.rindex("error:") :]
    assert words in last and "Traceback" not in out
    after = {p: p.stat().st_mtime_ns for p in short.rglob("*") if p.name != "lock"}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_a_truncated_checkpoint_is_named_and_an_older_one_taken(
    short, shared, tmp_path
):
    workdir = tmp_path / "copy"
    shutil.copytree(short, workdir)
    files = [p for p in (workdir / "checkpoints/2/state").rglob("*") if p.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    asked = "--config.checkpoint.restore_step=2"
    out = run(workdir, shared, "--config.steps=4", asked, code=2)
    assert "checkpoints/2 cannot be read" in out and "restore_step=1" in out
    assert steps(workdir) == [1, 2]
    out = run(workdir, shared, "--config.steps=4")
    assert "warning: checkpoint" in out and "checkpoints/2 cannot be read" in out
    assert "resuming after step 1 of 4" in out and "moved the later" in out
    assert (workdir / "abandoned" / "2-0").is_dir()
    assert steps(workdir) == [2, 4]
    whole = tmp_path / "whole"
    run(whole, shared, "--config.steps=4")
    assert sequence(workdir) == sequence(whole)


@pytest.mark.slow
def test_the_way_out_of_a_bad_loss_fits_the_checkpoint(short, shared, tmp_path):
    """Clipping, weight decay and learning rate may change between two starts."""
    workdir = tmp_path / "copy"
    shutil.copytree(short, workdir)
    flags = ["--config.optim.clip_norm=1.0", "--config.optim.weight_decay=0.01"]
    out = run(workdir, shared, "--config.steps=4", *flags)
    assert "resuming after step 2 of 4" in out


def test_a_loss_that_is_not_finite_is_never_saved(shared, tmp_path):
    flags = ["--config.optim.learning_rate=1e30", "--config.checkpoint.every=1"]
    out = run(tmp_path, shared, "--config.steps=9", *flags, code=2)
    assert "Lower config.optim.learning_rate" in out
    rows = sequence(tmp_path)
    assert all(abs(r["loss"]) < 1e30 for r in rows if "loss" in r)
    assert steps(tmp_path)[-1] <= rows[-1]["step"]


def test_evaluate_on_more_devices_than_the_run_had(short, shared, capsys):
    assert jax.device_count() == 8
    evaluate.main([f"--workdir={short}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = [r for r in sequence(short) if "heldout_loss" in r][-1]
    assert result["step"] == 2 and result["unigram_loss"] == trained["unigram_loss"]
    assert result["heldout_loss"] == pytest.approx(trained["heldout_loss"], rel=1e-5)


def test_a_full_disk_is_one_clear_error_and_keeps_what_is_there(short, shared):
    free = shutil.disk_usage(short)._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=free):
        with pytest.raises(OSError, match="2 more checkpoints need"):
            check_space(short, 10**6, 2)
    with tempfile.TemporaryDirectory() as directory:
        saved = checkpoint.Checkpoints(directory, tiny_config().checkpoint)
        saved.save(1, {"x": np.zeros(8)}, {})
        saved.wait()
        with mock.patch("orbax.checkpoint.CheckpointManager.save") as save:
            save.side_effect = OSError(28, "No space left on device")
            with pytest.raises(OSError, match=r"failed: .*\n?.*Complete .*: \[1\]"):
                saved.save(2, {"x": np.zeros(8)}, {})
        saved.close()


def test_a_stray_folder_is_no_checkpoint(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, tiny_config().checkpoint)
    saved.save(1, {"x": np.zeros(8)}, {})
    saved.close()
    (tmp_path / "checkpoints/99").mkdir()
    again = checkpoint.Checkpoints(tmp_path, tiny_config().checkpoint, reader=True)
    assert again.choose(-1) == 1
    again.close()


def test_the_best_checkpoint_outlives_a_restart(tmp_path):
    keep = tiny_config(checkpoint=dict(keep_last=1, keep_best=1)).checkpoint
    for start, losses in ((1, [3.0, 1.0, 5.0]), (4, [5.0, 2.0])):
        saved = checkpoint.Checkpoints(tmp_path, keep)
        for step, loss in enumerate(losses, start):
            saved.save(step, {"x": np.full(8, loss)}, {}, {"heldout_loss": loss})
            saved.wait()
        saved.close()
    # 4 is there until 5 is known to be good, which the next save asks.
    assert steps(tmp_path) == [2, 4, 5]


def test_an_unwritable_workdir_is_refused_at_once(shared, tmp_path):
    file = tmp_path / "file"
    file.touch()
    out = run(file / "run", shared, code=2)
    assert "cannot be written" in out and "Traceback" not in out
