"""What a run reports while it goes: the bar, metrics.jsonl, where the time went."""

import collections
import math
import sys
import time

import jax
import numpy as np
import tqdm

from t5x_lite import config, evaluate, optim, run


class StepLog:
    """Fetches step metrics one step behind, so that the device never waits for us."""

    def __init__(self, cfg: config.Config, setup: run.Setup, writer, first: int):
        self.cfg, self.setup, self.writer = cfg, setup, writer
        self.rate = optim.schedule(cfg)
        self.pending = collections.deque()
        self.bar = tqdm.tqdm(
            total=cfg.steps, initial=first, unit="step", disable=not setup.lead,
            mininterval=0.5, dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self):
        self.clock = time.perf_counter()

    def say(self, text: str):
        if self.setup.lead:
            self.bar.write(text, file=sys.stdout)

    def add(self, now: int, step_metrics: dict):
        self.pending.append((now, step_metrics))
        while len(self.pending) > 1:
            self._write(*self.pending.popleft())

    def drain(self):
        while self.pending:
            self._write(*self.pending.popleft())

    def _write(self, now: int, step_metrics: dict):
        host = jax.device_get(step_metrics)
        seconds = time.perf_counter() - self.clock
        self.restart_clock()
        sums, others = host["sums"]["tokens"], evaluate.others(host["sums"])
        weight = max(float(sums.weight), 1.0)
        loss = float(sums.nll) / weight
        norm = float(host["grad_norm"])
        # Checked before any save: every fetched step comes before it.
        if not all(map(math.isfinite, (loss, norm, *others.values()))):
            raise FloatingPointError(
                f"step {now} has loss {loss}, gradient norm {norm} {others or ''}. "
                "Lower config.optim.learning_rate or set config.optim.clip_norm, then "
                "run again: it resumes from the last checkpoint."
            )
        speed = self.setup.tokens_per_step / seconds
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", False)
        if now % self.cfg.log_every == 0:
            self.writer.write(
                now,
                loss=loss,
                z_loss=float(sums.z) / weight,
                accuracy=float(sums.correct) / weight,
                **others,
                grad_norm=norm,
                learning_rate=float(np.asarray(self.rate(now - 1))),
                tokens_per_second=speed,
                step_seconds=seconds,
                epoch=self.setup.epoch(now - 1),
                fingerprint=f"{int(host['fingerprint']):08x}",
            )
