"""Batches as a function of (seed, step): order, objective, layout, prefetching.

Example i is window order(i) of the token store; the batch of step s holds the
examples [s * batch_size, (s + 1) * batch_size), of which a host takes its slice. No
state is kept, so seeking costs nothing and any number of hosts makes the same batches.
"""

import functools
import zlib
from collections.abc import Generator
from typing import Any, SupportsIndex

import numpy as np

from t5x_lite.data.store import TokenStore
from t5x_lite.layouts import LAYOUTS
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


class Order:
    """Where example i starts: shuffled without replacement, anew in each epoch.

    Epoch e = i // windows_per_epoch. The circular store is cut into windows from a
    random offset of (seed, e) on, so the windows differ between epochs; fewer than
    `window` tokens are left over. Seeking costs O(1) and memory is bounded.

    Args:
        n_tokens: tokens in the store.
        window: tokens of a window.
        seed: any integer.

    Raises:
        ValueError: the store is shorter than one window.
    """

    def __init__(self, n_tokens: int, window: int, seed: int):
        _check_window(n_tokens, window)
        self.n_tokens = n_tokens
        self.window = window
        self.seed = seed
        self.windows_per_epoch = n_tokens // window
        if self.windows_per_epoch >= 2**32:
            raise ValueError(
                f"{self.windows_per_epoch} windows of {window} tokens: at most 2**32 "
                "can be shuffled. Use longer windows or several sources."
            )

    def epoch_of(self, example: int) -> int:
        return example // self.windows_per_epoch

    def starts(self, first_example: int, count: int) -> np.ndarray:
        """First token of the windows of `count` examples: int64 [count]."""
        starts = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, first = divmod(first_example + done, self.windows_per_epoch)
            n = min(count - done, self.windows_per_epoch - first)
            starts[done : done + n] = self._starts_in_epoch(epoch, first, n)
            done += n
        return starts

    def _starts_in_epoch(self, epoch: int, first: int, count: int) -> np.ndarray:
        entropy = np.random.SeedSequence((self.seed % 2**64, epoch))
        shuffle_seed, *words = entropy.generate_state(3, np.uint32).tolist()
        offset = (words[0] << 32 | words[1]) % self.n_tokens
        windows = _shuffled(self.windows_per_epoch, shuffle_seed, first, count)
        return (windows * self.window + offset) % self.n_tokens


def _shuffled(n: int, seed: int, first: int, count: int) -> np.ndarray:
    """Entries first .. first + count - 1 of a random permutation of n: int64 [count].

    Grain's shuffle permutes 16 bits or more and walks on until it is below n: 4 us an
    entry from 2**16 on, but 19 us at n = 2,000 and 2.3 ms at n = 11. Small n therefore
    take NumPy's permutation, at most half a megabyte, kept while the epoch lasts.
    """
    if n < 2**16:
        return _permutation(n, seed)[first : first + count]
    from grain.experimental import index_shuffle

    last = n - 1
    entries = range(first, first + count)
    shuffled = [index_shuffle(i, max_index=last, seed=seed, rounds=4) for i in entries]
    return np.array(shuffled, np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).permutation(n)


class Batches:
    """Random access to the batches of a run: `batches[step]` -> host batch.

    Args:
        store: the tokens.
        vocab: the vocabulary that made them.
        objective: a key of `OBJECTIVES`.
        knobs: keyword arguments of the objective, such as {"density": 0.15}.
        structure: a key of `LAYOUTS`.
        inputs_length: tokens of the inputs, EOS included.
        batch_size: global batch size, over all hosts.
        seed: of the order and of the objective's random numbers.
        host_index: this host, in [0, host_count).
        host_count: number of hosts; divides batch_size.
        evaluation: go through the store once, in order, from its first token; the
            last batch is filled up with rows of weight 0.

    Attributes:
        raw_length, inputs_length, targets_length: tokens per example.
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
        host_index: int = 0,
        host_count: int = 1,
        evaluation: bool = False,
    ):
        _check_names(objective, structure)
        if batch_size < 1 or batch_size % host_count:
            raise ValueError(
                f"batch_size={batch_size} cannot be split over {host_count} hosts: it "
                f"must be a positive multiple of {host_count}."
            )
        if not 0 <= host_index < host_count:
            raise ValueError(f"host_index={host_index}: allowed is [0, {host_count}).")
        row = OBJECTIVES[objective]
        self._make, self._knobs = row.make, dict(knobs)
        self._layout = LAYOUTS[structure]
        try:
            lengths = row.lengths(inputs_length, **knobs)
        except TypeError as error:
            raise ValueError(
                f"objective {objective!r} was given the knobs {sorted(knobs)}: {error}."
            ) from error
        self.raw_length, self.inputs_length, self.targets_length = lengths
        self.store, self.vocab, self.seed = store, vocab, seed
        self.batch_size, self.evaluation = batch_size, evaluation
        self.host_batch_size = batch_size // host_count
        self._host_first = host_index * self.host_batch_size
        self.order = Order(store.n_tokens, self.raw_length, seed)
        self.examples_per_epoch = self.order.windows_per_epoch
        # Fails now, not at the first step, if the vocabulary has too few sentinels.
        self._make(
            np.zeros((1, self.raw_length), np.int32), Draws(0, 0, 1), vocab, **knobs
        )

    def __len__(self) -> int:
        """Batches of an evaluation; training has no end."""
        if not self.evaluation:
            raise TypeError("batches for training have no length: pass first and last.")
        return -(-self.examples_per_epoch // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of `step`: streams of [B_host, T] (see `example`), fingerprint.

        Raises:
            IndexError: step < 0, or behind the last batch of an evaluation.
        """
        if step < 0 or (self.evaluation and step >= len(self)):
            raise IndexError(f"batches[{step}]: no such step.")
        first = step * self.batch_size + self._host_first
        if self.evaluation:
            examples_B = np.arange(first, first + self.host_batch_size)
            starts_B = examples_B % self.examples_per_epoch * self.raw_length
        else:
            starts_B = self.order.starts(first, self.host_batch_size)
        tokens_BT = self.store.windows(starts_B, self.raw_length)
        draws = Draws(self.seed, first, self.host_batch_size)
        pair = self._make(tokens_BT, draws, self.vocab, **self._knobs)
        batch: dict[str, Any] = self._layout(pair, self.vocab)
        batch["fingerprint"] = _fingerprints(batch, first)
        if self.evaluation:
            _weigh_rows(batch, self.examples_per_epoch - first)
        return batch


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
    import grain

    # One read thread: more only fight for the interpreter's lock.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    source = _Steps(batches, first_step, last_step)
    ahead = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from enumerate(ahead, first_step)
    finally:
        ahead.close()


def _fingerprints(batch: dict[str, Any], first: int) -> np.ndarray:
    """crc32 of (global index, tokens, targets) of each example: uint32 [B]."""
    parts = [s[k] for s in batch.values() for k in ("tokens", "targets") if k in s]
    rows_BT = np.concatenate(parts, axis=1, dtype="<i4")
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


def _check_names(objective: str, structure: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective={objective!r} is unknown. Allowed: {sorted(OBJECTIVES)}."
        )
    fitting = OBJECTIVES[objective].structures & LAYOUTS.keys()
    if structure not in fitting:
        raise ValueError(
            f"objective={objective!r} trains {sorted(fitting)}, but structure="
            f"{structure!r}."
        )


def _check_window(n_tokens: int, window: int) -> None:
    if n_tokens < window:
        raise ValueError(
            f"the corpus has {n_tokens} tokens, but one window needs {window}. Use "
            "more text or a smaller inputs_length."
        )
