"""Shapes by one dial: depth, width, aspect, parameters, compute; T5-Efficient's names.

Every function takes a base `config.Config` and returns overrides, dotted config keys
with their values ({"model.d_model": 256, ...}), which is what a cell of a study is made
of. What no knob names keeps the base's proportion: the width of a head, d_ff / d_model.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from configs import models
from t5x_lite import cli, config
from t5x_lite import model as model_lib
from t5x_lite.config import Config
from t5x_lite.studies import costs

Overrides = dict[str, Any]


def base(name: str, overrides: Overrides | None = None) -> Config:
    """The config of a file (FILE or FILE:ARG) with overrides, checked."""
    return costs.resolved(config.freeze(cli.load_config(name)), overrides or {})


def shaped(
    base: Config,
    *,
    depth: int = 0,
    width: int = 0,
    aspect: float = 0.0,
    heads: int = 0,
    head_dim: int = 0,
    ffn_ratio: float = 0.0,
    vocab_size: int = 0,
    length: int = 0,
    encoder_depth: int = 0,
    decoder_depth: int = 0,
) -> Overrides:
    """The base with other knobs, each on its own; 0 = as in the base.

    Args:
      depth: layers of every stack.
      width: d_model; with `aspect`, width = aspect * depth, to a multiple of a head.
      aspect: d_model / depth, of the deeper stack. Give two of depth, width, aspect.
      heads, head_dim: one of them, the other follows from the width; or both, and
        heads * head_dim need not be the width.
      ffn_ratio: d_ff / d_model.
      vocab_size: rows of the embedding; it must fit config.data.vocab.
      length: config.data.inputs_length in tokens.
      encoder_depth, decoder_depth: instead of `depth`.

    Raises:
      ValueError: knobs that contradict each other, or a width that heads don't divide.
    """
    m = base.model
    if depth and (encoder_depth or decoder_depth):
        raise ValueError(
            f"depth={depth} with encoder_depth={encoder_depth}, decoder_depth="
            f"{decoder_depth}: give depth, or the two, not both."
        )
    if aspect and width and (depth or encoder_depth or decoder_depth):
        raise ValueError(
            f"depth, width={width} and aspect={aspect} are all given; two of them make "
            "the third. Leave one out."
        )
    unit = heads or head_dim or m.head_dim  # the width is a multiple of it
    if aspect and width:
        depth = max(1, round(width / aspect))
    encoder = encoder_depth or depth or m.encoder_layers
    decoder = decoder_depth or depth or m.decoder_layers
    if aspect and not width:
        stacks = dict(encoder_decoder=max(encoder, decoder), encoder=encoder)
        stacks["permuted"] = encoder
        width = max(1, round(aspect * stacks.get(m.structure, decoder) / unit)) * unit
    width = width or m.d_model
    if not (aspect or heads or head_dim) and width == m.d_model:
        heads, head_dim = m.heads, m.head_dim
    if not (heads and head_dim):
        if width % unit:
            name = "heads" if heads else "head_dim"
            raise ValueError(
                f"width={width} is no multiple of {name}={unit}. Choose one, or give "
                "both heads and head_dim."
            )
        heads, head_dim = (heads, width // heads) if heads else (width // unit, unit)
    found: Overrides = {
        "model.d_model": width,
        "model.d_ff": max(1, round(width * (ffn_ratio or m.d_ff / m.d_model))),
        "model.heads": heads,
        "model.head_dim": head_dim,
        "model.encoder_layers": encoder,
        "model.decoder_layers": decoder,
    }
    if vocab_size:
        found["model.vocab_size"] = vocab_size
    if length:
        found["data.inputs_length"] = length
        # Streams of pairs put one behind the other are at most twice as long.
        found["model.max_positions"] = max(m.max_positions, 2 * length + 2)
    return found


def by_depth(base: Config, depths: Iterable[int], aspect: float) -> dict:
    """'l4' -> overrides: depth at a fixed d_model / depth."""
    return {f"l{d}": shaped(base, depth=d, aspect=aspect) for d in depths}


def by_parameters(
    base: Config,
    sizes: Iterable[float],
    *,
    aspect: float = 0.0,
    depth: int = 0,
    count: str = "non_embedding",
) -> dict:
    """'1.2M' -> overrides: the shape whose parameters come closest to each size.

    Args:
      aspect, depth: what is fixed while the width grows by whole heads: one of them.
      count: "non_embedding" or "total", see `metrics.split_parameters`.
    """
    shapes = _candidates(base, aspect, depth)

    def parameters(shape: Overrides) -> int:
        return costs.parameters(costs.resolved(base, shape))[count]

    return {short(size): _closest(shapes, parameters, size) for size in sizes}


def by_flops(
    base: Config,
    budgets: Iterable[float],
    *,
    aspect: float = 0.0,
    depth: int = 0,
    tokens_per_parameter: float = 20.0,
) -> dict:
    """'1.2e+13' -> overrides: for each training budget a shape and a number of steps.

    Tokens are `tokens_per_parameter` for each non-embedding parameter (about 20 is
    compute-optimal by Hoffmann et al. 2022).

    Args:
      budgets: floating-point operations of the whole run.
      aspect, depth: as in `by_parameters`.
    """
    shapes = _candidates(base, aspect, depth)

    def flops(shape: Overrides) -> float:
        cost = costs.of(costs.resolved(base, shape))
        tokens = tokens_per_parameter * cost.parameters["non_embedding"]
        return cost.flops_per_step / cost.tokens_per_step * tokens

    return {
        f"{budget:.1e}": at_flops(base, budget, _closest(shapes, flops, budget))
        for budget in budgets
    }


def at_flops(base: Config, budget: float, shape: Overrides) -> Overrides:
    """The shape with the steps that spend the budget; warm-up keeps its share.

    Raises:
      ValueError: the budget is less than half a step.
    """
    per_step = costs.of(costs.resolved(base, shape)).flops_per_step
    steps = round(budget / per_step)
    if not steps:
        raise ValueError(
            f"a budget of {budget:.2e} FLOPs is less than one step of {shape}, which "
            f"takes {per_step:.2e}. Raise it, or lower config.data.batch_size."
        )
    return shape | in_steps(base, steps)


def in_steps(base: Config, steps: int) -> Overrides:
    """So many steps; evaluation and checkpoint at the end, warm-up in proportion."""
    warmup = round(base.optim.warmup_steps * steps / base.steps)
    return {
        "steps": steps,
        "eval_every": steps,
        "checkpoint.every": steps,
        "optim.warmup_steps": min(max(1, warmup), steps - 1),
    }


def isoflop(base: Config, budgets: Iterable[float], shapes: dict) -> dict:
    """'1.2e+13_l4' -> overrides: every shape trained with every budget."""
    return {
        f"{budget:.1e}_{name}": at_flops(base, budget, shape)
        for budget in budgets
        for name, shape in shapes.items()
    }


def _candidates(base: Config, aspect: float, depth: int) -> Callable[[int], Overrides]:
    """k -> the k-th shape of a ladder, ever larger: by whole heads or whole layers."""
    if bool(aspect) == bool(depth):
        raise ValueError(
            f"aspect={aspect}, depth={depth}: give one of them, the other follows."
        )
    if aspect:
        return functools.cache(lambda k: shaped(base, depth=k, aspect=aspect))
    head = base.model.head_dim
    return functools.cache(lambda k: shaped(base, depth=depth, width=k * head))


def _closest(shapes, size: Callable[[Overrides], float], target: float) -> Overrides:
    """The candidate whose size is nearest to the target in ratio."""
    k = 1
    while size(shapes(2 * k)) < target:
        k *= 2
    low, high = k, 2 * k
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(shapes(middle)) < target else (low, middle)
    return min(
        (shapes(low), shapes(high)), key=lambda s: abs(math.log(size(s) / target))
    )


def short(number: float) -> str:
    """1_234_567 -> '1.23M'."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


