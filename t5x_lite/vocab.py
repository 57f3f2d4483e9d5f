"""Vocabularies: text <-> ids, special ids and sentinels.

`load("bytes")` needs no file; `load("data/vocab_4k.model")` reads a SentencePiece
model. Sentinels are the highest ids and count down, as in T5: <extra_id_0> is
size - 1, <extra_id_i> is size - 1 - i. They are ids only, never pieces, so text that
says "<extra_id_0>" is not mistaken for one.
"""

import argparse
import functools
import hashlib
import io
import itertools
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


# What in-place objectives put into the text; UL2's three modes (Tay et al. 2022).
MARKS = ("mask", "cls", "sep", "bos", "regular", "sequential", "extreme")


class Vocab:
    """Base of all vocabularies.

    Attributes:
        spec: what `load` was given.
        size: number of all ids, sentinels included.
        pad_id, eos_id, unk_id: 0, 1, 2 unless the model file says otherwise.
        sentinels: how many sentinels there are.
        fingerprint: short hash of the content; equal ids <=> equal fingerprints.
    """

    spec: str
    size: int
    sentinels: int
    fingerprint: str
    pad_id: int = 0
    eos_id: int = 1
    unk_id: int = 2

    def sentinel(self, i: Any) -> Any:
        """The id of <extra_id_i>; i is an int or an integer array.

        Raises:
            ValueError: i is not in [0, sentinels).
        """
        index = np.asarray(i)
        if index.size and not 0 <= index.min() <= index.max() < self.sentinels:
            raise ValueError(
                f"sentinel {index.min()} to {index.max()} asked for, but vocabulary "
                f"{self.spec!r} has {self.sentinels} of them (0 to "
                f"{self.sentinels - 1}). Load it with more sentinels."
            )
        return self.size - 1 - i

    def special(self, name: str) -> int:
        """Id of a mark of `MARKS`: the last sentinels, <extra_id_99> downward.

        So any vocabulary with sentinels serves all structures without another file.

        Raises:
            ValueError: too few sentinels to lend one.
        """
        i = self.sentinels - 1 - MARKS.index(name)
        if i < 0:
            raise ValueError(
                f"the mark [{name}] needs at least {MARKS.index(name) + 1} sentinels; "
                f"vocabulary {self.spec!r} has {self.sentinels}. Set "
                "config.data.sentinels=100."
            )
        return int(self.sentinel(i))

    @property
    def mask_id(self) -> int:
        return self.special("mask")

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """int32 ids of pieces of text: no pad, EOS, unknown, sentinel."""
        ids = np.arange(self.size - self.sentinels, dtype=np.int32)
        return ids[~np.isin(ids, (self.pad_id, self.eos_id, self.unk_id))]

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        """bool [B, T]: where a word begins; a mark or EOS is a word of its own."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 [T]; no EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Texts -> one int32 [T] each (may be read-only); no EOS."""
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        """Ids [T] -> text; sentinels as <extra_id_i>, padding and EOS dropped.

        A sentinel stands exactly where its span was cut out, so putting the span's
        text in its place gives the text back ("you<extra_id_0> me": the space before
        the missing word is part of the span).

        Raises:
            ValueError: an id is not in [0, size).
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} cannot be decoded by "
                f"{self.spec!r}: its ids are [0, {self.size})."
            )
        ids = ids[(ids != self.pad_id) & (ids != self.eos_id)]
        first = self.size - self.sentinels
        text = []
        for is_sentinel, run in itertools.groupby(ids.tolist(), lambda i: i >= first):
            if is_sentinel:
                text += [f"<extra_id_{self.size - 1 - i}>" for i in run]
            else:
                text.append(self._decode_run(list(run), at_start=not text))
        return "".join(text)

    def label(self, i: int) -> str:
        """One id for people: a piece, [MASK], <extra_id_0>, </s>, [PAD]."""
        if i in (self.pad_id, self.eos_id, self.unk_id):
            return {self.pad_id: "[PAD]", self.eos_id: "</s>"}.get(i, "<unk>")
        if i < self.size - self.sentinels:
            return self._piece(i)
        mark = self.sentinels - 1 - (self.size - 1 - i)
        if mark < len(MARKS):
            return f"[{MARKS[mark].upper()}]"
        return f"<extra_id_{self.size - 1 - i}>"

    def _piece(self, i: int) -> str:
        raise NotImplementedError

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        raise NotImplementedError


class ByteVocab(Vocab):
    """UTF-8 bytes: byte b is id b + 3, as in ByT5 (Xue et al. 2022)."""

    def __init__(self, sentinels: int = 100):
        self.spec = "bytes"
        self.sentinels = sentinels
        self.size = 3 + 256 + sentinels
        self.fingerprint = _fingerprint(b"bytes", sentinels)

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


class SentencePieceVocab(Vocab):
    """A SentencePiece model (Kudo and Richardson 2018) with sentinels on top."""

    def __init__(self, path: str, sentinels: int = 100):
        self.spec = path
        content = Path(path).read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(
                f"vocabulary {path!r} ({len(content)} bytes) is not a SentencePiece "
                f"model: {error}. Train one with {_TRAIN_HINT}."
            ) from error
        self.pad_id = self._model.pad_id()
        self.eos_id = self._model.eos_id()
        self.unk_id = self._model.unk_id()
        if min(self.pad_id, self.eos_id, self.unk_id) < 0:
            raise ValueError(
                f"vocabulary {path!r} has pad {self.pad_id}, eos {self.eos_id}, unk "
                f"{self.unk_id}: all three must exist (T5 has 0, 1, 2). Train one "
                f"with {_TRAIN_HINT}."
            )
        pieces = self._model.get_piece_size()
        held = [i for i in range(pieces) if _SENTINEL.fullmatch(self._piece(i))]
        if held:
            self._check_own_sentinels(held, pieces, sentinels)
        self.sentinels = sentinels
        self.size = pieces if held else pieces + sentinels
        self.fingerprint = _fingerprint(content, sentinels)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return self._model.encode(texts, return_type="numpy")

    def starts_word(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self._starts_V[tokens_BT]

    @functools.cached_property
    def _starts_V(self) -> np.ndarray:
        """bool by id: pieces that begin with a space, and all that are no text."""
        starts = np.ones(self.size, bool)
        for i in self.ordinary[self.ordinary < self._model.get_piece_size()]:
            starts[i] = self._piece(int(i)).startswith("\u2581")
        return starts

    def _piece(self, i: int) -> str:
        return self._model.id_to_piece(i)

    def _decode_run(self, ids: list[int], at_start: bool) -> str:
        # The model drops the space of a first piece; inside a text it is meant.
        space = "" if at_start or not self._piece(ids[0]).startswith("\u2581") else " "
        return space + self._model.decode(ids)

    def _check_own_sentinels(self, held: list[int], pieces: int, sentinels: int):
        """Accepts a model whose own last pieces are <extra_id_n-1> .. <extra_id_0>."""
        names = [self._piece(i) for i in held]
        ours = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
        if held[-1] != pieces - 1 or names != ours:
            raise ValueError(
                f"vocabulary {self.spec!r} of {pieces} pieces already holds "
                f"{len(held)} sentinel pieces, ids {held[0]} to {held[-1]}, but "
                f"sentinels={sentinels} was asked for. Allowed: a model without "
                f"<extra_id_*> pieces, or one whose last {sentinels} pieces are "
                f"<extra_id_{sentinels - 1}> to <extra_id_0>."
            )


_TRAIN_HINT = (
    "`python -m t5x_lite.vocab train --input='data/train.jsonl' --output=FILE.model`"
)


def load(spec: str, sentinels: int = 100) -> Vocab:
    """Loads a vocabulary.

    Args:
        spec: "bytes", or the path of a SentencePiece .model file.
        sentinels: how many sentinel ids to put on top.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a usable model, or sentinels < 0.
    """
    if sentinels < 0:
        raise ValueError(f"sentinels={sentinels}: 0 or more is needed (T5 has 100).")
    if spec == "bytes":
        return ByteVocab(sentinels)
    if not Path(spec).is_file():
        raise FileNotFoundError(
            f"vocabulary {spec!r}: there is no such file. Allowed: 'bytes' (needs no "
            f"file) or the path of a SentencePiece .model. Train one with "
            f"{_TRAIN_HINT}."
        )
    return SentencePieceVocab(spec, sentinels)


def _fingerprint(content: bytes, sentinels: int) -> str:
    digest = hashlib.sha256(content + b"\0sentinels=%d" % sentinels)
    return digest.hexdigest()[:16]


def train(source: str, size: int, output: str, threads: int = 2) -> None:
    """Trains a SentencePiece unigram model with byte fallback, ids as in T5.

    The same source, size and number of threads give the same pieces and scores.

    Args:
        source: what `data.sources.documents` reads: path or glob of text or jsonl.
        size: number of pieces, 256 bytes and pad, EOS, unknown included.
        output: the .model file to write.
        threads: pinned, because the pieces depend on it.

    Raises:
        ValueError: the size does not fit the text, or the output is not a .model.
    """
    from t5x_lite.data import sources  # the only use; it stands above this module

    if not output.endswith(".model"):
        raise ValueError(f"--output={output!r}: the name must end in .model.")
    if size < 260:
        raise ValueError(f"--size={size}: at least 260 (256 bytes, 3 special ids).")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sources.documents(source)),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            byte_fallback=True,
            num_threads=threads,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=2**16,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--size={size} does not fit the text of --input={source!r}: {error}"
        ) from error
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{output}.tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(output)


def _lines(documents: Iterator[str]) -> Iterator[str]:
    """Lines of the documents, with a progress bar."""
    import tqdm

    with tqdm.tqdm(unit="B", unit_scale=True, desc="reading text") as bar:
        for document in documents:
            bar.update(len(document.encode()))
            for line in document.splitlines():
                # SentencePiece leaves out lines above `max_sentence_length` bytes.
                yield from textwrap.wrap(line, 2**13) if len(line) > 2**13 else [line]
    print("training the vocabulary (EM over the seed pieces) ...", file=sys.stderr)


def show(spec: str, text: str | None) -> str:
    """A few lines about a vocabulary, for people."""
    vocab = load(spec)
    lines = [
        f"{spec}: {vocab.size} ids, of which {vocab.sentinels} sentinels "
        f"({vocab.size - vocab.sentinels} without them)",
        f"pad {vocab.pad_id}, eos {vocab.eos_id}, unknown {vocab.unk_id}, "
        f"<extra_id_0> {vocab.sentinel(0)}, fingerprint {vocab.fingerprint}",
    ]
    if isinstance(vocab, SentencePieceVocab):
        ids = range(260, min(300, vocab.size - vocab.sentinels))
        lines.append(f"pieces 260 ...: {' '.join(vocab._piece(i) for i in ids)}")
    if text is not None:
        ids = vocab.encode(text)
        lines += [f"ids: {ids.tolist()}", f"back: {vocab.decode(ids)}"]
    return "\n".join(lines)


_EXAMPLES = """examples:
  python -m t5x_lite.vocab train --input='corpus/*.jsonl' --size=4000 --output=v.model
  python -m t5x_lite.vocab show data/vocab_4k.model --text='Thank you'"""


def main(argv: list[str] | None = None):
    from t5x_lite import cli  # not at the top: the data path needs no command line

    parser = cli.parser(_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    look = {
        "description": _EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    trains = commands.add_parser(
        "train", help="train a SentencePiece unigram model", **look
    )
    trains.add_argument("--input", required=True, help="path or glob: .txt, .jsonl")
    trains.add_argument("--size", type=int, default=4000, help="number of pieces")
    trains.add_argument("--output", required=True, help="the .model file to write")
    trains.add_argument("--threads", type=int, default=2, help="pieces depend on it")
    shows = commands.add_parser("show", help="print sizes, ids and some pieces", **look)
    shows.add_argument("file", help="'bytes' or a .model file")
    shows.add_argument("--text", help="a text to encode and decode")
    args = parser.parse_args(argv)
    if args.command == "train":
        start = time.perf_counter()
        train(args.input, args.size, args.output, args.threads)
        print(f"wrote {args.output} in {time.perf_counter() - start:.1f} s")
        args.file, args.text = args.output, None
    print(show(args.file, args.text))


if __name__ == "__main__":
    from t5x_lite import cli

    cli.run(main)
