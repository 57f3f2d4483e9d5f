"""Answers of models to tasks: heads, writing, ranking, minimal pairs, the command."""

import itertools
from unittest import mock

import jax
import numpy as np
import pytest
from scipy import special

from t5x_lite import evaluate_tasks, evaluations, generate, model, prompting, scoring
from t5x_lite.data import head_rows, task_batches, tasks
from t5x_lite.settings import Settings
from tests import task_files
from tests.answering import WORDS, untrained
from tests.tiny import tiny_config


def log_softmax(logits_BTV) -> np.ndarray:
    """Over the ids that the vocabulary has."""
    logits = np.asarray(logits_BTV, np.float64)[..., : WORDS.size]
    return logits - special.logsumexp(logits, axis=-1, keepdims=True)


# ---- scores of texts ----------------------------------------------------------------


@pytest.mark.parametrize(
    "structure",
    [
        "encoder_decoder",
        "prefix_lm",
        pytest.param("decoder", marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_the_decoder_with_its_cache(structure):
    """What greedy decoding writes has the score that decoding gave it."""
    _, net, params = untrained(structure)
    rows = [np.append(WORDS.encode(t), 1).astype(np.int32) for t in ("ab c", "x")]
    settings = Settings(max_length=6, min_length=6)
    written = generate.continue_all(net, params, WORDS, rows, settings)
    asks = [
        scoring.Ask(row, one[0].ids) for row, one in zip(rows, written, strict=True)
    ]
    found = scoring.tokens(net, params, WORDS, asks)
    for logp_T, one, row in zip(found, written, rows, strict=True):
        score = logp_T.sum()
        if one[0].ended:
            asked = scoring.Ask(row, np.append(one[0].ids, WORDS.eos_id))
            (logp_T,) = scoring.tokens(net, params, WORDS, [asked])
            score = logp_T.sum()
        assert score == pytest.approx(one[0].score, abs=2e-4)


@pytest.mark.parametrize("structure", ["decoder", "encoder_decoder"])
def test_the_chain_rule_holds(structure):
    """log P(ab | c) = log P(a | c) + log P(b | ca), token by token."""
    _, net, params = untrained(structure)
    given, text = np.array([70, 71, 1]), np.array([80, 81, 82, 83])
    asks = [scoring.Ask(given, text[:n]) for n in range(1, 5)]
    found = scoring.tokens(net, params, WORDS, asks, batch_size=3)
    for shorter in found[:3]:
        np.testing.assert_allclose(shorter, found[3][: len(shorter)], atol=1e-5)
    skipped = scoring.tokens(net, params, WORDS, [scoring.Ask(given, text, skip=2)])
    np.testing.assert_allclose(skipped[0], found[3][2:], atol=1e-5)


def test_an_encoder_hides_one_token_after_the_other():
    """Salazar et al. 2020, equation 1, with the logits of all cells."""
    cfg, net, params = untrained("encoder")
    text = "abc de"
    ids = WORDS.encode(text)
    cls, sep = WORDS.special("cls"), WORDS.special("sep")
    whole = np.concatenate([[cls], ids, [sep]]).astype(np.int32)

    @jax.jit
    def logits(stream):
        bound = model.bind(net, params, cfg.model.dtype)
        return bound.logits(bound.outputs({"main": stream}).cells_BKE)

    expected = 0.0
    for k in range(1, len(whole) - 1):
        hidden = whole.copy()
        hidden[k] = WORDS.mask_id
        T = len(whole)
        stream = dict(
            tokens=hidden[None],
            positions=np.arange(T, dtype=np.int32)[None],
            segments=np.ones((1, T), np.int32),
            ranks=np.zeros((1, T), np.int32),
            targets=whole[None],
            weights=np.ones((1, T), np.float32),
        )
        expected += log_softmax(logits(stream))[0, k, whole[k]]
    (found,) = scoring.texts(net, params, WORDS, cfg, [text])
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_model_of_gaps_reads_a_gap_and_writes_behind_its_sentinel():
    cfg, _, _ = untrained("encoder_decoder")
    ask = scoring.ask(WORDS, cfg, "ab", "c")
    first = WORDS.sentinel(0)
    assert ask.given.tolist() == [*WORDS.encode("ab"), first, WORDS.eos_id]
    assert ask.text.tolist() == [first, *WORDS.encode(" c")] and ask.skip == 1
    cfg, _, _ = untrained("decoder")
    ask = scoring.ask(WORDS, cfg, "ab\n", "c")
    assert ask.given.tolist() == [WORDS.eos_id, *WORDS.encode("ab\n")]
    assert ask.text.tolist() == WORDS.encode("c").tolist()


# ---- ranking ------------------------------------------------------------------------

COPA = {
    "premise": "The glass fell.",
    "choice1": "It broke.",
    "choice2": "It sang a song.",
    "question": "effect",
    "label": "choice1",
}


@pytest.mark.parametrize("norm", prompting.NORMS)
def test_ranking_takes_the_likeliest_by_its_norm(norm):
    """Brown et al. 2020, section 2.4, from scores of single texts."""
    cfg, net, params = untrained("decoder")
    task = tasks.TASKS["copa"]
    shots = prompting.Shots(norm=norm)
    given = net, params, WORDS, cfg
    answers = prompting.rank(*given, task, [COPA, COPA], shots=shots)
    choices = [COPA["choice1"], COPA["choice2"]]
    prompt = "The glass fell.\nWhat happened as a result?"
    expected = np.array(scoring.texts(*given, choices, prompt))
    if norm == "token":
        expected /= [len(f" {c}") for c in choices]  # bytes
    if norm == "unconditional":
        expected -= scoring.texts(*given, choices, "Answer:")
    np.testing.assert_allclose(answers.texts[0]["scores"], expected, atol=1e-3)
    assert answers.predictions == [int(expected.argmax())] * 2
    assert answers.targets == [0, 0]
    assert answers.metrics(task)["accuracy"] == float(expected.argmax() == 0)


def test_shots_are_drawn_by_seed_and_number():
    task = tasks.TASKS["sst2"]
    examples = [
        {"sentence": f"film {i}", "label": ("negative", "positive")[i % 2]}
        for i in range(20)
    ]
    record = {"sentence": "this one", "label": "positive"}

    def prompt(seed, nth, count=3):
        shots = prompting.Shots(count, seed)
        return prompting.few_shot(task, examples, record, shots, nth)

    assert prompt(0, 0, 0) == "Review: this one\nSentiment:"
    assert prompt(0, 5) == prompt(0, 5) != prompt(1, 5)
    assert prompt(0, 5) != prompt(0, 6)
    *shown, last = prompt(0, 5).split("\n\n")
    assert len(shown) == 3 and last == "Review: this one\nSentiment:"
    for text in shown:
        number = int(text.split()[2])
        assert text == f"Review: film {number}\nSentiment: " + (
            "positive" if number % 2 else "negative"
        )
    # A question is not among its own examples with answers.
    shots = prompting.Shots(19)
    own = prompting.few_shot(task, examples, examples[7], shots, 0)
    assert own.count("film 7\n") == 1 and own.count("Sentiment:") == 20
    with pytest.raises(ValueError, match="norm='mean'"):
        prompting.Shots(norm="mean")


def test_tasks_without_classes_cannot_be_ranked():
    cfg, net, params = untrained("decoder")
    with pytest.raises(ValueError, match="has no classes to choose of"):
        prompting.rank(net, params, WORDS, cfg, tasks.TASKS["e2e_nlg"], [{}])


@pytest.mark.parametrize("structure", ["decoder", "encoder"])
def test_minimal_pairs_count_by_paradigm(structure):
    cfg, net, params = untrained(structure)
    pairs = [("a", "ab cd", "dc ba"), ("a", "x y", "y x"), ("b", "same", "same")]
    records = [dict(paradigm=p, good=g, bad=b) for p, g, b in pairs]
    metrics, rows = prompting.minimal_pairs(net, params, WORDS, cfg, records)
    scores = [
        scoring.texts(net, params, WORDS, cfg, [good, bad]) for _, good, bad in pairs
    ]
    right = [good > bad for good, bad in scores]
    assert not right[2]  # a tie is wrong
    assert metrics == {
        "accuracy": pytest.approx(np.mean(right)),
        "accuracy/a": np.mean(right[:2]),
        "accuracy/b": 0.0,
    }
    assert rows[0]["good_score"] == pytest.approx(scores[0][0], abs=1e-4)


def test_pairs_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^--blimp={tmp_path}: .*blimp.jsonl"):
        prompting.read_pairs(str(tmp_path))


def test_bits_per_byte_by_hand():
    """Nats of all tokens, EOS included, over the bytes of the text."""
    ids = np.append(WORDS.encode("héllo"), WORDS.eos_id)[None]  # 6 bytes, 7 tokens
    weights = np.ones_like(ids, np.float32)
    batches = mock.Mock()
    batches.whole.return_value = {"main": dict(targets=ids, weights=weights)}
    setup = mock.Mock(cfg=untrained("decoder")[0], vocab=WORDS)
    setup.heldouts, setup.heldout_steps.return_value = {"": batches}, range(2)
    found = dict(heldout_loss=0.5, heldout_tokens=14)
    expected = 14 * 0.5 / np.log(2) / 12
    found = evaluations.bits_per_byte(setup, found)
    assert found == {"heldout_bits_per_byte": pytest.approx(expected)}
    setup.cfg = untrained("encoder")[0]
    assert evaluations.bits_per_byte(setup, found) == {}


# ---- heads --------------------------------------------------------------------------


def test_the_best_span_by_brute_force():
    context = task_files.CONTEXT + " b c" * 20  # an answer has 30 words at most
    length = 192
    maker = head_rows.RowMaker(
        tasks.TASKS["squad"], "span", "encoder", WORDS, length, 100
    )
    record = {"question": "Who?", "context": context, "answers": []}
    rng = np.random.default_rng(0)
    for row in maker.rows([record]):
        assert row.characters is not None
        start_T, end_T = rng.normal(size=(2, length)).astype(np.float32)
        start_T[: length // 3] += 9.0
        end_T[-length // 3 :] += 9.0
        best = (-np.inf, "")
        for i, j in itertools.combinations_with_replacement(range(length), 2):
            if j >= len(row.tokens) or min(row.characters[[i, j], 1]) < 0:
                continue
            text = context[row.characters[i, 0] : row.characters[j, 1]]
            score = float(start_T[i]) + float(end_T[j])
            if score > best[0] and len(text.split()) <= evaluate_tasks.LONGEST_ANSWER:
                best = (score, text)
        found = evaluate_tasks.best_span(row, start_T, end_T, context)
        assert found[1] == best[1] and found[0] == pytest.approx(best[0])


def head(name: str, records: list[dict], head: str, classes: int = 0, length=64):
    """(model config, examples) of records."""
    cfg = tiny_config(
        data=dict(inputs_length=length, task_format="head", stride=20),
        model=dict(structure="encoder", head=head, classes=classes),
    )
    task = tasks.TASKS[name]
    return cfg.model, task_batches.HeadExamples(
        cfg, WORDS, {name: task}, {name: records}
    )


def test_windows_of_a_context_vote_for_one_answer():
    """The best of all windows, unless "no answer" is likelier in every one."""
    context = task_files.CONTEXT
    records = [
        {"question": "Who?", "context": context, "answers": [("Broncos", 11)]},
        {"question": "Who?", "context": context, "answers": []},
    ]
    cfg, made = head("squad", records, "span", length=48)
    assert len(made) > 4
    start, end = np.full((2, len(made), 48), -10.0, np.float32)
    for i, row in enumerate(made.rows):
        start[i, row.pooled] = end[i, row.pooled] = 2.0
        if row.record == 0 and row.span[0] != row.pooled:
            start[i, row.span[0]] = end[i, row.span[1]] = 3.0
            start[i, row.pooled] = 0.0
    answers = evaluate_tasks.answers_of(
        cfg, made, dict(start_logits=start, end_logits=end)
    )
    assert answers.predictions == ["Broncos", ""]
    assert answers.targets == [["Broncos"], [""]]
    assert answers.metrics(tasks.TASKS["squad"]) == dict(squad_f1=100.0, squad_em=100.0)


def test_tags_of_words_that_were_cut_are_wrong():
    record = {"words": ["Dogs", "bark", "loudly"], "tags": ["NOUN", "VERB", "ADV"]}
    cfg, made = head("ud_ewt", [record], "tags", 17, length=11)
    tags = np.full((1, 11), tasks.UPOS.index("VERB"), np.int32)
    tags[0, 1] = tasks.UPOS.index("NOUN")
    answers = evaluate_tasks.answers_of(cfg, made, {"tags": tags})
    assert answers.predictions == [["NOUN", "VERB", ""]]
    assert answers.metrics(tasks.TASKS["ud_ewt"])["tag_accuracy"] == pytest.approx(
        2 / 3
    )


def test_classes_have_probabilities():
    records = [{"sentence": "a", "label": label} for label in ("negative", "positive")]
    cfg, made = head("sst2", records, "class", 2)
    logits = np.log([[0.75, 0.25], [0.9, 0.1], [0.5, 0.5]])  # a row that fills up
    answers = evaluate_tasks.answers_of(cfg, made, {"logits": logits})
    assert answers.predictions == [0, 0] and answers.targets == [0, 1]
    assert answers.probabilities is not None
    np.testing.assert_allclose(answers.probabilities, [[0.75, 0.25], [0.9, 0.1]])
    found = answers.metrics(tasks.TASKS["sst2"])
    assert found["accuracy"] == 0.5 and found["ece"] == pytest.approx(
        0.25 / 2 + 0.9 / 2
    )
