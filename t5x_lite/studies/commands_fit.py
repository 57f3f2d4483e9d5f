"""`study fit` and `study report`: what finished cells say."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5x_lite import cli
from t5x_lite.config import Config, to_json
from t5x_lite.studies import analysis, grid, records
from t5x_lite.studies.analysis import Analysis, Family, Settings
from t5x_lite.studies.fit import Estimate
from t5x_lite.studies.plan import default_root
from t5x_lite.studies.records import Record

FIT = """Fits scaling laws to the finished cells of a study.

    python -m t5x_lite.study fit --config=configs/studies/scaling_law/config.py
    python -m t5x_lite.study fit --results=results.jsonl --budgets=1e13,1e14

For each structure and objective: L(N, D) = E + A/N^alpha + B/D^beta by Huber loss on
log values (Hoffmann et al. 2022, approach 3), parabolas at equal FLOPs (approach 2),
the envelope of the training curves (approach 1) and single power laws (Kaplan et al.
2020); intervals by bootstrap; the best N and D for a budget; and the largest budget
predicted from the others. Writes fit.json beside the results.
"""
REPORT = """Draws a study: one HTML page that needs nothing else, and PNG figures.

    python -m t5x_lite.study report --config=configs/studies/scaling_law/config.py
    python -m t5x_lite.study report --results=results.jsonl --output=here

Works while cells are still missing: parts without data say so.
"""


def _parser(doc: str):
    parser = cli.parser(doc)
    parser.add_argument("--config", default="", help="the study's config.py")
    parser.add_argument("--root", default="", help="where `study run` put the results")
    parser.add_argument("--results", default="", help="results.jsonl, instead of both")
    parser.add_argument("--output", default="", help="directory; default: the results'")
    parser.add_argument(
        "--loss", default="heldout", help="heldout, train, or a score of the records"
    )
    parser.add_argument(
        "--parameters", default="total", help="N: " + " | ".join(records.PARAMETERS)
    )
    parser.add_argument(
        "--budgets", default="", help="training FLOPs to ask the law for: 1e18,1e19"
    )
    parser.add_argument("--level", default="0.95", help="of the intervals")
    parser.add_argument("--replicates", default="1000", help="of the bootstrap")
    parser.add_argument("--delta", default="0.001", help="of the Huber loss, log nats")
    return parser


def _analysed(flags) -> tuple[Analysis, pathlib.Path, str]:
    """(analysis, output directory, name of the study) of a command's flags."""
    if not (flags.config or flags.results):
        raise ValueError("Give --config=configs/studies/NAME/config.py or --results=F.")
    name, study = "", None
    if flags.config:
        study = grid.load(flags.config)
        name = study.name
    if flags.results or study is None:
        path = pathlib.Path(flags.results)
    else:
        path = pathlib.Path(flags.root or default_root(study)) / "results.jsonl"
        beside = pathlib.Path(flags.config).parent / "results.jsonl"
        if not flags.root and not path.exists() and beside.exists():
            path = beside
    found = records.read(path)
    output = pathlib.Path(flags.output or path.parent)
    if output.exists() and not output.is_dir():
        raise ValueError(
            f"--output={output} is a file. Give a directory, new or old: report.html, "
            "fit.json and figures go there."
        )
    name = name or path.resolve().parent.name
    how = settings(flags)
    covered = coverage(study, found) if study else ""
    told = analysis.analyse(found, how)
    output.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(told, coverage=covered), output, name


def coverage(study: grid.Study, found: Sequence[Record]) -> str:
    """How many of the study's runs the records are, and how many are none of them.

    A record is of the study if it has the cell's name and seed, and the same config in
    all that both note; what only the start of a run decides (devices, the size of the
    vocabulary) does not count.
    """
    wanted = {(c.name, c.seed): c.config for c in grid.cells(study)}
    own = [
        r
        for r in found
        if (cfg := wanted.get((r.cell, r.seed))) is not None and _same(cfg, r.config)
    ]
    text = f"{len(own)} of {len(wanted)} runs of the study are here"
    other = [f"{r.cell} seed {r.seed}" for r in found if r not in own]
    if not other:
        return f"{text}."
    names = ", ".join(other[:3]) + (" ..." if len(other) > 3 else "")
    return (
        f"{text}; {len(other)} records are not of it as its config stands ({names}): "
        "another cell, seed or config. What follows counts them too."
    )


def _same(cfg: Config, noted: dict) -> bool:
    ours, theirs = flat(json.loads(json.dumps(to_json(cfg)))), flat(noted)
    return all(
        ours[key] == theirs[key]
        for key in ours.keys() & theirs.keys()
        if not key.startswith("sharding.") and (key, ours[key]) != _LATER
    )


_LATER = ("model.vocab_size", 0)  # taken from the vocabulary when a run starts


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted key -> value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found = {}
    for key, part in value.items():
        found |= flat(part, f"{prefix}.{key}" if prefix else str(key))
    return found


