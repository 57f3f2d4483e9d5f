"""Published shapes; the tests assert their parameter counts from shapes alone.

`PARAMETERS` are the published integers: without the output layer's own parameters and
the classifier, with BERT's pooler where the released model has one (`POOLED`).
"""

_T5_1_0 = dict(
    structure="encoder_decoder",
    vocab_size=32_128,
    activation="relu",
    gated=False,
    tie_embeddings=True,
)
_T5_1_1 = _T5_1_0 | dict(activation="gelu", gated=True, tie_embeddings=False)


def _shape(layers, d_model, heads, head_dim, d_ff):
    return dict(
        encoder_layers=layers,
        decoder_layers=layers,
        d_model=d_model,
        heads=heads,
        head_dim=head_dim,
        d_ff=d_ff,
    )


# T5 v1.0: Raffel et al. 2020, section 3.7. v1.1: Shazeer 2020 (GEGLU), untied head.
PRESETS = {
    "t5_small": _T5_1_0 | _shape(6, 512, 8, 64, 2048),
    "t5_base": _T5_1_0 | _shape(12, 768, 12, 64, 3072),
    "t5_large": _T5_1_0 | _shape(24, 1024, 16, 64, 4096),
    "t5_3b": _T5_1_0 | _shape(24, 1024, 32, 128, 16_384),
    "t5_11b": _T5_1_0 | _shape(24, 1024, 128, 128, 65_536),
    "t5_1_1_small": _T5_1_1 | _shape(8, 512, 6, 64, 1024),
    "t5_1_1_base": _T5_1_1 | _shape(12, 768, 12, 64, 2048),
    "t5_1_1_large": _T5_1_1 | _shape(24, 1024, 16, 64, 2816),
    "t5_1_1_xl": _T5_1_1 | _shape(24, 2048, 32, 64, 5120),
    "t5_1_1_xxl": _T5_1_1 | _shape(24, 4096, 64, 64, 10_240),
}


# mT5: Xue et al. 2021. ByT5: Xue et al. 2022. umT5: Chung et al. 2023. T5-Efficient:
# Tay et al. 2021; heads of 64 agree with its cards' sizes, the printed 32 do not.
_T5_BASE = _T5_1_0 | _shape(12, 768, 12, 64, 3072)
PRESETS |= {
    "mt5_small": PRESETS["t5_1_1_small"] | dict(vocab_size=250_112),
    "mt5_base": PRESETS["t5_1_1_base"] | dict(vocab_size=250_112),
    "umt5_small": PRESETS["t5_1_1_small"]
    | dict(vocab_size=256_384, positions="bias_per_layer"),
    "byt5_small": _T5_1_1
    | _shape(12, 1472, 6, 64, 3584)
    | dict(decoder_layers=4, vocab_size=384),
    "byt5_base": _T5_1_1
    | _shape(18, 1536, 12, 64, 3968)
    | dict(decoder_layers=6, vocab_size=384),
    "t5_efficient_tiny": _T5_1_0 | _shape(4, 256, 4, 64, 1024),
    "t5_efficient_mini": _T5_1_0 | _shape(4, 384, 8, 64, 1536),
    # Raffel et al. 2020, table 2: one stack of the same shape, or shared stacks.
    "t5_decoder_base": _T5_BASE | dict(structure="decoder"),
    "t5_prefix_base": _T5_BASE | dict(structure="prefix_lm"),
    "t5_shared_base": _T5_BASE | dict(share_stacks=True),
}


def _classic(structure, layers, d_model, heads, d_ff, **more):
    """Shapes of BERT's and GPT's kind: biases, LayerNorm after, tied output."""
    return (
        dict(
            structure=structure,
            encoder_layers=layers,
            decoder_layers=layers,
            d_model=d_model,
            heads=heads,
            head_dim=d_model // heads,
            d_ff=d_ff,
            activation="gelu",
            gated=False,
            bias=True,
            norm="layer",
            norm_order="post",
            norm_eps=1e-12,
            scale_attention=True,
            tie_embeddings=True,
            rescale_logits=False,
            positions="learned",
            init_std=0.02,
            dropout=0.1,
        )
        | more
    )


_BASE, _LARGE = (12, 768, 12, 3072), (24, 1024, 16, 4096)
_MLM = dict(embed_norm=True, transform_output=True, output_bias=True, types=2)
_BERT = _MLM | dict(vocab_size=30_522, classes=2)
_ROBERTA = _MLM | dict(vocab_size=50_265, types=1, position_offset=2, norm_eps=1e-5)
_ALBERT = _BERT | dict(vocab_size=30_000, d_embed=128, share_layers=True, dropout=0.0)
_ELECTRA = _BERT | dict(classes=0)
_NEZHA = dict(positions="functional", relative_max_distance=64)
_GPT2 = dict(vocab_size=50_257, max_positions=1024, norm_order="pre", norm_eps=1e-5)
_GPT2 |= dict(init_residual=True)
_GPT3 = _GPT2 | dict(max_positions=2048, dropout=0.0, window=256)
_XLNET = dict(vocab_size=32_000, positions="transformer_xl", types=2, query_streams=1)
_XLNET |= dict(memory_length=384, output_bias=True)
_EXACT = dict(embed_norm=True, norm_eps=1e-5, activation="gelu_exact")
_BART = _EXACT | dict(vocab_size=50_265, max_positions=1024, position_offset=2)
_PROPHETNET = _EXACT | dict(vocab_size=30_522, positions="prophetnet", query_streams=2)

