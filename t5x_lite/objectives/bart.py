"""BART's noise: text infilling, sentence permutation, masking, deletion, rotation."""

import functools
import math

import numpy as np

from t5x_lite.example import Pair
from t5x_lite.objectives import denoising
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab


def bart(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    infill: float = 0.3,
    mean_span: float = 3.0,
    permute: bool = True,
    mask: float = 0.0,
    delete: float = 0.0,
    rotate: float = 0.0,
) -> Pair:
    """Denoising of BART (Lewis et al. 2020, section 2.2); the targets are the text.

    The sentences are permuted, then the text is rotated; then tokens are deleted or
    masked and spans replaced by one [MASK] each, independently of each other. Span
    lengths are Poisson; an empty span inserts a [MASK]. A sentence ends with a piece
    that ends in . ! ? or with EOS between two documents.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives [MASK], EOS and the ends of sentences.
        infill: share of the tokens in the spans; the last span of a row is cut, so
            that the share is exact. No two spans touch. 0 = no spans.
        mean_span: mean of the spans' lengths.
        permute: whether sentences change places.
        mask: probability that a token becomes [MASK] by itself.
        delete: probability that a token is left out.
        rotate: probability that a row is rotated to begin at a random token.

    Returns:
        Pair; the rows of inputs end with padding.

    Raises:
        ValueError: a share or a span length is out of range.
    """
    B, T = tokens_BT.shape
    n_hidden, most, width = _sizes(T, infill, mean_span)
    for key, value in (("mask", mask), ("delete", delete), ("rotate", rotate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{key}={value} of bart: a probability in [0, 1].")
    text_BT = tokens_BT.astype(np.int32)
    if permute:
        text_BT = _permute_sentences(text_BT, rng, vocab)
    if rotate:
        draws_B2 = rng.uniform(2)
        shift_B1 = np.where(draws_B2[:, :1] < rotate, draws_B2[:, 1:] * T, 0)
        order_BT = (np.arange(T) + shift_B1.astype(np.int64)) % T
        text_BT = np.take_along_axis(text_BT, order_BT, axis=1)
    kept_BT = np.ones((B, T), bool)
    if delete:
        kept_BT &= rng.uniform(T) >= delete
    if mask:
        text_BT[rng.uniform(T) < mask] = vocab.mask_id
    inserted_BT = np.zeros((B, T + 1), bool)
    if n_hidden:
        hidden_BT, inserted_BT = _spans(rng, T, n_hidden, most, mean_span)
        kept_BT &= ~hidden_BT
    # Each token after the [MASK] that may stand before it, and one place at the end.
    ids_BT2 = np.full((B, T + 1, 2), vocab.mask_id, np.int32)
    ids_BT2[:, :-1, 1] = text_BT
    chosen_BT2 = np.zeros((B, T + 1, 2), bool)
    chosen_BT2[:, :, 0] = inserted_BT
    chosen_BT2[:, :-1, 1] = kept_BT
    flat = (B, 2 * (T + 1))
    inputs_BT = denoising.pack(
        ids_BT2.reshape(flat), chosen_BT2.reshape(flat), width, vocab
    )
    return Pair(inputs_BT, denoising.with_eos(tokens_BT, vocab))


def bart_lengths(
    inputs_length: int,
    *,
    infill: float = 0.3,
    mean_span: float = 3.0,
    permute: bool = True,
    mask: float = 0.0,
    delete: float = 0.0,
    rotate: float = 0.0,
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length), the inputs with the most spans."""
    return denoising.longest(
        inputs_length, lambda raw: (_sizes(raw, infill, mean_span)[2], raw + 1)
    )


def _sizes(length: int, infill: float, mean_span: float) -> tuple[int, int, int]:
    """(tokens in spans, most spans of a row, inputs length).

    The most spans reach the share with a probability above 0.9999; a row that does
    not has one longer span.
    """
    if not (0 <= infill < 1 and mean_span > 0):
        raise ValueError(
            f"infill={infill}, mean_span={mean_span} of bart: a share in [0, 1) and a "
            "mean above 0 are needed (BART: 0.3, 3)."
        )
    n_hidden = min(round(infill * length), length - 1)
    tokens = ((4 + math.sqrt(16 + 4 * n_hidden)) / 2) ** 2  # four deviations above
    most = min(math.ceil(tokens / mean_span), length - n_hidden + 1) if n_hidden else 0
    return n_hidden, most, length - n_hidden + most + 1


def _spans(
    rng: Draws, length: int, n_hidden: int, most: int, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """(hidden_BT bool, inserted_BT bool [B, length + 1]: a [MASK] before token t)."""
    lengths_BN = np.searchsorted(_poisson(mean_span), rng.uniform(most), side="right")
    ends_BN = np.minimum(np.cumsum(lengths_BN, axis=1), n_hidden)
    ends_BN[:, -1] = n_hidden
    begins_BN = np.pad(ends_BN[:, :-1], ((0, 0), (1, 0)))
    used_BN = begins_BN < n_hidden
    # Each span has its own gap between the other tokens: as many as are used, any set.
    gaps_BN = rng.subset(length - n_hidden + 1, most)
    rank_BN = np.argsort(np.argsort(rng.uniform(most), axis=1), axis=1)
    chosen_BN = rank_BN < used_BN.sum(axis=1, keepdims=True)
    order_BN = np.argsort(~chosen_BN, axis=1, kind="stable")
    gaps_BN = np.take_along_axis(gaps_BN, order_BN, axis=1)
    rows_BN = np.broadcast_to(np.arange(rng.batch)[:, None], gaps_BN.shape)[used_BN]
    steps_BT = np.zeros((rng.batch, length + 1), np.int8)
    inserted_BT = np.zeros((rng.batch, length + 1), bool)
    first, behind = (gaps_BN + begins_BN)[used_BN], (gaps_BN + ends_BN)[used_BN]
    inserted_BT[rows_BN, first] = True
    steps_BT[rows_BN, first] += 1
    steps_BT[rows_BN, behind] -= 1
    return np.cumsum(steps_BT[:, :-1], axis=1) > 0, inserted_BT


@functools.lru_cache(maxsize=4)
def _poisson(mean: float) -> np.ndarray:
    """Cumulative Poisson probabilities of 0, 1, 2, ... [K]."""
    k = np.arange(int(mean + 12 * math.sqrt(mean) + 12))
    logs = k * math.log(mean) - mean - np.array([math.lgamma(i + 1) for i in k])
    return np.cumsum(np.exp(logs))


def _permute_sentences(text_BT: np.ndarray, rng: Draws, vocab: Vocab) -> np.ndarray:
    ends_BT = _ends_sentence(vocab)[text_BT]
    sentence_BT = np.cumsum(ends_BT, axis=1) - ends_BT
    keys_BT = np.take_along_axis(rng.uniform(text_BT.shape[1]), sentence_BT, axis=1)
    order_BT = np.argsort(keys_BT, axis=1, kind="stable")
    return np.take_along_axis(text_BT, order_BT, axis=1)


@functools.lru_cache(maxsize=4)
def _ends_sentence(vocab: Vocab) -> np.ndarray:
    """bool by id."""
    ends = np.zeros(vocab.size, bool)
    for i in vocab.ordinary:
        ends[i] = vocab.decode([i]).endswith((".", "!", "?"))
    ends[vocab.eos_id] = True
    return ends
