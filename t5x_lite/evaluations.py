"""What `python -m t5x_lite.evaluate` computes, each kept in a file of its own."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5x_lite import evaluate_tasks, prompting, run, task_metrics
from t5x_lite.data import custom_tasks, task_batches, task_readers
from t5x_lite.settings import Settings
from t5x_lite.workdir import replace

# (metrics, a row for each example) of a checkpoint's parameters; None = not the lead.
Result = tuple[dict[str, float], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One evaluation of a checkpoint.

    Attributes:
        name: of its file, evaluation-STEP-NAME.json; "" = evaluation-STEP.json.
        asked: what decides the result beside the checkpoint; written down with it.
        compute: whole parameters of the setup -> `Result`.
        together: all processes compute it; else the lead alone.
    """

    name: str
    asked: dict[str, Any]
    compute: Callable[[run.Setup, dict], Result]
    together: bool = False

    def path(self, workdir, step: int) -> pathlib.Path:
        parts = [str(step), self.name] if self.name else [str(step)]
        return pathlib.Path(workdir) / f"evaluation-{'-'.join(parts)}.json"

    def done(self, workdir, step: int) -> dict | None:
        """What was computed before, if it was asked the same way."""
        path = self.path(workdir, step)
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        same = all(found.get(k) == v for k, v in self.asked.items())
        return found if found.get("step") == step and same else None

    def write(self, workdir, step: int, result: Result) -> dict:
        """Writes the metrics, and beside them what was answered, one JSON a line."""
        metrics, rows = result
        path = self.path(workdir, step)
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            replace(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
        found = {"step": step} | self.asked | metrics
        replace(path, json.dumps(found, indent=2) + "\n")
        return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """How tasks are evaluated: the flags of the command.

    Attributes:
        tasks: names; () = the run's own.
        split: "dev" or "test".
        limit: of examples that a model writes for or ranks; 0 = all.
        beams, max_length: of what is written; max_length 0 = config.data's
            targets_length.
        shots, norm, seed: of prompts, see `prompting.Shots`.
    """

    tasks: tuple[str, ...] = ()
    split: str = "dev"
    limit: int = 0
    beams: int = 1
    max_length: int = 0
    shots: int = 0
    norm: str = "sum"
    seed: int = 0


def of_tasks(setup: run.Setup, asked: Asked) -> list[Job]:
    """A job for each task: by its head, in writing, or by ranking what it could say.

    Raises:
        ValueError: a task that this run cannot do.
    """
    cfg, names = setup.cfg, asked.tasks or setup.cfg.data.tasks
    if cfg.data.tasks and (asked.shots or asked.norm != "sum"):
        raise ValueError(
            f"--shots={asked.shots}, --norm={asked.norm}: this run was trained on "
            f"{', '.join(cfg.data.tasks)} and is not asked by prompts. Leave them out."
        )
    jobs = []
    for name in names:
        task = custom_tasks.find(name, cfg.data.custom_tasks)
        task_metrics.check(task.metrics)  # before hours of writing
        if not cfg.data.tasks:
            how = dict(shots=asked.shots, norm=asked.norm, limit=asked.limit)
            if asked.shots:
                how["seed"] = asked.seed
            about = f"{name}-{asked.split}-{asked.shots}shot-{asked.norm}"
            jobs.append(
                Job(about, _about(setup, name, asked, how), _ranked(name, asked))
            )
            continue
        how, make = {}, _head
        if cfg.data.task_format == "text":
            length = asked.max_length or cfg.data.targets_length
            how = dict(beams=asked.beams, limit=asked.limit, max_length=length)
            make = _written
        about, together = f"{name}-{asked.split}", make is _head
        job = Job(about, _about(setup, name, asked, how), make(name, asked), together)
        jobs.append(job)
    return jobs


def _about(setup: run.Setup, name: str, asked: Asked, how: dict) -> dict[str, Any]:
    where = setup.cfg.data.task_dir
    return {"task": name, "split": asked.split, "task_dir": where} | how


def _batches(setup: run.Setup, name: str, split: str) -> task_batches.TaskBatches:
    if split == "dev" and name in setup.cfg.data.tasks:
        found = setup.heldouts[name]
        assert isinstance(found, task_batches.TaskBatches)
        return found
    return task_batches.batches(
        *(setup.cfg, setup.vocab, (name,), split, setup.train_batches.rows),
        evaluation=True,
    )


def _head(name: str, asked: Asked):
    def compute(setup: run.Setup, params: dict) -> Result:
        task = custom_tasks.find(name, setup.cfg.data.custom_tasks)
        batches = _batches(setup, name, asked.split)
        made = batches.made
        assert isinstance(made, task_batches.HeadExamples)
        answers = evaluate_tasks.of_head(setup, made, batches, params)
        return answers.metrics(task) | {"examples": len(answers.targets)}, answers.texts

    return compute


def _written(name: str, asked: Asked):
    def compute(setup: run.Setup, params: dict) -> Result:
        task = custom_tasks.find(name, setup.cfg.data.custom_tasks)
        made = _batches(setup, name, asked.split).made
        assert isinstance(made, task_batches.TextExamples)
        length = asked.max_length or setup.cfg.data.targets_length
        answers = evaluate_tasks.of_text(
            setup.model,
            params,
            setup.vocab,
            made,
            task,
            Settings(max_length=length, beams=asked.beams),
            limit=asked.limit,
            progress=True,
        )
        return answers.metrics(task) | {"examples": len(answers.targets)}, answers.texts

    return compute


def _ranked(name: str, asked: Asked):
    def compute(setup: run.Setup, params: dict) -> Result:
        data = setup.cfg.data
        task = custom_tasks.find(name, data.custom_tasks)
        records = task_readers.read(task.source, data.task_dir, asked.split)
        examples = []
        if asked.shots:
            examples = task_readers.read(task.source, data.task_dir, "train")
        answers = prompting.rank(
            setup.model,
            params,
            setup.vocab,
            setup.cfg,
            task,
            evaluate_tasks.spread(records, asked.limit),
            examples,
            prompting.Shots(asked.shots, asked.seed, asked.norm),
            progress=True,
        )
        return answers.metrics(task) | {"examples": len(answers.targets)}, answers.texts

    return compute


def of_pairs(folder: str, limit: int) -> Job:
    """BLiMP; of each paradigm the first `limit` pairs, 0 = all."""

    def compute(setup: run.Setup, params: dict) -> Result:
        records = prompting.read_pairs(folder, limit)
        given = setup.model, params, setup.vocab, setup.cfg, records
        metrics, rows = prompting.minimal_pairs(*given, progress=True)
        return metrics | {"examples": len(rows)}, rows

    about = {"task": "blimp", "folder": str(folder), "limit": limit}
    return Job("blimp", about, compute)


def bits_per_byte(setup: run.Setup, found: dict[str, float]) -> dict[str, float]:
    """Of a causal language model's held-out text; {} for any other.

    The tokens' loss in bits over the UTF-8 bytes that they stand for, ends of documents
    counted in the loss.
    """
    cfg = setup.cfg
    if cfg.model.structure != "decoder" or cfg.data.tasks:
        return {}
    if cfg.objective["name"] != "causal_lm":
        return {}
    count = 0
    for batches in setup.heldouts.values():
        for i in setup.heldout_steps(batches):
            stream = batches.whole(i)["main"]
            for ids, weights in zip(stream["targets"], stream["weights"], strict=True):
                text = setup.vocab.decode(ids[weights > 0], inside=True)
                count += len(text.encode())
    nats = found["heldout_loss"] * found["heldout_tokens"]
    return {"heldout_bits_per_byte": nats / np.log(2) / count} if count else {}


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Lines for people: a metric of a task at a step each."""
    about = ("step", "task", "split", "shots", "norm", "limit", "seed", "beams")
    hidden = {*about, "max_length", "examples"}
    head = ("step", "task", "split", "metric", "value")
    rows: list[tuple[str, ...]] = [head]
    for found in results:
        where = [str(found.get(key, "")) for key in head[:3]]
        if found.get("shots") is not None:
            where[1] += f", {found['shots']} shots, {found['norm']}"
        for name, value in found.items():
            if name not in hidden and isinstance(value, int | float):
                rows.append((*where, name, f"{value:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [c.ljust(w) for c, w in zip(row[:-1], widths, strict=False)]
        yield "  ".join([*cells, row[-1].rjust(widths[-1])])
