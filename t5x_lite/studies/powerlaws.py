"""Power laws without a model of the loss: envelope, IsoFLOP parabolas, lines.

Hoffmann et al. 2022, approaches 1 and 2 (sections 3.1, 3.2), and the single power laws
of Kaplan et al. 2020 (equations 1.1 to 1.3), which have no irreducible loss.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from t5x_lite.studies import fit
from t5x_lite.studies.fit import Estimate, Points

SAME_BUDGET = 0.1  # log FLOPs: cells within it of each other share a budget


@dataclasses.dataclass(frozen=True)
class Power:
    """y = exp(intercept) x^slope, with its bootstrap.

    Attributes:
      line: [2], slope and intercept of log y over log x.
      replicates: [R, 2]; none: no interval can be given.
      widen: as in `fit.Law`.
      span: (least, greatest) x it was fitted to.
      noise: standard deviation of log y around the line, 0 if not meant to predict.
    """

    line: np.ndarray
    replicates: np.ndarray
    widen: float
    level: float
    span: tuple[float, float]
    noise: float = 0.0

    @property
    def exponent(self) -> Estimate:
        return self._interval(self.line[0], self.replicates[:, 0])

    @property
    def factor(self) -> Estimate:
        """y at x = 1."""
        return _exp(self._interval(self.line[1], self.replicates[:, 1]))

    def at(self, x: float, seed: int | None = None) -> Estimate:
        """y of the line at x; with a seed, of a new measurement there."""
        basis = np.array([np.log(x), 1.0])
        found = self.replicates @ basis
        if seed is not None:
            found = found + np.random.default_rng(seed).normal(
                0, self.noise, len(found)
            )
        return _exp(self._interval(self.line @ basis, found))

    def _interval(self, value, replicates) -> Estimate:
        if not len(replicates):
            return Estimate(float(value), -np.inf, np.inf)
        ends = fit.interval(value, replicates, self.level, self.widen)
        return Estimate(float(value), *map(float, ends))


def _exp(e: Estimate) -> Estimate:
    return Estimate(*(float(np.exp(v)) for v in e))


def line(x, y, replicates: int, level: float, seed: int = 0) -> Power:
    """Least squares of log y over log x.

    Gaussian noise of the residuals' size is redrawn; from two points there is no
    interval.
    """
    x, y = np.log(x), np.log(y)
    n, free = len(x), len(x) - 2
    rng = np.random.default_rng(seed)
    found = np.polyfit(x, y, 1)
    fitted = np.polyval(found, x)
    span = (float(np.exp(x.min())), float(np.exp(x.max())))
    if free < 1:
        return Power(found, np.empty((0, 2)), 1.0, level, span)
    sigma = float(np.sqrt(np.sum((y - fitted) ** 2) / free))
    widen = fit.widening(free, level)
    drawn = np.polyfit(x, (fitted + rng.normal(0, sigma, (replicates, n))).T, 1).T
    return Power(found, np.asarray(drawn), widen, level, span, sigma)


def kaplan(
    points: Points, replicates: int, level: float, seed: int = 0
) -> dict[str, Power | str]:
    """L(N), L(D), L(C) through the lowest loss of each N, of each D, and the frontier.

    The frontier are the cells that no cheaper cell beats. A string says what is
    missing.
    """
    best = {
        "N": _lowest(points.N, points.loss),
        "D": _lowest(points.D, points.loss),
        "C": _frontier(points),
    }
    found: dict[str, Power | str] = {}
    for name, rows in best.items():
        x = getattr(points, name)[rows]
        if len(rows) < 3:
            what = dict(N="sizes", D="numbers of tokens", C="cells on the frontier")
            found[name] = (
                f"L({name}) needs 3 {what[name]}; there are {len(rows)} that count."
            )
        else:
            found[name] = line(x, points.loss[rows], replicates, level, seed)
    return found


def _lowest(x, loss) -> np.ndarray:
    """Row of the lowest loss among the cells of about the same x."""
    return np.array([rows[np.argmin(loss[rows])] for rows in groups(x, 0.02)])


def _frontier(points: Points) -> np.ndarray:
    """Rows of the best cell of each budget, if no cheaper budget has a better one."""
    best = [r[np.argmin(points.loss[r])] for r in groups(points.C, SAME_BUDGET)]
    before = np.minimum.accumulate(np.append(np.inf, points.loss[best]))[:-1]
    return np.array(best)[points.loss[best] < before]


def groups(x, width: float) -> list[np.ndarray]:
    """Rows whose log x follow each other by less than `width`, in rising order."""
    order = np.argsort(x)
    jumps = np.flatnonzero(np.diff(np.log(np.asarray(x)[order])) > width) + 1
    return np.split(order, jumps)


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Cells of one budget and the parabola of their loss over log N.

    Attributes:
      C: FLOPs, geometric mean of the cells.
      rows: of the points.
      parabola: coefficients of loss over log N - middle, highest power first.
      N, D: at the minimum, None where `problem` says why there is none.
    """

    C: float
    rows: np.ndarray
    parabola: np.ndarray
    middle: float
    N: float | None
    D: float | None
    problem: str = ""


