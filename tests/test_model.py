"""Properties of the model: visibility, scan, remat, dropout, init."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import layers, model, model_config, parameters, positions
from t5x_lite.visibility import Cells, visible
from tests.tiny import random_batch, tiny_config

CFG = tiny_config().model
KEY = jax.random.key(0)


def build(**changes) -> Any:
    cfg = dataclasses.replace(CFG, **changes)
    net = model.build(cfg)
    return net, parameters.init_params(net, KEY)


def objective(net, params, batch, key=None):
    bound = model.bind(net, params)
    y = bound.outputs(batch, key).cells_BKE
    return jnp.sum(jnp.sin(bound.logits(y)))


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("window", [0, 3])
def test_visible_is_the_rank_rule(gap, window):
    rng = np.random.default_rng(1)
    q = Cells(*(jnp.asarray(rng.integers(0, n, (3, 6))) for n in (3, 5, 9)))
    k = Cells(*(jnp.asarray(rng.integers(0, n, (3, 8))) for n in (3, 5, 9)))
    got = np.asarray(visible(q, k, gap=gap, window=window))
    for b in range(3):
        for t in range(6):
            for s in range(8):
                sees = q.segments_BT[b, t] == k.segments_BT[b, s] != 0
                sees &= k.ranks_BT[b, s] <= q.ranks_BT[b, t] - gap
                if window:
                    far = q.positions_BT[b, t] - k.positions_BT[b, s]
                    sees &= far < window
                assert got[b, t, s] == sees


def value_and_grads(batch, **changes) -> Any:
    net, params = build(**changes)
    return jax.jit(jax.value_and_grad(lambda p: objective(net, p, batch, KEY)))(params)


@pytest.mark.parametrize(
    "changes",
    [dict(gated=True, tie_embeddings=False, dropout=0.1),
     dict(gated=False, tie_embeddings=True, activation="relu")],
)  # fmt: skip
def test_scan_equals_unrolled_and_remat_changes_nothing(changes, strict_dtypes):
    batch = random_batch(batch=2)
    value, grads = value_and_grads(batch, scan=False, remat="none", **changes)
    others = [dict(scan=True, remat=remat) for remat in model_config.REMAT]
    for other in others if changes["gated"] else others[:1]:
        got, got_grads = value_and_grads(batch, **other, **changes)
        np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=str(other))
        for a, b in zip(
            jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True
        ):
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a, b, atol=3e-5 * scale, err_msg=str(other))


def test_the_decoder_is_causal_and_sees_the_whole_encoder():
    """By gradient: logits at t depend on decoder inputs <= t and the whole encoder."""
    net, params = build()
    batch = random_batch(batch=1, S=6, T=5)
    bound = model.bind(net, params)
    embed = type(bound).embed

    def logits(shift_enc, shift_dec):
        # Adds to the embedded inputs through the positions of the two streams.
        calls = iter((shift_enc, shift_dec))

        def shifted(tokens):
            return embed(bound, tokens) + next(calls)

        object.__setattr__(bound, "embed", shifted)
        return bound.logits(bound.outputs(batch).cells_BKE)

    D = CFG.d_model
    to_enc, to_dec = jax.jacobian(logits, (0, 1))(
        jnp.zeros((1, 6, D)), jnp.zeros((1, 5, D))
    )
    reach_dec = np.abs(to_dec[0]).sum((1, 2, 4)) > 0
    np.testing.assert_array_equal(reach_dec, np.tril(np.ones((5, 5), bool)))
    assert (np.abs(to_enc[0]).sum((1, 2, 4)) > 0).all()


def test_padding_changes_nothing():
    net, params = build()
    bound = model.bind(net, params)
    batch = random_batch(batch=2, S=6, T=5)
    plain = bound.logits(bound.outputs(batch).cells_BKE)

    def pad(stream, n):
        return {k: np.pad(v, ((0, 0), (0, n))) for k, v in stream.items()}

    padded = {"encoder": pad(batch["encoder"], 4), "decoder": pad(batch["decoder"], 3)}
    got = bound.logits(bound.outputs(padded).cells_BKE)[:, :5]
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5)


def test_two_packed_segments_equal_two_rows():
    """Relative bias goes by distance, so a packed row is its segments apart."""
    net, params = build()
    bound = model.bind(net, params)
    rows = random_batch(batch=2, S=6, T=5)

    def pack(stream):
        packed = {k: v.reshape(1, -1) for k, v in stream.items()}
        length = stream["tokens"].shape[1]
        return packed | {"segments": np.repeat([[1, 2]], length, axis=1)}

    packed = {"encoder": pack(rows["encoder"]), "decoder": pack(rows["decoder"])}
    got = bound.logits(bound.outputs(packed).cells_BKE)
    want = bound.logits(bound.outputs(rows).cells_BKE)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 9), (40, 40)])
def test_relative_bias_equals_a_lookup_per_pair(bidirectional, T, S):
    bias = positions.RelativeBias(CFG)
    table = jax.random.normal(KEY, (CFG.relative_buckets, CFG.heads))
    bias = model.bind(bias, {"embedding": table})
    got = bias(T, S, not bidirectional)[0]
    places = np.arange(S - T, S)  # of the queries, the last T of S cells
    distance = np.arange(S)[None, :] - places[:, None]
    bucket = positions.relative_bucket(distance, CFG, bidirectional)
    np.testing.assert_array_equal(got, np.moveaxis(np.asarray(table)[bucket], -1, 0))
    for t, place in enumerate(places):
        row = bias.row(jnp.int32(place), S, not bidirectional)
        np.testing.assert_array_equal(row[0, :, 0], got[:, t])


def test_dropout_keeps_the_mean_and_is_shared_along_length():
    x = jnp.ones((64, 5, 256))
    y = np.asarray(layers.dropout(x, 0.25, KEY, along=1))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == y[:, :1]).all()
    kept = (y[:, 0] > 0).mean()
    sigma = (0.25 * 0.75 / (64 * 256)) ** 0.5
    assert abs(kept - 0.75) < 5 * sigma


def test_init_depends_on_the_name_alone():
    """A deeper or untied model draws its common parameters alike."""
    _, small = build(tie_embeddings=True)
    _, big = build(tie_embeddings=False, decoder_layers=3)
    np.testing.assert_array_equal(small["embedding"], big["embedding"])
    query = ("encoder", "blocks", "attention", "query")
    a, b = small, big
    for part in query:
        a, b = a[part], b[part]
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(b, big["decoder"]["blocks"]["attention"]["query"][:2])


def test_init_has_the_standard_deviations_of_t5():
    net, params = build(d_model=256, d_ff=512)
    block = params["encoder"]["blocks"]
    expected = {
        "query": (256 * 16) ** -0.5,
        "key": 256**-0.5,
        "value": 256**-0.5,
        "out": (4 * 16) ** -0.5,
    }
    for name, std in expected.items():
        assert np.std(block["attention"][name]) == pytest.approx(std, rel=0.05)
    assert np.std(block["mlp"]["down"]) == pytest.approx(512**-0.5, rel=0.05)
    assert np.std(params["embedding"]) == pytest.approx(1.0, rel=0.05)


def test_bfloat16_computes_close_to_float32():
    batch = random_batch()
    values = {}
    for dtype in model_config.DTYPES:
        net, params = build(dtype=dtype)
        cast = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
        bound = model.bind(net, cast)
        values[dtype] = np.asarray(bound.logits(bound.outputs(batch).cells_BKE))
    assert values["bfloat16"].dtype == np.float32
    error = np.abs(values["bfloat16"] - values["float32"]).max()
    assert error < 0.05 * np.abs(values["float32"]).max()
