"""Train the model of a config file; run again, it resumes or says that it is done.

    python -m t5x_lite.train --config=configs/demo.py --workdir=runs/demo
    python -m t5x_lite.train --config=configs/demo.py:smoke --workdir=runs/smoke \\
        --config.steps=10 --config.optim.learning_rate=0.003

The workdir gets checkpoints/, metrics.jsonl, tensorboard/, config.json, summary.txt and
loss.png. SIGTERM and Ctrl-C save and exit; after kill -9 the same command goes on from
the last checkpoint with the very losses an uninterrupted run would have had.
"""

import time

_STARTED = time.perf_counter()

import contextlib  # noqa: E402
import fcntl  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402

from t5x_lite import (  # noqa: E402
    checkpoint,
    cli,
    config,
    evaluate,
    metrics,
    progress,
    report,
    run,
    sharding,
    state,
    step,
)
from t5x_lite.data import pipeline  # noqa: E402


def main(argv: list[str] | None = None):
    raw, flags = cli.parse_config(__doc__, argv, workdir="directory of the run")
    train(config.freeze(raw), pathlib.Path(flags.workdir))


def train(cfg: config.Config, workdir: pathlib.Path) -> dict:
    """Trains until `cfg.steps`; returns the last line of held-out metrics."""
    # ---- start-up -----------------------------------------------------------------
    timings = {"import": time.perf_counter() - _STARTED}
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_process(workdir))
        stop = stack.enter_context(StopSignal())

        with timed(timings, "store"):
            setup = run.Setup.of(cfg)
        cfg, say = setup.cfg, setup.say
        say(setup.headline())
        stack.enter_context(sharding.use(setup.mesh, cfg.sharding.rules))
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
        stack.callback(checkpoints.close)

        with timed(timings, "init or restore"):
            restored = checkpoints.choose(cfg.checkpoint.restore_step)
            if restored is None:
                train_state = setup.create_state()
            else:
                meta = checkpoints.meta(restored)
                checkpoint.check_compatible(meta, cfg, setup.data_identity())
                train_state = checkpoints.restore(restored, setup.abstract_state)
            jax.block_until_ready(train_state)
        first = restored or 0
        unigram = setup.unigram_loss()
        if first >= cfg.steps:
            rows = metrics.read(workdir / "metrics.jsonl")
            last = next((m for m in rows[::-1] if checkpoint.METRIC in m), {})
            say(
                f"finished: step {first} of {cfg.steps} is done. For more: "
                f"--config.steps=N above {first}, or another --workdir."
            )
            finish(setup, train_state, workdir, last, unigram)
            return last
        if restored is not None:
            say(f"resuming after step {restored} of {cfg.steps}")
            if later := checkpoints.set_aside_after(restored):
                aside = workdir / "abandoned"
                shutil.copy(workdir / "metrics.jsonl", aside / f"{later[-1]}.jsonl")
                say(f"moved the later checkpoints {later} to {aside}")
        check_space(workdir, state.size_bytes(setup.abstract_state))
        write_files(setup, workdir)

        with timed(timings, "compile"):
            batch = setup.to_device(setup.train_batches[first])
            train_step = jax.jit(
                step.make_train_step(setup.model, setup.tx, cfg, setup.vocab.size),
                donate_argnums=0,
                out_shardings=(state.shardings(setup.abstract_state), None),
            )
            train_step = train_step.lower(train_state, batch).compile()
            eval_step = jax.jit(step.make_eval_step(setup.model, cfg, setup.vocab.size))

        # ---- loop -----------------------------------------------------------------
        writer = metrics.Writer(workdir, first)
        stack.callback(writer.close)
        log = progress.StepLog(cfg, setup, writer, first)
        stack.callback(log.bar.close)

        def evaluate_now(at: int) -> dict:
            found = evaluate.heldout(setup, eval_step, train_state["params"])
            found["unigram_loss"] = unigram
            writer.write(at, **found)
            log.say(
                f"step {at}: held-out loss {found[checkpoint.METRIC]:.4f} "
                f"(unigram {unigram:.4f})"
            )
            return found

        last_eval, now = {}, first
        rows = metrics.read(workdir / "metrics.jsonl")
        if first and first % cfg.eval_every == 0 and checkpoint.METRIC not in rows[-1]:
            # A signal had stopped the run right before this evaluation.
            last_eval = evaluate_now(first)
        stop.waits = True
        data = pipeline.iterate(
            setup.train_batches, first, cfg.steps, prefetch=cfg.data.prefetch
        )
        for done, batch in data:
            began = time.perf_counter()
            batch = setup.to_device(batch)
            train_state, step_metrics = train_step(train_state, batch)
            now = done + 1
            log.add(now, step_metrics)
            if now == first + 1:
                log.drain()
                timings["first step"] = time.perf_counter() - began
                took = ", ".join(f"{k} {v:.2f} s" for k, v in timings.items())
                log.say(f"start-up: {took}")
            ends = now == cfg.steps or stop.signal is not None
            evaluates = now % cfg.eval_every == 0 and stop.signal is None
            evaluates = evaluates or now == cfg.steps
            saves = now % cfg.checkpoint.every == 0 or ends
            if not (evaluates or saves):
                continue
            log.drain()
            heldout = None
            if evaluates:
                last_eval = evaluate_now(now)
                heldout = last_eval[checkpoint.METRIC]
            if saves:
                writer.flush()
                meta = checkpoint.make_meta(cfg, now, setup.data_identity())
                checkpoints.save(now, train_state, meta, heldout)
            log.restart_clock()
            if ends:
                break
        data.close()
        checkpoints.wait()
        log.bar.close()
        if now < cfg.steps:
            say(f"{stop.signal}: saved step {now}; the same command goes on from there")
            return last_eval
        finish(setup, train_state, workdir, last_eval, unigram)
        return last_eval


