"""Language models of one stack: causal, permuted, and UniLM's mixture of directions."""

from collections.abc import Sequence

import numpy as np

from t5x_lite.example import Example, places_of
from t5x_lite.objectives import masking
from t5x_lite.objectives import units as units_lib
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


def causal_lm(tokens_BT: np.ndarray, rng: Draws, vocab: Vocab) -> Example:
    """Next-token prediction over windows of the stream (Radford et al. 2019).

    A window is one token longer than the inputs: its first token is read only, every
    other one is predicted. There is no mark at a window's start; documents begin
    after the EOS of the one before, which is what a generator starts from.

    Args:
        tokens_BT: int32 [B, T + 1] raw tokens.

    Returns:
        Example of T inputs, all predicted; rank = position.
    """
    B, T = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    ids_BT = tokens_BT.astype(np.int32)
    return Example(
        np.ascontiguousarray(ids_BT[:, :-1]),
        np.ascontiguousarray(ids_BT[:, 1:]),
        (ids_BT[:, 1:] != vocab.pad_id).astype(np.float32),
        ranks_BT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    )


def causal_lm_lengths(inputs_length: int, **_) -> tuple[int, int, int]:
    """(raw tokens, inputs length, predicted places)."""
    return inputs_length + 1, inputs_length, inputs_length


def permuted_lm(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    alpha: int = 6,
    beta: int = 1,
    longest: int = 5,
) -> Example:
    """Permutation language modelling, partial prediction (Yang et al. 2019, 2.2-2.3).

    The row is tiled with blocks of n * alpha / beta tokens, n in 1 .. longest with
    weights 1/n as in XLNet's code; in each, one span of n tokens at a random place is
    predicted. Single random tokens are added or left out to make K exactly.

    The factorisation order is the text that is not predicted (rank 0, all of it sees
    all of it), then the predicted tokens one by one in random order (ranks 1 .. K),
    whichever span they come from. XLNet's code does the same, but gives its marks
    [CLS] and [SEP] random ranks too; there are none here.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        alpha, beta: beta tokens of alpha are predicted; K = round(T * beta / alpha).
        longest: longest span.

    Returns:
        Example; one query stream predicts the K places, each from lower ranks only.

    Raises:
        ValueError: alpha, beta or longest are out of range.
    """
    B, T = tokens_BT.shape
    *_, K = permuted_lm_lengths(T, alpha=alpha, beta=beta)
    if not 1 <= longest <= T:
        raise ValueError(f"longest={longest}: 1 to {T} is needed (XLNet: 5).")
    weights = 1 / np.arange(1, longest + 1)
    bounds = np.cumsum(weights / weights.sum())[:-1]
    n_BS = 1 + np.searchsorted(bounds, rng.uniform(T), "right")
    size_BS = n_BS * alpha // beta
    begin_BS = np.cumsum(size_BS, axis=1) - size_BS
    begin_BS += np.floor(rng.uniform(T) * (size_BS - n_BS + 1)).astype(np.int64)
    # +1 where a span begins, -1 behind it: the running sum is 1 inside spans.
    steps_BT = np.zeros((B, T + 1), np.int64)
    rows_B1 = np.arange(B)[:, None]
    np.add.at(steps_BT, (rows_B1, np.minimum(begin_BS, T)), 1)
    np.add.at(steps_BT, (rows_B1, np.minimum(begin_BS + n_BS, T)), -1)
    spans_BT = np.cumsum(steps_BT, axis=1)[:, :-1] > 0
    text_BT = units_lib.is_text(tokens_BT, vocab)
    # Inside spans first, then other text, at random among equals; K of them.
    order_BT = np.argsort(rng.uniform(T) + ~spans_BT + 2 * ~text_BT, axis=1)
    chosen_BT = np.zeros((B, T), bool)
    np.put_along_axis(chosen_BT, order_BT[:, :K], True, axis=1)
    chosen_BT &= text_BT
    ranks_BT = random_ranks(chosen_BT, rng)
    places_BK, weights_BK = places_of(chosen_BT, K)
    ids_BT = tokens_BT.astype(np.int32)
    return Example(
        ids_BT,
        np.take_along_axis(ids_BT, places_BK, axis=1),
        weights_BK,
        places_BK,
        ranks_BT=ranks_BT,
        query_ranks_BGT=(ranks_BT - 1)[:, None],
    )


