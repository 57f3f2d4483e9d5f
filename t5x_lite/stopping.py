"""Early stopping (Prechelt 1998): no better evaluation for `checkpoint.patience` ones.

Derived from metrics.jsonl alone, so a run that was killed stops where it would have.
"""

import pathlib

from t5x_lite import metrics
from t5x_lite.config import CheckpointConfig


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
