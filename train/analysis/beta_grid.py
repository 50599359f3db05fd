"""A comparison over the beta plane: heat map, what the tie costs, the noise of a seed, and how many seeds a small difference would take.

train.report shows it. From report.csv files that were kept, such as those in docs/results: ``python -m train.plane FILE ... --out plane.svg``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from scipy import stats
from statsmodels.stats.power import TTestPower

from train.analysis import training_dynamics
from train.analysis.lr_selection import at_edge, everywhere
from train.analysis.paired_stats import LEVEL, holm, paired
from train.common.errors import ConfigError, first_line, require

POWER, SMALL = 0.8, 0.001
USUAL, TIED = (0.9, 0.95), (0.95, 0.95)
NUMBER = r"\d*\.?\d+(e-?\d+)?"
ALIKE = ("step", "tokens", "parameters", "validation_blocks")  # in all runs that have finished
Pair = tuple[float, float]


def cells_of(best: pd.DataFrame) -> pd.DataFrame:
    """Those rows of the arms' best learning rates that are a pair of betas with fp32 state, with columns ``beta1`` and ``beta2``."""
    found = best[best["arm"].str.fullmatch(f"{NUMBER}(,{NUMBER})?")].copy()
    numbers = found["arm"].str.split(",").map(lambda parts: [float(part) for part in parts])
    return found.assign(beta1=[pair[0] for pair in numbers], beta2=[pair[-1] for pair in numbers])


def is_grid(best: pd.DataFrame) -> bool:
    """Whether there are enough pairs of betas to speak of a plane: two tied and two untied ones."""
    cells = cells_of(best)[["beta1", "beta2"]].drop_duplicates()
    tied = int((cells["beta1"] == cells["beta2"]).sum())
    return tied >= 2 and len(cells) - tied >= 2


def means(cells: pd.DataFrame) -> pd.Series:
    """The mean loss of each cell over the seeds that have ended in all cells (over its own, if there is none), by (beta1, beta2). NaN where
    a run has diverged, at whatever seed."""
    ended = everywhere(cells, "arm")
    chosen = cells[ended] if ended.any() else cells
    found = chosen.groupby(["beta1", "beta2"])["validation_loss"].mean()
    whole = cells.groupby(["beta1", "beta2"])["validation_loss"].agg(lambda losses: losses.notna().all())
    return found.where(whole.loc[found.index])


class Contrast(NamedTuple):
    """The loss of one cell less that of another, paired by seed."""

    ours: Pair
    theirs: Pair
    why: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float


def compare(cells: pd.DataFrame, ours: Pair, theirs: Pair, why: str) -> Contrast:
    """Two cells: mean difference, 95 % interval and p by Student's t over seeds; NaN where there are too few."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss")
    return Contrast(ours, theirs, why, *paired(losses[ours], losses[theirs]))


def contrasts(cells: pd.DataFrame) -> list[Contrast]:
    """Of the cells that have not diverged: what the tie costs as a whole; the tie alone, at the best tied beta1, at 0.95 and at 0.9; beta1
    alone, between neighbours at the greatest beta2 that ties neither. Each comparison once, Holm-corrected over all of them."""
    found = means(cells).dropna()
    tied, untied = found[_is_tied(found)], found[~_is_tied(found)]
    wanted: dict[tuple[Pair, Pair], str] = {}
    if len(tied) and len(untied):
        best = tied.idxmin()
        wanted[best, untied.idxmin()] = "best tied against best untied"
        for pair in (best, TIED):
            if USUAL in untied.index and pair in tied.index:
                wanted.setdefault((pair, USUAL), "tied against the usual pair")
        for beta in dict.fromkeys([best[0], TIED[0], USUAL[0]]):
            if (beta, beta) in tied.index:
                for pair in untied.index[untied.index.get_level_values("beta1") == beta]:
                    wanted.setdefault(((beta, beta), pair), "the tie alone")
        for first, second in pairwise(sorted({first for first, _ in untied.index})):
            if at := [beta2 for beta1, beta2 in untied.index if beta1 == first and (second, beta2) in untied.index]:
                wanted.setdefault(((second, max(at)), (first, max(at))), "beta1 alone")
    results = [compare(cells, *pairs, why) for pairs, why in wanted.items()]
    corrected = holm(pd.Series([contrast.p for contrast in results], dtype=float))
    return [contrast._replace(p=float(p)) for contrast, p in zip(results, corrected, strict=True)]


class Noise(NamedTuple):
    """What a seed does; NaN where there are too few."""

    of_a_run: float
    """Standard deviation of a cell's loss over seeds, the median of the cells'."""
    of_a_pair: float
    """That of the difference of two cells with the same seed, the median of all pairs': a cell that nearly diverges scatters like no other."""
    seeds: int | None
    """That would show a difference of 0.1 % (one two-sided test at 5 %, power 80 %)."""


