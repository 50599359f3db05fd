"""The plan of a comparison: arms x learning rates x seeds, each run with its arguments for train.pretrain."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from train.analysis.lr_selection import best_lr
from train.analysis.results import caveats, load_results
from train.common.command_line import config_of, options_in, parse
from train.common.errors import ConfigError, first_line, require
from train.common.files import load_file
from train.common.schemas import PlanFile, read_schema
from train.run.config import ARM, Run
from train.sweep.arms import Arm
from train.sweep.options import Comparison

# Options that a comparison sets for each of its runs.
COMPARED = {
    "--out",
    "--betas",
    "--optimizer",
    "--state",
    "--allow-unbalanced",
    "--lr",
    "--seed",
    "--steps",
    "--batch",
    "--sequence-length",
    "--dry-run",
}
MODULES = {
    "deepspeed": "deepspeed",
    "torchrun": "torch",
    "accelerate": "accelerate",
    "python": "torch",
    "slurm": "torch",
}
ARMS_LR, GRID_LR = (1e-3,), (5e-4, 1e-3, 2e-3)  # one learning rate would not be the best of every cell of a grid


def manifest(comparison: Comparison) -> dict[str, Any]:
    """Return the plan as plain data: every run's name, arm, lr, seed, and arguments for train.pretrain.

    Raises:
        ConfigError: if an arm is invalid, an arm, seed or learning rate is given twice, an option after "--" is one
            that the comparison sets, an arm was not tuned in ``lr_from``, or train.pretrain would reject a run's
            settings.
    """
    wanted = comparison.arms
    if comparison.grid:
        require(wanted == Comparison.arms, "arms and grid are both given; give one of them.")
        for beta in comparison.grid:
            require(0.0 <= beta < 1.0, f"grid has {beta}; each beta must lie in [0, 1).")
        require(
            len(set(comparison.grid)) == len(comparison.grid),
            f"grid is {' '.join(map(str, comparison.grid))}; give each only once.",
        )
        tied = [repr(beta) for beta in comparison.grid]
        wanted = (*tied, *(f"{first},{second}" for first, second in product(tied, tied) if first != second))
    arms = {str(arm): arm for arm in map(Arm.parse, wanted)}
    require(not comparison.lr_from or comparison.lr is None, "lr and lr_from are both given; give one of them.")
    every = comparison.lr if comparison.lr is not None else GRID_LR if comparison.grid else ARMS_LR
    rates = _tuned(comparison, arms) if comparison.lr_from else dict.fromkeys(arms, every)
    for name, values in (("arms", wanted), ("seeds", comparison.seeds), ("lr", every)):
        different = arms if name == "arms" else set(values)
        require(bool(values), f"{name} is empty; give at least one.")
        require(len(different) == len(values), f"{name} is {' '.join(map(str, values))}; give each only once.")
    launcher = comparison.launcher
    ranks = min(2, torch.cuda.device_count() or 2) if comparison.ranks is None else comparison.ranks
    _check_launch(launcher, ranks)
    options = {option.split("=")[0].replace("_", "-") for option in comparison.rest}
    require(
        not options & COMPARED,
        f"{min(options & COMPARED, default='')} is given after --, where it would override what is compared; "
        "give it before.",
    )
    options |= _options_of_config(comparison, steps_of(comparison))
    for name in ("batch", "sequence_length"):
        require(getattr(comparison, name) >= 1, f"{name} is {getattr(comparison, name)}; it must be at least 1.")
    steps = steps_of(comparison)
    require(comparison.tokens is None or steps >= 1, f"tokens is {comparison.tokens}, less than one batch.")
    often = str(max(1, steps // 4))
    defaults = {"--warmup": str(steps // 10), "--save-every": often, "--validate-every": often}
    runs = []
    # Seed by seed, so that the runs finished so far can be compared in pairs at any time.
    cells = [(lr, label, arm) for label, arm in arms.items() for lr in rates[label]]
    for seed, (lr, label, arm) in product(comparison.seeds, cells):
        arguments = ["--betas", *arm.words, "--lr", repr(lr), "--seed", str(seed), "--steps", str(steps)]
        arguments += ["--batch", str(comparison.batch), "--sequence-length", str(comparison.sequence_length)]
        arguments += [word for option, value in defaults.items() if option not in options for word in (option, value)]
        arguments += ["--allow-unbalanced"] if len(arm.words) == 2 else []
        arguments += [] if arm.state == "fp32" else ["--state", arm.state]
        arguments += [] if arm.optimizer == "adam" else ["--optimizer", arm.optimizer]
        arguments += comparison.rest
        name = f"beta-{re.sub(r'[^0-9A-Za-z_.]+', '-', label)}_lr-{lr!r}_seed-{seed}"
        run = {"name": name, "arm": label, "lr": lr, "seed": seed, "arguments": arguments}
        _checked(run, ranks)
        runs.append(run)
    tuned = {"lr_from": list(map(str, comparison.lr_from))} if comparison.lr_from else {}
    return {"steps": steps, "ranks": ranks, "launcher": launcher, "runs": runs, **tuned}


def steps_of(comparison: Comparison) -> int:
    """Return the number of optimizer steps of each run."""
    if comparison.tokens is None:
        return comparison.steps
    return comparison.tokens // max(1, comparison.batch * comparison.sequence_length)


def _options_of_config(comparison: Comparison, steps: int) -> set[str]:
    """Return the options in the file of a ``--config`` after "--".

    The arms and ``lr`` take the place of the file's betas and lr.

    Raises:
        ConfigError: if the comparison would override another option of the file.
    """
    file = config_of(Run, list(comparison.rest))
    if file is None:
        return set()
    options = options_in(file, Run)
    per_step = max(1, comparison.batch * comparison.sequence_length)
    for name, words in options.items():
        text = words[-1].partition("=")[2] or words[-1]
        try:
            value = float(text)
        except ValueError:  # the run's own check says what is wrong
            value = math.nan
        agrees = {
            "batch": value == comparison.batch,
            "sequence_length": value == comparison.sequence_length,
            "steps": value == steps,
            "tokens": abs(value / per_step - steps) < 1,
            "lr": bool(comparison.lr or comparison.lr_from),
        }
        require(
            agrees.get(name, True),
            f"config {file} has {name} = {text}, which the comparison would override; give --{name.replace('_', '-')} "
            "before --.",
        )
        require(
            name not in ("optimizer", "state", "allow_unbalanced", "seed", "out", "dry_run"),
            f"config {file} has {name}, which the comparison says; remove it.",
        )
    return {f"--{name.replace('_', '-')}" for name in options}


def _tuned(comparison: Comparison, arms: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return each arm's best learning rate in the comparisons of ``lr_from``, or the one in an earlier plan in ``out``.

    Raises:
        ConfigError: if no run of an arm has ended there, or all have diverged.
    """
    planned = comparison.out / "manifest.json"
    if planned.exists():
        before = load_file(PlanFile, planned).model_dump(exclude_unset=True)
        taken = {run["arm"]: float(run["lr"]) for run in before["runs"]}
        if before.get("lr_from") == list(map(str, comparison.lr_from)) and all(arm in taken for arm in arms):
            return {arm: (taken[arm],) for arm in arms}
    folders = " ".join(map(str, comparison.lr_from))
    try:
        table = load_results(*comparison.lr_from)[1]
    except ConfigError as error:
        raise ConfigError(f"lr_from: {error}") from None
    best = best_lr(table)
    for arm in arms:
        there = best.loc[best["arm"] == arm, "validation_loss"]
        require(
            len(there) > 0,
            f"lr_from is {folders}, where no run of the arm {arm} has ended; "
            f"there are {', '.join(best['arm'].unique())}.",
        )
        require(
            there.notna().any(),
            f"lr_from is {folders}, where every run of the arm {arm} has diverged; give it other lrs.",
        )
    for sentence in caveats(table[table["arm"].isin(list(arms))]):
        print(f"lr_from: {sentence}", file=sys.stderr)
    return {arm: (float(best.loc[best["arm"] == arm, "lr"].iloc[0]),) for arm in arms}


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a plan from a file that :func:`manifest` has made and a user may have edited.

    Raises:
        ConfigError: if it is not a plan, contradicts itself, or train.pretrain would reject a run's settings.
    """
    require(file.is_file(), f"manifest is {file}, which is not a file; --plan-only writes one.")
    try:
        plan = read_schema(PlanFile, file).model_dump(exclude_unset=True)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"manifest is {file}, which is not a plan: {reason}; --plan-only writes one.") from None
    missing = [name for name in ("steps", "ranks", "launcher") if plan.get(name) is None]
    require(not missing, f"manifest is {file}, which is not a plan: it has no {', '.join(missing)}.")
    try:
        _check_launch(plan["launcher"], plan["ranks"])
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    runs = {run["name"]: run for run in plan["runs"]}
    require(bool(runs) and len(runs) == len(plan["runs"]), f"{file} has no run, or two of one name.")
    shared = []
    for name, run in runs.items():
        require("arguments" in run, f"{file} has the run {name!r} without arguments.")
        require(
            re.fullmatch(r"\w[\w.,-]*", name) is not None,
            f"{file} has the run {name!r}; a name is a folder's: letters, digits and . , - _.",
        )
        try:
            settings = _checked(run, plan["ranks"])
        except ConfigError as error:
            reason = str(error).partition("; see python -m")[0].rstrip(".")
            raise ConfigError(f"{file} has the run {name!r}, whose arguments are wrong: {reason}.") from None
        from_arguments = {
            "lr": settings.optimizer.lr,
            "seed": settings.seed,
            "arm": str(Arm.of(settings.optimizer)),
            "steps": settings.schedule.steps,
            "name": str(settings.out),
        }
        for key, value in from_arguments.items():
            have = plan[key] if key == "steps" else run[key]
            require(
                have == value,
                f"{file} has {key} = {have!r} for {name!r}, but its arguments say {value!r}; make them agree.",
            )
        identity = settings.identity()
        for key in ARM:
            identity["optimizer"].pop(key, None)
        shared.append({**identity, "seed": None, "dry_run": settings.dry_run})
    require(
        all(each == {**shared[0], "dry_run": False} for each in shared),
        f"{file} has runs that differ in more than betas, state, lr and seed, which would be no comparison.",
    )
    cells = [(run["arm"], run["lr"], run["seed"]) for run in runs.values()]
    require(len(set(cells)) == len(cells), f"{file} has an arm twice with one lr and seed.")
    return {key: plan[key] for key in ("steps", "ranks", "launcher", "runs", "lr_from") if key in plan}


def settings_of(run: dict[str, Any], out: Path = Path()) -> Run:
    """Parse a run's arguments as train.pretrain will. The run's folder is in ``out``."""
    return parse(Run, ["--out", str(out / run["name"]), *run["arguments"]], "train.pretrain", None)


def _checked(run: dict[str, Any], ranks: int) -> Run:
    """Parse and check a run's settings.

    Raises:
        ConfigError: if train.pretrain would reject them.
    """
    settings = settings_of(run)
    settings.check()
    settings.parallelism.micro_batch_on(ranks)
    branch = settings.checkpoints.branch_from
    require(
        branch is None or branch.name.startswith("step-"),
        f"branch_from is {branch}, whose newest checkpoint may be another for each run; give one, such as "
        f"{branch}/checkpoints/step-0001000.",
    )
    return settings


def _check_launch(launcher: Any, ranks: Any) -> None:
    """Check that this machine can start the ranks with the launcher.

    Raises:
        ConfigError: if it can't.
    """
    require(launcher in MODULES, f"launcher is {launcher!r}; it must be one of {', '.join(MODULES)}.")
    require(type(ranks) is int and ranks >= 1, f"ranks is {ranks!r}; it must be a number, at least 1.")
    gpus = torch.cuda.device_count() or ranks
    if launcher == "slurm":  # other machines
        return
    require(ranks <= gpus, f"ranks is {ranks}, but there are {gpus} GPUs; each rank needs its own.")
    module = MODULES[launcher]
    require(
        find_spec(module) is not None,
        f"launcher is {launcher!r}, but the package {module} is missing: pip install {module}.",
    )
    require(
        launcher != "python" or ranks == 1,
        f"ranks is {ranks}, but the launcher python starts one; give --ranks 1 or another launcher.",
    )
