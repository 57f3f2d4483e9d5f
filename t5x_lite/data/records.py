"""Small files that say what lies in large ones: checked, and replaced in one stroke."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from t5x_lite import workdir


def write(path: Path, content: dict[str, Any]):
    """Replaces a JSON file; it holds a checksum of its content."""
    held = {**content, "checksum": _checksum(content)}
    workdir.replace(path, json.dumps(held, indent=1))


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as it was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not an object")
    stored = content.pop("checksum", None)
    if stored != _checksum(content):
        raise ValueError(
            f"{path.name} is not as it was written, or by an earlier version: checksum "
            f"{_checksum(content)} instead of {stored}"
        )
    return content


def _checksum(content: dict[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256(file)


def sha256(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class Digests:
    """Content digests of files, kept while their size, times and inode stay the same.

    Only saves reading large files again at each start. The change time (ctime) cannot
    be set back by a program; a file changed less than 2 s ago is not kept, because a
    further change could fall on the same tick of its clock.

    Args:
        path: where they are kept.
        again: trust none of them.
    """

    def __init__(self, path: Path, again: bool = False):
        self._path = path
        self._known: dict[str, list] = {}
        if path.exists() and not again:
            # Only a cache: what cannot be read is made again.
            with contextlib.suppress(ValueError, RecursionError):
                self._known = read(path)
        self._before = dict(self._known)

    def of(self, path: Path, digest: Callable[[IO[bytes]], Any] = sha256) -> Any:
        """The digest of a file; anything that JSON holds.

        Args:
            digest: reads the open file; known by its name.
        """
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

    def save(self):
        if self._known == self._before or not os.access(self._path.parent, os.W_OK):
            return
        # Many processes may do so at once: each has its own file until then.
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        write(part, self._known)
        os.replace(part, self._path)
