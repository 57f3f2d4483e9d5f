"""Order, batches, layouts and prefetching: batch = f(seed, step)."""

import subprocess
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite import example, layouts
from t5x_lite import vocab as vocabularies
from t5x_lite.data import order as orders
from t5x_lite.data import pipeline
from t5x_lite.data.store import open_store
from t5x_lite.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
VOCAB = vocabularies.load(str(ROOT / "data/vocab_4k.model"))
KNOBS = {"density": 0.15, "mean_span": 3.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_store(str(ROOT / "data/heldout.jsonl"), VOCAB, cache, progress=False)


def make(store, **changes):
    arguments: dict[str, Any] = dict(
        objective="span_corruption",
        knobs=KNOBS,
        structure="encoder_decoder",
        inputs_length=128,
        batch_size=8,
        seed=3,
    )
    return pipeline.Batches(store, VOCAB, **(arguments | changes))


def flat(batch: dict[str, Any]) -> dict[Any, Any]:
    streams = {k: v for k, v in batch.items() if isinstance(v, dict)}
    arrays = {(n, f): a for n, s in streams.items() for f, a in s.items()}
    return arrays | {(k, ""): v for k, v in batch.items() if k not in streams}


def assert_same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


# Order


@pytest.mark.parametrize(("n_tokens", "window"), [(1003, 10), (7, 7), (29, 10)])
def test_each_epoch_takes_each_window_once(n_tokens, window):
    order = orders.Order(n_tokens, window, seed=5)
    n = order.windows_per_epoch
    assert n == n_tokens // window
    for epoch in range(3):
        starts = order.starts(epoch * n, n)
        assert starts.dtype == np.int64
        covered = (starts[:, None] + np.arange(window)) % n_tokens
        assert len(np.unique(covered)) == n * window


def test_more_windows_than_can_be_shuffled_are_refused():
    with pytest.raises(ValueError, match=r"4294967296 windows .* fewer than 2\*\*32"):
        orders.Order(2**32 * 8, 8, seed=0)
    ends = np.array([2**32 * 8, 2**32 * 8 + 20])
    store = types.SimpleNamespace(places_of=lambda token: ends)
    with pytest.raises(ValueError, match=r"windows .* fewer than 2\*\*32"):
        orders.Documents(store, 8, 0, eos_id=1)  # type: ignore[arg-type]


def test_a_large_epoch_is_a_permutation_too():
    n = 2**16 + 123
    shuffled = orders._shuffled(n, 9, 0, n)
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(n))
    assert abs(np.corrcoef(shuffled, np.arange(n))[0, 1]) < 0.02
    part = orders._shuffled(n, 9, 1000, 50)
    np.testing.assert_array_equal(part, shuffled[1000:1050])


def test_order_is_random_access_across_epochs():
    order = orders.Order(1003, 10, seed=5)
    whole = order.starts(0, 450)
    for first, count in [(0, 1), (99, 2), (50, 300), (449, 1)]:
        part = orders.Order(1003, 10, seed=5).starts(first, count)
        np.testing.assert_array_equal(part, whole[first : first + count])


def test_epochs_and_seeds_differ_in_order_and_in_windows():
    order, other = orders.Order(100_000, 10, 0), orders.Order(100_000, 10, 1)
    epochs = [order.starts(0, 10_000), order.starts(10_000, 10_000)]
    epochs.append(other.starts(0, 10_000))
    assert len({int(starts[0]) % 10 + 10 * i for i, starts in enumerate(epochs)}) == 3
    offsets = {int(np.min(starts)) for starts in epochs}
    assert len(offsets) > 1
    for a, b in [(0, 1), (0, 2)]:
        rank_a, rank_b = np.argsort(epochs[a]), np.argsort(epochs[b])
        assert abs(np.corrcoef(rank_a, rank_b)[0, 1]) < 0.05


# Batches


def test_lengths_and_contract(store):
    batches = make(store, inputs_length=512)
    lengths = (batches.raw_length, *batches.shapes.values())
    assert lengths == (568, (512, 0, 0), (114, 114, 0))
    batch = batches[0]
    example.check(batch, VOCAB.size)
    assert batch["encoder"]["tokens"].shape == (8, 512)
    assert batch["decoder"]["targets"].shape == (8, 114)
    assert (batch["encoder"]["tokens"] != VOCAB.pad_id).all()
    assert (batch["decoder"]["targets"] != VOCAB.pad_id).all()


