"""Labelled tasks: where their examples lie, their texts, heads and metrics.

A task is read in one of two ways (config.data.task_format): "text", as T5 reads it, a
prefix and named fields in and words out (Raffel et al. 2020, appendix D); or "head",
as BERT and GPT-1 do, marks between the parts and a head on top (t5x_lite/heads.py).
"""

import dataclasses
from collections.abc import Callable

from t5x_lite.data import task_texts as texts
from t5x_lite.data.task_readers import Source
from t5x_lite.data.task_texts import Record, Texts


@dataclasses.dataclass(frozen=True)
class Task:
    """One labelled task.

    Attributes:
        source: its files.
        prefix: what the text begins with, T5's name of the task.
        inputs: the fields that the text names, in T5's order.
        metrics: names in `task_metrics.METRICS`; the first is the task's own.
        heads: heads that it can be trained with; () = text only.
        parts: the one or two fields that a head reads, in BERT's order; () = inputs.
        classes: words of the classes, in the order of their numbers.
        text: record -> (inputs, targets), where it is not the rule.
        prompt: text of a prompt without training, with {field}; "" = the inputs.
        verbal: words for the classes in a prompt; () = `classes`.
    """

    source: Source
    prefix: str
    inputs: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    heads: tuple[str, ...] = ("class",)
    parts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    text: Callable[[Record], Texts] | None = None
    prompt: str = ""
    verbal: tuple[str, ...] = ()


def text_of(task: Task, record: Record) -> Texts:
    """(inputs, targets) of a record in T5's words: "prefix name: text name: text"."""
    if task.text:
        return task.text(record)
    fields = [f"{name}: {record[name]}" for name in task.inputs]
    return " ".join([task.prefix, *fields]), record["label"]


def parts_of(task: Task, record: Record) -> list[str]:
    """The one or two texts that a head reads."""
    return [texts.part(record, name) for name in task.parts or task.inputs]


def trains(task: Task, record: Record) -> bool:
    """Is it an example to train on as text? WSC's wrong referents are not."""
    return task.text is not texts.wsc or record["label"] == "True"


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _glue(folder: str, fields, label: str, labels, *, dev="dev.tsv", **more) -> Source:
    """The TSV files as published; labels None = a number."""
    fields = fields | {"value" if labels is None else "label": label}
    train, dev = f"{folder}/train.tsv", f"{folder}/{dev}"
    return Source("tsv", train, dev, None, fields, labels=labels or {}, **more)


def _superglue(folder: str, fields, labels, *, layout="jsonl") -> Source:
    """The JSONL files as published; other layouts know their fields."""
    fields = fields | {"label": "label"} if layout == "jsonl" else {}
    train, dev = f"{folder}/train.jsonl", f"{folder}/val.jsonl"
    return Source(layout, train, dev, None, fields, labels=labels)


def _squad(train: str, dev: str, **more) -> Task:
    return Task(
        Source("squad", train, dev, **more),
        "squad",
        ("question", "context"),
        metrics=("squad_f1", "squad_em"),
        heads=("span",),
        text=texts.squad,
    )


