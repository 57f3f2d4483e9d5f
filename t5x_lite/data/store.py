"""The token store: a corpus tokenised once, read in windows at any place.

All documents, each followed by EOS, are one array of the smallest unsigned integers
that hold the vocabulary. It is kept as an uncompressed Zarr v3 array of one chunk, so
that any Zarr library reads it and `numpy.memmap` reads it fastest. Measured with 32 Mi
uint16 tokens on one core (array-record 0.8.6, tensorstore 0.1.86, numpy 2.4), median
time to read 128 random windows of 568 tokens from warm files, and to write the store:

                                                          read      write
    ArrayRecord, 4096 tokens a record, zstd               2.13 ms   0.50 s
    ArrayRecord, 4096 tokens a record, uncompressed       1.51 ms   0.06 s
    zarr3, chunks of 64 Ki, zstd                          11.6 ms   0.55 s
    zarr3, chunks of 64 Ki, uncompressed                  2.95 ms   0.28 s
    zarr3, chunks of 4 Ki, uncompressed                   2.35 ms   4.45 s
    zarr3, shards of 1 Mi with chunks of 4 Ki             2.13 ms   0.24 s
    zarr3, uncompressed, all held in TensorStore's cache  1.47 ms   -
    zarr3, one uncompressed chunk, memmap (chosen)        0.04 ms   0.21 s

A store lives in `cache_dir/<fingerprint>/`: `c/0` the tokens, `zarr.json`,
`statistics.json` (see statistics.py, per file too) and `store.json`, written last:
without it the store is not complete and is built on (see building.py). It holds a
CRC-32 of every 64 MiB of tokens and the digests of the other files, and of itself, so
that damage is found and named. All of it is read again only when a file has changed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from t5x_lite.data import building, records, sources
from t5x_lite.data.encoding import dtype_of
from t5x_lite.data.statistics import Statistics
from t5x_lite.vocab import Vocab

VERSION = 1  # of the store: change it when the same text would give other tokens

_log = logging.getLogger(__name__)


class TokenStore:
    """A complete store, opened for reading.

    Attributes:
        path: its folder.
        n_tokens: number of tokens, the EOS of each document included.
        n_documents: number of documents.
        fingerprint: hash of the source's content, the vocabulary, what was asked for
            and `VERSION`.
        statistics: of all its documents.
    """

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.path = path
        self.n_tokens: int = meta["n_tokens"]
        self.n_documents: int = meta["n_documents"]
        self.fingerprint: str = meta["fingerprint"]
        self.statistics = Statistics(**meta["statistics"])
        # A plain array: the memmap subclass costs time at each indexing.
        self._tokens = np.asarray(np.memmap(path / "c/0", meta["dtype"], "r"))
        self._meta = meta

    def __reduce__(self):
        # For worker processes: they open the file, the tokens do not travel.
        return TokenStore, (self.path, self._meta)

    def windows(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Tokens from each start on: int32 [B, length]; wraps around at the end.

        Args:
            starts_B: integers in [0, n_tokens).
            length: tokens of a window, at most n_tokens.
        """
        last = self.n_tokens - length
        if last < 0:
            raise ValueError(
                f"windows of {length} tokens asked for; the store has {self.n_tokens}."
            )
        if (starts_B <= last).all():
            view = np.lib.stride_tricks.sliding_window_view(self._tokens, length)
            return view[starts_B].astype(np.int32)
        places_BT = starts_B[:, None] + np.arange(length)
        return self._tokens.take(places_BT, mode="wrap").astype(np.int32)

    def places_of(self, token: int) -> np.ndarray:
        """Every place of a token, ascending: int64 [n]; reads the store once."""
        step = 2**24
        found = [
            np.flatnonzero(self._tokens[at : at + step] == token) + at
            for at in range(0, self.n_tokens, step)
        ]
        return np.concatenate(found)


Build = Callable[..., building.Writer]


def open_store(
    source: str,
    vocab: Vocab,
    cache_dir: str | os.PathLike,
    *,
    options: sources.Options | None = None,
    deduplicate: bool = False,
    processes: int = 0,
    progress: bool = True,
    verify: bool = False,
    build: Build = building.build,
) -> TokenStore:
    """Opens the store of a source, building it first if need be.

    Safe to kill at any instant and to start many times at once: one process builds,
    the others wait. A changed source or vocabulary is another fingerprint, therefore
    another store. A damaged store is reported and built again.

    Args:
        source: see `sources.documents`.
        vocab: its ids fill the store.
        cache_dir: where stores are kept; made if missing.
        options: how the source is read; None = as by default.
        deduplicate: leave out documents whose very text came before.
        processes: that make tokens while building; 1 = this one alone, 0 = as many as
            this process may use cores, but at most one per 16 MiB of files. The store
            is the same with any number.
        progress: show a progress bar while building.
        verify: read all of a complete store, even if none of its files has changed.
        build: with the arguments of `building.build`.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read or holds no text.
        OSError: cache_dir cannot be written, or the disk is full.
    """
    cache = Path(cache_dir)
    options = options or sources.Options()
    files = sources.files(source, options)
    with _clear_os_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        digests = records.Digests(cache / "digests.json", again=verify)
        fingerprint = _fingerprint(files, vocab, options, deduplicate, digests)
        path = cache / fingerprint
        store = _open_complete(path, vocab, digests)
        left = (path / "progress.json").exists() and os.access(path, os.W_OK)
        if store is None or left:
            with _lock(cache / f"{fingerprint}.lock"):
                # By now another process may have built it.
                store = _open_complete(path, vocab, digests, forget_damaged=True)
                # Twice: what a killed build left may turn out to be damaged.
                for _ in range(2 if store is None else 0):
                    writer = build(
                        path,
                        source,
                        files,
                        vocab,
                        options,
                        deduplicate=deduplicate,
                        processes=processes,
                        progress=progress,
                    )
                    now = sources.files(source, options)
                    again = _fingerprint(now, vocab, options, deduplicate, digests)
                    _check_source(writer, source, again != fingerprint)
                    about = {"source": source, "vocab": vocab.spec, "version": VERSION}
                    writer.complete({"fingerprint": fingerprint, **about})
                    store = _open_complete(path, vocab, digests, forget_damaged=True)
                    if store is not None:
                        break
                building.clean(path)
        digests.save()
    if store is None:
        raise OSError(
            f"token store {str(path)!r} was damaged while it was written: the disk "
            "does not return what was written. Choose another cache_dir."
        )
    return store


