"""T5, T5.1.1 and umT5 weights: one table of names, read in both directions.

Theirs are the names of Hugging Face `T5ForConditionalGeneration` (UMT5 ...); arrays are
NumPy.
"""

from collections.abc import Mapping

import numpy as np

from t5x_lite.config import ModelConfig
from t5x_lite.interop import tables
from t5x_lite.interop.tables import HEADS_IN, HEADS_OUT, LINEAR, Row, Rows, Table

# {last}: the feed-forward's place in a block; {up}: wi, or wi_1 if gated.
RELATIVE = "block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
STACK = {
    "norm/scale": Row("final_layer_norm.weight"),
    "relative/embedding": Row(RELATIVE.replace("{i}", "0")),
    "blocks/relative/embedding": Row(RELATIVE),
    "blocks/attention_norm/scale": Row("block.{i}.layer.0.layer_norm.weight"),
    "blocks/attention/query": Row("block.{i}.layer.0.SelfAttention.q.weight", HEADS_IN),
    "blocks/attention/key": Row("block.{i}.layer.0.SelfAttention.k.weight", HEADS_IN),
    "blocks/attention/value": Row("block.{i}.layer.0.SelfAttention.v.weight", HEADS_IN),
    "blocks/attention/out": Row("block.{i}.layer.0.SelfAttention.o.weight", HEADS_OUT),
    "blocks/cross_norm/scale": Row("block.{i}.layer.1.layer_norm.weight"),
    "blocks/cross/query": Row("block.{i}.layer.1.EncDecAttention.q.weight", HEADS_IN),
    "blocks/cross/key": Row("block.{i}.layer.1.EncDecAttention.k.weight", HEADS_IN),
    "blocks/cross/value": Row("block.{i}.layer.1.EncDecAttention.v.weight", HEADS_IN),
    "blocks/cross/out": Row("block.{i}.layer.1.EncDecAttention.o.weight", HEADS_OUT),
    "blocks/mlp_norm/scale": Row("block.{i}.layer.{last}.layer_norm.weight"),
    "blocks/mlp/gate": Row("block.{i}.layer.{last}.DenseReluDense.wi_0.weight", LINEAR),
    "blocks/mlp/up": Row("block.{i}.layer.{last}.DenseReluDense.{up}.weight", LINEAR),
    "blocks/mlp/down": Row("block.{i}.layer.{last}.DenseReluDense.wo.weight", LINEAR),
}
# Copies of `shared.weight` that their state dict also holds.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In the published v1.0 checkpoints; no code of theirs reads it.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def hf_config(cfg: ModelConfig) -> dict:
    """Keyword arguments of the `transformers.T5Config` with the same shape."""
    act = dict(relu="relu", gelu="gelu_new")[cfg.activation]
    gated = "gated-gelu" if act == "gelu_new" else f"gated-{act}"
    return dict(
        vocab_size=cfg.vocab_size,
        d_model=cfg.d_model,
        d_kv=cfg.head_dim,
        d_ff=cfg.d_ff,
        num_heads=cfg.heads,
        num_layers=cfg.encoder_layers,
        num_decoder_layers=cfg.decoder_layers,
        feed_forward_proj=gated if cfg.gated else act,
        tie_word_embeddings=cfg.tie_embeddings,
        relative_attention_num_buckets=cfg.relative_buckets,
        relative_attention_max_distance=cfg.relative_max_distance,
        layer_norm_epsilon=cfg.norm_eps,
        dropout_rate=cfg.dropout,
    )


def table(cfg: ModelConfig) -> Table:
    """The names in a model of this shape."""
    rows: Rows = {"embedding": Row("shared.weight")}
    rows["output/kernel"] = Row("lm_head.weight")
    for stack, last in (("encoder", "1"), ("decoder", "2")):
        for ours, row in STACK.items():
            name = row.theirs.replace("{up}", "wi_1" if cfg.gated else "wi")
            name = f"{stack}.{name}".replace("{last}", last)
            rows[f"{stack}/{ours}"] = row._replace(theirs=name)
    tied = (*COPIES, "lm_head.weight") if cfg.tie_embeddings else COPIES
    return Table(rows, dict.fromkeys(tied, "shared.weight"), unused=(UNUSED,))


def to_hf(params: Mapping, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our nested parameters -> their whole state dict, copies included."""
    return tables.to_theirs(table(cfg), params, cfg)


def from_hf(weights: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their state dict -> our nested parameters; `tables.from_theirs` on errors."""
    return tables.from_theirs(table(cfg), weights, cfg)
