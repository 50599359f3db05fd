"""The options of train.compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs to compare, and how they are executed."""

    out: Path = Path("runs/compare")
    """Folder of the comparison, for manifest.json, one folder per run, and the report."""
    arms: tuple[str, ...] = ("0.9", "0.9,0.95", "0.9,0.999", "0.95")
    """Beta settings to compare: one number, beta1,beta2, or a rule as for --betas of train.pretrain.
    An optional state format follows after a colon, as in 0.95:packed16 or refresh:1000:packed16.
    An optional optimizer, as for --optimizer of train.pretrain, stands before a colon, as in adamd:0.95.
    The first arm is the baseline."""
    grid: tuple[float, ...] = ()
    """Instead of arms: compare every pair of these betas, the tied ones first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each arm.
    With the same seed every arm starts from the same weights and sees the same batches."""
    lr: tuple[float, ...] | None = None
    """Peak learning rates; every arm is run at each. Default: 1e-3; for a grid 5e-4, 1e-3 and 2e-3."""
    lr_from: tuple[Path, ...] = ()
    """Instead of lr: folders of comparisons in which these arms were tuned.
    Each arm is run at its best learning rate there."""
    steps: int = 200
    """Optimizer steps of one run; at least 1."""
    tokens: int | None = None
    """Instead of steps: training tokens of one run, rounded down to a multiple of batch x sequence_length."""
    batch: int = 16
    """Sequences in one optimizer step, over all ranks; at least 1."""
    sequence_length: int = 128
    """Tokens in one sequence; at least 2."""
    ranks: int | None = None
    """Number of ranks (processes) of one run; on GPUs at most one per GPU.
    Default: 2, or 1 if there is a single GPU."""
    launcher: Literal["deepspeed", "torchrun", "accelerate", "python", "slurm"] = "deepspeed"
    """Launcher that starts the ranks. "python" starts a single rank.
    "slurm" is for slurm/compare.sbatch, which submits each run as a job; it needs --plan-only."""
    max_runs: int | None = None
    """Number of runs to begin now; above 0. The same command continues later. Default: no limit."""
    max_hours: float | None = None
    """Begin no run that would end later than this many hours from now, if it takes as long as the runs before it.
    Above 0. Default: no limit."""
    discard_checkpoints: bool = False
    """Remove the checkpoints of each run that has finished. Otherwise a sweep of many runs may fill the disk."""
    plan_only: bool = False
    """Write the manifest and stop."""
    manifest: Path | None = None
    """Execute the plan in this file, such as one that --plan-only wrote and you edited.
    It decides arms, seeds, learning rates, steps, batch, ranks, launcher and the options after "--"."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": further options of every run, as for train.pretrain, such as -- --model small.
    Unless given there, warmup is steps / 10, and save_every and validate_every are steps / 4."""
