"""Labelled tasks: files, splits, T5's texts."""

import json

import pytest

from t5x_lite.data import task_readers, tasks
from tests import task_files
from tests.toy_task import shared

REAL = (
    *("subjectivity", "ud_ewt", "xquad_en", "e2e_nlg"),
    pytest.param("sentence_polarity", marks=pytest.mark.slow),
    pytest.param("libreoffice_en_de", marks=pytest.mark.slow),
    pytest.param("pep_titles", marks=pytest.mark.slow),
)


# ---- T5's texts ---------------------------------------------------------------------

# Raffel et al. 2020, appendix D, and the tests of the released preprocessors.
T5_TEXTS = {
    "cola": (
        {"sentence": "John made Bill master of himself.", "label": "acceptable"},
        "cola sentence: John made Bill master of himself.",
        "acceptable",
    ),
    "sst2": (
        {"sentence": "it confirms fincher 's status .", "label": "positive"},
        "sst2 sentence: it confirms fincher 's status .",
        "positive",
    ),
    "mnli": (
        {
            "hypothesis": "The St. Louis Cardinals have always won.",
            "premise": "yeah well losing is i mean",
            "label": "contradiction",
        },
        "mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well "
        "losing is i mean",
        "contradiction",
    ),
    "qnli": (
        {
            "question": "Where did Jebe die?",
            "sentence": "Jebe died on the road back to Samarkand.",
            "label": "entailment",
        },
        "qnli question: Where did Jebe die? sentence: Jebe died on the road back to "
        "Samarkand.",
        "entailment",
    ),
    "stsb": (
        {
            "sentence1": "Representatives for Puretunes could not be reached.",
            "sentence2": "Puretunes representatives could not be located.",
            "value": 3.25,
        },
        "stsb sentence1: Representatives for Puretunes could not be reached. "
        "sentence2: "
        "Puretunes representatives could not be located.",
        "3.2",
    ),
    "stsb ": (
        {"sentence1": "Big news.", "sentence2": "No idea.", "value": 1.66},
        "stsb sentence1: Big news. sentence2: No idea.",
        "1.6",
    ),
    "cb": (
        {
            "hypothesis": "Valence was helping",
            "premise": "Valence the void-brain, Valence the virtuous valet.",
            "label": "contradiction",
        },
        "cb hypothesis: Valence was helping premise: Valence the void-brain, Valence "
        "the virtuous valet.",
        "contradiction",
    ),
    "copa": (
        {
            "choice1": "Many citizens relocated to the capitol.",
            "choice2": "Many citizens took refuge in other territories.",
            "premise": "Political violence broke out in the nation.",
            "question": "effect",
            "label": "choice2",
        },
        "copa choice1: Many citizens relocated to the capitol. choice2: Many citizens "
        "took refuge in other territories. premise: Political violence broke "
        "out in the "
        "nation. question: effect",
        "choice2",
    ),
    "multirc": (
        {
            "paragraph": "<b>Sent 1: </b>Once upon a time, there was a squirrel named "
            "Joey.<br><b>Sent 2: </b>Joey loved to go outside and play with his cousin "
            "Jimmy.",
            "question": "Why was Joey surprised the morning he woke up for breakfast?",
            "answer": "There was only pie to eat",
            "label": "True",
        },
        "multirc question: Why was Joey surprised the morning he woke up for "
        "breakfast? "
        "answer: There was only pie to eat paragraph: Sent 1: Once upon a time, there "
        "was a squirrel named Joey. Sent 2: Joey loved to go outside and play with his "
        "cousin Jimmy.",
        "True",
    ),
    "record": (
        {
            "query": "It was @placeholder.",
            "entities": ["A", "B", "C"],
            "passage": "This is the passage\n@highlight\nAnother "
            "sentence.\n@highlight\n"
            "Third sentence.",
            "answers": ["A", "C"],
        },
        "record query: It was @placeholder. entities: A, B, C passage: This is the "
        "passage. Another sentence. Third sentence.",
        "A",
    ),
    "wsc": (
        {
            "text": "Mitchell asked Tom if he could lend some money.",
            "candidate": "Tom",
            "pronoun": "he",
            "place": 4,
        },
        "wsc: Mitchell asked Tom if *he* could lend some money.",
        "Tom",
    ),
    "wsc ": (
        {
            "text": "Carl borrowed a book, but the book was unreadable to him.",
            "candidate": "Carl",
            "pronoun": "him",
            "place": 10,
        },
        "wsc: Carl borrowed a book, but the book was unreadable to *him*.",
        "Carl",
    ),
    "libreoffice_en_de": (
        {"en": "That is good.", "de": "Das ist gut."},
        "translate English to German: That is good.",
        "Das ist gut.",
    ),
}


@pytest.mark.parametrize("name", sorted(T5_TEXTS))
def test_texts_are_those_of_t5(name):
    record, inputs, targets = T5_TEXTS[name]
    assert tasks.text_of(tasks.TASKS[name.strip()], record) == (inputs, targets)


def test_a_pronoun_that_is_not_where_it_should_be_is_refused():
    record = T5_TEXTS["wsc"][0] | {"place": 5}
    with pytest.raises(ValueError, match="word 5 .* is 'could', not 'he'"):
        tasks.text_of(tasks.TASKS["wsc"], record)


