"""What every class of batches has in common: batch = f(seed, step).

A run numbers its examples; the batch of step s holds the examples [s * batch_size,
(s + 1) * batch_size), of which a host makes its rows. A class of batches only says what
example i is, so seeking costs nothing and any number of hosts makes the same batches.
"""

import abc
import zlib
from typing import Any

import numpy as np

from t5x_lite.example import OPTIONAL
from t5x_lite.vocab import Vocab

Streams = dict[str, dict[str, np.ndarray]]


class AnyBatches(abc.ABC):
    """Random access to the batches of a run: `batches[step]` -> rows of this host.

    Attributes:
        vocab: of the ids.
        batch_size: global batch size, over all hosts.
        rows: of a batch that this host makes, ascending.
        evaluation: go through the examples once, in order; the last batch is filled up
            with rows of weight 0. Else the batches have no end.
        shapes: stream name -> (T cells, K predicted cells, G query streams).
        examples_per_epoch: how many examples there are.
        fingerprint: identity of the data, other if their content is.
    """

    vocab: Vocab
    batch_size: int
    rows: np.ndarray
    evaluation: bool
    shapes: dict[str, tuple[int, int, int]]
    examples_per_epoch: int
    fingerprint: str

    @abc.abstractmethod
    def examples(self, indices_B: np.ndarray) -> Streams:
        """The streams of the examples of these numbers: [B, ...] each.

        Args:
            indices_B: int64, ascending, from 0; epoch = index // examples_per_epoch. In
                an evaluation those behind the first epoch only fill up a batch.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """What the data are, in a few words for the headline of a run."""

    def epochs(self, examples: int) -> dict[str, float]:
        """How often the first examples of a run go through the data of each source.

        A single source is named "".
        """
        return {"": examples / self.examples_per_epoch}

    def blank(self, streams: Streams, filled_B: np.ndarray) -> None:
        """Takes rows that only fill up a batch (True) out of every loss, in place."""
        for stream in streams.values():
            if "weights" in stream:
                stream["weights"] = stream["weights"].copy()
                stream["weights"][filled_B] = 0

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
        indices_B = step * self.batch_size + rows.astype(np.int64)
        streams = self.examples(indices_B)
        crcs_B = fingerprints(streams, indices_B)
        if self.evaluation and indices_B[-1] >= self.examples_per_epoch:
            self.blank(streams, indices_B >= self.examples_per_epoch)
        return {**streams, "fingerprint": crcs_B}


def check_rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """The rows of a host, all for None.

    Raises:
        ValueError: there are none, or others than [0, batch_size).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows={rows} of a batch: allowed is [0, {batch_size}).")
    return rows


def runs(indices_B: np.ndarray) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers."""
    parts = np.split(indices_B, np.flatnonzero(np.diff(indices_B) != 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]


def joined(parts: list[Streams]) -> Streams:
    """Streams of some rows each -> those of all of them."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: {
            field: np.concatenate([part[name][field] for part in parts])
            for field in stream
        }
        for name, stream in parts[0].items()
    }


def shape(stream: dict[str, np.ndarray]) -> tuple[int, int, int]:
    """(T cells, K predicted cells, G query streams) of a stream."""
    queries = stream.get("query_ranks")
    predicted = stream["targets"].shape[1] if "targets" in stream else 0
    return (
        stream["tokens"].shape[1],
        predicted,
        0 if queries is None else queries.shape[1],
    )


def fingerprints(streams: Streams, indices_B: np.ndarray) -> np.ndarray:
    """crc32 of (global index, tokens, targets, what else is drawn): uint32 [B]."""
    drawn = ("tokens", "targets", *OPTIONAL)
    parts = [s[k] for s in streams.values() for k in drawn if k in s]
    if "main" in streams:  # an encoder-decoder's ranks say nothing new
        parts.append(streams["main"]["ranks"])
    rows_BT = np.concatenate(
        [_integers(part).reshape(len(part), -1) for part in parts], axis=1, dtype="<i4"
    )
    crcs = [
        zlib.crc32(row.data, zlib.crc32(index.data))
        for row, index in zip(rows_BT, indices_B.astype("<i8")[:, None], strict=True)
    ]
    return np.array(crcs, np.uint32)


def _integers(values: np.ndarray) -> np.ndarray:
    return values.view(np.int32) if values.dtype == np.float32 else values
