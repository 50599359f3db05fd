"""Load the runs of a comparison as tables, and summarize each arm with a verdict and caveats."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from balanced_adam import beta_schedule
from train.analysis.lr_selection import at_edge
from train.analysis.paired_stats import LEVEL, Paired, holm, paired
from train.common.errors import ConfigError, require
from train.common.files import load_file
from train.common.schemas import MetricsLine, PlanFile, ResultFile, RunFile
from train.run import run_dir
from train.run.config import ARM
from train.run.metrics import NAMED, TOKENS, read_metrics

TABLE = "report.csv"
NUMBER = r"\d*\.?\d+(e-?\d+)?"
"""A beta in the name of an arm."""
PLOTS = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm before clipping",
    "update_rms": "root mean square of update / lr",
    "update_max": "greatest |update| / lr",
    "step_seconds": "seconds a step",
}


def load_results(*folders: Path) -> tuple[dict[str, Any], pd.DataFrame, dict[str, pd.DataFrame]]:
    """Load the runs of one or more comparisons.

    Returns:
        The first folder's manifest, with the runs of all folders and their common ``settings``; a table with one row
        per run that ended (name, arm, lr, seed, and the fields of result.json); and the metrics of each of these runs,
        by name.

    Raises:
        ConfigError: if there is no manifest, no run has ended, a run is in two folders, or the runs differ in more than
            arm, lr and seed.
    """
    plan: dict[str, Any] = {}
    rows, metrics = [], {}
    shared: dict[str, Any] = {}
    cells: set[tuple[str, float, int]] = set()
    for out in folders:
        file = out / "manifest.json"
        require(file.exists(), f"{out} holds no manifest.json; give the folder of a comparison.")
        manifest = load_file(PlanFile, file).model_dump(exclude_unset=True)
        missing = [name for name in ("steps", "packages") if manifest.get(name) is None]
        require(not missing, f"{file} has no {', '.join(missing)}; train.compare has not written this manifest.")
        plan = plan or {**manifest, "runs": []}
        for run in manifest["runs"]:
            cell = (run["arm"], run["lr"], run["seed"])
            require(
                cell not in cells, f"runs has {run['name']} twice, in {out} and in another folder; give one of them."
            )
            cells.add(cell)
            plan["runs"].append(run)
            try:
                result = run_dir.result(out / run["name"])
            except ConfigError as error:
                print(f"left out: {error}", file=sys.stderr)  # one damaged run must not hide the others
                continue
            lines = read_metrics(out / run["name"])
            if result and lines:
                planned = {k: run[k] for k in ("name", "arm", "lr", "seed")}
                ended = {k: v for k, v in result.items() if k in ResultFile.model_fields or isinstance(v, int | float)}
                rows.append({**planned, "parameters": math.nan, **ended, **planned})  # whatever a file calls itself
                named = {key for line in lines for key in line if key.startswith(NAMED)}
                known = sorted({*PLOTS, *MetricsLine.model_fields, *named})
                kept = [{key: line[key] for key in known if key in line} for line in lines]
                metrics[run["name"]] = pd.DataFrame(kept, columns=known)
                settings = common_settings(out / run["name"]) | {"device": result.get("device", shared.get("device"))}
                # Runs of older versions lack this: they validated on the first blocks, not on evenly spread ones.
                settings["validation_blocks"] = result.get("validation_blocks")
                shared = shared or settings
                require(
                    settings == shared,
                    f"runs has {out / run['name']}, which differs from the others in more than arm, lr and seed: "
                    f"{', '.join(k or repr(k) for k in {**shared, **settings} if settings.get(k) != shared.get(k))}.",
                )
    require(bool(rows), f"no run has ended yet in {', '.join(map(str, folders))}.")
    table = pd.DataFrame(rows)
    table["validation_loss"] = table["validation_loss"].astype(float)
    return {**plan, "settings": shared}, table, metrics


def summarize(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return one row per arm: mean loss, and the difference from the baseline with its interval and verdict.

    Differences are paired by seed. Intervals and p-values are Student's t over seeds; ``p_holm`` is corrected over arms
    (Holm) and decides the verdict (level 0.05). A diverged run counts in ``diverged``, and its seed makes no pair.
    ``percent`` times a difference is that difference in percent of the baseline's loss.

    Args:
        table: the rows of each arm's best learning rate.
        baseline: the arm that the others are compared with.

    Raises:
        ConfigError: if no run of the baseline has ended.
    """
    arms = list(table["arm"].unique())
    require(baseline in arms, f"baseline is {baseline!r}, of which no run has ended; there are {', '.join(arms)}.")
    by_seed = table.pivot(index="seed", columns="arm", values="validation_loss")
    rows = []
    for arm in arms:
        losses = by_seed[arm]
        row = {
            "arm": arm,
            "lr": table.loc[table["arm"] == arm, "lr"].iloc[0],
            "runs": int((table["arm"] == arm).sum()),
            "diverged": int(table.loc[table["arm"] == arm, "validation_loss"].isna().sum()),
            "loss": losses.mean(),
            **table.loc[table["arm"] == arm, sets_of(table)].mean().to_dict(),
        }
        difference = paired(losses, by_seed[baseline])
        row["percent"] = 100.0 / by_seed.loc[losses.notna(), baseline].mean()
        row |= difference._asdict() if arm != baseline else Paired(difference.pairs, *[math.nan] * 4)._asdict()
        rows.append(row)
    summary = pd.DataFrame(rows)
    summary["p_holm"] = holm(summary["p"])
    against = summary.loc[summary["arm"] == baseline].iloc[0].to_dict()
    summary["verdict"] = [verdict(row, against) for row in summary.to_dict("records")]
    return summary