# ---- files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", task_files.NAMES)
def test_published_layouts_are_read(name, tmp_path):
    """Every field that a text or a head needs is there, every label is a class."""
    task_files.write(name, tmp_path)
    task = tasks.TASKS[name]
    records = task_readers.read(task.source, str(tmp_path), "dev")
    assert records == task_readers.read(task.source, str(tmp_path), "train")
    assert records
    for record in records:
        inputs, targets = tasks.text_of(task, record)
        assert targets and inputs
        if task.heads and task.heads[0] in ("class", "choice"):
            assert record["label"] in task.classes
            assert all(tasks.parts_of(task, record))
    with pytest.raises(ValueError, match="without a labelled test split"):
        task_readers.read(task.source, str(tmp_path), "test")


def test_fields_are_the_published_columns(tmp_path):
    def first(name, i=0):
        task_files.write(name, tmp_path)
        return task_readers.read(tasks.TASKS[name].source, str(tmp_path), "dev")[i]

    assert first("cola", 1) == {"sentence": "Dog the sleeps.", "label": "unacceptable"}
    assert first("sst2") == {"sentence": 'a "warm film ', "label": "positive"}
    assert first("mrpc")["sentence1"] == 'She said "yes .'
    assert first("stsb", 1)["value"] == 0.34
    assert first("mnli") == {
        "premise": "He sat.",
        "hypothesis": "He did sit.",
        "label": "entailment",
    }
    assert first("boolq")["label"] == "True"
    assert first("record")["entities"] == ["Ann", "Bob"]
    assert first("multirc", 1) | {"group": ""} == {
        "paragraph": "<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>Bob slept.<br>",
        "question": "Who ran?",
        "answer": "Bob",
        "label": "False",
        "group": "",
    }
    # QQP's file has lines that its own readers leave out.
    task_files.write("qqp", tmp_path)
    assert len(task_readers.read(tasks.TASKS["qqp"].source, str(tmp_path), "dev")) == 2


WRONG = {
    "label": (
        "rte",
        "0\ta\tb\tmaybe",
        r"line 2, column 'label': label 'maybe'.*entail",
    ),
    "columns": ("rte", "0\ta\tb", "line 2: 3 columns; allowed is 4"),
    "number": ("stsb", "0\t" * 9 + "five", "line 2, value: 'five' is no number"),
    "json": ("cb", "{", r"line 3: not JSON"),
    "array": ("cb", "[1]", r"line 3: list; allowed is an object"),
    "field": (
        "cb",
        '{"premise": "a"}',
        "line 3: no field 'hypothesis'; there is: premise",
    ),
    "string": (
        "cb",
        '{"premise": 3, "hypothesis": "a", "label": "neutral"}',
        "line 3, premise: 3; allowed is a string",
    ),
    "utf-8": ("cb", b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_wrong_files_are_named_with_line_and_column(kind, tmp_path):
    name, line, message = WRONG[kind]
    task_files.write(name, tmp_path)
    source = tasks.TASKS[name].source
    path = tmp_path / source.train
    lines = path.read_bytes().splitlines()
    if source.layout == "tsv":
        lines = lines[:1]
    added = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([*lines, added]) + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        task_readers.read(source, str(tmp_path), "train")
    assert str(path) in str(error.value)


def test_missing_and_renamed_files_are_named(tmp_path):
    source = tasks.TASKS["rte"].source
    with pytest.raises(FileNotFoundError, match="RTE/train.tsv: there is no such file"):
        task_readers.read(source, str(tmp_path), "train")
    task_files.write("rte", tmp_path)
    path = tmp_path / "RTE/train.tsv"
    path.write_text(path.read_text().replace("sentence2", "other"))
    with pytest.raises(ValueError, match="line 1: no column 'sentence2'"):
        task_readers.read(source, str(tmp_path), "train")


def test_an_answer_must_stand_where_the_file_says(tmp_path):
    wrong = task_files.squad("Denver Broncos", 5)
    (tmp_path / "train-v2.0.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="question q1: at character 5 .*'enver Bronc"):
        task_readers.read(tasks.TASKS["squad2"].source, str(tmp_path), "train")


# ---- splits -------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_drawn_splits_share_no_unit(name):
    source = tasks.TASKS[name].source
    folder = shared(source.train)
    splits = {s: task_readers.read(source, folder, s) for s in task_readers.SPLITS}
    units = {
        split: {str([record[name] for name in source.unit]) for record in found}
        for split, found in splits.items()
    }
    assert not units["train"] & units["dev"]
    if not source.test:
        assert not (units["train"] | units["dev"]) & units["test"]
        whole = sum(len(found) for found in splits.values())
        for split in ("dev", "test"):
            assert 0.05 < len(splits[split]) / whole < 0.2


def test_reviews_are_split_by_their_folds():
    source = tasks.TASKS["movie_reviews"].source
    folder = shared(source.train)
    for split, folds in dict(dev="9", test="8").items():
        found = task_readers.read(source, folder, split)
        assert {record["id"][2] for record in found} == {*folds}
        assert len(found) == 200 * len(folds)


def test_paragraphs_are_split_the_same_way_in_all_languages():
    def ids(language, split):
        source = tasks.TASKS[f"xquad_{language}"].source
        return [r["id"] for r in task_readers.read(source, shared(source.train), split)]

    for split in task_readers.SPLITS:
        assert ids("en", split) == ids("de", split)
