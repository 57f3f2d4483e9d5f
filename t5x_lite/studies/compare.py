"""Which differences between cells are more than the noise between their seeds."""

import functools
from collections.abc import Sequence

import numpy as np
from scipy import stats

MOST_PAIRED = 12  # cells whose pairs are all tested: a p takes hundredths of a second


def games_howell(losses: Sequence[np.ndarray], row: int | None = None) -> np.ndarray:
    """p of every pair's difference of means, [cells, cells], all pairs allowed for.

    Each cell has its own variance, so noisy cells do not hide what quiet ones show,
    nor lend their degrees of freedom (Games and Howell 1976). NaN: a cell has fewer
    than two seeds, or neither of the two varies, or the pair was not asked for.

    Args:
      losses: of each cell, [its seeds].
      row: pairs with this cell only.
    """
    found = np.full((len(losses), len(losses)), np.nan)
    several = [i for i, own in enumerate(losses) if len(own) > 1]
    for k, i in enumerate(several):
        for j in several[k + 1 :]:
            if row is None or row in (i, j):
                found[i, j] = found[j, i] = _p(losses[i], losses[j], len(several))
    return found


@functools.cache
def _tail(q: float, groups: int, free: float) -> float:
    return float(stats.studentized_range.sf(q, groups, free))


def _p(a: np.ndarray, b: np.ndarray, groups: int) -> float:
    parts = np.array([np.var(own, ddof=1) / len(own) for own in (a, b)])
    error = float(parts.sum())
    if not error:
        return float("nan")
    free = error**2 / sum(parts**2 / (len(a) - 1, len(b) - 1))
    q = abs(float(np.mean(a) - np.mean(b))) / np.sqrt(error / 2)
    return _tail(float(q), groups, float(free))


def reach(losses: np.ndarray, level: float) -> float:
    """Half the interval of a cell's mean by its own seeds (Student's t); 0 of one."""
    n = len(losses)
    if n < 2:
        return 0.0
    factor = stats.t.ppf(0.5 + level / 2, n - 1)
    return float(factor * np.std(losses, ddof=1) / np.sqrt(n))
