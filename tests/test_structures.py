"""The five structures: packing, padding, and who sees whom, by brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import inspect, layouts, model, parameters, vocab
from t5x_lite.config import ModelConfig
from t5x_lite.objectives import OBJECTIVES
from t5x_lite.objectives.draws import Draws

WORDS = vocab.load("bytes")
TINY = ModelConfig(
    vocab_size=384,
    d_model=24,
    d_ff=32,
    heads=2,
    head_dim=12,
    encoder_layers=2,
    decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=20,
    max_positions=64,
    norm="layer",
    bias=True,
)
POSITIONS = ("none", "learned", "sinusoidal", "bias", "bias_per_layer")


def text(B: int = 3, T: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(97 + 3, 122 + 3, (B, T)).astype(np.int32)


def streams(structure: str, B: int = 3, raw: int = 24) -> dict:
    """Span corruption of the same text with the same noise, in one structure."""
    make = OBJECTIVES["span_corruption"].make
    pair = make(text(B, raw), Draws(5, 0, B), WORDS, density=0.3, mean_span=3.0)
    return layouts.LAYOUTS[structure](pair, WORDS)


def built(structure: str, **changes):
    queries = 1 if structure == "permuted" else 0
    cfg = dataclasses.replace(TINY, structure=structure, query_streams=queries)
    cfg = dataclasses.replace(cfg, **changes)
    net = model.build(cfg)
    return cfg, model.bind(net, parameters.init_params(net, jax.random.key(0)))


def cells_of(bound, batch):
    return np.asarray(jax.jit(lambda: bound.outputs(batch).cells_BKE)())


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("structure", ["encoder", "decoder", "prefix_lm"])
def test_packed_equals_separate(structure, positions):
    """Two examples in one row, as two segments, are as if each had its own row."""
    _, bound = built(structure, positions=positions)
    apart = streams(structure, B=2)["main"]
    places = apart.pop("places", None)
    T = apart["tokens"].shape[1]
    packed = {k: v.reshape(1, -1) for k, v in apart.items()}
    packed["segments"] = np.repeat([[1, 2]], T, axis=1).astype(np.int32)
    if places is not None:
        apart["places"] = places
        packed["places"] = (places + [[0], [T]]).reshape(1, -1).astype(np.int32)
    want = cells_of(bound, {"main": apart})
    got = cells_of(bound, {"main": packed})
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["encoder", "decoder", "prefix_lm", "permuted"])
def test_padding_changes_nothing(structure):
    _, bound = built(structure)
    batch = streams(structure)
    want = cells_of(bound, batch)
    main = dict(batch["main"])
    cells = ("tokens", "positions", "segments", "ranks", "types")
    for k in cells:
        if k in main:
            main[k] = np.pad(main[k], ((0, 0), (0, 5)))
    T = batch["main"]["tokens"].shape[1]
    if "query_ranks" in main:
        main["query_ranks"] = np.pad(main["query_ranks"], ((0, 0), (0, 0), (0, 5)))
    got = cells_of(bound, {"main": main})
    got = got if "places" in main else got[:, :T]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def brute_force(stream: dict, window: int = 0) -> np.ndarray:
    """Design.md's table, one pair of cells after another: [B, (1+G)*T, S]."""
    segments, ranks = stream["segments"], stream["ranks"]
    positions, B, T = stream["positions"], *stream["tokens"].shape
    queries = stream.get("query_ranks", np.zeros((B, 0, T), np.int32))
    groups, G = stream.get("query_groups"), queries.shape[1]
    S = T * (1 + G) if groups is not None else T
    seen = np.zeros((B, (1 + G) * T, S), bool)
    for b in range(B):
        for q in range((1 + G) * T):
            g, t = divmod(q, T)
            rank = ranks[b, t] if g == 0 else queries[b, g - 1, t]
            for s in range(S):
                h, k = divmod(s, T)
                if segments[b, t] != segments[b, k] or segments[b, k] == 0:
                    continue
                if h == 0:
                    near = not window or positions[b, t] - positions[b, k] < window
                    seen[b, q, s] = ranks[b, k] <= rank and near
                elif g and groups is not None:
                    mine, other = groups[b, g - 1, t], groups[b, h - 1, k]
                    seen[b, q, s] = mine == other and mine > 0
    return seen


