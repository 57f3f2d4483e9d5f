"""Token stores through Apache Beam, for a corpus that one machine would take days for.

    read every file                                          (file, n, block, text)
    with deduplication: the first of those of one digest     (file, n, block, text)
    together what is in one block of a file, in order, encoded    a part, a file of its
                                                                  own in `parts`
    here: the parts in order                                 the store

The store and its statistics are bit for bit those that one machine builds. Workers need
this package, the files of the source under the same names, and `parts` (a folder or
URL that all of them and this machine see); the vocabulary travels with the pipeline.
Memory: one block of `BLOCK_CHARS` and one document.

Module of the extra `beam`; use `python -m t5x_lite.tokenize --beam=...`.
"""

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]
import fsspec
import tqdm
from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
    PipelineOptions,
)

from t5x_lite import vocab as vocabularies
from t5x_lite.config import nearest
from t5x_lite.data import dedup, sources
from t5x_lite.data.building import Piece, Writer
from t5x_lite.data.encoding import Encoder, dtype_of
from t5x_lite.data.statistics import Statistics
from t5x_lite.vocab import Vocab

BLOCK_CHARS = 2**22  # of a file, encoded together

SERVED = ("FlinkRunner", "SparkRunner", "PortableRunner")  # by a job server

# File, number of the document in it, block of the file, text.
Document = tuple[int, int, int, str]


def build(
    path: Path,
    source: str,
    files: list[sources.File],
    vocab: Vocab,
    options: sources.Options,
    *,
    deduplicate: bool,
    processes: int,
    progress: bool,
    parts: str,
    flags: list[str],
) -> Writer:
    """As `building.build`, by a pipeline.

    Args:
        processes: not used; `flags` say where and how it runs.
        parts: folder or URL where the pipeline writes; what is left there goes.
        flags: of Beam, such as ["--runner=DataflowRunner", ...].

    Raises:
        OSError: a part is missing or is not what was written.
    """
    with Writer(path, dtype_of(vocab), [file.name for file in files]) as writer:
        if writer.state.file == len(files):
            return writer  # all was put together before
        writer.restart()
        folder = f"{parts.rstrip('/')}/{path.name}"
        system, root = fsspec.core.url_to_fs(folder)
        system.makedirs(root, exist_ok=True)
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            read = (
                pipeline
                | "files" >> beam.Create(list(enumerate(files)))
                | "spread" >> beam.Reshuffle()
                | "read" >> beam.ParDo(_Read(options, folder))
            )
            if deduplicate:
                read = (
                    read
                    | "digest" >> beam.Map(lambda d: (dedup.digest(d[3]), d))
                    | "first" >> beam.CombinePerKey(min)
                    | "new" >> beam.Values()
                )
            _ = (
                read
                | "by block" >> beam.Map(lambda d: ((d[0], d[2]), (d[1], d[3])))
                | "together" >> beam.GroupByKey()
                | "encode" >> beam.ParDo(_Encode(vocab, folder))
            )
        bar = tqdm.tqdm(files, desc=f"putting {source} together", disable=not progress)
        there = {name.rpartition("/")[2] for name in system.find(root)}
        for index, _ in enumerate(bar):
            _put_together(writer, index, system, root, there, deduplicate)
        writer.commit()
        system.rm(root, recursive=True)
    return writer


def check(flags: list[str]):
    """Refuses what Beam would drop with a warning.

    Raises:
        ValueError: an unknown flag, but for runners whose own server has more of them.
    """
    options = PipelineOptions(flags)
    known = options.get_all_options()
    every = options.get_all_options(retain_unknown_options=True)
    unknown = sorted({name.partition("=")[0] for name in every.keys() - known.keys()})
    if unknown and known["runner"] not in SERVED:
        raise ValueError(
            f"--{unknown[0]} behind -- is no flag of Beam's with --runner="
            f"{known['runner']}{nearest(unknown[0], known)} Allowed: those of "
            "https://beam.apache.org/documentation/runners for each runner."
        )


class _Read(beam.DoFn):
    """The documents of a file; says at its end what was read."""

    def __init__(self, options: sources.Options, folder: str):
        self._options, self._folder = options, folder

    def process(self, element: tuple[int, sources.File]) -> Iterator[Document]:
        index, file = element
        counts, number, block, chars = sources.Counts(), -1, 0, 0
        documents = sources.read(file, self._options, counts=counts)
        for number, text in enumerate(documents):
            yield index, number, block, text
            chars += len(text)
            if chars >= BLOCK_CHARS:
                block, chars = block + 1, 0
        about = {"blocks": block + 1, **dataclasses.asdict(counts)}
        _write(f"{self._folder}/{index:08}.json", about, b"")


class _Encode(beam.DoFn):
    """Writes the tokens of a block."""

    def __init__(self, vocab: Vocab, folder: str):
        self._folder, self._sentinels = folder, vocab.sentinels
        self._fingerprint = vocab.fingerprint
        paths = vocabularies.files(vocab.spec)
        self._files = [(path.name, path.read_bytes()) for path in paths]

    def setup(self):
        with tempfile.TemporaryDirectory() as home:
            paths = [Path(home) / name for name, _ in self._files]
            for path, (_, content) in zip(paths, self._files, strict=True):
                path.write_bytes(content)
            spec = ",".join(map(str, paths)) or "bytes"
            vocab = vocabularies.load(spec, self._sentinels)
        assert vocab.fingerprint == self._fingerprint
        self._encode = Encoder(vocab)

    def process(self, element: tuple[tuple[int, int], Iterable[tuple[int, str]]]):
        (index, block), documents = element
        texts = [text for _, text in sorted(documents)]
        tokens, (statistics,) = self._encode((texts, [len(texts)]))
        about = dataclasses.asdict(statistics)
        _write(_name(self._folder, index, block), about, tokens)


def _name(folder: str, index: int, block: int) -> str:
    return f"{folder}/{index:08}-{block:08}.part"


def _write(url: str, about: dict[str, int], tokens: bytes):
    """A line of JSON, then the tokens."""
    header = json.dumps({**about, "crc32": zlib.crc32(tokens)}).encode() + b"\n"
    with fsspec.open(url, "wb") as file:
        file.write(header + tokens)  # type: ignore[union-attr]


def _read_part(system: Any, url: str) -> tuple[dict[str, int], bytes]:
    header, _, tokens = system.cat_file(url).partition(b"\n")
    about = json.loads(header)
    if zlib.crc32(tokens) != about.pop("crc32"):
        raise OSError(f"{url!r} is not what was written. Start again.")
    return about, tokens


def _put_together(
    writer: Writer, index: int, system: Any, root: str, there: set[str], gaps: bool
):
    """Appends the parts of a file; with `gaps`, some may have had nothing new."""
    counts, _ = _read_part(system, f"{root}/{index:08}.json")
    kept = 0
    for block in range(counts.pop("blocks")):
        name = _name(root, index, block)
        if name.rpartition("/")[2] not in there:
            continue
        about, tokens = _read_part(system, name)
        found = Statistics(**about)
        kept += found.documents
        piece = Piece(index, found.documents, kept, 0, None)
        writer.add([piece], tokens, [found])
    left_out = counts["documents"] - kept
    if left_out and not gaps:
        raise OSError(
            f"{root!r} holds {kept} documents of file {index} of the source, which has "
            f"{counts['documents']}. Start again."
        )
    rest = Piece(index, 0, counts["documents"], left_out, counts)
    writer.add([rest], b"", [Statistics()])
