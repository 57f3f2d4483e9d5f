"""Layouts: place the examples of an objective into the streams of a structure."""

import functools

import numpy as np

from t5x_lite.example import Example, Pair, places_of
from t5x_lite.vocab import Vocab

Streams = dict[str, dict[str, np.ndarray]]


def encoder_decoder(pair: Pair, vocab: Vocab) -> Streams:
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
    positions_BT = pair.target_positions_BT
    trained = {
        "tokens": tokens_BT,
        "positions": decoder["positions"] if positions_BT is None else positions_BT,
        "segments": _segments(pair.targets_BT, vocab),
        "ranks": decoder["positions"],
        "targets": pair.targets_BT,
        "weights": _weights(pair.targets_BT, vocab),
    }
    if pair.streams:
        trained |= future_streams(trained, pair.streams)
    return {
        "encoder": {
            "tokens": pair.inputs_BT,
            "positions": encoder["positions"],
            "segments": _segments(pair.inputs_BT, vocab),
            "ranks": encoder["zeros"],
        },
        "decoder": trained,
    }


def future_streams(trained: dict, streams: int) -> dict[str, np.ndarray]:
    """Fields of ProphetNet's streams (Qi et al. 2020, section 3.2), one a future token.

    A cell of stream k sees the context without its last k tokens, and itself. The
    decoder's first token stands before the text and every cell sees it, as in the
    released code: else the first k cells of stream k would see nothing but themselves.
    """
    B, T = trained["tokens"].shape
    gaps_G1 = np.arange(streams, dtype=np.int32)[:, None]
    cells_GT = np.arange(1, streams * T + 1, dtype=np.int32).reshape(streams, T)
    return {
        "query_ranks": np.maximum(trained["ranks"][:, None] - gaps_G1, 0),
        "query_groups": np.broadcast_to(cells_GT, (B, streams, T)),
        "targets": np.tile(trained["targets"], (1, streams)),
        "weights": np.tile(trained["weights"], (1, streams)),
    }


def prefix_lm(pair: Pair, vocab: Vocab) -> Streams:
    """One stream: the inputs see each other (rank 0), the targets follow causally.

    Only the targets are trained, each read off the token before it; the first is read
    off the inputs' last token.
    """
    return _concatenated(pair, vocab, causal_inputs=False, train_inputs=False)


def decoder(pair: Pair, vocab: Vocab) -> Streams:
    """One causal stream, inputs then targets; the targets are trained."""
    return _concatenated(pair, vocab, causal_inputs=True, train_inputs=False)


def decoder_all(pair: Pair, vocab: Vocab) -> Streams:
    """One causal stream, inputs then targets; both are trained."""
    return _concatenated(pair, vocab, causal_inputs=True, train_inputs=True)


def _concatenated(pair, vocab, *, causal_inputs: bool, train_inputs: bool) -> Streams:
    inputs_BT, targets_BT = pair.inputs_BT, pair.targets_BT
    B, T = len(inputs_BT), inputs_BT.shape[1] + targets_BT.shape[1]
    whole_BT = np.concatenate([inputs_BT, targets_BT], axis=1)
    is_input_BT = np.broadcast_to(np.arange(T) < inputs_BT.shape[1], (B, T))
    if (inputs_BT[:, -1] == vocab.pad_id).any():  # close the gap of short inputs
        order_BT = np.argsort(whole_BT == vocab.pad_id, axis=1, kind="stable")
        whole_BT = np.take_along_axis(whole_BT, order_BT, axis=1)
        is_input_BT = np.take_along_axis(is_input_BT, order_BT, axis=1)
    if pair.longest:
        T = pair.longest
        whole_BT, is_input_BT = whole_BT[:, :T], is_input_BT[:, :T]
    constant = _constants(B, T - 1)
    tokens_BT, next_BT = whole_BT[:, :-1], whole_BT[:, 1:]
    reads_input_BT, trains_input_BT = is_input_BT[:, :-1], is_input_BT[:, 1:]
    weights_BT = (next_BT != vocab.pad_id).astype(np.float32)
    if not train_inputs:
        weights_BT *= ~trains_input_BT
    ranks_BT = constant["positions"]
    if not causal_inputs:
        ranks_BT = np.where(reads_input_BT, 0, ranks_BT).astype(np.int32)
    return {
        "main": {
            "tokens": np.ascontiguousarray(tokens_BT),
            "positions": constant["positions"],
            "segments": _segments(tokens_BT, vocab),
            "ranks": ranks_BT,
            "targets": np.ascontiguousarray(next_BT),
            "weights": weights_BT,
        }
    }


