"""A comparison over the beta plane: heat map, what the tie costs, the noise of a seed, and how many seeds a small difference would take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from train import dynamics

LEVEL, POWER, SMALL = 0.05, 0.8, 0.001
USUAL, TIED = (0.9, 0.95), (0.95, 0.95)


def of(best: pd.DataFrame) -> pd.DataFrame:
    """Those rows of the arms' best learning rates that are a pair of betas with fp32 state, with columns ``beta1`` and ``beta2``."""
    found = best[best["arm"].str.fullmatch(r"[\d.e-]+(,[\d.e-]+)?")].copy()
    numbers = found["arm"].str.split(",").map(lambda parts: [float(part) for part in parts])
    return found.assign(beta1=[pair[0] for pair in numbers], beta2=[pair[-1] for pair in numbers])


def is_plane(best: pd.DataFrame) -> bool:
    """Whether there are enough pairs of betas to speak of a plane: two tied and two untied ones."""
    cells = of(best)[["beta1", "beta2"]].drop_duplicates()
    tied = int((cells["beta1"] == cells["beta2"]).sum())
    return tied >= 2 and len(cells) - tied >= 2


class Contrast(NamedTuple):
    """The loss of one cell less that of another, paired by seed."""

    ours: str
    theirs: str
    why: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float


def compare(cells: pd.DataFrame, ours: tuple[float, float], theirs: tuple[float, float], why: str) -> Contrast:
    """Two cells: mean difference, 95 % interval and p by Student's t over seeds; NaN where there are too few."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss")
    difference = (losses[ours] - losses[theirs]).dropna()
    low = high = p = math.nan
    if len(difference) > 1 and difference.std() > 0.0:
        test = stats.ttest_1samp(difference, 0.0)
        (low, high), p = test.confidence_interval(1 - LEVEL), float(test.pvalue)
    return Contrast(
        _name(ours), _name(theirs), why, len(difference), float(difference.mean()), float(low), float(high), p
    )


def contrasts(cells: pd.DataFrame) -> list[Contrast]:
    """What the tie costs, and apart from it what beta1 does, Holm-corrected over all of them."""
    means = cells.groupby(["beta1", "beta2"])["validation_loss"].agg(lambda losses: losses.mean(skipna=False))
    tied = means[[first == second for first, second in means.index]]
    best, best_tied = means.idxmin(), tied.idxmin()
    wanted = [(best_tied, best, "best tied against the best of all")] if best != best_tied else []
    if USUAL in means.index:
        wanted.append((best_tied, USUAL, "best tied against the usual pair"))
        if TIED in tied.index and best_tied != TIED:
            wanted.append((TIED, USUAL, "0.95 tied against the usual pair"))
    for beta in sorted({first for first, _ in tied.index}):
        wanted += [
            ((beta, beta), pair, f"the tie alone, beta1 = {beta}") for pair in means.index if pair[0] == beta != pair[1]
        ]
    found = [compare(cells, ours, theirs, why) for ours, theirs, why in wanted]
    tested = [k for k, contrast in enumerate(found) if not math.isnan(contrast.p)]
    if tested:
        corrected = multipletests([found[k].p for k in tested], LEVEL, method="holm")[1]
        for k, p in zip(tested, corrected, strict=True):
            found[k] = found[k]._replace(p=float(p))
    return found


class Noise(NamedTuple):
    """What a seed does."""

    of_a_run: float
    """Standard deviation of a cell's loss over seeds, pooled."""
    of_a_pair: float
    """That of the difference of two cells with the same seed, pooled over all pairs of cells."""
    seeds: float
    """That would show a difference of 0.1 % (two-sided 5 %, power 80 %)."""


