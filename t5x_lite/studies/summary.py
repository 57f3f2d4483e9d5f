"""What a study's data support and what they do not, in plain sentences from numbers."""

import datetime
from typing import Literal, NamedTuple

import numpy as np

from t5x_lite.studies import fit
from t5x_lite.studies.analysis import Analysis, Cell, Comparison, Family
from t5x_lite.studies.fit import Estimate

FAR = 10.0  # times the largest run, where the law is asked if no budget is given


class Sentence(NamedTuple):
    """One statement: "is" supported, "not" supported, or a "note" on what was run."""

    kind: Literal["is", "not", "note"]
    text: str


def summarise(found: Analysis) -> list[Sentence]:
    """All statements, those on what was run first."""
    told = [*_what(found), *_noise(found)]
    for compared in found.comparisons:
        told += _comparison(found, compared)
    scaled = [f for f in found.families if f.scales]
    for f in scaled:
        told += _law(found, f) + _approaches(found, f) + _leave_out(found, f)
    if not scaled:
        told.append(
            Sentence(
                "not",
                "No scaling law: within a structure and objective, sizes and budgets "
                "are about the same.",
            )
        )
    return told


def _what(found: Analysis):
    runs = [r for c in found.cells for r in c.records]
    hours = sum(r.wall_seconds for r in runs) / 3600
    machines = sorted({r.hardware for r in runs})
    seeds = sorted({len(c.losses) for c in found.cells})
    each = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = (
        f"{len(found.cells)} cells, {each} seed{'s' * (seeds[-1] > 1)} each, "
        f"{len(runs)} runs in {_hours(hours)} on {'; '.join(machines)}. "
    )
    for label, name, unit in (
        ("Parameters", "N", ""),
        ("tokens", "D", ""),
        ("compute", "C", " FLOPs"),
    ):
        low, high = (f([getattr(c, name) for c in found.cells]) for f in (min, max))
        span = f"{low:.3g}" if high < 1.005 * low else f"{low:.3g} to {high:.3g}"
        text += f"{label} {span}{unit}{', ' if name != 'C' else '.'}"
    yield Sentence("note", text)
    if found.coverage:
        yield Sentence("note", found.coverage)


def _hours(hours: float) -> str:
    if hours >= 2:
        return f"{hours:.1f} hours"
    return str(datetime.timedelta(seconds=round(3600 * hours)))


def _noise(found: Analysis):
    if found.dropped:
        names = [f"{r.cell} seed {r.seed}" for r in found.dropped]
        yield Sentence(
            "note",
            f"{len(names)} run{'s have' if len(names) > 1 else ' has'} no finite loss "
            f"and {'are' if len(names) > 1 else 'is'} left out: {_few(names)}. A cell "
            "that lost its bad runs looks better than it is.",
        )
    if not found.noise.free:
        yield Sentence(
            "not",
            "No cell has two seeds: how much of a difference is noise is unknown, and "
            "no difference between cells is supported.",
        )
        return
    own = [float(c.losses.std(ddof=1)) for c in found.cells if len(c.losses) > 1]
    text = f"The standard deviation between the seeds of a cell is {min(own):.4f}"
    if len(own) > 1:
        text += f" to {max(own):.4f}{unit(found)}, pooled {found.noise.sigma:.4f}"
    yield Sentence(
        "note",
        f"{text}{'' if len(own) > 1 else unit(found)}. Differences are judged by the "
        "Games-Howell test: each cell by its own spread, all pairs allowed for, "
        f"{100 * (1 - found.settings.level):.3g} % for one wrong claim. Few seeds let "
        "large differences alone count.",
    )


def unit(found: Analysis) -> str:
    """The unit behind a number, with a space; errors have none."""
    own = found.settings.loss == "heldout"
    scores = {r.score for c in found.cells for r in c.records} if own else set()
    errors = {name.endswith("error") for name in scores or {found.settings.loss}}
    return "" if True in errors else " nats"


