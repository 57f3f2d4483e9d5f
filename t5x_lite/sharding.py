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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite import config as config_lib

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(cfg: config_lib.ShardingConfig, devices=None) -> Mesh:
    """The device mesh (data, fsdp, tensor, sequence); -1 takes what is left.

    Devices are ordered by JAX so that neighbours in the mesh are neighbours in the
    machine; `dcn_data` and `dcn_fsdp` are the parts of `data` and `fsdp` that lie
    between slices, which are joined by a slower network.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or the parts
        between slices not to the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    asked = sizes = [cfg.data, cfg.fsdp, cfg.tensor, cfg.sequence]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.sharding {dict(zip(AXES, asked, strict=True))} does not fit "
            f"{len(devices)} device(s): the sizes must multiply to {len(devices)}. Set "
            "one of them to -1 to infer it."
        )
    grid = device_grid(sizes, cfg.dcn_data, cfg.dcn_fsdp, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(sizes, dcn_data: int, dcn_fsdp: int, devices) -> np.ndarray:
    """Devices in the shape `sizes`, slices outermost along data and fsdp.

    TPU slices are always told apart. Other machines are one, unless `dcn_data` or
    `dcn_fsdp` asks for parts: then by `slice_index` (the hosts of GPUs), or by process.
    """

    def count(attribute: str) -> int:
        return len({getattr(d, attribute, 0) for d in devices})

    attribute, slices = "slice_index", 1
    if devices[0].platform == "tpu":
        slices = count(attribute)
    elif dcn_data > 1 or dcn_fsdp > 1:
        attribute = attribute if count(attribute) > 1 else "process_index"
        slices = count(attribute)
    if dcn_data == -1:
        dcn_data = max(1, slices // dcn_fsdp)
    between = (dcn_data, dcn_fsdp, 1, 1)
    if math.prod(between) == slices == 1:
        return mesh_utils.create_device_mesh(
            tuple(sizes), devices, allow_split_physical_axes=True
        )
    inside = [size // ways for size, ways in zip(sizes, between, strict=True)]
    if math.prod(between) != slices or any(
        size % ways for size, ways in zip(sizes, between, strict=True)
    ):
        raise ValueError(
            f"config.sharding.dcn_data={dcn_data}, dcn_fsdp={dcn_fsdp} with data="
            f"{sizes[0]}, fsdp={sizes[1]}: they must divide these and multiply to the "
            f"number of slices, here {slices} (by {attribute}). Set dcn_data=-1 "
            "and dcn_fsdp=1 to infer it."
        )
    return mesh_utils.create_hybrid_device_mesh(
        inside,
        between,
        devices,
        process_is_granule=attribute == "process_index",
        allow_split_physical_axes=True,
    )


def ways(axis: str, rules: Mapping, sizes: Mapping) -> int:
    """Into how many parts a logical axis is split on a mesh of these sizes."""
    return math.prod(sizes.get(mesh_axis, 1) for mesh_axis in rules.get(axis, ()))


def spec(
    name: str, axes, shape, rules: Mapping, mesh: Mesh, uneven: tuple[str, ...] = ()
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry logical axis names.

    Args:
      name: of the array, for the errors.
      axes: one logical name (or None) per dimension.
      shape: sizes, checked for divisibility.
      rules: logical name -> tuple of mesh axes.
      uneven: axis names that need not divide; the last shard is then padded.
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
        if size % parts_over and axis not in uneven:
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


# Lengths follow from the text and the noise, not from the mesh.
UNEVEN = ("length", "predicted")


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Pins an activation to the rules of its logical axes; outside `use`: a no-op."""
    active = _ACTIVE.get()
    if active is None:
        return x
    mesh, rules = active
    partition = spec("activation", axes, x.shape, rules, mesh, uneven=UNEVEN)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition))


def rounded(size: int) -> int:
    """The next batch size that divides over the mesh in use; `size` outside `use`."""
    active = _ACTIVE.get()
    if active is None:
        return size
    mesh, rules = active
    parts = ways("batch", rules, mesh.shape)
    return -(-size // parts) * parts


def batch_sharding(mesh: Mesh, rules: Mapping, size: int) -> NamedSharding:
    """Sharding of a batch's first dimension of `size` examples (global)."""
    partition = spec("config.data.batch_size", ("batch",), (size,), rules, mesh)
    return NamedSharding(mesh, partition)


def local_rows(where: NamedSharding, size: int) -> np.ndarray:
    """The rows of a global batch of `size` that this process's devices hold.

    Processes that share rows (a tensor axis may span them) each get them all; a host's
    rows need not be neighbours (a host of a TPU pod is a block of a grid).
    """
    held = where.addressable_devices_indices_map((size,)).values()
    parts = [part[0].indices(size) for part in held if part]
    return np.unique([i for part in parts for i in range(*part)])


def to_device(batch, where: NamedSharding, size: int):
    """Host batch (the `local_rows` of `size`) -> global arrays split over the batch."""
    rows = local_rows(where, size)

    def put(x):
        def part(index):
            first, last, _ = index[0].indices(size)
            at = int(np.searchsorted(rows, first))
            return x[at : at + last - first]

        return jax.make_array_from_callback((size, *x.shape[1:]), where, part)

    return jax.tree.map(put, batch)
