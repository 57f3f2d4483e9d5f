"""Text-to-text objectives: properties that hold for every pair row of the table."""

import functools

import numpy as np
import pytest

from t5x_lite import example, layouts
from t5x_lite import vocab as vocabularies
from t5x_lite.layouts import LAYOUTS
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.objectives.draws import Draws

WORDS = vocabularies.load("data/vocab_4k.model")
FIRST_MARK = WORDS.size - WORDS.sentinels
PAIRS = sorted(name for name, row in OBJECTIVES.items() if row.kind == "pair")
ALL_OF_BART = {"mask": 0.1, "delete": 0.1, "rotate": 0.5}
OTHERS = [
    ("span_corruption", {"density": 0.5, "mean_span": 8.0}),
    ("iid_denoising", {"style": "bert"}),
    ("iid_denoising", {"style": "mass"}),
    ("iid_denoising", {"density": 0.4}),
    ("iid_denoising", {"density": 0.7}),
    ("drop_tokens", {"density": 0.5}),
    ("prefix_lm", {"split": "fixed", "share": 0.25}),
    ("prefix_lm", {"split": "none"}),
    ("bart", {"infill": 0.0}),
    ("bart", {"infill": 0.6, "mean_span": 0.7, "permute": False}),
    ("bart", ALL_OF_BART),
    ("mass", {"density": 0.9}),
    ("prophetnet", {"masked": 3, "block": 10, "streams": 3}),
    ("ul2", {"denoisers": [("S", 0.0, 0.5, 1.0)]}),
    ("ul2", {"denoisers": [("R", 3.0, 0.15, 3), ("X", 8.0, 0.5, 1)]}),
]
VARIANTS = [(name, {}) for name in PAIRS] + OTHERS
# The decoder may write only what the inputs hide; without 10 % left unchanged.
HIDING = {
    "span_corruption": {},
    "iid_denoising": {},
    "drop_tokens": {},
    "ul2": {},
    "prefix_lm": {},
    "mass": {"random": 0.0, "unchanged": 0.0},
    "prophetnet": {"random": 0.0, "unchanged": 0.0},
}
each_variant = pytest.mark.parametrize(("name", "knobs"), VARIANTS, ids=str)


def texts(batch, length, seed=0):
    """Rows of ordinary ids, no id twice in a row: [B, T]."""
    generator = np.random.default_rng(seed)
    rows = np.tile(WORDS.ordinary[300:], (batch, 1))
    return generator.permuted(rows, axis=1)[:, :length]


def make(name, knobs, *, batch=16, inputs_length=128, seed=3, first=40):
    row = OBJECTIVES[name]
    raw, *_ = row.lengths(inputs_length, **knobs)
    tokens_BT = texts(batch, raw)
    pair = row.make(tokens_BT, Draws(seed, first, batch), WORDS, **knobs)
    return tokens_BT, pair


def bodies(rows_BT):
    """The rows as lists, without EOS and padding, which stand at the end only."""
    for row in rows_BT.tolist():
        end = row.index(WORDS.eos_id)
        assert set(row[end + 1 :]) <= {WORDS.pad_id}
        assert WORDS.pad_id not in row[:end]
        yield row[:end]


@each_variant
@pytest.mark.parametrize("inputs_length", [40, 128, 200])
def test_lengths_are_as_promised(name, knobs, inputs_length):
    raw, inputs, targets = OBJECTIVES[name].lengths(inputs_length, **knobs)
    _, pair = make(name, knobs, inputs_length=inputs_length)
    assert inputs <= inputs_length
    assert pair.inputs_BT.shape == (16, inputs)
    assert pair.targets_BT.shape == (16, targets)
    assert pair.inputs_BT.dtype == pair.targets_BT.dtype == np.int32
    for array in (pair.source_BT, pair.mask_BT):
        assert array is None or array.shape == (16, raw)
    for row in (*bodies(pair.inputs_BT), *bodies(pair.targets_BT)):
        assert min(row, default=3) > WORDS.unk_id


@pytest.mark.parametrize("name", PAIRS)
def test_the_inputs_are_filled_as_far_as_they_can_be(name):
    for inputs_length in (*range(20, 60), 512):
        assert OBJECTIVES[name].lengths(inputs_length)[1] >= inputs_length - 1


@each_variant
def test_an_example_does_not_depend_on_its_batch(name, knobs):
    row = OBJECTIVES[name]
    tokens_BT, whole = make(name, knobs, batch=12, first=1000)
    parts, first = [], 0
    for size in (1, 7, 4):
        rows_BT = tokens_BT[first : first + size]
        parts.append(row.make(rows_BT, Draws(3, 1000 + first, size), WORDS, **knobs))
        first += size
    for key, value in vars(whole).items():
        if isinstance(value, np.ndarray):
            joined = np.concatenate([getattr(part, key) for part in parts])
            np.testing.assert_array_equal(joined, value, err_msg=key)
    again = make(name, knobs, batch=12, first=1000)[1]
    np.testing.assert_array_equal(again.inputs_BT, whole.inputs_BT)
    if knobs.get("split") not in ("fixed", "none") and knobs != {"infill": 0.0}:
        other = make(name, knobs, batch=12, first=1000, seed=4)[1]
        assert (other.inputs_BT != whole.inputs_BT).any()


