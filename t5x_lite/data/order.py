"""The order of the examples: functions of (seed, example), without state."""

import functools

import numpy as np

from t5x_lite.data.store import TokenStore


class Order:
    """Where example i starts: shuffled without replacement, anew in each epoch.

    Epoch e = i // windows_per_epoch. The circular store is cut into windows from a
    random offset of (seed, e) on, so the windows differ between epochs; fewer than
    `window` tokens are left over. Seeking costs O(1) and memory is bounded.

    Args:
        n_tokens: tokens in the store.
        window: tokens of a window.
        seed: any integer.
        recut: False = the same windows in every epoch, cut from the first token on.

    Raises:
        ValueError: the store is shorter than one window, or has 2**32 windows.
    """

    def __init__(self, n_tokens: int, window: int, seed: int, recut: bool = True):
        check_window(n_tokens, window)
        self.n_tokens = n_tokens
        self.window = window
        self.seed = seed
        self.recut = recut
        self.windows_per_epoch = n_tokens // window
        _check_count(self.windows_per_epoch, window)

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
        offset = (words[0] << 32 | words[1]) % self.n_tokens * self.recut
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


class Documents:
    """Windows that cross no border of a document, in shuffled order.

    A document of n tokens has max(1, n // window) windows, cut anew in each epoch from
    a random token of what is left over; a shorter one is one padded window. Documents
    of fewer than `least` tokens are left out.

    Args:
        store: the tokens; every document ends with `eos_id`.
        window: tokens of a window.
        seed: any integer.

    Memory: 32 bytes for each document of the store, in each process.

    Raises:
        ValueError: fewer than two documents are long enough.
    """

    def __init__(
        self, store: TokenStore, window: int, seed: int, eos_id: int, least: int = 16
    ):
        self.store, self.window, self.seed = store, window, seed
        ends = store.places_of(eos_id)
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends - starts
        kept = lengths >= least
        if kept.sum() < 2:
            raise ValueError(
                "this objective draws sentences from different documents, but only "
                f"{kept.sum()} of {len(ends)} have {least} tokens or more. Use a "
                "source with several documents (blank lines or one JSON object a line)."
            )
        self.first_D, self.length_D = starts[kept], lengths[kept]
        self.windows_D = np.maximum(self.length_D // window, 1)
        self.until_D = np.cumsum(self.windows_D)
        self.windows_per_epoch = int(self.until_D[-1])
        _check_count(self.windows_per_epoch, window)

    def windows_of(self, examples_B: np.ndarray, shuffle: bool) -> np.ndarray:
        """The windows that examples (global indices) show: int64 [B]."""
        epochs_B, windows_B = np.divmod(examples_B, self.windows_per_epoch)
        if not shuffle:
            return windows_B
        drawn = [
            _shuffled(self.windows_per_epoch, self._seed(int(e)), int(w), 1)
            for e, w in zip(epochs_B, windows_B, strict=True)
        ]
        return np.concatenate(drawn)

    def passages(
        self, windows_B: np.ndarray, uniform_B2: np.ndarray, epochs_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BT, others_BT): of one document, and of another; 0 = padding.

        Args:
            uniform_B2: in [0, 1), chooses the other document and its window.
            epochs_B: moves the cuts; -1 = from each document's first token.
        """
        documents_B = np.searchsorted(self.until_D, windows_B, side="right")
        nth_B = windows_B - (self.until_D[documents_B] - self.windows_D[documents_B])
        count = len(self.first_D)
        step_B = 1 + (uniform_B2[:, 0] * (count - 1)).astype(np.int64)
        others_B = (documents_B + step_B) % count
        other_nth_B = (uniform_B2[:, 1] * self.windows_D[others_B]).astype(np.int64)
        return (
            self._cut(documents_B, nth_B, epochs_B),
            self._cut(others_B, other_nth_B, epochs_B),
        )

    def _seed(self, epoch: int) -> int:
        return int(
            np.random.SeedSequence((self.seed % 2**64, epoch)).generate_state(1)[0]
        )

    def _cut(self, documents_B, nth_B, epochs_B) -> np.ndarray:
        left_B = self.length_D[documents_B] - self.windows_D[documents_B] * self.window
        # A cheap hash of (seed, document, epoch) moves the cuts from epoch to epoch.
        salt = self.seed % 2**16 * 97 + 1
        mixed_B = (documents_B * 2_654_435_761 + (epochs_B + salt) * 40_503) % 2**32
        offset_B = np.where(epochs_B < 0, 0, mixed_B % np.maximum(left_B + 1, 1))
        starts_B = self.first_D[documents_B] + offset_B + nth_B * self.window
        tokens_BT = self.store.windows(starts_B, self.window).astype(np.int32)
        size_B1 = np.minimum(self.length_D[documents_B], self.window)[:, None]
        return np.where(np.arange(self.window) < size_B1, tokens_BT, 0)


def _check_count(windows: int, window: int) -> None:
    if windows >= 2**32:
        raise ValueError(
            f"{windows} windows of {window} tokens: fewer than 2**32 can be shuffled. "
            "Use longer windows (config.data.inputs_length) or a mixture of parts."
        )


def check_window(n_tokens: int, window: int) -> None:
    if n_tokens < window:
        raise ValueError(
            f"the corpus has {n_tokens} tokens, but one window needs {window}. Use "
            "more text or a smaller inputs_length."
        )
