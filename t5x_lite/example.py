"""What an objective returns and what a batch holds: the contract of the data path.

Axis letters: B batch, T query length, S key length, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
    """A batch of text-to-text examples: read the inputs, write the targets.

    Attributes:
        inputs_BT: int32 [B, T_inputs], ends with EOS, no padding.
        targets_BT: int32 [B, T_targets], ends with EOS, no padding.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: its axes, its dtype, what it means."""

    axes: str
    dtype: str
    meaning: str


# The fields of one stream. A stream is one sequence that one stack of the model reads.
STREAM = {
    "tokens": Field("BT", "int32", "ids that the stack reads, in [0, V)"),
    "positions": Field("BT", "int32", "place inside the segment, from 0"),
    "segments": Field("BT", "int32", "1, 2, ... per example; 0 = padding"),
    "ranks": Field("BT", "int32", "a query sees keys of rank <= its own"),
}
# The further fields of a stream that is trained.
TRAINED = {
    "targets": Field("BT", "int32", "ids to predict at each place, in [0, V)"),
    "weights": Field("BT", "float32", "weight of the place in the loss; 0 = ignore"),
}
# Beside the streams.
WHOLE = {
    "fingerprint": Field("B", "uint32", "crc32 of (global index, tokens, targets)"),
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
        if stream.keys() != fields.keys():
            raise ValueError(
                f"batch[{name!r}] holds {sorted(stream)}; the contract is "
                f"{sorted(fields)} (t5x_lite/example.py)."
            )
        sizes.pop("T", None)
        for key, field in fields.items():
            where = f"batch[{name!r}][{key!r}]"
            _check_array(where, stream[key], field, sizes)
            high = {"tokens": vocab_size, "targets": vocab_size}.get(key)
            _check_range(where, stream[key], high)


def _check_array(where: str, array: Any, field: Field, sizes: dict[str, int]) -> None:
    if not hasattr(array, "dtype") or str(array.dtype) != field.dtype:
        got = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{where} is {got}; {field.dtype} is needed.")
    if array.ndim != len(field.axes):
        raise ValueError(f"{where} has shape {array.shape}; [{field.axes}] is needed.")
    for axis, size in zip(field.axes, array.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(
                f"{where} has shape {array.shape}; axis {axis} is {sizes[axis]} in "
                "the fields before it."
            )


def _check_range(where: str, array: Any, high: int | None) -> None:
    if not array.size:
        raise ValueError(f"{where} is empty: shape {array.shape}.")
    low_seen, high_seen = array.min(), array.max()
    if not (low_seen >= 0 and (high is None or high_seen < high)):
        raise ValueError(
            f"{where} holds values from {low_seen} to {high_seen}; allowed is "
            f"[0, {'inf' if high is None else high}). Does the model's vocabulary "
            "match the one that made the tokens?"
        )
