"""LoRA (Hu et al. 2021): a frozen weight W plus alpha / r * A B, of rank r.

Every weight whose name config.model.lora_targets matches gets `lora/NAME/a` and `/b`,
also those of stacked layers, [L, in, r] and [L, r, out]. B starts as zero, so a new
adapter changes nothing. What neither is an adapter nor matches
config.model.lora_trained is frozen: no gradient, no optimizer state.

The product is added to the weight, once a step, rather than to each activation: every
structure and layer is served by `model.bind`, and a merged model is the same function.
The weights' gradients are made for a moment, so that a step saves the memory of the
optimizer and its update, not of the backward pass.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import parameters
from t5x_lite.model_config import ModelConfig
from t5x_lite.mup import Rates
from t5x_lite.parameters import normal, zeros

PREFIX = "lora/"
TRAINING = ("lora", "distill")  # parts of a model that only training needs


class Group(nnx.Module):
    """Nothing but named parts."""


def matrix(p: nnx.Param) -> tuple[tuple[int, ...], tuple]:
    """(shape, axes) of a weight as [in, out], with `layers` before it if stacked.

    Heads and head dim become one axis, as in `optim.view`.
    """
    shape, axes = list(p.get_value().shape), list(p.get_metadata()["axes"])
    for i in reversed(range(len(axes) - 1)):
        if (axes[i], axes[i + 1]) == ("heads", "kv"):
            shape[i : i + 2], axes[i : i + 2] = [shape[i] * shape[i + 1]], ["heads"]
    return tuple(shape), tuple(axes)


def adapted(net: nnx.Module, cfg: ModelConfig) -> nnx.Module:
    """The model with adapters beside its weights.

    Raises:
      ValueError: the regex matches no weight, or something that is no matrix.
    """
    try:
        pattern = re.compile(cfg.lora_targets)
        re.compile(cfg.lora_trained)
    except re.error as e:
        raise ValueError(
            f"config.model.lora_targets={cfg.lora_targets!r}, lora_trained="
            f"{cfg.lora_trained!r}: no regex ({e})."
        ) from e
    r, whole = cfg.lora_rank, parameters.declared(net)
    found = {name: p for name, p in whole.items() if pattern.fullmatch(name)}
    if not found:
        raise ValueError(
            f"config.model.lora_targets={cfg.lora_targets!r} matches all of no "
            f"parameter's name. There are {', '.join(whole)}."
        )
    net.lora = Group()  # pyright: ignore
    for name, p in found.items():
        shape, axes = matrix(p)
        lead = 1 if axes[0] == "layers" else 0
        if len(shape) != lead + 2:
            raise ValueError(
                f"config.model.lora_targets={cfg.lora_targets!r} matches {name!r} of "
                f"shape {p.get_value().shape}, which is no matrix. Leave it out."
            )
        *layers, inputs, outputs = shape
        at: Any = net.lora  # pyright: ignore
        for part in name.split("/"):
            if not hasattr(at, part):
                setattr(at, part, Group())
            at = getattr(at, part)
        of_a, of_b = (*layers, inputs, r), (*layers, r, outputs)
        at.a = _param(of_a, (*axes[: lead + 1], None), normal(inputs**-0.5))
        at.b = _param(of_b, (*axes[:lead], None, axes[-1]), zeros)
    return net


def _param(shape, axes, init) -> nnx.Param:
    """Of the same rate at every width: muP has no rule for adapters."""
    what = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(what, axes=axes, init=init, rates=Rates(1.0, 1.0))


def names(params: dict) -> list[str]:
    """Of the weights that have an adapter in a nested dict of parameters."""
    found = []

    def walk(tree: dict, path: tuple):
        if "a" in tree and not isinstance(tree["a"], dict):
            found.append("/".join(path))
            return
        for key, below in tree.items():
            walk(below, (*path, key))

    walk(params.get("lora", {}), ())
    return found


def added(weight, a, b, scale: float):
    """The weight with scale * A B added, computed in float32, in its own dtype."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    delta = (scale * jnp.matmul(a, b)).reshape(weight.shape)
    return (weight + delta).astype(weight.dtype)


def merged(params: dict, net: nnx.Module, add=None) -> dict:
    """The parameters with every adapter added; the same object without adapters.

    The adapters stay beside, of no use any more.
    """
    if "lora" not in params:
        return params
    scale = scale_of(net.cfg)  # pyright: ignore
    for name in names(params):
        *path, last = name.split("/")
        a, b = (_at(params["lora"], (*path, last, k)) for k in "ab")
        weight = _at(params, (*path, last))
        new = (add or added)(weight, a, b, scale)
        params = _with(params, (*path, last), new)
    return params


def plain(params: dict, net: nnx.Module) -> dict:
    """The parameters of `without(cfg)`: adapters merged, weight by weight."""
    whole = merged(params, net, jax.jit(added, static_argnums=3))
    return {name: below for name, below in whole.items() if name not in TRAINING}


def scale_of(cfg: ModelConfig) -> float:
    """alpha / r"""
    return cfg.lora_alpha / cfg.lora_rank


def without(cfg: ModelConfig) -> ModelConfig:
    """The config of a model that is used: adapters merged, no teacher's projection."""
    return dataclasses.replace(cfg, lora_rank=0, distill_width=0)


def frozen(cfg: ModelConfig, name: str) -> bool:
    """Is a parameter left alone because adapters are trained instead?"""
    adapts = cfg.lora_rank and not name.startswith(PREFIX)
    return bool(adapts and not re.fullmatch(cfg.lora_trained, name))


def _at(tree: dict, path: tuple):
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: dict, path: tuple, leaf) -> dict:
    key, *rest = path
    new = leaf if not rest else _with(tree[key], tuple(rest), leaf)
    return tree | {key: new}
