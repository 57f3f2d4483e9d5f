"""What guards the training itself: steps that are not finite, and spikes of the loss.

Not finite: a step whose loss or gradient is NaN or infinite changes nothing but the
step's number (`step.make_train_step`). `Guard` counts these steps and, after more than
config.optim.skip_nonfinite in a row, stops the run with the batch in a dump, which
`python -m t5x_lite.inspect --dump=FILE` shows.

Spikes: a loss above config.optim.spike_factor times the median of the last
config.optim.spike_window is written down. With config.optim.spike_rewinds the run then
goes back to a checkpoint before the spike and leaves out the batches from there until
after it (Chowdhery et al. 2022, section 5.1). WORKDIR/rewinds.json and the meta of
every later checkpoint hold what is left out, so the batch stays a function of (seed,
step, what is left out), after a kill too.
"""

import collections
import dataclasses
import json
import pathlib
import shutil
import statistics
from typing import Any

import jax
import numpy as np

from t5x_lite import checkpoint, config, distributed, dumps, integrity, optim, run
from t5x_lite.workdir import replace

REWINDS = "rewinds.json"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Batches that no step trains on.

    Attributes:
      ranges: (step, count), ascending: from this step on the batch's index is higher
        by `count`.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pairs) -> "LeftOut":
        return cls(tuple((int(step), int(count)) for step, count in pairs))

    @classmethod
    def read(cls, workdir: pathlib.Path) -> "LeftOut":
        """What the rewinds of a run have left out so far."""
        return cls.of(read(workdir)["left_out"])

    def index(self, step: int) -> int:
        """Of the batch that the step after `step` steps trains on."""
        return step + sum(count for at, count in self.ranges if at <= step)

    def until(self, step: int) -> "LeftOut":
        """As a checkpoint of `step` has it: what changed the steps before."""
        return LeftOut(tuple(r for r in self.ranges if r[0] < step))

    def rewound(self, step: int, index: int) -> "LeftOut":
        """After going back to `step`: the next batch is that of `index`."""
        before = LeftOut(tuple(r for r in self.ranges if r[0] <= step))
        more = (step, index - before.index(step))
        return LeftOut((*before.ranges, more))


class Remaining:
    """Batches by step, without those left out."""

    def __init__(self, batches, left_out: LeftOut):
        self.batches, self.left_out = batches, left_out

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.batches[self.left_out.index(step)]


class Spike(Exception):
    """The loss of `step` is a spike, and the run may rewind."""

    def __init__(self, step: int, loss: float, usual: float, norms_N: np.ndarray):
        super().__init__(f"step {step}: loss {loss:.4f}, usual {usual:.4f}")
        self.step, self.loss, self.usual, self.norms_N = step, loss, usual, norms_N


