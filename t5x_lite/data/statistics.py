"""What a token store is made of: documents, characters, tokens, and what was left out.

All are whole numbers that add up, so that they are the same however the documents were
split over processes; rates are computed when they are shown.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from t5x_lite.vocab import Vocab

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a piece for one byte of UTF-8


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over documents.

    Attributes:
        documents: in the store.
        duplicates: left out because the same text came before.
        empty, repaired, skipped: see `sources.Counts`.
        characters: Unicode code points.
        bytes: of their UTF-8.
        tokens: one EOS per document included.
        unknown: tokens that are the unknown piece.
        byte_fallback: tokens that stand for one byte, where no piece fits; the ids of
            a vocabulary of bytes alone are its pieces and do not count.
        longest: tokens of the longest document, EOS included.
    """

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    repaired: int = 0
    skipped: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    byte_fallback: int = 0
    longest: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        sums = {name: mine[name] + theirs[name] for name in mine}
        return Statistics(**sums | {"longest": max(self.longest, other.longest)})

    def rates(self) -> dict[str, float]:
        tokens = max(self.tokens, 1)
        return {
            "tokens_per_character": self.tokens / max(self.characters, 1),
            "unknown_rate": self.unknown / tokens,
            "byte_fallback_rate": self.byte_fallback / tokens,
        }

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self) | self.rates()

    @classmethod
    def of(cls, found: Mapping) -> "Statistics":
        """From a mapping that may hold more than the fields here."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: found[name] for name in names & found.keys()})


class Meter:
    """Counts what `Statistics` holds, for the ids of one vocabulary."""

    def __init__(self, vocab: Vocab):
        self._unknown = vocab.unk_id
        pieces = range(vocab.size - vocab.sentinels)
        found = [i for i in pieces if _BYTE.fullmatch(vocab.label(i))]
        self._is_byte = np.zeros(vocab.size, bool)
        self._is_byte[found] = True
        self._has_bytes = bool(found)

    def measure(self, texts: list[str], tokens_N: np.ndarray, ends: np.ndarray):
        """The statistics of some documents.

        Args:
            tokens_N: their tokens, an EOS after each document.
            ends: place behind the EOS of each document: [len(texts)], ascending.
        """
        return Statistics(
            documents=len(texts),
            characters=sum(map(len, texts)),
            bytes=sum(len(text.encode()) for text in texts),
            tokens=len(tokens_N),
            unknown=int(np.count_nonzero(tokens_N == self._unknown)),
            byte_fallback=(
                int(np.count_nonzero(self._is_byte[tokens_N])) if self._has_bytes else 0
            ),
            longest=int(np.diff(ends, prepend=0).max(initial=0)),
        )


def table(rows: Iterable[tuple[str, Statistics]]) -> str:
    """For people: one row per source or file, rates in per cent of the tokens."""
    head = [
        *("", "documents", "empty", "duplicate", "repaired", "skipped", "characters"),
        *("UTF-8 bytes", "tokens", "tokens/char", "unknown", "single byte", "longest"),
    ]
    cells = [head]
    for name, s in rows:
        counts = (s.documents, s.empty, s.duplicates, s.repaired, s.skipped)
        sizes = (s.characters, s.bytes, s.tokens)
        per_character, *shares = s.rates().values()
        cells.append(
            [
                name,
                *(f"{n:,}" for n in (*counts, *sizes)),
                f"{per_character:.4f}",
                *(f"{share:.3%}" for share in shares),
                f"{s.longest:,}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
