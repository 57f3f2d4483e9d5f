"""Files of labelled examples -> records, checked: the published layouts of tasks.

A record is a dict of what one example holds, under the names that `data/tasks.py` uses.
Every error names file, line and column, what stands there and what is allowed.
"""

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec

SPLITS = ("train", "dev", "test")
SHARES = 10  # of a file without official splits one tenth each is dev and test
_LISTS = ("words", "tags")
_OTHERS = ("label", "answers", "entities", "place")  # fields that are not plain text


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task's examples lie and how they are split.

    A split without a file of its own is a tenth of `train`, drawn by the hash of what
    `unit` names, so that it is the same everywhere and equal texts stay together.

    Attributes:
        layout: a key of `READERS`.
        train, dev, test: paths below `config.data.task_dir` ("" = a tenth of `train`,
            None = there is none with labels).
        fields: our name -> the file's column, or dotted field of a JSON object.
        header: column names of a file that has no line of them.
        labels: the file's label -> ours; empty = as they are.
        unit: our fields that decide the split; or "fold": the number of cvNNN in `id`.
        short_lines: lines with too few columns are skipped, as the benchmark's own
            readers do.
    """

    layout: str
    train: str
    dev: str | None = ""
    test: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    header: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unit: tuple[str, ...] = ()
    short_lines: bool = False


def read(source: Source, folder: str, split: str) -> list[dict[str, Any]]:
    """The records of one split, in the order of the file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a file that is not as published, or a split that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: allowed are {', '.join(SPLITS)}.")
    name = getattr(source, split)
    if name is None:
        raise ValueError(
            f"{source.train!r} is published without a labelled {split} split. Use "
            f"{', '.join(s for s in SPLITS if getattr(source, s) is not None)}."
        )
    path = _path(folder, name or source.train)
    records = [
        _record(source, *found) for found in READERS[source.layout](path, source)
    ]
    if not records:
        raise ValueError(f"{path}: no example. Is it the file as published?")
    drawn = [s for s in ("dev", "test") if getattr(source, s) == ""]
    if not drawn or (name and split != "train"):
        return records
    kept = [r for r in records if _split_of(r, source, drawn) == split]
    if not kept:
        raise ValueError(
            f"{path}: of its {len(records)} examples none falls into {split}. Give "
            "more examples, or a file for each split."
        )
    return kept


def _split_of(record: dict[str, Any], source: Source, drawn: list[str]) -> str:
    """Of each ten parts the first is dev, the second test, if these are drawn."""
    if source.unit == ("fold",):
        found = re.match(r"cv(\d)\d\d", record["id"])
        if not found:
            raise ValueError(
                f"{source.train!r}: id {record['id']!r} does not begin with cvNNN, "
                "which says the fold."
            )
        part = 9 - int(found[1])  # the last folds are held out
    else:
        names = source.unit or sorted(source.fields)
        text = "\n".join(str(record[name]) for name in names)
        part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % SHARES
    return dict(enumerate(drawn)).get(part, "train")


def _path(folder: str, name: str) -> str:
    if "://" in name or name.startswith("/") or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}"


