"""Where text comes from: a path or a glob -> documents."""

import glob
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

KINDS = (".txt", ".jsonl")
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_ALLOWED = "Allowed: .txt or .jsonl, each also with .gz or .xz added."


def documents(
    spec: str, *, start: int = 0, progress: Callable[[int], object] | None = None
) -> Iterator[str]:
    """The documents of one or more local files, in order of file name.

    .txt: a document is a block of lines; blank lines stand between documents.
    .jsonl: a line is a document, an object with the text in its field "text".
    UTF-8; documents of white space only are skipped.

    Args:
        spec: a path, or a glob such as "corpus/*.jsonl.xz" (** for any depth).
        start: how many documents to skip.
        progress: called with the number of bytes read since it was last called.

    Raises:
        FileNotFoundError: no file matches (when called).
        ValueError: the kind of a file is not allowed (when called); a file is empty,
            binary, broken or without the field (while iterating). Names file and line.
    """
    paths = files(spec)
    every = itertools.chain.from_iterable(_documents(p, progress) for p in paths)
    return itertools.islice(every, start, None)


def files(spec: str) -> list[Path]:
    """The files that `spec` names, sorted; errors as in `documents`."""
    found = [spec] if Path(spec).exists() else sorted(glob.glob(spec, recursive=True))
    paths = [Path(p) for p in found if not Path(p).is_dir()]
    if not paths:
        if found:
            raise ValueError(
                f"source {spec!r} is a folder. Name its files: '{spec}/*.jsonl'. "
                f"{_ALLOWED}"
            )
        raise FileNotFoundError(
            f"source {spec!r}: no such file, and as a glob it matches none. "
            f"Paths are relative to {str(Path.cwd())!r}. {_ALLOWED}"
        )
    for path in paths:
        kind(path)
    return paths


def kind(path: Path) -> str:
    """ ".txt" or ".jsonl", whatever the compression."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise ValueError(f"source {str(path)!r}: unknown kind of file. {_ALLOWED}")
    return suffixes[-1]


def _documents(path: Path, progress) -> Iterator[str]:
    blocks = {".txt": _blocks, ".jsonl": _records}[kind(path)]
    count = done = 0
    with open(path, "rb") as raw:
        opener = _OPENERS.get(path.suffix)
        stream = opener(raw) if opener else raw
        for document in blocks(path, _lines(path, stream)):
            count += 1
            yield document
            if progress is not None:
                progress(raw.tell() - done)
                done = raw.tell()
    if not count:
        raise ValueError(
            f"source {str(path)!r} ({path.stat().st_size} bytes) holds no text. Take "
            "the file out of the source or fill it."
        )


def _lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            if b"\0" in line:
                raise ValueError(
                    f"source {str(path)!r}, line {number}: a NUL byte: this is a "
                    f"binary file, not text. {_ALLOWED}"
                )
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"source {str(path)!r}, line {number}: not UTF-8 ({error.reason}, byte "
            f"{error.object[error.start]:#04x} at {error.start} of the line): a binary "
            "file or another encoding. Convert it: iconv -f latin1 -t utf-8."
        ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"source {str(path)!r}, after line {number}: broken {path.suffix} file "
            f"({error}). Copy or compress it again."
        ) from error


def _blocks(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    block = []
    for _, line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\r\n")
            block = []
    if block:
        yield "".join(block).rstrip("\r\n")


def _records(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"source {str(path)!r}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{where}: not JSON ({error}). A line must be like {{"text": "..."}}.'
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            held = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f'{where}: no field "text" that is a string; the line holds {held}. '
                'A line must be like {"text": "..."}.'
            )
        try:
            record["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: text that is not valid Unicode ({error}). Repair the "
                "line or leave it out."
            ) from error
        if record["text"].strip():
            yield record["text"]
