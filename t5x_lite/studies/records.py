"""results.jsonl: one line for each finished cell of a study."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

PARAMETERS = ("total", "embedding", "non_embedding")
AGAIN = "Remove the line and run the cell again."


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
      cell: name; its runs differ in the seed alone.
      overrides: dotted config key -> value, what makes the cell.
      seed: of the run.
      parameters: counts, "total", "embedding" and "non_embedding".
      training_flops: of the whole run.
      tokens: read in training (D).
      curve: pairs (step, training loss), thinned.
      heldout_loss: at the end, nats per predicted token; None if not measured.
      config: the resolved config as nested dicts.
      heldout: all numbers of the held-out evaluation; `score` is the one that
        heldout_loss repeats.
      labels: axis of the study -> label.
      wall_seconds: of the run, with compilation.
    """

    cell: str
    overrides: dict[str, Any]
    seed: int
    parameters: dict[str, int]
    training_flops: float
    tokens: float
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    heldout_loss: float | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    heldout: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    score: str = "loss"
    revision: str = "unknown"
    wall_seconds: float = 0.0
    hardware: str = "unknown"

    def train_loss(self) -> float:
        """Mean training loss of the last tenth of the steps, nats per token."""
        if not self.curve:
            return float("nan")
        steps, losses = np.asarray(self.curve, float).T
        return float(losses[steps >= 0.9 * steps[-1]].mean())

    def loss(self, kind: str = "heldout") -> float:
        """The loss that a study is about; NaN if this run has not measured it.

        Args:
          kind: "heldout", "train", or a name in `heldout`, as "prefix_loss".
        """
        if kind == "train":
            return self.train_loss()
        value = self.heldout_loss if kind == "heldout" else self.heldout.get(kind)
        return float("nan") if value is None else float(value)


def read_rows(path) -> list[dict[str, Any]]:
    """The lines as dicts; a last line torn by a kill is left out.

    Raises:
      ValueError: naming the file and the line that is no JSON object.
    """
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{_broken(path, number)}: {error}. {AGAIN}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{_broken(path, number)}. {AGAIN}")
        found.append(row)
    return found


def _broken(path, number: int) -> str:
    return f"{path}, line {number}, is no JSON object"


def read(path) -> list[Record]:
    """The records of a results.jsonl; of a cell and seed, the last line counts.

    Raises:
      FileNotFoundError, ValueError: naming the file, its line and the way out.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}. `python -m t5x_lite.study run` writes it, a line for "
            "each finished cell."
        )
    fields = {f.name: f for f in dataclasses.fields(Record)}
    needed = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    found = {}
    for number, row in enumerate(read_rows(path), 1):
        missing = [name for name in needed if name not in row]
        if missing:
            raise ValueError(
                f"{path}, line {number}, has no {', '.join(missing)}; needed are "
                f"{', '.join(needed)}. {AGAIN}"
            )
        for name, value in _numbers(row).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"{path}, line {number}: {name}={value!r} is no number. {AGAIN}"
                )
        record = Record(**{k: v for k, v in row.items() if k in fields})
        found[record.cell, record.seed] = record
    if not found:
        raise ValueError(
            f"{path} has no finished cell yet. `python -m t5x_lite.study run` adds "
            "them."
        )
    return list(found.values())


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line that must be numbers; a loss may be null."""
    losses = {"heldout_loss": row.get("heldout_loss"), **row.get("heldout", {})}
    told = {name: row[name] for name in ("seed", "training_flops", "tokens")}
    return told | {k: v for k, v in losses.items() if v is not None}
