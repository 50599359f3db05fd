"""The plan of a comparison: arms (beta settings) x learning rates x seeds, each run with its arguments for train.pretrain."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from balanced_adam import horizon
from balanced_adam.state import FORMATS
from train import folder, report
from train.schemas import PlanFile, read_schema
from train.settings import ARM, Optimizer, Run, SettingsError, first_line, parse, require
from train.tuning import best_lr

# What a comparison decides for each of its runs.
COMPARED = {
    "--out",
    "--betas",
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


ARMS_LR, GRID_LR = (1e-3,), (5e-4, 1e-3, 2e-3)  # a cell at one learning rate alone would say little of its betas


class Arm(NamedTuple):
    """What the runs of a comparison differ in, but for lr and seed."""

    betas: tuple[float, ...] | str
    """One number where both are equal; or the rule that chooses it."""
    state: str

    @property
    def words(self) -> list[str]:
        """The betas, for a command line."""
        return [self.betas] if isinstance(self.betas, str) else list(map(repr, self.betas))

    def __str__(self) -> str:
        return ",".join(self.words) + (f":{self.state}" if self.state != "fp32" else "")

    @staticmethod
    def of(optimizer: Optimizer) -> Arm:
        """That of a run."""
        betas = (optimizer.betas,) if isinstance(optimizer.betas, float) else optimizer.betas
        return Arm.shortened(betas, optimizer.state)

    @staticmethod
    def shortened(betas: tuple[float, ...] | str, state: str) -> Arm:
        """With one beta where both are equal."""
        return Arm(betas[:1] if isinstance(betas, tuple) and betas[0] == betas[-1] else betas, state)

    @staticmethod
    def parse(text: str) -> Arm:
        """From the command line; raises :class:`SettingsError`."""
        said, _, state = text.rpartition(":")
        if state not in FORMATS:
            said, state = text, "fp32"
        if horizon.is_rule(said):
            with suppress(ValueError):  # what is no number is refused with the run's settings
                name, _, number = said.rpartition(":")
                said = f"{name}:{repr(float(number)).removesuffix('.0')}"
            return Arm(said, state)
        try:
            betas = tuple(float(part) for part in said.split(","))
            if len(betas) not in (1, 2) or not all(0.0 <= beta < 1.0 for beta in betas):
                raise ValueError
        except ValueError:
            raise SettingsError(
                f"arms has {text!r}; an arm is one beta or beta1,beta2, each in [0, 1), or a rule such as refresh:1000; and then, after a "
                f"colon, one of {', '.join(FORMATS)}."
            ) from None
        return Arm.shortened(betas, state)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how it is run."""

    out: Path = Path("runs/compare")
    """The folder of the comparison: manifest.json, one folder for each run, and the report."""
    arms: tuple[str, ...] = ("0.95", "0.9,0.95", "0.9,0.999")
    """Beta settings: one number, beta1,beta2, or a rule as --betas of train.pretrain takes it; and, after a colon, how the optimizer's
    state is stored, as in 0.95:packed16 or refresh:1000:packed16.
    The first one is what the others are compared with."""
    grid: tuple[float, ...] = ()
    """Instead of arms: every pair of these betas, the tied ones first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every arm starts from the same weights and sees the same batches for the same seed."""
    lr: tuple[float, ...] | None = None
    """Peak learning rates; every arm is run with each. Default: 1e-3, and 5e-4, 1e-3 and 2e-3 for a grid."""
    lr_from: tuple[Path, ...] = ()
    """Instead of lr: folders of comparisons in which these arms were tuned; each is run at its best learning rate there."""
    steps: int = 200
    """Optimizer steps of one run."""
    tokens: int | None = None
    """Instead of steps: training tokens of one run (a multiple of batch x sequence_length is taken)."""
    batch: int = 16
    """Sequences in one optimizer step."""
    sequence_length: int = 128
    """Tokens in one sequence."""
    ranks: int = field(default_factory=lambda: min(2, torch.cuda.device_count() or 2))
    """Processes of one run. Default: 2, but 1 where there is a single GPU."""
    launcher: Literal["deepspeed", "torchrun", "accelerate", "python", "slurm"] = "deepspeed"
    """What starts the ranks. "slurm" is for slurm/compare.sbatch, which makes a job of each run."""
    max_runs: int | None = None
    """Begin no more than so many runs now; the same command goes on."""
    max_hours: float | None = None
    """Begin no run that would end later than so many hours from now, if it takes as long as those before it."""
    discard_checkpoints: bool = False
    """Remove the checkpoints of a run that has finished; a sweep of many runs would fill the disk."""
    plan_only: bool = False
    """Write the manifest and stop."""
    manifest: Path | None = None
    """Run the plan in this file instead, whatever the settings above say but for out: one that --plan-only has written, edited."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": further options for every run, as train.pretrain takes them, such as -- --model small."""


