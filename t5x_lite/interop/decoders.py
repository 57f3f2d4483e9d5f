"""Names of GPT, GPT-2 and XLNet."""

from t5x_lite.interop.tables import Row, Rows, Table, dense, norm, under


def conv1d(ours: str, theirs: str, axes: str = "", part=(0, 1), bias: str = "") -> Rows:
    """A linear layer whose weight is [inputs, outputs] there as well."""
    return {
        ours: Row(f"{theirs}.weight", axes, part),
        f"{ours}_bias": Row(f"{theirs}.bias", bias, part),
    }


GPT_BLOCK: Rows = {
    **conv1d("attention/query", "attn.c_attn", "INH->I(NH)", (0, 3), "NH->(NH)"),
    **conv1d("attention/key", "attn.c_attn", "INH->I(NH)", (1, 3), "NH->(NH)"),
    **conv1d("attention/value", "attn.c_attn", "INH->I(NH)", (2, 3), "NH->(NH)"),
    **conv1d("attention/out", "attn.c_proj", "NHO->(NH)O"),
    **norm("attention_norm", "ln_1"),
    **conv1d("mlp/up", "mlp.c_fc"),
    **conv1d("mlp/down", "mlp.c_proj"),
    **norm("mlp_norm", "ln_2"),
}


def gpt(tokens: str, positions: str) -> Table:
    """`OpenAIGPTLMHeadModel` and `GPT2LMHeadModel`."""
    rows = {
        "embedding": Row(f"{tokens}.weight"),
        "inputs/positions": Row(f"{positions}.weight"),
        **under("stack/blocks/", "h.{i}.", GPT_BLOCK),
        **norm("stack/norm", "ln_f"),
    }
    return Table(
        under("", "transformer.", rows) | {"output/kernel": Row("lm_head.weight")},
        {"lm_head.weight": f"transformer.{tokens}.weight"},
        # Buffers of older releases.
        unused=(r".*\.attn\.(masked_)?bias",),
    )


# Of [D, N, H]; the same array but for the output's.
XLNET_BLOCK: Rows = {
    "attention/query": Row("rel_attn.q"),
    "attention/key": Row("rel_attn.k"),
    "attention/value": Row("rel_attn.v"),
    "attention/out": Row("rel_attn.o", "NHO->ONH"),
    "attention/relative/position": Row("rel_attn.r"),
    "attention/relative/content_bias": Row("rel_attn.r_w_bias"),
    "attention/relative/position_bias": Row("rel_attn.r_r_bias"),
    "attention/relative/segment_bias": Row("rel_attn.r_s_bias"),
    "attention/relative/segment": Row("rel_attn.seg_embed"),
    **norm("attention_norm", "rel_attn.layer_norm"),
    **dense("mlp/up", "ff.layer_1"),
    **dense("mlp/down", "ff.layer_2"),
    **norm("mlp_norm", "ff.layer_norm"),
}
# XLNetLMHeadModel.
XLNET = Table(
    {
        "embedding": Row("transformer.word_embedding.weight"),
        "inputs/queries": Row("transformer.mask_emb", "GD->G1D"),
        **under("stack/blocks/", "transformer.layer.{i}.", XLNET_BLOCK),
        "output/bias": Row("lm_loss.bias"),
        "output/kernel": Row("lm_loss.weight"),
    },
    {"lm_loss.weight": "transformer.word_embedding.weight"},
)
