"""Words as characters, for ELMo: character ids, a word vocabulary, windows of text."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from t5x_lite.data import sources

MAX_CHARACTERS = 50
# Above the 256 bytes: the sentence marks, the ends of a word and its padding. All ids
# are one higher in an array, where 0 is padding after the sentence.
BOS_CHARACTER, EOS_CHARACTER, WORD_BEGIN, WORD_END, WORD_PAD = range(256, 261)
_READING = sources.Options()
BOS, EOS, UNKNOWN = "<S>", "</S>", "<UNK>"
WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def characters(
    sentences: Sequence[Sequence[str]], max_characters: int = MAX_CHARACTERS
) -> np.ndarray:
    """Sentences of words -> int32 [B, T, max_characters], T = longest + 2.

    As in bilm-tf (Peters et al. 2018): a word is its UTF-8 bytes between two marks, cut
    at `max_characters`; a sentence stands between a BOS and an EOS word; 0 is padding.
    """
    distinct = list(dict.fromkeys(word for words in sentences for word in words))
    row = {word: 2 + i for i, word in enumerate(distinct)}
    table_UC = _table(distinct, max_characters)
    lengths = [len(words) + 2 for words in sentences]
    found_BTC = np.zeros((len(lengths), max(lengths, default=0), max_characters), "i4")
    for b, words in enumerate(sentences):
        found_BTC[b, : lengths[b]] = table_UC[[0, *(row[word] for word in words), 1]]
    return found_BTC


def _table(words: Sequence[str], max_characters: int) -> np.ndarray:
    """int32 [2 + U, max_characters]: the BOS and EOS words, then `words`."""
    middles = [bytes(word, "utf-8")[: max_characters - 2] for word in words]
    lengths = np.array([1, 1, *map(len, middles)])[:, None]
    places = np.arange(max_characters)[None] - 1
    table = np.full((len(lengths), max_characters), WORD_PAD, np.int32)
    inside = (places >= 0) & (places < lengths)
    flat = np.frombuffer(b"".join(middles), np.uint8).astype(np.int32)
    table[inside] = np.concatenate([[BOS_CHARACTER, EOS_CHARACTER], flat])
    table[places == lengths] = WORD_END
    table[:, 0] = WORD_BEGIN
    return table + 1


class Text:
    """A source as one stream of words; a line stands between a BOS and an EOS word.

    words: the distinct words, BOS and EOS first; stream_N: int32 indices into them.
    """

    def __init__(self, source: str, options: sources.Options = _READING):
        index = {BOS: 0, EOS: 1}
        stream = []
        for document in sources.documents(source, options=options):
            for line in filter(str.strip, document.splitlines()):
                found = WORD.findall(line)
                stream += [0, *(index.setdefault(w, len(index)) for w in found), 1]
        self.source, self.words = source, list(index)
        self.stream_N = np.array(stream, np.int32)


class WordVocab:
    """Word <-> id: BOS 0, EOS 1, unknown 2, then words, the most frequent first."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        broken = [w for w in self.words if not w or w != "".join(w.split())]
        special = self.words[:3] != [BOS, EOS, UNKNOWN]
        if special or broken or len(self._ids) != len(self.words):
            raise ValueError(
                f"word vocabulary of {len(self.words)} lines: the first three must be "
                f"{BOS}, {EOS}, {UNKNOWN}, and every line one word that occurs once. "
                "Make one with WordVocab.most_frequent(text, size).save(path)."
            )

    @property
    def size(self) -> int:
        return len(self.words)

    def ids(self, words: Sequence[str]) -> np.ndarray:
        """int32 [len(words)]"""
        return np.array([self._ids.get(word, 2) for word in words], np.int32)

    @classmethod
    def most_frequent(cls, text: Text, size: int) -> "WordVocab":
        """The `size` - 3 most frequent words of a text; ties in order of appearance."""
        if size < 4:
            raise ValueError(f"size={size} of a word vocabulary: at least 4 is needed.")
        counts = np.bincount(text.stream_N, minlength=len(text.words))[2:]
        best = np.argsort(-counts, kind="stable")[: size - 3]
        return cls([BOS, EOS, UNKNOWN, *(text.words[2 + i] for i in best)])

    def save(self, path: str | Path):
        """A text file, one word a line, in order of id."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text("\n".join(self.words) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "WordVocab":
        return cls(Path(path).read_text(encoding="utf-8").splitlines())


def windows(
    text: Text, vocab: WordVocab, batch_size: int, length: int
) -> Callable[[int, int], dict]:
    """-> batch(seed, step), a pure function of both.

    A batch is {"forward": w, "backward": w} with w = {"characters": int32 [B, T, 50],
    "targets": int32 [B, T] word ids}. Row b reads on where it stopped at the step
    before, forward to the next word or backward (in reading order) to the previous one,
    so that an LSTM's state may run on. The rows are evenly spaced over the text, which
    wraps around; N / (B T) steps are one epoch.

    Raises:
      ValueError: the text is shorter than one batch.
    """
    stream_N, B, T = text.stream_N, batch_size, length
    N = len(stream_N)
    if min(B, T) < 1 or N < B * (T + 1):
        raise ValueError(
            f"source {text.source!r} of {N} words: batches of batch_size={B} windows "
            f"of length={T} need at least {max(B, 1)} x {max(T, 1) + 1} words. Lower "
            "batch_size or length, or add text."
        )
    table_UC = _table(text.words[2:], MAX_CHARACTERS)
    ids_U = vocab.ids(text.words)

    def batch(seed: int, step: int) -> dict:
        phase = np.random.default_rng(seed).integers(N)
        first_B = phase + np.arange(B) * N // B + step * T
        ahead_BT = (first_B[:, None] + np.arange(T + 1)) % N
        next_BT, last_BT = stream_N[ahead_BT], stream_N[N - 1 - ahead_BT[:, ::-1]]
        return {
            "forward": dict(
                characters=table_UC[next_BT[:, :-1]], targets=ids_U[next_BT[:, 1:]]
            ),
            "backward": dict(
                characters=table_UC[last_BT[:, 1:]], targets=ids_U[last_BT[:, :-1]]
            ),
        }

    return batch