def noise(cells: pd.DataFrame) -> Noise:
    """Pooled over the cells in which no run has diverged."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss").dropna(axis=1)
    alone = math.sqrt(losses.var().mean())
    # The pooled variance of all differences of two columns is twice what is left when each seed's mean is taken out.
    paired = math.sqrt(
        2.0 * losses.sub(losses.mean(axis=1), axis=0).var().mean() * losses.shape[1] / (losses.shape[1] - 1)
    )
    effect = SMALL * float(losses.to_numpy().mean()) / paired
    return Noise(alone, paired, float(TTestPower().solve_power(effect_size=effect, alpha=LEVEL, power=POWER)))


def at_edge(table: pd.DataFrame, cells: pd.DataFrame) -> set[tuple[float, float]]:
    """Cells whose best learning rate is the least or the greatest that was tried for them."""
    rates = table.groupby("arm")["lr"].agg(["min", "max"])
    return {
        (row.beta1, row.beta2)
        for row in cells.drop_duplicates("arm").itertuples()
        if rates.loc[row.arm, "min"] < rates.loc[row.arm, "max"] and row.lr in tuple(rates.loc[row.arm])
    }


def heat_map(cells: pd.DataFrame, edges: set[tuple[float, float]]) -> Any:
    """A figure: the mean loss of each cell, the diagonal framed, cells at the edge of their learning rates marked with *."""
    means = cells.groupby(["beta2", "beta1"])["validation_loss"].mean().unstack()
    figure, axes = plt.subplots(figsize=(1.2 + 0.85 * means.shape[1], 1.0 + 0.6 * means.shape[0]), layout="constrained")
    image = axes.imshow(means, origin="lower", aspect="auto", cmap="viridis_r")
    axes.set_xticks(range(means.shape[1]), [f"{beta:g}" for beta in means.columns])
    axes.set_yticks(range(means.shape[0]), [f"{beta:g}" for beta in means.index])
    axes.set_xlabel("beta1")
    axes.set_ylabel("beta2")
    middle = np.nanmean([np.nanmin(means), np.nanmax(means)])
    for y, beta2 in enumerate(means.index):
        for x, beta1 in enumerate(means.columns):
            value = means.loc[beta2, beta1]
            text = "" if math.isnan(value) else f"{value:.3f}{'*' if (beta1, beta2) in edges else ''}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if value < middle else "black")
            if beta1 == beta2:
                axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=1.6))
    figure.colorbar(image, label="validation loss")
    return figure


def markdown(table: pd.DataFrame, best: pd.DataFrame) -> str:
    """The contrasts as a table, and the noise, for a report."""
    cells = of(best)
    found = noise(cells)
    lines = ["| | cell | less | pairs | difference | 95 % interval | p (Holm) |", "|---|---|---|---|---|---|---|"]
    for c in contrasts(cells):
        interval, p = ("n/a", "n/a") if math.isnan(c.p) else (f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.3f}")
        lines.append(f"| {c.why} | {c.ours} | {c.theirs} | {c.pairs} | {c.difference:+.4f} | {interval} | {p} |")
    lines += [
        "",
        f"- A seed moves the loss of a run by {found.of_a_run:.4f} (standard deviation), and the difference of two cells by {found.of_a_pair:.4f}; "
        f"to show a difference of 0.1 % would take {math.ceil(found.seeds)} seeds (power 80 %).",
        "- The best of many cells looks better than it is: some of its lead is the luck of its seeds.",
    ]
    for window in dynamics.WINDOWS:
        chosen = dynamics.selection(of(table), window)
        lines.append(
            f"- The tied run moves most evenly of those with its beta1, lr and seed (omega, window {window}) in {chosen.tied} of {chosen.rows} rows; "
            f"{chosen.expected:.1f} by chance, p = {chosen.p:.2g}."
        )
    if edges := sorted(at_edge(table, cells)):
        lines.append(f"- At the edge of their learning rates, and not to be trusted: {', '.join(map(_name, edges))}.")
    return "\n".join(lines) + "\n"


def _name(pair: tuple[float, float]) -> str:
    return f"({pair[0]:g}, {pair[1]:g})"
