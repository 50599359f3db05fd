"""Errors for the person who gave the input, one sentence each, and the exit codes that go with them."""

from __future__ import annotations

import os

EXIT_RETRY = 75
"""Exit code (EX_TEMPFAIL of sysexits.h) of a run that has not finished, through no fault of its input: start it again."""


class ConfigError(ValueError):
    """A bad input, in one sentence for the person who gave it. The process ends with exit code 2."""


class RetryError(ConfigError):
    """What may be over when the same command is started again. The process ends with EXIT_RETRY."""


class RankError(ConfigError):
    """One that this rank alone has met, and has to say itself."""


class PeerLostError(RankError):
    """Another rank can't be reached. The process ends with EXIT_RETRY."""


class Preempted(Exception):
    """A run that was asked to stop has saved and ended; it can go on."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or failing that its name."""
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]


def is_main_process() -> bool:
    """Whether this is rank 0, as far as its launcher has said so: torchrun and DeepSpeed in RANK, srun in SLURM_PROCID."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
