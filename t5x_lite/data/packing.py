"""Packing: several short examples share a row, told apart by their segments.

`pack` decides once which examples share a row, so epochs shuffle whole rows and a batch
stays a function of (seed, step). `join` moves laid-out examples into these rows: what a
cell sees, predicts and weighs is what it was alone (`visibility.py`: queries see keys
of their own segment only), so the loss does not change, only the padding goes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np

from t5x_lite.example import STREAM, TRAINED

GROUP = 4096  # examples that are packed among each other
# Fields with one value a cell; 0 stands in the cells that nothing fills.
_OF_CELLS = (*STREAM, *TRAINED, "types")


@dataclasses.dataclass(frozen=True)
class Packs:
    """Which examples share a row; `packs[row]` are their indices, ascending by place.

    Attributes:
        examples: int64 [n], the indices of the examples, row after row.
        offsets: int64 [rows + 1], where each row begins in `examples`.
        fill: non-padding cells / cells, over all streams.
        fills: the same of each stream.
    """

    examples: np.ndarray
    offsets: np.ndarray
    fill: float
    fills: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} packed rows.")
        return self.examples[self.offsets[row] : self.offsets[row + 1]]


def pack(lengths_XS: np.ndarray, capacity: tuple[int, ...], *, seed: int) -> Packs:
    """Packs examples into rows.

    The examples are shuffled and cut into groups of up to `GROUP`, which bounds the
    time. In a group, the long ones come first and each goes into the first row where
    it fits (first-fit decreasing, Johnson 1973). With two streams that leaves room in
    one of a row because the other is full: there `_two_by_two`.

    Args:
        lengths_XS: int [examples, streams], cells of each example in each stream.
        capacity: cells of a row in each stream: an example fits if it does in all.
        seed: any integer.

    Raises:
        ValueError: no examples, an example that fits no row or takes no cell.
    """
    lengths_XS = np.asarray(lengths_XS, np.int64)
    _check(lengths_XS, capacity)
    shuffled_X = _shuffled(len(lengths_XS), seed)
    examples, counts = [], []
    for group in np.array_split(shuffled_X, math.ceil(len(shuffled_X) / GROUP)):
        if len(capacity) == 2:
            rows, count = _two_by_two(lengths_XS[group], capacity)
        else:
            shares = (lengths_XS[group] / np.array(capacity)).sum(axis=1)
            group = group[np.argsort(-shares, kind="stable")]
            rows, count = _first_fit(lengths_XS[group], capacity)
        examples.append(group[np.argsort(rows, kind="stable")])
        counts.append(np.bincount(rows, minlength=count))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    cells_S = (len(offsets) - 1) * np.array(capacity)
    used_S = lengths_XS.sum(axis=0)
    return Packs(
        np.concatenate(examples),
        offsets,
        float(used_S.sum() / cells_S.sum()),
        tuple((used_S / cells_S).tolist()),
    )


def targets_length(lengths_X2: np.ndarray, inputs_length: int, *, seed: int) -> int:
    """Cells of a row for the targets that leave the least padding beside the inputs'.

    Chosen on a group of the examples: the ratio of all targets to all inputs, and up to
    twice that (where targets are short, room to spare costs little and the inputs then
    fill their rows). At least the longest targets: none is cut.

    Args:
        lengths_X2: int [examples, 2], cells of inputs and targets.
        inputs_length: cells of a row for the inputs.
    """
    ratio = lengths_X2[:, 1].sum() / max(lengths_X2[:, 0].sum(), 1)
    least = max(int(lengths_X2[:, 1].max()), 1)
    tried = {max(math.ceil(inputs_length * ratio * s), least) for s in _SLACK}
    few = lengths_X2[_shuffled(len(lengths_X2), seed)[:GROUP]]
    fills = {T: pack(few, (inputs_length, T), seed=seed).fill for T in sorted(tried)}
    return max(fills, key=lambda T: fills[T])


_SLACK = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)


def _shuffled(n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed % 2**64)).permutation(n)


def _check(lengths_XS: np.ndarray, capacity: tuple[int, ...]) -> None:
    if lengths_XS.ndim != 2 or lengths_XS.shape[1] != len(capacity):
        raise ValueError(
            f"lengths of shape {lengths_XS.shape} for the capacity {capacity}: one "
            "length for each of its streams is needed."
        )
    if not len(lengths_XS):
        raise ValueError("there is no example to pack.")
    wrong_X = (lengths_XS > np.array(capacity)).any(axis=1) | (
        (lengths_XS < 0).any(axis=1) | (lengths_XS.sum(axis=1) == 0)
    )
    if wrong_X.any():
        at = int(np.argmax(wrong_X))
        raise ValueError(
            f"example {at} takes {tuple(lengths_XS[at].tolist())} cells of a row's "
            f"{tuple(capacity)}: it needs at least one cell and must fit. Cut it, or "
            "raise the length."
        )


def _first_fit(lengths_XS: np.ndarray, capacity) -> tuple[np.ndarray, int]:
    """Row of each example, in the order given: (int64 [X], rows).

    Equal examples that follow each other are placed together: a row takes as many as
    fit before the next one takes any.
    """
    X, S = lengths_XS.shape
    free_SR = np.tile(np.array(capacity, np.int32)[:, None], (1, X))
    ends = np.flatnonzero((np.diff(lengths_XS, axis=0) != 0).any(axis=1)) + 1
    bounds = [0, *ends.tolist(), X]
    rows_X, count = np.empty(X, np.int64), 0
    for begin, end in itertools.pairwise(bounds):
        need = [(s, n) for s, n in enumerate(lengths_XS[begin].tolist()) if n]
        fits_R = np.logical_and.reduce([free_SR[s, :count] >= n for s, n in need])
        if end - begin == 1:
            row = int(fits_R.argmax()) if count else 0
            row = row if count and fits_R[row] else count
            rows_X[begin], count = row, max(count, row + 1)
            for s, n in need:
                free_SR[s, row] -= n
            continue
        # Those with room, then new ones.
        open_R = np.concatenate(
            [np.flatnonzero(fits_R), np.arange(count, count + end - begin)]
        )
        room_R = np.min([free_SR[s, open_R] // n for s, n in need], axis=0)
        taken_R = np.diff(np.minimum(np.cumsum(room_R), end - begin), prepend=0)
        for s, n in need:
            free_SR[s, open_R] -= (taken_R * n).astype(np.int32)
        rows_X[begin:end] = np.repeat(open_R, taken_R)
        count = max(count, int(rows_X[end - 1]) + 1)
    return rows_X, count


def _two_by_two(lengths_X2: np.ndarray, capacity) -> tuple[np.ndarray, int]:
    """Row of each example: (int64 [X], rows), for two streams.

    A row takes the next examples while they fit, and closes with the one or two of all
    that are left which leave the fewest cells free. That closing is looked for at each
    step on the way, until `_PATIENCE` steps have brought no better one; the best one is
    kept, and of the row what came before it. What then still has room is closed in
    again.
    """
    kinds_K2, kind_X = np.unique(lengths_X2, axis=0, return_inverse=True)
    kind_X = kind_X.reshape(-1)  # NumPy 2.0 gives [X, 1]
    (a_K, b_K), all_K = kinds_K2.T, np.bincount(kind_X)
    # Those of a kind are placed in the order given, so a count tells which have a row.
    by_kind_X, left_K = np.argsort(kind_X, kind="stable"), all_K.copy()
    nth_X = np.empty_like(kind_X)
    starts_K = np.cumsum(all_K) - all_K
    nth_X[by_kind_X] = np.arange(len(kind_X)) - np.repeat(starts_K, all_K)

    def waiting(x: int) -> int:
        """The first from x on that has no row, or the end."""
        while x < len(kind_X) and nth_X[x] < all_K[kind_X[x]] - left_K[kind_X[x]]:
            x += 1
        return x

    first, taken, counts, seconds = 0, [], [], _Seconds(kinds_K2)
    while (first := waiting(first)) < len(kind_X):
        if len(counts) % _STALE == 0:
            seconds.look(left_K)
        (a, b), row, x, best = capacity, [], first, (math.inf, 0, [])
        while best[0] and len(row) - best[1] < _PATIENCE:
            free, closing = seconds.closing(a, b, left_K)
            if free < best[0]:
                best = free, len(row), closing
            x = waiting(x)
            if x == len(kind_X) or a_K[kind_X[x]] > a or b_K[kind_X[x]] > b:
                break
            row.append(k := int(kind_X[x]))
            left_K[k] -= 1
            a, b = a - int(a_K[k]), b - int(b_K[k])
        _, kept, closing = best
        np.add.at(left_K, np.array(row[kept:], np.int64), 1)
        row = row[:kept]
        while closing:  # a third has room where all are short
            row += closing
            np.subtract.at(left_K, closing, 1)
            a, b = capacity[0] - a_K[row].sum(), capacity[1] - b_K[row].sum()
            closing = seconds.closing(int(a), int(b), left_K)[1]
        taken += row
        counts.append(len(row))
    rows_X = np.empty_like(kind_X)
    by_row = np.repeat(np.arange(len(counts)), counts)
    rows_X[by_kind_X] = by_row[np.argsort(taken, kind="stable")]
    return rows_X, len(counts)


_STALE = 16  # rows after which is looked anew what is left
_PATIENCE = 64  # steps of a row without a better closing: its walk is not repeated


class _Seconds:
    """Which one or two of the kinds that are left fill a row's end best.

    `best_AB` tells the largest kind (size * K + kind) that fits into a cells of the one
    stream and b of the other; lengths above 512 are rounded up, which bounds it.

    Args:
        kinds_K2: int [K, 2], different lengths.
    """

    def __init__(self, kinds_K2: np.ndarray):
        self.a_K, self.b_K = (np.ascontiguousarray(side) for side in kinds_K2.T)
        self.size_K = self.a_K + self.b_K
        self.unit_a, self.unit_b = (kinds_K2.max(axis=0) // 512 + 1).tolist()

    def look(self, left_K: np.ndarray):
        """Takes note of how many of each kind are left."""
        k = np.flatnonzero(left_K)
        at_a, at_b = -(-self.a_K[k] // self.unit_a), -(-self.b_K[k] // self.unit_b)
        best_AB = np.zeros((at_a.max() + 1, at_b.max() + 1), np.int64)
        np.maximum.at(best_AB, (at_a, at_b), self.size_K[k] * len(left_K) + k)
        np.maximum.accumulate(best_AB, axis=0, out=best_AB)
        self.best_AB = np.maximum.accumulate(best_AB, axis=1, out=best_AB)

    def closing(self, a: int, b: int, left_K: np.ndarray) -> tuple[int, list[int]]:
        """-> (cells of a + b that stay free, up to two kinds that take the others)."""
        one = np.flatnonzero((left_K > 0) & (self.a_K <= a) & (self.b_K <= b))
        if not len(one):
            return a + b, []
        A, B = self.best_AB.shape
        at_a = np.minimum((a - self.a_K[one]) // self.unit_a, A - 1)
        at_b = np.minimum((b - self.b_K[one]) // self.unit_b, B - 1)
        size, other = np.divmod(self.best_AB[at_a, at_b], len(left_K))
        # It has gone since the last look, or is the one, of which no second is left.
        size[left_K[other] <= (other == one)] = 0
        best = int(np.argmax(self.size_K[one] + size))
        kinds = [int(one[best])] + [int(other[best])] * bool(size[best])
        return a + b - int(self.size_K[kinds].sum()), kinds


def join(
    streams: Mapping[str, Mapping[str, np.ndarray]],
    rows_X: np.ndarray,
    rows: int,
    widths: Mapping[str, int],
) -> dict[str, dict[str, np.ndarray]]:
    """Moves laid-out examples into shared rows, one behind the other.

    Args:
        streams: of a layout: one example a row [X, T], padding (segment 0) at the end.
        rows_X: int [X], the row that each example goes into, ascending.
        rows: B, of the result.
        widths: stream name -> T, cells of the packed rows.

    Returns:
        Streams of [B, T] with segments 1, 2, ... in each row, the same number in all
        streams for an example; 0 = padding.

    Raises:
        ValueError: a field that cannot be packed, or examples that do not fit.
    """
    rows_X = np.asarray(rows_X)
    if (np.diff(rows_X) < 0).any():
        raise ValueError("join: rows must be given in ascending order.")
    counts_B = np.bincount(rows_X, minlength=rows)
    number_X = np.arange(len(rows_X)) - (np.cumsum(counts_B) - counts_B)[rows_X]
    joined = {}
    for name, stream in streams.items():
        if set(stream) - set(_OF_CELLS):
            raise ValueError(
                f"stream {name!r} holds {sorted(set(stream) - set(_OF_CELLS))}: only "
                "text-to-text examples, predicted cell by cell, can be packed."
            )
        T, filled_XT = widths[name], stream["segments"] > 0
        lengths_X = filled_XT.sum(axis=1)
        ends_X = np.cumsum(lengths_X)
        before_B = np.concatenate([[0], ends_X])[np.cumsum(counts_B) - counts_B]
        starts_X = ends_X - lengths_X - before_B[rows_X]
        if (starts_X + lengths_X > T).any():
            raise ValueError(f"stream {name!r}: a packed row has more than {T} cells.")
        x_N, t_N = np.nonzero(filled_XT)
        to_N = (rows_X * T + starts_X)[x_N] + t_N
        joined[name] = {}
        for field, values_XT in stream.items():
            packed = np.zeros(rows * T, values_XT.dtype)
            packed[to_N] = (
                number_X[x_N] + 1 if field == "segments" else values_XT[x_N, t_N]
            )
            joined[name][field] = packed.reshape(rows, T)
    return joined
