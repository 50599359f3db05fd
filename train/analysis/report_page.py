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
from train.analysis.results import PLOTS, TABLE, caveats, load_results, summarize
from train.common.files import write_text

POINTS = 200  # of a curve that are drawn, about


def _last_loss(metrics: pd.DataFrame) -> float:
    """The mean training loss of the last tenth of the steps: other text than the validation's, and the same for all arms of a seed."""
    losses = metrics["loss"].dropna()
    return float(losses[-max(1, len(losses) // 10) :].mean())


def curves(table: pd.DataFrame, metrics: dict[str, pd.DataFrame], column: str) -> str:
    """A plot of one column over steps, an arm's mean and range over seeds, as SVG."""
    figure, axes = _over_steps()
    for arm, runs in table.groupby("arm", sort=False):
        series = [metrics[n].set_index("step")[column].dropna() for n in runs["name"] if column in metrics[n]]
        if series:
            values = pd.concat(series, axis=1)
            _line(axes, f"({arm})", values.mean(axis=1), values.min(axis=1), values.max(axis=1))
    return as_svg(figure)


def paired_differences(ours: list[pd.Series], theirs: list[pd.Series]) -> pd.DataFrame:
    """Of losses by step, one series a seed in both lists: the mean difference over seeds, ``middle``, and its 95 % interval (Student's
    t), ``low`` to ``high``; each of the rolling mean over a twentieth of the steps. Only steps that all seeds have are in; without a second
    seed there is no interval (NaN)."""
    paired = pd.concat([a - b for a, b in zip(ours, theirs, strict=True)], axis=1)
    paired = paired.dropna().rolling(max(1, len(paired) // 20)).mean()
    middle = paired.mean(axis=1)
    half = stats.t.ppf(1 - LEVEL / 2, paired.count(axis=1) - 1) * paired.sem(axis=1)
    return pd.DataFrame({"middle": middle, "low": middle - half, "high": middle + half})


def difference_curves(table: pd.DataFrame, metrics: dict[str, pd.DataFrame], baseline: str) -> str:
    """A plot of :func:`paired_differences` of each arm's training loss from the baseline's, as SVG."""
    losses = {
        arm: {
            seed: metrics[name].set_index("step")["loss"].dropna()
            for seed, name in zip(runs["seed"], runs["name"], strict=True)
        }
        for arm, runs in table.groupby("arm", sort=False)
    }
    base = losses.pop(baseline)
    figure, axes = _over_steps()
    axes.axhline(0.0, color="black", linewidth=0.8)
    for arm, by_seed in losses.items():
        if seeds := sorted(by_seed.keys() & base.keys()):
            found = paired_differences([by_seed[s] for s in seeds], [base[s] for s in seeds])
            _line(axes, f"({arm})", found["middle"], found["low"], found["high"])
    return as_svg(figure)


def _over_steps() -> tuple[Any, Any]:
    """A figure and its empty axes."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _line(axes: Any, label: str, middle: pd.Series, low: pd.Series, high: pd.Series) -> None:
    every = max(1, len(middle) // POINTS)
    middle, low, high = (values[::every] for values in (middle, low, high))
    (line,) = axes.plot(middle.index, middle, label=label, linewidth=1.4)
    axes.fill_between(middle.index, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def markdown(summary: pd.DataFrame, notes: list[str]) -> str:
    """The table of arms as Markdown, with verdicts and caveats."""
    lines = [
        "| betas | lr | runs | diverged | validation loss | difference | 95 % interval | in % | p (Holm) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary.to_dict("records"):
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if not math.isnan(row["low"]) else "n/a"
        difference = f"{row['difference']:+.4f}" if not math.isnan(row["difference"]) else "n/a"
        percent = (
            " to ".join(f"{row[k] * row['percent']:+.2f}" for k in ("low", "high")) if interval != "n/a" else "n/a"
        )
        p = f"{row['p_holm']:.3f}" if not math.isnan(row["p_holm"]) else "n/a"
        loss = f"{row['loss']:.4f}" if not math.isnan(row["loss"]) else "n/a"
        lines.append(
            f"| {row['arm']} | {row['lr']:g} | {row['runs']} | {row['diverged']} | {loss} | {difference} | {interval} | {percent} | {p} |"
        )
    lines += ["", *(f"- {sentence}" for sentence in [*summary["verdict"], *notes])]
    return "\n".join(lines) + "\n"


def write_report(*folders: Path, baseline: str = "") -> None:
    """Write report.md, report.csv, report.html and its main figures into the first folder and print the table.

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
    table.loc[table["validation_loss"].isna(), measured] = (
        math.nan
    )  # what a run was until it diverged is not comparable
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
    text = markdown(summary, notes)
    figures = {label: curves(best, metrics, column) for column, label in PLOTS.items()}
    differences = (
        f"training loss less that of ({baseline}), mean over {max(1, plan['steps'] // 20)} steps, with 95 % intervals"
    )
    figures = {differences: difference_curves(best, metrics, baseline), **figures}
    write_text(out / "differences.svg", figures[differences])
    if beta_grid.is_grid(best):
        text += "\n" + beta_grid.markdown(table, best)
        cells = beta_grid.cells_of(best)
        heat_map = as_svg(beta_grid.heat_map(cells, beta_grid.edges(table)))
        figures = {"validation loss over the betas": heat_map, **figures}
        write_text(out / "plane.svg", heat_map)
    write_text(out / "report.md", text)
    write_text(out / TABLE, table.to_csv(index=False))
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    page = template.render(
        summary=summary.to_dict("records"),
        notes=notes,
        plots=[(label, as_url(svg)) for label, svg in figures.items()],
        runs=table.to_dict("records"),
        plan=plan,
        settings=", ".join(f"{key} {value}" for key, value in plan["settings"].items() if value is not None),
        speed={
            arm: float(np.median(np.concatenate([metrics[n]["step_seconds"].dropna() for n in rows["name"]])))
            for arm, rows in best.groupby("arm", sort=False)
        },
    )
    write_text(out / "report.html", page)
    print(text)
    print(f"Report: {(out / 'report.html').resolve()}")
