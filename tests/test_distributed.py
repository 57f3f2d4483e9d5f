"""Several processes on this machine: they equal one, and end together."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from t5x_lite import metrics
from tests.test_rendezvous import free_port

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "data" / "heldout.jsonl"
# Sums over other shards are rounded otherwise; thirty steps of Adam amplify that.
LOSS = dict(rel=2e-4)


FLAGS = (
    "--config=configs/gpt2.py:smoke",
    f"--config.data.train={SOURCE}",
    f"--config.data.heldout={SOURCE}",
    "--config.eval_batches=2",
    "--config.model.dropout=0.1",
    "--config.optim.learning_rate=1e-3",
    "--config.optim.schedule=constant",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Token stores and compiled programs, shared by the runs of this file."""
    return tmp_path_factory.mktemp("shared")


def environment(devices=1, **more):
    """Without what the machine of the tests may set; XLA compiles quickly."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
        # Of a cluster: it leads nowhere, and nobody may ask it for the way to rank 0.
        "http_proxy": "http://127.0.0.1:9",
        **more,
    }


def flags(workdir, shared, *more):
    return [
        f"--workdir={workdir}",
        *FLAGS,
        f"--config.data.cache_dir={shared}/stores",
        f"--config.compile_cache={shared}/compiled",
        *more,
    ]


class Group:
    """Processes of one run, each with its output."""

    def __init__(self, count, given, devices=1, instead=None, there=None):
        address = f"127.0.0.1:{free_port()}"
        self.processes, self.outputs = [], {}
        for rank in range(count) if there is None else there:
            place = dict(
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=str(count),
                JAX_PROCESS_ID=str(rank),
            )
            code = (instead or {}).get(rank, ["-m", "t5x_lite.train"])
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *code, *given(rank)],
                    cwd=ROOT,
                    env=environment(devices, **place),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def ended(self, timeout=300) -> list[int]:
        """Exit codes; the outputs are in `outputs` then."""
        readers = [
            threading.Thread(target=self._read, args=(i, process, timeout))
            for i, process in enumerate(self.processes)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return [process.returncode for process in self.processes]

    def _read(self, i, process, timeout):
        try:
            self.outputs[i], _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            self.outputs[i] = "TIMEOUT " + process.communicate()[0]

    def kill(self):
        for process in self.processes:
            process.kill()
        self.ended()


def refused(codes) -> bool:
    """Did all end as after wrong input? jax aborts who outlives rank 0 by a moment."""
    return 2 in codes and {*codes} <= {2, -signal.SIGABRT}


def run(count, workdir, shared, *more, devices=1, code=0):
    """One run from start to end; -> the output of rank 0."""
    group = Group(count, lambda rank: flags(workdir, shared, *more), devices)
    assert group.ended() == [code] * count, group.outputs
    return group.outputs[0]


def sequence(workdir):
    """(kind, step) -> a line of metrics.jsonl."""
    rows = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
    return {
        ("heldout" if "heldout_loss" in row else "train", row["step"]): row
        for row in rows
        if "loss" in row or "heldout_loss" in row
    }


def assert_same(found, expected):
    """Data bit-exact, losses within `LOSS`."""
    assert sorted(found) == sorted(expected)
    for key, row in expected.items():
        for name in ("fingerprint", "epoch", "heldout_tokens", "learning_rate"):
            assert found[key].get(name) == row.get(name), (key, name)
        for name in ("loss", "heldout_loss", "unigram_loss", "grad_norm"):
            if name in row:
                rel = LOSS["rel"] * (10 if name == "grad_norm" else 1)
                assert found[key][name] == pytest.approx(row[name], rel=rel), key


def wait_for(workdir, step, *processes):
    """Until line `step` of the metrics is written."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    while not path.exists() or ("train", step) not in sequence(workdir):
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


