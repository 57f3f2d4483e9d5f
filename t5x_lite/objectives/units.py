"""What is hidden as a whole: tokens, words, phrases, n-grams of them; and which ones.

A division of a row into units is bool [B, T], True where a unit begins. Whatever is
no text (marks, EOS, padding) is a unit of its own and is never chosen.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5x_lite.objectives.draws import Draws
from t5x_lite.vocab import Vocab

UNITS = ("token", "word", "phrase")


@functools.lru_cache(maxsize=8)
def _text_V(vocab: Vocab) -> np.ndarray:
    text_V = np.zeros(vocab.size, bool)
    text_V[vocab.ordinary] = True
    return text_V


def is_text(tokens_BT: np.ndarray, vocab: Vocab) -> np.ndarray:
    """bool [B, T]: pieces of text; no marks, EOS, unknown, padding."""
    return _text_V(vocab)[tokens_BT]


def random_text(rng: Draws, length: int, vocab: Vocab) -> np.ndarray:
    """int32 [B, length] pieces of text, all equally likely."""
    ordinary = vocab.ordinary
    return ordinary[rng.bits32(length) % np.uint32(len(ordinary))]


def unit_starts(
    tokens_BT: np.ndarray, vocab: Vocab, units: str = "token", spans: str = ""
) -> np.ndarray:
    """Where each token, word or phrase begins.

    Args:
        tokens_BT: int32 [B, T].
        vocab: says where words begin.
        units: "token", "word", or "phrase": the longest phrases found in the row from
            the left, words elsewhere (ERNIE, Sun et al. 2019, section 3.2).
        spans: file of the phrases (or entities): .txt, a phrase a line, or the .npz of
            `python -m t5x_lite.data.mining phrases`.

    Returns:
        bool [B, T].

    Raises:
        ValueError: an unknown kind of units, or phrases without a file.
    """
    if units not in UNITS:
        raise ValueError(f"units={units!r}: allowed are {', '.join(UNITS)}.")
    if (units == "phrase") != bool(spans):
        raise ValueError(
            f"units={units!r} with spans={spans!r}: units='phrase' and a file of "
            "phrases belong together. Make one with "
            "`python -m t5x_lite.data.mining phrases`."
        )
    edges_BT = _edges(is_text(tokens_BT, vocab))
    if units == "token":
        return np.ones_like(edges_BT)
    starts_BT = vocab.starts_word(tokens_BT) | edges_BT
    if units == "phrase":
        phrases = load_phrases(spans, vocab)
        numbers_BT, inside_BT = find_phrases(tokens_BT, starts_BT, phrases)
        starts_BT = starts_BT & ~inside_BT | (numbers_BT >= 0)
    return starts_BT


def ngram_starts(
    starts_BT: np.ndarray, text_BT: np.ndarray, rng: Draws, ngrams: Sequence[float]
) -> np.ndarray:
    """Joins units into n-grams, n drawn independently; one that meets what is no text
    is cut there.

    Args:
        starts_BT: bool [B, T], where units begin.
        text_BT: bool [B, T], see `is_text`.
        rng: the random numbers of these B examples.
        ngrams: relative weights of n = 1, 2, 3, ...

    Returns:
        bool [B, T], where n-grams begin.

    Raises:
        ValueError: weights below 0, or all 0.
    """
    weights = np.asarray(ngrams, np.float64)
    if weights.ndim != 1 or not weights.sum() > 0 or (weights < 0).any():
        raise ValueError(
            f"ngrams={ngrams}: weights of n = 1, 2, ... are needed, 0 or more and not "
            "all 0 (ALBERT: (6, 3, 2))."
        )
    if len(weights) == 1:
        return starts_BT
    B, T = starts_BT.shape
    bounds = np.cumsum(weights / weights.sum())[:-1]
    next_BU = np.cumsum(1 + np.searchsorted(bounds, rng.uniform(T), "right"), axis=1)
    first_BU = np.zeros((B, T + 1), bool)
    first_BU[:, 0] = True
    np.put_along_axis(first_BU, np.minimum(next_BU, T), True, axis=1)
    begins_BT = np.take_along_axis(first_BU, numbered(starts_BT), axis=1)
    return starts_BT & (begins_BT | _edges(text_BT))


def numbered(starts_BT: np.ndarray) -> np.ndarray:
    """Number of each token's unit, 0, 1, 2, ... in its row: int64 [B, T]."""
    return np.cumsum(starts_BT, axis=1) - 1


