"""Where text comes from: a path, a glob, a URL or a data set -> documents.

    SPEC                                what
    corpus/*.jsonl.zst                  local files, a path or a glob (** for any depth)
    gs://bucket/c4/*.parquet            by fsspec; also s3://, http(s)://, memory://
    tfds:NAME[/CONFIG][:VERSION]:SPLIT  TFDS, prepared on disk; or tfds:FOLDER:SPLIT
    hf:ORG/NAME[/CONFIG]:SPLIT          Hugging Face datasets, or hf:FOLDER[:SPLIT]

Files are plain text (.txt; with documents="files" any other suffix too), JSON lines
(.jsonl), both also compressed (.gz, .xz, .zst), or Parquet (.parquet). `texts` says
what happens to broken and to empty text, `Options` how files become documents. A
document is given out whole, in the order of the files, as long as it may be.

Memory: one document and the buffers of one file. A file of text is read from its start,
Parquet page by page; a TFDS split comes as one `File` for each shard and a Hugging Face
one as ranges of rows, so that a reader can leave out what it has done.
"""

import itertools
from collections.abc import Callable, Iterator

from t5x_lite.data import catalogue, readers, streams
from t5x_lite.data.streams import File
from t5x_lite.data.texts import Counts, Options

_READERS = {
    ".txt": readers.plain,
    ".jsonl": readers.json_lines,
    ".parquet": readers.parquet,
    "tfds": catalogue.tfds_rows,
    "hf": catalogue.hf_rows,
}
_DEFAULT = Options()


def documents(
    spec: str,
    *,
    options: Options = _DEFAULT,
    start: int = 0,
    progress: Callable[[int], object] | None = None,
    counts: dict[str, Counts] | None = None,
) -> Iterator[str]:
    """The documents of a source, in order of file name.

    Args:
        spec: see the module.
        options: how files become documents.
        start: how many documents to skip.
        progress: called with the number of bytes read since it was last called.
        counts: filled with what was read, by name of file.

    Raises:
        FileNotFoundError: no file matches (when called).
        ValueError: the spec or the kind of a file is not allowed, a package is missing
            (when called); a file is empty, binary, broken or without the field (while
            iterating). Names file and line, or row.
        OSError: a disk or a server does not answer.
    """
    every = _every(spec, files(spec, options), options, progress, counts)
    return itertools.islice(every, start, None)


def files(spec: str, options: Options = _DEFAULT) -> list[File]:
    """The files that `spec` names, sorted; errors as in `documents`.

    What `File.path` and `File.identity` hold tells whether the source has changed: of
    a local file its content, to be digested by the caller; of a remote one its checksum
    (else its size and time, else a digest); of a TFDS shard its content and rows; of a
    Hugging Face data set its fingerprint. Nothing is kept between calls.
    """
    if spec.startswith("tfds:"):
        return catalogue.tfds_files(spec)
    if spec.startswith("hf:"):
        return catalogue.hf_files(spec)
    if "://" in spec:
        protocol, _, path = spec.partition("://")
        if protocol not in ("file", "local"):
            return streams.remote(spec, options)
        spec = path
    return streams.local(spec, options)


def read(
    file: File,
    options: Options = _DEFAULT,
    *,
    counts: Counts | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[str]:
    """The documents of one file, from its start; errors as in `documents`.

    Args:
        counts: filled while reading.
    """
    counts = Counts() if counts is None else counts
    reader = _READERS[file.kind]
    yield from reader(file, options, counts, progress or (lambda n: None))
    may_be_empty = options.documents == "files" or file.rows[1]
    if not counts.documents and not may_be_empty:
        raise ValueError(
            f"source {file.name!r} ({file.size} bytes) holds no text ({counts}). Take "
            "the file out of the source or fill it."
        )


def nothing(spec: str, counts: Counts) -> str:
    """What to say of a source without any document."""
    return f"source {spec!r} holds no text at all ({counts})."


def _every(
    spec: str,
    found: list[File],
    options: Options,
    progress: Callable[[int], object] | None,
    counts: dict[str, Counts] | None,
) -> Iterator[str]:
    total = Counts()
    for file in found:
        own = Counts()
        if counts is not None:
            counts[file.name] = own
        yield from read(file, options, counts=own, progress=progress)
        total += own
    if not total.documents:
        raise ValueError(nothing(spec, total))
