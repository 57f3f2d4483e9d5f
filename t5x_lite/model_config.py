"""The shape of a model: every key of `config.model`, and what does not fit together."""

import dataclasses
from typing import Any


def key(default: Any, doc: str, *, low=None, high=None, among=None) -> Any:
    """A config field: its default, meaning (with unit) and allowed values."""
    metadata = dict(doc=doc, low=low, high=high, among=among)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


STRUCTURES = ("encoder", "decoder", "encoder_decoder", "prefix_lm", "permuted")
ACTIVATIONS = ("relu", "gelu", "gelu_exact")
POSITIONS = (
    *("none", "learned", "sinusoidal", "bias", "bias_per_layer"),
    *("functional", "transformer_xl", "prophetnet"),
)
DTYPES = ("float32", "bfloat16")
ATTENTION = ("einsum", "rows", "cudnn")
REMAT = ("none", "full", "dots", "dots_no_batch")
HEADS = ("", "class", "regression", "choice", "similarity", "tags", "span")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. Presets with published sizes are in `configs/models.py`."""

    structure: str = key("encoder_decoder", "which model and layout", among=STRUCTURES)
    vocab_size: int = key(0, "embedding rows; 0 = the vocabulary, up to 128n", low=0)
    d_model: int = key(512, "width D of the residual stream", low=1)
    d_embed: int = key(0, "width of the embeddings; 0 = d_model (else: ALBERT)", low=0)
    d_ff: int = key(1024, "width F inside the feed-forward layer", low=1)
    heads: int = key(6, "attention heads N", low=1)
    head_dim: int = key(64, "width H of one head; N*H need not equal D", low=1)
    encoder_layers: int = key(8, "depth of an encoder or permuted-LM", low=1)
    decoder_layers: int = key(8, "depth of a decoder or prefix-LM", low=1)
    share_layers: bool = key(False, "one block for all layers (ALBERT)")
    share_stacks: bool = key(False, "decoder uses the encoder's parameters too")
    activation: str = key("gelu", "gelu is tanh, gelu_exact erf", among=ACTIVATIONS)
    gated: bool = key(True, "gated feed-forward (GEGLU with gelu)")
    bias: bool = key(False, "biases in projections and norms")
    norm: str = key("rms", "RMSNorm or LayerNorm", among=("rms", "layer"))
    norm_order: str = key("pre", "before a sublayer or after it", among=("pre", "post"))
    norm_eps: float = key(1e-6, "epsilon of the norm", low=0.0)
    embed_norm: bool = key(False, "norm after the embeddings")
    scale_embedding: bool = key(False, "embedded tokens times D^0.5 (mBART)")
    scale_attention: bool = key(False, "scores times H^-0.5 (T5: no)")
    tie_embeddings: bool = key(False, "logits from the embedding")
    rescale_logits: bool = key(True, "times D^-0.5 if tied, as in T5 v1.0")
    output_bias: bool = key(False, "a bias on the logits")
    transform_output: bool = key(False, "dense, activation, norm before logits (BERT)")
    init_std: float = key(0.0, "of all weights; 0 = by fan-in as in T5", low=0.0)
    init_residual: bool = key(False, "outputs' init times (2L)^-0.5 (GPT-2)")
    positions: str = key("bias", "how positions enter; see layers", among=POSITIONS)
    max_positions: int = key(512, "rows of learned positions", low=1)
    position_offset: int = key(0, "first row used (RoBERTa, BART: 2)", low=0)
    types: int = key(0, "rows of sentence-type embeddings; 0 = none", low=0)
    classes: int = key(0, "classes of the whole example; 0 = no such head", low=0)
    head: str = key("", "what is read off for a task; see heads.py", among=HEADS)
    head_pooler: bool = key(True, "dense and tanh before it (BERT; GPT-1: no)")
    choices: int = key(0, "head='choice': rows that one is chosen of", low=0)
    mix_layers: bool = key(False, "the head reads a learned mix of all layers (ELMo)")
    lora_rank: int = key(0, "rank r of LoRA's adapters; 0 = none", low=0)
    lora_alpha: float = key(16.0, "adapters are multiplied by alpha / r", low=0.0)
    lora_targets: str = key(
        r".*/(attention|cross)/(query|value)", "regex of the weights that get one"
    )
    lora_trained: str = key(
        r"(head|mix)/.*", "regex of what else is trained; the rest is frozen"
    )
    distill_width: int = key(
        0, "of a teacher whose states the student's are projected to; 0 = none", low=0
    )
    query_streams: int = key(0, "query streams (XLNet 1, ProphetNet n)", low=0)
    memory_length: int = key(0, "tokens read before the stream (XLNet)", low=0)
    window: int = key(0, "positions that banded layers look back; 0 = all", low=0)
    window_every: int = key(2, "every k-th layer is banded, from the k-th", low=1)
    relative_buckets: int = key(32, "relative-position buckets", low=4)
    relative_max_distance: int = key(128, "tokens; farther shares a bucket", low=2)
    generator_width: float = key(
        0.0, "ELECTRA's generator as a share of the widths; 0 = none", low=0.0, high=1.0
    )
    d_entity: int = key(0, "width C of entities; 0 = none (else: ERNIE)", low=0)
    entities: int = key(0, "entity embeddings; 0 = those of the file", low=0)
    entity_heads: int = key(4, "attention heads of the entities", low=1)
    entity_layers: int = key(6, "layers that read entities, after the others", low=1)
    parametrisation: str = key(
        "standard", "mup: rates tuned at the base fit", among=("standard", "mup")
    )
    base_d_model: int = key(0, "muP: d_model that the rates were tuned at", low=0)
    base_d_ff: int = key(0, "muP: its d_ff; 0 = in proportion", low=0)
    base_heads: int = key(0, "muP: its heads; 0 = heads * head_dim in prop.", low=0)
    base_head_dim: int = key(0, "muP: its head_dim; 0 = the same", low=0)
    base_d_embed: int = key(0, "muP: its d_embed; 0 = the same", low=0)
    base_layers: int = key(0, "muP: depth of its stacks; 0 = depth is as is", low=0)
    dropout: float = key(0.0, "rate, broadcast over length as in T5", low=0.0, high=0.9)
    attention: str = key(
        "einsum", "kernel; rows: one CPU device, cudnn: GPU", among=ATTENTION
    )
    unpadded: bool = key(
        False, "promise for cudnn: rows have no padding and one segment (checked)"
    )
    dtype: str = key("float32", "compute dtype; state is float32", among=DTYPES)
    remat: str = key("dots", "what the backward pass recomputes", among=REMAT)
    scan: bool = key(True, "loop over layers with lax.scan (False: unrolled)")

    @property
    def depth(self) -> int:
        """Layers of a single stack."""
        encodes = self.structure in ("encoder", "permuted")
        return self.encoder_layers if encodes else self.decoder_layers


def generator_config(cfg: ModelConfig) -> ModelConfig:
    """ELECTRA's generator: the same depth, a share of the widths (section 3.3)."""
    heads = max(1, round(cfg.heads * cfg.generator_width))
    small = dataclasses.replace(
        cfg,
        generator_width=0.0,
        d_model=heads * cfg.head_dim,
        d_ff=max(1, round(cfg.d_ff * cfg.generator_width)),
        heads=heads,
        d_embed=cfg.d_embed or cfg.d_model,
    )
    if cfg.parametrisation == "standard":
        return small
    return with_base(small, generator_config(base_config(cfg)))


