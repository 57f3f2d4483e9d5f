"""Which texts came before: digests in a table on disk, so that memory stays bounded."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

MODULUS = 2**128
_CACHE_MIB = 64
_OF_THE_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_BUSY,
)


def digest(text: str) -> bytes:
    """16 bytes; two of 10^12 different texts share theirs with probability 10^-15."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Seen:
    """The digests of all documents read so far, with the number of each.

    Goes hand in hand with a file of progress: `commit` comes before it is written, and
    `Seen(path, ...)` forgets documents that came after what it says.

    Args:
        path: of the table; made if missing and nothing was read yet.
        n_read: documents read so far.
        n_kept: those of them that were new.
        total: sum of what `add` returned for them, modulo `MODULUS`.

    Raises:
        ValueError: the table is not that of these documents.
        OSError: the disk is full or does not answer.
    """

    def __init__(self, path: Path, n_read: int, n_kept: int, total: int):
        self._path, self._number = path, n_read
        if not n_read:
            remove(path)
        elif not path.exists():
            raise ValueError("the table of digests is missing")
        with self._errors():
            self._table = sqlite3.connect(path)
            try:
                self._prepare(n_kept, total)
            except BaseException:
                self._table.close()
                raise

    def _prepare(self, n_kept: int, total: int):
        # A rollback journal with full synchronisation: what is committed stays.
        for setting in ("journal_mode=DELETE", "synchronous=FULL"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute(f"PRAGMA cache_size=-{_CACHE_MIB * 1024}")
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS seen"
            "(digest BLOB PRIMARY KEY, document INTEGER) WITHOUT ROWID"
        )
        self._table.execute("DELETE FROM seen WHERE document >= ?", (self._number,))
        rows = found = 0
        (order,) = self._table.execute("PRAGMA quick_check(1)").fetchone()
        if order == "ok":
            for (key,) in self._table.execute("SELECT digest FROM seen"):
                found += int.from_bytes(key) if isinstance(key, bytes) else 0
                rows += 1
        if (rows, found % MODULUS) != (n_kept, total):
            raise ValueError("the table of digests is not as it was written")

    def add(self, text: str) -> int:
        """Counts the next document; its digest if the text is new, else 0."""
        key = digest(text)
        with self._errors():
            done = self._table.execute(
                "INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, self._number)
            )
        self._number += 1
        return int.from_bytes(key) if done.rowcount == 1 else 0

    def commit(self):
        with self._errors():
            self._table.commit()

    def close(self):
        self._table.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            about = f"the table of digests {str(self._path)!r}: {error}"
            if error.sqlite_errorcode & 0xFF in _OF_THE_DISK:
                raise OSError(
                    f"{about}. Is the disk full? The next start goes on from what was "
                    "written."
                ) from error
            raise ValueError(f"{about}; the next start makes it anew.") from error


def remove(path: Path):
    for name in (path.name, f"{path.name}-journal"):
        path.with_name(name).unlink(missing_ok=True)
