"""Builds a token store: reads, leaves out what came before, encodes, writes in order.

One process reads and writes; others encode (`encoding.py`). A batch may hold pieces of
several files. Its place in the store is the order of the documents alone, so the number
of processes changes nothing. Memory is bounded by a few batches and the longest
document.

What is unfinished lies beside the tokens: `progress.json` says how much of `c/0` and of
`files.jsonl` (statistics of the files that are done, one a line) is safely on disk, and
which document comes next. After a kill the rest is cut off and made again.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from t5x_lite.data import dedup, records, sources
from t5x_lite.data.encoding import Job, dtype_of, encoders
from t5x_lite.data.statistics import Statistics
from t5x_lite.vocab import Vocab

BATCH_CHARS = 2**20  # text encoded in one call
FILE_CHARS = 2**10  # what a file counts for beside its text
COMMIT_SECONDS = 2.0  # a killed build loses at most this much work
BLOCK_BYTES = 2**26  # of tokens, that share a checksum
PROCESS_BYTES = 2**24  # of files, that are worth starting a process for

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Piece:
    """Documents of one file that follow each other.

    Attributes:
        file: which of the source.
        size: documents that are new, the ones to encode.
        read: documents of the file up to here.
        duplicates: those of the piece that came before.
        counts: of the whole file, in its last piece.
        seen: sum of the digests of the new ones, if duplicates are looked for.
    """

    file: int
    size: int
    read: int
    duplicates: int
    counts: dict[str, int] | None
    seen: int = 0


def processes_for(asked: int, size: int) -> int:
    """How many processes to use for `size` bytes of files; asked = 0: as many as fit.

    Those that this process may use, but a small source is not worth starting others.
    """
    if asked:
        return asked
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, size // PROCESS_BYTES))


def build(
    path: Path,
    label: str,
    files: list[sources.File],
    vocab: Vocab,
    options: sources.Options,
    *,
    deduplicate: bool,
    processes: int,
    progress: bool,
) -> "Writer":
    """Tokenises files into `path`, going on where a killed build stopped.

    Returns:
        the writer, all committed; `Writer.complete` makes the store complete.
    """
    total = sum(file.size for file in files)
    with (
        Writer(path, dtype_of(vocab), [file.name for file in files]) as writer,
        _seen(writer, deduplicate) as seen,
        encoders(vocab, processes_for(processes, total)) as encode,
        tqdm.tqdm(
            total=total,
            initial=sum(file.size for file in files[: writer.state.file]),
            unit="B",
            unit_scale=True,
            desc=f"tokenising {label}",
            disable=not progress,
        ) as bar,
    ):
        committed = time.monotonic()
        read = _read(files, options, writer.state, seen, bar.update)
        for pieces, (tokens, statistics) in encode(read):
            writer.add(pieces, tokens, statistics)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                if seen:
                    seen.commit()
                writer.commit()
                committed = time.monotonic()
        bar.update(total - bar.n)
        writer.commit()
    return writer


@dataclasses.dataclass
class State:
    """How far an unfinished store is; all of it is on disk.

    Attributes:
        file, read: the file that goes on, and how many of its documents are done.
        n_read: documents done in all files, those left out included.
        n_documents, n_tokens: in the store.
        blocks: CRC-32 of each full block of `BLOCK_BYTES` of tokens.
        crc32: of what follows them.
        lines, lines_crc32: bytes of `files.jsonl`.
        seen: sum of the digests of all documents in the store, see `dedup.Seen`.
        current: statistics of the file that goes on.
    """

    file: int = 0
    read: int = 0
    n_read: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    crc32: int = 0
    lines: int = 0
    lines_crc32: int = 0
    seen: int = 0
    current: dict[str, int] = dataclasses.field(default_factory=dict)


class Writer:
    """Appends tokens to an unfinished store.

    Args:
        path: folder of the store, made if missing.
        dtype: of the tokens.
        names: of all files, for the statistics.
    """

    def __init__(self, path: Path, dtype: np.dtype, names: list[str]):
        self.path, self.dtype, self._names = path, dtype, names
        (path / "c").mkdir(parents=True, exist_ok=True)
        self.state = _stored_state(path, dtype.itemsize) or State()
        if not self.state.n_read:
            # Who has mapped a damaged store keeps what they have.
            (path / "c/0").unlink(missing_ok=True)
        self._tokens = open(path / "c/0", "ab")
        self._lines = open(path / "files.jsonl", "ab")
        self._cut()

    def _cut(self):
        self._tokens.truncate(self.state.n_tokens * self.dtype.itemsize)
        self._lines.truncate(self.state.lines)

    def restart(self):
        """Forgets all that is there."""
        (self.path / "progress.json").unlink(missing_ok=True)
        self.state = State()
        self._cut()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        self._tokens.close()
        self._lines.close()

    def add(self, pieces: list[Piece], tokens: bytes, statistics: list[Statistics]):
        """Appends the tokens of some pieces.

        Args:
            statistics: of the new documents of each piece.
        """
        state = self.state
        self._tokens.write(tokens)
        self._check_off(memoryview(tokens))
        state.n_tokens += len(tokens) // self.dtype.itemsize
        for piece, made in zip(pieces, statistics, strict=True):
            state.n_documents += piece.size
            state.n_read += piece.size + piece.duplicates
            state.seen = (state.seen + piece.seen) % dedup.MODULUS
            made += Statistics(duplicates=piece.duplicates)
            current = Statistics(**state.current) + made
            if piece.counts is None:
                state.read, state.current = piece.read, dataclasses.asdict(current)
                continue
            current += dataclasses.replace(Statistics.of(piece.counts), documents=0)
            row = {"file": self._names[piece.file], **dataclasses.asdict(current)}
            line = json.dumps(row).encode() + b"\n"
            state.lines += self._lines.write(line)
            state.lines_crc32 = zlib.crc32(line, state.lines_crc32)
            state.file, state.read, state.current = piece.file + 1, 0, {}

    def _check_off(self, rest: memoryview):
        state = self.state
        filled = state.n_tokens * self.dtype.itemsize % BLOCK_BYTES
        while rest:
            part = rest[: BLOCK_BYTES - filled]
            state.crc32 = zlib.crc32(part, state.crc32)
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == BLOCK_BYTES:
                state.blocks.append(state.crc32)
                state.crc32 = filled = 0

    def commit(self):
        """What was added is safe from here on."""
        for file in (self._lines, self._tokens):
            file.flush()
            os.fsync(file.fileno())
        records.write(self.path / "progress.json", dataclasses.asdict(self.state))

    def total(self) -> Statistics:
        """Statistics of all files that are done."""
        with open(self.path / "files.jsonl") as lines:
            return sum((Statistics.of(json.loads(x)) for x in lines), Statistics())

    def complete(self, about: dict[str, Any]):
        """Writes statistics and metadata; the last file makes the store complete."""
        state = self.state
        _describe_as_zarr(self.path, state.n_tokens, self.dtype)
        total = _write_statistics(self.path)
        files = ("zarr.json", "statistics.json")
        meta = {
            "n_documents": state.n_documents,
            "n_tokens": state.n_tokens,
            "dtype": self.dtype.str,
            "block_bytes": BLOCK_BYTES,
            "blocks": [*state.blocks, state.crc32],
            "statistics": dataclasses.asdict(total),
            "files": {name: records.sha256_of(self.path / name) for name in files},
            **about,
        }
        records.write(self.path / "store.json", meta)
        clean(self.path)


def clean(path: Path):
    """Removes what a complete store does not need."""
    for name in ("files.jsonl", "statistics.json.tmp", "progress.json"):
        (path / name).unlink(missing_ok=True)
    dedup.remove(path / "seen.sqlite")


def _stored_state(path: Path, itemsize: int) -> State | None:
    """Where a killed build stopped, if what it left can be gone on with."""
    try:
        state = State(**records.read(path / "progress.json"))
        written = (path / "c/0").stat().st_size
        crc32, left = 0, state.lines
        with open(path / "files.jsonl", "rb") as lines:
            while block := lines.read(min(left, 2**22)):
                crc32, left = zlib.crc32(block, crc32), left - len(block)
    except (ValueError, TypeError, FileNotFoundError):
        return None
    whole = (left, crc32) == (0, state.lines_crc32)
    return state if whole and written >= state.n_tokens * itemsize else None


@contextlib.contextmanager
def _seen(writer: Writer, deduplicate: bool) -> Iterator[dedup.Seen | None]:
    if not deduplicate:
        yield None
        return
    path = writer.path / "seen.sqlite"
    try:
        state = writer.state
        seen = dedup.Seen(path, state.n_read, state.n_documents, state.seen)
    except ValueError as error:
        _log.warning("token store %s is begun again: %s", writer.path, error)
        writer.restart()
        seen = dedup.Seen(path, 0, 0, 0)
    try:
        yield seen
    finally:
        seen.close()


def _read(
    files: list[sources.File],
    options: sources.Options,
    state: State,
    seen: dedup.Seen | None,
    progress: Callable[[int], object],
) -> Iterator[tuple[list[Piece], Job]]:
    """Groups documents into batches, from the place that `state` names.

    Counts of a file that was begun before are made anew, from its start.
    """
    first, skipped = state.file, state.read
    batch, texts, chars = [], [], 0
    for index in range(first, len(files)):
        counts = sources.Counts()
        read = skipped if index == first else 0
        held, duplicates, digests = len(texts), 0, 0
        documents = sources.read(
            files[index], options, counts=counts, progress=progress
        )
        for text in itertools.islice(documents, read, None):
            read += 1
            chars += len(text)
            new = seen.add(text) if seen else 1
            if new:
                texts.append(text)
                digests += new
            else:
                duplicates += 1
            if chars >= BATCH_CHARS:
                size = len(texts) - held
                batch.append(Piece(index, size, read, duplicates, None, digests))
                yield batch, (texts, [piece.size for piece in batch])
                batch, texts, chars = [], [], 0
                held = duplicates = digests = 0
        size, found = len(texts) - held, dataclasses.asdict(counts)
        batch.append(Piece(index, size, read, duplicates, found, digests))
        chars += FILE_CHARS
        if chars >= BATCH_CHARS:
            yield batch, (texts, [piece.size for piece in batch])
            batch, texts, chars = [], [], 0
    if batch:
        yield batch, (texts, [piece.size for piece in batch])


def _describe_as_zarr(path: Path, n_tokens: int, dtype: np.dtype):
    """Lets TensorStore write the metadata that makes `c/0` a Zarr v3 array."""
    import tensorstore

    grid = {"name": "regular", "configuration": {"chunk_shape": [n_tokens]}}
    metadata = {
        "shape": [n_tokens],
        "data_type": dtype.name,
        "chunk_grid": grid,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    (path / "zarr.json").unlink(missing_ok=True)
    tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "metadata": metadata,
        },
        create=True,
    ).result()


def _write_statistics(path: Path) -> Statistics:
    """Makes `statistics.json` of `files.jsonl`, a line at a time; returns the sum."""
    total = Statistics()
    part = path / "statistics.json.tmp"
    with open(path / "files.jsonl") as lines, open(part, "w") as file:
        for number, line in enumerate(lines):
            row = json.loads(line)
            found = Statistics.of(row)
            total += found
            row = json.dumps({"file": row["file"], **found.to_json()})
            file.write(f",\n{row}" if number else f'{{"files": [\n{row}')
        file.write(f'\n],\n"total": {json.dumps(total.to_json())}}}\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path / "statistics.json")
    return total
