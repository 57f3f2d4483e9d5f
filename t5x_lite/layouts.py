"""Layouts: place the examples of an objective into the streams of a structure."""

import functools

import numpy as np

from t5x_lite.example import Pair
from t5x_lite.vocab import Vocab


def encoder_decoder(pair: Pair, vocab: Vocab) -> dict[str, dict[str, np.ndarray]]:
    """Inputs to the encoder; the decoder reads the targets shifted right.

    The encoder's tokens all see each other (rank 0); a decoder token sees itself and
    those before it (rank = position). The decoder starts from padding, as T5's does.

    Returns:
        {"encoder": stream, "decoder": trained stream}; see `example.STREAM`. The
        constant fields are shared between batches and read-only.
    """
    encoder = _constants(*pair.inputs_BT.shape)
    decoder = _constants(*pair.targets_BT.shape)
    tokens_BT = np.empty_like(pair.targets_BT)
    tokens_BT[:, 0] = vocab.pad_id
    tokens_BT[:, 1:] = pair.targets_BT[:, :-1]
    return {
        "encoder": {
            "tokens": pair.inputs_BT,
            "positions": encoder["positions"],
            "segments": encoder["segments"],
            "ranks": encoder["zeros"],
        },
        "decoder": {
            "tokens": tokens_BT,
            "positions": decoder["positions"],
            "segments": decoder["segments"],
            "ranks": decoder["positions"],
            "targets": pair.targets_BT,
            "weights": decoder["weights"],
        },
    }


@functools.lru_cache(maxsize=16)
def _constants(batch: int, length: int) -> dict[str, np.ndarray]:
    shape = (batch, length)
    arrays = {
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segments": np.ones(shape, np.int32),
        "zeros": np.zeros(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


# structure -> layout
LAYOUTS = {"encoder_decoder": encoder_decoder}
