"""What an objective returns and what a batch holds: the contract of the data path.

Axis letters: B batch, T query length, S key length, V vocabulary, K
predicted places, G query streams.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
    """A batch of text-to-text examples: read the inputs, write the targets.

    Rows may end with padding (`vocab.pad_id`); nothing behind the first one is read.

    Attributes:
        inputs_BT: int32 [B, T_inputs], ends with EOS.
        targets_BT: int32 [B, T_targets], ends with EOS.
        source_BT, mask_BT: int32, bool [B, T_raw]: the text and what is hidden of it,
            for layouts that hide and predict in place; None if that is not the task.
        target_positions_BT: int32 [B, T_targets], places of the decoder's inputs where
            they are not 0, 1, 2, ... (MASS keeps those of the source); or None.
        streams: query streams of the decoder; stream k predicts the same targets from
            inputs that end k tokens earlier (ProphetNet); 0 = none.
        longest: most tokens that inputs and targets have together, where one is short
            when the other is long; 0 = their widths.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    source_BT: np.ndarray | None = None
    mask_BT: np.ndarray | None = None
    target_positions_BT: np.ndarray | None = None
    streams: int = 0
    longest: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
    """A batch of in-place examples: one stream that is read and trained.

    What is None takes the default of `layouts.single`.

    Attributes:
        tokens_BT: int32 [B, T], what the stack reads; `vocab.pad_id` = padding.
        targets_BK: int32 [B, K], ids to predict; K = T without `places_BK`.
        weights_BK: float32 [B, K], 0 = not trained.
        places_BK: int32 [B, K], the positions that are predicted, so that the output
            layer is computed there only; None = everywhere. In [0, T), or in [0, G * T)
            of the query streams one after the other.
        ranks_BT: int32 [B, T]; None = 0, everyone sees everyone.
        positions_BT: int32 [B, T]; None = 0, 1, 2, ...
        types_BT: int32 [B, T], sentence types (0 = A, 1 = B); None = 0.
        query_ranks_BGT: int32 [B, G, T]: G query streams beside the stack's own, with
            the ranks that they see; the own stream then only serves as context.
        query_groups_BGT: int32 [B, G, T], > 0: a query cell also sees the cells of the
            query streams of its own group; None = none.
        labels_B: int32 [B], class of the whole example (next sentence, order); or None.
        entities_BM, entity_targets_BM: int32 [B, M], the entity that is read at each
            mention and the true one, from 1; 0 = none; or None.
        entity_places_BM: int32 [B, M], the first token of each mention; or None.
    """

    tokens_BT: np.ndarray
    targets_BK: np.ndarray
    weights_BK: np.ndarray
    places_BK: np.ndarray | None = None
    ranks_BT: np.ndarray | None = None
    positions_BT: np.ndarray | None = None
    types_BT: np.ndarray | None = None
    query_ranks_BGT: np.ndarray | None = None
    query_groups_BGT: np.ndarray | None = None
    labels_B: np.ndarray | None = None
    entities_BM: np.ndarray | None = None
    entity_places_BM: np.ndarray | None = None
    entity_targets_BM: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Passages:
    """Raw text of objectives that need real documents: windows that cross no border.

    Attributes:
        tokens_BT: int32 [B, T] of one document each, padded at the end.
        others_BT: int32 [B, T] of other documents, padded at the end.
    """

    tokens_BT: np.ndarray
    others_BT: np.ndarray


