"""More text-to-text objectives: what the decoder writes is not always what was cut."""

from collections.abc import Sequence

import numpy as np

from t5x_lite.example import Pair
from t5x_lite.objectives import denoising, noise
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import MARKS, Vocab

# (kind, mean span, density, weight). R(egular) and X(treme) are span corruption;
# S(equential) hides the end of the text, `density` of it in the mean.
UL2 = (
    ("R", 3.0, 0.15, 0.165),
    ("R", 8.0, 0.15, 0.165),
    ("S", 0.0, 0.25, 0.34),
    ("X", 3.0, 0.5, 0.0825),
    ("X", 8.0, 0.5, 0.0825),
    ("X", 64.0, 0.15, 0.0825),
    ("X", 64.0, 0.5, 0.0825),
)
MODES = {"R": "regular", "S": "sequential", "X": "extreme"}


def ul2(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    denoisers: Sequence[tuple[str, float, float, float]] = UL2,
) -> Pair:
    """Mixture of denoisers (Tay et al. 2022, section 3.1).

    Each row draws one. R and X are span corruption; S hides the end of the text, of
    uniform length with mean `density`, behind one sentinel. The inputs begin with the
    mode token of the kind: `vocab.special("regular" | "sequential" | "extreme")`.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives mode tokens, sentinels and EOS.
        denoisers: (kind, mean span, density, weight) each; an S has no mean span.

    Returns:
        Pair; the rows end with padding up to the longest denoiser's lengths.

    Raises:
        ValueError: an unknown kind, a value out of range, more spans than sentinels
            that no mark uses.
    """
    T = tokens_BT.shape[1]
    inputs, targets = _ul2_widths(T, denoisers)
    for kind, mean_span, density, _ in denoisers:
        spans = 1 if kind == "S" else noise.noise_counts(T, density, mean_span)[1]
        setting = f"of {T} tokens at density={density}, mean_span={mean_span}"
        denoising.check_sentinels(spans, f"UL2's {kind} {setting}", vocab, len(MARKS))
    ends = np.cumsum([weight for *_, weight in denoisers])
    choice_B1 = np.searchsorted(ends[:-1] / ends[-1], rng.uniform(1), side="right")
    mask_BT = np.zeros(tokens_BT.shape, bool)
    modes_B1 = np.zeros_like(choice_B1)
    # All rows draw for all denoisers: a row may not depend on what others chose.
    for i, (kind, mean_span, density, _) in enumerate(denoisers):
        if kind == "S":
            most = _most_at_the_end(T, density)
            start_B1 = T - 1 - (rng.uniform(1) * most).astype(np.int64)
            hidden_BT = np.arange(T) >= start_B1
        else:
            hidden_BT, _ = noise.random_spans(rng, T, density, mean_span)
        mask_BT |= hidden_BT & (choice_B1 == i)
        modes_B1[choice_B1 == i] = vocab.special(MODES[kind])
    text_BT, targets_BT = denoising.cut_runs(
        tokens_BT, mask_BT, vocab, inputs - 1, targets
    )
    inputs_BT = np.concatenate([modes_B1, text_BT], axis=1, dtype=np.int32)
    return Pair(inputs_BT, targets_BT, source_BT=tokens_BT, mask_BT=mask_BT)


