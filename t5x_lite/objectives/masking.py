"""Masked language modelling, with or without a pair of sentences."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5x_lite.example import Example, Passages, places_of
from t5x_lite.objectives import units as units_lib
from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab

# kind of sentence pair -> what B is for label 0, 1, ...
SENTENCES = {
    "none": (),
    "nsp": ("next", "other"),
    "sop": ("next", "swapped"),
    "three_way": ("next", "swapped", "other"),
}


def masked_lm(
    tokens: np.ndarray | Passages,
    rng: Draws,
    vocab: Vocab,
    *,
    density: float = 0.15,
    mask: float = 0.8,
    random: float = 0.1,
    units: str = "token",
    spans: str = "",
    ngrams: Sequence[float] = (1.0,),
    decide: str = "token",
    similar: str = "",
    sentence: str = "none",
    shuffle: float = 0.0,
) -> Example:
    """Masked language modelling of BERT and its kin (Devlin et al. 2019, section 3.1).

    BERT: sentence="nsp". RoBERTa: the defaults. ALBERT: sentence="sop", ngrams=(6, 3,
    2). ELECTRA's generator: mask=0.85, random=0. NEZHA: units="word". ERNIE: units=
    "phrase". MacBERT: units="word", ngrams=(4, 3, 2, 1), similar=a file, sentence=
    "sop", decide="unit". StructBERT: sentence="three_way", shuffle=0.05.

    Args:
        tokens: int32 [B, raw] text, framed as [CLS] text [SEP]; or, with a sentence
            pair, `Passages`, see `pair_passages`.
        rng: the random numbers of these B examples.
        vocab: gives the marks and what is text.
        density: share of the text that is predicted, in (0, 1).
        mask, random: share of these places that become [MASK], a random piece of text;
            the others stay as they are.
        units, spans: what is hidden as a whole, see `units.unit_starts`.
        ngrams: relative weights of n = 1, 2, ... units hidden together.
        decide: "token" or "unit": who is masked, random or kept together.
        similar: .npy of similar ids [V, k], -1 = none, that take the place of [MASK];
            a token without any becomes a random one (Cui et al. 2020, section 3).
        sentence: "none", "nsp", "sop" or "three_way".
        shuffle: share of the text in trigrams that are shuffled among the places left
            over, and predicted (Wang et al. 2020, section 2.3). One of six shuffles
            leaves the order as it is.

    Returns:
        Example with K places, see `masked_lm_lengths`; those that a row has no text
        for, or where no unit fits any more, have weight 0.

    Raises:
        ValueError, FileNotFoundError: a knob is out of range, a file is not usable.
    """
    _check(density, mask, random, decide, shuffle, sentence)
    types_BT = labels_B = None
    if sentence == "none":
        original_BT = frame(_windows(tokens), vocab)
    else:
        original_BT, types_BT, labels_B = pair_passages(tokens, rng, vocab, sentence)
    T = original_BT.shape[1]
    *_, K = masked_lm_lengths(T, density=density, shuffle=shuffle, sentence=sentence)
    groups_BT, chosen_BT = choose_units(
        original_BT, rng, vocab, density, units, spans, ngrams
    )
    tokens_BT = replace(
        original_BT,
        chosen_BT,
        rng,
        vocab,
        mask=mask,
        random=random,
        groups_BT=groups_BT if decide == "unit" else None,
        similar=similar,
    )
    if shuffle:
        text_BT = units_lib.is_text(original_BT, vocab)
        count_B = np.rint(shuffle * text_BT.sum(axis=1) / 3).astype(np.int64)
        tokens_BT, moved_BT = shuffle_trigrams(
            tokens_BT, text_BT & ~chosen_BT, rng, count_B
        )
        chosen_BT |= moved_BT
    places_BK, weights_BK = places_of(chosen_BT, K)
    return Example(
        tokens_BT,
        np.take_along_axis(original_BT, places_BK, axis=1),
        weights_BK,
        places_BK,
        types_BT=types_BT,
        labels_B=labels_B,
    )


def masked_lm_lengths(
    inputs_length: int,
    *,
    density: float = 0.15,
    shuffle: float = 0.0,
    sentence: str = "none",
    **_,
) -> tuple[int, int, int]:
    """(raw tokens, inputs length, predicted places); `Passages` hold raw tokens each.

    >>> masked_lm_lengths(128, sentence="nsp")
    (125, 128, 19)

    Raises:
        ValueError: the inputs leave no room for text.
    """
    raw = inputs_length - _marks(sentence)
    if raw < 4:
        raise ValueError(
            f"inputs_length={inputs_length}: {_marks(sentence)} marks leave {raw} "
            f"tokens of text; at least {4 + _marks(sentence)} are needed."
        )
    places = places_count(raw, density) + 3 * round(shuffle * raw / 3)
    return raw, inputs_length, places


def places_count(text: int, density: float) -> int:
    """How many of `text` tokens are predicted: rounded, at least one."""
    return max(round(density * text), 1)


def choose_units(
    tokens_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    density: float,
    units: str,
    spans: str,
    ngrams: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses units of text up to round(density * text of the row) tokens.

    Returns:
        (groups_BT int64 [B, T], the unit or n-gram of each token; chosen_BT bool).
    """
    text_BT = units_lib.is_text(tokens_BT, vocab)
    starts_BT = units_lib.unit_starts(tokens_BT, vocab, units, spans)
    groups_BT = units_lib.numbered(
        units_lib.ngram_starts(starts_BT, text_BT, rng, ngrams)
    )
    budget_B = np.maximum(np.rint(density * text_BT.sum(axis=1)), 1).astype(np.int64)
    return groups_BT, units_lib.choose(groups_BT, text_BT, rng, budget_B)