def noise(cells: pd.DataFrame) -> Noise:
    """Of runs that have not diverged; every two cells are compared on the seeds that both have."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss")
    pairs = [(losses[a] - losses[b]).var() for a, b in combinations(losses.columns, 2)]
    alone, paired = (
        math.sqrt(np.nanmedian(values)) if np.isfinite(values).any() else math.nan for values in (losses.var(), pairs)
    )
    return Noise(alone, paired, seeds_for(SMALL * float(losses.mean().mean()), paired))


def seeds_for(difference: float, deviation: float) -> int | None:
    """How many pairs show a mean difference, if theirs scatter so much (two-sided 5 %, power 80 %); None if that can't be said."""
    if not deviation > 0.0:
        return None
    power = TTestPower().power
    counts = range(2, 100_000)
    found = bisect_left(counts, POWER, key=lambda count: power(difference / deviation, count, LEVEL))
    return counts[found] if found < len(counts) else None


def edges(table: pd.DataFrame) -> set[Pair]:
    """Cells at the edge of their learning rates (:func:`train.analysis.lr_selection.at_edge`)."""
    marked = cells_of(table[table["arm"].isin(at_edge(table))])
    return set(zip(marked["beta1"], marked["beta2"], strict=True))


def heat_map(cells: pd.DataFrame, marked: set[Pair]) -> Any:
    """A figure: the mean loss of each cell (:func:`means`), the diagonal framed, cells at the edge of their learning rates marked with *."""
    found = means(cells).unstack("beta1")
    diverged = (
        cells.groupby(["beta2", "beta1"])["validation_loss"].agg(lambda losses: int(losses.isna().sum())).unstack()
    )
    figure, axes = plt.subplots(figsize=(1.2 + 0.85 * found.shape[1], 1.0 + 0.6 * found.shape[0]), layout="constrained")
    least, middle, most = (
        np.nanquantile(found, part) if found.notna().any(axis=None) else 0.0 for part in (0.0, 0.5, 1.0)
    )
    most = min(most, least + 3.0 * (middle - least))  # a cell that has run away must not take all colours
    image = axes.imshow(found, origin="lower", aspect="auto", cmap="viridis_r", vmin=least, vmax=most)
    axes.set_xticks(range(found.shape[1]), [f"{beta:g}" for beta in found.columns])
    axes.set_yticks(range(found.shape[0]), [f"{beta:g}" for beta in found.index])
    axes.set_xlabel("beta1")
    axes.set_ylabel("beta2")
    for (y, beta2), (x, beta1) in product(enumerate(found.index), enumerate(found.columns)):
        value, count = found.loc[beta2, beta1], diverged.loc[beta2, beta1]
        text = ""
        if count > 0:
            text = f"{count:.0f} diverged"
        elif not math.isnan(value):
            text = f"{value:{'.3f' if value < 100 else '.0f'}}{'*' if (beta1, beta2) in marked else ''}"
        axes.text(
            x, y, text, ha="center", va="center", fontsize=8, color="white" if value > (least + most) / 2 else "black"
        )
        if beta1 == beta2:
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=1.6))
    figure.colorbar(image, label="validation loss", extend="max" if (found > most).any(axis=None) else "neither")
    return figure


