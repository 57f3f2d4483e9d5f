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
    """Packs examples by first-fit: each goes into the first row where it fits.

    The examples are shuffled and cut into groups of `GROUP`, which bounds the time; in
    a group the long ones come first (first-fit decreasing, Johnson 1973). "Long" has
    several meanings with several streams, and none is best for all data: the first
    group tries them all, and the shuffled order, and to fill the rows one by one, and
    what needs the fewest rows is kept for the others.

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
    groups = [shuffled_X[i : i + GROUP] for i in range(0, len(shuffled_X), GROUP)]

    def packed(group, order):
        if order is None:
            rows, count = _row_by_row(lengths_XS[group], capacity)
        else:
            sizes = order(lengths_XS[group] / np.array(capacity))
            group = group[np.argsort(-sizes, kind="stable")]
            rows, count = _first_fit(lengths_XS[group], capacity)
        by_row = np.argsort(rows, kind="stable")
        return group[by_row], np.bincount(rows, minlength=count)

    best = ORDERS[0]
    if len(capacity) > 1:
        ways = (*ORDERS, None)
        best = min(ways, key=lambda order: len(packed(groups[0], order)[1]))
    parts = [packed(group, best) for group in groups]
    examples = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    used_S = lengths_XS.sum(axis=0)
    fills_S = used_S / (len(counts) * np.array(capacity))
    return Packs(
        examples,
        np.concatenate([[0], np.cumsum(counts)]),
        float(used_S.sum() / (len(counts) * sum(capacity))),
        tuple(fills_S.tolist()),
    )


def targets_length(lengths_X2: np.ndarray, inputs_length: int, *, seed: int) -> int:
    """Cells of a row for the targets that leave the least padding beside the inputs'.

    Chosen on a group of the examples: the ratio of all targets to all inputs, and up to
    twice that (where targets are short, room to spare costs little and the inputs then
    fill their rows). At least the longest targets.

    Args:
        lengths_X2: int [examples, 2], cells of inputs and targets.
        inputs_length: cells of a row for the inputs.
    """
    ratio = lengths_X2[:, 1].sum() / max(lengths_X2[:, 0].sum(), 1)
    least = max(int(lengths_X2[:, 1].max()), 1)
    tried = {max(math.ceil(inputs_length * ratio * s), least) for s in _SLACK}
    few = lengths_X2[_shuffled(len(lengths_X2), seed)[: GROUP // 4]]
    fills = {T: pack(few, (inputs_length, T), seed=seed).fill for T in sorted(tried)}
    return max(fills, key=lambda T: fills[T])


_SLACK = (1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)


def _shuffled(n: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed % 2**64)).permutation(n)


# Shares [X, S] of a row's capacity that examples take -> sizes [X], largest first.
ORDERS = (
    lambda shares_XS: shares_XS.sum(axis=1),
    lambda shares_XS: shares_XS.max(axis=1),
    lambda shares_XS: shares_XS[:, 0],
    lambda shares_XS: np.zeros(len(shares_XS)),
)


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


def _row_by_row(lengths_XS: np.ndarray, capacity) -> tuple[np.ndarray, int]:
    """Row of each example: (int64 [X], rows).

    A row takes, as long as one fits, the example that looks most like its free cells:
    the largest dot product of shares (Panigrahy et al. 2011, "Heuristics for Vector Bin
    Packing", section 2). Keeps several streams in balance, where first-fit leaves room
    in one because another is full.
    """
    S, left_X = len(capacity), np.arange(len(lengths_XS))
    lengths_SX = lengths_XS.T.astype(np.int32)
    shares_SX = lengths_SX / np.array(capacity)[:, None]
    rows_X, row, free = np.empty(len(lengths_XS), np.int64), 0, list(capacity)
    gone = 0
    while gone < len(left_X):
        likeness_X = sum(shares_SX[s] * (free[s] / capacity[s]) for s in range(S))
        fits_X = np.logical_and.reduce([lengths_SX[s] <= free[s] for s in range(S)])
        likeness_X = np.where(fits_X, likeness_X, -1.0)
        x = int(np.argmax(likeness_X))
        if likeness_X[x] < 0:
            row, free = row + 1, list(capacity)
            continue
        rows_X[left_X[x]] = row
        free = [f - int(n) for f, n in zip(free, lengths_SX[:, x], strict=True)]
        lengths_SX[:, x] = _GONE
        gone += 1
        if 4 * gone > len(left_X):
            kept_X = lengths_SX[0] < _GONE
            left_X, gone = left_X[kept_X], 0
            lengths_SX, shares_SX = lengths_SX[:, kept_X], shares_SX[:, kept_X]
    return rows_X, row + 1


_GONE = 2**30  # cells of an example that has its row: fits nowhere


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
