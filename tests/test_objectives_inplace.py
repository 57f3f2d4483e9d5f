"""In-place objectives: masked, causal, permuted, mixed directions, query streams."""

import itertools
from typing import Any

import numpy as np
import pytest

from t5x_lite.data import mining
from t5x_lite.example import Passages
from t5x_lite.layouts import single
from t5x_lite.objectives import lm, masking, pseudo
from t5x_lite.objectives.draws import Draws
from tests.inplace import (
    MODEL,
    VOCABS,
    built,
    documents,
    every_vocab,
    load,
    rate_is,
    raw_text,
)

MASKED = (masking.masked_lm, masking.masked_lm_lengths)
UNILM = (lm.unilm, lm.unilm_lengths)
FLOW = (pseudo.span_flow, pseudo.span_flow_lengths)
PHRASES = dict(units="phrase", spans="{phrases}")
MACBERT = dict(units="word", ngrams=(0.4, 0.3, 0.2, 0.1), similar="{similar}")
# name -> (make, lengths, knobs); {phrases} and {similar} are mined files.
CASES = {
    "roberta": (*MASKED, {}),
    "bert": (*MASKED, dict(sentence="nsp")),
    "albert": (*MASKED, dict(sentence="sop", ngrams=(6 / 11, 3 / 11, 2 / 11))),
    "electra": (*MASKED, dict(mask=0.85, random=0.0)),
    "nezha": (*MASKED, dict(units="word")),
    "ernie": (*MASKED, PHRASES),
    "macbert": (*MASKED, MACBERT | dict(decide="unit", sentence="sop")),
    "structbert": (*MASKED, dict(sentence="three_way", shuffle=0.05)),
    "causal_lm": (lm.causal_lm, lm.causal_lm_lengths, {}),
    "permuted_lm": (lm.permuted_lm, lm.permuted_lm_lengths, {}),
    "unilm": (*UNILM, {}),
    "unilm_words": (*UNILM, dict(units="word", mode_types=True)),
    "pseudo_masked": (pseudo.pseudo_masked, pseudo.pseudo_masked_lengths, {}),
    "span_flow": (*FLOW, {}),
    "span_flow_phrases": (*FLOW, PHRASES | dict(noise=0.3)),
}
# What hides the answer: corrupted input, or ranks and query streams.
CORRUPTED = [
    n for n, (make, *_) in CASES.items() if make in (masking.masked_lm, lm.unilm)
]


QUERIED = [n for n in CASES if n.startswith(("permuted", "pseudo", "span"))]


every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """Knobs whose files are mined from the held-out text, for each vocabulary."""
    folder = tmp_path_factory.mktemp("mined")
    for i, spec in enumerate(VOCABS):
        phrases = mining.mine_phrases(documents(spec), load(spec), min_pmi=1.0)
        np.savez(folder / f"{i}.npz", **phrases)
        table = mining.similar_words(documents(spec), load(spec), dims=20)
        np.save(folder / f"{i}.npy", table)

    def fill(name, spec):
        i = VOCABS.index(spec)
        files = dict(phrases=folder / f"{i}.npz", similar=folder / f"{i}.npy")
        knobs = CASES[name][2].items()
        return {k: v.format(**files) if isinstance(v, str) else v for k, v in knobs}

    return fill


def make(name, spec, knobs, *, first=0, batch=16, length=96, seed=3, **more) -> Any:
    knobs = {**knobs, **more}
    function, lengths, _ = CASES[name]
    raw, _, _ = lengths(length, **knobs)
    pairs = knobs.get("sentence", "none") != "none"
    text = raw_text(spec, first, batch, raw, pairs)
    return function(text, Draws(seed, first, batch), load(spec), **knobs)


def sees(example, vocab, b):
    """bool [cells, cells] of row b, the rank rule said slowly; own stream first."""
    T = example.tokens_BT.shape[1]
    real = example.tokens_BT[b] != vocab.pad_id
    ranks = np.zeros(T) if example.ranks_BT is None else example.ranks_BT[b]
    queries, groups = [ranks], [np.zeros(T)]
    if example.query_ranks_BGT is not None:
        queries += list(example.query_ranks_BGT[b])
        none = np.zeros_like(example.query_ranks_BGT[b])
        given = example.query_groups_BGT
        groups += list(none if given is None else given[b])
    query, group = np.concatenate(queries), np.concatenate(groups)
    n = len(query)
    seen = np.zeros((n, n), bool)
    for q, k in itertools.product(range(n), range(n)):
        if k < T:
            seen[q, k] = real[k] and real[q % T] and ranks[k] <= query[q]
        else:
            seen[q, k] = q >= T and group[q] == group[k] > 0
    return seen


