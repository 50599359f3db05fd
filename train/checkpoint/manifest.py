"""The checkpoints folder of a run: names, manifests, and whether a checkpoint is complete.

step-N/              what DeepSpeed saves, and complete.json: the files with their sizes and SHA-256 sums, how the state
                     is partitioned, and the run and text that the checkpoint belongs to
step-N-universal/    the same state in DeepSpeed's universal format, converted from step-N when the run is resumed with
                     another number of ranks, ZeRO stage or partition
.step-N...           either of them while it is being written; synced, and renamed once it is complete
"""

from __future__ import annotations

import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from train.common.errors import ConfigError, require
from train.common.files import checksum, sync, write_json
from train.common.schemas import CheckpointFile, guard, parse_schema

MANIFEST = "complete.json"
Files = dict[str, tuple[int, str]]
"""Size in bytes and SHA-256 of each file, by its name within the checkpoint."""


class Origin(NamedTuple):
    """The run that a checkpoint belongs to."""

    run: dict[str, Any]
    """Identity of the run; see :meth:`train.run.config.Run.identity`."""
    tokens: str
    """Name of the token folder it trains on, as in run.json."""


class CheckpointInfo(NamedTuple):
    """A checkpoint to resume from."""

    path: Path
    step: int
    layout: dict[str, Any]
    """How the state is partitioned over the ranks; see :func:`train.run.deepspeed_config.layout`."""
    parameters: int
    """Number of weights in the model."""
    origin: dict[str, Any]
    """``run`` and ``tokens`` of the manifest. Older versions wrote neither. A parent's tokens are not the run's."""
    universal: bool = False
    """Whether the checkpoint is in DeepSpeed's universal format."""


def newest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, judged by names and sizes alone; 0 if none can be read."""
    with suppress(OSError):
        for path in reversed(all_checkpoints(folder)):
            with suppress(OSError):
                if not why_incomplete(path):
                    return step_of(path)
    return 0


def finish(tmp: Path, target: Path, about: dict[str, Any], known: Files) -> None:
    """Complete a checkpoint: sum its remaining files, write the manifest, sync, and rename ``tmp`` to ``target``.

    Args:
        tmp: the temporary folder, with all files but the manifest.
        target: the final path. A damaged checkpoint there is removed.
        about: the content of the manifest, but for the files.
        known: files that are synced and summed already.
    """
    files = {str(f.relative_to(tmp)): f for f in files_in(tmp)}
    rest = [name for name in files if name not in known]
    with ThreadPoolExecutor() as pool:
        known = {**known, **dict(zip(rest, pool.map(lambda name: written(files[name]), rest), strict=True))}
    write_json(tmp / MANIFEST, guard({**about, "files": {name: known[name] for name in sorted(files)}}))
    for folder in {f.parent for f in files.values()} | {tmp}:
        sync(folder)
    remove(target)  # a damaged one of the same step
    tmp.rename(target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint. Its manifest goes first, so that a partly removed checkpoint is incomplete."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def make_room(folder: Path, needed: int) -> None:
    """Make the folder, and check that its disk has ``needed`` bytes free.

    Raises:
        ConfigError: if it hasn't, or the run's folder is gone.
    """
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise ConfigError(gone(folder)) from None
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"the disk of {folder} has {free / 1e9:.1f} GB free, and a checkpoint needs about {needed / 1e9:.1f} GB; "
        f"{whats_left(folder)}.",
    )


def gone(folder: Path) -> str:
    """Return the sentence on a run whose folder, with this checkpoints folder in it, is no longer there."""
    return (
        f"out is {folder.parent}, which was moved or removed while the run was at work; put it back, and start the "
        "same command again."
    )


def written(path: Path) -> tuple[int, str]:
    """Sync a file to disk, and return its size and SHA-256."""
    sync(path)
    return checksum(path)


def size_of(path: Path) -> int:
    """Return a file's size in bytes; -1 if it doesn't exist or is not a regular file.

    Raises:
        OSError: if that can't be determined now.
    """
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-").removesuffix("-universal"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints by name, complete or not, oldest first; none if the folder doesn't exist.

    Raises:
        OSError: if the folder can't be read now.
    """
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        if folder.is_symlink():  # to a disk that is not mounted
            raise
        return []
    return sorted((path for path in paths if re.fullmatch(r"step-\d{7,}", path.name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return [path for path in all_checkpoints(folder) if not why_incomplete(path)]


def files_in(folder: Path) -> list[Path]:
    """Return all files in the folder and its subfolders."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _manifest(path: Path) -> CheckpointFile:
    return parse_schema(CheckpointFile, (path / MANIFEST).read_bytes())


def checkpoint_info(path: Path) -> CheckpointInfo:
    """Read the manifest of a complete checkpoint."""
    about = _manifest(path)
    origin = about.model_dump(include={"run", "tokens"}, exclude_none=True)
    return CheckpointInfo(path, about.step, about.layout.model_dump(), about.parameters, origin)


def why_incomplete(path: Path) -> str:
    """Return why a checkpoint is incomplete, judged by names and sizes; empty if it is complete.

    Raises:
        OSError: if that can't be determined now.
    """
    if size_of(path / MANIFEST) < 0:
        return f"it has no {MANIFEST}"
    try:
        about = _manifest(path)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    if about.step != step_of(path):
        return f"{MANIFEST} is of step {about.step}"
    if wrong := next((name for name, (size, _) in about.files.items() if size_of(path / name) != size), ""):
        return f"{wrong} is missing or has another size"
    if unlisted := next((f.name for f in sorted(path.glob("*.pt")) if f.name not in about.files), ""):
        return f"{MANIFEST} does not list {unlisted}"
    # The number of files in a universal checkpoint depends on the model; otherwise each rank writes its part.
    if not path.name.endswith("-universal"):
        parts = [sum(name.endswith(end) for name in about.files) for end in ("model_states.pt", "optim_states.pt")]
        stage, world = about.layout.stage, about.layout.world
        if parts != [world if stage == 3 else 1, world if stage else 0]:
            return (
                f"{MANIFEST} lists {parts[0]} files of weights and {parts[1]} of the optimizer's, "
                f"not those of {world} ranks"
            )
    return ""


def whats_left(folder: Path) -> str:
    """Return a clause for the end of an error message: which is the last good checkpoint."""
    try:
        complete = complete_checkpoints(folder)
    except OSError as error:
        return f"the checkpoints there can't be read now ({error.strerror})"
    return f"the last good checkpoint is {complete[-1].name}" if complete else "there is no good checkpoint yet"
