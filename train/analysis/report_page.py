"""The report of a comparison: Markdown, CSV, plots, and one self-contained HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from train.analysis import beta_grid, training_dynamics
from train.analysis.lr_selection import best_lr
from train.analysis.paired_stats import LEVEL
from train.analysis.plots import as_svg, as_url
from train.analysis.results import (
    PLOTS,
    TABLE,
    caveats,
    load_results,
    renewals,
    sets_of,
    summarize,
    tokens_by_source,
)
from train.common.files import write_text
from train.run.metrics import NAMED

POINTS = 200  # drawn per curve, approximately


def _last_loss(metrics: pd.DataFrame) -> float:
    """Return the mean training loss over the last tenth of the steps.

    Its text differs from the validation's, and is the same for all arms of a seed.
    """
    losses = metrics["loss"].dropna()
    return float(losses[-max(1, len(losses) // 10) :].mean())


def curves(table: pd.DataFrame, metrics: dict[str, pd.DataFrame], column: str, colors: dict[str, str]) -> str:
    """Plot one column over steps, each arm's mean and range over seeds, as SVG. ``colors`` are by arm."""
    figure, axes = _over_steps()
    for arm, runs in table.groupby("arm", sort=False):
        series = [metrics[n].set_index("step")[column].dropna() for n in runs["name"] if column in metrics[n]]
        if series:
            values = pd.concat(series, axis=1)
            _line(axes, arm, colors, values.mean(axis=1), values.min(axis=1), values.max(axis=1))
    return as_svg(figure)


