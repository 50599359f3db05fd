"""Save, find, convert and load checkpoints of a DeepSpeed engine; nothing that isn't whole is ever resumed from.

step-N/              what DeepSpeed saves, and complete.json: its files with their sizes and SHA-256 sums, how its state is split, and which
                     run and which text it is of
step-N-universal/    the same moments in DeepSpeed's universal format, made from it when another world size, ZeRO stage or
                     partition resumes
.step-N...           either of them on the way: written aside, synced, and renamed when it is whole
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from train.folder import checksum, difference_from, sync, write_json
from train.progress import Progress
from train.ranks import Ranks
from train.schemas import CheckpointFile, guard, parse_schema
from train.settings import RankError, SettingsError, TryAgain, first_line, require
from train.watch import is_lost

MANIFEST = "complete.json"
BYTES_PER_PARAMETER = 16  # float32 weights and two moments, and the model's own weights
TRIES = 3  # at reading a file that can't be read, some seconds apart
SEEN_LATE = 60.0  # seconds that a shared file system may take to show one host what another has written

Files = dict[str, tuple[int, str]]
"""Name within the checkpoint: size and SHA-256."""


class UnreadableOnRank(RankError, TryAgain):
    """This rank alone could not read a file now."""


class Origin(NamedTuple):
    """Which run a checkpoint is of."""

    run: dict[str, Any]
    """Its identity."""
    tokens: str
    """What it trains on, as in run.json."""


class Found(NamedTuple):
    """A checkpoint to resume from."""

    path: Path
    step: int
    layout: dict[str, Any]
    """How the state is split over the ranks; see :func:`layout`."""
    parameters: int
    origin: dict[str, Any]
    """``run`` and ``tokens`` of its manifest; nothing where an older version made it."""
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
    engine: Any,
    ranks: Ranks,
    folder: Path,
    step: int,
    keep: int,
    parameters: int,
    layout: dict[str, Any],
    origin: Origin | None = None,
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
        origin: which run it is of; None where that doesn't matter.

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
                about = {
                    "step": step,
                    "parameters": parameters,
                    "layout": layout,
                    **(origin._asdict() if origin else {}),
                }
                _finish(aside, target, about, {name: found for files in written for name, found in files.items()})
                require(not (reason := _not_whole(target)), _not_written(target, ValueError(reason)))
                _rotate(folder, step, keep)
            except OSError as error:
                raise SettingsError(_not_written(target, error)) from None


def find(ranks: Ranks, folder: Path, run: dict[str, Any] | None = None) -> Found | None:
    """The newest whole checkpoint, every file of it checked; the same on all ranks. None if there is none.

    What isn't whole or has been damaged since is named and passed over. A host to which a shared file system shows a
    checkpoint late waits for it.

    Args:
        ranks: all ranks call this.
        folder: the run's checkpoints folder.
        run: the identity of the run that it has to be of.

    Raises:
        SettingsError: if a host doesn't come to see it, it is of another run, or there are checkpoints and none of them is whole.
        TryAgain: if one can't be read now.
    """
    names: list[str] = []
    with ranks.together(), _readable(folder):
        if ranks.first:
            for path in reversed(_all(folder)):
                with _readable(path):
                    reason = _not_whole(path)
                if reason:
                    print(f"{path} is not whole ({reason}); passed over.", flush=True)
                else:
                    names.append(path.name)
    for name in ranks.from_first(names):
        path = folder / name
        with ranks.together(), _readable(path):
            mine = _found(path) if ranks.first else None
            theirs = mine.origin.get("run") if mine else None
            difference = difference_from(theirs, run) if theirs and run else ""
            require(
                not difference,
                f"{path} is a checkpoint of a run with {difference}; move it elsewhere, or give another folder.",
            )
        if _verified(ranks, path):
            return ranks.from_first(mine)
    with ranks.together(), _readable(folder):
        require(
            not (ranks.first and _all(folder)),
            f"{folder} holds checkpoints, and none of them is whole; restore one, or remove them all to begin from step 0.",
        )
    return None


def check_text(found: Found, tokens: str) -> None:
    """See that a checkpoint's run trained on the tokens of this name.

    Raises:
        SettingsError: if it is known to have trained on others.
    """
    theirs = found.origin.get("tokens")
    require(
        theirs in (None, tokens),
        f"{found.path} is a checkpoint of a run on other text ({theirs}, not {tokens}); move it elsewhere, or restore the text.",
    )


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
    with ranks.together(), _readable(target):
        # A copy of another checkpoint of this step, which was here before, is as none.
        missing = ranks.first and (_not_whole(target) or _found(target)._replace(path=found.path) != found)
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
        if isinstance(error, OSError):
            raise UnreadableOnRank(_unreadable(found.path, error)) from None
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
    """Steps taken in the newest whole checkpoint, by names and sizes alone; 0 if none can be read."""
    with suppress(OSError):
        for path in reversed(_all(folder)):
            with suppress(OSError):
                if not _not_whole(path):
                    return _step(path)
    return 0


def _convert(found: Found, target: Path) -> None:
    aside = target.with_name(f".{target.name}")
    _remove(aside)
    wanted = 2 * 12 * found.parameters  # three float32 numbers a weight, and DeepSpeed's temporary copy of them
    _make_room(found.path.parent, wanted)
    line = [sys.executable, "-m", "train.universal", str(found.path), str(aside)]
    merged = 0
    with Progress(12 * found.parameters, 0, f"converting {found.path.name}") as progress:
        # Not into a pipe: it says much, and would wait for somebody to read it.
        with TemporaryFile("w+") as said, subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    with suppress(OSError):  # files come and go
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
        about = {"step": found.step, "parameters": found.parameters, "layout": found.layout, **found.origin}
        _finish(aside, target, about, {})
        progress.show(12 * found.parameters, "bytes")


def _finish(aside: Path, target: Path, about: dict[str, Any], known: Files) -> None:
    """Sum what has no sum yet, write the manifest, sync, and give the folder its name."""
    files = {str(f.relative_to(aside)): f for f in _files(aside)}
    rest = [name for name in files if name not in known]
    with ThreadPoolExecutor() as pool:
        known = {**known, **dict(zip(rest, pool.map(lambda name: _written(files[name]), rest), strict=True))}
    write_json(aside / MANIFEST, guard({**about, "files": {name: known[name] for name in sorted(files)}}))
    for folder in {f.parent for f in files.values()} | {aside}:
        sync(folder)
    _remove(target)  # a damaged one of the same step
    aside.rename(target)
    sync(target.parent)


def _rotate(folder: Path, step: int, keep: int) -> None:
    try:
        kept = {path.name for path in _whole(folder)[-keep:]}
    except OSError:  # one can't be read now: it may be whole
        return
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
    """Whether every file has the sum in the manifest. The ranks share the work, and each waits until it sees the files.

    Raises:
        TryAgain: if one can't be read now, which doesn't say what it holds.
    """
    with ranks.together(), _readable(path):
        text = (path / MANIFEST).read_text() if ranks.first else ""
    expected = ranks.from_first(text)
    files = parse_schema(CheckpointFile, expected).files
    mine: Files = {name: files[name] for name in sorted(files)[ranks.rank :: ranks.world]}
    late = damaged = ""
    until = time.monotonic() + SEEN_LATE
    unreadable: OSError | None = None
    while (late := _unseen(path, expected, mine)) and time.monotonic() < until:
        ranks.alive()
        time.sleep(0.5)
    for name, summed in {} if late else mine.items():
        ranks.alive()
        try:
            if _checksum(path / name, ranks) != summed:
                damaged = name
        except OSError as error:
            unreadable = error
    with ranks.together():
        require(
            not late, f"{path / late} is not to be seen after {SEEN_LATE:.0f} s; is the folder shared by all hosts?"
        )
        if unreadable is not None:
            raise TryAgain(_unreadable(path, unreadable))
    differ = [name for name in ranks.gather(damaged) if name]
    with ranks.together():
        if differ and ranks.first:
            print(f"{path} is damaged ({differ[0]} has changed since it was written); passed over.", flush=True)
            (path / MANIFEST).rename(path / "damaged.json")  # so that it counts as whole nowhere
    return not differ


def _checksum(file: Path, ranks: Ranks) -> tuple[int, str]:
    """Size and sum; tried again where it can't be read."""
    for tried in range(1, TRIES):
        try:
            return checksum(file)
        except OSError:
            ranks.alive()
            time.sleep(tried)
    return checksum(file)