def isoflop(
    points: Points,
    replicates: int,
    level: float,
    seed: int = 0,
    noise: tuple[float, int] = (0.0, 0),
) -> tuple[list[IsoFlop], dict[str, Power | str]]:
    """Approach 2: a parabola for each budget, N_opt and D_opt as powers of C.

    The bootstrap adds noise of the size of all parabolas' residuals; where each goes
    through its three points, of the size that the seeds show. Parabolas follow the loss
    well near their minimum only: sizes much too small or large bend them.

    Args:
      noise: standard deviation of a cell's mean loss by its seeds, and how many
        degrees of freedom it comes from; 0 = not known.
    """
    slices, drawn = [], []
    for rows in groups(points.C, SAME_BUDGET):
        if len(np.unique(np.round(np.log(points.N[rows]), 2))) >= 3:
            slices.append(_parabola(points, rows))
    good = [s for s in slices if s.N is not None]
    missing = (
        "IsoFLOP parabolas need 2 budgets with 3 sizes each and a minimum between the "
        f"sizes; there are {len(good)} such budgets"
        + "".join(f"; {s.C:.2e} FLOPs: {s.problem}" for s in slices if s.problem)
        + "."
    )
    if len(good) < 2:
        return slices, dict(N=missing, D=missing)
    residuals = [
        points.loss[s.rows]
        - np.polyval(s.parabola, np.log(points.N[s.rows]) - s.middle)
        for s in slices
    ]
    free = sum(len(r) - 3 for r in residuals)
    rng = np.random.default_rng(seed)
    if free:
        sigma = np.sqrt(sum(np.sum(r**2) for r in residuals) / free)
    else:
        sigma, free = noise
    if free:
        drawn = [_redrawn(points, s, sigma, rng, replicates) for s in good]
    found: dict[str, Power | str] = {}
    x = np.log([s.C for s in good])
    for name in ("N", "D"):
        y = np.log([getattr(s, name) for s in good])
        lines = np.empty((0, 2))
        if free:
            noisy = np.array([n if name == "N" else d for n, d in drawn])
            lines = np.polyfit(x, noisy, 1).T
        widen = fit.widening(free, level) if free else 1.0
        span = (float(np.exp(x.min())), float(np.exp(x.max())))
        found[name] = Power(np.polyfit(x, y, 1), lines, widen, level, span)
    return slices, found


def _parabola(points: Points, rows: np.ndarray) -> IsoFlop:
    x, y = np.log(points.N[rows]), np.log(points.D[rows])
    middle, C = float(x.mean()), float(np.exp(np.log(points.C[rows]).mean()))
    curve = np.polyfit(x - middle, points.loss[rows], 2)
    at = -curve[1] / (2 * curve[0]) if curve[0] > 0 else np.nan
    if not np.isfinite(at):
        problem = "the losses have no minimum"
    elif not (x - middle).min() < at < (x - middle).max():
        problem = "the minimum lies beyond the sizes that were run"
    else:
        log_D = np.polyval(np.polyfit(x, y, 1), middle + at)
        return IsoFlop(
            C, rows, curve, middle, float(np.exp(middle + at)), float(np.exp(log_D))
        )
    return IsoFlop(C, rows, curve, middle, None, None, problem)


