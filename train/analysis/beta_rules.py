"""The regret of rules for a tied beta on finished runs, as train.regret prints it.

train.regret explains how a loss is assigned to every beta, and what the regret of a rule is.
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
    """The regret of a rule on a comparison, in percent of the best beta's loss."""

    beta: float
    """The beta that the rule chooses; NaN if it yields none."""
    beyond: bool
    """Whether the beta lies outside the betas that were run."""
    percent: float
    """Mean over seeds; NaN if there is no beta or a run has diverged."""
    low: float
    """Lower end of the 95 % interval; NaN as ``percent``, or without a second seed."""
    high: float
    """Upper end of the 95 % interval; NaN as ``percent``, or without a second seed."""
    diverged: int = 0
    """Number of seeds that have diverged at this beta. If there is any, no cost is computed from the others."""

    def __str__(self) -> str:
        if math.isnan(self.beta):
            return "none"
        shown = f"{self.beta:.4g}" if self.beta < 0.999 else f"{self.beta:.6f}"
        if self.diverged:
            return f"{shown}: diverged ({self.diverged} runs)"
        interval = "" if math.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{shown}: {self.percent:+.2f}{interval}{' (beyond what was run)' if self.beyond else ''}"


def diagonal(table: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of the tied betas at their best learning rates.

    Returns:
        One row per seed that has ended at all of these betas, and one column per beta, in ascending order. NaN if the
        run has diverged.

    Raises:
        ConfigError: if there is no such seed, or fewer than three betas have a run that has not diverged.
    """
    cells = beta_grid.cells_of(best_lr(table))
    tied = cells[cells["beta1"] == cells["beta2"]]
    losses = tied[everywhere(tied, "arm")].pivot(index="seed", columns="beta1", values="validation_loss")
    losses = losses.sort_index(axis="columns")
    there = int(losses.notna().any().sum())
    require(
        there >= 3,
        f"there are {there} tied betas with a finished run at a seed that all of them have; at least three are needed.",
    )
    return losses


def at(losses: pd.DataFrame, beta: float) -> pd.Series:
    """Return each seed's loss at ``beta``, interpolated linearly over log(1 - beta).

    Beyond the betas that were run, it is the loss at the nearest of them.
    """
    betas = [float(each) for each in losses.columns]
    beta = min(max(beta, betas[0]), betas[-1])
    if beta in betas:  # even if a neighbour has diverged
        return losses[beta]
    right = bisect_left(betas, beta)
    here, low, high = (math.log(beta_schedule.horizon(each)) for each in (beta, betas[right - 1], betas[right]))
    part = (here - low) / (high - low)
    return (1.0 - part) * losses[betas[right - 1]] + part * losses[betas[right]]


def best(losses: pd.DataFrame) -> float:
    """Return the beta with the least mean loss, among those that have diverged at no seed if there are any."""
    converged = losses.dropna(axis="columns")
    return float((losses if converged.empty else converged).mean().idxmin())


def cost(losses: pd.DataFrame, beta: float) -> Cost:
    """Return the cost of a beta over the best one. ``beta`` is NaN if the rule yields none."""
    if math.isnan(beta):
        return Cost(beta, False, math.nan, math.nan, math.nan)
    least, ours = losses[best(losses)], at(losses, beta)
    difference, scale = paired(ours, least), 100.0 / least.mean()
    beyond = not losses.columns[0] <= beta <= losses.columns[-1]
    if ours.isna().any():
        return Cost(beta, beyond, math.nan, math.nan, math.nan, int(ours.isna().sum()))
    return Cost(beta, beyond, difference.difference * scale, difference.low * scale, difference.high * scale)


def chosen(rule: str, pilot: Path, runs: dict[str, int]) -> float:
    """Return the beta that a rule chooses for these runs; NaN if it yields none.

    Args:
        rule: the rule, as on the command line.
        pilot: the pilot.json of train.choose_beta, which need not exist.
        runs: ``steps``, ``tokens_per_step`` and ``parameters`` of each run.

    Raises:
        ConfigError: if the pilot is for other runs.
    """
    if rule == PILOT:
        if not pilot.exists():
            return math.nan
        content = load_file(PilotFile, pilot).model_dump()
        for key, value in runs.items():
            require(
                content[key] == value,
                f"{pilot} is for runs with {key} = {content[key]}, and these have {value}; "
                "run train.choose_beta with their options.",
            )
        return math.nan if content["beta"] is None else float(content["beta"])
    try:
        return beta_schedule.resolve(rule, steps=runs["steps"], tokens_per_step=runs["tokens_per_step"])
    except ValueError:
        return math.nan


def check(rules: tuple[str, ...]) -> None:
    """Check the rules.

    Raises:
        ConfigError: if a rule yields no beta on any run, or a beta that moves.
    """
    for rule in rules:
        require(not rule.startswith("from:"), f"rules has {rule!r}, whose beta moves; a rule here must give one beta.")
        try:
            beta_schedule.resolve("0.95" if rule == PILOT else rule, steps=1e12, tokens_per_step=1)
        except ValueError as error:
            raise ConfigError(f'rules has {rule!r}, which is neither "{PILOT}" nor a rule: {error}') from None


def row(place: Path, rules: tuple[str, ...]) -> dict[str, str]:
    """Return one row of the table: the comparison in ``place``, and the cost of each rule on it.

    Args:
        place: the folder of a comparison, or a CSV file.
        rules: the rules, already checked.

    Raises:
        ConfigError: if there is no table of runs, or it has too few tied betas.
    """
    kept = place.suffix == ".csv"
    file, pilot = (place, place.with_suffix(".pilot.json")) if kept else (place / TABLE, place / PILOT_FILE)
    require(not place.is_file() or kept, f"runs has {place}, which is neither a folder nor a .csv file.")
    require(
        file.exists(), f"{file} is missing; {'give another' if kept else f'python -m train.report {place} makes it'}."
    )
    table = beta_grid.read(file)
    finished = table[table["validation_loss"].notna()]
    require(len(finished) > 0, f"{file} has no run that has finished.")
    require(
        set(NEEDED) <= set(table.columns) and (finished[NEEDED] >= 1).all(axis=None),
        f"{file} lacks numbers above 0 in the columns {', '.join(NEEDED)}, which the rules need.",
    )
    steps, tokens, parameters = (int(finished[column].iloc[0]) for column in NEEDED)
    runs = {"steps": steps, "tokens_per_step": tokens // steps, "parameters": parameters}
    try:
        losses = diagonal(table)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
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