def _fingerprint(
    files: list[sources.File],
    vocab: Vocab,
    options: sources.Options,
    deduplicate: bool,
    digests: records.Digests,
) -> str:
    content = []
    for file in files:
        digest = digests.of(file.path) if file.path else ""
        content.append([file.kind, digest, *filter(None, [file.identity])])
    described = [VERSION, vocab.fingerprint, vocab.eos_id, content]
    # What is as by default is left out: a new option leaves all stores as they are.
    usual = dataclasses.asdict(sources.Options())
    asked = dataclasses.asdict(options)
    chosen = {name: value for name, value in asked.items() if value != usual[name]}
    if deduplicate:
        chosen["deduplicate"] = True
    plain = json.dumps([*described, chosen] if chosen else described)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _check_source(writer: building.Writer, source: str, changed: bool):
    """Refuses a source without text, and one that is no longer what was read."""
    if not writer.state.n_documents:
        total = writer.total()
        left_out = sources.Counts(
            empty=total.empty, repaired=total.repaired, skipped=total.skipped
        )
        raise ValueError(sources.nothing(source, left_out))
    if changed:
        (writer.path / "progress.json").unlink()
        raise ValueError(
            f"source {source!r} was changed while it was tokenised. Start again when "
            "it is complete."
        )


def _open_complete(
    path: Path, vocab: Vocab, digests: records.Digests, forget_damaged: bool = False
) -> TokenStore | None:
    """The store, or None if it is not complete or damaged."""
    if not (path / "store.json").exists():
        return None
    try:
        meta = records.read(path / "store.json")
        _check(path, meta, vocab, digests)
        return TokenStore(path, meta)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if forget_damaged:
            _log.warning("token store %s is damaged: %s. Rebuilding", path, error)
            (path / "store.json").unlink()
            (path / "progress.json").unlink(missing_ok=True)
        return None


def _check(path: Path, meta: dict[str, Any], vocab: Vocab, digests: records.Digests):
    """Raises if a part of the store is not what was written, and names the part."""
    if meta["dtype"] != dtype_of(vocab).str or type(meta["n_tokens"]) is not int:
        raise ValueError(f"store.json has tokens of type {meta['dtype']}")
    if meta["fingerprint"] != path.name:
        raise ValueError(f"store.json is that of another one, {meta['fingerprint']}")
    step = building.BLOCK_BYTES
    if meta["block_bytes"] != step:
        raise ValueError(f"store.json has blocks of {meta['block_bytes']} bytes")
    for name in ("zarr.json", "statistics.json"):
        if digests.of(path / name) != meta["files"][name]:
            raise ValueError(f"{name} is not as it was written")
    width = np.dtype(meta["dtype"]).itemsize
    size, expected = (path / "c/0").stat().st_size, meta["n_tokens"] * width
    if size != expected:
        raise ValueError(f"c/0 has {size} bytes of tokens instead of {expected}")
    found = digests.of(path / "c/0", crc32_of_blocks)
    for i, (was, now) in enumerate(zip(meta["blocks"], found, strict=True)):
        if was != now:
            first, last = (j * step // width for j in (i, i + 1))
            raise ValueError(
                f"c/0, tokens {first} to {min(last, meta['n_tokens']) - 1}: crc32 "
                f"{now} instead of {was}"
            )


def crc32_of_blocks(file: IO[bytes]) -> list[int]:
    """CRC-32 of every `BLOCK_BYTES`; of nothing at the end if they come out even."""
    found, step = [], min(2**22, building.BLOCK_BYTES)
    while True:
        crc32 = 0
        for _ in range(0, building.BLOCK_BYTES, step):
            block = file.read(step)
            crc32 = zlib.crc32(block, crc32)
        found.append(crc32)
        if len(block) < step:
            return found


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock if the process dies."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another process builds the token store; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_below(filename: str | os.PathLike | None, folder: Path) -> bool:
    # A failed write to an open file has no name, and only the store is written.
    return filename is None or str(filename).startswith(str(folder))


@contextlib.contextmanager
def _clear_os_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None or not _is_below(error.filename, cache):
            raise  # has its message already, or is about the source
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way = "Free some space (2 to 4 bytes a token) or choose" if full else "Choose"
        raise OSError(
            error.errno,
            f"token store in cache_dir={str(cache)!r} cannot be written: "
            f"{error.strerror}. {way} another config.data.cache_dir; the next start "
            "goes on from what was written",
        ) from error
