"""Texts of tasks that T5 words by rules of their own, and parts that heads read."""

import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Texts = tuple[str, str]  # (inputs, targets)
NO_ANSWER = "unanswerable"  # SQuAD 2.0


def part(record: Record, name: str) -> str:
    """A field that a head reads, or one of `_MADE` of several."""
    return _MADE[name](record) if name in _MADE else record[name]


def references(record: Record, targets: str) -> list[str]:
    """All texts that count as right: the answers of a question, or the target."""
    if "answers" not in record:
        return [targets]
    found = [a if isinstance(a, str) else a[0] for a in record["answers"]]
    return list(dict.fromkeys(found)) or [""]


def number(prefix: str, inputs: tuple[str, ...]) -> Callable[[Record], Texts]:
    """STS-B: the score as text, rounded to the nearest 0.2."""

    def text(record: Record) -> Texts:
        fields = [f"{name}: {record[name]}" for name in inputs]
        return " ".join([prefix, *fields]), f"{round(record['value'] * 5) / 5:.1f}"

    return text


def multirc(record: Record) -> Texts:
    inputs = f"question: {record['question']} answer: {record['answer']}"
    return f"multirc {inputs} paragraph: {_unmarked(record)}", record["label"]


def _unmarked(record: Record) -> str:
    """MultiRC's paragraph without the mark-up of its sentences."""
    return re.sub(r"</?b>", "", re.sub(r"<br>", " ", record["paragraph"]))


def record(record: Record) -> Texts:
    """ReCoRD: the highlights become sentences; of several answers the first."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", record["passage"])
    passage = re.sub(r"\n@highlight\n", ". ", passage)
    entities = ", ".join(record["entities"])
    inputs = f"record query: {record['query']} entities: {entities} passage: {passage}"
    return inputs, record["answers"][0] if record["answers"] else "<unk>"


def wsc(record: Record) -> Texts:
    """The referent is what is written (Raffel et al. 2020, section 2.4)."""
    return f"wsc: {marked_pronoun(record)}", record["candidate"]


def marked_pronoun(record: Record) -> str:
    """WSC: the text with *asterisks* around the pronoun, the word number `place`.

    Raises:
        ValueError: another word stands there.
    """
    words, wanted = record["text"].split(" "), record["pronoun"].split(" ")
    first, last = record["place"], record["place"] + len(wanted) - 1
    found = " ".join(words[first : last + 1])
    if not re.match(rf"{re.escape(record['pronoun'])}\W*$", found, re.IGNORECASE):
        raise ValueError(
            f"WSC: word {first} of {record['text'][:80]!r} is {found!r}, not "
            f"{record['pronoun']!r}."
        )
    words[first] = "*" + words[first]
    words[last] = re.sub(r"(\W*)$", r"*\1", words[last], count=1)
    return " ".join(words)


def squad(record: Record) -> Texts:
    inputs = f"question: {record['question']} context: {record['context']}"
    return inputs, record["answers"][0][0] if record["answers"] else NO_ANSWER


def tags(prefix: str) -> Callable[[Record], Texts]:
    """Words in, as many tags out."""

    def text(record: Record) -> Texts:
        return f"{prefix}: {' '.join(record['words'])}", " ".join(record["tags"])

    return text


def plain(prefix: str, field: str, target: str) -> Callable[[Record], Texts]:
    """ "prefix: text" -> another field: translation, data to text."""

    def text(record: Record) -> Texts:
        return f"{prefix}: {record[field]}", record[target]

    return text


def pep(record: Record) -> Texts:
    """A PEP without its header, which says the title."""
    head, _, body = record["text"].partition("\n\n")
    text = body.strip() if head.startswith("PEP:") else record["text"]
    return f"summarize: {text}", record["title"]


_ASKED = dict(
    cause="What was the cause of this?", effect="What happened as a result?"
)  # COPA's own words
_MADE: dict[str, Callable[[Record], str]] = {
    "query": lambda r: f"{r['question']} {r['answer']}",
    "plain": _unmarked,
    "word_in_1": lambda r: f"{r['word']}: {r['sentence1']}",
    "word_in_2": lambda r: r["sentence2"],
    "marked": marked_pronoun,
    "asked": lambda r: _ASKED[r["question"]],
}
