"""Text-to-text objectives: rates, lengths and places against their distributions."""

import numpy as np
import pytest
from scipy import stats

from t5x_lite import vocab as vocabularies
from t5x_lite.layouts import LAYOUTS
from t5x_lite.objectives import bart, pairs
from t5x_lite.objectives.draws import Draws
from tests.test_objectives_pairs import WORDS, bodies, make


def assert_share(count, total, share):
    deviation = np.sqrt(total * share * (1 - share))
    assert abs(count - total * share) <= 4 * deviation, (count / total, share)


def assert_uniform(values, n):
    counts = np.bincount(np.asarray(values).reshape(-1), minlength=n)
    assert len(counts) == n
    assert stats.chisquare(counts).pvalue > 1e-4


def test_prefixes_end_anywhere():
    tokens_BT, pair = make("prefix_lm", {}, batch=5000)
    given = [len(row) for row in bodies(pair.inputs_BT)]
    assert_uniform(np.array(given) - 1, tokens_BT.shape[1] - 1)


@pytest.mark.parametrize("name", ["iid_denoising", "drop_tokens"])
def test_iid_noise_is_uniform_over_the_places(name):
    _, pair = make(name, {}, batch=2000)
    B, T = pair.mask_BT.shape
    share = pair.mask_BT.mean()
    assert abs(share - 0.15) < 0.5 / T
    for places in pair.mask_BT.sum(axis=0):
        assert_share(places, B, share)
    # Two neighbours are both noise as often as any two places: runs are no spans.
    n = pair.mask_BT[0].sum()
    both = (pair.mask_BT[:, 1:] & pair.mask_BT[:, :-1]).sum()
    assert_share(both, B * (T - 1), n * (n - 1) / (T * (T - 1)))


@pytest.mark.parametrize(
    ("name", "knobs", "random", "unchanged"),
    [
        ("iid_denoising", {"style": "bert"}, 0.1, 0.0),
        ("iid_denoising", {"style": "mass"}, 0.0, 0.0),
        ("mass", {}, 0.1, 0.1),
        ("prophetnet", {}, 0.1, 0.1),
    ],
    ids=str,
)
def test_hidden_tokens_become_mask_random_or_stay(name, knobs, random, unchanged):
    tokens_BT, pair = make(name, knobs, batch=2500)
    read_BT = pair.inputs_BT[:, :-1]
    np.testing.assert_array_equal(read_BT[~pair.mask_BT], tokens_BT[~pair.mask_BT])
    read, true = read_BT[pair.mask_BT], tokens_BT[pair.mask_BT]
    masked, same = read == WORDS.mask_id, read == true
    assert_share(masked.sum(), read.size, 1 - random - unchanged)
    # A random token is now and then the true one.
    by_chance = random / len(WORDS.ordinary)
    assert_share(same.sum(), read.size, unchanged + by_chance)
    drawn = read[~masked & ~same]
    assert np.isin(drawn, WORDS.ordinary).all()
    if random:
        scaled = (drawn - WORDS.ordinary[0]) / len(WORDS.ordinary)
        assert stats.kstest(scaled, "uniform").pvalue > 1e-4


def test_mass_hides_one_fragment_and_keeps_its_places():
    tokens_BT, pair = make("mass", {}, batch=4000)
    T = tokens_BT.shape[1]
    starts_B = pair.mask_BT.argmax(axis=1)
    m = int(pair.mask_BT[0].sum())
    assert m == round(T * 0.5)
    places_BM = starts_B[:, None] + np.arange(m)
    assert np.take_along_axis(pair.mask_BT, places_BM, axis=1).all()
    assert_uniform(starts_B - 1, T - m)
    streams = LAYOUTS["encoder_decoder"](pair, WORDS)
    decoder = streams["decoder"]
    # Each input of the decoder but the start symbol stands where it stood in the text.
    at_BT = np.take_along_axis(tokens_BT, decoder["positions"], axis=1)
    np.testing.assert_array_equal(at_BT[:, 1:], decoder["tokens"][:, 1:])
    assert (np.diff(decoder["positions"], axis=1) == 1).all()
    assert decoder["positions"].min() == 0


