"""Begin a run with the state of another run (``--branch-from``)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.load import readable
from train.checkpoint.manifest import (
    all_checkpoints,
    checkpoint_info,
    complete_checkpoints,
    make_room,
    remove,
    step_of,
    why_incomplete,
)
from train.common.errors import RetryError, require
from train.common.schemas import CheckpointFile, read_schema
from train.run import run_dir
from train.run.config import Run

TRIES = 3  # the parent may remove a checkpoint while it is linked


def check(run: Run) -> None:
    """Check that the checkpoint is there that the run branches from, if it does and has not begun.

    Raises:
        ConfigError: if it isn't, or the run would end before it.
    """
    if run.checkpoints.branch_from and run_dir.begun(run.out) is None:
        _source(run)


def is_due(run: Run) -> bool:
    """Return whether the run needs its parent's checkpoint: it has one, and has not begun or has no checkpoint left."""
    if run.checkpoints.branch_from is None:
        return False
    with readable(run.out / "checkpoints"):
        return run_dir.begun(run.out) is None or not all_checkpoints(run.out / "checkpoints")


def take(run: Run) -> dict[str, Any]:
    """Put the parent's checkpoint into the run's folder, as its own first, and return what run.json says of it.

    The files are linked where both folders are on one file system, and copied otherwise. The parent stays as it is.

    Raises:
        ConfigError: if there is no such checkpoint, it is no longer that which the run began from, or the run would end
            before it.
        RetryError: if the parent removes its checkpoints again and again.
        OSError: if a file can't be read or written.
    """
    folder, begun = run.out / "checkpoints", run_dir.begun(run.out)
    make_room(folder, 0)
    for path in all_checkpoints(folder) if begun is None else []:
        if _was_taken(path):  # by a start that failed; it may have been another's
            remove(path)
    for _ in range(TRIES):
        source = Path(begun.parent.checkpoint) if begun and begun.parent else _source(run)
        try:
            about = read_schema(CheckpointFile, source / manifest.MANIFEST)
            require(
                begun is None or begun.parent is None or about.files == begun.parent.files,
                f"out is {run.out}, whose checkpoints are gone, and {source} is no longer what it began from; "
                "give another folder.",
            )
            tmp = folder / f".{source.name}"
            remove(tmp)
            for name in about.files:
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                _link(source / name, tmp / name)
        except FileNotFoundError:
            continue
        stays = about.model_dump(include={"step", "parameters", "layout"})
        manifest.finish(tmp, folder / source.name, {**stays, "run": run.identity()}, about.files)
        return {"checkpoint": str(source), "step": about.step, "files": about.files}
    raise RetryError(f"branch_from is {source}, which is gone, or was removed while it was read; start again.")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _was_taken(path: Path) -> bool:
    """Return whether a checkpoint is one that :func:`take` has made: its own run's have tokens."""
    if why_incomplete(path):
        return False
    origin = checkpoint_info(path).origin
    return "run" in origin and "tokens" not in origin


def _source(run: Run) -> Path:
    given, parent = run.checkpoints.branch_from, run.checkpoints.parent
    assert given is not None and parent is not None
    source = given.resolve()
    if source != parent:
        require(
            re.fullmatch(r"step-\d{7,}", source.name) is not None,
            f"branch_from is {given}, which is a copy for other ranks; give the checkpoint without -universal.",
        )
        reason = why_incomplete(source)
        require(not reason, f"branch_from is {given}, which is not a complete checkpoint: {reason}.")
    else:
        complete = complete_checkpoints(parent / "checkpoints")
        require(bool(complete), f"branch_from is {given}, which has no complete checkpoint.")
        source = complete[-1]
    require(
        step_of(source) < run.schedule.steps,
        f"steps is {run.schedule.steps}, and branch_from is {source}; steps counts those of the parent, so give more "
        f"than {step_of(source)}.",
    )
    return source
