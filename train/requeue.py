"""Decide after an attempt of a batch job whether to requeue the run: ``python -m train.requeue OUT``.

Exit code 0: the run is finished. 75: requeue it. 1: don't, because it diverged, or because two attempts of this job in
a row made no progress. The step reached is appended to attempts.jsonl.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.checkpoint.manifest import newest_step
from train.common.command_line import parse
from train.common.errors import EXIT_RETRY, ConfigError, first_line, require
from train.common.files import read_lines
from train.run import run_dir

EVENT = "attempt ended"


def verdict(out: Path) -> tuple[int, str]:
    """Return the exit code, and the reason in one sentence.

    Raises:
        ConfigError: if result.json is damaged, or there is no such folder outside of a batch job.
    """
    if ended := run_dir.result(out):
        return int(ended["status"] != "finished"), f"{out} is {ended['status']}"
    # In a batch job the attempt may have ended before it made the folder.
    require(
        out.is_dir() or "SLURM_JOB_ID" in os.environ,
        f"{out} is no folder; give the one that a run was started with as --out.",
    )
    out.mkdir(parents=True, exist_ok=True)
    step = newest_step(out / "checkpoints")
    lines = read_lines(out / "attempts.jsonl")
    ends = [line for line in lines if line.get("event") == EVENT and type(line.get("step")) is int]
    job = os.environ.get("SLURM_JOB_ID")
    before = [line["step"] for line in ends if line.get("job") != job][-1:] or [0]
    steps = [*before, *(line["step"] for line in ends if line.get("job") == job), step]
    run_dir.note(out, EVENT, step=step)
    if len(steps) >= 3 and steps[-1] == steps[-2] == steps[-3]:
        return 1, f"{out} got no further than step {step} in two attempts; not started again"
    return EXIT_RETRY, f"{out} is saved up to step {step} and can be resumed"


@dataclass(frozen=True, kw_only=True)
class Requeue:
    """Which run."""

    out: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        code, why = verdict(parse(Requeue, arguments, "train.requeue", __doc__).out)
    except (ConfigError, OSError, ValueError) as error:
        code, why = 1, first_line(error)
    print(why, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
