"""The same bytes on any number of hosts, threads and processes, from any step on."""

import json
import logging
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from t5x_lite import example
from t5x_lite.data import pipeline
from tests.goldens import make_batches
from tests.goldens.make_batches import BATCH, CASES, STEPS, batches, digest

GOLDEN = json.loads(make_batches.PATH.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_the_golden_file(name, folder):
    """Runs made before see the same batches; see make_batches.py before touching it."""
    made = batches(name, folder)
    found = [digest(made[step]) for step in (*range(STEPS), 10**6)]
    assert found == GOLDEN[name]
    assert len(set(found)) == len(found)
    example.check(made[0], made.vocab.size)


def test_packs_are_those_of_the_golden_file():
    assert make_batches.packs() == GOLDEN["packs"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_hosts_make_the_batches_together(name, hosts, folder):
    # Rows of a host need not be neighbours: two blocks for each.
    of_hosts = np.arange(BATCH).reshape(2, hosts, -1)
    of_hosts = of_hosts.transpose(1, 0, 2).reshape(hosts, -1)
    parts = [batches(name, folder, rows=rows) for rows in of_hosts]
    order = np.argsort(of_hosts.ravel())
    for step in (0, STEPS - 1):
        joined = _joined([part[step] for part in parts], order)
        assert digest(joined) == GOLDEN[name][step]


def _joined(parts, order):
    if isinstance(parts[0], dict):
        return {k: _joined([part[k] for part in parts], order) for k in parts[0]}
    return np.concatenate(parts)[order]


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_resuming_at_any_step_goes_on_with_the_same_bytes(name, prefetch, folder):
    made = batches(name, folder)
    for first in (1, 4) if prefetch else range(STEPS):
        ahead = pipeline.iterate(made, first, STEPS, prefetch=prefetch)
        found = [(step, digest(batch)) for step, batch in ahead]
        assert found == list(enumerate(GOLDEN[name]))[first:STEPS]


@pytest.mark.parametrize("name", CASES)
def test_workers_get_the_same_batches(name, folder):
    """What is pickled for a worker process; the tokens are not part of it."""
    made = batches(name, folder)
    travels = pickle.dumps(made)
    assert digest(pickle.loads(travels)[3]) == GOLDEN[name][3]


# Processes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows", "task and text"])
def test_four_processes_make_the_same_bytes(name, folder):
    made = batches(name, folder)
    ahead = pipeline.iterate(made, 0, STEPS, workers=4)
    assert [digest(batch) for _, batch in ahead] == GOLDEN[name][:STEPS]
    for child in multiprocessing.active_children():
        child.join(60)  # it was told to end
    assert not multiprocessing.active_children()


def kill_a_worker():
    worker = multiprocessing.active_children()[0].pid
    assert worker
    os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_worker_changes_no_batch(folder, caplog):
    made = batches("windows", folder)
    expected = [digest(made[step]) for step in range(30)]
    found = []
    with caplog.at_level(logging.WARNING):
        for step, batch in pipeline.iterate(made, 0, 30, workers=2):
            found.append(digest(batch))
            if step in (3, 15):
                kill_a_worker()
    assert found == expected
    assert caplog.text.count("died before step") == 2
    assert "exit code -9" in caplog.text


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_the_run(folder):
    ahead = pipeline.iterate(batches("windows", folder), 0, 10**9, workers=1)
    last = -1
    with pytest.raises(RuntimeError, match="4 worker processes .* config.data.workers"):
        for step, _ in ahead:
            last = step
            if multiprocessing.active_children():
                kill_a_worker()
    assert last >= 4