class Guard:
    """Sees every step once, in order; the same in all processes.

    Args:
      setup: of the run.
      workdir: for dumps.
      after: `meta` of the checkpoint that the run goes on from, {} at the start.
      first: its step.

    Raises:
      ValueError: WORKDIR/rewinds.json is not that of the checkpoint.
    """

    def __init__(
        self, setup: run.Setup, workdir: pathlib.Path, after: dict, first: int = 0
    ):
        self.setup, self.optim = setup, setup.cfg.optim
        self.workdir = workdir
        self.left_out = LeftOut.read(workdir)
        before = after.get("guard", {})
        then = LeftOut.of(before.get("left_out", ()))
        if then != self.left_out.until(first):
            raise ValueError(
                f"the checkpoint of step {first} was trained without the batches "
                f"{then.ranges}, but {workdir / REWINDS} says {self.left_out.ranges}. "
                "Put the original file back."
            )
        self.skipped = int(before.get("skipped", 0))
        self.in_a_row = int(before.get("in_a_row", 0))
        self.owes_save = False  # see loop.py
        self._losses = collections.deque(
            before.get("losses", ()), maxlen=self.optim.spike_window
        )

    def meta(self) -> dict:
        """For the next checkpoint: what a `Guard` goes on from."""
        losses = list(self._losses) if self.optim.spike_factor else []
        pairs = [list(pair) for pair in self.left_out.ranges]
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": losses,
            "left_out": pairs,
        }

    def see(
        self, now: int, loss: float, finite: bool, norms_N: np.ndarray
    ) -> dict[str, Any]:
        """Judges step `now`; -> what to write about it, mostly nothing.

        Args:
          finite: was the step taken?
          norms_N: of the gradients of the parameters, in the order of their names.

        Raises:
          FloatingPointError: too many steps in a row were not finite, or too many
            spikes; the batch is in a dump.
          Spike: the run shall rewind.
        """
        if not finite:
            return self._not_finite(now, loss, norms_N)
        self.in_a_row = 0
        found, factor = {}, self.optim.spike_factor
        if factor and len(self._losses) == self.optim.spike_window:
            usual = statistics.median(self._losses)
            if loss > factor * usual:
                if self.optim.spike_rewinds:
                    raise Spike(now, loss, usual, norms_N)
                found = {"spike": loss / usual}
        self._losses.append(loss)
        return found

    def _not_finite(self, now: int, loss: float, norms_N: np.ndarray):
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row <= self.optim.skip_nonfinite:
            return {"skipped": self.skipped}
        names = self._parameters()
        bad = [names[i] for i in np.flatnonzero(~np.isfinite(norms_N))]
        row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
        raise FloatingPointError(
            f"step {now} is not finite{row}: loss {loss}, gradients of {len(bad)} of "
            f"{len(names)} parameters{': ' if bad else ''}{', '.join(bad[:3])}. "
            f"{self.dump('nonfinite', now, loss, norms_N)} Lower "
            "config.optim.learning_rate or set config.optim.clip_norm, then run again: "
            "it resumes from the last checkpoint. Skipped are up to "
            f"config.optim.skip_nonfinite={self.optim.skip_nonfinite} in a row."
        )

    def _parameters(self) -> list[str]:
        """In the order of their gradients; a frozen one's is 0."""
        leaves = jax.tree.leaves_with_path(self.setup.abstract_state["params"])
        return [optim.name_of(path) for path, _ in leaves]

    def dump(self, kind: str, now: int, loss: float, norms_N: np.ndarray) -> str:
        """The lead writes WORKDIR/KIND-STEP.npz; -> a sentence about the batch."""
        index = self.left_out.index(now - 1)
        B = self.setup.cfg.data.batch_size
        path = self.workdir / f"{kind}-{now}.npz"
        examples = index * B, (index + 1) * B - 1
        if self.setup.lead:
            about = {
                "step": now,
                "loss": loss,
                "examples": examples,
                "vocab": self.setup.vocab.fingerprint,
                "config": config.to_json(self.setup.cfg),
                "gradient_norms": dict(zip(self._parameters(), norms_N, strict=True)),
            }
            dumps.write(path, self.setup.train_batches.whole(index), about)
        return (
            f"Its examples are {examples[0]} to {examples[1]}: "
            f"`python -m t5x_lite.inspect --dump={path}`."
        )


# ---- rewinding --------------------------------------------------------------------


