"""The guard in whole runs: spikes, rewinds, kills, bad steps, processes."""

import json
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from t5x_lite import (
    checkpoint,
    config,
    guard,
    inspect,
    loop,
    metrics,
    progress,
    run,
    train,
)
from tests.test_distributed import Group

# ---- whole runs


@pytest.fixture(scope="module")
def one_device():
    """Of the eight: a restart in this process then compiles what it has compiled."""
    with jax.default_device(jax.devices()[0]):
        yield


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled")
    before = jax.config.values["jax_compilation_cache_dir"]
    yield path
    jax.config.update("jax_compilation_cache_dir", before)


class Killed(BaseException):
    """As SIGKILL: nothing of the program may catch it."""


def settings(shared: pathlib.Path, text: pathlib.Path, **optim_knobs) -> config.Config:
    raw: Any = base.get_config("smoke")
    base.set_objective(raw, "causal_lm")
    raw.model.structure = "decoder"
    raw.data.train = raw.data.heldout = str(text)
    raw.data.cache_dir = str(shared / "stores")
    raw.data.prefetch = 0
    raw.compile_cache = str(shared)
    raw.steps, raw.eval_every, raw.checkpoint.every = 30, 15, 10
    raw.optim.update(dict(name="adamw", schedule="constant", learning_rate=3e-3))
    raw.optim.update(optim_knobs)
    return config.freeze(raw)


def go(cfg, workdir, monkeypatch) -> list[dict]:
    with monkeypatch.context() as patch:
        patch.setattr("t5x_lite.samples.print_samples", lambda *_: None)
        patch.setattr("t5x_lite.report.plot_loss", lambda *_: None)
        train.train(cfg, workdir)
    return sequence(workdir)


def sequence(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in progress.CLOCKED} for r in rows]


FOX = "the quick brown fox jumps over the lazy dog " * 6


