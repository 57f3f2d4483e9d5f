"""Weights of other families: their names, and how their config maps to ours.

    cfg = families.model_config("bert", json.load(open("config.json")))
    params = families.from_hf("bert", weights, cfg)  # weights: name -> NumPy array
    weights = families.to_hf("bert", params, cfg)

Theirs are the names of Hugging Face's pretraining classes, or of its class for the
head of a task (see task_heads.py). A model without a head (classes=0, say) is read by
the same table.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.config import ModelConfig
from t5x_lite.interop import decoders, encoders, seq2seq, t5, tables, task_heads
from t5x_lite.interop.tables import Table


@dataclasses.dataclass(frozen=True)
class Family:
    """One class of theirs.

    Attributes:
        names: config -> table of names.
        keys: our config field -> their key, or a function of their whole config.
        fixed: our config fields that the family decides.
        must: their keys that, if present, must have the value that our model has.
        activations: their name -> ours.
    """

    names: Callable[[ModelConfig], Table]
    keys: Mapping[str, str | Callable[[Mapping], Any]]
    fixed: Mapping[str, Any]
    must: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: GELUS)


OURS = {field.name: field for field in dataclasses.fields(ModelConfig)}
GELUS = dict(relu="relu", gelu="gelu_exact", gelu_new="gelu", gelu_pytorch_tanh="gelu")
# Biases, LayerNorm after each sublayer, scaled scores, tied output.
CLASSIC = dict(
    gated=False,
    bias=True,
    norm="layer",
    norm_order="post",
    scale_attention=True,
    tie_embeddings=True,
    rescale_logits=False,
    positions="learned",
)
MASKED = CLASSIC | dict(
    structure="encoder", embed_norm=True, transform_output=True, output_bias=True
)
SHAPE = dict(
    vocab_size="vocab_size",
    d_model="hidden_size",
    heads="num_attention_heads",
    head_dim=lambda c: c["hidden_size"] // c["num_attention_heads"],
    d_ff="intermediate_size",
    encoder_layers="num_hidden_layers",
    types="type_vocab_size",
    norm_eps="layer_norm_eps",
    activation="hidden_act",
)
BERT = SHAPE | dict(max_positions="max_position_embeddings")
ABSOLUTE = dict(position_embedding_type="absolute", is_decoder=False)
# There is no projection between equal widths; 0 is no width there, so it is refused.
ELECTRA = BERT | dict(
    d_embed=lambda c: (
        0 if c["embedding_size"] == c["hidden_size"] else c["embedding_size"] or -1
    )
)
ELECTRA_FIXED = MASKED | dict(generator_width=0.25)
XLNET = dict(
    vocab_size="vocab_size",
    d_model="d_model",
    heads="n_head",
    head_dim=lambda c: c["d_model"] // c["n_head"],
    d_ff="d_inner",
    encoder_layers="n_layer",
    norm_eps="layer_norm_eps",
    memory_length=lambda c: c.get("mem_len") or 384,
    activation="ff_activation",
)
GPT = dict(
    vocab_size="vocab_size",
    max_positions="n_positions",
    d_model="n_embd",
    heads="n_head",
    head_dim=lambda c: c["n_embd"] // c["n_head"],
    d_ff=lambda c: c.get("n_inner") or 4 * c["n_embd"],
    decoder_layers="n_layer",
    norm_eps=lambda c: c.get("layer_norm_epsilon", 1e-5),
)
BART = dict(
    vocab_size="vocab_size",
    max_positions="max_position_embeddings",
    d_model="d_model",
    heads="encoder_attention_heads",
    head_dim=lambda c: c["d_model"] // c["encoder_attention_heads"],
    d_ff="encoder_ffn_dim",
    encoder_layers="encoder_layers",
    decoder_layers="decoder_layers",
    activation="activation_function",
)
PROPHETNET = dict(
    vocab_size="vocab_size",
    max_positions=lambda c: c["max_position_embeddings"] - 1,
    d_model="hidden_size",
    heads="num_encoder_attention_heads",
    head_dim=lambda c: c["hidden_size"] // c["num_encoder_attention_heads"],
    d_ff="encoder_ffn_dim",
    encoder_layers="num_encoder_layers",
    decoder_layers="num_decoder_layers",
    query_streams="ngram",
    relative_buckets="num_buckets",
    relative_max_distance="relative_max_distance",
    activation="activation_function",
)
# The oldest T5 configs leave out what was added later.
T5 = dict(
    vocab_size="vocab_size",
    d_model="d_model",
    heads="num_heads",
    head_dim="d_kv",
    d_ff="d_ff",
    encoder_layers="num_layers",
    decoder_layers=lambda c: c.get("num_decoder_layers") or c["num_layers"],
    relative_buckets="relative_attention_num_buckets",
    relative_max_distance=lambda c: c.get("relative_attention_max_distance", 128),
    norm_eps="layer_norm_epsilon",
    gated=lambda c: c.get("feed_forward_proj", "relu").startswith("gated-"),
    activation=lambda c: c.get("feed_forward_proj", "relu"),
    tie_embeddings=lambda c: c.get("tie_word_embeddings", True),
)
T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu", "gated-relu": "relu"}


def _fixed(table: Table) -> Callable[[ModelConfig], Table]:
    return lambda cfg: table


FAMILIES = {
    "bert": Family(
        _fixed(encoders.bert("bert")), BERT, MASKED | dict(classes=2), ABSOLUTE
    ),
    "ernie": Family(
        _fixed(encoders.bert("ernie")),
        BERT,
        MASKED | dict(classes=2),
        ABSOLUTE | dict(use_task_id=False),
    ),
    "nezha": Family(
        _fixed(encoders.bert("nezha")),
        SHAPE | dict(relative_max_distance="max_relative_position"),
        MASKED | dict(classes=2, positions="functional"),
    ),
    "roberta": Family(
        _fixed(encoders.ROBERTA),
        SHAPE | dict(max_positions=lambda c: c["max_position_embeddings"] - 2),
        MASKED | dict(position_offset=2),
        # Its head computes erf's gelu whatever hidden_act says.
        ABSOLUTE | dict(pad_token_id=1, hidden_act="gelu"),
    ),
    "albert": Family(
        _fixed(encoders.ALBERT),
        BERT | dict(d_embed="embedding_size"),
        MASKED | dict(classes=2, share_layers=True),
        ABSOLUTE | dict(num_hidden_groups=1, inner_group_num=1),
    ),
    # The config is the discriminator's; `generator_width` says the generator's.
    "electra_generator": Family(
        _fixed(encoders.ELECTRA_GENERATOR), ELECTRA, ELECTRA_FIXED, ABSOLUTE
    ),
    "electra_discriminator": Family(
        _fixed(encoders.ELECTRA_DISCRIMINATOR), ELECTRA, ELECTRA_FIXED, ABSOLUTE
    ),
    "electra": Family(
        _fixed(encoders.ELECTRA), ELECTRA, MASKED, ABSOLUTE | dict(hidden_act="gelu")
    ),
    "xlnet": Family(
        _fixed(decoders.XLNET),
        XLNET,
        CLASSIC
        | dict(structure="permuted", positions="transformer_xl", output_bias=True)
        | dict(types=2, query_streams=1),
        dict(attn_type="bi", clamp_len=-1, same_length=False, untie_r=True),
    ),
    "gpt": Family(
        _fixed(decoders.gpt("tokens_embed", "positions_embed")),
        GPT | dict(activation="afn"),
        CLASSIC | dict(structure="decoder"),
        activations=dict(gelu="gelu", relu="relu"),
    ),
    "gpt2": Family(
        _fixed(decoders.gpt("wte", "wpe")),
        GPT | dict(activation="activation_function"),
        CLASSIC | dict(structure="decoder", norm_order="pre"),
        dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    ),
    "bart": Family(
        _fixed(seq2seq.BART),
        BART,
        CLASSIC
        | dict(structure="encoder_decoder", embed_norm=True, norm_eps=1e-5)
        | dict(position_offset=2, output_bias=False),
        dict(scale_embedding=False),
    ),
    "mbart": Family(
        _fixed(seq2seq.MBART),
        BART | dict(scale_embedding=lambda c: c.get("scale_embedding", False)),
        CLASSIC
        | dict(structure="encoder_decoder", embed_norm=True, norm_eps=1e-5)
        | dict(position_offset=2, output_bias=False, norm_order="pre"),
    ),
    "prophetnet": Family(
        _fixed(seq2seq.PROPHETNET),
        PROPHETNET,
        CLASSIC
        | dict(structure="encoder_decoder", embed_norm=True, norm_eps=1e-5)
        | dict(position_offset=1, positions="prophetnet"),
        dict(pad_token_id=0),
    ),
    "t5": Family(t5.table, T5, {}, activations=T5_ACTIVATIONS),
    "mt5": Family(
        t5.table,
        T5 | dict(tie_embeddings=lambda c: False),  # whatever transformers 5 says
        {},
        activations=T5_ACTIVATIONS,
    ),
    "umt5": Family(
        t5.table,
        T5 | dict(tie_embeddings=lambda c: False),  # whatever transformers 5 says
        dict(positions="bias_per_layer"),
        activations=T5_ACTIVATIONS,
    ),
}


def model_config(family: str, theirs: Mapping[str, Any], **changes) -> ModelConfig:
    """Their config (the keys of their config.json) as ours.

    Args:
      changes: our fields, for what their config does not say, as `classes=0` for a
        model without the sentence head.

    Raises:
      ValueError: if a key is missing, has a value that no model has, or asks for what
        our model does not do.
    """
    row = FAMILIES[family]
    for key, value in row.must.items():
        if theirs.get(key, value) != value:
            raise ValueError(
                f"{key}={theirs[key]!r} in the config of {family!r}; our model has "
                f"{key}={value!r} only and would give other numbers."
            )
    fields: dict[str, Any] = dict(row.fixed)
    for ours, key in row.keys.items():
        try:
            fields[ours] = key(theirs) if callable(key) else theirs[key]
        except KeyError as e:
            raise ValueError(
                f"the config of {family!r} has no {e.args[0]!r}: {sorted(theirs)}. "
                "Copy the model's own config.json there."
            ) from e
        except (TypeError, AttributeError, ZeroDivisionError) as e:
            raise ValueError(_wrong(family, ours, e)) from e
        if problem := _problem(ours, fields[ours]):
            raise ValueError(_wrong(family, ours, problem))
    act = fields["activation"]
    if act not in row.activations:
        raise ValueError(
            f"activation {act!r} in the config of {family!r} is not one of "
            f"{sorted(row.activations)}."
        )
    fields["activation"] = row.activations[act]
    return ModelConfig(**fields | changes)


def _problem(ours: str, value: Any) -> str:
    """Why this is no value of our field; "" if it is one."""
    kind = str if ours == "activation" else type(OURS[ours].default)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        return f"{value!r} is no {kind.__name__}"
    low = OURS[ours].metadata["low"]
    low = 1 if ours == "vocab_size" else low
    if low is not None and not low <= value < math.inf:
        return f"{value!r} is not {low} or more"
    return ""


def _wrong(family: str, ours: str, why: object) -> str:
    key = FAMILIES[family].keys[ours]
    name = key if isinstance(key, str) else f"what gives config.model.{ours}"
    return (
        f"{name} in the config of {family!r}: {why}. Copy the model's own config.json "
        "there."
    )


def table(family: str, cfg: ModelConfig) -> Table:
    """The names in their class for this model and its head."""
    whole = FAMILIES[family].names(cfg)
    return task_heads.table(family, whole, cfg.head) if cfg.head else whole


def to_hf(family: str, params: Mapping, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our nested parameters -> their whole state dict, copies included."""
    return tables.to_theirs(table(family, cfg), params, cfg)


def from_hf(family: str, weights: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their state dict -> our nested parameters; `tables.from_theirs` on errors."""
    return tables.from_theirs(table(family, cfg), weights, cfg)
