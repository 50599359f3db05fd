"""metrics.jsonl: one line per step and per validation, appended as they happen."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from train.common.errors import ConfigError
from train.common.files import write_text
from train.common.schemas import MetricsLine, parse_schema

METRICS, DAMAGED_METRICS = "metrics.jsonl", "metrics.damaged.jsonl"
NAMED, TOKENS = "validation_loss/", "tokens/"
"""What the columns of validation sets with a name, and of the tokens by source, begin with."""
TAIL = 2**14
"""Bytes at the end of metrics.jsonl that hold its last lines."""


class Metrics:
    """Writes metrics.jsonl line by line. Numbers that are not finite become null."""

    def __init__(self, out: Path, step: int) -> None:
        """Open the file and drop the lines after ``step``, where the run resumes.

        Damaged lines are moved to metrics.damaged.jsonl.
        """
        path = out / METRICS
        lines, damaged = _metrics(path)
        if damaged:
            with (out / DAMAGED_METRICS).open("ab") as file:
                file.writelines(line + b"\n" for line in damaged.values())
        kept = [line for line in lines if line["step"] <= step]
        if lines and not step:
            _tell_once(f"{out} has metrics up to step {lines[-1]['step']} and no checkpoint: it restarts at step 0.")
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self.seconds = sum(line.get("step_seconds") or 0.0 for line in kept)
        """Time spent in training steps, including those before a resume."""

    def sync(self) -> None:
        """Flush what was written to disk (fsync).

        Raises:
            ConfigError: if that fails.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(f"{self._file.name} can't be written: {error.strerror}.") from None

    def write(self, **values: float | None) -> None:
        """Append one line and flush it to the operating system.

        Raises:
            ConfigError: if that fails.
        """
        self.seconds += values.get("step_seconds") or 0.0
        clean = {k: None if v is None or not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{self._file.name} can't be written: {error.strerror}.") from None


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the valid lines of the run's metrics.jsonl; none if there is no such file. Damaged lines are reported."""
    return _metrics(out / METRICS)[0]


def last_step(out: Path) -> int:
    """Return the step of the newest valid line of the run's metrics.jsonl, from the file's end; 0 if there is none."""
    try:
        with (out / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for text in reversed(lines):
        with suppress(ValueError):
            return parse_schema(MetricsLine, text).step
    return 0


def _metrics(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Return the valid lines, and the damaged ones by line number.

    An incomplete last line does not count as damaged, since the run may have been interrupted while writing it.
    """
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