def choose(
    groups_BT: np.ndarray, text_BT: np.ndarray, rng: Draws, budget_B: np.ndarray
) -> np.ndarray:
    """Chooses whole groups in random order while they fit into the budget.

    A group that no longer fits is passed over, as in BERT's whole-word masking, so a
    few tokens of the budget may stay unused.

    Args:
        groups_BT: int [B, T] in [0, T), the group of each token.
        text_BT: bool [B, T], which tokens count and may be chosen.
        rng: the random numbers of these B examples.
        budget_B: int [B], most tokens of a row.

    Returns:
        bool [B, T], the chosen tokens.
    """
    B, T = groups_BT.shape
    flat_BT = groups_BT + np.arange(B)[:, None] * T
    lengths_BG = np.bincount(flat_BT[text_BT], minlength=B * T).reshape(B, T)
    keys_BG = np.where(lengths_BG > 0, rng.bits(T) >> np.uint64(1), np.uint64(2**63))
    order_BG = np.argsort(keys_BG, axis=1, kind="stable")
    lengths_BG = np.take_along_axis(lengths_BG, order_BG, axis=1)
    left_B1 = np.asarray(budget_B)[:, None]
    taken_BG = np.zeros((B, T), bool)
    open_BG = (lengths_BG > 0) & (lengths_BG <= left_B1)
    while open_BG.any():
        fits_BG = open_BG & (np.cumsum(lengths_BG * open_BG, axis=1) <= left_B1)
        taken_BG |= fits_BG
        left_B1 = left_B1 - (lengths_BG * fits_BG).sum(axis=1, keepdims=True)
        open_BG &= ~fits_BG & (lengths_BG <= left_B1)
    chosen_BG = np.empty_like(taken_BG)
    np.put_along_axis(chosen_BG, order_BG, taken_BG, axis=1)
    return np.take_along_axis(chosen_BG, groups_BT, axis=1) & text_BT


def _edges(text_BT: np.ndarray) -> np.ndarray:
    """The first token of a row, all that is no text, and the token after it."""
    edges_BT = ~text_BT
    edges_BT[:, 1:] |= ~text_BT[:, :-1]
    edges_BT[:, 0] = True
    return edges_BT


@dataclasses.dataclass(frozen=True)
class _Phrases:
    """Phrases of one length n, sorted by hash."""

    ids_Pn: np.ndarray
    hashes_P: np.ndarray
    numbers_P: np.ndarray

    def found(self, tokens_BT: np.ndarray) -> np.ndarray:
        """int64 [B, T - n + 1]: number of the phrase that stands there, -1 = none."""
        n = self.ids_Pn.shape[1]
        windows_BWn = np.lib.stride_tricks.sliding_window_view(tokens_BT, n, axis=1)
        hashes_BW = _hash(windows_BWn)
        at_BW = np.searchsorted(self.hashes_P, hashes_BW)
        at_BW = np.minimum(at_BW, len(self.hashes_P) - 1)
        found_BW = self.hashes_P[at_BW] == hashes_BW
        # Equal hashes are rare: only those are compared token by token.
        found_BW[found_BW] = (
            self.ids_Pn[at_BW[found_BW]] == windows_BWn[found_BW]
        ).all(axis=-1)
        return np.where(found_BW, self.numbers_P[at_BW], -1)


def _hash(ids: np.ndarray) -> np.ndarray:
    """uint64 of the last axis, modulo 2**64."""
    total = np.zeros(ids.shape[:-1], np.uint64)
    for i in range(ids.shape[-1]):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[..., i].astype(np.uint64)
    return total


@functools.lru_cache(maxsize=8)
def load_phrases(path: str, vocab: Vocab) -> dict[int, _Phrases]:
    """Length in tokens -> phrases of that length; single tokens are left out.

    Raises:
        FileNotFoundError, ValueError: see `read_phrases`; or all are single tokens.
    """
    tables = by_length(read_phrases(path, vocab, "spans"))
    tables.pop(1, None)
    if not tables:
        raise ValueError(f"spans={path!r} holds no phrase of two tokens or more.")
    return tables


