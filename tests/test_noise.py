"""Random numbers, masks and span corruption, against slow statements of the same."""

import itertools

import numpy as np
import pytest
from scipy import stats

from t5x_lite import vocab as vocabularies
from t5x_lite.objectives import OBJECTIVES, denoising, noise
from t5x_lite.objectives.draws import Draws

BYTES = vocabularies.load("bytes")
SETTINGS = [(568, 0.15, 3.0), (141, 0.15, 3.0), (200, 0.5, 3.0), (300, 0.5, 20.0)]
SETTINGS += [(2, 0.15, 3.0), (3, 0.9, 2.0), (17, 0.5, 1.0), (40, 0.15, 64.0)]


def test_draws_do_not_depend_on_the_split_into_batches():
    def draw(first, batch):
        draws = Draws(5, first, batch)
        parts = [draws.bits(3), draws.bits32(9), draws.subset(30, 4), draws.uniform(2)]
        return parts

    whole = draw(100, 12)
    for split in ([12], [1, 11], [5, 3, 4]):
        firsts = itertools.accumulate([100, *split[:-1]])
        parts = [draw(f, b) for f, b in zip(firsts, split, strict=True)]
        for i, block in enumerate(whole):
            joined = np.concatenate([part[i] for part in parts])
            np.testing.assert_array_equal(joined, block)


def test_draws_differ_between_seeds_examples_and_calls():
    a, b = Draws(0, 0, 50), Draws(1, 0, 50)
    blocks = [a.bits(8), a.bits(8), b.bits(8), Draws(-1, 0, 50).bits(8)]
    values = np.concatenate(blocks).reshape(-1)
    assert len(np.unique(values)) == values.size
    uniform_BT = Draws(3, 0, 500).uniform(20)
    assert uniform_BT.min() >= 0 and uniform_BT.max() < 1
    assert stats.kstest(uniform_BT.reshape(-1), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("n", "k"), [(482, 27), (84, 27), (5, 0), (5, 5), (3000, 40)])
def test_subset_takes_the_smallest_keys(n, k):
    bits = Draws(1, 7, 6)
    keys = (bits.bits32(n) if n < 2048 else bits.bits(n)).tolist()
    width = n.bit_length()
    chosen = Draws(1, 7, 6).subset(n, k)
    for row, got in zip(keys, chosen, strict=True):
        order = sorted(range(n), key=lambda i: (row[i] >> width, i))
        assert got.tolist() == sorted(order[:k])


@pytest.mark.parametrize(("items", "segments"), [(7, 3), (6, 2), (8, 5)])
def test_all_segmentations_are_equally_likely(items, segments):
    rows = 30_000
    bounds = noise.random_segments(Draws(11, 0, rows), items, segments)
    compositions = {
        c: 0
        for c in itertools.product(range(1, items + 1), repeat=segments)
        if sum(c) == items
    }
    for lengths in np.diff(bounds).tolist():
        compositions[tuple(lengths)] += 1
    assert stats.chisquare(list(compositions.values())).pvalue > 1e-3


# Counted in the masks that t5 0.9.4 made with tensorflow 2.21.
@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((568, 0.15, 3.0), (85, 28)),
        ((10, 0.25, 1.0), (2, 2)),  # 2.5 rounds to even
        ((14, 0.25, 1.0), (4, 4)),  # 3.5 rounds to even
        ((20, 0.25, 2.0), (5, 2)),  # 2.5 spans round to even
        ((190, 0.15, 1.0), (29, 29)),  # above 28.5 in float32
        ((2, 0.01, 3.0), (1, 1)),
        ((3, 0.99, 64.0), (2, 1)),
    ],
)
def test_noise_counts_round_as_t5_does(arguments, counts):
    assert noise.noise_counts(*arguments) == counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.0, 3.0), "density=0.0"),
        ((10, 1.0, 3.0), "density=1.0"),
        ((10, float("nan"), 3.0), "density=nan"),
        ((10, 0.15, 0.5), "mean_span=0.5"),
        ((1, 0.15, 3.0), "at least 2"),
        ((10, 0.8, 1.0), "8 spans of noise cannot be kept apart by the 2 other"),
    ],
)
def test_noise_counts_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise.noise_counts(*arguments)


# Raffel et al. 2020 with the T5 code's rounding; (512, 0.15, 3) is in the T5 paper.
LENGTHS = [
    (512, 0.15, 3, 568, 114),
    (512, 0.15, 2, 552, 126),
    (512, 0.15, 5, 581, 105),
    (512, 0.15, 10, 591, 99),
    (512, 0.15, 8, 588, 100),
    (512, 0.15, 64, 600, 92),
    (512, 0.5, 3, 766, 512),
    (512, 0.5, 8, 908, 512),
    (512, 0.5, 64, 1006, 512),
    (128, 0.15, 3, 141, 29),
    (1024, 0.15, 3, 1137, 229),
    (2048, 0.15, 3, 2274, 456),
]


