"""Checkpoints through Orbax: the state, and what is needed to go on exactly.

`workdir/checkpoints/STEP/` holds `state` (parameters, optimizer, step) and `meta` (the
config, the data's fingerprint and position). Orbax writes asynchronously into a
temporary directory and renames it when complete, so a kill at any instant leaves the
checkpoints before it whole. What is read is compared with the checksums in `meta`, see
t5x_lite/integrity.py.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5x_lite import (
    checksums,
    distributed,
    integrity,
    lora,
    model,
    parameters,
    reading,
    retention,
)
from t5x_lite import config as config_lib
from t5x_lite.integrity import first_line
from t5x_lite.workdir import probe

METRIC = "heldout_loss"
# Bytes of an array in one piece of the files: whoever reads it holds pieces twice.
_PIECE = 2**27
# What Orbax and TensorStore raise for files they cannot write.
_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class Checkpoints:
    """Saves and restores the train state of one workdir.

    Keeps what `retention.Retention` says. A `reader` leaves everything as it is: a
    training run in the same workdir may just be writing a checkpoint.
    """

    def __init__(
        self,
        workdir,
        cfg: config_lib.CheckpointConfig,
        *,
        reader: bool = False,
        peers: distributed.Peers | None = None,
    ):
        # What the user of this process chooses a step with.
        self.flag = "--step" if reader else "--config.checkpoint.restore_step"
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.peers = peers or distributed.Peers()
        self._writes = not reader
        if reader:
            return
        if self.peers.lead:
            retention.sweep(self.directory)
        self._retention = retention.Retention(cfg, self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                # Renamed first: a kill leaves no checkpoint that lacks some files.
                todelete_subdir=retention.DELETED,
                cleanup_tmp_directories=True,
            ),
        )
        self._reader = futures.ThreadPoolExecutor(1)
        self._reading: futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending; stray folders are not."""
        return retention.steps(self.directory)

    def save(self, step: int, state, meta: dict, metrics: dict | None = None):
        """Starts writing; waits first if the previous write has not ended.

        Args:
          meta: see `make_meta`; checksums of `state` are added.
          metrics: of the evaluation at this step, if there was one.

        Raises:
          OSError: if this or the previous write failed (a full disk, say). Older
            checkpoints are not touched by a failed write.
        """
        self.wait()
        numbers = {
            k: v for k, v in (metrics or {}).items() if isinstance(v, int | float)
        }
        meta = meta | {integrity.SUMS: checksums.of_tree(state), "metrics": numbers}
        self._retention.scored(step, numbers)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), state)
        with self._write_errors():
            if self.peers.lead:
                # Orbax's threads would wait for ten minutes for the folder.
                probe(self.directory)
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=pieces),
                    meta=ocp.args.JsonSave(integrity.sealed(meta)),
                ),
                force=True,
            )
            if not written:
                raise RuntimeError(f"step {step} was not saved")
        if self.peers.lead:
            self._reading = self._reader.submit(self._read_back, step)

    def _read_back(self, step: int):
        """When it is written: is it good? Only then may the one before it go."""
        try:
            self._manager.wait_until_finished()
        except _ERRORS:
            return  # which `wait` raises, too
        found = self._retention.read_back(step)
        if found.problems:
            print(
                f"warning: checkpoint {step} was written, but does not read back: "
                f"{found.problems[0]}. The one before it is kept. Look at the disk.",
                flush=True,
            )
        retention.sweep(self.directory)

    def set_aside_after(self, step: int) -> list[int]:
        """Moves checkpoints after `step` to `workdir/abandoned`; returns their steps.

        Going on from an older checkpoint starts another branch: the later ones would
        stand in its way, and a restart would take them for its own.
        """
        later = [s for s in retention.numbered(self.directory) if s > step]
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
        self._retention.reload()

    def wait(self):
        """Blocks until what was saved is on disk and was read back."""
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._reading:
            self._reading.result()

    def close(self):
        """Waits as `wait` does, and ends the writers."""
        if not self._writes:
            return
        with self._write_errors():
            self._manager.close()
        self._reader.shutdown()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:  # a process is lost, not the files
            raise
        except _ERRORS as e:
            raise OSError(
                f"writing a checkpoint below {self.directory} failed: "
                f"{first_line(e)}. Complete checkpoints there: "
                f"{self.steps() or 'none'}. Free some space or fix the directory, then "
                "run the same command: it resumes."
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
        """What `save` was given as meta, with the checksums.

        Raises:
          Damaged: it is not what was saved.
        """
        with self.read_errors(step):
            return integrity.read_meta(self.directory / str(step))

    def restore(self, step: int, abstract_state):
        """The state at `step`, placed as `abstract_state` says (any mesh), verified.

        All processes call it; all raise or none.

        Raises:
          Damaged: it cannot be read, or is not what was saved.
        """
        restored, problem = None, ""
        try:
            sums = self.meta(step).get(integrity.SUMS, {})
            with self.read_errors(step):
                restored = reading.arrays(self.directory / str(step), abstract_state)
        except integrity.Damaged as e:
            problem, sums = str(e), {}
        found = filter(None, self.peers.everyone("restored", problem))
        if problem := next(found, ""):
            raise integrity.Damaged(problem)
        with self.read_errors(step):
            integrity.check(sums, restored)
        return restored

    def resume(
        self, asked: int, check: Callable[[dict], Any], abstract_state
    ) -> tuple[int | None, dict, Any]:
        """The newest checkpoint that is whole, or the one asked for.

        All processes call it. Damaged checkpoints are named and passed over; they stay
        where they are, see `set_aside_after`.

        Args:
          asked: a step, or -1.
          check: raises if a checkpoint of this meta cannot be continued.

        Returns:
          (step, meta, state); the state is None if it holds parameters alone. (None,
          {}, None) if there is no checkpoint at all.

        Raises:
          Damaged: the one asked for, or every one there is.
        """

        def candidates() -> list[int]:
            self.choose(asked)
            return self.steps()[::-1] if asked == -1 else [asked]

        steps, errors = self.peers.from_lead("restore", candidates), []
        for step in steps:
            try:
                meta = self._meta_of_lead(step)
                check(meta)
                whole = not meta.get("params_only")
                state = self.restore(step, abstract_state) if whole else None
            except integrity.Damaged as e:
                errors.append(e)
                continue
            for error in errors if self.peers.lead else ():
                print(f"warning: {error}", flush=True)
            self._retention.good.add(step)
            return step, meta, state
        if len(errors) > 1:
            raise integrity.Damaged(
                f"no checkpoint of {steps} can be read, nothing was changed. See "
                f"`python -m t5x_lite.verify --workdir={self.directory.parent}`; bring "
                f"a copy back, or start in a new --workdir. The latest: {errors[0]}"
            ) from errors[0]
        if errors:
            raise errors[0]
        return None, {}, None

    def _meta_of_lead(self, step: int) -> dict:
        def read() -> dict:
            try:
                return {"meta": self.meta(step)}
            except integrity.Damaged as e:
                return {"problem": str(e)}

        found = self.peers.from_lead("meta", read)
        if "problem" in found:
            raise integrity.Damaged(found["problem"])
        return found["meta"]

    @contextlib.contextmanager
    def read_errors(self, step: int):
        """Whatever fails inside is `Damaged`, with the step and a way out."""
        try:
            yield
        except Exception as e:  # Orbax has bare ones, too
            if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
                raise  # not the files
            others = [s for s in self.steps() if s != step]
            way_out = (
                f"Another one: {self.flag}={others[-1]}."
                if others
                else "No other one is left; start in a new --workdir."
            )
            directory = self.directory / str(step)
            what = [*integrity.inspect(directory).problems, first_line(e)][0]
            raise integrity.Damaged(
                f"checkpoint {directory} cannot be read; it is damaged or not ours: "
                f"{what}. {way_out}"
            ) from e


def make_meta(cfg: config_lib.Config, step: int, data: dict) -> dict:
    """Meta of a checkpoint.

    Args:
      data: what the order of the data depends on, e.g. the store's fingerprint.
    """
    return {"step": step, "config": config_lib.to_json(cfg), "data": data}


def load_run(workdir, step: int = -1):
    """A finished or running run for inference: (config, model, params, step, meta).

    As `read_run` and `load_params` on the default device; adapters are merged.
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
    params = load_params(workdir, chosen, parameters.nested(flat))
    if cfg.model != lora.without(cfg.model):
        params = lora.plain(params, net)
        cfg = dataclasses.replace(cfg, model=lora.without(cfg.model))
        net = model.build(cfg.model)
    return cfg, net, params, chosen, meta


def read_run(workdir, step: int = -1, key: str = "--workdir"):
    """What a finished or running run was: (config, step, meta).

    The config's platform is emptied and its attention is the reference: the run may
    have been on another machine.

    Args:
      key: what named it; stands in the error.

    Raises:
      FileNotFoundError: if `workdir` holds no checkpoint.
    """
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    nothing = FileNotFoundError(
        f"{key}={os.fspath(workdir)} has no checkpoint (looked in "
        f"{directory.name}/). Give the --workdir of a training run."
    )
    reader = Checkpoints(workdir, config_lib.CheckpointConfig(), reader=True)
    chosen = reader.choose(step)
    if chosen is None:
        raise nothing
    meta = reader.meta(chosen)
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
    return load_part(workdir, step, {"params": abstract_params})["params"]


def load_part(workdir, step: int, abstract: dict) -> dict:
    """A part of the state of a checkpoint, verified; the rest is not read.

    Args:
      abstract: as much of the tree as is wanted, ShapeDtypeStructs with shardings.

    Raises:
      Damaged: it cannot be read, or is not what was saved.
    """
    reader = Checkpoints(workdir, config_lib.CheckpointConfig(), reader=True)
    sums = reader.meta(step).get(integrity.SUMS, {})
    with reader.read_errors(step):
        restored = reading.arrays(reader.directory / str(step), abstract, partial=True)
        integrity.check(sums, restored)
    return restored
