"""Units, which are hidden, what takes their place; sentence pairs; mining."""

import itertools

import numpy as np
import pytest
from scipy import stats

from t5x_lite.data import mining
from t5x_lite.example import Passages
from t5x_lite.objectives import masking
from t5x_lite.objectives import units as units_lib
from t5x_lite.objectives.draws import Draws
from tests.inplace import MODEL, built, documents, every_vocab, load, rate_is, raw_text

RATES = [
    (dict(), (0.8, 0.1)),
    (dict(mask=0.85, random=0.0), (0.85, 0.0)),
    (dict(units="word", decide="unit"), (0.8, 0.1)),
]


@every_vocab
@pytest.mark.parametrize(("knobs", "shares"), RATES)
def test_mask_random_keep_rates(knobs, shares, spec):
    vocab = load(spec)
    raw = np.random.default_rng(0).choice(vocab.ordinary, (600, 510))
    example = built(masking.masked_lm, raw, vocab, seed=1, **knobs)
    assert raw.size >= 1e5
    trained = example.weights_BK > 0
    read = np.take_along_axis(example.tokens_BT, example.places_BK, axis=1)
    masked = (read == vocab.mask_id)[trained]
    kept = (read == example.targets_BK)[trained]
    # A random piece is the right one once in V; decisions are shared by whole words.
    by_chance = 1 / len(vocab.ordinary)
    words = 1
    if knobs.get("decide") == "unit":
        starts = units_lib.unit_starts(masking.frame(raw, vocab), vocab, "word")
        words = starts.shape[0] * starts.shape[1] / starts.sum()
        words *= 3 if spec == "bytes" else 2  # long words weigh more
    total = trained.sum() / words
    mask, random = shares
    assert rate_is(masked.sum() / words, total, mask)
    share_kept = 1 - mask - random + random * by_chance
    assert rate_is(kept.sum() / words, total, share_kept)
    if knobs.get("units", "token") == "token":
        assert trained.all(), "single tokens always fill the budget"
    # Every place is equally likely.
    places = np.bincount(example.places_BK[trained], minlength=512)[1:-1]
    if "units" not in knobs:
        assert stats.chisquare(places).pvalue > 1e-4


@pytest.mark.parametrize("ngrams", [(6, 3, 2), (0.4, 0.3, 0.2, 0.1), (0.6, 0, 0.4)])
def test_ngram_lengths_have_the_weights(ngrams):
    starts = np.random.default_rng(0).random((40, 6000)) < 0.6
    starts[:, 0] = True
    text = np.ones_like(starts)
    joined = units_lib.ngram_starts(starts, text, Draws(5, 0, 40), ngrams)
    assert not (joined & ~starts).any()
    lengths = np.concatenate(
        [np.diff(np.cumsum(s)[j]) for s, j in zip(starts, joined, strict=True)]
    )
    assert lengths.sum() > 1e5 and lengths.max() == len(ngrams)
    for n, weight in enumerate(ngrams, start=1):
        assert rate_is((lengths == n).sum(), len(lengths), weight / sum(ngrams))


def test_no_ngram_crosses_a_mark():
    vocab = load(MODEL)
    rows = raw_text(MODEL, 0, 64, 200)
    rows[:, 50] = vocab.eos_id
    text = units_lib.is_text(rows, vocab)
    starts = units_lib.unit_starts(rows, vocab, "word")
    joined = units_lib.ngram_starts(starts, text, Draws(0, 0, 64), (0, 0, 0, 1))
    assert joined[:, 50:52].all() and joined[:, 0].all()


@pytest.mark.parametrize("budget", [0, 1, 7, 40, 500])
def test_choose_is_the_greedy_choice(budget):
    B, T = 30, 60
    starts = np.random.default_rng(1).random((B, T)) < 0.3
    starts[:, 0] = True
    groups, text = (
        units_lib.numbered(starts),
        np.random.default_rng(2).random((B, T)) < 0.9,
    )
    chosen = units_lib.choose(groups, text, Draws(9, 0, B), np.full(B, budget))
    keys = Draws(9, 0, B).bits(T) >> np.uint64(1)
    for b in range(B):
        expected, left = np.zeros(T, bool), budget
        for group in sorted(range(T), key=lambda g: keys[b, g]):
            members = (groups[b] == group) & text[b]
            if 0 < members.sum() <= left:
                expected |= members
                left -= members.sum()
        np.testing.assert_array_equal(chosen[b], expected)


