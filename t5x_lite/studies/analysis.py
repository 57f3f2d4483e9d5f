"""What a study's records say: cells, and the scaling laws of each family of cells."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite.studies import compare, fit, powerlaws
from t5x_lite.studies.fit import Estimate, Points
from t5x_lite.studies.records import PARAMETERS, Record


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fit; see `python -m t5x_lite.study fit --help`."""

    loss: str = "heldout"
    parameters: str = "total"
    budgets: tuple[float, ...] = ()
    level: float = 0.95
    replicates: int = 1000
    delta: float = fit.DELTA


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs that differ in nothing but the seed.

    N, D, C are parameters, training tokens and training FLOPs; losses [seeds] in nats.
    """

    name: str
    family: str
    records: tuple[Record, ...]
    losses: np.ndarray
    N: float
    D: float
    C: float

    @property
    def mean(self) -> float:
        return float(self.losses.mean())

    def curve(self) -> list[tuple[float, float]]:
        """Mean training loss of the seeds at the steps of the first."""
        curves = [np.asarray(r.curve, float) for r in self.records if r.curve]
        if not curves:
            return []
        steps = curves[0][:, 0]
        losses = np.mean([np.interp(steps, *c.T) for c in curves], axis=0)
        return list(zip(steps.tolist(), losses.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Held:
    """A cell of the largest budget, predicted from the smaller ones."""

    cell: str
    N: float
    D: float
    C: float
    measured: float
    law: Estimate | None
    power: Estimate | None


@dataclasses.dataclass(frozen=True)
class LeaveOut:
    """The largest budget predicted from the rest.

    Attributes:
      distance: largest budget over the largest one used.
      nothing: lowest loss among the cells used, what "it stays as it is" predicts.
      missing: why there is no prediction; "" if there is one.
    """

    held: tuple[Held, ...] = ()
    used: int = 0
    distance: float = 1.0
    nothing: float = float("nan")
    missing: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """The laws of cells of one structure and objective. Strings say what is missing."""

    name: str
    cells: tuple[Cell, ...]
    points: Points
    cost: fit.Cost
    law: fit.Law | str
    slices: list[powerlaws.IsoFlop]
    isoflop: dict[str, powerlaws.Power | str]
    envelope: powerlaws.Envelope | None
    approach1: dict[str, powerlaws.Power | str]
    kaplan: dict[str, powerlaws.Power | str]
    leave_out: LeaveOut

    @property
    def scales(self) -> bool:
        """Whether sizes or budgets differ enough to ask for a law at all."""
        return _scales(self.points)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's loss between seeds, pooled over cells, in nats.

    `free` degrees of freedom; 0: no cell has two seeds. Cells need not be equally
    noisy: differences are judged by `compare.games_howell`.
    """

    sigma: float
    free: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Cells in the order of their mean loss, and p of their differences [cells, cells].

    Of more than `compare.MOST_PAIRED` cells, only pairs with the best one are tested.
    """

    name: str
    cells: tuple[Cell, ...]
    p: np.ndarray
    level: float

    def worse_than(self, cell: Cell) -> list[Cell]:
        """The cells whose loss is higher than this one's by more than noise."""
        i = self.cells.index(cell)
        sure = self.p[i] < 1 - self.level  # False where p is NaN
        return [self.cells[j] for j in range(i, len(self.cells)) if sure[j]]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that a study's records say.

    Attributes:
      dropped: runs whose loss is no finite number; they are in no cell.
      coverage: how many of the study's runs there are; "" if the study is not known.
    """

    settings: Settings
    cells: tuple[Cell, ...]
    families: tuple[Family, ...]
    noise: Noise
    dropped: tuple[Record, ...] = ()
    coverage: str = ""

    def comparable(self) -> dict[str, list[Cell]]:
        """Cells whose losses are of the same targets, two or more: name -> cells.

        A score of the study's own is one for all cells, a cell's own loss for those of
        one family and budget.
        """
        scores = {r.score for c in self.cells for r in c.records}
        common = self.settings.loss not in ("heldout", "train", "loss")
        if common or (self.settings.loss == "heldout" and "loss" not in scores):
            return {"all cells": list(self.cells)} if len(self.cells) > 1 else {}
        groups = {f.name: list(f.cells) for f in self.families}
        found = {}
        for name, group in groups.items():
            budgets = powerlaws.groups([c.C for c in group], powerlaws.SAME_BUDGET)
            for rows in budgets:
                C = group[rows[0]].C
                at = f"{name}, {C:.2g} FLOPs" if len(budgets) > 1 else name
                found[at] = [group[i] for i in rows]
        return {name: group for name, group in found.items() if len(group) > 1}

    @functools.cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparable cells, best first, with what their seeds say."""
        found = []
        for name, group in self.comparable().items():
            ordered = tuple(sorted(group, key=lambda c: c.mean))
            row = None if len(ordered) <= compare.MOST_PAIRED else 0
            p = compare.games_howell([c.losses for c in ordered], row)
            found.append(Comparison(name, ordered, p, self.settings.level))
        return tuple(found)