def read_phrases(path: str, vocab: Vocab, knob: str) -> list[tuple[int, ...]]:
    """The token ids of each phrase, in the file's order.

    A line of a .txt file is encoded with a space before it, as it stands in text.

    Args:
        knob: the name of `path` in the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no phrases, or those of another vocabulary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{knob}={path!r}: there is no such file. Allowed: a .txt with a phrase a "
            "line, or the .npz of `python -m t5x_lite.data.mining phrases`."
        )
    if path.endswith(".txt"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        texts = [" " + line.strip() for line in lines if line.strip()]
        return [tuple(ids.tolist()) for ids in vocab.encode_batch(texts)]
    try:
        with np.load(path, allow_pickle=False) as file:
            table_Pn, fingerprint = file["phrases"], str(file["vocab"])
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{knob}={path!r} is no file of `python -m t5x_lite.data.mining "
            f"phrases`: {error}"
        ) from error
    if fingerprint != vocab.fingerprint:
        raise ValueError(
            f"{knob}={path!r} was mined with vocabulary {fingerprint}, but "
            f"{vocab.spec!r} is {vocab.fingerprint}. Mine it again with this one."
        )
    return [tuple(i for i in row if i >= 0) for row in table_Pn.tolist()]


def by_length(phrases: Sequence[tuple[int, ...]]) -> dict[int, _Phrases]:
    """Length in tokens -> phrases of that length, numbered as in `phrases`.

    Of equal phrases the first one counts.
    """
    numbers: dict[tuple[int, ...], int] = {}
    for number, phrase in enumerate(phrases):
        numbers.setdefault(phrase, number)
    rows: dict[int, list] = {}
    for phrase in sorted(numbers):
        if phrase:
            rows.setdefault(len(phrase), []).append(phrase)
    tables = {}
    for n, each in rows.items():
        ids_Pn = np.array(each, np.int32)
        hashes_P = _hash(ids_Pn)
        order_P = np.argsort(hashes_P, kind="stable")
        numbers_P = np.array([numbers[phrase] for phrase in each], np.int64)
        tables[n] = _Phrases(ids_Pn[order_P], hashes_P[order_P], numbers_P[order_P])
    return tables


def find_phrases(
    tokens_BT: np.ndarray, starts_BT: np.ndarray, phrases: dict[int, _Phrases]
) -> tuple[np.ndarray, np.ndarray]:
    """Phrases of whole words that do not overlap: long ones first, then leftmost.

    Args:
        tokens_BT: int32 [B, T].
        starts_BT: bool [B, T], where words begin.
        phrases: see `by_length`.

    Returns:
        (numbers_BT int64, of the phrase that begins at a token, -1 = none;
        inside_BT bool, the tokens of all phrases).
    """
    T = tokens_BT.shape[1]
    ends_BT = np.ones_like(starts_BT)
    ends_BT[:, :-1] = starts_BT[:, 1:]
    numbers_BT = np.full(tokens_BT.shape, -1, np.int64)
    inside_BT = np.zeros_like(starts_BT)
    for n in sorted((n for n in phrases if n <= T), reverse=True):
        W = T - n + 1
        each_BW = phrases[n].found(tokens_BT)
        found_BW = (each_BW >= 0) & starts_BT[:, :W] & ends_BT[:, n - 1 :]
        for i in range(n):
            found_BW &= ~inside_BT[:, i : i + W]
        found_BW = _apart(found_BW, n)
        for i in range(n):
            inside_BT[:, i : i + W] |= found_BW
        numbers_BT[:, :W][found_BW] = each_BW[found_BW]
    return numbers_BT, inside_BT


def _apart(found_BW: np.ndarray, n: int) -> np.ndarray:
    """Keeps, from the left, those that begin n places or more after the one kept."""
    left_BW, kept_BW = found_BW.copy(), np.zeros_like(found_BW)
    while left_BW.any():
        near_BW = np.zeros_like(left_BW)
        for i in range(1, n):
            near_BW[:, i:] |= left_BW[:, :-i]
        first_BW = left_BW & ~near_BW
        kept_BW |= first_BW
        left_BW &= ~first_BW
        for i in range(1, n):
            left_BW[:, i:] &= ~first_BW[:, :-i]
    return kept_BW
