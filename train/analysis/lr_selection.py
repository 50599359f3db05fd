"""The learning rate at which an arm did best, and whether it might do better beyond those that were tried."""

from __future__ import annotations

import pandas as pd


def everywhere(table: pd.DataFrame, column: str) -> pd.Series:
    """Which rows are of a seed whose runs have ended at all values of ``column``: a mask, (rows,)."""
    return table.groupby("seed")[column].transform("nunique") == table[column].nunique()


def best_lr(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm's best learning rate: fewest divergences, then the lowest mean loss.

    While runs are missing, over the seeds that have ended at every learning rate of the arm, if there are any.
    """
    kept = []
    for _, arm in table.groupby("arm", sort=False):
        ended = everywhere(arm, "lr")
        by_lr = (arm[ended] if ended.any() else arm).groupby("lr")["validation_loss"]
        ranking = pd.DataFrame({"diverged": by_lr.apply(lambda x: x.isna().sum()), "loss": by_lr.mean()})
        kept.append(arm[arm["lr"] == ranking.sort_values(["diverged", "loss"]).index[0]])
    return pd.concat(kept)


def at_edge(table: pd.DataFrame) -> list[str]:
    """The arms whose best learning rate is the least or the greatest that was tried for them, as the only one is; none if each arm was run at
    one alone, since they were tuned elsewhere then, and no arm that has diverged at all of its best one's seeds."""
    tried = table.groupby("arm", sort=False)["lr"].agg(["min", "max", "nunique"])
    rows = best_lr(table).groupby("arm", sort=False)
    best = rows["lr"].first()
    outer = ((best == tried["min"]) | (best == tried["max"])) & (rows["validation_loss"].count() > 0)
    return list(tried.index[outer & (tried["nunique"].max() > 1)])
