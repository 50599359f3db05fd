"""A run's folder: who may write there, and the files that describe the run.

run.json        what the run is (options, command, versions); written once all of it is valid
attempts.jsonl  one line for each start and each end of the run: when, where, at which step, why it ended
ds_config.json  the configuration that DeepSpeed was given
metrics.jsonl   one line per step and per validation; on resuming, damaged lines move to metrics.damaged.jsonl
wandb.json      the run's id in Weights & Biases, if it logs there
checkpoints/    see train.checkpoint.manifest
result.json     how the run ended; written last
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.common.errors import ConfigError, require
from train.common.files import environment_facts, load_file, remove_temporaries, write_json
from train.common.schemas import ResultFile, RunFile, WandbFile
from train.run.config import Run, Schedule

OURS_EARLY = ("log.txt", "monitor", "attempts.jsonl", "STOP", "wandb.json")
"""Files that may exist in the folder before run.json, besides hidden ones."""
MAY_BRANCH = {"model": {"loss", "activation_checkpointing"}, "optimizer": {"lr", "clip", "allow_unbalanced"}}
"""In what options of these two kinds a run may differ from the one that it branches from."""
LOCK_SECONDS = 15.0  # time for a run that is just ending to release the folder
JOB = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}


def check(run: Run) -> None:
    """Check that the run may use its folder. Nothing is changed.

    Raises:
        ConfigError: if the folder belongs to another run, holds files that are not a run's, or holds this run and
            ``--no-resume`` is given; or if the run can't branch from the one that it should.
    """
    out = run.out
    early = (*OURS_EARLY, "checkpoints") if run.checkpoints.branch_from else OURS_EARLY
    try:
        require(not out.exists() or out.is_dir(), f"out is {out}, which is a file; give a folder.")
        strangers = (
            sorted(p.name for p in out.iterdir() if p.name not in early and p.name[0] != ".") if out.exists() else []
        )
    except OSError as error:
        raise ConfigError(f"out is {out!s:.200}, which can't be used: {error.strerror}.") from None
    written = out / "run.json"
    if not written.exists():
        require(
            not strangers,
            f"out is {out}, which holds {', '.join(strangers[:1])} but no run; give a new or an empty folder.",
        )
        _check_parent(run)
        return
    ended = (out / "result.json").exists()
    # Whether a wsd run may be made longer from its newest checkpoint is found out when that is found.
    difference = difference_from(load_file(RunFile, written).identity, run.identity(), sys.maxsize if ended else 0)
    require(not difference, f"out is {out}, which belongs to a run with {difference}; give another folder.")
    require(
        run.checkpoints.resume,
        f"out is {out}, which holds this very run; drop --no-resume, or give another folder.",
    )


def claim(run: Run) -> FileLock:
    """Lock the run's folder until the lock is released or this process ends. Call this on one rank.

    What a run that was killed had half written is removed.

    Raises:
        ConfigError: as :func:`check`, or if another run is at work there.
    """
    check(run)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"Another run is at work in {run.out}; waiting {LOCK_SECONDS:.0f} s for it to end.", flush=True)
            lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ConfigError(
            f"out is {run.out}, where another run is at work now; wait for it, or give another folder."
        ) from None
    remove_temporaries(run.out)
    return lock


@contextmanager
def sole_worker(out: Path) -> Iterator[bool]:
    """Claim the right to start the run in ``out`` during the block; yields whether this process has it.

    No process has it while ranks of the run are at work, whether another worker, a batch system or a worker that was
    killed has started them.
    """
    out.mkdir(parents=True, exist_ok=True)
    ours, theirs = FileLock(out / ".worker"), FileLock(out / ".lock")
    try:
        ours.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        try:
            with theirs.acquire(timeout=0):
                pass
        except Timeout:
            yield False
            return
        yield True
    finally:
        ours.release()


def has_begun(out: Path) -> bool:
    """Whether a run has begun in ``out``, or is just starting there."""
    if (out / "run.json").exists():
        return True
    if not (out / ".worker").exists():
        return False
    try:
        with FileLock(out / ".worker").acquire(timeout=0):
            return False
    except Timeout:
        return True


def note(out: Path, event: str, **values: Any) -> None:
    """Append a line to attempts.jsonl: what happened, when, on which host and in which Slurm job."""
    job = {key: os.environ[name] for key, name in JOB.items() if name in os.environ}
    line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": event, **values}
    with (out / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({**line, "host": platform.node(), **job}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def describe(run: Run, facts: dict[str, Any], ds_config: dict[str, Any]) -> None:
    """Write run.json and ds_config.json. If run.json exists, check that the run began on the same tokens.

    Args:
        run: the options.
        facts: what run.json says beside the identity; see :class:`train.common.schemas.RunFile`.
        ds_config: that DeepSpeed was given.

    Raises:
        ConfigError: if the text or its tokenizer has changed since the run began.
    """
    written = run.out / "run.json"
    if before := begun(run.out):
        require(
            before.tokens == facts["tokens"],
            f"data is {run.data.data!r}, which has changed since the run in {run.out} began (or its tokenizer has); "
            "restore it, or give another folder.",
        )
        if difference_from(before.identity, run.identity()):  # a wsd run that was made longer
            write_json(written, {**before.model_dump(exclude_unset=True), "identity": run.identity()})
    else:
        write_json(written, {"identity": run.identity(), **facts, **environment_facts()})
    write_json(run.out / "ds_config.json", ds_config)


def resume_in_wandb(out: Path) -> None:
    """Have the next ``wandb.init`` go on with the run's own run in Weights & Biases, or begin it.

    Its id is drawn once, and is on disk before W&B learns of it. DeepSpeed hands ``wandb.init`` none, so it goes by the
    environment; what that says already counts. Call this on rank 0, before the engine is built.

    Raises:
        ConfigError: if wandb.json is damaged.
    """
    written = out / "wandb.json"
    if not written.exists():
        write_json(written, {"id": uuid.uuid4().hex})
    os.environ.setdefault("WANDB_RUN_ID", load_file(WandbFile, written).id)
    os.environ.setdefault("WANDB_RESUME", "allow")


def begun(out: Path) -> RunFile | None:
    """Return what run.json says of the run in ``out``; None if no run has begun there."""
    written = out / "run.json"
    return load_file(RunFile, written) if written.exists() else None


def _check_parent(run: Run) -> None:
    """Check that the run may go on with the state of the run that it branches from, if it does.

    Raises:
        ConfigError: if there is no such run, or the two differ in what gives the state its meaning.
    """
    parent, given = run.checkpoints.parent, run.checkpoints.branch_from
    if parent is None:
        return
    require((parent / "run.json").is_file(), f"branch_from is {given}, which is not a run's folder nor its checkpoint.")
    kept = []
    theirs = load_file(RunFile, parent / "run.json")
    named = ("sequence_length",) if theirs.tokenizer else ("tokenizer", "sequence_length")  # known by its content
    for identity in (theirs.identity, run.identity()):
        both: dict[str, Any] = {
            kind: {key: value for key, value in identity[kind].items() if key not in may}
            for kind, may in MAY_BRANCH.items()
        }
        both["data"] = {key: identity["data"][key] for key in named}
        kept.append({**both, "parallelism": {"batch": identity["parallelism"]["batch"]}})
    difference = difference_from(kept[0], kept[1])
    require(
        not difference,
        f"branch_from is {given}, of a run with {difference}; only schedule, lr, clip, data and seed may be others.",
    )


def difference_from(theirs: dict[str, Any], mine: dict[str, Any], step: int = sys.maxsize) -> str:
    """Return the first difference of two identities, such as "seed = 1, not 0"; empty if they are the same run.

    The path of a corpus makes no difference: its content identifies it. Nor does a wsd schedule's length, if neither
    has begun to decay after ``step`` steps.
    """
    theirs, mine = (json.loads(json.dumps(identity)) for identity in (theirs, mine))
    both = [data for identity in (theirs, mine) if isinstance(data := identity.get("data"), dict)]
    if len(both) == 2 and all(_is_path(data.get("data")) for data in both):
        for data in both:
            del data["data"]
    ends = [_end_of_stable(identity) for identity in (theirs, mine)]
    if step <= min(ends):
        for identity in (theirs, mine):
            identity["schedule"].update(steps=None, decay=None)
    found = next(_differences(theirs, mine), "")
    longer = found.startswith(("steps = ", "decay = ")) and min(ends) >= 0
    return f"{found} (it began to decay at step {min(ends)}; --branch-from an earlier checkpoint)" if longer else found


def _end_of_stable(identity: dict[str, Any]) -> int:
    """Return the step at which a wsd schedule begins to decay; -1 if it is another, or decides betas, too."""
    schedule, optimizer = identity.get("schedule", {}), identity.get("optimizer", {})
    if schedule.get("schedule") != "wsd" or isinstance(optimizer.get("betas"), str):
        return -1
    known = {field.name for field in dataclasses.fields(Schedule)}
    options = Schedule(**{key: value for key, value in schedule.items() if key in known})
    return options.steps - options.decay_steps


def _is_path(data: Any) -> bool:
    return isinstance(data, str) and data != "stdlib" and not data.startswith("hub:")


def _differences(theirs: Any, mine: Any, name: str = "") -> Any:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(k for k in mine if k not in theirs)]:
            yield from _differences(theirs.get(key), mine.get(key), key)
    elif theirs != mine:
        yield f"{name} = {json.dumps(theirs)}, not {json.dumps(mine)}"


def result(out: Path) -> dict[str, Any] | None:
    """Return the content of result.json of the run in ``out``, or None while the run has not ended.

    Raises:
        ConfigError: if the file is damaged.
    """
    file = out / "result.json"
    return load_file(ResultFile, file).model_dump(exclude_unset=True) if file.exists() else None
