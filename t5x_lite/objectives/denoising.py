"""Denoising objectives: cut something out of the text, ask for it back."""

import numpy as np

from t5x_lite.example import Pair
from t5x_lite.objectives import noise
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


def span_corruption(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> Pair:
    """Span corruption (Raffel et al. 2020, section 3.1.4; T5's `span_corruption`).

    Each noise span becomes one sentinel, 0, 1, 2, ... from the left, in the inputs;
    the targets are each sentinel followed by its span. Both end with EOS.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives the sentinels and EOS.
        density: share of the tokens that are noise.
        mean_span: mean length of a noise span in tokens.

    Returns:
        Pair; all rows have the same lengths, those of `span_corruption_lengths`.

    Raises:
        ValueError: more spans than sentinels, or see `noise.noise_counts`.
    """
    B, T = tokens_BT.shape
    n_noise, spans = noise.noise_counts(T, density, mean_span)
    _check_sentinels(spans, T, density, mean_span, vocab)
    mask_BT, starts_BN = noise.random_spans(rng, T, density, mean_span)
    sentinels_N = vocab.sentinel(np.arange(spans, dtype=np.int32))
    rows_B1 = np.arange(B)[:, None]

    def cut(kept_BT, sentinel_places_BN, length):
        ids_BT = tokens_BT.astype(np.int32)
        ids_BT[rows_B1, sentinel_places_BN] = sentinels_N
        kept_BT[rows_B1, sentinel_places_BN] = True
        out_BT = np.empty((B, length + 1), np.int32)
        out_BT[:, :-1] = ids_BT[kept_BT].reshape(B, length)
        out_BT[:, -1] = vocab.eos_id
        return out_BT

    # In the inputs a sentinel takes the place of its span's first token; in the
    # targets that of the last token before the span, which exists and is not noise.
    return Pair(
        inputs_BT=cut(~mask_BT, starts_BN, T - n_noise + spans),
        targets_BT=cut(mask_BT, starts_BN - 1, n_noise + spans),
    )


def raw_length(
    inputs_length: int, density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int]:
    """How many raw tokens fill the inputs exactly (T5's `random_spans_helper`).

    >>> raw_length(512, 0.15, 3.0)
    (568, 114)

    Returns:
        (raw tokens, targets length), EOS counted in inputs and targets.

    Raises:
        ValueError: no number of raw tokens gives this inputs_length.
    """
    raw, _, targets = span_corruption_lengths(
        inputs_length, density=density, mean_span=mean_span
    )
    return raw, targets


def span_corruption_lengths(
    inputs_length: int, *, density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length) for `inputs_length`; see above.

    The counts are those of the mask (float32). T5's helper counts in float64, which
    differs by one where raw * density falls on a half: at 191 inputs and mean_span 1
    it says 57 targets, but T5's mask of those 190 tokens makes 59, and 2 are trimmed.
    It also allows 0 spans, which T5's mask does not.
    """

    def lengths(raw):
        n_noise, spans = noise.noise_counts(raw, density, mean_span)
        return raw - n_noise + spans + 1, n_noise + spans + 1

    raw = max(inputs_length - 1, 2)
    while lengths(raw + 1)[0] <= inputs_length:
        raw += 1
    inputs, targets = lengths(raw)
    # At density 0.5 T5 takes one token less, so that targets are not longer than the
    # inputs; here only where the inputs stay as long as asked for.
    if density == 0.5 and targets > inputs and lengths(raw - 1)[0] == inputs_length:
        raw -= 1
        inputs, targets = lengths(raw)
    if inputs != inputs_length:
        raise ValueError(
            f"inputs_length={inputs_length}: no number of raw tokens gives it at "
            f"density={density}, mean_span={mean_span} ({raw} tokens give {inputs}). "
            "Use another length."
        )
    return raw, inputs, targets


def _check_sentinels(spans, length, density, mean_span, vocab):
    if spans > vocab.sentinels:
        raise ValueError(
            f"span corruption of {length} tokens at density={density}, mean_span="
            f"{mean_span} makes {spans} spans, but vocabulary {vocab.spec!r} has "
            f"{vocab.sentinels} sentinels. Load the vocabulary with at least {spans} "
            "sentinels, use longer spans or shorter inputs."
        )
