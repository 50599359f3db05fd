"""Processes that must not outlive the one that has started them."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies: an orphan would keep files locked.

    Linux only: this is PR_SET_PDEATHSIG of prctl(2).
    """
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:  # the launcher died before the call
        os.kill(os.getpid(), signal.SIGTERM)
