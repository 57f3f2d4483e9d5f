"""The parameters of a checkpoint, one by one: for models larger than the memory."""

import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5x_lite import checkpoint, integrity, lora, model, parameters
from t5x_lite import config as config_lib
from t5x_lite.arrays import Lazy, Slot


def open_params(workdir, step: int = -1, adapters: str = "merged") -> Lazy:
    """By our names, layers stacked; each is restored alone, to host memory.

    Args:
      adapters: "merged" are those of `lora.without(config.model)`, "kept" all that the
        checkpoint holds.

    Orbax holds a piece of the files twice while it reads it: 128 MiB of an array, or,
    in checkpoints of older versions, all that one device had of it, up to 2 GiB. So
    three times the array may be needed for a moment.

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
    if adapters == "merged" and cfg.model != lora.without(cfg.model):
        slots = _merged(slots, lora.scale_of(cfg.model) if cfg.model.lora_rank else 0.0)
    return Lazy(slots)


def as_asked(flags, cfg: config_lib.Config, step: int):
    """(config, arrays) of `export` with --workdir, --lora and --verify.

    Raises:
      ValueError: --lora=adapter without adapters, or with --verify.
    """
    if flags.lora != "adapter":
        model_cfg = lora.without(cfg.model)
        cfg = dataclasses.replace(cfg, model=model_cfg)
        return cfg, open_params(flags.workdir, step)
    if not cfg.model.lora_rank or flags.verify:
        raise ValueError(
            f"--lora=adapter needs a run with adapters (config.model.lora_rank="
            f"{cfg.model.lora_rank}), and --verify the whole model. Leave out one flag."
        )
    kept = open_params(flags.workdir, step, "kept").slots.items()
    return cfg, Lazy({k: s for k, s in kept if not lora.frozen(cfg.model, k)})


def _merged(slots: dict[str, Slot], scale: float) -> dict[str, Slot]:
    add = jax.jit(lora.added, static_argnums=3)

    def read(name: str) -> np.ndarray:
        pair = (slots[f"{lora.PREFIX}{name}/{k}"].read() for k in "ab")
        return np.asarray(add(slots[name].read(), *pair, scale))

    found = {}
    for name, slot in slots.items():
        if name.split("/")[0] in lora.TRAINING:
            continue
        if f"{lora.PREFIX}{name}/a" in slots:
            slot = Slot(slot.shape, slot.dtype, functools.partial(read, name))
        found[name] = slot
    return found
