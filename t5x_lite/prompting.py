"""Tasks without training: which of some texts does a model find the likeliest?

Rank classification scores every answer behind a prompt, after no or a few examples with
their answers (Brown et al. 2020, section 2.4); minimal pairs ask whether the acceptable
sentence is likelier than the other one (Warstadt et al. 2020).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite import scoring
from t5x_lite.config import Config
from t5x_lite.data import task_readers, tasks
from t5x_lite.data.task_readers import Source
from t5x_lite.data.task_texts import Record
from t5x_lite.evaluate_tasks import Answers
from t5x_lite.vocab import Vocab

# How the score of an answer is made of the log-probabilities of its tokens.
NORMS = ("sum", "token", "unconditional")
NOTHING = "Answer:"  # the prompt of an answer's probability by itself
BLIMP = Source(
    "jsonl",
    "blimp.jsonl.xz",
    dev=None,
    fields=dict(paradigm="uid", good="good", bad="bad"),
)


@dataclasses.dataclass(frozen=True)
class Shots:
    """How a task is asked.

    Attributes:
        count: k examples with answers before the question, drawn anew for each one.
        seed: of these.
        norm: "sum" of the log-probabilities, their mean per "token", or the sum less
            that behind "Answer:" ("unconditional").
    """

    count: int = 0
    seed: int = 0
    norm: str = "sum"

    def __post_init__(self):
        if self.count < 0 or self.norm not in NORMS:
            raise ValueError(
                f"shots={self.count}, norm={self.norm!r}: allowed are 0 or more, and "
                f"{', '.join(NORMS)}."
            )


def prompt(task: tasks.Task, record: Record) -> str:
    """The question, without its answer."""
    if task.prompt:
        return task.prompt.format(**record)
    fields = [f"{name}: {record[name]}" for name in task.inputs if name in record]
    if "choice" in task.heads:
        return "\n".join(tasks.parts_of(task, record))
    return "\n".join([*fields, "answer:"])


def options(task: tasks.Task, record: Record) -> list[str]:
    """The answers that there are, in the order of the classes."""
    if "choice" in task.heads:
        return [record[name] for name in task.classes]
    return [*(task.verbal or task.classes)]


def few_shot(
    task: tasks.Task, examples: Sequence[Record], record: Record, shots: Shots, nth: int
) -> str:
    """k examples with answers, then the prompt; blank lines between them.

    Args:
        examples: what is drawn of, by (seed, nth); the record itself is left out.
    """
    rng = np.random.default_rng((shots.seed, nth))
    shown = []
    drawn = rng.permutation(len(examples))[: shots.count + 1]
    others = [i for i in drawn if examples[i] != record]
    for i in others[: shots.count]:
        answer = options(task, examples[i])[task.classes.index(examples[i]["label"])]
        shown.append(f"{prompt(task, examples[i])} {answer}")
    return "\n\n".join([*shown, prompt(task, record)])


def rank(
    net: Any,
    params: dict,
    words: Vocab,
    cfg: Config,
    task: tasks.Task,
    records: Sequence[Record],
    examples: Sequence[Record] = (),
    shots: Shots | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Answers:
    """Answers each record with its likeliest option.

    Args:
      examples: of the training split, for `shots`.

    Raises:
      ValueError: a task without options, or more shots than examples.
    """
    shots = shots or Shots()
    if not task.classes or "tags" in task.heads:
        raise ValueError(
            f"task {task.prefix!r} has no classes to choose of: it cannot be asked by "
            "rank classification. Train on it, or take a task with classes."
        )
    if shots.count > len(examples):
        raise ValueError(f"shots={shots.count}: there are {len(examples)} examples.")
    asks, owners = [], []
    for n, record in enumerate(records):
        given = few_shot(task, examples, record, shots, n)
        for answer in options(task, record):
            asks.append(_fitting(scoring.ask(words, cfg, given, answer), net, words))
            owners.append(n)
    bar = "rank" if progress else ""
    found = scoring.tokens(
        net, params, words, asks, batch_size=batch_size, progress=bar
    )
    scores = np.array([logp_T.sum() for logp_T in found], np.float64)
    if shots.norm == "token":
        scores /= np.array([max(len(logp_T), 1) for logp_T in found])
    elif shots.norm == "unconditional":
        answers = [a for record in records for a in options(task, record)]
        alone = {a: 0.0 for a in answers}
        prior = scoring.texts(net, params, words, cfg, [*alone], NOTHING)
        alone = dict(zip(alone, prior, strict=True))
        scores -= np.array([alone[a] for a in answers])
    scores_NK = scores.reshape(len(records), -1)
    shares_NK = np.exp(scores_NK - scores_NK.max(axis=1, keepdims=True))
    shares_NK /= shares_NK.sum(axis=1, keepdims=True)
    targets = [task.classes.index(record["label"]) for record in records]
    chosen = np.argmax(scores_NK, axis=1).tolist()
    rows = [
        {
            "input": prompt(task, record),
            "target": record["label"],
            "prediction": task.classes[choice],
            "scores": [round(float(s), 4) for s in scores_NK[n]],
        }
        for n, (record, choice) in enumerate(zip(records, chosen, strict=True))
    ]
    groups = [r["group"] for r in records] if "group" in records[0] else None
    return Answers(targets, chosen, rows, shares_NK, groups)


def _fitting(ask: scoring.Ask, net: Any, words: Vocab) -> scoring.Ask:
    """Without the beginning of what is given, where the positions do not reach."""
    if net.cfg.positions not in ("learned", "sinusoidal"):
        return ask
    # The layouts pad to powers of two, but only cells with text need positions.
    room = net.cfg.max_positions - len(ask.text) - 2
    return ask._replace(given=ask.given[max(len(ask.given) - room, 0) :])


def minimal_pairs(
    net: Any,
    params: dict,
    words: Vocab,
    cfg: Config,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[dict[str, float], list[dict]]:
    """(accuracy of all and of each paradigm, a row for each pair): BLiMP.

    Right is a higher log-probability of the good sentence; a tie is wrong.
    """
    sentences = [record[kind] for record in records for kind in ("good", "bad")]
    asks = [scoring.ask(words, cfg, "", sentence) for sentence in sentences]
    bar = "pairs" if progress else ""
    found = scoring.tokens(
        net, params, words, asks, batch_size=batch_size, progress=bar
    )
    scores_N2 = np.array([logp.sum() for logp in found], np.float64).reshape(-1, 2)
    right_N = scores_N2[:, 0] > scores_N2[:, 1]
    rows, by_paradigm = [], {}
    for record, (good, bad), right in zip(records, scores_N2, right_N, strict=True):
        by_paradigm.setdefault(record["paradigm"], []).append(bool(right))
        rows.append(record | {"good_score": float(good), "bad_score": float(bad)})
    metrics = {"accuracy": float(np.mean(right_N))}
    for name, each in sorted(by_paradigm.items()):
        metrics[f"accuracy/{name}"] = float(np.mean(each))
    return metrics, rows


def read_pairs(folder: str, each: int = 0) -> list[Record]:
    """The pairs of blimp.jsonl.xz in a folder; of each paradigm the first `each`.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        records = task_readers.read(BLIMP, folder, "train")
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"--blimp={folder}: there is no {BLIMP.train} in it. Give the folder that "
            "has it."
        ) from e
    if not each:
        return records
    seen: dict[str, int] = {}
    kept = []
    for record in records:
        seen[record["paradigm"]] = seen.get(record["paradigm"], 0) + 1
        if seen[record["paradigm"]] <= each:
            kept.append(record)
    return kept
