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
    """The mean absolute first difference of the exponential moving average (span ``window``, in steps) of the norm of step / lr, both after
    the first tenth of the steps: the average must not begin at the first step, where Adam's is 1 in every element.

    Args:
        metrics: a run's, with columns ``step`` and ``update_rms``.
        parameters: number of weights.
        window: span of the average.

    Returns:
        NaN if there are less than two steps.
    """
    sizes = metrics.set_index("step")["update_rms"].dropna() * math.sqrt(parameters)
    smooth = sizes[sizes.index > len(sizes) // 10].ewm(span=window, adjust=False).mean()
    return float(smooth.diff().abs().mean())


class Selection(NamedTuple):
    """How often the tied run is the evenest of those with its beta1."""

    window: int
    tied: int
    rows: int
    """Of equal beta1, lr and seed. They are not independent, so that they make no test."""
    votes: int
    """Of the beta1s, in how many the tied run is the evenest in the mean over the lrs and seeds that all of them have."""
    beta1s: int
    p: float
    """Of so many votes or more if each beta2 were the evenest as often (binomial; exact where all beta1s have as many cells); NaN without
    any. Where omega falls or rises with beta2 that is no fair coin."""


def selection(cells: pd.DataFrame, window: int) -> Selection:
    """Over the beta1s with a tied run and others.

    Args:
        cells: one row a run, with columns ``beta1``, ``beta2``, ``lr``, ``seed`` and ``omega_WINDOW``.
        window: which of them.
    """
    tied, rows, votes, chances = 0, 0, 0, []
    for beta1, cell in cells.groupby("beta1"):
        evenness = cell.pivot(index=["lr", "seed"], columns="beta2", values=f"omega_{window}")
        evenness = evenness.dropna(axis="columns", how="all").dropna()  # a cell that has always diverged has no vote
        if beta1 in evenness.columns and evenness.shape[1] > 1 and len(evenness):
            tied += int((evenness.idxmin(axis=1) == beta1).sum())
            rows += len(evenness)
            votes += int(evenness.mean().idxmin() == beta1)
            chances.append(1.0 / evenness.shape[1])
    if not chances:
        return Selection(window, 0, 0, 0, 0, math.nan)
    p = stats.binomtest(votes, len(chances), sum(chances) / len(chances), alternative="greater").pvalue
    return Selection(window, tied, rows, votes, len(chances), float(p))
