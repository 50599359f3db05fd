"""A checkpoint for another number of ranks, ZeRO stage or partition, through DeepSpeed's universal format."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.load import readable, verified
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


def convert_layout(ranks: Ranks, found: CheckpointInfo, wanted: dict[str, Any]) -> CheckpointInfo:
    """``found`` itself, if it was made in the layout that is wanted; else the same state in DeepSpeed's universal format.

    That is made once, on one rank, while the others wait.

    Raises:
        ConfigError: on every rank, if no conversion leads there, the disk is too full or DeepSpeed's conversion fails;
            ``found`` is untouched.
    """
    made = found.layout
    if made["stage"] == wanted["stage"] == 0:
        made = {**made, "world": wanted["world"]}  # every rank has everything
    if made == wanted:
        return found
    require(
        made["dtype"] == wanted["dtype"],
        f"checkpoint {found.path} was made in {made['dtype']}, and this run computes in {wanted['dtype']}; go on with the former.",
    )
    require(
        0 not in (made["stage"], wanted["stage"]),
        f"checkpoint {found.path} was made at ZeRO stage {made['stage']}, and this run is at stage {wanted['stage']}; DeepSpeed "
        "converts between the stages 1, 2 and 3 only.",
    )
    target = found.path.with_name(f"{found.path.name}-universal")
    with ranks.collective_errors(), readable(target):
        # A copy of another checkpoint of this step, which was here before, is as none.
        missing = ranks.is_main and (
            why_incomplete(target) or checkpoint_info(target)._replace(path=found.path) != found
        )
    ranks.wait_for((lambda: _convert(found, target)) if missing else None)
    if not verified(ranks, target):
        raise ConfigError(f"{target} has been damaged; remove it, to have it made anew from {found.path.name}.")
    return found._replace(path=target, universal=True)


def _convert(found: CheckpointInfo, target: Path) -> None:
    tmp = target.with_name(f".{target.name}")
    remove(tmp)
    wanted = 2 * 12 * found.parameters  # three float32 numbers a weight, and DeepSpeed's temporary copy of them
    make_room(found.path.parent, wanted)
    line = [sys.executable, "-m", "train.checkpoint.universal", str(found.path), str(tmp)]
    merged = 0
    with Progress(12 * found.parameters, 0, f"converting {found.path.name}") as progress:
        # Not into a pipe: it says much, and would wait for somebody to read it.
        with TemporaryFile("w+") as said, subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    with suppress(OSError):  # files come and go
                        merged = sum(max(size_of(f), 0) for f in files_in(tmp / "zero"))
                    progress.show(min(merged, 12 * found.parameters - 1), "bytes")
            finally:
                process.kill()
            said.seek(0)
            reason = (said.read().strip().splitlines() or ["?"])[-1]
        require(
            process.returncode == 0,
            f"{found.path} can't be converted to DeepSpeed's universal format: {reason}; go on "
            f"with the {found.layout['world']} ranks at ZeRO stage {found.layout['stage']} that made it.",
        )
        (found.path.parent / "latest_universal").unlink(missing_ok=True)  # DeepSpeed's pointer, to the wrong name
        about = {"step": found.step, "parameters": found.parameters, "layout": found.layout, **found.origin}
        manifest.finish(tmp, target, about, {})
        progress.show(12 * found.parameters, "bytes")