PRESETS |= {
    # BERT: Devlin et al. 2019; the small ones: Turc et al. 2019.
    "bert_tiny": _classic("encoder", 2, 128, 2, 512, **_BERT),
    "bert_mini": _classic("encoder", 4, 256, 4, 1024, **_BERT),
    "bert_small": _classic("encoder", 4, 512, 8, 2048, **_BERT),
    "bert_medium": _classic("encoder", 8, 512, 8, 2048, **_BERT),
    "bert_base": _classic("encoder", *_BASE, **_BERT),
    "bert_large": _classic("encoder", *_LARGE, **_BERT),
    # RoBERTa: Liu et al. 2019; one row of types, as in the released models.
    "roberta_base": _classic("encoder", *_BASE, **_ROBERTA),
    "roberta_large": _classic("encoder", *_LARGE, **_ROBERTA),
    # ALBERT v2: Lan et al. 2020.
    "albert_base": _classic("encoder", *_BASE, **_ALBERT),
    "albert_large": _classic("encoder", *_LARGE, **_ALBERT),
    "albert_xlarge": _classic("encoder", 24, 2048, 16, 8192, **_ALBERT),
    "albert_xxlarge": _classic("encoder", 12, 4096, 64, 16_384, **_ALBERT),
    # ELECTRA: Clark et al. 2020; the generator's widths are a share of these.
    "electra_small": _classic(
        "encoder", 12, 256, 4, 1024, **_ELECTRA, d_embed=128, generator_width=0.25
    ),
    "electra_base": _classic("encoder", *_BASE, **_ELECTRA, generator_width=1 / 3),
    "electra_large": _classic("encoder", *_LARGE, **_ELECTRA, generator_width=0.25),
    # MacBERT: Cui et al. 2020. NEZHA: Wei et al. 2019. ERNIE: Sun et al. 2019.
    # StructBERT: Wang et al. 2020.
    "macbert_base": _classic("encoder", *_BASE, **_BERT | dict(vocab_size=21_128)),
    "nezha_base": _classic(
        "encoder", *_BASE, **_BERT | _NEZHA | dict(vocab_size=21_128)
    ),
    "ernie_base": _classic(
        "encoder", *_BASE, **_BERT | dict(vocab_size=18_000), activation="relu"
    ),
    # ERNIE of Tsinghua: Zhang et al. 2019.
    "ernie_thu_base": _classic(
        *("encoder", 6, 768, 12, 3072),
        **_BERT | dict(vocab_size=28_996),
        d_entity=100,
    ),
    "structbert_base": _classic("encoder", *_BASE, **_BERT | dict(classes=3)),
    # UniLM: Dong et al. 2019; v2: Bao et al. 2020. ERNIE-GEN: Xiao et al. 2020.
    "unilm_base": _classic("encoder", *_BASE, **_ELECTRA | dict(vocab_size=28_996)),
    "unilm_v2_base": _classic(
        "encoder", *_BASE, **_ELECTRA, positions="bias", query_streams=2
    ),
    "ernie_gen_base": _classic("prefix_lm", *_BASE, **_ELECTRA, query_streams=2),
    # XLNet: Yang et al. 2019.
    "xlnet_base": _classic("permuted", *_BASE, **_XLNET),
    "xlnet_large": _classic("permuted", *_LARGE, **_XLNET),
    # GPT: Radford et al. 2018, 2019; GPT-3: Brown et al. 2020, who do not say how wide
    # the bands are: 256 is ours.
    "gpt": _classic("decoder", *_BASE, vocab_size=40_478, norm_eps=1e-5),
    "gpt2": _classic("decoder", *_BASE, **_GPT2),
    "gpt2_medium": _classic("decoder", *_LARGE, **_GPT2),
    "gpt2_large": _classic("decoder", 36, 1280, 20, 5120, **_GPT2),
    "gpt2_xl": _classic("decoder", 48, 1600, 25, 6400, **_GPT2),
    "gpt3_125m": _classic("decoder", *_BASE, **_GPT3),
    "gpt3_1_3b": _classic("decoder", 24, 2048, 32, 8192, **_GPT3),
    "gpt3_175b": _classic("decoder", 96, 12_288, 96, 49_152, **_GPT3),
    # BART: Lewis et al. 2020. MASS: Song et al. 2019. ProphetNet: Qi et al. 2020.
    "bart_base": _classic("encoder_decoder", 6, 768, 12, 3072, **_BART),
    "bart_large": _classic("encoder_decoder", 12, 1024, 16, 4096, **_BART),
    "mass_base": _classic(
        "encoder_decoder", 6, 768, 12, 3072, vocab_size=30_522, embed_norm=True
    ),
    "prophetnet_large": _classic(
        "encoder_decoder", 12, 1024, 16, 4096, **_PROPHETNET, position_offset=1
    ),
}
# The released model has BERT's pooler, which pretraining without classes has not.
POOLED = ("roberta_base", "roberta_large")

PARAMETERS = {
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "roberta_base": 124_645_632,
    "roberta_large": 355_359_744,
    "albert_base": 11_683_584,
    "albert_large": 17_683_968,
    "albert_xlarge": 58_724_864,
    "albert_xxlarge": 222_595_584,
    "gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "xlnet_base": 116_718_336,
    "xlnet_large": 360_268_800,
    "bart_base": 139_420_416,
    "bart_large": 406_291_456,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
}
