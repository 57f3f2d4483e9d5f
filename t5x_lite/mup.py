"""muP: a learning rate tuned on a small model that fits wide and deep ones too.

Switched on by config.model.parametrisation = "mup" and `base_d_model`, the width that
the rates were tuned at; a model of the base's shape is the standard one, bit for bit.

How many times wider than the base's is the input of a weight (m_in), and its output
(m_out)? Yang et al. 2022 (Tensor Programs V), table 8:

| weight                                | init's std | Adam       | Adafactor  |
| ------------------------------------- | ---------- | ---------- | ---------- |
| m_in = 1: embeddings, biases, norms   | 1          | 1          | 1          |
| m_in and m_out other than 1           | m_in^-1/2  | m_in^-1    | m_in^-1/2  |
| m_out = 1: classes, narrow embeddings | m_in^-1    | m_in^-1    | 1          |
| the vocabulary's, logits times m_in^-1| 1          | 1          | 1          |

are the factors beside the base's init and rate. The third row is that of table 3, equal
to the fourth, which tied embeddings need. Attention scores are divided by H instead of
H^1/2 (section 4 there): times (base's H / H)^1/2, at the base as they were.

Adafactor multiplies the rate by the parameter's own RMS (Shazeer & Stern 2018, section
8), which the init has already made smaller by the column "init's std"; what is left of
Adam's factor is their ratio. An update has RMS 1 before that with either (Everett et
al. 2024 derive all three optimizers' exponents so). It holds while the RMS is above
Adafactor's floor of 1e-3, also for zeros, whose floor does not depend on width.

Gradients shrink as 1/m, so Adam's epsilon does. Weight decay times rate stays.

Depth (`base_layers`), for norms before the sublayer: each sublayer's output is
multiplied by (base_layers / L)^1/2, and so are the rates of its parameters (Yang et al.
2023, Tensor Programs VI, for Adam; the branches also Bordelon et al. 2023). For
Adafactor the same, as the parameter's RMS does not depend on depth. Activations keep
their size so, but the best rate is only proven to stay for sublayers of one weight
matrix; for transformers that paper finds that no such rule is ideal.
"""

import math
from typing import NamedTuple

import jax
from flax import nnx

from t5x_lite.model_config import ModelConfig, base_config
from t5x_lite.parameters import declared, nested


class Rates(NamedTuple):
    """Factors of the learning rate, by config.optim.name."""

    adamw: float
    adafactor: float


def parametrised(model: nnx.Module, base: nnx.Module, cfg: ModelConfig) -> nnx.Module:
    """The model with muP's initializers, and rates for `rates`.

    Args:
      base: of `base_config(cfg)`; the same parameters, other shapes.

    Raises:
      ValueError: the base has other parameters.
    """
    ours, theirs = declared(model), declared(base)
    if ours.keys() != theirs.keys():
        # A projection between equal widths is left out.
        raise ValueError(
            f"config.model.parametrisation='mup': base_d_model={cfg.base_d_model} "
            f"makes a model with other parameters: {sorted(ours.keys() ^ theirs)}. "
            f"Choose it such that d_embed={cfg.d_embed} equals d_model in both or in "
            "neither."
        )

    def of_base(name: str, p: nnx.Param) -> nnx.Param:
        std, adam = factors(name, p, theirs[name])
        branch = 1.0
        if "/blocks/" in name or "/relative/" in name:
            branch = branch_scale(cfg, depth(name, cfg))
        return nnx.Param(
            jax.ShapeDtypeStruct(p.get_value().shape, p.get_value().dtype),
            axes=p.get_metadata()["axes"],
            init=times(theirs[name].get_metadata()["init"], std),
            rates=Rates(adam * branch, adam / std * branch),
        )

    graph, _ = nnx.split(model)
    flat = {tuple(name.split("/")): of_base(name, p) for name, p in ours.items()}
    return nnx.merge(graph, nested(flat))


def factors(name: str, p: nnx.Param, base: nnx.Param) -> tuple[float, float]:
    """(of the init's std, of Adam's rate) of a parameter, by the module's table."""
    wide, narrow = fans(p), fans(base)
    m_in, m_out = (a / b for a, b in zip(wide, narrow, strict=True))
    if m_in == 1.0 or name == "output/kernel":
        return 1.0, 1.0
    return (m_in**-0.5 if m_out != 1.0 else 1 / m_in), 1 / m_in


def fans(p: nnx.Param) -> tuple[int, int]:
    """(numbers that a weight sums over, numbers that it makes) in one layer."""
    shape, axes = p.get_value().shape, p.get_metadata()["axes"]
    if axes[0] == "layers":
        shape, axes = shape[1:], axes[1:]
    inputs = 2 if axes[:2] == ("heads", "kv") else 1
    if len(axes) == inputs:  # a bias or a scale
        return 1, math.prod(shape)
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def times(init, factor: float):
    """An initializer, multiplied."""
    if factor == 1.0:
        return init
    return lambda key, shape, dtype: init(key, shape, dtype) * factor


def depth(name: str, cfg: ModelConfig) -> int:
    """Layers of the stack that a parameter belongs to."""
    of = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
    return of.get(name.split("/")[0], cfg.depth)


def rates(params: dict[str, nnx.Param], optimizer: str) -> dict[str, float]:
    """Parameter name -> factor of the learning rate of a muP model.

    Args:
      params: `parameters.declared(model)`.
      optimizer: config.optim.name.
    """
    of = {name: p.get_metadata()["rates"] for name, p in params.items()}
    return {name: getattr(each, optimizer) for name, each in of.items()}


def attention_scale(cfg: ModelConfig) -> float:
    """What scores are multiplied by: H^-1/2 (T5: 1), under muP falling as 1/H."""
    base = base_config(cfg)
    usual = base.head_dim**-0.5 if cfg.scale_attention else 1.0
    return usual * (base.head_dim / cfg.head_dim)


def logits_scale(cfg: ModelConfig) -> float:
    """What the logits over the vocabulary are multiplied by."""
    base = base_config(cfg)
    tied = cfg.tie_embeddings and cfg.rescale_logits
    usual = base.d_model**-0.5 if tied else 1.0
    return usual * ((base.d_embed or base.d_model) / (cfg.d_embed or cfg.d_model))


def branch_scale(cfg: ModelConfig, depth: int) -> float:
    """What each sublayer's output is multiplied by, in a stack of `depth` layers."""
    scales = cfg.parametrisation == "mup" and cfg.base_layers
    return (cfg.base_layers / depth) ** 0.5 if scales else 1.0


def gradient_scale(cfg: ModelConfig) -> float:
    """How the gradients' numbers compare with the base's."""
    return base_config(cfg).d_model / cfg.d_model