def paired_differences(ours: list[pd.Series], theirs: list[pd.Series]) -> pd.DataFrame:
    """Return the mean difference of two arms' losses over steps, with its 95 % interval (Student's t over seeds).

    The differences are smoothed by a rolling mean over a twentieth of the steps. Only steps that all seeds have are
    used.

    Args:
        ours: losses by step, one series per seed.
        theirs: the other arm's, for the same seeds.

    Returns:
        Columns ``middle``, ``low`` and ``high``, by step. Without a second seed the interval is NaN.
    """
    paired = pd.concat([a - b for a, b in zip(ours, theirs, strict=True)], axis=1)
    paired = paired.dropna().rolling(max(1, len(paired) // 20)).mean()
    middle = paired.mean(axis=1)
    half = stats.t.ppf(1 - LEVEL / 2, paired.count(axis=1) - 1) * paired.sem(axis=1)
    return pd.DataFrame({"middle": middle, "low": middle - half, "high": middle + half})


def difference_curves(
    table: pd.DataFrame, metrics: dict[str, pd.DataFrame], baseline: str, colors: dict[str, str]
) -> str:
    """Plot each arm's training loss minus the baseline's (:func:`paired_differences`), as SVG; ``colors`` by arm."""
    losses = {
        arm: {
            seed: metrics[name].set_index("step")["loss"].dropna()
            for seed, name in zip(runs["seed"], runs["name"], strict=True)
        }
        for arm, runs in table.groupby("arm", sort=False)
    }
    base = losses.pop(baseline)
    figure, axes = _over_steps()
    axes.axhline(0.0, color=colors[baseline], linewidth=1.4, label=f"({baseline}), the baseline")
    for arm, by_seed in losses.items():
        if seeds := sorted(by_seed.keys() & base.keys()):
            differences = paired_differences([by_seed[s] for s in seeds], [base[s] for s in seeds])
            _line(axes, arm, colors, differences["middle"], differences["low"], differences["high"])
    return as_svg(figure)


def _over_steps() -> tuple[Any, Any]:
    """Return a figure and its empty axes, with steps on the x-axis."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _line(axes: Any, arm: str, colors: dict[str, str], middle: pd.Series, low: pd.Series, high: pd.Series) -> None:
    """Draw an arm's curve with a band from ``low`` to ``high``, thinned to about POINTS points."""
    every = max(1, len(middle) // POINTS)
    middle, low, high = (values[::every] for values in (middle, low, high))
    axes.plot(middle.index, middle, label=f"({arm})", color=colors[arm], linewidth=1.4)
    axes.fill_between(middle.index, low, high, color=colors[arm], alpha=0.18, linewidth=0)


def markdown(summary: pd.DataFrame, notes: list[str]) -> str:
    """Return the table of arms as Markdown, with verdicts and caveats."""
    sets = sets_of(summary)
    titles = ["betas", "lr", "runs", "diverged", "validation loss", *(name.removeprefix(NAMED) for name in sets)]
    titles += ["difference", "95 % interval", "in %", "p (Holm)"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in summary.to_dict("records"):
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if not math.isnan(row["low"]) else "n/a"
        difference = f"{row['difference']:+.4f}" if not math.isnan(row["difference"]) else "n/a"
        percent = (
            " to ".join(f"{row[k] * row['percent']:+.2f}" for k in ("low", "high")) if interval != "n/a" else "n/a"
        )
        p = f"{row['p_holm']:.3f}" if not math.isnan(row["p_holm"]) else "n/a"
        loss = f"{row['loss']:.4f}" if not math.isnan(row["loss"]) else "n/a"
        named = "".join(f"{row[name]:.4f} | " if not math.isnan(row[name]) else "n/a | " for name in sets)
        lines.append(
            f"| {row['arm']} | {row['lr']:g} | {row['runs']} | {row['diverged']} | {loss} | {named}{difference} "
            f"| {interval} | {percent} | {p} |"
        )
    lines += ["", *(f"- {sentence}" for sentence in [*summary["verdict"], *notes])]
    return "\n".join(lines) + "\n"


def write_report(*folders: Path, baseline: str = "") -> None:
    """Write report.md, report.csv, report.html and the main figures into the first folder, and print the table.

    Args:
        folders: folders of comparisons, whose runs are combined.
        baseline: the arm that the others are compared with; "" for the first one with an ended run.

    Raises:
        ConfigError: if there is nothing to report, or no such baseline.
    """
    out = folders[0]
    plan, table, metrics = load_results(*folders)
    table["training_loss"] = [_last_loss(metrics[name]) for name in table["name"]]
    for window in training_dynamics.WINDOWS:
        table[f"omega_{window}"] = [
            training_dynamics.omega(metrics[name], count, window)
            for name, count in zip(table["name"], table["parameters"], strict=True)
        ]
    measured = ["training_loss", *(f"omega_{window}" for window in training_dynamics.WINDOWS)]
    # Measurements of a run that has diverged are not comparable.
    table.loc[table["validation_loss"].isna(), measured] = math.nan
    best = best_lr(table)
    baseline = baseline or next(run["arm"] for run in plan["runs"] if run["arm"] in set(table["arm"]))
    summary = summarize(best, baseline)
    notes = caveats(table)
    if tuned := plan.get("lr_from"):
        notes[0] = f"Each arm was run at its best learning rate in {' '.join(tuned)}."
    if len(table) < len(plan["runs"]):
        notes.append(
            f"{len(plan['runs']) - len(table)} of {len(plan['runs'])} planned runs have not ended and are not in here."
        )
    notes += filter(None, [renewals(summary["arm"], plan["steps"]), tokens_by_source(table)])
    text = markdown(summary, notes)
    plots = {**PLOTS, **{name: f"validation loss on {name.removeprefix(NAMED)}" for name in sets_of(table)}}
    colors = {arm: f"C{number % 10}" for number, arm in enumerate(summary["arm"])}
    figures = {label: curves(best, metrics, column, colors) for column, label in plots.items()}
    differences = (
        f"training loss less the baseline's, mean over {max(1, plan['steps'] // 20)} steps, with 95 % intervals"
    )
    figures = {differences: difference_curves(best, metrics, baseline, colors), **figures}
    write_text(out / "differences.svg", figures[differences])
    if beta_grid.is_grid(best):
        text += "\n" + beta_grid.markdown(table, best)
        cells = beta_grid.cells_of(best)
        heat_map = as_svg(beta_grid.heat_map(cells, beta_grid.edges(table)))
        figures = {"validation loss over the betas": heat_map, **figures}
        write_text(out / "plane.svg", heat_map)
    write_text(out / "report.md", text)
    write_text(out / TABLE, table.to_csv(index=False))
    speed = {
        arm: float(np.median(np.concatenate([metrics[n]["step_seconds"].dropna() for n in rows["name"]])))
        for arm, rows in best.groupby("arm", sort=False)
    }
    page = _page(summary=summary, notes=notes, figures=figures, runs=table, plan=plan, speed=speed)
    write_text(out / "report.html", page)
    print(text)
    print(f"Report: {(out / 'report.html').resolve()}")


def _page(
    *,
    summary: pd.DataFrame,
    notes: list[str],
    figures: dict[str, str],
    runs: pd.DataFrame,
    plan: dict[str, Any],
    speed: dict[Any, float],
) -> str:
    """Render the HTML page. ``figures`` are SVGs by caption, ``speed`` the median seconds per step by arm."""
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    return template.render(
        summary=summary.to_dict("records"),
        sets={column: column.removeprefix(NAMED) for column in sets_of(summary)},
        notes=notes,
        plots=[(label, as_url(svg)) for label, svg in figures.items()],
        runs=runs.to_dict("records"),
        plan=plan,
        settings=", ".join(f"{key} {value}" for key, value in plan["settings"].items() if value is not None),
        speed=speed,
    )