MARKED = ("span_corruption", "ul2", "iid_denoising")
SENTINELS = [v for v in VARIANTS if v[0] in MARKED and "style" not in v[1]]


@pytest.mark.parametrize(("name", "knobs"), SENTINELS, ids=str)
def test_sentinels_count_down_and_rebuild_the_text(name, knobs):
    tokens_BT, pair = make(name, knobs, batch=64)
    rows = zip(bodies(pair.inputs_BT), bodies(pair.targets_BT), strict=True)
    for tokens, (inputs, targets) in zip(tokens_BT.tolist(), rows, strict=True):
        inputs = inputs[1:] if name == "ul2" else inputs
        marks = [t for t in inputs if t >= FIRST_MARK]
        assert marks == [WORDS.sentinel(i) for i in range(len(marks))]
        assert marks == [t for t in targets if t >= FIRST_MARK]
        text = []
        for token in inputs:
            if token in marks:
                rest = targets[targets.index(token) + 1 :]
                ends = [i for i, t in enumerate(rest) if t >= FIRST_MARK]
                span = rest[: ends[0]] if ends else rest
                assert span
                text += span
            else:
                text.append(token)
        assert text == tokens


@pytest.mark.parametrize("name", ["mass", "prophetnet"])
def test_fragments_fill_the_masked_places(name):
    tokens_BT, pair = make(name, {})
    np.testing.assert_array_equal(pair.source_BT, tokens_BT)
    rebuilt_BT = pair.inputs_BT[:, :-1].copy()
    rebuilt_BT[pair.mask_BT] = pair.targets_BT[:, :-1].reshape(-1)
    np.testing.assert_array_equal(rebuilt_BT, tokens_BT)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [v for v in VARIANTS if v[0] in ("bart", "deshuffling") or "style" in v[1]],
    ids=str,
)
def test_the_target_is_the_whole_text(name, knobs):
    tokens_BT, pair = make(name, knobs)
    np.testing.assert_array_equal(pair.targets_BT[:, :-1], tokens_BT)
    if name == "deshuffling":
        shuffled_BT = np.sort(pair.inputs_BT[:, :-1], axis=1)
        np.testing.assert_array_equal(shuffled_BT, np.sort(tokens_BT, axis=1))


@pytest.mark.parametrize("split", ["uniform", "fixed", "none"])
def test_prefix_and_rest_are_the_text(split):
    tokens_BT, pair = make("prefix_lm", {"split": split}, batch=2000)
    halves = list(zip(bodies(pair.inputs_BT), bodies(pair.targets_BT), strict=True))
    assert [given + rest for given, rest in halves] == tokens_BT.tolist()
    given = [len(g) for g, _ in halves]
    T = tokens_BT.shape[1]
    allowed = {"uniform": set(range(1, T)), "fixed": {round(T * 0.5)}, "none": {0}}
    assert set(given) == allowed[split]


def test_dropped_tokens_are_the_targets():
    tokens_BT, pair = make("drop_tokens", {})
    for b, tokens in enumerate(tokens_BT):
        mask = pair.mask_BT[b]
        assert pair.inputs_BT[b, :-1].tolist() == tokens[~mask].tolist()
        assert pair.targets_BT[b, :-1].tolist() == tokens[mask].tolist()


def seen(stream):
    """(query places of the trained targets, cells that each sees): [B, K], [B, K, S].

    The rule of `visibility`, said again: same segment, rank not above the query's.
    """
    segments_BS, ranks_BS = stream["segments"], stream["ranks"]
    query_BGT = stream.get("query_ranks", ranks_BS[:, None])
    B, G, T = query_BGT.shape
    query_BK = query_BGT.reshape(B, G * T)
    places_BK = stream.get("places", np.tile(np.arange(G * T), (B, 1)))
    query_BK = np.take_along_axis(query_BK, places_BK, axis=1)
    own_BK = np.take_along_axis(segments_BS, places_BK % T, axis=1)
    same = own_BK[:, :, None] == segments_BS[:, None, :]
    alive = segments_BS[:, None, :] > 0
    return places_BK, same & alive & (ranks_BS[:, None, :] <= query_BK[:, :, None])


GRID = [(name, s) for name in PAIRS for s in sorted(OBJECTIVES[name].structures)]


@functools.cache
def laid_out(name, structure):
    tokens_BT, pair = make(name, HIDING.get(name, {}), batch=4, inputs_length=80)
    return tokens_BT, LAYOUTS[structure](pair, WORDS)


