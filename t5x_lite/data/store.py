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

A store lives in `cache_dir/<fingerprint>/`: `c/0` the tokens, `zarr.json`, and
`store.json`, written last: without it the store is not complete and is built on from
`progress.json`, the last place where the tokens were safely on disk.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from t5x_lite.data import sources
from t5x_lite.vocab import Vocab

VERSION = 1  # of the store: change it when the same text would give other tokens
BATCH_CHARS = 2**20  # text encoded in one call
COMMIT_SECONDS = 2.0  # a killed build loses at most this much work

_log = logging.getLogger(__name__)


class TokenStore:
    """A complete store, opened for reading.

    Attributes:
        n_tokens: number of tokens, the EOS of each document included.
        n_documents: number of documents.
        fingerprint: hash of the source's content, the vocabulary and `VERSION`.
    """

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.n_tokens: int = meta["n_tokens"]
        self.n_documents: int = meta["n_documents"]
        self.fingerprint: str = meta["fingerprint"]
        # A plain array: the memmap subclass costs time at each indexing.
        self._tokens = np.asarray(np.memmap(path / "c/0", meta["dtype"], "r"))

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


def open_store(
    source: str, vocab: Vocab, cache_dir: str | os.PathLike, *, progress: bool = True
) -> TokenStore:
    """Opens the store of a source, building it first if need be.

    Safe to kill at any instant and to start many times at once: one process builds,
    the others wait. A changed source or vocabulary is another fingerprint, therefore
    another store. A damaged store is reported and built again.

    Args:
        source: see `sources.documents`.
        vocab: its ids fill the store.
        cache_dir: where stores are kept; made if missing.
        progress: show a progress bar while building.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read or holds no text.
        OSError: cache_dir cannot be written, or the disk is full.
    """
    cache = Path(cache_dir)
    paths = sources.files(source)
    with _clear_os_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        digests = _Digests(cache / "digests.json")
        fingerprint = _fingerprint(paths, vocab, digests)
        path = cache / fingerprint
        store = _open_complete(path, digests)
        if store is None:
            with _lock(cache / f"{fingerprint}.lock"):
                # By now another process may have built it.
                store = _open_complete(path, digests, forget_damaged=True)
                if store is None:
                    done = _build(source, paths, vocab, path, progress)
                    if _fingerprint(paths, vocab, digests) != fingerprint:
                        (path / "progress.json").unlink()
                        raise ValueError(
                            f"source {source!r} was changed while it was tokenised. "
                            "Start again when it is complete."
                        )
                    _complete(path, done, fingerprint, source, vocab)
                    store = _open_complete(path, digests)
        digests.save()
    if store is None:
        raise OSError(
            f"token store {str(path)!r} was damaged while it was written: the disk "
            "does not return what was written. Choose another cache_dir."
        )
    return store


def _fingerprint(paths: list[Path], vocab: Vocab, digests: "_Digests") -> str:
    content = [(sources.kind(p), digests.of(p)) for p in paths]
    described = json.dumps([VERSION, vocab.fingerprint, vocab.eos_id, content])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _open_complete(
    path: Path, digests: "_Digests", forget_damaged: bool = False
) -> TokenStore | None:
    """The store, or None if it is not complete or damaged."""
    if not (path / "store.json").exists():
        return None
    try:
        meta = json.loads((path / "store.json").read_text())
        size = (path / "c/0").stat().st_size
        expected = meta["n_tokens"] * np.dtype(meta["dtype"]).itemsize
        if size != expected:
            raise ValueError(f"{size} bytes of tokens instead of {expected}")
        crc32 = digests.of(path / "c/0", _crc32)
        if crc32 != meta["crc32"]:
            raise ValueError(f"crc32 of the tokens {crc32} instead of {meta['crc32']}")
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if forget_damaged:
            _log.warning("token store %s is damaged: %s. Rebuilding", path, error)
            (path / "store.json").unlink()
            (path / "progress.json").unlink(missing_ok=True)
        return None
    return TokenStore(path, meta)


def _dtype(vocab: Vocab) -> np.dtype:
    return np.min_scalar_type(vocab.size - 1).newbyteorder("<")