SENTIMENT = ("negative", "positive")
THREE_WAY = ("entailment", "neutral", "contradiction")
ENTAILED = ("entailment", "not_entailment")
TRUTH = ("False", "True")
UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART"),
    *("PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
_TRUTH = {"0": "False", "1": "True"} | _same(*TRUTH)
_REVIEW = "Review: {sentence}\nSentiment:"

TASKS = {
    # ---- GLUE (Wang et al. 2019b) -----------------------------------------------
    "cola": Task(
        _glue(
            "CoLA",
            _same("sentence"),
            "label",
            {"0": "unacceptable", "1": "acceptable"},
            header=("source", "label", "star", "sentence"),
        ),
        "cola",
        ("sentence",),
        metrics=("matthews", "accuracy"),
        classes=("unacceptable", "acceptable"),
    ),
    "sst2": Task(
        _glue("SST-2", _same("sentence"), "label", {"0": "negative", "1": "positive"}),
        "sst2",
        ("sentence",),
        metrics=("accuracy", "ece"),
        classes=SENTIMENT,
        prompt=_REVIEW,
    ),
    "mrpc": Task(
        _glue(
            "MRPC",
            dict(sentence1="#1 String", sentence2="#2 String"),
            "Quality",
            {"0": "not_equivalent", "1": "equivalent"},
        ),
        "mrpc",
        ("sentence1", "sentence2"),
        metrics=("f1", "accuracy"),
        heads=("class", "similarity"),
        classes=("not_equivalent", "equivalent"),
    ),
    "qqp": Task(
        _glue(
            "QQP",
            _same("question1", "question2"),
            "is_duplicate",
            {"0": "not_duplicate", "1": "duplicate"},
            short_lines=True,
        ),
        "qqp",
        ("question1", "question2"),
        metrics=("f1", "accuracy"),
        heads=("class", "similarity"),
        classes=("not_duplicate", "duplicate"),
    ),
    "stsb": Task(
        _glue("STS-B", _same("sentence1", "sentence2"), "score", None),
        "stsb",
        ("sentence1", "sentence2"),
        metrics=("pearson", "spearman"),
        heads=("regression", "similarity"),
        text=texts.number("stsb", ("sentence1", "sentence2")),
    ),
    "mnli": Task(
        _glue(
            "MNLI",
            dict(premise="sentence1", hypothesis="sentence2"),
            "gold_label",
            _same(*THREE_WAY),
            dev="dev_matched.tsv",
        ),
        "mnli",
        ("hypothesis", "premise"),
        metrics=("accuracy", "ece"),
        parts=("premise", "hypothesis"),
        classes=THREE_WAY,
    ),
    "qnli": Task(
        _glue("QNLI", _same("question", "sentence"), "label", _same(*ENTAILED)),
        "qnli",
        ("question", "sentence"),
        classes=ENTAILED,
    ),
    "rte": Task(
        _glue("RTE", _same("sentence1", "sentence2"), "label", _same(*ENTAILED)),
        "rte",
        ("sentence1", "sentence2"),
        classes=ENTAILED,
    ),
    "wnli": Task(
        _glue(
            "WNLI",
            _same("sentence1", "sentence2"),
            "label",
            {"0": "not_entailment", "1": "entailment"},
        ),
        "wnli",
        ("sentence1", "sentence2"),
        classes=("not_entailment", "entailment"),
    ),
    # ---- SuperGLUE (Wang et al. 2019a) ------------------------------------------
    "boolq": Task(
        _superglue("BoolQ", _same("question", "passage"), _TRUTH),
        "boolq",
        ("passage", "question"),
        parts=("question", "passage"),
        classes=TRUTH,
        prompt="{passage}\nquestion: {question}?\nanswer:",
        verbal=("no", "yes"),
    ),
    "cb": Task(
        _superglue("CB", _same("premise", "hypothesis"), _same(*THREE_WAY)),
        "cb",
        ("hypothesis", "premise"),
        metrics=("macro_f1", "accuracy"),
        parts=("premise", "hypothesis"),
        classes=THREE_WAY,
    ),
    "copa": Task(
        _superglue(
            "COPA",
            _same("premise", "choice1", "choice2", "question"),
            {"0": "choice1", "1": "choice2"},
        ),
        "copa",
        ("choice1", "choice2", "premise", "question"),
        heads=("choice",),
        parts=("premise", "asked"),
        classes=("choice1", "choice2"),
    ),
    "multirc": Task(
        _superglue("MultiRC", {}, _TRUTH, layout="multirc"),
        "multirc",
        ("question", "answer", "paragraph"),
        metrics=("f1", "group_match"),
        parts=("query", "plain"),
        classes=TRUTH,
        text=texts.multirc,
    ),
    "record": Task(
        _superglue("ReCoRD", {}, {}, layout="record"),
        "record",
        ("query", "entities", "passage"),
        metrics=("squad_f1", "squad_em"),
        heads=(),
        text=texts.record,
    ),
    "super_rte": Task(
        _superglue("RTE", _same("premise", "hypothesis"), _same(*ENTAILED)),
        "rte",
        ("hypothesis", "premise"),
        parts=("premise", "hypothesis"),
        classes=ENTAILED,
    ),
    "wic": Task(
        _superglue("WiC", _same("word", "sentence1", "sentence2"), _TRUTH),
        "wic",
        ("sentence1", "sentence2", "word"),
        parts=("word_in_1", "word_in_2"),
        classes=TRUTH,
    ),
    "wsc": Task(
        _superglue(
            "WSC",
            dict(
                text="text",
                candidate="target.span1_text",
                pronoun="target.span2_text",
                place="target.span2_index",
            ),
            _TRUTH,
        ),
        "wsc",
        ("text",),
        parts=("marked", "candidate"),
        classes=TRUTH,
        text=texts.wsc,
        prompt='{text}\nDoes "{pronoun}" stand for "{candidate}"?\nanswer:',
        verbal=("no", "yes"),
    ),
    # ---- questions about a text -------------------------------------------------
    # SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018). XQuAD (Artetxe et al. 2020) has
    # no training split: its paragraphs are drawn, the same ones in all languages.
    "squad": _squad("train-v1.1.json", "dev-v1.1.json"),
    "squad2": _squad("train-v2.0.json", "dev-v2.0.json"),
    "xquad_de": _squad("xquad.de.json.xz", "", test="", unit=("paragraph",)),
    "xquad_en": _squad("xquad.en.json.xz", "", test="", unit=("paragraph",)),
    # ---- one text ---------------------------------------------------------------
    # Pang and Lee 2004, 2005. The reviews are in ten folds.
    "sentence_polarity": Task(
        Source(
            "jsonl",
            "sentence_polarity.jsonl.xz",
            test="",
            fields=dict(sentence="text", label="label"),
            labels={"0": "negative", "1": "positive"},
            unit=("sentence",),
        ),
        "sentence_polarity",
        ("sentence",),
        metrics=("accuracy", "ece"),
        classes=SENTIMENT,
        prompt=_REVIEW,
    ),
    "subjectivity": Task(
        Source(
            "jsonl",
            "subjectivity.jsonl.xz",
            test="",
            fields=dict(sentence="text", label="label"),
            labels=_same("objective", "subjective"),
            unit=("sentence",),
        ),
        "subjectivity",
        ("sentence",),
        metrics=("accuracy", "ece"),
        classes=("objective", "subjective"),
        prompt="{sentence}\nThis sentence is",
    ),
    "movie_reviews": Task(
        Source(
            "jsonl",
            "movie_reviews.jsonl.xz",
            test="",
            fields=dict(sentence="text", label="label", id="id"),
            labels=dict(neg="negative", pos="positive"),
            unit=("fold",),
        ),
        "movie_reviews",
        ("sentence",),
        metrics=("accuracy", "ece"),
        classes=SENTIMENT,
        prompt=_REVIEW,
    ),
    # UD English EWT (Silveira et al. 2014): its dev file, of which a tenth is held out,
    # is what there is to train on; its test file is the test split.
    "ud_ewt": Task(
        Source(
            "jsonl",
            "ud_ewt_dev.jsonl.xz",
            test="ud_ewt_test.jsonl.xz",
            fields=dict(words="tokens", tags="upos"),
            unit=("words",),
        ),
        "upos",
        ("words",),
        metrics=("tag_accuracy",),
        heads=("tags",),
        classes=UPOS,
        text=texts.tags("upos"),
    ),
    # ---- writing ----------------------------------------------------------------
    "libreoffice_en_de": Task(
        Source(
            "tsv",
            "libreoffice_help_en_de.tsv.xz",
            test="",
            fields=_same("en", "de"),
            header=("en", "de"),
            unit=("en",),
        ),
        "translate English to German",
        ("en",),
        metrics=("bleu", "chrf"),
        heads=(),
        text=texts.plain("translate English to German", "en", "de"),
    ),
    # E2E (Novikova et al. 2017): of its dev file, split by meaning; the test file is
    # the test split. The right texts of a meaning count together.
    "e2e_nlg": Task(
        Source(
            "csv",
            "e2e_nlg_dev.csv.xz",
            test="e2e_nlg_test.csv.xz",
            fields=_same("mr", "ref"),
            unit=("mr",),
        ),
        "describe",
        ("mr",),
        metrics=("bleu", "rouge"),
        heads=(),
        text=texts.plain("describe", "mr", "ref"),
    ),
    "pep_titles": Task(
        Source(
            "jsonl",
            "../corpora/peps.jsonl.xz",
            test="",
            fields=_same("title", "text"),
            unit=("title",),
        ),
        "summarize",
        ("text",),
        metrics=("rouge", "exact_match"),
        heads=(),
        text=texts.pep,
    ),
}
