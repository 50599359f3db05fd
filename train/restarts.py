"""After an attempt of a batch job: shall the run be put back into the queue? ``python -m train.restarts OUT``.

Exit code 0: it is finished. 75: put it back. 1: don't, since it diverged, or two attempts of this job in a row made no progress.
What it sees is appended to attempts.jsonl, where a person can read it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train import checkpoints, folder
from train.settings import SettingsError
from train.watch import AGAIN

EVENT = "attempt ended"


def verdict(out: Path) -> tuple[int, str]:
    """The exit code, and why.

    Raises:
        SettingsError: if result.json is damaged.
    """
    if ended := folder.result(out):
        return int(ended["status"] != "finished"), f"{out} is {ended['status']}"
    out.mkdir(parents=True, exist_ok=True)
    step = checkpoints.newest_step(out / "checkpoints")
    ends = [line for line in folder.read_lines(out / "attempts.jsonl") if line.get("event") == EVENT]
    job = os.environ.get("SLURM_JOB_ID")
    before = [line["step"] for line in ends if line.get("job") != job][-1:] or [0]
    steps = [*before, *(line["step"] for line in ends if line.get("job") == job), step]
    folder.note(out, EVENT, step=step)
    if len(steps) >= 3 and steps[-1] == steps[-2] == steps[-3]:
        return 1, f"{out} got no further than step {step} in two attempts; not started again"
    return AGAIN, f"{out} is saved up to step {step}, and is to go on"


def main(arguments: list[str]) -> int:
    """Command line; the exit code."""
    try:
        code, why = verdict(Path(*arguments))
    except (SettingsError, OSError, ValueError) as error:
        code, why = 1, str(error)
    print(why, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
