"""Runs our models on a reference's weights and batch, and compares; needs no torch.

A reference is the dict of arrays that `goldens/make_families.py` stores or returns.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import layouts, losses, parameters, step
from t5x_lite import model as model_lib
from t5x_lite.config import Config, LossConfig, ModelConfig
from t5x_lite.interop import families
from tests import parity

# File -> family, where the names differ.
FAMILY = dict(xlnet_mems="xlnet", xlnet_permuted="xlnet")
# What their configs do not say; ELECTRA's generator is half of this discriminator.
MORE = {
    "bart": dict(output_bias=True),
    "mbart": dict(output_bias=True),
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
    places_BS = np.broadcast_to(
        np.arange(mask_BS.shape[1], dtype=np.int32), mask_BS.shape
    )
    stream: dict[str, Any] = dict(
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
        trained: dict[str, Any] = dict(tokens=arrays["decoder_input_ids"])
        trained |= dict(segments=mask_BT)
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
    # A row without a label still has a class: give it a weight, but none that counts.
    trained["weights"][:, 0] = np.maximum(trained["weights"][:, 0], 1e-30)
    if name == "prophetnet":
        trained |= layouts.future_streams(trained, cfg.query_streams)
    for key in ("next_sentence_label", "sentence_order_label"):
        if key in arrays:
            trained["labels"] = arrays[key]
    return batch


def forward(name: str, cfg: ModelConfig, params: dict, arrays: dict) -> dict[str, Any]:
    """Their outputs, under their names, and the loss."""
    net, batch = model_lib.build(cfg), streams(name, cfg, arrays)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params):
        bound = model_lib.bind(net, params)
        if name == "electra_discriminator":
            scores_BT = bound.scores(batch["main"], batch["main"]["tokens"])
            seen_BT = (batch["main"]["segments"] > 0).astype(jnp.float32)
            sums = losses.binary(scores_BT, arrays["labels"] > 0, seen_BT)
            return dict(logits=scores_BT, loss=sums.nll / sums.weight)
        if name == "electra_generator":
            places = dict(places=batch["main"]["positions"])
            out = bound.outputs(dict(main=batch["main"] | places))
            return dict(logits=bound.logits(out.cells_BKE))
        if name == "xlnet_mems":
            return with_memory(bound, batch["main"], arrays["mems"])
        out = bound.outputs(batch)
        found = dict(logits=bound.logits(out.cells_BKE), loss=loss(cfg, params, batch))
        if out.classes_BC is not None:
            found["sentence_logits"] = out.classes_BC
        return found

    return {k: np.asarray(v) for k, v in run(params).items()}


def with_memory(bound, stream: dict, mems_LMBD) -> dict:
    """XLNet behind tokens of which only each layer's inputs are known."""
    mems_LBMD = jnp.moveaxis(mems_LMBD, 1, 2)
    zeros_BM = np.zeros(mems_LBMD.shape[1:3], np.int32)
    before = dict.fromkeys(("tokens", "positions", "ranks", "types"), zeros_BM)
    before |= dict(segments=zeros_BM + 1)
    ctx = model_lib.context(bound.cfg, stream, before)._replace(keep=True)
    x_BTD = bound.inputs.with_streams(bound.embed(stream["tokens"]), stream)
    y_BTD, kept_LBTD = bound.stack(x_BTD, ctx, before_LBMD=mems_LBMD)
    new_mems = jnp.moveaxis(kept_LBTD, 1, 2)[:, -bound.cfg.memory_length :]
    return dict(logits=bound.logits(bound.output(y_BTD)), new_mems=new_mems)


def loss(cfg: ModelConfig, params: dict, batch: dict):
    """What our train step minimises, without z-loss."""
    whole = Config(model=cfg, loss=LossConfig(z_loss=0.0))
    net = model_lib.build(cfg)
    return step.batch_sums(net, params, batch, whole, cfg.vocab_size)[0]


def compare_outputs(name: str, cfg: ModelConfig, params: dict, arrays: dict) -> None:
    """Every output wherever there is a query, and the loss."""
    found = forward(name, cfg, params, arrays)
    causal = "decoder_attention_mask" if "decoder_input_ids" in arrays else ""
    seen = arrays[causal or "attention_mask"] > 0
    theirs = {k: arrays[k] for k in found}
    if name == "prophetnet":
        for ours in (found, theirs):
            ours["logits_ngram"] = None
        T = seen.shape[1]
        found["logits"], found["logits_ngram"] = np.split(found["logits"], [T], axis=1)
        theirs["logits_ngram"] = arrays["logits_ngram"][:, 0]
    for key, ours in found.items():
        if key == "new_mems":
            recent = seen[:, -ours.shape[1] :].T
            parity.close(key, ours[:, recent], theirs[key][:, recent])
        elif key == "loss":
            np.testing.assert_allclose(ours, theirs[key], rtol=1e-5)
        elif key == "sentence_logits":
            parity.close(key, ours, theirs[key])
        else:
            parity.close(key, ours[seen], theirs[key][seen])


def compare_grads(name: str, cfg: ModelConfig, params: dict, arrays: dict) -> None:
    """The gradient of every parameter, under their names."""
    batch = streams(name, cfg, arrays)
    fast = dict(xla_backend_optimization_level=0)
    of = jax.jit(jax.grad(lambda p: loss(cfg, p, batch)), compiler_options=fast)
    grads = jax.tree.map(np.asarray, of(params))
    ours = families.to_hf(family(name), grads, cfg)
    prefix = "grads/"
    theirs = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    stored = {k[len("weights/") :] for k in arrays if k.startswith("weights/")}
    assert stored - theirs.keys() <= {"final_logits_bias"}  # no parameter there
    assert set(ours) >= stored
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for key, grad in theirs.items():
        if "key" in key.split(".")[-2] or "k_proj" in key and key.endswith(".bias"):
            if key.endswith(".bias"):  # softmax does not see it
                assert np.abs(grad).max() < 1e-12 * largest
                assert np.abs(ours[key]).max() < 1e-6 * largest, key
                continue
        parity.close(f"gradient of {key}", ours[key], grad)