def reached(seen):
    """Whatever information reaches a cell through any number of layers."""
    reach = seen | np.eye(len(seen), dtype=bool)
    while True:
        further = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        if (further == reach).all():
            return reach
        reach = further


@every_vocab
@every_case
def test_shapes_are_those_promised_and_the_batch_contract_holds(name, spec, mined):
    from t5x_lite import example as contract

    knobs = mined(name, spec)
    example = make(name, spec, knobs)
    raw, T, K = CASES[name][1](96, **knobs)
    assert example.tokens_BT.shape == (16, T) and T == 96
    assert example.targets_BK.shape == example.weights_BK.shape == (16, K)
    contract.check(single(example, load(spec)), load(spec).size)
    assert example.weights_BK.sum(axis=1).min() > 0
    if example.places_BK is not None:
        for places, weights in zip(example.places_BK, example.weights_BK, strict=True):
            assert len(set(places[weights > 0])) == (weights > 0).sum()


@every_vocab
@every_case
def test_an_example_does_not_depend_on_its_batch(name, spec, mined):
    knobs = mined(name, spec)
    whole = make(name, spec, knobs, first=40, batch=9)
    parts = [make(name, spec, knobs, first=f, batch=b) for f, b in [(40, 2), (42, 7)]]
    for field, value in vars(whole).items():
        if value is not None:
            split = [getattr(part, field) for part in parts]
            np.testing.assert_array_equal(np.concatenate(split), value, err_msg=field)
    other = make(name, spec, knobs, first=40, batch=9, seed=4)
    if name != "causal_lm":
        assert any(
            (a != b).any()
            for a, b in zip(vars(whole).values(), vars(other).values(), strict=True)
            if a is not None
        )


@every_vocab
@pytest.mark.parametrize("name", ["causal_lm", *QUERIED])
def test_no_query_is_reached_by_its_own_answer(name, spec, mined):
    example = make(name, spec, mined(name, spec), batch=4, length=40)
    T = example.tokens_BT.shape[1]
    for b in range(4):
        reach = reached(sees(example, load(spec), b))
        if name == "causal_lm":
            assert not reach[np.arange(T - 1), np.arange(1, T)].any()
            continue
        places = example.places_BK[b][example.weights_BK[b] > 0]
        assert not reach[T + places, places % T].any()


@every_vocab
@pytest.mark.parametrize("name", CORRUPTED)
def test_marks_and_padding_are_untouched_and_only_places_change(name, spec, mined):
    vocab, knobs = load(spec), mined(name, spec)
    example = make(name, spec, knobs, batch=32)
    rebuilt = example.tokens_BT.copy()
    chosen = np.zeros(rebuilt.shape, bool)
    for b, (places, weights) in enumerate(
        zip(example.places_BK, example.weights_BK, strict=True)
    ):
        rebuilt[b, places[weights > 0]] = example.targets_BK[b][weights > 0]
        chosen[b, places[weights > 0]] = True
    assert not np.isin(rebuilt, vocab.mask_id).any()
    assert np.isin(rebuilt[chosen], vocab.ordinary).all()
    allowed = np.append(vocab.ordinary, vocab.mask_id)
    assert np.isin(example.tokens_BT[chosen], allowed).all()
    cls, sep = vocab.special("cls"), vocab.special("sep")
    assert (rebuilt[:, 0] == cls).all() and (rebuilt == cls).sum() == len(rebuilt)
    pairs = example.types_BT is not None
    assert ((rebuilt == sep).sum(axis=1) == 1 + pairs).all()
    padding = rebuilt == vocab.pad_id
    assert (padding[:, :-1] <= padding[:, 1:]).all(), "padding stands at the end"
    text = [
        rows[(rows != cls) & (rows != sep) & (rows != vocab.pad_id)] for rows in rebuilt
    ]
    raw = raw_text(spec, 0, 32, CASES[name][1](96, **knobs)[0], "sentence" in knobs)
    for b, row in enumerate(text):
        if not isinstance(raw, Passages):
            np.testing.assert_array_equal(row, raw[b])
        elif example.labels_B[b] == 0:
            whole = raw.tokens_BT[b]
            # Cut where the other document ends: lengths must not tell the label.
            whole = whole[whole != vocab.pad_id]
            np.testing.assert_array_equal(row, whole[: len(row)])


@every_vocab
@pytest.mark.parametrize("name", CORRUPTED)
def test_few_places_show_their_own_answer(name, spec, mined):
    knobs = mined(name, spec)
    example = make(name, spec, knobs, batch=400)
    read = np.take_along_axis(example.tokens_BT, example.places_BK, axis=1)
    trained = example.weights_BK > 0
    shown = (read == example.targets_BK)[trained]
    # A tenth is kept (ELECTRA: 15 %) or random and right by chance; of StructBERT's
    # shuffled tokens a third stays.
    most = 0.16 if name == "electra" else 0.13
    assert 0.05 < shown.mean() < (0.25 if name == "structbert" else most)