def replace(
    tokens_BT: np.ndarray,
    chosen_BT: np.ndarray,
    rng: Draws,
    vocab: Vocab,
    *,
    mask: float,
    random: float,
    groups_BT: np.ndarray | None = None,
    similar: str = "",
) -> np.ndarray:
    """Masks, exchanges or keeps the chosen tokens: int32 [B, T].

    Args:
        groups_BT: int [B, T], decide once for each group; None = for each token.
        mask, random, similar: see `masked_lm`.
    """
    T = tokens_BT.shape[1]
    fate_BT = rng.uniform(T)
    if groups_BT is not None:
        fate_BT = np.take_along_axis(fate_BT, groups_BT, axis=1)
    random_BT = units_lib.random_text(rng, T, vocab)
    masked_BT: np.ndarray | int = vocab.mask_id
    if similar:
        similar_Vk = load_similar(similar, vocab)
        column_BT = rng.bits32(T) % np.uint32(similar_Vk.shape[1])
        masked_BT = similar_Vk[tokens_BT, column_BT]
        masked_BT = np.where(masked_BT < 0, random_BT, masked_BT)
    new_BT = np.where(fate_BT < mask, masked_BT, random_BT)
    changed_BT = chosen_BT & (fate_BT < mask + random)
    return np.where(changed_BT, new_BT, tokens_BT).astype(np.int32)


@functools.lru_cache(maxsize=4)
def load_similar(path: str, vocab: Vocab) -> np.ndarray:
    """int32 [V, k] of similar ids, -1 = none, packed to the left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table for this vocabulary.
    """
    hint = "Make one with `python -m t5x_lite.data.mining similar`."
    if not Path(path).is_file():
        raise FileNotFoundError(f"similar={path!r}: there is no such file. {hint}")
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"similar={path!r} is no .npy file: {error}. {hint}"
        ) from error
    good = isinstance(table, np.ndarray) and table.ndim == 2 and table.size
    if not good or table.dtype.kind not in "iu" or len(table) != vocab.size:
        what = f"{table.dtype}{list(table.shape)}" if good else type(table).__name__
        raise ValueError(
            f"similar={path!r} holds {what}; integers [{vocab.size}, k] are needed for "
            f"vocabulary {vocab.spec!r}. {hint}"
        )
    if not np.isin(table[table >= 0], vocab.ordinary).all():
        raise ValueError(f"similar={path!r} holds ids that are no text. {hint}")
    # Rows shorter than k repeat their entries, so that any column serves.
    counts_V1 = np.maximum((table >= 0).sum(axis=1, keepdims=True), 1)
    columns_Vk = np.arange(table.shape[1]) % counts_V1
    return np.take_along_axis(table, columns_Vk, axis=1).astype(np.int32)


