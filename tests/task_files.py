"""Small made-up files in the layouts that benchmarks are published in."""

import json
import pathlib

_GLUE = {
    "cola": (
        "CoLA",
        None,
        [
            "gj04\t1\t\tThe dog sleeps.",
            "gj04\t0\t*\tDog the sleeps.",
            "l-93\t1\t\tHe ran.",
        ],
    ),
    "sst2": ("SST-2", "sentence\tlabel", ['a "warm film \t1', "dull and long \t0"]),
    "mrpc": (
        "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t10\t11\tShe said "yes .\tShe agreed .', "0\t12\t13\tIt rains .\tHe ran ."],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        [
            "0\t1\t2\tHow old is he?\tWhat is his age?\t1",
            "1\t3\t4\tWhy?\tWho?\t0",
            "2\tx",
        ],
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
        "sentence2\tscore",
        [
            "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA jet lands."
            "\tA jet is landing.\t5.000",
            "1\tmain\tMSRvid\t2012\t2\tnone\tnone\tA man eats.\tA cat sleeps.\t0.340",
        ],
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse"
        "\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            "0\t1\t1n\tfiction\t( a )\t( b )\t(ROOT)\t(ROOT)"
            "\tHe sat.\tHe did sit.\tneutral"
            "\tentailment",
            "1\t2\t2c\tfiction\t( a )\t( b )\t(ROOT)\t(ROOT)"
            "\tHe sat.\tHe stood.\tneutral"
            "\tcontradiction",
        ],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        ["0\tWhere?\tIn Rome.\tentailment", "1\tWhen?\tIn Rome.\tnot_entailment"],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        ["0\tHe ran home.\tHe ran.\tentailment", "1\tNo.\tYes.\tnot_entailment"],
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        ["0\tThe cup fell; it broke.\tThe cup broke.\t1", "1\tA b.\tB a.\t0"],
    ),
}
_SUPERGLUE = {
    "boolq": (
        "BoolQ",
        [
            {
                "question": "is ice cold",
                "passage": "Ice is cold.",
                "idx": 0,
                "label": True,
            },
            {
                "question": "is ice hot",
                "passage": "Ice is cold.",
                "idx": 1,
                "label": False,
            },
        ],
    ),
    "cb": (
        "CB",
        [
            {
                "premise": "He left.",
                "hypothesis": "He went",
                "label": "entailment",
                "idx": 0,
            },
            {
                "premise": "He left.",
                "hypothesis": "He may",
                "label": "neutral",
                "idx": 1,
            },
        ],
    ),
    "copa": (
        "COPA",
        [
            {
                "premise": "The glass fell.",
                "choice1": "It broke.",
                "choice2": "It sang.",
                "question": "effect",
                "label": 0,
                "idx": 0,
            },
            {
                "premise": "The road was wet.",
                "choice1": "It was noon.",
                "choice2": "It had rained.",
                "question": "cause",
                "label": 1,
                "idx": 1,
            },
        ],
    ),
    "multirc": (
        "MultiRC",
        [
            {
                "idx": 0,
                "version": 1.1,
                "passage": {
                    "text": "<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>Bob slept.<br>",
                    "questions": [
                        {
                            "question": "Who ran?",
                            "idx": 0,
                            "answers": [
                                {"text": "Ann", "idx": 0, "label": 1},
                                {"text": "Bob", "idx": 1, "label": 0},
                            ],
                        }
                    ],
                },
            }
        ],
    ),
    "record": (
        "ReCoRD",
        [
            {
                "source": "made up",
                "passage": {
                    "text": "Ann met Bob\n@highlight\nBob left.",
                    "entities": [
                        {"start": 0, "end": 2},
                        {"start": 8, "end": 10},
                        {"start": 23, "end": 25},
                    ],
                },
                "idx": 0,
                "qas": [
                    {
                        "query": "Then @placeholder left.",
                        "answers": [{"start": 23, "end": 25, "text": "Bob"}],
                        "idx": 0,
                    }
                ],
            }
        ],
    ),
    "super_rte": (
        "RTE",
        [
            {"premise": "He ran.", "hypothesis": "He moved.", "label": "entailment"},
            {"premise": "He ran.", "hypothesis": "He sat.", "label": "not_entailment"},
        ],
    ),
    "wic": (
        "WiC",
        [
            {
                "word": "bank",
                "sentence1": "The bank closed.",
                "sentence2": "The river bank.",
                "idx": 0,
                "label": False,
                "start1": 4,
                "start2": 10,
                "end1": 8,
                "end2": 14,
                "version": 1.1,
            }
        ],
    ),
    "wsc": (
        "WSC",
        [
            {
                "text": "Mitchell asked Tom if he could lend some money.",
                "target": {
                    "span1_index": i,
                    "span1_text": name,
                    "span2_index": 4,
                    "span2_text": "he",
                },
                "idx": i,
                "label": name == "Tom",
            }
            for i, name in enumerate(("Mitchell", "Tom"))
        ],
    ),
}
CONTEXT = "The Denver Broncos (10–6) won 23-16 in Denver. “They” beat the Steelers."


def squad(answer: str = "Denver Broncos", start: int = 4) -> dict:
    """SQuAD 2.0: a question with two answers and one without."""
    answers = [
        {"text": answer, "answer_start": start},
        {"text": "Broncos", "answer_start": 11},
    ]
    qas = [
        {
            "id": "q1",
            "question": "Who won?",
            "answers": answers,
            "is_impossible": False,
        },
        {"id": "q2", "question": "Who sang?", "answers": [], "is_impossible": True},
    ]
    paragraph = {"context": CONTEXT, "qas": qas}
    return {"version": "v2.0", "data": [{"title": "A", "paragraphs": [paragraph]}]}


def write(name: str, folder: pathlib.Path) -> None:
    """The training and dev files of a task, the same examples in both."""
    if name in _GLUE:
        place, header, lines = _GLUE[name]
        text = "\n".join([*([header] if header else []), *lines]) + "\n"
        dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
        files = {"train.tsv": text, dev: text}
    elif name in _SUPERGLUE:
        place, objects = _SUPERGLUE[name]
        text = "".join(json.dumps(o) + "\n" for o in objects)
        files = {"train.jsonl": text, "val.jsonl": text}
    else:
        place, version = ".", "v1.1" if name == "squad" else "v2.0"
        found = squad()
        if name == "squad":
            found["data"][0]["paragraphs"][0]["qas"].pop()
        text = json.dumps(found)
        files = {f"train-{version}.json": text, f"dev-{version}.json": text}
    (folder / place).mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / place / file).write_text(content)


NAMES = (*_GLUE, *_SUPERGLUE, "squad", "squad2")
