"""ERNIE of Tsinghua: the aggregators, the mentions, the denoising of entities."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from t5x_lite import config, entities, example, layouts, model, parameters, stack, step
from t5x_lite.objectives import entities as objective
from t5x_lite.objectives import masking, units
from t5x_lite.objectives.draws import Draws
from tests.inplace import MODEL, built, load, rate_is, raw_text

FILE = "data/phrases_4k.npz"
SMALL: Any = dict(
    models.PRESETS["ernie_thu_base"],
    **dict(vocab_size=4096, entities=2688, d_entity=12, entity_layers=2),
) | dict(d_model=32, d_ff=64, heads=4, head_dim=8, encoder_layers=1, dropout=0.0)
MASKED: dict = dict(entities=FILE, sentence="nsp")


def shape(**changes) -> config.ModelConfig:
    return config.ModelConfig(**(SMALL | changes))


def drawn(cfg: config.ModelConfig, seed: int = 0) -> dict:
    """Parameters of which no bias is 0 and no scale 1."""
    params = parameters.init_params(model.build(cfg), jax.random.key(seed))
    return jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


# Compiled fast: these functions run once.
quick: Any = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def laid_out(batch: int = 4, length: int = 61, first: int = 1) -> dict:
    vocab = load(MODEL)
    made = built(
        objective.masked_lm_entities,
        raw_text(MODEL, first, batch, length, pairs=True),
        vocab,
        **MASKED,
    )
    return layouts.single(made, vocab)


# ---- the model -----------------------------------------------------------------------


def paper(p: dict, w_TD, e_MC, places_M, known_M, heads: tuple[int, int]):
    """Zhang et al. 2019, section 3.3, one token and one entity at a time."""

    def gelu(x):  # the tanh form, as in BERT's release
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def norm(x, of):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * of["scale"] + of["bias"]

    def attend(x, a, n):
        out = np.zeros_like(x)
        for i in range(n):
            q, k, v = (
                x @ a[m][:, i] + a[f"{m}_bias"][i] for m in ("query", "key", "value")
            )
            weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            weights = weights / weights.sum(-1, keepdims=True)
            out += weights @ v @ a["out"][i]
        return out + a["out_bias"]

    w = norm(w_TD + attend(w_TD, p["attention"], heads[0]), p["attention_norm"])
    given = np.flatnonzero(known_M)
    e = np.zeros_like(e_MC)
    if len(given):
        y = attend(e_MC[given], p["entity_attention"], heads[1])
        e[given] = norm(e_MC[given] + y, p["entity_attention_norm"])
    new_w, new_e = np.zeros_like(w), np.zeros_like(e)
    aligned = {int(places_M[k]): k for k in given}
    for j in range(len(w)):
        z = w[j] @ p["up"] + p["up_bias"]
        if j in aligned:
            z = z + e[aligned[j]] @ p["entity_up"]
        h = gelu(z)
        new_w[j] = norm(w[j] + h @ p["down"] + p["down_bias"], p["mlp_norm"])
        if j in aligned:
            back = h @ p["entity_down"] + p["entity_down_bias"]
            new_e[aligned[j]] = norm(e[aligned[j]] + back, p["entity_mlp_norm"])
    return new_w, new_e


def aggregated(cfg, params, w_BTD, e_BMC, places_BM, known_BM):
    block = model.bind(entities.Aggregator(cfg), params)
    B, T, _ = w_BTD.shape
    ctx = stack.Context(visible_BTS=jnp.ones((B, T, T), bool))
    at = entities.Alignment(jnp.asarray(places_BM), jnp.asarray(known_BM))
    with jax.default_matmul_precision("highest"):
        return block(jnp.asarray(w_BTD), jnp.asarray(e_BMC), ctx, at)


def aggregator_input(seed: int, share: float):
    cfg, rng = shape(), np.random.default_rng(seed)
    params = parameters.init_params(entities.Aggregator(cfg), jax.random.key(seed))
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape), params)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    w_BTD = rng.normal(size=(3, 9, cfg.d_model)).astype(np.float32)
    e_BMC = rng.normal(size=(3, 4, cfg.d_entity)).astype(np.float32)
    places_BM = np.stack([rng.permutation(9)[:4] for _ in range(3)]).astype(np.int32)
    return cfg, params, w_BTD, e_BMC, places_BM, rng.random((3, 4)) < share


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_aggregator_is_the_papers(share):
    cfg, params, w_BTD, e_BMC, places_BM, known_BM = aggregator_input(3, share)
    got_w, got_e = aggregated(cfg, params, w_BTD, e_BMC, places_BM, known_BM)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for b in range(3):
        row = (w_BTD[b].astype(float), e_BMC[b].astype(float))
        want_w, want_e = paper(
            wide, *row, places_BM[b], known_BM[b], (cfg.heads, cfg.entity_heads)
        )
        np.testing.assert_allclose(got_w[b], want_w, atol=1e-5)
        np.testing.assert_allclose(
            got_e[b][known_BM[b]], want_e[known_BM[b]], atol=1e-5
        )


def test_an_entity_that_is_not_given_changes_nothing():
    cfg, params, w_BTD, e_BMC, places_BM, known_BM = aggregator_input(4, 0.5)
    want_w, want_e = aggregated(cfg, params, w_BTD, e_BMC, places_BM, known_BM)
    hidden_BM = ~known_BM
    other, moved = e_BMC.copy(), places_BM.copy()
    other[hidden_BM], moved[hidden_BM] = 100.0, 0
    got_w, got_e = aggregated(cfg, params, w_BTD, other, moved, known_BM)
    np.testing.assert_array_equal(got_w, want_w)
    np.testing.assert_array_equal(got_e[known_BM], want_e[known_BM])


def test_without_mentions_the_model_is_that_of_text_alone():
    cfg = shape()
    bound = model.bind(model.build(cfg), drawn(cfg))
    stream = dict(laid_out()["main"])
    stream["entities"] = np.zeros_like(stream["entities"])
    text = {k: v for k, v in stream.items() if not k.startswith("entit")}
    text_only = quick(bound.outputs)({"main": text})
    got = quick(bound.outputs)({"main": stream})
    np.testing.assert_allclose(got.cells_BKE, text_only.cells_BKE, atol=2e-5)
    np.testing.assert_allclose(got.classes_BC, text_only.classes_BC, atol=2e-5)
    assert text_only.mentions_BMC is None


def outputs_and_entity_sums(cfg, stream):
    bound = model.bind(model.build(cfg), drawn(cfg))
    out = quick(bound.outputs)({"main": stream})
    sums = bound.entity_sums(out, stream, step.row_weights(stream))
    return np.asarray(out.cells_BKE), jax.tree.map(float, sums)


def test_padding_changes_nothing():
    cfg, stream = shape(), laid_out()["main"]
    B, T = stream["tokens"].shape
    more, rng = dict(stream), np.random.default_rng(0)
    for name in ("tokens", "segments", "ranks", "types"):
        more[name] = np.pad(stream[name], ((0, 0), (0, 7)))
    more["positions"] = np.tile(np.arange(T + 7, dtype=np.int32), (B, 1))
    more["tokens"][:, T:] = rng.integers(10, 4000, (B, 7))
    for name in ("entities", "entity_places", "entity_targets"):
        more[name] = np.pad(stream[name], ((0, 0), (0, 5)))
    cells, sums = outputs_and_entity_sums(cfg, stream)
    padded_cells, padded_sums = outputs_and_entity_sums(cfg, more)
    np.testing.assert_allclose(padded_cells, cells, atol=2e-5)
    np.testing.assert_allclose(padded_sums, sums, rtol=1e-5)


def test_the_entity_loss_is_over_the_entities_of_the_row():
    cfg, stream = shape(), laid_out(batch=6)["main"]
    params = drawn(cfg)
    bound = model.bind(model.build(cfg), params)
    out, rows_B = quick(bound.outputs)({"main": stream}), step.row_weights(stream)
    got = bound.entity_sums(out, stream, rows_B)
    table, nll, count = np.asarray(params["entity_embedding"], np.float64), 0.0, 0
    for b, truth_M in enumerate(stream["entity_targets"]):
        candidates = sorted(set(truth_M[truth_M > 0].tolist()))
        for m in np.flatnonzero(truth_M):
            rows = table[np.array(candidates) - 1]
            logits = rows @ np.asarray(out.mentions_BMC[b, m], np.float64)
            nll += np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            nll -= logits[candidates.index(truth_M[m])]
            count += 1
    assert count == float(got.weight) > 6
    np.testing.assert_allclose(float(got.nll), nll, rtol=1e-4)
    uncounted = dict(
        stream, weights=stream["weights"] * np.array([[1.0]] + [[0.0]] * 5)
    )
    one = bound.entity_sums(out, uncounted, step.row_weights(uncounted))
    assert float(one.weight) == (stream["entity_targets"][0] > 0).sum()


def test_the_published_size():
    """Cased BERT-base, its heads, and what reads entities; not their embeddings.

    The paper says about 114M (section 4.1).
    """
    preset: Any = models.PRESETS["ernie_thu_base"]
    cfg = config.ModelConfig(**preset)
    D, C, F, V = 768, 100, 3072, 28_996
    bert = models.PARAMETERS["bert_base"] - (30_522 - V) * D
    heads = (D * D + D + 2 * D + V) + (2 * D + 2) + (D * C + C + 2 * C)
    attention = 4 * (C * C + C) + 2 * C
    fusion = C * F + F * C + C + 2 * C
    want = bert + heads + 6 * (attention + fusion)
    assert model.parameter_count(model.build(cfg)) == want == 112_941_834


# ---- mentions and their noise --------------------------------------------------------


@functools.cache
def many(first: int = 0, batch: int = 8192):
    return built(
        objective.masked_lm_entities,
        raw_text(MODEL, first, batch, 253, pairs=True),
        load(MODEL),
        **MASKED,
    )


def test_a_twentieth_is_exchanged_and_three_are_hidden():
    made, count = many(), objective.load_entities(FILE, load(MODEL)).count
    truth, read = made.entity_targets_BM, made.entities_BM
    there = truth > 0
    total, given = there.sum(), there & (read > 0)
    assert total >= 1e5
    assert (read[~there] == 0).all() and read.max() <= count
    assert rate_is((there & (read == 0)).sum(), total, 0.15)
    assert rate_is((given & (read != truth)).sum(), total, 0.05)
    assert rate_is((given & (read == truth)).sum(), total, 0.80)
    exchanged = read[given & (read != truth)]
    assert rate_is((exchanged <= count // 2).sum(), len(exchanged), count // 2 / count)


def test_mentions_are_the_files_phrases_in_the_unmasked_text():
    vocab = load(MODEL)
    made = many(0, 256)
    text_BT = objective.original(made)
    assert (text_BT != vocab.mask_id).all()
    with np.load(FILE) as file:
        phrases = [[i for i in row if i >= 0] for row in file["phrases"].tolist()]
    for row_T, places_M, truth_M in zip(
        text_BT, made.entity_places_BM, made.entity_targets_BM, strict=True
    ):
        end = 0
        for place, entity in zip(places_M, truth_M, strict=True):
            if entity:
                phrase = phrases[entity - 1]
                assert place >= end
                end = place + len(phrase)
                assert row_T[place:end].tolist() == phrase
    # The masked LM is the very one without entities, and nothing is found but phrases.
    raw = raw_text(MODEL, 0, 256, 253, pairs=True)
    plain = built(masking.masked_lm, raw, vocab, sentence="nsp")
    np.testing.assert_array_equal(plain.tokens_BT, made.tokens_BT)
    words_BT = units.unit_starts(text_BT, vocab, "word")
    units_BT = units.unit_starts(text_BT, vocab, "phrase", FILE)
    assert (np.take_along_axis(units_BT, made.entity_places_BM, axis=1)).all()
    assert (words_BT & ~units_BT).any()


def test_an_example_depends_on_seed_and_index_alone():
    whole = laid_out(batch=6, first=0)["main"]
    vocab = load(MODEL)
    rows = raw_text(MODEL, 4, 2, 61, pairs=True)
    made = objective.masked_lm_entities(rows, Draws(0, 4, 2), vocab, **MASKED)
    part = layouts.single(made, vocab)["main"]
    for name in ("tokens", "targets", "entities", "entity_places", "entity_targets"):
        np.testing.assert_array_equal(part[name], whole[name][4:])


def test_batches_keep_the_contract():
    example.check(laid_out(), load(MODEL).size)