def _record(source: Source, where: str, found: dict[str, Any]) -> dict[str, Any]:
    """Checks one record; its label becomes ours."""
    for name, value in found.items():
        if name == "value":
            try:
                found[name] = float(value)
            except (TypeError, ValueError) as e:
                raise ValueError(f"{where}, {name}: {value!r} is no number.") from e
        elif name in _LISTS:
            if not isinstance(value, list) or not all(
                isinstance(v, str) and v for v in value
            ):
                raise ValueError(
                    f"{where}, {name}: {str(value)[:60]!r}; allowed is a list of words."
                )
        elif name not in _OTHERS and not isinstance(value, str):
            raise ValueError(f"{where}, {name}: {value!r}; allowed is a string.")
    if source.labels:
        raw = str(found["label"])
        if raw not in source.labels:
            raise ValueError(
                f"{where}, column {source.fields.get('label', 'label')!r}: label "
                f"{raw[:40]!r}; allowed is one of {sorted(source.labels)}."
            )
        found["label"] = source.labels[raw]
    elif "label" in found:
        found["label"] = str(found["label"])
    return found


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, compressed or not (.xz, .gz, .zst)."""
    number = 0
    try:
        with fsspec.open(
            path, "rt", encoding="utf-8-sig", compression="infer", newline=""
        ) as f:
            for number, line in enumerate(f, 1):  # noqa: B007
                yield number, line
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{path}: there is no such file. config.data.task_dir (of `evaluate`: "
            "--task_dir) is the folder of the task's files; t5x_lite/data/tasks.py "
            "lists their names."
        ) from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}, after line {number}: not UTF-8 ({e}).") from e
    except (EOFError, OSError) as e:
        raise ValueError(
            f"{path}, after line {number}: cannot be read ({e}). Is it complete?"
        ) from e


def _tsv(path: str, source: Source):
    return _table(path, source, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv(path: str, source: Source):
    return _table(path, source, delimiter=",", strict=True)


def _table(path: str, source: Source, **dialect):
    numbered = _lines(path)
    # A quoted field may hold line breaks: the reader then asks for more lines.
    rows = csv.reader((line for _, line in numbered), **dialect)
    header = list(source.header)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not header:
                header = row
                _check_columns(path, header, source)
                continue
            if not row:
                continue
            if len(row) != len(header):
                if source.short_lines and len(row) < len(header):
                    continue
                raise ValueError(
                    f"{where}: {len(row)} columns; allowed is {len(header)} "
                    f"({', '.join(header)})."
                )
            named = dict(zip(header, row, strict=True))
            yield where, {ours: named[theirs] for ours, theirs in source.fields.items()}
    except csv.Error as e:
        raise ValueError(f"{path}, line {rows.line_num}: {e}.") from e


def _check_columns(path: str, header: list[str], source: Source):
    missing = [c for c in source.fields.values() if c not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {missing[0]!r}; the columns there are: "
            f"{', '.join(header)[:200]}. Needed: {', '.join(source.fields.values())}."
        )


def _objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{where}: not JSON ({e}).") from e
        if not isinstance(found, dict):
            raise ValueError(f"{where}: {type(found).__name__}; allowed is an object.")
        yield where, found


def _jsonl(path: str, source: Source):
    for where, found in _objects(path):
        yield (
            where,
            {
                ours: _get(found, theirs, where)
                for ours, theirs in source.fields.items()
            },
        )


def _get(found: Any, name: str, where: str, kind: type | None = None) -> Any:
    """A dotted field of an object; of type `kind`, if given."""
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            held = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"{where}: no field {name!r}; there is: {held[:200]}.")
        found = found[part]
    if kind is not None and not isinstance(found, kind):
        raise ValueError(
            f"{where}, field {name!r}: {type(found).__name__}; allowed is "
            f"{kind.__name__}."
        )
    return found


def _multirc(path: str, source: Source):
    """A record for each answer of each question."""
    for number, (where, found) in enumerate(_objects(path)):
        text = _get(found, "passage.text", where, str)
        for q, question in enumerate(_get(found, "passage.questions", where, list)):
            for answer in _get(question, "answers", where, list):
                yield (
                    where,
                    {
                        "paragraph": text,
                        "question": _get(question, "question", where, str),
                        "answer": _get(answer, "text", where, str),
                        "label": _get(answer, "label", where),
                        "group": f"{number}/{q}",
                    },
                )


def _record_qa(path: str, source: Source):
    """ReCoRD: a record for each query; entities are character ranges, ends included."""
    for where, found in _objects(path):
        text = _get(found, "passage.text", where, str)
        entities = [
            text[_get(e, "start", where, int) : _get(e, "end", where, int) + 1]
            for e in _get(found, "passage.entities", where, list)
        ]
        for qa in _get(found, "qas", where, list):
            answers = [
                _get(a, "text", where, str) for a in _get(qa, "answers", where, list)
            ]
            yield (
                where,
                {
                    "passage": text,
                    "query": _get(qa, "query", where, str),
                    "entities": list(dict.fromkeys(entities)),
                    "answers": list(dict.fromkeys(answers)),
                },
            )


def _squad(path: str, source: Source):
    """SQuAD 1.1 and 2.0, XQuAD: a record for each question.

    Raises:
        ValueError: an answer that does not stand in its context where it says.
    """
    try:
        found = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e}).") from e
    for article in _get(found, "data", path, list):
        for paragraph in _get(article, "paragraphs", path, list):
            context = _get(paragraph, "context", path, str)
            questions = _get(paragraph, "qas", path, list)
            for qa in questions:
                where = f"{path}, question {_get(qa, 'id', path, str)}"
                answers = [
                    (
                        _get(a, "text", where, str),
                        _get(a, "answer_start", where, int),
                    )
                    for a in _get(qa, "answers", where, list)
                ]
                for text, start in answers:
                    if context[start : start + len(text)] != text:
                        raise ValueError(
                            f"{where}: at character {start} of the context stands "
                            f"{context[start : start + len(text)][:40]!r}, not the "
                            f"answer {text[:40]!r}."
                        )
                yield (
                    where,
                    {
                        "id": qa["id"],
                        "question": _get(qa, "question", where, str),
                        "context": context,
                        "answers": answers,
                        # The same in all languages of XQuAD.
                        "paragraph": questions[0]["id"],
                    },
                )


READERS: dict[str, Callable[[str, Source], Iterator[tuple[str, dict[str, Any]]]]] = {
    "tsv": _tsv,
    "csv": _csv,
    "jsonl": _jsonl,
    "multirc": _multirc,
    "record": _record_qa,
    "squad": _squad,
}
