"""Selection of each arm's best learning rate, and whether it lies at the edge of those that were tried."""

from __future__ import annotations

import pandas as pd


def everywhere(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a mask, (rows,), of the rows whose seed has ended runs at all values of ``column``."""
    return table.groupby("seed")[column].transform("nunique") == table[column].nunique()


def best_lr(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each arm's best learning rate: the fewest divergences, then the lowest mean loss.

    While runs are missing, only seeds that have ended at every learning rate of the arm count, if there are any.
    """
    kept = []
    for _, arm in table.groupby("arm", sort=False):
        ended = everywhere(arm, "lr")
        by_lr = (arm[ended] if ended.any() else arm).groupby("lr")["validation_loss"]
        ranking = pd.DataFrame({"diverged": by_lr.apply(lambda x: x.isna().sum()), "loss": by_lr.mean()})
        kept.append(arm[arm["lr"] == ranking.sort_values(["diverged", "loss"]).index[0]])
    return pd.concat(kept)


def at_edge(table: pd.DataFrame) -> list[str]:
    """Return the arms whose best learning rate is the least or the greatest that was tried for them.

    This includes an arm with a single learning rate. But if every arm has a single one, the result is empty: they were
    tuned elsewhere then. An arm that has diverged at all seeds of its best learning rate is left out.
    """
    tried = table.groupby("arm", sort=False)["lr"].agg(["min", "max", "nunique"])
    rows = best_lr(table).groupby("arm", sort=False)
    best = rows["lr"].first()
    outer = ((best == tried["min"]) | (best == tried["max"])) & (rows["validation_loss"].count() > 0)
    return list(tried.index[outer & (tried["nunique"].max() > 1)])
