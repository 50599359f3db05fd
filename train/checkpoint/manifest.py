"""Save, find, convert and load checkpoints of a DeepSpeed engine; nothing that isn't whole is ever resumed from.

step-N/              what DeepSpeed saves, and complete.json: its files with their sizes and SHA-256 sums, how its state is split, and which
                     run and which text it is of
step-N-universal/    the same moments in DeepSpeed's universal format, made from it when another world size, ZeRO stage or
                     partition resumes
.step-N...           either of them on the way: written aside, synced, and renamed when it is whole
"""

from __future__ import annotations

import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from train.common.errors import require
from train.common.files import checksum, sync, write_json
from train.common.schemas import CheckpointFile, guard, parse_schema

MANIFEST = "complete.json"
Files = dict[str, tuple[int, str]]
"""Name within the checkpoint: size and SHA-256."""


class Origin(NamedTuple):
    """Which run a checkpoint is of."""

    run: dict[str, Any]
    """Its identity."""
    tokens: str
    """What it trains on, as in run.json."""


class CheckpointInfo(NamedTuple):
    """A checkpoint to resume from."""

    path: Path
    step: int
    layout: dict[str, Any]
    """How the state is split over the ranks; see :func:`train.run.deepspeed_config.layout`."""
    parameters: int
    origin: dict[str, Any]
    """``run`` and ``tokens`` of its manifest; nothing where an older version made it."""
    universal: bool = False
    """Whether it is in DeepSpeed's universal format."""


def newest_step(folder: Path) -> int:
    """Steps taken in the newest whole checkpoint, by names and sizes alone; 0 if none can be read."""
    with suppress(OSError):
        for path in reversed(all_checkpoints(folder)):
            with suppress(OSError):
                if not why_incomplete(path):
                    return step_of(path)
    return 0


def finish(tmp: Path, target: Path, about: dict[str, Any], known: Files) -> None:
    """Sum what has no sum yet, write the manifest, sync, and give the folder its name."""
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
    """Remove a checkpoint; half-removed it isn't whole."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def make_room(folder: Path, needed: int) -> None:
    """Make the folder; raise :class:`ConfigError` unless its disk has so many bytes free."""
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"the disk of {folder} has {free / 1e9:.1f} GB free, and a checkpoint needs about {needed / 1e9:.1f} GB; "
        f"{whats_left(folder)}.",
    )


def written(path: Path) -> tuple[int, str]:
    """Bring a file to the disk; its size and SHA-256."""
    sync(path)
    return checksum(path)


def size_of(path: Path) -> int:
    """Bytes of a file; -1 if there is none, or something that is no file.

    Raises:
        OSError: if that can't be found out now.
    """
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1


def step_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.name.removeprefix("step-").removesuffix("-universal"))


def all_checkpoints(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, complete or not, oldest first; none where there is no such folder."""
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        if folder.is_symlink():  # to a disk that isn't mounted
            raise
        return []
    return sorted((path for path in paths if re.fullmatch(r"step-\d{7,}", path.name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return [path for path in all_checkpoints(folder) if not why_incomplete(path)]


def files_in(folder: Path) -> list[Path]:
    """All files below it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def _manifest(path: Path) -> CheckpointFile:
    return parse_schema(CheckpointFile, (path / MANIFEST).read_bytes())


def checkpoint_info(path: Path) -> CheckpointInfo:
    """What the manifest of a complete checkpoint says."""
    about = _manifest(path)
    origin = {"run": about.run, "tokens": about.tokens} if about.run is not None and about.tokens is not None else {}
    return CheckpointInfo(path, about.step, about.layout.model_dump(), about.parameters, origin)


def why_incomplete(path: Path) -> str:
    """What shows that a checkpoint isn't whole, by names and sizes; empty if nothing does.

    Raises:
        OSError: if that can't be found out now.
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
    # What DeepSpeed writes into a universal checkpoint depends on the model; otherwise each rank writes its part.
    if not path.name.endswith("-universal"):
        parts = [sum(name.endswith(end) for name in about.files) for end in ("model_states.pt", "optim_states.pt")]
        stage, world = about.layout.stage, about.layout.world
        if parts != [world if stage == 3 else 1, world if stage else 0]:
            return f"{MANIFEST} lists {parts[0]} files of weights and {parts[1]} of the optimizer's, not those of {world} ranks"
    return ""


def whats_left(folder: Path) -> str:
    """Which good checkpoint there is, for the end of an error."""
    try:
        whole = complete_checkpoints(folder)
    except OSError as error:
        return f"the checkpoints there can't be read now ({error.strerror})"
    return f"the last good checkpoint is {whole[-1].name}" if whole else "there is no good checkpoint yet"