def ul2_lengths(
    inputs_length: int,
    *,
    denoisers: Sequence[tuple[str, float, float, float]] = UL2,
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length) of the longest denoisers."""
    return denoising.longest(inputs_length, lambda raw: _ul2_widths(raw, denoisers))


def _ul2_widths(length: int, denoisers) -> tuple[int, int]:
    if not denoisers:
        raise ValueError(
            "denoisers=(): at least one (kind, mean span, density, weight)."
        )
    widths = []
    for kind, mean_span, density, weight in denoisers:
        if kind not in MODES or not weight > 0:
            raise ValueError(
                f"denoisers: ({kind!r}, {mean_span}, {density}, {weight}). Allowed: "
                f"kinds {sorted(MODES)}, weights above 0."
            )
        if kind == "S":
            widths.append((length + 2, _most_at_the_end(length, density) + 2))
        else:
            n_noise, spans = noise.noise_counts(length, density, mean_span)
            widths.append((length - n_noise + spans + 2, n_noise + spans + 1))
    return max(w for w, _ in widths), max(w for _, w in widths)


def _most_at_the_end(length: int, density: float) -> int:
    """Most tokens of an S denoiser, drawn from 1 to this: the mean is the density."""
    if not 0 < density <= 0.5:
        raise ValueError(
            f"denoisers: an S of density={density}; a mean share in (0, 0.5] is needed."
        )
    return min(max(round(2 * density * length) - 1, 1), length - 1)


def prefix_lm(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    split: str = "uniform",
    share: float = 0.5,
) -> Pair:
    """Prefix language modelling (Raffel et al. 2020, sections 3.2.3, 3.3.1, Table 4).

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives EOS, at the end of inputs and targets.
        split: where the inputs end: "uniform" in [1, T), "fixed" after `share` of the
            tokens, "none": the inputs are EOS only and all of the text is predicted,
            the language-modelling objective of Table 2 for decoders.
        share: of the tokens, that the inputs hold; only for "fixed".

    Returns:
        Pair; with "uniform" the rows end with padding.

    Raises:
        ValueError: unknown split, share not in (0, 1).
    """
    T = tokens_BT.shape[1]
    inputs, targets = _prefix_widths(T, split, share)
    if split == "uniform":
        ends_B1 = 1 + (rng.uniform(1) * (T - 1)).astype(np.int64)
    else:
        ends_B1 = np.full((len(tokens_BT), 1), inputs - 1)
    given_BT = np.arange(T) < ends_B1
    return Pair(
        denoising.pack(tokens_BT, given_BT, inputs, vocab),
        denoising.pack(tokens_BT, ~given_BT, targets, vocab),
        longest=T + 2,  # and two EOS, wherever the split is
    )


def prefix_lm_lengths(
    inputs_length: int, *, split: str = "uniform", share: float = 0.5
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length); the targets' for split="none"."""
    if split == "none":
        return max(inputs_length - 1, 1), 1, max(inputs_length, 2)
    return denoising.longest(
        inputs_length, lambda raw: _prefix_widths(raw, split, share)
    )


def _prefix_widths(length: int, split: str, share: float) -> tuple[int, int]:
    if split not in ("uniform", "fixed", "none") or not 0 < share < 1:
        raise ValueError(
            f"split={split!r}, share={share} of prefix_lm. Allowed: 'uniform', "
            "'fixed', 'none'; a share in (0, 1)."
        )
    if split == "uniform":
        return length, length
    given = min(max(round(share * length), 1), length - 1) if split == "fixed" else 0
    return given + 1, length - given + 1


def deshuffling(tokens_BT: np.ndarray, rng: Draws, vocab: Vocab) -> Pair:
    """Deshuffling (Raffel et al. 2020, section 3.3.1, Tables 3 and 4).

    The inputs are the tokens in random order, the targets the text.
    """
    order_BT = np.argsort(rng.uniform(tokens_BT.shape[1]), axis=1)
    shuffled_BT = np.take_along_axis(tokens_BT, order_BT, axis=1)
    return Pair(
        denoising.with_eos(shuffled_BT, vocab), denoising.with_eos(tokens_BT, vocab)
    )


