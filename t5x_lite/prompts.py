"""Texts of people -> what a model reads, and what it wrote -> text."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from t5x_lite.config import Config
from t5x_lite.example import Example, places_of
from t5x_lite.layouts import Streams, single
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.vocab import Vocab

GAP = re.compile(r"_{3,}|<extra_id_\d+>")
# A private-use character: no tokenizer joins it with its neighbours.
MARK = "\ue000"
SHORTEST_BUCKET = 32


class Task(NamedTuple):
    """What a model learned that people can ask for.

    kind: "gaps" (written one after the other behind sentinels), "continue" the text,
      or "masks" (gaps filled in place).
    before, after: "eos" or marks of `vocab.MARKS` around what is read, as in training.
    """

    kind: str = "gaps"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ("eos",)


class Filled(NamedTuple):
    """A text, what was put into each of its gaps, and its score (log-probability).

    others: what else was written, if more than one answer was asked for.
    """

    pieces: list[str]
    fills: list[str]
    score: float
    others: Sequence["Filled"] = ()

    def joined(self, marks: str = "[]") -> str:
        """The whole text, each fill between the two marks ('' = none)."""
        left, right = marks or ("", "")
        parts = [f"{left}{fill}{right}" for fill in self.fills] + [""]
        return "".join(a + b for a, b in zip(self.pieces, parts, strict=True))


def task_of(cfg: Config) -> Task:
    """The task of a trained model.

    Raises:
      ValueError: if its objective taught it none.
    """
    knobs = dict(cfg.objective)
    name, structure = knobs.pop("name"), cfg.model.structure
    if cfg.model.head:
        raise ValueError(
            f"this run answers with a head (config.model.head={cfg.model.head!r}) and "
            "neither fills nor writes text. Ask it by `python -m t5x_lite.evaluate`."
        )
    if cfg.data.tasks:
        return Task("continue")  # labelled tasks as text: inputs, EOS, targets
    if structure == "encoder":
        if knobs.get("similar"):
            _refuse(name, "with similar words in place of [MASK], so it knows no gap")
        if OBJECTIVES[name].kind == "pair":
            return Task("masks", after=())
        return Task("masks", ("cls",), ("sep",))
    if structure == "permuted":
        _refuse(name, "of structure 'permuted', which predicts in a random order")
    if name == "ul2":
        return Task("gaps", ("regular",))
    if name == "span_corruption":
        return Task("gaps")
    if name == "iid_denoising" and knobs.get("style", "spans") == "spans":
        return Task("gaps")
    whole = knobs.get("split") == "none"
    if structure == "decoder" and (name == "causal_lm" or whole):
        return Task("continue", ("eos",), ())
    if name == "prefix_lm" and not whole:
        return Task("continue")
    _refuse(name, "which neither fills gaps behind sentinels nor continues a text")


def _refuse(name: str, what: str) -> NoReturn:
    raise ValueError(
        f"the run was trained with config.objective.name={name!r}, {what}. Gaps are "
        "filled by span_corruption, ul2, iid_denoising (style='spans') and by masked "
        "encoders; texts are continued by causal_lm and prefix_lm. See what this one "
        "reads and predicts with `python -m t5x_lite.inspect`."
    )


def split(text: str, task: Task, where: str = "the text") -> list[str]:
    """The pieces around what the model is to write.

    Raises:
      ValueError: if there is nothing to do: no gap, or no text to continue.
    """
    if task.kind == "continue":
        if GAP.search(text):
            raise ValueError(
                f"{where} has a gap: {text[:60]!r}. This model only continues a text: "
                "give the beginning of one. Gaps are filled by a model trained with "
                "span_corruption, say."
            )
        return [text, ""]
    pieces = GAP.split(text)
    if len(pieces) == 1:
        raise ValueError(
            f"{where} has no gap to fill: {text[:60]!r}. Mark gaps with ___ (three "
            "underscores)."
        )
    return pieces


def encode(
    pieces: list[str], words: Vocab, task: Task | None = None, gap_tokens: int = 1
) -> np.ndarray:
    """Ids [T] int32 that the model reads for the pieces of a text.

    Gaps become sentinels 0, 1, ... or, to be filled in place, `gap_tokens` [MASK] each.
    The space before a gap belongs to the fill, as it does in training.
    """
    task = task or Task()
    gaps = len(pieces) - 1 if task.kind != "continue" else 0
    if task.kind == "gaps" and gaps > words.sentinels:
        raise ValueError(
            f"the text has {gaps} gaps, but the vocabulary "
            f"{words.spec!r} has {words.sentinels} sentinels. Split the text."
        )
    before = task.before
    if before == ("regular",) and gaps == 1 and not pieces[1].strip():
        before = ("sequential",)  # UL2's mode of a gap at the end
    ids: list[Any] = [_marks(before, words)]
    for i, piece in enumerate(pieces[: gaps + 1]):
        ids.append(_encode_piece(piece.rstrip() if i < gaps else piece, i > 0, words))
        if i < gaps and task.kind == "masks":
            ids.append([words.mask_id] * gap_tokens)
        elif i < gaps:
            ids.append([words.sentinel(i)])
    ids.append(_marks(task.after, words))
    return np.concatenate(ids).astype(np.int32)


def prefix(text: str, words: Vocab, task: Task) -> np.ndarray:
    """Ids [T] int32 that an answer begins with: of the text that goes on, or gap 0."""
    if not text:
        return np.zeros(0, np.int32)
    sentinel = [words.sentinel(0)] if task.kind == "gaps" else []
    return np.append(sentinel, _encode_piece(text, True, words)).astype(np.int32)


def _marks(names: tuple[str, ...], words: Vocab) -> list[int]:
    return [words.eos_id if n == "eos" else words.special(n) for n in names]


def _encode_piece(piece: str, inside: bool, words: Vocab) -> np.ndarray:
    """Ids of a piece; SentencePiece would begin it with a space of its own."""
    if not inside or not piece or piece[0].isspace():
        return words.encode(piece)
    mark = words.encode(MARK)
    return words.encode(MARK + piece)[len(mark) :]


def parse(ids_T: np.ndarray, gaps: int, words: Vocab, task: Task) -> list[str]:
    """Text of each gap in what a model wrote, in one line each."""
    if task.kind == "gaps":
        return parse_fills(ids_T, gaps, words)
    if task.kind == "continue":
        return [re.sub(r"\s+", " ", _inside(until_eos(ids_T, words), words))]
    each = np.asarray(ids_T).reshape(gaps, -1)
    return [" ".join(_inside(ids, words).split()) for ids in each]


def until_eos(ids_T: np.ndarray, words: Vocab) -> np.ndarray:
    ended_T = np.asarray(ids_T) == words.eos_id
    return np.asarray(ids_T)[: np.argmax(ended_T) if ended_T.any() else None]


def _inside(ids, words: Vocab) -> str:
    """Text of ids from inside a text: the space it begins with is kept."""
    return words.decode(ids, inside=True)


def parse_fills(ids: np.ndarray, gaps: int, words: Vocab) -> list[str]:
    """Text of each gap in what the model wrote: '<0> a <1> b EOS'; '' if left out.

    Runs of white space become one space, as the output has a line a text.
    """
    ids = until_eos(ids, words)
    first = words.size - words.sentinels
    cuts = np.flatnonzero(ids >= first)
    fills = [""] * gaps
    # Backwards, so that the first of a sentinel written twice counts.
    ends = np.append(cuts, len(ids))[1:]
    for begin, end in zip(cuts[::-1], ends[::-1], strict=True):
        gap = words.size - 1 - int(ids[begin])
        if gap < gaps:
            fills[gap] = " ".join(_inside(ids[begin + 1 : end], words).split())
    return fills


def printable(text: str) -> str:
    """For a terminal: an untrained model over bytes also writes control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def pad_rows(rows: list[np.ndarray], batch_size: int, pad_id: int) -> dict:
    """A stream [B, S] that is read; S and B are powers of two, or `batch_size`."""
    S = max(SHORTEST_BUCKET, power_of_two(max(map(len, rows))))
    B = min(batch_size, power_of_two(len(rows)))
    tokens_BS = np.full((B, S), pad_id, np.int32)
    segments_BS = np.zeros((B, S), np.int32)
    for i, row in enumerate(rows):
        tokens_BS[i, : len(row)] = row
        segments_BS[i, : len(row)] = 1
    # Padding may reach behind the last learned position.
    positions_BS = np.arange(S, dtype=np.int32) * segments_BS
    return {
        "tokens": tokens_BS,
        "positions": positions_BS,
        "segments": segments_BS,
        "ranks": np.zeros((B, S), np.int32),
    }


