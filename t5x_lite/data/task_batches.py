"""Batches of labelled tasks as a function of (seed, step), in text or with a head.

Text-to-text examples are packed: which share a row is decided once, epochs shuffle the
rows. Examples with a head have a row each (or several that follow each other) and are
not packed: a head reads one cell of a row.
"""

import functools
import hashlib

import numpy as np

from t5x_lite.config import Config
from t5x_lite.data import custom_tasks, packing, task_readers, tasks
from t5x_lite.data.batches import AnyBatches, check_rows, fingerprints, shape
from t5x_lite.data.head_rows import Row, RowMaker
from t5x_lite.data.task_texts import Record
from t5x_lite.example import Pair
from t5x_lite.layouts import LAYOUTS, Streams, decoder_all
from t5x_lite.vocab import Vocab

TEXT = ("decoder", "encoder_decoder", "prefix_lm")


def train(cfg: Config, words: Vocab, rows: np.ndarray | None = None) -> "TaskBatches":
    """The training splits of all tasks of a config, mixed in proportion to their size.

    Args:
        rows: of a batch that this host makes; None = all.

    Raises:
        ValueError: tasks, model and files that do not go together.
    """
    return batches(cfg, words, cfg.data.tasks, "train", rows, evaluation=False)


def heldouts(
    cfg: Config, words: Vocab, rows: np.ndarray | None = None, split: str = "dev"
) -> dict[str, "TaskBatches"]:
    """The dev split of each task by its name; arguments as in `train`."""
    return {
        name: batches(cfg, words, (name,), split, rows, evaluation=True)
        for name in cfg.data.tasks
    }


def batches(
    cfg: Config, words: Vocab, names, split: str, rows=None, *, evaluation: bool
) -> "TaskBatches":
    """One split of some tasks."""
    chosen = {name: custom_tasks.find(name, cfg.data.custom_tasks) for name in names}
    check(cfg, chosen)
    records = {
        name: task_readers.read(task.source, cfg.data.task_dir, split)
        for name, task in chosen.items()
    }
    make = HeadExamples if cfg.data.task_format == "head" else TextExamples
    return TaskBatches(
        make(cfg, words, chosen, records),
        words,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        rows=rows,
        evaluation=evaluation,
        about=f"{', '.join(names)} ({split})",
    )


def check(cfg: Config, chosen: dict[str, tasks.Task]):
    """Refuses a model that the tasks cannot be trained with.

    Raises:
        ValueError: naming the key to change.
    """
    m, names = cfg.model, ", ".join(chosen)
    if cfg.data.task_format == "text":
        if m.head or m.structure not in TEXT or m.query_streams:
            wrong = (
                f"head={m.head!r}"
                if m.head
                else f"structure={m.structure!r}, query_streams={m.query_streams}"
            )
            raise ValueError(
                f"config.data.task_format='text' ({names}) writes words: "
                f"config.model.{wrong} does not. Allowed: structure {', '.join(TEXT)}, "
                "without head and query streams; or set task_format='head'."
            )
        return
    if len(chosen) != 1:
        raise ValueError(
            f"config.data.tasks={tuple(chosen)}: with a head one task is trained at a "
            "time. Name one, or set config.data.task_format='text'."
        )
    task = next(iter(chosen.values()))
    if m.head not in task.heads:
        raise ValueError(
            f"config.model.head={m.head!r} does not fit task {names}: allowed is "
            f"{' or '.join(map(repr, task.heads)) or 'none: it is a text task'}. Set "
            "it, or config.data.task_format='text'."
        )
    count = len(task.classes)
    number = m.head == "similarity" and not count
    wanted = dict(
        classes=1 if number else count * (m.head in ("class", "similarity", "tags")),
        choices=count if m.head == "choice" else 0,
    )
    for key, value in wanted.items():
        if getattr(m, key) != value:
            raise ValueError(
                f"config.model.{key}={getattr(m, key)}: task {names} with head "
                f"{m.head!r} has {value}. Set it to {value}."
            )


