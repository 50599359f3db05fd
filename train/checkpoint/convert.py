"""Convert a checkpoint for another number of ranks or ZeRO stage, through DeepSpeed's universal format."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from train.checkpoint import load, manifest
from train.checkpoint.load import readable
from train.checkpoint.manifest import (
    CheckpointInfo,
    checkpoint_info,
    files_in,
    make_room,
    remove,
    size_of,
    why_incomplete,
)
from train.common.errors import ConfigError, require
from train.common.progress import Progress
from train.distributed.ranks import Ranks
from train.run.optimizers import UNIVERSAL


def convert_layout(ranks: Ranks, checkpoint: CheckpointInfo, wanted: dict[str, Any], optimizer: str) -> CheckpointInfo:
    """Return ``checkpoint`` if it has the layout that is wanted, else the same state in DeepSpeed's universal format.

    One rank converts it, once, while the others wait. ``optimizer`` is the run's, as of ``--optimizer``.

    Raises:
        ConfigError: on every rank, if the layouts can't be converted, the disk is too full or DeepSpeed's conversion
            fails. ``checkpoint`` stays untouched.
    """
    made = {**checkpoint.layout}
    if made["round_robin"] is None:  # a checkpoint that is older than this
        made["round_robin"] = wanted["round_robin"]
    if made["stage"] == wanted["stage"] == 0:
        made = {**made, "world": wanted["world"]}  # at stage 0 every rank has the complete state
    if made == wanted:
        return checkpoint
    require(
        made["dtype"] == wanted["dtype"],
        f"checkpoint {checkpoint.path} was made in {made['dtype']}, and this run computes in {wanted['dtype']}; "
        f"resume in {made['dtype']}.",
    )
    require(
        not (made["round_robin"] or wanted["round_robin"]),
        f"checkpoint {checkpoint.path} was made with {_described(made)}, and this run has {_described(wanted)}; with "
        "round_robin_gradients DeepSpeed mixes up parameters when it converts: resume as it was.",
    )
    require(
        optimizer in UNIVERSAL,
        f"checkpoint {checkpoint.path} was made with {_described(made)}, and this run has {_described(wanted)}; "
        f"DeepSpeed converts two moments and no more, so that {optimizer} has to resume as it was.",
    )
    require(
        0 not in (made["stage"], wanted["stage"]),
        f"checkpoint {checkpoint.path} was made at ZeRO stage {made['stage']}, and this run is at stage "
        f"{wanted['stage']}; DeepSpeed converts between the stages 1, 2 and 3 only.",
    )
    target = checkpoint.path.with_name(f"{checkpoint.path.name}-universal")
    with ranks.collective_errors(), readable(target):
        # An older conversion of another checkpoint of the same step does not count.
        missing = ranks.is_main and (
            why_incomplete(target) or checkpoint_info(target)._replace(path=checkpoint.path) != checkpoint
        )
    ranks.wait_for((lambda: _convert(checkpoint, target)) if missing else None)
    if not load.verified(ranks, target):
        raise ConfigError(f"{target} has been damaged; remove it, to have it made anew from {checkpoint.path.name}.")
    return checkpoint._replace(path=target, universal=True)


def _described(layout: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layout.items())


def _convert(checkpoint: CheckpointInfo, target: Path) -> None:
    """Run DeepSpeed's converter in a process of its own, and complete its output to a checkpoint at ``target``.

    Raises:
        ConfigError: if the disk is too full or the conversion fails.
    """
    tmp = target.with_name(f".{target.name}")
    remove(tmp)
    size = 12 * checkpoint.parameters  # bytes of three float32 numbers per weight
    make_room(checkpoint.path.parent, 2 * size)  # DeepSpeed makes a temporary copy
    line = [sys.executable, "-m", "train.checkpoint.universal", str(checkpoint.path), str(tmp)]
    merged = 0
    with Progress(size, 0, f"converting {checkpoint.path.name}") as progress:
        # Not a pipe: the converter prints a lot, and would block until somebody reads it.
        with TemporaryFile("w+") as log, subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    with suppress(OSError):  # files come and go
                        merged = sum(max(size_of(f), 0) for f in files_in(tmp / "zero"))
                    progress.show(min(merged, size - 1), "bytes")
            finally:
                process.kill()
            log.seek(0)
            reason = (log.read().strip().splitlines() or ["?"])[-1]
        made = checkpoint.layout
        require(
            process.returncode == 0,
            f"{checkpoint.path} can't be converted to DeepSpeed's universal format: {reason}; "
            f"resume with the {made['world']} ranks at ZeRO stage {made['stage']} that made it.",
        )
        (checkpoint.path.parent / "latest_universal").unlink(missing_ok=True)  # DeepSpeed's pointer, to the wrong name
        about = {"step": checkpoint.step, "parameters": checkpoint.parameters, "layout": made, **checkpoint.origin}
        manifest.finish(tmp, target, about, {})
        progress.show(size, "bytes")
