"""How a model that was trained before is trained on: what moves, when, how much.

Layer-wise learning rates, gradual unfreezing and the pull to the start are parts of the
optimizer's chain (`optim.make`); what is frozen has no gradient at all (`step`).
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_lite import lora
from t5x_lite.config import Config
from t5x_lite.model_config import ModelConfig
from t5x_lite.parameters import name_of


def unused(cfg: Config, name: str) -> bool:
    """Is it the language model's output layer, which a head alone does not train?"""
    alone = cfg.model.head and not cfg.loss.lm_weight
    return bool(alone and name.startswith("output/"))


def frozen(cfg: Config, rate: dict[str, float]) -> set[str]:
    """Names of the parameters that never move.

    Args:
      rate: name -> multiplier of config.optim.lr_rules.
    """
    return {
        name
        for name, factor in rate.items()
        if factor == 0.0 or lora.frozen(cfg.model, name) or unused(cfg, name)
    }


def layer_factors(cfg: Config, params: dict[str, nnx.Param]) -> dict:
    """Name -> factor of the learning rate, [L, 1, ...] for stacked layers.

    config.optim.layer_decay ** (layers above), with the heads above all of them, as in
    discriminative fine-tuning (Howard & Ruder 2018, section 3.2: 1 / 2.6) and ELECTRA
    (Clark et al. 2020, appendix A: 0.8 to 0.9; its code has one power more below the
    head). An encoder lies below its decoder, embeddings below their stack.
    """
    decay = cfg.optim.layer_decay
    if decay == 1.0:
        return dict.fromkeys(params, 1.0)

    def factor(name: str, p: nnx.Param):
        depth = depths(cfg.model, name)
        if isinstance(depth, int):
            return decay ** (top(cfg.model) - depth)
        powers_L = decay ** (top(cfg.model) - np.asarray(depth, np.float32))
        ones = (1,) * (p.get_value().ndim - 1)
        return powers_L.astype(np.float32).reshape(-1, *ones)

    return {name: factor(name, p) for name, p in params.items()}


def top(cfg: ModelConfig) -> int:
    """Depth of what is above all layers."""
    both = cfg.structure == "encoder_decoder"
    return 1 + (cfg.encoder_layers + cfg.decoder_layers if both else cfg.depth)


def depths(cfg: ModelConfig, name: str) -> int | range:
    """Layers below a parameter, from 0; a range for one of stacked layers."""
    name = re.sub(r"^lora/(.*)/[ab]$", r"\1", name)
    stack, _, rest = name.partition("/")
    if cfg.structure == "encoder_decoder":
        below = {"encoder": 0, "decoder": cfg.encoder_layers}
        count = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
    else:
        below, count = {"stack": 0}, {"stack": cfg.depth}
    if stack in below:
        if rest.startswith("blocks/"):
            return range(below[stack] + 1, below[stack] + count[stack] + 1)
        above = rest.startswith("norm/")
        return below[stack] + (count[stack] if above else 0)
    if stack == "decoder_inputs":
        return below["decoder"]
    if stack in ("embedding", "inputs", "encoder_inputs"):
        return 0
    return top(cfg)


def starts(cfg: Config, names) -> dict[str, int]:
    """Name -> the step that it trains from (config.optim.unfreeze).

    Raises:
      ValueError: for a bad row, or one that is the first match of no parameter.
    """
    rows, found, used = [], dict.fromkeys(names, 0), set()
    for row in cfg.optim.unfreeze:
        try:
            pattern, step = row
            rows.append((re.compile(pattern), step))
            if type(step) is not int or step < 0:
                raise TypeError(f"step {step!r} is no whole number from 0")
        except (TypeError, ValueError, re.error) as e:
            raise ValueError(
                f"config.optim.unfreeze: {row!r} is no (regex, step) row ({e}). Write "
                "e.g. (('head/.*', 0), ('stack/.*', 200), ('.*', 400))."
            ) from e
    for name in found:
        for i, (pattern, step) in enumerate(rows):
            if pattern.fullmatch(name):
                found[name] = step
                used.add(i)
                break
    for i, (pattern, _) in enumerate(rows):
        if i not in used:
            raise ValueError(
                f"config.optim.unfreeze: {pattern.pattern!r} is the first match of no "
                f"parameter. There are {', '.join(found)}."
            )
    return found


class Counted(NamedTuple):
    """Updates done, and the state of what is inside."""

    count: jax.Array
    inner: optax.OptState


def gate(start: dict[str, int]) -> optax.GradientTransformation:
    """No gradient before a parameter's step: it has no share in the norm either."""

    def init(params):
        del params
        return Counted(jnp.zeros((), jnp.int32), optax.EmptyState())

    def update(updates, state, params=None):
        del params

        def one(path, u):
            step = start[name_of(path)]
            return u if not step else jnp.where(state.count >= step, u, 0.0)

        updates = jax.tree.map_with_path(one, updates)
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def unfreezing(tx: optax.GradientTransformation, start: dict[str, int]):
    """`tx`, which groups of parameters enter at their own steps (Howard & Ruder 2018).

    Before that neither they nor their moments move; then it begins for them as new,
    with Adam's correction of the first steps. The rate's schedule does not begin again.
    """

    def labels(tree):
        return jax.tree.map_with_path(
            lambda path, _: f"from {start[name_of(path)]}", tree
        )

    steps = sorted(set(start.values()))
    return optax.partition({f"from {s}": held(tx, s) for s in steps}, labels)


def held(tx: optax.GradientTransformation, step: int):
    """`tx` from that update on; before, no update and the fresh state."""
    if not step:
        return tx
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return Counted(jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates, state, params=None, **extra):
        new, inner = tx.update(updates, state.inner, params, **extra)
        on = state.count >= step
        new = jax.tree.map(lambda u: jnp.where(on, u, 0.0), new)
        inner = jax.tree.map(lambda a, b: jnp.where(on, a, b), inner, state.inner)
        return new, Counted(state.count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def decayed(weight_decay: float, multiplier: dict[str, float], l2_start: float):
    """Adds decay * multiplier * parameter and l2_start * (parameter - its start).

    The second is L2-SP (Li et al. 2018), decoupled from the gradient as weight decay
    is; `update` is given `start`: name -> array, of the parameters that have one.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, start=None, **_):
        def add(path, u, p):
            name = name_of(path)
            if weight_decay:
                u = u + weight_decay * multiplier[name] * p
            if l2_start and start is not None and name in start:
                u = u + l2_start * (p - start[name])
            return u

        return jax.tree.map_with_path(add, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