class TextExamples:
    """Text-to-text examples of some tasks, packed into rows.

    Attributes:
        each: rows of an example that must stay together (1: a row is a pack).
        records, owners: (task, record) of each example, in the order of the files.
        inputs, targets: int32 ids of each, EOS included. Not all are in a row: some are
            only to be answered (`tasks.trains`).
        cut: how many inputs and targets were too long, by task.
    """

    each = 1

    def __init__(
        self,
        cfg: Config,
        vocab: Vocab,
        chosen: dict[str, tasks.Task],
        records: dict[str, list[Record]],
    ):
        self.vocab, data = vocab, cfg.data
        self.structure, self.seed = cfg.model.structure, cfg.seed
        self._layout = LAYOUTS[self.structure]
        if data.train_inputs and self.structure == "decoder":
            self._layout = decoder_all
        self.records = [(n, r) for n, found in records.items() for r in found]
        texts = [tasks.text_of(chosen[n], r) for n, r in self.records]
        self.inputs, long_inputs = _ended(
            [inputs for inputs, _ in texts], data.inputs_length, vocab
        )
        self.targets, long_targets = _ended(
            [targets for _, targets in texts], data.targets_length, vocab
        )
        self.cut = {"inputs": long_inputs, "targets": long_targets}
        self.widths = (data.inputs_length, data.targets_length)
        sizes_X2 = np.array(
            [(len(i), len(t)) for i, t in zip(self.inputs, self.targets, strict=True)]
        )
        self._row_widths: dict[str, int]
        if self.structure == "encoder_decoder":
            self._row_widths = dict(
                zip(("encoder", "decoder"), self.widths, strict=True)
            )
        else:
            # Nothing follows the last token of the longest example.
            total = sum(self.widths)
            sizes_X2 = np.minimum(sizes_X2.sum(axis=1, keepdims=True), total - 1)
            self._row_widths = {"main": total}
        capacity = tuple(self._row_widths.values())
        trained = [tasks.trains(chosen[n], r) for n, r in self.records]
        self._trained = np.flatnonzero(trained)
        self.packs = packing.pack(sizes_X2[self._trained], capacity, seed=cfg.seed)

    def __len__(self) -> int:
        return len(self.packs)

    def describe(self) -> str:
        counts = " and ".join(f"{n} {what}" for what, n in self.cut.items() if n)
        return (
            f"{len(self.records):,} examples in {len(self):,} rows, "
            f"{100 * self.packs.fill:.0f} % filled"
        ) + (f", {counts} cut to fit" if counts else "")

    def streams(self, rows_B: np.ndarray) -> Streams:
        """The rows of these numbers."""
        packs = [self._trained[self.packs[int(row)]] for row in rows_B]
        examples = np.concatenate(packs)
        pair = Pair(
            _padded([self.inputs[i] for i in examples], self.widths[0], self.vocab),
            _padded([self.targets[i] for i in examples], self.widths[1], self.vocab),
        )
        rows_X = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        laid_out = self._layout(pair, self.vocab)
        return packing.join(laid_out, rows_X, len(packs), self._row_widths)


class HeadExamples:
    """Rows with marks and what their head is to say.

    Attributes:
        rows: of all examples, `each` behind each other.
        records: (task, record) of each example.
    """

    def __init__(
        self,
        cfg: Config,
        vocab: Vocab,
        chosen: dict[str, tasks.Task],
        records: dict[str, list[Record]],
    ):
        ((name, task),) = chosen.items()
        self.vocab, self.task, m = vocab, task, cfg.model
        self.structure, self.head = m.structure, m.head
        self.width = cfg.data.inputs_length
        self.lm = cfg.loss.lm_weight > 0
        make = RowMaker(task, m.head, m.structure, vocab, self.width, cfg.data.stride)
        self.rows: list[Row] = make.rows(records[name])
        self.records = [(name, record) for record in records[name]]
        self.each, self.cut, self.windows = make.each, make.cut, make.windows

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self) -> str:
        said = f"{len(self.records):,} examples in {len(self):,} rows"
        if self.windows:
            said += f", {self.windows:,} of them windows of long contexts"
        if self.cut:
            said += f", {self.cut:,} cut to {self.width} tokens"
        return said

    def streams(self, rows_B: np.ndarray) -> Streams:
        rows = [self.rows[int(i)] for i in rows_B]
        B, T = len(rows), self.width
        tokens_BT = np.full((B, T), self.vocab.pad_id, np.int32)
        types_BT, lengths_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        tags_BT = np.full((B, T), -1, np.int32)
        allowed_BT = np.zeros((B, T), np.int32)
        for b, row in enumerate(rows):
            n = lengths_B[b] = len(row.tokens)
            tokens_BT[b, :n], types_BT[b, :n] = row.tokens, row.types
            if row.tags is not None:
                tags_BT[b, :n] = row.tags
            if row.allowed is not None:
                allowed_BT[b, :n] = row.allowed
        causal = self.structure in ("decoder", "encoder_decoder")
        stream = _stream(tokens_BT, lengths_B, causal)
        stream |= {"types": types_BT, "pooled": _ints(row.pooled for row in rows)}
        if self.head == "tags":
            stream["tags"] = tags_BT
        elif self.head == "span":
            spans = np.array([row.span for row in rows], np.int32)
            stream |= {"span": spans, "allowed": allowed_BT}
        elif "value" in self.records[0][1]:
            stream["values"] = np.array([row.value for row in rows], np.float32)
        else:
            stream["labels"] = _ints(row.label for row in rows)
        stream |= self._next_tokens(tokens_BT, lengths_B)
        if self.structure != "encoder_decoder":
            return {"main": stream}
        # The encoder reads what the decoder reads, without the start token.
        read_BT = np.full((B, T), self.vocab.pad_id, np.int32)
        read_BT[:, :-1] = tokens_BT[:, 1:]
        return {"encoder": _stream(read_BT, lengths_B - 1, False), "decoder": stream}

    def _next_tokens(self, tokens_BT, lengths_B) -> dict[str, np.ndarray]:
        """GPT-1's auxiliary task (section 3.2), or one place that counts nothing."""
        B, T = tokens_BT.shape
        if not self.lm:
            places_B1 = np.zeros((B, 1), np.int32)
            nothing = np.zeros((B, 1), np.float32)
            return {"places": places_B1, "targets": places_B1, "weights": nothing}
        targets_BT = np.full((B, T), self.vocab.pad_id, np.int32)
        targets_BT[:, :-1] = tokens_BT[:, 1:]
        there_BT = np.arange(T) < lengths_B[:, None] - 1
        return {"targets": targets_BT, "weights": there_BT.astype(np.float32)}