def _build(
    source: str, paths: list[Path], vocab: Vocab, path: Path, progress: bool
) -> dict[str, int]:
    """Tokenises the source into `path`, going on where a killed build stopped."""
    dtype = _dtype(vocab)
    (path / "c").mkdir(parents=True, exist_ok=True)
    done = {"n_documents": 0, "n_tokens": 0, "crc32": 0}
    if (path / "progress.json").exists():
        done = json.loads((path / "progress.json").read_text())
    total = sum(p.stat().st_size for p in paths)
    with (
        open(path / "c/0", "ab") as file,
        tqdm.tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=f"tokenising {source}",
            disable=not progress,
        ) as bar,
    ):
        if file.tell() < done["n_tokens"] * dtype.itemsize:
            raise OSError(
                f"unfinished token store {str(path)!r} is shorter than its progress "
                "file says. Delete the folder and start again."
            )
        file.truncate(done["n_tokens"] * dtype.itemsize)
        committed = time.monotonic()
        texts = sources.documents(
            source, start=done["n_documents"], progress=bar.update
        )
        for batch in _batches(texts):
            tokens = _join(vocab.encode_batch(batch), vocab.eos_id, dtype)
            file.write(tokens.data)
            done = {
                "n_documents": done["n_documents"] + len(batch),
                "n_tokens": done["n_tokens"] + len(tokens),
                "crc32": zlib.crc32(tokens.data, done["crc32"]),
            }
            if time.monotonic() - committed >= COMMIT_SECONDS:
                _commit(file, path, done)
                committed = time.monotonic()
        bar.update(total - bar.n)
        _commit(file, path, done)
    return done


def _complete(
    path: Path, done: dict[str, int], fingerprint: str, source: str, vocab: Vocab
) -> None:
    """Writes the metadata; the last file makes the store complete."""
    _describe_as_zarr(path, done["n_tokens"], _dtype(vocab))
    meta = {
        **done,
        "dtype": _dtype(vocab).str,
        "fingerprint": fingerprint,
        "source": source,
        "vocab": vocab.spec,
        "version": VERSION,
    }
    _write_json(path / "store.json", meta)
    (path / "progress.json").unlink()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Groups documents, so that memory is bounded by a group and one document."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _join(ids: list[np.ndarray], eos_id: int, dtype: np.dtype) -> np.ndarray:
    eos = np.array([eos_id], np.int32)
    parts = [part for document in ids for part in (document, eos)]
    return np.concatenate(parts, dtype=dtype, casting="unsafe")


def _commit(file, path: Path, done: dict[str, int]) -> None:
    file.flush()
    os.fsync(file.fileno())
    _write_json(path / "progress.json", done)


def _describe_as_zarr(path: Path, n_tokens: int, dtype: np.dtype) -> None:
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


def _write_json(path: Path, content: dict) -> None:
    """Replaces the file in one step, after its content is on disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _sha256(file) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(file) -> int:
    crc32 = 0
    while block := file.read(2**22):
        crc32 = zlib.crc32(block, crc32)
    return crc32


class _Digests:
    """Content digests of files, kept while their size, times and inode stay the same.

    Only saves reading large files again at each start. The change time (ctime) cannot
    be set back by a program; a file changed less than 2 s ago is not kept, because a
    further change could fall on the same tick of its clock.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list] = {}
        if path.exists():
            with contextlib.suppress(json.JSONDecodeError):  # only a cache
                self._known = json.loads(path.read_text())
        self._before = dict(self._known)

    def of(self, path: Path, digest=_sha256) -> Any:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            key = f"{digest.__name__} {path.resolve()}"
            *known_state, value = self._known.get(key, [None])
            if known_state != state:
                value = digest(file)
                self._known.pop(key, None)
                if time.time_ns() - stat.st_ctime_ns > 2 * 10**9:
                    self._known[key] = [*state, value]
        return value

    def save(self) -> None:
        if self._known != self._before and os.access(self._path.parent, os.W_OK):
            _write_json(self._path, self._known)


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
        raise OSError(
            error.errno,
            f"token store in cache_dir={str(cache)!r} cannot be written: "
            f"{error.strerror}. Free some space (2 to 4 bytes a token) or choose "
            "another cache_dir; the next start goes on from what was written",
        ) from error
