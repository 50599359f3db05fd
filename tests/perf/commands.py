"""Whole commands, measured with all of their processes."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import psutil


class Watched(NamedTuple):
    """What a command took."""

    seconds: float
    cpu: float
    """CPU seconds."""
    memory: float
    """Peak, in MiB; what processes share is counted once."""


def command(module: str, *options: object) -> list[str]:
    """The command line of a module."""
    return [sys.executable, "-m", module, *map(str, options)]


def watched(line: list[str], until: Callable[[], bool] = lambda: False, log: Path | None = None) -> Watched:
    """Run a command to its end, and measure it: its process and its children together.

    Args:
        line: the command.
        until: whether to kill all of its processes now (SIGKILL); asked five times a second.
        log: what it prints goes there.

    Raises:
        SystemExit: if it fails by itself.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, peak = time.monotonic(), 0
    with log.open("ab") if log else nullcontext(subprocess.DEVNULL) as file:
        process = subprocess.Popen(line, stdout=file, stderr=file)
        killed = False
        while process.poll() is None:
            try:
                one = psutil.Process(process.pid)
                tree = [*one.children(recursive=True), one]
                peak = max(peak, sum(each.memory_full_info().pss for each in tree))
                if until():
                    killed = True
                    for each in tree:
                        each.kill()
            except (psutil.Error, FileNotFoundError):
                continue
            time.sleep(0.2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode and not killed:
        raise SystemExit(f"{line} ended with {process.returncode}{f'; see {log}' if log else ''}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Watched(time.monotonic() - began, cpu, peak / 2**20)