def base_config(cfg: ModelConfig) -> ModelConfig:
    """The standard model that a muP one is measured by; a standard one is its own."""
    if cfg.parametrisation == "standard":
        return cfg
    D, H = cfg.base_d_model, cfg.base_head_dim or cfg.head_dim
    heads = cfg.heads * cfg.head_dim * D // (cfg.d_model * H)
    return dataclasses.replace(
        cfg,
        parametrisation="standard",
        d_model=D,
        d_ff=cfg.base_d_ff or cfg.d_ff * D // cfg.d_model,
        heads=cfg.base_heads or heads,
        head_dim=H,
        d_embed=cfg.base_d_embed or cfg.d_embed,
        encoder_layers=cfg.base_layers or cfg.encoder_layers,
        decoder_layers=cfg.base_layers or cfg.decoder_layers,
    )


def with_base(cfg: ModelConfig, base: ModelConfig) -> ModelConfig:
    """`cfg` under muP, measured by the widths of `base`; `base_layers` stays."""
    return dataclasses.replace(
        cfg,
        parametrisation="mup",
        base_d_model=base.d_model,
        base_d_ff=base.d_ff,
        base_heads=base.heads,
        base_head_dim=base.head_dim,
        base_d_embed=base.d_embed,
    )


def mup_problems(m: ModelConfig):
    """Yields (is it so, what is wrong with a muP model's base)."""
    D = m.base_d_model
    yield (
        not D,
        "parametrisation='mup' needs base_d_model, the width that the learning rate "
        f"was tuned at: base_d_model={m.d_model}, say, for this model itself.",
    )
    yield (
        not m.base_d_ff and m.d_ff * D % m.d_model,
        f"base_d_ff=0 means d_ff={m.d_ff} * base_d_model={D} / d_model={m.d_model}, "
        "which is no whole number. Set base_d_ff.",
    )
    H = m.base_head_dim or m.head_dim
    yield (
        not m.base_heads and m.heads * m.head_dim * D % (m.d_model * H),
        f"base_heads=0 means heads={m.heads} * head_dim={m.head_dim} * base_d_model="
        f"{D} / (d_model={m.d_model} * base_head_dim={H}), which is no whole number. "
        "Set base_heads and base_head_dim.",
    )
    yield (
        m.base_d_embed and not m.d_embed,
        f"base_d_embed={m.base_d_embed} needs d_embed > 0. Set it to 0: the "
        "embeddings then are as wide as the model.",
    )
    yield (
        m.base_layers and m.norm_order == "post",
        f"base_layers={m.base_layers} (muP over depth) is known for norm_order='pre' "
        "only. Set base_layers=0: muP over width goes with norms after, too.",
    )
    yield (
        m.base_layers and m.share_layers,
        f"base_layers={m.base_layers} (muP over depth) needs layers of their own, here "
        "is share_layers=True. Set base_layers=0.",
    )


