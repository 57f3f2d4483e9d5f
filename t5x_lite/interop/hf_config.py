"""Hugging Face's config.json and ours, in both directions.

    family, cfg = hf_config.read(json.load(open("config.json")), weights)
    json.dump(hf_config.write("bert", cfg), open("config.json", "w"))

`families.FAMILIES` says which of our fields is which of their keys; here is the rest.
What is written is read back and compared, so a model that theirs would compute in
another way is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, t5, task_heads


class Theirs(NamedTuple):
    """What a family is called there.

    Attributes:
        type: their model_type.
        prefix: of the names of the model without heads.
        classes: their class, and the one with a class of the whole example.
        dropout: their keys that have our rate.
        more: config -> keys that are not in `Family.keys` under one name.
    """

    type: str
    prefix: str
    classes: tuple[str, ...]
    dropout: tuple[str, ...]
    more: Callable[[ModelConfig], dict] = lambda cfg: {}

    def architecture(self, cfg: ModelConfig) -> str:
        """Their class for a model with these heads."""
        return self.classes[-1 if cfg.classes else 0]


IN_BERT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
IN_GPT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SEQ2SEQ = dict(is_encoder_decoder=True)


def _electra(cfg: ModelConfig) -> dict:
    return dict(embedding_size=cfg.d_embed or cfg.d_model)


def _bart(cfg: ModelConfig) -> dict:
    both = dict(decoder_attention_heads=cfg.heads, decoder_ffn_dim=cfg.d_ff)
    return both | SEQ2SEQ | dict(scale_embedding=cfg.scale_embedding)


def _t5(cfg: ModelConfig) -> dict:
    if cfg.activation not in ("relu", "gelu"):
        raise ValueError(f"config.model.activation={cfg.activation!r} is not T5's.")
    return t5.hf_config(cfg) | SEQ2SEQ


ELECTRA = ("ElectraForMaskedLM",)
THEIRS = {
    "t5": Theirs("t5", "", ("T5ForConditionalGeneration",), ("dropout_rate",), _t5),
    "mt5": Theirs("mt5", "", ("MT5ForConditionalGeneration",), ("dropout_rate",), _t5),
    "umt5": Theirs(
        "umt5", "", ("UMT5ForConditionalGeneration",), ("dropout_rate",), _t5
    ),
    "bert": Theirs("bert", "bert", ("BertForMaskedLM", "BertForPreTraining"), IN_BERT),
    "ernie": Theirs(
        *("ernie", "ernie", ("ErnieForMaskedLM", "ErnieForPreTraining"), IN_BERT),
        lambda cfg: dict(use_task_id=False),
    ),
    "nezha": Theirs(
        "nezha", "nezha", ("NezhaForMaskedLM", "NezhaForPreTraining"), IN_BERT
    ),
    "roberta": Theirs(
        *("roberta", "roberta", ("RobertaForMaskedLM",), IN_BERT),
        lambda cfg: dict(max_position_embeddings=cfg.max_positions + 2, pad_token_id=1),
    ),
    "albert": Theirs(
        *("albert", "albert", ("AlbertForMaskedLM", "AlbertForPreTraining"), IN_BERT),
        lambda cfg: dict(num_hidden_groups=1, inner_group_num=1),
    ),
    "electra": Theirs("electra", "electra", ELECTRA, IN_BERT, _electra),
    "electra_generator": Theirs("electra", "electra", ELECTRA, IN_BERT, _electra),
    "electra_discriminator": Theirs(
        "electra", "electra", ("ElectraForPreTraining",), IN_BERT, _electra
    ),
    "xlnet": Theirs(
        *("xlnet", "transformer", ("XLNetLMHeadModel",), ("dropout",)),
        lambda cfg: dict(
            mem_len=cfg.memory_length, d_head=cfg.head_dim, attn_type="bi", untie_r=True
        ),
    ),
    "gpt": Theirs(
        *("openai-gpt", "transformer", ("OpenAIGPTLMHeadModel",), IN_GPT),
        lambda cfg: dict(layer_norm_epsilon=cfg.norm_eps),
    ),
    "gpt2": Theirs(
        *("gpt2", "transformer", ("GPT2LMHeadModel",), IN_GPT),
        lambda cfg: dict(n_inner=cfg.d_ff, layer_norm_epsilon=cfg.norm_eps),
    ),
    "bart": Theirs(
        "bart", "model", ("BartForConditionalGeneration",), ("dropout",), _bart
    ),
    "mbart": Theirs(
        "mbart", "model", ("MBartForConditionalGeneration",), ("dropout",), _bart
    ),
    "prophetnet": Theirs(
        *("prophetnet", "prophetnet", ("ProphetNetForConditionalGeneration",)),
        ("dropout",),
        lambda cfg: (
            SEQ2SEQ
            | dict(
                max_position_embeddings=cfg.max_positions + 1,
                num_decoder_attention_heads=cfg.heads,
                decoder_ffn_dim=cfg.d_ff,
                pad_token_id=0,
            )
        ),
    ),
}
# In which order families are tried for a model of ours; theirs of a type: the first.
_ORDER = ("t5", "umt5", "bert", "albert", "roberta", "electra", "nezha", "xlnet")
ORDER = (*_ORDER, "gpt2", "gpt", "bart", "mbart", "prophetnet")
# Pairs of their keys that our model has as one.
EQUAL = (
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_ffn_dim", "decoder_ffn_dim"),
    ("num_encoder_attention_heads", "num_decoder_attention_heads"),
)
# Fields on which neither parameters nor logits depend, or only if another has a value.
FREE = (
    *("dropout", "attention", "unpadded", "dtype", "remat", "scan", "memory_length"),
    *("init_std", "init_residual", "window_every", "entity_heads", "entity_layers"),
    *("entities", "lora_alpha", "lora_targets", "lora_trained"),
)
# And of a model with a head: what belongs to the head, which has rows of its own, and
# to the language model's output, which is left out.
HEADED = (
    *("head", "head_pooler", "classes", "choices", "tie_embeddings", "output_bias"),
    *("rescale_logits", "transform_output"),
)
ONLY_IF: dict[str, Callable[[ModelConfig], bool]] = {
    "max_positions": lambda c: c.positions in ("learned", "sinusoidal", "prophetnet"),
    "position_offset": lambda c: c.positions in ("learned", "prophetnet"),
    "relative_buckets": lambda c: (
        c.positions in ("bias", "bias_per_layer", "prophetnet")
    ),
    "relative_max_distance": lambda c: (
        c.positions in ("bias", "bias_per_layer", "prophetnet", "functional")
    ),
    "encoder_layers": lambda c: c.structure not in ("decoder", "prefix_lm"),
    "decoder_layers": lambda c: c.structure not in ("encoder", "permuted"),
    "rescale_logits": lambda c: c.tie_embeddings,
}


def family_of(theirs: Mapping[str, Any], names) -> str:
    """The family of a config.json and its weights' names.

    Raises:
      ValueError: a model_type that is not here.
    """
    kind = theirs.get("model_type")
    if kind == "electra":
        found = any(name.startswith("discriminator_predictions.") for name in names)
        return "electra_discriminator" if found else "electra"
    for family, row in THEIRS.items():
        if row.type == kind:
            return family
    known = sorted({row.type for row in THEIRS.values()})
    raise ValueError(
        f"config.json has model_type={kind!r}; known are {', '.join(known)}. A model "
        "that has the names and the computation of one of these: write that "
        "model_type into its config.json."
    )


def _rate(theirs: Mapping[str, Any], key: str) -> float:
    value = theirs.get(key) or 0.0
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            f"config.json has {key}={value!r}; a number from 0 to 1 is needed. Copy "
            "the model's own config.json there."
        )
    return float(value)


def read(
    theirs: Mapping[str, Any], weights: Mapping[str, np.ndarray], family: str = ""
) -> tuple[str, ModelConfig]:
    """(family, our config); classes and tied embeddings are as the weights have them.

    The head of a task is that of the class that `theirs` names.

    Raises:
      ValueError: what our model does not compute, or no config can say.
    """
    family = family or family_of(theirs, weights)
    for one, other in EQUAL:
        if one in theirs and theirs[one] != theirs.get(other, theirs[one]):
            raise ValueError(
                f"config.json has {one}={theirs[one]!r} and {other}={theirs[other]!r}; "
                "our model has the same in both stacks."
            )
    cfg = families.model_config(family, theirs)
    cfg = dataclasses.replace(cfg, head=task_heads.head_of(family, theirs))
    rows = families.table(family, cfg).rows
    changes: dict[str, Any] = {}
    changes["dropout"] = max(_rate(theirs, key) for key in THEIRS[family].dropout)
    for key in ("init_std", "initializer_range"):
        if theirs.get(key) is not None:
            changes["init_std"] = _rate(theirs, key)
    if cfg.head:
        changes |= task_heads.fields(family, cfg, theirs, weights)
        return family, dataclasses.replace(cfg, **changes)
    if cfg.classes:
        kernel = weights.get(rows["classes/kernel"].theirs)
        changes["classes"] = 0 if kernel is None else kernel.shape[0]
    if "output/kernel" in rows:
        kernel = weights.get(rows["output/kernel"].theirs)
        changes["tie_embeddings"] = kernel is None or np.array_equal(
            kernel, weights.get(rows["embedding"].theirs, kernel)
        )
        if kernel is None and family == "t5":
            changes["tie_embeddings"] = cfg.tie_embeddings
    if family == "mt5" and changes["tie_embeddings"]:
        changes["rescale_logits"] = False
    if family == "t5":
        scaled = theirs.get(
            "scale_decoder_outputs", theirs.get("tie_word_embeddings", True)
        )
        changes["rescale_logits"] = scaled or not changes["tie_embeddings"]
        if scaled and not changes["tie_embeddings"]:
            raise ValueError(
                "config.json has tie_word_embeddings=true, but lm_head.weight is not "
                "the embedding: transformers would scale its logits, our model does "
                "not. Write false if the model was trained without (T5.1.1)."
            )
    bias = rows.get("output/bias")
    if family in ("bart", "mbart") and bias is not None:
        value = weights.get(bias.theirs)
        changes["output_bias"] = value is not None and bool(np.any(value))
    return family, dataclasses.replace(cfg, **changes)


def write(family: str, cfg: ModelConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """The config.json of a model of ours.

    Args:
      labels: names of the classes of its head; () = LABEL_0 ...

    Raises:
      ValueError: naming the fields in which theirs would be another model.
    """
    theirs = _written(family, cfg)
    wrong = differences(family, cfg, theirs)
    if wrong:
        raise ValueError(
            f"this model is no {family!r} of transformers:\n  - " + "\n  - ".join(wrong)
        )
    return theirs | (task_heads.config(family, cfg, labels) if cfg.head else {})


def _written(family: str, cfg: ModelConfig) -> dict[str, Any]:
    row, names = families.FAMILIES[family], THEIRS[family]
    back = {ours: key for key, ours in reversed(list(row.activations.items()))}
    theirs: dict[str, Any] = {}
    for ours, key in row.keys.items():
        if isinstance(key, str):
            value = getattr(cfg, ours)
            theirs[key] = back.get(value, value) if ours == "activation" else value
    theirs |= names.more(cfg)
    theirs |= dict.fromkeys(names.dropout, cfg.dropout)
    if cfg.init_std and family not in ("t5", "mt5", "umt5"):
        key = "init_std" if "is_encoder_decoder" in theirs else "initializer_range"
        theirs[key] = cfg.init_std
    theirs |= dict(model_type=names.type, architectures=[names.architecture(cfg)])
    theirs["tie_word_embeddings"] = cfg.tie_embeddings
    return theirs


def differences(family: str, cfg: ModelConfig, theirs: Mapping) -> list[str]:
    """What their model would compute in another way, a line for each field.

    Raises:
      ValueError: their config has no such value at all.
    """
    heads: dict[str, Any] = dict(classes=cfg.classes, tie_embeddings=cfg.tie_embeddings)
    if family in ("bart", "mbart"):
        heads["output_bias"] = cfg.output_bias
    if family in ("t5", "mt5"):
        heads["rescale_logits"] = cfg.tie_embeddings and family == "t5"
    if family in ("electra_generator", "electra_discriminator"):
        heads["generator_width"] = cfg.generator_width
    again = families.model_config(family, theirs, **heads)
    found, free = [], (*FREE, *(HEADED if cfg.head else ()))
    for field in dataclasses.fields(cfg):
        name = field.name
        here, there = getattr(cfg, name), getattr(again, name)
        counts = name not in free and ONLY_IF.get(name, lambda c: True)(cfg)
        if counts and here != there:
            found.append(f"config.model.{name}={here!r}, theirs has {there!r}")
    if theirs.get("type_vocab_size") == 0:
        found.append("config.model.types=0, theirs has 1 or more")
    if cfg.head:
        return found + task_heads.problems(family, cfg)
    if cfg.classes and len(THEIRS[family].classes) == 1:
        found.append(f"config.model.classes={cfg.classes}, theirs has 0")
    if cfg.classes not in (0, 2):
        found.append(f"config.model.classes={cfg.classes}, theirs has 0 or 2")
    return found


def fitting(cfg: ModelConfig) -> list[str]:
    """The families that compute this model, the usual one first.

    Raises:
      ValueError: none does; it says why not the nearest.
    """
    found, why = [], {}
    for family in ORDER:
        try:
            why[family] = differences(family, cfg, _written(family, cfg))
        except ValueError:  # too far away to be named as the nearest
            continue
        if not why[family]:
            found.append(family)
    if not found:
        nearest = min(why, key=lambda family: _distance(why[family]))
        raise ValueError(
            "config.model is none of the models of transformers that are known here "
            f"({', '.join(ORDER)}). The nearest, {nearest!r}, differs:\n  - "
            + "\n  - ".join(why[nearest])
            + "\nExport the parameters with t5x_lite.export instead."
        )
    return found


def _distance(lines: list[str]) -> tuple[int, int]:
    """A body that fits, without the head, is nearer than any other."""
    body = [line for line in lines if not line.startswith("config.model.head")]
    return len(body), len(lines)


def fits(cfg: ModelConfig) -> bool:
    """Is there such a family?"""
    try:
        return bool(fitting(cfg))
    except ValueError:
        return False


def notes(family: str, cfg: ModelConfig) -> list[str]:
    """What differs in theirs though the weights are the same."""
    found = []
    if cfg.head:
        row = task_heads.find(family, cfg.head)
        return [f"{row.name}: {row.note}"] if row and row.note else []
    if family == "umt5" and not cfg.tie_embeddings:
        found.append(
            "transformers 5 multiplies the logits of umT5 by d_model^-0.5, as if they "
            "were tied; set model.config.tie_word_embeddings = False after "
            "from_pretrained"
        )
    if family == "nezha":
        found.append("NEZHA is in transformers up to 4.49 only")
    return found
