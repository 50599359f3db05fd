"""What rules for a tied beta cost on runs that were made: ``python -m train.regret FOLDER_OR_CSV ...``.

A comparison with several tied betas, each at its best learning rate, has a loss for every beta: between two of its betas, a
straight line over log(1 - beta); beyond them, that of the nearest. A rule's regret is the loss at the beta it chooses less that
at the best of those that were run, which was chosen by looking, so that no rule can do better but by luck.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from balanced_adam import beta_schedule
from train.analysis import beta_grid
from train.analysis.lr_selection import best_lr, everywhere
from train.analysis.paired_stats import paired
from train.analysis.results import TABLE
from train.common.errors import ConfigError, require
from train.common.files import load_file
from train.common.schemas import PILOT_FILE, PilotFile

PILOT = "pilot"
NEEDED = ["step", "tokens", "parameters"]


class Cost(NamedTuple):
    """Of a rule on a comparison. In percent of the best beta's loss; NaN without a second seed, or where it can't be said."""

    beta: float
    """NaN if the rule comes to none."""
    beyond: bool
    """Whether it lies outside the betas that were run."""
    percent: float
    low: float
    high: float
    diverged: int = 0
    """Seeds; those that are left make no cost."""

    def __str__(self) -> str:
        if math.isnan(self.beta):
            return "none"
        shown = f"{self.beta:.4g}" if self.beta < 0.999 else f"{self.beta:.6f}"
        if self.diverged:
            return f"{shown}: diverged ({self.diverged} runs)"
        interval = "" if math.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{shown}: {self.percent:+.2f}{interval}{' (beyond what was run)' if self.beyond else ''}"


def diagonal(table: pd.DataFrame) -> pd.DataFrame:
    """The losses of the tied betas at their best learning rates, a row a seed that has ended at all of them and a column a beta, in order;
    NaN is one that has diverged.

    Raises:
        ConfigError: if there is no such seed, or there are less than three betas with a run that has not diverged.
    """
    cells = beta_grid.cells_of(best_lr(table))
    tied = cells[cells["beta1"] == cells["beta2"]]
    losses = tied[everywhere(tied, "arm")].pivot(index="seed", columns="beta1", values="validation_loss")
    losses = losses.sort_index(axis="columns")
    there = int(losses.notna().any().sum())
    require(
        there >= 3,
        f"there are {there} tied betas with a finished run at a seed that all of them have; it takes at least three.",
    )
    return losses


def at(losses: pd.DataFrame, beta: float) -> pd.Series:
    """The loss of each seed at ``beta``: on straight lines over log(1 - beta), and at the nearest beta beyond those that were run."""
    betas = [float(each) for each in losses.columns]
    beta = min(max(beta, betas[0]), betas[-1])
    if beta in betas:  # whatever its neighbours have
        return losses[beta]
    right = bisect_left(betas, beta)
    here, low, high = (math.log(beta_schedule.horizon(each)) for each in (beta, betas[right - 1], betas[right]))
    part = (here - low) / (high - low)
    return (1.0 - part) * losses[betas[right - 1]] + part * losses[betas[right]]


def best(losses: pd.DataFrame) -> float:
    """The beta with the least mean loss, of those that have diverged at no seed; of all, if there is none."""
    whole = losses.dropna(axis="columns")
    return float((losses if whole.empty else whole).mean().idxmin())


def cost(losses: pd.DataFrame, beta: float) -> Cost:
    """Of a beta, however it was chosen; NaN: of none."""
    if math.isnan(beta):
        return Cost(beta, False, math.nan, math.nan, math.nan)
    least, ours = losses[best(losses)], at(losses, beta)
    found, scale = paired(ours, least), 100.0 / least.mean()
    beyond = not losses.columns[0] <= beta <= losses.columns[-1]
    if ours.isna().any():
        return Cost(beta, beyond, math.nan, math.nan, math.nan, int(ours.isna().sum()))
    return Cost(beta, beyond, found.difference * scale, found.low * scale, found.high * scale)


def chosen(rule: str, pilot: Path, runs: dict[str, int]) -> float:
    """The beta of a rule for these runs; NaN if it comes to none.

    Args:
        rule: its words.
        pilot: the file that train.choose_beta has left, if there is one.
        runs: ``steps``, ``tokens_per_step`` and ``parameters`` of each.

    Raises:
        ConfigError: if there is a pilot for other runs.
    """
    if rule == PILOT:
        if not pilot.exists():
            return math.nan
        found = load_file(PilotFile, pilot).model_dump()
        for key, value in runs.items():
            require(found[key] == value, f"{pilot} is for runs with {key} = {found[key]}, and these have {value}.")
        return math.nan if found["beta"] is None else float(found["beta"])
    try:
        return beta_schedule.resolve(rule, steps=runs["steps"], tokens_per_step=runs["tokens_per_step"])
    except ValueError:
        return math.nan


def check(rules: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` if one of them would come to no beta on any run, or to more than one."""
    for rule in rules:
        require(not rule.startswith("from:"), f"rules has {rule!r}, whose beta moves; a rule here must come to one.")
        try:
            beta_schedule.resolve("0.95" if rule == PILOT else rule, steps=1e12, tokens_per_step=1)
        except ValueError as error:
            raise ConfigError(f'rules has {rule!r}, which is not "{PILOT}", and {error}') from None


def row(place: Path, rules: tuple[str, ...]) -> dict[str, str]:
    """Of the table, for one comparison.

    Raises:
        ConfigError: if it has no table of runs, or they don't make a diagonal.
    """
    kept = place.suffix == ".csv"
    file, pilot = (place, place.with_suffix(".pilot.json")) if kept else (place / TABLE, place / PILOT_FILE)
    require(
        file.exists(), f"{file} is missing; {'give another' if kept else f'python -m train.report {place} makes it'}."
    )
    table = beta_grid.read(file)
    finished = table[table["validation_loss"].notna()]
    require(
        len(finished) > 0 and set(NEEDED) <= set(table.columns) and (finished[NEEDED] >= 1).all(axis=None),
        f"{file} has no run that has finished, or lacks the numbers in the columns {', '.join(NEEDED)}, which the rules need.",
    )
    steps, tokens, parameters = (int(finished[column].iloc[0]) for column in NEEDED)
    runs = {"steps": steps, "tokens_per_step": tokens // steps, "parameters": parameters}
    losses = diagonal(table)
    least = best(losses)
    edge = " (at the edge of those that were run)" if least in (losses.columns[0], losses.columns[-1]) and least else ""
    tied = beta_grid.cells_of(table).query("beta1 == beta2")
    left_out = tied["seed"].nunique() - len(losses)
    cells = {
        "runs": f"{place.stem if kept else place}: {parameters} weights, {steps} steps of {tokens // steps} tokens",
        "seeds": f"{len(losses)}{f' ({left_out} more lack a beta)' if left_out else ''}",
        "best tied": f"{least:g}: {losses[least].mean():.4f}{edge}",
    }
    return cells | {rule: str(cost(losses, chosen(rule, pilot, runs))) for rule in rules}
