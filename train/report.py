"""Runs -> a table on the terminal, Markdown, CSV, and one self-contained HTML page."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from scipy import stats

from train import dynamics, folder, plane
from train.figures import as_svg, as_url
from train.pairs import LEVEL, Paired, holm, paired
from train.schemas import PlanFile, RunFile
from train.settings import ARM, SettingsError, exit_code, parse, require
from train.tuning import at_edge, best_lr

POINTS = 200  # of a curve that are drawn, about
TABLE = "report.csv"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the runs are."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/compare"),)
    """Folders of comparisons (each holds manifest.json), which are put together; the report goes into the first one."""
    baseline: str = ""
    """The arm the others are compared with. Default: the first arm."""


def load(*folders: Path) -> tuple[dict[str, Any], pd.DataFrame, dict[str, pd.DataFrame]]:
    """The first manifest with all runs, one row per run that ended (arm, lr, seed, status, validation_loss), and each run's metrics by name.

    Raises:
        SettingsError: if there is no manifest, no run has ended, or the folders don't belong together.
    """
    plan: dict[str, Any] = {}
    rows, metrics = [], {}
    shared: dict[str, Any] = {}
    cells: set[tuple[str, float, int]] = set()
    for out in folders:
        file = out / "manifest.json"
        require(file.exists(), f"{out} holds no manifest.json; give the folder of a comparison.")
        found = folder.read(PlanFile, file).model_dump(exclude_unset=True)
        missing = [name for name in ("steps", "packages") if found.get(name) is None]
        require(not missing, f"{file} has no {', '.join(missing)}; it is no manifest that train.compare has written.")
        plan = plan or {**found, "runs": []}
        for run in found["runs"]:
            cell = (run["arm"], run["lr"], run["seed"])
            require(
                cell not in cells, f"runs has {run['name']} twice, in {out} and in another folder; give one of them."
            )
            cells.add(cell)
            plan["runs"].append(run)
            try:
                result = folder.result(out / run["name"])
            except SettingsError as error:
                print(f"left out: {error}", file=sys.stderr)  # one damaged run is no reason to hide the others
                continue
            lines = folder.read_metrics(out / run["name"])
            if result and lines:
                rows.append({**{k: run[k] for k in ("name", "arm", "lr", "seed")}, "parameters": math.nan, **result})
                metrics[run["name"]] = pd.DataFrame(
                    lines, columns=sorted({*PLOTS, *(k for line in lines for k in line)})
                )
                settings = common_settings(out / run["name"]) | {"device": result.get("device", shared.get("device"))}
                settings["validation_blocks"] = result.get("validation_blocks")  # lacking: the first ones, not spread
                shared = shared or settings
                require(
                    settings == shared,
                    f"runs has {out / run['name']}, which differs from the others in more than arm, lr and seed: "
                    f"{', '.join(k for k in settings if settings[k] != shared.get(k))}.",
                )
    require(bool(rows), f"no run has ended yet in {', '.join(map(str, folders))}.")
    table = pd.DataFrame(rows)
    table["validation_loss"] = table["validation_loss"].astype(float)
    return {**plan, "settings": shared}, table, metrics


def summarize(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """One row per arm: mean loss, and the paired difference from the baseline with its interval and verdict; ``percent`` times a
    difference is that in percent of the baseline's loss.

    Differences are paired by seed; intervals and p-values are Student's t over seeds, Holm-corrected over arms for the
    verdict (level 0.05). A diverged run counts in ``diverged`` and leaves its seed without a pair.
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
        }
        found = paired(losses, by_seed[baseline])
        row["percent"] = 100.0 / by_seed.loc[losses.notna(), baseline].mean()
        row |= found._asdict() if arm != baseline else Paired(found.pairs, *[math.nan] * 4)._asdict()
        rows.append(row)
    summary = pd.DataFrame(rows)
    summary["p_holm"] = holm(summary["p"])
    against = summary.loc[summary["arm"] == baseline].iloc[0].to_dict()
    summary["verdict"] = [verdict(row, against) for row in summary.to_dict("records")]
    return summary


