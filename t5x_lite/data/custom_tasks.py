"""Tasks by name: those of the table, and those that a config describes."""

import re
import string
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
_CLASSES = ("accuracy", "f1", "macro_f1", "matthews", "ece")
# The heads that such a task may have ("" = text only) -> its metrics, the first of them
# if the row names none.
_HEADS = {
    "class": _CLASSES,
    "similarity": _CLASSES,
    "regression": ("pearson", "spearman"),
    "tags": ("tag_accuracy",),
    "": ("exact_match", "bleu", "chrf", "rouge", "squad_em", "squad_f1"),
}
_SEVERAL = ("inputs", "classes", "metrics")
# Names of fields that readers and texts give a meaning.
_TAKEN = ("label", "value", "words", "tags", "answers", "entities", "place", "group")


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
    for key in _SEVERAL:
        if isinstance(found[key], str):  # ('a') is no tuple
            raise ValueError(
                f"{where}: {key}={found[key]!r} is one string; write it as "
                f"({found[key]!r},)."
            )
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
    several = head in ("class", "similarity", "tags")
    if several != bool(classes) or (several and len(set(classes)) < 2):
        raise ValueError(
            f"{where}: classes={classes} with head {head!r}, which has "
            f"{'two or more' if several else 'none'}."
        )
    if taken := [name for name in inputs if name in _TAKEN and head != "tags"]:
        raise ValueError(
            f"{where}: inputs={inputs}; {', '.join(_TAKEN)} have a meaning here. Give "
            f"the file's column {taken[0]!r} another name."
        )
    allowed = [m for m in _HEADS[head] if m != "f1" or len(classes) == 2]
    if wrong := [name for name in found["metrics"] if name not in allowed]:
        raise ValueError(
            f"{where}: metrics={tuple(found['metrics'])}: {wrong[0]!r} is none of head "
            f"{head!r} with {len(classes)} classes. Allowed: {', '.join(allowed)}."
        )
    asked = [field for _, field, _, _ in string.Formatter().parse(found["prompt"])]
    if unknown := [f for f in asked if f is not None and f not in inputs]:
        raise ValueError(
            f"{where}: prompt={found['prompt']!r} has a field {{{unknown[0]}}}; "
            f"allowed are {', '.join(f'{{{name}}}' for name in inputs)}."
        )
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
        # By what is read: one text with two labels is not in two splits.
        Source(kind[1], *files, fields, labels=labels, unit=inputs),
        prefix,
        inputs,
        metrics=tuple(found["metrics"]) or _HEADS[head][:1],
        heads=(head,) if head else (),
        parts=inputs[:2],
        classes=classes,
        text=text,
        prompt=found["prompt"],
    )
