"""UTF-8 bytes as a vocabulary, as in ByT5 (Xue et al. 2022)."""

import numpy as np

from t5x_lite.vocabularies.base import Vocab


class ByteVocab(Vocab):
    """Byte b is id b + 3."""

    def __init__(self, sentinels: int = 100):
        self.spec = "bytes"
        self._settle(3 + 256, dict(pad=0, eos=1, unk=2), sentinels, b"bytes")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + 3 for t in texts]

    def _piece(self, i: int) -> str:
        return chr(i - 3) if 32 < i - 3 < 127 else f"<{i - 3:02x}>"

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        text_BT = (tokens_BT >= 3) & (tokens_BT < 259)
        space_BT = np.isin(tokens_BT, np.frombuffer(b" \n\t\r", np.uint8) + 3)
        starts_BT = ~text_BT
        starts_BT[:, 0] = True
        # A space belongs to the word that follows, as in SentencePiece.
        starts_BT[:, 1:] |= ~text_BT[:, :-1] | (space_BT[:, 1:] & ~space_BT[:, :-1])
        return starts_BT

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        # A model may write half a character: show it as U+FFFD instead of failing.
        return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")
