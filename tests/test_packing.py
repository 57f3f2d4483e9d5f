"""Packing: against a plain loop, and packed rows against separate ones."""

import functools
import json
import pathlib

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from t5x_lite import layouts, model, parameters, step, vocab
from t5x_lite.data import packing, task_batches, text_lengths
from t5x_lite.example import Pair, check
from tests.tiny import tiny_config
from tests.toy_task import shared

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = vocab.load("bytes")


def first_fit(lengths, capacity):
    """The textbook's loop."""
    rows, free = [], []
    for need in lengths:
        fits = [all(map(int.__le__, need, left)) for left in free]
        row = fits.index(True) if any(fits) else len(free)
        if row == len(free):
            free.append(list(capacity))
        free[row] = [f - n for n, f in zip(need, free[row], strict=True)]
        rows.append(row)
    return rows, len(free)


@strategies.composite
def examples(draw):
    capacity = draw(
        strategies.lists(strategies.integers(1, 12), min_size=1, max_size=3)
    )
    one = strategies.tuples(*[strategies.integers(0, cells) for cells in capacity])
    some = strategies.lists(one.filter(any), min_size=1, max_size=60)
    # Equal examples that follow each other take a path of their own.
    found = draw(some)
    if draw(strategies.booleans()):
        found = sorted(found, reverse=True)
    return np.array(found), tuple(capacity)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(examples())
def test_rows_are_those_of_first_fit(given):
    lengths_XS, capacity = given
    rows_X, count = packing._first_fit(lengths_XS, capacity)
    assert (rows_X.tolist(), count) == first_fit(lengths_XS.tolist(), capacity)


@strategies.composite
def two_streams(draw):
    """Lengths, also above 512, which are rounded up in the table, and a capacity."""
    most = draw(strategies.sampled_from([4, 12, 1200]))
    capacity = tuple(draw(strategies.integers(1, most)) for _ in range(2))
    one = strategies.tuples(*[strategies.integers(0, cells) for cells in capacity])
    found = draw(strategies.lists(one.filter(any), min_size=1, max_size=60))
    return np.array(found), capacity


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(two_streams())
def test_rows_filled_one_by_one_are_full(given):
    """All fit, and no example had room in a row before its own."""
    lengths_X2, capacity = given
    rows_X, count = packing._two_by_two(lengths_X2, capacity)
    assert set(rows_X) == set(range(count))
    free_R2 = np.array([capacity] * count)
    np.subtract.at(free_R2, rows_X, lengths_X2)
    assert (free_R2 >= 0).all()
    for x, row in enumerate(rows_X):
        assert (free_R2[:row] < lengths_X2[x]).any(axis=1).all()


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(two_streams(), strategies.data())
def test_a_row_closes_with_the_best_two(given, data):
    """Against all pairs; a length above 512 may lose what it is rounded up by."""
    lengths_X2, capacity = given
    lengths_X2 = np.repeat(lengths_X2[:20], 2, axis=0)  # a second one of each is left
    kinds_K2, left_K = np.unique(lengths_X2, axis=0, return_counts=True)
    free = np.array([data.draw(strategies.integers(0, cells)) for cells in capacity])
    sets = [()]
    for one in range(len(lengths_X2)):
        sets += [(one,)] + [(one, other) for other in range(one)]
    taken = [lengths_X2[list(few)].sum(axis=0) for few in sets]
    best = max(cells.sum() for cells in taken if (cells <= free).all())
    seconds = packing._Seconds(kinds_K2)
    seconds.look(left_K)
    waste, closing = seconds.closing(int(free[0]), int(free[1]), left_K)
    assert waste == free.sum() - kinds_K2[closing].sum() >= free.sum() - best
    assert (kinds_K2[closing].sum(axis=0) <= free).all()
    assert (np.bincount(closing, minlength=len(left_K)) <= left_K).all()
    if kinds_K2.max() <= 512:
        assert waste == free.sum() - best


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(examples(), strategies.integers(-5, 2**70))
def test_a_pack_holds_every_example_once_and_fits(given, seed):
    lengths_XS, capacity = given
    packs = packing.pack(lengths_XS, capacity, seed=seed)
    together = np.concatenate([packs[row] for row in range(len(packs))])
    assert sorted(together) == list(range(len(lengths_XS)))
    for row in range(len(packs)):
        used = lengths_XS[packs[row]].sum(axis=0)
        assert len(packs[row]) and (used <= capacity).all()
    assert packs.fill == lengths_XS.sum() / (len(packs) * sum(capacity))
    again = packing.pack(lengths_XS, capacity, seed=seed)
    np.testing.assert_array_equal(packs.examples, again.examples)
    with pytest.raises(IndexError):
        packs[len(packs)]


