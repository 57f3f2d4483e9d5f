"""Labelled tasks with a trained model: its answers, and what they are worth."""

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from t5x_lite import generate, heads, run, sharding, step, task_metrics
from t5x_lite.data import task_texts, tasks
from t5x_lite.data.batches import AnyBatches
from t5x_lite.data.head_rows import Row
from t5x_lite.data.task_batches import HeadExamples, TextExamples
from t5x_lite.data.task_texts import Record
from t5x_lite.settings import Settings
from t5x_lite.vocab import Vocab

LONGEST_ANSWER = 30  # words of an extracted answer


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model answers to the examples of a task.

    Attributes:
        targets, predictions: as `task_metrics.compute` takes them.
        texts: what is written down of each example: input, target, prediction.
        probabilities: float32 [N, K] of the classes; or None.
        groups: names of the groups that metrics know; or None.
    """

    targets: list
    predictions: list
    texts: list[dict[str, Any]]
    probabilities: np.ndarray | None = None
    groups: list[str] | None = None

    def metrics(self, task: tasks.Task) -> dict[str, float]:
        return task_metrics.compute(
            task.metrics,
            self.targets,
            self.predictions,
            probabilities=self.probabilities,
            groups=self.groups,
        )


def of_head(
    setup: run.Setup, made: HeadExamples, batches: AnyBatches, params: dict
) -> Answers:
    """The answers of a model with a head to the examples of an evaluation.

    All processes call it and have the answers.

    Args:
      batches: of an evaluation, made of `made`.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for i in tqdm.tqdm(
        range(len(batches)), "predict", leave=False, disable=not setup.lead, delay=1.0
    ):
        said = setup.predict_step(params, setup.to_device(batches[i]))
        if jax.process_count() > 1:
            said = multihost_utils.process_allgather(said, tiled=True)
        for name, values in said.items():
            parts.setdefault(name, []).append(np.asarray(values))
    said = {name: np.concatenate(values) for name, values in parts.items()}
    return answers_of(setup.cfg.model, made, said)


def of_few(setup: run.Setup, params: dict, made: HeadExamples, count: int) -> Answers:
    """The answers to `count` examples from everywhere, on one device."""
    chosen = {
        old: new for new, old in enumerate(spread(range(len(made.records)), count))
    }
    few = copy.copy(made)
    few.records = [made.records[old] for old in chosen]
    few.rows = [
        dataclasses.replace(row, record=chosen[row.record])
        for row in made.rows
        if row.record in chosen
    ]
    predict = jax.jit(step.make_predict_step(setup.model, setup.cfg))
    with sharding.unconstrained():
        said = predict(params, few.streams(np.arange(len(few.rows))))
    return answers_of(setup.cfg.model, few, jax.tree.map(np.asarray, said))


def answers_of(model, made: HeadExamples, said: dict[str, np.ndarray]) -> Answers:
    """What `heads.predictions` says of all rows in order -> the answers."""
    task, records = made.task, [record for _, record in made.records]
    shown = [{"input": _shown(task, record)} for record in records]
    n, classes = len(records), task.classes
    if heads.is_number(model):
        values = [float(v) for v in said["values"][:n]]
        wanted = [record["value"] for record in records]
        return _answers(wanted, values, shown, wanted, values)
    if made.head == "tags":
        found = [_tags(row, said["tags"][i], task) for i, row in enumerate(made.rows)]
        wanted = [record["tags"] for record in records]
        return _answers(wanted, found, shown, wanted, found)
    if made.head == "span":
        found = _spans(made, said["start_logits"], said["end_logits"])
        wanted = [task_texts.references(record, "") for record in records]
        return _answers(wanted, found, shown, wanted, found)
    logits_NK = said["logits"][:n].astype(np.float64)
    shares_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    shares_NK /= shares_NK.sum(axis=1, keepdims=True)
    numbers = [classes.index(record["label"]) for record in records]
    chosen = np.argmax(logits_NK, axis=1).tolist()
    return dataclasses.replace(
        _answers(
            numbers,
            chosen,
            shown,
            [record["label"] for record in records],
            [classes[i] for i in chosen],
        ),
        probabilities=shares_NK,
        groups=_groups(records),
    )


def _answers(targets, predictions, shown, wanted, found) -> Answers:
    texts = [
        row | {"target": target, "prediction": prediction}
        for row, target, prediction in zip(shown, wanted, found, strict=True)
    ]
    return Answers(targets, predictions, texts)


def _groups(records: list[Record]) -> list[str] | None:
    return [r["group"] for r in records] if "group" in records[0] else None


def _shown(task: tasks.Task, record: Record) -> str:
    parts = [record[name] for name in task.inputs]
    return "\n".join(p if isinstance(p, str) else " ".join(p) for p in parts)


