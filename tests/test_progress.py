"""What a run says about its time: every second is in one place, over restarts too."""

import collections
import gzip
import json
import time
import types
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from configs import base
from t5x_lite import config, guard, losses, metrics, progress, train
from tests.tiny import tiny_config

SHAPES: Any = dict(encoder=(12, 0, 0), decoder=(7, 7, 0))


class Clock:
    """Time that only passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "time", clock)
    return clock


class Lines(list):
    def write(self, step, **values):
        self.append({"step": step, **values})


def step_log(workdir, first=0, kind="cpu", devices=1, **sections):
    cfg = tiny_config(steps=20, **sections)
    device = types.SimpleNamespace(device_kind=kind)
    setup: Any = types.SimpleNamespace(
        cfg=cfg,
        lead=True,
        tokens_per_step=8 * 19,
        train_batches=types.SimpleNamespace(shapes=SHAPES),
        mesh=types.SimpleNamespace(
            devices=np.full(devices, device, object), size=devices
        ),
        epoch=lambda step: 0,
        epochs=lambda step: {},
    )
    lines = Lines()
    timings = {"import": 1.0, "compile": 4.0}
    watch = guard.Guard(setup, workdir, {})
    return progress.StepLog(setup, lines, first, workdir, timings, watch), lines


ones: Any = np.ones((), np.float32)
SUMS = losses.Sums(ones, ones, ones, ones, ones)
RESULT = {"sums": {"tokens": SUMS}, "grad_norm": 1.0, "fingerprint": 7}
RESULT |= {"learning_rate": 0.5, "nonpadding": 1.0, "finite": True}
RESULT["grad_norms"] = np.ones(3)


def go(log, clock, steps, *, data=0.5, compute=3.0, save=None):
    """The loop of `train`: each step waits for data, computes, and maybe saves."""

    def batches():
        for step in steps:
            clock.sleep(data)
            yield step

    for done in log.waiting(batches()):
        clock.sleep(compute)
        log.add(done + 1, RESULT)
        log.drain()
        if save:
            with log.saving():
                clock.sleep(save)
            log.restart_clock()


def test_every_second_is_in_one_place(clock, tmp_path):
    log, lines = step_log(tmp_path, log_every=2)
    go(log, clock, range(4), save=2.0)
    assert [line["step"] for line in lines] == [2, 4]
    first, second = lines
    assert first["data_seconds"] == 0.5 and first["compute_seconds"] == 3.0
    assert first["step_seconds"] == 3.5
    assert first["tokens_per_second"] == pytest.approx(8 * 19 / 3.5)
    # The save after a line is in the next one: one of two, then two of two steps.
    assert first["checkpoint_seconds"] == 1.0 and second["checkpoint_seconds"] == 2.0
    assert second["useful_seconds"] == 4 * 3.0
    # 5 s of start-up, 4 steps of 3.5 s, 3 saves of 2 s.
    assert second["goodput"] == pytest.approx(12 / (5 + 14 + 6))
    assert "mfu" not in second
    assert not any(key.startswith("memory") for key in second)


def test_goodput_counts_restarts_and_steps_done_twice(clock, tmp_path):
    log, lines = step_log(tmp_path, first=0)
    go(log, clock, range(3))
    log.started()
    # Killed after step 3; only the lines up to the checkpoint of step 2 are kept.
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines[:2])
    clock.sleep(100.0)
    log, lines = step_log(tmp_path, first=2)
    go(log, clock, range(2, 4))
    assert [line["step"] for line in lines] == [3, 4]
    assert lines[-1]["useful_seconds"] == 4 * 3.0
    # 5 s before the first step, five steps, and 100 s of which 5 s are start-up again.
    assert lines[-1]["goodput"] == pytest.approx(12 / (5 + 5 * 3.5 + 100))


def test_a_clock_that_was_set_back_leaves_shares_of_time(clock, tmp_path):
    """By an hour, between two starts: the second began before the first."""
    log, _ = step_log(tmp_path)
    go(log, clock, range(3))
    log.started()
    clock.now -= 3600.0
    log, lines = step_log(tmp_path, first=3)
    go(log, clock, range(3, 6))
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert all(0.0 < line["goodput"] <= 1.0 for line in lines)
    assert all(line["step_seconds"] == 3.5 for line in lines)


def test_mfu_is_against_all_chips(clock, tmp_path):
    log, lines = step_log(tmp_path, kind="NVIDIA H200", devices=4)
    go(log, clock, range(1), data=0.0, compute=2.0)
    flops = 3 * 8 * metrics.forward_flops(tiny_config().model, SHAPES)
    assert lines[0]["mfu"] == pytest.approx(flops / 2.0 / (4 * 989.5e12))


def test_memory_is_that_of_the_fullest_device(clock, tmp_path, monkeypatch):
    devices = [
        mock.Mock(**{"memory_stats.return_value": stats})
        for stats in (
            dict(bytes_in_use=5, peak_bytes_in_use=6),
            dict(bytes_in_use=4, peak_bytes_in_use=9),
        )
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    log, lines = step_log(tmp_path)
    go(log, clock, range(1))
    assert lines[0]["memory_bytes"] == 5 and lines[0]["memory_peak_bytes"] == 9


@pytest.mark.parametrize(
    "first, steps, profile_first, traced",
    [(0, 20, 10, [10, 13]), (5, 20, 10, [15, 18]), (5, 20, 14, [17, 20]),
     (0, 2, 10, [0, 3])],
)  # fmt: skip
def test_the_trace_fits_into_the_run(first, steps, profile_first, traced, tmp_path):
    cfg = tiny_config(steps=steps, profile=3, profile_first=profile_first)
    lead: Any = types.SimpleNamespace(lead=True)
    log: Any = types.SimpleNamespace(first=first, setup=lead)
    profiler = progress.Profiler(cfg, log, tmp_path)
    assert [profiler.begin, profiler.end] == traced


# ---- a real run


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The workdir of a tiny run of 6 steps, then of 9, and the wall seconds of both."""
    workdir = tmp_path_factory.mktemp("run")
    raw: Any = base.get_config("smoke")
    raw.data.train = raw.data.heldout = "data/heldout.jsonl"
    raw.data.cache_dir = str(workdir / "stores")
    raw.compile_cache = ""
    raw.checkpoint.every = 3
    raw.profile, raw.profile_first = 2, 1
    began = time.perf_counter()
    with mock.patch("t5x_lite.samples.print_samples"):
        for raw.steps in (6, 9):
            with mock.patch.object(train, "_STARTED", time.perf_counter()):
                train.train(config.freeze(raw), workdir / "run")
            raw.profile = 0
    return workdir / "run", time.perf_counter() - began


