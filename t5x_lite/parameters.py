"""Parameters: declared with shape, logical axes and init, stacked, drawn by name.

Modules only declare parameters and say how to use them; building one allocates nothing.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from t5x_lite import sharding
from t5x_lite.config import ModelConfig

ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
normal = nnx.initializers.normal


def param(shape, axes, init) -> nnx.Param:
    """Declares a float32 parameter: its shape, logical axis names and initializer."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, init=init)


def stacked(block: nnx.Module, layers: int) -> nnx.Module:
    """The same module with a leading `layers` axis on every parameter."""

    def stack(p: nnx.Param) -> nnx.Param:
        declared = p.get_metadata()
        return param(
            (layers, *p.get_value().shape),
            ("layers", *declared["axes"]),
            declared["init"],
        )

    graph, state = nnx.split(block)
    state = jax.tree.map(stack, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, state)


def declared(model: nnx.Module) -> dict[str, nnx.Param]:
    """Name ('decoder/blocks/attention/query') -> declaration, in a fixed order."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): p for path, p in sorted(flat)}


def init_params(model: nnx.Module, key: jax.Array, only: str = "") -> dict:
    """Draws all parameters, or one; its key is folded from its name alone."""

    def draw(path, p):
        own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
        return p.get_metadata()["init"](own, p.get_value().shape, jnp.float32)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    chosen = [(path, p) for path, p in flat if only in ("", "/".join(map(str, path)))]
    return nested({path: draw(path, p) for path, p in chosen})


def spread(model: nnx.Module, params: dict, mesh: Mesh, rules: Mapping) -> dict:
    """Parameters at their places in a mesh, see `sharding.spec`."""

    def put(name: str, p: nnx.Param):
        leaf: Any = params
        for part in name.split("/"):
            leaf = leaf[part]
        axes = p.get_metadata()["axes"]
        partition = sharding.spec(name, axes, leaf.shape, rules, mesh)
        return jax.device_put(leaf, NamedSharding(mesh, partition))

    flat = declared(model).items()
    return nested({tuple(name.split("/")): put(name, p) for name, p in flat})


def nested(flat: dict) -> dict:
    """{('a', 'b'): x} -> {'a': {'b': x}}"""
    return nnx.traversals.unflatten_mapping(flat)


def weight_init(cfg: ModelConfig, fan_in_std: float, *, residual: bool = False):
    """Normal with config.model.init_std, or by fan-in if that is 0.

    `residual`: the last weight of a sublayer, which GPT-2 draws smaller by the number
    of sublayers (Radford et al. 2019, section 2.3).
    """
    std = cfg.init_std or fan_in_std
    if residual and cfg.init_residual:
        std *= (2 * cfg.decoder_layers) ** -0.5
    return normal(std)


def name_of(path) -> str:
    """'encoder/blocks/attention/query' from a tree path; tuple fields are skipped."""
    return "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