def write_files(setup: run.Setup, workdir: pathlib.Path):
    """config.json and summary.txt."""
    if not setup.lead:
        return
    about = {
        "config": config.to_json(setup.cfg),
        "data": setup.data_identity(),
        "versions": report.versions(),
        "devices": [d.device_kind for d in jax.devices()],
    }
    replace(workdir / "config.json", json.dumps(about, indent=2) + "\n")
    replace(
        workdir / "summary.txt",
        report.summary(
            setup.cfg, setup.model, setup.abstract_state, setup.train_batches.shapes
        ),
    )


def replace(path: pathlib.Path, text: str):
    """Writes a file in one stroke."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def finish(setup: run.Setup, train_state, workdir: pathlib.Path, last: dict, unigram):
    """Pictures, samples and the closing lines of a finished run."""
    if not setup.lead:
        return
    rows = metrics.read(workdir / "metrics.jsonl")
    report.plot_loss(rows, workdir / "loss.png", unigram)
    if jax.process_count() == 1:  # other processes' shards are not at hand here
        evaluate.print_samples(setup, train_state["params"])
    loss = last.get(checkpoint.METRIC)
    print(f"checkpoint     {workdir / 'checkpoints'}")
    print(f"loss curve     {workdir / 'loss.png'}")
    if loss is not None:
        print(f"held-out loss  {loss:.4f} nats per target token")
        print(f"unigram loss   {unigram:.4f} on the same targets")


@contextlib.contextmanager
def only_process(workdir: pathlib.Path):
    """Creates the workdir and holds its lock; kill -9 releases it too."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("w")
    except OSError as e:
        raise OSError(
            f"--workdir={workdir} cannot be written ({e.strerror or e}). "
            "Give a directory you may write to."
        ) from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(
                f"--workdir={workdir} is in use by another running process. "
                "Wait for it, stop it, or give another --workdir."
            ) from e
        yield


@contextlib.contextmanager
def timed(timings: dict, name: str):
    began = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - began


class StopSignal:
    """Within: SIGTERM and SIGINT only set `signal`, once `waits` is True.

    Before that there is nothing to save and they end the process; so does a second
    SIGINT.
    """

    signal: str | None = None
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
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def check_space(workdir: pathlib.Path, needed: int):
    """Room for two checkpoints, before any long compile."""
    free = shutil.disk_usage(workdir).free
    if free < 2 * needed:
        raise OSError(
            f"--workdir={workdir} has {free / 2**20:,.0f} MiB free; two checkpoints "
            f"need {2 * needed / 2**20:,.0f} MiB. Free some space or give another one."
        )


if __name__ == "__main__":
    cli.run(main)
