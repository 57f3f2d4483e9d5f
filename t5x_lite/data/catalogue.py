"""Data sets by name: TFDS, without TensorFlow where it can be, and Hugging Face."""

import functools
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5x_lite.data import readers, texts
from t5x_lite.data.streams import File
from t5x_lite.data.texts import Counts, Options

ROWS = 2**16  # of a Hugging Face data set that count as one file
AT_ONCE = 64  # rows held in memory
_SYNTAX = {
    "tfds": "tfds:NAME[/CONFIG][:VERSION]:SPLIT or tfds:FOLDER:SPLIT, such as "
    "tfds:wikipedia/20230601.en:train[:10%]",
    "hf": "hf:ORG/NAME[/CONFIG]:SPLIT or hf:FOLDER[:SPLIT], such as "
    "hf:allenai/c4/en:validation",
}


def tfds_files(spec: str) -> list[File]:
    """A file for each shard of a split of a data set that is prepared on disk.

    Its content and `identity`, the rows of the shard that the split takes, tell
    whether it has changed.
    """
    name, split = _name_and_split(spec)
    builder = _tfds_builder(spec, name)
    info, folder = builder.info, str(builder.data_path)
    format = info.file_format.value
    if format not in ("array_record", "tfrecord"):
        raise ValueError(
            f"source {spec!r}: files of format {format!r} are not read (the Parquet of "
            f"TFDS loses rows). {_prepare(builder)}"
        )
    if format == "tfrecord":
        _tensorflow(spec, builder)
    try:
        shards = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"source {spec!r}: {_first_line(error)} Splits: {sorted(info.splits)}, "
            f"each also with [10%:20%] or [100:200]."
        ) from error
    ends = list(itertools.accumulate(shard.take for shard in shards))
    return [
        File(
            name=f"{spec}, shard {Path(shard.filename).name}",
            kind="tfds",
            size=Path(shard.filename).stat().st_size
            * shard.take
            // max(shard.examples_in_shard, 1),
            path=Path(shard.filename),
            identity=f"rows {shard.skip} to {shard.skip + shard.take}",
            location=folder,
            split=split,
            rows=(end - shard.take, end),
            skip=shard.skip,
        )
        for shard, end in zip(shards, ends, strict=True)
    ]