LONG = (
    "--config.steps=30",
    "--config.checkpoint.every=4",
    "--config.eval_every=10",
)


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    """An uninterrupted run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    subprocess.run(
        [sys.executable, "-m", "t5x_lite.train", *flags(workdir, shared, *LONG)],
        cwd=ROOT,
        env=environment(),
        check=True,
        capture_output=True,
    )
    return sequence(workdir)


def local(workdir, shared, *more):
    """`launch/local.sh` with two processes."""
    return subprocess.Popen(
        ["launch/local.sh", "-n", "2", "--", *flags(workdir, shared, *more)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_are_one_run(alone, shared, tmp_path):
    process = local(tmp_path, shared, *LONG)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert_same(sequence(tmp_path), alone)
    assert re.search(r"2 processes, 2 devices:\n  rank 0 .*\n  rank 1 .*1 x cpu\n", out)
    assert out.count("held-out sentences") == out.count("loss curve") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_killed_and_resumed_with_fewer_processes(alone, shared, tmp_path):
    """4 processes, all killed; 2 with two devices each, all killed; 1 ends the run."""
    for count, devices, until, sizes in (
        (4, 1, 9, ("--config.sharding.data=2", "--config.sharding.fsdp=2")),
        (2, 2, 19, ("--config.sharding.data=2", "--config.sharding.tensor=2")),
    ):

        def given(rank, sizes=sizes):
            return flags(tmp_path, shared, *LONG, *sizes)

        group = Group(count, given, devices)
        wait_for(tmp_path, until, *group.processes)
        group.kill()
        assert [p.returncode for p in group.processes] == [-signal.SIGKILL] * count
        assert steps(tmp_path)[-1] >= until // 4 * 4 - 4
    out = run(1, tmp_path, shared, *LONG)
    assert "resuming after step" in out
    assert_same(sequence(tmp_path), alone)


@pytest.mark.slow
def test_a_tensor_axis_may_span_processes(alone, shared, tmp_path):
    sizes = ("--config.sharding.tensor=2", "--config.sharding.fsdp=2")
    out = run(2, tmp_path, shared, *LONG, *sizes, "--config.steps=10", devices=2)
    assert "2 processes, 4 devices" in out
    assert_same(sequence(tmp_path), {k: v for k, v in alone.items() if k[1] <= 10})
    again = ["-m", "t5x_lite.evaluate"]
    group = Group(
        2, lambda rank: [f"--workdir={tmp_path}"], 2, instead={0: again, 1: again}
    )
    assert group.ended() == [0, 0], group.outputs
    found = json.loads(group.outputs[0].splitlines()[-1])
    assert "heldout_loss" not in group.outputs[1] and found["step"] == 10
    expected = alone["heldout", 10]
    assert found["heldout_loss"] == pytest.approx(
        expected["heldout_loss"], rel=LOSS["rel"]
    )
    assert found["unigram_loss"] == expected["unigram_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_at_one_step(rank, alone, shared, tmp_path):
    more = ("--config.checkpoint.every=1000",)
    group = Group(2, lambda rank: flags(tmp_path, shared, *LONG, *more))
    wait_for(tmp_path, 3, *group.processes)
    group.processes[rank].send_signal(signal.SIGTERM)
    assert group.ended() == [128 + signal.SIGTERM] * 2, group.outputs
    saved = int(re.findall(r"SIGTERM: saved step (\d+)", group.outputs[0])[0])
    assert "saved step" not in group.outputs[1]
    assert steps(tmp_path) == [saved] and saved < 30
    assert f"resuming after step {saved}" in run(2, tmp_path, shared, *LONG, *more)
    assert_same(sequence(tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim, shared, tmp_path):
    group = Group(2, lambda rank: flags(tmp_path, shared, *LONG, "--config.steps=3000"))
    wait_for(tmp_path, 5, *group.processes)
    group.processes[victim].kill()
    codes = group.ended()
    assert 0 not in codes and codes[victim] == -signal.SIGKILL, group.outputs
    assert not any(out.startswith("TIMEOUT") for out in group.outputs.values())
    if victim:
        assert "no answer from rank 1 (" in group.outputs[0]
    assert steps(tmp_path)


@pytest.mark.slow
def test_the_local_script_passes_signals_on_and_tells_of_deaths(shared, tmp_path):
    def started(step):
        process = local(tmp_path, shared, "--config.steps=30000")
        wait_for(tmp_path, step, process)
        return process

    process = started(3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "SIGTERM: saved step" in out
    saved = steps(tmp_path)[-1]
    assert f"saved step {saved};" in out
    process = started(saved + 3)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode > 0 and "no answer from rank 1 (" in out, out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_stops_all_with_its_message(rank, shared, tmp_path):
    """In the middle of the loop, where the others wait in a collective."""
    broken = (
        "import sys; from t5x_lite import cli, progress, train\n"
        "def add(self, now, metrics):\n"
        "    if now == 4: raise OSError('the disk of this machine is gone')\n"
        "progress.StepLog.add = add\n"
        "cli.run(train.main)"
    )
    group = Group(
        2, lambda rank: flags(tmp_path, shared, *LONG), instead={rank: ["-c", broken]}
    )
    codes = group.ended()
    assert refused(codes), group.outputs
    assert "error: the disk of this machine is gone" in group.outputs[rank]
    assert re.search(
        rf"error: rank {rank} \(.*\) stopped: the disk of this machine is gone",
        group.outputs[1 - rank],
    )
    assert "Traceback" not in "".join(group.outputs.values())


@pytest.mark.slow
def test_all_learn_of_a_refusal_and_of_a_difference(shared, tmp_path):
    first = Group(2, lambda rank: flags(tmp_path, shared, "--config.steps=30000"))
    wait_for(tmp_path, 1, *first.processes)
    second = Group(2, lambda rank: flags(tmp_path, shared))
    assert refused(second.ended()), second.outputs
    for out in second.outputs.values():
        assert "in use by another running process" in out and "Traceback" not in out
    first.kill()
    third = Group(2, lambda rank: flags(tmp_path, shared, f"--config.seed={rank}"))
    assert refused(third.ended()), third.outputs
    for out in third.outputs.values():
        assert "config.seed is 1, 0 on rank 0" in out and "Traceback" not in out


@pytest.mark.slow
def test_a_missing_process_is_named(shared, tmp_path):
    more = ("--config.peers_timeout=15",)
    group = Group(3, lambda rank: flags(tmp_path, shared, *more), there=[0, 2])
    assert group.ended() == [75, 75], group.outputs
    for out in group.outputs.values():
        assert "1 of 3 processes did not come within 15 s: rank 1. Here" in out


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(shared, tmp_path):
    (tmp_path / "1").mkdir()
    group = Group(2, lambda rank: flags(tmp_path / str(rank), shared))
    assert refused(group.ended()), group.outputs
    for out in group.outputs.values():
        assert re.search(r"/1 of rank 1 \(.*\) is not the directory that rank 0", out)
    assert not list((tmp_path / "1").iterdir())


@pytest.mark.slow
def test_data_that_differs_is_named(shared, tmp_path):
    """The same path holds another text on the second machine."""
    other = tmp_path / "other.jsonl"
    other.write_text(SOURCE.read_text()[: 2**17].rpartition("\n")[0] + "\n")
    elsewhere = (
        "import sys; from t5x_lite import cli, train\n"
        "from t5x_lite.data import store\n"
        "whole = store.open_store\n"
        "def open_store(source, *args, **more):\n"
        f"    return whole({str(other)!r}, *args, **more)\n"
        "store.open_store = open_store\n"
        "cli.run(train.main)"
    )
    group = Group(
        2, lambda rank: flags(tmp_path, shared), instead={1: ["-c", elsewhere]}
    )
    assert refused(group.ended()), group.outputs
    for out in group.outputs.values():
        assert re.search(r"rank 1 \(.*\): heldout is '.*', '.*' on rank 0", out), out


def steps(workdir) -> list[int]:
    found = (pathlib.Path(workdir) / "checkpoints").glob("*")
    return sorted(int(p.name) for p in found if p.name.isdigit())
