"""Requests to save and stop: signals, or a file."""

from __future__ import annotations

import signal
from pathlib import Path

STOP_FILE = "STOP"  # creating this file in the run's folder asks the run to save and stop


class StopRequest:
    """True once SIGTERM or SIGUSR1 was received or the stop file exists. The ranks have to agree on it at a step."""

    def __init__(self, file: Path | None) -> None:
        """Install the signal handlers, which only record the request.

        Args:
            file: the stop file to look for, on one rank; None on the others.
        """
        self.file, self.signal = file, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._heard)

    def _heard(self, number: int, _: object) -> None:
        self.signal = number

    def __bool__(self) -> bool:
        return bool(self.signal) or (self.file is not None and self.file.exists())