def test_a_batch_is_a_function_of_seed_and_step(store):
    assert_same(make(store)[7], make(store)[7])
    batches = make(store)
    seen = [batches[step] for step in range(5)]
    for step in (4, 0, 2):
        assert_same(batches[step], seen[step])
    far = 10**9  # O(1) to reach
    assert_same(batches[far], make(store)[far])
    tokens = {b["encoder"]["tokens"].tobytes() for b in [*seen, batches[far]]}
    assert len(tokens) == 6
    assert (make(store, seed=4)[0]["fingerprint"] != seen[0]["fingerprint"]).all()


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("hosts", [2, 4, "blocks"])
def test_any_number_of_hosts_makes_the_same_batches(store, hosts, evaluation):
    whole = make(store, evaluation=evaluation)
    B = whole.batch_size
    # On a TPU pod a host's chips are a block of a grid: its rows are not neighbours.
    of_hosts = (
        [[0, 1, 4, 5], [2, 3, 6, 7, *range(8, B)]]
        if hosts == "blocks"
        else np.split(np.arange(B), hosts)
    )
    parts = [make(store, rows=rows, evaluation=evaluation) for rows in of_hosts]
    order = np.argsort(np.concatenate(of_hosts))
    last = whole.examples_per_epoch // whole.batch_size
    for step in (0, 1, last):
        one = flat(whole[step])
        slices = [flat(part[step]) for part in parts]
        for key, array in one.items():
            joined = np.concatenate([s[key] for s in slices])[order]
            np.testing.assert_array_equal(joined, array)


def test_the_windows_of_an_epoch_come_back_out_of_the_batches(store):
    batches = make(store, batch_size=1)
    n = batches.examples_per_epoch
    row = OBJECTIVES["span_corruption"]
    assert row.lengths(128, **KNOBS)[0] == batches.raw_length
    total = sum(
        int((batches[step]["encoder"]["tokens"] < VOCAB.size - 100).sum())
        + int((batches[step]["decoder"]["targets"] < VOCAB.size - 100).sum())
        for step in range(n)
    )
    assert total == n * (batches.raw_length + 2)  # each token once, and two EOS


