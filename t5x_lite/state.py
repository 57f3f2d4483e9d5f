"""The train state: a nested dict {"params", "opt", "step"} and its shardings."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from t5x_lite import optim, parameters, sharding


def init(model: nnx.Module, tx: optax.GradientTransformation, key) -> dict:
    """A fresh state; jit it with `out_shardings` so no host ever holds all of it."""
    params = parameters.init_params(model, key)
    return {"params": params, "opt": tx.init(params), "step": jnp.zeros((), jnp.int32)}


def abstract(model, tx, mesh: Mesh, rules: Mapping, offload: bool = False) -> dict:
    """The state as ShapeDtypeStructs with shardings; needs no device memory.

    Args:
      offload: the optimizer's arrays lie in the host's memory between steps.

    Raises:
      ValueError: `offload` on a backend that cannot.
    """
    if offload:
        check_offload(mesh)
    shapes = jax.eval_shape(lambda: init(model, tx, jax.random.key(0)))
    params = parameters.declared(model)

    def place(path, leaf):
        axes = optim.state_axes(path[1:], leaf, params)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = sharding.spec(name, axes, leaf.shape, rules, mesh)
        where = NamedSharding(mesh, spec)
        if offload and path[0].key == "opt" and leaf.ndim:
            where = where.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map_with_path(place, shapes)


HOST = "pinned_host"


def check_offload(mesh: Mesh):
    """Refuses config.optim.offload where devices have no such memory."""
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or HOST not in kinds:
        raise ValueError(
            f"config.optim.offload=True: {device.device_kind} has no {HOST!r} memory "
            f"apart from its own (it has {sorted(kinds)}). Set it to False, or shard "
            "the state with config.sharding.fsdp."
        )


def on_device(opt, abstract_opt):
    """Brings offloaded arrays to the device, within jit; others are left alone."""

    def bring(x, leaf):
        where = leaf.sharding
        if where.memory_kind != HOST:
            return x
        return jax.device_put(x, where.with_memory_kind("device"))

    return jax.tree.map(bring, opt, abstract_opt)


def shardings(abstract_state):
    """The NamedSharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state)


def create(model, tx, abstract_state, seed: int) -> dict:
    """Draws the state straight into its shards."""
    # The key is made inside, with the 32 bits that jax takes of a seed: each operation
    # outside is a program of its own to compile.
    draw = jax.jit(
        lambda bits: init(model, tx, jax.random.key(bits)),
        out_shardings=shardings(abstract_state),
    )
    return draw(np.uint32(seed % 2**32))


def size_bytes(abstract_state) -> int:
    """Bytes of the whole state, over all devices."""
    leaves = jax.tree.leaves(abstract_state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
