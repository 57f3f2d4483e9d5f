"""Says where a run hangs."""

import collections
import contextlib
import faulthandler
import os
import pathlib
import socket
import statistics
import sys
import threading
import time

FIRST_SECONDS = 300.0  # a step may take, before there is a median
SHORTEST_SECONDS = 5.0  # no step is slow below
REMEMBERED = 50  # steps


class Watchdog:
    """Dumps the stacks of all Python threads when a step takes far too long.

    To stderr and `path`; again whenever the step has taken twice as long as then.

    Args:
      factor: times the median of the last steps; 0 = never.
      shortest: seconds that are never too long.
    """

    def __init__(
        self, factor: float, path: pathlib.Path, *, shortest: float = SHORTEST_SECONDS
    ):
        self.factor, self.path, self.shortest = factor, path, shortest
        self._seconds = collections.deque(maxlen=REMEMBERED)
        self._began: float | None = None
        self._limit, self._step = 0.0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if factor:
            self._thread.start()

    def step(self, done: int):
        """A step begins; `done` are behind it. The one before, if any, has ended."""
        now = time.monotonic()
        if self._began is not None:
            self._seconds.append(now - self._began)
        known = len(self._seconds) > 2
        usual = statistics.median(self._seconds) * self.factor if known else 0.0
        limit = max(usual, self.shortest) if known else FIRST_SECONDS
        self._limit, self._step, self._began = limit, done + 1, now

    def rest(self):
        """What comes now is no step."""
        self._began = None

    def close(self):
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self):
        while not self._closed.wait(min(1.0, self.shortest / 4)):
            began = self._began
            if began is None or time.monotonic() - began < self._limit:
                continue
            self._dump(time.monotonic() - began)
            self._limit *= 2

    def _dump(self, seconds: float):
        usual = statistics.median(self._seconds or [float("nan")])
        head = (
            f"{socket.gethostname()}, pid {os.getpid()}: step {self._step} takes "
            f"{seconds:.1f} s so far, the median is {usual:.2f} s "
            f"(config.slow_step={self.factor:g}). Stacks of all threads:"
        )
        with contextlib.suppress(OSError), self.path.open("a") as file:
            _write(head, file)
        _write(f"{head} (also in {self.path})", sys.__stderr__)


def _write(head: str, file):
    if file is not None:
        print(f"\n{head}", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