def settings(flags) -> Settings:
    """The settings of a command's flags.

    Raises:
      ValueError: naming the flag.
    """
    budgets = [_number("budgets", b, 0) for b in flags.budgets.split(",") if b.strip()]
    return Settings(
        loss=flags.loss,
        parameters=flags.parameters,
        budgets=tuple(budgets),
        level=_number("level", flags.level, 0, 1),
        replicates=int(_number("replicates", flags.replicates, 39)),
        delta=_number("delta", flags.delta, 0),
    )


def _number(flag: str, text: str, above: float, below: float = np.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not above < value < below:
        limit = f" and below {below:g}" if np.isfinite(below) else ""
        raise ValueError(f"--{flag}={text}: a number above {above:g}{limit} is needed.")
    return value


def fit(argv: list[str] | None = None):
    found, output, name = _analysed(_parser(FIT).parse_args(argv))
    path = output / "fit.json"
    path.write_text(analysis.as_json(found))
    print("\n".join([f"{name}: {_cells(found)}", *text(found), "", f"fit  {path}"]))


def report(argv: list[str] | None = None):
    from t5x_lite.studies import page

    began = time.perf_counter()
    flags = _parser(REPORT).parse_args(argv)
    found, output, name = _analysed(flags)
    (output / "fit.json").write_text(analysis.as_json(found))
    path = page.write(found, output, name)
    print(f"{name}: {_cells(found)}")
    print(f"drawn in {time.perf_counter() - began:.1f} s")
    print(f"report  {path}")


def _cells(found: Analysis) -> str:
    runs = sum(len(c.losses) for c in found.cells)
    told = f"{len(found.cells)} cells, {runs} runs"
    if found.dropped:
        told += f", {len(found.dropped)} without a finite loss left out"
    return f"{told}. {found.coverage}" if found.coverage else told


def text(found: Analysis) -> list[str]:
    """The laws as lines for people."""
    lines = []
    percent = f"{100 * found.settings.level:g} %"
    for f in found.families:
        lines += ["", f"===== {f.name}: {len(f.cells)} cells, intervals of {percent}"]
        if not f.scales:
            lines.append("no scaling law: sizes and budgets are about the same")
            continue
        lines += _parametric(f, found.settings)
        for title, powers in (
            ("IsoFLOP parabolas", f.isoflop),
            ("envelope", f.approach1),
        ):
            for key, power in powers.items():
                if isinstance(power, str):
                    lines.append(f"{title}: {power}")
                    break
                lines.append(
                    f"{title}: {key}_opt = {power.factor.value:.3g} "
                    f"C^{shown(power.exponent)}"
                )
        for key, power in f.kaplan.items():
            if isinstance(power, str):
                lines.append(f"single power law: {power}")
            else:
                lines.append(
                    f"single power law: L({key}) = {power.factor.value:.4g} "
                    f"{key}^{shown(power.exponent)}"
                )
        lines += _leave_out(f)
    return lines


def _parametric(f: Family, how: Settings) -> list[str]:
    if isinstance(f.law, str):
        return [f"parametric: {f.law}"]
    lines = ["L(N, D) = E + A/N^alpha + B/D^beta"]
    named = f.law.coefficients() | {
        f"{k} of {n}_opt ~ C^{k}": v
        for (k, v), n in zip(f.law.exponents(f.cost).items(), "ND", strict=True)
    }
    for key, value in named.items():
        bound = "  not determined: at its bound" if f.law.unbounded else ""
        lines.append(f"  {key:20} {shown(value)}{bound if key == 'E' else ''}")
    lines.append(f"  residual             {f.law.sigma:.2%} of the loss")
    largest = float(f.points.C.max())
    for C in how.budgets or (largest, 10 * largest):
        best = f.law.optimum(C, f.cost)
        lines.append(
            f"  best for {C:.3g} FLOPs ({C / largest:.3g} x the largest run): "
            + ", ".join(f"{k} {shown(v)}" for k, v in best.items())
        )
    return lines


def _leave_out(f: Family) -> list[str]:
    left = f.leave_out
    if left.missing:
        return [f"largest budget left out: {left.missing}"]
    lines = [
        f"largest budget left out ({left.used} cells used, {left.distance:.3g} x their "
        "compute):"
    ]
    for h in left.held:
        lines.append(f"  {h.cell}: measured {h.measured:.4f}")
        for title, guess in (("L(N, D)", h.law), ("power of C", h.power)):
            if guess is not None:
                lines.append(
                    f"    {title}: {shown(guess)}, error "
                    f"{guess.value - h.measured:+.4f} nats "
                    f"({guess.value / h.measured - 1:+.2%})"
                )
    lines.append(f"  lowest loss among the cells used: {left.nothing:.4f}")
    return lines


def shown(e: Estimate) -> str:
    """'0.34 [0.31, 0.36]'; an end that the data do not bound is '?'."""
    low, high = (f"{v:.4g}" if np.isfinite(v) else "?" for v in (e.low, e.high))
    return f"{e.value:.4g} [{low}, {high}]"
