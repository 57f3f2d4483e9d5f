"""Checkpoints through Orbax: the state, and what is needed to go on exactly.

`workdir/checkpoints/STEP/` holds `state` (parameters, optimizer, step) and `meta` (the
config, the data's fingerprint and position). Orbax writes asynchronously into a
temporary directory and renames it when complete, so a kill at any instant leaves the
checkpoints before it whole.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from t5x_lite import config as config_lib
from t5x_lite import model, parameters
from t5x_lite.vocab import Vocab

METRIC = "heldout_loss"
# What Orbax and TensorStore raise for files they cannot write or read.
_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class Checkpoints:
    """Saves and restores the train state of one workdir.

    Keeps the newest `keep_last`, every `keep_every`-th step and the `keep_best` with
    the lowest held-out loss. A `reader` leaves half-written checkpoints alone: a
    training run in the same workdir may just be writing one.
    """

    def __init__(
        self, workdir, cfg: config_lib.CheckpointConfig, *, reader: bool = False
    ):
        # What the user of this process chooses a step with.
        self.flag = "--step" if reader else "--config.checkpoint.restore_step"
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        keep: list[Any] = [policies.LatestN(cfg.keep_last)]
        if cfg.keep_every:
            keep.append(policies.EveryNSteps(cfg.keep_every))
        if cfg.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    reverse=True,
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Only with these does Orbax write metrics, which BestN needs after a
                # restart.
                best_fn=lambda metrics: metrics[METRIC],
                best_mode="min",
                cleanup_tmp_directories=not reader,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending; stray folders are not."""
        found = self._manager.all_steps()
        return sorted(s for s in found if (self.directory / str(s) / "state").is_dir())

    def save(self, step: int, state, meta: dict, heldout_loss: float | None = None):
        """Starts writing; waits first if the previous write has not ended.

        Raises:
          OSError: if this or the previous write failed (a full disk, say). Older
            checkpoints are not touched by a failed write.
        """
        metrics = None if heldout_loss is None else {METRIC: heldout_loss}
        with self._write_errors():
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                metrics=metrics,
                force=True,
            )
            if not written:
                raise RuntimeError(f"step {step} was not saved")

    def set_aside_after(self, step: int) -> list[int]:
        """Moves checkpoints after `step` to `workdir/abandoned`; returns their steps.

        Going on from an older checkpoint starts another branch: the later ones would
        stand in its way, and a restart would take them for its own.
        """
        later = [s for s in self.steps() if s > step]
        aside = self.directory.parent / "abandoned"
        for s in later:
            aside.mkdir(exist_ok=True)
            free = next(
                path
                for n in itertools.count()
                if not (path := aside / f"{s}-{n}").exists()
            )
            (self.directory / str(s)).rename(free)
        if later:
            self.reload()
        return later

    def reload(self):
        """Looks again at what is there, after another process changed it."""
        self._manager.reload()

    def wait(self):
        """Blocks until what was saved is on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self):
        """Waits as `wait` does, and ends the writers."""
        with self._write_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:  # a process is lost, not the files
            raise
        except _ERRORS as e:
            have = sorted(
                int(p.name) for p in self.directory.glob("*") if p.name.isdigit()
            )
            raise OSError(
                f"writing a checkpoint below {self.directory} failed: "
                f"{_first_line(e)}. Complete checkpoints there: {have or 'none'}. Free "
                "some space or fix the directory, then run the same command: it "
                "resumes."
            ) from e

    def choose(self, asked: int) -> int | None:
        """The step to restore: `asked`, the latest for -1, None if there is none."""
        have = self.steps()
        if asked == -1:
            return have[-1] if have else None
        if asked not in have:
            raise ValueError(
                f"{self.flag}={asked} is not in {self.directory}: "
                f"it has {have or 'no checkpoints'}. Use one of them, or -1."
            )
        return asked

    def meta(self, step: int) -> dict:
        """What `save` was given as meta."""
        with self.read_errors(step):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
        return restored["meta"]

    def restore(self, step: int, abstract_state):
        """The state at `step`, placed as `abstract_state` says (any mesh)."""
        with self.read_errors(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
            )
        return restored["state"]

    @contextlib.contextmanager
    def read_errors(self, step: int):
        """Whatever fails inside is a ValueError that names the step and a way out."""
        try:
            yield
        except _ERRORS as e:
            if "RESOURCE_EXHAUSTED" in str(e):  # memory, not the files
                raise
            others = [s for s in self.steps() if s != step]
            way_out = (
                f"Another one: {self.flag}={others[-1]}."
                if others
                else "No other one is left; start in a new --workdir."
            )
            raise ValueError(
                f"checkpoint {self.directory / str(step)} cannot be read; it is "
                f"damaged or not ours: {_first_line(e)} {way_out}"
            ) from e


def _first_line(e: BaseException) -> str:
    lines = f"{type(e).__name__}: {e}".strip().splitlines()
    return lines[0][:300]


def make_meta(cfg: config_lib.Config, step: int, data: dict) -> dict:
    """Meta of a checkpoint.

    Args:
      data: what the order of the data depends on, e.g. the store's fingerprint.
    """
    return {"step": step, "config": config_lib.to_json(cfg), "data": data}


# What the stored arrays depend on, and what the sequence of batches depends on.
_STATE_KEYS = ("model", "optim.name", "optim.lr_rules")
_FREE_MODEL_KEYS = ("attention", "dropout", "dtype", "remat", "scan", "unpadded")
_ORDER_KEYS = (
    *("seed", "objective", "data.batch_size", "data.inputs_length"),
    *("data.train_inputs", "data.static_noise"),
)


def check_compatible(meta: dict, cfg: config_lib.Config, data: dict):
    """Refuses a checkpoint that this config cannot continue exactly.

    Raises:
      ValueError: naming every key that differs with both values.
    """
    # A key that is newer than the checkpoint had its default.
    frozen = config_lib.freeze(meta["config"])
    then, now = (json.loads(json.dumps(config_lib.to_json(c))) for c in (frozen, cfg))

    def differing(keys, a, b):
        for key in keys:
            left, right = _at(a, key), _at(b, key)
            if isinstance(left, dict) and isinstance(right, dict):
                for k in sorted({*left, *right}):
                    if left.get(k) != right.get(k):
                        yield f"config.{key}.{k}", left.get(k), right.get(k)
            elif left != right:
                yield f"config.{key}", left, right

    free = {f"config.model.{k}" for k in _FREE_MODEL_KEYS}
    # Nothing was trained yet in a workdir that was converted.
    trained = not meta.get("params_only")
    keys = _STATE_KEYS if trained else ("model",)
    found = [d for d in differing(keys, then, now) if d[0] not in free]
    way_out = "Restore these values, or train in a new --workdir."
    before = meta["data"]["vocab"] if "vocab" in meta["data"] else ""
    if not trained and before and before != data["vocab"]:
        found.append(("data vocab", before, data["vocab"]))
    if trained and not found and not cfg.checkpoint.accept_changes:
        found = [*differing(_ORDER_KEYS, then, now)]
        found += [
            (f"data {k}", meta["data"].get(k), v)
            for k, v in data.items()
            if meta["data"].get(k) != v
        ]
        way_out += (
            " To go on from here on other data all the same: "
            "--config.checkpoint.accept_changes=True."
        )
    if found:
        rows = [f"{k}: {a!r} in the checkpoint, {b!r} now" for k, a, b in found]
        raise ValueError(
            f"the checkpoint of step {meta['step']} was made with another config:\n  - "
            + "\n  - ".join(rows)
            + f"\n{way_out}"
        )


def check_vocab(meta: dict, words: Vocab):
    """Refuses a vocabulary other than the one a checkpoint was trained with."""
    trained_with = meta["data"]["vocab"]
    if not trained_with:
        raise ValueError(
            "the workdir was converted without a vocabulary: none was beside the "
            "weights, or it cannot be read here. Convert it again with --vocab=FILE."
        )
    if trained_with != words.fingerprint:
        raise ValueError(
            f"config.data.vocab={words.spec!r} is not the vocabulary of the run: its "
            f"fingerprint is {words.fingerprint}, the checkpoint of step "
            f"{meta['step']} was trained with {trained_with}. Put the original file "
            "back."
        )


def _at(tree: dict, path: str):
    for part in path.split("."):
        tree = tree[part]
    return tree


def load_run(workdir, step: int = -1):
    """A finished or running run for inference: (config, model, params, step, meta).

    As `read_run` and `load_params` on the default device.
    """
    cfg, chosen, meta = read_run(workdir, step)
    net = model.build(cfg.model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = {
        tuple(name.split("/")): jax.ShapeDtypeStruct(
            p.get_value().shape, np.float32, sharding=here
        )
        for name, p in parameters.declared(net).items()
    }
    return cfg, net, load_params(workdir, chosen, parameters.nested(flat)), chosen, meta


def read_run(workdir, step: int = -1):
    """What a finished or running run was: (config, step, meta).

    The config's platform is emptied and its attention is the reference: the run may
    have been on another machine.

    Raises:
      FileNotFoundError: if `workdir` holds no checkpoint.
    """
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    nothing = FileNotFoundError(
        f"--workdir={os.fspath(workdir)} has no checkpoint (looked in "
        f"{directory.name}/). Give the --workdir of a training run."
    )
    # Orbax would create a directory that is missing.
    if not directory.is_dir():
        raise nothing
    reader = Checkpoints(workdir, config_lib.CheckpointConfig(), reader=True)
    try:
        chosen = reader.choose(step)
        if chosen is None:
            raise nothing
        meta = reader.meta(chosen)
    finally:
        reader.close()
    cfg = config_lib.freeze(meta["config"] | {"platform": ""})
    # Of the training machine: a kernel, and where the optimizer's state lies.
    reference = dataclasses.replace(cfg.model, attention="einsum", unpadded=False)
    still = dataclasses.replace(cfg.optim, offload=False)
    return dataclasses.replace(cfg, model=reference, optim=still), chosen, meta


def load_params(workdir, step: int, abstract_params: dict) -> dict:
    """The parameters of a checkpoint; the optimizer's arrays are not read.

    Args:
      abstract_params: nested ShapeDtypeStructs with shardings, all of them.
    """
    reader = Checkpoints(workdir, config_lib.CheckpointConfig(), reader=True)
    try:
        with reader.read_errors(step):
            return _restore_params(
                reader.directory / str(step) / "state", abstract_params
            )
    finally:
        reader.close()


def _restore_params(path: pathlib.Path, abstract_params: dict) -> dict:
    tree = {"params": abstract_params}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            ),
        )
    return restored["params"]