def test_the_lines_of_a_real_run_add_up(resumed):
    workdir, wall = resumed
    rows = [r for r in metrics.read(workdir / "metrics.jsonl") if "loss" in r]
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row in rows:
        parts = row["data_seconds"] + row["compute_seconds"]
        assert parts == pytest.approx(row["step_seconds"])
        assert 0.0 < row["goodput"] < 1.0
        assert {"mfu"}.isdisjoint(row)
    saved = [row["step"] for row in rows if row["checkpoint_seconds"] > 0.0]
    assert saved == [4]  # those of 6 and 9 end with their session
    useful = np.cumsum([row["compute_seconds"] for row in rows])
    np.testing.assert_allclose([r["useful_seconds"] for r in rows], useful, rtol=1e-6)
    assert useful[-1] + sum(row["checkpoint_seconds"] for row in rows) < wall


def test_each_start_is_a_line_of_sessions(resumed):
    workdir, wall = resumed
    first, second = metrics.read(workdir / "sessions.jsonl")
    assert [first["first_step"], second["first_step"]] == [1, 7]
    assert 0.0 < second["began"] - first["began"] < wall + 60.0
    phases = first["startup_seconds"]
    assert {"import", "store", "init_or_restore", "compile", "first_step"} <= {*phases}
    assert all(seconds > 0.0 for seconds in phases.values())


def test_the_profile_holds_the_steps_that_were_asked_for(resumed):
    workdir, _ = resumed
    assert list((workdir / "profile").rglob("*.xplane.pb"))  # TensorBoard's
    (path,) = (workdir / "profile").rglob("*.trace.json.gz")
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    found = collections.Counter(map(int, steps))
    assert found == {2: 1, 3: 1}