def sentences(n: int) -> np.ndarray:
    """Lengths as of sentence pairs: log-normal, the second follows the first."""
    rng = np.random.default_rng(0)
    first_X = np.clip(rng.lognormal(3.6, 0.6, n), 4, 250).astype(int)
    second_X = np.clip(first_X * 0.5 * rng.lognormal(0, 0.3, n), 2, 120).astype(int)
    return np.stack([first_X, second_X], axis=1)


def test_little_padding_is_left(monkeypatch):
    monkeypatch.setattr(packing, "GROUP", 1000)  # several groups
    lengths_X2 = sentences(4500)
    total_X1 = lengths_X2.sum(axis=1, keepdims=True)
    assert packing.pack(total_X1, (512,), seed=1).fill > 0.98
    chosen = packing.targets_length(lengths_X2, 512, seed=1)
    fill = packing.pack(lengths_X2, (512, chosen), seed=1).fill
    assert fill > 0.98
    for worse in (chosen // 2 + 60, 512):
        assert packing.pack(lengths_X2, (512, worse), seed=1).fill < fill


def test_a_row_that_could_take_thousands_is_not_walked_again_and_again(monkeypatch):
    """Halves that nearly fill a row in two, beside tiny ones: minutes, else."""
    X, calls, real = 1024, 0, packing._Seconds.closing

    def closing(*args):
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(packing._Seconds, "closing", closing)
    lengths = np.concatenate(
        [np.full((X // 2, 2), 4999), np.tile([[7, 1]], (X // 2, 1))]
    )
    packed = packing.pack(lengths, (9999, 9999), seed=0)
    assert len(packed) <= X // 4 + 1  # two halves a row; the tiny ones fill one more
    assert calls < 70 * len(packed)


def test_what_packs_best_cuts_no_targets():
    lengths_X2 = np.array([[10, 3]] * 50 + [[10, 90]])
    assert packing.targets_length(lengths_X2, 20, seed=0) == 90


FILLED = [
    ("sentence_polarity", "encoder_decoder", 256),
    ("sentence_polarity", "decoder", 256),
    ("subjectivity", "encoder_decoder", 512),
    *(("e2e_nlg", "encoder_decoder", length) for length in (256, 512)),
    ("e2e_nlg", "prefix_lm", 256),
    pytest.param("libreoffice_en_de", "encoder_decoder", 512, marks=pytest.mark.slow),
]


def rows_of(name: str, structure: str, length: int):
    """The config after `text_lengths.resolve`, and its rows to train on."""
    cfg = tiny_config(
        model=dict(structure=structure),
        data=dict(
            tasks=(name,),
            task_dir=shared(""),
            vocab=str(ROOT / "data/vocab_4k.model"),
            inputs_length=length,
            targets_length=0,
        ),
    )
    words = vocab.load(cfg.data.vocab, 100)
    cfg = text_lengths.resolve(cfg, words)
    made = task_batches.train(cfg, words).made
    assert isinstance(made, task_batches.TextExamples)
    return cfg, made


@pytest.mark.parametrize(("name", "structure", "length"), FILLED)
def test_the_rows_of_the_demo_tasks_are_full(name, structure, length):
    """The share of cells that `nonpadding` reports, over an epoch; nothing is cut."""
    cfg, made = rows_of(name, structure, length)
    streams = made.streams(np.arange(len(made)))
    full = [stream["segments"] > 0 for stream in streams.values()]
    cells = sum(cells_BT.size for cells_BT in full)
    assert sum(cells_BT.sum() for cells_BT in full) / cells >= 0.97
    assert cfg.data.targets_length >= max(map(len, made.targets))
    assert made.cut["targets"] == 0


def test_a_length_needs_examples(tmp_path):
    """WSC as text is trained on its true rows alone (T5, section 2.4)."""
    folder = tmp_path / "WSC"
    folder.mkdir()
    spans = dict(span1_text="Ann", span1_index=0, span2_text="Eve", span2_index=2)
    row = dict(text="Ann met Eve.", label=False, target=spans)
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = dict(tasks=("wsc",), task_dir=str(tmp_path), targets_length=0)
    with pytest.raises(ValueError, match="'wsc',. have none to train on"):
        text_lengths.resolve(tiny_config(data=data), WORDS)


def test_the_seed_packs_other_examples_together():
    lengths_X1 = sentences(500)[:, :1]
    one, other = (packing.pack(lengths_X1, (300,), seed=s) for s in (0, 1))
    together = [{frozenset(p[r].tolist()) for r in range(len(p))} for p in (one, other)]
    assert len(together[0] & together[1]) < 0.2 * len(one)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([[3], [9]], (8,), r"example 1 takes \(9,\) cells of a row's \(8,\)"),
        ([[3, 9]], (8, 8), "must fit"),
        ([[0, 0]], (8, 8), "at least one cell"),
        ([[3]], (8, 8), "one length for each"),
        (np.zeros((0, 1)), (8,), "no example"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(np.array(lengths), capacity, seed=0)


# Rows


def ragged(n: int, longest: tuple[int, int], seed: int = 0) -> Pair:
    """Padded text-to-text examples of all lengths."""
    rng = np.random.default_rng(seed)
    sides = []
    for most in longest:
        ids = rng.integers(100, 120, (n, most)).astype(np.int32)
        lengths_X1 = rng.integers(1, most + 1, (n, 1))
        ids = np.where(np.arange(most) < lengths_X1, ids, WORDS.pad_id)
        np.put_along_axis(ids, lengths_X1 - 1, WORDS.eos_id, axis=1)
        sides.append(ids.astype(np.int32))
    return Pair(*sides)


def packed_and_separate(structure: str):
    separate = layouts.LAYOUTS[structure](ragged(40, (9, 6)), WORDS)
    sizes_XS = np.stack([(s["segments"] > 0).sum(axis=1) for s in separate.values()], 1)
    widths = {name: 2 * s["tokens"].shape[1] for name, s in separate.items()}
    packs = packing.pack(sizes_XS, tuple(widths.values()), seed=2)
    ordered = {
        name: {field: values[packs.examples] for field, values in stream.items()}
        for name, stream in separate.items()
    }
    rows_X = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return packing.join(ordered, rows_X, len(packs), widths), separate


@functools.cache
def evaluation(structure: str):
    cfg = tiny_config(
        model=dict(
            structure=structure, vocab_size=384, encoder_layers=1, decoder_layers=1
        ),
        loss=dict(z_loss=1e-2),
    )
    net = model.build(cfg.model)
    # Without these gains the relative bias would be too weak to tell positions.
    params = parameters.init_params(net, jax.random.key(0))
    params = jax.tree.map(lambda p: 3.0 * p, params)
    evaluate = jax.jit(step.make_eval_step(net, cfg, WORDS.size))
    return lambda batch: evaluate(params, batch)["tokens"]


@pytest.mark.parametrize("structure", ["encoder_decoder", "decoder", "prefix_lm"])
def test_packed_loss_equals_unpacked_loss(structure):
    packed, separate = packed_and_separate(structure)
    check(packed, WORDS.size)
    trained = "decoder" if structure == "encoder_decoder" else "main"
    rows = [len(s[trained]["tokens"]) for s in (packed, separate)]
    assert rows[0] < 0.5 * rows[1], "little would be shown"
    assert packed[trained]["segments"].max() > 2
    of = evaluation(structure)
    for ours, truth in zip(of(packed), of(separate), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5)
    # The test sees an example that reads its neighbour.
    mixed_up = {
        name: stream | {"segments": np.minimum(stream["segments"], 1)}
        for name, stream in packed.items()
    }
    assert abs(of(mixed_up)[1] / of(separate)[1] - 1) > 1e-3


def test_join_numbers_segments_and_keeps_positions():
    packed, _ = packed_and_separate("encoder_decoder")
    for stream in packed.values():
        for segments, positions in zip(
            stream["segments"], stream["positions"], strict=True
        ):
            numbers, starts, counts = np.unique(
                segments, return_index=True, return_counts=True
            )
            for number, start, count in zip(numbers, starts, counts, strict=True):
                cells = slice(start, start + count)
                assert (segments[cells] == number).all()
                expected = np.arange(count) if number else np.zeros(count)
                np.testing.assert_array_equal(positions[cells], expected)
    most = [s["segments"].max(axis=1) for s in packed.values()]
    np.testing.assert_array_equal(*most)


def test_join_refuses():
    streams = layouts.LAYOUTS["decoder"](ragged(3, (4, 3)), WORDS)
    wide = {"main": 40}
    with pytest.raises(ValueError, match="ascending"):
        packing.join(streams, np.array([0, 1, 0]), 2, wide)
    with pytest.raises(ValueError, match="more than 6 cells"):
        packing.join(streams, np.zeros(3, int), 1, {"main": 6})
    streams["main"]["places"] = streams["main"]["tokens"]
    with pytest.raises(ValueError, match="holds .'places'.: only text-to-text"):
        packing.join(streams, np.zeros(3, int), 1, wide)
