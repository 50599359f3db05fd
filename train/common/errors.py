"""User-facing errors, one sentence each, and the exit codes that go with them."""

from __future__ import annotations

import os
import reprlib

EXIT_RETRY = 75
"""Exit code of a run that did not finish but whose input is fine: start it again. (EX_TEMPFAIL of sysexits.h.)"""


class ConfigError(ValueError):
    """Invalid input, described in one sentence for the user. The process exits with code 2."""


class RetryError(ConfigError):
    """A condition that may be temporary: the same command may succeed later. The process exits with EXIT_RETRY."""


class RankError(ConfigError):
    """An error on this rank alone. The rank has to report it itself."""


class PeerLostError(RankError):
    """Another rank can't be reached. The process exits with EXIT_RETRY."""


class Preempted(Exception):
    """The run was asked to stop, has saved a checkpoint and has ended. It can be resumed."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def first_line(error: BaseException) -> str:
    """Return the first line of a library error's message, or the error's class name if it has no message."""
    if type(error).__name__ == "UnpicklingError":  # torch's message explains how to load it all the same
        return "a file holds more than tensors and plain data, or is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."


def shown(text: str) -> str:
    """Return a text in quotes, shortened in the middle where it is long. (That of balanced_adam imports torch.)"""
    short = reprlib.Repr()
    short.maxstring = 80
    return short.repr(text)


def why_not_loaded(name: str, error: BaseException) -> str:
    """Return why transformers can't load something by this name: a path, or a name on the Hugging Face hub."""
    if os.path.exists(name):  # noqa: PTH110 -- False for a name that is too long for a path
        return first_line(error).rstrip(".")
    return "there is no such folder, and no such name in the Hugging Face cache, or on the hub as far as it is reached"


def is_main_process() -> bool:
    """Return whether this is rank 0 in the launcher's environment: RANK (torchrun, deepspeed), SLURM_PROCID (srun)."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