def places_of(mask_BT: np.ndarray, most: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The True places of each row, ascending -> (places_BK int32, weights_BK float32).

    K is `most`, or the largest count of a row; short rows repeat place 0, weight 0.
    """
    counts_B1 = mask_BT.sum(axis=1, keepdims=True)
    K = most or max(int(counts_B1.max()), 1)
    places_BK = np.argsort(~mask_BT, axis=1, kind="stable")[:, :K].astype(np.int32)
    weights_BK = (np.arange(K) < counts_B1).astype(np.float32)
    return np.where(weights_BK > 0, places_BK, 0).astype(np.int32), weights_BK


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: its axes (a digit is a size), dtype, meaning, lowest."""

    axes: str
    dtype: str
    meaning: str
    low: int | None = 0


# The fields of one stream. A stream is one sequence that one stack of the model reads.
STREAM = {
    "tokens": Field("BT", "int32", "ids that the stack reads, in [0, V)"),
    "positions": Field("BT", "int32", "place inside the segment, from 0"),
    "segments": Field("BT", "int32", "1, 2, ... per example; 0 = padding"),
    "ranks": Field("BT", "int32", "a query sees keys of rank <= its own"),
}
# The further fields of a stream that is trained.
# K = T, or the number of `places`, or G * T with query streams.
TRAINED = {
    "targets": Field("BK", "int32", "ids to predict at each place, in [0, V)"),
    "weights": Field("BK", "float32", "weight of the place in the loss; 0 = ignore"),
}
# Further fields that some objectives need.
OPTIONAL = {
    "types": Field("BT", "int32", "sentence types: 0 = A, 1 = B"),
    "query_ranks": Field("BGT", "int32", "what G further query streams see"),
    "query_groups": Field("BGT", "int32", "query cells that see each other; 0 = none"),
    "places": Field("BK", "int32", "predicted cells, in [0, T) or [0, G * T)"),
    "labels": Field("B", "int32", "class of the whole example; -1 = none", -1),
    "pooled": Field("B", "int32", "the cell that a head reads, in [0, T)"),
    "values": Field("B", "float32", "number to predict; NaN = none", None),
    "tags": Field("BT", "int32", "class of each cell; -1 = none", -1),
    "span": Field("B2", "int32", "first and last cell of the answer; -1 = none", -1),
    "allowed": Field("BT", "int32", "1 = cells that a span may lie in"),
    "entities": Field("BM", "int32", "entity read at each mention, from 1; 0 = none"),
    "entity_places": Field("BM", "int32", "first token of each mention, in [0, T)"),
    "entity_targets": Field("BM", "int32", "true entities, from 1; 0 = no mention"),
}
# Beside the streams.
WHOLE = {
    "fingerprint": Field("B", "uint32", "crc32 of (global index, tokens, targets ...)"),
}


def check(batch: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses a host batch that breaks the contract.

    Ids are checked here because a gather on the device clamps ids that are out of
    range silently.

    Args:
        batch: stream name -> field -> array, and the fields of `WHOLE`.
        vocab_size: V, all ids, sentinels included.

    Raises:
        ValueError: naming the field, what it holds and what is allowed.
    """
    sizes: dict[str, int] = {}
    streams = {k: v for k, v in batch.items() if isinstance(v, Mapping)}
    if not streams:
        raise ValueError(f"batch holds {sorted(batch)}: at least one stream is needed.")
    for key, value in batch.items():
        if key in WHOLE:
            _check_array(f"batch[{key!r}]", value, WHOLE[key], sizes)
        elif key not in streams:
            raise ValueError(
                f"batch[{key!r}] is not a field of the contract: streams (dicts) "
                f"and {sorted(WHOLE)} are."
            )
    for name, stream in streams.items():
        trained = bool(TRAINED.keys() & stream.keys())
        fields = STREAM | TRAINED if trained else STREAM
        fields = fields | {k: v for k, v in OPTIONAL.items() if k in stream}
        if stream.keys() != fields.keys():
            raise ValueError(
                f"batch[{name!r}] holds {sorted(stream)}; the contract is "
                f"{sorted(fields)}, optional {sorted(OPTIONAL)} (t5x_lite/example.py)."
            )
        for axis in "TKGM":
            sizes.pop(axis, None)
        for key, field in fields.items():
            where = f"batch[{name!r}][{key!r}]"
            _check_array(where, stream[key], field, sizes)
            cells = sizes["T"] * sizes.get("G", 1)
            highs = dict(tokens=vocab_size, targets=vocab_size, places=cells)
            length = dict.fromkeys(("entity_places", "pooled", "span"), sizes["T"])
            high = (highs | length).get(key)
            if key == "query_ranks":  # a stream may see less than the first rank
                continue
            _check_range(where, stream[key], high, field.low)


def _check_array(where: str, array: Any, field: Field, sizes: dict[str, int]) -> None:
    if not hasattr(array, "dtype") or str(array.dtype) != field.dtype:
        got = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{where} is {got}; {field.dtype} is needed.")
    if array.ndim != len(field.axes):
        raise ValueError(f"{where} has shape {array.shape}; [{field.axes}] is needed.")
    for axis, size in zip(field.axes, array.shape, strict=True):
        if sizes.setdefault(axis, int(axis) if axis.isdigit() else size) != size:
            raise ValueError(
                f"{where} has shape {array.shape}; axis {axis} is {sizes[axis]} in "
                "the fields before it."
            )


def _check_range(where: str, array: Any, high: int | None, low: int | None) -> None:
    if not array.size:
        raise ValueError(f"{where} is empty: shape {array.shape}.")
    if low is None:
        return
    low_seen, high_seen = array.min(), array.max()
    if not (low_seen >= low and (high is None or high_seen < high)):
        raise ValueError(
            f"{where} holds values from {low_seen} to {high_seen}; allowed is "
            f"[{low}, {'inf' if high is None else high}). Does the model's vocabulary "
            "match the one that made the tokens?"
        )
