"""Heads: the logits of transformers' models."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import model, parameters
from t5x_lite.interop import families

# ---- parity with transformers ------------------------------------------------------
SIZES = dict(
    bert=dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, vocab_size=99, max_position_embeddings=24,
    ),
    gpt2=dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=24),
    bart=dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        vocab_size=99, max_position_embeddings=24,
    ),
)  # fmt: skip
CLASSES = {
    "BertForSequenceClassification": ("bert", "class"),
    "BertForTokenClassification": ("bert", "tags"),
    "BertForQuestionAnswering": ("bert", "span"),
    "GPT2ForSequenceClassification": ("gpt2", "class"),
    "BartForSequenceClassification": ("bart", "class"),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", CLASSES)
def test_logits_are_transformers(name):
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    family, head = CLASSES[name]
    torch.manual_seed(0)
    kind = {"bert": "BertConfig", "gpt2": "GPT2Config", "bart": "BartConfig"}[family]
    theirs_cfg = getattr(transformers, kind)(
        **SIZES[family], num_labels=3 if head != "span" else 2, pad_token_id=1
    )
    if family == "bart":
        theirs_cfg.decoder_start_token_id = 2
    net = getattr(transformers, name)(theirs_cfg).eval()
    with torch.no_grad():
        for p in net.parameters():  # zeros test nothing
            p.add_(0.05 * torch.randn_like(p))
    arrays = {k: v.numpy() for k, v in net.state_dict().items()}
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 99, (4, 9)).astype(np.int32)
    lengths = np.array([9, 7, 5, 9])
    mask = (np.arange(9) < lengths[:, None]).astype(np.int32)
    if family == "bart":
        tokens[np.arange(4), lengths - 1] = 2  # EOS, whose state is read
    tokens = np.where(mask > 0, tokens, 1)
    given = dict(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    with torch.no_grad():
        out = net(**given)
    expected = (
        np.stack([out.start_logits, out.end_logits], axis=-1)
        if head == "span"
        else out.logits.numpy()
    )
    base = families.model_config(family, theirs_cfg.to_dict())
    pooled = family != "gpt2"
    own = dataclasses.replace(base, classes=0, tie_embeddings=True)
    shape = dataclasses.replace(
        own, head=head, classes=0 if head == "span" else 3, head_pooler=pooled
    )
    params = _body(family, own, arrays) | {"head": _head(family, head, arrays)}
    ours = model.build(shape)
    drawn = parameters.init_params(ours, jax.random.key(0))
    params = _filled(drawn, params)
    places = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    last = (lengths - 1).astype(np.int32)
    stream = dict(
        tokens=tokens,
        segments=mask,
        positions=places,
        ranks=places if family != "bert" else np.zeros_like(places),
        types=np.zeros_like(tokens),
        targets=tokens[:, :1],
        weights=np.zeros((4, 1), np.float32),
        places=np.zeros((4, 1), np.int32),
        pooled=np.zeros(4, np.int32) if family == "bert" else last,
    )
    batch = {"main": stream}
    if family == "bart":
        encoder = {k: stream[k] for k in ("tokens", "segments", "positions")}
        encoder["ranks"] = np.zeros_like(places)
        shifted = np.concatenate([np.full((4, 1), 2, np.int32), tokens[:, :-1]], axis=1)
        batch = {"encoder": encoder, "decoder": stream | {"tokens": shifted}}
    found = model.bind(ours, params).outputs(batch).head
    at = (slice(None),) if head == "class" else (mask > 0,)
    found, expected = np.asarray(found)[at], expected[at]
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def _body(family: str, cfg, arrays: dict) -> dict:
    """The weights below the head; the language model's own are zeros."""
    names = {"bert": "bert.", "gpt2": "transformer.", "bart": "model."}
    kept = {k: v for k, v in arrays.items() if k.startswith(names[family])}
    shapes = families.to_hf(family, _zeros(cfg), cfg)
    copies = families.FAMILIES[family].names(cfg).copies
    whole = {
        k: kept.get(k, np.zeros_like(v)) for k, v in shapes.items() if k not in copies
    }
    return families.from_hf(family, whole, cfg)


def _zeros(cfg) -> dict:
    drawn = parameters.init_params(model.build(cfg), jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), drawn)


def _head(family: str, head: str, arrays: dict) -> dict:
    def linear(name):
        weight = arrays[f"{name}.weight"].T
        return weight, arrays.get(f"{name}.bias", np.zeros(weight.shape[1], np.float32))

    last = {
        "bert": "classifier",
        "gpt2": "score",
        "bart": "classification_head.out_proj",
    }
    last = "qa_outputs" if head == "span" else last[family]
    found = dict(zip(("kernel", "bias"), linear(last), strict=True))
    pooler = {"bert": "bert.pooler.dense", "bart": "classification_head.dense"}
    if head == "class" and family in pooler:
        both = linear(pooler[family])
        found |= dict(zip(("pooler", "pooler_bias"), both, strict=True))
    return found


def _filled(drawn: dict, params: dict) -> dict:
    """`params`, and zeros for what they have not."""
    zeros = jax.tree.map(jnp.zeros_like, drawn)

    def merge(a, b) -> Any:
        if not isinstance(a, dict):
            assert a.shape == b.shape
            return jnp.asarray(b)
        assert set(b) <= set(a), set(b) - set(a)
        return {k: merge(a[k], b[k]) if k in b else a[k] for k in a}

    return merge(zeros, params)
