"""A study: a base config, axes of overrides, seeds; and its cells, one run each.

    def get_study():
        return grid.Study(
            name="depth",
            config="configs/gpt2.py:study",
            axes={"depth": {f"l{d}": {"model.decoder_layers": d} for d in (1, 2, 4)}},
            seeds=(0, 1, 2),
        )

in `configs/studies/depth/config.py` makes nine cells, l1 to l4 with seeds 0 to 2.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from t5x_lite import cli, config
from t5x_lite.config import Config
from t5x_lite.studies import costs

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A second run that starts from the parameters of a finished one.

    Parameters of the same name and shape are taken over (of ELECTRA those of the
    discriminator), the optimizer starts anew.

    Attributes:
      overrides: on the cell's config: objective, steps, learning rate ...
      anew: regex of parameters that are drawn anew all the same, a head, say.
    """

    overrides: Overrides
    anew: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What `get_study()` of a study's config file returns.

    Attributes:
      name: of the study; runs are in runs/studies/NAME unless --root says otherwise.
      config: base config, FILE or FILE:ARG.
      base: overrides of all cells: dotted config key -> value; a dict replaces a
        section, as {"objective": {"name": "prefix_lm"}} does.
      axes: axis -> label -> overrides. The grid is their product.
      cells: label -> overrides, instead of axes or as their first factor.
      seeds: each cell is run with each.
      evaluations: name -> overrides of the config for a further held-out loss of the
        finished model, without training.
      adaptations: name -> a second run whose held-out loss is noted too.
      score: what the study compares, a key of a record's `heldout`: "loss" is the
        held-out loss of the cell's own objective, "NAME_loss" that of an evaluation or
        adaptation.
      labels: axis -> text for figures.
    """

    name: str
    config: str
    base: Overrides = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Mapping[str, Overrides]] = dataclasses.field(
        default_factory=dict
    )
    cells: Mapping[str, Overrides] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    evaluations: Mapping[str, Overrides] = dataclasses.field(default_factory=dict)
    adaptations: Mapping[str, Adaptation] = dataclasses.field(default_factory=dict)
    score: str = "loss"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: the labels joined by "-"; the seed is apart.
      overrides: without those of `Study.base` and the seed.
      config: resolved.
      labels: axis -> label.
    """

    name: str
    seed: int
    overrides: dict[str, Any]
    config: Config
    labels: dict[str, str]
    study: Study

    @property
    def key(self) -> str:
        """Name of the cell's directory; another config gives another one."""
        told = [
            config.to_json(self.config),
            {k: dict(v) for k, v in self.study.evaluations.items()},
            {k: dataclasses.asdict(v) for k, v in self.study.adaptations.items()},
            self.study.score,
        ]
        text = json.dumps(told, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{self.name}-s{self.seed}-{digest[:8]}"


def cells(study: Study) -> list[Cell]:
    """All cells; the seeds of a cell stand one after the other, so they share a
    compiled program.

    Raises:
      ValueError: naming the study's cell and what is wrong with it.
    """
    factors: list[list[tuple[str, str, Overrides]]] = []
    if study.cells:
        factors.append([("cell", label, o) for label, o in study.cells.items()])
    for axis, values in study.axes.items():
        factors.append([(axis, label, o) for label, o in values.items()])
    if not study.seeds:
        raise ValueError(
            f"study {study.name!r} has seeds=(), so no run. Give one: seeds=(0,)."
        )
    empty = [axis for axis, values in study.axes.items() if not values]
    if empty:
        raise ValueError(
            f"study {study.name!r}: the axis {empty[0]!r} has no label, so there is no "
            "cell. Give it label -> overrides, or remove it."
        )
    for axis, label, _ in itertools.chain(*factors):
        if not re.fullmatch(r"[\w.+]+", str(label)):
            raise ValueError(
                f"study {study.name!r}, axis {axis!r}: the label {label!r} becomes a "
                "part of a directory's name. Use letters, digits, '_', '.' and '+'."
            )
    with _named(study):
        raw = config.freeze(cli.load_config(study.config))
        base = costs.resolved(raw, dict(study.base))
    found = []
    for combination in itertools.product(*factors):
        overrides: dict[str, Any] = {}
        for _, _, part in combination:
            overrides |= part
        name = "-".join(str(label) for _, label, _ in combination) or study.name
        labels = {axis: str(label) for axis, label, _ in combination}
        for seed in study.seeds:
            with _named(study, name):
                resolved = costs.resolved(base, overrides | {"seed": seed})
            found.append(Cell(name, seed, overrides, resolved, labels, study))
    names = [(cell.name, cell.seed) for cell in found]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"study {study.name!r} has the cell {twice} twice. Rename it.")
    return found


