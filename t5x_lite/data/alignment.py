"""Words and characters of a text <-> the pieces of a vocabulary."""

import re

import numpy as np

from t5x_lite.vocab import Vocab

WORD = re.compile(r"\S+")


class Aligner:
    """Encodes word by word and knows where each piece stands.

    Pieces never reach over white space, so the ids are those of the whole text with
    single spaces; words are cached.

    Attributes:
        space: what stands before a text that follows another one.
    """

    def __init__(self, vocab: Vocab):
        self.vocab = vocab
        whole, parts = vocab.encode("a b"), (vocab.encode("a"), vocab.encode(" b"))
        # GPT-2's pieces and bytes hold the space before a word, others imply it.
        self.space = " " if np.array_equal(whole, np.concatenate(parts)) else ""
        self._known: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def words(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], first piece of each word int32 [W]); -1 = it has none."""
        found = self._encode(words)
        lengths = np.array([len(ids) for ids, _ in found], np.int32)
        firsts_W = np.cumsum(lengths) - lengths
        ids = [ids for ids, _ in found]
        return _joined(ids), np.where(lengths > 0, firsts_W, -1).astype(np.int32)

    def text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], characters int32 [T, 2]: start and end of each piece).

        A piece of whom nothing can be said has the characters of its whole word.
        """
        ids, places = [], []
        matches = [*WORD.finditer(text)]
        found = self._encode([match[0] for match in matches])
        for match, (word_ids, ends) in zip(matches, found, strict=True):
            ids.append(word_ids)
            if ends is None:
                spans = np.tile([[0, len(match[0])]], (len(word_ids), 1))
            else:
                spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
            places.append(spans.astype(np.int32) + match.start())
        return _joined(ids), np.concatenate([np.zeros((0, 2), np.int32), *places])

    def _encode(self, words: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Ids of each word, and how many characters end with each (None = unclear).

        The new ones are encoded in one call, which SentencePiece is far faster at.
        """
        spaced = [self.space * (i > 0) + word for i, word in enumerate(words)]
        new = [text for text in dict.fromkeys(spaced) if text not in self._known]
        for text, ids in zip(new, self.vocab.encode_batch(new), strict=True):
            ids = np.asarray(ids, np.int32)
            if not len(ids) and self.vocab.unk_id >= 0:
                ids = np.array([self.vocab.unk_id], np.int32)
            self._known[text] = ids, self._ends(ids, len(text.lstrip()))
        return [self._known[text] for text in spaced]

    def _ends(self, ids: np.ndarray, length: int) -> np.ndarray | None:
        decoded = (self.vocab.decode(ids[: k + 1]) for k in range(len(ids)))
        ends = np.array([len("".join(text.split())) for text in decoded], np.int32)
        # A normaliser may write more or fewer characters, as NFKC does with "½".
        clear = len(ends) > 0 and ends[-1] == length and (np.diff(ends) >= 0).all()
        return np.minimum(ends, length) if clear else None


def _joined(ids: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)


def cells_of(places_T2: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """First and last piece that touch the characters [start, end); None = none does."""
    touched = np.flatnonzero((places_T2[:, 1] > start) & (places_T2[:, 0] < end))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None
