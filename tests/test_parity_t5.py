"""Our T5 and T5.1.1 against Hugging Face's, from committed goldens (no torch)."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import model as model_lib
from t5x_lite import parameters, positions
from t5x_lite.interop import t5
from t5x_lite.model_config import REMAT, ModelConfig
from tests import parity

pytestmark = pytest.mark.usefixtures("strict_dtypes")
NAMES = ["t5", "t5_1_1"]


def golden(name: str):
    """-> config, their state dict, all arrays of the file."""
    with np.load(parity.GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    cfg = ModelConfig(**json.loads(str(arrays["config"])))
    weights = {
        k.removeprefix("weights/"): v
        for k, v in arrays.items()
        if k.startswith("weights/")
    }
    copies = {*t5.COPIES, "lm_head.weight"} - set(weights)
    return cfg, weights | {k: weights["shared.weight"] for k in copies}, arrays


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_reference(name, scan):
    cfg, weights, arrays = golden(name)
    cfg = dataclasses.replace(cfg, scan=scan)
    parity.compare_logits(cfg, t5.from_hf(weights, cfg), arrays, arrays)


@pytest.mark.parametrize(
    "name, scan, remat, attention",
    [("t5_1_1", scan, remat, "einsum") for scan in (True, False) for remat in REMAT]
    + [("t5_1_1", True, "dots", "rows")]
    + [("t5", True, "dots", "einsum"), ("t5", False, "none", "rows")],
)
def test_gradients_are_the_reference(name, scan, remat, attention):
    cfg, weights, arrays = golden(name)
    cfg = dataclasses.replace(cfg, scan=scan, remat=remat, attention=attention)
    # One chunk, chunks that divide the length, and chunks that do not.
    chunk = {"none": 0, "full": 20, "dots": 17, "dots_no_batch": 1}[remat]
    parity.compare_grads(
        cfg,
        t5.from_hf(weights, cfg),
        arrays,
        arrays,
        z_loss=float(arrays["z_loss"]),
        chunk=chunk,
    )


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name):
    cfg, weights, _ = golden(name)
    again = t5.to_hf(t5.from_hf(weights, cfg), cfg)
    assert set(again) == set(weights)
    for key, weight in weights.items():
        assert again[key].dtype == weight.dtype
        np.testing.assert_array_equal(again[key], weight, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_model(name):
    cfg, weights, _ = golden(name)
    params = t5.from_hf(weights, cfg)
    shapes = jax.eval_shape(
        lambda key: parameters.init_params(model_lib.build(cfg), key), jax.random.key(0)
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes)


def test_the_unused_table_of_published_checkpoints_is_accepted():
    cfg, weights, _ = golden("t5")
    extra = {t5.UNUSED: np.zeros((cfg.relative_buckets, cfg.heads), np.float32)}
    t5.from_hf(weights | extra, cfg)


def drop(w):
    del w["decoder.block.1.layer.1.EncDecAttention.k.weight"]


def add(w):
    w["decoder.block.9.layer.0.layer_norm.weight"] = w["shared.weight"][0]


def transpose(w):
    w["encoder.block.0.layer.1.DenseReluDense.wo.weight"] = w[
        "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    ].T


def untie(w):
    w["encoder.embed_tokens.weight"] = w["encoder.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    "break_it, problem",
    [
        (drop, "missing: decoder.block.1.layer.1.EncDecAttention.k.weight"),
        (add, "unexpected: decoder.block.9.layer.0.layer_norm.weight"),
        (transpose, r"shape \(\d+, \d+\) instead of \(24, 36\): encoder.block.0.layer"),
        (untie, "not equal to shared.weight: encoder.embed_tokens.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(break_it, problem):
    cfg, weights, _ = golden("t5_1_1")
    break_it(weights)
    with pytest.raises(ValueError, match=problem):
        t5.from_hf(weights, cfg)


def test_all_problems_are_in_one_error():
    cfg, weights, _ = golden("t5")
    drop(weights)
    add(weights)
    with pytest.raises(ValueError, match="^2 weight"):
        t5.from_hf(weights, cfg)


def test_untied_weights_are_refused_by_a_tied_model():
    cfg, weights, _ = golden("t5_1_1")
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    with pytest.raises(ValueError, match="not equal to shared.weight: lm_head.weight"):
        t5.from_hf(weights, tied)


BUCKETS = dict(np.load(parity.GOLDENS / "buckets.npz", allow_pickle=False))


@pytest.mark.parametrize("case", sorted(set(BUCKETS) - {"distances", "made_with"}))
def test_relative_buckets_are_the_reference(case):
    direction, count, far = case.split("_")
    cfg = ModelConfig(relative_buckets=int(count), relative_max_distance=int(far))
    ours = positions.relative_bucket(BUCKETS["distances"], cfg, direction == "both")
    np.testing.assert_array_equal(ours, BUCKETS[case])
