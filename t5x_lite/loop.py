"""The loop of training: steps, evaluations and saves, until something ends it."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from t5x_lite import (
    checkpoint,
    distributed,
    evaluate,
    guard,
    metrics,
    progress,
    run,
    stopping,
)
from t5x_lite.data import pipeline
from t5x_lite.watchdog import Watchdog


class StopSignal:
    """Within: SIGTERM and SIGINT only set `signal` (from 0), once `waits` is True.

    Before that there is nothing to save and they end the process; so does a second
    SIGINT.
    """

    signal = 0
    waits = False

    def __enter__(self):
        self._old = {
            s: signal.signal(s, self._received) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _received(self, number, frame):
        del frame
        if not self.waits and number == signal.SIGTERM:
            sys.exit(128 + number)
        if not self.waits:
            raise KeyboardInterrupt
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class End:
    """How a loop ended.

    Attributes:
      step: that was done last.
      heldout: the last held-out metrics, {} if there were none.
      signal: that stopped it, or 0.
      saved: the last step whose checkpoint was begun, or None.
      watch: that saw its steps.
      spike: that asks for a rewind, or None.
    """

    state: Any
    step: int
    watch: guard.Guard
    heldout: dict = dataclasses.field(default_factory=dict)
    signal: int = 0
    saved: int | None = None
    spike: guard.Spike | None = None


@dataclasses.dataclass
class Loop:
    """What the steps of a run need, from one start to the end.

    Attributes:
      unigram: loss of the baseline.
      timings: seconds of each phase of the start-up; the first step is added.
    """

    setup: run.Setup
    train_step: Callable
    eval_step: Callable
    checkpoints: checkpoint.Checkpoints
    peers: distributed.Peers
    stop: StopSignal
    workdir: pathlib.Path
    unigram: float
    timings: dict[str, float]

    def run(self, train_state: dict, first: int, after: dict) -> End:
        """Trains from `first` steps on; all processes end alike.

        Args:
          train_state: is donated.
          after: `meta` of the checkpoint that it comes from, {} at the start.

        Raises:
          FloatingPointError: see `guard.Guard.see`.
        """
        cfg = self.setup.cfg
        with contextlib.ExitStack() as stack:
            watch = guard.Guard(self.setup, self.workdir, after, first)
            writer = metrics.Writer(self.workdir, first, active=self.peers.lead)
            stack.callback(writer.close)
            log = progress.StepLog(
                self.setup, writer, first, self.workdir, self.timings, watch
            )
            stack.callback(log.bar.close)
            profiler = progress.Profiler(cfg, log, self.workdir)
            stack.callback(profiler.close)
            stacks = self.workdir / f"stacks-{self.peers.rank}.txt"
            watchdog = Watchdog(cfg.slow_step, stacks)
            stack.callback(watchdog.close)
            end = End(train_state, first, watch)
            del train_state  # donated
            if self.peers.from_lead(
                "evaluation", lambda: self._evaluation_is_due(first, writer)
            ):
                end.heldout = self._evaluate(end, writer, log)
            agree = distributed.Agreement(self.setup.mesh)
            self.stop.waits = True
            remaining = guard.Remaining(self.setup.train_batches, watch.left_out)
            data = pipeline.iterate(
                *(remaining, first, cfg.steps),
                prefetch=cfg.data.prefetch,
                workers=cfg.data.workers,
            )
            stack.callback(data.close)
            placed = ((done, self.setup.to_device(batch)) for done, batch in data)
            try:
                for done, batch in log.waiting(placed):
                    watchdog.step(done)
                    profiler.before(done)
                    self._step(end, batch, log, first)
                    end.signal = agree(self.stop.signal)
                    if self._rest(end, writer, log, watchdog, watch):
                        break
            except guard.Spike as spike:
                # Without the frames, which hold the state.
                end.spike = spike.with_traceback(None)
        return end

    def _step(self, end: End, batch: dict, log: progress.StepLog, first: int):
        began = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=end.step + 1):
            end.state, step_metrics = self.train_step(end.state, batch)
        end.step += 1
        log.add(end.step, step_metrics)
        if end.step == first + 1 and "first step" not in self.timings:
            log.drain()
            self.timings["first step"] = time.perf_counter() - began
            log.started()

    def _rest(self, end: End, writer, log, watchdog, watch: guard.Guard) -> bool:
        """Evaluates and saves when it is time to; -> was this the last step?"""
        cfg, now = self.setup.cfg, end.step
        ends = now == cfg.steps or end.signal > 0
        evaluates = now % cfg.eval_every == 0 and not end.signal or now == cfg.steps
        saves = now % cfg.checkpoint.every == 0 or ends or watch.owes_save
        if not (evaluates or saves):
            return False
        watchdog.rest()
        log.drain()
        heldout = None
        if evaluates:
            end.heldout = self._evaluate(end, writer, log)
            heldout = end.heldout
            over = self._is_over(end, writer)
            ends, saves = ends or over, saves or over
        # Parameters without a finite loss may be broken, and would push good ones out.
        watch.owes_save = saves and watch.in_a_row > 0 and not evaluates
        if saves and not watch.owes_save:
            with log.saving():
                writer.flush()
                meta = checkpoint.make_meta(cfg, now, self.setup.data_identity())
                meta["guard"] = watch.meta()
                self.checkpoints.save(now, end.state, meta, heldout)
            end.saved = now
        log.restart_clock()
        return ends

    def _evaluate(self, end: End, writer, log: progress.StepLog) -> dict:
        found = evaluate.heldout(self.setup, self.eval_step, end.state["params"])
        found["unigram_loss"] = self.unigram
        loss = found[checkpoint.METRIC]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {end.step} has held-out loss {loss}. Lower "
                "config.optim.learning_rate or set config.optim.clip_norm, then run "
                "again: it resumes from the last checkpoint."
            )
        writer.write(end.step, **found)
        log.say(
            f"step {end.step}: held-out loss {loss:.4f} (unigram {self.unigram:.4f})"
        )
        return found

    def _is_over(self, end: End, writer) -> bool:
        """Is config.checkpoint.patience at its end?"""
        cfg = self.setup.cfg.checkpoint
        if not cfg.patience:
            return False
        writer.flush()
        over = self.peers.from_lead(
            "patience", lambda: stopping.is_over(cfg, self.workdir, end.step)
        )
        if over:
            self.setup.say(
                f"step {end.step}: {cfg.patience} evaluations without a better "
                f"{cfg.metric}; this was the last step"
            )
        return over

    def _evaluation_is_due(self, first: int, writer) -> bool:
        """Had a signal stopped the run right before this evaluation?"""
        if not first or first % self.setup.cfg.eval_every:
            return False
        rows = metrics.read(writer.path)
        return not any(r["step"] == first and checkpoint.METRIC in r for r in rows)
