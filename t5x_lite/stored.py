"""The parameters of a checkpoint, one by one: for models larger than the memory."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5x_lite import checkpoint, integrity, model, parameters
from t5x_lite import config as config_lib
from t5x_lite.arrays import Lazy, Slot


def open_params(workdir, step: int = -1) -> Lazy:
    """By our names, layers stacked; each is restored alone, to host memory.

    Orbax writes an array of a device in one piece, up to 2 GiB. It holds such a piece
    twice while it reads it, so up to three times the array is needed for a moment.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if `step` is none of them; while reading, if it is damaged.
    """
    cfg, step, meta = checkpoint.read_run(workdir, step)
    reader = checkpoint.Checkpoints(workdir, config_lib.CheckpointConfig(), reader=True)
    sums = meta.get(integrity.SUMS, {})
    path, reading = reader.directory / str(step) / "state", reader.read_errors

    def read(name: str, stored: jax.ShapeDtypeStruct) -> np.ndarray:
        key = ("params", *name.split("/"))
        to_host = {key: ocp.RestoreArgs(restore_type=np.ndarray)}
        with reading(step), ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=parameters.nested({key: stored}),
                    restore_args=parameters.nested(to_host),
                    partial_restore=True,
                ),
            )
            integrity.check(sums, restored)
        (array,) = jax.tree.leaves(restored)
        return array

    slots = {}
    for name, p in parameters.declared(model.build(cfg.model)).items():
        shape, dtype = p.get_value().shape, np.dtype(np.float32)
        one = functools.partial(read, name, jax.ShapeDtypeStruct(shape, dtype))
        slots[name] = Slot(shape, dtype, one)
    return Lazy(slots)