def _scales(p: Points) -> bool:
    return len(p.N) > 2 and max(np.max(v) / np.min(v) for v in (p.N, p.D, p.C)) > 1.5


def cells(records: Sequence[Record], settings: Settings) -> list[Cell]:
    """Groups records by cell, in their order.

    Raises:
      ValueError: no run has the loss that is asked for.
    """
    if settings.parameters not in PARAMETERS:
        raise ValueError(
            f"--parameters={settings.parameters}: allowed are {', '.join(PARAMETERS)}."
        )
    groups: dict[str, list[Record]] = {}
    for record in records:
        if np.isfinite(record.loss(settings.loss)):
            groups.setdefault(record.cell, []).append(record)
    if not groups:
        names = sorted({name for r in records for name in r.heldout})
        raise ValueError(
            f"--loss={settings.loss}: no run has measured it, or none is finite. "
            f"Allowed: {', '.join(['heldout', 'train', *names])}."
        )
    found = []
    for name, group in groups.items():
        first = group[0]
        found.append(
            Cell(
                name=name,
                family=family_of(first),
                records=tuple(group),
                losses=np.array([r.loss(settings.loss) for r in group]),
                N=float(first.parameters[settings.parameters]),
                D=float(first.tokens),
                C=float(first.training_flops),
            )
        )
    return found


def family_of(record: Record) -> str:
    """Structure and objective: losses of one family follow one law."""
    model = record.config.get("model", {})
    objective = dict(record.config.get("objective", {}))
    words = [str(model.get("structure", "")), str(objective.pop("name", ""))]
    if model.get("share_stacks"):
        words.insert(1, "shared stacks")
    if model.get("generator_width"):
        words.append("replaced tokens")
    knobs = ", ".join(f"{k} {v}" for k, v in sorted(objective.items()))
    name = ", ".join(filter(None, words)).replace("_", " ") or "all cells"
    return f"{name} ({knobs})" if knobs else name


def points_of(chosen: Sequence[Cell]) -> Points:
    """One point for each cell."""
    return Points(
        N=np.array([c.N for c in chosen]),
        D=np.array([c.D for c in chosen]),
        C=np.array([c.C for c in chosen]),
        loss=np.array([c.mean for c in chosen]),
    )


def analyse(records: Sequence[Record], settings: Settings) -> Analysis:
    """Everything `study fit` prints and `study report` draws."""
    found = cells(records, settings)
    names = dict.fromkeys(cell.family for cell in found)
    groups = {name: [c for c in found if c.family == name] for name in names}
    families = [family(*of, settings) for of in groups.items()]
    dropped = tuple(r for r in records if not np.isfinite(r.loss(settings.loss)))
    noise = noise_of(found)
    return Analysis(settings, tuple(found), tuple(families), noise, dropped)


def noise_of(found: Sequence[Cell]) -> Noise:
    """Pooled over cells."""
    free = sum(len(c.losses) - 1 for c in found)
    squares = sum(float(np.sum((c.losses - c.mean) ** 2)) for c in found)
    return Noise(float(np.sqrt(squares / free)) if free else float("nan"), free)


def family(name: str, chosen: Sequence[Cell], settings: Settings) -> Family:
    """All laws of one family."""
    noise = noise_of(chosen)
    points = points_of(chosen)
    how = (settings.replicates, settings.level)
    seeds = float(np.mean([len(c.losses) for c in chosen]))
    sigma = (noise.sigma / np.sqrt(seeds), noise.free) if noise.free else (0.0, 0)
    slices, isoflop = powerlaws.isoflop(points, *how, noise=sigma)
    curves = [powerlaws.smooth(c.curve()) for c in chosen]
    envelope, approach1 = powerlaws.envelope(curves, points, *how)
    return Family(
        name=name,
        cells=tuple(chosen),
        points=points,
        cost=fit.Cost.of(points),
        law=_law(points, settings),
        slices=slices,
        isoflop=isoflop,
        envelope=envelope,
        approach1=approach1,
        kaplan=powerlaws.kaplan(points, *how),
        leave_out=leave_out(chosen, points, settings),
    )


