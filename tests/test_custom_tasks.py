"""Tasks of one's own: what a config may say of them, and how they are split."""

import json

import pytest

from t5x_lite import task_metrics
from t5x_lite.data import custom_tasks, task_readers

ROW = dict(train="a.jsonl", inputs=("text",), classes=("no", "yes"))
WRONG = {
    "inputs": (dict(inputs="text"), r"inputs='text' is one string; .* \('text',\)"),
    "classes": (dict(classes="no"), r"classes='no' is one string"),
    "one class": (dict(classes=("no", "no")), "which has two or more"),
    "classes of numbers": (dict(head="regression"), "'regression', which has none"),
    "taken": (dict(inputs=("answers",)), "column 'answers' another name"),
    "metric": (dict(metrics=("acuracy",)), "'acuracy' is none of head 'class'"),
    "metric of texts": (dict(metrics=("bleu",)), "Allowed: accuracy"),
    "f1 of three": (dict(classes=("a", "b", "c"), metrics=("f1",)), "with 3 classes"),
    "prompt": (dict(prompt="{txt}?"), r"has a field \{txt\}; allowed are \{text\}"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_cannot_work_is_refused_before_anything_is_read(kind):
    more, message = WRONG[kind]
    with pytest.raises(ValueError, match=message) as error:
        custom_tasks.find("mine", {"mine": ROW | more})
    assert "config.data.custom_tasks['mine']" in str(error.value)


def test_a_text_with_two_labels_is_in_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [dict(text=f"text {i // 2}", label=("no", "yes")[i % 2]) for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = custom_tasks.find("mine", {"mine": ROW | dict(train=str(path))})
    texts = [
        {record["text"] for record in task_readers.read(task.source, "", split)}
        for split in ("train", "dev")
    ]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 100


def test_every_metric_that_is_allowed_exists():
    allowed = {name for names in custom_tasks._HEADS.values() for name in names}
    assert allowed <= set(task_metrics.METRICS)