class TaskBatches(AnyBatches):
    """Random access to the batches of labelled examples.

    Args:
        made: `TextExamples` or `HeadExamples`.
        about: their name, for people.
        rows, evaluation: as in `AnyBatches`.
    """

    def __init__(
        self,
        made: TextExamples | HeadExamples,
        vocab: Vocab,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        evaluation: bool = False,
        about: str = "",
    ):
        self.made, self.vocab, self.about = made, vocab, about
        self.batch_size, self.seed, self.evaluation = batch_size, seed, evaluation
        self.rows = check_rows(rows, batch_size)
        self.examples_per_epoch = len(made)
        first = made.streams(np.zeros(1, np.int64))
        self.shapes = {name: shape(stream) for name, stream in first.items()}
        digest = hashlib.sha256(repr((vocab.fingerprint, self.shapes)).encode())
        for i in range(0, len(made), 1024):
            chosen = np.arange(i, min(i + 1024, len(made)))
            digest.update(fingerprints(made.streams(chosen), chosen).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def describe(self) -> str:
        return f"{self.about}: {self.made.describe()}"

    def examples(self, indices_B: np.ndarray) -> Streams:
        """The rows of these numbers; each epoch shuffles whole examples anew."""
        count, each = self.examples_per_epoch, self.made.each
        if self.evaluation:
            return self.made.streams(indices_B % count)
        units_B, nth_B = np.divmod(indices_B, each)
        epochs_B, units_B = np.divmod(units_B, count // each)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            units_B[here] = _order(count // each, self.seed, int(epoch))[units_B[here]]
        return self.made.streams(units_B * each + nth_B)

    def blank(self, streams: Streams, filled_B: np.ndarray) -> None:
        nothing = dict(weights=0, labels=-1, values=np.nan, tags=-1, span=-1)
        for stream in streams.values():
            for name in nothing.keys() & stream.keys():
                stream[name] = stream[name].copy()
                stream[name][filled_B] = nothing[name]


def _ended(texts: list[str], length: int, vocab: Vocab) -> tuple[list[np.ndarray], int]:
    """(ids with EOS, at most `length` of them; how many texts were longer)."""
    encoded = [np.asarray(ids, np.int32) for ids in vocab.encode_batch(texts)]
    eos = np.array([vocab.eos_id], np.int32)
    ended = [np.concatenate([ids[: length - 1], eos]) for ids in encoded]
    return ended, sum(len(ids) > length - 1 for ids in encoded)


def _padded(rows: list[np.ndarray], width: int, vocab: Vocab) -> np.ndarray:
    padded_XT = np.full((len(rows), width), vocab.pad_id, np.int32)
    for x, ids in enumerate(rows):
        padded_XT[x, : len(ids)] = ids
    return padded_XT


def _stream(tokens_BT, lengths_B, causal: bool) -> dict[str, np.ndarray]:
    B, T = tokens_BT.shape
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return {
        "tokens": tokens_BT,
        "positions": positions_BT,
        "segments": (positions_BT < lengths_B[:, None]).astype(np.int32),
        "ranks": positions_BT if causal else np.zeros_like(positions_BT),
    }


def _ints(values) -> np.ndarray:
    return np.array(list(values), np.int32)


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    entropy = np.random.SeedSequence((seed % 2**64, epoch))
    return np.random.Generator(np.random.Philox(entropy)).permutation(n)