def encoder(pair: Pair, vocab: Vocab) -> Streams:
    """The hidden tokens become [MASK] in place and are predicted in place."""
    source_BT, mask_BT = _in_place(pair, "encoder")
    tokens_BT = np.where(mask_BT, vocab.mask_id, source_BT).astype(np.int32)
    places_BK, weights_BK = places_of(mask_BT)
    targets_BK = np.take_along_axis(source_BT, places_BK, axis=1)
    return single(Example(tokens_BT, targets_BK, weights_BK, places_BK), vocab)


def permuted(pair: Pair, vocab: Vocab) -> Streams:
    """The hidden spans come last in the factorisation order, left to right.

    A query stream predicts each hidden token from the text that is not hidden and from
    the hidden tokens before it (Yang et al. 2019, section 2.2, with this order).
    """
    source_BT, mask_BT = _in_place(pair, "permuted")
    ranks_BT = np.where(mask_BT, np.cumsum(mask_BT, axis=1), 0).astype(np.int32)
    places_BK, weights_BK = places_of(mask_BT)
    targets_BK = np.take_along_axis(source_BT, places_BK, axis=1)
    example = Example(
        source_BT.astype(np.int32),
        targets_BK,
        weights_BK,
        places_BK,
        ranks_BT=ranks_BT,
        query_ranks_BGT=(ranks_BT - 1)[:, None],
    )
    return single(example, vocab)


def single(example: Example, vocab: Vocab) -> Streams:
    """An in-place example as the one stream of a single stack."""
    constant = _constants(*example.tokens_BT.shape)

    def given(value, default):
        return default if value is None else value

    stream = {
        "tokens": example.tokens_BT,
        "positions": given(example.positions_BT, constant["positions"]),
        "segments": _segments(example.tokens_BT, vocab),
        "ranks": given(example.ranks_BT, constant["zeros"]),
        "targets": example.targets_BK,
        "weights": example.weights_BK,
        "types": given(example.types_BT, constant["zeros"]),
        "places": example.places_BK,
        "query_ranks": example.query_ranks_BGT,
        "query_groups": example.query_groups_BGT,
        "labels": example.labels_B,
        "entities": example.entities_BM,
        "entity_places": example.entity_places_BM,
        "entity_targets": example.entity_targets_BM,
    }
    return {"main": {k: v for k, v in stream.items() if v is not None}}


def _in_place(pair: Pair, structure: str) -> tuple[np.ndarray, np.ndarray]:
    assert pair.source_BT is not None and pair.mask_BT is not None, structure
    return pair.source_BT, pair.mask_BT


def _segments(tokens_BT: np.ndarray, vocab: Vocab) -> np.ndarray:
    if (tokens_BT[:, -1] != vocab.pad_id).all():  # padding stands at the end
        return _constants(*tokens_BT.shape)["segments"]
    return (tokens_BT != vocab.pad_id).astype(np.int32)


def _weights(targets_BT: np.ndarray, vocab: Vocab) -> np.ndarray:
    if (targets_BT[:, -1] != vocab.pad_id).all():
        return _constants(*targets_BT.shape)["weights"]
    return (targets_BT != vocab.pad_id).astype(np.float32)


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


# structure -> layout of a Pair; an Example is laid out by `single` in any of them.
LAYOUTS = {
    "encoder_decoder": encoder_decoder,
    "prefix_lm": prefix_lm,
    "decoder": decoder,
    "encoder": encoder,
    "permuted": permuted,
}
