"""Metrics of labelled tasks, from the libraries that papers use.

Each is a function (targets, predictions, ...) -> {name: number}. BLEU, chrF, ROUGE and
SQuAD's two are in percent, as they are published; all others are fractions.
"""

import collections
import importlib.util
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BINS = 15  # of the calibration error


def compute(
    names: Sequence[str], targets: Sequence, predictions: Sequence, **given
) -> dict[str, float]:
    """All metrics of some names.

    Args:
        names: keys of `METRICS`. "ece" is left out where there are no probabilities.
        targets: class numbers, floats, lists of tags, or lists of right texts.
        predictions: as many; class -1 = none of the classes.
        given: probabilities [N, K] of the classes; groups, a name for each example.

    Raises:
        ValueError: an unknown name, or lists of different lengths.
        ModuleNotFoundError: naming the extra to install.
    """
    check(names)
    if len(targets) != len(predictions) or not len(targets):
        raise ValueError(
            f"{len(targets)} targets and {len(predictions)} predictions: as many of "
            "both, at least one, are needed."
        )
    found: dict[str, float] = {}
    for name in names:
        if name == "ece" and given.get("probabilities") is None:
            continue
        found |= METRICS[name](targets, predictions, **given)
    return {name: float(value) for name, value in found.items()}


def check(names: Sequence[str]):
    """Refuses metrics that cannot be computed here.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: naming the extra to install.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric {name!r} is unknown: {', '.join(METRICS)}.")
        package = _PACKAGES.get(name)
        if package and not importlib.util.find_spec(package):
            raise ModuleNotFoundError(
                f"metric {name!r} needs {package!r}: pip install 't5x-lite[tasks]'."
            )


def accuracy(targets, predictions, **_):
    from sklearn import metrics

    return {"accuracy": metrics.accuracy_score(targets, predictions)}


def f1(targets, predictions, **_):
    """Of class 1. What is neither class counts as the wrong one, as in T5's code."""
    from sklearn import metrics

    targets, predictions = np.asarray(targets), np.asarray(predictions)
    valid = (predictions == 0) | (predictions == 1)
    predictions = np.where(valid, predictions, 1 - targets)
    return {"f1": metrics.f1_score(targets, predictions)}


def macro_f1(targets, predictions, **_):
    """The mean over the classes that occur among the targets."""
    from sklearn import metrics

    labels = sorted(set(targets))
    score = metrics.f1_score(targets, predictions, labels=labels, average="macro")
    return {"macro_f1": score}


def matthews(targets, predictions, **_):
    from sklearn import metrics

    return {"matthews": metrics.matthews_corrcoef(targets, predictions)}


def group_match(targets, predictions, groups=None, **_):
    """Share of groups that are right as a whole (MultiRC's questions)."""
    if groups is None:
        raise ValueError("metric 'group_match' needs groups.")
    right: dict[Any, bool] = {}
    for group, target, prediction in zip(groups, targets, predictions, strict=True):
        right[group] = right.get(group, True) and target == prediction
    return {"group_match": np.mean([*right.values()])}


def ece(targets, predictions, probabilities=None, **_):
    """Expected calibration error (Guo et al. 2017, section 2) with 15 equal bins."""
    confidence_N = np.max(np.asarray(probabilities), axis=1)
    right_N = np.asarray(targets) == np.argmax(np.asarray(probabilities), axis=1)
    bins_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    total = 0.0
    for b in np.unique(bins_N):
        here = bins_N == b
        total += abs(np.mean(right_N[here]) - np.mean(confidence_N[here])) * here.sum()
    return {"ece": total / len(confidence_N)}


def _correlation(name: str):
    def correlation(targets, predictions, **_):
        from scipy import stats

        if len(set(targets)) < 2 or len(set(predictions)) < 2:
            return {name: 0.0}  # the same number for all says nothing
        return {name: getattr(stats, f"{name}r")(targets, predictions).statistic}

    return correlation


def tag_accuracy(targets, predictions, **_):
    """Of all words; `targets` and `predictions` are lists of lists of tags."""
    from sklearn import metrics

    return {
        "tag_accuracy": metrics.accuracy_score(
            [tag for tags in targets for tag in tags],
            [tag for tags in predictions for tag in tags],
        )
    }


def bleu(targets, predictions, **_):
    """sacrebleu's corpus BLEU with T5's tokenisation, over all right texts."""
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(
            [*predictions], _by_place(targets), tokenize="intl"
        ).score
    }


def chrf(targets, predictions, **_):
    import sacrebleu

    return {"chrf": sacrebleu.corpus_chrf([*predictions], _by_place(targets)).score}


def _by_place(targets) -> list[list[Any]]:
    """Lists of right texts -> the first ones, the second ones, ...; None = no more."""
    most = max(map(len, targets))
    return [[t[i] if i < len(t) else None for t in targets] for i in range(most)]


def rouge(targets, predictions, **_):
    """ROUGE-1, -2 and -Lsum F1 in percent, the best over all right texts.

    As T5's code: a sentence that ends with " . " ends a line. The mean over the
    examples, of which T5's code takes the median of 1000 bootstrap draws.
    """
    from rouge_score import rouge_scorer

    kinds = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(kinds)

    def lines(text: str) -> str:
        return text.replace(" . ", " .\n")

    scores = [
        scorer.score_multi([*map(lines, right)], lines(prediction))
        for right, prediction in zip(targets, predictions, strict=True)
    ]
    return {kind: 100 * np.mean([s[kind].fmeasure for s in scores]) for kind in kinds}


def exact_match(targets, predictions, **_):
    """Share of predictions that are one of the right texts, to the letter."""
    pairs = zip(targets, predictions, strict=True)
    return {
        "exact_match": np.mean([prediction in right for right, prediction in pairs])
    }


def normalise_squad(answer: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def squad_em(targets, predictions, **_):
    """SQuAD's exact match, the best over the answers."""
    return {"squad_em": _squad(targets, predictions, lambda a, b: float(a == b))}


def squad_f1(targets, predictions, **_):
    """SQuAD's F1 of words, the best over the answers."""
    return {"squad_f1": _squad(targets, predictions, _words_f1)}


def _squad(targets, predictions, score: Callable[[str, str], float]) -> float:
    best = [
        max(score(normalise_squad(t), normalise_squad(prediction)) for t in right)
        for right, prediction in zip(targets, predictions, strict=True)
    ]
    return 100 * float(np.mean(best))


def _words_f1(target: str, prediction: str) -> float:
    wanted, said = target.split(), prediction.split()
    if not wanted or not said:  # SQuAD 2.0: no answer is right or wrong as a whole
        return float(wanted == said)
    common = sum((collections.Counter(wanted) & collections.Counter(said)).values())
    return 2 * common / (len(wanted) + len(said))


METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "group_match": group_match,
    "ece": ece,
    "pearson": _correlation("pearson"),
    "spearman": _correlation("spearman"),
    "tag_accuracy": tag_accuracy,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "exact_match": exact_match,
    "squad_em": squad_em,
    "squad_f1": squad_f1,
}
_SKLEARN = ("accuracy", "f1", "macro_f1", "matthews", "tag_accuracy")
_PACKAGES = {  # that a metric imports
    **dict.fromkeys(_SKLEARN, "sklearn"),
    **dict.fromkeys(("pearson", "spearman"), "scipy"),
    **dict.fromkeys(("bleu", "chrf"), "sacrebleu"),
    "rouge": "rouge_score",
}
