"""Published shapes; the tests assert their parameter counts from shapes alone."""

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

PARAMETERS = {
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
