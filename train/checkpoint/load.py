"""Find, verify and load the newest complete checkpoint. An incomplete or damaged one is never loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.manifest import (
    MANIFEST,
    CheckpointInfo,
    Files,
    all_checkpoints,
    checkpoint_info,
    size_of,
    step_of,
    why_incomplete,
)
from train.common.errors import RankError, RetryError, first_line, require
from train.common.files import checksum
from train.common.schemas import CheckpointFile, parse_schema
from train.distributed.ranks import Ranks
from train.distributed.watchdog import is_lost
from train.run import run_dir

TRIES = 3  # attempts to read a file, some seconds apart
SEEN_LATE = 60.0  # seconds that a shared file system may take to show one host what another has written


class UnreadableOnRank(RankError, RetryError):
    """This rank alone could not read a file. Reading it may succeed later."""


def find_checkpoint(ranks: Ranks, folder: Path, run: dict[str, Any] | None = None) -> CheckpointInfo | None:
    """Return the newest complete checkpoint, with every file verified; the same on all ranks. None if there is none.

    An incomplete or damaged checkpoint is reported and skipped. If a shared file system shows a checkpoint late, the
    host waits for it.

    Args:
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        run: the identity of the run that the checkpoint has to belong to; None accepts any.

    Raises:
        ConfigError: if the checkpoint does not become visible on a host, it belongs to another run, or there are
            checkpoints and none of them is complete.
        RetryError: if a checkpoint can't be read now.
    """
    names: list[str] = []
    with ranks.collective_errors(), readable(folder):
        if ranks.is_main:
            for path in reversed(all_checkpoints(folder)):
                with readable(path):
                    reason = why_incomplete(path)
                if reason:
                    print(f"{path} is incomplete ({reason}); passed over.", flush=True)
                else:
                    names.append(path.name)
    for name in ranks.broadcast(names):
        path = folder / name
        with ranks.collective_errors(), readable(path):
            mine = checkpoint_info(path) if ranks.is_main else None
            theirs = mine.origin.get("run") if mine else None
            difference = run_dir.difference_from(theirs, run, step_of(path)) if theirs and run else ""
            require(
                not difference,
                f"{path} is a checkpoint of a run with {difference}; move it elsewhere, or give another folder.",
            )
        if verified(ranks, path):
            return ranks.broadcast(mine)
    with ranks.collective_errors(), readable(folder):
        require(
            not (ranks.is_main and all_checkpoints(folder)),
            f"{folder} holds checkpoints, and none of them is complete; restore one, or remove them all to begin anew.",
        )
    return None


def check_text(checkpoint: CheckpointInfo, tokens: str) -> None:
    """Check that the checkpoint's run trained on the token folder of this name. Old checkpoints don't record it.

    Raises:
        ConfigError: if it trained on another text.
    """
    theirs = checkpoint.origin.get("tokens")
    require(
        theirs in (None, tokens),
        f"{checkpoint.path} is a checkpoint of a run on other text ({theirs}, not {tokens}); "
        "move it elsewhere, or restore the text.",
    )


@contextmanager
def only_known_classes() -> Iterator[None]:
    """Restrict ``torch.load`` to tensors, plain data and four DeepSpeed classes during the block.

    DeepSpeed passes weights_only=False everywhere, which would execute any code in a file. So all code that reads a
    checkpoint has to do it within this block. (tests/harness/test_guard.py finds code that doesn't.)
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Who has set the second in the environment, for files of others, doesn't get it here; torch refuses both at once.
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def restore_checkpoint(engine: Any, ranks: Ranks, checkpoint: CheckpointInfo) -> int:
    """Load the checkpoint into the engine, and return the number of steps taken.

    Raises:
        RankError: if it can't be loaded on this rank.
    """
    # Not under collective_errors: load_checkpoint has collectives of its own, so a rank that fails must exit.
    try:
        with only_known_classes():
            loaded, state = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
        require(loaded is not None, "DeepSpeed found nothing in it")
    except Exception as error:  # of any class, if a file was damaged before it was summed
        if is_lost(error):
            raise
        if isinstance(error, OSError):
            raise UnreadableOnRank(cannot_be_read(checkpoint.path, error)) from None
        raise RankError(
            f"checkpoint {checkpoint.path} can't be loaded on rank {ranks.rank} ({first_line(error)}); "
            "if its files are damaged, remove it to resume from an older one."
        ) from None
    if ranks.is_main:
        print(f"Resuming from {checkpoint.path}.", flush=True)
    return int(state["step"])


def verified(ranks: Ranks, path: Path) -> bool:
    """Return whether every file has the checksum in the manifest. The ranks share the work.

    Each rank waits until it sees its files. The manifest of a damaged checkpoint is renamed to damaged.json.

    Raises:
        ConfigError: on every rank, if a file does not become visible on one.
        RetryError: on every rank, if a file can't be read now. That doesn't mean that it is damaged.
    """
    with ranks.collective_errors(), readable(path):
        text = (path / MANIFEST).read_text() if ranks.is_main else ""
    expected = ranks.broadcast(text)
    files = parse_schema(CheckpointFile, expected).files
    mine: Files = {name: files[name] for name in sorted(files)[ranks.rank :: ranks.world]}
    late = damaged = ""
    until = time.monotonic() + SEEN_LATE
    unreadable: OSError | None = None
    while (late := _unseen(path, expected, mine)) and time.monotonic() < until:
        ranks.heartbeat()
        time.sleep(0.5)
    for name, summed in {} if late else mine.items():
        ranks.heartbeat()
        try:
            if _checksum(path / name, ranks) != summed:
                damaged = name
        except OSError as error:
            unreadable = error
    with ranks.collective_errors():
        require(not late, f"{path / late} is not visible after {SEEN_LATE:.0f} s; is the folder shared by all hosts?")
        if unreadable is not None:
            raise RetryError(cannot_be_read(path, unreadable))
    differ = [name for name in ranks.gather(damaged) if name]
    with ranks.collective_errors():
        if differ and ranks.is_main:
            print(f"{path} is damaged ({differ[0]} has changed since it was written); passed over.", flush=True)
            (path / MANIFEST).rename(path / "damaged.json")  # so that it is incomplete for every reader
    return not differ


def _checksum(file: Path, ranks: Ranks) -> tuple[int, str]:
    """Return a file's size and SHA-256. If the file can't be read, try again."""
    for tried in range(1, TRIES):
        try:
            return checksum(file)
        except OSError:
            ranks.heartbeat()
            time.sleep(tried)
    return checksum(file)


def _unseen(path: Path, manifest: str, files: Files) -> str:
    """Return the name of a file that this host does not see yet as it was written; empty if it sees all."""
    try:
        if (path / MANIFEST).read_text() != manifest:
            return MANIFEST
        return next((name for name, (size, _) in files.items() if size_of(path / name) != size), "")
    except OSError:
        return MANIFEST


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a RetryError: a read error doesn't mean that the checkpoint is damaged."""
    try:
        yield
    except OSError as error:
        raise RetryError(cannot_be_read(path, error)) from None


def cannot_be_read(path: Path, error: OSError) -> str:
    """Return the message for a checkpoint that can't be read now."""
    return (
        f"checkpoint {path} can't be read now ({error.strerror or first_line(error)}); nothing was changed. "
        "Start the same command again; if the error persists, move that checkpoint elsewhere to resume from an older "
        "one."
    )
