"""A run's own folder: who may write there, what it says about itself, and its metrics.

run.json        what the run is (settings, command, versions), written when all of it has been found good
attempts.jsonl  one line for each start and each end of it: when, where, from which step, why it ended
ds_config.json  what DeepSpeed was given
metrics.jsonl   one line a step, and one a validation; a damaged line of it goes to metrics.damaged.jsonl when the run goes on
checkpoints/    see train.checkpoints
result.json   written last: how it ended
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.schemas import Kind, MetricsLine, ResultFile, RunFile, parse_schema, read_schema
from train.settings import Run, SettingsError, first_line, require

OURS_EARLY = (
    "log.txt",
    "monitor",
    "attempts.jsonl",
    "STOP",
)  # what may lie there before run.json, and names with a dot
METRICS, DAMAGED_METRICS = "metrics.jsonl", "metrics.damaged.jsonl"
LOCK_SECONDS = 15.0  # that a run which is just ending has to let go of the folder
JOB = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}
PACKAGES = ("balanced-adam", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it and rename it, so that nobody ever sees a part, also after a power cut."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # workers on several hosts may have one process number
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
        return file.tell(), digest.hexdigest()


def read(kind: type[Kind], path: Path) -> Kind:
    """The content of a file that this program has written.

    Raises:
        SettingsError: if somebody or something has damaged it.
    """
    try:
        return read_schema(kind, path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} can't be read: {first_line(error)}; restore it, or remove it.") from None


def environment() -> dict[str, Any]:
    """Command, versions and machine, for the reader of a result."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "machine": f"{platform.node()}: {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def check(run: Run) -> None:
    """See whether the run may use its folder; change nothing.

    Raises:
        SettingsError: if the folder belongs to another configuration or to nobody we know, or it holds a run that
            ``--no-resume`` would overwrite.
    """
    out = run.out
    try:
        require(not out.exists() or out.is_dir(), f"out is {out}, which is a file; give a folder.")
        strangers = (
            sorted(p.name for p in out.iterdir() if p.name not in OURS_EARLY and p.name[0] != ".")
            if out.exists()
            else []
        )
    except OSError as error:
        raise SettingsError(f"out is {out!s:.200}, which can't be used: {error.strerror}.") from None
    written = out / "run.json"
    if not written.exists():
        require(
            not strangers,
            f"out is {out}, which holds {', '.join(strangers[:1])} but no run; give a new or an empty folder.",
        )
        return
    difference = difference_from(read(RunFile, written).identity, run.identity())
    require(not difference, f"out is {out}, which belongs to a run with {difference}; give another folder.")
    require(
        run.checkpoints.resume,
        f"out is {out}, which holds this very run; drop --no-resume, or give another folder.",
    )


def claim(run: Run) -> FileLock:
    """Take the run's folder for this run alone, until the lock is released or this process ends. Call on one rank.

    Raises:
        SettingsError: as :func:`check`, or if another run is at work there.
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
        raise SettingsError(
            f"out is {run.out}, where another run is at work now; wait for it, or give another folder."
        ) from None
    return lock


@contextmanager
def sole_worker(out: Path) -> Iterator[bool]:
    """Whether this process alone is to start the run in ``out``, for as long as the block takes.

    Nobody is to while its ranks are at work: those of another worker, a batch system, or a worker that was killed.
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


def note(out: Path, event: str, **values: Any) -> None:
    """Append a line to attempts.jsonl: what happened, when, on which host and in which job of Slurm's."""
    job = {key: os.environ[name] for key, name in JOB.items() if name in os.environ}
    line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": event, **values}
    with (out / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({**line, "host": platform.node(), **job}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def describe(run: Run, tokens: str, ds_config: dict[str, Any]) -> None:
    """Write run.json and ds_config.json, or see that the run that is there is this one on the same text.

    Raises:
        SettingsError: if its text has changed since.
    """
    written = run.out / "run.json"
    if before := begun_on(run.out):
        require(
            before == tokens,
            f"data is {run.data.data!r}, which has changed since the run in {run.out} began (or its tokenizer has); restore it, "
            "or give another folder.",
        )
    else:
        write_json(written, {"identity": run.identity(), "tokens": tokens, **environment()})
    write_json(run.out / "ds_config.json", ds_config)


def begun_on(out: Path) -> str:
    """What the run in ``out`` trains on: the name of its folder of tokens; empty where no run has begun."""
    written = out / "run.json"
    return read(RunFile, written).tokens if written.exists() else ""


def difference_from(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """The first thing that makes another run of one, by their identities: "seed = 1, not 0"; empty if they are one run.

    Where a corpus lies makes none: it is known by its content.
    """
    theirs, mine = (json.loads(json.dumps(identity)) for identity in (theirs, mine))
    both = [data for identity in (theirs, mine) if isinstance(data := identity.get("data"), dict)]
    if len(both) == 2 and all(_is_path(data.get("data")) for data in both):
        for data in both:
            del data["data"]
    return next(_differences(theirs, mine), "")


def _is_path(data: Any) -> bool:
    return isinstance(data, str) and data != "stdlib" and not data.startswith("hub:")


def _differences(theirs: Any, mine: Any, name: str = "") -> Any:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(k for k in mine if k not in theirs)]:
            yield from _differences(theirs.get(key), mine.get(key), key)
    elif theirs != mine:
        yield f"{name} = {json.dumps(theirs)}, not {json.dumps(mine)}"


def result(out: Path) -> dict[str, Any] | None:
    """How the run in ``out`` ended, or None while it hasn't.

    Raises:
        SettingsError: if the file is damaged.
    """
    file = out / "result.json"
    return read(ResultFile, file).model_dump() if file.exists() else None


class Metrics:
    """metrics.jsonl: appended line by line; numbers that are not finite become null."""

    def __init__(self, out: Path, step: int) -> None:
        """Open the file, dropping what a run that was cut wrote after ``step``, where it goes on."""
        path = out / METRICS
        lines, damaged = _metrics(path)
        if damaged:
            with (out / DAMAGED_METRICS).open("ab") as file:
                file.writelines(line + b"\n" for line in damaged.values())
        kept = [line for line in lines if line["step"] <= step]
        if lines and not step:
            _tell_once(f"{out} has metrics up to step {lines[-1]['step']} and no checkpoint: it begins anew at step 0.")
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self.seconds = sum(line.get("step_seconds") or 0.0 for line in kept)
        """Time spent in training steps, also before a resume."""

    def sync(self) -> None:
        """Bring what was written to the disk.

        Raises:
            SettingsError: if it can't be.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SettingsError(f"{self._file.name} can't be written: {error.strerror}.") from None

    def write(self, **values: float | None) -> None:
        """Append one line and hand it to the operating system.

        Raises:
            SettingsError: if it can't be written.
        """
        self.seconds += values.get("step_seconds") or 0.0
        clean = {k: None if v is None or not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise SettingsError(f"{self._file.name} can't be written: {error.strerror}.") from None


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All whole lines of the run's metrics.jsonl; none if there is no such file. What is damaged is told and left out."""
    return _metrics(out / METRICS)[0]


def _metrics(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The whole lines, and those that are damaged, by number. The last one may have been cut with the run that wrote it."""
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    lines, damaged = [], {}
    for number, text in enumerate(texts, 1):
        try:
            lines.append(parse_schema(MetricsLine, text).model_dump(exclude_unset=True))
        except ValueError as error:
            if number < len(texts):
                _tell_once(f"{path} line {number} is damaged ({error}); it is left out.")
                damaged[number] = text
    return lines, damaged


@cache
def _tell_once(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole objects of a file with one a line; none if there is no such file."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [line for text in lines if (line := _object(text))]


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # the last line of a run that was cut
        return {}
    return content if isinstance(content, dict) else {}
