"""Save, find and load checkpoints through the DeepSpeed engine; one that isn't whole is never resumed from.

A checkpoint is a folder checkpoints/step-N that DeepSpeed fills; complete.json, written last, lists its files with
their sizes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.folder import read_json, write_json
from train.ranks import Ranks
from train.settings import RankError, SettingsError, first_line, require

MARKER = "complete.json"
BYTES_PER_PARAMETER = 16  # float32 weights and two moments, and the model's own weights


class _Deferred:
    """DeepSpeed's checkpoint engine, but a failed write is remembered instead of raised.

    A rank that raised in the middle of ``save_checkpoint`` would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def save(engine: Any, ranks: Ranks, folder: Path, step: int, keep: int, parameters: int) -> None:
    """Save the engine's whole state after ``step`` steps; then remove what is older than the newest ``keep``.

    Args:
        engine: the DeepSpeed engine.
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        step: optimizer steps taken.
        keep: number of whole checkpoints that stay.
        parameters: weights of the whole model, to foretell the size.

    Raises:
        SettingsError: if the disk is too full or a write fails, on all ranks; older checkpoints are untouched.
    """
    target = folder / f"step-{step:07d}"
    with ranks.together():
        if ranks.first:
            folder.mkdir(exist_ok=True)
            free, needed = shutil.disk_usage(folder).free, BYTES_PER_PARAMETER * parameters
            require(
                free >= needed,
                f"the disk of {folder} has {free / 1e9:.1f} GB free, and a checkpoint needs about {needed / 1e9:.1f} GB; "
                f"{_whats_left(folder)}.",
            )
            if target.exists():
                shutil.rmtree(target)  # a half-written one of a run that was cut
    writer = _Deferred(engine.checkpoint_engine)
    engine.checkpoint_engine = writer
    try:
        engine.save_checkpoint(str(folder), tag=target.name, client_state={"step": step}, save_latest=False)
    finally:
        engine.checkpoint_engine = writer.inner
    with ranks.together():
        if writer.error is not None:
            reason = str(writer.error).splitlines()[0]
            raise SettingsError(f"checkpoint {target} could not be written ({reason}); {_whats_left(folder)}.")
    with ranks.together():
        if ranks.first:
            sizes = {str(f.relative_to(target)): f.stat().st_size for f in sorted(target.rglob("*")) if f.is_file()}
            about = {"step": step, "world": ranks.world, "stage": engine.zero_optimization_stage(), "files": sizes}
            write_json(target / MARKER, about)
            for old in [
                *_whole(folder)[:-keep],
                *(p for p in _all(folder) if _step(p) < step and not _is_whole(p)),
            ]:
                (old / MARKER).unlink(missing_ok=True)  # first, so that a half-removed one isn't whole
                shutil.rmtree(old)


def resume(engine: Any, ranks: Ranks, folder: Path) -> int:
    """Load the newest whole checkpoint, if there is one, and return the number of steps taken.

    Raises:
        SettingsError: if it was made by another number of ranks or at another ZeRO stage, or can't be loaded.
    """
    found: list[Path | None] = [None]
    with ranks.together():
        if ranks.first:
            whole = _whole(folder)
            for path in _all(folder):
                if path not in whole:
                    print(f"{path} is not whole; passed over.", flush=True)
            found = [whole[-1] if whole else None]
            if whole:
                about = read_json(whole[-1] / MARKER, "world", "stage")
                made, now = (about["world"], about["stage"]), (ranks.world, engine.zero_optimization_stage())
                require(
                    made == now,
                    f"checkpoint {whole[-1]} was made by {made[0]} ranks at ZeRO stage {made[1]}, and this run has {now[0]} "
                    f"at stage {now[1]}; go on with the former.",
                )
    dist.broadcast_object_list(found, device=ranks.device)
    if found[0] is None:
        return 0
    try:  # not together: DeepSpeed's own collectives are in here, and a rank that fails must leave
        loaded, state = engine.load_checkpoint(str(folder), tag=found[0].name)
        require(loaded is not None, "DeepSpeed found nothing in it")
    except Exception as error:  # whatever a file that has changed without changing its size runs into
        raise RankError(
            f"checkpoint {found[0]} can't be loaded on rank {ranks.rank} ({first_line(error)}); if its files are damaged, remove "
            "it to go on from an older one."
        ) from None
    if ranks.first:
        print(f"Going on from {found[0]}.", flush=True)
    return int(state["step"])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    ours = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)]
    return sorted(ours, key=_step)


def _whole(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _whats_left(folder: Path) -> str:
    whole = _whole(folder)
    return f"the last good checkpoint is {whole[-1].name}" if whole else "there is no good checkpoint yet"
