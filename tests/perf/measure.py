"""Interleaved timing: every contender once a round, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

WARM_UP = 2


class Times(NamedTuple):
    """Seconds of one contender, one number per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        return f"{self.median * 1e3:.1f} [{low * 1e3:.1f} .. {high * 1e3:.1f}]"


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Each contender's times over ``rounds`` rounds, after WARM_UP rounds that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(values[WARM_UP:]) for name, values in seconds.items()}


def ratio(other: list[float], ours: list[float]) -> str:
    """How many times longer the other takes: the median of the rounds' ratios."""
    return f"{statistics.median(a / b for a, b in zip(other, ours, strict=True)):.2f}"


def machine() -> str:
    """What ran, for the head of a report."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break

    def version_of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    packages = ", ".join(map(version_of, ("torch", "deepspeed")))
    return f"{date.today()}, {cpu}, {torch.get_num_threads()} threads, {packages}"