def markdown(table: pd.DataFrame, best: pd.DataFrame) -> str:
    """The contrasts as a table, and the noise, for a report."""
    cells, marked = cells_of(best), edges(table)
    found, asked = noise(cells), contrasts(cells)

    def named(pair: Pair) -> str:
        return _name(pair) + ("*" if pair in marked else "")

    lines = ["| | cell | less | pairs | difference | 95 % interval | p (Holm) |", "|---|---|---|---|---|---|---|"]
    for c in asked:
        interval, p = ("n/a", "n/a") if math.isnan(c.p) else (f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.3f}")
        difference = f"{c.difference:+.4f}" if c.pairs else "n/a"
        lines.append(f"| {c.why} | {named(c.ours)} | {named(c.theirs)} | {c.pairs} | {difference} | {interval} | {p} |")
    lines.append("")
    tested = [c.pairs for c in asked if not math.isnan(c.p)]
    if tested:
        t = stats.t.ppf(1.0 - LEVEL / 2 / len(tested), min(tested) - 1)
        lines.append(
            f"- p is corrected for {len(tested)} comparisons, the intervals are not: with {min(tested)} pairs the first of them has to be "
            f"{t:.1f} standard errors from 0."
        )
    everything = means(cells)
    of_cells = everything.dropna()
    tied, ran = of_cells[_is_tied(of_cells)], everything[_is_tied(everything)]
    untied = everything[~_is_tied(everything)]
    lines.append(
        "- Cells are chosen by their mean over the seeds that all have (over their own, if there is none); the best of many looks better than "
        f"it is, and of {len(of_cells) - len(tied)} untied cells more so than of {len(tied)} tied ones."
    )
    for what, losses, run, axis in (
        ("tied beta", tied, ran, 0),
        ("beta1", of_cells, untied, 0),  # a tied cell alone makes no row
        ("beta2", of_cells, untied, 1),
    ):
        betas = run.index.get_level_values(axis)
        if len(losses) > 1 and len(set(betas)) > 1:
            chosen = losses.idxmin()[axis]
            if 0.0 < chosen <= min(betas) or chosen >= max(betas):
                lines.append(
                    f"- The best {what} is {chosen:g}, at the edge of those that were run; the optimum may lie beyond."
                )
    for cell, losses in cells.groupby(["beta1", "beta2"])["validation_loss"]:
        if losses.isna().any():
            lines.append(
                f"- {_name(cell)} has diverged in {losses.isna().sum()} of {len(losses)} runs, and is in no comparison."
            )
    if not math.isnan(found.of_a_pair):
        needed = "more than anybody has" if found.seeds is None else f"{found.seeds}"
        lines.append(
            f"- A seed moves the loss of a run by {found.of_a_run:.4f} (standard deviation), and the difference of two cells by "
            f"{found.of_a_pair:.4f}; to show a difference of 0.1 % in one comparison takes {needed} seeds (power 80 %)."
        )
    for window in training_dynamics.WINDOWS:
        if f"omega_{window}" in table:
            even = training_dynamics.selection(cells_of(table), window)
            lines.append(
                f"- Of the runs with its beta1 the tied one moves most evenly (omega, window {window}) in {even.votes} of {even.beta1s} beta1s "
                f"(p = {even.p:.2g}), and in {even.tied} of {even.rows} rows of one lr and seed."
            )
    if marked:
        lines.append(
            f"- *: best at the edge of their learning rates, or run at one alone, and not to be trusted: {', '.join(map(_name, sorted(marked)))}."
        )
    return "\n".join(lines) + "\n"


def _is_tied(losses: pd.Series) -> Any:
    """Of losses by (beta1, beta2): a mask, (cells,)."""
    return losses.index.get_level_values(0) == losses.index.get_level_values(1)


def _name(pair: Pair) -> str:
    return f"({pair[0]:g}, {pair[1]:g})"


def read(*files: Path) -> pd.DataFrame:
    """The runs in these tables.

    Raises:
        ConfigError: if one can't be read or is no table of runs, a run is in two of them, or they are of several experiments.
    """
    tables = []
    for file in files:
        try:
            table = pd.read_csv(file, dtype={"arm": str})
            present = [name for name in ALIKE if name in table.columns]
            numbers = table[["lr", "seed", "validation_loss", *present]].apply(pd.to_numeric)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{file} is no table of runs: {first_line(error)}") from None
        require(
            len(table) > 0 and table[["arm", "lr", "seed"]].notna().all(axis=None),
            f"{file} is no table of runs: it has a row without arm, lr or seed, or none at all.",
        )
        tables.append(table.assign(**numbers))
    require(bool(tables), "no table is given; give report.csv files of train.report.")
    found = pd.concat(tables, ignore_index=True)
    twice = found.duplicated(["arm", "lr", "seed"])
    require(
        not twice.any(), f"the tables have the arm, lr and seed of {int(twice.sum())} runs twice; give each run once."
    )
    finished = found[found["validation_loss"].notna()]
    for column in [name for name in ALIKE if name in finished.columns]:
        values = finished[column].unique()
        require(
            len(values) <= 1,
            f"the tables have runs that differ in more than arm, lr and seed: {column} is {', '.join(f'{value:g}' for value in values)}.",
        )
    return found