def _tags(row: Row, tags_T: np.ndarray, task: tasks.Task) -> list[str]:
    """A tag for each word, '' for words that were cut off."""
    assert row.places is not None
    return [task.classes[tags_T[place]] if place >= 0 else "" for place in row.places]


def _spans(made: HeadExamples, start_NT, end_NT) -> list[str]:
    """The best answer over the windows of each context.

    It is "" where the task knows questions without an answer and "no answer", the least
    likely of the windows, is more likely than the best (Devlin et al. 2019, 4.3).
    """
    records = [record for _, record in made.records]
    nullable = any(not record["answers"] for record in records)
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(records)
    null_N = np.full(len(records), np.inf)
    for i, row in enumerate(made.rows):
        at = row.record
        null = float(start_NT[i, row.pooled] + end_NT[i, row.pooled])
        null_N[at] = min(null_N[at], null)
        found = best_span(row, start_NT[i], end_NT[i], records[at]["context"])
        best[at] = max(best[at], found, key=lambda pair: pair[0])
    return [
        "" if nullable and null_N[i] > score else text
        for i, (score, text) in enumerate(best)
    ]


def best_span(row: Row, start_T, end_T, context: str) -> tuple[float, str]:
    """(score, text) of the likeliest answer in a window, of 30 words at most."""
    assert row.characters is not None
    cells = np.flatnonzero(row.characters[:, 1] >= 0)
    if not len(cells):
        return -np.inf, ""
    begins, ends = row.characters[cells].T
    words = np.array([m.start() for m in re.finditer(r"\S+", context)])
    word_C = np.searchsorted(words, begins, side="right")
    sums_CC = start_T[cells][:, None].astype(np.float64) + end_T[cells][None]
    length_CC = word_C[None] - word_C[:, None]
    places = np.arange(len(cells))
    wrong_CC = places[None] < places[:, None]
    wrong_CC |= length_CC >= LONGEST_ANSWER
    sums_CC = np.where(wrong_CC, -np.inf, sums_CC)
    first, last = np.unravel_index(np.argmax(sums_CC), sums_CC.shape)
    return float(sums_CC[first, last]), context[begins[first] : ends[last]]


def of_text(
    model,
    params: dict,
    words: Vocab,
    made: TextExamples,
    task: tasks.Task,
    settings: Settings,
    *,
    limit: int = 0,
    progress: bool = False,
) -> Answers:
    """The answers that a text-to-text model writes.

    Examples of the same inputs (E2E) are asked once, their targets count together.

    Args:
      settings: how is written.
      limit: answer so many examples only; 0 = all.
    """
    asked: dict[Any, list[int]] = {}
    whole = not task.classes and "value" not in made.records[0][1]
    for i, ids in enumerate(made.inputs):
        asked.setdefault(ids.tobytes() if whole else i, []).append(i)
    places = spread([*asked.values()], limit)
    rows = [made.inputs[each[0]] for each in places]
    written = generate.continue_all(
        model, params, words, rows, settings, progress=progress
    )
    texts = [words.decode(one[0].ids).strip() for one in written]
    records = [[made.records[i][1] for i in each] for each in places]
    targets, predictions, rows = [], [], []
    for same, text in zip(records, texts, strict=True):
        inputs, wanted = tasks.text_of(task, same[0])
        right = [
            r for each in same for r in task_texts.references(each, _target(task, each))
        ]
        target, prediction = _read(task, same[0], list(dict.fromkeys(right)), text)
        targets.append(target)
        predictions.append(prediction)
        rows.append({"input": inputs, "target": wanted, "prediction": text})
    groups = _groups([same[0] for same in records])
    return Answers(targets, predictions, rows, groups=groups)


def spread(items: Sequence, limit: int) -> list:
    """At most `limit` of them (0 = all), evenly: files are often sorted by class."""
    if not limit or limit >= len(items):
        return [*items]
    return [items[i * len(items) // limit] for i in range(limit)]


def _target(task: tasks.Task, record: Record) -> str:
    return tasks.text_of(task, record)[1]


def _read(task: tasks.Task, record: Record, right: list[str], text: str):
    """(target, prediction) for the metrics, of a text that was written.

    No class is -1, no number is -1.0, as in T5's code.
    """
    if "tags" in record:
        tags = text.split()[: len(record["tags"])]
        return record["tags"], tags + [""] * (len(record["tags"]) - len(tags))
    if "value" in record:
        try:
            return record["value"], float(text)
        except ValueError:
            return record["value"], -1.0
    if task.text is task_texts.wsc:
        # One names the other, as T5 compares them.
        said, meant = ({*re.findall(r"\w+", t.lower())} for t in (text, right[0]))
        found = bool(said) and (said <= meant or meant <= said)
        return int(record["label"] == "True"), int(found)
    if task.classes:
        known = task.classes.index(text) if text in task.classes else -1
        return task.classes.index(record["label"]), known
    if "answers" in record and text == task_texts.NO_ANSWER:
        text = ""
    return right, text
