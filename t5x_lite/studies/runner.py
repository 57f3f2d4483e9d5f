"""Runs the cells of a study, notes their results, goes on after a stop.

A cell's directory is ROOT/cells/NAME-sSEED-DIGEST: `train` is the workdir of its run,
others those of its adaptations, and `result.json` says that it is finished. A cell with
another config has another directory, so an old result is never taken for a new one.
"""

import contextlib
import json
import math
import os
import pathlib
import platform
import re
import time
import traceback
from typing import Any

import jax
import numpy as np

from t5x_lite import (
    __version__,
    checkpoint,
    cli,
    compatible,
    evaluate,
    metrics,
    sharding,
    step,
    stopping,
    train,
)
from t5x_lite import run as run_lib
from t5x_lite.config import Config
from t5x_lite.studies import costs, grid
from t5x_lite.studies.progress import Progress
from t5x_lite.workdir import only_process, replace

CURVE = 200  # most points of a noted loss curve


def directory(root, cell: grid.Cell) -> pathlib.Path:
    """Where a cell's runs and result are."""
    return pathlib.Path(root) / "cells" / cell.key


def result(root, cell: grid.Cell) -> dict | None:
    """The record of a finished cell, else None."""
    path = directory(root, cell) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def gather(root, cells: list[grid.Cell]) -> pathlib.Path:
    """Writes ROOT/results.jsonl: the records of all finished cells, in their order."""
    rows = [row for cell in cells if (row := result(root, cell)) is not None]
    path = pathlib.Path(root) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tasks of an array may write at the same time; each writes all that it sees.
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return path


def run_all(root, cells: list[grid.Cell], wanted: list[grid.Cell]) -> list[str]:
    """Runs the wanted cells that are not finished, one after the other.

    A cell that fails is told of and left; one that another process runs is left too.

    Args:
      cells: of the whole study, for results.jsonl.

    Returns:
      One line for each wanted cell that is not finished at the end.

    Raises:
      SystemExit: after SIGTERM or Ctrl-C, as `train.train`.
    """
    left = []
    began, spent = time.perf_counter(), 0.0
    with Progress(root, wanted) as progress:
        for cell in wanted:
            if result(root, cell) is not None:
                continue
            where = directory(root, cell)
            progress.now(cell)
            try:
                with log_to(where / "log.txt"):
                    row = run_cell(cell, where)
            except SystemExit:
                progress.say(
                    f"stopped: {cell.name}, seed {cell.seed}; its checkpoint is saved, "
                    "the same command goes on"
                )
                raise
            except Exception as error:
                # An ill-fated cell may not end a night's study; the others go on.
                text = f"{cell.name}, seed {cell.seed}: {cli.message_of(error)}"
                progress.say(f"failed: {text}")
                left.append(f"{text} (see {where / 'log.txt'})")
                continue
            spent += row["session_seconds"]
            gather(root, cells)
            progress.done(cell, row)
    gather(root, cells)
    took = time.perf_counter() - began
    if spent:
        print(
            f"runs {spent:,.1f} s, study {took:,.1f} s: overhead "
            f"{100 * (took / spent - 1):.2f} %"
        )
    return left


@contextlib.contextmanager
def log_to(path: pathlib.Path):
    """What Python prints goes to the end of this file; an error's traceback too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except Exception:
                file.write(traceback.format_exc())
                raise


def run_cell(cell: grid.Cell, where: pathlib.Path) -> dict:
    """Trains, evaluates and adapts one cell, or goes on with it -> its record."""
    began = time.perf_counter()
    with only_process(where):
        clock = Clock(where / "seconds.json")
        with clock:
            heldout = trained(cell.config, where / "train")
            found = own_scores(heldout)
            for name, overrides in cell.study.evaluations.items():
                cfg = costs.resolved(cell.config, dict(overrides))
                scores = evaluated(cfg, where / "train")
                found |= {f"{name}_{k}": v for k, v in scores.items()}
            for name, adaptation in cell.study.adaptations.items():
                scores = adapted(cell.config, adaptation, where, name)
                found |= {f"{name}_{k}": v for k, v in scores.items()}
        row = record(cell, where, found) | {"wall_seconds": clock.total}
        row["session_seconds"] = time.perf_counter() - began
        replace(where / "result.json", json.dumps(row) + "\n")
    return row


class Clock:
    """Seconds spent within, over all sessions that ended by themselves or a signal."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.total = float(json.loads(path.read_text())) if path.exists() else 0.0

    def __enter__(self):
        self._began = time.perf_counter()

    def __exit__(self, *_):
        self.total += time.perf_counter() - self._began
        replace(self.path, json.dumps(round(self.total, 3)))


def trained(cfg: Config, workdir: pathlib.Path) -> dict:
    """The last held-out metrics of a run, which is trained or resumed if needed.

    With config.checkpoint.patience, which keeps the best, those of the best.
    """
    if cfg.steps not in saved_steps(cfg, workdir):
        train.train(cfg, workdir)
    if not cfg.checkpoint.patience:
        return last_heldout(workdir)
    at = stopping.best(
        cfg.checkpoint, stopping.scores(cfg.checkpoint, workdir, cfg.steps)
    )
    rows = metrics.read(workdir / "metrics.jsonl")
    return next(row for row in rows if row["step"] == at and checkpoint.METRIC in row)


