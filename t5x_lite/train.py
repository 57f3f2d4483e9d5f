"""Train the model of a config file; run again, it resumes or says that it is done.

    python -m t5x_lite.train --config=configs/demo.py --workdir=runs/demo --preflight
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
import json  # noqa: E402
import pathlib  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from concurrent import futures  # noqa: E402

import jax  # noqa: E402

from t5x_lite import (  # noqa: E402
    checkpoint,
    cli,
    compatible,
    config,
    distributed,
    evaluate,
    guard,
    loop,
    metrics,
    preflight,
    report,
    run,
    samples,
    sharding,
    stages,
    state,
    step,
    stopping,
)
from t5x_lite.workdir import only_process, replace  # noqa: E402


def main(argv: list[str] | None = None) -> int | None:
    raw, flags = cli.parse_config(
        __doc__,
        argv,
        workdir="directory of the run",
        preflight=(False, "check all that the run needs, print a table, and stop"),
    )
    cfg, workdir = config.freeze(raw), pathlib.Path(flags.workdir)
    if flags.preflight:
        return preflight.main(cfg, workdir)
    train(cfg, workdir)


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
        loop.StopSignal() as stop,
        distributed.join(same, cfg.peers_timeout) as peers,
        contextlib.ExitStack() as together,
    ):
        if peers.lead:
            word = stack.enter_context(only_process(workdir))
            if word:
                print(word, flush=True)
        peers.check_shared(workdir)
        run.prepare_jax(cfg)
        peers.show()
        if peers.count > 1:
            timings["peers"] = time.perf_counter() - _STARTED - timings["import"]

        with timed(timings, "store"):
            if peers.lead:
                preflight.before_stores(cfg, workdir)
            setup = run.Setup.of(cfg)
        cfg, say = setup.cfg, setup.say
        peers.check_same(setup.data_identity() | setup.heldout_identity())
        say(setup.headline())
        stack.enter_context(sharding.use(setup.mesh, cfg.sharding.rules))
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint, peers=peers)
        stack.callback(checkpoints.close)
        together.push(lambda kind, *_: not_finite(kind, checkpoints, peers))

        # On NumPy alone, while XLA works.
        background = stack.enter_context(futures.ThreadPoolExecutor(1))
        baseline = background.submit(setup.unigram_loss)
        with timed(timings, "init or restore"):
            guard.settle(checkpoints, workdir, peers)
            asked = cfg.checkpoint.restore_step
            setup, restored, meta, train_state = begin(setup, checkpoints, asked)
            jax.block_until_ready(train_state)
        first, cfg = restored or 0, setup.cfg
        over = peers.from_lead(
            "patience", lambda: stopping.is_over(cfg.checkpoint, workdir, restored or 0)
        )
        if first >= cfg.steps or over:
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
            guard.go_on_from(restored, checkpoints, workdir, peers)
        if peers.lead:
            say(f"workdir: {preflight.space(cfg, workdir, setup.abstract_state)}")
            write_files(setup, workdir)

        with timed(timings, "compile"):
            batch = setup.to_device(setup.train_batches[first])
            beside = setup.beside()
            compiled = compile_step(setup, train_state, batch, beside)
            preflight.warn_of_memory(compiled, say)
            eval_step = jax.jit(step.make_eval_step(setup.model, cfg, setup.vocab.size))
        with timed(timings, "baseline"):
            unigram = baseline.result()

        # ---- loop -----------------------------------------------------------------
        running = loop.Loop(
            setup,
            lambda train_state, batch: compiled(train_state, batch, beside),
            *(eval_step, checkpoints, peers, stop, workdir),
            *(unigram, timings),
        )
        end = running.run(train_state, first, meta)
        while end.spike:
            end.state = None  # makes room
            guard.rewind(end.spike, end.watch, checkpoints, peers)
            _, restored, meta, train_state = begin(setup, checkpoints, -1)
            end = running.run(train_state, restored or 0, meta)
        checkpoints.wait()
        if not end.signal:
            finish(setup, end.state, workdir, end.heldout, unigram)
            return end.heldout
        name = signal.Signals(end.signal).name
        saved = "nothing" if end.saved is None else f"step {end.saved}"
        say(f"{name}: saved {saved}; the same command goes on from there")
    sys.exit(128 + end.signal)


def begin(setup: run.Setup, checkpoints: checkpoint.Checkpoints, asked: int):
    """The state to go on from -> (setup, its step or None, its meta, the state)."""

    def check(meta: dict):
        compatible.check_compatible(meta, setup.cfg, setup.data_identity())

    found = checkpoints.resume(asked, check, setup.abstract_state)
    restored, meta, train_state = found
    setup = stages.pinned(setup, meta)
    if restored is None:
        train_state = setup.create_state()
    elif train_state is None:
        train_state = setup.create_state(checkpoints.directory.parent, restored)
    return setup, restored, meta, train_state


def compile_step(setup: run.Setup, train_state, batch: dict, beside: dict):
    """The train step for arrays as these, or abstract ones; donates the state."""
    train_step = jax.jit(
        step.make_train_step(
            *(setup.model, setup.tx, setup.cfg, setup.vocab.size),
            *(setup.abstract_state, setup.teacher),
        ),
        donate_argnums=0,
        out_shardings=(state.shardings(setup.abstract_state), None),
    )
    return train_step.lower(train_state, batch, beside).compile()


def not_finite(kind, checkpoints: checkpoint.Checkpoints, peers: distributed.Peers):
    """All see it at once; the last save and the dump are whole before they stop."""
    if kind is FloatingPointError:
        checkpoints.wait()
        peers.barrier("not finite")


def write_files(setup: run.Setup, workdir: pathlib.Path):
    """config.json and summary.txt."""
    about = {
        "config": config.to_json(setup.cfg),
        "data": setup.data_identity(),
        "versions": report.versions(),
        "devices": [d.device_kind for d in jax.devices()],
        "lineage": stages.lineage(setup.cfg),
    }
    replace(workdir / "config.json", json.dumps(about, indent=2) + "\n")
    replace(
        workdir / "summary.txt",
        report.summary(
            setup.cfg, setup.model, setup.abstract_state, setup.train_batches.shapes
        ),
    )


def finish(setup: run.Setup, train_state, workdir: pathlib.Path, last: dict, unigram):
    """Pictures, samples and the closing lines of a finished run; all call it."""
    stages.finish(setup, train_state["params"], workdir, int(train_state["step"]))
    with evaluate.on_lead(setup, train_state["params"]) as params:
        if not setup.lead:
            return
        rows = metrics.read(workdir / "metrics.jsonl")
        report.plot_loss(rows, workdir / "loss.png", unigram)
        if params is not None:
            samples.print_samples(setup, params)
    loss = last.get(checkpoint.METRIC)
    print(f"checkpoint     {workdir / 'checkpoints'}")
    print(f"loss curve     {workdir / 'loss.png'}")
    if loss is not None:
        unit = "target token" if not setup.cfg.model.head else "labelled example"
        print(f"held-out loss  {loss:.4f} nats per {unit}")
        print(f"unigram loss   {unigram:.4f} on the same targets")


@contextlib.contextmanager
def timed(timings: dict, name: str):
    began = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - began


if __name__ == "__main__":
    cli.run(main)
