"""Denoising objectives: cut something out of the text, ask for it back."""

from collections.abc import Callable

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
    """Span corruption (Raffel et al. 2020, section 3.3.4; T5's `span_corruption`).

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
    setting = f"of {T} tokens at density={density}, mean_span={mean_span}"
    check_sentinels(spans, f"span corruption {setting}", vocab)
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
        targets_BT=cut(mask_BT.copy(), starts_BN - 1, n_noise + spans),
        source_BT=tokens_BT,
        mask_BT=mask_BT,
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


def iid_denoising(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.15,
    style: str = "spans",
) -> Pair:
    """I.i.d. denoising (Raffel et al. 2020, sections 3.1.4, 3.3.1, 3.3.2; Tables 3-6).

    The number of noise tokens is fixed, so which ones are noise is i.i.d. given their
    number. T5's masks draw each token by itself; the share is the same.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives the marks and EOS. T5 masks with its first sentinel; here [MASK].
        density: share of the tokens that are noise.
        style: "spans": each run of noise becomes one sentinel, the targets are as in
            span corruption; "bert": 90 % of the noise becomes [MASK], 10 % a random
            token, the target is the whole text; "mass": all becomes [MASK].

    Returns:
        Pair; the rows end with padding where there are fewer runs than there can be.

    Raises:
        ValueError: unknown style; more runs are possible than there are sentinels.
    """
    B, T = tokens_BT.shape
    inputs, targets = _iid_widths(T, density, style)
    mask_BT = _iid_mask(rng, T, density)
    if style == "spans":
        runs = inputs - (T - mask_BT[0].sum()) - 1
        setting = f"of {T} tokens at density={density}"
        check_sentinels(runs, f"i.i.d. denoising {setting}", vocab)
        inputs_BT, targets_BT = cut_runs(tokens_BT, mask_BT, vocab, inputs, targets)
    else:
        random = 0.1 if style == "bert" else 0.0
        hidden_BT = hide(tokens_BT, mask_BT, rng, vocab, random=random)
        inputs_BT, targets_BT = with_eos(hidden_BT, vocab), with_eos(tokens_BT, vocab)
    return Pair(inputs_BT, targets_BT, source_BT=tokens_BT, mask_BT=mask_BT)


def iid_denoising_lengths(
    inputs_length: int, *, density: float = 0.15, style: str = "spans"
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length), the largest that there can be."""
    return longest(inputs_length, lambda raw: _iid_widths(raw, density, style))


def _iid_widths(length: int, density: float, style: str) -> tuple[int, int]:
    n_noise, _ = noise.noise_counts(length, density, length)
    if style == "spans":
        runs = min(n_noise, length - n_noise + 1)
        return length - n_noise + runs + 1, n_noise + runs + 1
    if style not in ("bert", "mass"):
        raise ValueError(
            f"style={style!r} of iid_denoising. Allowed: 'spans', 'bert', 'mass'."
        )
    return length + 1, length + 1


def _iid_mask(rng: Draws, length: int, density: float) -> np.ndarray:
    n_noise, _ = noise.noise_counts(length, density, length)
    mask_BT = np.zeros((rng.batch, length), bool)
    np.put_along_axis(mask_BT, rng.subset(length, n_noise), True, axis=1)
    return mask_BT


def drop_tokens(
    tokens_BT: np.ndarray, rng: Draws, vocab: Vocab, *, density: float = 0.15
) -> Pair:
    """Drop corrupted tokens (Raffel et al. 2020, section 3.3.2, Tables 3 and 5).

    I.i.d. noise is left out of the inputs without a mark; the targets are the tokens
    left out, in their order. For `density` see `iid_denoising`.
    """
    B, T = tokens_BT.shape
    mask_BT = _iid_mask(rng, T, density)
    kept_BT, dropped_BT = (
        tokens_BT[chosen_BT].reshape(B, -1) for chosen_BT in (~mask_BT, mask_BT)
    )
    return Pair(
        with_eos(kept_BT, vocab),
        with_eos(dropped_BT, vocab),
        source_BT=tokens_BT,
        mask_BT=mask_BT,
    )


