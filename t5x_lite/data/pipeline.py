"""Batches of text: order, objective, layout; and making batches ahead.

Example i is window order(i) of the token store; see `batches.AnyBatches`.
"""

import contextlib
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Generator
from typing import Any, Protocol, SupportsIndex

import numpy as np

from t5x_lite.config import nearest
from t5x_lite.data.batches import AnyBatches, Streams, check_rows, joined, runs, shape
from t5x_lite.data.order import Documents, Order, check_window
from t5x_lite.data.store import TokenStore
from t5x_lite.example import STREAM, Example, Passages
from t5x_lite.layouts import LAYOUTS, decoder_all, single
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab

MOST_DEATHS = 4
_log = logging.getLogger(__name__)


class ByStep(Protocol):
    """What `iterate` goes through: `AnyBatches`, or some of its steps."""

    def __getitem__(self, step: int, /) -> dict[str, Any]: ...


class Batches(AnyBatches):
    """The batches of one text: windows of its token store, given to an objective.

    Args:
        store: the tokens.
        vocab: the vocabulary that made them.
        objective: a key of `OBJECTIVES`.
        knobs: keyword arguments of the objective, such as {"density": 0.15}.
        structure: a key of `LAYOUTS`.
        inputs_length: tokens of the inputs, EOS included.
        batch_size: global batch size, over all hosts.
        seed: of the order and of the objective's random numbers.
        rows: of a batch that this host makes, ascending; None = all.
        evaluation: go through the store once, in order, from its first token; the
            last batch is filled up with rows of weight 0.
        memory_length: tokens before each example that become its memory stream.
        train_inputs: a decoder is trained on the inputs of a pair too.
        static_noise: a window is noised the same way in every epoch.

    Attributes:
        raw_length: tokens of the store per example.
        examples_per_epoch: windows of the store.

    Raises:
        ValueError: an unknown name or knob, sizes that do not fit.
    """

    def __init__(
        self,
        store: TokenStore,
        vocab: Vocab,
        *,
        objective: str,
        knobs: dict[str, Any],
        structure: str,
        inputs_length: int,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        evaluation: bool = False,
        memory_length: int = 0,
        train_inputs: bool = False,
        static_noise: bool = False,
    ):
        _check_names(objective, structure)
        self.rows = check_rows(rows, batch_size)
        row = OBJECTIVES[objective]
        self._make, self._knobs = row.make, dict(knobs)
        self._layout = LAYOUTS[structure]
        if train_inputs and structure == "decoder":
            self._layout = decoder_all
        with _explain_knobs(objective, knobs):
            lengths = row.lengths(inputs_length, **knobs)
        self.raw_length = memory_length + lengths[0]
        self.store, self.vocab, self.seed = store, vocab, seed
        self.batch_size, self.evaluation = batch_size, evaluation
        self.memory_length, self.static_noise = memory_length, static_noise
        self.fingerprint = store.fingerprint
        self.documents = None
        if row.reads(knobs) == "passages":
            if memory_length:
                raise ValueError(
                    f"objective {objective!r} reads whole documents: "
                    f"config.model.memory_length={memory_length} does not go with it. "
                    "Set it to 0."
                )
            self.documents = Documents(store, lengths[0], seed, vocab.eos_id)
            self.examples_per_epoch = self.documents.windows_per_epoch
        else:
            recut = not static_noise
            # What is read as memory is predicted in the example before.
            self.order = Order(store.n_tokens, lengths[0], seed, recut)
            check_window(store.n_tokens, self.raw_length)
            self.examples_per_epoch = self.order.windows_per_epoch
        # Fails now, not at the first step, if the vocabulary has too few sentinels.
        blank_1T = np.full((1, self.raw_length), int(vocab.ordinary[0]), np.int32)
        blank = Passages(blank_1T, blank_1T) if self.documents else blank_1T
        with _explain_knobs(objective, knobs):
            streams = self._streams(blank, Draws(0, 0, 1))
        self.shapes = {name: shape(stream) for name, stream in streams.items()}

    def describe(self) -> str:
        s = self.store
        return f"{s.n_tokens:,} tokens in {s.n_documents:,} documents"

    def examples(self, indices_B: np.ndarray) -> Streams:
        return joined([self._examples(*run) for run in runs(indices_B)])

    def _examples(self, first: int, B: int) -> Streams:
        """The examples [first, first + B)."""
        draws = Draws(self.seed, first, B)
        examples_B = np.arange(first, first + B)
        if self.documents is not None:
            windows_B = self.documents.windows_of(examples_B, not self.evaluation)
            if self.static_noise:
                return self._static(windows_B)
            return self._of_documents(windows_B, examples_B, draws, self.evaluation)
        if self.evaluation:
            starts_B = examples_B % self.examples_per_epoch * self.order.window
        else:
            starts_B = self.order.starts(first, B)
        starts_B = (starts_B - self.memory_length) % self.store.n_tokens
        tokens_BT = self.store.windows(starts_B, self.raw_length)
        if self.static_noise:
            return self._static(starts_B, tokens_BT)
        return self._streams(tokens_BT, draws)

    def _streams(self, raw, draws: Draws) -> Streams:
        """Raw tokens [B, raw_length] or Passages -> the streams of a batch."""
        M, before = self.memory_length, {}
        if M:
            before = single(Example(raw[:, :M].astype(np.int32), *_NOTHING), self.vocab)
            before = {
                "memory": {k: v for k, v in before["main"].items() if k in STREAM}
            }
            before["memory"]["types"] = np.zeros_like(before["memory"]["tokens"])
            raw = raw[:, M:]
        made = self._make(raw, draws, self.vocab, **self._knobs)
        if isinstance(made, Example):
            return single(made, self.vocab) | before
        return self._layout(made, self.vocab) | before

    def _of_documents(self, windows_B, examples_B, draws: Draws, still: bool):
        assert self.documents is not None
        epochs_B = examples_B // self.examples_per_epoch
        if still:
            epochs_B = np.full_like(epochs_B, -1)
        raw = self.documents.passages(windows_B, draws.uniform(2), epochs_B)
        return self._streams(Passages(*raw), draws)

    def _static(self, places_B: np.ndarray, tokens_BT=None) -> Streams:
        """Noise by the place in the store instead of the example's index."""
        rows = []
        for b, place in enumerate(places_B):
            draws = Draws(self.seed, int(place), 1)
            if tokens_BT is None:
                one = np.zeros(1, np.int64)
                rows.append(self._of_documents(places_B[b : b + 1], one, draws, True))
            else:
                rows.append(self._streams(tokens_BT[b : b + 1], draws))
        return joined(rows)