def masked_streams(read: dict, words: Vocab, query_streams: int = 0) -> Streams:
    """The batch whose predicted places are the [MASK] of a stream that is read.

    With the two query streams of `objectives.pseudo` all gaps are one block, predicted
    at once in stream 0.
    """
    tokens_BT, mask_BT = read["tokens"], read["tokens"] == words.mask_id
    most = power_of_two(max(int(mask_BT.sum(axis=1).max()), 1))
    places_BK, weights_BK = places_of(mask_BT, min(most, mask_BT.shape[1]))
    fields = {}
    if query_streams:
        B, T = tokens_BT.shape
        ranks_BGT = np.stack([np.where(mask_BT, 0, -1)] * query_streams, axis=1)
        cells_GT = np.arange(query_streams * T).reshape(query_streams, T) + 1
        blocks_G1 = query_streams * T + 1 + np.arange(query_streams)[:, None]
        groups_BGT = np.where(mask_BT[:, None], blocks_G1, cells_GT)
        fields = dict(
            ranks_BT=mask_BT.astype(np.int32),
            query_ranks_BGT=ranks_BGT.astype(np.int32),
            query_groups_BGT=groups_BGT.astype(np.int32),
        )
    example = Example(
        tokens_BT,
        np.zeros_like(places_BK),
        weights_BK,
        places_BK,
        positions_BT=read["positions"],
        **fields,
    )
    return single(example, words)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