def drop_tokens_lengths(
    inputs_length: int, *, density: float = 0.15
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length)."""

    def widths(raw):
        n_noise, _ = noise.noise_counts(raw, density, raw)
        return raw - n_noise + 1, n_noise + 1

    return longest(inputs_length, widths)


def longest(
    inputs_length: int, widths: Callable[[int], tuple[int, int]]
) -> tuple[int, int, int]:
    """(raw tokens, inputs, targets) of the most raw tokens whose inputs fit.

    Args:
        inputs_length: what the inputs may have.
        widths: raw tokens -> (inputs, targets) lengths; the inputs do not get shorter.

    Raises:
        ValueError: not even 2 raw tokens fit.
    """
    raw = 2
    if widths(raw)[0] > inputs_length:
        raise ValueError(
            f"inputs_length={inputs_length}: 2 raw tokens already make "
            f"{widths(raw)[0]}. Use longer inputs."
        )
    while widths(raw + 1)[0] <= inputs_length:
        raw += 1
    return raw, *widths(raw)


def with_eos(tokens_BT: np.ndarray, vocab: Vocab) -> np.ndarray:
    """int32 [B, T + 1]."""
    return np.pad(
        tokens_BT.astype(np.int32), ((0, 0), (0, 1)), constant_values=vocab.eos_id
    )


def pack(
    ids_BT: np.ndarray, kept_BT: np.ndarray, length: int, vocab: Vocab
) -> np.ndarray:
    """The kept ids of each row moved together, EOS, padding: int32 [B, length]."""
    counts_B1 = kept_BT.sum(axis=1, keepdims=True)
    assert counts_B1.max() < length, "a row is longer than its width"
    out_BT = np.full((len(ids_BT), length), vocab.pad_id, np.int32)
    out_BT[np.arange(length) < counts_B1] = ids_BT[kept_BT]
    np.put_along_axis(out_BT, counts_B1, vocab.eos_id, axis=1)
    return out_BT


def cut_runs(
    tokens_BT: np.ndarray, mask_BT: np.ndarray, vocab: Vocab, inputs: int, targets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Any mask's (inputs_BT, targets_BT) as in span corruption, of these lengths."""
    B, T = tokens_BT.shape
    starts_BT = mask_BT.copy()
    starts_BT[:, 1:] &= ~mask_BT[:, :-1]
    marks_BT = vocab.sentinel(np.maximum(np.cumsum(starts_BT, axis=1) - 1, 0))
    kept_BT = np.where(starts_BT, marks_BT, tokens_BT)
    both_BT = np.stack([marks_BT, tokens_BT], axis=-1).reshape(B, 2 * T)
    chosen_BT = np.stack([starts_BT, mask_BT], axis=-1).reshape(B, 2 * T)
    return (
        pack(kept_BT, ~mask_BT | starts_BT, inputs, vocab),
        pack(both_BT, chosen_BT, targets, vocab),
    )


def hide(
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    random: float = 0.1,
    unchanged: float = 0.0,
) -> np.ndarray:
    """[MASK], a random token or the token itself where the mask is True.

    The random tokens are uniform over `vocab.ordinary` (Devlin et al. 2019, section
    3.1: random 0.1, unchanged 0.1).
    """
    if not (random >= 0 and unchanged >= 0 and random + unchanged <= 1):
        raise ValueError(
            f"random={random}, unchanged={unchanged}: shares of the hidden tokens, "
            "together at most 1, are needed."
        )
    T = tokens_BT.shape[1]
    draw_BT = rng.uniform(T)
    others_BT = vocab.ordinary[rng.bits(T) % np.uint64(len(vocab.ordinary))]
    hidden_BT = np.where(draw_BT < random, others_BT, vocab.mask_id)
    kept_BT = ~mask_BT | (draw_BT >= 1 - unchanged)
    return np.where(kept_BT, tokens_BT, hidden_BT).astype(np.int32)


def check_sentinels(spans: int, task: str, vocab: Vocab, marks: int = 0):
    if spans + marks > vocab.sentinels:
        beside = f" beside the {marks} marks" if marks else ""
        raise ValueError(
            f"{task} makes {spans} spans, but vocabulary {vocab.spec!r} has "
            f"{vocab.sentinels - marks} sentinels{beside}. Load the vocabulary with at "
            f"least {spans + marks} sentinels (config.data.sentinels), use longer "
            "spans or shorter inputs."
        )
