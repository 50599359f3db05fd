"""Warnings that come once a process, and from rank 0 alone."""

from __future__ import annotations

import warnings

import torch

_warned: set[str] = set()


def is_rank_0() -> bool:
    """Whether this process is rank 0 of its process group, or in none."""
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def warn_once(message: str, key: str = "") -> None:
    """Warn of this once a process, on rank 0; warnings with the same ``key`` count as one."""
    if (key or message) not in _warned and is_rank_0():
        warnings.warn(message, stacklevel=2)
    _warned.add(key or message)
