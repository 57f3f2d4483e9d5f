"""OpenNMT's Transformer as CTranslate2 names its weights -> our config and parameters.

    weights = dict(numpy.load("weights.npz"))
    cfg = opennmt.config(weights, heads=8)
    params = opennmt.from_ctranslate2(weights, cfg)

Source and target have vocabularies of their own there and one table of ids here: target
id j is ours len(source) + j, and the source's ids are never written (their bias on the
logits is -1e9). Decoding starts with the target's <s>. The last id of each is <unk>,
which their vocabulary files do not list.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite.config import ModelConfig
from t5x_lite.interop import families, tables
from t5x_lite.interop.tables import Row, Rows, Table

NEVER = -1e9


def _norm(ours: str, theirs: str) -> Rows:
    return {
        f"{ours}/scale": Row(f"{theirs}/layer_norm/gamma"),
        f"{ours}/bias": Row(f"{theirs}/layer_norm/beta"),
    }


def _linear(ours: str, theirs: str, axes: str = "", part: tuple[int, int] = (0, 1)):
    """Weights are [inputs, outputs] by now; see `_prepared`."""
    bias = "NH->(NH)" if axes.endswith("(NH)") else ""
    return {
        ours: Row(f"{theirs}/weight", axes, part),
        f"{ours}_bias": Row(f"{theirs}/bias", bias, part),
    }


INTO, OUT = "INH->I(NH)", "NHO->(NH)O"


def _block(stack: str) -> Rows:
    at = f"{stack}/layer_{{i}}"
    rows: Rows = {
        **_norm("attention_norm", f"{at}/self_attention"),
        **_linear("attention/query", f"{at}/self_attention/linear_0", INTO, (0, 3)),
        **_linear("attention/key", f"{at}/self_attention/linear_0", INTO, (1, 3)),
        **_linear("attention/value", f"{at}/self_attention/linear_0", INTO, (2, 3)),
        **_linear("attention/out", f"{at}/self_attention/linear_1", OUT),
        **_norm("cross_norm", f"{at}/attention"),
        **_linear("cross/query", f"{at}/attention/linear_0", INTO),
        **_linear("cross/key", f"{at}/attention/linear_1", INTO, (0, 2)),
        **_linear("cross/value", f"{at}/attention/linear_1", INTO, (1, 2)),
        **_linear("cross/out", f"{at}/attention/linear_2", OUT),
        **_norm("mlp_norm", f"{at}/ffn"),
        **_linear("mlp/up", f"{at}/ffn/linear_0"),
        **_linear("mlp/down", f"{at}/ffn/linear_1"),
    }
    return tables.under(f"{stack}/blocks/", "", rows)


TABLE = Table(
    {
        "embedding": Row("embedding"),
        "encoder_inputs/positions": Row("positions"),
        "decoder_inputs/positions": Row("positions"),
        **_block("encoder"),
        **_norm("encoder/norm", "encoder"),
        **_block("decoder"),
        **_norm("decoder/norm", "decoder"),
        "output/kernel": Row("output/kernel"),
        "output/bias": Row("output/bias"),
    }
)


def config(
    weights: Mapping[str, np.ndarray], *, heads: int, max_positions: int = 512
) -> ModelConfig:
    """The config that the shapes imply; they do not say how many heads there are.

    Raises:
      KeyError: if they are not of such a model.
    """
    source, target = (
        weights[f"{stack}/embeddings/weight"].shape for stack in ("encoder", "decoder")
    )
    D = source[1]
    fields: dict[str, Any] = families.CLASSIC | dict(
        structure="encoder_decoder",
        vocab_size=source[0] + target[0],
        d_model=D,
        heads=heads,
        head_dim=D // heads,
        d_ff=len(weights["encoder/layer_0/ffn/linear_0/bias"]),
        encoder_layers=_depth(weights, "encoder"),
        decoder_layers=_depth(weights, "decoder"),
        activation="relu",
        norm_order="pre",
        norm_eps=1e-5,
        scale_embedding=True,
        tie_embeddings=False,
        output_bias=True,
        max_positions=max_positions,
    )
    return ModelConfig(**fields)


def _depth(weights: Mapping[str, np.ndarray], stack: str) -> int:
    names = [name.split("/") for name in weights if name.startswith(f"{stack}/layer_")]
    return 1 + max(int(n[1].split("_")[1]) for n in names if n[1] != "layer_norm")


def from_ctranslate2(weights: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their weights -> our nested parameters; `tables.from_theirs` on errors."""
    return tables.from_theirs(TABLE, _prepared(weights, cfg), cfg)


def _prepared(
    weights: Mapping[str, np.ndarray], cfg: ModelConfig
) -> dict[str, np.ndarray]:
    rest = dict(weights)
    source, target = (
        rest.pop(f"{stack}/embeddings/weight") for stack in ("encoder", "decoder")
    )
    kernel, bias = (rest.pop(f"decoder/projection/{n}") for n in ("weight", "bias"))
    found = {
        name: array.T if array.ndim == 2 else array for name, array in rest.items()
    }
    found["embedding"] = np.concatenate([source, target])
    found["positions"] = sinusoids(cfg.max_positions, cfg.d_model)
    found["output/kernel"] = np.concatenate([np.zeros_like(source), kernel])
    unwritten = np.full(len(source), NEVER, bias.dtype)
    found["output/bias"] = np.concatenate([unwritten, bias])
    return found


def sinusoids(rows: int, width: int) -> np.ndarray:
    """Positions from 1, rates down to 1e-4 itself: float32 [rows, width].

    tensor2tensor's, all sines and then all cosines; Vaswani et al. 2017 divide by one
    rate more.
    """
    rates = np.exp(-np.log(1e4) * np.arange(width // 2) / (width // 2 - 1))
    angles = np.arange(1, rows + 1)[:, None] * rates[None]
    both = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    return both.astype(np.float32)
