"""Find the newest complete checkpoint and load it; nothing that is incomplete or damaged is ever resumed from."""

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
    why_incomplete,
)
from train.common.errors import RankError, RetryError, first_line, require
from train.common.files import checksum
from train.common.schemas import CheckpointFile, parse_schema
from train.distributed.ranks import Ranks
from train.distributed.watchdog import is_lost
from train.run import run_dir

TRIES = 3  # at reading a file that can't be read, some seconds apart
SEEN_LATE = 60.0  # seconds that a shared file system may take to show one host what another has written


class UnreadableOnRank(RankError, RetryError):
    """This rank alone could not read a file now."""


def find_checkpoint(ranks: Ranks, folder: Path, run: dict[str, Any] | None = None) -> CheckpointInfo | None:
    """The newest whole checkpoint, every file of it checked; the same on all ranks. None if there is none.

    What isn't whole or has been damaged since is named and passed over. A host to which a shared file system shows a
    checkpoint late waits for it.

    Args:
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        run: the identity of the run that it has to be of.

    Raises:
        ConfigError: if a host doesn't come to see it, it is of another run, or there are checkpoints and none of them is whole.
        RetryError: if one can't be read now.
    """
    names: list[str] = []
    with ranks.collective_errors(), readable(folder):
        if ranks.is_main:
            for path in reversed(all_checkpoints(folder)):
                with readable(path):
                    reason = why_incomplete(path)
                if reason:
                    print(f"{path} is not whole ({reason}); passed over.", flush=True)
                else:
                    names.append(path.name)
    for name in ranks.broadcast(names):
        path = folder / name
        with ranks.collective_errors(), readable(path):
            mine = checkpoint_info(path) if ranks.is_main else None
            theirs = mine.origin.get("run") if mine else None
            difference = run_dir.difference_from(theirs, run) if theirs and run else ""
            require(
                not difference,
                f"{path} is a checkpoint of a run with {difference}; move it elsewhere, or give another folder.",
            )
        if verified(ranks, path):
            return ranks.broadcast(mine)
    with ranks.collective_errors(), readable(folder):
        require(
            not (ranks.is_main and all_checkpoints(folder)),
            f"{folder} holds checkpoints, and none of them is whole; restore one, or remove them all to begin from step 0.",
        )
    return None


def check_text(found: CheckpointInfo, tokens: str) -> None:
    """See that a checkpoint's run trained on the tokens of this name.

    Raises:
        ConfigError: if it is known to have trained on others.
    """
    theirs = found.origin.get("tokens")
    require(
        theirs in (None, tokens),
        f"{found.path} is a checkpoint of a run on other text ({theirs}, not {tokens}); move it elsewhere, or restore the text.",
    )


@contextmanager
def only_known_classes() -> Iterator[None]:
    """Within this block ``torch.load`` makes tensors, plain data and four classes of DeepSpeed's, and runs nothing else.

    DeepSpeed asks for weights_only=False everywhere, which would run whatever a file says. So whatever reads a checkpoint does it
    within this (tests/harness/test_guard.py looks for what doesn't).
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def restore_checkpoint(engine: Any, ranks: Ranks, found: CheckpointInfo) -> int:
    """Load it into the engine, and return the number of steps taken.

    Raises:
        RankError: if it can't be loaded.
    """
    try:  # not together: DeepSpeed's own collectives are in here, and a rank that fails must leave
        with only_known_classes():
            loaded, state = engine.load_checkpoint(str(found.path.parent), tag=found.path.name)
        require(loaded is not None, "DeepSpeed found nothing in it")
    except Exception as error:  # whatever a file that was damaged before it was summed runs into
        if is_lost(error):
            raise
        if isinstance(error, OSError):
            raise UnreadableOnRank(cannot_be_read(found.path, error)) from None
        raise RankError(
            f"checkpoint {found.path} can't be loaded on rank {ranks.rank} ({first_line(error)}); if its files are damaged, "
            "remove it to go on from an older one."
        ) from None
    if ranks.is_main:
        print(f"Going on from {found.path}.", flush=True)
    return int(state["step"])


def load_weights(engine: Any, found: CheckpointInfo) -> None:
    """Load the weights alone, made at any ZeRO stage, into an engine at stage 0 on one rank.

    Raises:
        Exception: whatever another model's weights, or a damaged file, run into.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    place, tag = str(found.path.parent), found.path.name
    with only_known_classes():
        if found.layout["stage"] == 0:
            engine.load_checkpoint(place, tag, load_module_only=True)
        else:
            engine.module.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(place, tag))


def verified(ranks: Ranks, path: Path) -> bool:
    """Whether every file has the sum in the manifest. The ranks share the work, and each waits until it sees the files.

    Raises:
        RetryError: if one can't be read now, which doesn't say what it holds.
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
        require(
            not late, f"{path / late} is not to be seen after {SEEN_LATE:.0f} s; is the folder shared by all hosts?"
        )
        if unreadable is not None:
            raise RetryError(cannot_be_read(path, unreadable))
    differ = [name for name in ranks.gather(damaged) if name]
    with ranks.collective_errors():
        if differ and ranks.is_main:
            print(f"{path} is damaged ({differ[0]} has changed since it was written); passed over.", flush=True)
            (path / MANIFEST).rename(path / "damaged.json")  # so that it counts as whole nowhere
    return not differ


def _checksum(file: Path, ranks: Ranks) -> tuple[int, str]:
    """Size and sum; tried again where it can't be read."""
    for tried in range(1, TRIES):
        try:
            return checksum(file)
        except OSError:
            ranks.heartbeat()
            time.sleep(tried)
    return checksum(file)


def _unseen(path: Path, manifest: str, files: Files) -> str:
    try:
        if (path / MANIFEST).read_text() != manifest:
            return MANIFEST
        return next((name for name, (size, _) in files.items() if size_of(path / name) != size), "")
    except OSError:
        return MANIFEST


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """An error while reading says nothing of what there is to read: RetryError."""
    try:
        yield
    except OSError as error:
        raise RetryError(cannot_be_read(path, error)) from None


def cannot_be_read(path: Path, error: OSError) -> str:
    """The sentence for a checkpoint that can't be read now."""
    return (
        f"checkpoint {path} can't be read now ({error.strerror or first_line(error)}); nothing was changed. Start the same command again; if "
        "it stays so, move that checkpoint elsewhere to go on from an older one."
    )
