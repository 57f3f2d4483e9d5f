"""Texts -> tokens and their statistics, here or in other processes.

The other processes are plain `python -m t5x_lite.data.encoding`: they inherit nothing
from this one (no JAX, no locks, no `__main__`), load the vocabulary once, read batches
from a pipe and write tokens to another. When this process dies, however it dies, their
pipe ends and so do they.
"""

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from t5x_lite import vocab as vocabularies
from t5x_lite.data.statistics import Meter, Statistics
from t5x_lite.vocab import Vocab

# Texts, and how many of them belong together: each group has statistics of its own.
Job = tuple[list[str], list[int]]
Result = tuple[bytes, list[Statistics]]
T = TypeVar("T")

AHEAD = 2  # batches per process that are read ahead of the one that is written


def dtype_of(vocab: Vocab) -> np.dtype:
    """The smallest unsigned type for the ids of a vocabulary, little-endian."""
    return np.min_scalar_type(vocab.size - 1).newbyteorder("<")


class Encoder:
    """Encodes batches with one vocabulary."""

    def __init__(self, vocab: Vocab):
        self._vocab, self._meter, self._dtype = vocab, Meter(vocab), dtype_of(vocab)

    def __call__(self, job: Job) -> Result:
        """Bytes of all tokens, an EOS after each text, and statistics by group."""
        texts, sizes = job
        if not texts:
            return b"", [Statistics() for _ in sizes]
        ids = self._vocab.encode_batch(texts)
        eos = np.array([self._vocab.eos_id], np.int32)
        parts = [part for document in ids for part in (document, eos)]
        tokens_N = np.concatenate(parts, dtype=self._dtype, casting="unsafe")
        ends = np.cumsum([len(document) + 1 for document in ids])
        found, first = [], 0
        for size in sizes:
            last = first + size
            begin, end = (ends[i - 1] if i else 0 for i in (first, last))
            found.append(
                self._meter.measure(
                    texts[first:last], tokens_N[begin:end], ends[first:last] - begin
                )
            )
            first = last
        return tokens_N.tobytes(), found


@contextlib.contextmanager
def encoders(
    vocab: Vocab, processes: int
) -> Iterator[Callable[[Iterable[tuple[T, Job]]], Iterator[tuple[T, Result]]]]:
    """Gives a function from (anything, job) to (the same, result), in the same order.

    Args:
        processes: 1 = this one; more = so many others. At most `AHEAD` jobs per process
            are taken before the first result is given back.

    Raises (while iterating):
        ChildProcessError: a process died twice on the same job.
    """
    if processes == 1:
        encode = Encoder(vocab)
        yield lambda jobs: ((what, encode(job)) for what, job in jobs)
        return
    with contextlib.ExitStack() as stack:
        # Threads only wait for the pipes.
        pool = concurrent.futures.ThreadPoolExecutor(processes)
        idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        started = [_Process(vocab) for _ in range(processes)]
        for process in started:
            stack.callback(process.end)  # one that a thread started meanwhile
            idle.put(process)
        stack.callback(pool.shutdown, cancel_futures=True)
        for process in started:
            stack.callback(process.close)

        def encode_there(job: Job) -> Result:
            process = idle.get()
            try:
                return process.encode(job)
            finally:
                idle.put(process)

        def in_order(jobs: Iterable[tuple[Any, Job]]) -> Iterator[tuple[Any, Result]]:
            waiting: collections.deque = collections.deque()
            for what, job in jobs:
                if len(waiting) == AHEAD * processes:
                    before, result = waiting.popleft()
                    yield before, result.result()
                waiting.append((what, pool.submit(encode_there, job)))
            while waiting:
                before, result = waiting.popleft()
                yield before, result.result()

        yield in_order


class _Process:
    """One other process; started again once when it dies on a job."""

    def __init__(self, vocab: Vocab):
        self._hello = vocab.spec, vocab.sentinels, vocab.fingerprint
        self._closed = False
        self._start()

    def _start(self):
        root = str(Path(vocabularies.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Each process is one thread; -P: not the working directory's t5x_lite.
        threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "t5x_lite.data.encoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._greeted = False

    def encode(self, job: Job) -> Result:
        for attempt in range(2):
            try:
                result = self._ask(job)
                break
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                self.end()
                code = self._popen.returncode
                if attempt or self._closed:
                    raise ChildProcessError(
                        "a process that makes tokens died twice on the same "
                        f"{sum(map(len, job[0]))} characters of text, at last with "
                        f"code {code} (-9: killed, perhaps for want of memory). Lower "
                        "config.data.build_processes; the next start goes on from "
                        "what was written."
                    ) from None
                self._start()
        if isinstance(result, str):
            raise RuntimeError(f"in a process that makes tokens: {result}")
        return result

    def _ask(self, job: Job) -> Result | str:
        assert self._popen.stdin and self._popen.stdout
        if not self._greeted:
            pickle.dump(self._hello, self._popen.stdin)
            self._greeted = True
        pickle.dump(job, self._popen.stdin)
        self._popen.stdin.flush()
        return pickle.load(self._popen.stdout)

    def close(self):
        self._closed = True
        self.end()

    def end(self):
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def _load(spec: str, sentinels: int, fingerprint: str) -> Encoder:
    vocab = vocabularies.load(spec, sentinels)
    if vocab.fingerprint != fingerprint:
        raise ValueError(f"vocabulary {spec!r} was changed while it was in use.")
    vocab.threads = 1
    return Encoder(vocab)


def _work(jobs, results):
    """What another process does until its pipe ends."""
    hello, encode = pickle.load(jobs), None
    while True:
        job = pickle.load(jobs)
        try:
            encode = encode or _load(*hello)
            result = encode(job)
        except Exception:
            result = traceback.format_exc()
        pickle.dump(result, results, protocol=5)
        results.flush()


def _main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that writes
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    with contextlib.suppress(EOFError, BrokenPipeError):
        _work(sys.stdin.buffer, results)
    os._exit(0)  # nothing of its own is left to write


if __name__ == "__main__":
    _main()
