"""Records of a task -> the rows that a model with a head reads.

The marks are those of the papers: [CLS] A [SEP] B [SEP] of an encoder (Devlin et al.
2019, section 3), start A delimiter B extract of a decoder and a prefix-LM (Radford et
al. 2018, section 3.3), A [SEP] B EOS of an encoder-decoder, whose decoder reads it
again (Lewis et al. 2020, section 3.1), A [SEP] B [SEP] [CLS] of a permuted-LM (Yang et
al. 2019). What the vocabulary has not its last sentinels lend (`Vocab.special`).
"""

import dataclasses
import math

import numpy as np

from t5x_lite.data import tasks
from t5x_lite.data.alignment import Aligner, cells_of
from t5x_lite.data.task_texts import Record
from t5x_lite.data.tasks import Task
from t5x_lite.vocab import Vocab

LONGEST_QUESTION = 64  # tokens, as in BERT's code; half a row at most


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row of a batch holds; -1 and NaN where the head has no such answer.

    Attributes:
        tokens, types: int32 [T].
        pooled: the cell that stands for the row.
        record: index of the record it was made of.
        tags: int32 [T]. places: int32 [W], the cell of each word (-1 = cut off).
        span: first and last cell of the answer.
        characters: int32 [T, 2], where a cell stands in the context; -1 = it does not.
    """

    tokens: np.ndarray
    types: np.ndarray
    pooled: int
    record: int
    label: int = -1
    value: float = math.nan
    tags: np.ndarray | None = None
    places: np.ndarray | None = None
    span: tuple[int, int] = (-1, -1)
    characters: np.ndarray | None = None

    @property
    def allowed(self) -> np.ndarray | None:
        """bool [T]: the cells of the context, and the pooled one for "no answer"."""
        if self.characters is None:
            return None
        allowed_T = self.characters[:, 1] >= 0
        allowed_T[self.pooled] = True
        return allowed_T


def frame(parts: list[np.ndarray], structure: str, vocab: Vocab):
    """One or two parts with their marks.

    Returns:
        (tokens int32 [T], types int32 [T], first cell of each part, pooled cell).
    """
    sep = vocab.special("sep")
    before, between, after = {
        "encoder": ([vocab.special("cls")], [sep], [sep]),
        "encoder_decoder": ([vocab.pad_id], [sep], [vocab.eos_id]),
        "permuted": ([], [sep], [sep, vocab.special("cls")]),
    }.get(structure, ([vocab.special("bos")], [sep], [vocab.special("cls")]))
    tokens, types, firsts = [*before], [0] * len(before), []
    for i, part in enumerate(parts):
        firsts.append(len(tokens))
        tokens += [*part.tolist(), *(between if i < len(parts) - 1 else after)]
        types += [i] * (len(tokens) - len(types))
    if structure == "permuted":
        types[-1] = 2
    pooled = 0 if structure == "encoder" else len(tokens) - 1
    return np.array(tokens, np.int32), np.array(types, np.int32), firsts, pooled


def cut(parts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Takes tokens off the end of the longer part until both fit, as BERT does."""
    if len(parts) == 1:
        return [parts[0][:room]]
    a, b = map(len, parts)
    a = min(a, max(room - b, (room + 1) // 2))
    return [parts[0][:a], parts[1][: room - a]]


class RowMaker:
    """Makes the rows of a task.

    Args:
        task: with the head `head`.
        length: T, cells of a row at most.
        stride: tokens from one window of a long context to the next.

    Attributes:
        each: rows of one example.
        cut: examples that did not fit as a whole.
        windows: rows of contexts that were read in several windows.
    """

    def __init__(
        self,
        task: Task,
        head: str,
        structure: str,
        vocab: Vocab,
        length: int,
        stride: int,
    ):
        self.task, self.head, self.structure, self.vocab = task, head, structure, vocab
        self.length, self.stride, self.aligner = length, stride, Aligner(vocab)
        self.each = dict(choice=len(task.classes), similarity=2).get(head, 1)
        self.cut = self.windows = 0

    def rows(self, records: list[Record]) -> list[Row]:
        """All rows, those of one example behind each other.

        Raises:
            ValueError: a row is too short for the marks.
        """
        if self.length < 8:
            raise ValueError(
                f"config.data.inputs_length={self.length}: a row with marks needs at "
                "least 8 cells."
            )
        if self.head in ("tags", "span"):
            made = self._tags if self.head == "tags" else self._span
            return [row for i, record in enumerate(records) for row in made(i, record)]
        texts = [self._texts(record) for record in records]
        # All in one call, which SentencePiece is far faster at.
        flat = self.vocab.encode_batch([text for each in texts for text in each])
        parts = iter(np.asarray(ids) for ids in flat)
        made = self._choice if self.head == "choice" else self._plain
        rows = []
        for i, (record, each) in enumerate(zip(records, texts, strict=True)):
            rows += made(i, record, [next(parts) for _ in each])
        return rows

    def _texts(self, record: Record) -> list[str]:
        """What a record's rows are made of; for `choice` the context, the choices."""
        texts = tasks.parts_of(self.task, record)
        if self.head == "choice":
            return [" ".join(texts), *(record[name] for name in self.task.classes)]
        return texts

    def _row(self, parts: list[np.ndarray], record: int, **answer) -> Row:
        room = self.length - len(parts) - 1
        tokens, types, _, pooled = frame(cut(parts, room), self.structure, self.vocab)
        return Row(tokens, types, pooled, record, **answer)

    def _count(self, sizes: list[int], parts: int):
        self.cut += any(size > self.length - parts - 1 for size in sizes)

    def _plain(self, i: int, record: Record, parts: list[np.ndarray]) -> list[Row]:
        """Classes and numbers; similarity in both orders."""
        answer = {}
        if "value" in record:
            answer["value"] = record["value"]
        else:
            answer["label"] = self.task.classes.index(record["label"])
        self._count([sum(map(len, parts))], len(parts))
        if self.head == "similarity":
            return [self._row(parts, i, **answer), self._row(parts[::-1], i)]
        return [self._row(parts, i, **answer)]

    def _choice(self, i: int, record: Record, parts: list[np.ndarray]) -> list[Row]:
        first, *others = parts
        label = self.task.classes.index(record["label"])
        self._count([len(first) + len(other) for other in others], 2)
        return [
            self._row([first, other], i, **({"label": label} if n == 0 else {}))
            for n, other in enumerate(others)
        ]

    def _tags(self, i: int, record: Record) -> list[Row]:
        """The first piece of each word is labelled (Devlin et al. 2019, 5.3)."""
        words, tags = record["words"], record["tags"]
        if len(words) != len(tags) or not set(tags) <= set(self.task.classes):
            raise ValueError(
                f"example {i}: {len(words)} words and {len(tags)} tags, of which "
                f"{sorted(set(tags) - set(self.task.classes))} are not in "
                f"{self.task.classes}."
            )
        ids, places_W = self.aligner.words(words)
        self._count([len(ids)], 1)
        row = self._row([ids], i)
        first = 0 if self.structure == "permuted" else 1
        kept_W = (places_W >= 0) & (places_W < self.length - 2)
        places_W = np.where(kept_W, places_W + first, -1)
        tags_T = np.full(len(row.tokens), -1, np.int32)
        numbers = np.array([self.task.classes.index(tag) for tag in tags], np.int32)
        tags_T[places_W[kept_W]] = numbers[kept_W]
        return [dataclasses.replace(row, tags=tags_T, places=places_W)]

    def _span(self, i: int, record: Record) -> list[Row]:
        """Windows of the context behind the question; no answer in it = (pooled, same).

        As in BERT's code for SQuAD: of several answers the first is trained.
        """
        question = np.asarray(self.vocab.encode(record["question"]), np.int32)
        most = min(LONGEST_QUESTION, self.length // 2)
        self.cut += len(question) > most
        question = question[:most]
        ids, places_T2 = self._context(record["context"])
        room = self.length - len(question) - 3
        answer = None
        if record["answers"]:
            text, start = record["answers"][0]
            answer = cells_of(places_T2, start, start + len(text))
        rows, begin = [], 0
        while True:
            window = slice(begin, begin + room)
            rows.append(self._window(i, question, ids[window], places_T2[window]))
            pooled, first = rows[-1].pooled, rows[-1].span[0]
            span = (pooled, pooled)
            if answer and begin <= answer[0] and answer[1] < begin + room:
                span = (answer[0] - begin + first, answer[1] - begin + first)
            rows[-1] = dataclasses.replace(rows[-1], span=span)
            if begin + room >= len(ids):
                break
            begin += min(self.stride, room)
        self.windows += len(rows) if len(rows) > 1 else 0
        return rows

    def _window(self, i: int, question, ids, places_T2) -> Row:
        """`span` is the first cell of the context, for now."""
        tokens, types, firsts, pooled = frame(
            [question, ids], self.structure, self.vocab
        )
        characters_T2 = np.full((len(tokens), 2), -1, np.int32)
        characters_T2[firsts[1] : firsts[1] + len(ids)] = places_T2
        first = (firsts[1], firsts[1])
        return Row(tokens, types, pooled, i, span=first, characters=characters_T2)

    def _context(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Several questions in a row are about the same context."""
        if getattr(self, "_last", ("",))[0] != text:
            self._last = (text, self.aligner.text(text))
        return self._last[1]
