"""How evenly a run moves: the training-dynamics metric of arXiv 2601.21739, from the update's size that every run logs.

Theirs is over Linear and Conv weights and drops three epochs; ours is over all weights and drops the first tenth of the steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from scipy import stats

WINDOWS = (10, 50, 200)
"""The choice of one decides the result (theirs is 200), so several are shown."""


def omega(metrics: pd.DataFrame, parameters: float, window: int) -> float:
    """The mean absolute first difference of the exponential moving average (span ``window``, in steps) of the norm of step / lr.

    Args:
        metrics: a run's, with columns ``step`` and ``update_rms``.
        parameters: number of weights.
        window: span of the average.

    Returns:
        NaN if there are less than two steps.
    """
    sizes = metrics.set_index("step")["update_rms"].dropna() * math.sqrt(parameters)
    smooth = sizes.ewm(span=window, adjust=False).mean()
    return float(smooth[smooth.index > len(smooth) // 10].diff().abs().mean())


class Selection(NamedTuple):
    """In how many rows of equal beta1, lr and seed the tied run is the evenest, and how likely that would be by chance."""

    window: int
    tied: int
    rows: int
    expected: float
    """Rows that it would be in by chance."""
    p: float
    """Of so many or more (exact binomial; where the rows have different numbers of runs, with their mean chance)."""


def selection(cells: pd.DataFrame, window: int) -> Selection:
    """Over the rows with a tied run and others.

    Args:
        cells: one row a run, with columns ``beta1``, ``beta2``, ``lr``, ``seed`` and ``omega_WINDOW``.
        window: which of them.
    """
    tied, chances = 0, []
    for (beta1, _, _), row in cells.groupby(["beta1", "lr", "seed"]):
        evenness = row.set_index("beta2")[f"omega_{window}"].dropna()
        if beta1 in evenness.index and len(evenness) > 1:
            tied += evenness.idxmin() == beta1
            chances.append(1.0 / len(evenness))
    if not chances:
        return Selection(window, 0, 0, 0.0, math.nan)
    p = stats.binomtest(tied, len(chances), sum(chances) / len(chances), alternative="greater").pvalue
    return Selection(window, tied, len(chances), sum(chances), float(p))
