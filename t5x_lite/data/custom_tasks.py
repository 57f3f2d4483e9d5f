"""Tasks by name: those of the table, and those that a config describes."""

import re
from collections.abc import Mapping
from typing import Any

from t5x_lite.config import nearest
from t5x_lite.data import task_texts
from t5x_lite.data.task_readers import Source
from t5x_lite.data.tasks import TASKS, Task


def find(name: str, custom: Mapping[str, Any] | None = None) -> Task:
    """The task of a name, of `TASKS` or of config.data.custom_tasks.

    Raises:
        ValueError: an unknown name, naming the nearest.
    """
    custom = custom or {}
    if name in custom:
        return _custom(name, custom[name])
    if name not in TASKS:
        known = sorted({*TASKS, *custom})
        raise ValueError(
            f"config.data.tasks: there is no task {name!r}{nearest(name, known)} "
            f"Tasks: {', '.join(known)}; your own go into config.data.custom_tasks."
        )
    return TASKS[name]


_KEYS = dict(
    train="",
    dev="",
    test=None,
    inputs=(),
    label="label",
    classes=(),
    head="class",
    metrics=(),
    prefix="",
    prompt="",
)
# The heads that such a task may have ("" = text only) -> its metrics.
_HEADS = {
    "class": ("accuracy",),
    "similarity": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "tags": ("tag_accuracy",),
    "": ("exact_match",),
}


def _custom(name: str, row: Mapping[str, Any]) -> Task:
    """A task of one's own: TSV, CSV or JSONL files, see config.data.custom_tasks."""
    where = f"config.data.custom_tasks[{name!r}]"
    for key in row:
        if key not in _KEYS:
            raise ValueError(
                f"{where}: {key!r} is no key{nearest(key, _KEYS)} Keys: "
                f"{', '.join(_KEYS)}."
            )
    found: dict[str, Any] = _KEYS | dict(row)
    head, prefix = found["head"], found["prefix"] or name
    inputs, classes = tuple(found["inputs"]), tuple(map(str, found["classes"]))
    kind = re.search(r"\.(tsv|csv|jsonl)(\.\w+)?$", found["train"])
    if not kind:
        raise ValueError(
            f"{where}: train={found['train']!r}; allowed are .tsv (with a line of "
            "column names), .csv and .jsonl, each also compressed (.xz, .gz, .zst)."
        )
    if not inputs or head not in _HEADS:
        raise ValueError(
            f"{where}: inputs={inputs}, head={head!r}; needed are the names of one or "
            f"more fields, and a head of {', '.join(map(repr, _HEADS))}."
        )
    if head in ("class", "similarity", "tags") and len(classes) < 2:
        raise ValueError(f"{where}: head {head!r} needs its classes, two or more.")
    fields, text = dict(zip(inputs, inputs, strict=True)), None
    labels = dict(zip(classes, classes, strict=True))
    if head == "tags":
        fields, labels = dict(words=inputs[0], tags=found["label"]), {}
        inputs, text = ("words",), task_texts.tags(prefix)
    elif head == "regression":
        fields["value"], text = found["label"], task_texts.number(prefix, inputs)
    else:
        fields["label"] = found["label"]
    files = found["train"], found["dev"], found["test"]
    return Task(
        Source(kind[1], *files, fields, labels=labels),
        prefix,
        inputs,
        metrics=tuple(found["metrics"]) or _HEADS[head],
        heads=(head,) if head else (),
        parts=inputs[:2],
        classes=classes,
        text=text,
        prompt=found["prompt"],
    )
