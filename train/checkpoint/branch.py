"""Begin a run with the state of another run (``--branch-from``)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.manifest import complete_checkpoints, make_room, remove, step_of, why_incomplete
from train.common.errors import require
from train.common.schemas import CheckpointFile, read_schema
from train.run.config import Run


def take(run: Run) -> dict[str, Any]:
    """Put the parent's checkpoint into the run's folder, as its own first, and return what run.json says of it.

    The files are linked where both folders are on one file system, and copied otherwise. The parent stays as it is.

    Raises:
        ConfigError: if there is no such checkpoint, or the run would end before it.
        OSError: if a file can't be read or written.
    """
    source = _source(run)
    step = step_of(source)
    require(
        step < run.schedule.steps,
        f"steps is {run.schedule.steps}, and branch_from is {source}; steps counts those of the parent, so give more "
        f"than {step}.",
    )
    about = read_schema(CheckpointFile, source / manifest.MANIFEST)
    folder = run.out / "checkpoints"
    make_room(folder, 0)
    tmp = folder / f".{source.name}"
    remove(tmp)
    for name in about.files:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, tmp / name)
        except OSError:  # another file system, or one without links
            shutil.copy2(source / name, tmp / name)
    stays = about.model_dump(include={"step", "parameters", "layout"})
    manifest.finish(tmp, folder / source.name, {**stays, "run": run.identity()}, about.files)
    return {"checkpoint": str(source.resolve()), "step": step, "files": about.files}


def _source(run: Run) -> Path:
    given, parent = run.checkpoints.branch_from, run.checkpoints.parent
    assert given is not None and parent is not None
    if given != parent:
        reason = why_incomplete(given)
        require(not reason, f"branch_from is {given}, which is not a complete checkpoint: {reason}.")
        return given
    complete = complete_checkpoints(parent / "checkpoints")
    require(bool(complete), f"branch_from is {given}, which has no complete checkpoint.")
    return complete[-1]