def _few(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _comparison(found: Analysis, compared: Comparison) -> list[Sentence]:
    """Which cells can be told from the best."""
    best, others = compared.cells[0], compared.cells[1:]
    where = f"Of {compared.name}" if len(found.comparisons) > 1 else "Of all cells"
    what = "loss" if unit(found) else "error"
    lowest = f"{where}, {best.name} has the lowest {what}, {best.mean:.4f}{unit(found)}"
    if len(best.losses) < 2:
        gap = others[0].mean - best.mean
        text = f"{lowest}, {gap:.4f} below the next; with one seed this may be noise."
        return [Sentence("not", text)]
    worse = compared.worse_than(best)
    p = dict(zip((c.name for c in compared.cells), compared.p[0], strict=True))

    def shown(c: Cell) -> str:
        tested = f"p {p[c.name]:.2g}" if np.isfinite(p[c.name]) else _untested(c)
        return f"{c.name} (by {c.mean - best.mean:.4f}, {tested})"

    told = []
    if worse:
        all_of_them = len(worse) == len(others)
        which = "the others" if all_of_them else f"{len(worse)} of the others"
        told.append(
            Sentence(
                "is",
                f"{lowest}, better than {which} by more than the noise between seeds "
                f"explains: {_few([shown(c) for c in worse])}.",
            )
        )
    same = [shown(c) for c in others if c not in worse]
    if same:
        text = f"{lowest}, but with these seeds it cannot be told from {_few(same)}."
        told.append(Sentence("not", text))
    return told


def _untested(c: Cell) -> str:
    return "one seed" if len(c.losses) < 2 else "seeds do not vary"


def _law(found: Analysis, f: Family) -> list[Sentence]:
    where = _where(found, f)
    if isinstance(f.law, str):
        return [Sentence("not", f"{where}{f.law}")]
    named = f.law.coefficients()
    told = []
    for name, of in (("alpha", "size"), ("beta", "tokens")):
        e = named[name]
        if not e.low > 0:
            text = (
                f"{where}that more {of} lower the loss by a power law is not shown: "
                f"{name} {_shown(e)} includes 0."
            )
            told.append(Sentence("not", text))
        else:
            wide = e.high - e.low > 0.5 * e.value
            text = f"{where}{name}, the exponent of {of}, is {_shown(e)}" + (
                ", a wide interval." if wide else "."
            )
            told.append(Sentence("not" if wide else "is", text))
    E = named["E"]
    if f.law.unbounded:
        text = (
            f"{where}the irreducible loss E is not determined (at its bound, "
            f"{fit.FLOOR:g} of the lowest loss): nothing was trained near it."
        )
        told.append(Sentence("not", text))
    elif E.low < 0.5 * E.value:
        text = f"{where}the irreducible loss E is not determined: {_shown(E)} nats."
        told.append(Sentence("not", text))
    else:
        text = f"{where}the irreducible loss E is {_shown(E)} nats."
        told.append(Sentence("is", text))
    a = f.law.exponents(f.cost)["a"]
    if not np.isfinite([a.low, a.high]).all():
        text = f"{where}how the best size grows with compute is not determined."
        told.append(Sentence("not", text))
    else:
        half = a.low <= 0.5 <= a.high
        text = (
            f"{where}the best size grows as C^{_shown(a)}; growing size and tokens "
            f"equally (0.5) is {'compatible with that' if half else 'outside of it'}."
        )
        told.append(Sentence("is", text))
    largest = float(f.points.C.max())
    tested = _tested(f)
    for C in found.settings.budgets or (FAR * largest,):
        best, times = f.law.optimum(C, f.cost), C / largest
        text = (
            f"{where}for {C:.3g} FLOPs the law asks for N {_shown(best['N'])} and D "
            f"{_shown(best['D'])}, with a loss of {_shown(best['loss'])}."
        )
        if times > 1.01:
            text += f" That is {times:.3g} times the largest run: an extrapolation"
            text += f"; what was tested here is {tested:.3g} times." if tested else "."
        sure = times <= max(1.0, tested) * 1.01 and np.isfinite(best["N"]).all()
        told.append(Sentence("is" if sure else "not", text))
    if f.cost.spread > 0.25:
        text = (
            f"{where}FLOPs are not a function of N and D alone (up to "
            f"{np.expm1(f.cost.spread):.0%} off), nor is the best N for a budget."
        )
        told.append(Sentence("not", text))
    return told


def _tested(f: Family) -> float:
    """How far, in times the compute used, a prediction of L(N, D) has held; else 0."""
    held = [(h.measured, h.law) for h in f.leave_out.held if h.law is not None]
    good = [law.low <= measured <= law.high for measured, law in held]
    return f.leave_out.distance if held and sum(good) > len(good) / 2 else 0.0


def _approaches(found: Analysis, f: Family) -> list[Sentence]:
    """Whether the approaches agree on the exponent of N_opt."""
    by: dict[str, Estimate] = {}
    if not isinstance(f.law, str):
        by["L(N, D)"] = f.law.exponents(f.cost)["a"]
    for title, powers in (("parabolas", f.isoflop), ("envelope", f.approach1)):
        power = powers["N"]
        if isinstance(power, str):
            continue
        if np.isfinite(power.exponent.low):
            by[title] = power.exponent
    if len(by) < 2:
        return []
    apart = max(e.low for e in by.values()) > min(e.high for e in by.values())
    text = (
        f"{_where(found, f)}the exponent of the best size by "
        + ", ".join(f"{k}: {_shown(e)}" for k, e in by.items())
        + (
            ". The intervals do not all overlap: at least one approach is biased here."
            if apart
            else ". The intervals overlap."
        )
    )
    return [Sentence("not" if apart else "is", text)]


def _leave_out(found: Analysis, f: Family) -> list[Sentence]:
    where, left = _where(found, f), f.leave_out
    if left.missing:
        return [Sentence("not", f"{where}no test of the prediction. {left.missing}")]
    told = []
    guesses = [(h, h.law) for h in left.held if h.law is not None]
    if guesses:
        errors = np.array([g.value - h.measured for h, g in guesses])
        inside = sum(g.low <= h.measured <= g.high for h, g in guesses)
        size = float(np.sqrt(np.mean(errors**2)))
        best = min(left.held, key=lambda h: h.measured)
        gain = left.nothing - best.measured
        text = (
            f"{where}fitted without the largest budget ({left.distance:.3g} times the "
            f"rest), L(N, D) predicts its {len(guesses)} cells with an error of "
            f"{size:.4f} nats (root mean square; {size / best.measured:.2%}); {inside} "
            f"of {len(guesses)} lie in their intervals. The step itself lowered the "
            f"best loss by {gain:.4f}"
        )
        if size < abs(gain):
            told.append(Sentence("is", f"{text}, more than the error."))
        else:
            told.append(Sentence("not", f"{text}, no more than the error."))
    for h in left.held:
        if h.power is not None:
            error = h.power.value - h.measured
            inside = h.power.low <= h.measured <= h.power.high
            text = (
                f"{where}the power law of compute alone misses the best of them by "
                f"{error:+.4f} nats, {'inside' if inside else 'outside'} its interval."
            )
            told.append(Sentence("is" if inside else "not", text))
    return told


def _where(found: Analysis, f: Family) -> str:
    return f"{f.name}: " if sum(g.scales for g in found.families) > 1 else ""


def _shown(e: Estimate) -> str:
    low, high = (f"{v:.3g}" if np.isfinite(v) else "?" for v in (e.low, e.high))
    return f"{e.value:.3g} [{low}, {high}]"
