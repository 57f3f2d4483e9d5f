"""RoBERTa as fairseq stores it: a checkpoint .pt -> our config and parameters.

    args, weights = fairseq.read("checkpoint_best.pt")
    cfg = fairseq.config(args, weights)
    params = fairseq.from_fairseq(weights, cfg)

Its dict.txt is the vocabulary: ids 0 to 3 are <s>, <pad>, </s>, <unk>, then its lines,
then <mask>.
"""

import argparse
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, tables
from t5x_lite.interop.seq2seq import SELF
from t5x_lite.interop.tables import Row, Table, dense, norm, under

BODY = "decoder.sentence_encoder."
TABLE = Table(
    {
        "embedding": Row(f"{BODY}embed_tokens.weight"),
        "inputs/positions": Row(f"{BODY}embed_positions.weight"),
        **norm("inputs/norm", f"{BODY}emb_layer_norm"),
        **under("stack/blocks/", f"{BODY}layers.{{i}}.", SELF),
        **dense("output/transform", "decoder.lm_head.dense"),
        **norm("output/norm", "decoder.lm_head.layer_norm"),
        "output/bias": Row("decoder.lm_head.bias"),
    },
    {"decoder.lm_head.weight": f"{BODY}embed_tokens.weight"},
    unused=(r"decoder\.classification_heads\..*", r".*\.version"),
)


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(training arguments, weights by name) of a checkpoint, whose code is not run.

    Raises:
      ImportError: torch is not installed.
      ValueError: the file is damaged, holds other objects, or is no fairseq checkpoint.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(
            f"{path}: fairseq's checkpoints are read by torch: pip install torch. Or, "
            "where torch is, save the output of fairseq.read(path) as .npz."
        ) from e
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        args, tensors = vars(found["args"]), found["model"]
        return args, {name: t.float().numpy() for name, t in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as e:
        text = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{path} is no fairseq checkpoint ('args' and 'model'), or holds objects "
            f"that only unsafe code could read; none of it was run. ({text})"
        ) from e


def config(args: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> ModelConfig:
    """The config of a RoBERTa.

    Raises:
      KeyError, ValueError: if an argument or weight is missing, or is not RoBERTa's.
    """
    activation = args["activation_fn"]
    if activation not in families.GELUS:
        raise ValueError(
            f"activation_fn={activation!r} is not one of {sorted(families.GELUS)}."
        )
    weights = _first_names(weights)
    vocab_size, d_model = weights[f"{BODY}embed_tokens.weight"].shape
    heads = args["encoder_attention_heads"]
    fields: dict[str, Any] = families.MASKED | dict(
        vocab_size=vocab_size,
        max_positions=len(weights[f"{BODY}embed_positions.weight"]) - 2,
        position_offset=2,
        d_model=d_model,
        heads=heads,
        head_dim=d_model // heads,
        d_ff=args["encoder_ffn_embed_dim"],
        encoder_layers=args["encoder_layers"],
        activation=families.GELUS[activation],
        norm_eps=1e-5,
    )
    return ModelConfig(**fields)


def from_fairseq(weights: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their weights -> our nested parameters; `tables.from_theirs` on errors."""
    return tables.from_theirs(TABLE, _first_names(weights), cfg)


def _first_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Releases from 2020 on renamed two things."""
    return {
        ("decoder" + name.removeprefix("encoder")).replace(
            ".layernorm_embedding.", ".emb_layer_norm."
        )
        if name.startswith("encoder.")
        else name: array
        for name, array in weights.items()
    }
