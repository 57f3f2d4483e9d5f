"""Small sources of every kind for tests."""

import functools
import gzip
import json
import lzma

import pyarrow
import zstandard
from pyarrow import parquet

from t5x_lite.data import sources
from t5x_lite.data.texts import Counts, Options

TEXTS = [
    "One line.",
    "Two\nlines — ünïcode",
    "def f(x):\n\tif x:\n        return '\\n'  # code stays as it is",
    "日本語のテキスト、العربية, עברית, हिन्दी, ไทย, 😀👩‍👩‍👧, e\u0301",
    "a\u2028b\u2029c\x0bd\x0ce\x85f",  # line ends of Unicode, not of files
]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def as_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def read(spec, **options):
    """All documents of a source, and what was counted over its files."""
    counts = {}
    found = list(
        sources.documents(str(spec), options=Options(**options), counts=counts)
    )
    return found, functools.reduce(Counts.__add__, counts.values())


def write(path, content):
    path.write_bytes(content)
    return str(path)


def write_parquet(path, values, field="text", kind=None, **options):
    table = pyarrow.table(
        {"id": range(len(values)), field: pyarrow.array(values, kind)}
    )
    parquet.write_table(table, path, **options)
    return str(path)