def permuted_lm_lengths(
    inputs_length: int, *, alpha: int = 6, beta: int = 1, **_
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, predicted places).

    >>> permuted_lm_lengths(512)
    (512, 512, 85)
    """
    if not 1 <= beta < alpha:
        raise ValueError(
            f"alpha={alpha}, beta={beta}: beta tokens of alpha are predicted, so "
            "1 <= beta < alpha is needed (XLNet: 6 and 1)."
        )
    places = max(round(inputs_length * beta / alpha), 1)
    return inputs_length, inputs_length, places


def random_ranks(chosen_BT: np.ndarray, rng: Draws) -> np.ndarray:
    """1, 2, 3, ... on the chosen cells in random order, 0 elsewhere: int32 [B, T]."""
    B, T = chosen_BT.shape
    order_BT = np.argsort(rng.uniform(T) + ~chosen_BT, axis=1)
    ranks_BT = np.empty((B, T), np.int32)
    one_up_BT = np.broadcast_to(np.arange(1, T + 1, dtype=np.int32), (B, T))
    np.put_along_axis(ranks_BT, order_BT, one_up_BT, axis=1)
    return ranks_BT * chosen_BT


MODES = ("bidirectional", "sequence_to_sequence", "left_to_right", "right_to_left")


def unilm(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.15,
    mask: float = 0.8,
    random: float = 0.1,
    units: str = "token",
    spans: str = "",
    ngrams: Sequence[float] = (0.8, 0.1, 0.1),
    modes: Sequence[float] = (1 / 3, 1 / 3, 1 / 6, 1 / 6),
    mode_types: bool = False,
) -> Example:
    """UniLM: masked tokens predicted from what one of four modes shows (Dong et al.
    2019, section 2.3). The mode is drawn for each row, in UniLM for each batch.

    Args:
        tokens_BT: int32 [B, raw] text, cut at random in its middle half into
            [CLS] A [SEP] B [SEP]; no next-sentence label is made.
        density, mask, random, units, spans, ngrams: see `masking.masked_lm`.
        modes: relative weights of `MODES`, which set the ranks: 0; 0 on [CLS] A [SEP],
            then 1, 2, ...; the position; the position from the end.
        mode_types: sentence types per mode as in UniLM's code: 0/1 bidirectional, 4/5
            sequence to sequence, 2 left to right, 3 right to left. Needs a model of 6.

    Returns:
        Example with K places, see `unilm_lengths`.

    Raises:
        ValueError, FileNotFoundError: a knob is out of range, a file is not usable.
    """
    masking.check_density(density)
    masking.check_fates(mask, random)
    weights = np.asarray(modes, np.float64)
    if weights.shape != (len(MODES),) or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(
            f"modes={modes}: {len(MODES)} weights are needed ({', '.join(MODES)}), "
            "0 or more and not all 0."
        )
    original_BT, second_BT, ranks_BT = cut_in_two(tokens_BT, rng, vocab)
    T = original_BT.shape[1]
    *_, K = unilm_lengths(T, density=density)
    groups_BT, chosen_BT = masking.choose_units(
        original_BT, rng, vocab, density, units, spans, ngrams
    )
    corrupted_BT = masking.replace(
        original_BT, chosen_BT, rng, vocab, mask=mask, random=random
    )
    bounds = np.cumsum(weights / weights.sum())[:-1]
    mode_B1 = np.searchsorted(bounds, rng.uniform(1), "right")
    place_1T = np.arange(T, dtype=np.int32)[None]
    ranks_BT = np.choose(
        mode_B1, [np.zeros_like(ranks_BT), ranks_BT, place_1T, T - 1 - place_1T]
    )
    types_BT = second_BT.astype(np.int32)
    if mode_types:
        types_BT = np.array([[0, 1], [4, 5], [2, 2], [3, 3]], np.int32)[
            mode_B1, types_BT
        ]
    places_BK, weights_BK = places_of(chosen_BT, K)
    return Example(
        corrupted_BT,
        np.take_along_axis(original_BT, places_BK, axis=1),
        weights_BK,
        places_BK,
        ranks_BT=ranks_BT.astype(np.int32),
        types_BT=types_BT,
    )


def unilm_lengths(
    inputs_length: int, *, density: float = 0.15, **_
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, predicted places)."""
    return masking.masked_lm_lengths(inputs_length, density=density, sentence="sop")


def cut_in_two(
    tokens_BN: np.ndarray, rng: Draws, vocab: Vocab
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[CLS] A [SEP] B [SEP] of full windows, cut in their middle half.

    Returns:
        (tokens_BT int32 [B, raw + 3]; second_BT bool, True on B and its [SEP];
        ranks_BT int32, there 1, 2, 3, ..., elsewhere 0).
    """
    raw = tokens_BN.shape[1]
    split_B1 = masking.random_split(rng, np.full((len(tokens_BN), 1), raw))
    zero_B1 = np.zeros_like(split_B1)
    first, second = (zero_B1, split_B1), (split_B1, raw - split_B1)
    tokens_BT, types_BT = masking.frame_pair(tokens_BN, first, second, raw + 3, vocab)
    return tokens_BT, types_BT > 0, np.cumsum(types_BT, axis=1, dtype=np.int32)
