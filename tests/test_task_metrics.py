"""Metrics of tasks against published values."""

import pathlib
import sys

import numpy as np
import pytest

from t5x_lite import task_metrics

ROUGE = pathlib.Path(__file__).resolve().parents[1].parent / "shared/data/tasks"


def one(name, targets, predictions, **given):
    return task_metrics.compute([name], targets, predictions, **given)


# The tests of T5's metrics (Raffel et al. 2020's released code), as fractions here
# where it has percent.
T5 = {
    "accuracy": ([0, 0, 2, 1], [0, 1, 2, 1], {"accuracy": 0.75}),
    "matthews": ([0, 0, 2, 1], [0, 1, 2, 1], {"matthews": 0.7}),
    "pearson": ([0, 2], [0, 1], {"pearson": 1.0}),
    "spearman": ([0, 2, 1], [0, 1, 2], {"spearman": 0.5}),
    "f1": ([0, 1, 1, 0], [0, 1, 2, 2], {"f1": 0.5}),
    "macro_f1": ([0, 1, 1, 2], [0, 0, 2, 2], {"macro_f1": 4 / 9}),
    "squad_em": (
        [
            ["big moose", "hippo"],
            ["correct1"],
            ["correct2.1", "correct2.2"],
            ["a", "b"],
        ],
        ["a big  Moose!", "wrong", "correct2.2", "c"],
        {"squad_em": 50.0},
    ),
    "squad_f1": ([["abc abd", "$$$$"]], ["abd"], {"squad_f1": 100 * 2 / 3}),
    "bleu": (
        [["", "this is a string"], ["this is a string", ""]],
        ["this is a string"] * 2,
        {"bleu": 100.0},
    ),
    "rouge": (
        [["this is a string"]] * 2,
        ["", ""],
        {"rouge1": 0.0, "rouge2": 0.0, "rougeLsum": 0.0},
    ),
    "exact_match": ([["a b"], ["a"]], ["a b", "a b"], {"exact_match": 0.5}),
}


@pytest.mark.parametrize("name", sorted(T5))
def test_values_of_t5(name):
    targets, predictions, expected = T5[name]
    assert one(name, targets, predictions) == pytest.approx(expected, abs=1e-9)


def test_squad_knows_questions_without_an_answer():
    """As SQuAD 2.0's script: all or nothing if one of the two says nothing."""
    found = task_metrics.compute(
        ["squad_em", "squad_f1"], [[""], [""], ["the"], ["cat"]], ["", "cat", "", ""]
    )
    assert found == {"squad_em": 50.0, "squad_f1": 50.0}  # "the" is an article


def test_rouge_of_a_thousand_summaries_is_that_of_the_perl_script():
    """ROUGE-1.5.5 on these files, from the tests of the rouge-score package.

    The script's numbers are the middle of bootstrap draws, so its own test allows
    0.002.
    """
    if not (ROUGE / "rouge_large").exists():
        pytest.skip("T5's ROUGE files are not in ../shared/data/tasks")
    texts = [
        (ROUGE / f"rouge_large/{kind}_large.txt").read_text().split("\n")
        for kind in ("target", "prediction")
    ]
    found = one("rouge", [[t] for t in texts[0]], texts[1])
    assert found["rouge1"] / 100 == pytest.approx(0.38554, abs=0.002)


def test_rouge_lsum_splits_sentences_as_t5_does():
    """Sentences in another order: line by line the same, as one line not."""
    target, said = "the cat sat . a dog ran .", "a dog ran . the cat sat ."
    assert one("rouge", [[target]], [said])["rougeLsum"] == pytest.approx(100.0)
    joined = (t.replace(" .", "") for t in (target, said))
    target, said = joined
    assert one("rouge", [[target]], [said])["rougeLsum"] == pytest.approx(50.0)


def test_the_best_of_several_texts_counts():
    right = [["a b c d", "w x y z"], ["a b c d", "w x y z"]]
    said = ["a b c d", "w x y z"]
    for name in ("rouge", "bleu", "chrf", "exact_match", "squad_f1"):
        values = one(name, right, said).values()
        assert [*values] == pytest.approx(
            [1.0 if name == "exact_match" else 100.0] * len(values)
        )
    with_one = one("bleu", [["a b c d"], ["a b c d", "w x y z"]], said)
    assert with_one["bleu"] == pytest.approx(100.0)  # as many as there are


def test_calibration_error_by_hand():
    """Guo et al. 2017, equations 2, 3 and 5, bin by bin."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1.0, 1.0, 1.0], size=500)
    targets = rng.integers(0, 3, 500)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == targets
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.sum() / 500 * gap
    found = one("ece", targets, right, probabilities=shares)
    assert found["ece"] == pytest.approx(expected)
    certain = np.eye(3)[[0, 1, 2]]
    assert one("ece", [0, 1, 2], [0, 1, 2], probabilities=certain) == {"ece": 0.0}
    assert one("ece", [0], [0]) == {}


def test_groups_and_words():
    found = one("group_match", [0, 1, 1, 0], [0, 1, 0, 0], groups=["a", "a", "b", "c"])
    assert found["group_match"] == pytest.approx(2 / 3)
    found = one(
        "tag_accuracy", [["A", "B"], ["A", "A", "A"]], [["A", "A"], ["A", "B", ""]]
    )
    assert found == {"tag_accuracy": 0.4}


def test_constant_answers_do_not_correlate():
    for name in ("pearson", "spearman"):
        assert one(name, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == {name: 0.0}


def test_what_cannot_be_computed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'blue' is unknown: accuracy"):
        one("blue", [1], [1])
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        one("accuracy", [1, 2], [1])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 't5x-lite\[tasks\]'"):
        one("bleu", [["a"]], ["a"])
