"""Save, find, convert and load checkpoints of a DeepSpeed engine; nothing that isn't whole is ever resumed from.

step-N/              what DeepSpeed saves, and complete.json: its files with their sizes and SHA-256 sums, by whom it was made
step-N-universal/    the same moments in DeepSpeed's universal format, made from it when another world size, ZeRO stage or
                     partition resumes
.step-N...           either of them on the way: written aside, synced, and renamed when it is whole
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from train.folder import checksum, sync, write_json
from train.progress import Progress
from train.ranks import Ranks
from train.settings import RankError, SettingsError, first_line, require
from train.watch import is_lost

MANIFEST = "complete.json"
BYTES_PER_PARAMETER = 16  # float32 weights and two moments, and the model's own weights
SEEN_LATE = 60.0  # seconds that a shared file system may take to show one host what another has written

Files = dict[str, tuple[int, str]]
"""Name within the checkpoint: size and SHA-256."""


class Found(NamedTuple):
    """A checkpoint to resume from."""

    path: Path
    step: int
    layout: dict[str, Any]
    """How the state is split over the ranks; see :func:`layout`."""
    parameters: int
    universal: bool = False
    """Whether it is in DeepSpeed's universal format."""


def layout(ds_config: dict[str, Any], world: int) -> dict[str, Any]:
    """What has to be equal for DeepSpeed to load a checkpoint as it is."""
    accumulation = ds_config.get("data_types", {}).get("grad_accum_dtype")
    dtype = next((name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")), "fp32")
    return {
        "world": world,
        "stage": ds_config["zero_optimization"]["stage"],
        "dtype": dtype,
        "accumulation": accumulation,
    }


class _Recorder:
    """DeepSpeed's checkpoint engine, but what is written is synced and summed, and a failed write remembered, not raised.

    A rank that raised in the middle of ``save_checkpoint`` would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self, inner: Any, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks
        self.error: Exception | None = None
        self.files: Files = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.ranks.alive()
        try:
            self.inner.save(state_dict, path)
            self.files[Path(path).name] = _written(Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            self.error = error
        self.ranks.alive()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def save(
    engine: Any, ranks: Ranks, folder: Path, step: int, keep: int, parameters: int, layout: dict[str, Any]
) -> None:
    """Save the engine's whole state after ``step`` steps; then remove what is older than the newest ``keep``.

    Args:
        engine: the DeepSpeed engine.
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        step: optimizer steps taken.
        keep: number of whole checkpoints that stay.
        parameters: weights of the whole model, to foretell the size.
        layout: see :func:`layout`.

    Raises:
        SettingsError: if the disk is too full or a write fails, on all ranks; older checkpoints are untouched.
    """
    target = folder / f"step-{step:07d}"
    aside = folder / f".{target.name}"
    with ranks.together():
        if ranks.first:
            for left in folder.glob(".step-*"):  # of a run that was cut
                _remove(left)
            _make_room(folder, BYTES_PER_PARAMETER * parameters)
    writer = _Recorder(engine.checkpoint_engine, ranks)
    engine.checkpoint_engine = writer
    try:
        engine.save_checkpoint(str(folder), tag=aside.name, client_state={"step": step}, save_latest=False)
    except OSError as error:  # not together: the others may be in a barrier of DeepSpeed's
        raise RankError(_not_written(target, error)) from None
    finally:
        engine.checkpoint_engine = writer.inner
    with ranks.together():
        if writer.error is not None:
            raise SettingsError(_not_written(target, writer.error))
    written = ranks.gather(writer.files)
    with ranks.together():
        if ranks.first:
            try:
                about = {"step": step, "parameters": parameters, "layout": layout}
                _finish(aside, target, about, {name: found for files in written for name, found in files.items()})
                _rotate(folder, step, keep)
            except OSError as error:
                raise SettingsError(_not_written(target, error)) from None


def find(ranks: Ranks, folder: Path) -> Found | None:
    """The newest whole checkpoint, every file of it checked; the same on all ranks. None if there is none.

    What isn't whole or has been damaged since is named and passed over. A host to which a shared file system shows a
    checkpoint late waits for it.

    Raises:
        SettingsError: if a host doesn't come to see it, or there are checkpoints and none of them is whole.
    """
    names: list[str] = []
    with ranks.together():
        if ranks.first:
            for path in reversed(_all(folder)):
                if reason := _not_whole(path):
                    print(f"{path} is not whole ({reason}); passed over.", flush=True)
                else:
                    names.append(path.name)
    for name in ranks.from_first(names):
        path = folder / name
        if _verified(ranks, path):
            with ranks.together():
                mine = _manifest(path) if ranks.first else {}
            about = ranks.from_first(mine)
            return Found(path, about["step"], about["layout"], about["parameters"])
    with ranks.together():
        require(
            not (ranks.first and _all(folder)),
            f"{folder} holds checkpoints, and none of them is whole; restore one, or remove them all to begin from step 0.",
        )
    return None


def fit(ranks: Ranks, found: Found, wanted: dict[str, Any]) -> Found:
    """``found`` itself, if it was made in the layout that is wanted; else the same state in DeepSpeed's universal format.

    That is made once, on one rank, while the others wait.

    Raises:
        SettingsError: on every rank, if no conversion leads there, the disk is too full or DeepSpeed's conversion fails;
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
    with ranks.together():
        missing = ranks.first and _not_whole(target)
    ranks.wait_for((lambda: _convert(found, target)) if missing else None)
    if not _verified(ranks, target):
        raise SettingsError(f"{target} has been damaged; remove it, to have it made anew from {found.path.name}.")
    return found._replace(path=target, universal=True)


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


def load(engine: Any, ranks: Ranks, found: Found) -> int:
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
        raise RankError(
            f"checkpoint {found.path} can't be loaded on rank {ranks.rank} ({first_line(error)}); if its files are damaged, "
            "remove it to go on from an older one."
        ) from None
    if ranks.first:
        print(f"Going on from {found.path}.", flush=True)
    return int(state["step"])


def load_weights(engine: Any, found: Found) -> None:
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


def newest_step(folder: Path) -> int:
    """Steps taken in the newest whole checkpoint, by names and sizes alone; 0 if there is none."""
    return max(map(_step, _whole(folder)), default=0)


def _convert(found: Found, target: Path) -> None:
    aside = target.with_name(f".{target.name}")
    _remove(aside)
    wanted = 2 * 12 * found.parameters  # three float32 numbers a weight, and DeepSpeed's temporary copy of them
    _make_room(found.path.parent, wanted)
    line = [sys.executable, "-m", "train.universal", str(found.path), str(aside)]
    with Progress(12 * found.parameters, 0, f"converting {found.path.name}") as progress:
        # Not into a pipe: it says much, and would wait for somebody to read it.
        with TemporaryFile("w+") as said, subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    merged = sum(max(_size(f), 0) for f in _files(aside / "zero"))
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
        about = {"step": found.step, "parameters": found.parameters, "layout": found.layout}
        _finish(aside, target, about, {})
        progress.show(12 * found.parameters, "bytes")


def _finish(aside: Path, target: Path, about: dict[str, Any], known: Files) -> None:
    """Sum what has no sum yet, write the manifest, sync, and give the folder its name."""
    files = {str(f.relative_to(aside)): f for f in _files(aside)}
    rest = [name for name in files if name not in known]
    with ThreadPoolExecutor() as pool:
        known = {**known, **dict(zip(rest, pool.map(lambda name: _written(files[name]), rest), strict=True))}
    write_json(aside / MANIFEST, {**about, "files": {name: known[name] for name in sorted(files)}})
    for folder in {f.parent for f in files.values()} | {aside}:
        sync(folder)
    _remove(target)  # a damaged one of the same step
    aside.rename(target)
    sync(target.parent)


def _rotate(folder: Path, step: int, keep: int) -> None:
    kept = {path.name for path in _whole(folder)[-keep:]}
    for path in folder.iterdir():
        match = re.fullmatch(r"\.?(step-(\d{7,}))(-universal)?", path.name)
        if match and int(match[2]) <= step and match[1] not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; half-removed it isn't whole."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _make_room(folder: Path, needed: int) -> None:
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"the disk of {folder} has {free / 1e9:.1f} GB free, and a checkpoint needs about {needed / 1e9:.1f} GB; "
        f"{_whats_left(folder)}.",
    )


def _written(path: Path) -> tuple[int, str]:
    """Bring a file to the disk; its size and SHA-256."""
    sync(path)
    return checksum(path)


def _verified(ranks: Ranks, path: Path) -> bool:
    """Whether every file has the sum in the manifest. The ranks share the work, and each waits until it sees the files."""
    with ranks.together():
        text = (path / MANIFEST).read_text() if ranks.first else ""
    expected = ranks.from_first(text)
    files: Files = json.loads(expected)["files"]
    mine: Files = {name: (files[name][0], files[name][1]) for name in sorted(files)[ranks.rank :: ranks.world]}
    late = damaged = ""
    until = time.monotonic() + SEEN_LATE
    while (late := _unseen(path, expected, mine)) and time.monotonic() < until:
        ranks.alive()
        time.sleep(0.5)
    for name, summed in {} if late else mine.items():
        ranks.alive()
        try:
            if checksum(path / name) != summed:
                damaged = name
        except OSError:
            damaged = name
    with ranks.together():
        require(
            not late, f"{path / late} is not to be seen after {SEEN_LATE:.0f} s; is the folder shared by all hosts?"
        )
    found = [name for name in ranks.gather(damaged) if name]
    with ranks.together():
        if found and ranks.first:
            print(f"{path} is damaged ({found[0]} has changed since it was written); passed over.", flush=True)
            (path / MANIFEST).rename(path / "damaged.json")  # so that it counts as whole nowhere
    return not found


def _unseen(path: Path, manifest: str, files: Files) -> str:
    try:
        if (path / MANIFEST).read_text() != manifest:
            return MANIFEST
    except OSError:
        return MANIFEST
    return next((name for name, (size, _) in files.items() if _size(path / name) != size), "")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    ours = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)]
    return sorted(ours, key=_step)


def _whole(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if not _not_whole(path)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _manifest(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return about


def _not_whole(path: Path) -> str:
    """What shows that a checkpoint isn't whole, by names and sizes; empty if nothing does."""
    try:
        about = _manifest(path)
        if not {"step", "layout", "parameters"} <= about.keys():
            return f"{MANIFEST} is not what this program writes"
        files = about["files"].items()
        return next(
            (f"{name} is missing or has another size" for name, (size, _) in files if _size(path / name) != size), ""
        )
    except OSError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"


def _not_written(target: Path, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return f"checkpoint {target} could not be written ({reason}); {_whats_left(target.parent)}."


def _whats_left(folder: Path) -> str:
    whole = _whole(folder)
    return f"the last good checkpoint is {whole[-1].name}" if whole else "there is no good checkpoint yet"