# T5-Efficient's sizes (Tay et al. 2021, table 2): layers of either stack, ff, dm, kv,
# nh. Its cards print kv=32 for the first three; the parameters that they state, and
# the released config.json files, are those of kv=64.
EFFICIENT = {
    "tiny": (4, 1024, 256, 64, 4),
    "mini": (4, 1536, 384, 64, 8),
    "small": (6, 2048, 512, 64, 8),
    "base": (12, 3072, 768, 64, 12),
    "large": (24, 4096, 1024, 64, 16),
    "xl": (24, 16_384, 1024, 128, 32),
    "xxl": (24, 65_536, 1024, 128, 128),
}
_KNOBS = {
    "nl": ("model.encoder_layers", "model.decoder_layers"),
    "el": ("model.encoder_layers",),
    "dl": ("model.decoder_layers",),
    "ff": ("model.d_ff",),
    "dm": ("model.d_model",),
    "kv": ("model.head_dim",),
    "nh": ("model.heads",),
}


def t5_efficient(name: str) -> Overrides:
    """The T5 v1.0 shape of a name of the Scale Efficiently paper (Tay et al. 2021).

    'google/t5-efficient-small-el16-dl4' -> overrides. The knobs: nl layers of both
    stacks, el of the encoder, dl of the decoder, ff d_ff, dm d_model, kv head_dim, nh
    heads. Each replaces one number of the size, no other follows. As in the released
    models a whole thousand means 1024: ff6000 is a d_ff of 6144.

    Raises:
      ValueError: an unknown size or knob, a knob given twice.
    """
    size, *knobs = name.lower().rpartition("t5-efficient-")[2].split("-")
    if size not in EFFICIENT:
        raise ValueError(
            f"{name!r}: there is no size {size!r}. Allowed: {', '.join(EFFICIENT)}, "
            "then knobs, as in 't5-efficient-small-el16-dl4-dm256'."
        )
    layers, d_ff, d_model, head_dim, heads = EFFICIENT[size]
    found = {f"model.{k}": v for k, v in models.PRESETS["t5_small"].items()}
    found |= {
        "model.encoder_layers": layers,
        "model.decoder_layers": layers,
        "model.d_ff": d_ff,
        "model.d_model": d_model,
        "model.head_dim": head_dim,
        "model.heads": heads,
    }
    given: set[str] = set()
    for knob in knobs:
        match = re.fullmatch(r"([a-z]+)(\d+)", knob)
        if match is None or match[1] not in _KNOBS or not int(match[2]):
            shared = " Shared heads or keys and values (sh, skv) are not covered."
            raise ValueError(
                f"{name!r}: {knob!r} is no knob. Allowed: {', '.join(_KNOBS)}, each "
                f"with a number above 0.{shared if knob in ('sh', 'skv') else ''}"
            )
        keys = _KNOBS[match[1]]
        if given & set(keys):
            raise ValueError(
                f"{name!r}: {knob!r} sets {' and '.join(sorted(given & set(keys)))} "
                "again. Give each once (nl stands for el and dl)."
            )
        given |= set(keys)
        thousands, rest = divmod(int(match[2]), 1000)
        number = 1024 * thousands if not rest else int(match[2])
        found |= dict.fromkeys(keys, number)
    return found


def model_parameters(overrides: Overrides) -> int:
    """Parameters of the shape that overrides of `t5_efficient` name."""
    prefix = "model."
    named = {k.removeprefix(prefix): v for k, v in overrides.items()}
    return model_lib.parameter_count(model_lib.build(model_lib.ModelConfig(**named)))