def rewind(
    spike: Spike,
    guard: Guard,
    checkpoints: checkpoint.Checkpoints,
    peers: distributed.Peers,
):
    """Goes back before a spike: the newest checkpoint is then the one to go on from.

    That is the latest one at least config.optim.spike_back steps before it; without
    any the oldest there is; without that the run begins anew.

    Raises:
      FloatingPointError: the run has rewound config.optim.spike_rewinds times.
    """
    o, workdir = guard.optim, guard.workdir
    checkpoints.wait()
    where = guard.dump("spike", spike.step, spike.loss, spike.norms_N)
    found = f"step {spike.step} has loss {spike.loss:.4f}, "
    found += f"{spike.loss / spike.usual:.2f} times the median before. {where}"
    # Rank 0 alone may read the file: it is about to write it.
    done = peers.from_lead("rewinds", lambda: len(read(workdir)["rewinds"]))
    if done >= o.spike_rewinds:
        raise FloatingPointError(
            f"{found} The run has rewound {done} times already "
            f"(config.optim.spike_rewinds={o.spike_rewinds}). Look at these examples, "
            "lower config.optim.learning_rate, or allow more; then run again."
        )

    def decide():
        have = [s for s in checkpoints.steps() if s < spike.step]
        early = [s for s in have if s <= spike.step - o.spike_back]
        to = max(early) if early else min(have, default=0)
        last = guard.left_out.index(spike.step - 1) + o.spike_skip
        left_out = guard.left_out.rewound(to, last + 1)
        first = LeftOut(left_out.ranges[:-1]).index(to)
        about = {
            "step": spike.step,
            "loss": spike.loss,
            "median": spike.usual,
            "to": to,
            "batches": [first, last],
        }
        rewinds = [*read(workdir)["rewinds"], about]
        # From here on the run has rewound, whatever happens: see `settle`.
        record = {"left_out": left_out.ranges, "rewinds": rewinds}
        replace(workdir / REWINDS, json.dumps(record, indent=2) + "\n")
        print(
            f"{found} Rewind {len(rewinds)} of {o.spike_rewinds}: going on from step "
            f"{to} without the batches {first} to {last}.",
            flush=True,
        )

    peers.from_lead("rewind", decide)
    settle(checkpoints, workdir, peers)


def settle(
    checkpoints: checkpoint.Checkpoints, workdir: pathlib.Path, peers: distributed.Peers
):
    """Sets the checkpoints aside that a rewind has left behind; all call it."""

    def stale() -> int | None:
        left_out, behind = LeftOut.read(workdir), False
        if not left_out.ranges:
            return None
        last = left_out.ranges[-1][0]
        for step in reversed(checkpoints.steps()):
            try:
                before = checkpoints.meta(step).get("guard", {}).get("left_out", ())
            except integrity.Damaged:  # `Checkpoints.resume` tells of it
                continue
            if LeftOut.of(before) == left_out.until(step):
                return step if behind else None
            behind = True
        if behind and last:
            raise ValueError(
                f"{workdir / REWINDS} says that the run went back to step {last}, but "
                "no checkpoint fits to that. Put the original file back."
            )
        return 0 if behind else None

    last = peers.from_lead("settle", stale)
    if last is not None:
        go_on_from(last, checkpoints, workdir, peers)


def go_on_from(
    step: int,
    checkpoints: checkpoint.Checkpoints,
    workdir: pathlib.Path,
    peers: distributed.Peers,
):
    """Sets what came after `step` aside, with a word about it; all call it."""

    def aside() -> list[int]:
        later = [s for s in checkpoints.steps() if s > step]
        if later:
            folder = workdir / "abandoned"
            folder.mkdir(exist_ok=True)
            # Before the checkpoints: a kill in between leaves it with them.
            shutil.copy(workdir / "metrics.jsonl", folder / f"{later[-1]}.jsonl")
        return checkpoints.set_aside_after(step)

    later = peers.from_lead("aside", aside)
    if later and peers.lead:
        folder = workdir / "abandoned"
        print(f"moved the later checkpoints {later} to {folder}", flush=True)
    elif later:
        checkpoints.reload()


def read(workdir: pathlib.Path) -> dict:
    """WORKDIR/rewinds.json: {"left_out": pairs, "rewinds": one dict for each}.

    Raises:
      ValueError: it is damaged.
    """
    path = workdir / REWINDS
    if not path.exists():
        return {"left_out": [], "rewinds": []}
    try:
        found = json.loads(path.read_bytes())
        pairs = LeftOut.of(found["left_out"]).ranges
        if any(at < 0 or count < 0 for at, count in pairs) or sorted(pairs) != [*pairs]:
            raise ValueError("its numbers make no sense")
        return {"left_out": pairs, "rewinds": [dict(each) for each in found["rewinds"]]}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError(
            f"{path} is damaged ({type(e).__name__}: {e}). It says which batches the "
            "run leaves out. Put a copy back."
        ) from e