def manifest(comparison: Comparison) -> dict[str, Any]:
    """The plan as plain data: every run's name, arm, lr, seed, and arguments for train.pretrain.

    Raises:
        SettingsError: if an arm is no pair of betas, an arm or a seed is given twice, an option after "--" is one of those
            that are compared, an arm was not tuned, or train.pretrain would refuse a run's settings.
    """
    wanted = comparison.arms
    if comparison.grid:
        require(wanted == Comparison.arms, "arms and grid are both given; give one of them.")
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
    ranks, launcher = comparison.ranks, comparison.launcher
    _check_launch(launcher, ranks)
    options = {option.split("=")[0].replace("_", "-") for option in comparison.rest}
    require(
        not options & COMPARED,
        f"{min(options & COMPARED, default='')} is given after --, where it would override what is compared; give it before.",
    )
    for name in ("batch", "sequence_length"):
        require(getattr(comparison, name) >= 1, f"{name} is {getattr(comparison, name)}; it must be at least 1.")
    steps = comparison.steps
    if comparison.tokens is not None:
        steps = comparison.tokens // (comparison.batch * comparison.sequence_length)
        require(steps >= 1, f"tokens is {comparison.tokens}, less than one batch.")
    often = str(max(1, steps // 4))
    runs = []
    # Seed by seed, so that whatever is finished when somebody stops can be compared in pairs.
    cells = [(lr, label, arm) for label, arm in arms.items() for lr in rates[label]]
    for seed, (lr, label, arm) in product(comparison.seeds, cells):
        arguments = ["--betas", *arm.words, "--lr", repr(lr), "--seed", str(seed), "--steps", str(steps)]
        arguments += ["--batch", str(comparison.batch), "--sequence-length", str(comparison.sequence_length)]
        arguments += ["--warmup", str(steps // 10), "--save-every", often, "--validate-every", often]
        arguments += ["--allow-unbalanced"] if len(arm.words) == 2 else []
        arguments += [] if arm.state == "fp32" else ["--state", arm.state]
        arguments += comparison.rest
        name = f"beta-{re.sub(r'[^0-9A-Za-z_.]+', '-', label)}_lr-{lr!r}_seed-{seed}"
        run = {"name": name, "arm": label, "lr": lr, "seed": seed, "arguments": arguments}
        _checked(run, ranks)
        runs.append(run)
    tuned = {"lr_from": list(map(str, comparison.lr_from))} if comparison.lr_from else {}
    return {"steps": steps, "ranks": ranks, "launcher": launcher, "runs": runs, **tuned}


def _tuned(comparison: Comparison, arms: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Of each arm, its best learning rate in the comparisons in ``lr_from``, or what a plan in ``out`` has taken for it before."""
    planned = comparison.out / "manifest.json"
    if planned.exists():
        before = folder.read(PlanFile, planned).model_dump(exclude_unset=True)
        taken = {run["arm"]: float(run["lr"]) for run in before["runs"]}
        if before.get("lr_from") == list(map(str, comparison.lr_from)) and all(arm in taken for arm in arms):
            return {arm: (taken[arm],) for arm in arms}
    folders = " ".join(map(str, comparison.lr_from))
    table = report.load(*comparison.lr_from)[1]
    best = best_lr(table)
    for arm in arms:
        there = best.loc[best["arm"] == arm, "validation_loss"]
        require(
            len(there) > 0,
            f"lr_from is {folders}, where no run of the arm {arm} has ended; there are {', '.join(best['arm'].unique())}.",
        )
        require(
            there.notna().any(),
            f"lr_from is {folders}, where every run of the arm {arm} has diverged; give it other lrs.",
        )
    for sentence in report.caveats(table[table["arm"].isin(list(arms))]):
        print(f"lr_from: {sentence}", file=sys.stderr)
    return {arm: (float(best.loc[best["arm"] == arm, "lr"].iloc[0]),) for arm in arms}


def read_manifest(file: Path) -> dict[str, Any]:
    """A plan from a file, as :func:`manifest` makes it and somebody may have edited it.

    Raises:
        SettingsError: if it is no plan, or train.pretrain would refuse a run's settings.
    """
    require(file.is_file(), f"manifest is {file}, which is not a file; --plan-only writes one.")
    try:
        plan = read_schema(PlanFile, file).model_dump(exclude_unset=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"manifest is {file}, which is no plan: {first_line(error)}.") from None
    missing = [name for name in ("steps", "ranks", "launcher") if plan.get(name) is None]
    require(not missing, f"manifest is {file}, which is no plan: it has no {', '.join(missing)}.")
    _check_launch(plan["launcher"], plan["ranks"])
    runs = {run["name"]: run for run in plan["runs"]}
    require(bool(runs) and len(runs) == len(plan["runs"]), f"{file} has no run, or two of one name.")
    shared = []
    for name, run in runs.items():
        require(
            re.fullmatch(r"\w[\w.,-]*", name) is not None,
            f"{file} has the run {name!r}; a name is a folder's: letters, digits and . , - _.",
        )
        settings = _checked(run, plan["ranks"])
        told = {
            "lr": settings.optimizer.lr,
            "seed": settings.seed,
            "arm": str(Arm.of(settings.optimizer)),
            "steps": settings.schedule.steps,
            "name": str(settings.out),
        }
        for key, value in told.items():
            have = plan[key] if key == "steps" else run[key]
            require(
                have == value,
                f"{file} has {key} = {have!r} for {name!r}, but its arguments say {value!r}.",
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
    """What train.pretrain will make of a run's arguments."""
    return parse(Run, ["--out", str(out / run["name"]), *run["arguments"]], "train.pretrain", None)


def _checked(run: dict[str, Any], ranks: int) -> Run:
    settings = settings_of(run)
    settings.check()
    settings.parallelism.micro_batch_on(ranks)
    return settings


def _check_launch(launcher: Any, ranks: Any) -> None:
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
