"""Which checkpoints stay, and how many that are at most.

The newest, the best and every k-th, as Orbax's policies say, and always the newest one
that was read back (or restored from) and found whole: whatever happens to a later one,
there is one to go on from. Nothing here looks at a clock.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from t5x_lite import integrity
from t5x_lite.config import CheckpointConfig, Config

DELETED = "deleted"  # folder of checkpoints whose files are about to go


def numbered(directory: pathlib.Path) -> list[int]:
    """The numbers that folders of `directory` have for a name, ascending."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdecimal() and p.is_dir())


def steps(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in `directory`, ascending, torn ones included."""
    parts = ("state", "meta", "_CHECKPOINT_METADATA")
    return [
        step
        for step in numbered(directory)
        if any((directory / str(step) / part).exists() for part in parts)
    ]


def sweep(directory: pathlib.Path):
    """Deletes the files of what is deleted already."""
    shutil.rmtree(directory / DELETED, ignore_errors=True)


def at_most(cfg: Config) -> int:
    """Checkpoints that are on disk at a time, the one that is being written included.

    One more while one is damaged. A run that was stopped by signals may have saved more
    of config.checkpoint.keep_every than this, if these were steps to keep.
    """
    c = cfg.checkpoint
    kept = max(c.keep_last, 2) + c.keep_best + 1
    if c.keep_every:
        kept += cfg.steps // c.keep_every
    return min(kept, -(-cfg.steps // c.every))


class Retention(policies.PreservationPolicy):
    """Orbax asks it after every save.

    Attributes:
      good: steps that were read and found whole.
    """

    def __init__(self, cfg: CheckpointConfig, directory: pathlib.Path):
        self.cfg, self.directory = cfg, directory
        self.good: set[int] = set()
        self._scores: dict[int, float] = {}
        chosen: list[Any] = [policies.LatestN(cfg.keep_last)]
        if cfg.keep_every:
            chosen.append(policies.EveryNSteps(cfg.keep_every))
        if cfg.keep_best:
            chosen.append(
                policies.BestN(
                    get_metric_fn=float,
                    reverse=cfg.metric_mode == "min",
                    n=cfg.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._policy = policies.AnyPreservationPolicy(chosen)
        self.reload()

    def reload(self):
        """Reads the metrics of the checkpoints that are there."""
        self._scores.clear()
        for step in steps(self.directory):
            self.scored(step, _metrics(self.directory / str(step)))

    def scored(self, step: int, metrics: dict):
        """Notes what an evaluation at `step` found."""
        if self.cfg.metric in metrics:
            self._scores[step] = float(metrics[self.cfg.metric])

    def read_back(self, step: int) -> integrity.Found:
        """Reads a checkpoint that was just written, if the config wants that."""
        if not self.cfg.read_back:
            self.good.add(step)
            return integrity.Found(())
        directory = self.directory / str(step)
        found = integrity.inspect(directory)
        if not found.problems:
            integrity.list_files(directory)
            self.good.add(step)
        return found

    def best(self) -> int | None:
        """The step with the best metric; None if none has one."""
        sign = 1 if self.cfg.metric_mode == "min" else -1
        return min(self._scores, key=lambda s: sign * self._scores[s], default=None)

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """In the order of `checkpoints`, which is that of their steps."""
        there = {c.step for c in checkpoints}
        self.good &= there
        self._scores = {s: v for s, v in self._scores.items() if s in there}
        scored: Any = [
            dataclasses.replace(c, metrics=self._scores.get(c.step))  # type: ignore
            for c in checkpoints
        ]
        keep = self._policy.should_preserve(scored, context=context)
        newest_good = max(self.good, default=None)
        pairs = zip(checkpoints, keep, strict=True)
        return [kept or c.step == newest_good for c, kept in pairs]


def _metrics(directory: pathlib.Path) -> dict:
    """Of a checkpoint's evaluation; {} if it had none or cannot be read."""
    try:
        meta = integrity.read_meta(directory)
        if "metrics" in meta:
            return meta["metrics"]
        # Where Orbax kept them before we did.
        return json.loads((directory / "metrics" / "metrics").read_text())
    except (ValueError, OSError):
        return {}