def test_evaluation_goes_through_the_store_once(store):
    batches = make(store, evaluation=True, batch_size=16)
    n = batches.examples_per_epoch
    assert len(batches) == -(-n // 16) and n % 16
    made = [batches[step] for step in range(len(batches))]
    weights = np.concatenate([b["decoder"]["weights"] for b in made])
    assert (weights[:n] == 1).all() and (weights[n:] == 0).all()
    assert made[0]["decoder"]["weights"].all(), "the shared constant is untouched"
    for batch in made:
        example.check(batch, VOCAB.size)
    first = store.windows(np.array([0]), batches.raw_length)[0].tolist()
    inputs = made[0]["encoder"]["tokens"][0].tolist()
    assert inputs[: inputs.index(VOCAB.sentinel(0))] == first[: inputs.index(4099)]
    with pytest.raises(IndexError):
        batches[len(batches)]
    with pytest.raises(TypeError, match="no length"):
        len(make(store))
    with pytest.raises(IndexError):
        make(store)[-1]


def test_fingerprint_is_the_crc_of_index_tokens_and_targets(store):
    batch = make(store)[2]
    streams = (batch["encoder"]["tokens"], batch["decoder"]["tokens"])
    for b in range(8):
        content = np.int64(2 * 8 + b).tobytes()
        for array in (*streams, batch["decoder"]["targets"]):
            content += array[b].tobytes()
        assert batch["fingerprint"][b] == zlib.crc32(content)


def test_encoder_decoder_layout():
    pair = example.Pair(
        inputs_BT=np.array([[7, 8, 99, 1]], np.int32),
        targets_BT=np.array([[99, 9, 1]], np.int32),
    )
    batch = layouts.encoder_decoder(pair, VOCAB)
    lists = {k: v.tolist() for k, v in flat(batch).items()}
    assert lists == {
        ("encoder", "tokens"): [[7, 8, 99, 1]],
        ("encoder", "positions"): [[0, 1, 2, 3]],
        ("encoder", "segments"): [[1, 1, 1, 1]],
        ("encoder", "ranks"): [[0, 0, 0, 0]],
        ("decoder", "tokens"): [[0, 99, 9]],
        ("decoder", "positions"): [[0, 1, 2]],
        ("decoder", "segments"): [[1, 1, 1]],
        ("decoder", "ranks"): [[0, 1, 2]],
        ("decoder", "targets"): [[99, 9, 1]],
        ("decoder", "weights"): [[1.0, 1.0, 1.0]],
    }


def test_every_objective_fits_a_layout_with_its_lengths():
    for name, row in OBJECTIVES.items():
        assert row.structures and row.structures <= layouts.LAYOUTS.keys(), name
        raw, inputs, targets = row.lengths(128)
        assert min(raw, inputs, targets) > 0


@pytest.mark.parametrize("sentence", ["none", "nsp"])
def test_static_noise_is_the_same_in_every_epoch(store, sentence):
    """Each window, wherever an epoch's shuffle puts it, is noised the same way."""
    knobs = {"sentence": sentence}
    asked = dict(objective="masked_lm", structure="encoder", knobs=knobs)

    def epochs(static_noise):
        batches = make(store, **asked, batch_size=1, static_noise=static_noise)
        n = batches.examples_per_epoch
        rows = [batches[i]["main"]["tokens"].tobytes() for i in range(2 * n)]
        return set(rows[:n]), set(rows[n:])

    first, second = epochs(static_noise=True)
    assert first == second and len(first) > 10
    first, second = epochs(static_noise=False)
    assert first.isdisjoint(second)


def broken(batch, stream, field, value):
    return batch | {stream: batch[stream] | {field: value}}


def test_check_refuses_what_breaks_the_contract(store):
    batch = make(store)[0]
    tokens = batch["encoder"]["tokens"]
    wrong = tokens.copy()
    wrong[3, 4] = VOCAB.size
    cases = [
        (broken(batch, "encoder", "tokens", wrong), "to 4100; allowed is .0, 4100."),
        (broken(batch, "decoder", "targets", -batch["decoder"]["targets"]), "from -"),
        (broken(batch, "encoder", "tokens", tokens.astype(np.int64)), "is int64"),
        (broken(batch, "encoder", "ranks", tokens[:, :-1]), "axis T"),
        (broken(batch, "encoder", "ranks", tokens[:-1]), "axis B"),
        (broken(batch, "encoder", "ranks", tokens[0]), r"\[BT\] is needed"),
        (broken(batch, "encoder", "extra", tokens), "the contract is"),
        (batch | {"tokens": tokens}, "not a field of the contract"),
        ({"fingerprint": batch["fingerprint"]}, "at least one stream"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            example.check(bad, VOCAB.size)


REFUSED = [
    ({"inputs_length": 60_000}, "has 51.* tokens, but one window needs"),
    ({"batch_size": 0}, "must be at least 1"),
    ({"batch_size": 4, "rows": [3, 4]}, r"rows=\[3 4\] of a batch: allowed is \[0, 4"),
    ({"objective": "span"}, "objective='span' is unknown. Allowed"),
    (
        {"objective": "mass", "knobs": {}, "structure": "encoder"},
        "trains .'encoder_decoder'., but structure='encoder'",
    ),
    (
        {"knobs": {"densty": 0.1}},
        "config.objective.densty is no knob of .*did you mean 'density'",
    ),
    ({"knobs": {"density": 2.0}}, "density=2.0"),
    ({"inputs_length": 4000}, "makes 222 spans.*has 100 sentinels"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_batches_refuse(store, changes, message):
    with pytest.raises(ValueError, match=message):
        make(store, **changes)


def test_a_corpus_of_one_token_documents_trains(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("abcdefghij" * 5))
    vocab = vocabularies.load("bytes")
    store = open_store(str(tmp_path / "a.txt"), vocab, tmp_path, progress=False)
    batches = pipeline.Batches(
        store,
        vocab,
        objective="span_corruption",
        knobs=KNOBS,
        structure="encoder_decoder",
        inputs_length=32,
        batch_size=4,
        seed=0,
    )
    example.check(batches[11], vocab.size)


# Prefetching


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterate_resumed_equals_uninterrupted(store, prefetch):
    batches = make(store)
    whole = list(pipeline.iterate(batches, 0, 9, prefetch=prefetch))
    assert [step for step, _ in whole] == list(range(9))
    resumed = list(pipeline.iterate(make(store), 5, 9, prefetch=prefetch))
    for (step_a, a), (step_b, b) in zip(whole[5:], resumed, strict=True):
        assert step_a == step_b
        assert_same(a, b)
    assert list(pipeline.iterate(batches, 3, 3, prefetch=prefetch)) == []


def test_iterate_can_be_left_early_and_passes_errors_on(store):
    for step, _ in pipeline.iterate(make(store), 10**9, 10**9 + 100):
        if step == 10**9 + 3:
            break
    evaluation = make(store, evaluation=True)
    with pytest.raises(IndexError, match="no such step"):
        list(pipeline.iterate(evaluation, 0, len(evaluation) + 1))


def test_the_data_path_imports_neither_jax_nor_grain():
    code = (
        "import sys, t5x_lite.data.pipeline, t5x_lite.example, t5x_lite.layouts\n"
        "print(sorted({'jax', 'grain', 'tensorflow'} & sys.modules.keys()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert out.stdout == "[]\n", out.stderr
