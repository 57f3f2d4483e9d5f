"""The documents of one file: plain text, JSON lines, Parquet."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from t5x_lite.data import streams, texts
from t5x_lite.data.streams import File
from t5x_lite.data.texts import Counts, Options

_TELL = 2**18  # bytes of text between two words to the progress bar
_BOM = b"\xef\xbb\xbf"
Progress = Callable[[int], object]


def plain(file: File, options: Options, counts: Counts, progress: Progress):
    """Documents of a text file: blocks between blank lines, lines, or the file.

    A line ends at LF or CR LF, which becomes LF; the ends of a document's last lines
    are left out. A line of white space only is blank.
    """
    number = 0

    def where() -> str:
        return f"source {file.name!r}, line {number}"

    def documents() -> Iterator[tuple[str, bool]]:
        nonlocal number
        block, size, broken = [], 0, False
        for number, raw in enumerate(_lines(file, counts, progress), 1):  # noqa: B007
            line, bad = texts.clean(raw, options.bad_utf8, where)
            line = line or ""
            if line.endswith("\r\n"):
                line = line[:-2] + "\n"
            if options.documents == "lines":
                yield line.rstrip("\r\n"), bad
                continue
            if options.documents == "files" or bad or not line.isspace():
                block.append(line)
                size, broken = size + len(raw), broken or bad
                if size > texts.LONGEST:
                    raise ValueError(f"{streams.too_long(file)}.")
            elif block:
                yield "".join(block).rstrip("\r\n"), broken
                block, size, broken = [], 0, False
        if block or options.documents == "files":
            yield "".join(block).rstrip("\r\n"), broken

    return texts.cleaned(documents(), options, counts, where)


def json_lines(file: File, options: Options, counts: Counts, progress: Progress):
    """Documents of a file of JSON objects, one a line; blank lines are left out."""
    number = 0

    def where() -> str:
        return f"source {file.name!r}, line {number}"

    def values() -> Iterator[tuple[str | None, bool]]:
        nonlocal number
        for number, raw in enumerate(_lines(file, counts, progress), 1):  # noqa: B007
            line, broken = texts.clean(raw, options.bad_utf8, where)
            if line is None:
                yield None, True
            elif not line.isspace():
                yield _field(line, options.field, where), broken

    return texts.cleaned(values(), options, counts, where)


def parquet(file: File, options: Options, counts: Counts, progress: Progress):
    """Documents of a column of a Parquet file, read page by page."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"source {file.name!r}: Parquet needs pyarrow: pip install "
            "'t5x-lite[parquet]'"
        ) from error
    row = -1

    def where() -> str:
        return f"source {file.name!r}, row {row}"

    def values() -> Iterator[tuple[bytes | None, bool]]:
        nonlocal row
        with streams.opened(file) as raw:
            table = parquet.ParquetFile(
                raw,
                # Page by page, instead of a column of a whole row group at once.
                buffer_size=2**20,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            check_column(f"source {file.name!r}", table.schema_arrow, options.field)
            groups = table.num_row_groups
            for group in range(groups):
                for batch in table.iter_batches(
                    64, row_groups=[group], columns=[options.field], use_threads=False
                ):
                    for raw_text in as_bytes(batch.column(0)):
                        row += 1
                        yield raw_text, False
                done = [file.size * g // groups for g in (group, group + 1)]
                progress(done[1] - done[0])

    return texts.cleaned(_arrow_errors(file, values(), where), options, counts, where)


def as_bytes(column: Any) -> Iterator[bytes | None]:
    """Values of a string column of Arrow, undecoded: Arrow does not check UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for value in column.cast(pyarrow.large_binary()):
        yield value.as_py()


def check_column(where: str, schema: Any, field: str) -> None:
    """Raises if an Arrow schema has no string column of that name."""
    import pyarrow

    if field not in schema.names:
        raise texts.missing_field(where, field, schema.names)
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    like = ("is_string", "is_large_string", "is_string_view")
    like += ("is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(pyarrow.types, name)(kind) for name in like):
        raise ValueError(
            f'{where}: field "{field}" holds {kind}, not text. Set data.field to one '
            f"of {sorted(schema.names)}."
        )


def _arrow_errors(file: File, values: Iterator, where: Callable[[], str]) -> Iterator:
    import pyarrow

    try:
        yield from values
    except (pyarrow.ArrowException, OSError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{where()} or after: broken .parquet file ({_first_line(error)}). Copy or "
            "write it again."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _lines(file: File, counts: Counts, progress: Progress) -> Iterator[bytes]:
    """Lines of the text in a file, without its byte order mark."""
    told, unseen, first = 0, 0, True
    with streams.opened(file) as raw:
        for line in streams.lines(file, raw):
            if first and line.startswith(_BOM):
                counts.byte_order_marks += 1
                line = line[len(_BOM) :]
            first = False
            yield line
            unseen += len(line)
            if unseen >= _TELL:
                progress(raw.tell() - told)
                told, unseen = raw.tell(), 0
        progress(raw.tell() - told)


def _field(line: str, field: str, where: Callable[[], str]) -> str | None:
    like = f'A line must be like {{"{field}": "..."}}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        # Not only JSONDecodeError: an integer of too many digits, too deep a nesting.
        raise ValueError(f"{where()}: not JSON ({error}). {like}.") from error
    if isinstance(record, dict) and field in record:
        value = record[field]
        if value is None or isinstance(value, str):
            return value
        raise ValueError(
            f'{where()}: no field "{field}" that is a string, it is a '
            f"{type(value).__name__}; the line holds {sorted(record)}. {like}."
        )
    if isinstance(record, dict):
        raise texts.missing_field(where(), field, record)
    raise ValueError(
        f'{where()}: no field "{field}"; the line holds {type(record).__name__}. '
        f"{like}."
    )