ROWS = [
    (name, structure)
    for name, row in OBJECTIVES.items()
    for structure in sorted(row.structures)
    if structure != "encoder_decoder"
    and row.reads({}) == "tokens"
    and name not in ("ul2", "masked_lm_entities")  # lengths vary; needs a file
]


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("name, structure", ROWS)
def test_visibility_is_the_brute_force_of_the_table(name, structure, window):
    row = OBJECTIVES[name]
    raw, *_ = row.lengths(30)
    made = row.make(text(2, raw, seed=1), Draws(3, 0, 2), WORDS)
    lay = layouts.single if row.kind == "example" else layouts.LAYOUTS[structure]
    stream = lay(made, WORDS)["main"]
    cfg = dataclasses.replace(TINY, structure=structure, window=window)
    ctx = model.context(cfg, stream)
    seen = ctx.banded_BTS if window else ctx.visible_BTS
    np.testing.assert_array_equal(np.asarray(seen), brute_force(stream, window))


def test_one_noise_mask_trains_all_five():
    """Each structure predicts the hidden tokens of the same spans, and no others."""
    hidden = {}
    for structure in layouts.LAYOUTS:
        batch = streams(structure)
        stream = batch["decoder" if structure == "encoder_decoder" else "main"]
        row = stream["targets"][0][stream["weights"][0] > 0]
        hidden[structure] = sorted(row[(row >= 3) & (row < 259)].tolist())
    assert hidden["encoder"] and len({tuple(h) for h in hidden.values()}) == 1


def test_shared_stacks_have_no_encoder_of_their_own():
    cfg, _ = built("encoder_decoder", share_stacks=True)
    names = parameters.declared(model.build(cfg))
    assert not [n for n in names if n.startswith("encoder/")]


def test_memory_is_seen_and_gets_no_gradient():
    cfg, bound = built(
        "permuted", positions="transformer_xl", memory_length=6, norm_order="post"
    )
    batch = streams("permuted", B=1)
    before = {
        "tokens": text(1, 6, seed=9),
        "positions": np.arange(6, dtype=np.int32)[None],
        "segments": np.ones((1, 6), np.int32),
        "ranks": np.zeros((1, 6), np.int32),
    }
    other = before | {"tokens": text(1, 6, seed=10)}
    a = cells_of(bound, batch | {"memory": before})
    b = cells_of(bound, batch | {"memory": other})
    assert np.abs(a - b).max() > 1e-3
    net, params = (
        model.build(cfg),
        parameters.init_params(model.build(cfg), jax.random.key(0)),
    )

    def through_memory(params, stopped):
        read = model.bind(net, params if not stopped else jax.lax.stop_gradient(params))
        return jnp.sum(read.remember(before) ** 2)

    for leaf in jax.tree.leaves(jax.grad(through_memory)(params, False)):
        assert not np.asarray(leaf).any()


def test_inspect_prints_what_a_person_needs(tmp_path, capsys):
    png = tmp_path / "see.png"
    inspect.main(
        [
            *("--config=configs/bert.py:smoke", "--examples=1", "--cells=8"),
            f"--config.data.cache_dir={tmp_path}",
            "--config.compile_cache=",
            "--config.sharding.data=-1",
            f"--png={png}",
        ]
    )
    out = capsys.readouterr().out
    assert "[CLS]" in out and "[SEP]" in out and "[MASK]" in out
    assert "label of the example" in out and "predicts 9" in out
    assert "   0 ########" in out and png.stat().st_size > 1000