def test_prophetnet_hides_nine_of_each_sixty_four():
    _, pair = make("prophetnet", {}, batch=4000, inputs_length=3 * 64 + 33)
    blocks_BNT = pair.mask_BT[:, : 3 * 64].reshape(4000, 3, 64)
    assert (blocks_BNT.sum(axis=2) == 9).all()
    assert (pair.mask_BT[:, 3 * 64 :].sum(axis=1) == round(32 * 9 / 64)).all()
    edges = np.diff(blocks_BNT.astype(np.int8), axis=2, prepend=0, append=0)
    assert (np.abs(edges).sum(axis=2) == 2).all()
    assert_uniform(blocks_BNT.argmax(axis=2), 64 - 9 + 1)
    assert pair.streams == 2


def test_ul2_draws_the_denoisers_by_weight():
    B = 6000
    tokens_BT, pair = make("ul2", {}, batch=B)
    T = tokens_BT.shape[1]
    modes = {WORDS.special(name) for name in ("regular", "sequential", "extreme")}
    assert set(pair.inputs_BT[:, 0].tolist()) == modes
    for mode, share in (("regular", 0.33), ("sequential", 0.34), ("extreme", 0.33)):
        chosen_B = pair.inputs_BT[:, 0] == WORDS.special(mode)
        assert_share(chosen_B.sum(), B, share)
        hidden_B = pair.mask_BT[chosen_B].sum(axis=1)
        starts_BT = np.diff(pair.mask_BT[chosen_B].astype(np.int8), axis=1) == 1
        if mode == "regular":
            assert (hidden_B == round(0.15 * T)).all()
        elif mode == "extreme":
            counts = np.unique(hidden_B)
            assert counts.tolist() == [round(0.15 * T), round(0.5 * T)]
            assert_share((hidden_B == counts[1]).sum(), len(hidden_B), 0.75)
        else:
            assert (starts_BT.sum(axis=1) == 1).all()
            assert pair.mask_BT[chosen_B, -1].all()
            assert_uniform(hidden_B - 1, round(0.5 * T) - 1)


def bart_runs(tokens, inputs):
    """Lengths of the spans of one row, by the distinct ids of the text around them."""
    place = {token: i for i, token in enumerate(tokens)}
    kept = [-1 if t == WORDS.mask_id else place[t] for t in inputs]
    lengths = []
    for i, here in enumerate(kept):
        if here == -1:
            before = kept[i - 1] if i else -1
            after = kept[i + 1] if i + 1 < len(kept) else len(tokens)
            assert after > -1, "two spans touch"
            lengths.append(after - before - 1)
    return lengths


