"""Costly values that many tests look at are worked out once a session, by the pytest-xdist worker that is first."""

from __future__ import annotations

import atexit
import os
import shutil
import traceback
from collections.abc import Callable
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ParamSpec, TypeVar

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")
VARIABLE = "BALANCED_ADAM_TESTS"


def folder() -> Path:
    """A folder of this session's, the same in all of its processes; it goes with the process that asked first."""
    if VARIABLE not in os.environ:
        made = os.environ[VARIABLE] = mkdtemp(prefix="balanced-adam-")
        (Path(made) / "owner").write_text(str(os.getpid()))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(os.environ[VARIABLE])


def shared(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Remember what the function returned for each of its arguments, or how it failed, for all workers.

    The first that asks works it out; the others wait, however long that takes. The value travels through torch.save.

    Raises:
        RuntimeError: from the function that is returned, with the traceback of the first failure.
    """
    import torch
    from filelock import FileLock

    @cache
    def outcome(*arguments: Any) -> tuple[Any, str]:
        digest = sha256(repr(arguments).encode()).hexdigest()[:12]
        file = folder() / f"{function.__module__}.{function.__qualname__}-{digest}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                value, error = None, ""
                try:
                    value = function(*arguments)  # type: ignore[call-arg]
                except KeyboardInterrupt:
                    raise
                except BaseException:  # pytest's own, too
                    error = traceback.format_exc()
                aside = file.with_suffix(".aside")
                torch.save((value, error), aside)
                aside.rename(file)
        return torch.load(file, weights_only=False)

    @wraps(function)
    def wrapper(*arguments: Arguments.args, **named: Arguments.kwargs) -> Value:
        assert not named, "give arguments by position"
        value, error = outcome(*arguments)
        if error:
            raise RuntimeError(f"{function.__name__} failed:\n{error}")
        return value

    return wrapper
