"""Requests to save and stop: signals, a file, or the death of the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

STOP_FILE = "STOP"  # a file in the run's folder that asks it to save and end


class StopRequest:
    """Asked to stop by SIGTERM or SIGUSR1, or by a file that somebody has made. The ranks have to agree on it at a step."""

    def __init__(self, file: Path | None) -> None:
        """From now on the signals only ask. ``file``: the one to look for, on one rank alone."""
        self.file, self.signal = file, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: object) -> None:
        self.signal = number

    def __bool__(self) -> bool:
        return bool(self.signal) or (self.file is not None and self.file.exists())


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when its launcher dies: an orphan would keep the run's folder to itself.

    (Linux only; the flag is PR_SET_PDEATHSIG of prctl(2).)
    """
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:  # it died meanwhile
        os.kill(os.getpid(), signal.SIGTERM)
