"""Sharding is a table of names: logical axis -> mesh axes, resolved here and only here.

Nothing falls back to replication silently: an unknown name, one mesh axis used twice in
one array and a dimension that does not divide are errors that name the array.
"""

import contextlib
import contextvars
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite import config as config_lib

AXES = ("data", "fsdp", "tensor")


def make_mesh(cfg: config_lib.ShardingConfig, devices=None) -> Mesh:
    """The device mesh (data, fsdp, tensor); a size of -1 takes what is left.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.sharding {dict(zip(AXES, asked, strict=True))} does not fit "
            f"{len(devices)} device(s): the sizes must multiply to {len(devices)}. Set "
            "one of them to -1 to infer it."
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def spec(name: str, axes, shape, rules: Mapping, mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry logical axis names.

    Args:
      name: of the array, for the errors.
      axes: one logical name (or None) per dimension.
      shape: sizes, checked for divisibility.
      rules: logical name -> tuple of mesh axes.
    """
    parts, taken = [], {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise KeyError(
                f"{name}: axis name {axis!r} is not in config.sharding.rules"
                f"{config_lib.nearest(axis, rules)} Known: {sorted(rules)}. "
                "Add a rule for it, () for no sharding."
            )
        mesh_axes = tuple(rules[axis]) if axis is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis not in mesh.shape:
                raise ValueError(
                    f"config.sharding.rules.{axis}={mesh_axes} names the mesh axis "
                    f"{mesh_axis!r}, but the mesh has {list(mesh.shape)}."
                )
            if mesh_axis in taken:
                raise ValueError(
                    f"{name} with axes {tuple(axes)} would use the mesh axis "
                    f"{mesh_axis!r} twice, for {taken[mesh_axis]!r} and {axis!r}. "
                    "Change one of their rows in config.sharding.rules."
                )
            taken[mesh_axis] = axis
        parts_over = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts_over:
            raise ValueError(
                f"{name}: dimension {axis!r} of size {size} does not divide over mesh "
                f"axes {mesh_axes} of size {parts_over}. Change the size, the mesh "
                f"(config.sharding.*) or config.sharding.rules.{axis}."
            )
        parts.append(mesh_axes if len(mesh_axes) != 1 else mesh_axes[0])
    return PartitionSpec(*(p if p != () else None for p in parts))


_ACTIVE: contextvars.ContextVar = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Mapping):
    """Within: `constrain` applies these rules, and the mesh is jax's current one."""
    token = _ACTIVE.set((mesh, rules))
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def unconstrained():
    """Within: `constrain` is a no-op, for batches too small for the mesh."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def on_cpu() -> bool:
    """Is the code being traced for a CPU? (The mesh may be of other devices.)"""
    active = _ACTIVE.get()
    if active is None:
        return jax.default_backend() == "cpu"
    return active[0].devices.flat[0].platform == "cpu"


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Pins an activation to the rules of its logical axes; outside `use`: a no-op."""
    active = _ACTIVE.get()
    if active is None:
        return x
    mesh, rules = active
    partition = spec("activation", axes, x.shape, rules, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition))


def batch_sharding(mesh: Mesh, rules: Mapping, size: int) -> NamedSharding:
    """Sharding of a batch's first dimension of `size` examples (global)."""
    partition = spec("config.data.batch_size", ("batch",), (size,), rules, mesh)
    return NamedSharding(mesh, partition)


def to_device(batch, sharding: NamedSharding):
    """Host batch (this process's rows) -> global arrays split over the batch axis."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