@every_vocab
@pytest.mark.parametrize("name", ["permuted_lm", "pseudo_masked", "span_flow"])
def test_targets_of_query_streams_are_the_text(name, spec, mined):
    example = make(name, spec, mined(name, spec))
    T = example.tokens_BT.shape[1]
    read = np.take_along_axis(example.tokens_BT, example.places_BK % T, axis=1)
    trained = example.weights_BK > 0
    equal = (read == example.targets_BK)[trained].mean()
    assert equal == 1 if name != "span_flow" else 0.9 < equal < 1


def test_causal_lm_predicts_the_next_token():
    rows = raw_text(MODEL, 0, 3, 33)
    example = built(lm.causal_lm, rows, load(MODEL))
    np.testing.assert_array_equal(example.tokens_BT, rows[:, :-1])
    np.testing.assert_array_equal(example.targets_BK, rows[:, 1:])
    assert (example.weights_BK == 1).all()


def test_permuted_lm_predicts_spans_in_random_order():
    vocab, B, T = load(MODEL), 400, 512
    rows = np.random.default_rng(0).choice(vocab.ordinary, (B, T)).astype(np.int32)
    example = built(lm.permuted_lm, rows, vocab)
    assert example.places_BK.shape == (B, 85) and (example.weights_BK == 1).all()
    ranks = np.take_along_axis(example.ranks_BT, example.places_BK, axis=1)
    assert (np.sort(ranks, axis=1) == np.arange(1, 86)).all()
    assert ((example.ranks_BT > 0).sum(axis=1) == 85).all()
    # Order and place are independent; spans of 1 .. 5 stand apart from each other.
    correlation = np.corrcoef(ranks.reshape(-1), example.places_BK.reshape(-1))[0, 1]
    assert abs(correlation) < 0.03
    runs = np.diff(
        np.flatnonzero(np.diff(np.pad(example.ranks_BT > 0, ((0, 0), (1, 1)))))
    )
    share_single = (runs[::2] == 1).mean()
    assert 0.3 < share_single < 0.6 and runs[::2].max() <= 11
    edges = np.bincount(example.places_BK.reshape(-1), minlength=T) / B
    assert abs(edges[64:-64].mean() - 1 / 6) < 0.01 and edges[-8:].mean() > 0.1


@every_vocab
def test_unilm_modes(spec):
    vocab, B = load(spec), 6000
    rows = raw_text(spec, 0, B, 61)
    example = built(lm.unilm, rows, vocab, mode_types=True)
    T = example.tokens_BT.shape[1]
    first_type = example.types_BT[:, 0]
    for kind, share in ((0, 1 / 3), (4, 1 / 3), (2, 1 / 6), (3, 1 / 6)):
        assert rate_is((first_type == kind).sum(), B, share)
    ranks, line = example.ranks_BT, np.arange(T)
    assert (ranks[first_type == 0] == 0).all()
    assert (ranks[first_type == 2] == line).all()
    assert (ranks[first_type == 3] == line[::-1]).all()
    second = example.types_BT[first_type == 4] == 5
    assert ((ranks[first_type == 4] > 0) == second).all()
    assert (np.diff(ranks[first_type == 4], axis=1)[second[:, 1:]] == 1).all()


def test_pseudo_masks_share_what_they_should():
    vocab, B = load(MODEL), 6
    example = built(pseudo.pseudo_masked, raw_text(MODEL, 0, B, 60), vocab)
    T, K = 62, example.places_BK.shape[1] // 2
    np.testing.assert_array_equal(
        example.places_BK[:, K:] - T, example.places_BK[:, :K]
    )
    for b in range(B):
        seen, ranks = sees(example, vocab, b), example.ranks_BT[b]
        blocks = sorted(set(ranks) - {0})
        assert blocks == list(range(1, len(blocks) + 1))
        places = example.places_BK[b, :K]
        for p, q in itertools.product(places, range(T)):
            assert seen[T + p, q] == (ranks[q] == 0)
            assert seen[T + p, T + q] == (ranks[q] > 0)
            assert seen[2 * T + p, q] == (ranks[q] < ranks[p])
            assert seen[2 * T + p, 2 * T + q] == (ranks[q] == ranks[p])
            assert not seen[T + p, 2 * T + q] and not seen[2 * T + p, T + q]