@pytest.mark.parametrize(("inputs", "density", "span", "raw", "targets"), LENGTHS)
def test_raw_length_is_t5s(inputs, density, span, raw, targets):
    assert denoising.raw_length(inputs, density, span) == (raw, targets)


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.5])
def test_lengths_come_out_exactly(density):
    many = vocabularies.load("bytes", sentinels=400)
    for inputs in [*range(4, 100), 255, 256, 511, 1000]:
        for span in (2.0, 3.0, 8.0):
            knobs = {"density": density, "mean_span": span}
            lengths = OBJECTIVES["span_corruption"].lengths(inputs, **knobs)
            tokens_BT = np.full((2, lengths[0]), 9, np.int32)
            pair = denoising.span_corruption(tokens_BT, Draws(0, 0, 2), many, **knobs)
            assert lengths[1] == inputs
            assert pair.inputs_BT.shape == (2, inputs)
            assert pair.targets_BT.shape == (2, lengths[2])


def slow_mask(length, density, mean_span, noise_cuts, other_cuts):
    """T5's `random_spans_noise_mask` for one example, step by step.

    The cuts stand for its shuffles: places (of items - 1) where a segment begins.
    """
    n_noise, spans = noise.noise_counts(length, density, mean_span)

    def segment_lengths(items, cuts):
        first_in_segment = [0] + [int(i in cuts) for i in range(items - 1)]
        segment_ids = list(itertools.accumulate(first_in_segment))
        return [segment_ids.count(i) for i in range(spans)]

    noise_lengths = segment_lengths(n_noise, set(noise_cuts))
    other_lengths = segment_lengths(length - n_noise, set(other_cuts))
    mask = []
    for other, noisy in zip(other_lengths, noise_lengths, strict=True):
        mask += [False] * other + [True] * noisy
    return mask


def slow_cut(tokens, mask, vocab):
    """`noise_span_to_unique_sentinel` of one example, then EOS."""
    out, spans = [], 0
    for i, token in enumerate(tokens):
        if not mask[i]:
            out.append(token)
        elif i == 0 or not mask[i - 1]:
            out.append(vocab.size - 1 - spans)
            spans += 1
    return [*out, vocab.eos_id]


@pytest.mark.parametrize(("length", "density", "mean_span"), SETTINGS)
def test_span_corruption_against_the_slow_algorithm(length, density, mean_span):
    B = 20
    tokens_BT = np.random.default_rng(0).integers(3, 259, (B, length), np.int32)
    knobs = {"density": density, "mean_span": mean_span}
    pair = denoising.span_corruption(tokens_BT, Draws(3, 40, B), BYTES, **knobs)
    assert pair.inputs_BT.dtype == pair.targets_BT.dtype == np.int32
    n_noise, spans = noise.noise_counts(length, density, mean_span)
    draws = Draws(3, 40, B)
    noise_cuts = draws.subset(n_noise - 1, spans - 1).tolist()
    other_cuts = draws.subset(length - n_noise - 1, spans - 1).tolist()
    for b, tokens in enumerate(tokens_BT.tolist()):
        mask = slow_mask(length, density, mean_span, noise_cuts[b], other_cuts[b])
        assert sum(mask) == n_noise and not mask[0] and mask[-1]
        assert pair.inputs_BT[b].tolist() == slow_cut(tokens, mask, BYTES)
        opposite = [not m for m in mask]
        assert pair.targets_BT[b].tolist() == slow_cut(tokens, opposite, BYTES)
        assert reconstructed(pair.inputs_BT[b], pair.targets_BT[b]) == tokens


def reconstructed(inputs_T, targets_T):
    first = BYTES.size - BYTES.sentinels
    fillings, current = {}, None
    for token in targets_T[:-1].tolist():
        if token >= first:
            current = fillings.setdefault(token, [])
        else:
            assert current is not None, "targets begin with a sentinel"
            current.append(token)
    out = []
    for token in inputs_T[:-1].tolist():
        out += fillings.pop(token) if token >= first else [token]
    assert not fillings and inputs_T[-1] == targets_T[-1] == BYTES.eos_id
    return out


def test_every_place_but_the_ends_is_noise_equally_often():
    mask_BT, _ = noise.random_spans(Draws(2, 0, 4000), 60, 0.15, 3.0)
    assert (mask_BT.sum(axis=1) == 9).all()
    assert not mask_BT[:, 0].any() and mask_BT[:, -1].all()
    # By symmetry of the segmentation, place t of the non-noise head mirrors the tail.
    share_T = mask_BT.mean(axis=0)
    assert 0.05 < share_T[10:40].min() and share_T[10:40].max() < 0.25


def test_too_few_sentinels_names_the_numbers():
    few = vocabularies.load("bytes", sentinels=27)
    with pytest.raises(ValueError, match="makes 28 spans.* has 27 sentinels"):
        denoising.span_corruption(np.zeros((1, 568), np.int32), Draws(0, 0, 1), few)
    enough = vocabularies.load("bytes", sentinels=28)
    denoising.span_corruption(np.zeros((1, 568), np.int32), Draws(0, 0, 1), enough)