def _redrawn(points: Points, s: IsoFlop, sigma, rng, replicates):
    """log N and log D at the minimum, [R] each, of parabolas through noisy losses.

    A replicate without a minimum among the sizes takes the nearer end.
    """
    x = np.log(points.N[s.rows])
    losses = np.polyval(s.parabola, x - s.middle)
    noisy = losses[:, None] + rng.normal(0, sigma, (len(x), replicates))
    curve = np.polyfit(x - s.middle, noisy, 2)
    with np.errstate(divide="ignore"):
        at = -curve[1] / (2 * curve[0]) + s.middle
    ends = np.where(curve[1] > 0, x.min(), x.max())
    at = np.clip(np.where(curve[0] > 0, at, ends), x.min(), x.max())
    return at, np.polyval(np.polyfit(x, np.log(points.D[s.rows]), 1), at)


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Approach 1: for each budget C on the way, the run with the lowest loss."""

    C: np.ndarray
    loss: np.ndarray
    N: np.ndarray
    D: np.ndarray


def envelope(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    points: Points,
    replicates: int,
    level: float,
    seed: int = 0,
    budgets: int = 200,
) -> tuple[Envelope | None, dict[str, Power | str]]:
    """Approach 1: N_opt and D_opt from the lower envelope of all training curves.

    Losses before the end of a run whose learning rate still falls are too high, so the
    envelope leans towards runs that end at C. The bootstrap redraws cells.

    Args:
      curves: for each cell, (share of its steps, loss), smoothed; see `smooth`.
      points: N, D and C of the cells.
    """
    usable = [i for i, (share, _) in enumerate(curves) if len(share) >= 10]
    sizes = np.unique(np.round(np.log(points.N[usable]), 2)) if usable else []
    missing = (
        "The envelope needs training curves of 3 sizes that take turns at being best, "
        "beside the smallest and the largest; "
    )
    if len(sizes) < 3:
        text = f"{missing}there are curves of {len(sizes)} sizes."
        return None, dict(N=text, D=text)
    first = min(points.C[i] * curves[i][0][0] for i in usable)
    last = max(points.C[i] for i in usable)
    C = np.geomspace(first, last, budgets)
    losses = np.full((len(usable), budgets), np.inf)
    for row, i in enumerate(usable):
        share, loss = curves[i]
        losses[row] = np.interp(
            np.log(C), np.log(share * points.C[i]), loss, left=np.inf, right=np.inf
        )
    # A budget that one run alone reaches says nothing of the best size.
    reached = np.isfinite(losses).sum(0) >= 2
    C, losses = C[reached], losses[:, reached]
    N, D = points.N[usable], points.D[usable] / points.C[usable]
    best = np.argmin(losses, axis=0)
    # Where the smallest or the largest size wins, the best one may lie beyond it.
    inner = (N[best] > 1.02 * N.min()) & (N[best] < N.max() / 1.02)
    C, losses, best = C[inner], losses[:, inner], best[inner]
    found = Envelope(C, losses[best, np.arange(len(C))], N[best], D[best] * C)
    winners = len(np.unique(np.round(np.log(found.N), 2)))
    if winners < 3:
        text = f"{missing}there are {winners} such sizes."
        return found, dict(N=text, D=text)
    rng, n = np.random.default_rng(seed), len(usable)
    drawn = {"N": [], "D": []}
    for rows in rng.integers(0, n, (replicates, n)):
        own = losses[rows]
        there = np.isfinite(own).any(axis=0)
        if there.sum() < 2:
            continue
        pick = rows[np.argmin(own[:, there], axis=0)]
        drawn["N"].append(np.polyfit(np.log(C[there]), np.log(N[pick]), 1))
        drawn["D"].append(np.polyfit(np.log(C[there]), np.log(D[pick] * C[there]), 1))
    span = (float(C[0]), float(C[-1]))
    widen = fit.widening(max(1, n - 2), level) * np.sqrt(n / max(1, n - 2))
    fitted = {
        name: Power(
            np.polyfit(np.log(C), np.log(y), 1),
            np.asarray(drawn[name]),
            float(widen),
            level,
            span,
        )
        for name, y in (("N", found.N), ("D", found.D))
    }
    return found, dict(fitted)


def smooth(curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of [[step, loss], ...] -> (share of the steps, smoothed loss).

    Gaussian over neighbouring points, 2 % of the curve wide; the falling start, where
    this would blur more than noise, is left out.
    """
    if len(curve) < 10:
        return np.empty(0), np.empty(0)
    steps, losses = np.asarray(curve, float).T
    wide = max(1.0, 0.02 * len(losses))
    smoothed = ndimage.gaussian_filter1d(losses, wide, mode="nearest")
    keep = slice(len(losses) // 20, None)
    return steps[keep] / steps[-1], smoothed[keep]
