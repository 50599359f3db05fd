"""Save a checkpoint of a DeepSpeed engine atomically: written under a temporary name, synced, summed and renamed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.manifest import (
    Files,
    Origin,
    complete_checkpoints,
    gone,
    make_room,
    remove,
    step_of,
    whats_left,
    why_incomplete,
    written,
)
from train.common.errors import ConfigError, RankError, first_line, require
from train.distributed.ranks import Ranks
from train.run.optimizers import checkpoint_bytes


class _Recorder:
    """Wraps DeepSpeed's checkpoint engine: syncs and sums each file, and records a failed write instead of raising.

    A rank that raised in the middle of ``save_checkpoint`` would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self, inner: Any, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks
        self.error: Exception | None = None
        self.files: Files = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.ranks.heartbeat()
        try:
            self.inner.save(state_dict, path)
            self.files[Path(path).name] = written(Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            self.error = error
        self.ranks.heartbeat()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def save_checkpoint(
    engine: Any,
    ranks: Ranks,
    folder: Path,
    step: int,
    keep: tuple[int, int],
    parameters: int,
    layout: dict[str, Any],
    origin: Origin | None = None,
) -> None:
    """Save the engine's complete state after ``step`` steps; then remove checkpoints that are not to be kept.

    Args:
        engine: the DeepSpeed engine.
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        step: optimizer steps taken.
        keep: how many of the newest complete checkpoints to keep; and a number of steps, whose multiples are kept for
            good, or 0.
        parameters: number of weights in the model, to estimate the checkpoint's size.
        layout: how the state is partitioned; see :func:`train.run.deepspeed_config.layout`.
        origin: the run that the checkpoint belongs to; None where that doesn't matter.

    Raises:
        ConfigError: on all ranks, if the disk is too full or a write fails. Older checkpoints stay untouched.
        RankError: if DeepSpeed fails on this rank alone.
    """
    target = folder / f"step-{step:07d}"
    tmp = folder / f".{target.name}"

    def moved() -> bool:  # DeepSpeed makes a folder that is gone anew, without the run's other files
        return origin is not None and not (folder.parent / "run.json").exists()

    def not_written(error: Exception) -> str:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        sentence = f"checkpoint {target} could not be written ({reason}); {whats_left(folder)}."
        return gone(folder) if moved() else sentence

    with ranks.collective_errors():
        if ranks.is_main:
            require(not moved(), gone(folder))
            for left in folder.glob(".step-*"):  # of an interrupted run
                remove(left)
            name = origin.run["optimizer"].get("optimizer", "adam") if origin else "adam"
            make_room(folder, checkpoint_bytes(name) * parameters)
    writer = _Recorder(engine.checkpoint_engine, ranks)
    engine.checkpoint_engine = writer
    try:
        engine.save_checkpoint(str(folder), tag=tmp.name, client_state={"step": step}, save_latest=False)
    except OSError as error:  # not under collective_errors: the others may be in one of DeepSpeed's barriers
        raise RankError(not_written(error)) from None
    finally:
        engine.checkpoint_engine = writer.inner
    with ranks.collective_errors():
        if writer.error is not None:
            raise ConfigError(not_written(writer.error))
    by_rank = ranks.gather(writer.files)
    with ranks.collective_errors():
        if ranks.is_main:
            require(not moved(), gone(folder))
            try:
                about = {
                    "step": step,
                    "parameters": parameters,
                    "layout": layout,
                    **(origin._asdict() if origin else {}),
                }
                known = {name: summed for files in by_rank for name, summed in files.items()}
                manifest.finish(tmp, target, about, known)
                require(not (reason := why_incomplete(target)), not_written(ValueError(reason)))
                _rotate(folder, step, keep)
            except OSError as error:
                raise ConfigError(not_written(error)) from None


def _rotate(folder: Path, step: int, keep: tuple[int, int]) -> None:
    """Remove the checkpoints up to ``step``, complete or not, that are not to be kept; see :func:`save_checkpoint`."""
    newest, every = keep
    try:
        complete = complete_checkpoints(folder)
    except OSError:  # one can't be read now, and may be complete
        return
    kept = {path.name for path in complete[-newest:]}
    kept |= {path.name for path in complete if every and step_of(path) % every == 0}
    for path in folder.iterdir():
        match = re.fullmatch(r"\.?(step-(\d{7,}))(-universal)?", path.name)
        if match and int(match[2]) <= step and match[1] not in kept:
            remove(path)
