"""Which files a vocabulary is read from."""

import json
from pathlib import Path

from t5x_lite.vocabularies import base

# In a directory, the first of these that is there. tokenizer.json first: the ids of
# sentencepiece.bpe.model (XLM-R, mBART) are not those of the published weights.
_NAMES = ("tokenizer.json", "spiece.model", "*.model", "vocab.json", "vocab.txt")


def find(spec: str) -> list[Path]:
    """A vocabulary's .model, .txt or .json; or its .json of pieces and its merges.

    Args:
        spec: a file, "PIECES.json,MERGES" or a directory. Merges are looked for beside
            their PIECES.json: merges.txt, or a .bpe of the same name.

    Raises:
        FileNotFoundError: there is none.
    """
    if not spec:
        raise FileNotFoundError(
            "config.data.vocab is empty: give --config.data.vocab=FILE, or convert "
            "with --vocab=FILE."
        )
    path = Path(spec)
    if path.is_dir():
        found = [p for name in _NAMES for p in sorted(path.glob(name))]
        if not found:
            raise FileNotFoundError(
                f"vocabulary {spec!r}: the directory has none of {', '.join(_NAMES)}."
            )
        return _with_merges(found[0])
    if path.is_file():
        return _with_merges(path)
    both = [Path(part) for part in spec.split(",")]
    if len(both) == 2 and all(part.is_file() for part in both):
        return both
    raise FileNotFoundError(
        f"vocabulary {spec!r}: there is no such file. Allowed: 'bytes' (needs no "
        "file); a SentencePiece .model, a WordPiece .txt, a tokenizer.json, or a "
        "vocab.json with its merges beside or behind a comma; or their directory. "
        f"Train one with {base.TRAIN_HINT}."
    )


def merges_of(path: Path) -> Path:
    """Where the merges of a new .json are written: merges.txt for a vocab.json."""
    if path.name == "vocab.json":
        return path.with_name("merges.txt")
    return path.with_suffix(".bpe")


def _with_merges(path: Path) -> list[Path]:
    if path.suffix != ".json" or is_whole(path):
        return [path]
    stem = path.stem.replace("encoder_bpe", "vocab").replace("encoder", "vocab")
    names = [f"{stem}.bpe", "merges.txt"]
    if path.name == "vocab.json":
        names.reverse()  # as transformers and `merges_of` write them
    for name in names:
        if (merges := path.with_name(name)).is_file():
            return [path, merges]
    raise FileNotFoundError(
        f"vocabulary {str(path)!r} is no tokenizer.json (it has no 'model'), and its "
        f"merges are not beside it: {', '.join(names)}. Give both: "
        f"'{path},MERGES'."
    )


def is_whole(path: Path) -> bool:
    """Is a JSON file a tokenizer.json, and not pieces with their ids?"""
    return isinstance(parse(path, read(path)).get("model"), dict)


def read(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"vocabulary {str(path)!r} is not UTF-8 text: {error}. A SentencePiece "
            "model must have a name that ends in .model."
        ) from error


def parse(path: str | Path, content: str) -> dict:
    """The JSON object of a file.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"vocabulary {str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"vocabulary {str(path)!r} is not a JSON object.")
    return found
