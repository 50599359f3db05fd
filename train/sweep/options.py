"""What is compared, as the user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


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
    ranks: int | None = None
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
