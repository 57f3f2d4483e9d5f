"""Names of BART and ProphetNet."""

import dataclasses

from t5x_lite.interop.tables import (
    HEADS_IN,
    HEADS_OUT,
    Row,
    Rows,
    Table,
    dense,
    norm,
    under,
)

SELF: Rows = {
    **dense("attention/query", "self_attn.q_proj", HEADS_IN),
    **dense("attention/key", "self_attn.k_proj", HEADS_IN),
    **dense("attention/value", "self_attn.v_proj", HEADS_IN),
    **dense("attention/out", "self_attn.out_proj", HEADS_OUT),
    **norm("attention_norm", "self_attn_layer_norm"),
    **dense("mlp/up", "fc1"),
    **dense("mlp/down", "fc2"),
    **norm("mlp_norm", "final_layer_norm"),
}
CROSS: Rows = {
    **dense("cross/query", "encoder_attn.q_proj", HEADS_IN),
    **dense("cross/key", "encoder_attn.k_proj", HEADS_IN),
    **dense("cross/value", "encoder_attn.v_proj", HEADS_IN),
    **dense("cross/out", "encoder_attn.out_proj", HEADS_OUT),
    **norm("cross_norm", "encoder_attn_layer_norm"),
}


def _inputs(stack: str, positions: str, norms: str) -> Rows:
    return {
        f"{stack}_inputs/positions": Row(f"{stack}.{positions}.weight"),
        **norm(f"{stack}_inputs/norm", f"{stack}.{norms}"),
    }


# BartForConditionalGeneration. The bias of its logits is no parameter there: zero in
# the published weights, unless someone set it (then output_bias=True reads it).
BART = Table(
    under(
        "",
        "model.",
        {
            "embedding": Row("shared.weight"),
            **_inputs("encoder", "embed_positions", "layernorm_embedding"),
            **_inputs("decoder", "embed_positions", "layernorm_embedding"),
            **under("encoder/blocks/", "encoder.layers.{i}.", SELF),
            **under("decoder/blocks/", "decoder.layers.{i}.", SELF | CROSS),
        },
    )
    | {
        "output/bias": Row("final_logits_bias", "V->1V"),
        "output/kernel": Row("lm_head.weight"),
    },
    dict.fromkeys(
        (
            "lm_head.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
        ),
        "model.shared.weight",
    ),
    zeros=("final_logits_bias",),
)
# MBartForConditionalGeneration: norms before the sublayers, so each stack ends in one.
MBART = dataclasses.replace(
    BART,
    rows={
        **BART.rows,
        **norm("encoder/norm", "model.encoder.layer_norm"),
        **norm("decoder/norm", "model.decoder.layer_norm"),
    },
)


def _prophetnet_attention(ours: str, theirs: str) -> Rows:
    return {
        **dense(f"{ours}/query", f"{theirs}.query_proj", HEADS_IN),
        **dense(f"{ours}/key", f"{theirs}.key_proj", HEADS_IN),
        **dense(f"{ours}/value", f"{theirs}.value_proj", HEADS_IN),
        **dense(f"{ours}/out", f"{theirs}.out_proj", HEADS_OUT),
        **norm(f"{ours}_norm", f"{theirs}_layer_norm"),
    }


PROPHETNET_BLOCK: Rows = {
    **_prophetnet_attention("attention", "self_attn"),
    **dense("mlp/up", "feed_forward.intermediate"),
    **dense("mlp/down", "feed_forward.output"),
    **norm("mlp_norm", "feed_forward_layer_norm"),
}
# Each query computes its own relative bias: [bucket, head], side by side there.
PROPHETNET_DECODER: Rows = {
    **PROPHETNET_BLOCK,
    **_prophetnet_attention("cross", "cross_attn"),
    "attention/relative/kernel": Row(
        "self_attn.relative_pos_embeddings.weight", "DKN->(KN)D"
    ),
    "attention/relative/bias": Row(
        "self_attn.relative_pos_embeddings.bias", "KN->(KN)"
    ),
}
# ProphetNetForConditionalGeneration. Its first stream starts from the last row.
PROPHETNET = Table(
    under(
        "",
        "prophetnet.",
        {
            "embedding": Row("word_embeddings.weight"),
            **_inputs("encoder", "position_embeddings", "embeddings_layer_norm"),
            **_inputs("decoder", "position_embeddings", "embeddings_layer_norm"),
            "decoder_inputs/queries": Row("decoder.ngram_embeddings.weight", roll=1),
            **under("encoder/blocks/", "encoder.layers.{i}.", PROPHETNET_BLOCK),
            **under("decoder/blocks/", "decoder.layers.{i}.", PROPHETNET_DECODER),
        },
    )
    | {"output/kernel": Row("lm_head.weight")},
    dict.fromkeys(
        (
            "lm_head.weight",
            "prophetnet.encoder.word_embeddings.weight",
            "prophetnet.decoder.word_embeddings.weight",
        ),
        "prophetnet.word_embeddings.weight",
    ),
)