# Step 24 of 30 reads the poisoned document: see `test_a_spike_...`.
SPIKES = dict(spike_factor=1.2, spike_window=3, spike_back=3, spike_skip=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """110 documents that are alike, and one of noise between them."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    noise = np.random.default_rng(0).integers(33, 126, 60)
    documents = [FOX] * 110
    documents[40] = "".join(map(chr, noise))
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="module")
def rewound(one_device, cached, text, tmp_path_factory):
    """A run that rewinds once, not killed: (workdir, config, its lines)."""
    workdir = tmp_path_factory.mktemp("rewound")
    cfg = settings(cached, text, **SPIKES, spike_rewinds=1)
    with pytest.MonkeyPatch.context() as patch:
        return workdir, cfg, go(cfg, workdir, patch)


def poisoned_steps(cfg) -> list[int]:
    """Steps whose batch holds a character that the other documents have not."""
    setup = run.Setup.of(cfg)
    usual = set(FOX.encode())
    found = []
    for done in range(cfg.steps):
        ids = setup.train_batches.whole(done)["main"]["tokens"]
        text = "".join(setup.vocab.decode(row) for row in ids)
        if not set(text.encode()) <= usual:
            found.append(done + 1)
    return found


def test_a_spike_is_rewound_and_its_batches_are_left_out(rewound, capsys):
    workdir, cfg, rows = rewound
    (spike,) = poisoned_steps(cfg)
    to = spike - 4
    assert to % cfg.checkpoint.every == 0 and spike - to >= cfg.optim.spike_back
    note = json.loads((workdir / guard.REWINDS).read_text())
    (about,) = note["rewinds"]
    assert (about["step"], about["to"]) == (spike, to)
    assert about["batches"] == [to, spike - 1 + cfg.optim.spike_skip]
    assert about["loss"] > 1.2 * about["median"] and note["left_out"] == [[to, 6]]
    trained = [r for r in rows if "loss" in r]
    assert [r["step"] for r in trained] == list(range(1, cfg.steps + 1))
    # The data as they are asked for by number.
    batches = run.Setup.of(cfg).train_batches
    for row in trained:
        index = row["step"] - 1 + (6 if row["step"] > to else 0)
        mark = np.sum(batches.whole(index)["fingerprint"], dtype=np.uint32)
        assert row["fingerprint"] == f"{int(mark):08x}"
    # The batch of the spike was kept for people.
    capsys.readouterr()
    inspect.main([f"--dump={workdir}/spike-{spike}.npz"])
    shown = capsys.readouterr().out
    assert f"step {spike}: loss {about['loss']:g}, examples" in shown
    assert "gradients that are not finite: 0 of" in shown


@pytest.mark.slow
def test_a_rewound_run_is_one_that_never_saw_the_spike(
    rewound, cached, text, tmp_path, monkeypatch
):
    """These batches left out from the start, and no guard."""
    workdir, _, rows = rewound
    (tmp_path / guard.REWINDS).write_text((workdir / guard.REWINDS).read_text())
    assert go(settings(cached, text), tmp_path, monkeypatch) == rows


KILLS = {
    # What is killed before it happens, and whether that is the usual test.
    "before it is recorded": (guard, "replace", pytest.mark.slow),
    "before anything is set aside": (guard, "settle", ()),
    "before the old state is restored": (loop.Loop, "run", pytest.mark.slow),
    "before the next checkpoint": (progress.StepLog, "_write", pytest.mark.slow),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=m) for n, (*_, m) in KILLS.items()]
)
def test_killed_in_a_rewind_it_is_the_same_run(name, rewound, tmp_path, monkeypatch):
    _, cfg, rows = rewound
    owner, attribute, _ = KILLS[name]
    real = getattr(owner, attribute)
    killed = []

    def dies(*args, **more):
        pending = (tmp_path / guard.REWINDS).exists()
        now = {
            "replace": lambda: args[0].name == guard.REWINDS,
            "settle": lambda: pending,
            "run": lambda: pending,
            "_write": lambda: pending and args[1] == 23,
        }[attribute]()
        if now:
            killed.append(name)
            raise Killed
        return real(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, attribute, dies)
        go(cfg, tmp_path, monkeypatch)
    assert killed == [name]
    assert go(cfg, tmp_path, monkeypatch) == rows


def test_too_many_bad_steps_stop_the_run_with_their_batch(
    one_device, cached, text, tmp_path, monkeypatch, capsys
):
    """And once more of them are allowed it goes on as if they always had been."""
    poisoned = {6, 9, 17, 18, 19}  # checkpoints are due after each 10 steps
    real, save, saved = guard.Remaining.__getitem__, checkpoint.Checkpoints.save, []

    def poison(self, done):
        batch = real(self, done)
        if done in poisoned:
            batch["main"]["weights"] = np.full_like(batch["main"]["weights"], np.nan)
        return batch

    def saves(self, done, *args):
        saved.append(done)
        save(self, done, *args)

    monkeypatch.setattr(guard.Remaining, "__getitem__", poison)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", saves)
    strict, lax = (settings(cached, text, skip_nonfinite=n) for n in (2, 3))
    with pytest.raises(FloatingPointError, match=r"step 20 is not finite \(3 in a row"):
        go(strict, tmp_path / "run", monkeypatch)
    capsys.readouterr()
    inspect.main([f"--dump={tmp_path}/run/nonfinite-20.npz"])
    shown = capsys.readouterr().out
    batch = run.Setup.of(strict).train_batches.whole(19)
    assert "step 20: loss nan, examples 152 to 159" in shown
    bad = len(jax.tree.leaves(run.Setup.of(strict).abstract_state["params"]))
    assert f"not finite: {bad} of {bad} parameters\n           nan  " in shown
    for b, mark in enumerate(batch["fingerprint"]):
        assert f"example {152 + b}, fingerprint {mark:08x}\n" in shown
    assert "jumps over the lazy dog" in shown
    rows = go(lax, tmp_path / "run", monkeypatch)
    skipped = {r["step"]: r["skipped"] for r in rows if "skipped" in r}
    assert skipped == {7: 1, 10: 2, 18: 3, 19: 4, 20: 5}
    assert not any("loss" in r for r in rows if "skipped" in r)
    # Never a state that has given no finite loss: 11 for 10, 21 for 20.
    assert saved == [11, 21, 30]


def two_processes(workdir, rewound, poison="", limit=10):
    """The run of `rewound` with two processes -> exit codes and outputs."""
    given = [
        *(f"--config={rewound[0]}/config.json", f"--workdir={workdir}"),
        *("--config.sharding.data=2", f"--config.optim.skip_nonfinite={limit}"),
    ]
    code = (
        "from t5x_lite import cli, guard, train\n"
        "real = guard.Remaining.__getitem__\n"
        "def poisoned(self, done):\n"
        "    batch = real(self, done)\n"
        f"    if done in [{poison}]: batch['main']['weights'] += float('nan')\n"
        "    return batch\n"
        "guard.Remaining.__getitem__ = poisoned\n"
        "cli.run(train.main)"
    )
    group = Group(2, lambda rank: given, instead=dict.fromkeys(range(2), ["-c", code]))
    return group.ended(), group.outputs


@pytest.mark.slow
def test_processes_rewind_together(rewound, tmp_path):
    codes, outputs = two_processes(tmp_path, rewound)
    assert codes == [0, 0], outputs
    (about,) = json.loads((tmp_path / guard.REWINDS).read_text())["rewinds"]
    assert (about["step"], about["to"], about["batches"]) == (24, 20, [20, 25])
    assert "Rewind 1 of 1: going on from step 20 without" in outputs[0]
    assert "Rewind" not in outputs[1]
    rows = [r for r in sequence(tmp_path) if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 31))


@pytest.mark.slow
def test_processes_stop_together_and_the_dump_is_whole(rewound, tmp_path, capsys):
    codes, outputs = two_processes(tmp_path, rewound, poison="3, 6, 7", limit=1)
    assert 2 in codes and {*codes} <= {2, -signal.SIGABRT}, outputs
    for out in outputs.values():
        assert "step 8 is not finite (2 in a row)" in out and "Traceback" not in out
    inspect.main([f"--dump={tmp_path}/nonfinite-8.npz"])
    assert "examples 56 to 63" in capsys.readouterr().out
