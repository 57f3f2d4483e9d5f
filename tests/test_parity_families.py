"""Our models against Hugging Face's, family by family, from committed goldens."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.models import PRESETS
from t5x_lite import layouts, parameters, vocab
from t5x_lite import model as model_lib
from t5x_lite.config import ModelConfig
from t5x_lite.example import Pair
from t5x_lite.interop import families, t5, tables
from tests import parity
from tests import parity_families as pf

pytestmark = pytest.mark.usefixtures("strict_dtypes")
NOT_HERE = {"t5", "t5_1_1", "buckets", "optim", "elmo", "generation"}
NAMES = sorted({path.stem for path in parity.GOLDENS.glob("*.npz")} - NOT_HERE)
WITH_GRADS = ["bart", "bert", "gpt2", "prophetnet", "xlnet_permuted"]


def golden(name: str, **changes):
    """-> arrays, our config."""
    arrays = pf.load(name)
    return arrays, dataclasses.replace(pf.config(name, arrays), **changes)


@pytest.mark.parametrize(
    "name, scan",
    [(name, True) for name in NAMES]
    + [(name, False) for name in ("albert", "nezha", "prophetnet", "xlnet_mems")],
)
def test_outputs_are_the_reference(name, scan):
    arrays, cfg = golden(name, scan=scan)
    pf.compare_outputs(name, cfg, pf.our_params(name, cfg, arrays), arrays)


@pytest.mark.parametrize("name", WITH_GRADS)
def test_gradients_are_the_reference(name):
    arrays, cfg = golden(name)
    pf.compare_grads(name, cfg, pf.our_params(name, cfg, arrays), arrays)


def test_every_golden_gradient_is_compared():
    have = [n for n in NAMES if any(k.startswith("grads/") for k in pf.load(n))]
    assert have == WITH_GRADS


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name):
    arrays, cfg = golden(name)
    weights, family = pf.weights(arrays), pf.family(name)
    params = families.from_hf(family, weights, cfg)
    again = families.to_hf(family, params, cfg)
    assert set(again) == set(weights)
    for key, weight in weights.items():
        assert again[key].dtype == weight.dtype
        np.testing.assert_array_equal(again[key], weight, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_model(name):
    arrays, cfg = golden(name)
    params = families.from_hf(pf.family(name), pf.weights(arrays), cfg)
    declared = parameters.declared(model_lib.build(cfg))
    ours = {
        "/".join(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree.flatten_with_path(params)[0]
    }
    other = {"electra_generator": "discriminator", "electra_discriminator": "generator"}
    if name in other:  # the rest is of the other model: its tower and its head
        heads = dict(generator=("output",), discriminator=("dense", "score"))
        own = (other[name], *heads[other[name]])
        declared = {k: p for k, p in declared.items() if not k.startswith(own)}
    assert ours == {k: p.get_value().shape for k, p in declared.items()}


def test_a_model_without_a_head_reads_weights_without_it():
    arrays, cfg = golden("bert", classes=0)
    weights = pf.weights(arrays)
    with pytest.raises(ValueError, match="unexpected: cls.seq_relationship.bias"):
        families.from_hf("bert", weights, cfg)
    weights = {k: v for k, v in weights.items() if "seq_relationship" not in k}
    params = families.from_hf("bert", weights, cfg)  # the pooler may stay
    assert "classes" not in params


def test_untied_weights_are_read_by_an_untied_model():
    arrays, cfg = golden("gpt2", tie_embeddings=False)
    weights = pf.weights(arrays)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    params = families.from_hf("gpt2", weights, cfg)
    np.testing.assert_array_equal(params["output"]["kernel"], weights["lm_head.weight"])
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    with pytest.raises(ValueError, match="not equal to transformer.wte.weight: lm_h"):
        families.from_hf("gpt2", weights, tied)


def test_a_bias_that_is_not_read_must_be_zero():
    arrays, cfg = golden("bart", output_bias=False)
    weights = pf.weights(arrays)
    with pytest.raises(ValueError, match="^1 weight(?s:.*)not zero: final_logits_bias"):
        families.from_hf("bart", weights, cfg)
    weights["final_logits_bias"] *= 0
    families.from_hf("bart", weights, cfg)


def test_all_weights_that_do_not_fit_are_named():
    arrays, cfg = golden("gpt2")
    weights = pf.weights(arrays)
    del weights["transformer.h.1.ln_2.bias"]
    weights["transformer.h.0.attn.c_attn.weight"] = np.zeros((24, 24), np.float32)
    weights["transformer.h.7.ln_1.bias"] = np.zeros(24, np.float32)
    with pytest.raises(ValueError) as error:
        families.from_hf("gpt2", weights, cfg)
    for problem in (
        "3 weight(s)",
        "missing: transformer.h.1.ln_2.bias",
        "shape (24, 24) instead of (24, 72): transformer.h.0.attn.c_attn.weight",
        "unexpected: transformer.h.7.ln_1.bias",
    ):
        assert problem in str(error.value)


def test_a_model_of_another_family_is_refused():
    arrays, cfg = golden("bert", positions="bias")
    with pytest.raises(ValueError, match="no place(?s:.*)stack/relative/embedding"):
        families.from_hf("bert", pf.weights(arrays), cfg)


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("bart", dict(scale_embedding=True), "scale_embedding=True"),
        ("bert", dict(hidden_act="silu"), "activation 'silu'"),
        ("bert", dict(position_embedding_type="relative_key"), "relative_key"),
        ("albert", dict(num_hidden_groups=2), "num_hidden_groups=2"),
    ],
)
def test_configs_that_our_model_does_not_compute_are_refused(name, change, problem):
    theirs = json.loads(str(pf.load(name)["config"]))
    with pytest.raises(ValueError, match=problem):
        families.model_config(name, theirs | change)


def test_a_config_without_a_key_is_refused():
    theirs = json.loads(str(pf.load("bert")["config"]))
    del theirs["hidden_act"]
    with pytest.raises(ValueError, match="hidden_act"):
        families.model_config("bert", theirs)


def test_rows_of_attention_refuse_positions_that_differ_by_row():
    _, cfg = golden("nezha", attention="rows")
    with pytest.raises(ValueError, match="attention='einsum'"):
        model_lib.build(cfg)


def test_streams_see_what_the_released_prophetnet_shows_them():
    """labels[t] of stream k from inputs 0 .. t - k, and always from the start."""
    ids = np.array([[5, 6, 7, 1]], np.int32)
    pair = Pair(ids, ids, streams=3)
    stream = layouts.encoder_decoder(pair, vocab.ByteVocab(10))["decoder"]
    np.testing.assert_array_equal(
        stream["query_ranks"][0], [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1]]
    )


OF_PRESETS = dict(
    bert=("bert_tiny", "bert_large", "macbert_base"),
    roberta=("roberta_base",),
    albert=("albert_base", "albert_xxlarge"),
    electra_generator=("electra_small", "electra_base"),
    electra_discriminator=("electra_small", "electra_base"),
    ernie=("ernie_base",),
    nezha=("nezha_base",),
    xlnet=("xlnet_base",),
    gpt=("gpt",),
    gpt2=("gpt2_xl",),
    bart=("bart_large",),
    mbart=(),
    mt5=("mt5_small", "mt5_base"),
    electra=(),
    prophetnet=("prophetnet_large",),
    t5=("t5_small", "t5_1_1_base", "byt5_small", "mt5_small"),
    umt5=("umt5_small",),
)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_presets_whose_parameters_have_names(family):
    for preset in OF_PRESETS[family]:
        cfg = ModelConfig(**PRESETS[preset])
        places = tables.places(families.FAMILIES[family].names(cfg), cfg)
        names = [name for place in places.values() for name in place.theirs]
        parts = [place.row.part[1] for place in places.values() for _ in place.theirs]
        assert len(set(names)) == round(sum(1 / n for n in parts))


@pytest.mark.parametrize("preset", OF_PRESETS["t5"])
def test_a_config_of_t5_comes_back(preset):
    cfg = ModelConfig(**PRESETS[preset])
    assert families.model_config("t5", t5.hf_config(cfg)) == cfg
