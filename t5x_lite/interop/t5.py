"""T5 and T5.1.1 weights: one table of names, read in both directions.

Theirs are the names of Hugging Face `T5ForConditionalGeneration`; arrays are NumPy.
"""

from collections.abc import Mapping

import numpy as np

from t5x_lite import model, parameters
from t5x_lite.config import ModelConfig

# Ours -> (theirs, input axes). A linear weight is [inputs..., outputs...] here and
# [outputs, inputs] there; 0 input axes: the same array. {i} is the layer.
ENDS = {"embedding": ("shared.weight", 0), "output/kernel": ("lm_head.weight", 0)}
RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
STACK = {
    "norm/scale": ("final_layer_norm.weight", 0),
    "relative/embedding": (RELATIVE, 0),
}
BLOCK = {
    "attention_norm/scale": ("block.{i}.layer.0.layer_norm.weight", 0),
    "attention/query": ("block.{i}.layer.0.SelfAttention.q.weight", 1),
    "attention/key": ("block.{i}.layer.0.SelfAttention.k.weight", 1),
    "attention/value": ("block.{i}.layer.0.SelfAttention.v.weight", 1),
    "attention/out": ("block.{i}.layer.0.SelfAttention.o.weight", 2),
    "cross_norm/scale": ("block.{i}.layer.1.layer_norm.weight", 0),
    "cross/query": ("block.{i}.layer.1.EncDecAttention.q.weight", 1),
    "cross/key": ("block.{i}.layer.1.EncDecAttention.k.weight", 1),
    "cross/value": ("block.{i}.layer.1.EncDecAttention.v.weight", 1),
    "cross/out": ("block.{i}.layer.1.EncDecAttention.o.weight", 2),
    "mlp_norm/scale": ("block.{i}.layer.{last}.layer_norm.weight", 0),
    "mlp/gate": ("block.{i}.layer.{last}.DenseReluDense.wi_0.weight", 1),
    "mlp/up": ("block.{i}.layer.{last}.DenseReluDense.{up}.weight", 1),
    "mlp/down": ("block.{i}.layer.{last}.DenseReluDense.wo.weight", 1),
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


def names(cfg: ModelConfig) -> dict[str, tuple[list[str], int, tuple[int, ...]]]:
    """Our name -> (their name of each layer or the only one, input axes, our shape).

    The shape is of one layer.
    """
    rows = {}
    for ours, p in parameters.declared(model.build(cfg)).items():
        shape, (stack, _, rest) = p.get_value().shape, ours.partition("/")
        if ours in ENDS:
            theirs, inputs = ENDS[ours]
            rows[ours] = [theirs], inputs, shape
        elif rest in STACK:
            theirs, inputs = STACK[rest]
            rows[ours] = [f"{stack}.{theirs}"], inputs, shape
        else:
            theirs, inputs = BLOCK[rest.removeprefix("blocks/")]
            up, last = "wi_1" if cfg.gated else "wi", 1 if stack == "encoder" else 2
            theirs = f"{stack}.{theirs}".replace("{up}", up).replace(
                "{last}", str(last)
            )
            each = [theirs.format(i=i) for i in range(shape[0])]
            rows[ours] = each, inputs, shape[1:]
    return rows


def to_hf(params: Mapping, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our nested parameters -> their whole state dict, copies included."""
    out: dict[str, np.ndarray] = {}
    for ours, (theirs, inputs, _) in names(cfg).items():
        value = params
        for part in ours.split("/"):
            value = value[part]
        each = np.asarray(value if "/blocks/" in ours else [value])
        for name, one in zip(theirs, each, strict=True):
            if inputs:
                one = one.reshape(np.prod(one.shape[:inputs]), -1).T
            out[name] = np.ascontiguousarray(one)
    return out | {copy: out["shared.weight"] for copy in _copies(cfg)}


def from_hf(weights: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their state dict -> our nested parameters.

    Raises:
      ValueError: naming all weights that are missing, not of this model, of another
        shape, or that should be copies of `shared.weight` and are not.
    """
    rows = names(cfg)
    known = {name for theirs, _, _ in rows.values() for name in theirs}
    copies = _copies(cfg)
    problems = [f"missing: {name}" for name in sorted(known - set(weights))]
    unexpected = set(weights) - known - set(copies) - {UNUSED}
    problems += [f"unexpected: {name}" for name in sorted(unexpected)]
    for theirs, inputs, shape in rows.values():
        wanted = _their_shape(shape, inputs)
        for name in theirs:
            if name in weights and np.shape(weights[name]) != wanted:
                got = np.shape(weights[name])
                problems.append(f"shape {got} instead of {wanted}: {name}")
    for name in copies:
        both = [weights[n] for n in (name, "shared.weight") if n in weights]
        if not all(np.array_equal(w, both[0]) for w in both):
            problems.append(f"not equal to shared.weight: {name}")
    if problems:
        raise ValueError(
            f"{len(problems)} weight(s) do not fit config.model ({cfg.encoder_layers}+"
            f"{cfg.decoder_layers} layers, gated={cfg.gated}, tie_embeddings="
            f"{cfg.tie_embeddings}); set config.model to the shape the weights were "
            "made with:\n  - " + "\n  - ".join(problems)
        )
    params: dict = {}
    for ours, (theirs, inputs, shape) in rows.items():
        each = [np.asarray(weights[name]) for name in theirs]
        each = [(w.T if inputs else w).reshape(shape) for w in each]
        *path, last = ours.split("/")
        at = params
        for part in path:
            at = at.setdefault(part, {})
        at[last] = np.stack(each) if "/blocks/" in ours else each[0]
    return params


def _copies(cfg: ModelConfig) -> tuple[str, ...]:
    return (*COPIES, "lm_head.weight") if cfg.tie_embeddings else COPIES


def _their_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    if not inputs:
        return shape
    into, out = np.prod(shape[:inputs]), np.prod(shape[inputs:])
    return int(out), int(into)