def saved_steps(cfg: Config, workdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    if not (workdir / "checkpoints").exists():
        return []
    with contextlib.closing(
        checkpoint.Checkpoints(workdir, cfg.checkpoint, reader=True)
    ) as there:
        return there.steps()


def last_heldout(workdir: pathlib.Path) -> dict:
    rows = metrics.read(workdir / "metrics.jsonl")
    return next((row for row in rows[::-1] if checkpoint.METRIC in row), {})


def own_scores(heldout: dict) -> dict[str, float]:
    """{"loss": ..., "accuracy": ...} of a line of held-out metrics.

    And "error" = 1 - accuracy, of which less is better, too.
    """
    named = {
        k.removeprefix("heldout_"): v
        for k, v in heldout.items()
        if k.startswith("heldout_")
    }
    if "accuracy" in named:
        named["error"] = 1.0 - named["accuracy"]
    if "unigram_loss" in heldout:
        named["unigram_loss"] = heldout["unigram_loss"]
    return named


def evaluated(cfg: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Held-out scores of a finished run under another config: of data or objective."""
    _, _, params, _, meta = checkpoint.load_run(workdir)
    setup = run_lib.Setup.of(cfg)
    compatible.check_vocab(meta, setup.vocab)
    with sharding.use(setup.mesh, setup.cfg.sharding.rules):
        params = carried(params, setup.abstract_state["params"])
        words = setup.vocab.size
        eval_step = jax.jit(step.make_eval_step(setup.model, setup.cfg, words))
        return own_scores(evaluate.heldout(setup, eval_step, params))


def adapted(
    cfg: Config, adaptation: grid.Adaptation, where: pathlib.Path, name: str
) -> dict[str, float]:
    """Held-out scores after a run that starts from the parameters of WHERE/train."""
    cfg, workdir = costs.resolved(cfg, dict(adaptation.overrides)), where / name
    if not saved_steps(cfg, workdir):
        _, _, params, _, meta = checkpoint.load_run(where / "train")
        setup = run_lib.Setup.of(cfg)
        compatible.check_vocab(meta, setup.vocab)
        with sharding.use(setup.mesh, setup.cfg.sharding.rules):
            state = setup.create_state()
            state["params"] = carried(params, state["params"], adaptation.anew)
            meta = checkpoint.make_meta(setup.cfg, 0, setup.data_identity())
            with contextlib.closing(
                checkpoint.Checkpoints(workdir, setup.cfg.checkpoint)
            ) as first:
                best = setup.cfg.checkpoint
                worst = math.inf if best.metric_mode == "min" else -math.inf
                first.save(0, state, meta, {best.metric: worst})
                first.wait()
    return own_scores(trained(cfg, workdir))


def carried(old: dict, fresh: dict, anew: str = "") -> dict:
    """`fresh` with the parameters of `old` that have the same name and shape.

    Of ELECTRA the discriminator's stack is taken.

    Args:
      fresh: arrays, or their abstract shapes, if every one must be in `old`.
      anew: regex of names that stay as in `fresh`.

    Raises:
      ValueError: not even the embedding fits, or one that must.
    """
    given = {}
    for path, leaf in jax.tree.leaves_with_path(old):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        given[name] = leaf
        given[name.removeprefix("discriminator/")] = leaf
        given[name.replace("discriminator/project", "inputs/project")] = leaf

    def take(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if anew and re.fullmatch(anew, name):
            return leaf
        if name in given and given[name].shape == leaf.shape:
            return jax.device_put(given[name], leaf.sharding)
        if name == "embedding" or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                "the model of an evaluation or adaptation does not fit the cell's: "
                f"{name} {leaf.shape}. Keep the vocabulary and the shape; only an "
                "adaptation may add parameters."
            )
        return leaf

    return jax.tree.map_with_path(take, fresh)


def record(cell: grid.Cell, where: pathlib.Path, heldout: dict) -> dict[str, Any]:
    """The cell's line of results.jsonl.

    Raises:
      ValueError: `Study.score` is none of the scores there are.
    """
    score = cell.study.score
    if score not in heldout:
        raise ValueError(
            f"Study.score={score!r} is none of this cell's scores: "
            f"{', '.join(sorted(heldout))}."
        )
    rows = metrics.read(where / "train" / "metrics.jsonl")
    curve = [[row["step"], row["loss"]] for row in rows if "loss" in row]
    cost = grid.cost(cell)
    about = json.loads((where / "train" / "config.json").read_text())
    revision = about["versions"]["git"]
    return {
        "cell": cell.name,
        "labels": cell.labels,
        "overrides": cell.overrides,
        "seed": cell.seed,
        "config": about["config"],
        "revision": __version__ if revision == "unknown" else revision,
        "parameters": cost.parameters,
        "training_flops": cost.training_flops,
        "adaptation_flops": grid.adaptation_flops(cell),
        "tokens": cost.tokens,
        "steps": cost.steps,
        "curve": thinned(curve),
        "heldout_loss": heldout[score],
        "score": score,
        "heldout": heldout,
        "hardware": hardware(about["devices"]),
    }


def thinned(curve: list, most: int = CURVE) -> list:
    """At most `most` points of [[step, loss], ...], each the mean of its neighbours."""
    if len(curve) <= most:
        return curve
    return [
        [int(part[-1, 0]), round(float(part[:, 1].mean()), 6)]
        for part in np.array_split(np.asarray(curve, float), most)
    ]


def hardware(devices: list[str]) -> str:
    """'2 x NVIDIA H200', '2 cores, x86_64'"""
    kinds = sorted(set(devices))
    if kinds == ["cpu"]:
        return f"{cores()} CPU core{'s' * (cores() > 1)}, {platform.machine()}"
    return ", ".join(f"{devices.count(kind)} x {kind}" for kind in kinds)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