def problems(m: ModelConfig):
    """Yields one line for each pair of keys that do not fit together."""
    single = m.structure != "encoder_decoder"
    own_outputs = m.generator_width or m.d_entity
    classified = m.head in ("class", "tags", "similarity")
    rows = (
        (
            classified and m.classes < (1 if m.head == "similarity" else 2),
            f"classes={m.classes}: head={m.head!r} needs how many there are"
            + (" (1 = a number)." if m.head == "similarity" else ", 2 or more."),
        ),
        (
            m.head in ("regression", "choice", "span") and m.classes,
            f"classes={m.classes}: head={m.head!r} has none. Set it to 0.",
        ),
        (
            (m.head == "choice") != (m.choices > 1),
            f"choices={m.choices} with head={m.head!r}: head='choice' needs the number "
            "of rows that one is chosen of, 2 or more; any other head has 0.",
        ),
        (
            m.mix_layers and not m.head,
            "mix_layers=True needs a head that reads the mix. Set head, or False.",
        ),
        (
            own_outputs and (m.head or m.mix_layers or m.distill_width),
            f"head={m.head!r}, mix_layers={m.mix_layers}, distill_width="
            f"{m.distill_width} do not go with generator_width={m.generator_width} "
            f"(ELECTRA) or d_entity={m.d_entity} (ERNIE). Set these to 0: a fine-tuned "
            "run may start from one of their runs by config.init_rules.",
        ),
        (
            m.d_embed and not m.transform_output,
            f"d_embed={m.d_embed} needs transform_output=True, which maps the stack's "
            "output back to that width.",
        ),
        (
            m.share_stacks and (single or m.encoder_layers != m.decoder_layers),
            f"share_stacks=True needs structure='encoder_decoder' (here {m.structure!r}"
            f") and encoder_layers={m.encoder_layers} equal to decoder_layers="
            f"{m.decoder_layers}.",
        ),
        (
            m.memory_length and m.positions != "transformer_xl",
            f"memory_length={m.memory_length} needs positions='transformer_xl' (here "
            f"{m.positions!r}), which count on from the memory. Set it to 0.",
        ),
        (
            m.memory_length and not single,
            f"memory_length={m.memory_length} needs a single stack. Set it to 0.",
        ),
        (
            m.window and m.structure not in ("decoder", "prefix_lm"),
            f"window={m.window} needs structure 'decoder' or 'prefix_lm', here "
            f"{m.structure!r}. Set it to 0.",
        ),
        (
            m.generator_width and m.structure != "encoder",
            f"generator_width={m.generator_width} (ELECTRA) needs structure='encoder', "
            f"here {m.structure!r}. Set it to 0.",
        ),
        (
            m.generator_width
            and (
                m.classes
                or m.query_streams
                or m.memory_length
                or m.window
                or not m.transform_output
            ),
            f"generator_width={m.generator_width} (ELECTRA) needs classes=0, "
            "query_streams=0, memory_length=0, window=0 and transform_output=True.",
        ),
        (
            m.positions == "functional" and m.query_streams,
            f"positions='functional' has no query streams; query_streams="
            f"{m.query_streams}. Use 'learned' or 'bias'.",
        ),
        (
            m.positions == "transformer_xl" and m.query_streams > 1,
            "positions='transformer_xl' has one query stream (XLNet) or none; "
            f"query_streams={m.query_streams}.",
        ),
        (
            m.positions == "prophetnet" and single,
            f"positions='prophetnet' needs structure='encoder_decoder', here "
            f"{m.structure!r}.",
        ),
        (
            m.positions in ("functional", "transformer_xl", "prophetnet")
            and m.attention != "einsum",
            f"attention={m.attention!r} cannot compute positions={m.positions!r}. Use "
            "'einsum'.",
        ),
        (
            m.unpadded
            and (
                m.structure not in ("encoder", "decoder", "encoder_decoder")
                or m.query_streams
                or m.memory_length
                or m.window
            ),
            "unpadded=True is for encoders, decoders and encoder-decoders without "
            "query streams, memory and window, whose masks are all or causal. Set it "
            "to False.",
        ),
    )
    if m.parametrisation == "mup":
        rows += tuple(mup_problems(m))
    for wrong, text in rows:
        if wrong:
            yield f"config.model.{text}"