# Targets and weights of a stream that is only read.
_NOTHING = (np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))


class _Steps:
    """The batches of [first, last) as a Grain source."""

    def __init__(self, batches: ByStep, first: int, last: int):
        self._batches, self._first, self._last = batches, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return self._batches[self._first + int(index)]


def iterate(
    batches: ByStep,
    first_step: int,
    last_step: int,
    *,
    prefetch: int = 2,
    workers: int = 0,
) -> Generator[tuple[int, dict[str, Any]]]:
    """Yields (step, batch) for the steps in [first_step, last_step).

    Args:
        batches: what to go through; with workers it is pickled.
        first_step: O(1) to reach, whatever it is.
        last_step: the first step that is not yielded.
        prefetch: batches made ahead by one thread of Grain, or by each worker; 0 makes
            them here.
        workers: processes that make the batches, the same ones in the same order, for
            data that one thread cannot make fast enough; they take seconds to start.

    Raises:
        RuntimeError: `MOST_DEATHS` worker processes died. Before, what a dead one would
            have made is made here, and new ones go on behind it.
    """
    step, deaths = first_step, 0
    while step < last_step:
        # The first step need not wait for imports and processes.
        yield step, batches[step]
        step += 1
        try:
            for batch in _ahead(batches, step, last_step, prefetch, workers):
                yield step, batch
                step += 1
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            deaths += 1
            if deaths == MOST_DEATHS:
                raise RuntimeError(
                    f"{deaths} worker processes of the data pipeline died, the last "
                    f"one before step {step}: {error} Too little memory ends "
                    "processes with -9: lower config.data.workers, or set it to 0 to "
                    "make batches in the training process."
                ) from error
            _log.warning(
                "a worker process of the data pipeline died before step %d: %s New "
                "ones go on (%d of at most %d times)",
                *(step, error, deaths, MOST_DEATHS - 1),
            )


def _start_worker(index: int, count: int) -> None:
    """In a worker: Ctrl-C is for the parent, and without it there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def follow():
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _ahead(batches: ByStep, first: int, last: int, prefetch: int, workers: int):
    """The batches of [first, last)."""
    if first >= last:
        return
    if not prefetch and not workers:
        for step in range(first, last):
            yield batches[step]
        return
    import grain

    source = grain.MapDataset.source(_Steps(batches, first, last))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's processes read them
            flags.FLAGS.mark_as_parsed()
        here = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        ahead = source.to_iter_dataset(here).mp_prefetch(
            grain.MultiprocessingOptions(workers, max(prefetch, 1)),
            worker_init_fn=_start_worker,
        )
    else:
        # One read thread: more only fight for the interpreter's lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        ahead = source.to_iter_dataset(options)
    ahead = iter(ahead)
    try:
        yield from ahead
    finally:
        ahead.close()


@contextlib.contextmanager
def _explain_knobs(objective: str, knobs: dict[str, Any]):
    """An unknown knob becomes an error that lists those there are."""
    known = list(inspect.signature(OBJECTIVES[objective].make).parameters)[3:]
    for name in knobs:
        if name not in known:
            raise ValueError(
                f"config.objective.{name} is no knob of {objective!r}"
                f"{nearest(name, known)} Knobs: {', '.join(known) or 'none'}."
            )
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"config.objective {objective!r} {knobs}: {error}") from error


def _check_names(objective: str, structure: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective={objective!r} is unknown. Allowed: {sorted(OBJECTIVES)}."
        )
    fitting = OBJECTIVES[objective].structures
    if structure not in fitting:
        raise ValueError(
            f"objective={objective!r} trains {sorted(fitting)}, but structure="
            f"{structure!r}. Objectives for {structure!r}: "
            f"{sorted(n for n, o in OBJECTIVES.items() if structure in o.structures)}."
        )