def tfds_rows(
    file: File, options: Options, counts: Counts, progress: readers.Progress
) -> Iterator[str]:
    """Documents of one shard."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(file.location)
    fields = list(builder.info.features or ())
    if options.field not in fields:
        raise texts.missing_field(f"source {file.name!r}", options.field, fields)
    if builder.info.file_format.value == "tfrecord":
        batches = _tfrecords(builder, file)
    else:
        source = builder.as_data_source(split=file.split)
        batches = (
            source.__getitems__(range(at, min(at + AT_ONCE, file.rows[1])))
            for at in range(*file.rows, AT_ONCE)
        )
    return _documents(file, batches, options, counts, progress)


def hf_files(spec: str) -> list[File]:
    """A file for each `ROWS` rows of a split; downloads what is not there yet.

    `identity` is the fingerprint that `datasets` gives the data set, and the rows.
    """
    _hf_load.cache_clear()  # what changed since is another data set
    location, split = _hf_place(spec)
    table = _hf_load(spec, location, split)
    size = sum(Path(f["filename"]).stat().st_size for f in table.cache_files)
    return [
        File(
            name=f"{spec}, rows {start} to {min(start + ROWS, len(table))}",
            kind="hf",
            size=size * (min(start + ROWS, len(table)) - start) // len(table),
            identity=f"{table._fingerprint} of {len(table)} rows from {start}",
            location=spec,
            rows=(start, min(start + ROWS, len(table))),
        )
        for start in range(0, len(table), ROWS)
    ]


def hf_rows(
    file: File, options: Options, counts: Counts, progress: readers.Progress
) -> Iterator[str]:
    """Documents of a range of rows."""
    table = _hf_load(file.location, *_hf_place(file.location))
    where = f"source {file.name!r}"
    readers.check_column(where, table.features.arrow_schema, options.field)
    arrow = table.select_columns([options.field]).with_format("arrow")
    batches = (
        [
            {options.field: value}
            for value in readers.as_bytes(
                arrow[at : min(at + AT_ONCE, file.rows[1])].column(0)
            )
        ]
        for at in range(*file.rows, AT_ONCE)
    )
    return _documents(file, batches, options, counts, progress)


def _documents(
    file: File,
    batches: Iterator[list[dict]],
    options: Options,
    counts: Counts,
    progress: readers.Progress,
) -> Iterator[str]:
    first, end = file.rows
    row = first - 1

    def where() -> str:
        return f"source {file.name!r}, row {row}"

    def values() -> Iterator[tuple[Any, bool]]:
        nonlocal row
        for batch in batches:
            for record in batch:
                row += 1
                value = record[options.field]
                if value is not None and not isinstance(value, bytes | str):
                    raise ValueError(
                        f'{where()}: field "{options.field}" holds '
                        f"{type(value).__name__}, not text. Set data.field to one of "
                        f"{sorted({*record} - {options.field})}."
                    )
                yield value, False
            done = [
                n * file.size // (end - first) for n in (row + 1 - len(batch), row + 1)
            ]
            progress(done[1] - done[0])

    def clear_errors() -> Iterator[tuple[Any, bool]]:
        try:
            yield from values()
        except ValueError as error:
            if str(error).startswith("source "):
                raise
            raise _broken(where(), error) from error
        except Exception as error:  # of array_record, TensorFlow, Arrow
            raise _broken(where(), error) from error
        if row + 1 != end:
            raise _broken(where(), EOFError(f"{end} rows were promised"))

    return texts.cleaned(clear_errors(), options, counts, where)


def _broken(where: str, error: Exception) -> ValueError:
    return ValueError(
        f"{where} or after: the data set is broken ({_first_line(error)}). Prepare it "
        "again."
    )


def _name_and_split(spec: str) -> tuple[str, str]:
    """The split is what stands after the last colon outside of [10%:20%]."""
    catalogue, _, rest = spec.partition(":")
    cut = rest.partition("[")[0].rfind(":")
    if cut < 1 or cut == len(rest) - 1:
        raise ValueError(f"source {spec!r} is not of the form {_SYNTAX[catalogue]}.")
    return rest[:cut], rest[cut + 1 :]


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _prepare(builder: Any) -> str:
    name = "/".join(filter(None, [builder.info.name, builder.info.config_name]))
    return (
        'Prepare it: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    )


def _tfds_builder(spec: str, name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"source {spec!r} needs TFDS: pip install 't5x-lite[tfds]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(str(folder))
        else:
            builder = tfds.builder(name)
    except Exception as error:  # each builder of the catalogue has its own
        raise ValueError(
            f"source {spec!r}: TFDS finds no data set {name!r} ({_first_line(error)}). "
            f"Allowed: {_SYNTAX['tfds']}; folders are sought in TFDS_DATA_DIR, else in "
            "~/tensorflow_datasets."
        ) from error
    if not builder.info.splits:
        raise ValueError(
            f"source {spec!r} is not prepared in {str(builder.data_path)!r}, and "
            f"nothing is downloaded here. {_prepare(builder)}, or set TFDS_DATA_DIR to "
            "where it is."
        )
    return builder


def _tensorflow(spec: str, builder: Any) -> Any:
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise ValueError(
            f"source {spec!r}: its files are TFRecords, which only TensorFlow reads: "
            f"pip install tensorflow-cpu, or without it: {_prepare(builder)}"
        ) from error


def _tfrecords(builder: Any, file: File) -> Iterator[list[dict]]:
    """The rows of a shard of TFRecords."""
    tf = _tensorflow(file.name, builder)
    records = tf.data.TFRecordDataset(str(file.path)).skip(file.skip)
    records = records.take(file.rows[1] - file.rows[0]).as_numpy_iterator()
    while batch := list(itertools.islice(records, AT_ONCE)):
        yield [builder.info.features.deserialize_example_np(r) for r in batch]


def _hf_place(spec: str) -> tuple[str, str]:
    """Folder or name, and the split."""
    rest = spec.removeprefix("hf:")
    if Path(rest).expanduser().is_dir():
        return str(Path(rest).expanduser()), ""
    location, split = _name_and_split(spec)
    return str(Path(location).expanduser()), split


@functools.lru_cache(maxsize=8)
def _hf_load(spec: str, location: str, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"source {spec!r} needs Hugging Face datasets: "
            "pip install 't5x-lite[datasets]'"
        ) from error
    try:
        if Path(location).is_dir():
            table = datasets.load_from_disk(location, keep_in_memory=False)
            if isinstance(table, datasets.DatasetDict) and split in table:
                table = table[split]
            elif isinstance(table, datasets.DatasetDict) or split:
                there = list(table) if isinstance(table, dict) else "none"
                raise ValueError(f"no split {split!r}, there are {there}")
            return table
        parts = location.split("/")
        path, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
        return datasets.load_dataset(path, config, split=split, keep_in_memory=False)
    except Exception as error:  # of the hub, of Arrow, of the network
        raise ValueError(
            f"source {spec!r}: datasets cannot load it ({type(error).__name__}: "
            f"{_first_line(error)}). Allowed: {_SYNTAX['hf']}."
        ) from error
