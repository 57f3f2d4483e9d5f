"""Early stopping (Prechelt 1998): no better evaluation for `checkpoint.patience` ones.

Derived from metrics.jsonl alone, so a run that was killed stops where it would have.
"""

import pathlib

from t5x_lite import heads, metrics, task_metrics
from t5x_lite.checkpoint import METRIC
from t5x_lite.config import CheckpointConfig, Config, nearest
from t5x_lite.data import custom_tasks, mixture


def names(cfg: Config) -> list[str]:
    """The held-out metrics that every evaluation of a run writes, counts left out."""
    m, found = cfg.model, [METRIC]
    if not heads.is_number(m):
        found.append("heldout_accuracy")
    if not m.head:
        found += ["heldout_perplexity", "heldout_z_loss"]
    if cfg.data.task_format == "head" and not cfg.eval_batches:
        for name in cfg.data.tasks:
            task = custom_tasks.find(name, cfg.data.custom_tasks)
            found += [f"heldout_{metric}" for metric in task.metrics]
    others = dict(
        tokens=m.head and cfg.loss.lm_weight,
        classes=m.classes and not m.head,
        entities=m.d_entity,
        replaced=m.generator_width,
    )
    for name, there in others.items():
        found += [f"heldout_{name}_{of}" for of in ("loss", "accuracy") if there]
    sets = {*cfg.data.tasks, *(s.name for s in mixture.sources_of(cfg, "heldout"))}
    if len(sets) > 1:
        found += [f"{key}/{name}" for name in sorted(sets) for key in found]
    return list(dict.fromkeys(found))


def check(cfg: Config):
    """Refuses what an evaluation, maybe hours away, could not compute.

    Raises:
      ValueError: config.checkpoint.metric is none that a run of this config writes.
      ModuleNotFoundError: a metric of a head's task needs a package.
    """
    known, asked = names(cfg), cfg.checkpoint.metric
    if asked not in known:
        whole = ""
        if cfg.model.head and cfg.eval_batches:
            whole = (
                " The metrics of a task are of its whole split: "
                "config.eval_batches=0 writes them."
            )
        raise ValueError(
            f"config.checkpoint.metric={asked!r} is none that an evaluation of this "
            f"run writes{nearest(asked, known)} Allowed: {', '.join(known)}."
            f"{whole}"
        )
    if cfg.data.task_format == "head" and not cfg.eval_batches:
        for name in cfg.data.tasks:
            task_metrics.check(custom_tasks.find(name, cfg.data.custom_tasks).metrics)


def scores(cfg: CheckpointConfig, workdir: pathlib.Path, upto: int) -> dict[int, float]:
    """Step -> config.checkpoint.metric of each evaluation up to a step.

    Raises:
      ValueError: the evaluations have no such metric.
    """
    path = workdir / "metrics.jsonl"
    rows = metrics.read(path) if path.exists() else []
    evaluations = [r for r in rows if "heldout_loss" in r and r["step"] <= upto]
    if missing := [r for r in evaluations if cfg.metric not in r]:
        have = sorted(k for k in missing[0] if k.startswith("heldout_"))
        raise ValueError(
            f"config.checkpoint.metric={cfg.metric!r} is not in the evaluation of step "
            f"{missing[0]['step']}, which has {have}. Set it to one of them."
        )
    return {r["step"]: float(r[cfg.metric]) for r in evaluations}


def best(cfg: CheckpointConfig, found: dict[int, float]) -> int | None:
    """The step with the best score, the first of equal ones; None of none."""
    sign = 1.0 if cfg.metric_mode == "min" else -1.0
    return min(found, key=lambda step: (sign * found[step], step), default=None)


def is_over(cfg: CheckpointConfig, workdir: pathlib.Path, step: int) -> bool:
    """Have `patience` evaluations up to `step` brought nothing better?"""
    if not cfg.patience:
        return False
    found = scores(cfg, workdir, step)
    top = best(cfg, found)
    return top is not None and sum(s > top for s in found) >= cfg.patience