@every_vocab
def test_words_are_hidden_whole(spec):
    vocab = load(spec)
    rows = raw_text(spec, 0, 32, 300)
    example = built(masking.masked_lm, rows, vocab, units="word", mask=1.0, random=0.0)
    words = units_lib.numbered(
        units_lib.unit_starts(masking.frame(rows, vocab), vocab, "word")
    )
    hidden = example.tokens_BT == vocab.mask_id
    assert 0.13 < hidden.mean() < 0.151
    for b in range(32):
        for word in range(words[b].max() + 1):
            assert len(set(hidden[b][words[b] == word])) == 1


@every_vocab
def test_phrases_are_units_where_they_stand(spec, tmp_path):
    vocab, path = load(spec), tmp_path / "phrases.txt"
    path.write_text("unto him\nsaid unto him\nthe man\n\nman of war\n")
    text = "And he said unto him, the man of war: and the mantle said unto him the man"
    tokens = vocab.encode(text)[None]
    starts = units_lib.unit_starts(tokens, vocab, "phrase", str(path))[0]
    bounds = [*np.flatnonzero(starts), tokens.shape[1]]
    spans = [
        vocab.decode(tokens[0, i:j]).strip() for i, j in itertools.pairwise(bounds)
    ]
    # "him," is another word than "him", and no phrase ends inside "mantle".
    assert spans == (
        "And|he|said|unto|him,|the man|of|war:|and|the|mantle|said unto him|the man"
    ).split("|") or (
        spec == MODEL and "said unto him" in spans and "the mantle" not in spans
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_overlapping_phrases_keep_the_leftmost(n):
    found = np.random.default_rng(n).random((20, 80)) < 0.5
    kept = units_lib._apart(found, n)
    for row, got in zip(found, kept, strict=True):
        expected, free = [], 0
        for i in np.flatnonzero(row):
            if i >= free:
                expected.append(i)
                free = i + n
        assert np.flatnonzero(got).tolist() == expected


@every_vocab
@pytest.mark.parametrize("kind", ["nsp", "sop", "three_way"])
def test_sentence_pairs(kind, spec):
    vocab, B, raw = load(spec), 4000, 61
    passages = raw_text(spec, 0, B, raw, pairs=True)
    tokens, types, labels = masking.pair_passages(passages, Draws(2, 0, B), vocab, kind)
    cases = masking.SENTENCES[kind]
    assert tokens.shape == types.shape == (B, raw + 3)
    for label in range(len(cases)):
        assert rate_is((labels == label).sum(), B, 1 / len(cases))
    sep, splits = vocab.special("sep"), []
    for b in range(200):
        first, second = np.flatnonzero(tokens[b] == sep)
        a, rest = tokens[b, 1:first], tokens[b, first + 1 : second]
        assert (tokens[b, second + 1 :] == vocab.pad_id).all()
        is_b = np.zeros(raw + 3, np.int32)
        is_b[first + 1 : second + 1] = 1
        np.testing.assert_array_equal(types[b], is_b)
        whole = passages.tokens_BT[b][passages.tokens_BT[b] != vocab.pad_id]
        other = passages.others_BT[b][passages.others_BT[b] != vocab.pad_id]
        case = cases[labels[b]]
        if case == "next":
            both = np.concatenate([a, rest])
            np.testing.assert_array_equal(both, whole[: len(both)])
        elif case == "swapped":
            both = np.concatenate([rest, a])
            np.testing.assert_array_equal(both, whole[: len(both)])
        else:
            np.testing.assert_array_equal(a, whole[: len(a)])
            windows = np.lib.stride_tricks.sliding_window_view(other, len(rest))
            assert (windows == rest).all(axis=1).any()
        if len(whole) == raw and case == "next":
            splits.append(len(a))
    # In the middle half, or at the start of the word that lies there.
    assert 0 < min(splits) and max(splits) <= raw // 4 + raw // 2
    assert np.mean(np.array(splits) >= raw // 4) > 0.8


def test_lengths_do_not_tell_the_label():
    """Short documents: B is as long whatever it is (a lookup stays at chance)."""
    rng, vocab, B, raw = np.random.default_rng(0), load("bytes"), 6000, 61
    letters = rng.integers(100, 125, (2, B, raw)).astype(np.int32)
    lengths = rng.integers(16, raw + 1, (2, B, 1))
    tokens, others = np.where(np.arange(raw) < lengths, letters, vocab.pad_id)
    passages = Passages(tokens.astype(np.int32), others.astype(np.int32))
    made, types, labels = masking.pair_passages(passages, Draws(1, 0, B), vocab, "nsp")
    b_len = types.sum(axis=1)
    a_len = (made != vocab.pad_id).sum(axis=1) - b_len
    seen = a_len // 4 * 100 + b_len // 4
    train, test = slice(0, B // 2), slice(B // 2, B)
    votes: dict[int, int] = {}
    for key, label in zip(seen[train].tolist(), labels[train].tolist(), strict=True):
        votes[key] = votes.get(key, 0) + (1 if label else -1)
    guess = np.array([votes.get(key, 0) > 0 for key in seen[test].tolist()])
    assert abs(np.mean(guess == labels[test]) - 0.5) < 4 * 0.5 / np.sqrt(B // 2)


def test_passages_may_be_tiny():
    vocab = load(MODEL)
    tokens, others = np.zeros((4, 20), np.int32), np.zeros((4, 20), np.int32)
    tokens[1, :1], tokens[2, :2], tokens[3, :3] = 5, 6, 7
    others[2:, :4] = 8
    for kind, seed in itertools.product(("nsp", "sop", "three_way"), range(8)):
        example = built(
            masking.masked_lm, Passages(tokens, others), vocab, seed, sentence=kind
        )
        sep = example.tokens_BT == vocab.special("sep")
        assert (sep.sum(axis=1) == 2).all()
        marks = (vocab.special("cls"), vocab.special("sep"), vocab.mask_id)
        allowed = np.append(vocab.ordinary, (*marks, vocab.pad_id))
        assert np.isin(example.tokens_BT, allowed).all()


def test_shuffled_trigrams_keep_their_tokens():
    tokens = np.tile(np.arange(100, 400, dtype=np.int32), (2000, 1))
    free = np.random.default_rng(0).random(tokens.shape) < 0.85
    new, moved = masking.shuffle_trigrams(
        tokens, free, Draws(0, 0, 2000), np.full(2000, 5)
    )
    assert (moved.sum(axis=1) == 15).all() and not (moved & ~free).any()
    assert (new == tokens)[~moved].all()
    orders = np.zeros((3, 3))
    for b in range(2000):
        at = np.flatnonzero(moved[b]).reshape(5, 3)
        assert (np.diff(at) == 1).all()
        assert (np.sort(new[b, at]) == tokens[b, at]).all()
        for i in range(3):
            orders[i] += np.bincount(
                new[b, at[:, i]] - tokens[b, at[:, 0]], minlength=3
            )
    assert all(rate_is(count, 10_000, 1 / 3) for count in orders.reshape(-1))


def test_similar_words_take_the_place_of_the_mask(tmp_path):
    vocab, path = load(MODEL), str(tmp_path / "similar.npy")
    a, b, c, d = vocab.ordinary[300:304]
    table = np.full((vocab.size, 4), -1, np.int32)
    table[a, :2], table[b, :1] = (b, c), a
    np.save(path, table)
    rows = np.tile(np.array([a, b, d], np.int32), (3000, 40))
    example = built(masking.masked_lm, rows, vocab, similar=path)
    read = np.take_along_axis(example.tokens_BT, example.places_BK, axis=1)
    of_a, of_b, of_d = (read[example.targets_BK == x] for x in (a, b, d))
    for new, share in ((a, 0.1), (b, 0.4), (c, 0.4)):
        assert rate_is((of_a == new).sum(), len(of_a), share + 0.1 / 3997)
    assert rate_is((of_b == a).sum(), len(of_b), 0.8 + 0.1 / 3997)
    assert rate_is((of_d == d).sum(), len(of_d), 0.1 + 0.9 / 3997)
    assert not (example.tokens_BT == vocab.mask_id).any()


def test_mined_phrases_are_the_words_that_stay_together():
    vocab, rng = load("bytes"), np.random.default_rng(0)
    words = [f"w{i}" for i in range(50)]
    texts = []
    for _ in range(300):
        line = list(rng.choice(words, 20))
        line[5:7] = ["new", "york"]
        texts.append(" ".join(line))
    mined = mining.mine_phrases(
        vocab.encode_batch(texts), vocab, longest=2, min_pmi=2.0
    )
    found = [vocab.decode(row[row >= 0]) for row in mined["phrases"]]
    assert found == [" new york"] and mined["counts"].tolist() == [300]


def test_mining_commands(tmp_path, capsys):
    common = ["--data=data/heldout.jsonl", f"--vocab={MODEL}"]
    mining.main(["phrases", *common, f"--output={tmp_path / 'p.npz'}"])
    mining.main(["similar", *common, f"--output={tmp_path / 's.npy'}", "--dims=20"])
    assert "phrases" in capsys.readouterr().out
    vocab = load(MODEL)
    assert units_lib.load_phrases(str(tmp_path / "p.npz"), vocab)
    table = np.load(tmp_path / "s.npy")
    again = mining.similar_words(documents(MODEL), vocab, dims=20)
    np.testing.assert_array_equal(table, again)
    assert (table[np.arange(vocab.size)] != np.arange(vocab.size)[:, None]).all()
    with pytest.raises(ValueError, match="npz"):
        mining.main(["phrases", *common, "--output=p.txt"])