def shuffle_trigrams(
    tokens_BT: np.ndarray, free_BT: np.ndarray, rng: Draws, count_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles the tokens inside up to `count_B` random trigrams of free tokens.

    Returns:
        (int32 [B, T] tokens, bool [B, T] those of the trigrams).
    """
    B, T = tokens_BT.shape
    places_BT = np.arange(T) + np.floor(rng.uniform(1) * 3).astype(np.int64)
    groups_BT, offsets_BT = places_BT // 3, places_BT % 3
    flat_BT = groups_BT + np.arange(B)[:, None] * (T + 2)
    sizes = np.bincount(flat_BT[free_BT], minlength=B * (T + 2))
    whole_BT = sizes[flat_BT] == 3
    moved_BT = units_lib.choose(groups_BT, whole_BT, rng, 3 * count_B)
    within_BT = np.where(moved_BT, rng.uniform(T), offsets_BT / 3)
    order_BT = np.argsort(groups_BT + within_BT, axis=1, kind="stable")
    return np.take_along_axis(tokens_BT, order_BT, axis=1), moved_BT


def frame(tokens_BT: np.ndarray, vocab: Vocab) -> np.ndarray:
    """[CLS] text [SEP]: int32 [B, raw + 2]."""
    framed_BT = np.empty((len(tokens_BT), tokens_BT.shape[1] + 2), np.int32)
    framed_BT[:, 0], framed_BT[:, -1] = vocab.special("cls"), vocab.special("sep")
    framed_BT[:, 1:-1] = tokens_BT
    return framed_BT


def frame_pair(
    pool_BN: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    length: int,
    vocab: Vocab,
) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] A [SEP] B [SEP], padded to `length`.

    Args:
        pool_BN: int32 [B, N] tokens that A and B are slices of.
        first, second: (start, count) of A and of B, each int [B, 1].

    Returns:
        (tokens_BT int32, types_BT int32: 1 on B and its [SEP], 0 elsewhere).
    """
    (start_a, a), (start_b, b) = first, second
    place_1T = np.arange(length)[None]
    source_BT = np.where(
        place_1T <= a, start_a + place_1T - 1, start_b + place_1T - a - 2
    )
    source_BT = np.clip(source_BT, 0, pool_BN.shape[1] - 1)
    tokens_BT = np.take_along_axis(pool_BN, source_BT, axis=1).astype(np.int32)
    tokens_BT[:, 0] = vocab.special("cls")
    last_B1 = a + b + 2
    tokens_BT[(place_1T == a + 1) | (place_1T == last_B1)] = vocab.special("sep")
    tokens_BT[place_1T > last_B1] = vocab.pad_id
    return tokens_BT, ((place_1T > a + 1) & (place_1T <= last_B1)).astype(np.int32)


def random_split(rng: Draws, lengths_B1: np.ndarray | int) -> np.ndarray:
    """int64 [B, 1], uniform in the middle half: quarter to quarter + half."""
    lengths_B1 = np.asarray(lengths_B1)
    half_B1 = lengths_B1 // 2 + 1
    split_B1 = lengths_B1 // 4 + np.floor(rng.uniform(1) * half_B1).astype(np.int64)
    return np.clip(split_B1, np.minimum(lengths_B1, 1), np.maximum(lengths_B1 - 1, 1))


def pair_passages(
    passages: np.ndarray | Passages, rng: Draws, vocab: Vocab, kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[CLS] A [SEP] B [SEP] and how B relates to A; all relations equally likely.

    nsp: 0 = B continues A, 1 = B is of another document (Devlin et al. 2019, section
    3.1). sop: 0 = B continues A, 1 = they are swapped (Lan et al. 2020, section 3.1).
    three_way: 0 = next, 1 = previous, 2 = another document (Wang et al. 2020, section
    2.3). A and B are cut at random in the middle half of the document.

    Args:
        passages: see `example.Passages`; raw = T - 3 tokens each.
        kind: a key of `SENTENCES`, not "none".

    Returns:
        (tokens_BT, types_BT int32 [B, raw + 3], labels_B int32).
    """
    if not isinstance(passages, Passages):
        raise ValueError(
            f"sentence={kind!r} needs Passages, not windows of the stream."
        )
    cases = SENTENCES[kind]
    raw = passages.tokens_BT.shape[1]
    pool_BN = np.concatenate([passages.tokens_BT, passages.others_BT], axis=1)
    length_B1, other_B1 = (
        (part_BT != vocab.pad_id).sum(axis=1, keepdims=True)
        for part_BT in (passages.tokens_BT, passages.others_BT)
    )
    split_B1 = np.minimum(random_split(rng, length_B1), length_B1)
    split_B1 = _at_word_start(passages.tokens_BT, split_B1, vocab)
    labels_B1 = np.floor(rng.uniform(1) * len(cases)).astype(np.int32)
    case_B1 = np.array(cases)[labels_B1]
    rest_B1, zero_B1 = length_B1 - split_B1, np.zeros_like(split_B1)
    if "other" in cases:  # as long whatever the label, or the lengths would tell it
        rest_B1 = np.minimum(rest_B1, other_B1)
    swapped_B1, alien_B1 = case_B1 == "swapped", case_B1 == "other"
    first = (
        np.where(swapped_B1, split_B1, zero_B1),
        np.where(swapped_B1, rest_B1, split_B1),
    )
    room_B1 = np.maximum(other_B1 - rest_B1, 0) + 1
    alien_start_B1 = raw + np.floor(rng.uniform(1) * room_B1).astype(np.int64)
    start_B1 = np.where(
        swapped_B1, zero_B1, np.where(alien_B1, alien_start_B1, split_B1)
    )
    count_B1 = np.where(swapped_B1, split_B1, rest_B1)
    tokens_BT, types_BT = frame_pair(
        pool_BN, first, (start_B1, count_B1), raw + 3, vocab
    )
    return tokens_BT, types_BT, labels_B1[:, 0]


def _at_word_start(tokens_BT, split_B1, vocab: Vocab) -> np.ndarray:
    """The last start of a word up to each split, if there is one behind the first."""
    T = tokens_BT.shape[1]
    starts_BT = np.where(vocab.starts_word(tokens_BT), np.arange(T), 0)
    last_BT = np.maximum.accumulate(starts_BT, axis=1)
    at_B1 = np.minimum(split_B1, T - 1)
    snapped_B1 = np.take_along_axis(last_BT, at_B1, axis=1)
    return np.where(snapped_B1 > 0, np.minimum(snapped_B1, split_B1), split_B1)


def _windows(tokens: np.ndarray | Passages) -> np.ndarray:
    if isinstance(tokens, Passages):
        raise ValueError(
            "sentence='none' takes windows of the stream, not Passages. Set "
            "config.objective.sentence to 'nsp', 'sop' or 'three_way'."
        )
    return tokens


def _marks(sentence: str) -> int:
    if sentence not in SENTENCES:
        raise ValueError(f"sentence={sentence!r}: allowed are {', '.join(SENTENCES)}.")
    return 2 if sentence == "none" else 3


def check_density(density: float) -> None:
    if not 0 < density < 1:
        raise ValueError(
            f"density={density}: a share in (0, 1) is needed (BERT: 0.15)."
        )


def check_fates(mask: float, random: float) -> None:
    if not (mask >= 0 and random >= 0 and mask + random <= 1 + 1e-9):
        raise ValueError(
            f"mask={mask}, random={random}: shares of 0 or more are needed, together "
            "at most 1 (BERT: 0.8 and 0.1; the rest is kept)."
        )


def _check(density, mask, random, decide, shuffle, sentence) -> None:
    check_density(density)
    check_fates(mask, random)
    _marks(sentence)
    if decide not in ("token", "unit"):
        raise ValueError(f"decide={decide!r}: allowed are token, unit.")
    if not 0 <= shuffle <= 1 - density:
        raise ValueError(
            f"shuffle={shuffle}: a share in [0, {1 - density:.2f}] is needed at "
            f"density={density} (StructBERT: 0.05)."
        )
