"""A run's own folder: who may write there, what it says about itself, and its metrics.

run.json      what the run is (settings, command, versions), written at the start
ds_config.json  what DeepSpeed was given
metrics.jsonl   one line a step, and one a validation
checkpoints/    see train.checkpoints
result.json   written last: how it ended
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.settings import Run, SettingsError, require

PACKAGES = ("balanced-adam", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file aside and rename it, so that a reader never sees a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    aside.replace(path)


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


def claim(run: Run) -> FileLock:
    """Take the run's folder for this run alone, until the lock is released or this process ends. Call on one rank.

    Raises:
        SettingsError: if another run is at work there, or the folder belongs to another configuration or to nobody we
            know, or it holds a run that ``--no-resume`` would overwrite. Nothing in it has changed then.
    """
    out = run.out
    require(not out.exists() or out.is_dir(), f"out is {out}, which is a file; give a folder.")
    written = out / "run.json"
    if out.exists() and not written.exists():
        strangers = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "log.txt"))
        require(
            not strangers,
            f"out is {out}, which holds {', '.join(strangers[:1])} but no run; give a new or an empty folder.",
        )
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingsError(
            f"out is {out}, where another run is at work now; wait for it, or give another folder."
        ) from None
    try:
        mine = json.loads(json.dumps(run.identity()))
        if not written.exists():
            write_json(written, {"identity": mine, **environment()})
            return lock
        difference = next(_differences(json.loads(written.read_text())["identity"], mine), None)
        require(difference is None, f"out is {out}, which belongs to a run with {difference}; give another folder.")
        require(
            run.checkpoints.resume,
            f"out is {out}, which holds this very run; drop --no-resume, or give another folder.",
        )
    except SettingsError:
        lock.release()
        raise
    return lock


def _differences(theirs: Any, mine: Any, name: str = "") -> Any:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(k for k in mine if k not in theirs)]:
            yield from _differences(theirs.get(key), mine.get(key), key)
    elif theirs != mine:
        yield f"{name} = {json.dumps(theirs)}, not {json.dumps(mine)}"


def result(out: Path) -> dict[str, Any] | None:
    """How the run in ``out`` ended, or None while it hasn't."""
    file = out / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


class Metrics:
    """metrics.jsonl: appended line by line; numbers that are not finite become null."""

    def __init__(self, out: Path, step: int) -> None:
        """Open the file, dropping what a run that was cut wrote after ``step``, where it goes on."""
        path = out / "metrics.jsonl"
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self._file = path.open("a")

    def write(self, **values: float | None) -> None:
        """Append one line and hand it to the operating system."""
        clean = {k: None if v is None or not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """All whole lines of the run's metrics.jsonl; none if there is no such file."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
