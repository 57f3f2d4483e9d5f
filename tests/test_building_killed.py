"""Builds of stores that are killed, interrupted or out of disk."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from t5x_lite.data import building
from tests.built_stores import (
    FIRST,
    ROOT,
    TEXTS,
    all_tokens,
    children,
    expected_tokens,
    files_of,
    open_quietly,
    take_small_steps,
    write_corpus,
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path)


@pytest.fixture
def small_steps(monkeypatch):
    take_small_steps(monkeypatch)


# Killed, interrupted, full


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_at_every_write_leaves_the_same_result(
    call, corpus, tmp_path, monkeypatch, small_steps
):
    open_quietly(corpus, tmp_path / "whole", deduplicate=True)
    real, crashes = getattr(os, call), 0
    finished = False
    while not finished:
        calls = itertools.count()

        def crash(*args, calls=calls, dies_at=2 + crashes % 5, after=crashes % 2):
            # A few calls get through each time, then the process "dies".
            if next(calls) == dies_at:
                if after:
                    real(*args)
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, crash)
            try:
                open_quietly(corpus, tmp_path / "cache", deduplicate=True)
                finished = True
            except KeyboardInterrupt:
                crashes += 1
    assert crashes > 3
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


SLOW_BUILD = """
import sys, time
from t5x_lite import vocab
from t5x_lite.data import building, store
building.BATCH_CHARS, building.COMMIT_SECONDS, building.BLOCK_BYTES = 500, 0, 1000
commit = building.Writer.commit
def slow_commit(writer):
    commit(writer)
    print("commit", flush=True)
    time.sleep(0.02)
building.Writer.commit = slow_commit
opened = store.open_store(
    sys.argv[1], vocab.load("bytes"), sys.argv[2], progress=False,
    processes=int(sys.argv[3]), deduplicate=True,
)
print("ready", opened.fingerprint, flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(pids):
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def kill_builds(corpus, tmp_path, times):
    """Kills builds, some after one of their processes; returns how far each got."""
    rng, reached = random.Random(0), []
    for i in range(times):
        process = start(SLOW_BUILD, corpus, tmp_path / "cache", 2)
        assert process.stdout and process.stdout.readline() == "commit\n"
        helpers = children(process.pid)
        time.sleep(rng.uniform(0, 0.1))
        if i % 3 == 2 and helpers:  # the build goes on without it
            os.kill(helpers[0], signal.SIGKILL)
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert gone(helpers)  # nobody told them
        progress = list((tmp_path / "cache").glob("*/progress.json"))
        if not progress:
            break  # complete
        reached.append(json.loads(progress[0].read_text())["n_read"])
    return reached


def test_kill_9_and_resume_gives_identical_bytes(corpus, tmp_path, small_steps):
    open_quietly(corpus, tmp_path / "whole", deduplicate=True)
    reached = kill_builds(corpus, tmp_path, 3)
    assert 0 < reached[0] < reached[-1] < len(TEXTS)
    open_quietly(corpus, tmp_path / "cache", deduplicate=True)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_many_kills(tmp_path, small_steps):
    texts = [f"{i // 2 * 7 % 900} {'word ' * (i % 17)}" for i in range(3000)]
    rows = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    open_quietly(str(tmp_path / "a.jsonl"), tmp_path / "whole", deduplicate=True)
    reached = kill_builds(str(tmp_path / "a.jsonl"), tmp_path, 24)
    print(f"\n{len(reached)} kills, of {len(texts)} documents done: {reached}")
    assert len(reached) > 8
    open_quietly(str(tmp_path / "a.jsonl"), tmp_path / "cache", deduplicate=True)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_a_killed_process_does_not_stop_the_build(corpus, tmp_path, small_steps):
    open_quietly(corpus, tmp_path / "whole", deduplicate=True)
    process = start(SLOW_BUILD, corpus, tmp_path / "cache", 2)
    assert process.stdout and process.stdout.readline() == "commit\n"
    os.kill(children(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert "ready" in out, err
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


def test_processes_that_start_at_once_share_one_build(corpus, tmp_path):
    processes = [start(SLOW_BUILD, corpus, tmp_path / "cache", 1) for _ in range(3)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert sum("commit" in out for out, _ in outputs) == 1
    assert sum("waiting for it" in err for _, err in outputs) == 2


FULL_DISK = """
import resource, sys
from t5x_lite import vocab
from t5x_lite.data import store
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for deduplicate in (False, True):
    try:
        store.open_store(sys.argv[1], vocab.load("bytes"), sys.argv[2],
                         deduplicate=deduplicate, progress=False)
    except OSError as error:
        print(error.errno, error)
"""


def test_a_full_disk_is_a_clear_error_and_the_build_goes_on_later(corpus, tmp_path):
    out, err = start(FULL_DISK, corpus, tmp_path / "cache").communicate(timeout=60)
    plain, deduplicated = out.splitlines()
    assert plain.startswith(f"{errno.EFBIG} "), err
    assert "cannot be written" in plain and "Free some space" in plain
    assert "table of digests" in deduplicated and "disk" in deduplicated
    for deduplicate, texts in ((False, TEXTS), (True, FIRST)):
        opened = open_quietly(corpus, tmp_path / "cache", deduplicate=deduplicate)
        np.testing.assert_array_equal(all_tokens(opened), expected_tokens(texts))


def test_a_cache_dir_that_cannot_be_made(corpus):
    file = str(Path(corpus).parent / "c.txt")
    with pytest.raises(
        OSError, match="cannot be written: .*. Choose another config.data.cache_dir"
    ):
        open_quietly(file, file)


def test_a_source_changed_while_it_is_tokenised(corpus, tmp_path):
    def build_then_change(*args, **kwargs):
        writer = building.build(*args, **kwargs)
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
        return writer

    with pytest.raises(ValueError, match="was changed while it was tokenised"):
        open_quietly(corpus, tmp_path / "cache", build=build_then_change)
    opened = open_quietly(corpus, tmp_path / "cache")
    texts = [*TEXTS[:170], "more", *TEXTS[170:]]
    np.testing.assert_array_equal(all_tokens(opened), expected_tokens(texts))