@pytest.mark.parametrize(("name", "structure"), GRID)
def test_batches_keep_the_contract(name, structure):
    _, streams = laid_out(name, structure)
    example.check(streams, WORDS.size)
    (trained,) = [s for s in streams.values() if "targets" in s]
    assert trained["weights"].any(axis=1).all()
    is_pad_BK = trained["targets"] == WORDS.pad_id
    assert not trained["weights"][is_pad_BK].any()


@pytest.mark.parametrize(("name", "structure"), GRID)
def test_no_query_sees_its_own_answer(name, structure):
    _, streams = laid_out(name, structure)
    (trained,) = [s for s in streams.values() if "targets" in s]
    places_BK, seen_BKS = seen(trained)
    targets_BK, tokens_BS = trained["targets"], trained["tokens"]
    in_place = "places" in trained
    T = tokens_BS.shape[1]
    for b, k in np.argwhere(trained["weights"] > 0).tolist():
        place = places_BK[b, k]
        visible_S = seen_BKS[b, k]
        # The cell that holds the answer: the place itself, or the next one in a
        # stream that is read one token behind.
        cell = place % T + (not in_place)
        if cell < T and structure != "encoder":
            assert tokens_BS[b, cell] == targets_BK[b, k]
            assert not visible_S[cell]
        if not in_place:
            gap = place // T
            # The start token, which holds no text, is seen by all.
            assert not visible_S[max(place % T - gap + 1, 1) :].any()
            assert visible_S[0]
        if name in HIDING and targets_BK[b, k] in WORDS.ordinary:
            read = set(tokens_BS[b, visible_S].tolist())
            if "encoder" in streams:
                read |= set(streams["encoder"]["tokens"][b].tolist())
            assert targets_BK[b, k] not in read
    if structure == "encoder":
        hidden_BK = np.take_along_axis(tokens_BS, places_BK, axis=1)
        assert (hidden_BK[trained["weights"] > 0] == WORDS.mask_id).all()


@pytest.mark.parametrize("name", ["span_corruption", "iid_denoising"])
def test_the_same_noise_trains_all_five_structures(name):
    assert OBJECTIVES[name].structures == LAYOUTS.keys()
    tokens_BT, pair = make(name, {}, batch=8)
    expected = [
        sorted(tokens[mask].tolist())
        for tokens, mask in zip(tokens_BT, pair.mask_BT, strict=True)
    ]
    for structure, layout in LAYOUTS.items():
        streams = layout(pair, WORDS)
        (trained,) = [s for s in streams.values() if "targets" in s]
        rows = zip(trained["targets"], trained["weights"], strict=True)
        predicted = [targets[weights > 0] for targets, weights in rows]
        texts = [
            sorted(row[np.isin(row, WORDS.ordinary)].tolist()) for row in predicted
        ]
        assert texts == expected, structure


def test_the_table_says_what_a_row_gets_and_returns():
    for name, row in OBJECTIVES.items():
        assert row.kind in ("pair", "example"), name
        assert row.reads({}) in ("tokens", "passages"), name
        assert row.structures <= layouts.LAYOUTS.keys(), name


def test_language_modelling_predicts_all_of_the_text():
    tokens_BT, pair = make("prefix_lm", {"split": "none"})
    main = LAYOUTS["decoder"](pair, WORDS)["main"]
    assert main["tokens"].shape[1] == 128 and main["weights"].all()
    np.testing.assert_array_equal(main["targets"][:, :-1], tokens_BT)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("iid_denoising", {"style": "albert"}, "style='albert'.*'spans', 'bert'"),
        ("iid_denoising", {"density": 1.0}, "density=1.0"),
        ("iid_denoising", {"density": 0.4, "inputs_length": 512}, "100 sentinels"),
        ("prefix_lm", {"split": "half"}, "split='half'.*'uniform', 'fixed'"),
        ("prefix_lm", {"split": "fixed", "share": 1.0}, "share=1.0"),
        ("bart", {"infill": 1.0}, "infill=1.0"),
        ("bart", {"mean_span": 0.0}, "mean_span=0.0"),
        ("bart", {"delete": 1.5}, "delete=1.5 of bart"),
        ("mass", {"random": 0.6, "unchanged": 0.6}, "random=0.6, unchanged=0.6"),
        ("prophetnet", {"masked": 64}, "masked=64, block=64"),
        ("prophetnet", {"streams": 0}, "streams=0"),
        ("prophetnet", {"inputs_length": 4}, "3 raw tokens: too short"),
        ("deshuffling", {"inputs_length": 2}, "inputs_length=2"),
        ("ul2", {"denoisers": []}, "at least one"),
        ("ul2", {"denoisers": [("Q", 3.0, 0.15, 1.0)]}, "'Q'.*kinds"),
        ("ul2", {"denoisers": [("S", 0.0, 0.75, 1.0)]}, "density=0.75"),
        ("ul2", {"inputs_length": 1024}, "93 sentinels beside the 7 marks"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(name, knobs, message):
    knobs = dict(knobs)
    inputs_length = knobs.pop("inputs_length", 128)
    with pytest.raises(ValueError, match=message):
        make(name, knobs, inputs_length=inputs_length)