def _unseen(path: Path, manifest: str, files: Files) -> str:
    try:
        if (path / MANIFEST).read_text() != manifest:
            return MANIFEST
        return next((name for name, (size, _) in files.items() if _size(path / name) != size), "")
    except OSError:
        return MANIFEST


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none, or something that is no file.

    Raises:
        OSError: if that can't be found out now.
    """
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix("-universal"))


def _all(folder: Path) -> list[Path]:
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        if folder.is_symlink():  # to a disk that isn't mounted
            raise
        return []
    return sorted((path for path in paths if re.fullmatch(r"step-\d{7,}", path.name)), key=_step)


def _whole(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if not _not_whole(path)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _manifest(path: Path) -> CheckpointFile:
    return parse_schema(CheckpointFile, (path / MANIFEST).read_bytes())


def _found(path: Path) -> Found:
    about = _manifest(path)
    origin = {"run": about.run, "tokens": about.tokens} if about.run is not None and about.tokens is not None else {}
    return Found(path, about.step, about.layout.model_dump(), about.parameters, origin)


def _not_whole(path: Path) -> str:
    """What shows that a checkpoint isn't whole, by names and sizes; empty if nothing does.

    Raises:
        OSError: if that can't be found out now.
    """
    if _size(path / MANIFEST) < 0:
        return f"it has no {MANIFEST}"
    try:
        about = _manifest(path)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValueError as error:
        return f"{MANIFEST} is damaged: {error}"
    if about.step != _step(path):
        return f"{MANIFEST} is of step {about.step}"
    if wrong := next((name for name, (size, _) in about.files.items() if _size(path / name) != size), ""):
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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """An error while reading says nothing of what there is to read: TryAgain."""
    try:
        yield
    except OSError as error:
        raise TryAgain(_unreadable(path, error)) from None


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"checkpoint {path} can't be read now ({error.strerror or first_line(error)}); nothing was changed. Start the same command again; if "
        "it stays so, move that checkpoint elsewhere to go on from an older one."
    )


def _not_written(target: Path, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return f"checkpoint {target} could not be written ({reason}); {_whats_left(target.parent)}."


def _whats_left(folder: Path) -> str:
    try:
        whole = _whole(folder)
    except OSError as error:
        return f"the checkpoints there can't be read now ({error.strerror})"
    return f"the last good checkpoint is {whole[-1].name}" if whole else "there is no good checkpoint yet"
