"""Runs our models on a reference's weights and batch, and compares; needs no torch.

A reference is the dict of arrays that `goldens/make_families.py` stores or returns.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import model as model_lib
from t5x_lite import parameters, step
from t5x_lite.config import Config, LossConfig, ModelConfig
from t5x_lite.interop import families
from tests import parity

# File -> family, where the names differ.
FAMILY = dict(xlnet_mems="xlnet", xlnet_permuted="xlnet")
# What their configs do not say; ELECTRA's generator is half of this discriminator.
MORE = {
    "bart": dict(output_bias=True),
    "electra_generator": dict(d_model=40, d_ff=72, heads=4, generator_width=0.5),
    "electra_discriminator": dict(generator_width=0.5),
}
PREDICTED = "logits", "sentence_logits"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(parity.GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def family(name: str) -> str:
    return FAMILY.get(name, name)


def config(name: str, arrays: dict) -> ModelConfig:
    theirs = json.loads(str(arrays["config"]))
    return families.model_config(family(name), theirs, **MORE.get(name, {}))


def weights(arrays: dict) -> dict[str, np.ndarray]:
    """Their whole state dict."""
    prefix = "weights/"
    kept = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    copies = json.loads(str(arrays["copies"]))
    return kept | {copy: kept[name] for copy, name in copies.items()}


def our_params(name: str, cfg: ModelConfig, arrays: dict) -> dict:
    """From their weights; zeros for what these have not (the other half of ELECTRA)."""
    shapes = jax.eval_shape(
        lambda key: parameters.init_params(model_lib.build(cfg), key), jax.random.key(0)
    )
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return merged(zeros, families.from_hf(family(name), weights(arrays), cfg))


def merged(under: dict, over: dict) -> dict:
    both = {k: merged(v, over[k]) if isinstance(v, dict) and k in over else v
            for k, v in under.items()}  # fmt: skip
    return both | {k: v for k, v in over.items() if not isinstance(v, dict)}


def streams(name: str, cfg: ModelConfig, arrays: dict) -> dict:
    """Ids, masks and labels (-100 = ignored) as our batch."""
    mask_BS = arrays["attention_mask"]
    places_BS = np.broadcast_to(np.arange(mask_BS.shape[1], dtype=np.int32), mask_BS.shape)
    stream = dict(
        tokens=arrays["input_ids"],
        segments=mask_BS,
        positions=places_BS,
        ranks=places_BS if cfg.structure == "decoder" else np.zeros_like(places_BS),
    )
    if "token_type_ids" in arrays:
        stream["types"] = arrays["token_type_ids"]
    elif name == "roberta":
        stream["types"] = np.zeros_like(places_BS)
        stream["positions"] = np.maximum(arrays["position_ids"] - 2, 0)
    labels_BK = arrays["labels"]
    if cfg.structure == "encoder_decoder":
        mask_BT = arrays["decoder_attention_mask"]
        row = np.arange(mask_BT.shape[1], dtype=np.int32)
        places_BT = np.broadcast_to(row, mask_BT.shape)
        trained = dict(tokens=arrays["decoder_input_ids"], segments=mask_BT)
        trained |= dict(positions=places_BT, ranks=places_BT)
        batch = dict(encoder=stream, decoder=trained)
    else:
        trained, batch = stream, dict(main=stream)
        if cfg.structure == "decoder":  # their labels stand on their own token
            labels_BK = np.pad(labels_BK[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    if "ranks" in arrays:  # context -1, then 0, 1, 2 ...
        trained["ranks"] = arrays["ranks"] + 1
        trained["query_ranks"] = np.maximum(arrays["ranks"], 0)[:, None]
    trained["targets"] = np.maximum(labels_BK, 0)
    trained["weights"] = (labels_BK >= 0).astype(np.float32)
    if name == "prophetnet":
        trained |= layouts._future_streams(trained, cfg.query_streams)
    for key in ("next_sentence_label", "sentence_order_label"):
        if key in arrays:
            trained["labels"] = arrays[key]
    return batch