def verdict(row: dict[str, Any], against: dict[str, Any]) -> str:
    """One sentence for an arm, or two where runs of it or of the baseline, ``against``, have diverged."""
    arm, baseline = f"({row['arm']})", against["arm"]
    if row["arm"] == baseline:
        return f"{arm} is what the others are compared with."
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
        return f"{arm} is not distinguishable from ({baseline}) at n = {row['pairs']}.{survivors}"
    better = "better" if row["difference"] < 0 else "worse"
    return f"{arm} is {better} than ({baseline}) by {abs(row['difference']):.4f} at n = {row['pairs']}.{survivors}"


def caveats(table: pd.DataFrame) -> list[str]:
    """What a reader must know before believing the table."""
    rates = sorted(table["lr"].unique())
    said = []
    if len(rates) == 1:
        said.append(f"One learning rate ({rates[0]:g}) was used for all arms; an arm tuned on its own might do better.")
    elif table.groupby("arm")["lr"].nunique().max() == 1:
        said.append("Each arm was run at one learning rate, chosen for it beforehand.")
    else:
        same = table.groupby("arm")["lr"].nunique().min() == len(rates)
        said.append(
            f"Each arm is shown at its best of {'the' if same else 'its'} learning rates"
            f"{'' if same else ', which are of'} {', '.join(f'{r:g}' for r in rates)}."
        )
        for arm in at_edge(table):
            said.append(f"({arm}) is best at the edge of the learning rates tried, so its optimum may lie beyond.")
    if table["seed"].nunique() == 1:
        said.append("There is one seed, and one seed proves nothing.")
    return said


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


PLOTS = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "grad_norm": "gradient norm before clipping",
    "update_rms": "root mean square of update / lr",
    "update_max": "greatest |update| / lr",
    "step_seconds": "seconds a step",
}


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


def common_settings(run: Path) -> dict[str, Any]:
    """What the runs of a comparison share, from the run.json of one of them: settings, and the text as it was read."""
    about = folder.read(RunFile, run / "run.json")
    parts = (part for part in about.identity.values() if isinstance(part, dict))
    return {k: v for part in parts for k, v in part.items() if k not in ARM} | {"tokens": about.tokens}


def write(*folders: Path, baseline: str = "") -> None:
    """Write report.md, report.csv, report.html and its main figures into the first folder and print the table.

    Raises:
        SettingsError: if there is nothing to report, or no such baseline.
    """
    out = folders[0]
    plan, table, metrics = load(*folders)
    table["training_loss"] = [_last_loss(metrics[name]) for name in table["name"]]
    for window in dynamics.WINDOWS:
        table[f"omega_{window}"] = [
            dynamics.omega(metrics[name], count, window)
            for name, count in zip(table["name"], table["parameters"], strict=True)
        ]
    measured = ["training_loss", *(f"omega_{window}" for window in dynamics.WINDOWS)]
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
    folder.write_text(out / "differences.svg", figures[differences])
    if plane.is_plane(best):
        text += "\n" + plane.markdown(table, best)
        cells = plane.of(best)
        heat_map = as_svg(plane.heat_map(cells, plane.edges(table)))
        figures = {"validation loss over the betas": heat_map, **figures}
        folder.write_text(out / "plane.svg", heat_map)
    folder.write_text(out / "report.md", text)
    folder.write_text(out / TABLE, table.to_csv(index=False))
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
    folder.write_text(out / "report.html", page)
    print(text)
    print(f"Report: {(out / 'report.html').resolve()}")


def main(arguments: list[str] | None = None) -> None:
    """Command line: ``python -m train.report FOLDER``."""

    def program() -> None:
        report = parse(Report, sys.argv[1:] if arguments is None else arguments, "train.report", __doc__)
        write(*report.runs, baseline=report.baseline)

    if code := exit_code(program):
        sys.exit(code)


if __name__ == "__main__":
    main()