def deshuffling_lengths(inputs_length: int) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length)."""
    return denoising.longest(inputs_length, lambda raw: (raw + 1, raw + 1))


def mass(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.5,
    random: float = 0.1,
    unchanged: float = 0.1,
) -> Pair:
    """MASS: one contiguous fragment (Song et al. 2019, section 3).

    The encoder reads the text with the fragment hidden in place; the decoder reads and
    writes the fragment only (and EOS), at the places that its tokens have in the text.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives [MASK], the random tokens and EOS.
        density: length of the fragment as a share of the text. It begins anywhere but
            at the first token, which the place of the decoder's first input needs.
        random, unchanged: shares of the hidden tokens, as in the code of MASS; the
            others become [MASK].

    Returns:
        Pair with target_positions_BT, source_BT and mask_BT.
    """
    B, T = tokens_BT.shape
    m, _ = noise.noise_counts(T, density, T)
    starts_B1 = 1 + (rng.uniform(1) * (T - m)).astype(np.int64)
    places_BM = starts_B1 + np.arange(m)
    mask_BT = np.zeros((B, T), bool)
    np.put_along_axis(mask_BT, places_BM, True, axis=1)
    hidden_BT = denoising.hide(
        tokens_BT, mask_BT, rng, vocab, random=random, unchanged=unchanged
    )
    return Pair(
        denoising.with_eos(hidden_BT, vocab),
        denoising.with_eos(tokens_BT[mask_BT].reshape(B, m), vocab),
        source_BT=tokens_BT,
        mask_BT=mask_BT,
        target_positions_BT=(starts_B1 - 1 + np.arange(m + 1)).astype(np.int32),
    )


def mass_lengths(
    inputs_length: int,
    *,
    density: float = 0.5,
    random: float = 0.1,
    unchanged: float = 0.1,
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length)."""
    return denoising.longest(
        inputs_length,
        lambda raw: (raw + 1, noise.noise_counts(raw, density, raw)[0] + 1),
    )


def prophetnet(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    masked: int = 9,
    block: int = 64,
    streams: int = 2,
    random: float = 0.1,
    unchanged: float = 0.1,
) -> Pair:
    """ProphetNet's denoising with future n-grams (Qi et al. 2020, the denoising task).

    In every block of the text one contiguous fragment is hidden in place; the targets
    are the fragments, one after the other, predicted by `streams` streams.

    Args:
        tokens_BT: int32 [B, T] raw tokens.
        rng: the random numbers of these B examples.
        vocab: gives [MASK], the random tokens and EOS.
        masked: tokens of a fragment; a last short block has its share, rounded.
        block: tokens of a block.
        streams: n, how many tokens ahead are predicted, the next one included.
        random, unchanged: shares of the hidden tokens; the others become [MASK].

    Returns:
        Pair with streams, source_BT and mask_BT.

    Raises:
        ValueError: masked, block or streams out of range; the text is too short.
    """
    B, T = tokens_BT.shape
    sizes_N, masked_N = _fragments(T, masked, block)
    if streams < 1:
        raise ValueError(f"streams={streams}: at least 1 is needed (ProphetNet: 2).")
    first_N = np.arange(len(sizes_N)) * block
    room_N = sizes_N - masked_N + 1
    starts_BN = first_N + (rng.uniform(len(sizes_N)) * room_N).astype(np.int64)
    block_T = np.arange(T) // block
    offset_BT = np.arange(T) - starts_BN[:, block_T]
    mask_BT = (offset_BT >= 0) & (offset_BT < masked_N[block_T])
    hidden_BT = denoising.hide(
        tokens_BT, mask_BT, rng, vocab, random=random, unchanged=unchanged
    )
    return Pair(
        denoising.with_eos(hidden_BT, vocab),
        denoising.with_eos(tokens_BT[mask_BT].reshape(B, -1), vocab),
        source_BT=tokens_BT,
        mask_BT=mask_BT,
        streams=streams,
    )


def prophetnet_lengths(
    inputs_length: int,
    *,
    masked: int = 9,
    block: int = 64,
    streams: int = 2,
    random: float = 0.1,
    unchanged: float = 0.1,
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, targets length)."""
    raw = inputs_length - 1
    return raw, inputs_length, int(_fragments(raw, masked, block)[1].sum()) + 1


def _fragments(length: int, masked: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each block [N], hidden tokens of each block [N])."""
    if not 0 < masked < block:
        raise ValueError(
            f"masked={masked}, block={block}: 0 < masked < block is needed "
            "(ProphetNet: 9 of 64)."
        )
    sizes_N = np.minimum(block, length - np.arange(0, length, block))
    masked_N = np.round(sizes_N * (masked / block)).astype(np.int64)
    if not masked_N.any():
        raise ValueError(
            f"{length} raw tokens: too short to hide {masked} of each {block}. Use "
            "longer inputs or a larger share."
        )
    return sizes_N, masked_N