class _named:
    """Errors say which cell they are of."""

    def __init__(self, study: Study, name: str = ""):
        part = f"cell {name!r}" if name else "its config or base"
        self.where = f"study {study.name!r}, {part}: "

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError | KeyError):
            raise ValueError(self.where + cli.message_of(error)) from error


def load(path: str) -> Study:
    """Runs `get_study` of a study's config file.

    Raises:
      FileNotFoundError, ValueError: naming the file and the way out.
    """
    if not pathlib.Path(path).is_file():
        there = sorted(map(str, pathlib.Path("configs/studies").glob("*/config.py")))
        raise FileNotFoundError(
            f"--config={path}: there is no such file. Studies here: "
            f"{', '.join(there) or 'none'}."
        )
    spec = importlib.util.spec_from_file_location("t5x_lite_study_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path} is no Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    with cli._errors_of(path, path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise ValueError(
            f"--config={path}: the file does not define get_study(). A study's does; "
            "see t5x_lite/studies/grid.py."
        )
    with cli._errors_of(path, path):
        made = module.get_study()
    if not isinstance(made, Study):
        raise ValueError(
            f"--config={path}: get_study() returned {type(made).__name__}, not a "
            "t5x_lite.studies.grid.Study."
        )
    return made


# The numbers of a held-out evaluation, see `evaluate.heldout`.
_SCORE = re.compile(
    r"((classes|replaced|entities)_)?(loss|accuracy)|error|perplexity|z_loss|unigram_loss"
)


def check(cells: list[Cell]):
    """Refuses what would only fail once a cell is trained.

    Raises:
      ValueError: naming the cell and its evaluation or adaptation that does not fit,
        or a score that nothing makes.
    """
    for cell in {cell.name: cell for cell in cells}.values():
        cost(cell)
        adaptation_flops(cell)
        for name, overrides in cell.study.evaluations.items():
            with _named(cell.study, f"{cell.name}, evaluation {name}"):
                costs.of(costs.resolved(cell.config, dict(overrides)))
    for study in {id(cell.study): cell.study for cell in cells}.values():
        if any(cell.config.data.tasks for cell in cells):  # these have their metrics
            continue
        names = [*study.evaluations, *study.adaptations]
        of = next((n for n in names if study.score.startswith(f"{n}_")), "")
        if not _SCORE.fullmatch(study.score.removeprefix(f"{of}_" if of else "")):
            allowed = ["loss", "accuracy", *(f"{n}_loss" for n in names)]
            raise ValueError(
                f"Study.score={study.score!r} of study {study.name!r} is no score. "
                f"Allowed: {', '.join(allowed)} and the like."
            )


def cost(cell: Cell) -> costs.Cost:
    """What the cell's own run costs, adaptations not counted."""
    with _named(cell.study, cell.name):
        return costs.of(cell.config)


def adaptation_flops(cell: Cell) -> int:
    """FLOPs of the cell's adaptations."""
    total = 0
    for name, adaptation in cell.study.adaptations.items():
        with _named(cell.study, f"{cell.name}, adaptation {name}"):
            cfg = costs.resolved(cell.config, dict(adaptation.overrides))
            total += costs.of(cfg).training_flops
    return total
