"""Analysis of a comparison over the (beta1, beta2) plane: heat map, cost of tying the betas, and noise between seeds.

train.report includes it in a report, and train.plane makes it from report.csv files that were kept.
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
from train.analysis.results import NUMBER
from train.common.errors import ConfigError, first_line, require

POWER, SMALL = 0.8, 0.001
"""Power of the tests, and the relative difference in loss that counts as small."""
USUAL, TIED = (0.9, 0.95), (0.95, 0.95)
ALIKE = ("step", "tokens", "parameters", "validation_blocks")  # have to be equal in all runs that have finished
Pair = tuple[float, float]
"""(beta1, beta2)."""


def cells_of(best: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose arm is a pair of betas with fp32 state, with the columns ``beta1`` and ``beta2`` added."""
    cells = best[best["arm"].str.fullmatch(f"{NUMBER}(,{NUMBER})?")].copy()
    numbers = cells["arm"].str.split(",").map(lambda parts: [float(part) for part in parts])
    return cells.assign(beta1=[pair[0] for pair in numbers], beta2=[pair[-1] for pair in numbers])


def is_grid(best: pd.DataFrame) -> bool:
    """Return whether there are enough pairs of betas for a plane: two tied ones, and untied ones of two beta1."""
    cells = cells_of(best)[["beta1", "beta2"]].drop_duplicates()
    tied = cells["beta1"] == cells["beta2"]
    return int(tied.sum()) >= 2 and cells.loc[~tied, "beta1"].nunique() >= 2


def means(cells: pd.DataFrame) -> pd.Series:
    """Return the mean loss of each cell, by (beta1, beta2). NaN if a run of the cell has diverged, at any seed.

    The mean is over the seeds that have ended in all cells; if there is none, over each cell's own seeds.
    """
    ended = everywhere(cells, "arm")
    chosen = cells[ended] if ended.any() else cells
    losses = chosen.groupby(["beta1", "beta2"])["validation_loss"].mean()
    converged = cells.groupby(["beta1", "beta2"])["validation_loss"].agg(lambda values: values.notna().all())
    return losses.where(converged.loc[losses.index])


class Contrast(NamedTuple):
    """The loss of one cell minus that of another, paired by seed."""

    ours: Pair
    theirs: Pair
    why: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float


def compare(cells: pd.DataFrame, ours: Pair, theirs: Pair, why: str) -> Contrast:
    """Compare two cells: mean difference, 95 % interval and p by Student's t over seeds; NaN if there are too few."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss")
    return Contrast(ours, theirs, why, *paired(losses[ours], losses[theirs]))


def contrasts(cells: pd.DataFrame) -> list[Contrast]:
    """Return the comparisons of cells that have not diverged, each once, with p Holm-corrected over all of them.

    They are: the best tied against the best untied cell; the tie alone, at the best tied beta1, at 0.95 and at 0.9; and
    beta1 alone, between neighbours at the greatest beta2 that ties neither.
    """
    losses = means(cells).dropna()
    tied, untied = losses[_is_tied(losses)], losses[~_is_tied(losses)]
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
    """The effect of the seed on the loss; NaN if there are too few seeds.

    Medians are used, since the loss of a cell that nearly diverges varies far more than the others'.
    """

    of_a_run: float
    """Standard deviation of a cell's loss over seeds; the median over cells."""
    of_a_pair: float
    """Standard deviation of the difference of two cells with the same seed; the median over all pairs of cells."""
    seeds: int | None
    """Number of seeds that would show a difference of 0.1 % (one two-sided test at 5 %, power 80 %)."""


def noise(cells: pd.DataFrame) -> Noise:
    """Measure the noise between seeds on runs that have not diverged. Two cells are compared on the seeds of both."""
    losses = cells.pivot(index="seed", columns=["beta1", "beta2"], values="validation_loss")
    pairs = [(losses[a] - losses[b]).var() for a, b in combinations(losses.columns, 2)]
    alone, paired = (
        math.sqrt(np.nanmedian(values)) if np.isfinite(values).any() else math.nan for values in (losses.var(), pairs)
    )
    return Noise(alone, paired, seeds_for(SMALL * float(losses.mean().mean()), paired))


def seeds_for(difference: float, deviation: float) -> int | None:
    """Return the number of pairs needed to show a mean difference (two-sided 5 %, power 80 %).

    Args:
        difference: the mean difference to show.
        deviation: the standard deviation of the pairs' differences.

    Returns:
        None if ``deviation`` is 0 or NaN, or 100 000 pairs are too few.
    """
    if not deviation > 0.0:
        return None
    power = TTestPower().power
    counts = range(2, 100_000)
    index = bisect_left(counts, POWER, key=lambda count: power(difference / deviation, count, LEVEL))
    return counts[index] if index < len(counts) else None


