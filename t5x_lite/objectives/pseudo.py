"""Two query streams beside the text: UniLM v2's pseudo masks, ERNIE-GEN's flows."""

from collections.abc import Sequence

import numpy as np

from t5x_lite.example import Example, places_of
from t5x_lite.objectives import lm, masking
from t5x_lite.objectives import units as units_lib
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


def pseudo_masked(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.15,
    units: str = "token",
    spans: str = "",
    ngrams: Sequence[float] = (0.6, 0.08, 0.08, 0.08, 0.08, 0.08),
) -> Example:
    """Pseudo-masked language modelling of UniLM v2 (Bao et al. 2020, section 3).

    Blocks (40 % n-grams of 2 to 6, else single tokens) are predicted twice. Stream 0,
    autoencoding: from the text that is not masked, all at once. Stream 1, partially
    autoregressive: block after block in random order, the tokens of a block at once,
    from the text and the blocks before. The stack's own stream reads the original
    text, with rank 0 or the block's number.

    Args:
        tokens_BT: int32 [B, raw] text, framed as [CLS] text [SEP].
        density, units, spans, ngrams: see `masking.masked_lm`.

    Returns:
        Example; places [0, T) are of stream 0 and [T, 2 T) of stream 1.

    Raises:
        ValueError, FileNotFoundError: a knob is out of range, a file is not usable.
    """
    masking.check_density(density)
    original_BT = masking.frame(tokens_BT, vocab)
    T = original_BT.shape[1]
    *_, K = pseudo_masked_lengths(T, density=density)
    groups_BT, chosen_BT = masking.choose_units(
        original_BT, rng, vocab, density, units, spans, ngrams
    )
    chosen_BU = np.zeros_like(chosen_BT)
    rows_BT = np.broadcast_to(np.arange(len(groups_BT))[:, None], groups_BT.shape)
    chosen_BU[rows_BT[chosen_BT], groups_BT[chosen_BT]] = True
    blocks_BU = lm.random_ranks(chosen_BU, rng)
    ranks_BT = np.take_along_axis(blocks_BU, groups_BT, axis=1)
    own_BGT = _own_cells(*original_BT.shape)
    # Ids behind those of single cells: one for all of stream 0, one for each block.
    shared_BGT = 2 * T + 1 + np.stack([np.zeros_like(ranks_BT), ranks_BT], axis=1)
    return _two_streams(
        original_BT,
        original_BT,
        chosen_BT,
        K // 2,
        ranks_BT=ranks_BT,
        query_ranks_BGT=np.stack([np.where(chosen_BT, 0, -1), ranks_BT - 1], axis=1),
        query_groups_BGT=np.where(chosen_BT[:, None], shared_BGT, own_BGT),
    )


def pseudo_masked_lengths(
    inputs_length: int, *, density: float = 0.15, **_
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, predicted places of both streams together)."""
    raw, inputs, places = masking.masked_lm_lengths(inputs_length, density=density)
    return raw, inputs, 2 * places


def span_flow(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    noise: float = 0.05,
    units: str = "token",
    spans: str = "",
    ngrams: Sequence[float] = (1.0, 1.0, 1.0),
) -> Example:
    """Span-by-span and word-by-word flows of ERNIE-GEN (Xiao et al. 2020,
    section 3).

    The row is [CLS] A [SEP] B [SEP], cut at random in the middle half; B and its [SEP]
    are predicted twice. Stream 0, word by word: from A and the tokens before. Stream
    1, span by span: from A and the spans before. Spans are n-grams of units; ERNIE-GEN
    takes frequent n-grams, which is units="phrase" with a mined file.

    Args:
        tokens_BT: int32 [B, raw] text.
        noise: share of B that the stack reads as random tokens, so that it learns to
            go on from its own mistakes; the targets stay.
        units, spans, ngrams: see `masking.masked_lm`.

    Returns:
        Example; places [0, T) are of stream 0 and [T, 2 T) of stream 1.

    Raises:
        ValueError, FileNotFoundError: a knob is out of range, a file is not usable.
    """
    if not 0 <= noise <= 1:
        raise ValueError(
            f"noise={noise}: a share in [0, 1] is needed (ERNIE-GEN: 0.05)"
        )
    original_BT, target_BT, ranks_BT = lm.cut_in_two(tokens_BT, rng, vocab)
    T = original_BT.shape[1]
    *_, K = span_flow_lengths(T)
    text_BT = units_lib.is_text(original_BT, vocab)
    starts_BT = units_lib.unit_starts(original_BT, vocab, units, spans)
    starts_BT = units_lib.ngram_starts(starts_BT, text_BT, rng, ngrams)
    noisy_BT = masking.replace(
        original_BT, target_BT & text_BT, rng, vocab, mask=0.0, random=noise
    )
    # Ranks ascend, so the last start seen holds the rank of the span's first token.
    first_BT = np.maximum.accumulate(np.where(starts_BT, ranks_BT, 0), axis=1)
    return _two_streams(
        noisy_BT,
        original_BT,
        target_BT,
        K // 2,
        ranks_BT=ranks_BT,
        query_ranks_BGT=np.stack([ranks_BT - 1, first_BT - 1], axis=1),
        query_groups_BGT=_own_cells(*original_BT.shape),
    )


def span_flow_lengths(inputs_length: int, **_) -> tuple[int, int, int]:
    """(raw tokens, inputs length, most predicted places of both streams together)."""
    raw, inputs, _ = masking.masked_lm_lengths(inputs_length, sentence="sop")
    return raw, inputs, 2 * (raw - max(raw // 4, 1) + 1)


def _own_cells(B: int, T: int) -> np.ndarray:
    """int32 [B, 2, T]: a group of its own for every query cell, 1 .. 2 T."""
    cells_GT = np.arange(1, 2 * T + 1, dtype=np.int32).reshape(2, T)
    return np.tile(cells_GT, (B, 1, 1))


def _two_streams(tokens_BT, original_BT, predicted_BT, each: int, **fields) -> Example:
    """Both query streams predict the original text at up to `each` places a row."""
    T = tokens_BT.shape[1]
    places_BK, weights_BK = places_of(predicted_BT, each)
    targets_BK = np.take_along_axis(original_BT, places_BK, axis=1)
    return Example(
        tokens_BT,
        np.concatenate([targets_BK, targets_BK], axis=1),
        np.concatenate([weights_BK, weights_BK], axis=1),
        np.concatenate([places_BK, places_BK + T], axis=1).astype(np.int32),
        **{name: field.astype(np.int32) for name, field in fields.items()},
    )
