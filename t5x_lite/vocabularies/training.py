"""Training vocabularies; the same text, size and threads give the same file."""

import collections
import io
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from t5x_lite.data import texts
from t5x_lite.vocabularies import files

# Kind -> what the name of the file must end in.
KINDS = dict(unigram=".model", bpe=".model", wordpiece=".txt", bytebpe=".json")
_ALPHABET = 1000  # characters of a WordPiece vocabulary, as in BERT's
_READING = texts.Options()
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train(
    source: str,
    size: int,
    output: str,
    threads: int = 2,
    kind: str = "unigram",
    uncased: bool = False,
    options: texts.Options = _READING,
) -> None:
    """Trains a vocabulary.

    unigram, bpe: a SentencePiece model with byte fallback, ids as in T5. wordpiece: a
    list like BERT's, [PAD] [UNK] [CLS] [SEP] [MASK] first. bytebpe: pieces like those
    of GPT-2, <pad> <|endoftext|> first, and their merges in
    merges.txt for a vocab.json, or else in the .bpe beside.

    Args:
        source: what `data.sources.documents` reads: a path, a glob ...
        size: number of pieces, bytes and special ids included.
        output: the file to write.
        threads: pinned, because the pieces of unigram and bpe depend on it.
        kind: of `KINDS`.
        uncased: wordpiece: small letters without accents.
        options: how the source is read.

    Raises:
        ValueError: the size does not fit the text, or the name of the output the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"--kind={kind!r}: allowed are {', '.join(KINDS)}.")
    if not output.endswith(KINDS[kind]):
        raise ValueError(
            f"--output={output!r}: the name must end in {KINDS[kind]} for a vocabulary "
            f"of --kind={kind}."
        )
    if size < 260:
        raise ValueError(f"--size={size}: at least 260 (256 bytes, 3 special ids).")
    if uncased and kind != "wordpiece":
        raise ValueError(f"--uncased is for --kind=wordpiece, here is {kind!r}.")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    if kind == "wordpiece":
        content = {output: _wordpiece(source, options, size, uncased).encode()}
    elif kind == "bytebpe":
        pieces, merges = _bytebpe(source, options, size)
        # The merges first: a .json is read together with them.
        content = {
            str(files.merges_of(Path(output))): merges.encode(),
            output: pieces.encode(),
        }
    else:
        content = {output: _sentencepiece(source, options, size, threads, kind)}
    for path, data in content.items():
        Path(f"{path}.tmp").write_bytes(data)
    for path in content:
        Path(f"{path}.tmp").replace(path)


def _sentencepiece(
    source: str, options: texts.Options, size: int, threads: int, kind: str
) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(source, options, "training the vocabulary"),
            model_writer=model,
            vocab_size=size,
            model_type=kind,
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
    return model.getvalue()


def _wordpiece(source: str, options: texts.Options, size: int, uncased: bool) -> str:
    """The lines of a vocab.txt."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    normal = normalizers.BertNormalizer(lowercase=uncased)
    split = pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter()
    for line in _lines(source, options):
        counts.update(normal.normalize_str(line))
    common = [c for c, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    letters = sorted(c for c in common[:_ALPHABET] if not c.isspace())
    # The trainer numbers the inner letters in an order that differs in every process,
    # and with it breaks ties, unless they are there before.
    inner = [f"##{c}" for c in letters if len(split.pre_tokenize_str(f"a{c}")) == 1]
    special = [*_SPECIAL, *inner]
    if size < len(special) + len(letters):
        raise ValueError(
            f"--size={size} does not fit the text of --input={source!r}: its letters "
            f"alone are {len(special) + len(letters)} pieces."
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    lines = _lines(source, options, "training the vocabulary")
    tokenizer.train_from_iterator(lines, trainer)
    ids = tokenizer.get_vocab()
    _check_size(len(ids), size, source)
    return "\n".join(sorted(ids, key=ids.__getitem__)) + "\n"


def _bytebpe(source: str, options: texts.Options, size: int) -> tuple[str, str]:
    """The contents of vocab.json and of the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = _lines(source, options, "training the vocabulary")
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    _check_size(len(model["vocab"]), size, source)
    pieces = sorted(model["vocab"].items(), key=lambda item: item[1])
    merges = [" ".join(pair) for pair in model["merges"]]
    text = json.dumps(dict(pieces), ensure_ascii=False)
    return text + "\n", "\n".join(["#version: 0.2", *merges]) + "\n"


def _check_size(found: int, size: int, source: str):
    if found != size:
        raise ValueError(
            f"--size={size} does not fit the text of --input={source!r}: it gives "
            f"{found} pieces. Set that, or give more text."
        )


def _lines(source: str, options: texts.Options, then: str = "") -> Iterator[str]:
    """Lines of the documents, with a progress bar; `then`: what is done with them."""
    import tqdm

    from t5x_lite.data import sources  # the only use; it stands above this module

    with tqdm.tqdm(unit="B", unit_scale=True, desc="reading text") as bar:
        for document in sources.documents(source, options=options):
            bar.update(len(document.encode()))
            for line in document.splitlines():
                # SentencePiece leaves out lines above `max_sentence_length` bytes.
                yield from textwrap.wrap(line, 2**13) if len(line) > 2**13 else [line]
    if then:
        print(f"{then} ...", file=sys.stderr)
