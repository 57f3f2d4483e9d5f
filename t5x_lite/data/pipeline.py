"""Batches as a function of (seed, step): order, objective, layout, prefetching.

Example i is window order(i) of the token store; the batch of step s holds the
examples [s * batch_size, (s + 1) * batch_size), of which a host takes its slice. No
state is kept, so seeking costs nothing and any number of hosts makes the same batches.
"""

import contextlib
import inspect
import zlib
from collections.abc import Generator
from typing import Any, SupportsIndex

import numpy as np

from t5x_lite.config import nearest
from t5x_lite.data.order import Documents, Order, check_window
from t5x_lite.data.store import TokenStore
from t5x_lite.example import OPTIONAL, STREAM, Example, Passages
from t5x_lite.layouts import LAYOUTS, decoder_all, single
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


class Batches:
    """Random access to the batches of a run: `batches[step]` -> rows of this host.

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
        shapes: stream name -> (T cells, K predicted cells, G query streams).
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
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size:
            raise ValueError(f"rows={rows} of a batch: allowed is [0, {batch_size}).")
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
        self.rows = rows
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
        self.shapes = {name: _shape(stream) for name, stream in streams.items()}

    def __len__(self) -> int:
        """Batches of an evaluation; training has no end."""
        if not self.evaluation:
            raise TypeError("batches for training have no length: pass first and last.")
        return -(-self.examples_per_epoch // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """This host's rows of the batch of `step`; see `whole`."""
        return self._rows(step, self.rows)

    def whole(self, step: int) -> dict[str, Any]:
        """The batch of `step`: streams of [B, T] (see `example`), fingerprint.

        Raises:
            IndexError: step < 0, or behind the last batch of an evaluation.
        """
        return self._rows(step, np.arange(self.batch_size))

    def _rows(self, step: int, rows: np.ndarray) -> dict[str, Any]:
        if step < 0 or (self.evaluation and step >= len(self)):
            raise IndexError(f"batches[{step}]: no such step.")
        first = step * self.batch_size
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        made = [self._examples(first + int(run[0]), len(run)) for run in runs]
        return made[0] if len(made) == 1 else _joined(made)

    def _examples(self, first: int, B: int) -> dict[str, Any]:
        """The examples [first, first + B)."""
        draws = Draws(self.seed, first, B)
        examples_B = np.arange(first, first + B)
        if self.documents is not None:
            windows_B = self.documents.windows_of(examples_B, not self.evaluation)
            if self.static_noise:
                batch = self._static(windows_B)
            else:
                still = self.evaluation
                batch = self._of_documents(windows_B, examples_B, draws, still)
        else:
            if self.evaluation:
                starts_B = examples_B % self.examples_per_epoch * self.order.window
            else:
                starts_B = self.order.starts(first, B)
            starts_B = (starts_B - self.memory_length) % self.store.n_tokens
            tokens_BT = self.store.windows(starts_B, self.raw_length)
            if self.static_noise:
                batch = self._static(starts_B, tokens_BT)
            else:
                batch = self._streams(tokens_BT, draws)
        batch["fingerprint"] = _fingerprints(batch, first)
        if self.evaluation:
            _weigh_rows(batch, self.examples_per_epoch - first)
        return batch

    def _streams(self, raw, draws: Draws) -> dict[str, Any]:
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

    def _static(self, places_B: np.ndarray, tokens_BT=None) -> dict[str, Any]:
        """Noise by the place in the store instead of the example's index."""
        rows = []
        for b, place in enumerate(places_B):
            draws = Draws(self.seed, int(place), 1)
            if tokens_BT is None:
                one = np.zeros(1, np.int64)
                rows.append(self._of_documents(places_B[b : b + 1], one, draws, True))
            else:
                rows.append(self._streams(tokens_BT[b : b + 1], draws))
        return _joined(rows)


# Targets and weights of a stream that is only read.
_NOTHING = (np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of some rows each -> one of all of them."""
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(value, dict)
        else np.concatenate([part[name] for part in parts])
        for name, value in parts[0].items()
    }


def _shape(stream: dict[str, np.ndarray]) -> tuple[int, int, int]:
    queries = stream.get("query_ranks")
    predicted = stream["targets"].shape[1] if "targets" in stream else 0
    return (
        stream["tokens"].shape[1],
        predicted,
        0 if queries is None else queries.shape[1],
    )


class _Steps:
    """The batches of [first, last) as a Grain source."""

    def __init__(self, batches: Batches, first: int, last: int):
        self._batches, self._first, self._last = batches, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return self._batches[self._first + int(index)]


def iterate(
    batches: Batches, first_step: int, last_step: int, *, prefetch: int = 2
) -> Generator[tuple[int, dict[str, Any]]]:
    """Yields (step, batch) for the steps in [first_step, last_step).

    Args:
        batches: what to go through.
        first_step: O(1) to reach, whatever it is.
        last_step: the first step that is not yielded.
        prefetch: batches made ahead by one thread of Grain; 0 makes them here.
    """
    if first_step >= last_step:
        return
    if not prefetch:
        for step in range(first_step, last_step):
            yield step, batches[step]
        return
    # The first step need not wait for this import.
    yield first_step, batches[first_step]
    import grain

    # One read thread: more only fight for the interpreter's lock.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    source = _Steps(batches, first_step + 1, last_step)
    ahead = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from enumerate(ahead, first_step + 1)
    finally:
        ahead.close()


def _fingerprints(batch: dict[str, Any], first: int) -> np.ndarray:
    """crc32 of (global index, tokens, targets, what else is drawn): uint32 [B]."""
    drawn = ("tokens", "targets", *OPTIONAL)
    parts = [s[k] for s in batch.values() for k in drawn if k in s]
    if "main" in batch:  # an encoder-decoder's ranks say nothing new
        parts.append(batch["main"]["ranks"])
    rows_BT = np.concatenate(
        [part.reshape(len(part), -1) for part in parts], axis=1, dtype="<i4"
    )
    indices_B = np.arange(first, first + len(rows_BT), dtype="<i8")
    crcs = [
        zlib.crc32(row.data, zlib.crc32(index.data))
        for row, index in zip(rows_BT, indices_B[:, None], strict=True)
    ]
    return np.array(crcs, np.uint32)


def _weigh_rows(batch: dict[str, Any], counted: int) -> None:
    """Gives weight 0 to the rows from `counted` on."""
    for stream in batch.values():
        if isinstance(stream, dict) and "weights" in stream:
            if counted < len(stream["weights"]):
                stream["weights"] = stream["weights"].copy()
                stream["weights"][max(counted, 0) :] = 0


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