def test_span_flow_sees_the_past_by_words_and_by_spans():
    vocab, B = load(MODEL), 6
    rows = raw_text(MODEL, 0, B, 60)
    example = built(pseudo.span_flow, rows, vocab, ngrams=(0, 0, 1), noise=0.0)
    T = 63
    for b in range(B):
        seen, ranks = sees(example, vocab, b), example.ranks_BT[b]
        targets = np.flatnonzero(ranks)
        trained = example.places_BK[b][example.weights_BK[b] > 0]
        assert sorted(trained) == [*targets, *(targets + T)]
        others = np.eye(2 * T, dtype=bool)
        np.testing.assert_array_equal(seen[T:, T:], others)
        context = seen[2 * T :][targets, :T].sum(axis=1)
        for p in targets:
            assert (seen[T + p, :T] == (np.arange(T) < p)).all()
        # All tokens of a span see what stands before its first one; the first span,
        # the [SEP] and borders of documents cut n-grams short.
        begins, lengths = np.unique(context, return_counts=True)
        np.testing.assert_array_equal(np.repeat(begins, lengths), context)
        np.testing.assert_array_equal(begins, targets[np.cumsum(lengths) - lengths])
        assert lengths.max() == 3 and lengths[-1] == 1
        if not (example.tokens_BT[b] == vocab.eos_id).any():
            assert (lengths[1:-2] == 3).all()


def test_span_flow_noise_rate():
    vocab, B = load(MODEL), 1000
    rows = np.random.default_rng(0).choice(vocab.ordinary, (B, 253)).astype(np.int32)
    example = built(pseudo.span_flow, rows, vocab)
    clean = built(pseudo.span_flow, rows, vocab, noise=0.0)
    changed = example.tokens_BT != clean.tokens_BT
    in_target = example.ranks_BT > 0
    assert in_target.sum() > 1e5 and not changed[~in_target].any()
    total = in_target.sum() - B  # [SEP] is not noise
    assert rate_is(changed.sum(), total, 0.05 * (1 - 1 / len(vocab.ordinary)))
    np.testing.assert_array_equal(example.targets_BK, clean.targets_BK)


BAD = [
    ("roberta", dict(density=0.0), "density"),
    ("roberta", dict(density=1.5), "density"),
    ("roberta", dict(mask=0.8, random=0.3), "mask"),
    ("roberta", dict(units="line"), "units"),
    ("roberta", dict(units="phrase"), "spans"),
    ("roberta", dict(spans="a.txt"), "units"),
    ("roberta", dict(ngrams=(0.0,)), "ngrams"),
    ("roberta", dict(ngrams=(1.0, -0.1)), "ngrams"),
    ("roberta", dict(decide="row"), "decide"),
    ("roberta", dict(shuffle=0.9), "shuffle"),
    ("roberta", dict(sentence="qa"), "sentence"),
    ("unilm", dict(modes=(1, 1)), "modes"),
    ("unilm", dict(density=-1), "density"),
    ("permuted_lm", dict(alpha=1), "alpha"),
    ("permuted_lm", dict(longest=0), "longest"),
    ("pseudo_masked", dict(density=1.0), "density"),
    ("span_flow", dict(noise=2.0), "noise"),
]


@pytest.mark.parametrize(("name", "knobs", "key"), BAD)
def test_bad_knobs_are_named(name, knobs, key):
    with pytest.raises(ValueError, match=key):
        make(name, MODEL, knobs)


def test_inputs_of_the_wrong_kind_are_named():
    vocab, rows = load(MODEL), raw_text(MODEL, 0, 2, 40)
    with pytest.raises(ValueError, match="Passages"):
        masking.masked_lm(rows, Draws(0, 0, 2), vocab, sentence="nsp")
    with pytest.raises(ValueError, match="sentence='none'"):
        masking.masked_lm(Passages(rows, rows), Draws(0, 0, 2), vocab)
    with pytest.raises(ValueError, match="inputs_length=5"):
        masking.masked_lm_lengths(5)


def test_bad_files_are_named(tmp_path, mined):
    knobs = mined("ernie", MODEL)
    with pytest.raises(ValueError, match="mined with vocabulary"):
        make("roberta", "bytes", knobs)
    for key, more in (("spans", dict(units="phrase")), ("similar", {})):
        with pytest.raises(FileNotFoundError, match=key):
            make("roberta", MODEL, {key: str(tmp_path / "none.npz"), **more})
    wrong = tmp_path / "wrong.npy"
    for content in (np.zeros((5, 2), np.int32), np.full((4100, 2), 4099)):
        np.save(wrong, content)
        masking.load_similar.cache_clear()
        with pytest.raises(ValueError, match="similar"):
            make("roberta", MODEL, dict(similar=str(wrong)))
    np.savez(tmp_path / "wrong.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="spans"):
        make("roberta", MODEL, dict(units="phrase", spans=str(tmp_path / "wrong.npz")))
