"""What a run reports while it goes: the bar, metrics.jsonl, where the time went."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import tqdm

from t5x_lite import config, evaluate, guard, hardware, heads, metrics, run

# What depends on the clock or the machine; two runs agree in everything else.
CLOCKED = (
    *("tokens_per_second", "step_seconds", "data_seconds", "compute_seconds"),
    *("checkpoint_seconds", "mfu", "goodput", "useful_seconds"),
    *("memory_bytes", "memory_peak_bytes"),
)


@dataclasses.dataclass
class Spent:
    """Seconds since the last line: of `steps` steps, waiting for data, saving."""

    steps: int = 0
    step: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0


class StepLog:
    """Fetches step metrics one step behind, so that the device never waits for us.

    Args:
      first: steps done before.
      watch: sees every step.
      timings: seconds of each phase of the start-up; `started` records them.
    """

    def __init__(
        self,
        setup: run.Setup,
        writer,
        first: int,
        workdir: pathlib.Path,
        timings: dict[str, float],
        watch: guard.Guard,
    ):
        cfg = setup.cfg
        self.cfg, self.setup, self.writer, self.watch = cfg, setup, writer, watch
        self.first, self.workdir, self.timings = first, workdir, timings
        self.pending = collections.deque()
        self.began = time.time() - sum(timings.values())
        self.run_began = min(self.began, _first_start(workdir) or self.began)
        rows = reversed(metrics.read(workdir / "metrics.jsonl"))
        self.useful = next((r[k] for r in rows if (k := "useful_seconds") in r), 0.0)
        self.spent = Spent()
        per_example = metrics.forward_flops(cfg.model, setup.train_batches.shapes)
        self.flops = 3 * per_example * cfg.data.batch_size
        chip = hardware.of_device(setup.mesh.devices.flat[0])
        self.peak = chip.flops * setup.mesh.size if chip else None
        self.bar = tqdm.tqdm(
            total=cfg.steps, initial=first, unit="step", disable=not setup.lead,
            mininterval=0.5 if sys.stderr.isatty() else 30.0, dynamic_ncols=True,
            smoothing=0.05,
        )  # fmt: skip
        self.restart_clock()

    def restart_clock(self):
        self.clock = time.perf_counter()
        self.waited = 0.0

    def say(self, text: str):
        if self.setup.lead:
            self.bar.write(text, file=sys.stdout)

    def waiting(self, data: Iterable) -> Iterator:
        """Goes through `data` and counts what the loop waits for it."""
        iterator = iter(data)
        self.restart_clock()
        while True:
            began = time.perf_counter()
            item = next(iterator, None)
            self.waited += time.perf_counter() - began
            if item is None:
                return
            yield item

    @contextlib.contextmanager
    def saving(self):
        """Within: the loop waits for a checkpoint."""
        began = time.perf_counter()
        yield
        self.spent.checkpoint += time.perf_counter() - began

    def started(self):
        """Says what the start-up took and adds it to sessions.jsonl."""
        took = ", ".join(f"{k} {v:.2f} s" for k, v in self.timings.items())
        self.say(f"start-up: {took}")
        if not self.setup.lead:
            return
        line = {"began": self.began, "first_step": self.first + 1}
        seconds = {k.replace(" ", "_"): v for k, v in self.timings.items()}
        line |= {"startup_seconds": seconds, "processes": jax.process_count()}
        line["devices"] = self.setup.mesh.size
        line["device_kind"] = self.setup.mesh.devices.flat[0].device_kind
        path = self.workdir / "sessions.jsonl"
        lines = [*metrics.read(path), line]  # without one that was torn
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(each) + "\n" for each in lines))
        os.replace(temporary, path)

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
        self.spent.steps += 1
        self.spent.step += seconds
        self.spent.data += self.waited
        self.useful += seconds - self.waited
        self.restart_clock()
        main = heads.main(self.cfg.model)
        sums, others = host["sums"][main], evaluate.others(host["sums"], main)
        weight = max(float(sums.weight), 1.0)
        loss = float(sums.nll) / weight
        finite = bool(host["finite"])
        # Before any save: every fetched step comes before it.
        found = self.watch.see(now, loss, finite, host["grad_norms"])
        self.bar.update()
        speed = f"{self.setup.tokens_per_step / seconds:,.0f} tokens/s"
        if self.peak:
            speed += f", MFU {self.flops / seconds / self.peak:.1%}"
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed}", False)
        if now % self.cfg.log_every == 0 or found:
            if finite:  # numbers that are not have no place in JSON
                found |= dict(
                    loss=loss,
                    z_loss=float(sums.z) / weight,
                    accuracy=float(sums.correct) / weight,
                    **others,
                    grad_norm=float(host["grad_norm"]),
                )
            self.writer.write(
                now,
                **found,
                learning_rate=float(host["learning_rate"]),
                epoch=self.setup.epoch(self.watch.left_out.index(now - 1)),
                **self.setup.epochs(self.watch.left_out.index(now - 1) + 1),
                nonpadding=float(host["nonpadding"]),
                fingerprint=f"{int(host['fingerprint']):08x}",
                **self._clocked(),
            )
            self.spent = Spent()

    def _clocked(self) -> dict[str, float]:
        """`CLOCKED`: means over the steps since the last line; see the README."""
        spent = self.spent
        step = spent.step / spent.steps
        found = {
            "tokens_per_second": self.setup.tokens_per_step / step,
            "step_seconds": step,
            "data_seconds": spent.data / spent.steps,
            "compute_seconds": (spent.step - spent.data) / spent.steps,
            "checkpoint_seconds": spent.checkpoint / spent.steps,
        }
        if self.peak:
            found["mfu"] = self.flops / step / self.peak
        # A clock that was set back makes the run look shorter than what it did.
        elapsed = max(time.time() - self.run_began, self.useful)
        found["goodput"] = self.useful / elapsed if elapsed else 0.0
        found["useful_seconds"] = self.useful
        stats = [d.memory_stats() for d in jax.local_devices()]
        for key, of in (("", "bytes_in_use"), ("peak_", "peak_bytes_in_use")):
            if used := [s[of] for s in stats if s and of in s]:
                found[f"memory_{key}bytes"] = max(used)
        return found


def _first_start(workdir: pathlib.Path) -> float | None:
    """When the run began, in seconds since 1970; None if it has no session yet."""
    sessions = metrics.read(workdir / "sessions.jsonl", "began")
    return sessions[0]["began"] if sessions else None


class Profiler:
    """Traces config.profile steps into WORKDIR/profile, for TensorBoard and Perfetto.

    The trace begins config.profile_first steps after the start, or earlier if the run
    would end within it. Only the lead process traces.
    """

    def __init__(self, cfg: config.Config, log: StepLog, workdir: pathlib.Path):
        self.log, self.directory, self.running = log, workdir / "profile", False
        self.begin = self.end = -1
        if cfg.profile and log.setup.lead:
            last = cfg.steps - cfg.profile
            self.begin = max(log.first, min(log.first + cfg.profile_first, last))
            self.end = self.begin + cfg.profile

    def before(self, done: int):
        """To be called when `done` steps are done, before the next one."""
        if done == self.begin:
            self.log.drain()
            jax.profiler.start_trace(self.directory)
            self.running = True
        if done == self.end:
            self.log.drain()
            self.close()

    def close(self):
        """Ends the trace, if one is running."""
        if not self.running:
            return
        self.running = False
        jax.profiler.stop_trace()
        self.log.restart_clock()
        steps = f"{self.begin + 1} to {self.end}"
        self.log.say(f"profile of steps {steps}: tensorboard --logdir={self.directory}")
        self.log.say("  or open its trace.json.gz in https://ui.perfetto.dev")
