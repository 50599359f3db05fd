"""train.pretrain with a stand-in for the package wandb, which notes what it is given in $WANDB_DIR/calls.jsonl.

$KILLED_AT ends the process as ``kill -9`` does: in ``init``, or in ``log`` from that step on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from train import pretrain
from train.distributed.launch import exit_process


def _note(**values: Any) -> None:
    with Path(os.environ["WANDB_DIR"], "calls.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
    killed_at = os.environ.get("KILLED_AT", "never")
    if killed_at == "init" or (killed_at.isdigit() and values.get("step", -1) >= int(killed_at)):
        os.kill(os.getpid(), signal.SIGKILL)


def init(**given: Any) -> None:
    """As ``wandb.init``, which takes id and resume from the environment where it isn't given them."""
    environment = {name: os.environ.get(name) for name in ("WANDB_RUN_ID", "WANDB_RESUME")}
    _note(rank=os.environ["RANK"], **environment, **given)


def log(data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
    """As ``wandb.log``."""
    _note(step=step)


if __name__ == "__main__":
    package = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    package.init, package.log = init, log  # type: ignore[attr-defined]
    sys.modules["wandb"] = package
    exit_process(pretrain.main())