def test_infilled_spans_are_poisson():
    tokens_BT, pair = make("bart", {"permute": False}, batch=400, inputs_length=512)
    T = tokens_BT.shape[1]
    rows = zip(tokens_BT.tolist(), bodies(pair.inputs_BT), strict=True)
    lengths = [bart_runs(tokens, inputs) for tokens, inputs in rows]
    assert {sum(row) for row in lengths} == {round(0.3 * T)}
    # The share cuts the last span of a row; the first 30 are as they were drawn.
    first = np.array([row[:30] for row in lengths]).reshape(-1)
    assert T * 400 >= 1e5 and first.size == 400 * 30
    k = np.arange(10)
    expected = stats.poisson.pmf(k, 3)
    observed = np.bincount(first, minlength=11)
    expected = np.append(expected, stats.poisson.sf(9, 3)) * first.size
    observed = np.append(observed[:10], observed[10:].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    assert abs(first.mean() - 3) <= 4 * np.sqrt(3 / first.size)
    # Nor do the spans prefer a place.
    masks = [t == WORDS.mask_id for row in bodies(pair.inputs_BT) for t in row]
    share = sum(masks) / len(masks)
    heads = [t == WORDS.mask_id for row in bodies(pair.inputs_BT) for t in row[:100]]
    assert_share(sum(heads), len(heads), share)


def test_poisson_table_is_scipys():
    for mean in (0.5, 3.0, 20.0):
        table = bart._poisson(mean)
        np.testing.assert_allclose(table, stats.poisson.cdf(range(len(table)), mean))
        assert table[-1] > 1 - 1e-12


def test_bart_masks_deletes_and_rotates_at_their_rates():
    plain = {"infill": 0.0, "permute": False}
    B = 1000
    tokens_BT, pair = make("bart", plain | {"mask": 0.2}, batch=B)
    inputs_BT = pair.inputs_BT[:, :-1]
    masked_BT = inputs_BT == WORDS.mask_id
    assert_share(masked_BT.sum(), masked_BT.size, 0.2)
    np.testing.assert_array_equal(inputs_BT[~masked_BT], tokens_BT[~masked_BT])

    tokens_BT, pair = make("bart", plain | {"delete": 0.2}, batch=B)
    kept = list(bodies(pair.inputs_BT))
    assert_share(sum(map(len, kept)), tokens_BT.size, 0.8)
    for tokens, row in zip(tokens_BT.tolist(), kept, strict=True):
        assert row == [t for t in tokens if t in set(row)]

    tokens_BT, pair = make("bart", plain | {"rotate": 0.3}, batch=B)
    T = tokens_BT.shape[1]
    shift_B = (tokens_BT == pair.inputs_BT[:, :1]).argmax(axis=1)
    assert_share((shift_B > 0).sum(), B, 0.3 * (1 - 1 / T))
    order_BT = (shift_B[:, None] + np.arange(T)) % T
    rotated_BT = np.take_along_axis(tokens_BT, order_BT, axis=1)
    np.testing.assert_array_equal(pair.inputs_BT[:, :-1], rotated_BT)


@pytest.mark.parametrize("spec", ["bytes", "data/vocab_4k.model"])
def test_bart_permutes_whole_sentences(spec):
    vocab = vocabularies.load(spec)
    text = "One came. Was it two? No! They were three of them. And no end to"
    tokens_T = vocab.encode(text)
    tokens_BT = np.tile(tokens_T, (600, 1))
    pair = bart.bart(tokens_BT, Draws(0, 0, 600), vocab, infill=0.0)
    ends_T = [vocab.decode([t]).endswith((".", "!", "?")) for t in tokens_T.tolist()]
    parts = np.split(tokens_T, np.flatnonzero(ends_T) + 1)
    assert len(parts) == 5
    firsts = np.zeros(5, int)
    for row in pair.inputs_BT[:, :-1].tolist():
        order = []
        while row:
            (i,) = [
                i for i, p in enumerate(parts) if p.tolist() == row[: len(p)] and len(p)
            ]
            order.append(i)
            row = row[len(parts[i]) :]
        assert sorted(order) == list(range(5))
        firsts[order[0]] += 1
    assert stats.chisquare(firsts).pvalue > 1e-4


def test_deshuffling_moves_every_token_anywhere():
    tokens_BT, pair = make("deshuffling", {}, batch=3000, inputs_length=41)
    where_BT = np.argsort(np.argsort(pair.inputs_BT[:, :-1], axis=1), axis=1)
    from_BT = np.argsort(np.argsort(tokens_BT, axis=1), axis=1)
    for token in (0, 20, 39):
        assert_uniform((where_BT == token).argmax(axis=1), 40)
    assert not (where_BT == from_BT).all(axis=1).any()


def test_default_mixture_sums_to_one():
    assert sum(weight for *_, weight in pairs.UL2) == pytest.approx(1.0)
