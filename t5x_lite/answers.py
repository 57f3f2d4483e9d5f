"""The JSONL files of `generate`: texts in, and answers out that a kill cannot spoil.

Answers are appended in the order of the texts. Beside them FILE.about.json says what
they are of; the same command goes on where an interrupted one stopped, and what would
mix answers of different texts, models or settings is refused.
"""

import fcntl
import hashlib
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from t5x_lite.prompts import Filled


class Text(NamedTuple):
    """A text to fill or continue: where it stands, and the id it came with, if any."""

    text: str
    where: str = "the text"
    id: Any = None


def read(path: str, field: str) -> list[Text]:
    """The texts of a file, one a line; blank lines are skipped.

    Args:
      path: .jsonl: an object a line with a string `field` and perhaps an `id`; any
        other name: the line is the text.

    Raises:
      FileNotFoundError, ValueError: naming the file and the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--input={path}: there is no such file.")
    try:
        whole = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"--input={path} is not UTF-8 text: {e}.") from e
    texts = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--input={path}, line {number}"
        if path.endswith(".jsonl"):
            texts.append(_of_object(line, field, where))
        else:
            texts.append(Text(line, where))
    if not texts:
        raise ValueError(f"--input={path} is empty. Put one text on a line.")
    return texts


def _of_object(line: str, field: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{where} is no JSON: {e}. Put an object with {field!r} on each line, or "
            "give plain lines in a file of another name than .jsonl."
        ) from e
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where} has no string {field!r}, but {found}. Name the field with "
            "--field=NAME."
        )
    return Text(row[field], where, row.get("id"))


def digest(path: str) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row(text: Text, found: Filled) -> dict:
    """What is written of a text; with several answers the others follow the first."""

    def one(found: Filled) -> dict:
        score = found.score if math.isfinite(found.score) else None
        return dict(filled=found.joined(""), fills=found.fills, score=score)

    made = {} if text.id is None else dict(id=text.id)
    made |= dict(text=text.text, **one(found))
    if found.others:
        made["others"] = [one(other) for other in found.others]
    return made


class Answers:
    """An open file of answers; `done` of them are there already.

    Args:
      path: of the .jsonl file; its directory must exist.
      about: what the answers are of, JSON by the name of the flag that sets it.
      total: how many there will be.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: if there is no such directory, or
        a file that this command did not begin, or began with something else.
    """

    def __init__(self, path: str, about: dict[str, Any], total: int):
        self.path, beside = pathlib.Path(path), pathlib.Path(f"{path}.about.json")
        check_directory(path)
        begun = beside.is_file()
        if self.path.exists() and not begun and self.path.stat().st_size:
            raise FileExistsError(
                f"--output={path} exists, but not {beside.name}, which would say what "
                "it is of. Remove it, or give another --output."
            )
        about = json.loads(json.dumps(about))
        if begun and self.path.exists():
            _check_same(path, json.loads(beside.read_text("utf-8")), about)
        # Locked first: the file of another that is running is left alone.
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._file.close()
            raise ValueError(
                f"--output={path} is being written by another process. Wait for it, or "
                "give another --output."
            ) from e
        temporary = pathlib.Path(f"{beside}.tmp")
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
        os.replace(temporary, beside)
        self.done = self._whole_lines()
        if self.done > total:
            self.close()
            raise ValueError(
                f"--output={path} holds {self.done} answers to {total} texts. Remove "
                "it, or give another --output."
            )

    def _whole_lines(self) -> int:
        """Drops the line that a kill has torn."""
        self._file.seek(0)
        count = end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def append(self, rows: list[dict]) -> None:
        """Adds whole lines, which are on the disk when this returns."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self._file.write("".join(lines).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(rows)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_directory(path: str) -> None:
    """Refuses an --output in a directory that is not there."""
    if not pathlib.Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={path}: its directory is missing.")


def _check_same(path: str, before: dict, now: dict) -> None:
    changed = sorted(k for k in before | now if before.get(k) != now.get(k))
    if changed:
        said = ", ".join(f"{k}={before.get(k)!r} (now {now.get(k)!r})" for k in changed)
        raise ValueError(
            f"--output={path} was begun with other settings: {said}. Give the same "
            "ones to go on with it (--step=N for an earlier checkpoint); to begin "
            f"anew, remove it and {pathlib.Path(path).name}.about.json or give another "
            "--output."
        )
