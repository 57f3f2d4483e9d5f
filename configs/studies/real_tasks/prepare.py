"""The texts of the study: general, of each domain, of each task; and a vocabulary.

    python -m configs.studies.real_tasks.prepare --data=DATA --output=ROOT/text

DATA holds corpora/ (austen, classics, kjv, us_addresses, peps, wikitext2) and tasks/
(see `t5x_lite/data/tasks.py`), compressed with xz. Of a task only its training split is
read. Every text is split into NAME_train.jsonl and NAME_heldout.jsonl (3 %, by hash).
"""

import argparse
import hashlib
import json
import lzma
import pathlib
import random
import re

from t5x_lite.data import task_readers, tasks
from t5x_lite.vocabularies import training

GENERAL = ("austen", "classics", "us_addresses", "kjv")
TASKS = (
    *("sentence_polarity", "subjectivity", "ud_ewt", "xquad_en"),
    *("libreoffice_en_de", "e2e_nlg", "pep_titles"),
)
PIECES = 5000


def lines(path: pathlib.Path):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from file


def documents(path: pathlib.Path) -> list[str]:
    return [json.loads(line)["text"] for line in lines(path)]


def articles(path: pathlib.Path) -> list[str]:
    """WikiText-2's articles, without its marks around hyphens and numbers."""
    found = [[]]
    for line in map(str.strip, lines(path)):
        if re.fullmatch(r"= [^=].* =", line):
            found.append([])
        elif line and not line.startswith("="):
            found[-1].append(re.sub(r" @(.)@ ", r"\1", line))
    return ["\n".join(article) for article in found if article]


def records(data: pathlib.Path, name: str) -> list[dict]:
    return task_readers.read(tasks.TASKS[name].source, str(data / "tasks"), "train")


def task_text(data: pathlib.Path, name: str) -> list[str]:
    """The texts of a task's training split, each once, without labels."""
    found = []
    for record in records(data, name):
        if name in ("libreoffice_en_de", "e2e_nlg"):
            fields = ("en", "de") if name == "libreoffice_en_de" else ("mr", "ref")
            found += [record[field] for field in fields]
        elif name == "pep_titles":
            found.append(f"{record['title']}\n{record['text']}")
        elif name == "ud_ewt":
            found.append(" ".join(record["words"]))
        elif name == "xquad_en":
            found += [record["context"], record["question"]]
        else:
            found.append(record["sentence"])
    return list(dict.fromkeys(found))


def domains(data: pathlib.Path) -> dict[str, list[str]]:
    wiki = [
        article
        for part in ("test", "valid")
        for article in articles(data / f"corpora/wikitext2_{part}.txt.xz")
    ]
    return {
        "reviews": documents(data / "tasks/movie_reviews.jsonl.xz"),
        "wiki": wiki,
        "help": task_text(data, "libreoffice_en_de"),
        "peps": [record["text"] for record in records(data, "pep_titles")],
    }


def vocabulary_sample(data: pathlib.Path, general: list[str]) -> list[str]:
    """Paragraphs of all kinds of text, without regard to the splits of the tasks."""
    rng = random.Random(0)
    reviews = documents(data / "tasks/movie_reviews.jsonl.xz")[:1000]
    peps = documents(data / "corpora/peps.jsonl.xz")[:500]
    wiki = articles(data / "corpora/wikitext2_valid.txt.xz")
    sample = []
    for texts, most in ((general, 400), (wiki, 60), (reviews, 300), (peps, 60)):
        sample += rng.sample(texts, min(most, len(texts)))
    for line in list(lines(data / "tasks/libreoffice_help_en_de.tsv.xz"))[:8000]:
        sample += line.rstrip("\n").split("\t")
    meanings = list(lines(data / "tasks/e2e_nlg_dev.csv.xz"))[1:1500]
    sample += [line.strip() for line in meanings]
    return [part for text in sample for part in text.split("\n") if part.strip()]


def write(path: pathlib.Path, texts: list[str]):
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(rows), encoding="utf-8")


def save(output: pathlib.Path, name: str, texts: list[str]):
    held = {t for t in texts if hashlib.sha256(t.encode()).digest()[0] < 8}
    write(output / f"{name}_train.jsonl", [t for t in texts if t not in held])
    write(output / f"{name}_heldout.jsonl", [t for t in texts if t in held])
    size = sum(map(len, texts)) / 1e6
    print(f"{name:24} {len(texts):6} texts, {size:.2f} M characters")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    general = [
        text
        for name in GENERAL
        for text in documents(flags.data / f"corpora/{name}.jsonl.xz")
    ]
    texts = {"general": general} | domains(flags.data)
    texts |= {name: task_text(flags.data, name) for name in TASKS}
    for name, several in texts.items():
        save(flags.output, name, several)
    write(flags.output / "vocab.jsonl", vocabulary_sample(flags.data, general))
    sample, model = (flags.output / f"vocab.{kind}" for kind in ("jsonl", "model"))
    training.train(str(sample), PIECES, str(model))


if __name__ == "__main__":
    main()
