"""Train the model of a config file; run again, it resumes or says that it is done.

    python -m t5x_lite.train --config=configs/demo.py --workdir=runs/demo
    python -m t5x_lite.train --config=configs/demo.py:smoke --workdir=runs/smoke \\
        --config.steps=10 --config.optim.learning_rate=0.003

The workdir gets checkpoints/, metrics.jsonl, tensorboard/, config.json, summary.txt and
loss.png. SIGTERM and Ctrl-C save and exit with 143 and 130; after kill -9 the same
command goes on from the last checkpoint with the very losses an uninterrupted run would
have had.

Several processes, one command for each, make one run: see launch/ and
t5x_lite/distributed.py.
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
from concurrent import futures  # noqa: E402

import jax  # noqa: E402

from t5x_lite import (  # noqa: E402
    checkpoint,
    cli,
    config,
    distributed,
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
from t5x_lite.watchdog import Watchdog  # noqa: E402


def main(argv: list[str] | None = None):
    raw, flags = cli.parse_config(__doc__, argv, workdir="directory of the run")
    train(config.freeze(raw), pathlib.Path(flags.workdir))


def train(cfg: config.Config, workdir: pathlib.Path) -> dict:
    """Trains until `cfg.steps`; returns the last line of held-out metrics.

    Raises:
      SystemExit: with 128 + its number after a signal has stopped the run and its
        checkpoint is saved: what starts runs again takes 0 for the end.
    """
    # ---- start-up -----------------------------------------------------------------
    timings = {"import": time.perf_counter() - _STARTED}

    def same() -> dict:
        return distributed.identity(config=config.to_json(cfg))

    with (
        contextlib.ExitStack() as stack,
        StopSignal() as stop,
        distributed.join(same, cfg.peers_timeout) as peers,
        contextlib.ExitStack() as together,
    ):
        if peers.lead:
            stack.enter_context(only_process(workdir))
        peers.check_shared(workdir)
        run.prepare_jax(cfg)
        peers.show()
        if peers.count > 1:
            timings["peers"] = time.perf_counter() - _STARTED - timings["import"]

        with timed(timings, "store"):
            setup = run.Setup.of(cfg)
        cfg, say = setup.cfg, setup.say
        heldout_store = setup.heldout_batches.store.fingerprint
        peers.check_same(setup.data_identity() | {"heldout": heldout_store})
        say(setup.headline())
        stack.enter_context(sharding.use(setup.mesh, cfg.sharding.rules))
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
        stack.callback(checkpoints.close)
        # All see a loss that is not finite; the last save ends before they stop for it.
        together.push(
            lambda kind, *_: kind is FloatingPointError and checkpoints.wait()
        )

        # On NumPy alone, while XLA works.
        background = stack.enter_context(futures.ThreadPoolExecutor(1))
        baseline = background.submit(setup.unigram_loss)
        with timed(timings, "init or restore"):
            asked = cfg.checkpoint.restore_step
            restored = peers.from_lead("restore", lambda: checkpoints.choose(asked))
            if restored is None:
                train_state = setup.create_state()
            else:
                meta = checkpoints.meta(restored)
                checkpoint.check_compatible(meta, cfg, setup.data_identity())
                if meta.get("params_only"):
                    train_state = setup.create_state(workdir, restored)
                else:
                    train_state = checkpoints.restore(restored, setup.abstract_state)
            jax.block_until_ready(train_state)
        first = restored or 0
        if first >= cfg.steps:
            rows = metrics.read(workdir / "metrics.jsonl")
            last = next((m for m in rows[::-1] if checkpoint.METRIC in m), {})
            say(
                f"finished: step {first} of {cfg.steps} is done. For more: "
                f"--config.steps=N above {first}, or another --workdir."
            )
            finish(setup, train_state, workdir, last, baseline.result())
            return last
        if restored is not None:
            again = "resuming after" if restored else "starting from the parameters of"
            say(f"{again} step {restored} of {cfg.steps}")
            go_on_from(restored, checkpoints, workdir, peers)
        if peers.lead:
            check_space(workdir, state.size_bytes(setup.abstract_state))
            write_files(setup, workdir)

        with timed(timings, "compile"):
            batch = setup.to_device(setup.train_batches[first])
            train_step = jax.jit(
                step.make_train_step(
                    setup.model, setup.tx, cfg, setup.vocab.size, setup.abstract_state
                ),
                donate_argnums=0,
                out_shardings=(state.shardings(setup.abstract_state), None),
            )
            train_step = train_step.lower(train_state, batch).compile()
            eval_step = jax.jit(step.make_eval_step(setup.model, cfg, setup.vocab.size))
        with timed(timings, "baseline"):
            unigram = baseline.result()

        # ---- loop -----------------------------------------------------------------
        writer = metrics.Writer(workdir, first, active=peers.lead)
        stack.callback(writer.close)
        log = progress.StepLog(cfg, setup, writer, first, workdir, timings)
        stack.callback(log.bar.close)
        profiler = progress.Profiler(cfg, log, workdir)
        stack.callback(profiler.close)

        def evaluate_now(at: int) -> dict:
            found = evaluate.heldout(setup, eval_step, train_state["params"])
            found["unigram_loss"] = unigram
            writer.write(at, **found)
            log.say(
                f"step {at}: held-out loss {found[checkpoint.METRIC]:.4f} "
                f"(unigram {unigram:.4f})"
            )
            return found

        def evaluation_is_due() -> bool:
            # A signal had stopped the run right before this evaluation.
            if not first or first % cfg.eval_every:
                return False
            rows = metrics.read(writer.path)
            return not any(r["step"] == first and checkpoint.METRIC in r for r in rows)

        last_eval, now, stopped = {}, first, 0
        if peers.from_lead("evaluation", evaluation_is_due):
            last_eval = evaluate_now(first)
        agree = distributed.Agreement(setup.mesh)
        watchdog = Watchdog(cfg.slow_step, workdir / f"stacks-{peers.rank}.txt")
        stack.callback(watchdog.close)
        stop.waits = True
        data = pipeline.iterate(
            setup.train_batches, first, cfg.steps, prefetch=cfg.data.prefetch
        )
        placed = ((done, setup.to_device(batch)) for done, batch in data)
        for done, batch in log.waiting(placed):
            watchdog.step(done)
            profiler.before(done)
            began = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                train_state, step_metrics = train_step(train_state, batch)
            now = done + 1
            log.add(now, step_metrics)
            if now == first + 1:
                log.drain()
                timings["first step"] = time.perf_counter() - began
                log.started()
            stopped = agree(stop.signal)
            ends = now == cfg.steps or stopped > 0
            evaluates = now % cfg.eval_every == 0 and not stopped
            evaluates = evaluates or now == cfg.steps
            saves = now % cfg.checkpoint.every == 0 or ends
            if not (evaluates or saves):
                continue
            watchdog.rest()
            log.drain()
            heldout = None
            if evaluates:
                last_eval = evaluate_now(now)
                heldout = last_eval[checkpoint.METRIC]
            if saves:
                with log.saving():
                    writer.flush()
                    meta = checkpoint.make_meta(cfg, now, setup.data_identity())
                    checkpoints.save(now, train_state, meta, heldout)
            log.restart_clock()
            if ends:
                break
        profiler.close()
        data.close()
        checkpoints.wait()
        log.bar.close()
        if now == cfg.steps:
            finish(setup, train_state, workdir, last_eval, unigram)
            return last_eval
        name = signal.Signals(stopped).name
        say(f"{name}: saved step {now}; the same command goes on from there")
    sys.exit(128 + stopped)


def write_files(setup: run.Setup, workdir: pathlib.Path):
    """config.json and summary.txt."""
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


def go_on_from(
    step: int,
    checkpoints: checkpoint.Checkpoints,
    workdir: pathlib.Path,
    peers: distributed.Peers,
):
    """Sets what came after `step` aside, with a word about it."""
    later = peers.from_lead("aside", lambda: checkpoints.set_aside_after(step))
    if later and peers.lead:
        aside = workdir / "abandoned"
        shutil.copy(workdir / "metrics.jsonl", aside / f"{later[-1]}.jsonl")
        print(f"moved the later checkpoints {later} to {aside}", flush=True)
    elif later:
        checkpoints.reload()


def replace(path: pathlib.Path, text: str):
    """Writes a file in one stroke."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def finish(setup: run.Setup, train_state, workdir: pathlib.Path, last: dict, unigram):
    """Pictures, samples and the closing lines of a finished run; all call it."""
    with evaluate.on_lead(setup, train_state["params"]) as params:
        if not setup.lead:
            return
        rows = metrics.read(workdir / "metrics.jsonl")
        report.plot_loss(rows, workdir / "loss.png", unigram)
        if params is not None:
            evaluate.print_samples(setup, params)
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
        lock = (workdir / "lock").open("a")
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
