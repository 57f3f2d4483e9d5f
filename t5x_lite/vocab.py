"""Vocabularies: text <-> ids, special ids and sentinels.

`load("bytes")` needs no file; `load("data/vocab_4k.model")` reads a SentencePiece
model, `load("vocab.txt")` WordPiece, `load("vocab.json")` (merges beside it) the BPE of
GPT and GPT-2, `load("tokenizer.json")` what Hugging Face's tokenizers has written.
Sentinels are the highest ids and count down, as in T5: <extra_id_0> is size - 1,
<extra_id_i> is size - 1 - i. They are ids only, never pieces, so text that says
"<extra_id_0>" is not mistaken for one.
"""

import argparse
import time
from pathlib import Path

from t5x_lite.vocabularies import files as files_lib
from t5x_lite.vocabularies import training
from t5x_lite.vocabularies.base import MARKS, Vocab
from t5x_lite.vocabularies.byte import ByteVocab
from t5x_lite.vocabularies.pieces import SentencePieceVocab
from t5x_lite.vocabularies.training import train

__all__ = [
    "MARKS",
    "ByteVocab",
    "SentencePieceVocab",
    "Vocab",
    "files",
    "load",
    "main",
    "show",
    "train",
]


def load(spec: str, sentinels: int = 100) -> Vocab:
    """Loads a vocabulary.

    Args:
        spec: "bytes", a SentencePiece .model, a WordPiece .txt, a tokenizer.json, a
            vocab.json whose merges are beside it or behind a comma, or a directory.
        sentinels: how many sentinel ids to put on top.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a usable vocabulary, or sentinels < 0.
    """
    if sentinels < 0:
        raise ValueError(f"sentinels={sentinels}: 0 or more is needed (T5 has 100).")
    if spec == "bytes":
        return ByteVocab(sentinels)
    path, *merges = files_lib.find(spec)
    if not merges and path.suffix not in (".txt", ".json"):
        return SentencePieceVocab(str(path), sentinels)
    from t5x_lite.vocabularies import subwords  # its library is not loaded for others

    if merges:
        return subwords.bpe(spec, path, merges[0], sentinels)
    kind = subwords.wordpiece if path.suffix == ".txt" else subwords.whole
    return kind(str(path), sentinels)


def files(spec: str) -> list[Path]:
    """The files that `load` reads: none for "bytes", two for pieces and merges.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return [] if spec == "bytes" else files_lib.find(spec)


def show(spec: str, text: str | None, sentinels: int = 100) -> str:
    """A few lines about a vocabulary, for people."""
    vocab = load(spec, sentinels)
    lines = [
        f"{spec}: {vocab.size} ids, of which {vocab.sentinels} sentinels "
        f"({vocab.size - vocab.sentinels} without them)",
        f"pad {vocab.pad_id}, eos {vocab.eos_id}, unknown {vocab.unk_id}, "
        f"fingerprint {vocab.fingerprint}",
    ]
    if sentinels:
        lines.append(f"<extra_id_0> {vocab.sentinel(0)}")
    if vocab.own:
        own = ", ".join(f"[{mark.upper()}] {i}" for mark, i in vocab.own.items())
        lines.append(f"its own marks: {own}")
    if spec != "bytes":
        shown = vocab.ordinary[260:300]
        pieces = " ".join(vocab.label(int(i)) for i in shown)
        lines.append(f"pieces {shown[0] if len(shown) else ''} ...: {pieces}")
    if text is not None:
        ids = vocab.encode(text)
        lines += [f"ids: {ids.tolist()}", f"back: {vocab.decode(ids)}"]
    return "\n".join(lines)


_EXAMPLES = """examples:
  python -m t5x_lite.vocab train --input='corpus/*.jsonl' --size=4000 --output=v.model
  python -m t5x_lite.vocab train --input=a.txt --kind=wordpiece --output=vocab.txt
  python -m t5x_lite.vocab train --input=a.txt --kind=bytebpe --output=vocab.json
  python -m t5x_lite.vocab show data/vocab_4k.model --text='Thank you'"""


def main(argv: list[str] | None = None):
    # Not at the top: the data path needs no command line, and stands above.
    from t5x_lite import cli
    from t5x_lite.data import texts

    parser = cli.parser(_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    look = {
        "description": _EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    trains = commands.add_parser("train", help="train a vocabulary", **look)
    trains.add_argument("--input", required=True, help="text; see data/sources.py")
    cli.add_reading(trains)
    trains.add_argument("--size", type=int, default=4000, help="number of pieces")
    kinds = ", ".join(f"{kind}: {end}" for kind, end in training.KINDS.items())
    trains.add_argument("--output", required=True, help=f"file to write ({kinds})")
    trains.add_argument(
        "--kind", default="unigram", choices=[*training.KINDS], help="of vocabulary"
    )
    trains.add_argument(
        "--uncased", action="store_true", help="wordpiece: no capitals, no accents"
    )
    trains.add_argument("--threads", type=int, default=2, help="pieces depend on it")
    shows = commands.add_parser("show", help="print sizes, ids and some pieces", **look)
    shows.add_argument("file", help="'bytes', a vocabulary file or its directory")
    shows.add_argument("--text", help="a text to encode and decode")
    shows.add_argument("--sentinels", type=int, default=100, help="on top of its ids")
    args = parser.parse_args(argv)
    if args.command == "train":
        start = time.perf_counter()
        train(
            args.input,
            args.size,
            args.output,
            args.threads,
            args.kind,
            args.uncased,
            texts.Options.of(args),
        )
        print(f"wrote {args.output} in {time.perf_counter() - start:.1f} s")
        args.file, args.text, args.sentinels = args.output, None, 100
    print(show(args.file, args.text, args.sentinels))


if __name__ == "__main__":
    from t5x_lite import cli

    cli.run(main)
