"""Files, local or remote, found by path or glob and opened as streams of lines."""

import contextlib
import glob
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from t5x_lite.data import texts

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".xz", ".zst")
ALLOWED = "Allowed: .txt or .jsonl, each also with .gz, .xz or .zst added, .parquet."
# Where fsspec's driver comes from that it does not bring itself.
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
EXTRAS |= {"http": "http", "https": "http"}
# What a remote file's listing may tell of its content, the surest first.
_CONTENT = ("md5Hash", "crc32c", "ETag", "etag", "checksum", "content_md5")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_MAGIC = {
    b"\x1f\x8b": "gzip: call it .gz",
    b"\xfd7zXZ\0": "xz: call it .xz",
    b"\x28\xb5\x2f\xfd": "zstd: call it .zst",
    b"PAR1": "Parquet: call it .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xfe": "UTF-16 or UTF-32: convert it (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16: convert it (iconv -f utf-16 -t utf-8)",
}


@dataclass(frozen=True)
class File:
    """A piece of a source that is read from its start: mostly a file.

    Attributes:
        name: for people: path, URL, or dataset with shard or rows.
        kind: of `KINDS`, "tfds" or "hf".
        size: about how many bytes will be read, for a progress bar.
        path: of a local file, whose content tells whether it has changed.
        identity: what else tells that: of a remote file its checksum, or size and time.
        location: URL or folder from which it is read.
        split: of a dataset.
        rows: of the split, [from, to).
        skip: rows of a shard before its first in the split.
    """

    name: str
    kind: str
    size: int = 0
    path: Path | None = None
    identity: str = ""
    location: str = ""
    split: str = ""
    rows: tuple[int, int] = (0, 0)
    skip: int = 0

    @property
    def compression(self) -> str:
        """ ".gz", ".xz", ".zst" or ""."""
        name = self.location if self.path else self.location.partition("?")[0]
        suffix = PurePosixPath(name).suffix
        return suffix if suffix in COMPRESSED else ""


def kind(name: str, options: texts.Options) -> str:
    """Of `KINDS`, whatever the compression; with documents="files" all is .txt."""
    suffixes = PurePosixPath(name).suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        suffixes = [s for s in suffixes[-1:] if s != ".parquet"]
    if suffixes and suffixes[-1] in KINDS:
        return suffixes[-1]
    if options.documents == "files":
        return ".txt"
    raise ValueError(f"source {name!r}: unknown kind of file. {ALLOWED}")


def local(spec: str, options: texts.Options) -> list[File]:
    """The files that a path or glob names, sorted."""
    found = [spec] if Path(spec).exists() else sorted(glob.glob(spec, recursive=True))
    paths = [Path(p) for p in found if not Path(p).is_dir()]
    if not paths:
        if found:
            raise _is_folder(spec)
        raise FileNotFoundError(
            f"source {spec!r}: no such file, and as a glob it matches none. "
            f"Paths are relative to {str(Path.cwd())!r}. {ALLOWED}"
        )
    files = []
    for path in paths:
        what = kind(str(path), options)
        size = path.stat().st_size
        identity = "lf" if what == ".txt" else ""  # once CR LF stayed as it was
        files.append(File(str(path), what, size, path, identity, str(path)))
    return files


