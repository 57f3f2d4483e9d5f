"""SentencePiece models (Kudo and Richardson 2018) as vocabularies."""

import functools
import unicodedata
from pathlib import Path

import numpy as np
import sentencepiece

from t5x_lite.vocabularies import base
from t5x_lite.vocabularies.base import Vocab


class SentencePieceVocab(Vocab):
    """A SentencePiece model with sentinels on top.

    As the authors of ALBERT (a model with the piece [CLS]) and XLNet (<eod>) did, with
    their models text loses its accents and, if no piece has a capital, its capitals,
    and "3," becomes "3" and ",".
    """

    def __init__(self, path: str, sentinels: int = 100):
        self.spec = path
        content = Path(path).read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(
                f"vocabulary {path!r} ({len(content)} bytes) is not a SentencePiece "
                f"model: {error}. Train one with {base.TRAIN_HINT}."
            ) from error
        names = [self._piece(i) for i in range(self._model.get_piece_size())]
        named = {name: i for i, name in enumerate(names)}
        held = base.roles(named)
        for role in ("pad", "eos", "unk"):
            if (i := getattr(self._model, f"{role}_id")()) >= 0:
                held[role] = i
        self._settle_file(names, held, sentinels, content)
        self._accents = not {"[CLS]", "<eod>"} & named.keys()
        text = {*names} - {names[i] for i in held.values()}
        self._lower = not self._accents and not any(n != n.lower() for n in text)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._accents:
            return self._model.encode(
                texts, return_type="numpy", num_threads=self.threads
            )
        texts = [_plain(text, self._lower) for text in texts]
        rows = self._model.encode(texts, num_threads=self.threads)
        split = self._split
        return [
            np.array([j for i in row for j in split.get(i, (i,))], np.int32)
            for row in rows
        ]

    @functools.cached_property
    def _split(self) -> dict[int, list[int]]:
        """Pieces of digits and a comma -> the ids of both."""
        found = {}
        for i in range(self.pieces):
            name = self._piece(i)
            if len(name) > 1 and name[-1] == "," and name[-2].isdigit():
                digits = self._model.encode(name[:-1].lstrip("\u2581"), out_type=str)
                if name[0] != "\u2581":
                    digits = [digits[0].removeprefix("\u2581"), *digits[1:]]
                parts = [part for part in (*digits, ",") if part]
                found[i] = [self._model.piece_to_id(part) for part in parts]
        return found

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self._starts_V[tokens_BT]

    @functools.cached_property
    def _starts_V(self) -> np.ndarray:
        """bool by id: pieces that begin with a space, and all that are no text."""
        starts = np.ones(self.size, bool)
        for i in self.ordinary[self.ordinary < self.pieces]:
            starts[i] = self._piece(int(i)).startswith("\u2581")
        return starts

    def _piece(self, i: int) -> str:
        return self._model.id_to_piece(i)

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        # The model drops the space of a first piece; inside a text it is meant.
        space = "" if at_start or not self._piece(ids[0]).startswith("\u2581") else " "
        return space + self._model.decode(ids)


def _plain(text: str, lower: bool) -> str:
    """As ALBERT's and XLNet's authors prepared their text."""
    text = text.replace("``", '"').replace("''", '"')
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.combining(c))
    return text.lower() if lower else text
