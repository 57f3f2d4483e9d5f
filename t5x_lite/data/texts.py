"""What counts as text: options of reading, counts, and one rule for broken text.

A document is a string of Unicode characters without NUL. Whatever is not (bytes that
are no UTF-8, a NUL, a lone surrogate from an escape in JSON) is broken, and
`Options.bad_utf8` decides for every kind of source alike:

error: a ValueError that names file and line (or row).
replace: each broken sequence becomes U+FFFD (the maximal-subpart rule of the Unicode
    Standard 15, section 3.9, table 3-8); the document counts as repaired.
skip: the document is left out, and counts as skipped.

Everything else is text and stays as it is: any script, U+2028, form feeds, tabs and
indentation, unnormalised, at any length up to `LONGEST`. Documents of white space only
(`str.isspace`) and missing values (null) are left out and count as empty.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LONGEST = 2**30  # bytes of a document: more is a file of another kind
DOCUMENTS = ("blank_lines", "lines", "files")
BAD_UTF8 = ("error", "replace", "skip")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a source is read.

    Attributes:
        field: of JSONL, Parquet, TFDS and Hugging Face datasets: where the text is.
        documents: of plain text: what a document is. "blank_lines": lines up to a
            blank one; "lines": each line; "files": each file.
        bad_utf8: "error", "replace" or "skip"; see the module.
    """

    field: str = "text"
    documents: str = "blank_lines"
    bad_utf8: str = "error"

    def __post_init__(self):
        for name, allowed in [("documents", DOCUMENTS), ("bad_utf8", BAD_UTF8)]:
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(
                    f"data.{name}={value!r}: allowed are {', '.join(allowed)}."
                )

    @classmethod
    def of(cls, data: Any) -> "Options":
        """Of the keys of the same names in `config.data`."""
        return cls(**{f.name: getattr(data, f.name) for f in dataclasses.fields(cls)})


@dataclasses.dataclass
class Counts:
    """What was read of a file.

    Attributes:
        documents: given out.
        empty: left out: white space only, or null.
        repaired: given out with U+FFFD in place of what was broken.
        skipped: left out because they were broken.
        byte_order_marks: taken from the start of the file (0 or 1).
    """

    documents: int = 0
    empty: int = 0
    repaired: int = 0
    skipped: int = 0
    byte_order_marks: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            *map(sum, zip(*map(dataclasses.astuple, (self, other)), strict=True))
        )

    def __str__(self) -> str:
        """Like "7 documents, 2 empty"; zeros are left out."""
        every = dataclasses.asdict(self)
        documents = every.pop("documents")
        rest = [f"{n} {name.replace('_', ' ')}" for name, n in every.items() if n]
        return ", ".join([f"{documents} documents", *rest])


def clean(
    raw: bytes | str, bad_utf8: str, where: Callable[[], str]
) -> tuple[str | None, bool]:
    """Text that is valid, and whether it was broken; None where it is to be skipped.

    Args:
        where: names the place for the error.
    """
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        if "\0" not in text:
            if not text.isascii():
                text.encode()  # a lone surrogate does not encode
            return text, False
        problem = "a NUL byte: this is a binary file, not text"
    except UnicodeDecodeError as e:
        problem = (
            f"not UTF-8 ({e.reason}, byte {e.object[e.start]:#04x} at {e.start}): a "
            "binary file or another encoding. Convert it (iconv -f latin1 -t utf-8)"
        )
    except UnicodeEncodeError as e:
        problem = f"text that is not valid Unicode ({e})"
    if bad_utf8 == "skip":
        return None, True
    if bad_utf8 == "error":
        raise ValueError(
            f"{where()}: {problem}. data.bad_utf8='replace' puts U+FFFD in the place "
            "of what is broken, 'skip' leaves the document out."
        )
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return _SURROGATE.sub("\ufffd", text).replace("\0", "\ufffd"), True


def cleaned(
    values: Iterable[tuple[bytes | str | None, bool]],
    options: Options,
    counts: Counts,
    where: Callable[[], str],
) -> Iterator[str]:
    """The documents among values; fills `counts`.

    Args:
        values: raw text (None = missing), and whether it was broken before.
        where: names the place of the value that was drawn last.
    """
    for raw, broken in values:
        text, worse = clean(raw or "", options.bad_utf8, where)
        if text is None or (broken and options.bad_utf8 == "skip"):
            counts.skipped += 1
        elif not text or text.isspace():
            counts.empty += 1
        else:
            counts.documents += 1
            counts.repaired += broken or worse
            yield text


def missing_field(where: str, field: str, there: Iterable[str]) -> ValueError:
    """The error of a field that is not there: which are, and which is meant."""
    names = sorted(map(str, there))
    close = difflib.get_close_matches(field, names, n=1)
    guess = f" Did you mean data.field={close[0]!r}?" if close else ""
    return ValueError(f'{where}: no field "{field}"; there are {names}.{guess}')
