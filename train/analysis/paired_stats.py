"""Paired differences of runs: Student's t over seeds, and Holm's correction over comparisons."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05


class Paired(NamedTuple):
    """A mean difference with its 95 % interval and p. NaN if there are too few pairs, or all differences are equal."""

    pairs: int
    difference: float
    low: float
    high: float
    p: float


def paired(ours: pd.Series, theirs: pd.Series) -> Paired:
    """Compare losses by seed, ``ours`` minus ``theirs``. A seed that lacks one of them (NaN: diverged) is left out."""
    difference = (ours - theirs).dropna()
    low = high = p = math.nan
    if len(difference) > 1 and difference.std() > 0.0:
        test = stats.ttest_1samp(difference, 0.0)
        (low, high), p = test.confidence_interval(1 - LEVEL), test.pvalue
    middle = difference.mean() if len(difference) else math.nan
    return Paired(len(difference), float(middle), float(low), float(high), float(p))


def holm(p_values: pd.Series) -> pd.Series:
    """Correct p-values for multiple comparisons (Holm). NaN stays NaN and is not counted as a comparison."""
    corrected, tested = p_values.astype(float), p_values.notna()
    if tested.any():
        corrected[tested] = multipletests(p_values[tested], LEVEL, method="holm")[1]
    return corrected