def _law(points: Points, settings: Settings) -> fit.Law | str:
    missing = fit.lacking(points)
    if not missing and not _scales(points):
        missing = "L(N, D) cannot be fitted: sizes and budgets are about the same."
    if missing:
        return missing
    return fit.fit(points, settings.replicates, settings.level, settings.delta)


def leave_out(chosen: Sequence[Cell], points: Points, settings: Settings) -> LeaveOut:
    """Predicts the cells of the largest budget from all others."""
    budgets = powerlaws.groups(points.C, powerlaws.SAME_BUDGET)
    if len(budgets) < 3:
        return LeaveOut(
            missing="Leaving out the largest budget needs 3 budgets; there "
            f"{'is' if len(budgets) == 1 else 'are'} {len(budgets)}."
        )
    top, rest = budgets[-1], np.concatenate(budgets[:-1])
    used = points.take(rest)
    law = _law(used, settings)
    power = powerlaws.kaplan(used, settings.replicates, settings.level)["C"]
    if isinstance(law, str) and isinstance(power, str):
        return LeaveOut(missing=f"Without the largest budget: {law} {power}")
    best = top[np.argmin(points.loss[top])]
    held = []
    for i in map(int, top):
        cell = chosen[i]
        by_law = None if isinstance(law, str) else law.prediction(cell.N, cell.D)
        by_power = None
        # Of a budget's cells, a power of compute speaks of the best alone.
        if isinstance(power, powerlaws.Power) and i == best:
            by_power = power.at(cell.C, seed=0)
        held.append(
            Held(cell.name, cell.N, cell.D, cell.C, cell.mean, by_law, by_power)
        )
    return LeaveOut(
        held=tuple(held),
        used=len(rest),
        distance=float(points.C[top].max() / used.C.max()),
        nothing=float(used.loss.min()),
    )


def frontier(of: Family, C: np.ndarray) -> dict[str, np.ndarray] | None:
    """Optimal N, D and loss at C FLOPs by the law: name -> [value, low, high], each
    as long as C."""
    law = of.law
    if isinstance(law, str):
        return None
    found = [law.optimum(float(c), of.cost) for c in C]
    return {name: np.array([f[name] for f in found]).T for name in ("N", "D", "loss")}


def as_json(analysis: Analysis) -> str:
    """fit.json: every number with its interval; a string where data are missing."""
    settings = analysis.settings
    told: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "cells": len(analysis.cells),
        "coverage": analysis.coverage,
        "dropped": [f"{r.cell}, seed {r.seed}" for r in analysis.dropped],
        "noise": dataclasses.asdict(analysis.noise),
        "families": {f.name: _family_json(f, settings) for f in analysis.families},
    }
    return json.dumps(_finite(told), indent=1) + "\n"


def _family_json(f: Family, settings: Settings) -> dict[str, Any]:
    law: Any = f.law
    if not isinstance(law, str):
        law = {
            "coefficients": law.coefficients(),
            "exponents": law.exponents(f.cost),
            "residual": law.sigma,
            "optimum": {f"{C:g}": law.optimum(C, f.cost) for C in settings.budgets},
        }
    return {
        "cells": len(f.cells),
        "flops": {"log_factor": f.cost.c, "power_of_N": f.cost.power},
        "parametric": law,
        "isoflop": {k: _power_json(v) for k, v in f.isoflop.items()},
        "envelope": {k: _power_json(v) for k, v in f.approach1.items()},
        "single": {k: _power_json(v) for k, v in f.kaplan.items()},
        "leave_out": dataclasses.asdict(f.leave_out),
    }


def _power_json(power: powerlaws.Power | str):
    if isinstance(power, str):
        return power
    return {"factor": power.factor, "exponent": power.exponent, "span": power.span}


def _finite(value):
    """Estimates as dicts; what is not finite as null, which JSON has."""
    if isinstance(value, Estimate):
        return _finite(value._asdict())
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