def remote(spec: str, options: texts.Options) -> list[File]:
    """The files that a URL names, with * and ** where the server lists its files."""
    fs, path = _filesystem(spec)
    protocol = spec.partition("://")[0]
    try:
        fs.invalidate_cache()
        if protocol in ("http", "https") or not glob.has_magic(path):
            found = {path: fs.info(path)}
        else:
            found = fs.glob(path, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each driver has its own
        raise _remote_error(spec, error) from error
    infos = {p: found[p] for p in sorted(found) if found[p]["type"] != "directory"}
    if not infos:
        if found:
            raise _is_folder(spec)
        raise FileNotFoundError(f"source {spec!r}: no file there, none that matches.")
    files = []
    for path, info in infos.items():
        url = spec if protocol.startswith("http") else fs.unstrip_protocol(path)
        clear = url.partition("?")[0] if protocol.startswith("http") else url
        size = int(info.get("size") or 0)
        identity = _identity(info) or _read_through(fs, path, url)
        files.append(
            File(url, kind(clear, options), size, None, f"{size} {identity}", url)
        )
    return files


@contextlib.contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """The bytes of a file as they lie there, still compressed."""
    if file.path:
        with open(file.path, "rb") as raw:
            yield raw
        return
    fs, path = _filesystem(file.location)
    try:
        stream = fs.open(path, "rb", cache_type="readahead")
    except Exception as error:
        raise _remote_error(file.name, error) from error
    with stream:
        yield io.BufferedReader(stream, 2**20)  # type: ignore[arg-type]


def lines(file: File, raw: IO[bytes]) -> Iterator[bytes]:
    """The lines of an opened text file, each with its end; only LF ends a line."""
    number = 0
    try:
        stream = _decompressed(file.compression, raw)
        while line := stream.readline(texts.LONGEST + 1):
            number += 1
            if len(line) > texts.LONGEST:
                raise ValueError(f"{too_long(file)} (line {number}).")
            if number == 1:
                _refuse_other_kinds(file, line)
            yield line
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, _Broken) as error:
        raise ValueError(
            f"source {file.name!r}, after line {number}: broken {file.compression} "
            f"file ({error}). Copy or compress it again."
        ) from error
    except ValueError:
        raise
    except Exception as error:  # of a disk, or a remote driver
        raise OSError(
            f"source {file.name!r}, after line {number}: cannot be read on "
            f"({type(error).__name__}: {error})."
        ) from error


def too_long(file: File) -> str:
    return (
        f"source {file.name!r}: a document of more than {texts.LONGEST:,} bytes. Is it "
        "one? Set data.documents, or bring the text into lines of JSON"
    )


class _Broken(Exception):
    """Of a zstd file."""


class _Zstd(io.RawIOBase):
    """All frames of a zstd stream.

    The library's own reader takes the end of a cut file for the end of the text.
    """

    # A block of 4 bytes may stand for 128 KiB: a chunk of zeros for 64 MiB.
    CHUNK = 2048

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw, self._ready, self._frame = raw, memoryview(b""), None
        self._error = zstandard.ZstdError
        self._start = lambda: zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(self.CHUNK)
            if not chunk:
                if self._frame:
                    raise _Broken("it ends within a frame")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            self._frame = self._frame or self._start()
            try:
                parts.append(self._frame.decompress(chunk))
            except self._error as error:
                raise _Broken(str(error)) from error
            chunk = b""
            if self._frame.eof:
                chunk, self._frame = self._frame.unused_data, None
        return b"".join(parts)


def _decompressed(compression: str, raw: IO[bytes]) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".xz":
        return lzma.open(raw, format=lzma.FORMAT_XZ)
    if compression == ".zst":
        return io.BufferedReader(_Zstd(raw), 2**17)
    return raw


def _refuse_other_kinds(file: File, line: bytes) -> None:
    for magic, what in _MAGIC.items():
        if line.startswith(magic):
            raise ValueError(f"source {file.name!r}: not text but {what}. {ALLOWED}")


def _is_folder(spec: str) -> ValueError:
    return ValueError(
        f"source {spec!r} is a folder. Name its files: '{spec}/*.jsonl'. {ALLOWED}"
    )


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        way = f"pip install 't5x-lite[{extra}]'" if extra else str(error)
        raise ValueError(
            f"source {url!r}: the driver of {protocol}:// is missing. {way}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"source {url!r}: {protocol}:// is not known ({error}). Known are a path, "
            "gs://, s3://, http(s)://, memory:// and what else fsspec has a driver for."
        ) from error
    except Exception as error:  # credentials, region: each driver has its own
        raise _remote_error(url, error) from error


def _remote_error(name: str, error: Exception) -> OSError:
    return OSError(f"source {name!r}: {type(error).__name__}: {error}")


def _identity(info: dict) -> str:
    for keys in (_CONTENT, _TIMES):
        if found := [f"{key}={info[key]}" for key in keys if info.get(key)]:
            return found[0]
    return ""


def _read_through(fs: Any, path: str, name: str) -> str:
    """A server that tells neither checksum nor time: the content itself."""
    try:
        with fs.open(path, "rb") as stream:
            return f"sha256={hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except Exception as error:
        raise _remote_error(name, error) from error
