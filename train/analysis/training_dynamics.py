"""How evenly a run moves: the training-dynamics metric of arXiv 2601.21739, from the update's size that every run logs.

The paper's metric covers Linear and Conv weights and drops three epochs. Ours covers all weights and drops the first
tenth of the steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from scipy import stats

WINDOWS = (10, 50, 200)
"""Spans of the moving average, in steps. The choice decides the result (the paper's is 200), so several are shown."""


def omega(metrics: pd.DataFrame, parameters: float, window: int) -> float:
    """Return the mean absolute first difference of the exponential moving average of the norm of step / lr.

    Both start after the first tenth of the steps. The average must not include the first step, where Adam's update is 1
    in every element.

    Args:
        metrics: metrics of a run, with columns ``step`` and ``update_rms``.
        parameters: number of weights.
        window: span of the average, in steps.

    Returns:
        Omega; NaN if there are fewer than two steps.
    """
    sizes = metrics.set_index("step")["update_rms"].dropna() * math.sqrt(parameters)
    smooth = sizes[sizes.index > len(sizes) // 10].ewm(span=window, adjust=False).mean()
    return float(smooth.diff().abs().mean())


class Selection(NamedTuple):
    """How often the tied run is the evenest of those with its beta1."""

    window: int
    tied: int
    """Number of ``rows`` in which the tied run is the evenest."""
    rows: int
    """Number of sets of runs with equal beta1, lr and seed. They are not independent, so they are not tested."""
    votes: int
    """Number of beta1s whose tied run is the evenest, in the mean over the lrs and seeds that all its cells have."""
    beta1s: int
    p: float
    """Probability of this many votes or more if each beta2 were the evenest equally often (binomial; exact if all
    beta1s have equally many cells). NaN without any beta1. If omega falls or rises with beta2, that assumption does not
    hold."""


def selection(cells: pd.DataFrame, window: int) -> Selection:
    """Count how often the tied run is the evenest, over the beta1s with a tied and an untied run.

    Args:
        cells: one row per run, with columns ``beta1``, ``beta2``, ``lr``, ``seed`` and ``omega_WINDOW``.
        window: the window, one of WINDOWS.
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