def edges(table: pd.DataFrame) -> set[Pair]:
    """Return the cells at the edge of their learning rates (:func:`train.analysis.lr_selection.at_edge`)."""
    marked = cells_of(table[table["arm"].isin(at_edge(table))])
    return set(zip(marked["beta1"], marked["beta2"], strict=True))


def heat_map(cells: pd.DataFrame, marked: set[Pair]) -> Any:
    """Draw the mean loss of each cell (:func:`means`). The diagonal is framed, and cells in ``marked`` have a *."""
    grid = means(cells).unstack("beta1")
    diverged = (
        cells.groupby(["beta2", "beta1"])["validation_loss"].agg(lambda losses: int(losses.isna().sum())).unstack()
    )
    figure, axes = plt.subplots(figsize=(1.2 + 0.85 * grid.shape[1], 1.0 + 0.6 * grid.shape[0]), layout="constrained")
    least, middle, most = (
        np.nanquantile(grid, part) if grid.notna().any(axis=None) else 0.0 for part in (0.0, 0.5, 1.0)
    )
    most = min(most, least + 3.0 * (middle - least))  # an outlier must not take up the colour range
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis_r", vmin=least, vmax=most)
    axes.set_xticks(range(grid.shape[1]), [f"{beta:g}" for beta in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [f"{beta:g}" for beta in grid.index])
    axes.set_xlabel("beta1")
    axes.set_ylabel("beta2")
    for (y, beta2), (x, beta1) in product(enumerate(grid.index), enumerate(grid.columns)):
        value, count = grid.loc[beta2, beta1], diverged.loc[beta2, beta1]
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
    figure.colorbar(image, label="validation loss", extend="max" if (grid > most).any(axis=None) else "neither")
    return figure


def markdown(table: pd.DataFrame, best: pd.DataFrame) -> str:
    """Return the contrasts as a Markdown table, and notes on how to read it.

    Args:
        table: all runs.
        best: the rows of each arm's best learning rate.
    """
    cells, marked = cells_of(best), edges(table)
    tests = contrasts(cells)
    lines = [
        *_contrast_table(tests, marked),
        "",
        *_correction_note(tests),
        *_selection_notes(means(cells)),
        *_divergence_notes(cells),
        *_noise_note(noise(cells)),
        *_evenness_notes(table),
    ]
    if marked:
        lines.append(
            "- *: best at the edge of their learning rates, or run at one alone, and not to be trusted: "
            f"{', '.join(map(_name, sorted(marked)))}."
        )
    return "\n".join(lines) + "\n"


def _contrast_table(tests: list[Contrast], marked: set[Pair]) -> list[str]:
    """Return the lines of the table of contrasts. Cells in ``marked`` have a *."""

    def named(pair: Pair) -> str:
        return _name(pair) + ("*" if pair in marked else "")

    lines = ["| | cell | less | pairs | difference | 95 % interval | p (Holm) |", "|---|---|---|---|---|---|---|"]
    for c in tests:
        interval, p = ("n/a", "n/a") if math.isnan(c.p) else (f"{c.low:+.4f} to {c.high:+.4f}", f"{c.p:.3f}")
        difference = f"{c.difference:+.4f}" if c.pairs else "n/a"
        lines.append(f"| {c.why} | {named(c.ours)} | {named(c.theirs)} | {c.pairs} | {difference} | {interval} | {p} |")
    return lines


def _correction_note(tests: list[Contrast]) -> list[str]:
    """Return a note on Holm's correction, if there is any test."""
    tested = [c.pairs for c in tests if not math.isnan(c.p)]
    if not tested:
        return []
    t = stats.t.ppf(1.0 - LEVEL / 2 / len(tested), min(tested) - 1)
    return [
        f"- p is corrected for {len(tested)} comparisons, the intervals are not: with {min(tested)} pairs the first of "
        f"them has to be {t:.1f} standard errors from 0."
    ]


def _selection_notes(losses: pd.Series) -> list[str]:
    """Return notes on how the best cells were selected, and which best betas lie at the edge of those that were run.

    Args:
        losses: mean loss by (beta1, beta2), from :func:`means`; NaN if the cell has diverged.
    """
    converged = losses.dropna()
    tied_converged, tied = converged[_is_tied(converged)], losses[_is_tied(losses)]
    untied = losses[~_is_tied(losses)]
    notes = [
        "- Cells are chosen by their mean over the seeds that all have (over their own, if there is none); the best of "
        f"many looks better than it is, and of {len(converged) - len(tied_converged)} untied cells more so than of "
        f"{len(tied_converged)} tied ones."
    ]
    for what, candidates, run, axis in (
        ("tied beta", tied_converged, tied, 0),
        ("beta1", converged, untied, 0),  # a tied cell alone does not make a row of the grid
        ("beta2", converged, untied, 1),
    ):
        betas = run.index.get_level_values(axis)
        if len(candidates) > 1 and len(set(betas)) > 1:
            best = candidates.idxmin()[axis]
            if 0.0 < best <= min(betas) or best >= max(betas):
                notes.append(
                    f"- The best {what} is {best:g}, at the edge of those that were run; the optimum may lie beyond."
                )
    return notes


def _divergence_notes(cells: pd.DataFrame) -> list[str]:
    """Return a note for each cell in which a run has diverged."""
    return [
        f"- {_name(cell)} has diverged in {losses.isna().sum()} of {len(losses)} runs, and is in no comparison."
        for cell, losses in cells.groupby(["beta1", "beta2"])["validation_loss"]
        if losses.isna().any()
    ]


def _noise_note(measured: Noise) -> list[str]:
    """Return a note on the noise between seeds, if it could be measured."""
    if math.isnan(measured.of_a_pair):
        return []
    needed = "more than anybody has" if measured.seeds is None else f"{measured.seeds}"
    return [
        f"- A seed moves the loss of a run by {measured.of_a_run:.4f} (standard deviation), and the difference of two "
        f"cells by {measured.of_a_pair:.4f}; to show a difference of 0.1 % in one comparison takes {needed} seeds "
        "(power 80 %)."
    ]


def _evenness_notes(table: pd.DataFrame) -> list[str]:
    """Return a note for each window of :mod:`train.analysis.training_dynamics` that the table has."""
    notes = []
    for window in training_dynamics.WINDOWS:
        if f"omega_{window}" in table:
            even = training_dynamics.selection(cells_of(table), window)
            notes.append(
                f"- Of the runs with its beta1 the tied one moves most evenly (omega, window {window}) in "
                f"{even.votes} of {even.beta1s} beta1s (p = {even.p:.2g}), "
                f"and in {even.tied} of {even.rows} rows of one lr and seed."
            )
    return notes


def _is_tied(losses: pd.Series) -> Any:
    """Return a mask, (cells,), of the tied cells among losses by (beta1, beta2)."""
    return losses.index.get_level_values(0) == losses.index.get_level_values(1)


def _name(pair: Pair) -> str:
    return f"({pair[0]:g}, {pair[1]:g})"


def read(*files: Path) -> pd.DataFrame:
    """Read the runs of all tables.

    Raises:
        ConfigError: if a file can't be read or is not a table of runs, a run is in two of them, or the runs differ in
            more than arm, lr and seed.
    """
    tables = []
    for file in files:
        try:
            table = pd.read_csv(file, dtype={"arm": str})
            present = [name for name in ALIKE if name in table.columns]
            needed = table[["arm", "lr", "seed", "validation_loss", *present]]
            numbers = needed.drop(columns="arm").apply(pd.to_numeric)
        except OSError as error:
            raise ConfigError(f"{file} can't be read: {error.strerror}; give a report.csv of train.report.") from None
        except (KeyError, ValueError, TypeError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else first_line(error).rstrip(".")
            raise ConfigError(f"{file} is not a table of runs ({reason}); give a report.csv of train.report.") from None
        require(
            len(table) > 0 and table[["arm", "lr", "seed"]].notna().all(axis=None),
            f"{file} is not a table of runs: it has a row without arm, lr or seed, or none at all.",
        )
        tables.append(table.assign(**numbers))
    require(bool(tables), "no table is given; give report.csv files of train.report.")
    runs = pd.concat(tables, ignore_index=True)
    twice = runs.duplicated(["arm", "lr", "seed"])
    require(
        not twice.any(), f"the tables have the arm, lr and seed of {int(twice.sum())} runs twice; give each run once."
    )
    finished = runs[runs["validation_loss"].notna()]
    for column in [name for name in ALIKE if name in finished.columns]:
        values = finished[column].unique()
        require(
            len(values) <= 1,
            f"the tables have runs that differ in more than arm, lr and seed: "
            f"{column} is {', '.join(f'{value:g}' for value in values)}.",
        )
    return runs