def sets_of(table: pd.DataFrame) -> list[str]:
    """Return the columns that hold the losses on validation sets with a name."""
    return [column for column in table.columns if column.startswith(NAMED)]


def tokens_by_source(table: pd.DataFrame) -> str:
    """Return a sentence on the tokens of each source that a run has been trained on; empty without a mixture."""
    counts = table[[column for column in table.columns if column.startswith(TOKENS)]].max()
    each = [
        f"{name.removeprefix(TOKENS)} {count / 1e6:.4g} M ({100 * count / counts.sum():.3g} %)"
        for name, count in counts.items()
    ]
    return f"Tokens by source in a whole run: {', '.join(each)}." if each else ""


def verdict(row: dict[str, Any], against: dict[str, Any]) -> str:
    """Return a sentence on an arm, and more if runs of it or of the baseline, ``against``, have diverged."""
    arm, baseline = f"({row['arm']})", against["arm"]
    if row["arm"] == baseline:
        return f"{arm} is the baseline."
    differ = relation(row["arm"], baseline)
    if row["pairs"] == 0:
        return f"{arm} can't be compared: no seed finished in both arms."
    if row["pairs"] == 1:
        return f"{arm}: one seed proves nothing (difference {row['difference']:+.4f})."
    survivors = "".join(
        f" This leaves out what has diverged: {each['diverged']} of {each['runs']} runs of ({each['arm']})."
        for each in (row, against)
        if each["diverged"]
    )
    if not row["p_holm"] < LEVEL:
        return f"{arm} is not distinguishable from ({baseline}) at n = {row['pairs']}.{survivors}{differ}"
    better = "better" if row["difference"] < 0 else "worse"
    by = f"{abs(row['difference']):.4f}"
    return f"{arm} is {better} than ({baseline}) by {by} at n = {row['pairs']}.{survivors}{differ}"


def _betas(arm: str) -> tuple[tuple[float, float] | None, list[str]]:
    """Return an arm's two betas, None if a rule chooses them, and what else its name says: optimizer, format."""
    betas, rest = None, []
    for part in arm.split(":"):
        if betas is None and re.fullmatch(f"{NUMBER}(,{NUMBER})?", part):
            first, *more = map(float, part.split(","))
            betas = first, more[0] if more else first
        else:
            rest.append(part)
    return (None, []) if any(map(beta_schedule.is_rule, rest)) else (betas, rest)


def relation(arm: str, baseline: str) -> str:
    """Return a sentence on what two arms differ in, after a space; empty if that can't be told from their betas.

    The tie is one thing, and the memory, which beta1 decides, another.
    """
    (ours, more), (theirs, others) = _betas(arm), _betas(baseline)
    if ours is None or theirs is None:
        return ""
    differ = []
    tied, was_tied = (first == second for first, second in (ours, theirs))
    if ours[0] != theirs[0]:
        differ.append("the memory")
    if tied != was_tied:
        differ.append("the tie")
    elif not tied and ours[1] != theirs[1]:
        differ.append("beta2")
    if more != others:
        differ.append("the optimizer or the format of its state")
    return f" They differ in {' and '.join(differ)}{' alone' if len(differ) == 1 else ''}." if differ else ""


def renewals(arms: Iterable[str], steps: int) -> str:
    """Return a sentence on how often a run renews its first moment, beside published runs; empty without numbers."""
    firsts = sorted({betas[0] for arm in arms if (betas := _betas(arm)[0]) is not None})
    if not firsts:
        return ""
    each = ", ".join(f"{(1 - beta) * steps:.3g} at beta1 = {beta:g}" for beta in firsts)
    return (
        f"(1 - beta1) T, how often {steps} steps renew the first moment, is {each}; with the best tied betas of arXiv "
        "2505.21829 it was 120 to 390."
    )


def caveats(table: pd.DataFrame) -> list[str]:
    """Return what a reader must know before trusting the table, one sentence each."""
    rates = sorted(table["lr"].unique())
    sentences = []
    if len(rates) == 1:
        sentences.append(
            f"One learning rate ({rates[0]:g}) was used for all arms; an arm tuned on its own might do better."
        )
    elif table.groupby("arm")["lr"].nunique().max() == 1:
        sentences.append("Each arm was run at one learning rate, chosen for it beforehand.")
    else:
        same = table.groupby("arm")["lr"].nunique().min() == len(rates)
        sentences.append(
            f"Each arm is shown at its best of {'the' if same else 'its'} learning rates"
            f"{'' if same else ', which are of'} {', '.join(f'{r:g}' for r in rates)}."
        )
        for arm in at_edge(table):
            sentences.append(f"({arm}) is best at the edge of the learning rates tried, so its optimum may lie beyond.")
    if table["seed"].nunique() == 1:
        sentences.append("There is one seed, and one seed proves nothing.")
    return sentences


def common_settings(run: Path) -> dict[str, Any]:
    """Return what the runs of a comparison have to share, from one run's run.json: settings, and the token folder."""
    about = load_file(RunFile, run / "run.json")
    parts = (part for part in about.identity.values() if isinstance(part, dict))
    return {k: v for part in parts for k, v in part.items() if k not in ARM} | {"tokens": about.tokens}
